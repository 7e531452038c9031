"""Rows become conversations, conversations become rows of tokens; what is wrong is named."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmkit.config.chat import InstructTaskConfig, TooLong
from lmkit.data.chat import Conversation, Encoded, Turn, has_whole_answer
from lmkit.data.conversations import ChatBatches, chat_batch, conversation_of, fitted, packed, read_splits
from lmkit.data.rows import Record
from lmkit.errors import DataError
from lmkit.models.base import IGNORE

CHAT = InstructTaskConfig(data="x", messages="talk")


def example(length: int, answer: int, first: int = 0) -> Encoded:
    """ids of which the last ``answer`` are learnt."""
    ids = [99, *range(first, first + length - 1)]
    return Encoded(ids, [i >= length - answer for i in range(length)])


def message(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_messages_are_turns() -> None:
    talk = [message("system", "s"), *(message(r, f"{r}{i}") for i in (1, 2) for r in ("user", "assistant"))]
    found = conversation_of(Record("row 1", {"talk": talk}), CHAT)
    assert found == Conversation((Turn("user1", "assistant1"), Turn("user2", "assistant2")), "s")


@pytest.mark.parametrize(
    ("talk", "problem"),
    [
        (None, "row 1, column 'talk' is no list"),
        ([], "is no list"),
        (["hi"], "row 1, message 1 has no role and content"),
        ([message("user", "a")], "row 1: the roles are user; .*the assistant speaks last"),
        ([message("system", "a")], "the roles are system only"),
        ([message("user", "a"), message("user", "b"), message("assistant", "c")], "must take turns"),
        ([message("user", "a"), message("assistant", " \n")], "row 1: answer 1 is empty"),
        ([message("user", None), message("assistant", "b")], "row 1, message 1, content holds null"),
        ([message("user", "a\0"), message("assistant", "b")], "NUL"),
    ],
)
def test_what_is_no_conversation_is_named(talk: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        conversation_of(Record("row 1", {"talk": talk}), CHAT)


def test_an_empty_answer_and_a_missing_column_are_named() -> None:
    config = InstructTaskConfig(data="x")
    with pytest.raises(DataError, match="row 1, column 'response' is empty"):
        conversation_of(Record("row 1", {"prompt": "a", "response": " "}), config)
    with pytest.raises(DataError, match="row 1 has no column 'response' but prompt, answer"):
        conversation_of(Record("row 1", {"prompt": "a", "answer": "b"}), config)


def test_equal_examples_are_never_both_in_train_and_valid(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(i % 40), "response": "x"}) + "\n" for i in range(200)))
    config = InstructTaskConfig(data=str(path), valid_fraction=0.1)
    train, valid = read_splits(config, lambda record: conversation_of(record, config))
    assert (len(train), len(valid)) == (180, 20)
    assert not set(train) & set(valid)


def test_a_single_example_cannot_be_held_out(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "x"}) + "\n")
    config = InstructTaskConfig(data=str(path))
    with pytest.raises(DataError, match="only one example"):
        read_splits(config, lambda record: conversation_of(record, config))


def test_long_examples_are_refused_left_out_or_cut() -> None:
    long = example(10, answer=4)
    assert fitted(long, 9, TooLong.error) is long
    with pytest.raises(ValueError, match=r"9 tokens do not fit into train.seq_len=6"):
        fitted(long, 6, TooLong.error)
    assert fitted(long, 6, TooLong.drop) is None
    left, right = fitted(long, 6, TooLong.left), fitted(long, 7, TooLong.right)
    assert left == Encoded([99, *range(3, 9)], [False] * 3 + [True] * 4)
    assert right == Encoded([99, *range(7)], [False] * 6 + [True] * 2)
    assert fitted(long, 5, TooLong.right) is None


@pytest.mark.parametrize(
    ("seq_len", "policy", "whole"),
    [
        (7, TooLong.right, True),
        (6, TooLong.right, False),
        (6, TooLong.left, True),
        (3, TooLong.left, False),
        (2, TooLong.left, False),
    ],
    ids=["not cut", "without its end token", "without some of the prompt", "without all of it", "without its start"],
)
def test_an_answer_is_whole_with_its_end_and_something_that_it_answers(
    seq_len: int, policy: TooLong, whole: bool
) -> None:
    cut = fitted(Encoded([99, 1, 2, 3, 4, 5, 6, 99], [False] * 5 + [True] * 3), seq_len, policy)
    assert cut is not None
    assert has_whole_answer(cut, 99) is whole


def test_of_a_conversation_that_was_cut_in_a_prompt_the_last_answer_is_whole() -> None:
    turns = Encoded([99, 1, 5, 99, 2, 6, 99], [False, False, True, True, False, True, True])
    cut = fitted(turns, 4, TooLong.right)
    assert cut is not None
    assert has_whole_answer(cut, 99)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 40))
def test_packing_puts_each_example_into_one_row_that_holds_it(lengths: list[int], room: int) -> None:
    rows = packed(lengths, room)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= room for row in rows)
    spare = sorted(room - sum(lengths[i] for i in row) for row in rows)
    assert len(rows) == 1 or spare[-1] + spare[-2] < room, "two rows would fit into one"


@pytest.mark.parametrize("room", [None, 25], ids=["one a row", "packed"])
def test_every_answer_token_is_a_target_once_an_epoch(room: int | None) -> None:
    examples = [example(5 + i % 7, answer=2 + i % 3, first=100 * i) for i in range(23)]
    batches = ChatBatches(examples, 99, batch_size=4, room=room, seed=3)
    expected = Counter(i for e in examples for i, learnt in zip(e.ids, e.learnt, strict=True) if learnt)
    orders = []
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        targets = [i for step in steps for row in batches[step].targets_BT.tolist() for i in row if i != IGNORE]
        assert Counter(targets) == expected
        orders.append(targets)
    assert orders[0] != orders[1]
    again = ChatBatches(examples, 99, batch_size=4, room=room, seed=3)[5]
    assert torch.equal(again.inputs_BT, batches[5].inputs_BT)
    with pytest.raises(IndexError):
        batches[-1]


def test_a_row_of_several_examples_numbers_them() -> None:
    batch = chat_batch([[example(4, 2), example(3, 1, first=50)], [example(3, 1)]], 99, packing=True)
    assert batch.inputs_BT.tolist() == [[99, 0, 1, 99, 50], [99, 0, 99, 99, 99]]
    assert batch.targets_BT.tolist() == [[IGNORE, 1, 2, IGNORE, 51], [IGNORE, 1, IGNORE, IGNORE, IGNORE]]
    assert batch.segments_BT is not None
    assert batch.segments_BT.tolist() == [[0, 0, 0, 1, 1], [0, 0, -1, -1, -1]]
    assert batch.num_targets == 4
    cut = batch.cut(slice(1, 2), torch.device("cpu"))
    assert cut.num_targets == 1
    assert cut.scored_N is not None
    assert cut.scored_N.tolist() == [1]
    assert batch.rows(str)[1] == {"row": 1, "text": "[99, 0, 99, 99, 99]", "ids": [1]}

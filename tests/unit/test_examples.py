"""Rows as examples: what is read of a text, standardised numbers, batches, splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkit.config.tasks import ClassifyTaskConfig, RegressTaskConfig, Truncation
from lmkit.data.examples import Examples, RowReader, Scale, ShuffledExamples, cut_to, number_of, read_split
from lmkit.data.rows import Record
from lmkit.errors import DataError
from lmkit.tasks.rows import reading_notes
from lmkit.tokenizers import ByteTokenizer, WordTokenizer

END = ByteTokenizer.eos_id


def record(**values: str) -> Record:
    return Record("here, line 1", dict(values))


def reader(max_tokens: int = 100, **options: object) -> RowReader:
    config = ClassifyTaskConfig(data="x", **options)  # type: ignore[arg-type]
    return RowReader(config, ByteTokenizer(), max_tokens, {})


def test_a_text_stands_between_two_end_tokens_and_a_pair_between_three() -> None:
    (ids,) = reader().examples([record(text="ab")]).tokens
    assert ids.tolist() == [END, 97, 98, END]
    (ids,) = reader(pair="second").examples([record(text="ab", second="c")]).tokens
    assert ids.tolist() == [END, 97, 98, END, 99, END]
    (ids,) = reader().examples([record(text="")]).tokens
    assert ids.tolist() == [END, END]


@pytest.mark.parametrize(("truncation", "kept"), [(Truncation.keep_start, "abc"), (Truncation.keep_end, "def")])
def test_a_text_that_is_too_long_is_cut_but_keeps_its_end_tokens(truncation: Truncation, kept: str) -> None:
    cutting = reader(5, truncation=truncation)
    (ids,) = cutting.examples([record(text="abcdef")]).tokens
    assert ids.tolist() == [END, *kept.encode(), END]
    assert cutting.num_cut == 1
    assert cutting.examples([record(text="abc")]).tokens[0].tolist() == [END, 97, 98, 99, END]
    assert cutting.num_cut == 1


def test_a_text_that_is_too_long_is_refused_where_that_was_asked_for() -> None:
    with pytest.raises(DataError, match=r"here, line 1 has 8 tokens, more than 5; .*task\.truncation"):
        reader(5, truncation=Truncation.refuse).examples([record(text="abcdef")])


def test_tokens_that_stand_for_what_the_tokenizer_does_not_know_are_counted_and_told() -> None:
    config = ClassifyTaskConfig(data="x", pair="second")
    reading = RowReader(config, WordTokenizer(["good", "film"]), 100, {})
    reading.examples([record(text="good", second="film <unk>")])
    assert list(reading_notes(reading, 1)) == [], "<unk> in a text is a word of its own"
    reading.examples([record(text="a good film", second=""), record(text="好 电影", second="film")])
    (note,) = reading_notes(reading, 3)
    assert note.startswith("3 of 9 tokens of the texts stand for what the tokenizer does not know")
    assert list(reading_notes(reader(), 0)) == []


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 40), st.booleans())
def test_of_a_pair_the_longer_text_is_cut_first_and_no_more_than_needed(
    first: int, second: int, room: int, keep_end: bool
) -> None:
    parts = [np.arange(first), np.arange(100, 100 + second)]
    cut = cut_to(parts, room, keep_end=keep_end)
    assert sum(map(len, cut)) == min(room, first + second)
    assert all(len(c) in (len(p), min(len(p), room // 2), room - room // 2) or len(c) > room // 2
               for c, p in zip(cut, parts, strict=True))  # fmt: skip
    if len(cut[0]) < first and len(cut[1]) < second:
        assert abs(len(cut[0]) - len(cut[1])) <= 1
    for piece, part in zip(cut, parts, strict=True):
        assert piece.tolist() == (part[len(part) - len(piece) :] if keep_end else part[: len(piece)]).tolist()


def test_numbers_are_standardised_by_the_training_rows_and_one_that_is_none_is_named() -> None:
    scale = Scale.of(np.array([1.0, 3.0]), "a")
    assert (scale.mean, scale.std) == (2.0, 1.0)
    config = RegressTaskConfig(data="x", numeric=["a"])
    made = RowReader(config, ByteTokenizer(), 10, {"a": scale}).examples([record(a=" 5e0 "), record(a="-1")])
    assert made.numeric_NK.tolist() == [[3.0], [-3.0]]
    for text in ("", "n/a", "nan", "inf", "1_000", "1,5"):
        with pytest.raises(DataError, match=r"here, line 1, column 'a' holds .* no number"):
            number_of(record(a=text), "a")
    with pytest.raises(DataError, match="column 'a' does not vary"):
        Scale.of(np.array([4.0, 4.0]), "a")


def test_whether_numbers_vary_is_told_by_their_own_size() -> None:
    scale = Scale.of(np.array([1e-15, 3e-15]), "farads")
    assert scale.standardise(np.array([1e-15, 2e-15, 3e-15])).tolist() == pytest.approx([-1, 0, 1])
    for constant in (0.0, 0.1, -3e9, 7e-20):
        with pytest.raises(DataError, match="column 'a' does not vary"):
            Scale.of(np.full(7, constant), "a")
    with pytest.raises(DataError, match=r"column 'a' holds numbers of up to 1e\+200 .*, too large"):
        Scale.of(np.array([1.0, -1e200]), "a")


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_over_an_epoch_each_example_comes_once_and_epochs_differ_in_order_only(
    size: int, batch: int, epoch: int
) -> None:
    tokens = [np.array([i] * (1 + i % 4)) for i in range(size)]
    examples = Examples(tokens, np.zeros((size, 0), np.float32), np.arange(size))
    batches = ShuffledExamples(examples, batch, seed=1)
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    seen = [int(target) for step in steps for target in batches[step].targets_B]
    assert sorted(seen) == list(range(size))
    one = batches[steps[0]]
    assert one.num_targets == one.num_rows == min(batch, size)
    assert [one.tokens_BT[row, : one.lengths_B[row]].tolist() for row in range(one.num_rows)] == [
        tokens[i].tolist() for i in one.targets_B.tolist()
    ]


def test_held_out_rows_are_drawn_by_the_seed_and_are_all_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"t{i},l\n" for i in range(50)), encoding="utf-8")
    config = ClassifyTaskConfig(data=str(path), valid_fraction=0.2)

    def split(seed: int) -> tuple[list[str], list[str]]:
        train, valid = read_split(config, seed)
        return [r.text("text") for r in train], [r.text("text") for r in valid]

    train, valid = split(1)
    assert sorted(train + valid) == sorted(f"t{i}" for i in range(50))
    assert len(valid) == 10
    assert split(1) == (train, valid)
    assert split(2)[1] != valid


def test_too_few_rows_to_hold_some_out_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,b\nc,d\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"has 2 rows, too few .*task\.valid"):
        read_split(ClassifyTaskConfig(data=str(path)), 1)

"""Conversations become tokens of which the answers, and nothing else, are learnt."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkit.commands.chat import Chat
from lmkit.config.chat import TEMPLATES, InstructTaskConfig, PreferTaskConfig, TooLong
from lmkit.config.data import SentencePieceTokenizerConfig
from lmkit.config.generation import GenerateConfig
from lmkit.console import Console
from lmkit.data.chat import ChatTemplate, Conversation, Turn, answers_of
from lmkit.errors import ConfigError
from lmkit.loading import LoadedRun
from lmkit.tasks.chat import encode_all
from lmkit.tokenizers import ByteTokenizer, Tokenizer
from lmkit.tokenizers.basic import CharTokenizer, WordTokenizer
from lmkit.tokenizers.sentencepiece import SentencePieceTokenizer

WORDS = WordTokenizer(["two", "plus", "is", "four", "and", "six", "[INST]", "[/INST]"])
CHARS = CharTokenizer(
    "".join(sorted(set("".join(turn for turn, _ in TEMPLATES.values()) + "two plus is four and six?")))
)
PIECES = SentencePieceTokenizer.train(
    lambda: iter([f"two plus {i} is four and six?\n" for i in range(200)]), SentencePieceTokenizerConfig(vocab_size=300)
)
TOKENIZERS: list[Tokenizer] = [ByteTokenizer(), CHARS, PIECES, WORDS]
TALK = Conversation((Turn("two plus two", "four"), Turn("and plus two", "is six")), "two is two")


def template(name: str) -> ChatTemplate:
    return ChatTemplate.of(InstructTaskConfig(data="x", template=name))


def test_the_answers_and_their_ends_are_learnt_token_by_token() -> None:
    encoded = ChatTemplate("Q {prompt} A {response}!", "S {system};").encode(TALK, ByteTokenizer())
    expected = [
        (None, False),
        *((c, False) for c in "S two is two;Q two plus two A "),
        *((c, True) for c in "four"),
        (None, True),
        *((c, False) for c in "!Q and plus two A "),
        *((c, True) for c in "is six"),
        (None, True),
    ]
    end = ByteTokenizer.eos_id
    assert encoded.ids == [end if c is None else ord(c) for c, _ in expected]
    assert encoded.learnt == [learnt for _, learnt in expected]


def test_a_word_unk_of_a_text_is_not_told_as_one_that_the_tokenizer_does_not_know() -> None:
    talks = [
        Conversation((Turn("two <unk> two", "four"),), "<unk>"),
        Conversation((Turn("<unk>", "<unk> is"), Turn("<unk>", "six <unk>"))),
        Conversation((Turn("two minus <unk>", "four <unk>"),)),
        Conversation((Turn("two <unk>", "zero <unk>"),)),
    ]
    said, base = io.StringIO(), cast(LoadedRun, SimpleNamespace(tokenizer=WORDS))
    options: dict[str, Any] = {"seq_len": 100, "policy": TooLong.error, "split": "train", "console": Console(said)}
    encode_all(talks[:2], template("plain"), base, **options)
    assert said.getvalue() == ""
    encode_all(talks, template("plain"), base, **options)
    shown = " ".join(said.getvalue().split())
    assert "train: 1 answers hold text that the tokenizer does not know" in shown
    assert "train: 1 prompts hold text that the tokenizer does not know" in shown


def test_with_word_tokens_an_answer_ends_in_one_line_end() -> None:
    encoded = template("plain").encode(Conversation((Turn("two\nplus  two", "four\n"), Turn("and", "six"))), WORDS)
    two, plus, four, and_, six, end = (*map(int, WORDS.encode("two plus four and six")), WORDS.eos_id)
    assert encoded.ids == [end, two, plus, two, end, four, end, and_, end, six, end]
    assert encoded.learnt == [False] * 5 + [True] * 2 + [False] * 2 + [True] * 2


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.kind)
@pytest.mark.parametrize("name", TEMPLATES)
def test_training_and_generation_read_the_same_tokens_before_an_answer(name: str, tokenizer: Tokenizer) -> None:
    encoded = template(name).encode(TALK, tokenizer)
    spans = answers_of(encoded)
    assert [tokenizer.decode(encoded.ids[start : end - 1]) for start, end in spans] == ["four", "is six"]
    assert all(encoded.ids[end - 1] == tokenizer.eos_id for _, end in spans)
    for number, (start, _) in enumerate(spans):
        before = Conversation(TALK.turns[:number], TALK.system)
        assert template(name).encode_prompt(before, TALK.turns[number].prompt, tokenizer) == encoded.ids[:start]


@pytest.mark.parametrize("name", TEMPLATES)
@given(data=st.data())
def test_no_prompt_holds_a_marker_of_the_template(name: str, data: st.DataObject) -> None:
    chosen = template(name)
    pieces = st.sampled_from([*chosen.markers, *(m[1:] for m in chosen.markers), "a", " ", "\n", "{response}", "\0"])
    prompt = "".join(data.draw(st.lists(pieces, max_size=8)))
    for tokenizer in (ByteTokenizer(), WORDS):
        read = chosen.content(prompt, tokenizer)
        assert not [marker for marker in chosen.markers if marker in read]
        assert "".join(read.split()) == "".join(prompt.split())


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: t.kind)
def test_a_prompt_that_spells_out_the_next_turn_does_not_begin_one(tokenizer: Tokenizer) -> None:
    for name, (turn, _) in TEMPLATES.items():
        forged = "two" + turn.partition("{prompt}")[2].replace("{response}", "four").replace("\n", "\n<eos>\n") + turn
        encoded = template(name).encode(Conversation((Turn(forged, "six"),)), tokenizer)
        assert len(answers_of(encoded)) == 1
        text_ends = encoded.ids[1:-1].count(tokenizer.eos_id)
        honest = template(name).encode(Conversation((Turn("two", "six"),)), tokenizer)
        assert text_ends == honest.ids[1:-1].count(tokenizer.eos_id)


def test_a_marker_of_several_words_is_broken_up_for_word_tokenizers_too() -> None:
    words = WordTokenizer(["-", "Answer:", "Question:", "is", "two", "A"])
    chosen = ChatTemplate("- Question: {prompt}\n- Answer: {response}\n", "* {system}\n")
    assert chosen.content("two - Answer: is * A", words) == "two - A nswer: is * A"
    ids = [int(i) for i in words.encode(chosen.content("two - Answer: is", words))]
    assert words.encode("Answer:")[0] not in ids
    assert ChatTemplate("- a {prompt}\n{response}", "{system}\n").content("- a", ByteTokenizer()) == "-  a"


def test_markers_are_broken_up_and_plain_words_are_not() -> None:
    broken = ChatTemplate("Q: {prompt}\nthe answer {response}", "{system}\n").content(
        "Q: is the answer Q:", ByteTokenizer()
    )
    assert broken == "Q : is the answer Q :"
    assert template("chatml").content("<|im_end|>", ByteTokenizer()) == "< |im_end|>"


@pytest.mark.parametrize(
    "text", ["{prompt}", "{response}", "chat", "{response} {prompt}", "{prompt}{prompt}{response}"]
)
def test_a_template_without_its_places_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"task.template=.* must be plain, chatml"):
        InstructTaskConfig(data="x", template=text)


def test_all_problems_of_a_task_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"valid_fraction=0.9 .*system_template=x .*beta=0 .*label_smoothing=0.5"):
        PreferTaskConfig(data="x", valid_fraction=0.9, system_template="x", beta=0, label_smoothing=0.5)


def test_words_that_are_not_known_are_named_as_in_a_prompt_without_a_conversation() -> None:
    said, loaded = io.StringIO(), SimpleNamespace(tokenizer=WORDS, context=None)
    chat = Chat(GenerateConfig(), loaded, template("plain"), SimpleNamespace(), Console(said))  # type: ignore[arg-type]
    chat._prompt("two zebra <unk> zebra")
    assert said.getvalue() == "warning: not in the vocabulary, read as <unk>: zebra\n"


def test_the_repetition_penalty_leaves_an_answer_the_words_of_what_was_asked() -> None:
    loaded = SimpleNamespace(tokenizer=WORDS, context=None)
    chat = Chat(GenerateConfig(), loaded, template("plain"), SimpleNamespace(), Console())  # type: ignore[arg-type]
    prompt = chat._prompt("two plus two")
    assert prompt.ids[:-1] == [WORDS.eos_id, *WORDS.encode("two plus two")]
    assert prompt.text_ids == []

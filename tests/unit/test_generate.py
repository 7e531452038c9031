"""Generation: the state gives what full passes give, text comes in whole characters, and samples are independent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmkit.config.generation import SamplingConfig
from lmkit.config.machine import Precision
from lmkit.config.model import Cell, ModelConfig, RecurrentConfig, TransformerConfig
from lmkit.device import Device
from lmkit.errors import DivergedError
from lmkit.evaluation.plan import Segments, sliding
from lmkit.evaluation.scoring import score
from lmkit.generate import MAX_BATCH, Sample, generate, read_prompt, unknown_words
from lmkit.models.base import Head, LanguageModel, Scores, State
from lmkit.models.stepping import MIN_TOKENS
from lmkit.sampling import sample as draw
from lmkit.tasks.chat import greedy_answers
from lmkit.tokenizers import ByteTokenizer, CharTokenizer, HfTokenizer, Tokenizer, WordTokenizer
from lmkit.tokenizers.convert import hf_json

CPU = Device(torch.device("cpu"), Precision.fp32, False, False, "cpu")
BYTES = ByteTokenizer()
WORDS = WordTokenizer(["the", "company", "said", "it", "would"])
GREEDY = SamplingConfig(temperature=0.0)
CONTEXT = 12


@dataclass(frozen=True)
class Read(State):
    """How many tokens were read."""

    num: int

    def detach(self) -> Read:
        return self

    def select(self, rows: Tensor) -> Read:
        return self


class OneHot(Head):
    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def loss(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        raise AssertionError("not needed")

    def score(self, hidden_ND: Tensor, targets_N: Tensor) -> Scores:
        raise AssertionError("not needed")

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return 1e4 * torch.nn.functional.one_hot(hidden_ND[:, 0].long(), self.vocab_size).float()


class Script(LanguageModel):
    """Says the same tokens whatever the prompt of ``num_read`` tokens was, and zeros behind them."""

    def __init__(self, tokenizer: Tokenizer, script: Sequence[int], num_read: int = 1) -> None:
        super().__init__()
        self.vocab_size, self.context, self.head = tokenizer.vocab_size, None, OneHot(tokenizer.vocab_size)
        self.script = torch.tensor([*[0] * (num_read - 1), *script, *[0] * 100])

    def forward(self, tokens_BT: Tensor, state: Any = None, *, use_state: bool = False) -> tuple[Tensor, Any]:
        start = 0 if state is None else state.num
        end = start + tokens_BT.shape[1]
        return self.script[start:end].expand(len(tokens_BT), -1)[..., None], Read(end)


def say(tokenizer: Tokenizer, script: Sequence[int], **options: Any) -> tuple[Sample, list[str]]:
    """What comes out when the model says ``script`` after an empty prompt, and the pieces it comes in."""
    pieces: list[str] = []
    options.setdefault("max_new_tokens", len(script))
    prompt = read_prompt(tokenizer, "", context=None, max_new_tokens=options["max_new_tokens"])
    model = Script(tokenizer, script)
    (sample,) = generate(model, tokenizer, prompt, sampling=GREEDY, device=CPU, on_text=pieces.append, **options)
    assert "".join(pieces) == sample.text
    assert all(pieces)
    return sample, pieces


def build(config: ModelConfig, vocab_size: int) -> LanguageModel:
    model = config.build(vocab_size, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8.0)  # so that it does not say the same word for ever
    return model.eval()


def models() -> list[Any]:
    size = {"d_embed": 8, "d_hidden": 12}
    return [
        pytest.param(TransformerConfig(d_model=16, num_layers=2, num_heads=2, context=CONTEXT), id="transformer"),
        pytest.param(RecurrentConfig(cell=Cell.lstm, **size), id="lstm"),
        pytest.param(RecurrentConfig(cell=Cell.gru, **size), id="gru"),
    ]


def run(
    model: LanguageModel, tokenizer: Tokenizer, text: str, sampling: SamplingConfig, **options: Any
) -> list[Sample]:
    prompt = read_prompt(tokenizer, text, context=model.context, max_new_tokens=options["max_new_tokens"])
    return generate(model, tokenizer, prompt, sampling=sampling, device=CPU, **options)


@pytest.mark.parametrize("config", models())
def test_decoding_with_the_state_is_greedy_search_by_full_passes_past_the_context_too(config: ModelConfig) -> None:
    model = build(config, WORDS.vocab_size)
    (sample,) = run(model, WORDS, "the company", GREEDY, max_new_tokens=40)
    everything = [WORDS.eos_id, *WORDS.encode("the company").tolist()]
    window_start = 0
    for _ in range(40):
        if model.context is not None and len(everything) - window_start > model.context:
            window_start = len(everything) - model.context // 2
        hidden_BTD, _ = model(torch.tensor([everything[window_start:]]))
        everything.append(int(model.head.logits(hidden_BTD[:, -1]).argmax()))
    assert "the company" + sample.text == WORDS.decode(everything[1:])
    assert (sample.num_tokens, sample.finish) == (40, "length")
    assert model.context is None or len(set(everything[-CONTEXT:])) > 3, "it does not show which words were read again"


@pytest.mark.parametrize("config", models())
@pytest.mark.parametrize("num_samples", [1, 2, MAX_BATCH + 3])
def test_a_sample_depends_on_seed_prompt_and_its_number_only(config: ModelConfig, num_samples: int) -> None:
    model = build(config, WORDS.vocab_size)
    options = {"max_new_tokens": 20, "seed": 5}
    few = run(model, WORDS, "it said", SamplingConfig(), num_samples=num_samples, **options)
    torch.randn(10)  # a draw elsewhere has no influence
    many = run(model, WORDS, "it said", SamplingConfig(), num_samples=MAX_BATCH + 3, **options)
    assert few == many[:num_samples]
    assert len({sample.text for sample in many}) > MAX_BATCH // 2


@pytest.mark.parametrize("change", [{"seed": 6}, {"prompt_index": 1}])
def test_another_seed_or_prompt_index_gives_another_sample(change: dict[str, int]) -> None:
    model = build(RecurrentConfig(d_embed=8, d_hidden=8), WORDS.vocab_size)
    first = run(model, WORDS, "it said", SamplingConfig(), max_new_tokens=20, seed=5)
    assert first != run(model, WORDS, "it said", SamplingConfig(), max_new_tokens=20, **{"seed": 5, **change})


def test_text_is_streamed_in_whole_characters() -> None:
    text = "naïve 我喜欢学习 🙂!"
    sample, pieces = say(BYTES, BYTES.encode(text).tolist())
    assert sample.text == text
    assert pieces == list(text)


def test_bytes_that_are_not_utf8_become_replacement_characters() -> None:
    sample, _ = say(BYTES, [*BYTES.encode("a").tolist(), *BYTES.encode("我").tolist()[:2]])
    assert sample.text == "a\N{REPLACEMENT CHARACTER}"


@given(st.lists(st.integers(0, BYTES.vocab_size - 1), max_size=20))
@settings(max_examples=60, deadline=None)
def test_the_pieces_of_any_tokens_join_to_their_decoding(script: list[int]) -> None:
    sample, _ = say(BYTES, script, stop_at_eos=False)
    assert sample.text == BYTES.decode(script)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@settings(max_examples=100, deadline=None)
def test_a_sample_ends_before_the_first_stop_string_and_no_piece_goes_beyond(text: str, stop: list[str]) -> None:
    sample, _ = say(BYTES, BYTES.encode(text).tolist(), stop=stop)
    ends = [text.index(s) + len(s) for s in stop if s in text]
    # Text is read left to right, so the stop string that is complete first ends it.
    expected = (
        text if not ends else min(text[: min(ends)].removesuffix(s) for s in stop if text[: min(ends)].endswith(s))
    )
    assert sample.text == expected
    assert sample.finish == ("stop" if ends else "length")
    assert not any(s in sample.text for s in stop)


@given(st.lists(st.integers(1, 5), max_size=6), st.lists(st.text("ab \n", min_size=1, max_size=5), max_size=3))
@settings(max_examples=100, deadline=None)
def test_where_a_sample_ends_does_not_depend_on_how_much_text_a_token_brings(ids: list[int], stop: list[str]) -> None:
    words = WordTokenizer(["a", "abba", "baab", "aabab"])
    text = words.decode(ids)
    assert say(words, ids, stop=stop)[0].text == say(BYTES, BYTES.encode(text).tolist(), stop=stop)[0].text
    assert say(words, [5], stop=["aabab", "ba"])[0].text == "aa"


def test_a_possible_beginning_of_a_stop_string_is_held_back_until_it_is_decided() -> None:
    sample, pieces = say(BYTES, BYTES.encode("one enough end").tolist(), stop=["end"])
    assert sample == Sample("one enough ", 14, "stop")
    assert pieces == ["o", "n", "e ", "eno", "u", "g", "h", " "]


def test_an_end_of_document_ends_a_sample_unless_it_is_told_not_to() -> None:
    script = [*BYTES.encode("ab").tolist(), BYTES.eos_id, *BYTES.encode("cd").tolist()]
    assert say(BYTES, script)[0] == Sample("ab", 2, "eos")
    assert say(BYTES, script, stop_at_eos=False)[0] == Sample("abcd", 5, "length")


def test_the_eos_of_a_word_tokenizer_only_ends_a_line() -> None:
    script = [2, 3, WORDS.eos_id, 2]
    assert say(WORDS, script)[0] == Sample("the company\nthe", 4, "length")


def test_a_decoder_that_gives_its_text_at_the_end_does_not_repeat_the_prompt() -> None:
    vocab = {"[UNK]": 0, "the": 1, "cat": 2, "##s": 3}
    spec = {
        "version": "1.0",
        "model": {"type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
        | {"max_input_chars_per_word": 100},
        "pre_tokenizer": {"type": "Whitespace"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    }
    pieces = HfTokenizer(json.dumps(spec).encode())
    prompt = read_prompt(pieces, "the cat", context=None, max_new_tokens=9)
    options: dict[str, Any] = {"sampling": GREEDY, "device": CPU, "max_new_tokens": 3, "num_samples": 2}
    said = generate(Script(pieces, [3, 1, 2], num_read=3), pieces, prompt, **options)
    assert said == [Sample("s the cat", 3, "length")] * 2
    said = generate(Script(pieces, [3, 1, 2], num_read=3), pieces, prompt, stop=["the"], **options)
    assert said == [Sample("s ", 3, "stop")] * 2


def test_the_samples_of_a_batch_end_each_on_its_own() -> None:
    model = build(RecurrentConfig(d_embed=8, d_hidden=8), BYTES.vocab_size)
    with torch.no_grad():
        model.head.bias[BYTES.eos_id] = 4.0  # type: ignore[index, union-attr]
    samples = run(model, BYTES, "", SamplingConfig(), max_new_tokens=30, num_samples=20)
    assert len({s.num_tokens for s in samples}) > 3
    for sample in samples:
        assert sample.num_tokens < 30 or sample.finish == "length"


@pytest.mark.parametrize("config", models())
@pytest.mark.parametrize("length", [MIN_TOKENS - 1, 2 * MIN_TOKENS])
def test_what_the_others_say_is_the_same_when_samples_that_have_ended_are_left_out(
    config: ModelConfig, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows: list[int] = []

    def counted(logits_NV: Tensor, *rest: Any) -> Tensor:
        num_rows.append(len(logits_NV))
        return draw(logits_NV, *rest)

    model = build(config, WORDS.vocab_size)
    options: dict[str, Any] = {"max_new_tokens": length, "num_samples": 20}
    sampling = SamplingConfig(repetition_penalty=1.1)
    whole = run(model, WORDS, "it said", sampling, **options)
    monkeypatch.setattr("lmkit.generate.sample", counted)
    ended = run(model, WORDS, "it said", sampling, stop=["would"], **options)
    assert [s.text for s in ended] == [s.text.partition("would")[0] for s in whole]
    going_on = [sum(s.num_tokens > position for s in ended) for position in range(len(num_rows))]
    assert 0 < going_on[-1] <= 5
    assert len(num_rows) > CONTEXT  # so that a Transformer has read its last tokens again without those that had ended
    assert all(going <= rows < 2 * going for going, rows in zip(going_on, num_rows, strict=True))


def test_no_new_tokens_give_an_empty_text_without_running_the_model() -> None:
    sample, pieces = say(WORDS, [], max_new_tokens=0)
    assert (sample, pieces) == (Sample("", 0, "length"), [])


def test_a_continuation_of_words_starts_with_a_blank_that_a_blank_in_the_prompt_does_not_double() -> None:
    for text in ("the company", "the company ", "the company \t"):
        prompt = read_prompt(WORDS, text, context=None, max_new_tokens=1)
        model = Script(WORDS, [4], num_read=3)
        (sample,) = generate(model, WORDS, prompt, sampling=GREEDY, device=CPU, max_new_tokens=1)
        assert prompt.text + sample.text == "the company said"


def test_the_prompt_is_read_behind_an_eos_and_an_empty_one_is_that_eos() -> None:
    assert read_prompt(WORDS, "", context=4, max_new_tokens=9).ids == [WORDS.eos_id]
    prompt = read_prompt(WORDS, "the company", context=4, max_new_tokens=9)
    assert (prompt.ids, prompt.text_ids, prompt.num_dropped) == ([1, 2, 3], [2, 3], 0)


@pytest.mark.parametrize(
    ("num_words", "max_new_tokens", "expected_kept"), [(9, 1, 9), (10, 1, 10), (11, 1, 10), (30, 4, 7), (30, 99, 5)]
)
def test_of_a_prompt_that_is_too_long_the_last_tokens_are_kept(
    num_words: int, max_new_tokens: int, expected_kept: int
) -> None:
    text = " ".join(["the"] * (num_words - 1) + ["said"])
    prompt = read_prompt(WORDS, text, context=10, max_new_tokens=max_new_tokens)
    assert len(prompt.text_ids) == expected_kept
    assert prompt.num_dropped == num_words - expected_kept
    assert prompt.ids[-1] == 4
    assert len(prompt.ids) <= 10
    assert prompt.text == text


def test_a_prompt_of_any_length_is_read_in_pieces_of_bounded_size() -> None:
    model = build(RecurrentConfig(d_embed=8, d_hidden=8), WORDS.vocab_size)
    prompt = read_prompt(WORDS, "the company said it would " * 2000, context=None, max_new_tokens=2)
    hidden_BTD, _ = model(torch.tensor([prompt.ids]))
    expected = model.head.logits(hidden_BTD[:, -1]).argmax(1).tolist()
    widths: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    (sample,) = generate(model, WORDS, prompt, sampling=GREEDY, device=CPU, max_new_tokens=2)
    assert sample.text.startswith(WORDS.decode([2, *expected])[3:])
    assert sum(widths) == len(prompt.ids) + 1
    assert max(widths) < len(prompt.ids)


@pytest.mark.parametrize("context", [1, 2, 3])
def test_the_smallest_contexts_work(context: int) -> None:
    config = TransformerConfig(d_model=8, num_layers=1, num_heads=1, context=context)
    (sample,) = run(build(config, WORDS.vocab_size), WORDS, "the company said", SamplingConfig(), max_new_tokens=9)
    assert sample.num_tokens == 9


def test_a_shorter_context_than_the_models_can_be_asked_for() -> None:
    small = build(TransformerConfig(d_model=16, num_layers=2, num_heads=2, context=8), WORDS.vocab_size)
    large = build(TransformerConfig(d_model=16, num_layers=2, num_heads=2, context=64), WORDS.vocab_size)
    prompt = read_prompt(WORDS, "the company", context=8, max_new_tokens=30)
    options: dict[str, Any] = {"sampling": GREEDY, "device": CPU, "max_new_tokens": 30}
    assert generate(large, WORDS, prompt, context=8, **options) == generate(small, WORDS, prompt, **options)


def test_unknown_words_and_characters_are_named_once() -> None:
    assert unknown_words(WORDS, "the zebra <unk> zebra\nsaid x") == ["zebra", "x"]
    assert unknown_words(CharTokenizer("abc"), "aéb") == ["é"]
    assert unknown_words(BYTES, "我") == []
    assert unknown_words(HfTokenizer(hf_json(WORDS)), "the zebra said") == ["zebra"]


def test_the_repetition_penalty_sees_prompt_and_new_tokens_but_not_the_eos_in_front() -> None:
    model = build(RecurrentConfig(d_embed=8, d_hidden=8), WORDS.vocab_size)
    with torch.no_grad():
        model.head.weight.zero_()  # type: ignore[operator, union-attr]
        model.head.bias.copy_(torch.tensor([1.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]))  # type: ignore[operator, union-attr]
    config = SamplingConfig(temperature=0.0, repetition_penalty=100.0)
    (sample,) = run(model, WORDS, "company", config, max_new_tokens=4, num_samples=1)
    assert sample.text == "\nthe said it"


def test_a_model_that_has_diverged_is_an_error() -> None:
    model = build(RecurrentConfig(d_embed=8, d_hidden=8), WORDS.vocab_size)
    with torch.no_grad():
        model.head.bias[2] = float("nan")  # type: ignore[index, union-attr]
    with pytest.raises(DivergedError, match="logits are not finite"):
        run(model, WORDS, "the", SamplingConfig(), max_new_tokens=3)


@pytest.mark.parametrize("what", ["generate", "score", "answer"])
def test_what_is_read_in_many_shapes_needs_no_plan_for_each(what: str) -> None:
    """See attention_of_any_shape."""
    model = TransformerConfig(d_model=16, num_layers=1, num_heads=2, context=32).build(BYTES.vocab_size, seed=1)
    allowed: list[bool] = []
    model.register_forward_pre_hook(lambda *_: allowed.append(torch.backends.cuda.cudnn_sdp_enabled()))
    if what == "generate":
        prompt = read_prompt(BYTES, "a", context=32, max_new_tokens=3)
        generate(model, BYTES, prompt, sampling=GREEDY, device=CPU, max_new_tokens=3)
    elif what == "score":
        tokens = np.arange(20, dtype=np.uint8)
        windows = sliding(Segments.whole(len(tokens), BYTES.eos_id), 8, 8)
        score(model, tokens, windows, seq_len=8, batch_size=2, device=CPU)
    else:
        eos_id = BYTES.eos_id
        greedy_answers(model, [[1, 2]], [2], eos_id=eos_id, device=CPU, batch_size=1, progress=lambda _: None)
    assert allowed
    assert not any(allowed)
    assert torch.backends.cuda.cudnn_sdp_enabled()

"""Each protocol against its convention worked out on its own: plain loops over plain lists, no windows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lmkit.config.evaluation import (
    AwdLstmProtocolConfig,
    Gpt2PaperProtocolConfig,
    HfStridedProtocolConfig,
    LmEvalWikitextProtocolConfig,
    ProtocolConfig,
    SentenceProtocolConfig,
    TransformerXlProtocolConfig,
)
from lmkit.config.machine import Precision
from lmkit.config.model import NgramConfig, RecurrentConfig, TransformerConfig
from lmkit.data.tokenfiles import Split
from lmkit.device import Device
from lmkit.errors import ConfigError
from lmkit.evaluation.plan import Reach, strided
from lmkit.evaluation.protocols import Headline, Protocol, Source, build_protocol
from lmkit.evaluation.scoring import score
from lmkit.models.base import LanguageModel
from lmkit.models.ngram import KneserNey
from lmkit.tokenizers import Tokenizer
from lmkit.tokenizers.basic import ByteTokenizer, WordTokenizer

CPU = Device(torch.device("cpu"), Precision.fp32, False, False, "cpu")
LINES = [
    "the cat sat on the mat",
    "",
    "a dog , which barked , ran off",
    "the end of the text is near",
    "so",
    "it ends here now",
]
PAGES = ' \n = One = \n \n It was 5 @.@ 5 m " long " . \n = = Part = = \n It \'s so . \n = Two = \n \n Yes , it is . \n'


def words_of(text: str) -> Tokenizer:
    return WordTokenizer(sorted(set(text.split())))


def source(text: str, tokenizer: Tokenizer, *, name: str = "text", split: str = "test") -> Source:
    ids = np.asarray([*tokenizer.encode(text), *tokenizer.encode_document_end()], dtype=np.uint16)
    words, lines = len(text.split()), text.count("\n")
    prepared = Split(
        tokens=ids,
        document_ends=np.array([len(ids)]),
        num_tokens=len(ids),
        num_words=words + lines,
        num_bytes=len(text.encode()),
        num_chars=len(text),
        num_lines=lines,
        num_documents=1,
        num_unk=0,
        text_digest="",
    )
    return Source(name, split, prepared, tokenizer, lambda: text)


def lstm(vocab_size: int) -> LanguageModel:
    model = RecurrentConfig(d_embed=12, d_hidden=12, num_layers=1).build(vocab_size, seed=1)
    return _sharpened(model)


def transformer(vocab_size: int, context: int = 8) -> LanguageModel:
    return _sharpened(
        TransformerConfig(d_model=16, num_layers=2, num_heads=2, context=context).build(vocab_size, seed=1)
    )


def _sharpened(model: LanguageModel) -> LanguageModel:
    """With opinions strong enough that a wrong context shows."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0)
    return model.eval()


def nats_after(model: LanguageModel, before: list[int], token: int) -> float:
    """-log p(token | before), from an empty state, by the whole softmax."""
    hidden_BTD, _ = model(torch.tensor([before]))
    return -float(torch.log_softmax(model.head.logits(hidden_BTD[0, -1:]).double(), 1)[0, token])


def run_protocol(
    config: ProtocolConfig | None, src: Source, model: LanguageModel, reach: Reach | None = None
) -> tuple[Headline, int]:
    """The protocol's number, and how many tokens were scored."""
    protocol: Protocol = build_protocol(config, word_level=False)
    material = protocol.material(src)
    limit = model.context
    reach = reach or protocol.reach(None, None, limit, limit, carries_state=limit is None)
    windows = protocol.windows(material, src, reach)
    scores = score(model, material.tokens, windows, seq_len=reach.context or 5, batch_size=3, device=CPU)
    return protocol.headline(scores.nats_N, windows, material), int(scores.scored_N.sum())


def ppl(headline: Headline) -> float:
    return math.exp(headline.nats / headline.count)


@pytest.fixture
def word_source() -> Source:
    text = "".join(f"{line}\n" for line in LINES)
    return source(text, words_of(text))


def word_ids(src: Source) -> list[int]:
    """Ids worked out from the lines themselves."""
    ids: list[int] = []
    for line in LINES:
        ids += [int(src.tokenizer.encode(word)[0]) for word in line.split()] + [src.tokenizer.eos_id]
    return ids


@torch.inference_mode()
def test_mikolov_scores_every_word_and_end_of_line_given_all_before_it(word_source: Source) -> None:
    ids, eos = word_ids(word_source), word_source.tokenizer.eos_id
    model = lstm(word_source.tokenizer.vocab_size)
    nats = sum(nats_after(model, [eos, *ids[:i]], token) for i, token in enumerate(ids))
    headline, num_scored = run_protocol(None, word_source, model)
    num_words = sum(len(line.split()) for line in LINES)
    assert num_scored == len(ids) == num_words + len(LINES)
    assert ppl(headline) == pytest.approx(math.exp(nats / (num_words + len(LINES))), rel=1e-5)


@torch.inference_mode()
def test_sentence_starts_each_line_anew(word_source: Source) -> None:
    eos = word_source.tokenizer.eos_id
    for model in (lstm(word_source.tokenizer.vocab_size), transformer(word_source.tokenizer.vocab_size, context=20)):
        nats = 0.0
        for line in LINES:
            ids = [int(word_source.tokenizer.encode(word)[0]) for word in line.split()] + [eos]
            nats += sum(nats_after(model, [eos, *ids[:i]], token) for i, token in enumerate(ids))
        headline, num_scored = run_protocol(SentenceProtocolConfig(), word_source, model)
        assert num_scored == len(word_ids(word_source))
        assert ppl(headline) == pytest.approx(math.exp(nats / num_scored), rel=1e-5)


def test_sentence_scores_the_text_and_not_the_ends_of_documents() -> None:
    tokenizer = ByteTokenizer()
    headline, num_scored = run_protocol(SentenceProtocolConfig(), source("ab\ncd\n", tokenizer), lstm(257))
    assert (num_scored, headline.count) == (6, 4)


def stripes_of(ids: list[int], num_stripes: int) -> list[list[int]]:
    length = len(ids) // num_stripes
    return [ids[i * length : (i + 1) * length] for i in range(num_stripes)]


@torch.inference_mode()
def stripe_nats(model: LanguageModel, ids: list[int], num_stripes: int) -> float:
    return sum(
        nats_after(model, stripe[:i], stripe[i])
        for stripe in stripes_of(ids, num_stripes)
        for i in range(1, len(stripe))
    )


@pytest.mark.parametrize(("split", "num_stripes"), [("valid", 4), ("test", 1)])
def test_awd_lstm_trims_restarts_and_divides_by_one_too_many(word_source: Source, split: str, num_stripes: int) -> None:
    src = Source("text", split, word_source.split, word_source.tokenizer, word_source.read)
    ids, model = word_ids(src), lstm(src.tokenizer.vocab_size)
    length = len(ids) // num_stripes
    # evaluate() sums len(data) * mean loss over batches of num_stripes columns and divides by the stripes' length
    total = stripe_nats(model, ids, num_stripes) / num_stripes
    headline, num_scored = run_protocol(AwdLstmProtocolConfig(valid_stripes=4, test_stripes=1), src, model)
    assert num_scored == num_stripes * (length - 1) < len(ids)
    assert ppl(headline) == pytest.approx(math.exp(total / length), rel=1e-5)


def test_awd_lstm_counts_alike_whatever_the_stride(word_source: Source) -> None:
    model = transformer(word_source.tokenizer.vocab_size, context=4)
    config = AwdLstmProtocolConfig(test_stripes=3)
    counts = {run_protocol(config, word_source, model, Reach(4, stride))[0].count for stride in (1, 2, 4)}
    assert counts == {3 * (len(word_ids(word_source)) // 3)}


def test_transformer_xl_takes_the_mean_over_what_is_scored(word_source: Source) -> None:
    ids, model = word_ids(word_source), lstm(word_source.tokenizer.vocab_size)
    headline, num_scored = run_protocol(TransformerXlProtocolConfig(test_stripes=3), word_source, model)
    assert num_scored == 3 * (len(ids) // 3 - 1)
    assert ppl(headline) == pytest.approx(math.exp(stripe_nats(model, ids, 3) / num_scored), rel=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize(("max_length", "stride"), [(8, 4), (8, 8), (8, 3), (64, 32)])
@pytest.mark.parametrize("family", [lstm, transformer])
def test_hf_strided_equals_the_published_loop(
    max_length: int, stride: int, family: Callable[[int], LanguageModel]
) -> None:
    """The loop of the documentation, with labels, -100 and the shift inside the model."""
    tokenizer, text = ByteTokenizer(), "one two\nthree\n\nfour five six\n"
    model = family(257)
    if model.context is not None:
        max_length = min(max_length, model.context)
        stride = min(stride, max_length)
    ids = list("\n\n".join(["one two", "three", "", "four five six"]).encode())
    nll_sum, n_tokens, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        target_length = end - previous_end
        window = ids[begin:end]
        labels = [-100] * (len(window) - target_length) + window[len(window) - target_length :]
        losses = [nats_after(model, window[:i], labels[i]) for i in range(1, len(window)) if labels[i] != -100]
        if losses and target_length > 1:
            nll_sum += sum(losses) / len(losses) * (target_length - 1)
            n_tokens += target_length - 1
        previous_end = end
        if end == len(ids):
            break
    config = HfStridedProtocolConfig(max_length=max_length, stride=stride)
    headline, _ = run_protocol(config, source(text, tokenizer), model)
    assert ppl(headline) == pytest.approx(math.exp(nll_sum / n_tokens), rel=1e-5)


def test_rows_of_hf_strided_end_at_newlines_only() -> None:
    text = "one\x0ctwo\rthree\n\nfour\x85five\u2028six\n"
    src = source(text, ByteTokenizer())
    tokens = build_protocol(HfStridedProtocolConfig(), word_level=False).material(src).tokens
    assert src.tokenizer.decode(tokens) == "one\x0ctwo\rthree\n\n\n\nfour\x85five\u2028six"


def test_hf_strided_leaves_out_one_token_a_window_without_overlap() -> None:
    src = source("abcdefghijklmnopqrst\n", ByteTokenizer())
    _, num_scored = run_protocol(HfStridedProtocolConfig(max_length=5, stride=5), src, lstm(257))
    assert num_scored == 20 - 4


@torch.inference_mode()
@pytest.mark.parametrize("context", [8, 16, 1000])
def test_lm_eval_wikitext_equals_its_rolling_windows_page_by_page(context: int) -> None:
    tokenizer = ByteTokenizer()
    model = transformer(257, context=context)
    src = source(PAGES, tokenizer, name="wikitext2_raw")
    protocol = build_protocol(LmEvalWikitextProtocolConfig(), word_level=False)
    material = protocol.material(src)
    found = [
        bytes(material.tokens[begin:end].astype(np.uint8)).decode()
        for begin, end in zip([0, *material.document_ends[:-1]], material.document_ends, strict=True)
    ]
    nats, words = 0.0, 0
    for page, text in zip(_pages(PAGES), found, strict=True):
        words += len(re.split(r"\s+", page))
        ids, predicted = list(text.encode()), 0
        while predicted < len(ids):  # loglikelihood_rolling with context_len 1
            if predicted == 0:
                target, before = ids[:context], [tokenizer.eos_id]
            else:
                length = min(len(ids) - predicted, context)
                end = predicted + length
                start = end - context
                target, before = ids[predicted:end], ids[start - 1 : predicted]
                before = before if len(before) <= context - length + 1 else before[-(context - length + 1) :]
            for i, token in enumerate(target):
                nats += nats_after(model, [*before, *target[:i]], token)
            predicted += len(target)
    headline, num_scored = run_protocol(LmEvalWikitextProtocolConfig(), src, model)
    assert num_scored == sum(map(len, found))
    assert headline.count == words
    assert headline.nats == pytest.approx(nats, rel=1e-5)


def _pages(text: str) -> list[str]:
    """Pages begin with a title between single equals signs."""
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        if re.fullmatch(r" = [^=]+ = ", line):
            pages.append([])
        pages[-1].append(line)
    joined = ["\n".join(page) for page in pages]
    return [page for page in joined[:-1] if page.strip()] + joined[-1:]


@torch.inference_mode()
def test_gpt2_paper_divides_the_nats_of_detokenised_text_by_original_words() -> None:
    tokenizer, text = ByteTokenizer(), ' He said , " no " .\n'
    model = lstm(257)
    src = source(text, tokenizer, name="wikitext2_raw")
    material = build_protocol(Gpt2PaperProtocolConfig(), word_level=False).material(src)
    ids = [int(i) for i in material.tokens]
    assert bytes(ids).decode().split() == ["He", "said,", '"no".']
    nats = sum(nats_after(model, [tokenizer.eos_id, *ids[:i]], token) for i, token in enumerate(ids))
    headline, _ = run_protocol(Gpt2PaperProtocolConfig(), src, model)
    assert headline.nats == pytest.approx(nats, rel=1e-5)
    assert headline.count == len(text.split()) + 1


@pytest.mark.parametrize("config", [LmEvalWikitextProtocolConfig(), Gpt2PaperProtocolConfig()])
def test_a_closed_vocabulary_cannot_read_detokenised_text(word_source: Source, config: ProtocolConfig) -> None:
    with pytest.raises(ConfigError, match="closed vocabulary of tokenizer=word"):
        build_protocol(config, word_level=False).material(word_source)


def test_word_level_benchmarks_are_counted_as_by_mikolov_others_as_a_stream() -> None:
    assert build_protocol(None, word_level=True).name == "mikolov"
    assert build_protocol(None, word_level=False).name == "stream"


def test_context_and_stride_are_refused_where_a_state_carries_the_past() -> None:
    protocol = build_protocol(None, word_level=True)
    with pytest.raises(ConfigError, match="do not apply"):
        protocol.reach(10, None, None, None, carries_state=True)
    with pytest.raises(ConfigError, match="context is unbounded"):
        protocol.reach(None, None, None, None, carries_state=False)


def test_too_many_stripes_are_a_clear_error(word_source: Source) -> None:
    with pytest.raises(ConfigError, match="too short for 30 stripes"):
        run_protocol(AwdLstmProtocolConfig(test_stripes=30), word_source, lstm(word_source.tokenizer.vocab_size))


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_an_ngram_model_reads_of_overlapping_windows_only_what_its_scores_depend_on(
    word_source: Source, stride: int
) -> None:
    tokens = word_source.split.tokens
    model = NgramConfig(order=3).build(word_source.tokenizer.vocab_size, seed=1)
    assert isinstance(model, KneserNey)
    model.fit(tokens, eos_id=word_source.tokenizer.eos_id)
    windows = strided(len(tokens), 8, stride)
    short = windows.shortened(2)
    nats_N = score(model, tokens, windows, seq_len=8, batch_size=3, device=CPU).nats_N
    model.receptive_field = None
    np.testing.assert_array_equal(nats_N, score(model, tokens, windows, seq_len=8, batch_size=3, device=CPU).nats_N)
    assert (short.scored_W - short.begins_W).max() <= 1

"""Every number against hand counts of a text whose nats are given, and the bootstrap against what it must estimate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkit.config.evaluation import (
    AwdLstmProtocolConfig,
    HfStridedProtocolConfig,
    ProtocolConfig,
    SentenceProtocolConfig,
    TransformerXlProtocolConfig,
)
from lmkit.data.tokenfiles import Split
from lmkit.errors import DataError
from lmkit.evaluation import numbers
from lmkit.evaluation.numbers import Units, bootstrap, resampled, summary, units_of
from lmkit.evaluation.plan import Reach
from lmkit.evaluation.protocols import Material, Source, build_protocol
from lmkit.evaluation.scoring import TokenScores
from lmkit.tokenizers import Tokenizer
from lmkit.tokenizers.basic import ByteTokenizer, CharTokenizer, WordTokenizer

TEXT = "the cat sat\n\nthe zebra sat on it\nit sat 是\n"
"""11 words in 4 lines, one of them empty; zebra and 是 are unknown to WORDS."""
WORDS = WordTokenizer(["the", "cat", "sat", "on", "it"])
# the cat sat . . the zebra sat on it . it sat 是 .
IS_EOS = [0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]
IS_UNK = [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0]


def source(text: str, tokenizer: Tokenizer, *, documents: int = 1) -> Source:
    """The text, ``documents`` times."""
    one = [*tokenizer.encode(text), *tokenizer.encode_document_end()]
    ids = np.array(one * documents, dtype=np.uint16)
    words, lines = len(text.split()), text.count("\n")
    prepared = Split(
        tokens=ids,
        document_ends=np.arange(1, documents + 1) * len(one),
        num_tokens=len(ids),
        num_words=documents * (words + lines),
        num_bytes=documents * len(text.encode()),
        num_chars=documents * len(text),
        num_lines=documents * lines,
        num_documents=documents,
        num_unk=0,
        text_digest="",
    )
    return Source("text", "test", prepared, tokenizer, lambda: text * documents)


def scores_of(src: Source, seed: int = 0) -> tuple[TokenScores, list[float]]:
    """Scores for all tokens, and their nats as plain numbers."""
    rng = np.random.default_rng(seed)
    nats = rng.gamma(2.0, 2.0, src.split.num_tokens).astype(np.float32)
    return TokenScores(nats, rng.random(len(nats)) < 0.3), [float(n) for n in nats]


def count(
    src: Source, scores: TokenScores, config: ProtocolConfig | None = None, reach: Reach | None = None
) -> dict[str, Any]:
    """The summary; what the protocol does not score is taken out of the scores first."""
    protocol = build_protocol(config, word_level=src.tokenizer.ends_lines)
    material = protocol.material(src)
    windows = protocol.windows(material, src, reach or Reach(None, None))
    scored_N = windows.positions_in_context(len(material.tokens)) >= 0
    kept = TokenScores(
        np.where(scored_N, scores.nats_N[: len(scored_N)], np.nan).astype(np.float32),
        scores.correct_N[: len(scored_N)] & scored_N,
    )
    return summary(kept, material, src, protocol, windows)


def ppl(nats: list[float], number: float) -> float:
    return math.exp(math.fsum(nats) / number)


def test_every_perplexity_of_words_is_exp_of_the_sum_over_the_count() -> None:
    src = source(TEXT, WORDS)
    assert src.split.num_tokens == len(IS_EOS) == 11 + 4
    scores, nats = scores_of(src)
    found = count(src, scores)
    assert found["ppl"] == found["word_ppl"] == pytest.approx(ppl(nats, 15))
    assert found["ppl_per"] == "word, ends of line counted"
    assert found["word_ppl_eos_not_counted"] == pytest.approx(ppl(nats, 11))
    assert found["token_ppl"] == pytest.approx(ppl(nats, 15))
    assert found["byte_ppl"] == pytest.approx(ppl(nats, len(TEXT.encode())))
    assert found["char_ppl"] == pytest.approx(ppl(nats, len(TEXT)))
    assert found["bits_per_byte"] == pytest.approx(math.fsum(nats) / len(TEXT.encode()) / math.log(2))
    assert found["bits_per_char"] == pytest.approx(math.fsum(nats) / len(TEXT) / math.log(2))
    assert len(TEXT.encode()) == len(TEXT) + 2
    assert found["nats"] == pytest.approx(math.fsum(nats), rel=1e-12)
    assert found["accuracy"] == pytest.approx(int(scores.correct_N.sum()) / 15)


def test_the_counts_are_those_of_the_text() -> None:
    src = source(TEXT, WORDS)
    found = count(src, scores_of(src)[0])
    names = ("num_tokens", "num_tokens_left_out", "num_words", "num_lines", "num_bytes", "num_chars", "num_unk")
    assert [found[name] for name in names] == [15, 0, 15, 4, len(TEXT.encode()), len(TEXT), 2]


def test_leaving_out_eos_or_unk_leaves_out_their_nats_and_their_number() -> None:
    src = source(TEXT, WORDS)
    scores, nats = scores_of(src)
    found = count(src, scores)
    for name, left_out in (
        ("eos", IS_EOS),
        ("unk", IS_UNK),
        ("eos_and_unk", [a or b for a, b in zip(IS_EOS, IS_UNK, strict=True)]),
    ):
        kept = [n for n, out in zip(nats, left_out, strict=True) if not out]
        assert found[f"token_ppl_without_{name}"] == pytest.approx(ppl(kept, len(kept)))


def test_share_and_cost_of_eos_and_unk() -> None:
    src = source(TEXT, WORDS)
    scores, nats = scores_of(src)
    found = count(src, scores)
    for name, marked in (("eos", IS_EOS), ("unk", IS_UNK)):
        own = [n for n, m in zip(nats, marked, strict=True) if m]
        assert found[name]["count"] == len(own)
        assert found[name]["share_of_tokens"] == pytest.approx(len(own) / 15)
        assert found[name]["nats"] == pytest.approx(math.fsum(own))
        assert found[name]["share_of_nats"] == pytest.approx(math.fsum(own) / math.fsum(nats))
        assert found[name]["ppl"] == pytest.approx(ppl(own, len(own)))


def test_bytes_count_the_end_of_document_as_a_token_and_not_as_a_byte() -> None:
    src = source(TEXT, ByteTokenizer())
    scores, nats = scores_of(src)
    found = count(src, scores)
    num_bytes = len(TEXT.encode())
    assert found["num_tokens"] == num_bytes + 1
    assert found["token_ppl"] == pytest.approx(ppl(nats, num_bytes + 1))
    assert found["byte_ppl"] == pytest.approx(ppl(nats, num_bytes))
    assert found["word_ppl"] == pytest.approx(ppl(nats, 15)), "words of the text, whatever the tokenizer"
    assert found["eos"]["count"] == 1
    assert (found["unk"]["count"], found["unk"]["ppl"], found["num_unk"]) == (0, None, 0)
    assert found["token_ppl_without_unk"] == found["token_ppl"]


def test_an_unknown_character_is_counted_as_unknown() -> None:
    src = source("abcx", CharTokenizer("abc"))
    scores, nats = scores_of(src)
    found = count(src, scores)
    assert found["num_unk"] == 1
    assert found["token_ppl_without_eos_and_unk"] == pytest.approx(ppl(nats[:3], 3))


def test_bits_per_byte_and_perplexities_tell_the_same_sum() -> None:
    src = source(TEXT, ByteTokenizer())
    found = count(src, scores_of(src)[0])
    assert found["byte_ppl"] == pytest.approx(2 ** found["bits_per_byte"])
    assert found["char_ppl"] == pytest.approx(2 ** found["bits_per_char"])
    assert found["word_ppl"] == pytest.approx(found["token_ppl"] ** (found["num_tokens"] / found["num_words"]))


def test_where_tokens_are_left_out_words_are_the_scored_ones_and_bytes_are_not_known() -> None:
    src = source(TEXT, WORDS)
    scores, nats = scores_of(src)
    found = count(src, scores, TransformerXlProtocolConfig(test_stripes=2))
    # stripes of 7: positions 0 and 7 are only inputs, 14 (the last <eos>) is in no stripe
    kept = [i for i in range(15) if i not in (0, 7, 14)]
    own = [nats[i] for i in kept]
    num_eos = sum(IS_EOS[i] for i in kept)
    assert (found["num_tokens"], found["num_tokens_left_out"]) == (12, 3)
    assert (found["num_words"], found["num_lines"]) == (12, num_eos)
    assert found["ppl"] == found["token_ppl"] == found["word_ppl"] == pytest.approx(ppl(own, 12))
    assert found["word_ppl_eos_not_counted"] == pytest.approx(ppl(own, 12 - num_eos))
    for name in ("byte_ppl", "char_ppl", "bits_per_byte", "bits_per_char", "num_bytes", "num_chars"):
        assert found[name] is None
    assert count(src, scores, AwdLstmProtocolConfig(test_stripes=2))["ppl"] == pytest.approx(ppl(own, 14))


def test_where_bytes_are_left_out_nothing_is_known_per_word() -> None:
    src = source(TEXT, ByteTokenizer())
    found = count(src, scores_of(src)[0], TransformerXlProtocolConfig(test_stripes=3))
    assert found["num_tokens_left_out"] > 0
    for name in ("word_ppl", "word_ppl_eos_not_counted", "byte_ppl", "bits_per_byte", "bits_per_char"):
        assert found[name] is None
    assert found["token_ppl"] == found["ppl"]


def test_where_bytes_are_left_out_the_numbers_of_words_and_lines_are_not_known() -> None:
    src = source(TEXT, ByteTokenizer())
    found = count(src, scores_of(src)[0], TransformerXlProtocolConfig(test_stripes=3))
    assert (found["num_words"], found["num_lines"]) == (None, None)


def test_a_text_without_words_has_no_perplexity_per_word() -> None:
    src = source("\n\n", WORDS)
    found = count(src, scores_of(src)[0])
    assert found["word_ppl_eos_not_counted"] is None
    assert found["token_ppl_without_eos"] is None
    assert found["word_ppl"] is not None


def test_a_protocol_that_scores_nothing_is_a_clear_error() -> None:
    src = source("a\n", WORDS)
    one = replace(src.split, tokens=src.split.tokens[:1], document_ends=np.array([1]), num_tokens=1)
    with pytest.raises(DataError, match="protocol=hf-strided scores no token of text test"):
        count(replace(src, split=one), scores_of(src)[0], HfStridedProtocolConfig(), Reach(4, 2))


def test_a_perplexity_that_overflows_is_infinite() -> None:
    src = source(TEXT, WORDS)
    scores = TokenScores(np.full(15, 1000.0, np.float32), np.zeros(15, np.bool_))
    assert count(src, scores)["ppl"] == math.inf


def test_a_mixture_has_no_accuracy() -> None:
    src = source(TEXT, WORDS)
    protocol = build_protocol(None, word_level=True)
    material = protocol.material(src)
    windows = protocol.windows(material, src, Reach(None, None))
    assert summary(scores_of(src)[0], material, src, protocol, windows, has_accuracy=False)["accuracy"] is None


# Units and the bootstrap


def units(src: Source, scores: TokenScores, number: float, config: ProtocolConfig | None = None) -> Units:
    protocol = build_protocol(config, word_level=False)
    return units_of(scores, protocol.material(src), src, number)


def test_with_few_documents_the_lines_are_resampled() -> None:
    src = source(TEXT, WORDS, documents=29)
    scores, nats = scores_of(src)
    found = units(src, scores, 15 * 29)
    assert (found.name, len(found.nats_U)) == ("line", 4 * 29)
    assert found.nats_U[:4].tolist() == pytest.approx(
        [math.fsum(nats[a:b]) for a, b in ((0, 4), (4, 5), (5, 11), (11, 15))]
    )
    assert found.counts_U[:4].tolist() == pytest.approx([4, 1, 6, 4])


@pytest.mark.parametrize("tokenizer", [WORDS, ByteTokenizer()])
def test_with_many_documents_these_are_resampled(tokenizer: Tokenizer) -> None:
    src = source(TEXT, tokenizer, documents=30)
    scores, nats = scores_of(src)
    found = units(src, scores, 15 * 30)
    length = len(nats) // 30
    assert found.name == "document"
    expected = [math.fsum(nats[i * length : (i + 1) * length]) for i in range(30)]
    assert found.nats_U.tolist() == pytest.approx(expected)
    assert found.counts_U.tolist() == pytest.approx([15.0] * 30)


def test_lines_of_a_byte_text_end_with_the_newline_and_the_rest_is_one_more() -> None:
    src = source("ab\ncde\nf", ByteTokenizer())
    scores, nats = scores_of(src)
    found = units(src, scores, 9)
    assert found.nats_U.tolist() == pytest.approx([sum(nats[:3]), sum(nats[3:7]), sum(nats[7:])])
    assert found.counts_U.tolist() == pytest.approx([3, 4, 2])


def test_the_end_of_a_document_belongs_to_its_last_line() -> None:
    src = source("ab\ncde\n", ByteTokenizer(), documents=2)
    scores, nats = scores_of(src)
    found = units(src, scores, 16)
    assert found.nats_U.tolist() == pytest.approx([sum(nats[a:b]) for a, b in ((0, 3), (3, 8), (8, 11), (11, 16))])
    assert found.counts_U.tolist() == pytest.approx([3, 5, 3, 5])


@pytest.mark.parametrize("documents", [1, 40])
def test_where_the_number_is_per_word_the_counts_are_the_words_of_each_part(documents: int) -> None:
    src = source(TEXT, ByteTokenizer(), documents=documents)
    scores, _ = scores_of(src)
    found = units(src, scores, 15.0 * documents)
    assert found.counts_U.tolist() == ([4, 1, 6, 4] if documents == 1 else [15] * 40)
    in_bytes = units(src, scores, float(len(TEXT.encode()) * documents))
    assert in_bytes.counts_U.tolist() != found.counts_U.tolist()
    assert found.nats_U.tolist() == in_bytes.nats_U.tolist()
    elsewhere = replace(src, read=lambda: "other lines\n")  # than those of the tokens
    assert units(elsewhere, scores, 15.0 * documents).counts_U.sum() == pytest.approx(15 * documents)


def test_words_of_documents_are_the_counts_where_a_protocol_counts_them() -> None:
    src = source(TEXT, ByteTokenizer(), documents=40)
    scores, _ = scores_of(src)
    words = tuple(range(1, 41))
    material = replace(build_protocol(None, word_level=False).material(src), words_of_documents=words)
    assert units_of(scores, material, src, sum(words)).counts_U.tolist() == list(words)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=80), st.integers(0, 100), st.booleans())
@settings(deadline=None)
def test_units_sum_to_the_nats_and_the_count_whatever_is_left_out(lengths: list[int], seed: int, by_line: bool) -> None:
    """Empty documents and unscored tokens anywhere."""
    ends = np.cumsum(lengths)
    if ends[-1] == 0:
        return
    rng = np.random.default_rng(seed)
    nats = np.where(rng.random(ends[-1]) < 0.7, rng.gamma(2.0, 2.0, ends[-1]), np.nan).astype(np.float32)
    nats[0] = 1.0
    ids = rng.integers(97, 100, ends[-1])
    if by_line:
        ids[ends[ends > 0] - 1] = 10
    material = Material(ids, np.array([ends[-1]]) if by_line else ends, 1, 1, 1, 1, "")
    src = source("a\n", ByteTokenizer())
    found = units_of(TokenScores(nats, np.zeros(len(nats), np.bool_)), material, src, 123.5)
    assert found.nats_U.sum() == pytest.approx(np.nansum(nats, dtype=np.float64))
    assert found.counts_U.sum() == pytest.approx(123.5)
    assert (found.counts_U > 0).all(), "nothing was scored of a unit without a count"
    if not by_line and len(lengths) >= numbers.ENOUGH_DOCUMENTS:
        begins = ends - lengths
        scored = [nats[b:e][~np.isnan(nats[b:e])] for b, e in zip(begins, ends, strict=True)]
        assert found.nats_U.tolist() == pytest.approx([float(s.sum(dtype=np.float64)) for s in scored if len(s)])


@pytest.mark.parametrize("counted", [True, False])
def test_joined_units_are_whole_ones_and_keep_the_sums(monkeypatch: pytest.MonkeyPatch, counted: bool) -> None:
    monkeypatch.setattr(numbers, "MAX_UNITS", 7)
    src = source(TEXT, WORDS, documents=50)
    scores, nats = scores_of(src)
    material = build_protocol(None, word_level=False).material(src)
    words = tuple(range(1, 51))
    if counted:
        material = replace(material, words_of_documents=words)
    total = float(sum(words)) if counted else 750.0
    found = units_of(scores, material, src, total)
    assert len(found.nats_U) == 7
    assert found.name == "joined document"
    assert found.nats_U.sum() == pytest.approx(math.fsum(nats))
    assert found.counts_U.sum() == pytest.approx(total)
    documents = np.array(nats).reshape(50, 15).sum(1)
    possible = np.concatenate([[0.0], np.cumsum(documents)])
    for joined in np.cumsum(found.nats_U):
        assert np.abs(possible - joined).min() < 1e-6
    if counted:
        assert set(np.cumsum(found.counts_U)) <= set(np.cumsum(words))
    else:
        assert found.counts_U.max() <= 8 * 15, "of about the same size: 7 or 8 documents each"


def iid_units(number: int, seed: int = 0) -> Units:
    rng = np.random.default_rng(seed)
    return Units("line", rng.normal(80.0, 20.0, number), np.full(number, 20.0))


@pytest.mark.parametrize("number", [2, 5, 50, 2000])
def test_the_interval_holds_the_value(number: int) -> None:
    for seed in range(10):
        found = iid_units(number, seed)
        made = bootstrap(found, 300, seed)
        assert made is not None
        assert made.low <= math.exp(found.nats_U.sum() / found.counts_U.sum()) <= made.high
        assert (made.resamples, made.num_units, made.unit, made.level) == (300, number, "line", 0.95)


def test_the_interval_is_that_of_the_normal_approximation_for_independent_units() -> None:
    found = iid_units(400)
    made = bootstrap(found, 4000, 1)
    assert made is not None
    per_count = found.nats_U / 20.0
    standard_error = per_count.std(ddof=1) / math.sqrt(400)
    width = math.log(made.high) - math.log(made.low)
    assert width == pytest.approx(2 * 1.96 * standard_error, rel=0.15)
    assert (math.log(made.high) + math.log(made.low)) / 2 == pytest.approx(per_count.mean(), abs=0.3 * standard_error)


def test_units_of_different_size_are_weighted_by_their_counts() -> None:
    """The ratio of sums, with the spread of the linearised ratio (Cochran 1977, 6.4)."""
    rng = np.random.default_rng(3)
    counts = rng.integers(1, 60, 500).astype(np.float64)
    found = Units("line", counts * rng.normal(4.0, 0.5, 500), counts)
    made = bootstrap(found, 4000, 1)
    assert made is not None
    ratio = found.nats_U.sum() / counts.sum()
    error = math.sqrt(((found.nats_U - ratio * counts) ** 2).sum()) / counts.sum()
    assert math.log(made.high) - math.log(made.low) == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_fewer_units_make_the_interval_wider() -> None:
    made = [bootstrap(iid_units(number), 1000, 1) for number in (2000, 500, 125, 30)]
    widths = [one.high - one.low for one in made if one is not None]
    assert widths == sorted(widths)
    assert widths[2] / widths[0] == pytest.approx(4, rel=0.25), "by the root of their number"


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    found = iid_units(100)
    assert bootstrap(found, 200, 5) == bootstrap(found, 200, 5) != bootstrap(found, 200, 6)


def test_a_higher_level_is_wider() -> None:
    wide, narrow = bootstrap(iid_units(100), 2000, 1, level=0.99), bootstrap(iid_units(100), 2000, 1, level=0.8)
    assert wide is not None
    assert narrow is not None
    assert wide.low < narrow.low < narrow.high < wide.high


def test_there_is_no_interval_of_one_unit_or_of_no_resamples() -> None:
    assert bootstrap(iid_units(1), 1000, 1) is None
    assert bootstrap(iid_units(100), 0, 1) is None


def test_an_infinite_perplexity_has_an_interval_that_says_so() -> None:
    found = iid_units(50)
    found.nats_U[3] = math.inf
    made = bootstrap(found, 500, 1)
    assert made is not None
    assert math.isfinite(made.low), "a third of the resamples miss the unit"
    assert made.high == math.inf


def test_resamples_draw_as_many_units_as_there_are_and_the_same_ones_of_each_quantity() -> None:
    sums = np.stack([np.ones(40), np.arange(40.0), 3 * np.arange(40.0)])
    drawn = resampled(sums, 200, 1)
    assert drawn.shape == (200, 3)
    assert (drawn[:, 0] == 40).all()
    np.testing.assert_allclose(drawn[:, 2], 3 * drawn[:, 1])
    assert drawn[:, 1].mean() == pytest.approx(sums[1].sum(), rel=0.05)
    assert len(set(drawn[:, 1])) > 100


def test_sentences_leave_out_ends_of_documents_and_keep_the_documents_apart() -> None:
    src = source(TEXT, ByteTokenizer(), documents=30)
    protocol = build_protocol(SentenceProtocolConfig(), word_level=False)
    material = protocol.material(src)
    nats = np.arange(len(material.tokens), dtype=np.float32)
    found = units_of(TokenScores(nats, np.zeros(len(nats), np.bool_)), material, src, 100.0)
    length = len(TEXT.encode())
    assert found.nats_U.tolist() == [float(sum(range(i * length, (i + 1) * length))) for i in range(30)]

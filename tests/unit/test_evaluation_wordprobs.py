"""Files of probabilities give back what was written, whoever wrote them, and paired comparisons see what is there."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmkit.errors import DataError
from lmkit.evaluation.numbers import Units
from lmkit.evaluation.wordprobs import aligned, best_mixture, compare_units, read_word_probs, word_probs_text

NATS = np.random.default_rng(0).gamma(1.5, 3.0, 5000).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "probs.txt"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def test_a_written_file_has_one_probability_a_line_that_gives_the_perplexity_to_six_digits() -> None:
    lines = word_probs_text(NATS).split("\n")
    assert lines.pop() == ""
    probs = [float(line) for line in lines]
    assert len(probs) == len(NATS)
    assert all(0 < p <= 1 for p in probs)
    found = math.exp(-math.fsum(map(math.log, probs)) / len(probs))
    assert found == pytest.approx(math.exp(NATS.sum(dtype=np.float64) / len(NATS)), rel=1e-6)


def test_reading_gives_back_the_nats_that_were_written(path: Path) -> None:
    read = read_word_probs(write(path, word_probs_text(NATS)))
    np.testing.assert_allclose(read, NATS, atol=1e-8, rtol=1e-7)


def test_tokens_that_are_not_scored_have_no_line() -> None:
    nats = NATS[:6].copy()
    nats[[0, 4]] = np.nan
    assert len(word_probs_text(nats).splitlines()) == 4


@pytest.mark.parametrize("value", [0.0, 1e-9, 20.0, 200.0, 700.0])
def test_certain_and_hopeless_tokens_survive_the_file(path: Path, value: float) -> None:
    read = read_word_probs(write(path, word_probs_text(np.array([value, 1.0], np.float32))))
    assert read[0] == pytest.approx(value, rel=1e-6, abs=1e-8)


def test_a_probability_of_zero_is_infinite_nats(path: Path) -> None:
    assert read_word_probs(write(path, "0.5\n0\n")).tolist() == [pytest.approx(math.log(2)), math.inf]
    assert word_probs_text(np.array([np.inf], np.float32)) == "0.00000000E+00\n"


def test_a_file_of_logarithms_is_recognised(path: Path) -> None:
    probs = write(path, "0.5\n1.0\n0.125\n")
    from_probs = read_word_probs(probs)
    logs = write(path, f"{math.log(0.5)}\n0.0\n{math.log(0.125)}\n")
    np.testing.assert_allclose(read_word_probs(logs), from_probs, rtol=1e-12)
    assert read_word_probs(write(path, "-1\n-inf\n")).tolist() == [1.0, math.inf]


@pytest.mark.parametrize("text", ["0.25\r\n0.5\r\n", " 0.25\t\n0.5", "2.5E-01\n5e-1\n", ".25\n0.5\n"])
def test_numbers_may_be_written_as_others_write_them(path: Path, text: str) -> None:
    path.write_bytes(text.encode())
    assert read_word_probs(path).tolist() == pytest.approx([math.log(4), math.log(2)])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0.5\n\n0.5\n", r"line 2: '' is not a number"),
        ("0.5\n0.25\nword 0.5\n", r"line 3: 'word 0.5' is not a number"),
        ("nan\n", "line 1: 'nan' is not a number"),
        ("0.5\nNaN\n", "line 2: 'NaN' is not a number"),
        ("0.5\n1.5\n", "line 2: 1.5 is not a probability"),
        ("0.5\ninf\n", "line 2: inf is not a probability"),
        ("0.5\n0.5\n-0.5\n", "line 3: -0.5 is not a probability"),
        ("", "is empty"),
    ],
)
def test_a_line_that_is_no_probability_is_named(path: Path, text: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        read_word_probs(write(path, text))
    assert f"compare={path}" in str(caught.value)


def test_binary_rubbish_missing_files_and_folders_are_data_errors(path: Path) -> None:
    path.write_bytes(bytes(range(128, 256)) * 30)
    with pytest.raises(DataError, match="line 1"):
        read_word_probs(path)
    with pytest.raises(DataError, match="cannot read"):
        read_word_probs(path.parent)
    with pytest.raises(DataError, match="cannot read"):
        read_word_probs(path.parent / "missing")


@given(st.lists(st.booleans(), min_size=1, max_size=40).filter(any))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_is_laid_along_the_scored_tokens(path: Path, scored: list[bool]) -> None:
    places = [i for i, one in enumerate(scored) if one]
    values = np.arange(1.0, len(places) + 1)
    found = aligned(values, np.array(scored), path)
    expected = [math.nan] * len(scored)
    for place, value in zip(places, values, strict=True):
        expected[place] = value
    np.testing.assert_array_equal(found, expected)
    if len(places) > 1:  # without the first token, as published files are
        shorter = aligned(values[1:], np.array(scored), path)
        expected[places[0]] = math.nan
        np.testing.assert_array_equal(shorter, expected)


@pytest.mark.parametrize("length", [1, 3, 6, 8])
def test_a_file_of_another_length_is_of_another_text(path: Path, length: int) -> None:
    with pytest.raises(DataError, match=f"has {length} lines, the text 5 scored tokens"):
        aligned(np.ones(length), np.array([True, False, True, True, True, True]), path)


# Paired comparison


def units(nats: np.ndarray, counts: np.ndarray | float = 20.0) -> Units:
    return Units("line", nats.astype(np.float64), np.broadcast_to(np.asarray(counts, np.float64), nats.shape).copy())


def line_nats(seed: int, number: int = 300) -> np.ndarray:
    return np.random.default_rng(seed).normal(80.0, 20.0, number)


def test_a_model_against_itself_is_exactly_0() -> None:
    same = units(line_nats(0))
    found = compare_units("other", same, same, 500, 1)
    assert (found.nats_per_count, found.low, found.high, found.better) == (0.0, 0.0, 0.0, 0.0)
    assert found.ppl == found.other_ppl == pytest.approx(math.exp(line_nats(0).sum() / 6000))


@pytest.mark.parametrize(("gain", "better"), [(1.0, 1.0), (-1.0, 0.0)])
def test_what_is_better_line_by_line_is_better_in_all_resamples(gain: float, better: float) -> None:
    """The lines differ among themselves by 20 nats, the models by 1 a line: only a paired test sees it."""
    theirs = line_nats(0)
    noise = np.random.default_rng(1).normal(0.0, 2.0, len(theirs))
    found = compare_units("other", units(theirs - gain + noise), units(theirs), 1000, 1)
    assert found.better == better
    assert found.low <= found.nats_per_count <= found.high
    assert found.low * gain > 0 < found.high * gain
    assert found.nats_per_count == pytest.approx((gain - noise.mean()) / 20)
    spread = 2 * 1.96 * noise.std() / math.sqrt(len(noise)) / 20
    assert found.high - found.low == pytest.approx(spread, rel=0.15)


def test_models_that_differ_by_chance_alone_are_each_better_sometimes() -> None:
    theirs = line_nats(0)
    noise = np.random.default_rng(1).normal(0.0, 2.0, len(theirs))
    found = compare_units("other", units(theirs + noise - noise.mean()), units(theirs), 1000, 1)
    assert 0.3 < found.better < 0.7
    assert found.low < 0 < found.high


def test_swapping_the_models_turns_the_comparison_around() -> None:
    a, b = units(line_nats(0)), units(line_nats(0) + np.random.default_rng(2).normal(0.2, 2.0, 300))
    there, back = compare_units("b", a, b, 401, 7), compare_units("a", b, a, 401, 7)
    assert (there.ppl, there.other_ppl) == (back.other_ppl, back.ppl)
    assert there.nats_per_count == pytest.approx(-back.nats_per_count)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), rel=0.05)
    assert there.better == pytest.approx(1 - back.better)


def test_nats_are_weighed_by_counts_not_by_lines() -> None:
    counts = np.array([1.0, 99.0])
    found = compare_units("other", units(np.array([1.0, 99.0]), counts), units(np.array([11.0, 99.0]), counts), 10, 1)
    assert found.nats_per_count == pytest.approx(10 / 100)
    assert found.ppl == pytest.approx(math.e)


@pytest.mark.parametrize(("number", "resamples"), [(1, 100), (300, 0)])
def test_one_unit_or_no_resamples_say_nothing_of_chance(number: int, resamples: int) -> None:
    found = compare_units("other", units(line_nats(0, number)), units(line_nats(1, number)), resamples, 1)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert math.isnan(found.better)
    assert math.isfinite(found.nats_per_count)


def test_a_model_that_thinks_a_token_impossible_is_infinitely_worse() -> None:
    theirs = line_nats(0)
    theirs[::10] = math.inf
    found = compare_units("other", units(line_nats(0)), units(theirs), 200, 1)
    assert (found.other_ppl, found.nats_per_count, found.low, found.high) == (math.inf,) * 4
    assert found.better == 1.0


def test_the_best_mixture_is_that_of_a_grid_search_over_the_tokens_that_both_score() -> None:
    ours, theirs = NATS[:400].copy(), np.random.default_rng(5).permutation(NATS[:400]).astype(np.float32)
    ours[0] = theirs[7] = np.nan
    kept = ~(np.isnan(ours) | np.isnan(theirs))
    weight, mixture_N = best_mixture(ours, theirs)
    p, q = (np.exp(-n[kept].astype(np.float64)) for n in (ours, theirs))
    costs = {w / 1000: -float(np.log((1 - w / 1000) * p + w / 1000 * q).sum()) for w in range(1001)}
    best = min(costs, key=costs.__getitem__)
    assert weight == pytest.approx(best, abs=2e-3)
    assert np.array_equal(np.isnan(mixture_N), ~kept)
    assert np.nansum(mixture_N, dtype=np.float64) == pytest.approx(costs[best], rel=1e-5)

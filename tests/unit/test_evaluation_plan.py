"""Windows against plain loops over positions: what each token is predicted from, and that each is asked for once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkit.config.machine import Precision
from lmkit.config.model import NgramConfig
from lmkit.device import Device
from lmkit.errors import ConfigError
from lmkit.evaluation.plan import (
    NO_PREFIX,
    Segments,
    Windows,
    check_window,
    rolling,
    sliding,
    strided,
    unbroken,
)
from lmkit.evaluation.scoring import score
from lmkit.models.ngram import KneserNey

CPU = Device(torch.device("cpu"), Precision.fp32, False, False, "cpu")
PREFIX = 77


def seen(windows: Windows) -> dict[int, list[int]]:
    """Position -> the positions of the inputs it is predicted from, PREFIX for the prefix; each is scored once."""
    found: dict[int, list[int]] = {}
    for begin, scored, end, prefix in zip(
        windows.begins_W, windows.scored_W, windows.ends_W, windows.prefix_W, strict=True
    ):
        for position in range(scored, end):
            first = begin - 1 if prefix == NO_PREFIX else int(prefix)
            assert position not in found
            found[position] = [int(first), *range(begin, position)]
    return found


def segment_bounds(segments: Segments) -> Iterator[tuple[int, int]]:
    yield from zip(map(int, segments.begins_S), map(int, segments.ends_S), strict=True)


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[int, Segments]:
    """A text of up to 60 tokens cut anywhere, empty parts included where the first token of a part is scored too."""
    prefix = draw(st.sampled_from([PREFIX, NO_PREFIX]))
    lengths = draw(st.lists(st.integers(1 if prefix == NO_PREFIX else 0, 15), min_size=1, max_size=6))
    ends = np.cumsum(lengths)
    return int(ends[-1]), Segments(np.append(0, ends)[:-1], ends, prefix)


@given(cut_texts())
def test_unbroken_segments_predict_each_token_from_all_of_its_segment_before_it(case: tuple[int, Segments]) -> None:
    _, segments = case
    expected = {}
    for begin, end in segment_bounds(segments):
        for position in range(begin + (segments.prefix == NO_PREFIX), end):
            inputs = list(range(begin, position))
            expected[position] = inputs if segments.prefix == NO_PREFIX else [PREFIX, *inputs]
    assert seen(unbroken(segments)) == expected


@given(cut_texts(), st.integers(1, 9), st.data())
@settings(max_examples=200)
def test_sliding_windows_give_each_token_what_the_first_window_over_it_holds(
    case: tuple[int, Segments], context: int, data: st.DataObject
) -> None:
    _, segments = case
    stride = data.draw(st.integers(1, context))
    expected = {}
    for begin, end in segment_bounds(segments):
        line = list(range(begin, end)) if segments.prefix == NO_PREFIX else [PREFIX, *range(begin, end)]
        inputs, targets = line[:-1], line[1:]
        for i, target in enumerate(targets):
            start = 0
            while start + context <= i:
                start += stride
            expected[target] = inputs[start : i + 1]
    assert seen(sliding(segments, context, stride)) == expected


@given(cut_texts(), st.integers(1, 9))
@settings(max_examples=200)
def test_rolling_windows_are_those_of_the_harness(case: tuple[int, Segments], context: int) -> None:
    """get_rolling_token_windows with context_len 1 and make_disjoint_window, written out."""
    _, segments = case
    expected = {}
    for begin, end in segment_bounds(segments):
        ids = list(range(begin, end))
        if segments.prefix == NO_PREFIX:
            before_all, ids = ids[:1], ids[1:]
        else:
            before_all = [PREFIX]
        line, done = before_all + ids, 0
        while done < len(ids):
            if done == 0:
                given_tokens, new = before_all, ids[:context]
            else:
                length = min(len(ids) - done, context)
                stop = done + length
                # line is one longer than ids: line[i] is what ids[i] follows
                given_tokens, new = line[stop - context : done + 1], ids[done:stop]
            for i, target in enumerate(new):
                expected[target] = [*given_tokens, *new[:i]]
            done += len(new)
    assert seen(rolling(segments, context)) == expected


@given(st.integers(1, 60), st.integers(2, 12), st.data())
@settings(max_examples=200)
def test_strided_windows_are_those_of_the_published_loop(num_tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    expected: dict[int, list[int]] = {}
    previous_end = 0
    for start in range(0, num_tokens, stride):
        end = min(start + length, num_tokens)
        for position in range(start + 1, end):  # the shift in the model drops a window's first label
            if position >= previous_end:
                expected[position] = list(range(start, position))
        previous_end = end
        if end == num_tokens:
            break
    assert seen(strided(num_tokens, length, stride)) == expected


@given(st.integers(4, 80), st.integers(1, 6))
def test_stripes_are_equal_parts_without_the_rest_and_without_each_first_token(num_tokens: int, number: int) -> None:
    length = num_tokens // number
    if length < 2:
        with pytest.raises(ConfigError, match=f"too short for {number} stripes"):
            Segments.stripes(num_tokens, number)
        return
    expected = {}
    for stripe in range(number):
        for i in range(1, length):
            expected[stripe * length + i] = [stripe * length + k for k in range(i)]
    assert seen(unbroken(Segments.stripes(num_tokens, number))) == expected


@given(st.lists(st.booleans(), max_size=30))
def test_segments_end_with_the_marked_tokens_and_with_the_text(is_end: list[bool]) -> None:
    parts: list[list[int]] = [[]]
    for position, end in enumerate(is_end):
        parts[-1].append(position)
        if end:
            parts.append([])
    parts = [part for part in parts if part]
    segments = Segments.ending_with(np.array(is_end, dtype=np.bool_), PREFIX)
    assert [list(range(*bounds)) for bounds in segment_bounds(segments)] == parts


@given(cut_texts(), st.integers(1, 9))
def test_the_position_in_context_is_the_number_of_inputs_before_the_one_that_predicts(
    case: tuple[int, Segments], context: int
) -> None:
    num_tokens, segments = case
    windows = sliding(segments, context, max(1, context // 2))
    inputs = seen(windows)
    found = windows.positions_in_context(num_tokens)
    assert found.tolist() == [len(inputs[i]) - 1 if i in inputs else -1 for i in range(num_tokens)]
    assert windows.num_scored == len(inputs)


@given(cut_texts(), st.integers(1, 12), st.integers(1, 6), st.data())
def test_shortened_windows_score_the_same_from_the_last_inputs(
    case: tuple[int, Segments], context: int, field: int, data: st.DataObject
) -> None:
    windows = sliding(case[1], context, data.draw(st.integers(1, context)))
    inputs, short = seen(windows), seen(windows.shortened(field))
    assert short.keys() == inputs.keys()
    for position, found in short.items():
        assert found == inputs[position][-len(found) :]
        assert len(found) >= min(field, len(inputs[position]))


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_an_n_gram_model_scores_shortened_windows_alike(order: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 13, 300)
    model = KneserNey(NgramConfig(order=order), 13)
    model.fit(tokens, eos_id=1)
    for windows in (
        unbroken(Segments.whole(300, 1)),
        sliding(Segments.whole(300, 1), 20, 7),
        strided(300, 20, 5),
        unbroken(Segments.stripes(300, 7)),
        rolling(Segments.ending_with(tokens == 1, 1), 20),
    ):
        model.receptive_field = max(order - 1, 1)
        short = score(model, tokens, windows, seq_len=100, batch_size=3, device=CPU)
        model.receptive_field = None
        full = score(model, tokens, windows, seq_len=100, batch_size=3, device=CPU)
        assert np.array_equal(short.nats_N, full.nats_N, equal_nan=True)


def test_the_longest_window_and_a_choice_of_windows() -> None:
    windows = sliding(Segments.whole(20, PREFIX), 8, 4)
    assert windows.longest == 8
    assert seen(windows.take(np.array([1]))) == {i: list(range(3, i)) for i in range(8, 12)}
    assert windows.take(np.zeros(0, np.int64)).longest == windows.take(np.zeros(0, np.int64)).num_scored == 0


@pytest.mark.parametrize(
    ("context", "stride", "limit", "problem"),
    [
        (0, 1, None, "context=0 must be at least 1"),
        (9, 1, 8, "between 1 and the model's context of 8"),
        (8, 0, 8, "stride=0 must be between 1 and context=8"),
        (8, 9, 8, "stride=9"),
    ],
)
def test_a_window_that_would_leave_tokens_out_is_refused(
    context: int, stride: int, limit: int | None, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_window(context, stride, limit)


def test_the_widest_and_the_narrowest_window_are_allowed() -> None:
    check_window(8, 8, 8)
    check_window(1, 1, None)

"""When a run saves where nobody says so, and what it does when it cannot."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from storing import ByteTokenizer, open_run

from lmkit.config.training import OnSaveError, SaveConfig
from lmkit.errors import DivergedError, ResourceError
from lmkit.store import checkpoint_writer, saving, staging
from lmkit.store.checkpoint import VALID_LOSS, Snapshot, load_checkpoint
from lmkit.store.listing import list_checkpoints
from lmkit.store.runs import Run
from lmkit.store.saving import Saves, may_save

# Saves that fail


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, {"weight": torch.full((3,), float(step))}, {}, {"step": step}, {})


class Failing:
    """Makes chosen saves (counted from 1) fail."""

    def __init__(self, patch: pytest.MonkeyPatch, numbers: set[int], error: Exception) -> None:
        self.count = 0
        original = checkpoint_writer.CheckpointWriter._write

        def write(writer: Any, staged: Any) -> Path:
            self.count += 1
            if self.count in numbers:
                raise error
            return original(writer, staged)

        patch.setattr(checkpoint_writer.CheckpointWriter, "_write", write)


FULL = OSError(28, "No space left on device")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with open_run(tmp_path / "r") as made:
        made.begin(seed=1, command=["pretrain"], digests={})
        yield made


def saved(run: Run) -> list[int]:
    return [int(path.name[-12:]) for path in list_checkpoints(run.path)]


def wait_for(saves: Saves) -> None:
    """Poll until the save in flight is over, also if that is another try."""
    for _ in range(12_000):
        saves.poll()
        if saves.last_s or saves.retry_due:
            break
        time.sleep(0.005)


def test_a_failed_save_is_noticed_without_waiting_and_asks_for_one_retry(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    Failing(monkeypatch, {1}, FULL)
    warnings: list[str] = []
    with Saves(run, ByteTokenizer(), SaveConfig(), warnings.append) as saves:
        saves.save(snapshot(1))
        wait_for(saves)
        assert saves.retry_due
        saves.save(snapshot(2))
        saves.finish(snapshot(3))
        assert not saves.retry_due
    assert saved(run) == [2, 3]
    assert len(warnings) == 1
    assert "trying once more" in warnings[0]


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_save_that_fails_twice_stops_or_goes_on_as_configured(
    run: Run, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    Failing(monkeypatch, {1, 2}, FULL)
    warnings: list[str] = []
    with Saves(run, ByteTokenizer(), SaveConfig(on_error=OnSaveError[policy]), warnings.append) as saves:
        saves.save(snapshot(1))
        saves.wait()
        saves.save(snapshot(2))
        if policy == "stop":
            with pytest.raises(ResourceError, match="No space left"):
                saves.wait()
        else:
            saves.wait()
            assert not saves.retry_due
            saves.finish(snapshot(3))
    assert saved(run) == ([] if policy == "stop" else [3])
    assert len(warnings) == (1 if policy == "stop" else 2)


def test_the_last_save_is_tried_twice_and_then_the_run_fails_with_the_reason(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(monkeypatch, {2, 3}, FULL)
    warnings: list[str] = []
    with Saves(run, ByteTokenizer(), SaveConfig(), warnings.append) as saves:
        saves.save(snapshot(1))
        with pytest.raises(ResourceError, match=r"step-000000000001\).*No space left on device; free some .*resume"):
            saves.finish(snapshot(2))
        assert failing.count == 3
    assert saved(run) == [1]


def test_one_step_is_saved_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Failing(monkeypatch, set(), FULL)
    with Saves(run, ByteTokenizer(), SaveConfig(), pytest.fail) as saves:
        saves.save(snapshot(1))
        saves.save(snapshot(1))
        saves.finish(snapshot(1))
    assert counted.count == 1


def test_weights_that_are_not_finite_end_the_run_whatever_the_policy(run: Run) -> None:
    bad = Snapshot(1, {"weight": torch.tensor([float("nan")])}, {}, {}, {})
    with Saves(run, ByteTokenizer(), SaveConfig(), pytest.fail) as saves:
        saves.save(bad)
        with pytest.raises(DivergedError):
            saves.wait()
    assert saved(run) == []


def test_a_copy_that_finds_no_memory_is_a_failed_save(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("not enough memory")

    warnings: list[str] = []
    with Saves(run, ByteTokenizer(), SaveConfig(), warnings.append) as saves:
        with monkeypatch.context() as patch:
            patch.setattr(staging.torch, "empty", full)
            saves.save(snapshot(1))
            assert saves.retry_due
        saves.finish(snapshot(2))
    assert saved(run) == [2]


# Saves that are offered


@pytest.fixture(autouse=True)
def _usual_price(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "CHEAP_S", 0.1)


@pytest.mark.parametrize(
    ("cost_s", "whole_s", "all_s", "elapsed_s", "allowed"),
    [
        (0.0, 0.0, 0.0, 0.0, True),  # the first one: what it takes is not known
        (0.1, 0.1, 50.0, 1.0, True),  # cheap
        (0.1, 3.0, 50.0, 1.0, True),
        (1.0, 1.0, 1.0, 374.0, False),
        (1.0, 1.0, 1.0, 376.0, True),  # one, the next, and the last one of the run: 0.8 %
        (1.0, 3.0, 1.0, 624.0, False),
        (1.0, 3.0, 1.0, 626.0, True),  # for the last one the run waits
        (1.0, 0.5, 4.0, 687.0, False),
        (1.0, 0.5, 4.0, 688.0, True),
    ],
)
def test_saves_take_one_percent_of_the_time_the_last_one_included(
    cost_s: float, whole_s: float, all_s: float, elapsed_s: float, allowed: bool
) -> None:
    assert may_save(cost_s, whole_s, all_s, elapsed_s) is allowed


@pytest.mark.parametrize(("cost_s", "whole_s"), [(0.05, 0.2), (0.39, 0.8), (1.2, 2.4)])
def test_the_saves_of_ten_minutes_take_six_seconds_or_are_cheap(cost_s: float, whole_s: float) -> None:
    num_saves = 0
    for elapsed_s in (60.0 * number for number in range(1, 10)):
        num_saves += may_save(*(cost_s, whole_s) if num_saves else (0.0, 0.0), num_saves * cost_s, elapsed_s)
    assert num_saves == {0.05: 9, 0.39: 7, 1.2: 1}[cost_s]
    assert num_saves * cost_s + whole_s <= 4.8 + 0.1


def judged(step: int, loss: float) -> Snapshot:
    return Snapshot(step, {"weight": torch.full((3,), float(step))}, {}, {"step": step, VALID_LOSS: loss}, {})


@pytest.fixture
def dear(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every save takes a second of training's time; the time since the start, to set."""
    now = [0.0]
    monkeypatch.setattr(checkpoint_writer, "Cost", lambda *_: COST)
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    return now


COST = checkpoint_writer.Cost(copy_s=0.1, cpu_s=0.9, wall_s=1.5)
MANY = SaveConfig(keep=9)


def test_the_first_offer_is_saved_and_the_next_ones_when_time_allows(run: Run, dear: list[float]) -> None:
    with Saves(run, ByteTokenizer(), MANY, pytest.fail) as saves:
        saves.offer(judged(1, 5.0), best=True)
        saves.wait()
        for step, now in ((2, 60.0), (3, 120.0)):
            dear[0] = now
            saves.offer(judged(step, 5.0 - step), best=True)
            saves.poll()
        saves.wait()
        assert saved(run) == [1]
        dear[0] = 449.0
        saves.poll()
        saves.wait()
        assert saved(run) == [1]
        dear[0] = 451.0
        saves.poll()
        saves.wait()
        assert saved(run) == [1, 3]
        assert saves.step == 3
        saves.finish(judged(4, 0.5))
    assert saved(run) == [1, 3, 4]


def test_the_best_of_what_was_offered_is_held_as_it_was_and_saved_in_the_end(run: Run, dear: list[float]) -> None:
    with Saves(run, ByteTokenizer(), MANY, pytest.fail) as saves:
        saves.offer(judged(1, 5.0), best=True)
        best = judged(3, 3.0)
        for snapshot, is_best in ((judged(2, 4.0), True), (best, True), (judged(4, 3.5), False)):
            saves.offer(snapshot, best=is_best)
        best.model["weight"].zero_()  # training goes on
        saves.finish(judged(5, 3.6))
        saves.offer(judged(6, 2.0), best=True)
        saves.finish(judged(7, 1.0), best=True)
    assert saved(run) == [1, 3, 5, 7]
    assert load_checkpoint(list_checkpoints(run.path)[1], with_optimizer=False).model["weight"].tolist() == [3.0] * 3


def test_of_those_that_are_not_the_best_the_newest_is_held_and_what_is_asked_for_takes_its_place(
    run: Run, dear: list[float]
) -> None:
    with Saves(run, ByteTokenizer(), MANY, pytest.fail) as saves:
        for step in (1, 2, 3):
            saves.offer(judged(step, 3.0 + step), best=False)
        saves.flush()
        assert saved(run) == [1, 3]
        saves.offer(judged(4, 7.0), best=False)
        saves.save(judged(5, 8.0))
    assert saved(run) == [1, 3, 5]


@pytest.mark.parametrize("how", ["the block is left", "an exception"])
def test_what_is_held_is_saved_however_the_run_ends(run: Run, dear: list[float], how: str) -> None:
    def offers() -> None:
        with Saves(run, ByteTokenizer(), MANY, pytest.fail) as saves:
            saves.offer(judged(1, 5.0), best=True)
            saves.offer(judged(2, 4.0), best=True)
            if how == "an exception":
                raise DivergedError("the loss is not finite", "")

    if how == "an exception":
        with pytest.raises(DivergedError):
            offers()
    else:
        offers()
    assert saved(run) == [1, 2]


@pytest.mark.parametrize("failures", [{2}, {2, 3}, {2, 3, 4}])
def test_a_held_best_state_that_cannot_be_saved_is_tried_twice_and_so_is_the_last_one(
    run: Run, dear: list[float], monkeypatch: pytest.MonkeyPatch, failures: set[int]
) -> None:
    Failing(monkeypatch, failures, FULL)
    warnings: list[str] = []
    with Saves(run, ByteTokenizer(), MANY, warnings.append) as saves:
        saves.offer(judged(1, 5.0), best=True)
        saves.offer(judged(2, 4.0), best=True)
        saves.finish(judged(3, 4.5))
    assert saved(run) == ([1, 2, 3] if failures == {2} else [1, 3])
    assert len(warnings) == len(failures)
    assert "step-000000000002" in warnings[0]


def test_the_best_state_is_tried_again_itself_while_training_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Failing(monkeypatch, {1}, FULL)
    warnings: list[str] = []
    with Saves(run, ByteTokenizer(), MANY, warnings.append) as saves:
        saves.offer(judged(1, 5.0), best=True)
        wait_for(saves)
        saves.poll()
        assert not saves.retry_due
    assert saved(run) == [1]
    assert len(warnings) == 1


@pytest.mark.parametrize("then", ["offer", "finish"])
def test_the_best_state_is_tried_again_also_if_another_one_comes_before_its_failure_is_noticed(
    run: Run, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    Failing(monkeypatch, {1}, FULL)
    warnings: list[str] = []
    with Saves(run, ByteTokenizer(), MANY, warnings.append) as saves:
        saves.offer(judged(1, 5.0), best=True)
        if then == "offer":
            saves.offer(judged(2, 6.0), best=False)
        saves.finish(judged(3, 6.0))
    assert saved(run) == [1, 3]
    assert len(warnings) == 1


def test_a_best_state_that_failed_is_tried_again_where_saving_is_dear(
    run: Run, dear: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    Failing(monkeypatch, {2}, FULL)
    warnings: list[str] = []
    with Saves(run, ByteTokenizer(), MANY, warnings.append) as saves:
        saves.save(judged(1, 5.0), best=True)
        saves.save(judged(2, 4.0), best=True)
        saves.wait()
        assert saves.retry_due
        saves.poll()
        assert not saves.retry_due
    assert saved(run) == [1, 2]


def test_flush_waits_for_the_save_in_flight(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    original = checkpoint_writer.CheckpointWriter._write

    def write(writer: Any, staged: Any) -> Path:
        time.sleep(0.2)
        return original(writer, staged)

    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "_write", write)
    with Saves(run, ByteTokenizer(), MANY, pytest.fail) as saves:
        saves.save(judged(1, 5.0))
        saves.flush()
        assert saved(run) == [1]


def test_a_second_signal_does_not_wait_for_what_is_held(run: Run, dear: list[float]) -> None:
    def interrupted() -> None:
        with Saves(run, ByteTokenizer(), MANY, pytest.fail) as saves:
            saves.offer(judged(1, 5.0), best=True)
            saves.offer(judged(2, 4.0), best=True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert saved(run) == [1]


def test_beside_a_card_the_last_save_does_not_put_off_the_next_one(
    run: Run, dear: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take minutes, of which training waits for the copy alone."""
    cost = replace(COST, copy_s=0.2, cpu_s=9.0, wall_s=90.0)
    monkeypatch.setattr(checkpoint_writer, "Cost", lambda *_: cost)
    with Saves(run, ByteTokenizer(), MANY, pytest.fail, shares_cores=False) as saves:
        saves.offer(judged(1, 5.0), best=True)
        saves.wait()
        for now, steps in ((74.0, [1]), (76.0, [1, 2])):  # 0.8 % of which are three copies
            dear[0] = now
            saves.offer(judged(2, 4.0), best=True)
            saves.poll()
            saves.wait()
            assert saved(run) == steps


def test_copies_that_are_never_written_do_not_count(run: Run, dear: list[float]) -> None:
    with Saves(run, ByteTokenizer(), MANY, pytest.fail) as saves:
        for step in range(1, 300):
            saves.offer(judged(step, 1.0 / step), best=True)
        saves.wait()
        dear[0] = 451.0
        saves.poll()
        saves.wait()
        assert saved(run) == [1, 299]


@pytest.mark.parametrize("shares_cores", [True, False])
def test_the_cost_of_a_save_is_processor_time_where_training_needs_the_processor(
    run: Run, monkeypatch: pytest.MonkeyPatch, shares_cores: bool
) -> None:
    original = checkpoint_writer.CheckpointWriter._write

    def write(writer: Any, staged: Any) -> Path:
        busy_until = time.thread_time() + 0.3
        while time.thread_time() < busy_until:
            pass
        return original(writer, staged)

    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "_write", write)
    with Saves(run, ByteTokenizer(), MANY, pytest.fail, shares_cores=shares_cores) as saves:
        saves.offer(judged(1, 5.0), best=True)
        saves.wait()
        assert (saves.last_cost_s >= 0.3) is shares_cores
        saves.offer(judged(2, 4.0), best=True)
        saves.wait()
        assert saved(run) == ([1] if shares_cores else [1, 2])

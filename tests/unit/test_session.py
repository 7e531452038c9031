"""The parts of a session: requests to stop, limits of time, batches made ahead, advice in errors."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmkit import signals
from lmkit.commands.resuming import check_resumable
from lmkit.config.training import TrainConfig
from lmkit.console import Console
from lmkit.data.batches import Ahead, Batch, Lanes, Windows
from lmkit.errors import ConfigError, StoppedError
from lmkit.horizon import last_step
from lmkit.signals import SLURM_END, Deadline, StopRequests, find_deadline
from lmkit.store.incidents import out_of_memory, resume_command

# Requests


def has(name: str) -> int:
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"there is no {name} here")
    return int(number)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_the_first_signal_is_noted_and_the_second_one_interrupts(name: str) -> None:
    number = has(name)
    before = signal.getsignal(number)
    with StopRequests() as stop:
        stop.deferring = True
        assert stop.requested is None
        signal.raise_signal(number)
        assert stop.requested == name
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("name", ["SIGUSR2", "SIGHUP", "SIGUSR1"])
def test_signals_that_save_never_stop_however_often_they_come(name: str) -> None:
    number = has(name)
    with StopRequests(usr1_saves=True) as stop:
        for deferring in (False, True):
            stop.deferring = deferring
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert stop.requested is None
            assert stop.take_save_request() == name
            assert stop.take_save_request() is None


def test_before_there_is_anything_to_save_the_first_signal_ends_the_block() -> None:
    with pytest.raises(StoppedError, match="stopped by SIGTERM before the first step") as stopped, StopRequests():
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.exit_code == 75


def test_an_interrupt_that_no_signal_asked_for_stays_one() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequests():
        raise KeyboardInterrupt


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGHUP")
def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.take_save_request() is None
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_no_handler_is_touched() -> None:
    found: list[Any] = []

    def work() -> None:
        with StopRequests() as stop:
            found.append((signal.getsignal(signal.SIGTERM), stop.requested))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(before, None)]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_the_third_signal_ends_the_process_on_the_spot() -> None:
    code = (
        "import signal\nfrom lmkit.signals import StopRequests\nwith StopRequests() as stop:\n"
        "    stop.deferring = True\n    signal.raise_signal(signal.SIGTERM)\n    try:\n"
        "        signal.raise_signal(signal.SIGTERM)\n    except KeyboardInterrupt:\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 128 + signal.SIGTERM


# Limits of time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """time.monotonic() as a value to set; time.time() is ahead of it by 1000 s."""
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.time, "time", lambda: now[0] + 1000.0)
    monkeypatch.delenv(SLURM_END, raising=False)
    return now


def test_a_limit_asks_to_stop_a_tenth_of_it_or_a_minute_early_and_by_the_notice_earlier(clock: list[float]) -> None:
    stop = StopRequests(deadline=find_deadline(50.0, 0.0))
    clock[0] = 44.9
    assert stop.requested is None
    stop.notice_s = 2.0
    assert stop.requested == "train.time_limit"
    stop.notice_s = 0.0
    clock[0] = 45.1
    assert (stop.requested, stop.signalled) == ("train.time_limit", None)
    assert find_deadline(86400.0, 0.0) == Deadline("train.time_limit", 86400.0, 60.0)


def test_the_earlier_of_both_limits_counts(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SLURM_END, "1500")
    for limit_s, name in ((None, SLURM_END), (400.0, "train.time_limit"), (900.0, SLURM_END)):
        found = find_deadline(limit_s, 0.0)
        assert found is not None
        assert found.name == name
    monkeypatch.setenv(SLURM_END, "not a time")
    assert find_deadline(None, 0.0) is None


@pytest.mark.parametrize("text", ["", "3x", "-1h", "nan"])
def test_a_time_limit_that_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.time_limit="):
        TrainConfig(time_limit=text)


def test_everything_wrong_with_the_policies_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"max_skips=-1 .*workers=-2") as caught:
        TrainConfig(max_skips=-1, workers=-2, spike_nats=0.0)
    assert "spike_nats=0 must" in str(caught.value)


def test_the_last_step_is_the_smallest_limit() -> None:
    assert last_step(TrainConfig(max_steps=10, max_epochs=2.0), 100) == 10
    assert last_step(TrainConfig(max_steps=1000, max_epochs=2.0), 100) == 200
    assert last_step(TrainConfig(budget="10m"), 100) is None
    assert last_step(TrainConfig(), 100) == 300


# Batches


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("kind", ["lanes", "windows"])
def test_row_73_batches_made_ahead_are_the_same_in_any_order_of_steps(workers: int, kind: str) -> None:
    tokens = np.arange(500) % 97
    plain = Lanes(tokens, 0, 4, 8) if kind == "lanes" else Windows(tokens, 0, 4, 8, seed=3)
    with Ahead(plain, workers) as ahead:
        assert ahead.steps_per_epoch == plain.steps_per_epoch
        for step in [*range(20), 5, 6, 7, 10**9, 0, 1]:
            made, expected = ahead[step], plain[step]
            assert torch.equal(made.inputs_BT, expected.inputs_BT)
            assert torch.equal(made.targets_BT, expected.targets_BT)
            assert made.starts_text == expected.starts_text


def test_row_78_no_batch_before_the_first_one_is_made() -> None:
    asked: list[int] = []

    class Watched(Windows):
        def __getitem__(self, step: int) -> Batch:
            asked.append(step)
            return super().__getitem__(step)

    with Ahead(Watched(np.arange(500), 0, 4, 8, seed=3), 3) as ahead:
        _ = ahead[10**9]
    assert min(asked) == 10**9
    assert len(asked) <= 1 + 3 * Ahead.DEPTH


def test_batches_that_were_made_in_vain_are_dropped() -> None:
    with Ahead(Windows(np.arange(500), 0, 4, 8, seed=3), 2) as ahead:
        for step in (0, 100, 200, 300):
            _ = ahead[step]
        assert set(ahead._ready) == set(range(301, 301 + 2 * Ahead.DEPTH))


def test_what_goes_wrong_in_a_worker_is_raised_where_the_batch_is_asked_for() -> None:
    class Broken(Windows):
        def __getitem__(self, step: int) -> Batch:
            if step == 2:
                raise MemoryError("no memory")
            return super().__getitem__(step)

    with Ahead(Broken(np.arange(500), 0, 4, 8, seed=3), 2) as ahead:
        _ = ahead[0], ahead[1]
        with pytest.raises(MemoryError):
            _ = ahead[2]


def test_the_rows_of_a_batch_are_its_targets_without_padding() -> None:
    rows = Lanes(np.arange(10), 9, batch_size=3, seq_len=3)[1].rows(lambda ids: " ".join(map(str, ids)))
    assert rows == [
        {"row": 0, "text": "3", "ids": [3]},
        {"row": 1, "text": "7", "ids": [7]},
    ]


# Advice


def test_the_advice_to_resume_can_be_pasted() -> None:
    command = ["lmkit", "pretrain", "dataset.path=my texts", "run.dir=old", "train.micro_batch_size=8"]
    text = resume_command(command, Path("runs/a b"), "train.micro_batch_size=4")
    assert text == ("lmkit pretrain 'dataset.path=my texts' 'run.dir=runs/a b' resume=true train.micro_batch_size=4")
    assert resume_command(["lmkit", "pretrain", "-m", "seed=1,2"], Path("runs/1")) == (
        "the job's command with run.dir=runs/1 resume=true"
    )


@pytest.mark.parametrize(
    ("shape", "advice"),
    [((32, 32, 32), "train.micro_batch_size=16"), ((9, 9, 9), "train.micro_batch_size=3"),
     ((30, 15, 15), "train.micro_batch_size=5"), ((32, 32, 1), "use a smaller model or (in a new run) a lower key.of")],
)  # fmt: skip
def test_row_35_what_would_fit_divides_the_batch_of_a_process(shape: tuple[int, int, int], advice: str) -> None:
    length = ("key.of", "key.of=64")
    error = out_of_memory(MemoryError(), ["lmkit"], Path("r"), where="step 3", shape=shape, length=length, saved=2)
    assert error.exit_code == 6
    assert f"in parts of {shape[2]} and key.of=64; " in str(error)
    assert advice in str(error)


def test_the_policies_may_change_on_resume_and_the_shape_of_a_batch_may_not() -> None:
    old = {"train": {"batch_size": 4, "nonfinite": "stop", "workers": 0}}
    assert check_resumable(old, {"train": {"batch_size": 4, "nonfinite": "skip", "workers": 3}}) == [
        "train.nonfinite: stop -> skip",
        "train.workers: 0 -> 3",
    ]
    with pytest.raises(ConfigError, match=r"train\.batch_size: 4 -> 8"):
        check_resumable(old, {"train": {"batch_size": 8}})
    assert check_resumable(old, {**old, "base_had_base": True}) == []  # an older lmkit has not written it down


def test_a_tokenizer_may_lie_elsewhere_on_resume_since_its_digest_tells_whether_it_is_the_same() -> None:
    old, new = ({"tokenizer": {"kind": "hf", "path": f"{home}/tokenizer.json"}} for home in ("/old", "/new"))
    assert check_resumable(old, new) == ["tokenizer.path: /old/tokenizer.json -> /new/tokenizer.json"]


def test_keys_that_rows_do_not_read_may_change_on_resume_since_older_runs_were_given_them() -> None:
    def changes(kind: str) -> list[str]:
        old = {"task": {"kind": kind}, "train": {"seq_len": 64, "order": "windows"}}
        return check_resumable(old, {"task": {"kind": kind}, "train": {"seq_len": 128, "order": "auto"}})

    told = ["train.order: windows -> auto", "train.seq_len: 64 -> 128"]
    assert changes("classify") == changes("regress") == told
    with pytest.raises(ConfigError, match=r"train\.order: windows -> auto, train\.seq_len: 64 -> 128"):
        changes("instruct")


def test_beta1_may_change_on_resume_but_for_schedule_free_training_whose_average_it_decodes() -> None:
    def changes(kind: str) -> list[str]:
        old, new = ({"optimizer": {"kind": kind, "beta1": beta1}} for beta1 in (0.95, 0.9))
        return check_resumable(old, new)

    assert changes("adamw") == ["optimizer.beta1: 0.95 -> 0.9"]
    with pytest.raises(ConfigError, match=r"optimizer\.beta1: 0\.95 -> 0\.9"):
        changes("schedule_free")


def test_what_must_not_change_on_resume_is_shown_in_two_columns() -> None:
    shown = io.StringIO()
    old = {"model": {"d_model": 256, "num_layers": 6}, "train": {"seq_len": 128, "workers": 0}}
    new = {"model": {"d_model": 320, "num_layers": 6}, "train": {"seq_len": None, "workers": 2}}
    with pytest.raises(ConfigError):
        check_resumable(old, new, Console(shown))
    lines = [line.split() for line in shown.getvalue().splitlines()]
    assert lines == [["key", "the", "run", "now"], ["model.d_model", "256", "320"], ["train.seq_len", "128", "null"]]

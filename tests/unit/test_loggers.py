"""Loggers besides metrics.jsonl: what is sent, what is not sent twice, and that none of them can stop a run."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from storing import open_run

from lmkit import loggers
from lmkit.config.loggers import (
    LoggerConfig,
    MlflowLoggerConfig,
    TensorboardLoggerConfig,
    TrackioLoggerConfig,
)
from lmkit.errors import DivergedError, ResourceError, StoppedError
from lmkit.loggers import AttachedLogger, Logger, attach_logger, require_logger
from lmkit.store.found import read_metrics
from lmkit.store.runs import Run

CONFIG = {"seed": 1, "model": {"kind": "lstm", "d_hidden": 32}, "nothing": None}


class Fake(Logger):
    """Notes what it is told, and fails from a step or at a method that is named."""

    def __init__(self, fails_at: int | str | None = None) -> None:
        self.fails_at = fails_at
        self.sent: list[tuple[int, dict[str, float]]] = []
        self.calls: list[tuple[str, Any]] = []

    def start(self, name: str, config: Mapping[str, Any], run_id: str | None) -> str:
        self.calls.append(("start", run_id))
        if self.fails_at == "start":
            raise ConnectionError("no route to host")
        return run_id or "external"

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.calls.append(("log", step))
        if isinstance(self.fails_at, int) and step >= self.fails_at:
            raise RuntimeError("the server is gone")
        self.sent.append((step, dict(numbers)))

    def finish(self, status: str) -> None:
        self.calls.append(("finish", status))
        if self.fails_at == "finish":
            raise OSError("disk full")


def attach(run: Run, logger: Logger, warnings: list[str]) -> None:
    attached = AttachedLogger(logger, "fake", run.path, warnings.append)
    attached.start("name", {"seed": 1})
    run.attach(attached)


def train(run: Run, first: int, last: int) -> None:
    for step in range(first, last + 1):
        run.log_metrics({"step": step, "loss": 1.0 / step, "lr": 0.1, "elapsed_s": float(step)})
        if step % 2 == 0:
            run.log_metrics({"step": step, "valid_loss": 2.0 / step, "elapsed_s": step + 0.5})


def losses(logger: Fake, name: str = "train/loss") -> list[int]:
    return [step for step, numbers in logger.sent if name in numbers]


def test_every_finite_number_of_a_row_is_sent_by_what_it_is_of(tmp_path: Path) -> None:
    fake = Fake()
    with open_run(tmp_path / "a") as run:
        attach(run, fake, [])
        run.log_metrics({"step": 3, "loss": 2.5, "skipped": 0, "grad_norm": float("nan"), "note": "text", "ok": True})
        run.log_metrics({"step": 3, "valid_loss": 2.0, "valid_ppl": 7.4})
    assert fake.sent == [(3, {"train/loss": 2.5, "train/skipped": 0.0}), (3, {"valid/loss": 2.0, "valid/ppl": 7.4})]


def test_a_killed_run_that_goes_on_sends_no_step_twice_to_the_same_external_run(tmp_path: Path) -> None:
    first, second = Fake(), Fake()
    with open_run(tmp_path / "a") as run:
        attach(run, first, [])
        train(run, 1, 5)
    with open_run(tmp_path / "a", resume=True) as run:
        run.cut_metrics(3)  # the checkpoint that it goes on from
        attach(run, second, [])
        train(run, 4, 8)
    assert second.calls[0] == ("start", "external")
    assert losses(first) + losses(second) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert losses(first, "valid/loss") + losses(second, "valid/loss") == [2, 4, 6, 8]


def test_a_logger_that_is_switched_on_later_gets_what_was_before(tmp_path: Path) -> None:
    fake = Fake()
    with open_run(tmp_path / "a") as run:
        train(run, 1, 3)
        attach(run, fake, [])
        train(run, 4, 4)
    assert losses(fake) == [1, 2, 3, 4]
    assert losses(fake, "valid/loss") == [2, 4]


def test_steps_never_go_back_after_a_rollback(tmp_path: Path) -> None:
    fake = Fake()
    with open_run(tmp_path / "a") as run:
        attach(run, fake, [])
        train(run, 1, 5)
        run.cut_metrics(2)
        train(run, 3, 7)
    steps = [step for step, _ in fake.sent]
    assert steps == sorted(steps)
    assert losses(fake) == [1, 2, 3, 4, 5, 6, 7]


def test_a_logger_that_fails_is_one_warning_and_the_run_goes_on_without_it(tmp_path: Path) -> None:
    fake, warnings = Fake(fails_at=3), list[str]()
    with open_run(tmp_path / "a") as run:
        attach(run, fake, warnings)
        train(run, 1, 6)
    assert len(read_metrics(tmp_path / "a")) == 9
    (warning,) = warnings
    assert "logger=fake is off" in warning
    assert "RuntimeError: the server is gone" in warning
    assert [call for call in fake.calls if call[0] == "log"] == [("log", 1), ("log", 2), ("log", 2), ("log", 3)]
    assert fake.calls[-1][0] == "log"


def test_what_a_logger_missed_while_it_was_off_is_sent_when_the_run_goes_on(tmp_path: Path) -> None:
    again = Fake()
    with open_run(tmp_path / "a") as run:
        attach(run, Fake(fails_at=3), [])
        train(run, 1, 6)
    with open_run(tmp_path / "a", resume=True) as run:
        attach(run, again, [])
    assert losses(again) == [3, 4, 5, 6]


def test_a_new_external_run_that_cannot_begin_is_an_error_and_one_that_cannot_go_on_a_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    with open_run(tmp_path / "a") as run:
        with pytest.raises(ResourceError, match=r"logger=fake cannot begin a run: ConnectionError: no route"):
            attach(run, Fake(fails_at="start"), warnings)
        attach(run, Fake(), warnings)
        train(run, 1, 1)
    with open_run(tmp_path / "a", resume=True) as run:
        attach(run, Fake(fails_at="start"), warnings)
        train(run, 2, 2)
    assert [("no route to host" in warning) for warning in warnings] == [True]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "finished"),
        (StoppedError("SIGTERM"), "stopped"),
        (DivergedError("nan"), "diverged"),
        (RuntimeError("bug"), "crashed"),
        (KeyboardInterrupt(), "stopped"),
    ],
)
def test_the_external_run_is_told_how_it_ended(tmp_path: Path, error: BaseException | None, status: str) -> None:
    fake = Fake(fails_at="finish")
    warnings: list[str] = []
    expected = contextlib.nullcontext() if error is None else pytest.raises(type(error))
    with expected, open_run(tmp_path / "a") as run:
        attach(run, fake, warnings)
        if error is not None:
            raise error
    assert fake.calls[-1] == ("finish", status)
    assert len(warnings) == 1
    open_run(tmp_path / "a", resume=True).close()  # the lock is free


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b'{"fake": 3}',
        b'{"fake": {"id": "x", "last": [1]}}',
        b'{"fake": {"id": "x", "last": {"train/loss": "two"}}}',
    ],
)
def test_a_damaged_state_begins_a_new_external_run(tmp_path: Path, damage: bytes) -> None:
    fake = Fake()
    with open_run(tmp_path / "a") as run:
        (run.path / loggers.STATE).write_bytes(damage)
        attach(run, fake, [])
        train(run, 1, 2)
    assert fake.calls[0] == ("start", None)
    assert losses(fake) == [1, 2]


@pytest.mark.parametrize("config", [TensorboardLoggerConfig(), MlflowLoggerConfig(), TrackioLoggerConfig()])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    config: LoggerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    package = loggers.PACKAGES[type(config)]
    with pytest.raises(ResourceError) as error:
        require_logger(config)
    assert error.value.exit_code == 6
    assert f"pip install 'lmkit[{package}]'" in str(error.value)


def test_no_logger_needs_nothing_and_writes_nothing(tmp_path: Path) -> None:
    require_logger(LoggerConfig())
    with open_run(tmp_path / "a") as run:
        attach_logger(LoggerConfig(), run, CONFIG, pytest.fail)
        train(run, 1, 1)
    assert not (tmp_path / "a" / loggers.STATE).exists()


# The real libraries, offline. Each runs in a process of its own, which is killed, and then goes on in a second one.

PROGRAM = """
import os, sys
from pathlib import Path
from lmkit.config.loggers import *
from lmkit.loggers import attach_logger
from lmkit.store.runs import Run

path, config, resume = Path(sys.argv[1]), eval(sys.argv[2]), sys.argv[3] == "resume"
warnings = []
stored = {"seed": 1, "model": {"kind": "lstm", "long": "x" * 9000, "none": None, "list": [1, 2]}}
with Run.create(path, root=path.parent, dataset="d", model="m", resume=resume, warn=warnings.append) as run:
    run.begin(seed=1, command=["lmkit"], digests={})
    run.cut_metrics(3 if resume else 0)
    attach_logger(config, run, stored, warnings.append)
    for step in range(4, 9) if resume else range(1, 6):
        run.log_metrics({"step": step, "loss": 10.0 / step, "lr": 0.5, "elapsed_s": float(step)})
        if step % 2 == 0:
            run.log_metrics({"step": step, "valid_loss": 20.0 / step})
    assert warnings == [], warnings
    if not resume:
        if "rackio" in sys.argv[2] or "andb" in sys.argv[2]:
            run._listeners[0].end(RuntimeError())  # their threads and services have sent what was logged
        os._exit(9)
assert warnings == [], warnings
"""


def twice(tmp_path: Path, config: str, **environment: str) -> Path:
    """A run that is killed after step 5 and goes on from the checkpoint of step 3 to step 8."""
    path = tmp_path / "run"
    for mode, code in (("new", 9), ("resume", 0)):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(path), config, mode],
            env={**os.environ, "HOME": str(tmp_path), **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, done.stderr
        assert done.stdout == ""
    return path


TRAIN = [(step, 10.0 / step) for step in range(1, 9)]
VALID = [(step, 20.0 / step) for step in range(2, 9, 2)]


@pytest.mark.extra("tensorboard")
def test_tensorboard_has_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    accumulators = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    path = twice(tmp_path, "TensorboardLoggerConfig()")
    events = accumulators.EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    for name, values in (("train/loss", TRAIN), ("valid/loss", VALID)):
        assert [(e.step, pytest.approx(e.value)) for e in events.Scalars(name)] == values
    assert "config/text_summary" in events.Tags()["tensors"]


@pytest.mark.extra("mlflow")
def test_mlflow_has_each_step_once_in_one_run(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    tracking = importlib.import_module("mlflow.tracking")
    uri = f"sqlite:///{(tmp_path / 'mlflow.db').as_posix()}"
    twice(tmp_path, f"MlflowLoggerConfig(uri={uri!r})")
    client = tracking.MlflowClient(uri)
    experiment = client.get_experiment_by_name("lmkit")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.kind"] == "lstm"
    for name, values in (("train/loss", TRAIN), ("valid/loss", VALID)):
        assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] == values


@pytest.mark.extra("wandb")
def test_wandb_has_each_step_once_under_one_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    path = twice(tmp_path, "WandbLoggerConfig(offline=True)", WANDB_CACHE_DIR=str(tmp_path))
    folders = sorted((path / "wandb").glob("offline-run-*"))
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1
    found: dict[str, list[tuple[int, float]]] = {"train/loss": [], "valid/loss": []}
    for folder in folders:
        for row in wandb_history(next(folder.glob("*.wandb"))):
            for name, values in found.items():
                if name in row:
                    values.append((int(row["_step"]), row[name]))
    assert found == {"train/loss": TRAIN, "valid/loss": VALID}


def wandb_history(path: Path) -> list[dict[str, float]]:
    """The rows in a file of wandb's own format: a header of 7 bytes, then the log format of LevelDB.

    That is blocks of 32 KiB; a piece has 4 bytes of checksum, 2 of length and 1 that says whether it is whole (1), or
    the first (2), a middle (3) or the last (4) piece of a record.
    """
    records = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, position, pending, rows = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if (room := 32768 - position % 32768) < 7:
            position += room
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        pending += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):
            record = records.Record()
            record.ParseFromString(pending)
            pending = b""
            if record.WhichOneof("record_type") == "history":
                items = [i for i in record.history.item if _is_number(i)]
                rows.append({(i.key or ".".join(i.nested_key)): float(i.value_json) for i in items})
    return rows


def _is_number(item: Any) -> bool:
    try:
        float(item.value_json)
    except ValueError:
        return False
    return True


@pytest.mark.extra("trackio")
def test_trackio_has_each_step_once_in_one_run(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    twice(tmp_path, "TrackioLoggerConfig()", TRACKIO_DIR=str(tmp_path / "trackio"))
    program = """
import json
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("lmkit")
print(json.dumps([{k: v for k, v in row.items() if k != "timestamp"} for row in SQLiteStorage.get_logs("lmkit", run)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    for name, values in (("train/loss", TRAIN), ("valid/loss", VALID)):
        assert sorted((row["step"], row[name]) for row in rows if name in row) == values

"""Several processes train what one process trains: the same losses, weights and state, whatever happens on the way.

The file is a test module and, started by torchrun with PARALLEL DIR CORPUS CASE..., each of its processes.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmkit import distributed, launch
from lmkit.cli import main
from lmkit.commands import pretrain, training
from lmkit.commands.place import check_sharding, deal
from lmkit.config import SCHEMAS
from lmkit.config.commands import PretrainConfig
from lmkit.config.data import ByteTokenizerConfig, TextConfig
from lmkit.config.machine import DeviceConfig, DeviceType, Precision, Switch
from lmkit.config.model import RecurrentConfig, TransformerConfig, VaeLstmConfig
from lmkit.config.objectives import VaeObjectiveConfig
from lmkit.config.optimization import AdamwConfig, CosineConfig, MuonConfig, PlateauConfig, ScheduleFreeConfig
from lmkit.config.parallel import DdpConfig, FsdpConfig, ParallelConfig
from lmkit.config.training import (
    Average,
    EvalConfig,
    LogConfig,
    NewRunConfig,
    NonFinite,
    SaveConfig,
    TrainConfig,
)
from lmkit.device import resolve_device
from lmkit.distributed import SINGLE, LostError, World, find_world
from lmkit.errors import CheckpointError, ConfigError, DataError, LmkitError, StoppedError
from lmkit.reporting import FIRST_S, said_by_first
from lmkit.sharding import is_sharded
from lmkit.store.browse import read_journal
from lmkit.store.checkpoint import Snapshot, latest_checkpoint, list_checkpoints, load_checkpoint
from lmkit.store.found import read_metrics, read_result
from lmkit.store.sweeps import read_failures
from lmkit.timing import Timing
from lmkit.train import Trainer

TRANSFORMER = TransformerConfig(d_model=32, num_layers=2, num_heads=2, context=32, dropout=0.1)
LSTM = RecurrentConfig(d_embed=24, d_hidden=32, num_layers=2, dropout_recurrent=0.2, dropout_embed=0.1)
STEPS = 10
STOP_STEP = 5
POISON = {7: {(3, 5)}, 8: {(4, 5), (7, 2)}}
"""Seed of a run -> what is not finite in it: (steps done before, micro-batch), which one of the processes has."""
COMPARED = ("step", "loss", "valid_loss", "grad_norm", "lr", "num_targets", "skipped", "progress", "epoch")


def base(root: Path, corpus: Path, name: str, **train: object) -> PretrainConfig:
    values = {"batch_size": 8, "micro_batch_size": 1, "seq_len": 16, "max_steps": STEPS} | train
    return PretrainConfig(
        dataset=TextConfig(path=str(corpus)),
        tokenizer=ByteTokenizerConfig(),
        model=TRANSFORMER,
        optimizer=AdamwConfig(lr=3e-3),
        schedule=CosineConfig(),
        device=DeviceConfig(type=DeviceType.cpu, threads=1),
        train=TrainConfig(**values),  # type: ignore[arg-type]
        log=LogConfig(every_steps=1),
        eval=EvalConfig(every_steps=3),
        save=SaveConfig(every_steps=1000),
        run=NewRunConfig(dir=str(root / name), root=str(root)),
    )


def averaged(root: Path, corpus: Path) -> PretrainConfig:
    return base(root, corpus, "averaged", average=Average.ema, ema_decay=0.9)


def carried(root: Path, corpus: Path) -> PretrainConfig:
    return replace(base(root, corpus, "carried"), model=LSTM, schedule=PlateauConfig())


def left_out(root: Path, corpus: Path) -> PretrainConfig:
    """One micro-batch of a step is not finite (see POISON); several processes read that late, as on cards."""
    return replace(base(root, corpus, "left_out", nonfinite=NonFinite.skip, max_skips=STEPS), seed=7)


def rolled_back(root: Path, corpus: Path) -> PretrainConfig:
    """Two steps are not finite, each in another process: the run goes back to the save before, and on without them."""
    config = base(root, corpus, "rolled_back", nonfinite=NonFinite.rollback)
    return replace(config, model=LSTM, save=SaveConfig(every_steps=3), seed=8)


def rolled_again(root: Path, corpus: Path) -> PretrainConfig:
    """The same once more: these two end with the same bits."""
    again = rolled_back(root, corpus)
    return replace(again, run=NewRunConfig(dir=str(root / "rolled_again"), root=str(root)))


def stopped(root: Path, corpus: Path) -> PretrainConfig:
    """Asked to stop in its last process only, and continued."""
    return replace(base(root, corpus, "stopped"), model=LSTM)


def undisturbed(root: Path, corpus: Path) -> PretrainConfig:
    """The same, without a stop: these two end with the same bits."""
    return replace(base(root, corpus, "undisturbed"), model=LSTM)


def begun(root: Path, corpus: Path) -> PretrainConfig:
    """Begun, and stopped, by one process; its micro-batches leave one of two processes none at an epoch's end."""
    config = base(root, corpus, "begun", micro_batch_size=2, seq_len=24)
    return replace(config, optimizer=MuonConfig())


CASES: dict[str, Callable[[Path, Path], PretrainConfig]] = {
    made.__name__: made
    for made in (averaged, carried, left_out, rolled_back, rolled_again, stopped, undisturbed, begun)
}
TWINS = {"undisturbed": "stopped", "rolled_again": "rolled_back"}
"""Cases that end with the same bits as others."""


def poisoned(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Trainer.run_micro_batch`` that gives NaN where POISON says so."""

    def run_micro_batch(self: Trainer, batch: Any, micro: int, progress: float) -> Any:
        loss, state = original(self, batch, micro, progress)
        bad = (self.state.step, micro) in POISON.get(self.seed, ())
        return loss * math.nan if bad else loss, state

    return run_micro_batch


follow = Timing.follow


def follow_and_stop(self: Timing) -> None:
    """``Timing.follow`` that asks the run to stop after STOP_STEP."""
    follow(self)
    if self.state.step == STOP_STEP:
        signal.raise_signal(signal.SIGTERM)


# What each process does


def work(parallel: str, root: Path, corpus: Path, names: list[str]) -> None:
    """Train the cases; write down the digest of the whole weights that this process ends with, and what it left out."""
    rank = int(os.environ["RANK"])
    trainers: list[Trainer] = []
    original_build = training.build_trainer

    def build(*args: object) -> Trainer:
        trainers.append(original_build(*args))  # type: ignore[arg-type]
        return trainers[-1]

    training.build_trainer = build  # type: ignore[assignment]
    training.plot_run = lambda *_: None  # as in tests/conftest.py, which does not reach this process
    Trainer.run_micro_batch = poisoned(Trainer.run_micro_batch)  # type: ignore[method-assign]
    for name in names:
        config = replace(CASES[name](root, corpus), parallel=SCHEMAS["parallel"][parallel](timeout_s=250.0))
        config.resume = name == "begun"
        stops = name == "stopped" and rank == int(os.environ["WORLD_SIZE"]) - 1
        Timing.follow = follow_and_stop if stops else follow  # type: ignore[method-assign]
        training.pays_to_read_late = lambda device, name=name: name == "left_out"  # type: ignore[misc,assignment]
        try:
            pretrain.run(config)
        except (StoppedError, SystemExit) as end:
            code = end.code if isinstance(end, SystemExit) else end.exit_code
            (root / f"{name}-code-{rank}").write_text(str(code), encoding="utf-8")
            pretrain.run(replace(config, resume=True))
        digest = hashlib.sha256()
        for tensor in trainers[-1].model.state_dict().values():
            digest.update(b"" if is_sharded(tensor) else tensor.numpy().tobytes())
        end = f"{digest.hexdigest()} {trainers[-1].state.step} {trainers[-1].state.skipped_steps}"
        (root / f"{name}-end-{rank}").write_text(end, encoding="utf-8")


# What is true of it


def torchrun(processes: int, *words: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *launcher, *words]


def newest(run: Path) -> Snapshot:
    path = latest_checkpoint(run, pytest.fail)
    assert path is not None
    return load_checkpoint(path, with_optimizer=True)


def assert_close(first: Path, second: Path) -> None:
    """Weights, optimizer, averages, carried state and everything that was logged are the same up to rounding."""
    one, two = newest(first), newest(second)
    assert one.step == two.step
    for left, right in ((one.model, two.model), (one.optimizer, two.optimizer)):
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            torch.testing.assert_close(right[name], tensor, atol=1e-5, rtol=1e-4, msg=f"{name} differs")
    rows = [[{k: row[k] for k in COMPARED if k in row} for row in read_metrics(run)] for run in (first, second)]
    assert len(rows[0]) == len(rows[1])
    for left, right in zip(*rows, strict=True):
        assert right == pytest.approx(left, rel=1e-4, abs=1e-6, nan_ok=True)


def assert_same_bits(first: Path, second: Path) -> None:
    one, two = newest(first), newest(second)
    assert one.step == two.step
    for left, right in ((one.model, two.model), (one.optimizer, two.optimizer)):
        assert left.keys() == right.keys()
        assert [name for name in left if not torch.equal(left[name], right[name])] == []


def check_cases(
    parallel: str, processes: int, tmp_path: Path, corpus: Path, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    several, alone = tmp_path / "several", tmp_path / "alone"
    several.mkdir()
    if "begun" in names:
        with monkeypatch.context() as patch:
            patch.setattr(Timing, "follow", follow_and_stop)
            with pytest.raises(StoppedError):
                pretrain.run(CASES["begun"](several, corpus))
    words = torchrun(processes, __file__, parallel, str(several), str(corpus), *names)
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    monkeypatch.setattr(Trainer, "run_micro_batch", poisoned(Trainer.run_micro_batch))
    for name in names:
        if name in TWINS:
            assert_same_bits(several / TWINS[name], several / name)
        else:
            pretrain.run(CASES[name](alone, corpus))
            assert_close(alone / name, several / name)
        ends = {(several / f"{name}-end-{rank}").read_text(encoding="utf-8") for rank in range(processes)}
        assert len(ends) == 1, f"{name}: the weights of the processes are not the same bits, or what they left out"
        result = read_result(several / name)
        assert result is not None
        assert result["step"] == STEPS
        assert done.stderr.count(f"run: {several / name}\n") == (2 if name == "stopped" else 1)  # one console
    if "left_out" in names:
        assert newest(several / "left_out").state["skipped_steps"] == [4]
    if "rolled_back" in names:
        for run in (alone / "rolled_back", several / "rolled_back"):
            events = [event for event in read_journal(run) if event["event"] == "rollback"]
            assert [(event["step"], event["skipped"]) for event in events] == [(3, [5]), (6, [5, 8])]
            assert newest(run).state["skipped_steps"] == [5, 8]
    if "stopped" in names:
        assert {(several / f"stopped-code-{rank}").read_text(encoding="utf-8") for rank in range(processes)} == {"75"}
        assert read_metrics(several / "stopped")[-1]["step"] == STEPS


def test_rows_46_54_60_two_processes_compute_what_one_does_with_the_same_bits_in_both(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["averaged", "carried", "left_out", "rolled_back", "rolled_again", "stopped", "undisturbed"]
    check_cases("ddp", 2, tmp_path, corpus, names, monkeypatch)


def test_two_processes_with_the_model_in_pieces_compute_what_one_does(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["averaged", "begun", "left_out", "rolled_back", "stopped", "undisturbed"]
    check_cases("fsdp", 2, tmp_path, corpus, names, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_four_processes_compute_what_one_does(
    parallel: str, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name in CASES if not name.startswith("rolled")]  # what two do is enough there
    check_cases(parallel, 4, tmp_path, corpus, names, monkeypatch)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_rows_17_72_a_killed_process_ends_the_job_and_one_process_goes_on_from_its_checkpoint(
    parallel: str, tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [
        *("pretrain", "dataset=text", f"dataset.path={corpus}", "tokenizer=byte", "model=lstm", "schedule=constant"),
        *("model.d_embed=16", "model.d_hidden=16", "device=cpu", "train.batch_size=4", "train.seq_len=16"),
        *("train.micro_batch_size=2", "eval.every_steps=1000000", "save.every_steps=10", "schedule.warmup_steps=5"),
    ]
    run = tmp_path / "killed"
    endless = [*words, f"run.dir={run}", "train.max_steps=1000000", f"parallel={parallel}"]
    with subprocess.Popen(torchrun(2, "-m", "lmkit", *endless), stderr=subprocess.PIPE, text=True) as job:
        try:
            until = time.monotonic() + 400
            while not list_checkpoints(run) and job.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            os.kill(process_of_rank(1 if list_checkpoints(run) else 0, job.pid), signal.SIGKILL)
            said = job.communicate(timeout=120)[1]
        finally:
            job.terminate()  # or it would train for ever
    assert latest_checkpoint(run, pytest.fail) is not None, said
    assert job.returncode == 1
    assert said.count("error: the processes lost each other") <= 1
    assert [p.name for p in (run / "checkpoints").iterdir() if not p.name.startswith((".tmp-", "step-"))] == []
    steps = newest(run).step + 5
    assert main([*words, f"run.dir={run}", f"train.max_steps={steps}", "resume=true"]) == 0
    assert main([*words, f"run.dir={tmp_path / 'whole'}", f"train.max_steps={steps}"]) == 0
    capfd.readouterr()
    one, two = newest(tmp_path / "whole"), newest(run)
    assert one.step == two.step == steps
    for name, tensor in {**one.model, **one.optimizer}.items():
        torch.testing.assert_close({**two.model, **two.optimizer}[name], tensor, atol=1e-5, rtol=1e-4)


def process_of_rank(rank: int, parent: int) -> int:
    import psutil

    for child in psutil.Process(parent).children():
        if child.environ().get("RANK") == str(rank):
            return int(child.pid)
    raise AssertionError(f"no process of rank {rank}")


def test_a_world_of_one_is_bit_identical_to_no_parallel(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain.run(carried(tmp_path / "none", corpus))
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    pretrain.run(replace(carried(tmp_path / "ddp", corpus), parallel=DdpConfig()))
    one, two = newest(tmp_path / "none" / "carried"), newest(tmp_path / "ddp" / "carried")
    for left, right in ((one.model, two.model), (one.optimizer, two.optimizer)):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


# What is refused


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("no such file"), 3),
        (OSError(errno.ENOSPC, "No space left on device"), 6),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 6),
        (ValueError("a bug"), 1),
    ],
)
def test_the_others_leave_with_the_exit_code_of_the_first_one_s_error(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[float]] = []

    def agree(world: World, decision: Sequence[float], requests: Sequence[bool] = ()) -> tuple[list[float], list[bool]]:
        told.extend([list(decision)] if world.is_first else [])
        return told[-1], []

    def fail() -> str:
        raise error

    monkeypatch.setattr(World, "agree", agree)
    with pytest.raises(type(error)):
        World(rank=0, size=2).tell(fail)
    with pytest.raises(SystemExit) as left:
        World(rank=1, size=2).tell(fail)
    assert left.value.code == code


def test_the_first_one_says_its_error_where_the_others_have_given_up_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise LostError("lost each other", "timed out")

    def full() -> str:
        raise DataError("the text changed while it was read")

    monkeypatch.setattr(World, "agree", lost)
    with pytest.raises(DataError, match="changed while it was read"):
        World(rank=0, size=2).tell(full)


JOINED = """
import atexit, sys
import torch.distributed as dist
import lmkit.distributed
from lmkit import cli
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
atexit.register(print, "shut down")
sys.exit(cli.main(["prepare", "dataset=text", "dataset.path=none"]))
"""


def test_a_process_that_an_error_leaves_joined_to_others_does_not_shut_python_down() -> None:
    """The threads that connect it to them would abort it at times, and the exit code with it."""
    done = subprocess.run([sys.executable, "-c", JOINED], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    assert done.stderr.startswith("error: ")


def test_row_18_processes_that_find_the_checkpoints_of_different_steps_are_refused() -> None:
    class Other:
        """What the second of two processes is told, where the first one has found step 12."""

        def agree(self, values: list[float], requests: Sequence[bool] = ()) -> tuple[list[float], Sequence[bool]]:
            return [12.0] * len(values), requests

    job: Any = SimpleNamespace(place=SimpleNamespace(world=Other()), run=SimpleNamespace(path=Path("runs/one")))
    training._check_shared(job, 12)
    with pytest.raises(CheckpointError, match=r"not all processes find the checkpoint of step 12 in runs/one"):
        training._check_shared(job, 8)


ENVIRONMENT = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("batch", "micro", "remedy"),
    [
        (6, None, r"train.batch_size=6 cannot be dealt to 4 processes; make it a multiple of 4"),
        (8, 4, r"makes 2 micro-batches of a step, .* 4 processes; use train.micro_batch_size=2"),
        (12, 2, r"makes 6 micro-batches .*; use train.micro_batch_size=1"),
    ],
)
def test_a_batch_that_cannot_be_dealt_evenly_is_refused_with_what_would_do(
    batch: int, micro: int | None, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=remedy):
        deal(TrainConfig(batch_size=batch, micro_batch_size=micro), World(0, 4, 0, 4))


def test_without_a_micro_batch_size_each_process_takes_its_share_at_once() -> None:
    assert deal(TrainConfig(batch_size=8), World(0, 4, 0, 4)).micro_batch_size == 2
    assert deal(TrainConfig(batch_size=8), SINGLE).micro_batch_size is None


def test_ddp_without_torchrun_says_the_command_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"torchrun --nproc-per-node 2 -m lmkit COMMAND parallel=ddp"):
        find_world(DdpConfig())


def test_row_123_torchrun_without_ddp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {**ENVIRONMENT, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match=r"has started 2 processes, but parallel=none; add parallel=ddp or fsdp"):
        find_world(ParallelConfig())


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["train.max_step=3"], "unknown key 'train.max_step'"),
        (["-m", "train.max_step=3,4"], "unknown key 'train.max_step'"),
        (["parallel=ddp", "optimizer=schedule_free"], "optimizer=schedule_free "),  # not installed, or not so
    ],
)
def test_what_is_wrong_in_all_processes_is_said_by_the_first_one(
    words: list[str], problem: str, tmp_path: Path
) -> None:
    command = torchrun(2, "-m", "lmkit", "pretrain", f"run.root={tmp_path}", "device=cpu", *words)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr
    assert said[0].startswith(f"error: {problem}")


@pytest.mark.parametrize("option", [[], ["-m"]])
def test_a_process_says_late_what_only_it_has_met(
    option: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    assert main(["pretrain", *option, "train.max_step=3"]) == 2
    assert waited == []
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["pretrain", *option, "train.max_step=3"]) == 2
    assert waited == []  # nobody ends it
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert main(["pretrain", *option, "train.max_step=3"]) == 2
    assert waited == [FIRST_S]
    assert capfd.readouterr().err.count("error: unknown key") == 3


def test_a_job_of_a_multirun_that_fails_in_all_processes_is_said_once_and_the_next_one_is_run(
    tmp_path: Path, corpus: Path
) -> None:
    """The first job in all of them, the second one in the first process."""
    (tmp_path / "jobs" / "1").mkdir(parents=True)
    (tmp_path / "jobs" / "1" / "foreign.txt").touch()
    words = [
        *("pretrain", "-m", "dataset=text", f"dataset.path={corpus}", "tokenizer=byte", "model=lstm", "device=cpu"),
        *("model.d_embed=16", "model.d_hidden=16", "train.batch_size=3,2,4", "train.seq_len=8", "train.max_steps=2"),
        *("parallel=ddp", f"run.dir={tmp_path / 'jobs'}"),
    ]
    done = subprocess.run(torchrun(2, "-m", "lmkit", *words), capture_output=True, text=True, timeout=300)
    said = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "job ", "2 of 3"))]
    assert len(said) == 6, done.stderr
    assert said[1].startswith("error: job 1: train.batch_size=3 cannot be dealt to 2 processes")
    assert said[3].startswith("error: job 2: run.dir=")
    assert said[5] == "2 of 3 jobs failed"
    assert done.returncode != 0
    assert (read_result(tmp_path / "jobs" / "2") or {})["step"] == 2
    assert list(read_failures(tmp_path / "jobs")) == ["0", "1"]


def test_processes_of_different_jobs_of_a_multirun_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them could not begin the job that the others wait in, as where it has no card, and is at the next one."""
    for key, value in {**ENVIRONMENT, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    places: list[str] = []

    def store(place: str, _: object) -> torch.distributed.Store:
        places.append(place)
        return torch.distributed.HashStore()

    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(None, 0, 2)]))
    monkeypatch.setattr(distributed, "PrefixStore", store)
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)

    def joined() -> int:
        with find_world(DdpConfig()).joined(torch.device("cpu"), DdpConfig()):
            return int(places[-1].removeprefix("lmkit-"))

    before = joined()
    find_world(DdpConfig())
    assert joined() == before + 2


def test_a_process_does_not_wait_for_the_first_one_where_there_is_another_job(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    started = {**ENVIRONMENT, "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}
    for key, value in started.items():
        monkeypatch.setenv(key, value)
    assert main(["pretrain", "-m", "seed=1,2", "device=cpu"]) == 0  # the first one has the exit code
    assert capfd.readouterr().err.count("has started 2 processes, but parallel=none") == 2
    assert waited == []


@pytest.mark.parametrize(
    "error", [StoppedError("stopped"), LostError("lost each other", "timed out"), DataError("bad")]
)
def test_a_process_that_had_joined_the_first_one_says_at_once_what_ends_it(
    error: LmkitError, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(distributed, "_is_joined", lambda: isinstance(error, DataError))
    with pytest.raises(type(error)), said_by_first():
        raise error
    assert waited == []


@pytest.mark.parametrize("plugin", ["launcher=joblib", "sweeper=optuna"])
def test_what_is_wrong_with_a_launcher_or_a_search_is_said_by_the_first_process(
    plugin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(_: object) -> None:
        raise ConfigError("a wrong setting")

    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(launch, "check", lambda _: None)  # as if it were installed
    for name in ("launched", "search"):
        monkeypatch.setattr(launch, name, wrong)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for rank, waits in (("0", []), ("1", [FIRST_S])):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["pretrain", "-m", plugin, "run.dir=jobs"]) == 2
        assert waited == waits


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"optimizer": ScheduleFreeConfig()},
            "optimizer=schedule_free does not go with parallel=fsdp; use parallel=ddp",
        ),
        ({"objective": VaeObjectiveConfig(), "model": VaeLstmConfig()}, "objective=vae does not go with parallel=fsdp"),
    ],
)
def test_what_cannot_be_trained_in_pieces_is_refused(
    changes: dict[str, Any], problem: str, tmp_path: Path, corpus: Path
) -> None:
    config = replace(base(tmp_path, corpus, "refused"), **changes)
    with pytest.raises(ConfigError, match=problem):
        check_sharding(replace(config, parallel=FsdpConfig()))
    check_sharding(replace(config, parallel=DdpConfig()))


@pytest.mark.parametrize("changes", [{"compile": Switch.on}, {"precision": Precision.fp16}])
def test_the_model_in_pieces_is_neither_compiled_nor_trained_in_fp16(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="does not go with parallel=fsdp"):
        resolve_device(DeviceConfig(type=DeviceType.cpu, **changes), World(0, 2, 0, 2, shards=True))


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])

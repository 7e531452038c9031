"""One of the processes that train together ends, hangs or goes astray while a checkpoint is made.

The processes are children that nobody watches over, as torchrun would: each has to find out for itself. Numbers in
names (row_17 ...) are the rows of the project's fault table.
"""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Child, Setup, environment
from harness import Lmkit, Start, digests, names

from lmkit import distributed, loading, sharding
from lmkit.commands.place import deal
from lmkit.config.training import TrainConfig
from lmkit.errors import ConfigError
from lmkit.session import Session
from lmkit.store import storage
from lmkit.store.found import read_info
from lmkit.store.manifest import step_directory
from lmkit.tasks.language import LanguageModelling
from lmkit.timing import Timing
from lmkit.train import Trainer

STEP = 8
"""Of the save in which something happens; the one before it is that of step 4."""

Job = Callable[..., list[Child]]


@pytest.fixture
def job(start: Start, small: list[str], tmp_path: Path) -> Job:
    """``job(parallel, run_name, setups)`` trains ``small``, or runs another command, in as many processes as there are
    setups, by their ranks."""

    def begin(
        parallel: str,
        run_name: str,
        setups: Sequence[Sequence[Setup]],
        *words: str,
        command: Sequence[str] = small,
    ) -> list[Child]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port, size = free.getsockname()[1], len(setups)
        return [
            start(
                *command, f"run.dir={tmp_path / run_name}", f"parallel={parallel}", *words,
                setup=[
                    environment(
                        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
                        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                    ),
                    *setup,
                ],
            )
            for rank, setup in enumerate(setups)
        ]  # fmt: skip

    return begin


def error_of(child: Child) -> str:
    """The one line in which a process says why it ends."""
    found = [line for line in child.text.splitlines() if line.startswith("error: ")]
    assert len(found) == 1, child.text
    assert "Traceback" not in child.text
    return found[0]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_snapshot(action: Callable[[Session], None]) -> None:
    """Do something where this process would give its part of the checkpoint of STEP."""
    snapshot = Session._snapshot

    def instead(self: Session) -> Any:
        if self.state.step == STEP:
            action(self)
        return snapshot(self)

    Session._snapshot = instead  # type: ignore[method-assign]


def end(_: Session) -> None:
    die()


def end_in_the_middle(_: Session) -> None:
    """End when two tensors are whole in all processes, and the others are not."""
    whole, calls = sharding.whole, []

    def counted(tensor: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            die()
        return whole(tensor)

    sharding.whole = counted


def end_before_agreeing() -> None:
    """End when all parts are given, and the processes tell each other which step they are of."""
    check = distributed.World.check_step

    def instead(self: distributed.World, step: int) -> None:
        if step == STEP:
            die()
        check(self, step)

    distributed.World.check_step = instead  # type: ignore[method-assign]


def hang(_: Session) -> None:
    time.sleep(3600)


def go_ahead(session: Session) -> None:
    session.state.step += 1


def flip_a_bit(session: Session) -> None:
    """As a cosmic ray does: the lowest bit of one weight of this process."""
    weight = next(session.trainer.model.parameters()).detach()
    weight.view(-1)[:1].view(torch.int32).bitwise_xor_(1)


def at_the_rename(action: Callable[[], None]) -> None:
    """Do something right before the checkpoint of STEP is committed."""
    rename = storage.rename

    def instead(source: Path, target: Path) -> None:
        if target.name == step_directory(STEP):
            action()
        rename(source, target)

    storage.rename = instead


def die_at_the_rename() -> None:
    """End right before the checkpoint of STEP is committed; training, which might come to its end before, waits."""
    at_the_rename(die)
    follow = Timing.follow

    def instead(self: Timing) -> None:
        if self.state.step == STEP + 1:
            time.sleep(300)
        follow(self)

    Timing.follow = instead  # type: ignore[method-assign]


def wait_for(path: Path) -> None:
    until = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def end_after(path: Path) -> None:
    """End a step later, and say so before."""
    follow = Timing.follow

    def instead(self: Timing) -> None:
        if self.state.step == STEP + 1:
            path.touch()
            die()
        follow(self)

    Timing.follow = instead  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, dict[str, str]]:
    """``parallel`` -> how a job of two processes ends that nothing happens to; filled by the first test."""
    return {}


def goes_on(job: Job, parallel: str, run_dir: Path, undisturbed: dict[str, dict[str, str]]) -> None:
    """Continue a job of two processes; it ends as if nothing had happened."""
    if parallel not in undisturbed:
        whole = job(parallel, "undisturbed", [[], []])
        assert [child.wait() for child in whole] == [0, 0], [child.text for child in whole]
        undisturbed[parallel] = digests(run_dir.with_name("undisturbed"))
    again = job(parallel, run_dir.name, [[], []], "resume=true")
    assert [child.wait() for child in again] == [0, 0], [child.text for child in again]
    assert digests(run_dir) == undisturbed[parallel]
    assert [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("parallel", "dead", "setup", "saved"),
    [
        ("ddp", 1, partial(before_snapshot, end), [4]),
        ("fsdp", 1, partial(before_snapshot, end_in_the_middle), [4]),
        ("ddp", 1, end_before_agreeing, [4]),
        ("ddp", 0, die_at_the_rename, [4]),
        ("ddp", 1, None, [4, 8]),  # after all have given their parts, while the first one writes: it may go on to do so
    ],
    ids=["before its part", "in its part", "before it agrees", "the writing one", "after its part"],
)
def test_row_17_a_process_that_ends_in_a_save_leaves_the_checkpoint_before_and_is_named_by_the_other(
    job: Job,
    tmp_path: Path,
    undisturbed: dict[str, dict[str, str]],
    parallel: str,
    dead: int,
    setup: Setup | None,
    saved: list[int],
) -> None:
    run_dir, said = tmp_path / "run", tmp_path / "said"
    setups: list[list[Setup]] = [[], []]
    if setup is None:
        setups = [[partial(at_the_rename, partial(wait_for, said))], [partial(end_after, said)]]
    else:
        setups[dead].append(setup)
    children = job(parallel, "run", setups)
    codes = [child.wait() for child in children]
    assert codes[dead] == -signal.SIGKILL, children[dead].text
    left = children[1 - dead]
    assert codes[1 - dead] == 6, left.text
    assert error_of(left).startswith(f"error: the processes lost each other: no answer from process {dead} (")
    assert "resume=true goes on from the last checkpoint" in error_of(left)
    assert names(run_dir) == [step_directory(step) for step in saved]
    litter = [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".")]
    assert len(litter) == (1 if dead == 0 else 0), litter
    goes_on(job, parallel, run_dir, undisturbed)


@pytest.mark.slow
def test_row_17_a_process_that_hangs_in_a_save_is_given_up_after_the_timeout(job: Job, tmp_path: Path) -> None:
    first, second = job("ddp", "run", [[], [partial(before_snapshot, hang)]], "parallel.timeout_s=20")
    assert first.wait() == 6, first.text
    assert error_of(first).startswith("error: the processes lost each other: no answer from process 1 (")
    assert second.process.is_alive()
    assert names(tmp_path / "run") in ([], [step_directory(4)])


def answer_slowly() -> None:
    """Wait longer for the answers of the others, since the machine may be slow."""
    distributed.ANSWER_S = 20.0


@pytest.mark.slow
def test_row_17_of_several_processes_the_one_that_ended_is_named(job: Job, tmp_path: Path) -> None:
    setups = [[answer_slowly], [answer_slowly], [partial(before_snapshot, end)]]
    children = job("ddp", "run", setups, "train.batch_size=6")
    codes = [child.wait() for child in children]
    assert codes == [6, 6, -signal.SIGKILL], [child.text for child in children]
    assert error_of(children[0]).startswith("error: the processes lost each other: no answer from process 2 (")
    assert names(tmp_path / "run") == [step_directory(4)]


def test_row_18_processes_that_are_at_different_steps_save_nothing(
    job: Job, tmp_path: Path, undisturbed: dict[str, dict[str, str]]
) -> None:
    children = job("ddp", "run", [[], [partial(before_snapshot, go_ahead)]])
    codes = [child.wait() for child in children]
    assert codes == [4, 4], [child.text for child in children]
    assert error_of(children[0]).startswith(
        "error: the processes do not agree on the step to save: process 0 is at step 8, process 1 is at step 9;"
    )
    assert names(tmp_path / "run") == [step_directory(4)]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith(".")] == []
    goes_on(job, "ddp", tmp_path / "run", undisturbed)


def test_row_61_a_bit_that_flips_in_the_memory_of_one_process_is_found_before_the_save(
    job: Job, tmp_path: Path
) -> None:
    children = job("ddp", "run", [[], [partial(before_snapshot, flip_a_bit)]])
    codes = [child.wait() for child in children]
    assert codes == [4, 4], [child.text for child in children]
    assert error_of(children[0]).startswith("error: process 1 holds other weights than process 0, the first of them '")
    assert names(tmp_path / "run") == [step_directory(4)]


def run_out_of_memory() -> None:
    """Find no memory for the third step."""
    train_step = Trainer.train_step

    def instead(self: Trainer, batch: Any) -> Any:
        if self.state.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train_step(self, batch)

    Trainer.train_step = instead  # type: ignore[method-assign]


def test_row_35_the_micro_batch_that_would_fit_can_be_dealt_to_the_processes(job: Job) -> None:
    children = job("ddp", "run", [[run_out_of_memory], [run_out_of_memory]], "train.batch_size=30")
    assert [child.wait() for child in children] == [6, 6], [child.text for child in children]
    for child in children:
        advice = re.search(r"out of memory in step 3 .* train\.micro_batch_size=(\d+)$", error_of(child))
        assert advice is not None, child.text
        train = TrainConfig(batch_size=30, micro_batch_size=int(advice[1]))
        deal(train, distributed.World(0, 2, 0, 2))  # is not refused


def leave_late(path: Path) -> None:
    """Take a while to leave after an error, as where something is to be saved yet, and say when that is done."""
    tell = distributed.World.tell

    def instead(self: distributed.World, make: Callable[[], str]) -> str:
        try:
            return tell(self, make)
        except ConfigError:
            time.sleep(3)
            path.touch()
            raise

    distributed.World.tell = instead  # type: ignore[method-assign]


def test_the_others_leave_when_the_first_one_that_has_met_an_error_has_left(job: Job, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "foreign.txt").touch()
    first, second = job("ddp", "run", [[partial(leave_late, tmp_path / "late")], []])
    assert second.wait() == 2, second.text
    assert (tmp_path / "late").exists()
    assert first.wait() == 2, first.text
    assert "error: " not in second.text


def diverge() -> None:
    """Find a validation loss that is not finite."""
    validate = LanguageModelling.validate

    def instead(self: LanguageModelling, **options: Any) -> Any:
        return replace(validate(self, **options), loss=math.nan)

    LanguageModelling.validate = instead  # type: ignore[method-assign]


def test_row_58_a_validation_that_is_not_finite_ends_all_processes_with_7_and_is_said_by_the_first(job: Job) -> None:
    children = job("ddp", "run", [[diverge], []])
    assert [child.wait() for child in children] == [7, 7], [child.text for child in children]
    assert error_of(children[0]).startswith("error: the validation loss after step ")
    assert "error: " not in children[1].text


def find(run_dir: Path) -> None:
    """Take this for the newest finished run."""
    loading.newest_finished_run = lambda root: run_dir


def test_all_processes_finetune_the_run_that_the_first_one_finds(
    job: Job, small: list[str], trained: Path, corpus: Path, ended: Lmkit, tmp_path: Path
) -> None:
    """Another one, which would not fit, ends before the second process looks."""
    other = ended(*small, "model.d_embed=8", "train.max_steps=1", f"run.dir={tmp_path / 'other'}")
    assert other.code == 0, other.err
    command = ["finetune", "dataset=text", f"dataset.path={corpus}", "train.batch_size=4", "train.seq_len=16"]
    command += ["train.max_steps=2", "device=cpu", "device.threads=1"]
    setups = [[partial(find, trained)], [partial(find, tmp_path / "other")]]
    children = job("ddp", "tuned", setups, "parallel.timeout_s=60", command=command)
    assert [child.wait() for child in children] == [0, 0], [child.text for child in children]
    assert Path((read_info(tmp_path / "tuned") or {})["base"]).parent.parent == trained

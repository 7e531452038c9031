"""Killed in the middle of a save, a run that goes on ends with the bytes of one that was never killed.

test_checkpoint_faults.py kills at every storage operation and looks at what is left; here runs that were killed at each
kind of operation are continued and trained to their end. The save is a whole one in the background: files, commit, and
the retirement of an older checkpoint.
"""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from harness import FailPoint, Start, digests, half_then_kill, in_child, names

from lmkit.commands import pretrain
from lmkit.config.commands import PretrainConfig
from lmkit.config.data import ByteTokenizerConfig, TextConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import RecurrentConfig
from lmkit.config.optimization import AdamwConfig, CosineConfig
from lmkit.config.training import EvalConfig, LogConfig, NewRunConfig, SaveConfig, TrainConfig
from lmkit.store.audit import audit_run
from lmkit.store.checkpoint_writer import CheckpointWriter
from lmkit.store.found import read_metrics
from lmkit.store.staging import Staged

STEPS = 8
KILLED = 6
"""The step whose save is killed: the third one, which retires the first."""


def config(run_dir: Path, corpus: Path) -> PretrainConfig:
    """A run of milliseconds, whose end depends on all that a checkpoint holds: moments, state, dropout, schedule."""
    return PretrainConfig(
        dataset=TextConfig(path=str(corpus)),
        tokenizer=ByteTokenizerConfig(),
        model=RecurrentConfig(d_embed=8, d_hidden=8, num_layers=1, dropout_recurrent=0.2),
        optimizer=AdamwConfig(lr=3e-3),
        schedule=CosineConfig(),
        device=DeviceConfig(type=DeviceType.cpu, threads=1),
        train=TrainConfig(batch_size=4, micro_batch_size=2, seq_len=16, max_steps=STEPS, ema_decay=0.9),
        log=LogConfig(every_steps=1),
        eval=EvalConfig(every_steps=1000),  # at the end only
        save=SaveConfig(every_steps=2),
        run=NewRunConfig(dir=str(run_dir), root=str(run_dir.parent)),
    )


def train(cfg: PretrainConfig, at: int | None = None, found: Path | None = None) -> None:
    """Train; die at the storage operation of this number of the save of KILLED, or write down which there are."""
    save = CheckpointWriter._save

    def watched(self: CheckpointWriter, staged: Staged) -> None:
        if staged.step != KILLED:
            return save(self, staged)
        with pytest.MonkeyPatch.context() as patch:  # training itself uses none of them meanwhile
            point = FailPoint(patch, at, half_then_kill)
            save(self, staged)
        if found is not None:
            found.write_text(json.dumps(point.calls), encoding="utf-8")
        return None

    CheckpointWriter._save = watched  # type: ignore[method-assign]
    pretrain.run(cfg)


def kill_and_go_on(cfg: PretrainConfig, at: int) -> None:
    """Go on in a process that dies, as in ``train``, and again in this one, to the end."""
    cfg = replace(cfg, resume=True)
    assert in_child(partial(train, cfg, at)) == -signal.SIGKILL
    pretrain.run(cfg)


def places(calls: list[str]) -> list[int]:
    """Where each kind of operation is used first and last: before the commit, at it and after it.

    A kill right behind syncs leaves the same files as one before them, and is that one.
    """

    def before_syncs(at: int) -> int:
        return before_syncs(at - 1) if at > 0 and calls[at - 1].startswith("sync") else at

    last = {name: at for at, name in enumerate(calls)}
    return sorted({before_syncs(at) for at in (*map(calls.index, last), *last.values())})


@pytest.mark.slow
def test_rows_1_to_10_34_killed_at_every_kind_of_operation_of_a_save_a_run_ends_as_if_it_had_not_been(
    corpus: Path, start: Start, tmp_path: Path
) -> None:
    alone = start(setup=[partial(train, config(tmp_path / "alone", corpus), found=tmp_path / "calls")])
    assert alone.wait() == 0, alone.text
    expected = digests(tmp_path / "alone")
    calls = json.loads((tmp_path / "calls").read_bytes())
    assert {"write_all", "sync_file", "sync_directory", "rename", "remove_file", "remove_directory"} <= set(calls)
    commit = calls.index("rename")
    begun = start(setup=[partial(train, config(tmp_path / "begun", corpus), 0)])  # so that not each trains from scratch
    assert begun.wait() == -signal.SIGKILL, begun.text
    for at in places(calls):
        run_dir = Path(shutil.copytree(tmp_path / "begun", tmp_path / f"run{at}"))
        child = start(setup=[partial(kill_and_go_on, config(run_dir, corpus), at)])
        assert child.wait() == 0, child.text
        assert f"resuming {run_dir} after step {KILLED - 2 if at <= commit else KILLED}\n" in child.text
        assert digests(run_dir) == expected, calls[at]
        assert names(run_dir) == names(tmp_path / "alone")
        assert audit_run(run_dir).litter == ()
        assert [row["step"] for row in read_metrics(run_dir) if "loss" in row] == list(range(1, STEPS + 1))
        shutil.rmtree(run_dir)

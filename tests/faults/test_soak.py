"""The soak: runs of every kind are killed (kill -9) at random moments and continued, for as long as you like.

LMKIT_SOAK_S: how many seconds to go on (default 60). The moments come from a fixed seed, so that a longer soak begins
as a shorter one; what a moment hits depends on the machine.
"""

from __future__ import annotations

import os
import random
import time
from itertools import cycle
from pathlib import Path

import pytest
from harness import Start, digests

from lmkit.store.audit import audit_run
from lmkit.store.found import read_metrics
from lmkit.store.listing import list_checkpoints
from lmkit.store.manifest import step_of

SOAK_S = float(os.environ.get("LMKIT_SOAK_S", "60"))
LEAST_KILLS = 8
"""So many there are in any case, however slow the machine."""
STEPS = 80
PACE = [f"train.max_steps={STEPS}", "eval.every_steps=8", "save.every_steps=3", "save.keep_every=24"]
TRANSFORMER = ["model=tiny", "model.d_model=16", "model.num_layers=1", "model.num_heads=2", "model.context=16"]
LSTM = ["model=lstm", "model.d_embed=16", "model.d_hidden=24", "model.num_layers=1"]
KINDS = {
    "lstm": [*LSTM, "model.dropout_embed=0.2", "train.micro_batch_size=2", "train.spike_nats=20"],
    "transformer": [*TRANSFORMER, "model.dropout=0.1", "train.ema_decay=0.9", "train.workers=3"],
    "plateau": [*LSTM, "optimizer=sgd", "optimizer.momentum=0.9", "schedule=plateau", "schedule.patience=0"],
    "muon": [*TRANSFORMER, "optimizer=muon", "softmax=sampled", "softmax.num_frequent=20", "softmax.num_sampled=20"],
}


class Kind:
    """One kind of run, as it ends when nothing happens to it."""

    def __init__(self, name: str, small: list[str], start: Start, folder: Path) -> None:
        self.words = [*(word for word in small if not word.startswith("model")), *KINDS[name], *PACE]
        alone = start(*self.words, f"run.dir={folder / name}")
        began = time.monotonic()
        assert alone.wait(120) == 0, alone.text
        self.whole_s = time.monotonic() - began
        """How long it takes."""
        self.digests = digests(folder / name)


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint; all that there are must be whole."""
    audit = audit_run(run_dir)
    assert audit.num_damaged == 0, audit
    assert audit.damage == (), audit
    return max((step_of(path.name) or 0 for path in list_checkpoints(run_dir)), default=0)


def kill_until_it_ends(kind: Kind, run_dir: Path, start: Start, draw: random.Random, deadline: float) -> int:
    """Start a run, kill it and continue it until it has come to its end, after the deadline undisturbed.

    Returns how often it was killed.
    """
    killed = step = 0
    while True:
        child = start(*kind.words, f"run.dir={run_dir}", "resume=true")
        if time.monotonic() < deadline or killed == 0:
            child.process.join(draw.uniform(0.0, 0.8 * kind.whole_s))
            child.process.kill()
        code = child.wait(120)
        if run_dir.exists():
            before, step = step, newest_step(run_dir)
            assert step >= before, "a checkpoint was lost"
        if code == 0:
            return killed
        assert code == -9, child.text
        killed += 1


@pytest.mark.slow
@pytest.mark.timeout(SOAK_S + 600)
def test_rows_34_77_killed_at_random_for_a_long_time_no_run_loses_a_byte(
    small: list[str], start: Start, tmp_path: Path
) -> None:
    kinds = {name: Kind(name, small, start, tmp_path) for name in KINDS}
    draw = random.Random(4)
    deadline = time.monotonic() + SOAK_S
    killed = 0
    for number, name in enumerate(cycle(kinds)):
        if time.monotonic() > deadline and killed >= LEAST_KILLS:
            break
        kind, run_dir = kinds[name], tmp_path / f"run{number}"
        killed += kill_until_it_ends(kind, run_dir, start, draw, deadline)
        assert digests(run_dir) == kind.digests, name
        assert audit_run(run_dir).litter == ()
        steps = [row["step"] for row in read_metrics(run_dir) if "loss" in row]
        assert steps == list(range(1, STEPS + 1)), name
    print(f"{killed} kills in {number} runs")

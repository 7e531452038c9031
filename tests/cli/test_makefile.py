"""What ``make`` runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("words", "checkpoint"), [((), "best"), (("CHECKPOINT=latest",), "latest")])
def test_a_recipe_is_evaluated_at_the_checkpoint_that_is_named(words: tuple[str, ...], checkpoint: str) -> None:
    command = ["make", "-n", "repro", "RECIPE=zaremba_small", *words]
    own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    shown = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True).stdout
    train, evaluate = shown.splitlines()[-2:]
    assert train.endswith("lmkit pretrain recipe=zaremba_small run.dir=runs/repro-zaremba_small")
    assert f"lmkit eval-ppl run=runs/repro-zaremba_small run.checkpoint={checkpoint} output=" in evaluate

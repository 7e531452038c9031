"""The memory that scoring takes at the vocabulary of WikiText-103."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_eval.py"


@pytest.mark.slow
def test_scoring_with_267735_types_and_model_small_stays_under_2_gb() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--memory", "--tokens", "1024"], capture_output=True, text=True, check=True
    )
    peak = re.search(r"peak ([\d.]+) GB", done.stdout)
    assert peak is not None, done.stdout
    assert float(peak[1]) < 2.0

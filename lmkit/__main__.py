"""``python -m lmkit`` and ``torchrun -m lmkit``."""

from __future__ import annotations

import sys

from lmkit.cli import main

if __name__ == "__main__":
    sys.exit(main())

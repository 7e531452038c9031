"""Randomness as a function of (seed, stream, position): no random state is ever stored.

Every use derives its own key, so that an extra draw in one place cannot shift another, and resuming at step k needs
only k.
"""

from __future__ import annotations

import hashlib


def derive_key(seed: int, stream: str, *position: int | str) -> int:
    """A 63-bit key from the run's seed, the name of the use, and where it is used (step, micro-batch, name ...)."""
    text = "\x1f".join([str(seed), stream, *map(str, position)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

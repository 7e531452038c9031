"""What may change the last bits of a result, as a checkpoint records it."""

from __future__ import annotations

import platform

import torch

from lmkit import __version__


def environment() -> dict[str, str]:
    """Versions, platform, number of threads and instructions; never the process's environment variables.

    The lmkit is the one that runs, not the one that is installed by now.
    """
    return {
        "lmkit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()}-{platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }

"""What every test, and every process that a test starts, finds: one thread, and signals as a terminal leaves them.

Tiny tensors gain nothing from more threads, and threads of several test processes take each other's cores. Under nohup
or in the background SIGHUP and SIGINT come ignored.
"""

from __future__ import annotations

import os
import signal

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # read when torch is imported, which is later

signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

"""Signals as a terminal would leave them: under nohup or in the background SIGHUP and SIGINT come ignored, and children
inherit that."""

from __future__ import annotations

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

"""For the benchmarks: each way of doing the same work in a process of its own, measured in turns.

A benchmark script calls itself: ``serve`` runs in the child, ``Peer`` in the parent. Separate processes keep peaks of
memory apart; interleaved rounds give every way the same share of a busy machine. The parent imports neither torch nor
numpy, since Linux counts what a parent had resident at the start of a child as the child's peak.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Work:
    """What a child has built: the work of one round, and what it has to have in common with its peers."""

    run: Callable[[], int]
    """Does the work once and returns how many tokens it made or trained on."""
    num_parameters: int
    digest: Callable[[], str] = str
    """Of what the last round made, asked for when the clock stands; "" where only the numbers of tokens can agree."""
    memory: Callable[[], int] = field(default_factory=lambda: peak_bytes)
    """Peak memory so far, bytes."""


@dataclass
class Peer:
    """One way of doing the work, in a child process."""

    name: str
    process: subprocess.Popen[str]
    num_parameters: int = 0
    num_tokens: int = 0
    digest: str = ""
    peak_bytes: int = 0
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, script: str, arguments: Sequence[str]) -> Peer:
        """Start ``script --serve name arguments`` and wait until it has built its work."""
        command = [sys.executable, script, "--serve", name, *arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        peer = cls(name, process)
        peer.num_parameters = peer._read()["num_parameters"]
        return peer

    def measure(self) -> None:
        """One round."""
        if self.process.stdin is None:
            raise RuntimeError("a peer is started by Peer.start")
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self._read()
        self.seconds.append(answer["seconds"])
        self.num_tokens, self.digest, self.peak_bytes = (answer[key] for key in ("num_tokens", "digest", "peak_bytes"))

    def close(self) -> None:
        """Let the child end."""
        self.process.communicate()

    def median_s(self) -> float:
        """Seconds of a round; the first one, which warms up, does not count."""
        return statistics.median(self.seconds[1:])

    def tokens_per_s(self) -> float:
        """Median over the rounds."""
        return self.num_tokens / self.median_s()

    def ratio_to(self, other: Peer) -> float:
        """How many times as fast as ``other``: the median of the ratios within each round."""
        pairs = zip(self.seconds[1:], other.seconds[1:], strict=True)
        return statistics.median(theirs / mine for mine, theirs in pairs)

    def row(self, **facts: Any) -> dict[str, Any]:
        """The row for --json."""
        return {
            "name": self.name,
            "tokens_per_s": self.tokens_per_s(),
            "peak_bytes": self.peak_bytes,
            "num_parameters": self.num_parameters,
            "num_tokens": self.num_tokens,
            **facts,
        }

    def _read(self) -> dict[str, Any]:
        if self.process.stdout is None:
            raise RuntimeError("a peer is started by Peer.start")
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"{self.name} ended early with exit code {self.process.wait()}")


def measure_in_turns(
    names: Sequence[str], script: str, arguments: Sequence[str], rounds: int, beside: Peer | None = None
) -> list[Peer]:
    """Start every way and measure one after the other in each round; refuses unlike work.

    ``beside`` is measured in each round too, but is other work and not compared; it is closed at the end.
    """
    peers = [Peer.start(name, script, arguments) for name in names]
    try:
        refuse_unlike_parameters(peers)
        for _ in range(rounds + 1):
            for peer in [*peers, *([beside] if beside else [])]:
                peer.measure()
            refuse_unlike_tokens(peers)
    finally:
        for peer in [*peers, *([beside] if beside else [])]:
            peer.close()
    return peers


def refuse_unlike_parameters(peers: Sequence[Peer]) -> None:
    """SystemExit if the numbers of parameters are more than 1 % apart."""
    counts = {peer.name: peer.num_parameters for peer in peers}
    if max(counts.values()) > 1.01 * min(counts.values()):
        raise SystemExit(f"the models are not of the same size, so their speeds say nothing: {counts}")


def refuse_unlike_tokens(peers: Sequence[Peer]) -> None:
    """SystemExit if the numbers of tokens differ, or the tokens themselves where the ways tell their digest."""
    counts = {peer.name: peer.num_tokens for peer in peers}
    if len(set(counts.values())) > 1:
        raise SystemExit(f"the ways did not make the same number of tokens: {counts}")
    digests = {peer.name: peer.digest for peer in peers}
    if len(set(digests.values())) > 1:
        raise SystemExit(f"the ways made as many tokens, but not the same ones: {digests}")


def serve(work: Work) -> None:
    """The child's side: tell the size of the work, then do it once for every line that comes."""
    print(json.dumps({"num_parameters": work.num_parameters}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        num_tokens = work.run()
        answer = {"seconds": time.perf_counter() - start, "num_tokens": num_tokens, "peak_bytes": work.memory()}
        print(json.dumps(answer | {"digest": work.digest()}), flush=True)


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from ``least`` on, for argparse."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} must be a whole number, {least} or more")
        return int(text)

    return number


def is_installed(name: str) -> bool:
    """Whether a library is there; says that its row is left out if not."""
    found = importlib.util.find_spec(name) is not None
    if not found:
        print(f"{name} is not installed: left out (python -m pip install {name})", file=sys.stderr)
    return found


def table(peers: Sequence[Peer], title: str, num_bytes: int = 0) -> None:
    """Print tokens/s, MB/s where a round takes bytes of text, the ratio to the last way, and the peak of memory."""
    print(title)
    width = max(14, *(len(peer.name) for peer in peers))
    for peer in peers:
        rate = f"  {num_bytes / 1e6 / peer.median_s():7.1f} MB/s" if num_bytes else ""
        print(
            f"  {peer.name:<{width}} {peer.tokens_per_s():10,.0f} tokens/s{rate}  {peer.ratio_to(peers[-1]):6.2f} x"
            f" {peers[-1].name}  peak {peer.peak_bytes / 1e9:.2f} GB"
        )


def write_rows(path: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows as JSON if a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(list(rows), indent=2) + "\n", encoding="utf-8", newline="\n")

"""How fast ``prepare`` is, end to end, and how much memory it takes.

    python scripts/bench_prepare.py [--text FILE] [--copies N] [--vocab-size N] [--gigabyte] [--repeat N]

Without --text it takes WikiText-2 from LMKIT_DATA, or pydocs repeated; --copies makes it longer, since only long texts
are encoded on all cores. Rates are MB of text (1e6 UTF-8 bytes) a second
of wall time, the best of --repeat. ``sentencepiece alone`` encodes the same lines with the library itself and writes
the ids, without counting, digests or checks. --gigabyte prepares a generated 1 GB text file in a process of its own
and reports its largest resident memory, without and with the processes that encode for it.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from lmkit.config.data import (
    ByteTokenizerConfig,
    CharTokenizerConfig,
    SentencePieceTokenizerConfig,
    TextConfig,
    TokenizerConfig,
    WordTokenizerConfig,
)
from lmkit.data.prepared import PreparedData, prepare

GIGABYTE = 1_000_000_000

CHILD = """
import sys
from lmkit.config.data import TextConfig, WordTokenizerConfig, ByteTokenizerConfig, SentencePieceTokenizerConfig
from lmkit.data.prepared import prepare
tokenizer = {"word": WordTokenizerConfig, "byte": ByteTokenizerConfig, "sentencepiece": SentencePieceTokenizerConfig}
data = prepare(TextConfig(path=sys.argv[1]), tokenizer[sys.argv[2]]())
print(sum(split.num_tokens for split in data.splits.values()))
"""


def sample_text() -> str:
    """WikiText-2's training text if it is there, else the embedded corpus several times."""
    path = Path(os.environ.get("LMKIT_DATA", "")) / "wikitext-2" / "wiki.train.tokens"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n".join(topics.values()) * 25


def best_of(repeat: int, action: Callable[[], object]) -> float:
    """Seconds of the fastest of ``repeat`` calls."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def show(name: str, num_bytes: int, seconds: float, note: str = "") -> None:
    print(f"{name:<34} {num_bytes / 1e6 / seconds:7.1f} MB/s  {seconds:7.2f} s  {note}", flush=True)


def bench_rates(path: Path, vocab_size: int, repeat: int) -> None:
    num_bytes = path.stat().st_size
    config = TextConfig(path=str(path))
    prepared: dict[str, PreparedData] = {}
    kinds: dict[str, TokenizerConfig] = {
        "word": WordTokenizerConfig(),
        "char": CharTokenizerConfig(),
        "byte": ByteTokenizerConfig(),
        "sentencepiece": SentencePieceTokenizerConfig(vocab_size=vocab_size),
    }
    for name, tokenizer in kinds.items():

        def trained(name: str = name, tokenizer: TokenizerConfig = tokenizer) -> None:
            prepared[name] = prepare(config, tokenizer, force=True)

        def known(name: str = name) -> None:
            prepare(config, prepared[name].tokenizer, force=True)

        show(f"{name}: train and encode", num_bytes, best_of(1 if name == "sentencepiece" else repeat, trained))
        show(f"{name}: encode", num_bytes, best_of(repeat, known))
    show("found in the cache", num_bytes, best_of(repeat, lambda: prepare(config, kinds["word"])))

    import sentencepiece

    model = prepared["sentencepiece"].path / "tokenizer" / "sentencepiece.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    lines = path.read_text(encoding="utf-8").split("\n")
    for threads in (1, 2):

        def alone(threads: int = threads) -> None:
            with tempfile.TemporaryFile() as file:
                for start in range(0, len(lines), 10_000):
                    for ids in processor.encode(lines[start : start + 10_000], num_threads=threads):
                        file.write(np.array(ids, np.uint16).tobytes())

        show(f"sentencepiece alone, {threads} thread{'s' * (threads > 1)}", num_bytes, best_of(repeat, alone))


def bench_memory(folder: Path, kinds: list[str]) -> None:
    path = folder / "gigabyte.txt"
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyzäö", k=draw.randint(1, 12))) for _ in range(200_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    with path.open("w", encoding="utf-8", newline="\n") as file:
        paragraph = [" ".join(draw.choices(words, weights, k=draw.randint(1, 60))) for _ in range(40_000)]
        while file.tell() < GIGABYTE:
            draw.shuffle(paragraph)
            file.write("\n".join(paragraph) + "\n")
    for kind in kinds:
        start = time.perf_counter()
        with subprocess.Popen([sys.executable, "-c", CHILD, str(path), kind], stdout=subprocess.PIPE) as process:
            peak = peak_bytes(psutil.Process(process.pid))
            assert process.stdout is not None
            tokens = int(process.stdout.read())
        seconds = time.perf_counter() - start
        note = f"peak {peak[0] / 1e6:,.0f} MB, with its children {peak[1] / 1e6:,.0f} MB, {tokens:,} tokens"
        show(f"1 GB, {kind}", path.stat().st_size, seconds, note)


def peak_bytes(process: psutil.Process) -> tuple[int, int]:
    """Largest resident memory of a process until it ends, without and with its children; looks 10 times a second."""
    alone = together = 0
    while True:
        try:
            rss = [one.memory_info().rss for one in (process, *process.children(recursive=True))]
        except psutil.NoSuchProcess:
            rss = [0]
        alone, together = max(alone, rss[0]), max(together, sum(rss))
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return alone, together
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="text file to measure on, as it is")
    parser.add_argument("--copies", type=int, default=8, help="copies of that text, one after the other")
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces of the sentencepiece model")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each measurement")
    parser.add_argument(
        "--gigabyte",
        nargs="*",
        metavar="KIND",
        help="only measure memory on 1 GB, for these tokenizers (default: word)",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LMKIT_CACHE"] = str(Path(folder) / "cache")
        if options.gigabyte is not None:
            bench_memory(Path(folder), options.gigabyte or ["word"])
            return
        path = options.text
        if path is None:
            path = Path(folder) / "sample.txt"
            path.write_text(sample_text() * options.copies, encoding="utf-8", newline="\n")
        bench_rates(path, options.vocab_size, options.repeat)


if __name__ == "__main__":
    main()

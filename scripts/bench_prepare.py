"""How fast ``prepare`` is, end to end, and how much memory it takes, beside the sentencepiece library.

    python scripts/bench_prepare.py [--text FILE] [--copies N] [--tokenizers KIND ...] [--rounds 3] [--json FILE]
    python scripts/bench_prepare.py --gigabyte [KIND ...] [--json FILE]

Without --text it takes WikiText-2 from LMKIT_DATA, or pydocs repeated; --copies makes it longer, since only long texts
are encoded on all cores. Each way runs in a process of its own; rounds are interleaved, the first one warms up, and
medians are printed. MB are 1e6 UTF-8 bytes of text. All of the text is the train split.

- lmkit, trained: all that ``prepare`` does with an empty cache: reading, counting, training a tokenizer, encoding,
  digests, checks, writing
- lmkit, cached: finding the result of an earlier preparation
- lmkit: encoding with a tokenizer that is there already, the text counted before; digests, checks and writing as ever
- sentencepiece, N threads: the library with the same model and the same lines, which it has in memory, and their ids
  written to a file, without counting, digests or checks

Ways with the same tokenizer have to write the same ids, byte for byte, and are refused otherwise: a text with U+2581,
which the library takes for a blank, is one. Peaks of memory hold the processes that encode for a way. --gigabyte
prepares a generated 1 GB text file in a process of its own; there the peak of that process alone is given, too.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from peers import Work, at_least, measure_in_turns, peak_bytes, serve, table, write_rows

KINDS = ["word", "char", "byte", "sentencepiece"]
LMKIT = ["lmkit, trained", "lmkit, cached", "lmkit"]
LIBRARY = {"sentencepiece, 1 thread": 1, "sentencepiece, 2 threads": 2}
GIGABYTE = 1_000_000_000

CHILD = """
import sys
from lmkit.config.data import TextConfig, CharTokenizerConfig, WordTokenizerConfig, ByteTokenizerConfig
from lmkit.config.data import SentencePieceTokenizerConfig
from lmkit.data.prepared import prepare
tokenizer = {"word": WordTokenizerConfig, "byte": ByteTokenizerConfig, "sentencepiece": SentencePieceTokenizerConfig,
             "char": CharTokenizerConfig}
data = prepare(TextConfig(path=sys.argv[1]), tokenizer[sys.argv[2]]())
print(sum(split.num_tokens for split in data.splits.values()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="text file to measure on, as it is")
    parser.add_argument("--copies", type=at_least(1), default=8, help="copies of the default text, one after the other")
    parser.add_argument("--tokenizers", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help="default: all")
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces of the sentencepiece model")
    parser.add_argument("--rounds", "--repeat", type=at_least(1), default=3, help="measured rounds")
    parser.add_argument(
        "--gigabyte",
        nargs="*",
        choices=KINDS,
        metavar="KIND",
        help="only measure memory on 1 GB, for these tokenizers (default: word)",
    )
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(build(args.serve, args.tokenizers[0], args.text, args.vocab_size))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LMKIT_CACHE"] = str(Path(folder) / "cache")  # all ways find there what the first one has trained
        if args.gigabyte is not None:
            text = write_words(Path(folder) / "gigabyte.txt", GIGABYTE)
            rows = [measure_memory(text, kind) for kind in args.gigabyte or ["word"]]
        else:
            text = args.text
            if text is None:
                text = Path(folder) / "sample.txt"
                text.write_text(sample_text() * args.copies, encoding="utf-8", newline="\n")
                time.sleep(4)  # lmkit remembers nothing of a file that has just been written and may still change
            for kind in args.tokenizers:
                rows += compare(text, kind, args.vocab_size, args.rounds)
    write_rows(args.json, rows)


def sample_text() -> str:
    """WikiText-2's training text if it is there, else the embedded corpus several times."""
    path = Path(os.environ.get("LMKIT_DATA", "")) / "wikitext-2" / "wiki.train.tokens"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n".join(topics.values()) * 25


def compare(text: Path, kind: str, vocab_size: int, rounds: int) -> list[dict[str, Any]]:
    names = [*LMKIT, *(LIBRARY if kind == "sentencepiece" else [])]
    arguments = ["--text", str(text), "--tokenizers", kind, "--vocab-size", str(vocab_size)]
    peers = measure_in_turns(names, __file__, arguments, rounds)
    num_bytes = text.stat().st_size
    table(peers, f"{kind}, {num_bytes / 1e6:.1f} MB, {rounds} rounds", num_bytes)
    return [peer.row(tokenizer=kind, num_bytes=num_bytes, mb_per_s=num_bytes / 1e6 / peer.median_s()) for peer in peers]


def build(way: str, kind: str, text: Path, vocab_size: int) -> Work:
    """The work of a way. The first way to be built trains the tokenizer that all share, which no clock sees."""
    from lmkit.config import data as configs
    from lmkit.data.prepared import prepare
    from lmkit.data.tokenfiles import sha256_of

    untrained: dict[str, configs.TokenizerConfig] = {
        "word": configs.WordTokenizerConfig(),
        "char": configs.CharTokenizerConfig(),
        "byte": configs.ByteTokenizerConfig(),
        "sentencepiece": configs.SentencePieceTokenizerConfig(vocab_size=vocab_size),
    }
    config = configs.TextConfig(path=str(text), valid_fraction=0.0, test_fraction=0.0)
    prepared = prepare(config, untrained[kind])
    if way in LIBRARY:
        return library_work(prepared, text, LIBRARY[way])
    tokenizer = prepared.tokenizer if way == "lmkit" else untrained[kind]
    cache, written = os.environ["LMKIT_CACHE"], Path()

    def run() -> int:
        nonlocal written
        if way == "lmkit, trained":
            os.environ["LMKIT_CACHE"] = tempfile.mkdtemp(dir=cache)
        data = prepare(config, tokenizer, force=way == "lmkit")
        written = data.path / "train.tokens"
        return data.splits["train"].num_tokens

    watch = Watch(os.getpid())
    return Work(run, 0, lambda: sha256_of(written), lambda: max(peak_bytes(), watch.together))


def library_work(prepared: Any, text: Path, threads: int) -> Work:
    """The sentencepiece library. It leaves out the ends of the lines and of the text, so they are put in here."""
    import numpy as np
    import sentencepiece

    from lmkit.data.tokenfiles import sha256_of

    dtype = prepared.splits["train"].tokens.dtype
    processor = sentencepiece.SentencePieceProcessor(model_proto=prepared.tokenizer.content())
    end_of_line, end_of_text = processor.piece_to_id("\n"), processor.eos_id()
    lines = text.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    written = prepared.path.parent / f"{threads}.tokens"

    def run() -> int:
        with written.open("wb") as file:
            for start in range(0, len(lines), 10_000):
                for ids in processor.encode(lines[start : start + 10_000], num_threads=threads):
                    ids.append(end_of_line)
                    file.write(np.array(ids, dtype).tobytes())
            file.write(np.array([end_of_text], dtype).tobytes())
            return file.tell() // dtype.itemsize

    return Work(run, 0, lambda: sha256_of(written))


def write_words(path: Path, num_bytes: int) -> Path:
    """Write at least so much text of made-up words, some more frequent than others, and return the path."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyzäö", k=draw.randint(1, 12))) for _ in range(200_000)]
    sums = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(words))))
    num_lines = min(40_000, num_bytes // 100)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        paragraph = [" ".join(draw.choices(words, cum_weights=sums, k=draw.randint(1, 60))) for _ in range(num_lines)]
        while file.tell() < num_bytes:
            draw.shuffle(paragraph)
            file.write("\n".join(paragraph) + "\n")
    return path


def measure_memory(text: Path, kind: str) -> dict[str, Any]:
    """Prepare the text once in a process that is watched; prints the line and returns the row."""
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", CHILD, str(text), kind], stdout=subprocess.PIPE) as process:
        watch = Watch(process.pid)
        assert process.stdout is not None
        answer = process.stdout.read()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"the process that prepares the text ended with exit code {process.returncode}")
    num_bytes, num_tokens = text.stat().st_size, int(answer)
    print(
        f"{num_bytes / 1e9:.1f} GB, {kind:<14} {num_bytes / 1e6 / seconds:7.1f} MB/s  {seconds:7.2f} s"
        f"  peak {watch.alone / 1e6:,.0f} MB, with its children {watch.together / 1e6:,.0f} MB, {num_tokens:,} tokens",
        flush=True,
    )
    return {
        "name": "lmkit, trained",
        "tokens_per_s": num_tokens / seconds,
        "peak_bytes": watch.together,
        "peak_bytes_alone": watch.alone,
        "num_tokens": num_tokens,
        "tokenizer": kind,
        "num_bytes": num_bytes,
        "mb_per_s": num_bytes / 1e6 / seconds,
    }


class Watch(threading.Thread):
    """Looks five times a second how much memory a process holds, without and with its children, until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        import psutil

        self.process = psutil.Process(pid)
        self.alone = self.together = 0
        """Largest resident memory so far, bytes."""
        self.start()

    def run(self) -> None:
        import psutil

        while self.process.is_running():
            with contextlib.suppress(psutil.NoSuchProcess):  # any of them may end between two calls
                if self.process.status() == psutil.STATUS_ZOMBIE:
                    return
                rss = [one.memory_info().rss for one in (self.process, *self.process.children(recursive=True))]
                self.alone, self.together = max(self.alone, rss[0]), max(self.together, sum(rss))
            time.sleep(0.2)


if __name__ == "__main__":
    main()

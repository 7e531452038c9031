"""The table of results: runs of one dataset, static and beyond, on valid and test.

    python scripts/results.py --run lstm=runs/A --run transformer=runs/B --run kn5=runs/C [--dynamic "KEY=VALUE ..."]
                              [--ways static,cache,dynamic,kn5,ensemble] [--out FOLDER]

Every number is one call of ``lmkit eval-ppl``, whose command is printed and whose JSON is kept in ``--out``, named
after the run and a digest of the whole command; what is there already is not computed again. Runs named kn5 are scored
statically only; the ensemble is of the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

SPLITS = ("valid", "test")
WAYS = ("static", "cache", "dynamic", "kn5", "ensemble")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="append", required=True, metavar="NAME=RUN", help="one for each run")
    parser.add_argument("--dynamic", default="dynamic=rms", help="words of dynamic evaluation")
    parser.add_argument("--ways", default=",".join(WAYS), help="ways of scoring, with commas")
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help="folder of the results in JSON")
    args = parser.parse_args()
    runs = dict(text.partition("=")[::2] for text in args.run)
    if len(runs) < len(args.run) or not all(runs.values()):
        parser.error("--run needs NAME=RUN, each with a name of its own")
    if unknown := [way for way in args.ways.split(",") if way not in WAYS]:
        parser.error(f"--ways {','.join(unknown)} is unknown: choose from {', '.join(WAYS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, run in runs.items():
        for way, words in ways_of(name, args.dynamic).items():
            if way in args.ways.split(","):
                rows.append((f"{name}{'' if way == 'static' else f' + {way}'}", evaluate(args.out, run, words)))
    neural = [run for name, run in runs.items() if name != "kn5"]
    if "ensemble" in args.ways.split(",") and len(neural) > 1:
        words = [f"ensemble={','.join(neural[1:])}"]
        rows.append(("ensemble", evaluate(args.out, neural[0], words)))
        rows.append(("ensemble + kn5", evaluate(args.out, neural[0], [*words, "mix=kn5"])))
    print("\n| model | valid | test |\n| --- | --- | --- |")
    for name, numbers in rows:
        print(f"| {name} | {numbers['valid']:.2f} | {numbers['test']:.2f} |")


def ways_of(name: str, dynamic: str) -> dict[str, list[str]]:
    """Ways of scoring a run, as words for the command line."""
    if name == "kn5":
        return {"static": []}
    return {"static": [], "cache": ["cache=neural"], "dynamic": dynamic.split(), "kn5": ["mix=kn5"]}


def evaluate(out: Path, run: str, words: list[str]) -> dict[str, float]:
    """The perplexity on each split."""
    numbers = {}
    for split in SPLITS:
        asked = "\0".join([str(Path(run).resolve()), split, *words])  # runs of multiruns are all named 0, 1, 2 ...
        path = out / f"{Path(run).name}-{split}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
        if not path.exists():
            line = ["eval-ppl", f"run={run}", f"split={split}", *words, "baselines=false", f"output={path}"]
            print(f"lmkit {shlex.join(line)}", flush=True)
            subprocess.run([sys.executable, "-m", "lmkit", *line], check=True, stdout=subprocess.DEVNULL)
        numbers[split] = json.loads(path.read_text(encoding="utf-8"))["ppl"]
        print(f"  {split} {numbers[split]:.2f}", flush=True)
    return numbers


if __name__ == "__main__":
    main()

"""``make demo``: the whole way on the embedded corpus: prepare, pretrain, eval-ppl, generate, and what came out."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

RUN = Path("runs") / "demo"
PROMPT = "When a class"


def lmkit(*args: str, capture: bool = False) -> str:
    """Run the installed program; its notes go to the terminal, its standard output too unless it is captured."""
    program = Path(sysconfig.get_path("scripts")) / ("lmkit.exe" if os.name == "nt" else "lmkit")
    print(f"\n$ lmkit {shlex.join(args)}", flush=True)
    done = subprocess.run(
        [program, *args], stdout=subprocess.PIPE if capture else None, text=True, encoding="utf-8", check=False
    )
    if done.returncode != 0:
        sys.exit(done.returncode)
    return done.stdout or ""


def fresh_directory() -> Path:
    """runs/demo, or the first of runs/demo-2, runs/demo-3 ... that does not exist yet."""
    path, number = RUN, 2
    while path.exists():
        path, number = RUN.with_name(f"demo-{number}"), number + 1
    return path


def main() -> None:
    start = time.monotonic()
    run = fresh_directory()
    lmkit("prepare", "tokenizer.vocab_size=1500")
    lmkit("pretrain", "recipe=pydocs_demo", f"run.dir={run}")
    lmkit("eval-ppl", f"run={run}", f"output={run / 'test.json'}")
    text = lmkit("generate", f"run={run}", "--prompt", PROMPT, "-n", "120", "--temperature", "0.7", capture=True)
    trained = json.loads((run / "result.json").read_text(encoding="utf-8"))
    test = json.loads((run / "test.json").read_text(encoding="utf-8"))
    rows = [
        ("corpus", "pydocs: the reference texts inside this Python"),
        ("model", f"{trained['num_parameters']:,} parameters, trained from nothing"),
        ("trained", f"{trained['trained_tokens']:,} tokens in {trained['elapsed_s']:.0f} s"),
        ("test perplexity per word", f"{test['word_ppl']:.1f}"),
        ("test perplexity per token", f"{test['token_ppl']:.1f}"),
        ("test bits per byte", f"{test['bits_per_byte']:.3f}"),
        ("the whole demo took", f"{time.monotonic() - start:.0f} s"),
        ("next", f'.venv/bin/lmkit generate run={run} --prompt "A class"'),
        ("then", ".venv/bin/lmkit pretrain dataset=text dataset.path=YOUR_FOLDER model=small"),
    ]
    width = max(len(name) for name, _ in rows)
    print(f"\nWhat the model writes after {PROMPT!r}:\n\n{text.strip()}\n")
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


if __name__ == "__main__":
    main()

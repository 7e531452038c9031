"""The five commands in a row through the installed ``lmkit``, small enough for every commit (``make smoke``).

``smoke.py PROGRAM`` tries another installation.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path


def lmkit(*args: str, env: dict[str, str]) -> str:
    """Run the installed program, show what it says, and return its standard output."""
    installed = Path(sysconfig.get_path("scripts")) / ("lmkit.exe" if os.name == "nt" else "lmkit")
    program = sys.argv[1] if len(sys.argv) > 1 else installed
    print(f"$ lmkit {' '.join(args)}", flush=True)
    done = subprocess.run([program, *args], env=env, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode != 0:
        sys.exit(f"smoke: lmkit {args[0]} exited with {done.returncode}")
    return done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "LMKIT_CACHE": f"{folder}/cache", "PYTHONUTF8": "1"}
        env.pop("LMKIT_DATA", None)
        root = f"run.root={folder}/runs"
        notes = Path(folder) / "notes"
        notes.mkdir()
        for number in range(40):
            text = "".join(f"Note {number}, line {line}: the cat sat on mat {line % 7}.\n" for line in range(20))
            (notes / f"{number}.txt").write_text(text, encoding="utf-8")
        small = ["train.batch_size=8", "train.seq_len=32", root]
        lmkit("prepare", "tokenizer.vocab_size=400", env=env)
        lmkit("pretrain", "model=tiny", "tokenizer.vocab_size=400", "train.max_steps=20", *small, env=env)
        lmkit("eval-ppl", root, f"output={folder}/eval.json", "split=valid", env=env)
        numbers = json.loads((Path(folder) / "eval.json").read_text(encoding="utf-8"))
        if not 1.0 < numbers["token_ppl"] < 400:
            sys.exit(f"smoke: token_ppl {numbers['token_ppl']} is not below that of a uniform model")
        lmkit("finetune", "dataset=text", f"dataset.path={notes}", "train.max_steps=5", *small, env=env)
        text = lmkit("generate", "--prompt", "我喜欢学习", "-n", "20", root, env=env)
        if not text.startswith("我喜欢学习"):
            sys.exit(f"smoke: the generated text does not begin with the prompt: {text!r}")
        lmkit("pretrain", "model=kn5", "tokenizer=word", f"run.dir={folder}/kn5", env=env)
        lmkit("eval-ppl", f"run={folder}/kn5", env=env)
        shutil.rmtree(notes)
    print("smoke: prepare, pretrain, eval-ppl, finetune and generate work", flush=True)


if __name__ == "__main__":
    main()

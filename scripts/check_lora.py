"""LoRA against full finetuning: a small model that can sort and add learns to be asked, on one core.

    python scripts/check_lora.py [FOLDER]

Pretrains a character-level Transformer on plain statements ("36 + 7 = 43"; FOLDER/base, kept if it is there), then
tunes it twice with task=instruct on questions in other words ("36 plus 7?"), with the same data, steps and schedule:
all parameters, and LoRA on all linear layers with less than a tenth of them. Each has its own
learning rate. The questions that count are of combinations that neither text nor questions hold in any form (see
check_instruct.py). Fails unless LoRA answers as many of them word for word as full finetuning does, within 2 %.
About 4 minutes on one core.

On 2026-11-24 it printed: exact match of 163 held-out questions 98.77 % full, 96.93 % LoRA (ratio 1.0190; one question
more would have failed it), answer perplexity 1.0240 and 1.1148 (ratio 1.0887), 8.1 % of the parameters. So LoRA is
within 2 % by what is answered right, narrowly and with one seed, and not by perplexity. The settings were found on 135
questions of the same held-out combinations, from another base: 6 epochs with full 1e-3, 3e-3 and LoRA 1e-2, 3e-2; 25
with full 1e-3, 3e-3 and LoRA 5e-3, 1e-2 (best ratio 1.041); 60 with full 3e-3 and LoRA 1.5e-2 alone (ratio 1.000).
With task=lm, from a base of a million parameters and 600 steps to other packages of Python's library, LoRA stayed 4 to
5 % behind in perplexity in all six settings that were tried.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from check_instruct import draw, lmkit

KINDS = ("sort", "add")
NUM_STATEMENTS, NUM_TRAIN, NUM_HELD_OUT = 60_000, 3_000, 2_000
"""Lines of the pretraining text, questions to learn from, and draws of held-out questions, each asked once."""
EPOCHS = 60
LEARNING_RATES = {"full": 3e-3, "lora": 1.5e-2}
TOLERANCE = 0.02


def write_data(folder: Path) -> None:
    """The pretraining text, and the questions to learn from and to judge on."""
    generator = random.Random(1)
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    lines = [draw(generator.choice(KINDS), generator, test=False)[0] for _ in range(NUM_STATEMENTS)]
    (text / "statements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    for name, count in (("train", NUM_TRAIN), ("held_out", NUM_HELD_OUT)):
        drawn = dict(draw(KINDS[i % 2], generator, test=name == "held_out")[1:] for i in range(count))
        rows = [json.dumps({"prompt": question, "response": answer}) for question, answer in drawn.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8", newline="\n")


def tuned(folder: Path, name: str, words: list[str]) -> dict[str, Any]:
    """Tune the base; its result.json."""
    shutil.rmtree(folder / name, ignore_errors=True)
    lmkit(
        *("finetune", "task=instruct", f"run={folder / 'base'}", f"run.dir={folder / name}"),
        *(f"task.data={folder / 'train.jsonl'}", f"task.valid={folder / 'held_out.jsonl'}", "task.exact_match=1000"),
        *("task.template=Q: {prompt}\nA: {response}\n", "train.seq_len=96", "train.batch_size=8", "schedule=cosine"),
        *(f"train.max_epochs={EPOCHS}", f"optimizer.lr={LEARNING_RATES[name]}", "eval.every_steps=500", *words),
    )
    result: dict[str, Any] = json.loads((folder / name / "result.json").read_text(encoding="utf-8"))
    return result


def main(folder: Path) -> int:
    """Returns the exit code."""
    os.environ["LMKIT_CACHE"] = str(folder / "cache")
    start = time.monotonic()
    write_data(folder)
    if not (folder / "base" / "result.json").exists():
        lmkit(
            *("pretrain", "dataset=text", f"dataset.path={folder / 'text'}", "tokenizer=char", "model=small"),
            *("model.d_model=64", "model.num_layers=3", "model.num_heads=4", "model.context=96", "model.dropout=0"),
            *("train.seq_len=96", "train.batch_size=16", "train.max_steps=1500", "optimizer=muon"),
            f"run.dir={folder / 'base'}",
        )
    adapter = ["adapter=lora", "adapter.rank=4", "adapter.alpha=8", "optimizer.weight_decay=0"]
    results = {"full": tuned(folder, "full", []), "lora": tuned(folder, "lora", adapter)}
    print(f"{'':6}{'trained':>10}{'exact match':>13}{'ppl/token':>11}{'base text ppl':>15}")
    for name, found in results.items():
        exact, after = found["exact_match"], found["forgetting"]["after"]["token_ppl"]
        print(f"{name:6}{found['num_parameters']:10,}{exact:13.2%}{found['answer_ppl']:11.4f}{after:15.2f}")
    full, lora = results["full"], results["lora"]
    ratio = full["exact_match"] / max(lora["exact_match"], 1e-9)
    share = lora["num_parameters"] / full["num_parameters"]
    print(f"{full['num_answered']} held-out questions; full / LoRA: exact match {ratio:.4f}")
    print(f"LoRA / full: answer perplexity {lora['answer_ppl'] / full['answer_ppl']:.4f}, parameters {share:.4f}")
    print(f"{time.monotonic() - start:.0f} s, {time.process_time():.0f} s of one core")
    return 0 if ratio <= 1 + TOLERANCE and share <= 0.1 else 1


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1]).resolve()))
    with tempfile.TemporaryDirectory() as made:
        sys.exit(main(Path(made)))

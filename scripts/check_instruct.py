"""Does instruction tuning teach? A small model on sorting, addition and looking up, with held-out combinations.

    python scripts/check_instruct.py [FOLDER]

Pretrains a character-level Transformer on plain statements ("36 + 7 = 43"), then tunes it with task=instruct on a few
thousand questions in other words ("36 plus 7?"). A tenth of the combinations is held out by a hash that looks at
neither order nor words: no list, sum or table of the test was seen in any form. Prints the exact match of greedy
answers to 200 draws of held-out questions of each kind, repeats left out; exits with 1 if one kind is not above 90 %.
About 5 minutes on one core.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from lmkit import cli
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.training import ExistingRunConfig
from lmkit.console import Console
from lmkit.data.chat import Conversation
from lmkit.device import resolve_device
from lmkit.loading import load_run
from lmkit.tasks.chat import greedy_answers, template_of_run

NUM_STATEMENTS, NUM_TRAIN, NUM_TEST = 60_000, 6_000, 200
"""Lines of the pretraining text; questions to learn from; held-out questions drawn of each kind."""
GOAL = 0.9
KINDS = ("sort", "add", "look up")
NAMES = "abcdef"


def held_out(*parts: object) -> bool:
    """Whether a combination is in the test, whatever its order."""
    text = " ".join(sorted(map(str, parts)))
    return hashlib.sha256(text.encode()).digest()[0] < 26


def draw(kind: str, generator: random.Random, *, test: bool) -> tuple[str, str, str]:
    """(statement, question, answer) of a combination that is, or is not, held out."""
    while True:
        if kind == "sort":
            digits = [generator.randrange(10) for _ in range(3)]
            if held_out(*digits) == test:
                given, answer = (" ".join(map(str, row)) for row in (digits, sorted(digits)))
                return f"{given} in order: {answer}", f"sort {given}", answer
        elif kind == "add":
            a, b = generator.randrange(100), generator.randrange(10)
            if held_out(a, b) == test:
                return f"{a} + {b} = {a + b}", f"{a} plus {b}?", str(a + b)
        else:
            names, values = generator.sample(NAMES, 3), [generator.randrange(10) for _ in range(3)]
            pairs = [f"{name}{value}" for name, value in zip(names, values, strict=True)]
            if held_out(*pairs) == test:
                table, mixed = (" ".join(row) for row in (pairs, generator.sample(pairs, 3)))
                answer = generator.choice(pairs)
                return f"{table} mixed: {mixed}", f"{table} has {answer[0]}?", answer


def write_data(folder: Path) -> None:
    """The pretraining text and the questions to learn from and to validate on."""
    generator = random.Random(1)
    text = folder / "text"
    text.mkdir(parents=True)
    lines = [draw(generator.choice(KINDS), generator, test=False)[0] for _ in range(NUM_STATEMENTS)]
    (text / "statements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, count in (("train", NUM_TRAIN), ("valid", 300)):
        drawn = [draw(KINDS[i % 3], generator, test=False) for i in range(count)]
        rows = [{"prompt": question, "response": answer} for _, question, answer in drawn]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def lmkit(*words: str) -> None:
    """Run a command in this process."""
    print(f"$ lmkit {' '.join(words)}", file=sys.stderr)
    if code := cli.main([*words, "device=cpu", "device.threads=1"]):
        sys.exit(code)


def exact_match(run: Path) -> dict[str, tuple[int, int]]:
    """Held-out questions of each kind, each once: how many are answered word for word, and how many there are."""
    device = resolve_device(DeviceConfig(type=DeviceType.cpu, threads=1))
    loaded = load_run(ExistingRunConfig(path=str(run)), device=device, console=Console())
    template, tokenizer = template_of_run(loaded), loaded.tokenizer
    assert template is not None
    generator = random.Random(2)
    found = {}
    for kind in KINDS:
        drawn = dict(draw(kind, generator, test=True)[1:] for _ in range(NUM_TEST))
        answers = greedy_answers(
            loaded.model,
            [template.encode_prompt(Conversation(()), question, tokenizer) for question in drawn],
            [20] * len(drawn),
            eos_id=tokenizer.eos_id,
            device=device,
            batch_size=64,
            progress=lambda _: None,
        )
        pairs = zip(answers, drawn.values(), strict=True)
        right = sum(ids is not None and tokenizer.decode(ids) == answer for ids, answer in pairs)
        found[kind] = (right, len(drawn))
    return found


def main(folder: Path) -> int:
    """Returns the exit code."""
    os.environ["LMKIT_CACHE"] = str(folder / "cache")
    start = time.monotonic()
    write_data(folder)
    shape = ["model=small", "model.d_model=64", "model.num_layers=3", "model.num_heads=4", "model.context=96"]
    lmkit(
        *("pretrain", "dataset=text", f"dataset.path={folder / 'text'}", "tokenizer=char", *shape),
        *("model.dropout=0", "train.seq_len=96", "train.batch_size=16", "train.max_steps=1500", "optimizer=muon"),
        f"run.dir={folder / 'base'}",
    )
    lmkit(
        *("finetune", "task=instruct", f"task.data={folder / 'train.jsonl'}", f"task.valid={folder / 'valid.jsonl'}"),
        *(
            f"run={folder / 'base'}",
            f"run.dir={folder / 'tuned'}",
            "task.template=Q: {prompt}\nA: {response}\n",
            "task.exact_match=300",
        ),
        *("train.seq_len=96", "train.batch_size=16", "train.max_epochs=40", "optimizer=muon"),
    )
    found = exact_match(folder / "tuned")
    shown = ", ".join(f"{kind} {right} of {count}" for kind, (right, count) in found.items())
    print(f"held-out questions answered word for word: {shown}")
    print(f"{time.monotonic() - start:.0f} s, {time.process_time():.0f} s of one core")
    return 0 if min(right / count for right, count in found.values()) > GOAL else 1


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1]).resolve()))
    with tempfile.TemporaryDirectory() as made:
        sys.exit(main(Path(made)))

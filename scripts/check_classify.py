"""Does a finetuned language model classify better than bags of words? On real text, on one core; needs LMKIT_DATA.

usage: LMKIT_DATA=DIR python scripts/check_classify.py [--folder DIR] [--examples N] [--steps N]

The text is that of Penn Treebank and WikiText-2, made hard to tell apart: lower case, only words that occur at least
three times in both corpora, no numbers, no punctuation, no <unk>; cut into pieces of 8 words.

- source: which of the two corpora the piece is from. Words tell much of it
- order: whether the words of the piece stand as they were written, or two neighbours have changed places. Words tell
  nothing of it, and bigrams a little

The baselines are logistic regressions on the counts of words, and of words and bigrams, with weight decay and number of
epochs chosen on valid. The model is an LSTM that was pretrained on pieces of the training text of both corpora,
and then finetuned on the same examples as the baselines. Accuracy is that on test pieces, which stand in no training
text. Prints a table; exit code 1 unless the model is better than the better baseline in both tasks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lmkit import cli

PIECE_WORDS = 8
MIN_COUNT = 3
NUM_VALID, NUM_TEST = 1000, 4000
Example = tuple[str, str]
"""Text and label."""


def read_words(data: Path) -> dict[str, list[list[str]]]:
    """Corpus -> its lines as lists of lower-case words of letters."""
    files = {"ptb": data / "ptb" / "ptb.train.txt", "wikitext2": data / "wikitext-2" / "wiki.train.tokens"}
    corpora = {}
    for name, path in files.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        text = [line for line in lines if not line.strip().startswith("=")]
        corpora[name] = [[w for w in line.lower().split() if w.isalpha() and w.isascii() and w != "n"] for line in text]
    return corpora


def cut_pieces(corpora: dict[str, list[list[str]]], draw: random.Random) -> dict[str, list[list[str]]]:
    """Corpus -> pieces of its words that both corpora use, shuffled, as many of each."""
    counts = {name: Counter(w for line in lines for w in line) for name, lines in corpora.items()}
    shared = {w for w, n in counts["ptb"].items() if n >= MIN_COUNT and counts["wikitext2"][w] >= MIN_COUNT}
    pieces = {}
    for name, lines in corpora.items():
        pieces[name] = []
        for line in lines:
            kept = [w for w in line if w in shared]
            starts = range(0, len(kept) - PIECE_WORDS + 1, PIECE_WORDS)
            pieces[name] += [kept[i : i + PIECE_WORDS] for i in starts]
        draw.shuffle(pieces[name])
    least = min(map(len, pieces.values()))
    return {name: of[:least] for name, of in pieces.items()}


def swapped(words: Sequence[str], draw: random.Random) -> list[str]:
    """The words with two different neighbours in each other's place."""
    places = [i for i in range(len(words) - 1) if words[i] != words[i + 1]]
    if not places:
        return list(words)
    i = draw.choice(places)
    return [*words[:i], words[i + 1], words[i], *words[i + 2 :]]


def make_tasks(
    pieces: dict[str, list[list[str]]], num_train: int, draw: random.Random
) -> tuple[dict[str, dict[str, list[Example]]], list[str]]:
    """Task -> split -> examples, and what is left as text to pretrain on, the training examples' own text included."""
    sizes = {"test": NUM_TEST // 2, "valid": NUM_VALID // 2, "train": num_train // 2}
    tasks: dict[str, dict[str, list[Example]]] = {"source": {}, "order": {}}
    start = 0
    for split, size in sizes.items():
        own = {name: of[start : start + size] for name, of in pieces.items()}
        tasks["source"][split] = [(" ".join(words), name) for name, of in own.items() for words in of]
        mixed = [words for of in own.values() for words in of]
        draw.shuffle(mixed)
        half = len(mixed) // 2
        tasks["order"][split] = [(" ".join(words), "written") for words in mixed[:half]]
        tasks["order"][split] += [(" ".join(swapped(words, draw)), "swapped") for words in mixed[half:]]
        for task in tasks.values():
            draw.shuffle(task[split])
        start += size
    first = sizes["test"] + sizes["valid"]
    text = [" ".join(words) for of in pieces.values() for words in of[first:]]
    draw.shuffle(text)
    return tasks, text


def features(text: str, *, bigrams: bool) -> list[str]:
    words = text.split()
    return words + ([f"{a} {b}" for a, b in itertools.pairwise(words)] if bigrams else [])


def bag_of_words(task: dict[str, list[Example]], *, bigrams: bool) -> float:
    """Accuracy on test of the logistic regression that is best on valid."""
    labels = sorted({label for _, label in task["train"]})
    known = sorted({f for text, _ in task["train"] for f in features(text, bigrams=bigrams)})
    ids = {feature: i for i, feature in enumerate(known)}
    data = {}
    for split, examples in task.items():
        rows = [[ids[f] for f in features(text, bigrams=bigrams) if f in ids] for text, _ in examples]
        flat = torch.tensor([i for row in rows for i in row])
        offsets = torch.tensor([0, *map(len, rows[:-1])]).cumsum(0)
        data[split] = (flat, offsets, torch.tensor([labels.index(label) for _, label in examples]))
    best_valid, best_test = 0.0, 0.0
    for decay in (0.0, 1e-5, 1e-4, 1e-3, 1e-2):
        torch.manual_seed(0)
        weights = torch.nn.EmbeddingBag(len(known), len(labels), mode="sum")
        bias = torch.nn.Parameter(torch.zeros(len(labels)))
        torch.nn.init.zeros_(weights.weight)
        optimizer = torch.optim.Adam([weights.weight, bias], lr=0.02)

        def accuracy(split: str, weights: Any = weights, bias: Any = bias) -> float:
            flat, offsets, targets = data[split]
            return float(((weights(flat, offsets) + bias).argmax(1) == targets).float().mean())

        for _ in range(60):
            flat, offsets, targets = data["train"]
            loss = F.cross_entropy(weights(flat, offsets) + bias, targets) + decay * weights.weight.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                if (valid := accuracy("valid")) > best_valid:
                    best_valid, best_test = valid, accuracy("test")
    return best_test


def command(words: list[str]) -> None:
    code = cli.main([*words, "device=cpu", "device.threads=1", "log.every_steps=1000"])
    if code != 0:
        sys.exit(code)


def finetuned(name: str, task: dict[str, list[Example]], folder: Path) -> float:
    """Accuracy on test of the classifier whose checkpoint is best on valid, by way of predict=FILE."""
    for split, examples in task.items():
        rows = [json.dumps({"text": text, "label": label}) for text, label in examples]
        (folder / f"{name}.{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8", newline="\n")
    words = ["finetune", "task=classify", f"run={folder / 'language_model'}", f"run.dir={folder / name}"]
    words += [
        f"task.{key}={folder / f'{name}.{split}.jsonl'}" for key, split in (("data", "train"), ("valid", "valid"))
    ]
    words += ["task.pooling=mean", "task.dropout=0.2", "optimizer.lr=1e-3", "train.batch_size=32", "train.max_epochs=3"]
    command([*words, f"predict={folder / f'{name}.test.jsonl'}"])
    lines = (folder / f"{name}.test.predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return sum(row["prediction"] == row["label"] for row in rows) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--examples", type=int, default=16000, help="training examples of each task")
    parser.add_argument("--steps", type=int, default=1000, help="pretraining steps")
    args = parser.parse_args()
    if "LMKIT_DATA" not in os.environ:
        parser.error("set LMKIT_DATA to the folder that holds ptb and wikitext-2")
    folder = args.folder or Path(tempfile.mkdtemp(prefix="classify-"))
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    draw, start = random.Random(1), time.monotonic()
    tasks, text = make_tasks(cut_pieces(read_words(Path(os.environ["LMKIT_DATA"])), draw), args.examples, draw)
    (folder / "pieces.txt").write_text("\n".join(text) + "\n", encoding="utf-8", newline="\n")
    words = ["pretrain", "dataset=text", f"dataset.path={folder / 'pieces.txt'}", "tokenizer=word", "model=lstm"]
    words += ["model.d_embed=128", "model.d_hidden=128", "model.num_layers=1", "optimizer.lr=4e-3"]
    words += [f"train.max_steps={args.steps}", "train.batch_size=32", "train.seq_len=36", "dataset.test_fraction=0"]
    words += ["dataset.valid_fraction=0.01", f"eval.every_steps={args.steps}"]
    command([*words, f"run.dir={folder / 'language_model'}"])
    print(f"{len(text)} pieces to pretrain on, {time.monotonic() - start:.0f} s; accuracy on {NUM_TEST} test pieces:")
    print(f"{'task':<8} {'words':>8} {'bigrams':>8} {'lmkit':>8}")
    worse = False
    for name, task in tasks.items():
        baselines = [bag_of_words(task, bigrams=bigrams) for bigrams in (False, True)]
        ours = finetuned(name, task, folder)
        worse = worse or ours <= max(baselines)
        print(f"{name:<8} {baselines[0]:8.2%} {baselines[1]:8.2%} {ours:8.2%}", flush=True)
    print(f"{time.monotonic() - start:.0f} s in all")
    sys.exit(worse)


if __name__ == "__main__":
    main()

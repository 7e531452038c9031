"""Makes the golden checkpoints of today's format: one small real run for each family, and what its model says.

    python tests/golden/make.py

writes ``checkpoint-v<VERSION>/<case>/``, as training saved it, and ``checkpoint-v<VERSION>/expected.json``. Run it
once after VERSION in lmkit/store/migrations.py was raised: a folder that is there is never written again, since it
stands for the checkpoints that people have.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from lmkit.commands import pretrain
from lmkit.config.commands import PretrainConfig
from lmkit.config.data import ByteTokenizerConfig, TextConfig, TokenizerConfig, WordTokenizerConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import ModelConfig, NgramConfig, RecurrentConfig, TransformerConfig
from lmkit.config.optimization import (
    AdamwConfig,
    CosineConfig,
    OptimizerConfig,
    PlateauConfig,
    ScheduleConfig,
    SgdConfig,
)
from lmkit.config.training import EvalConfig, ExistingRunConfig, RunConfig, TrainConfig
from lmkit.console import Console
from lmkit.device import resolve_device
from lmkit.loading import LoadedRun, load_run
from lmkit.store.checkpoint import latest_checkpoint
from lmkit.store.migrations import VERSION

GOLDEN = Path(__file__).parent
EXPECTED = "expected.json"
STEPS = 200
CPU = DeviceConfig(type=DeviceType.cpu, threads=1)
WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "on", "under", "mat", "tree", "and", "我们"]
SENTENCE = "the cat sat under a tree and the bird ran\n"

CASES: dict[str, tuple[ModelConfig, TokenizerConfig, OptimizerConfig, ScheduleConfig, dict[str, Any]]] = {
    "transformer-word": (
        TransformerConfig(d_model=8, num_layers=1, num_heads=2, d_ff=16, context=16, dropout=0.1),
        WordTokenizerConfig(),
        AdamwConfig(lr=0.03),
        CosineConfig(),
        {},
    ),
    "lstm-byte": (
        RecurrentConfig(d_embed=4, d_hidden=6, num_layers=2),
        ByteTokenizerConfig(),
        SgdConfig(lr=0.5, momentum=0.5),
        PlateauConfig(patience=0),
        {"micro_batch_size": 2, "ema_decay": 0.9, "spike_nats": 5.0},
    ),
    "kn-word": (NgramConfig(order=3), WordTokenizerConfig(), AdamwConfig(), CosineConfig(), {}),
}


def write_corpus(folder: Path) -> None:
    """The texts that the golden runs were trained on, always the same."""
    draw = random.Random(1)
    folder.mkdir()
    for split, num_lines in (("train", 40), ("valid", 8), ("test", 8)):
        lines = [" ".join(draw.choice(WORDS) for _ in range(8)) for _ in range(num_lines)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def config(case: str, *, steps: int, resume: bool) -> PretrainConfig:
    """The run of a case, with paths relative to the current folder."""
    model, tokenizer, optimizer, schedule, train = CASES[case]
    return PretrainConfig(
        dataset=TextConfig(path="corpus"),
        tokenizer=tokenizer,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        device=CPU,
        train=TrainConfig(batch_size=4, seq_len=8, max_steps=steps, **train),
        eval=EvalConfig(every_steps=50),
        run=RunConfig(dir=f"run-{case}", root="."),
        resume=resume,
    )


def load(checkpoint: Path) -> LoadedRun:
    """The model of a checkpoint, as every command loads it."""
    return load_run(ExistingRunConfig(path=str(checkpoint)), device=resolve_device(CPU), console=Console())


@torch.no_grad()
def answers(loaded: LoadedRun) -> dict[str, Any]:
    """Ids of SENTENCE, nats of each under the model, and all logits before the last one; computed in float64."""
    tokenizer = loaded.tokenizer
    ids = tokenizer.encode(SENTENCE)[: loaded.context]
    model = loaded.model.double() if list(loaded.model.parameters()) else loaded.model
    hidden, _ = model(torch.tensor([[tokenizer.eos_id, *ids[:-1]]]))
    logits = model.head.logits(hidden[0]).double()
    nats = -logits.log_softmax(1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
    return {"ids": [int(i) for i in ids], "nats": nats.tolist(), "logits": logits[-1].tolist()}


def main() -> None:
    target = GOLDEN / f"checkpoint-v{VERSION}"
    if target.exists():
        raise SystemExit(f"{target} is there and stays as it is")
    expected = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.environ["LMKIT_CACHE"] = str(Path(folder) / "cache")
        write_corpus(Path("corpus"))
        for case in CASES:
            pretrain.run(config(case, steps=STEPS, resume=False))
            newest = latest_checkpoint(Path(f"run-{case}"))
            if newest is None:
                raise SystemExit(f"{case} has left no checkpoint")
            shutil.copytree(newest, target / case)
            expected[case] = answers(load(target / case))
    text = json.dumps(expected, indent=1) + "\n"
    (target / EXPECTED).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

"""Makes the golden checkpoints of today's format: one small real run for each family, and what its model says.

    python tests/golden/make.py

writes ``checkpoint-v<VERSION>/<case>/``, as training saved it, and what is said to ``checkpoint-v<VERSION>/
expected.json``. Run it once after VERSION in lmkit/store/migrations.py was raised, or a case was added here: what is
there is never written again, since it stands for the checkpoints that people have.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lmkit.commands import finetune, pretrain
from lmkit.commands.predict import predict_file
from lmkit.config.adapter import AdapterConfig
from lmkit.config.commands import FinetuneConfig, PretrainConfig
from lmkit.config.data import ByteTokenizerConfig, TextConfig, TokenizerConfig, WordTokenizerConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import (
    Activation,
    Cell,
    ModelConfig,
    NgramConfig,
    Norm,
    Positions,
    RecurrentConfig,
    RelganConfig,
    TransformerConfig,
    VaeLstmConfig,
)
from lmkit.config.objectives import GanObjectiveConfig, ObjectiveConfig, VaeObjectiveConfig
from lmkit.config.optimization import (
    AdamConfig,
    AdamwConfig,
    CosineConfig,
    MuonConfig,
    NadamConfig,
    OptimizerConfig,
    PlateauConfig,
    RmspropConfig,
    ScheduleConfig,
    SgdConfig,
)
from lmkit.config.softmax import AdaptiveSoftmaxConfig, SoftmaxConfig
from lmkit.config.tasks import (
    ClassifyTaskConfig,
    LmTaskConfig,
    NetworkConfig,
    RegressTaskConfig,
    RowsTaskConfig,
    TaskConfig,
)
from lmkit.config.training import Average, EvalConfig, ExistingRunConfig, RunConfig, TrainConfig
from lmkit.console import Console
from lmkit.device import resolve_device
from lmkit.loading import LoadedRun, load_run
from lmkit.models.gan import Relgan
from lmkit.models.vae import VaeLstm
from lmkit.store.checkpoint import latest_checkpoint
from lmkit.store.migrations import VERSION

GOLDEN = Path(__file__).parent
EXPECTED = "expected.json"
STEPS = 200
TUNED_STEPS = 20
CPU = DeviceConfig(type=DeviceType.cpu, threads=1)
WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "on", "under", "mat", "tree", "and", "我们"]
SENTENCE = "the cat sat under a tree and the bird ran\n"


@dataclass(frozen=True)
class Case:
    """A run of pretrain."""

    model: ModelConfig
    tokenizer: TokenizerConfig = field(default_factory=WordTokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=AdamwConfig)
    schedule: ScheduleConfig = field(default_factory=CosineConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    softmax: SoftmaxConfig = field(default_factory=SoftmaxConfig)
    train: dict[str, Any] = field(default_factory=dict)


CASES = {
    "transformer-word": Case(
        TransformerConfig(d_model=8, num_layers=1, num_heads=2, d_ff=16, context=16, dropout=0.1),
        optimizer=AdamwConfig(lr=0.03),
    ),
    "gpt2-mixture-word": Case(
        TransformerConfig(
            d_model=8, num_layers=1, num_heads=2, d_ff=16, context=16, positions=Positions.learned, bias=True,
            norm=Norm.layernorm, activation=Activation.gelu, gated=False, num_softmaxes=2,
        ),
        optimizer=MuonConfig(),
    ),
    "transformer-xl-word": Case(
        TransformerConfig(d_model=8, num_layers=2, num_heads=2, d_ff=16, context=16, dropout=0.1, memory_tokens=6),
        optimizer=AdamConfig(lr=0.03),
    ),
    "lstm-byte": Case(
        RecurrentConfig(d_embed=4, d_hidden=6, num_layers=2),
        ByteTokenizerConfig(),
        SgdConfig(lr=0.5, momentum=0.5),
        PlateauConfig(patience=0),
        train={"micro_batch_size": 2, "ema_decay": 0.9, "spike_nats": 5.0},
    ),
    "gru-adaptive-word": Case(
        RecurrentConfig(cell=Cell.gru, d_embed=8, d_hidden=6, num_layers=2, tie_embeddings=False),
        optimizer=RmspropConfig(),
        softmax=AdaptiveSoftmaxConfig(cutoffs=[5, 10]),
    ),
    "mogrifier-word": Case(
        RecurrentConfig(d_embed=6, d_hidden=6, num_layers=1, mogrifier_rounds=2, mogrifier_rank=2),
        optimizer=SgdConfig(lr=0.5, momentum=0.5),
        train={"average": Average.swa, "swa_start": 0.5},
    ),
    "vae-word": Case(
        VaeLstmConfig(d_embed=6, d_encoder=6, d_latent=2),
        optimizer=NadamConfig(),
        objective=VaeObjectiveConfig(num_samples=2),
    ),
    "relgan-word": Case(
        RelganConfig(d_embed=8, num_representations=2, d_representation=4, num_filters=4),
        optimizer=AdamwConfig(lr=0.03),
        objective=GanObjectiveConfig(pretrain_share=0.6, length=8, num_samples=20),
    ),
    "kn-word": Case(NgramConfig(order=3)),
}  # fmt: skip


@dataclass(frozen=True)
class Tuned:
    """A run of finetune, which starts from the checkpoint of BASE."""

    task: TaskConfig
    adapter: AdapterConfig | None = None


TUNED = {
    "lora-word": Tuned(LmTaskConfig(), AdapterConfig(rank=2)),
    "classify-word": Tuned(ClassifyTaskConfig(data="rows.jsonl", label="animal")),
    "regress-word": Tuned(
        RegressTaskConfig(
            data="rows.jsonl", target="legs", text="text", numeric=["age"], network=NetworkConfig(d_hidden=4)
        )
    ),
}
BASE = "transformer-word"


def write_corpus(folder: Path) -> None:
    """The texts that the golden runs were trained on, always the same."""
    draw = random.Random(1)
    folder.mkdir()
    for split, num_lines in (("train", 40), ("valid", 8), ("test", 8)):
        lines = [" ".join(draw.choice(WORDS) for _ in range(8)) for _ in range(num_lines)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def write_rows(path: Path) -> None:
    """The rows that the golden classifier and regression were trained on, always the same."""
    draw = random.Random(2)
    rows = []
    for number in range(40):
        animal = draw.choice(["cat", "dog", "bird"])
        text = f"{draw.choice(['the', 'a'])} {animal} {draw.choice(['sat', 'ran'])}"
        rows.append({"text": text, "animal": animal, "age": number % 7, "legs": 2 if animal == "bird" else 4})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def prepare_folder(version: Path) -> None:
    """Put what the runs are trained on, and start from, into the current folder, to which their paths are relative."""
    write_corpus(Path("corpus"))
    write_rows(Path("rows.jsonl"))
    if (version / BASE).exists():
        shutil.copytree(version / BASE, "base")


def config(case: str, *, steps: int, resume: bool) -> PretrainConfig:
    """A run of pretrain."""
    made = CASES[case]
    return PretrainConfig(
        dataset=TextConfig(path="corpus"),
        tokenizer=made.tokenizer,
        model=made.model,
        objective=made.objective,
        optimizer=made.optimizer,
        schedule=made.schedule,
        softmax=made.softmax,
        device=CPU,
        train=TrainConfig(batch_size=4, seq_len=8, max_steps=steps, **made.train),
        eval=EvalConfig(every_steps=50),
        run=RunConfig(dir=f"run-{case}", root="."),
        resume=resume,
    )


def tuning(case: str, *, steps: int, resume: bool) -> FinetuneConfig:
    """A run of finetune."""
    task = TUNED[case].task
    length = {} if isinstance(task, RowsTaskConfig) else {"seq_len": 8}
    return FinetuneConfig(
        task=task,
        adapter=TUNED[case].adapter,
        dataset=TextConfig(path="corpus"),
        optimizer=AdamwConfig(lr=0.03),
        schedule=CosineConfig(),
        device=CPU,
        train=TrainConfig(batch_size=4, max_steps=steps, **length),
        eval=EvalConfig(every_steps=50),
        run=RunConfig(path="base", dir=f"run-{case}", root="."),
        resume=resume,
    )


def train(case: str, *, steps: int, resume: bool = False) -> dict[str, Any]:
    """Make or continue the run of a case, as ``run-<case>`` in the current folder; its result."""
    if case in TUNED:
        return finetune.run(tuning(case, steps=steps, resume=resume))
    return pretrain.run(config(case, steps=steps, resume=resume))


def load(checkpoint: Path) -> LoadedRun:
    """The language model of a checkpoint, as every command loads it."""
    existing = ExistingRunConfig(path=str(checkpoint))
    return load_run(existing, device=resolve_device(CPU), console=Console(), latent=True)


def answers(case: str, checkpoint: Path) -> dict[str, Any]:
    """What the model of a checkpoint says, as lists of numbers or of texts."""
    if case in TUNED and isinstance(TUNED[case].task, RowsTaskConfig):
        return of_rows(case, checkpoint)
    return of_sentence(load(checkpoint))


@torch.no_grad()
def of_sentence(loaded: LoadedRun) -> dict[str, Any]:
    """Ids of SENTENCE, nats of each under the model, and all logits before the last one; computed in float64.

    Of a VAE also the posterior, and of a GAN what its discriminator thinks.
    """
    tokenizer = loaded.tokenizer
    ids = [int(i) for i in tokenizer.encode(SENTENCE)[: loaded.context]]
    model = loaded.model.double() if list(loaded.model.parameters()) else loaded.model
    hidden, _ = model(torch.tensor([[tokenizer.eos_id, *ids[:-1]]]))
    logits = model.head.logits(hidden[0]).double()
    nats = -logits.log_softmax(1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
    said = {"ids": ids, "nats": nats.tolist(), "logits": logits[-1].tolist()}
    if isinstance(model, VaeLstm):
        posterior = model.encode(torch.tensor([ids]))
        said["posterior"] = torch.cat([posterior.mean_BZ, posterior.log_var_BZ], 1)[0].tolist()
    if isinstance(model, Relgan):
        said["judged"] = model.discriminator(model.discriminator.embedding(torch.tensor([ids])))[0].tolist()
    return said


def of_rows(case: str, checkpoint: Path) -> dict[str, Any]:
    """Column by column, what the model adds to the rows."""
    told = replace(tuning(case, steps=1, resume=False), predict="rows.jsonl", output="predictions.jsonl")
    predict_file(told, ExistingRunConfig(path=str(checkpoint)))
    rows = [json.loads(line) for line in Path("predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    return {name: [row[name] for row in rows] for name in ("prediction", "probability") if name in rows[0]}


def main() -> None:
    target = GOLDEN / f"checkpoint-v{VERSION}"
    expected = json.loads((target / EXPECTED).read_bytes()) if target.exists() else {}
    missing = [case for case in (*CASES, *TUNED) if case not in expected]
    if not missing:
        raise SystemExit(f"{target} has every case and stays as it is")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.environ["LMKIT_CACHE"] = str(Path(folder) / "cache")
        prepare_folder(target)
        for case in missing:
            train(case, steps=TUNED_STEPS if case in TUNED else STEPS)
            newest = latest_checkpoint(Path(f"run-{case}"), print)
            if newest is None:
                raise SystemExit(f"{case} has left no checkpoint")
            shutil.copytree(newest, target / case)
            expected[case] = answers(case, target / case)
            if case == BASE:
                shutil.copytree(newest, "base")
    text = json.dumps(expected, indent=1) + "\n"
    (target / EXPECTED).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()

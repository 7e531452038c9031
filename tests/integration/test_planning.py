"""What a plan says a training will take is what it takes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lmkit import products
from lmkit.averaging import ScheduleFreeAverage
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import Cell, ModelConfig, RecurrentConfig, TransformerConfig
from lmkit.config.optimization import (
    AdadeltaConfig,
    AdagradConfig,
    AdamwConfig,
    CosineConfig,
    MuonConfig,
    OptimizerConfig,
    RmspropConfig,
    ScheduleFreeConfig,
    SgdConfig,
)
from lmkit.config.softmax import SoftmaxConfig
from lmkit.config.training import EvalConfig, SaveConfig, TrainConfig
from lmkit.data.batches import Batch, Windows
from lmkit.device import resolve_device
from lmkit.heads import CHUNK_ELEMENTS_CPU
from lmkit.horizon import Horizon
from lmkit.memory import Memory, _kept, estimate_memory, largest_fitting, optimizer_bytes
from lmkit.models.base import State
from lmkit.objectives import build_objective
from lmkit.optim import build_optimizer
from lmkit.planning import Plan, plan, time_steps
from lmkit.tasks.language import NextToken
from lmkit.train import Trainer, TrainState

needs_schedule_free = pytest.mark.skipif(importlib.util.find_spec("schedulefree") is None, reason="needs schedulefree")
VOCAB = 500
TINY = TransformerConfig(d_model=32, num_layers=2, num_heads=2, context=32)


def make_trainer(
    model_config: ModelConfig = TINY,
    optimizer_config: OptimizerConfig | None = None,
    *,
    vocab_size: int = VOCAB,
    batch_size: int = 4,
    micro_batch_size: int = 4,
    seq_len: int = 16,
    task_class: type[NextToken] = NextToken,
) -> Trainer:
    device = resolve_device(DeviceConfig(type=DeviceType.cpu, threads=1))
    config = optimizer_config or AdamwConfig(lr=1e-3)
    model = model_config.build(vocab_size, seed=1)
    tokens = np.random.default_rng(0).integers(0, vocab_size, 40_000).astype(np.int32)
    task = task_class(
        model,
        Windows(tokens, 0, batch_size, seq_len, 1),
        build_objective(SoftmaxConfig(), torch.ones(vocab_size)),
    )
    task.num_targets = len(tokens)
    return Trainer(
        task=task,
        model=model,
        optimizer=build_optimizer(config, model, fused=device.fused),
        optimizer_config=config,
        schedule=CosineConfig(),
        device=device,
        seed=1,
        micro_batch_size=micro_batch_size,
        state=TrainState(horizon=Horizon(0.01)),
    )


SHAPES: dict[str, tuple[ModelConfig, int, int, int]] = {
    "transformer": (TransformerConfig(d_model=256, num_layers=6, num_heads=8), 10_000, 48, 128),
    "large vocabulary": (TransformerConfig(d_model=256, num_layers=4, num_heads=4, dropout=0.1), 32_000, 16, 256),
    "lstm": (RecurrentConfig(d_embed=300, d_hidden=800, num_layers=3), 10_000, 48, 70),
    "gru": (RecurrentConfig(d_embed=300, d_hidden=800, num_layers=2, cell=Cell.gru), 10_000, 64, 70),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux' /proc")
@pytest.mark.parametrize("name", SHAPES)
def test_the_memory_is_within_15_percent_of_the_measured_peak(name: str) -> None:
    """Each in a process of its own: nothing else has grown its heap."""
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["estimate"] == pytest.approx(found["peak"], rel=0.15), found


def measure(name: str) -> None:
    """Print the estimate and the peak of the resident size over three steps."""
    config, vocab_size, batch_size, seq_len = SHAPES[name]
    trainer = make_trainer(
        config, vocab_size=vocab_size, batch_size=batch_size, micro_batch_size=batch_size, seq_len=seq_len
    )
    memory = estimate_memory(trainer)
    estimate = memory.peak(batch_size) - memory.copy  # nothing is saved here
    for step in range(3):
        trainer.train_step(trainer.task.batches[step])
    with open("/proc/self/status", encoding="ascii") as status:
        (peak,) = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")]
    print(json.dumps({"estimate": estimate, "peak": peak}))


@pytest.mark.parametrize("cell", [Cell.lstm, Cell.gru])
def test_what_is_kept_is_linear_in_the_rows(cell: Cell) -> None:
    for model in (TINY, RecurrentConfig(d_embed=16, d_hidden=32, num_layers=2, cell=cell)):
        trainer = make_trainer(model, batch_size=8, micro_batch_size=8)
        one, two, four = (sum(_kept(trainer, rows)) for rows in (1, 2, 4))
        assert four == pytest.approx(one + 3 * (two - one), rel=0.02)


@pytest.mark.parametrize(
    "config",
    [
        AdamwConfig(lr=0.1),
        SgdConfig(lr=0.1),
        SgdConfig(lr=0.1, momentum=0.9),
        AdagradConfig(lr=0.1),
        AdadeltaConfig(lr=0.1),
        RmspropConfig(lr=0.1),
        RmspropConfig(lr=0.1, momentum=0.9),
        MuonConfig(lr=0.1),
        pytest.param(ScheduleFreeConfig(lr=0.1), marks=[pytest.mark.extra("schedule-free"), needs_schedule_free]),
    ],
    ids=lambda c: f"{type(c).__name__}-{getattr(c, 'momentum', '')}",
)
def test_the_optimizer_takes_what_it_was_said_to_take(config: OptimizerConfig) -> None:
    trainer = make_trainer(optimizer_config=config)
    said = optimizer_bytes(config, trainer.optimizer)
    trainer.train_step(trainer.task.batches[0])
    held = sum(
        t.numel() * t.element_size()
        for state in trainer.optimizer.state.values()
        for t in state.values()
        if isinstance(t, torch.Tensor) and t.ndim > 0
    )
    assert said == held


def a_memory(**changes: int | bool) -> Memory:
    values = {
        "weights": 100,
        "optimizer": 200,
        "average": 0,
        "gradients": 100,
        "accumulates": False,
        "fixed": 10,
        "per_row": 50,
        "working_per_row": 20,
        "working_fixed": 5,
        "process": 1000,
        "update": 0,
        "copy": 0,
    }
    return Memory(**{**values, **changes})  # type: ignore[arg-type]


def test_the_largest_micro_batch_divides_the_batch_and_fits() -> None:
    memory = a_memory()
    for limit in range(1200, 2600, 37):
        largest = largest_fitting(memory, 12, limit)
        assert largest == 0 or 12 % largest == 0
        larger = [m for m in (1, 2, 3, 4, 6, 12) if m > largest]
        if larger:
            extra = memory.gradients if larger[0] < 12 else 0
            assert memory.peak(larger[0]) + extra > limit


def test_gradients_hide_behind_activations_unless_they_add_up() -> None:
    assert a_memory().peak(4) == 1000 + 100 + 200 + (10 + 200 + 5 + 80)
    assert a_memory(gradients=10_000).peak(4) == 1000 + 100 + 200 + 10_000
    assert a_memory(accumulates=True).peak(4) == a_memory().peak(4) + 100
    assert a_memory(update=10_000).peak(4) == 1000 + 100 + 200 + 100 + 10_000
    assert a_memory(copy=400).peak(4) == a_memory().peak(4) + 400


def make_plan(trainer: Trainer, **train: object) -> Plan:
    values = {"batch_size": 4, "seq_len": 16, "max_steps": 100} | train
    return plan(trainer, TrainConfig(**values), EvalConfig(), SaveConfig())  # type: ignore[arg-type]


@pytest.fixture
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes half a second, a validation six."""
    monkeypatch.setattr("lmkit.planning.time_steps", lambda *_: 0.5)
    monkeypatch.setattr(NextToken, "validation_s", lambda *_, **__: 6.0)


@pytest.mark.usefixtures("_clock")
def test_a_plan_counts_parameters_steps_epochs_and_disk() -> None:
    trainer = make_trainer()
    made = make_plan(trainer)
    num = sum(p.numel() for p in trainer.model.parameters())
    assert made.num_parameters == num
    assert made.steps == 100
    assert made.memory.optimizer == 2 * 4 * num
    assert made.memory.gradients == 4 * num
    assert made.checkpoint_bytes >= 3 * 4 * num
    assert made.memory.copy == made.checkpoint_bytes
    assert made.fits
    rows = dict(made.rows())
    assert rows["steps"] == f"100, {100 / trainer.task.batches.steps_per_epoch:.2f} epochs"
    assert rows["fits"] == "yes; train.micro_batch_size up to 4 would"


@pytest.mark.usefixtures("_clock")
def test_a_plan_counts_the_checkpoints_that_are_kept_for_good() -> None:
    trainer, train = make_trainer(), TrainConfig(batch_size=4, seq_len=16, max_steps=100)
    for keep_every, every_steps, number in ((None, None, 4), (10, None, 14), (10, 15, 7), (200, None, 4)):
        save = SaveConfig(keep_every=keep_every, every_steps=every_steps)
        made = plan(trainer, train, EvalConfig(), save)
        assert made.num_checkpoints == number
        assert f"{number} checkpoints of" in dict(made.rows())["disk"]


@pytest.mark.usefixtures("_clock")
@pytest.mark.parametrize("every_steps", [None, 50])
def test_a_plan_by_the_clock_fits_into_it_with_its_validations(every_steps: int | None) -> None:
    train = TrainConfig(batch_size=4, seq_len=16, budget="10m")
    made = plan(make_trainer(), train, EvalConfig(every_steps=every_steps), SaveConfig())
    assert made.total_s is not None
    assert 570 < made.total_s <= 600
    assert made.num_validations == (4 if every_steps is None else 19)  # 3 % of 600 s are three, before the last one


@pytest.mark.usefixtures("_clock")
def test_a_plan_counts_the_validations_of_a_number_of_steps() -> None:
    trainer = make_trainer()
    assert make_plan(trainer).num_validations == 5  # at least 20 steps apart
    assert make_plan(trainer, max_steps=2000).num_validations == 10


def test_what_does_not_fit_is_said_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(batch_size=4, micro_batch_size=4, seq_len=32)
    memory = estimate_memory(trainer)
    enough_for_two = int((memory.peak(2) + memory.gradients + 1) / 0.9) + 1
    monkeypatch.setattr("lmkit.planning.room_bytes", lambda device: enough_for_two)
    monkeypatch.setattr("lmkit.planning.estimate_memory", lambda *_: memory)
    monkeypatch.setattr("lmkit.planning.time_steps", lambda *_: pytest.fail("a step was tried"))
    made = plan(trainer, TrainConfig(batch_size=4, seq_len=32, max_steps=5), EvalConfig(), SaveConfig())
    assert dict(made.rows())["fits"] == "no: train.micro_batch_size=2 would, with the same updates"
    monkeypatch.setattr("lmkit.planning.room_bytes", lambda device: 1)
    made = plan(trainer, TrainConfig(batch_size=4, seq_len=32, max_steps=5), EvalConfig(), SaveConfig())
    assert dict(made.rows())["fits"].startswith("no, not even one row")


class Changing(NextToken):
    """Computes its loss twice from the middle of the run on."""

    pace_changes_at = (0.5, 1.0)

    def loss(
        self, forward: torch.nn.Module, batch: Batch, state: State | None, progress: float
    ) -> tuple[torch.Tensor, State | None]:
        nats, new_state = super().loss(forward, batch, state, progress)
        if progress >= 0.5:
            nats = nats + super().loss(forward, batch, state, progress)[0]
        return nats, new_state


def test_each_part_of_a_run_is_counted_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(task_class=Changing)
    time_steps(trainer, 0.5)
    assert trainer.state.horizon.progress(trainer.state.step) == 0.5
    first = estimate_memory(trainer)
    monkeypatch.setattr("lmkit.planning.time_steps", lambda trainer, share: 1.0 if share < 0.5 else 3.0)
    monkeypatch.setattr(NextToken, "validation_s", lambda *_, **__: 0.0)
    by_steps, by_clock = (
        plan(trainer, TrainConfig(batch_size=4, seq_len=16, **length), EvalConfig(), SaveConfig())  # type: ignore[arg-type]
        for length in ({"max_steps": 100}, {"budget": "1005s"})
    )
    assert by_steps.memory.activations(4) == pytest.approx(2 * first.activations(4), rel=0.05)
    assert by_steps.total_s == pytest.approx(50 * 1.0 + 50 * 3.0)
    assert by_clock.steps == int(500 / 1.0 + 500 / 3.0)  # 5 s are kept back for the end
    rows = dict(by_steps.rows())
    assert rows["memory at the peak of a step"].endswith(", from 50 % of the run on")
    assert [name for name in rows if name.startswith("a step")] == ["a step", "a step from 50 % of the run on"]


def test_where_batches_have_many_lengths_a_long_one_is_counted() -> None:
    class Uneven(Windows):
        def __getitem__(self, step: int) -> Batch:
            whole, length = super().__getitem__(step), 16 if step == 2 else 4
            return Batch(whole.inputs_BT[:, :length], whole.targets_BT[:, :length], whole.starts_text)

    even, uneven = make_trainer(), make_trainer()
    uneven.task.batches = Uneven(np.arange(40_000, dtype=np.int32) % VOCAB, 0, 4, 16, 1)
    assert estimate_memory(uneven).per_row == estimate_memory(even).per_row


def test_batches_of_one_row_take_what_a_row_of_others_takes() -> None:
    several, alone = estimate_memory(make_trainer()), estimate_memory(make_trainer(batch_size=1, micro_batch_size=1))
    assert alone.per_row == several.per_row > 0
    assert alone.working_per_row == several.working_per_row > 0
    assert alone.fixed == pytest.approx(several.fixed, rel=0.01)


@pytest.mark.usefixtures("_clock")
def test_schedule_free_training_has_no_average_beside_its_weights_but_saves_both() -> None:
    """AdamW's optimizer, with the same number of tensors, stands in for that of the package."""
    trainer = make_trainer()
    adamw, num_bytes = make_plan(trainer), sum(p.nbytes for p in trainer.model.parameters())
    trainer.optimizer_config = ScheduleFreeConfig()
    trainer.average = ScheduleFreeAverage(trainer.model, trainer.optimizer)
    made = make_plan(trainer)
    assert made.memory.average == 0
    assert made.memory.optimizer == adamw.memory.optimizer
    assert made.checkpoint_bytes == adamw.checkpoint_bytes + num_bytes
    assert adamw.memory.update == 0
    assert 0.9 * num_bytes < made.memory.update < num_bytes  # all but gains and biases are one group


def test_processes_share_the_micro_batches_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(batch_size=8, micro_batch_size=4)
    monkeypatch.setattr("lmkit.planning.time_steps", lambda *_: 3.0)
    monkeypatch.setattr(NextToken, "validation_s", lambda *_, **__: 0.0)
    train = TrainConfig(batch_size=8, micro_batch_size=4, seq_len=16, max_steps=100)
    alone, shared = (plan(trainer, train, EvalConfig(), SaveConfig(), num_processes=number) for number in (1, 2))
    assert (alone.total_s, shared.total_s) == (300.0, 150.0)
    assert (alone.memory.accumulates, shared.memory.accumulates) == (True, False)
    assert (alone.largest_fitting, shared.largest_fitting) == (8, 4)


if __name__ == "__main__":
    measure(sys.argv[1])


def test_the_matrix_of_the_head_in_the_order_of_onednn_is_counted_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = {}
    for by_onednn in (False, True):
        monkeypatch.setattr(products, "prefers_onednn", lambda: by_onednn)  # noqa: B023
        fixed[by_onednn] = estimate_memory(make_trainer()).working_fixed
    assert fixed[True] - fixed[False] == 2 * VOCAB * TINY.d_model * 4


@pytest.mark.parametrize(
    ("head", "chunks"), [({"num_softmaxes": 3}, 2), ({"cutoffs": [50, 200], "tie_embeddings": False}, 1)]
)
def test_chunks_of_logits_are_counted_for_every_kind_of_output_layer(head: dict[str, Any], chunks: int) -> None:
    fixed = estimate_memory(make_trainer(replace(TINY, **head))).working_fixed
    assert fixed > 0.99 * chunks * CHUNK_ELEMENTS_CPU * 4

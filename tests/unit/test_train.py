"""Laws of the training step: the cut of the batch does not matter, divergence leaves no trace, the horizon ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmkit.averaging import WeightAverage
from lmkit.config.training import ConstantConfig, DeviceConfig, DeviceType, OptimizerConfig, SgdConfig
from lmkit.data.batches import Batch
from lmkit.device import resolve_device
from lmkit.errors import DivergedError
from lmkit.models.base import IGNORE, Head, LanguageModel, Scores, State
from lmkit.objectives import ExactSoftmax
from lmkit.optim import build_optimizer
from lmkit.train import Horizon, Trainer, TrainState, fit

VOCAB = 11


@dataclass(frozen=True)
class Sum(State):
    total_B: Tensor

    def detach(self) -> Sum:
        return Sum(self.total_B.detach())

    def select(self, rows: Tensor) -> Sum:
        return Sum(self.total_B[rows])


class PlainHead(Head):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCAB, 4) * 0.1)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND @ self.weight.T

    def loss(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.logits(hidden_ND), targets_N, reduction="sum", ignore_index=IGNORE)

    def score(self, hidden_ND: Tensor, targets_N: Tensor) -> Scores:
        raise AssertionError("not needed here")


class Toy(LanguageModel):
    """The hidden vector is the embedding plus a carried running sum, so that losing the state would be seen."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vocab_size, self.context = VOCAB, None
        self.embedding = nn.Embedding(VOCAB, 4)
        self.dropout = nn.Dropout(dropout)
        self.head = PlainHead()

    def forward(self, tokens_BT: Tensor, state: Any = None, *, use_state: bool = False) -> tuple[Tensor, Any]:
        start = 0.0 if state is None else state.total_B[:, None]
        total_BT = start + tokens_BT.cumsum(1) * 0.01
        return self.dropout(self.embedding(tokens_BT)) + total_BT[..., None], Sum(total_BT[:, -1])


class Random:
    steps_per_epoch = 4

    def __getitem__(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, VOCAB, (6, 6), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[0, 1:] = IGNORE
        return Batch(tokens[:, :-1], targets, starts_text=step % self.steps_per_epoch == 0)


def trainer(
    micro: int = 6, optimizer: OptimizerConfig | None = None, max_steps: int = 8, dropout: float = 0.0
) -> Trainer:
    model = Toy(dropout)
    config = optimizer or SgdConfig(lr=0.5)
    return Trainer(
        model=model,
        optimizer=build_optimizer(config, model, fused=False),
        optimizer_config=config,
        objective=ExactSoftmax(),
        schedule=ConstantConfig(warmup_ratio=0.0),
        device=resolve_device(DeviceConfig(type=DeviceType.cpu, threads=1)),
        seed=3,
        micro_batch_size=micro,
        state=TrainState(horizon=Horizon(1 / max_steps)),
    )


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_the_update_does_not_depend_on_how_the_batch_is_cut(micro: int) -> None:
    whole, cut = trainer(6), trainer(micro)
    for a, b in zip(fit(whole, Random()), fit(cut, Random()), strict=True):
        assert a.nats == pytest.approx(b.nats, rel=1e-5)
        assert a.num_targets == b.num_targets == 6 * 5 - 4
    for p, q in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_same_seed_trains_the_same_bits_and_dropout_is_keyed_by_the_step() -> None:
    first, second = trainer(3, dropout=0.5), trainer(3, dropout=0.5)
    losses = [r.nats for r in fit(first, Random())]
    torch.randn(1000)  # a draw elsewhere must not shift the run
    assert losses == [r.nats for r in fit(second, Random())]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_exits_with_7(where: str) -> None:
    t = trainer()
    next(iter(fit(t, Random())))
    before = [p.detach().clone() for p in t.model.parameters()]
    if where == "loss":
        t.model.head.loss = lambda h, y: h.sum() * float("nan")  # type: ignore[method-assign]
    else:
        t.model.embedding.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(DivergedError, match="step 2 is not finite") as caught:
        t.train_step(Random()[1])
    assert caught.value.exit_code == 7
    assert t.state.step == 1
    for p, q in zip(before, t.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_clipping_bounds_the_update() -> None:
    t = trainer(optimizer=SgdConfig(lr=1.0, clip_norm=0.01))
    before = torch.cat([p.detach().flatten().clone() for p in t.model.parameters()])
    t.train_step(Random()[0])
    after = torch.cat([p.detach().flatten() for p in t.model.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 3, 7, 49, 1000])
def test_a_horizon_in_steps_ends_after_exactly_that_many(steps: int) -> None:
    horizon = Horizon(1.0 / steps)
    assert horizon.progress(steps) == 1.0
    assert horizon.progress(steps - 1) < 1.0


def test_a_refitted_horizon_never_jumps_and_reaches_its_end() -> None:
    horizon = Horizon(1e-9)
    horizon.refit(10, 100.0)
    before = horizon.progress(40)
    horizon.refit(40, 30.0)
    assert horizon.progress(40) == pytest.approx(before)
    assert horizon.progress(70) == 1.0


def test_train_state_survives_json() -> None:
    state = TrainState(step=3, valid_losses=[2.5], horizon=Horizon(0.1, 2, 0.2))
    assert TrainState.from_json(state.to_json()) == state


def test_the_average_of_constant_weights_is_those_weights_and_swapping_restores() -> None:
    model = Toy()
    average = WeightAverage(model, 0.9)
    average.update(model, 1)
    original = model.embedding.weight.detach().clone()
    with torch.no_grad():
        model.embedding.weight.add_(1.0)
    average.update(model, 100)
    with average.applied(model):
        torch.testing.assert_close(model.embedding.weight, original + 0.1)
    torch.testing.assert_close(model.embedding.weight, original + 1.0)

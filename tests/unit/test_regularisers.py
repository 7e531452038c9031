"""Each regulariser changes training as its paper says, and evaluation not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmkit.config.model import ModelConfig, RecurrentConfig, TransformerConfig
from lmkit.config.optimization import AdamwConfig, Decay, MuonConfig, NadamConfig, OptimizerConfig
from lmkit.config.softmax import SampledSoftmaxConfig, SoftmaxConfig
from lmkit.data.batches import Batch
from lmkit.errors import ConfigError
from lmkit.heads import SoftmaxHead
from lmkit.models.base import IGNORE, LanguageModel
from lmkit.models.dropout import DropPath, LockedDropout, embed_with_dropout
from lmkit.objectives import build_objective
from lmkit.optim import build_optimizer
from lmkit.tasks.language import NextToken

VOCAB, BATCH, TIME = 23, 3, 6
SMALL: dict[str, Any] = {"d_model": 16, "num_layers": 3, "num_heads": 2, "context": 16}
COUNTS = torch.arange(1, VOCAB + 1)


def text(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, TIME), generator=torch.Generator().manual_seed(seed))


def hidden(model: LanguageModel, tokens_BT: Tensor, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    result: Tensor = model(tokens_BT)[0]
    return result


@pytest.mark.parametrize(
    "changes",
    [{"dropout_embed": 0.5}, {"dropout": 0.5, "dropout_locked": True}, {"drop_path": 0.9}],
    ids=["embed", "locked", "path"],
)
def test_a_transformers_regularisers_change_training_and_not_evaluation(changes: dict[str, Any]) -> None:
    plain, model = (TransformerConfig(**SMALL, **c).build(VOCAB, seed=0) for c in ({}, changes))
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(hidden(model.eval(), text()), hidden(plain.eval(), text()))
    model.train()
    assert torch.equal(hidden(model, text(), 1), hidden(model, text(), 1))
    assert not torch.equal(hidden(model, text(), 1), hidden(model, text(), 2))


def test_word_type_dropout_drops_every_occurrence_of_a_word_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    weight_VD = torch.ones(4000, 2)
    ids = torch.arange(4000).repeat(2, 1)
    x = embed_with_dropout(ids, weight_VD, 0.25)
    assert torch.equal(x[0], x[1])
    assert x.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert x.mean().item() == pytest.approx(1.0, abs=0.05)


def test_locked_dropout_has_one_mask_for_all_positions_of_a_row() -> None:
    torch.manual_seed(0)
    y_BTD = LockedDropout(0.5)(torch.ones(4, 5, 64))
    assert torch.equal(y_BTD, y_BTD[:, :1].expand_as(y_BTD))
    assert not torch.equal(y_BTD[0], y_BTD[1])
    assert torch.equal(LockedDropout(0.5).eval()(y_BTD), y_BTD)


def test_stochastic_depth_drops_whole_rows_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    y_BTD = DropPath(0.3)(torch.ones(5000, 2, 3))
    assert torch.equal(y_BTD, y_BTD[:, :1, :1].expand_as(y_BTD))
    assert y_BTD.mean().item() == pytest.approx(1.0, abs=0.03)


def test_stochastic_depth_grows_linearly_to_the_last_block() -> None:
    model = TransformerConfig(**SMALL, drop_path=0.3).build(VOCAB, seed=0)
    found = [m.p for m in model.modules() if isinstance(m, DropPath)]
    assert found == pytest.approx([0.1, 0.2, 0.3])


# Loss


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_label_smoothing_is_that_of_cross_entropy_in_gradient_and_leaves_the_shown_loss(bias: bool) -> None:
    torch.manual_seed(0)
    head = SoftmaxHead(nn.Parameter(torch.randn(VOCAB, 8)), bias=bias)
    hidden_ND = torch.randn(20, 8, requires_grad=True)
    targets_N = torch.randint(0, VOCAB, (20,))
    targets_N[::4] = IGNORE
    parts = [hidden_ND, *head.parameters()]
    ours = build_objective(SoftmaxConfig(label_smoothing=0.2), COUNTS)(head, hidden_ND, targets_N)
    logits = F.linear(hidden_ND, head.weight, head.bias)
    theirs = F.cross_entropy(logits, targets_N, reduction="sum", ignore_index=IGNORE, label_smoothing=0.2)
    assert torch.equal(ours, build_objective(SoftmaxConfig(), COUNTS)(head, hidden_ND, targets_N))
    for a, b in zip(torch.autograd.grad(ours, parts), torch.autograd.grad(theirs, parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_training_with_a_sampled_softmax_ends_with_the_exact_one_where_that_is_asked_for() -> None:
    model = TransformerConfig(**SMALL).build(VOCAB, seed=0)
    batch = Batch(text(), text(1), starts_text=True)
    sampled = SampledSoftmaxConfig(num_frequent=3, num_sampled=3, exact_from=0.5)

    def loss(softmax: SoftmaxConfig, progress: float) -> float:
        torch.manual_seed(0)
        task = NextToken(model, None, build_objective(softmax, COUNTS))  # type: ignore[arg-type]
        return task.loss(model, batch, None, progress)[0].item()

    exact = loss(SoftmaxConfig(), 0.0)
    assert loss(sampled, 0.49) != pytest.approx(exact, rel=1e-3)
    assert loss(sampled, 0.5) == exact


def gradients(model: LanguageModel, softmax: SoftmaxConfig, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of one batch, dropout drawn from seed 0."""
    task = NextToken(model, None, build_objective(softmax, COUNTS))  # type: ignore[arg-type]
    torch.manual_seed(0)
    model.zero_grad()
    loss, _ = task.loss(model, batch, None, 0.0)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
    }


def reference_penalty(model: LanguageModel, batch: Batch, alpha: float, beta: float) -> Tensor:
    """As in AWD-LSTM's main.py, times the number of targets: AR on the dropped output, TAR on the raw one."""
    torch.manual_seed(0)
    dropped, state = model(batch.inputs_BT)
    raw = dropped if state is None or state.undropped_BTD is None else state.undropped_BTD
    per_target = alpha * dropped.pow(2).mean() + beta * (raw[:, 1:] - raw[:, :-1]).pow(2).mean()
    return per_target * batch.num_targets


@pytest.mark.parametrize(
    "config",
    [RecurrentConfig(d_embed=6, d_hidden=8, dropout_output=0.5), TransformerConfig(**SMALL, dropout=0.1)],
    ids=["lstm", "transformer"],
)
def test_ar_and_tar_add_the_gradient_of_their_means_and_leave_the_shown_loss(config: ModelConfig) -> None:
    model = config.build(VOCAB, seed=0).train()
    batch = Batch(text(), text(1), starts_text=True)
    nll, plain = gradients(model, SoftmaxConfig(), batch)
    shown, ours = gradients(model, SoftmaxConfig(ar_alpha=2.0, tar_beta=1.0), batch)
    assert shown == nll
    model.zero_grad()
    reference_penalty(model, batch, 2.0, 1.0).backward()  # type: ignore[no-untyped-call]
    for name, p in model.named_parameters():
        extra = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(ours[name] - plain[name], extra, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, TIME - 1])
def test_ar_and_tar_of_a_batch_that_is_not_full_are_those_of_its_targets_alone(length: int) -> None:
    objective = build_objective(SoftmaxConfig(ar_alpha=2.0, tar_beta=1.0), COUNTS)
    hidden_BTD, targets_BT = torch.randn(BATCH, TIME, 4), text()
    alone = objective.penalty(hidden_BTD[:, :length], hidden_BTD[:, :length], targets_BT[:, :length])
    targets_BT[:, length:] = IGNORE
    torch.testing.assert_close(objective.penalty(hidden_BTD, hidden_BTD, targets_BT), alone)


def test_tar_looks_at_the_output_before_its_dropout_and_ar_after_it() -> None:
    model = RecurrentConfig(d_embed=6, d_hidden=8, dropout_output=0.5).build(VOCAB, seed=0).train()
    dropped_BTD, state = model(text())
    assert state.undropped_BTD is not None
    kept = dropped_BTD != 0
    torch.testing.assert_close(dropped_BTD[kept], 2.0 * state.undropped_BTD[kept])
    assert 0.2 < kept.float().mean().item() < 0.8
    assert state.detach().undropped_BTD is None
    assert "undropped" not in " ".join(state.tensors())
    assert model.eval()(text())[1].undropped_BTD is None


def test_the_penalty_is_a_sum_over_rows_and_ignores_padding() -> None:
    objective = build_objective(SoftmaxConfig(ar_alpha=2.0, tar_beta=1.0), COUNTS)
    hidden_BTD, targets_BT = torch.randn(BATCH, TIME, 4), text()
    targets_BT[1, 3:] = IGNORE
    whole = objective.penalty(hidden_BTD, hidden_BTD, targets_BT)
    rows = [
        objective.penalty(hidden_BTD[i : i + 1], hidden_BTD[i : i + 1], targets_BT[i : i + 1]) for i in range(BATCH)
    ]
    assert whole is not None
    torch.testing.assert_close(whole, sum(r for r in rows if r is not None))
    hidden_BTD[1, 3:] = 1e6
    torch.testing.assert_close(objective.penalty(hidden_BTD, hidden_BTD, targets_BT), whole)


# Optimizer


@pytest.mark.parametrize("config", [AdamwConfig, NadamConfig, MuonConfig])
@pytest.mark.parametrize(("on", "gains"), [(Decay.matrices, 0.0), (Decay.all, 0.3)])
def test_weight_decay_applies_to_what_decay_on_says(config: type[OptimizerConfig], on: Decay, gains: float) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    groups = build_optimizer(config(weight_decay=0.3, decay_on=on), model, fused=False).param_groups
    assert {p.ndim: g["weight_decay"] for g in groups for p in g["params"]} == {2: 0.3, 1: gains}


def test_nadam_without_growing_momentum_is_adam_with_nesterov() -> None:
    """Dozat 2016, algorithm 2, with mu constant: m' = mu m / (1 - mu^(t+1)) + (1 - mu) g / (1 - mu^t)."""
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = build_optimizer(
        NadamConfig(lr=0.1, momentum_decay=1e9, weight_decay=0.0), nn.ParameterList([p]), fused=False
    )
    m = v = 0.0
    x, beta1, beta2 = 1.0, 0.9, 0.999
    for t in range(1, 4):
        g = 2.0 * x
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        nesterov = beta1 * m / (1 - beta1 ** (t + 1)) + (1 - beta1) * g / (1 - beta1**t)
        x -= 0.1 * nesterov / ((v / (1 - beta2**t)) ** 0.5 + 1e-8)
        p.grad = 2.0 * p.detach()
        optimizer.step()
    assert p.item() == pytest.approx(x, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: TransformerConfig(dropout_embed=1.0), "model.dropout_embed"),
        (lambda: TransformerConfig(drop_path=-0.1), "model.drop_path"),
        (lambda: SoftmaxConfig(label_smoothing=1.0), "softmax.label_smoothing"),
        (lambda: SoftmaxConfig(ar_alpha=-1.0, tar_beta=float("nan")), r"softmax.ar_alpha=-1 .*softmax.tar_beta=nan"),
        (lambda: SampledSoftmaxConfig(label_smoothing=0.1), "needs softmax=exact"),
        (lambda: NadamConfig(momentum_decay=-1.0, beta1=2.0), r"optimizer.beta1.*optimizer.momentum_decay"),
    ],
)
def test_values_out_of_range_are_named(make: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        make()

"""What dropout of single values leaves, how often and by how much it is scaled."""

from __future__ import annotations

import pytest
import torch

from lmkit.models.dropout import LEVELS, Dropout, dropout

P = 0.3


def test_each_value_is_dropped_or_scaled_up_and_the_mean_stays() -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 1001)
    y = dropout(x, P)
    num_kept = round((1 - P) * LEVELS)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(LEVELS / num_kept).item()}
    spread = (P * (1 - P) / x.numel()) ** 0.5
    assert (y == 0).float().mean().item() == pytest.approx(P, abs=4 * spread)
    assert y.mean().item() == pytest.approx(1.0, abs=4 * spread / (1 - P))
    # neither rows, columns nor neighbours within a draw of 64 bits have a share of their own
    assert (y == 0).float().mean(0).std().item() == pytest.approx((P * (1 - P) / 400) ** 0.5, rel=0.15)
    assert (y == 0).float().mean(1).std().item() == pytest.approx((P * (1 - P) / 1001) ** 0.5, rel=0.15)
    both = ((y[:, 1:] == 0) & (y[:, :-1] == 0)).float().mean().item()
    assert both == pytest.approx(P * P, abs=4 * spread)


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.5, 1 - 1e-6, 1.0])
def test_the_ends_of_the_range(p: float) -> None:
    y = dropout(torch.ones(50_000), p)
    assert torch.isfinite(y).all()
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.02)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (0, 4)])
def test_any_shape_and_order_of_the_values(shape: tuple[int, ...]) -> None:
    assert dropout(torch.ones(shape), P).shape == shape
    assert dropout(torch.ones(6, 5).T, P).shape == (5, 6)


def test_the_gradient_is_that_of_the_values_that_stay() -> None:
    x = torch.randn(64, 33, requires_grad=True)
    y = dropout(x, P)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(y.detach(), x.detach() * x.grad)
    assert len(x.grad.unique()) == 2


def test_the_same_seed_drops_the_same_values() -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(dropout(torch.ones(1000), P))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_only_in_training() -> None:
    layer, x = Dropout(P), torch.ones(1000)
    assert (layer(x) == 0).any()
    assert layer.eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_half_precision_keeps_its_type() -> None:
    assert dropout(torch.ones(8, dtype=torch.bfloat16), P).dtype is torch.bfloat16


def test_where_there_are_no_values_torch_draws() -> None:
    assert dropout(torch.ones(3, 4, device="meta"), P).shape == (3, 4)

"""Recurrent layers are torch's own, but in fp32 where autocast to bf16 has no bf16 for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmkit.models import cells
from lmkit.sharding import keep_in_place


@pytest.mark.parametrize(("own", "plain"), [(cells.LSTM, nn.LSTM), (cells.GRU, nn.GRU)])
def test_it_is_the_layer_of_torch(own: type[nn.RNNBase], plain: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    one, two = own(3, 4), plain(3, 4)
    assert list(one.state_dict()) == list(two.state_dict())
    two.load_state_dict(one.state_dict())
    x_TBD = torch.randn(5, 2, 3)
    state = None
    for _ in range(2):
        (y_TBD, state), (z_TBD, _) = one(x_TBD, state), two(x_TBD, state)
        assert torch.equal(y_TBD, z_TBD)


@pytest.mark.parametrize("own", [cells.LSTM, cells.GRU])
def test_where_bf16_is_missing_it_computes_in_fp32(own: type[nn.RNNBase], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x_TBD = own(3, 4), torch.randn(5, 2, 3).bfloat16()
    exact_TBD, state = layer(x_TBD.float())
    narrow = tuple(t.bfloat16() for t in state) if isinstance(state, tuple) else state.bfloat16()
    wide = tuple(t.float() for t in narrow) if isinstance(narrow, tuple) else narrow.float()
    next_TBD, _ = layer(x_TBD.float(), wide)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x_TBD)[0], exact_TBD)
        assert torch.equal(layer(x_TBD, narrow)[0], next_TBD)


@pytest.mark.parametrize(("own", "plain"), [(cells.LSTM, nn.LSTM), (cells.GRU, nn.GRU)])
@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16 is missing"])
def test_the_layer_is_given_its_state_in_one_piece_which_cudnn_asks_for(
    own: type[nn.RNNBase], plain: type[nn.RNNBase], narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    given: list[Tensor] = []
    forward: Any = plain.forward

    def watched(self: nn.RNNBase, x_TBD: Tensor, state: Any) -> Any:
        given.extend(state if isinstance(state, tuple) else (state,))
        return forward(self, x_TBD, state)

    monkeypatch.setattr(plain, "forward", watched)
    monkeypatch.setattr(cells, "bf16_is_missing", lambda x: narrow)
    halves = torch.randn(2, 8).chunk(2, 1)
    one, two = (half[None] for half in halves)
    own(3, 4)(torch.randn(5, 2, 3), (one, two) if plain is nn.LSTM else one)
    assert not one.is_contiguous()
    assert [t.is_contiguous() for t in given] == [True] * len(given)
    assert torch.equal(given[0], one)


def test_in_pieces_its_parameters_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[nn.RNNBase] = []
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda self: moved.append(self))
    model = nn.Sequential(cells.LSTM(3, 4))
    moved.clear()
    keep_in_place(model)
    model[0].flatten_parameters()
    assert moved == []

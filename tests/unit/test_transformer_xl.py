"""The carried memory: what each token sees, that training carries it, and how it begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lmkit.config.model import Positions, TransformerConfig
from lmkit.errors import ConfigError
from lmkit.models.transformer import Transformer
from lmkit.models.transformer_xl import MemoryTransformer, window_mask

VOCAB = 17
SHAPE: dict[str, Any] = {"d_model": 16, "num_layers": 2, "num_heads": 4, "context": 64}


def build(memory: int, **changes: Any) -> MemoryTransformer:
    model = TransformerConfig(**SHAPE | changes, memory_tokens=memory).build(VOCAB, seed=0)
    assert isinstance(model, MemoryTransformer)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4.0)
    return model.eval()


def text(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


def test_within_its_memory_it_is_the_plain_transformer() -> None:
    model, plain = build(20), Transformer(TransformerConfig(**SHAPE), VOCAB, seed=0).eval()
    plain.load_state_dict(model.state_dict())
    tokens_BT, state, pieces = text(21), None, []
    for piece_BT in torch.split(tokens_BT, 6, 1):
        hidden_BTD, state = model(piece_BT, state)
        pieces.append(hidden_BTD)
    torch.testing.assert_close(torch.cat(pieces, 1), plain(tokens_BT)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("piece", [1, 4, 30])
def test_a_token_depends_on_its_receptive_field_and_on_nothing_before_it(piece: int) -> None:
    memory, length = 4, 30
    model = build(memory)
    assert model.receptive_field == 2 * memory + 1
    tokens_BT = text(length).requires_grad_(False)
    other_BT = tokens_BT.clone()
    other_BT[:, :5] = (other_BT[:, :5] + 1) % VOCAB

    def read(ids_BT: Tensor) -> Tensor:
        state, pieces = None, []
        with torch.no_grad():
            for part_BT in torch.split(ids_BT, piece, 1):
                hidden_BTD, state = model(part_BT, state)
                pieces.append(hidden_BTD)
        return torch.cat(pieces, 1)

    changed_T = (read(tokens_BT) - read(other_BT)).abs().amax((0, 2)) > 1e-5
    assert bool(changed_T[: 5 + 2 * memory].all())
    assert not bool(changed_T[5 + 2 * memory :].any())


def test_the_memory_takes_no_gradient_and_the_segment_does() -> None:
    model = build(8).train()
    _, state = model(text(6))
    assert not state.keys_LBKMC.requires_grad
    hidden_BTD, after = model(text(6, 1), state)
    hidden_BTD.sum().backward()
    assert after.filled_B.tolist() == [8, 8]
    assert model.embedding.weight.grad is not None


def test_the_state_survives_its_tensors_and_zeros_are_the_empty_memory() -> None:
    model = build(8)
    _, state = model(text(5))
    named = state.tensors()
    assert {len(t) for t in named.values()} == {2}
    expected = model(text(4, 1), state)[0]
    assert torch.equal(model(text(4, 1), model.state_from_tensors(named))[0], expected)
    nothing = model.state_from_tensors({name: torch.zeros_like(t).float() for name, t in named.items()})
    torch.testing.assert_close(model(text(4, 1), nothing)[0], model(text(4, 1))[0])


def test_a_row_whose_memory_is_empty_begins_anew_beside_one_whose_is_not() -> None:
    model = build(8)
    _, state = model(text(5))
    named = {name: t.clone() for name, t in state.tensors().items()}
    for t in named.values():
        t[1] = 0
    hidden_BTD, _ = model(text(4, 1), model.state_from_tensors(named))
    torch.testing.assert_close(hidden_BTD[0], model(text(4, 1), state)[0][0])
    torch.testing.assert_close(hidden_BTD[1], model(text(4, 1))[0][1])


def test_the_mask_is_a_band_over_filled_slots() -> None:
    mask_B1TS = window_mask(torch.tensor([0, 2]), 2, 3)
    assert mask_B1TS[0, 0].int().tolist() == [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert mask_B1TS[1, 0].int().tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_it_carries_state_and_needs_rotary_positions() -> None:
    assert TransformerConfig(memory_tokens=4).carries_state
    assert not TransformerConfig().carries_state
    with pytest.raises(ConfigError, match=r"model.positions=learned must be rotary"):
        TransformerConfig(memory_tokens=4, positions=Positions.learned)
    with pytest.raises(ValueError, match="one text a row"):
        build(4)(text(4), segments_BT=text(4))

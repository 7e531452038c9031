"""Texts that share a row do not see each other: everything is as if each stood in a row of its own."""

from __future__ import annotations

import pytest
import shapes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkit.config.model import TransformerConfig
from lmkit.models.transformer import Transformer

VOCAB = 23
CONFIGS = {
    "llama": TransformerConfig(d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, context=24),
    "qk_norm": TransformerConfig(d_model=16, num_layers=2, num_heads=4, qk_norm=True, context=24),
    "gpt2": TransformerConfig(d_model=16, num_layers=2, num_heads=4, context=24, **shapes.GPT2),
    "vanilla": TransformerConfig(d_model=16, num_layers=2, num_heads=4, context=24, **shapes.VANILLA),
}


def randomised(name: str) -> Transformer:
    model = Transformer(CONFIGS[name], VOCAB, seed=5)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("name", CONFIGS)
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_logits_and_gradients_of_packed_texts_are_those_of_single_ones(
    name: str, lengths: list[int], seed: int
) -> None:
    model = randomised(name)
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(VOCAB, (1, n), generator=generator) for n in lengths]
    weights = [torch.randn(n, VOCAB, generator=generator) for n in lengths]
    segments = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], 1)
    packed = model.head.logits(model(torch.cat(texts, 1), segments_BT=segments)[0][0])
    (packed * torch.cat(weights)).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    single = [model.head.logits(model(text)[0][0]) for text in texts]
    sum((s * w).sum() for s, w in zip(single, weights, strict=True)).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(packed, torch.cat(single), atol=1e-5, rtol=1e-5)
    for packed_gradient, p in zip(gradients, model.parameters(), strict=True):
        assert p.grad is not None
        scale = max(1.0, float(p.grad.abs().max()))
        torch.testing.assert_close(packed_gradient / scale, p.grad / scale, atol=2e-5, rtol=1e-4)


def test_segments_and_a_state_are_not_combined() -> None:
    model = randomised("llama")
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="several texts"):
        model(tokens, use_state=True, segments_BT=tokens)

"""TokenStep gives what the whole model gives, for every kind of block, and declines what it does not know."""

from __future__ import annotations

from typing import Any

import pytest
import shapes
import torch
from torch import nn

from lmkit import products
from lmkit.config.generation import SamplingConfig
from lmkit.config.model import RecurrentConfig, TransformerConfig
from lmkit.models.stepping import MAX_ROOM, token_step
from lmkit.models.transformer import Transformer
from lmkit.sampling import sample

VOCAB = 17
SMALL: dict[str, Any] = {"d_model": 16, "num_layers": 2, "num_heads": 4, "context": 12}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "grouped": {"num_kv_heads": 2},
    "untied": {"tie_embeddings": False, "dropout": 0.1},
    "post-norm": {"pre_norm": False},
    "gpt2": shapes.GPT2,
    "vanilla": shapes.VANILLA,
}


def build(kind: str) -> Transformer:
    """Weights, gains and biases large enough that one left out shows."""
    model = TransformerConfig(**SMALL, **KINDS[kind]).build(VOCAB, seed=1).eval()
    assert isinstance(model, Transformer)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4 + (p.ndim == 1))
    return model


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize(("threads", "onednn"), [(1, False), (1, True), (2, True), (3, True)])
@torch.no_grad()
def test_a_step_gives_the_logits_of_the_whole_model(
    kind: str, batch: int, threads: int, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices cut for several threads or not, multiplied by either library."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    if onednn and not torch._C._has_mkldnn:
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(products, "prefers_onednn", lambda: onednn)
    model = build(kind)
    tokens_BT = torch.randint(VOCAB, (batch, 12), generator=torch.Generator().manual_seed(3))
    expected = model.head.logits(model(tokens_BT)[0].flatten(0, 1)).view(batch, 12, VOCAB)
    step = token_step(model, batch, 6)  # so that there is room for six tokens at a time
    assert step is not None
    _, cache = model(tokens_BT[:, :4], use_state=True)
    for t in range(4, 12):
        logits_BV, cache = step(tokens_BT[:, t], cache)
        torch.testing.assert_close(logits_BV, expected[:, t], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "grouped", "gpt2"])
@pytest.mark.parametrize("onednn", [False, torch._C._has_mkldnn])
@torch.no_grad()
def test_the_cache_of_some_of_the_texts_goes_on_with_them(
    kind: str, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "prefers_onednn", lambda: onednn)
    model = build(kind)
    tokens_BT = torch.randint(VOCAB, (5, 8), generator=torch.Generator().manual_seed(3))
    rows = torch.tensor([1, 4])
    step = token_step(model, 5, 6)
    assert step is not None
    _, cache = model(tokens_BT[:, :4], use_state=True)
    _, cache = step(tokens_BT[:, 4], cache)
    cache = cache.select(rows)
    expected = model.head.logits(model(tokens_BT[rows])[0].flatten(0, 1)).view(2, 8, VOCAB)
    for t in range(5, 8):
        logits_BV, cache = step(tokens_BT[rows, t], cache)
        torch.testing.assert_close(logits_BV, expected[:, t], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_room_is_made_for_what_is_asked_for_but_never_for_more_than_a_thousand() -> None:
    model = TransformerConfig(**(SMALL | {"context": 5000})).build(VOCAB, seed=1).eval()
    for num_tokens, room in ((9, 73), (100, 164), (4000, 64 + MAX_ROOM)):
        step = token_step(model, 1, num_tokens)
        assert step is not None
        _, cache = model(torch.zeros(1, 64, dtype=torch.int64), use_state=True)
        _, cache = step(torch.tensor([3]), cache)
        assert cache.heads_L2NSC.shape[3] == room
        assert cache.length == 65


def test_a_step_does_not_change_the_embedding() -> None:
    model = build("vanilla")
    before = model.embedding.weight.detach().clone()
    step = token_step(model, 2, 9)
    assert step is not None
    with torch.no_grad():
        _, cache = model(torch.tensor([[1, 2]]), use_state=True)
        step(torch.tensor([3]), cache)
    assert torch.equal(model.embedding.weight, before)


def test_a_model_with_a_part_that_is_not_known_has_no_step() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    assert token_step(RecurrentConfig(d_embed=4, d_hidden=4).build(VOCAB, seed=1), 2, 9) is None
    normed = TransformerConfig(**SMALL, qk_norm=True).build(VOCAB, seed=1)
    assert token_step(normed, 2, 9) is None
    model = build("llama")
    model.blocks[1].attention.qkv = Wrapped(model.blocks[1].attention.qkv)  # type: ignore[union-attr]
    assert token_step(model, 2, 9) is None


def test_greedy_takes_the_smallest_id_of_equally_probable_tokens_in_large_vocabularies_too() -> None:
    logits_NV = torch.zeros(3, 50_000)
    logits_NV[1, [40_000, 123, 49_999]] = 2.0
    logits_NV[2, [49_999, 49_998]] = 2.0
    draws = torch.zeros(3, dtype=torch.float64)
    assert sample(logits_NV, SamplingConfig(temperature=0.0), draws).tolist() == [0, 123, 49_998]

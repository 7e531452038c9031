"""Laws of every family that is trained by gradient: causality, the state, independence of rows, initialisation."""

from __future__ import annotations

from itertools import pairwise

import pytest
import shapes
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmkit.config.model import Cell, ModelConfig, RecurrentConfig, TransformerConfig
from lmkit.models.base import LanguageModel

VOCAB, CONTEXT, MAX_BATCH = 17, 12, 4
SMALL = {"d_model": 16, "num_layers": 2, "num_heads": 4, "context": CONTEXT}

CONFIGS: dict[str, ModelConfig] = {
    "llama": TransformerConfig(**SMALL),  # type: ignore[arg-type]
    "grouped": TransformerConfig(num_kv_heads=2, **SMALL),  # type: ignore[arg-type]
    "gpt2": TransformerConfig(**shapes.GPT2, **SMALL),
    "vanilla": TransformerConfig(dropout=0.1, **shapes.VANILLA, **SMALL),
    "locked": TransformerConfig(dropout=0.2, dropout_locked=True, dropout_embed=0.1, drop_path=0.2, **SMALL),  # type: ignore[arg-type]
    "memory": TransformerConfig(memory_tokens=5, num_kv_heads=2, **SMALL | {"context": 4}),  # type: ignore[arg-type]
    "memory, post-norm": TransformerConfig(memory_tokens=3, pre_norm=False, qk_norm=True, **SMALL),  # type: ignore[arg-type]
    "mogrifier": RecurrentConfig(d_embed=8, d_hidden=12, mogrifier_rounds=5),
    "mogrifier of low rank": RecurrentConfig(d_embed=8, d_hidden=12, mogrifier_rounds=1, mogrifier_rank=3),
    "mixture": RecurrentConfig(d_embed=8, d_hidden=12, num_softmaxes=3),
    "adaptive": TransformerConfig(cutoffs=[4, 9], tie_embeddings=False, **SMALL),  # type: ignore[arg-type]
    "lstm": RecurrentConfig(d_embed=8, d_hidden=12, dropout_embed=0.1, dropout_recurrent=0.1),
    "gru": RecurrentConfig(cell=Cell.gru, d_embed=8, d_hidden=12, tie_embeddings=False),
}

every_family = pytest.mark.parametrize("family", list(CONFIGS))


def build(family: str, seed: int = 0) -> LanguageModel:
    """In evaluation mode, with weights large enough that a wrong context shows."""
    model = CONFIGS[family].build(VOCAB, seed=seed).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4.0)
    return model


@st.composite
def texts(draw: st.DrawFn) -> Tensor:
    """(B, T) token ids, up to the context in length."""
    batch, length = draw(st.integers(1, MAX_BATCH)), draw(st.integers(1, CONTEXT))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(0, VOCAB, (batch, length), generator=generator)


def hidden(model: LanguageModel, tokens_BT: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(tokens_BT)[0]
    return result


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@every_family
@settings(max_examples=20, deadline=None)
@given(tokens_BT=texts(), data=st.data())
def test_reading_in_pieces_with_the_state_equals_reading_at_once(
    family: str, tokens_BT: Tensor, data: st.DataObject
) -> None:
    model, length = build(family), tokens_BT.shape[1]
    cuts = data.draw(st.sets(st.integers(1, max(1, length - 1))))
    edges = sorted({0, length, *(cut for cut in cuts if cut < length)})
    state, pieces = None, []
    with torch.no_grad():
        for start, end in pairwise(edges):
            piece, state = model(tokens_BT[:, start:end], state, use_state=True)
            pieces.append(piece)
    close(torch.cat(pieces, 1), hidden(model, tokens_BT))


@every_family
@settings(max_examples=5, deadline=None)
@given(tokens_BT=texts())
def test_decoding_one_token_at_a_time_equals_one_forward_pass(family: str, tokens_BT: Tensor) -> None:
    model, state, pieces = build(family), None, []
    with torch.no_grad():
        for t in range(tokens_BT.shape[1]):
            piece, state = model(tokens_BT[:, t : t + 1], state, use_state=True)
            pieces.append(piece)
    close(torch.cat(pieces, 1), hidden(model, tokens_BT))


@every_family
@settings(max_examples=15, deadline=None)
@given(tokens_BT=texts(), data=st.data())
def test_a_later_token_changes_no_earlier_hidden_vector_but_its_own(
    family: str, tokens_BT: Tensor, data: st.DataObject
) -> None:
    model = build(family)
    place = data.draw(st.integers(0, tokens_BT.shape[1] - 1))
    changed_BT = tokens_BT.clone()
    changed_BT[:, place] = (changed_BT[:, place] + 1) % VOCAB
    before, after = hidden(model, tokens_BT), hidden(model, changed_BT)
    close(after[:, :place], before[:, :place])
    assert not torch.allclose(after[:, place], before[:, place], rtol=1e-4, atol=1e-4)


@every_family
@settings(max_examples=15, deadline=None)
@given(tokens_BT=texts())
def test_a_row_does_not_depend_on_the_rows_beside_it(family: str, tokens_BT: Tensor) -> None:
    model = build(family)
    together = hidden(model, tokens_BT)
    for row in range(len(tokens_BT)):
        close(hidden(model, tokens_BT[row : row + 1]), together[row : row + 1])


@every_family
@settings(max_examples=15, deadline=None)
@given(tokens_BT=texts(), data=st.data())
def test_a_selected_state_goes_on_as_the_selected_rows_would(
    family: str, tokens_BT: Tensor, data: st.DataObject
) -> None:
    model, batch = build(family), len(tokens_BT)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=6)))
    cut = data.draw(st.integers(0, tokens_BT.shape[1] - 1))
    if cut == 0:
        return
    with torch.no_grad():
        _, state = model(tokens_BT[:, :cut], use_state=True)
        tail, _ = model(tokens_BT[rows, cut:], state.select(rows))
    close(tail, hidden(model, tokens_BT[rows])[:, cut:])


@every_family
def test_the_same_seed_gives_the_same_parameters_and_another_seed_others(family: str) -> None:
    torch.manual_seed(1)
    first = CONFIGS[family].build(VOCAB, seed=3).state_dict()
    torch.manual_seed(2)
    second = CONFIGS[family].build(VOCAB, seed=3).state_dict()
    other = CONFIGS[family].build(VOCAB, seed=4).state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


@every_family
def test_a_parameter_starts_the_same_whatever_else_the_model_has(family: str) -> None:
    """Its initial value is keyed by its name, so more layers before or after it do not shift it."""
    config = CONFIGS[family]
    longer = type(config)(**{**vars(config), "num_layers": 3})
    untied = type(config)(**{**vars(config), "tie_embeddings": False})
    base, more, own = (c.build(VOCAB, seed=3).state_dict() for c in (config, longer, untied))
    first = "layers.0." if isinstance(config, RecurrentConfig) else "blocks.0."
    same = [name for name in base if name.startswith((first, "embedding"))]
    assert same
    for name in same:
        scale = base[name].std() / more[name].std() if base[name].ndim > 1 else torch.tensor(1.0)
        torch.testing.assert_close(more[name] * scale, base[name])
        assert torch.equal(own[name], base[name])


@every_family
def test_building_a_model_draws_nothing_from_the_global_generator_that_shows(family: str) -> None:
    """Dropout follows the seed that is set before a step, not how the model was made."""
    model, again = (CONFIGS[family].build(VOCAB, seed=seed).train() for seed in (3, 3))
    tokens_BT = torch.arange(8).view(2, 4)
    results = []
    for m in (model, again):
        torch.manual_seed(11)
        results.append(m(tokens_BT)[0])
    assert torch.equal(*results)


@every_family
@settings(max_examples=10, deadline=None)
@given(tokens_BT=texts(), data=st.data())
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(
    family: str, tokens_BT: Tensor, data: st.DataObject
) -> None:
    model = build(family).double()
    targets_BT = tokens_BT.flip(1)
    size = data.draw(st.integers(1, len(tokens_BT)))
    gradients = []
    for rows in (len(tokens_BT), size):
        model.zero_grad()
        for inputs, targets in zip(tokens_BT.split(rows), targets_BT.split(rows), strict=True):
            model.head.loss(model(inputs)[0].flatten(0, 1), targets.flatten()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-6, msg=name)

"""Sampled softmax estimates the exact loss, and initial parameters from counts are what they claim."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmkit import initialise
from lmkit.config.model import RecurrentConfig
from lmkit.config.softmax import SampledSoftmaxConfig, SoftmaxConfig
from lmkit.config.start import BiasInit, EmbeddingInit, InitConfig
from lmkit.heads import Candidates, SoftmaxHead
from lmkit.initialise import cooccurrence_embeddings, initialise_from_text, token_counts
from lmkit.models.base import IGNORE
from lmkit.objectives import ExactSoftmax, build_objective

VOCAB, WIDTH, N = 60, 8, 24


def setup() -> tuple[SoftmaxHead, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = SoftmaxHead(nn.Parameter(torch.randn(VOCAB, WIDTH)), bias=True)
    counts = torch.arange(VOCAB, 0, -1) ** 2
    return head, torch.randn(N, WIDTH), torch.randint(0, VOCAB, (N,)), counts


def test_a_sample_of_everything_is_the_exact_loss() -> None:
    head, hidden, targets, counts = setup()
    targets[3] = IGNORE
    exact = build_objective(SoftmaxConfig(), counts)(head, hidden, targets)
    sampled = build_objective(SampledSoftmaxConfig(num_frequent=VOCAB), counts)(head, hidden, targets)
    torch.testing.assert_close(sampled, exact)


class RowZero(SoftmaxHead):
    """Notes the loss of the first row alone."""

    first = torch.tensor(0.0)

    def sampled_loss(self, hidden_ND: torch.Tensor, candidates: Candidates, targets_N: torch.Tensor) -> torch.Tensor:
        self.first = super().sampled_loss(hidden_ND[:1], candidates, targets_N[:1])
        return self.first


def test_the_partition_function_is_estimated_without_bias() -> None:
    """Averaged over batches whose other targets are drawn by frequency, exp(log Z) is the exact sum."""
    plain, hidden, targets, counts = setup()
    head = RowZero(plain.weight, bias=True).requires_grad_(False)
    objective = build_objective(SampledSoftmaxConfig(num_frequent=5, num_sampled=10), counts)
    logits = head.logits(hidden[:1])[0]
    own = logits[targets[0]]
    draws = []
    for _ in range(4000):
        targets[1:] = torch.multinomial(counts.float(), N - 1, replacement=True)
        draws.append(torch.exp(objective(head, hidden, targets) + own) - torch.exp(own))
    rest = torch.stack(draws)
    exact = torch.exp(logits).sum() - torch.exp(own)
    assert abs(float(rest.mean() - exact)) < 4 * float(rest.std()) / len(rest) ** 0.5


def test_loss_and_gradients_of_the_sampled_softmax_are_those_of_its_formula() -> None:
    head, hidden, _, _ = setup()
    assert head.bias is not None
    ids, log_weight = torch.tensor([5, 9, 1, 30]), torch.tensor([0.0, 1.5, 0.3, 2.0])
    positions = torch.randint(0, 4, (N,))
    positions[2] = IGNORE
    results = []
    for ours in (True, False):
        x = hidden.clone().requires_grad_()
        if ours:
            loss = head.sampled_loss(x, Candidates(ids, log_weight), positions)
        else:
            safe = positions.clamp(min=0)
            logits = x @ head.weight[ids].T + head.bias[ids] + log_weight
            own = nn.functional.one_hot(safe, 4) * log_weight[safe][:, None]
            loss = nn.functional.cross_entropy(logits - own, positions, reduction="sum", ignore_index=IGNORE)
        results.append([loss, *torch.autograd.grad(2 * loss, [x, head.weight, head.bias])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_counts_are_those_of_the_text() -> None:
    tokens = np.array([3, 1, 3, 3, 0], dtype=np.uint16)
    assert token_counts(tokens, 5).tolist() == [1, 1, 0, 3, 0]


def test_tokens_with_the_same_neighbours_get_similar_embeddings() -> None:
    generator = np.random.default_rng(0)
    tokens = np.stack([generator.integers(0, 5, 4000), generator.integers(5, 10, 4000)], 1).ravel()
    table = cooccurrence_embeddings(tokens, token_counts(tokens, 10), 6, seed=1)
    similarity = nn.functional.cosine_similarity(table[:, None], table[None], dim=-1)
    assert float(similarity[:5, :5].min()) > 0.5 > float(similarity[:5, 5:].max())
    torch.testing.assert_close(table, cooccurrence_embeddings(tokens, token_counts(tokens, 10), 6, seed=1))


@pytest.mark.parametrize("elements", [1, 700, 25_000_000])
def test_counting_some_rows_at_a_time_gives_the_table_of_all_at_once(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initialise, "CHUNK_ELEMENTS", elements)
    text_N = torch.from_numpy(np.random.default_rng(0).zipf(1.3, 5000) % 60)
    column_V = torch.where(torch.arange(60) % 3 > 0, torch.arange(60) - torch.arange(60) // 3 - 1, -1)
    table = torch.full((60, 3 * 40), torch.nan)
    initialise._put_ppmi(table[:, 40:80], text_N, column_V, -2)
    columns = column_V[text_N[:-2]]
    counts_VK = torch.zeros(60, 40)
    counts_VK.index_put_((text_N[2:][columns >= 0], columns[columns >= 0]), torch.ones(()), accumulate=True)
    context_K = counts_VK.sum(0).pow(0.75)
    context_K = (context_K / context_K.sum()).clamp(min=1e-9)
    given_token = counts_VK / counts_VK.sum(1, keepdim=True).clamp(min=1.0)
    whole_VK = (given_token / context_K).clamp(min=1.0).log()
    torch.testing.assert_close(table[:, 40:80], whole_VK, rtol=1e-6, atol=0.0)  # a library may end a row otherwise
    assert bool(table[:, :40].isnan().all() and table[:, 80:].isnan().all())
    assert bool(table[:, 40:80].any())


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor of each type that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for part in tree_leaves(made):
            if isinstance(part, torch.Tensor):
                self.bytes[part.dtype] = max(self.bytes.get(part.dtype, 0), part.untyped_storage().nbytes())
        return made


def test_a_large_vocabulary_has_fewer_neighbours_so_that_the_table_and_its_counts_stay_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """3,000 tokens at 4 offsets with 20 neighbours each, in place of 2,500, counted 150 rows at a time."""
    monkeypatch.setattr(initialise, "TABLE_BYTES", 3000 * 4 * 20 * 4 + 100)
    monkeypatch.setattr(initialise, "CHUNK_ELEMENTS", 3000)
    tokens = np.random.default_rng(0).integers(0, 3000, 2000)
    counts_V = token_counts(tokens, 3000)
    with Largest() as largest:
        table = cooccurrence_embeddings(tokens, counts_V, 8, seed=1)
    assert largest.bytes[torch.float32] == 3000 * 4 * 20 * 4
    assert largest.bytes[torch.int64] <= 3000 * 8
    assert table.shape == (3000, 8)
    assert bool(table.isfinite().all() and table.any())


@pytest.mark.parametrize("start", list(EmbeddingInit))
def test_initialising_keeps_the_scale_and_sets_the_bias_to_the_log_frequency(start: EmbeddingInit) -> None:
    tokens = np.random.default_rng(0).integers(0, 20, 5000)
    model = RecurrentConfig(d_embed=16, d_hidden=16).build(20, seed=1)
    before = float(model.embedding.weight.detach().std())  # type: ignore[union-attr, operator]
    counts = token_counts(tokens, 20)
    config = InitConfig(embeddings=start, output_bias=BiasInit.log_frequency)
    initialise_from_text(model, config, tokens, counts, seed=1)
    assert float(model.embedding.weight.detach().std()) == pytest.approx(before, rel=1e-4)  # type: ignore[union-attr, operator]
    assert isinstance(model.head, SoftmaxHead)
    assert model.head.bias is not None
    torch.testing.assert_close(model.head.bias.softmax(0), (counts / counts.sum()).float())


def test_a_text_of_one_type_leaves_embeddings_as_they_are() -> None:
    tokens = np.zeros(50, dtype=np.uint8)
    model = RecurrentConfig(d_embed=4, d_hidden=4).build(3, seed=1)
    before = model.embedding.weight.detach().clone()  # type: ignore[union-attr, operator]
    config = InitConfig(embeddings=EmbeddingInit.cooccurrence)
    initialise_from_text(model, config, tokens, token_counts(tokens, 3), seed=1)
    assert torch.equal(model.embedding.weight.detach(), before)  # type: ignore[union-attr, operator, arg-type]


def test_a_sampled_softmax_is_the_exact_one_after_its_share_of_the_run_penalties_included() -> None:
    config = SampledSoftmaxConfig(num_frequent=2, num_sampled=2, exact_from=0.8, ar_alpha=0.5, tar_beta=0.25)
    objective = build_objective(config, torch.arange(VOCAB).flip(0) + 1)
    assert objective.at(0.79) is objective
    late = objective.at(0.8)
    assert isinstance(late, ExactSoftmax)
    assert (late.ar_alpha, late.tar_beta) == (0.5, 0.25)
    never = build_objective(SampledSoftmaxConfig(), torch.ones(VOCAB))
    assert never.at(0.999) is never


def test_a_head_that_is_told_which_targets_count_reads_those_only(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, targets, _ = setup()
    hidden_BTD, targets_BT = hidden.view(4, 6, WIDTH).requires_grad_(), targets.view(4, 6)
    targets_BT[:3, :5] = IGNORE
    objective = ExactSoftmax()
    losses = [objective.of_batch(head, hidden_BTD, None, targets_BT)]
    read: list[int] = []
    original = SoftmaxHead.loss

    def loss(self: SoftmaxHead, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        read.append(len(hidden_ND))
        return original(self, hidden_ND, targets_N)

    monkeypatch.setattr(SoftmaxHead, "loss", loss)
    scored_N = (targets_BT.reshape(-1) != IGNORE).nonzero().squeeze(1)
    losses.append(objective.of_batch(head, hidden_BTD, None, targets_BT, scored_N))
    assert read == [9]
    assert torch.equal(losses[0], losses[1])
    gradients = [torch.autograd.grad(value, [hidden_BTD, head.weight]) for value in losses]
    for plain, told in zip(*gradients, strict=True):
        torch.testing.assert_close(told, plain)

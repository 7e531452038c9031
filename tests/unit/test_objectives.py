"""Sampled softmax estimates the exact loss, and initial parameters from counts are what they claim."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lmkit.config.model import RecurrentConfig
from lmkit.config.optimization import BiasInit, EmbeddingInit, InitConfig, SampledSoftmaxConfig, SoftmaxConfig
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

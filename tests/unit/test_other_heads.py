"""Mixture of softmaxes and adaptive softmax: exact distributions, exact losses, whatever the size of the chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmkit.models.adaptive
import lmkit.models.mixture
from lmkit.config.model import ModelConfig, RecurrentConfig, TransformerConfig
from lmkit.config.softmax import AdaptiveSoftmaxConfig, SampledSoftmaxConfig, SoftmaxConfig
from lmkit.config.start import BiasInit, InitConfig
from lmkit.errors import ConfigError
from lmkit.heads import SoftmaxHead
from lmkit.initialise import initialise_from_text
from lmkit.models.adaptive import AdaptiveHead
from lmkit.models.base import IGNORE, Head
from lmkit.models.mixture import MixtureHead
from lmkit.models.output import head_of
from lmkit.objectives import check_head

VOCAB, WIDTH, N = 61, 12, 40


@pytest.fixture(params=[1, 16, 10_000], ids=["chunks of 1", "chunks of 16", "one chunk"], autouse=True)
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lmkit.models.mixture, lmkit.models.adaptive, lmkit.heads):
        monkeypatch.setattr(module, "rows_per_chunk", lambda vocab_size, device: request.param)


@pytest.fixture(params=[True, False], ids=["rows dropped", "rows masked"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without a target, as on CPUs and as on cards."""
    for module in (lmkit.models.mixture, lmkit.heads):
        monkeypatch.setattr(module, "drops_unscored", lambda device: request.param)


def mixture(*, bias: bool = True) -> MixtureHead:
    torch.manual_seed(0)
    head = MixtureHead(nn.Parameter(torch.randn(VOCAB, WIDTH)), 3, bias=bias)
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return head


def adaptive() -> AdaptiveHead:
    torch.manual_seed(0)
    head = AdaptiveHead(WIDTH, VOCAB, [7, 20, 45], 2.0)
    head.set_counts(torch.randint(0, 50, (VOCAB,)), biases=False)
    for p in head.parameters():
        nn.init.normal_(p)
    return head


HEADS: dict[str, Callable[[], Head]] = {
    "mixture": mixture,
    "mixture without bias": lambda: mixture(bias=False),
    "adaptive": adaptive,
}
every_head = pytest.mark.parametrize("kind", list(HEADS))


def inputs(*ignored: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    targets_N = torch.randint(0, VOCAB, (N,), generator=generator)
    targets_N[list(ignored)] = IGNORE
    return torch.randn(N, WIDTH, generator=generator).requires_grad_(), targets_N


@every_head
def test_the_probabilities_of_all_tokens_sum_to_one_and_logits_are_their_logs(kind: str) -> None:
    log_probs_NV = HEADS[kind]().logits(inputs()[0])
    assert log_probs_NV.shape == (N, VOCAB)
    assert log_probs_NV.dtype == torch.float32
    torch.testing.assert_close(log_probs_NV.exp().sum(1), torch.ones(N))


@every_head
@pytest.mark.parametrize("ignored", [(), (0, 7, 8, 39), tuple(range(N))], ids=["none", "some", "all ignored"])
def test_loss_and_gradients_are_those_of_the_log_probabilities(kind: str, ignored: tuple[int, ...]) -> None:
    head, (hidden_ND, targets_N) = HEADS[kind](), inputs(*ignored)
    parts = [hidden_ND, *head.parameters()]
    ours = head.loss(hidden_ND, targets_N)
    theirs = F.nll_loss(head.logits(hidden_ND), targets_N, reduction="sum", ignore_index=IGNORE)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours_grad = torch.autograd.grad(3.0 * ours, parts, allow_unused=True)
    for a, b in zip(ours_grad, torch.autograd.grad(3.0 * theirs, parts), strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, rtol=1e-4, atol=1e-4)


@every_head
def test_scores_are_those_of_the_log_probabilities(kind: str) -> None:
    head, (hidden_ND, targets_N) = HEADS[kind](), inputs(3, 4)
    scores, log_probs_NV = head.score(hidden_ND, targets_N), head.logits(hidden_ND)
    scored = targets_N != IGNORE
    expected = -log_probs_NV.gather(1, targets_N.where(scored, 0)[:, None]).squeeze(1).where(scored, 0.0)
    torch.testing.assert_close(scores.nats_N, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(scores.correct_N, (log_probs_NV.argmax(1) == targets_N) & scored)
    assert not scores.nats_N.requires_grad


@every_head
def test_under_autocast_the_loss_is_close_and_gradients_have_their_parameters_dtype(kind: str) -> None:
    head, (hidden_ND, targets_N) = HEADS[kind](), inputs(3)
    exact = head.loss(hidden_ND, targets_N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head.loss(hidden_ND.bfloat16(), targets_N)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in head.parameters())


def test_one_softmax_of_a_mixture_is_a_softmax_of_its_latent_vector() -> None:
    torch.manual_seed(0)
    head = MixtureHead(nn.Parameter(torch.randn(VOCAB, WIDTH)), 1)
    hidden_ND, targets_N = inputs()
    plain = SoftmaxHead(head.weight).loss(torch.tanh(head.latent(hidden_ND)), targets_N)
    torch.testing.assert_close(head.loss(hidden_ND, targets_N), plain)


def test_a_mixture_has_a_higher_rank_than_a_softmax_of_its_width() -> None:
    """Yang et al. 2018, section 2: log-probabilities of one softmax have rank at most D + 1."""
    torch.manual_seed(0)
    hidden_ND = torch.randn(VOCAB, 4)
    weight_VD = nn.Parameter(torch.randn(VOCAB, 4, dtype=torch.float32))
    ranks = [
        int(torch.linalg.matrix_rank(torch.log_softmax(head.logits(hidden_ND), 1).double(), rtol=1e-4))
        for head in (SoftmaxHead(weight_VD), MixtureHead(weight_VD, 4))
    ]
    assert ranks[0] <= 5 < 15 < ranks[1]


# Adaptive


def test_frequent_tokens_are_in_the_head_and_rare_ones_in_the_clusters() -> None:
    head = AdaptiveHead(WIDTH, VOCAB, [7, 20], 2.0)
    counts_V = torch.randperm(VOCAB)
    head.set_counts(counts_V, biases=True)
    assert head.rank_V[counts_V.argmax()] == 0
    assert head.rank_V[counts_V.argmin()] == VOCAB - 1
    assert torch.equal(head.rank_V.sort().values, torch.arange(VOCAB))
    assert [tuple(t.weight.shape) for t in head.tails] == [(13, 6), (41, 3)]  # type: ignore[union-attr, operator]


def test_biases_that_start_at_the_frequencies_give_the_unigram_model() -> None:
    head = AdaptiveHead(WIDTH, VOCAB, [7, 20], 2.0)
    counts_V = torch.randint(1, 100, (VOCAB,))
    for p in head.parameters():
        nn.init.zeros_(p)
    head.set_counts(counts_V, biases=True)
    expected = torch.log(counts_V / counts_V.sum()).expand(N, VOCAB)
    torch.testing.assert_close(head.logits(inputs()[0]), expected, rtol=1e-4, atol=1e-4)


def test_the_vocabulary_must_be_larger_than_the_last_cutoff() -> None:
    with pytest.raises(ConfigError, match="ends with 61, but the vocabulary has 61 tokens"):
        AdaptiveHead(WIDTH, VOCAB, [7, 61], 2.0)


def test_no_cluster_is_narrower_than_one_channel_however_large_the_divisor() -> None:
    head = AdaptiveHead(WIDTH, VOCAB, [7, 20], 1e200)
    assert [tail.weight.shape[1] for tail in head.tails] == [1, 1]  # type: ignore[union-attr, index]


# Models


SMALL: dict[str, Any] = {"d_model": 16, "num_layers": 1, "num_heads": 2, "context": 16}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (TransformerConfig(**SMALL), SoftmaxHead),
        (TransformerConfig(**SMALL, num_softmaxes=3), MixtureHead),
        (TransformerConfig(**SMALL, cutoffs=[7, 20], tie_embeddings=False), AdaptiveHead),
        (RecurrentConfig(d_embed=8, d_hidden=8, num_softmaxes=3), MixtureHead),
        (RecurrentConfig(d_embed=8, d_hidden=8, cutoffs=[7, 20], tie_embeddings=False), AdaptiveHead),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ModelConfig) else value.__name__,
)
def test_a_model_has_the_head_of_its_configuration_and_starts_near_the_unigram_model(
    config: ModelConfig, kind: type[Head]
) -> None:
    model = config.build(VOCAB, seed=0).eval()
    assert type(model.head) is head_of(config) is kind
    counts_V = torch.randint(1, 100, (VOCAB,), generator=torch.Generator().manual_seed(0))
    if isinstance(config, RecurrentConfig) or kind is AdaptiveHead:  # a Transformer's other heads have no bias
        initialise_from_text(model, InitConfig(output_bias=BiasInit.log_frequency), counts_V.numpy(), counts_V, seed=0)
        hidden_BTD, _ = model(torch.zeros(1, 4, dtype=torch.int64))
        probs = model.head.logits(hidden_BTD[0]).softmax(1)
        assert (probs - counts_V / counts_V.sum()).abs().max() < 0.02


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: TransformerConfig(cutoffs=[7], num_softmaxes=2),
            r"num_softmaxes=2 must be 1.*tie_embeddings=true must",
        ),
        (lambda: RecurrentConfig(cutoffs=[7, 7], num_softmaxes=0), r"num_softmaxes=0 must be >= 1.*rising"),
        (lambda: AdaptiveSoftmaxConfig(cutoffs=[0, 3], div_value=0.5), r"softmax.cutoffs=\[0,3\].*softmax.div_value"),
        (lambda: AdaptiveSoftmaxConfig(label_smoothing=0.1), "needs softmax=exact"),
        (lambda: check_head(AdaptiveSoftmaxConfig(), MixtureHead), "softmax=adaptive cannot train"),
        (lambda: check_head(SampledSoftmaxConfig(), MixtureHead), "cannot train a mixture"),
        (lambda: check_head(SoftmaxConfig(label_smoothing=0.1), AdaptiveHead), "cannot train a mixture"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()

"""The softmax head is plain cross-entropy, in value and gradient, however it is cut into chunks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lmkit.heads
from lmkit.heads import SoftmaxHead, linear_cross_entropy, rows_per_chunk, spare_types
from lmkit.models.adaptive import AdaptiveHead
from lmkit.models.base import IGNORE, Head
from lmkit.models.mixture import MixtureHead

VOCAB, WIDTH, N, SPARE = 97, 12, 50, 31


@pytest.fixture(params=[1, 16, 10_000], ids=["chunks of 1", "chunks of 16", "one chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows scored at a time: does not divide N, or is more than N."""
    rows: int = request.param
    for module in (lmkit.heads, lmkit.models.mixture, lmkit.models.adaptive):
        monkeypatch.setattr(module, "rows_per_chunk", lambda vocab_size, device: rows)
    return rows


@pytest.fixture(params=[True, False], ids=["rows dropped", "rows masked"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without a target, and types behind the vocabulary, as on CPUs and as on cards."""
    for module in (lmkit.heads, lmkit.models.mixture):
        monkeypatch.setattr(module, "drops_unscored", lambda device: request.param)
    if not request.param:
        monkeypatch.setattr(lmkit.heads, "spare_types", lambda vocab_size, device: SPARE)


def case(*, bias: bool = True, ignored: tuple[int, ...] = ()) -> tuple[SoftmaxHead, Tensor, Tensor]:
    """A head with random parameters, hidden vectors that want a gradient, and targets."""
    generator = torch.Generator().manual_seed(0)
    head = SoftmaxHead(nn.Parameter(torch.randn(VOCAB, WIDTH, generator=generator)), bias=bias)
    if head.bias is not None:
        with torch.no_grad():
            head.bias.normal_(generator=generator)
    hidden_ND = torch.randn(N, WIDTH, generator=generator).requires_grad_()
    targets_N = torch.randint(0, VOCAB, (N,), generator=generator)
    targets_N[list(ignored)] = IGNORE
    return head, hidden_ND, targets_N


def reference(head: SoftmaxHead, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_ND, head.weight, head.bias), targets_N, reduction="sum", ignore_index=IGNORE)


def gradients(head: SoftmaxHead, hidden_ND: Tensor, loss: Tensor) -> tuple[Tensor, ...]:
    wanted = [hidden_ND, head.weight] + ([] if head.bias is None else [head.bias])
    return torch.autograd.grad(loss, wanted)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("ignored", [(), (0, 7, 8, 49), tuple(range(N))], ids=["none", "some", "all ignored"])
def test_loss_and_gradients_equal_those_of_cross_entropy(bias: bool, ignored: tuple[int, ...]) -> None:
    head, hidden_ND, targets_N = case(bias=bias, ignored=ignored)
    ours, theirs = head.loss(hidden_ND, targets_N), reference(head, hidden_ND, targets_N)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours_grad, theirs_grad in zip(
        gradients(head, hidden_ND, 3.0 * ours), gradients(head, hidden_ND, 3.0 * theirs), strict=True
    ):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("chunk")
def test_scores_are_the_loss_of_each_target_and_whether_it_is_the_argmax() -> None:
    head, hidden_ND, targets_N = case(ignored=(3, 4))
    logits_NV = F.linear(hidden_ND, head.weight, head.bias)
    targets_N[5] = logits_NV[5].argmax()
    scores = head.score(hidden_ND, targets_N)
    nats_N = F.cross_entropy(logits_NV, targets_N, reduction="none", ignore_index=IGNORE)
    torch.testing.assert_close(scores.nats_N, nats_N.detach(), rtol=1e-5, atol=1e-5)
    assert scores.nats_N.dtype == torch.float32
    assert not scores.nats_N.requires_grad
    torch.testing.assert_close(scores.correct_N, logits_NV.argmax(1) == targets_N)
    assert scores.correct_N[5]
    assert not scores.correct_N[3]


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("kind", ["softmax", "mixture", "adaptive"])
def test_each_target_counts_as_often_as_its_weight_says(kind: str) -> None:
    torch.manual_seed(0)
    plain, hidden_ND, targets_N = case(ignored=(3, 4))
    head: Head = plain
    if kind == "mixture":
        head = MixtureHead(nn.Parameter(torch.randn(VOCAB, WIDTH)), 2, bias=True)
    if kind == "adaptive":
        head = AdaptiveHead(WIDTH, VOCAB, [20, 60], 2.0)
        nn.init.normal_(head.weight)
        for tail in head.tails:
            nn.init.normal_(tail.weight)
    weights_N = torch.randn(N)
    rows = (row for row in range(N) if targets_N[row] != IGNORE)
    one_by_one = torch.stack(
        [weights_N[row] * head.loss(hidden_ND[row, None], targets_N[row, None]) for row in rows]
    ).sum()
    together = head.loss(hidden_ND, targets_N, weights_N)
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-4)
    wanted = [hidden_ND, *head.parameters()]
    for ours, expected in zip(
        torch.autograd.grad(3.0 * together, wanted), torch.autograd.grad(3.0 * one_by_one, wanted), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_rows_without_a_target_are_not_scored_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmkit.heads, "drops_unscored", lambda device: True)
    head, hidden_ND, targets_N = case(ignored=tuple(range(0, N, 2)))
    seen = []
    logits = head.logits
    monkeypatch.setattr(head, "logits", lambda hidden: seen.append(len(hidden)) or logits(hidden))  # type: ignore[func-returns-value]
    scores = head.score(hidden_ND, targets_N)
    assert sum(seen) == N // 2
    assert (scores.nats_N != 0).sum() == N // 2


@pytest.mark.usefixtures("chunk")
def test_ignored_targets_contribute_nothing_whatever_their_hidden_vector_holds() -> None:
    head, hidden_ND, targets_N = case(ignored=(1, 2))
    kept = targets_N != IGNORE
    with torch.no_grad():
        hidden_ND[1:3] = float("nan")
    loss = head.loss(hidden_ND, targets_N)
    alone = head.loss(hidden_ND[kept], targets_N[kept])
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)
    d_hidden, d_weight, d_bias = gradients(head, hidden_ND, loss)
    assert (d_hidden[1:3] == 0).all()
    assert d_weight.isfinite().all()
    assert d_bias.isfinite().all()


def test_equal_logits_give_a_perplexity_of_the_vocabulary_size() -> None:
    head = SoftmaxHead(nn.Parameter(torch.zeros(VOCAB, WIDTH)))
    hidden_ND, targets_N = torch.randn(N, WIDTH), torch.arange(N)
    assert math.exp(float(head.loss(hidden_ND, targets_N).detach()) / N) == pytest.approx(VOCAB, rel=1e-5)
    assert math.exp(float(head.score(hidden_ND, targets_N).nats_N.mean())) == pytest.approx(VOCAB, rel=1e-5)


def test_extreme_logits_neither_overflow_nor_lose_the_loss() -> None:
    head = SoftmaxHead(nn.Parameter(torch.tensor([[500.0], [-500.0], [0.0]])))
    hidden_ND = torch.ones(3, 1, requires_grad=True)
    targets_N = torch.tensor([0, 1, 2])
    loss = head.loss(hidden_ND, targets_N)
    assert float(loss.detach()) == pytest.approx(1500.0, rel=1e-6)
    d_hidden, d_weight = gradients(head, hidden_ND, loss)
    torch.testing.assert_close(d_hidden, torch.tensor([[0.0], [1000.0], [500.0]]))
    torch.testing.assert_close(d_weight, torch.tensor([[2.0], [-1.0], [-1.0]]))


@pytest.mark.parametrize("own", [None, 3.0], ids=["plain", "lowered"])
@pytest.mark.parametrize("below", [0.0, 40.0, 68.0, 70.0, 87.0, 95.0, 103.0, 150.0])
def test_targets_of_any_probability_have_all_their_digits(below: float, own: float | None) -> None:
    """From fp32's smallest probabilities on they are rounded, and then 0, while their logarithms are not."""
    head, hidden_ND, targets_N = case()
    assert head.bias is not None
    with torch.no_grad():
        head.bias[7] -= below
    targets_N[::2] = 7  # so that in one chunk there are usual ones, too
    own_N = None if own is None else torch.full((N,), own)
    weights_N = torch.rand(N)
    ours = linear_cross_entropy(hidden_ND, head.weight, head.bias, targets_N, own_N, weights_N)
    wide = [t.detach().double().requires_grad_() for t in (hidden_ND, head.weight, head.bias)]
    logits_NV = F.linear(*wide) - F.one_hot(targets_N, VOCAB) * (own or 0.0)
    theirs = (F.cross_entropy(logits_NV, targets_N, reduction="none") * weights_N).sum()
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0)
    for ours_grad, theirs_grad in zip(gradients(head, hidden_ND, ours), torch.autograd.grad(theirs, wide), strict=True):
        torch.testing.assert_close(ours_grad.double(), theirs_grad, rtol=1e-5, atol=1e-5)


@pytest.fixture
def compiled_chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the chunks whose softmax was made as torch's compiler has traced it, as on cards."""
    torch.compiler.reset()
    traced: Any = torch.compile(lmkit.heads._softmax_minus_target_in_one_pass, backend="aot_eager")
    rows: list[int] = []

    def counted(logits_CV: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        rows.append(len(logits_CV))
        found: tuple[Tensor, Tensor] = traced(logits_CV, *others)
        return found

    monkeypatch.setattr(lmkit.heads, "drops_unscored", lambda device: False)
    monkeypatch.setattr(lmkit.heads, "spare_types", lambda vocab_size, device: SPARE)
    monkeypatch.setattr(lmkit.heads, "_compiled", lambda: counted)
    monkeypatch.setattr(lmkit.heads, "rows_per_chunk", lambda vocab_size, device: 16)
    return rows


@pytest.mark.parametrize("own", [None, 3.0], ids=["plain", "lowered"])
def test_compiled_it_is_the_same(own: float | None, compiled_chunks: list[int]) -> None:
    head, hidden_ND, targets_N = case(bias=False, ignored=(0, 7, 49))
    own_N = None if own is None else torch.full((N,), own)
    ours = linear_cross_entropy(hidden_ND, head.weight, None, targets_N, own_N, compiled=True)
    assert compiled_chunks == [16, 16, 16, 2]
    kept_N = targets_N != IGNORE
    logits_NV = F.linear(hidden_ND, head.weight)[kept_N] - F.one_hot(targets_N[kept_N], VOCAB) * (own or 0.0)
    theirs = F.cross_entropy(logits_NV, targets_N[kept_N], reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours_grad, theirs_grad in zip(
        gradients(head, hidden_ND, ours), gradients(head, hidden_ND, theirs), strict=True
    ):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-5, atol=1e-5)


def test_compiled_the_loss_and_the_gradients_are_rounded_no_more_than_without_under_autocast(
    compiled_chunks: list[int],
) -> None:
    head, hidden_ND, targets_N = case(bias=False, ignored=(5,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = head.loss(hidden_ND, targets_N)
        assert not compiled_chunks
        head.compiled = True
        loss = head.loss(hidden_ND, targets_N)
    assert compiled_chunks
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    for ours, theirs in zip(gradients(head, hidden_ND, loss), gradients(head, hidden_ND, plain), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-2)


def test_compiled_or_not_weights_and_the_gradient_of_a_bias_are_those_of_fp32(compiled_chunks: list[int]) -> None:
    head, hidden_ND, targets_N = case()
    head.compiled = True
    gradients(head, hidden_ND, head.loss(hidden_ND, targets_N))
    assert head.bias is not None
    head.bias.requires_grad_(False)
    head.loss(hidden_ND, targets_N, torch.rand(N))
    assert not compiled_chunks
    head.loss(hidden_ND, targets_N)
    assert compiled_chunks


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "hidden+weight"])
def test_what_is_frozen_gets_no_gradient_and_the_others_the_same_as_ever(frozen: str) -> None:
    head, hidden_ND, targets_N = case(ignored=(9,))
    tensors = {"hidden": hidden_ND, "weight": head.weight, "bias": head.bias}
    full = dict(zip(tensors, gradients(head, hidden_ND, head.loss(hidden_ND, targets_N)), strict=True))
    for name in frozen.split("+"):
        tensor = tensors[name]
        assert tensor is not None
        tensor.requires_grad_(False)
    head.loss(hidden_ND, targets_N).backward()
    for name, tensor in tensors.items():
        assert tensor is not None
        if name in frozen.split("+"):
            assert tensor.grad is None
        else:
            assert tensor.grad is not None
            torch.testing.assert_close(tensor.grad, full[name], rtol=1e-5, atol=1e-6)


def test_without_gradients_the_loss_is_the_same_and_has_no_graph() -> None:
    head, hidden_ND, targets_N = case()
    with torch.no_grad():
        loss = head.loss(hidden_ND, targets_N)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, head.loss(hidden_ND, targets_N).detach(), rtol=1e-6, atol=0)


def test_a_tied_weight_gets_the_gradient_of_both_uses() -> None:
    table = nn.Embedding(VOCAB, WIDTH)
    head = SoftmaxHead(table.weight)
    tokens_N, targets_N = torch.arange(20), torch.arange(1, 21)
    head.loss(table(tokens_N), targets_N).backward()
    ours = table.weight.grad
    table.weight.grad = None
    reference(head, table(tokens_N), targets_N).backward()
    assert ours is not None
    assert table.weight.grad is not None
    torch.testing.assert_close(ours, table.weight.grad, rtol=1e-5, atol=1e-5)
    assert [name for name, _ in head.named_parameters()] == ["weight"]


def test_the_gradient_survives_being_asked_for_twice() -> None:
    head, hidden_ND, targets_N = case()
    loss = head.loss(hidden_ND, targets_N)
    first = torch.autograd.grad(loss, head.weight, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(2 * loss, head.weight)[0], 2 * first)


def test_the_own_logit_of_each_target_is_lowered_by_what_is_given() -> None:
    head, hidden_ND, targets_N = case(ignored=(0, 11))
    own_N = torch.rand(N)
    ours = linear_cross_entropy(hidden_ND, head.weight, head.bias, targets_N, own_N)
    safe_N = targets_N.where(targets_N != IGNORE, 0)
    shift_NV = F.one_hot(safe_N, VOCAB) * own_N[:, None]
    logits_NV = F.linear(hidden_ND, head.weight, head.bias) - shift_NV
    theirs = F.cross_entropy(logits_NV, targets_N, reduction="sum", ignore_index=IGNORE)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours_grad, theirs_grad in zip(
        gradients(head, hidden_ND, ours), gradients(head, hidden_ND, theirs), strict=True
    ):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-5, atol=1e-5)


def test_under_autocast_products_are_rounded_but_the_sum_and_the_gradients_stay_in_fp32() -> None:
    head, hidden_ND, targets_N = case(ignored=(5,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head.loss(hidden_ND, targets_N)
        scores = head.score(hidden_ND, targets_N)
    exact = reference(head, hidden_ND, targets_N)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)
    torch.testing.assert_close(scores.nats_N.sum(), exact.detach(), rtol=1e-2, atol=0)
    for ours_grad, theirs_grad in zip(gradients(head, hidden_ND, loss), gradients(head, hidden_ND, exact), strict=True):
        assert ours_grad.dtype == torch.float32
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("vocab_size", [2, 10_000, 50_257, 267_735, 10_000_000])
def test_a_chunk_has_a_row_and_few_more_logits_than_fit_the_cache_and_enough_rows_for_speed(vocab_size: int) -> None:
    for device, limit in (("cpu", lmkit.heads.CHUNK_ELEMENTS_CPU), ("cuda", lmkit.heads.CHUNK_ELEMENTS_GPU)):
        rows = rows_per_chunk(vocab_size, torch.device(device))
        assert rows >= 1
        assert rows * vocab_size <= max(limit, lmkit.heads.MAX_ELEMENTS)
        assert rows >= lmkit.heads.MIN_ROWS or (rows + 1) * vocab_size > lmkit.heads.MAX_ELEMENTS


@pytest.mark.parametrize("vocab_size", [1, 97, 10_000, 50_257, 50_304])
def test_rows_of_logits_begin_at_multiples_of_16_bytes_on_a_card_whatever_the_vocabulary(vocab_size: int) -> None:
    assert spare_types(vocab_size, torch.device("cpu")) == 0
    spare = spare_types(vocab_size, torch.device("cuda"))
    assert 0 <= spare < 64
    assert (vocab_size + spare) * torch.bfloat16.itemsize % 16 == 0


@pytest.mark.parametrize("kind", ["exact", "mixture", "adaptive"])
def test_logits_are_not_rounded_by_autocast(kind: str) -> None:
    torch.manual_seed(0)
    head = SoftmaxHead(nn.Parameter(torch.randn(VOCAB, WIDTH)), bias=True)
    if kind == "mixture":
        head = MixtureHead(nn.Parameter(torch.randn(VOCAB, WIDTH)), 2)  # type: ignore[assignment]
    elif kind == "adaptive":
        head = AdaptiveHead(WIDTH, VOCAB, [20, 60], 2.0)  # type: ignore[assignment]
        for p in head.parameters():
            nn.init.normal_(p)
    hidden_ND = torch.randn(N, WIDTH).bfloat16()
    exact_NV = head.logits(hidden_ND.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head.logits(hidden_ND), exact_NV)

"""Dynamic evaluation against plain loops: score a piece, learn from it, go on; and the model gets its weights back."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lmkit.config.evaluation import DynamicConfig, DynamicRmsConfig, DynamicSgdConfig
from lmkit.config.machine import Precision
from lmkit.config.model import Cell, NgramConfig, RecurrentConfig, TransformerConfig
from lmkit.device import Device
from lmkit.errors import ConfigError, DivergedError
from lmkit.evaluation.dynamic import Steps, adaptable, adapting, score_dynamic, steps_for
from lmkit.evaluation.plan import Indices, Segments, Windows, sliding, unbroken
from lmkit.evaluation.scoring import TokenScores, score
from lmkit.models.base import LanguageModel, Scores
from lmkit.models.ngram import KneserNey

CPU = Device(torch.device("cpu"), Precision.fp32, False, False, "cpu")
VOCAB, EOS, CONTEXT = 13, 1, 8


def text(num_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, num_tokens).astype(np.uint8)


def recurrent(cell: Cell = Cell.lstm) -> LanguageModel:
    made = RecurrentConfig(cell=cell, d_embed=6, d_hidden=7, num_layers=2, dropout_output=0.5).build(VOCAB, seed=1)
    return sharpened(made)


def transformer() -> LanguageModel:
    config = TransformerConfig(d_model=8, num_layers=1, num_heads=2, context=CONTEXT, dropout=0.5)
    return sharpened(config.build(VOCAB, seed=1))


def sharpened(model: LanguageModel) -> LanguageModel:
    """In double precision, so that many updates in two ways of computing stay together."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    return model.double().eval()


def whole(num_tokens: int) -> Windows:
    return unbroken(Segments.whole(num_tokens, EOS))


def windows_of(model: LanguageModel, num_tokens: int, stride: int = 4) -> Windows:
    if model.context is None:
        return whole(num_tokens)
    return sliding(Segments.whole(num_tokens, EOS), CONTEXT, stride)


def static(model: LanguageModel, tokens: np.ndarray, seq_len: int = 5) -> np.ndarray:
    seq_len = seq_len if model.context is None else CONTEXT
    windows = windows_of(model, len(tokens))
    return score(model, tokens, windows, seq_len=seq_len, batch_size=1, device=CPU).nats_N


def dynamic(model: LanguageModel, tokens: np.ndarray, config: DynamicConfig, steps: Steps | None = None) -> TokenScores:
    context = None if model.context is None else CONTEXT
    steps = steps or steps_for(model, config, tokens, EOS, context=context, device=CPU)
    return score_dynamic(model, tokens, windows_of(model, len(tokens)), config, steps, device=CPU)


def nats_of(model: LanguageModel, hidden_TD: Tensor, targets: list[int]) -> Tensor:
    """(T,) by the whole softmax, differentiable."""
    logits_TV = hidden_TD @ model.head.weight.T  # type: ignore[operator, union-attr]
    if model.head.bias is not None:
        logits_TV = logits_TV + model.head.bias  # type: ignore[operator]
    return -torch.log_softmax(logits_TV, 1)[torch.arange(len(targets)), torch.tensor(targets)]


Update = Callable[[str, Tensor, Tensor, Tensor], Tensor]
"""From a parameter's name, value, trained value and gradient to its next value."""


def learn(model: LanguageModel, nats_T: Tensor, trained: dict[str, Tensor], update: Update) -> None:
    model.zero_grad()
    nats_T.mean().backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, p in model.named_parameters():
            assert p.grad is not None
            p.copy_(update(name, p, trained[name], p.grad))


def recurrent_by_loop(model: LanguageModel, tokens: np.ndarray, seq_len: int, update: Update) -> list[float]:
    """Truncated backpropagation over pieces with the state carried, as in Krause's code."""
    model = copy.deepcopy(model)
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs, targets = [EOS, *tokens[:-1].tolist()], tokens.tolist()
    found: list[float] = []
    state = None
    for start in range(0, len(targets), seq_len):
        piece = slice(start, start + seq_len)
        hidden_BTD, state = model(torch.tensor([inputs[piece]]), state)
        state = state.detach()
        nats_T = nats_of(model, hidden_BTD[0], targets[piece])
        found += nats_T.tolist()
        learn(model, nats_T, trained, update)
    return found


def transformer_by_loop(model: LanguageModel, tokens: np.ndarray, stride: int, update: Update) -> list[float]:
    """A window at a time: the first learns from all its tokens, each later one from its new ones."""
    model = copy.deepcopy(model)
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs, targets = [EOS, *tokens[:-1].tolist()], tokens.tolist()
    found: list[float] = []
    start = 0
    while len(found) < len(targets):
        end = min(start + CONTEXT, len(targets))
        hidden_BTD, _ = model(torch.tensor([inputs[start:end]]))
        new = slice(len(found) - start, end - start)
        nats_T = nats_of(model, hidden_BTD[0, new], targets[len(found) : end])
        found += nats_T.tolist()
        learn(model, nats_T, trained, update)
        start += stride
    return found


def sgd(lr: float, decay: float) -> Update:
    return lambda _, value, trained, grad: value - lr * grad + decay * (trained - value)


@pytest.mark.parametrize("cell", list(Cell))
@pytest.mark.parametrize(("seq_len", "decay"), [(5, 0.0), (5, 0.1), (1, 0.05), (100, 0.1)])
def test_sgd_with_carried_state_is_the_plain_loop(cell: Cell, seq_len: int, decay: float) -> None:
    model, tokens = recurrent(cell), text(43)
    found = dynamic(model, tokens, DynamicSgdConfig(seq_len=seq_len, lr=0.5, decay=decay))
    expected = recurrent_by_loop(model, tokens, seq_len, sgd(0.5, decay))
    np.testing.assert_allclose(found.nats_N, expected, rtol=1e-5)
    if seq_len < 43:
        assert not np.allclose(found.nats_N, static(model, tokens), rtol=1e-2), "learning matters"


@pytest.mark.parametrize("stride", [1, 4, 8])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_in_windows_is_the_plain_loop(stride: int, decay: float) -> None:
    model, tokens = transformer(), text(43)
    windows = windows_of(model, len(tokens), stride)
    config = DynamicSgdConfig(lr=0.1, decay=decay, seq_len=3)  # seq_len has no meaning here
    steps = steps_for(model, config, tokens, EOS, context=CONTEXT, device=CPU)
    found = score_dynamic(model, tokens, windows, config, steps, device=CPU)
    expected = transformer_by_loop(model, tokens, stride, sgd(0.1, decay))
    np.testing.assert_allclose(found.nats_N, expected, rtol=1e-5)
    assert not np.allclose(found.nats_N[8:], static(model, tokens)[8:], rtol=1e-2), "learning matters"


def mean_squares(model: LanguageModel, pieces: list[Tensor]) -> dict[str, Tensor]:
    """Of the gradient of each piece's mean loss, element by element; a piece is its tokens' nats."""
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for nats_N in pieces:
        model.zero_grad()
        nats_N.mean().backward()  # type: ignore[no-untyped-call]
        for name, p in model.named_parameters():
            assert p.grad is not None
            squares[name] += p.grad**2
    return {name: square / len(pieces) for name, square in squares.items()}


def lanes(model: LanguageModel, tokens: list[int], number: int, seq_len: int) -> list[Tensor]:
    """``number`` lanes side by side, ``seq_len`` tokens at a time with the state carried, as in Krause's gradstat."""
    length = len(tokens) // number
    rows = torch.tensor(tokens[: number * length]).view(number, length)
    pieces: list[Tensor] = []
    state = None
    for start in range(0, length - 1, seq_len):
        end = min(start + seq_len, length - 1)
        hidden_BTD, state = model(rows[:, start:end], state)
        state = state.detach()
        pieces.append(nats_of(model, hidden_BTD.flatten(0, 1), rows[:, start + 1 : end + 1].flatten().tolist()))
    return pieces


def rms_rule(squares: dict[str, Tensor], config: DynamicRmsConfig) -> Update:
    """Krause et al. 2018, equations 6 to 9, with the decay cut off at the whole way back as in their code."""
    rms = {name: square.sqrt() for name, square in squares.items()}
    mean = sum(float(r.mean()) for r in rms.values()) / len(rms)

    def update(name: str, value: Tensor, trained: Tensor, grad: Tensor) -> Tensor:
        share = torch.minimum(config.decay * rms[name] / mean, torch.ones(()))
        return value - config.lr * grad / (rms[name] + config.epsilon) + share * (trained - value)

    return update


def test_rms_with_carried_state_is_the_plain_loop() -> None:
    model, tokens, train = recurrent(), text(43), text(2017, seed=5)
    config = DynamicRmsConfig(seq_len=5, lr=0.01, decay=0.1, epsilon=1e-3)
    squares = mean_squares(copy := recurrent(), lanes(copy, train.tolist(), 100, 5))
    steps = steps_for(model, config, train, EOS, context=None, device=CPU)
    found = score_dynamic(model, tokens, whole(43), config, steps, device=CPU)
    expected = recurrent_by_loop(model, tokens, 5, rms_rule(squares, config))
    np.testing.assert_allclose(found.nats_N, expected, rtol=1e-5)


def test_rms_statistics_of_windows_are_those_of_batches_of_500_tokens() -> None:
    model, train = transformer(), text(1105, seed=5)
    config = DynamicRmsConfig(lr=0.01, decay=0.1, epsilon=1e-3)
    inputs, targets = [EOS, *train[:-1].tolist()], train.tolist()
    whole_windows = len(targets) // CONTEXT  # 138, and one of a single token
    pieces = []
    for first in range(0, whole_windows + 1, 500 // CONTEXT):
        nats = []
        for start in range(first * CONTEXT, min((first + 500 // CONTEXT) * CONTEXT, len(targets)), CONTEXT):
            hidden_BTD, _ = model(torch.tensor([inputs[start : start + CONTEXT]]))
            nats.append(nats_of(model, hidden_BTD[0], targets[start : start + CONTEXT]))
        pieces.append(torch.cat(nats))
    squares = mean_squares(model, pieces)
    steps = steps_for(model, config, train, EOS, context=CONTEXT, device=CPU)
    for lr, (name, square) in zip(steps.lr, squares.items(), strict=True):
        torch.testing.assert_close(lr, 0.01 / (square.sqrt() + 1e-3), rtol=1e-6, atol=0, msg=name)


def test_rms_statistics_take_as_many_tokens_of_train_as_asked_for() -> None:
    train = text(3000, seed=5)
    config = DynamicRmsConfig(seq_len=5, statistics_tokens=1000)
    some = steps_for(recurrent(), config, train, EOS, context=None, device=CPU)
    same = steps_for(recurrent(), config, train[:1000], EOS, context=None, device=CPU)
    more = steps_for(recurrent(), DynamicRmsConfig(seq_len=5), train, EOS, context=None, device=CPU)
    assert all(torch.equal(a, b) for a, b in zip(some.lr, same.lr, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(some.lr, more.lr, strict=True))


def test_parameters_without_gradient_go_all_the_way_back_at_most() -> None:
    steps = steps_for(
        recurrent(), DynamicRmsConfig(seq_len=5, decay=1.0), text(1500, seed=5), EOS, context=None, device=CPU
    )
    assert max(float(decay.max()) for decay in steps.decay) == 1.0
    assert min(float(decay.min()) for decay in steps.decay) >= 0.0


@pytest.mark.parametrize("family", [recurrent, transformer])
@pytest.mark.parametrize("config", [DynamicSgdConfig(lr=1e-300), DynamicRmsConfig(lr=1e-300)])
def test_learning_nothing_gives_the_static_scores(family: Callable[[], LanguageModel], config: DynamicConfig) -> None:
    model, tokens = family(), text(60)
    found = dynamic(model, tokens, config)
    np.testing.assert_allclose(found.nats_N, static(model, tokens, config.seq_len), rtol=1e-6)


@pytest.mark.parametrize("family", [recurrent, transformer])
@pytest.mark.parametrize("rule", [DynamicSgdConfig, DynamicRmsConfig])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_gets_its_weights_and_its_mode_back_bit_for_bit(
    family: Callable[[], LanguageModel], rule: type[DynamicConfig], training: bool
) -> None:
    """With a rate of 1e-3 the losses of RMS go up and down by 70 nats, and on some CPUs beyond all bounds."""
    model, tokens = family().float().train(training), text(60)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    first = dynamic(model, tokens, rule(lr=1e-5))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert model.training is training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    second = dynamic(model, tokens, rule(lr=1e-5))
    assert np.array_equal(first.nats_N, second.nats_N)


@pytest.mark.parametrize("family", [recurrent, transformer])
def test_the_weights_come_back_after_an_error_too(family: Callable[[], LanguageModel]) -> None:
    model, tokens = family().train(), text(60)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    calls = []

    def failing(hidden_ND: Tensor, targets_N: Tensor, positions_N: Indices) -> Scores:
        calls.append(positions_N)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return model.head.score(hidden_ND, targets_N)

    config = DynamicSgdConfig(lr=0.5, seq_len=5)
    steps = steps_for(model, config, tokens, EOS, context=model.context, device=CPU)
    with pytest.raises(KeyboardInterrupt):
        score_dynamic(model, tokens, windows_of(model, 60), config, steps, device=CPU, scorer=failing)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert model.training


def test_with_decay_1_each_update_starts_from_the_trained_weights() -> None:
    model, tokens = recurrent(), text(43)
    found = dynamic(model, tokens, DynamicSgdConfig(seq_len=5, lr=0.5, decay=1.0))
    expected = recurrent_by_loop(model, tokens, 5, lambda _, value, trained, grad: trained - 0.5 * grad)
    np.testing.assert_allclose(found.nats_N, expected, rtol=1e-5)


@pytest.mark.parametrize("family", [recurrent, transformer])
def test_learning_helps_on_a_text_that_repeats(family: Callable[[], LanguageModel]) -> None:
    model, tokens = family(), np.tile(text(10), 40)
    lr = 1.0 if model.context is None else 0.1
    learnt = dynamic(model, tokens, DynamicSgdConfig(seq_len=10, lr=lr, decay=0.0)).nats_N
    still = static(model, tokens)
    assert learnt[200:].mean() < 0.8 * still[200:].mean()


def test_nothing_is_learnt_from_a_token_before_it_is_scored() -> None:
    model, tokens = recurrent(), text(43)
    changed = tokens.copy()
    changed[30:] = (changed[30:] + 1) % VOCAB
    config = DynamicSgdConfig(seq_len=5, lr=0.5)
    steps = steps_for(model, config, tokens, EOS, context=None, device=CPU)
    first, second = (dynamic(model, one, config, steps).nats_N for one in (tokens, changed))
    assert np.array_equal(first[:30], second[:30])
    assert not np.array_equal(first[30:], second[30:])


def test_learning_goes_on_from_one_window_to_the_next_and_the_state_does_not() -> None:
    """Two lines with equal text: the second starts with an empty state but with what was learnt from the first."""
    model = recurrent()
    line = [*text(9).tolist(), EOS]
    line = [token if token != EOS else 2 for token in line[:-1]] + [EOS]
    tokens = np.array(line * 2, dtype=np.uint8)
    lines = unbroken(Segments.ending_with(tokens == EOS, EOS))
    for lr, alike in ((1e-30, True), (0.5, False)):
        config = DynamicSgdConfig(seq_len=100, lr=lr)
        steps = steps_for(model, config, tokens, EOS, context=None, device=CPU)
        nats = score_dynamic(model, tokens, lines, config, steps, device=CPU).nats_N
        assert np.allclose(nats[:10], nats[10:]) is alike


def test_progress_grows_to_the_number_of_tokens() -> None:
    seen: list[int] = []
    model, tokens, config = recurrent(), text(43), DynamicSgdConfig(seq_len=5)
    steps = steps_for(model, config, tokens, EOS, context=None, device=CPU)
    score_dynamic(model, tokens, whole(43), config, steps, device=CPU, progress=seen.append)
    assert seen == [*range(5, 43, 5), 43]


@pytest.mark.parametrize("family", [recurrent, transformer])
@pytest.mark.parametrize("lr", [1e5, 1e37])
def test_updates_that_blow_up_are_a_diverged_error_that_names_the_rate(
    family: Callable[[], LanguageModel], lr: float
) -> None:
    model = family().float()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(DivergedError, match=r"blew up before token \d+; lower dynamic.lr"):
        dynamic(model, text(200), DynamicSgdConfig(lr=lr, seq_len=5))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_model_that_does_not_learn_by_gradient_is_refused() -> None:
    model, tokens = KneserNey(NgramConfig(order=3), VOCAB), text(60)
    model.fit(tokens, eos_id=EOS)
    with pytest.raises(ConfigError, match="needs a model that learns by gradient, not KneserNey; leave out dynamic"):
        adaptable(model)
    with pytest.raises(ConfigError, match="learns by gradient"):
        dynamic(model, tokens, DynamicSgdConfig())


def test_an_n_gram_model_learns_a_factor_for_each_word_and_forgets_it() -> None:
    """Against the update written out: the gradient of a factor is the share expected less the share seen."""
    model, tokens = KneserNey(NgramConfig(order=3), VOCAB), text(60)
    model.fit(text(200, seed=1), eos_id=EOS)
    inputs = torch.from_numpy(np.concatenate([[EOS], tokens[:-1]]).astype(np.int64))[None]
    log_probs_NV = model.head.logits(model(inputs)[0][0]).double()
    tilt_V, expected = torch.zeros(VOCAB, dtype=torch.float64), []
    for start in range(0, 60, 5):
        logits_NV = log_probs_NV[start : start + 5] + tilt_V
        targets_N = torch.from_numpy(tokens[start : start + 5].astype(np.int64))
        expected += torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none").tolist()
        seen_V = torch.bincount(targets_N, minlength=VOCAB) / 5
        tilt_V = tilt_V * (1 - 0.1) - 0.7 * (logits_NV.softmax(1).mean(0) - seen_V)
    before = model.head.score(model(inputs)[0][0], torch.from_numpy(tokens.astype(np.int64))).nats_N
    with adapting(model):
        found = dynamic(model, tokens, DynamicSgdConfig(seq_len=5, lr=0.7, decay=0.1))
    np.testing.assert_allclose(found.nats_N, expected, rtol=1e-5)
    assert model.head.tilt_V is None
    after = model.head.score(model(inputs)[0][0], torch.from_numpy(tokens.astype(np.int64))).nats_N
    assert torch.equal(before, after)


@pytest.mark.parametrize("model", [recurrent, transformer])
def test_in_bf16_it_gives_about_the_same(model: Callable[[], LanguageModel]) -> None:
    config, tokens, nats = DynamicSgdConfig(lr=0.1), text(60), []
    for precision in (Precision.fp32, Precision.bf16):
        made, device = model().float(), Device(torch.device("cpu"), precision, False, False, "cpu")
        if precision is Precision.bf16:  # what a recurrent layer gives where bf16 is to be had
            made.register_forward_hook(lambda _, inputs, outputs: (outputs[0].bfloat16(), outputs[1]))
        context = None if made.context is None else CONTEXT
        steps = steps_for(made, config, tokens, EOS, context=context, device=device)
        nats.append(score_dynamic(made, tokens, windows_of(made, 60), config, steps, device=device).nats_N.mean())
    assert nats[1] == pytest.approx(nats[0], rel=0.05)

"""Dynamic evaluation: each piece of the text is scored first and then learned from (Krause et al. 2018).

After a piece with mean loss L the parameters move by

    SGD:  -lr dL + decay (theta_0 - theta)
    RMS:  -lr dL / (rms + epsilon) + min(decay rms / mean rms, 1) (theta_0 - theta)

where theta_0 are the trained parameters and rms is the root mean square of the gradients on train, element by element
(their equations 6 to 9; no step goes beyond theta_0, as in their code). The model gets its trained parameters back.
An n-gram model has no parameters that a gradient could move: it learns a factor for each word (KneserNeyHead.tilted).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmkit.config.evaluation import DynamicConfig, DynamicRmsConfig
from lmkit.device import Device
from lmkit.errors import ConfigError, DivergedError
from lmkit.evaluation.plan import Segments, Tokens, Windows, sliding, unbroken
from lmkit.evaluation.scoring import Scorer, ScoreSheet, Text, TokenScores, batches, mode, own_scores
from lmkit.models.base import LanguageModel
from lmkit.models.ngram import KneserNeyHead

STATISTICS_TOKENS = 500
"""Tokens behind each gradient of the statistics: 100 lanes of 5, as in their code."""
BLOWN_UP = 1000.0
"""Nats per token beyond which the updates have gone wrong: guessing costs log V, about 10. Recurrent models saturate
and reach any loss without a value that is not finite."""


@dataclass(frozen=True)
class Steps:
    """Element-wise rates of the update, one tensor (or number, for all alike) a parameter."""

    lr: list[Tensor]
    """What the gradient is multiplied by."""
    decay: list[Tensor]
    """Share of the way back to the trained value."""


def score_dynamic(
    model: LanguageModel,
    tokens: Tokens,
    windows: Windows,
    config: DynamicConfig,
    steps: Steps,
    *,
    device: Device,
    scorer: Scorer | None = None,
    progress: Callable[[int], None] | None = None,
) -> TokenScores:
    """Score a text in its order, one window at a time, updating the model after each piece of ``config.seq_len`` tokens
    (with carried state) or each window's scored tokens. Raises DivergedError if the updates blow up."""
    parameters = adaptable(model)
    trained = [p.detach().clone() for p in parameters]
    text, sheet = Text(tokens, model.vocab_size), ScoreSheet(len(tokens), windows)
    scorer = scorer or own_scores(model)
    try:
        with mode(model, training=False), torch.backends.cudnn.flags(enabled=False):
            for window in batches(windows, 1):
                for hidden_ND, targets_N, positions_N in _pieces(model, text, window, config.seq_len, device):
                    with torch.no_grad():
                        sheet.put(positions_N, scorer(hidden_ND.detach(), targets_N, positions_N))
                    loss = model.head.loss(hidden_ND, targets_N) / len(targets_N)
                    if not loss.item() <= BLOWN_UP:
                        raise DivergedError(
                            f"dynamic evaluation blew up before token {positions_N[0]}", "lower dynamic.lr"
                        )
                    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                    _update(parameters, trained, gradients, steps)
                    if progress is not None:
                        progress(sheet.num_put)
        return sheet.finish()
    finally:
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in parameters], trained)


def adapting(model: LanguageModel) -> contextlib.AbstractContextManager[None]:
    """Within it the model has parameters to learn with; an n-gram model has them only there."""
    return model.head.tilted() if isinstance(model.head, KneserNeyHead) else contextlib.nullcontext()


def adaptable(model: LanguageModel) -> list[nn.Parameter]:
    """The parameters that a model learns with. Raises ConfigError if there are none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError(
            f"dynamic evaluation needs a model that learns by gradient, not {type(model).__name__}",
            "leave out dynamic, or use cache=unigram",
        )
    return parameters


def steps_for(
    model: LanguageModel,
    config: DynamicConfig,
    train_tokens: Tokens,
    eos_id: int,
    *,
    context: int | None,
    device: Device,
    progress: Callable[[int], None] | None = None,
) -> Steps:
    """The rates of a rule; for RMS after a pass over some of train. ``context``: window of a model without carried
    state; None: it carries its state."""
    parameters = adaptable(model)
    if not isinstance(config, DynamicRmsConfig):
        one = torch.ones((), device=device.torch_device)
        return Steps([config.lr * one] * len(parameters), [config.decay * one] * len(parameters))
    train_tokens = train_tokens[: config.statistics_tokens]
    squares = [torch.zeros_like(p) for p in parameters]
    number = done = 0
    with mode(model, training=False), torch.backends.cudnn.flags(enabled=False):
        for hidden_ND, targets_N, _ in _statistics_pieces(model, train_tokens, eos_id, config.seq_len, context, device):
            loss = model.head.loss(hidden_ND, targets_N) / len(targets_N)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for square, gradient in zip(squares, gradients, strict=True):
                if gradient is not None:
                    square.addcmul_(gradient, gradient)
            number, done = number + 1, done + len(targets_N)
            if progress is not None:
                progress(done)
    rms = [square.div_(max(number, 1)).sqrt_() for square in squares]
    mean = sum(float(r.mean()) for r in rms) / len(rms)
    return Steps(
        [config.lr / (r + config.epsilon) for r in rms],
        [(config.decay * r / max(mean, 1e-30)).clamp_(max=1.0) for r in rms],
    )


def _statistics_pieces(
    model: LanguageModel, tokens: Tokens, eos_id: int, seq_len: int, context: int | None, device: Device
) -> Iterator[tuple[Tensor, Tensor, Any]]:
    text = Text(tokens, model.vocab_size)
    if context is None:
        lanes = max(1, min(STATISTICS_TOKENS // seq_len, len(tokens) // 2))
        yield from _pieces(model, text, unbroken(Segments.stripes(len(tokens), lanes)), seq_len, device)
        return
    windows = sliding(Segments.whole(len(tokens), eos_id), context, context)
    for batch in batches(windows, max(1, STATISTICS_TOKENS // context)):
        yield from _pieces(model, text, batch, seq_len, device)


def _pieces(
    model: LanguageModel, text: Text, windows: Windows, seq_len: int, device: Device
) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """Hidden vectors with their graph, targets and positions of the scored tokens, piece by piece with carried state.

    A model that takes windows (with a context of its own) reads each at once.
    """
    state: Any = None
    piece = windows.longest if model.context is not None else seq_len
    for offset in range(0, windows.longest, piece):
        positions_BT = windows.begins_W[:, None] + np.arange(offset, min(offset + piece, windows.longest))
        wanted_BT = (positions_BT >= windows.scored_W[:, None]) & (positions_BT < windows.ends_W[:, None])
        with device.autocast():
            inputs_BT = text.inputs(positions_BT, windows).to(device.torch_device)
            hidden_BTD, state = model(inputs_BT, state, use_state=offset + piece < windows.longest)
        state = None if state is None else state.detach()
        positions_N = positions_BT[wanted_BT]
        if len(positions_N):
            hidden_ND = hidden_BTD[torch.from_numpy(wanted_BT).to(device.torch_device)]
            if hidden_ND.dtype.itemsize < 4:  # of autocast, which ends here
                hidden_ND = hidden_ND.float()
            yield hidden_ND, text.targets(positions_N).to(device.torch_device), positions_N


@torch.no_grad()
def _update(
    parameters: list[nn.Parameter], trained: list[Tensor], gradients: tuple[Tensor | None, ...], steps: Steps
) -> None:
    """In two passes over memory, which at a few tokens a step is what dynamic evaluation costs."""
    for p, start, gradient, lr, decay in zip(parameters, trained, gradients, steps.lr, steps.decay, strict=True):
        if gradient is not None:
            p.lerp_(start, decay).addcmul_(gradient, lr, value=-1)

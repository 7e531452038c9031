"""Averages of the weights over the steps: exponential, or uniform from some step on.

Sources: Polyak & Juditsky 1992; the ramp of the decay is that of TensorFlow's documentation. Izmailov et al. 2018
(SWA): they average once an epoch, ours after every step. Merity et al. 2018, algorithm 1 (NT-ASGD): they leave the
learning rate as it is, so take schedule=constant for theirs; ours averages under any schedule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lmkit.config.training import Average, TrainConfig


def build_average(config: TrainConfig, model: nn.Module) -> WeightAverage | None:
    """The average that ``config`` asks for; None: none."""
    if config.average is None and config.ema_decay is None:
        return None
    return WeightAverage(model, config.ema_decay)


def average_begins(config: TrainConfig, progress: float, valid_losses: Sequence[float]) -> bool:
    """Whether a uniform average starts with the next step, as a function of the share of the run that is done and of
    the validation losses so far, oldest first."""
    if config.average is Average.swa:
        return progress >= config.swa_start
    return config.average is Average.nt_asgd and is_nonmonotonic(valid_losses, config.asgd_patience)


def is_nonmonotonic(valid_losses: Sequence[float], patience: int) -> bool:
    """Whether some validation loss was above the lowest of those at least ``patience`` + 1 evaluations before it, the
    trigger of NT-ASGD."""
    return any(valid_losses[t] > min(valid_losses[: t - patience]) for t in range(patience + 1, len(valid_losses)))


class WeightAverage:
    """Keeps an average of a model's parameters beside it.

    With a decay, the one in use after update number n is min(decay, n / (n + 9)), so that the first steps do not
    linger. Without one it is the mean of the parameters after each update behind number ``since``, and until then, or
    while that is None, the parameters themselves.
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, num_updates: int, since: int | None = None) -> None:
        """Fold the current parameters in; ``num_updates`` counts from 1."""
        if self.decay is not None:
            weight = 1.0 - min(self.decay, num_updates / (num_updates + 9.0))
        else:
            weight = 1.0 if since is None else 1.0 / (num_updates - since)
        current = [p.detach() for _, p in model.named_parameters()]
        torch._foreach_lerp_(list(self.average.values()), current, weight)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Context in which the model's parameters are the average; the trained ones come back after it."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            kept = p.detach().clone()
            p.copy_(self.average[name])
            self.average[name] = kept

    def tensors(self) -> dict[str, Tensor]:
        """The averaged parameters by name."""
        return self.average

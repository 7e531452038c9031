"""Averages of the weights over the steps: exponential, or uniform from some step on.

Sources: Polyak & Juditsky 1992; the ramp of the decay is that of TensorFlow's documentation. Izmailov et al. 2018
(SWA): they average once an epoch, ours after every step. Merity et al. 2018, algorithm 1 (NT-ASGD): they leave the
learning rate as it is, so take schedule=constant for theirs; ours averages under any schedule.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lmkit.config.optimization import ConstantConfig, OptimizerConfig, ScheduleConfig, ScheduleFreeConfig
from lmkit.config.training import Average, TrainConfig
from lmkit.errors import ConfigError, ResourceError


def build_average(config: TrainConfig, model: nn.Module, optimizer: Optimizer) -> WeightAverage | None:
    """The average that ``config`` asks for, or that the optimizer makes; None: none."""
    if any("weight_sum" in group for group in optimizer.param_groups):
        return ScheduleFreeAverage(model, optimizer)
    if config.average is None and config.ema_decay is None:
        return None
    return WeightAverage(model, config.ema_decay)


def check_schedule_free(optimizer: OptimizerConfig, schedule: ScheduleConfig, train: TrainConfig) -> None:
    """Raise ConfigError for what does not go with the average that schedule-free training is made of, and ResourceError
    if its package is missing; call it before any work."""
    if not isinstance(optimizer, ScheduleFreeConfig):
        return
    if importlib.util.find_spec("schedulefree") is None:
        raise ResourceError(
            "optimizer=schedule_free needs the package schedulefree, which is not installed",
            "pip install 'lmkit[schedule-free]'",
        )
    if not isinstance(schedule, ConstantConfig):
        raise ConfigError("optimizer=schedule_free goes with a constant learning rate", "add schedule=constant")
    if train.average is not None or train.ema_decay is not None:
        raise ConfigError(
            "optimizer=schedule_free makes an average of its own", "leave out train.average and train.ema_decay"
        )


def average_begins(config: TrainConfig, progress: float, valid_losses: Sequence[Sequence[float]]) -> bool:
    """Whether a uniform average starts with the next step, as a function of the share of the run that is done and of
    the validation losses so far, oldest first, apart by the data they are of."""
    if config.average is Average.swa:
        return progress >= config.swa_start
    patience = config.asgd_patience
    return config.average is Average.nt_asgd and any(is_nonmonotonic(losses, patience) for losses in valid_losses)


def is_nonmonotonic(valid_losses: Sequence[float], patience: int) -> bool:
    """Whether some validation loss was above the lowest of those at least ``patience`` + 1 evaluations before it, the
    trigger of NT-ASGD."""
    lowest = accumulate(valid_losses, min)
    return any(loss > low for loss, low in zip(valid_losses[patience + 1 :], lowest, strict=False))


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

    def restarted(self, model: nn.Module) -> WeightAverage:
        """A new one that begins with the model's parameters."""
        return WeightAverage(model, self.decay)

    def tensors(self) -> dict[str, Tensor]:
        """The averaged parameters by name."""
        return self.average


class ScheduleFreeAverage(WeightAverage):
    """The average x that schedule-free training keeps (Defazio et al. 2024, eq. 3 to 5).

    The model holds y = (1 - beta1) z + beta1 x, where gradients are taken; the optimizer holds z: x follows.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(model, None)
        self.model, self.optimizer = model, optimizer
        self.average = {}

    def update(self, model: nn.Module, num_updates: int, since: int | None = None) -> None:
        """Nothing to do: the optimizer's step has moved the average."""

    def restarted(self, model: nn.Module) -> WeightAverage:
        """Itself: all it is made of lies elsewhere."""
        return self

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Context in which the model's parameters are the average; the trained ones come back after it."""
        self.average = self.tensors()
        try:
            with super().applied(model):
                yield
        finally:
            self.average = {}

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The averaged parameters by name, new tensors; those without an update so far are as they are."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                slots = self.optimizer.state.get(p, {})
                if "z" in slots:
                    average[names[id(p)]].lerp_(slots["z"], 1.0 - 1.0 / group["betas"][0])
        return average

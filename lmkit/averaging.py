"""Exponential moving average of the weights (Polyak & Juditsky 1992; decay ramp as in TensorFlow's documentation)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class WeightAverage:
    """Keeps an average of a model's parameters beside it.

    After update number n the decay in use is min(decay, n / (n + 9)), so that the first steps do not linger.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, num_updates: int) -> None:
        """Fold the current parameters in; ``num_updates`` counts from 1."""
        weight = 1.0 - min(self.decay, num_updates / (num_updates + 9.0))
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

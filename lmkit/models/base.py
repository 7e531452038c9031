"""What every language model is: tokens in, hidden vectors and a state out, and a separate head that scores them.

Shape letters, used as suffixes of tensor names everywhere: B batch, T time, S cached time, V vocabulary, D model width,
F feed-forward width, H query heads, K key/value heads, C head channels, L layers, N = B x T flattened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmkit.rng import derive_key

IGNORE = -100
"""Target id of a position that is not scored."""


class State(ABC):
    """What a model remembers of the tokens it has read: a key/value cache, (h, c), the last n-1 tokens."""

    undropped_BTD: Tensor | None = None
    """In training, the hidden vectors before the model's last dropout where there is one; is not carried on."""

    @abstractmethod
    def detach(self) -> State:
        """The same state cut from the graph (truncated backpropagation through time)."""

    @abstractmethod
    def select(self, rows: Tensor) -> State:
        """The state of the given batch rows (int64 indices, repeats allowed), as a copy."""

    def tensors(self) -> dict[str, Tensor]:
        """A state that training carries from step to step, as named tensors for a checkpoint."""
        raise TypeError(f"{type(self).__name__} is not carried from step to step")


@dataclass(frozen=True)
class Scores:
    """Result of scoring N targets under the softmax; ignored targets have 0 nats and are never correct."""

    nats_N: Tensor
    """float32, negative log-likelihood of each target in nats."""
    correct_N: Tensor
    """bool, whether the target is the most probable token."""


class Head(nn.Module, ABC):
    """Turns hidden vectors into a distribution over the vocabulary without ever holding N x V values at once."""

    @abstractmethod
    def loss(self, hidden_ND: Tensor, targets_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
        """Summed negative log-likelihood (nats, scalar, differentiable) of the targets that are not IGNORE.

        weights_N: float32 factors of the targets, without a gradient; None: all 1.
        """

    @abstractmethod
    def score(self, hidden_ND: Tensor, targets_N: Tensor) -> Scores:
        """Each target's negative log-likelihood and whether it is the argmax; no gradient."""

    def row_nats(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """(B,) float64 on the CPU (Apple's GPU has none): nats of the targets of each row, as ``score`` has them."""
        nats_N = self.score(hidden_BTD.flatten(0, 1), targets_BT.reshape(-1)).nats_N
        return nats_N.view(targets_BT.shape).cpu().double().sum(1)

    @abstractmethod
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """(N, V) float32 logits; for few positions, as in decoding. A softmax over them gives the distribution."""


class LanguageModel(nn.Module, ABC):
    """A causal language model: hidden[t] depends on tokens[0..t] and on the state only."""

    vocab_size: int
    context: int | None
    """Longest sequence, cached tokens included, that one forward pass can attend over; None if unbounded."""
    receptive_field: int | None = None
    """Number of last tokens that a hidden vector depends on; None: all that were read."""
    head: Head

    @abstractmethod
    def forward(self, tokens_BT: Tensor, state: Any = None, *, use_state: bool = False) -> tuple[Tensor, Any]:
        """Return (hidden_BTD, state).

        tokens_BT: int64. state: what an earlier call returned, or None at the start of a text. The new state is
        returned if ``use_state`` is true or a state was given, else None; models with carried state always return it.
        Running a text in pieces with the state gives the same hidden vectors as running it at once.
        """

    def state_from_tensors(self, tensors: dict[str, Tensor]) -> State:
        """The inverse of State.tensors, for models with carried state."""
        raise TypeError(f"{type(self).__name__} carries no state from step to step")

    def num_parameters(self) -> int:
        """Number of distinct trainable parameters (tied ones count once)."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator keyed by (seed, name), so that each parameter's initial value depends on nothing else."""
    return torch.Generator().manual_seed(derive_key(seed, "init", name))

"""Low-rank adapters: small trained matrices beside frozen linear layers, which can be merged into them.

Sources: Hu et al. 2021 (LoRA), Kalajdzievski 2023 ("A rank stabilization scaling factor for fine-tuning with LoRA"),
Liu et al. 2024 (DoRA). Names of the tensors are those of the ``peft`` library behind its prefix, and what they compute
is the same.

More shape letters: I and O widths of a layer's input and output, R rank of its adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmkit.config.adapter import AdapterConfig
from lmkit.errors import ConfigError
from lmkit.models.base import seeded_generator
from lmkit.models.dropout import Dropout

PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
"""Names of an adapter's tensors inside its layer."""


class AdaptedLinear(nn.Module):
    """A frozen linear layer W, b and its adapter: y = W x + b + s B A dropout(x).

    With DoRA the rows of W' = W + s B A are rescaled to the trained norms m: y = g (W x + s B A dropout(x)) + b, where
    g = m / ||W'|| row by row, and ||W'|| counts as a constant in the gradient (section 4.3 there). s = alpha / R, or
    alpha / sqrt(R) for rsLoRA. A starts as in nn.Linear, B at 0 and m at the norms of W, so that at first y = W x + b
    to the last bit. Under autocast the products run in its dtype.
    """

    def __init__(self, layer: nn.Linear, config: AdapterConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = nn.Linear(layer.in_features, config.rank, bias=False, device="meta").to_empty(device="cpu")
        self.lora_B = nn.Linear(config.rank, layer.out_features, bias=False, device="meta").to_empty(device="cpu")
        bound = 1 / math.sqrt(layer.in_features)
        with torch.no_grad():
            self.lora_A.weight.uniform_(-bound, bound, generator=generator)
            self.lora_B.weight.zero_()
        self.lora_A.to(layer.weight)
        self.lora_B.to(layer.weight)
        self.dropout = Dropout(config.dropout)
        self.scaling = config.alpha / (math.sqrt(config.rank) if config.use_rslora else config.rank)
        self.lora_magnitude_vector = nn.Parameter(self._norms_O().clone()) if config.use_dora else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        plain = F.linear(x, self.weight, self.bias)
        added: Tensor = self.lora_B(self.lora_A(self.dropout(x))) * self.scaling
        if self.lora_magnitude_vector is None:
            lora: Tensor = plain + added
            return lora
        gain_O = self.lora_magnitude_vector / self._norms_O()
        without_bias = plain if self.bias is None else plain - self.bias
        dora: Tensor = plain + (gain_O - 1) * without_bias + gain_O * added
        return dora

    @torch.no_grad()
    def _norms_O(self) -> Tensor:
        """Norm of each row of W + s B A; of one of zeros, which has no direction, the least number that divides."""
        norms_O: Tensor = torch.linalg.vector_norm(self._sum_OI(), dim=1)
        return norms_O.clamp_(min=torch.finfo(norms_O.dtype).tiny)

    def _sum_OI(self) -> Tensor:
        sum_OI: Tensor = self.weight + self.scaling * (self.lora_B.weight @ self.lora_A.weight)
        return sum_OI

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One linear layer that computes the same in evaluation, up to rounding."""
        weight_OI = self._sum_OI()
        if self.lora_magnitude_vector is not None:
            weight_OI = weight_OI * (self.lora_magnitude_vector / self._norms_O())[:, None]
        layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight_OI)
        layer.bias = self.bias
        return layer


def add_adapter(model: nn.Module, config: AdapterConfig, *, seed: int) -> None:
    """Freeze a model and put adapters beside the linear layers that ``config.targets`` names.

    Raises ConfigError, before anything is changed, for a pattern that matches none.
    """
    layers = layers_to_adapt(model, config)
    model.requires_grad_(False)
    for name, layer in layers.items():
        adapted = AdaptedLinear(layer, config, seeded_generator(seed, f"adapter/{name}"))
        _replace(model, name, adapted.train(model.training))


def layers_to_adapt(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Linear]:
    """The linear layers that ``config.targets`` names. Raises ConfigError for a pattern that matches none."""
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    return {name: layers[name] for name in targeted(list(layers), config.targets)}


def targeted(names: list[str], patterns: list[str]) -> list[str]:
    """The names, in their order, that a pattern matches as a whole or from one of their dots on."""
    found = {pattern: [name for name in names if _matches(name, pattern)] for pattern in patterns}
    if unmatched := [pattern for pattern, matched in found.items() if not matched]:
        kinds = dict.fromkeys(".".join("*" if part.isdecimal() else part for part in n.split(".")) for n in names)
        raise ConfigError(
            f"adapter.targets={','.join(unmatched)} matches no linear layer of the model",
            f"it has {', '.join(kinds)}" if kinds else "it has none: leave out adapter, or set tune.last_layers",
        )
    chosen = {name for matched in found.values() for name in matched}
    return [name for name in names if name in chosen]


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[start:]), pattern) for start in range(len(parts)))


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Every adapted layer of a model, with its name."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


def adapter_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a model's weights that belongs to adapters."""
    return {name: tensor for name, tensor in weights.items() if name.endswith(PARTS)}


def merge_adapter(model: nn.Module) -> None:
    """Put a plain linear layer in the place of each adapted one; all parameters are trainable again."""
    for name, layer in list(adapted_layers(model)):
        _replace(model, name, layer.merged())
    model.requires_grad_(True)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)

"""Which parameters of a model are trained, when, and how fast, by their depth.

The depth of a parameter is 0 for embeddings (tied ones too), l + 1 for layer l, and one more than that of the last
layer for whatever lies above: the final norm, the head, the head of a task.
"""

from __future__ import annotations

from torch import nn

from lmkit.config.adapter import AdapterConfig, TuneConfig
from lmkit.errors import ConfigError
from lmkit.lora import add_adapter
from lmkit.models.base import LanguageModel

LAYERS = ("blocks", "layers")
"""What the families call their lists of layers."""
EMBEDDINGS = ("embedding", "positions")


def language_model_in(model: nn.Module) -> tuple[str, LanguageModel] | None:
    """The language model that a task's model is or holds, and the prefix of its parameters' names."""
    for name, module in model.named_modules():
        if isinstance(module, LanguageModel):
            return f"{name}." if name else "", module
    return None


def choose_trainable(model: nn.Module, adapter: AdapterConfig | None, tune: TuneConfig, *, seed: int) -> None:
    """Freeze what is not to be trained, and add the adapters. What a task adds to a language model is always trained.

    Raises ConfigError for what the model has not, and where nothing would be left to train.
    """
    found = language_model_in(model)
    if adapter is not None:
        if found is None:
            raise ConfigError("adapter needs a language model to adapt", "leave out adapter")
        if tune.last_layers is not None:
            raise ConfigError(
                f"tune.last_layers={tune.last_layers} cannot be combined with adapter",
                "name the layers in adapter.targets, as in blocks.3.*",
            )
        add_adapter(found[1], adapter, seed=seed)
    if tune.last_layers is None:
        return
    depths, num_layers = depths_of(model), 0 if found is None else num_layers_of(found[1])
    if tune.last_layers > num_layers:
        raise ConfigError(f"tune.last_layers={tune.last_layers} is more than the model's {num_layers} layers")
    for name, p in model.named_parameters():
        p.requires_grad_(depths[name] > num_layers - tune.last_layers)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"tune.last_layers={tune.last_layers} leaves nothing to train", "raise it")


def depths_of(model: nn.Module) -> dict[str, int]:
    """Depth of each parameter by name; the same for all of a model without a language model inside."""
    found = language_model_in(model)
    if found is None:
        return {name: 1 for name, _ in model.named_parameters()}
    prefix, language_model = found
    num_layers = num_layers_of(language_model)
    return {name: _depth(name, prefix, num_layers) for name, _ in model.named_parameters()}


def num_layers_of(model: LanguageModel) -> int:
    """Layers of a language model."""
    lists = (child for name, child in model.named_children() if name in LAYERS)
    return sum(len(child) for child in lists if isinstance(child, nn.ModuleList))


def _depth(name: str, prefix: str, num_layers: int) -> int:
    if not name.startswith(prefix):
        return num_layers + 1
    first, _, rest = name.removeprefix(prefix).partition(".")
    if first in EMBEDDINGS:
        return 0
    return int(rest.partition(".")[0]) + 1 if first in LAYERS else num_layers + 1


def lr_factors(model: nn.Module, tune: TuneConfig) -> dict[str, float]:
    """What the peak learning rate of each parameter is multiplied by, where it is not 1.

    layer_decay to the number of layers between a parameter and the top (Clark et al. 2020, ELECTRA, appendix B).
    """
    depths = depths_of(model)
    top = max(depths.values(), default=0)
    return {name: tune.layer_decay ** (top - d) for name, d in depths.items() if tune.layer_decay < 1 and d < top}


def unfreezing(model: nn.Module, tune: TuneConfig) -> dict[str, float]:
    """The share of the run (0 to 1) from which on each trained parameter learns, where that is not its start.

    With k depths among them, the i-th from the top begins at (i - 1) / k.
    """
    if not tune.unfreeze:
        return {}
    depths = depths_of(model)
    trained = {name: depths[name] for name, p in model.named_parameters() if p.requires_grad}
    order = sorted(set(trained.values()), reverse=True)
    return {name: order.index(d) / len(order) for name, d in trained.items() if d < order[0]}

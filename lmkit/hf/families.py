"""The families of Hugging Face models that lmkit's Transformer can be, as tables that are read in both directions.

A family maps ``config.json`` to a TransformerConfig and back, and its tensors to the Transformer's parameters and back.
What a family has and the Transformer lacks, or the other way round, is refused by name: nothing is read as something
that it is not. Keys of ``config.json`` that nobody reads must be known to be harmless, or unset.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmkit.config.model import TransformerConfig
from lmkit.errors import ConfigError
from lmkit.hf.family import Family, settings
from lmkit.hf.gpt import GPTS
from lmkit.hf.llama import LLAMAS

FAMILIES: dict[str, Family] = {family.name: family for family in (*GPTS, *LLAMAS)}
"""``model_type`` -> family; an export takes the first that can express the model."""


def family_for(config: TransformerConfig, names: Sequence[str] = tuple(FAMILIES)) -> Family:
    """The first of the named families that computes what this model does. Raises ConfigError naming what none has."""
    own = settings(config, num_softmaxes=1, cutoffs=([],), memory_tokens=0)
    misses = {name: own + FAMILIES[name].lacks(config) for name in names}
    for name, lacking in misses.items():
        if not lacking:
            return FAMILIES[name]
    least = min(map(len, misses.values()))
    nearest = [f"{name} has no {' and no '.join(found)}" for name, found in misses.items() if len(found) == least]
    raise ConfigError(
        f"no stock architecture computes this model: {', '.join(nearest)}", "use format=safetensors or format=onnx"
    )

"""What a family of Hugging Face models is: a table between its files and lmkit's Transformer, read both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lmkit.config.model import Activation, TransformerConfig
from lmkit.config.text import format_value
from lmkit.hf.keys import Keys

ACTIVATIONS = {
    Activation.silu: ("silu", "swish"),
    Activation.gelu: ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    Activation.relu: ("relu",),
    Activation.tanh: ("tanh",),
    Activation.sigmoid: ("sigmoid",),
}
"""lmkit's activation -> its names there, the one to write first. Their ``gelu`` is the exact one, ours is not."""

NO = (None, False)


@dataclass(frozen=True)
class Row:
    """One parameter: its name here and there. Several names there are stacked, in this order, along the rows."""

    ours: str
    theirs: tuple[str, ...]
    how: str = "same"
    """``same``; ``transposed`` (their Conv1D is (in, out)); ``minus_one`` (a norm that multiplies by 1 + weight)."""


@dataclass(frozen=True)
class Family:
    """One ``model_type``."""

    name: str
    """``model_type`` in config.json."""
    architecture: str
    """The class that AutoModelForCausalLM chooses."""
    prefix: str
    """What the names of the model's tensors begin with, which a file may leave out."""
    read: Callable[[Keys], TransformerConfig]
    write: Callable[[TransformerConfig], dict[str, Any]]
    lacks: Callable[[TransformerConfig], list[str]]
    """The settings of a Transformer that the family cannot express; [] if it can."""
    rows: Callable[[TransformerConfig], Iterator[Row]]
    learned_positions: str | None = None
    """The tensor of learned positions, which sinusoids can be written into."""
    ignored: tuple[str, ...] = ()
    """Endings of tensors that are computed and not read."""


def settings(config: TransformerConfig, **wanted: Any) -> list[str]:
    """``model.key=value`` for each setting that is not the one wanted (one value, or a tuple of them)."""
    found = []
    for key, value in wanted.items():
        has = getattr(config, key)
        allowed = value if isinstance(value, tuple) else (value,)
        if has not in allowed:
            found.append(f"model.{key}={format_value(has)}")
    return found


def read_activation(keys: Keys, name: str, default: str) -> Activation:
    """The activation under a key. Raises ConfigError for one that lmkit does not have."""
    text = keys.text(name, default)
    found = next((kind for kind, names in ACTIVATIONS.items() if text in names), None)
    if found is None:
        keys.refuse(name, text, f"lmkit has {', '.join(names[0] for names in ACTIVATIONS.values())}")
    return found

"""Reading a ``config.json`` key by key, so that what was not read can be refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lmkit.errors import ConfigError, DataError
from lmkit.tokenizers.base import one_line

MAX_BYTES = 1 << 24

HARMLESS = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "is_llama_config",
    "initializer_range", "label2id", "model_type", "pad_token_id", "problem_type", "return_dict",
    "task_specific_params", "torch_dtype", "transformers.js_config", "transformers_version", "unk_token_id",
    "use_cache", "vocab_size",
    "tokenizer_class", "output_past", "_num_labels", "gradient_checkpointing", "_attn_implementation_autoset",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "num_labels", "is_decoder", "n_special",
}  # fmt: skip
"""Keys that say nothing about what the model computes."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DataError that names the file."""
    try:
        if not path.is_file():
            raise DataError(f"{path} is missing", "name a folder with config.json, *.safetensors and tokenizer.json")
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} is too large for a JSON file of a model")
        data = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({one_line(error)})") from None
    if not isinstance(data, dict):
        raise DataError(f"{path} is damaged (it holds no object)")
    return data


class Keys:
    """The keys of one ``config.json``. Each read is checked and remembered; ``finish`` refuses the rest."""

    def __init__(self, data: Mapping[str, Any], path: Path) -> None:
        self.data, self.path = dict(data), path
        self._read: set[str] = set()
        self.zeros: tuple[str, ...] = ()
        """Endings of the Transformer's biases that the family does not have here, so that they are zeros."""

    def refuse(self, name: str, value: object, why: str) -> NoReturn:
        """Raises ConfigError about a value that lmkit's Transformer cannot express."""
        raise ConfigError(f"{self.path}: {name}={json.dumps(value)[:200]} cannot be imported: {why}")

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number >= 1. Raises DataError for anything else, as the others do, and for a key that is lacking."""
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 40:
            raise DataError(f"{self.path}: {name}={json.dumps(value)[:100]} must be a whole number >= 1")
        return value

    def optional_whole(self, name: str, default: int | None = None) -> int | None:
        """The same, or None where the key is null or not there."""
        if self.data.get(name, default) is None:
            self._read.add(name)
            return None
        return self.whole(name, default)

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        value = self._value(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
            raise DataError(f"{self.path}: {name}={json.dumps(value)[:100]} must be a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise DataError(f"{self.path}: {name}={json.dumps(value)[:100]} must be true or false")
        return value

    def text(self, name: str, default: str) -> str:
        """A text."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise DataError(f"{self.path}: {name}={json.dumps(value)[:100]} must be a text")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of texts, empty where there is none."""
        value = self._value(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise DataError(f"{self.path}: {name}={json.dumps(value)[:100]} must be a list of texts")
        return value

    def only(self, name: str, value: bool) -> None:
        """Refuse any other value of a key; null and absent stand for the one that is allowed."""
        self._read.add(name)
        found = self.data.get(name)
        if found is not None and found is not value:
            self.refuse(name, found, f"lmkit has only {json.dumps(value)}")

    def skip(self, *names: str) -> None:
        """Keys of the family that change nothing when the model is not trained further there."""
        self._read.update(names)

    def rope_theta(self) -> float:
        """Base of plain rotary positions, wherever the version of the file has it; any scaling of them is refused."""
        theta = self.number("rope_theta", 10000.0)
        for name in ("rope_scaling", "rope_parameters"):
            options = self._value(name, None)
            if options is None:
                continue
            if not isinstance(options, dict):
                raise DataError(f"{self.path}: {name} must be an object")
            kind = options.get("rope_type", options.get("type", "default"))
            rest = {key: value for key, value in options.items() if key not in ("rope_type", "type", "rope_theta")}
            if kind != "default" or any(value not in (None, 1, 1.0) for value in rest.values()):
                self.refuse(name, options, "lmkit has rotary positions without scaling")
            given = options.get("rope_theta", theta)
            if not isinstance(given, int | float) or isinstance(given, bool):
                raise DataError(f"{self.path}: {name}.rope_theta must be a number")
            if "rope_theta" in self.data and given != theta:
                self.refuse(name, options, f"it contradicts rope_theta={theta}")
            theta = float(given)
        return theta

    def finish(self) -> None:
        """Raises ConfigError naming every key that is set, was not read, and is not known to be harmless."""
        left = sorted(set(self.data) - self._read - HARMLESS)
        left = [name for name in left if self.data[name] not in (None, False, [], {})]
        if left:
            raise ConfigError(
                f"{self.path} has {', '.join(f'{name}={json.dumps(self.data[name])[:60]}' for name in left)}, which "
                "may change what the model computes and which lmkit does not know"
            )

    def _value(self, name: str, default: Any) -> Any:
        self._read.add(name)
        value = self.data.get(name)
        if value is None:
            value = default
        if value is None and name not in ("rope_scaling", "rope_parameters"):
            raise DataError(f"{self.path} lacks {name}")
        return value

"""Hugging Face folders in: config.json, safetensors and tokenizer.json become a configuration, weights, a tokenizer."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from lmkit.config.model import TransformerConfig
from lmkit.errors import ConfigError, DataError
from lmkit.hf.families import FAMILIES
from lmkit.hf.family import Family
from lmkit.hf.keys import Keys, read_json
from lmkit.hf.weights import read_weights, to_ours
from lmkit.models.transformer import Transformer
from lmkit.tokenizers import ByteTokenizer, Tokenizer
from lmkit.tokenizers.base import one_line
from lmkit.tokenizers.convert import read_hf_tokenizer

CONFIG = "config.json"


@dataclass(frozen=True)
class ImportedModel:
    """A model of another library as one of lmkit's."""

    family: str
    """Its ``model_type``."""
    model_config: TransformerConfig
    state_dict: dict[str, Tensor]
    """fp32; fits ``Transformer(model_config, vocab_size)`` exactly."""
    vocab_size: int
    tokenizer: Tokenizer
    """With ``vocab_size`` ids; its end of document is what the first token is conditioned on."""

    def build(self, *, seed: int = 0) -> Transformer:
        """The model itself, in evaluation mode."""
        model = Transformer(self.model_config, self.vocab_size, seed=seed)
        model.load_state_dict(self.state_dict)
        return model.eval()


def import_hf(folder: Path) -> ImportedModel:
    """Read a folder that ``save_pretrained`` or ``lmkit export format=hf`` wrote.

    The context is what config.json allows, or the sliding window where that is shorter: up to its length attention
    through a window is plain attention. Raises ConfigError naming every option of the model that lmkit lacks, and
    DataError for files that are missing, damaged, or do not fit together.
    """
    model = read_model(folder)
    return replace(model, tokenizer=read_hf_tokenizer(folder, model.vocab_size))


def read_model(folder: Path) -> ImportedModel:
    """The model alone, with the bytes for a tokenizer."""
    family, config, vocab_size, zeros = _read_config(folder)
    state = _read_state(folder, family, config, vocab_size, zeros)
    return ImportedModel(family.name, config, state, vocab_size, ByteTokenizer())


def _read_config(folder: Path) -> tuple[Family, TransformerConfig, int, tuple[str, ...]]:
    """What config.json describes: family, configuration, number of types, biases that are zeros."""
    path = folder / CONFIG
    keys = Keys(read_json(path), path)
    name = keys.text("model_type", "?")
    if name not in FAMILIES:
        raise ConfigError(f"{path}: model_type={name} cannot be imported", f"lmkit reads {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[name]
    vocab_size = keys.whole("vocab_size")
    try:
        config = family.read(keys)
        config.__post_init__()  # of the values that the family set afterwards
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(str(path)) else f"{path} describes no Transformer: {text}") from None
    keys.finish()
    return family, config, vocab_size, keys.zeros


def _read_state(
    folder: Path, family: Family, config: TransformerConfig, vocab_size: int, zeros: tuple[str, ...]
) -> dict[str, Tensor]:
    """The weights of a folder. Raises DataError if they do not fit the configuration."""
    try:
        state = to_ours(family, config, read_weights(folder, family), zeros)
    except DataError as error:
        raise DataError(f"{folder}: {error.problem}", error.remedy) from None
    if len(state["embedding.weight"]) != vocab_size:
        raise DataError(
            f"{folder}: config.json says vocab_size={vocab_size}, the weights {len(state['embedding.weight'])}"
        )
    return state


def resolve_hf(name_or_dir: str) -> Path:
    """A local folder, or the snapshot of a model on the hub, which is downloaded once and then found in its cache.

    Raises DataError if there is no such model or it cannot be reached.
    """
    path = Path(os.path.expanduser(name_or_dir))
    if name_or_dir and os.path.isdir(path):
        return path.resolve()
    if not name_or_dir or name_or_dir.count("/") > 1 or name_or_dir.startswith((".", "/", "~")) or "\\" in name_or_dir:
        raise DataError(f"{name_or_dir or 'hf:'} is not a folder", "name a folder, or a model of the hub as OWNER/NAME")
    from huggingface_hub import snapshot_download

    wanted = [CONFIG, "*.safetensors", "*.safetensors.index.json", "tokenizer.json"]
    try:
        return Path(snapshot_download(name_or_dir, allow_patterns=wanted))
    except Exception as error:  # the library has a dozen of its own, besides those of its network stack
        raise DataError(
            f"the model {name_or_dir} is neither a folder nor can it be had from the hub ({one_line(error)})",
            "check the name and the network, or download the folder and name that",
        ) from None

"""A run that an older lmkit stored resumes where a newer one has more fields, and only there."""

from __future__ import annotations

from typing import Any

import pytest

from lmkit.commands.pretrain import with_head
from lmkit.commands.resuming import check_resumable
from lmkit.config.commands import PretrainConfig
from lmkit.config.data import ByteTokenizerConfig, PydocsConfig
from lmkit.config.model import ModelConfig, NgramConfig, RecurrentConfig, TransformerConfig
from lmkit.config.optimization import AdamwConfig, CosineConfig
from lmkit.config.plain import to_plain, with_defaults
from lmkit.config.softmax import AdaptiveSoftmaxConfig, SoftmaxConfig
from lmkit.config.training import TrainConfig
from lmkit.errors import ConfigError


def stored(model: ModelConfig) -> dict[str, Any]:
    config = PretrainConfig(
        dataset=PydocsConfig(),
        tokenizer=ByteTokenizerConfig(),
        model=model,
        optimizer=AdamwConfig(),
        schedule=CosineConfig(),
        train=TrainConfig(),
    )
    return {"command": "pretrain", "vocab_size": 257, **to_plain(config)}


def without(config: dict[str, Any], **keys: list[str]) -> dict[str, Any]:
    return {
        name: {k: v for k, v in value.items() if k not in keys[name]} if name in keys else value
        for name, value in config.items()
    }


def test_fields_that_were_not_known_yet_are_at_their_defaults() -> None:
    now = stored(RecurrentConfig())
    before = without(now, model=["num_softmaxes", "cutoffs"], train=["shuffle", "average"], softmax=["tar_beta"])
    del before["logger"]
    with pytest.raises(ConfigError, match=r"model.num_softmaxes: null -> 1"):  # unless they are filled in
        check_resumable(before, now)
    assert with_defaults(before) == now
    assert check_resumable(with_defaults(before), now) == []


def test_an_older_run_does_not_resume_as_something_that_it_was_not() -> None:
    before = without(stored(RecurrentConfig()), model=["num_softmaxes"], train=["seq_len_jitter"])
    now = stored(RecurrentConfig(num_softmaxes=3))
    now["train"]["seq_len_jitter"] = True
    with pytest.raises(ConfigError, match=r"model\.num_softmaxes: 1 -> 3, train\.seq_len_jitter: false -> true"):
        check_resumable(with_defaults(before), now)


def test_an_adaptive_softmax_gives_the_model_its_head_once_and_for_all() -> None:
    model, softmax = TransformerConfig(tie_embeddings=False), AdaptiveSoftmaxConfig(div_value=2.0)
    given = with_head(model, softmax, 10_000)
    assert isinstance(given, TransformerConfig)
    assert (given.cutoffs, given.div_value) == ([800, 2500], 2.0)
    assert with_head(given, softmax, 10_000) == given
    assert with_head(model, SoftmaxConfig(), 10_000) is model


def test_an_adaptive_softmax_is_refused_where_it_has_no_place() -> None:
    with pytest.raises(ConfigError, match="tie_embeddings=true must be false with softmax=adaptive"):
        with_head(TransformerConfig(), AdaptiveSoftmaxConfig(), 10_000)
    with pytest.raises(ConfigError, match="softmax=adaptive cannot train model=ngram"):
        with_head(NgramConfig(), AdaptiveSoftmaxConfig(), 10_000)

"""A run that is stopped and resumed ends with the same bytes as one that was not."""

from __future__ import annotations

import gc
import importlib.util
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stopping import assert_same, signal_after, tensors_in

from lmkit.commands import pretrain, training
from lmkit.config.commands import PretrainConfig
from lmkit.config.model import ModelConfig, RecurrentConfig, TransformerConfig
from lmkit.config.optimization import (
    AdadeltaConfig,
    AdagradConfig,
    AdamConfig,
    ConstantConfig,
    MuonConfig,
    NadamConfig,
    OptimizerConfig,
    PlateauConfig,
    RmspropConfig,
    ScheduleFreeConfig,
    SgdConfig,
)
from lmkit.config.softmax import AdaptiveSoftmaxConfig, SampledSoftmaxConfig, SoftmaxConfig
from lmkit.config.training import Average, EvalConfig, Shuffle
from lmkit.errors import ConfigError, StoppedError
from lmkit.session import Session
from lmkit.store.checkpoint import latest_checkpoint, load_checkpoint
from lmkit.store.found import read_metrics

MakeConfig = Callable[..., PretrainConfig]
TRANSFORMER = TransformerConfig(d_model=32, num_layers=2, num_heads=2, context=32, dropout=0.1)
LSTM = RecurrentConfig(d_embed=24, d_hidden=32, num_layers=2, dropout_recurrent=0.2, dropout_embed=0.1)


def check_stop_and_resume(
    config: PretrainConfig, resumed: PretrainConfig, monkeypatch: pytest.MonkeyPatch, step: int = 5
) -> None:
    """Run ``config`` whole, ``resumed`` with a stop after a step, and compare every tensor bit for bit."""
    pretrain.run(config)
    with monkeypatch.context() as patch:
        signal_after(patch, step)
        with pytest.raises(StoppedError, match="resume=true") as stopped:
            pretrain.run(resumed)
    assert stopped.value.exit_code == 75
    pretrain.run(replace(resumed, resume=True))
    assert config.run.dir is not None
    assert resumed.run.dir is not None
    assert_same(tensors_in(Path(config.run.dir), 12), tensors_in(Path(resumed.run.dir), 12))


@pytest.mark.parametrize("model", [TRANSFORMER, LSTM], ids=["transformer", "lstm"])
@pytest.mark.parametrize(
    "train",
    [{}, {"micro_batch_size": 2}, {"ema_decay": 0.9}, {"average": Average.swa, "swa_start": 0.25}],
    ids=["plain", "accumulation", "ema", "swa"],
)
def test_a_stopped_run_resumes_bit_for_bit(
    model: ModelConfig, train: dict[str, object], config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_stop_and_resume(config(model, **train), config(model, run="other", **train), monkeypatch)


@pytest.mark.parametrize(
    "optimizer",
    [
        SgdConfig(momentum=0.9),
        AdagradConfig(),
        AdadeltaConfig(),
        RmspropConfig(),
        AdamConfig(),
        NadamConfig(),
        MuonConfig(),
    ],
    ids=lambda o: type(o).__name__,
)
def test_every_optimizer_resumes_bit_for_bit(
    optimizer: OptimizerConfig, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (replace(config(run=name), optimizer=optimizer) for name in ("run", "other"))
    check_stop_and_resume(first, second, monkeypatch)


@pytest.mark.extra("schedule-free")
@pytest.mark.skipif(importlib.util.find_spec("schedulefree") is None, reason="needs schedulefree")
def test_schedule_free_training_resumes_bit_for_bit(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (
        replace(config(run=name), optimizer=ScheduleFreeConfig(), schedule=ConstantConfig())
        for name in ("run", "other")
    )
    check_stop_and_resume(first, second, monkeypatch)


@pytest.mark.parametrize(
    ("model", "softmax"),
    [
        (replace(TRANSFORMER, num_softmaxes=3), SoftmaxConfig()),
        (replace(LSTM, tie_embeddings=False), AdaptiveSoftmaxConfig()),
        (replace(TRANSFORMER, memory_tokens=8), SoftmaxConfig()),
        (replace(LSTM, mogrifier_rounds=3, mogrifier_rank=4), SoftmaxConfig()),
        (replace(LSTM, dropout_output=0.4), SoftmaxConfig(label_smoothing=0.1, ar_alpha=2.0, tar_beta=1.0)),
        (replace(TRANSFORMER, dropout_embed=0.1, dropout_locked=True, drop_path=0.2), SoftmaxConfig(tar_beta=1.0)),
    ],
    ids=["mixture", "adaptive", "memory", "mogrifier", "ar_tar", "dropouts"],
)
def test_every_output_layer_and_regulariser_resumes_bit_for_bit(
    model: ModelConfig, softmax: SoftmaxConfig, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (replace(config(model, run=name), softmax=softmax) for name in ("run", "other"))
    check_stop_and_resume(first, second, monkeypatch)


@pytest.mark.parametrize("shuffle", [Shuffle.blocks, Shuffle.documents])
def test_shuffled_lanes_of_drawn_lengths_resume_bit_for_bit(
    shuffle: Shuffle, config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train = {"shuffle": shuffle, "seq_len_jitter": True, "batch_size": 64, "workers": 2}
    first, second = (
        replace(config(LSTM, run=name, **train), schedule=ConstantConfig(warmup_steps=0)) for name in ("run", "other")
    )
    first.log.every_steps = 1
    check_stop_and_resume(first, second, monkeypatch)
    rates = {row["lr"] for row in read_metrics(tmp_path / "run") if "lr" in row}
    assert len(rates) > 3


def test_a_resumed_run_does_not_hold_what_it_was_read_from(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and optimizer would take as much memory again: a run that fits would not once it is resumed."""
    cfg, read = config(), list[weakref.ref[torch.Tensor]]()
    with monkeypatch.context() as patch:
        signal_after(patch, 5)
        with pytest.raises(StoppedError):
            pretrain.run(cfg)
    load, execute = training.load_latest, Session.execute

    def loaded(*args: Any, **keys: Any) -> Any:
        found = load(*args, **keys)
        assert found is not None
        read.extend(map(weakref.ref, [*found[1].model.values(), *found[1].optimizer.values()]))
        return found

    def executed(self: Session) -> Any:
        gc.collect()
        assert [tensor().shape for tensor in read if tensor() is not None] == []  # type: ignore[union-attr]
        return execute(self)

    monkeypatch.setattr(training, "load_latest", loaded)
    monkeypatch.setattr(Session, "execute", executed)
    pretrain.run(replace(cfg, resume=True))
    assert len(read) > 20


def test_shuffle_of_windows_is_refused(config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="are for train"):
        pretrain.run(config(shuffle=Shuffle.blocks))


@pytest.mark.parametrize("stopped_after", [5, 8])
def test_nt_asgd_begins_at_the_same_step_after_a_resume(
    stopped_after: int, config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A rate that makes the valid loss rise: the trigger is pulled between steps 5 and 8."""
    train = {"average": Average.nt_asgd, "asgd_patience": 4}
    first, second = (
        replace(
            config(LSTM, run=name, **train), optimizer=SgdConfig(lr=60.0, clip_norm=1.0), eval=EvalConfig(every_steps=1)
        )
        for name in ("run", "other")
    )
    check_stop_and_resume(first, second, monkeypatch, stopped_after)
    ends = [latest_checkpoint(tmp_path / name, pytest.fail) for name in ("run", "other")]
    since = [load_checkpoint(end, with_optimizer=False).state["averaged_since"] for end in ends if end is not None]
    assert since[0] == since[1]
    assert 5 <= since[0] < 8


def test_plateau_schedule_and_sampled_softmax_resume_bit_for_bit(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, softmax = PlateauConfig(patience=0), SampledSoftmaxConfig(num_frequent=20, num_sampled=20)
    first, second = (replace(config(LSTM, run=n), schedule=schedule, softmax=softmax) for n in ("run", "other"))
    check_stop_and_resume(first, second, monkeypatch)


def test_a_finished_run_has_nothing_to_do_and_a_longer_one_goes_on(config: MakeConfig, tmp_path: Path) -> None:
    first = pretrain.run(config())
    assert pretrain.run(config(resume=True)).items() >= first.items()
    longer = pretrain.run(config(resume=True, max_steps=15))
    assert longer["step"] == 15
    steps = [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert steps == sorted(set(steps))


def test_the_mean_of_a_run_that_got_longer_begins_at_the_share_of_its_new_length(
    config: MakeConfig, tmp_path: Path
) -> None:
    """Behind step 9 of 12 the mean began; now that there are 36, behind step 27."""
    since = []
    for max_steps in (12, 24, 36):
        pretrain.run(config(average=Average.swa, resume=max_steps > 12, max_steps=max_steps))
        end = latest_checkpoint(tmp_path / "run", pytest.fail)
        assert end is not None
        since.append(load_checkpoint(end, with_optimizer=False).state["averaged_since"])
    assert since == [9, 18, 27]


def test_resume_with_another_shape_is_refused_with_both_values(config: MakeConfig) -> None:
    pretrain.run(config(max_steps=2))
    with pytest.raises(ConfigError, match=r"model\.d_model: 32 -> 64") as refused:
        pretrain.run(config(replace(TRANSFORMER, d_model=64), resume=True, max_steps=2))
    assert refused.value.exit_code == 2


def test_resume_starts_a_run_that_does_not_exist_yet(config: MakeConfig, tmp_path: Path) -> None:
    result = pretrain.run(config(resume=True, max_steps=2))
    assert (
        json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))["token_ppl"] == result["token_ppl"]
    )


def test_an_existing_run_is_not_overwritten(config: MakeConfig) -> None:
    pretrain.run(config(max_steps=2))
    with pytest.raises(ConfigError, match="not empty"):
        pretrain.run(config(max_steps=2))

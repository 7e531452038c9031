"""From raw text to a finetuned model and its words, through the functions behind the five commands."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stopping import signal_after

from lmkit import cli, judging, plots, session, timing
from lmkit.commands import eval_ppl, finetune, generate, place, prepare, pretrain, training
from lmkit.config.commands import EvalPplConfig, FinetuneConfig, PrepareConfig, PretrainConfig
from lmkit.config.data import SentencePieceTokenizerConfig, TextConfig, WordTokenizerConfig
from lmkit.config.generation import GenerateConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import Cell, ModelConfig, NgramConfig, RecurrentConfig, TransformerConfig
from lmkit.config.optimization import AdamwConfig, CosineConfig, SgdConfig
from lmkit.config.softmax import SampledSoftmaxConfig
from lmkit.config.start import EmbeddingInit, InitConfig
from lmkit.config.training import Average, EvalConfig, RunConfig, SaveConfig, TrainConfig
from lmkit.data.batches import TrainingBatch
from lmkit.errors import CheckpointError, ConfigError, DivergedError, StoppedError
from lmkit.horizon import EXIT_RESERVE_S
from lmkit.store import checkpoint_writer
from lmkit.store.checkpoint import list_checkpoints, load_checkpoint, valid_loss
from lmkit.store.found import read_metrics, read_result
from lmkit.store.manifest import step_of
from lmkit.train import StepReport, Trainer

MakeConfig = Callable[..., PretrainConfig]
CPU = DeviceConfig(type=DeviceType.cpu, threads=1)
MODELS: list[ModelConfig] = [
    TransformerConfig(d_model=32, num_layers=1, num_heads=2, context=32),
    RecurrentConfig(d_embed=24, d_hidden=24, num_layers=1),
    RecurrentConfig(cell=Cell.gru, d_embed=24, d_hidden=32, num_layers=2),
    NgramConfig(order=3),
]


@pytest.mark.parametrize("model", MODELS, ids=["transformer", "lstm", "gru", "kneser-ney"])
def test_every_family_goes_the_whole_way(
    model: ModelConfig, config: MakeConfig, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = config(model)
    prepare.run(PrepareConfig(dataset=first.dataset, tokenizer=first.tokenizer))
    trained = pretrain.run(first)
    assert 1.0 < trained["token_ppl"] < 257
    run = RunConfig(root=str(tmp_path))  # no path: the newest finished run
    out = tmp_path / "eval.json"
    result = eval_ppl.run(EvalPplConfig(run=run, split="valid", device=CPU, output=str(out)))
    assert json.loads(out.read_text(encoding="utf-8"))["nats"] == result["nats"]
    assert result["num_tokens"] == trained["num_tokens"]
    capfd.readouterr()
    samples = generate.run(GenerateConfig(run=run, max_new_tokens=12, device=CPU), ["我喜欢学习"])
    shown = capfd.readouterr()
    assert shown.out == f"我喜欢学习{samples[0]['text']}\n"
    assert str(tmp_path / "run") in shown.err
    if model.trains_by_counting:
        return
    tuned = finetune.run(
        FinetuneConfig(
            dataset=TextConfig(path=str(corpus)),
            optimizer=AdamwConfig(lr=1e-3),
            schedule=CosineConfig(),
            train=TrainConfig(max_steps=4, batch_size=2, seq_len=16),
            device=CPU,
            run=RunConfig(dir=str(tmp_path / "tuned"), path=str(tmp_path / "run"), root=str(tmp_path)),
        )
    )
    assert tuned["command"] == "finetune"
    assert eval_ppl.run(EvalPplConfig(run=run, device=CPU))["run"] == str(tmp_path / "tuned")


def test_numbers_agree_between_training_evaluation_and_result_json(config: MakeConfig, tmp_path: Path) -> None:
    trained = pretrain.run(config())
    stored = read_result(tmp_path / "run")
    assert stored is not None
    assert stored["token_ppl"] == trained["token_ppl"]
    again = eval_ppl.run(
        EvalPplConfig(run=RunConfig(path=str(tmp_path / "run")), split="valid", context=16, stride=16, device=CPU)
    )
    assert again["nats"] == pytest.approx(trained["nats"], rel=1e-6)
    assert again["word_ppl"] == pytest.approx(math.exp(again["nats"] / again["num_words"]))
    assert again["bits_per_byte"] == pytest.approx(again["nats"] / again["num_bytes"] / math.log(2))


def test_finetuning_with_rate_zero_like_steps_starts_from_the_weights_of_the_run(
    config: MakeConfig, corpus: Path, tmp_path: Path
) -> None:
    pretrain.run(config())
    finetune.run(
        FinetuneConfig(
            dataset=TextConfig(path=str(corpus)),
            optimizer=SgdConfig(lr=1e-12),
            schedule=CosineConfig(),
            train=TrainConfig(max_steps=1, batch_size=2, seq_len=16),
            device=CPU,
            run=RunConfig(dir=str(tmp_path / "tuned"), path=str(tmp_path / "run")),
        )
    )
    base, tuned = (load_checkpoint(list_checkpoints(tmp_path / r)[-1], with_optimizer=False) for r in ("run", "tuned"))
    for name, tensor in base.model.items():
        torch.testing.assert_close(tensor, tuned.model[name], atol=1e-6, rtol=0)


def test_training_learns_more_than_the_word_frequencies(config: MakeConfig) -> None:
    result = pretrain.run(replace(config(max_steps=150), optimizer=AdamwConfig(lr=1e-2)))
    assert result["bits_per_byte"] < 3.0


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_keys_that_do_nothing_without_another_are_refused_before_any_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["dataset=ptb", f"dataset.path={tmp_path / 'none'}", "device=cpu", f"run.dir={tmp_path / 'run'}"]
    needs = {
        "train.swa_start=0.5": "train.average=swa",
        "train.asgd_patience=3": "train.average=nt_asgd",
        "train.max_skips=3": "train.nonfinite=skip or rollback",
    }
    assert cli.main([command, *place, *needs]) == 2
    found = capsys.readouterr().err.splitlines()[-1]
    assert all(f"{key} needs {other}" in found for key, other in needs.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["softmax=adaptive"], "model.tie_embeddings=true must be false with softmax=adaptive"),
        (
            ["softmax=adaptive", "model.tie_embeddings=false", "model.div_value=2"],
            "model.div_value=2 is what softmax=adaptive sets: use softmax.div_value",
        ),
        (["model.div_value=2"], "model.div_value=2 needs softmax=adaptive: set softmax.div_value with it"),
        (["softmax=adaptive", "objective=vae", "model=vae_lstm"], "softmax=adaptive cannot train model=vae_lstm"),
        (["softmax=adaptive", "init=hf:no/folder"], "cannot train a model that began with another softmax"),
        (["softmax=sampled", "model.num_softmaxes=2"], "cannot train a mixture of softmaxes"),
        (["softmax.label_smoothing=0.1", "model.num_softmaxes=2"], "cannot train a mixture of softmaxes"),
        (["softmax=sampled", "model.tie_embeddings=false", "model.cutoffs=20,60"], "or an adaptive softmax"),
    ],
)
def test_a_softmax_that_cannot_train_the_model_is_refused_before_the_corpus_is_looked_for(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["dataset=ptb", f"dataset.path={tmp_path / 'none'}", "device=cpu", f"run.dir={tmp_path / 'run'}"]
    assert cli.main(["pretrain", *place, *words]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_sampled_softmax_and_cooccurrence_start_learn_too(config: MakeConfig) -> None:
    made = config(RecurrentConfig(d_embed=16, d_hidden=16, num_layers=1), max_steps=60)
    made = replace(
        made,
        tokenizer=WordTokenizerConfig(),
        softmax=SampledSoftmaxConfig(num_frequent=4, num_sampled=4),
        init=InitConfig(embeddings=EmbeddingInit.cooccurrence),
    )
    assert pretrain.run(made)["token_ppl"] < 30


def test_best_and_newest_checkpoints_are_kept_and_the_losses_drawn(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "plot_run", plots.plot_run)
    pretrain.run(replace(config(), save=SaveConfig(keep=2)))
    kept = list_checkpoints(tmp_path / "run")
    losses = {row["step"]: row["valid_loss"] for row in read_metrics(tmp_path / "run") if "valid_loss" in row}
    assert kept[-1].name == "step-000000000012"
    assert min(losses.values()) == pytest.approx(min(v for v in map(valid_loss, kept) if v is not None))
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize("grows", [True, False])
def test_the_table_at_the_end_tells_of_a_better_validation_before_the_last(
    grows: bool, config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    judge_alone = judging._judge_alone
    losses: list[float] = []

    def judged(*args: Any) -> Any:
        found, sample = judge_alone(*args)
        losses.append(3.0 + len(losses) if grows else 9.0 - len(losses))
        return replace(found, loss=losses[-1]), sample

    monkeypatch.setattr(judging, "_judge_alone", judged)
    result = pretrain.run(config())
    assert result["best_valid_loss"] == min(losses)
    said = [line.split() for line in capfd.readouterr().err.splitlines() if line.startswith("  best")]
    assert said == ([["best", "valid", "ppl/token", "20.09", "at", "step", "2"]] if grows else [])


def test_early_stopping_ends_a_run_that_does_not_improve(config: MakeConfig) -> None:
    made = replace(config(max_steps=200, patience=2), optimizer=SgdConfig(lr=1e-12))
    assert pretrain.run(made)["step"] < 200


class Clock:
    """A clock that only moves when it is read."""

    now_s = 0.0
    tick_s = 0.05

    def monotonic(self) -> float:
        self.now_s += self.tick_s
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of a training run."""
    clock = Clock()
    for module in (session, timing, judging, place):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def _free_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves, which have a clock of their own, take no time."""
    free = checkpoint_writer.Cost(copy_s=0.0, cpu_s=0.0, wall_s=0.0)
    monkeypatch.setattr(checkpoint_writer, "Cost", lambda *_: free)


@pytest.mark.usefixtures("clock", "_free_saves")
def test_a_time_budget_is_kept_and_the_rate_is_annealed(config: MakeConfig, tmp_path: Path) -> None:
    result = pretrain.run(config(max_steps=None, budget="20s"))
    assert 10 < result["elapsed_s"] < 20
    rows = [row for row in read_metrics(tmp_path / "run") if "lr" in row]
    assert rows[-1]["progress"] > 0.99
    assert rows[-1]["lr"] < 0.01 * max(row["lr"] for row in rows)


@pytest.mark.usefixtures("_free_saves")
def test_a_run_by_the_clock_goes_on_when_it_gets_more_time(config: MakeConfig, clock: Clock, tmp_path: Path) -> None:
    clock.tick_s = 0.1
    first = pretrain.run(config(max_steps=None, budget="20s"))
    same = pretrain.run(config(max_steps=None, budget="20s", resume=True))
    assert same["step"] == first["step"]
    longer = pretrain.run(config(max_steps=None, budget="40s", resume=True))
    assert longer["step"] > 1.3 * first["step"]
    assert 25 < longer["elapsed_s"] < 40
    rows = [row for row in read_metrics(tmp_path / "run") if "lr" in row and row["step"] > first["step"]]
    assert rows[0]["progress"] < 0.6
    assert rows[-1]["progress"] > 0.99


@pytest.mark.usefixtures("clock", "_free_saves")
def test_a_run_that_goes_on_when_its_time_is_over_ends_without_another_step(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        signal_after(patch, 31)
        with pytest.raises(StoppedError):
            pretrain.run(config(max_steps=None, budget="20s"))
    state = load_checkpoint(list_checkpoints(tmp_path / "run")[-1], with_optimizer=False).state
    assert state["step_s"] == pytest.approx(state["elapsed_s"] / 31, rel=0.3)
    budget_s = state["elapsed_s"] + EXIT_RESERVE_S
    result = pretrain.run(config(max_steps=None, budget=f"{budget_s:.3f}s", resume=True))
    assert result["step"] == 31
    assert valid_loss(list_checkpoints(tmp_path / "run")[-1]) == pytest.approx(result["nats"] / result["num_tokens"])


def test_a_budget_that_is_over_before_the_first_step_makes_that_one_and_says_so(
    config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    assert pretrain.run(config(max_steps=None, budget="1s"))["step"] == 1
    assert "warning: train.budget=1s was over after 1 step, too soon" in " ".join(capfd.readouterr().err.split())
    assert pretrain.run(config(run="asked for", max_steps=1, budget="1s"))["step"] == 1
    assert "train.budget" not in capfd.readouterr().err


def test_an_average_that_never_began_is_told(
    config: MakeConfig, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pretrain.run(config(average=Average.nt_asgd))
    assert "train.average=nt_asgd never began" in capfd.readouterr().err


def test_a_mean_that_an_early_stop_has_forestalled_is_told(
    config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    """The mean of the last quarter of 200 steps, of a run that stops after six."""
    made = replace(config(max_steps=200, patience=2, average=Average.swa), optimizer=SgdConfig(lr=1e-12))
    assert pretrain.run(made)["step"] < 20
    assert "train.average=swa never began in" in capfd.readouterr().err


def test_a_time_budget_is_kept_where_the_last_evaluation_takes_a_fifth_longer_than_the_one_before(
    config: MakeConfig, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.tick_s = 10.0
    judge_alone = judging._judge_alone
    took_s = [200.0]

    def slower(*args: Any) -> Any:
        clock.now_s += took_s[-1]
        took_s.append(took_s[-1] * 1.2)
        return judge_alone(*args)

    monkeypatch.setattr(judging, "_judge_alone", slower)
    result = pretrain.run(replace(config(max_steps=None, budget="3500s"), eval=EvalConfig()))
    assert len(took_s) == 3
    assert 3400 < result["elapsed_s"] <= 3500


def test_memory_that_was_needed_before_the_first_step_is_given_back(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    step = Trainer.train_step

    def noted(self: Trainer, batch: TrainingBatch) -> StepReport:
        events.append("step")
        return step(self, batch)

    monkeypatch.setattr(session, "give_back_freed_memory", lambda: events.append("given back"))
    monkeypatch.setattr(Trainer, "train_step", noted)
    pretrain.run(config(max_steps=2))
    assert events == ["given back", "step", "step"]


def test_divergence_keeps_the_last_good_checkpoint(config: MakeConfig, tmp_path: Path) -> None:
    made = replace(config(max_steps=60), optimizer=SgdConfig(lr=1e12, clip_norm=None), save=SaveConfig(every_steps=1))
    with pytest.raises(DivergedError, match=r"step \d+ is not finite") as diverged:
        pretrain.run(made)
    last = list_checkpoints(tmp_path / "run")[-1]
    load_checkpoint(last, with_optimizer=True)  # which raises for weights that are not finite
    assert f"step {step_of(last.name) + 1} " in str(diverged.value)


def test_a_sequence_longer_than_the_context_is_refused_before_anything_is_made(
    config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"train\.seq_len=64 is longer than model\.context=32"):
        pretrain.run(config(seq_len=64))
    assert not (tmp_path / "run").exists()


def test_no_run_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no finished run"):
        eval_ppl.run(EvalPplConfig(run=RunConfig(root=str(tmp_path)), device=CPU))


def test_sentencepiece_runs_generate_any_prompt(config: MakeConfig, capfd: pytest.CaptureFixture[str]) -> None:
    made = replace(config(), tokenizer=SentencePieceTokenizerConfig(vocab_size=300))
    pretrain.run(made)
    capfd.readouterr()
    generate.run(
        GenerateConfig(run=RunConfig(path=made.run.dir), max_new_tokens=40, device=CPU), ["🙂 ∀x {a,b} ${HOME}"]
    )
    assert capfd.readouterr().out.startswith("🙂 ∀x {a,b} ${HOME}")

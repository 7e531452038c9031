"""objective=gan from a raw file to sentences: both parts of the training, resuming, eval-ppl and generate."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stopping import assert_same, signal_after, tensors_in
from torch import Tensor

from lmkit import cli
from lmkit.commands import pretrain
from lmkit.commands.training import build_trainer
from lmkit.config.commands import PretrainConfig
from lmkit.config.data import ByteTokenizerConfig, TextConfig, WordTokenizerConfig
from lmkit.config.model import RelganConfig
from lmkit.config.objectives import GanObjectiveConfig
from lmkit.config.optimization import AdamwConfig, ConstantConfig
from lmkit.config.softmax import SampledSoftmaxConfig, SoftmaxConfig
from lmkit.config.training import ExistingRunConfig
from lmkit.console import Console
from lmkit.device import resolve_device
from lmkit.errors import ResourceError, StoppedError
from lmkit.loading import load_run
from lmkit.models.gan import Relgan
from lmkit.planning import plan
from lmkit.store.checkpoint import list_checkpoints
from lmkit.store.manifest import step_directory
from lmkit.tasks import gan as gan_task
from lmkit.tasks.gan import draw_sentences
from lmkit.train import Trainer

MakeConfig = Callable[..., PretrainConfig]


@pytest.fixture(scope="session")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of sentences that each repeat one word: who has learnt it repeats."""
    folder, generator = tmp_path_factory.mktemp("lines"), random.Random(1)
    words = ["red", "green", "blue", "one"]
    for number in range(12):
        text = "\n".join(" ".join([generator.choice(words)] * generator.randint(3, 5)) for _ in range(60))
        (folder / f"{number}.txt").write_text(f"{text}\n", encoding="utf-8")
    return folder


@pytest.fixture
def gan(config: MakeConfig, lines: Path) -> MakeConfig:
    """A maker of small configurations, half maximum likelihood and half adversarial."""

    def make(
        *, pretrain_share: float = 0.5, rates: tuple[float, float] = (1.0, 1.0), **values: object
    ) -> PretrainConfig:
        return replace(
            config(**({"batch_size": 16, "seq_len": 16, "max_steps": 12} | values)),
            dataset=TextConfig(path=str(lines), valid_fraction=0.2),
            tokenizer=WordTokenizerConfig(),
            model=RelganConfig(
                d_embed=16, num_filters=8, num_representations=2, d_representation=4, dropout_input=0, dropout_output=0
            ),
            objective=GanObjectiveConfig(
                pretrain_share=pretrain_share,
                length=7,
                num_samples=100,
                generator_lr=rates[0],
                discriminator_lr=rates[1],
            ),
            optimizer=AdamwConfig(lr=1e-2),
        )

    return make


def weights(cfg: PretrainConfig, step: int | None = None) -> dict[str, Tensor]:
    assert cfg.run.dir is not None
    return tensors_in(Path(cfg.run.dir), step)


def test_a_run_stopped_in_either_part_and_resumed_ends_with_the_same_bits(
    gan: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gan(run="whole", micro_batch_size=8)
    pretrain.run(whole)
    for stop_at in (4, 9):
        cut = gan(run=f"cut{stop_at}", micro_batch_size=8)
        with monkeypatch.context() as patch:
            signal_after(patch, stop_at)
            with pytest.raises(StoppedError):
                pretrain.run(cut)
        pretrain.run(replace(cut, resume=True))
        assert_same(weights(whole), weights(cut))


def test_adversarial_losses_are_means_over_the_sentences_of_a_batch_however_it_is_cut(
    gan: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the noise of what is drawn, which each micro-batch draws anew."""
    monkeypatch.setattr(Tensor, "exponential_", lambda self: self.fill_(1.0))
    found = []
    for size in (16, 4, 1):
        cfg = gan(pretrain_share=0.0, micro_batch_size=size)
        prepared, _ = pretrain.prepare_data(cfg, Console())
        model = pretrain.build_model(cfg, None, prepared.tokenizer.vocab_size)
        trainer = build_trainer(cfg, pretrain.build_task(cfg, model, prepared), model, resolve_device(cfg.device), None)
        report = trainer.train_step(trainer.task.batches[0])
        found.append((report.loss, report.grad_norm))
    assert found[1:] == [pytest.approx(found[0], rel=1e-4)] * 2
    assert found[0][0] == pytest.approx(2 * math.log(2), rel=0.1)  # of a discriminator that knows nothing yet


def test_a_plan_counts_and_times_the_adversarial_part(gan: MakeConfig) -> None:
    found = []
    for share in (0.5, 1.0):
        cfg = gan(pretrain_share=share)
        prepared, _ = pretrain.prepare_data(cfg, Console())
        model = pretrain.build_model(cfg, None, prepared.tokenizer.vocab_size)
        task = pretrain.build_task(
            replace(cfg, objective=GanObjectiveConfig(pretrain_share=share, length=50)), model, prepared
        )
        trainer = build_trainer(cfg, task, model, resolve_device(cfg.device), None)
        found.append(plan(trainer, cfg.train, cfg.eval, cfg.save))
    both, likelihood = found
    assert both.peak_from == 0.5
    assert both.memory.per_row > 3 * likelihood.memory.per_row
    assert [share for share, _ in both.paces] == [0.0, 0.5]
    assert [share for share, _ in likelihood.paces] == [0.0]
    assert both.step_s is not None
    assert both.paces[0][1] < both.step_s < both.paces[1][1]


def test_where_memory_runs_out_the_advice_names_what_limits_each_part(
    gan: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_step(self: Trainer, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "train_step", train_step)
    advice = r"and train\.seq_len=16 and objective\.length=7; .*a lower train\.seq_len or objective\.length, or another"
    with pytest.raises(ResourceError, match=advice):
        pretrain.run(gan(micro_batch_size=1))
    monkeypatch.setattr("lmkit.planning.room_bytes", lambda device: 1)
    told = pretrain.run(replace(gan(run="planned"), plan=True))["fits"]
    assert told == "no, not even one row: use a smaller model or train.seq_len or objective.length, or another device"


def test_the_discriminator_rests_while_the_generator_learns_by_maximum_likelihood(gan: MakeConfig) -> None:
    cfg = gan()
    cfg = replace(cfg, save=replace(cfg.save, every_steps=2, keep=10))
    pretrain.run(cfg)
    assert cfg.run.dir is not None
    steps = [int(path.name.removeprefix("step-")) for path in list_checkpoints(Path(cfg.run.dir))]
    assert {2, 6, 8} <= set(steps)
    two, six, eight = (weights(cfg, step) for step in (2, 6, 8))
    judge = [name for name in two if name.startswith("discriminator.") and "/" not in name]
    assert judge
    assert all(torch.equal(two[name], six[name]) for name in judge)
    assert not all(torch.equal(six[name], eight[name]) for name in judge)
    assert not torch.equal(six["generator.embedding.weight"], eight["generator.embedding.weight"])


@pytest.mark.parametrize(
    ("rates", "expected"), [((1.0, 1.0), (1, 1)), ((0.1, 0.5), (0.1, 0.5)), ((0.5, 0.1), (0.5, 0.1))]
)
def test_each_part_moves_at_its_own_rate_once_they_are_adversaries(
    gan: MakeConfig, rates: tuple[float, float], expected: tuple[float, float]
) -> None:
    """The first step of Adam moves a parameter by its learning rate, whatever the gradient."""
    cfg = gan(run=f"rates{rates}", rates=rates, pretrain_share=0.0, max_steps=1)
    cfg = replace(cfg, optimizer=AdamwConfig(lr=1e-2, weight_decay=0.0), schedule=ConstantConfig(warmup_ratio=0.0))
    pretrain.run(cfg)
    initial = cfg.model.build(6, seed=cfg.seed).state_dict()
    trained = weights(cfg)
    for part, factor in zip(("generator.embedding.weight", "discriminator.embedding.weight"), expected, strict=True):
        assert initial[part].shape == trained[part].shape
        assert float((trained[part] - initial[part]).abs().max()) == pytest.approx(1e-2 * factor, rel=0.01)


def test_the_sampled_softmax_ends_exact_and_a_budget_knows_where_the_time_of_a_step_changes(gan: MakeConfig) -> None:
    cfg = gan(pretrain_share=0.8)
    prepared, _ = pretrain.prepare_data(cfg, Console())
    losses: dict[bool, list[float]] = {}
    for sampled in (False, True):
        softmax = SampledSoftmaxConfig(num_frequent=1, num_sampled=1, exact_from=0.5) if sampled else SoftmaxConfig()
        own = replace(cfg, softmax=softmax)
        model = pretrain.build_model(own, None, prepared.tokenizer.vocab_size)
        task = pretrain.build_task(own, model, prepared)
        assert set(task.pace_changes_at) == ({0.5, 0.8} if sampled else {0.8})
        batch = task.batches[0].cut(slice(0, 1), torch.device("cpu"))
        losses[sampled] = []
        for progress in (0.4, 0.6):
            torch.manual_seed(1)
            losses[sampled].append(float(task.loss(model.train(), batch, None, progress)[0].detach()))
    assert losses[True][0] != losses[False][0]
    assert losses[True][1] == losses[False][1]


def test_with_other_tokenizers_a_sentence_ends_with_its_line(gan: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their end of document, which no sentence holds, never comes."""
    drawn: list[np.ndarray[Any, Any]] = []
    soft: list[Tensor] = []
    original = Relgan.soft_sentences

    def draw(*args: Any, **kwargs: Any) -> Any:
        drawn.extend(found := draw_sentences(*args, **kwargs))
        return found

    def draw_soft(*args: Any, **kwargs: Any) -> Tensor:
        soft.append(found := original(*args, **kwargs).detach())
        return found.requires_grad_()

    monkeypatch.setattr(gan_task, "draw_sentences", draw)
    monkeypatch.setattr(Relgan, "soft_sentences", draw_soft)
    pretrain.run(replace(gan(max_steps=4), tokenizer=ByteTokenizerConfig()))
    ends = [np.flatnonzero(ids == ord("\n")) for ids in drawn]
    assert any(len(places) for places in ends)
    assert all(len(places) == 0 or places[0] == len(ids) - 1 for ids, places in zip(drawn, ends, strict=True))
    ended = 0
    for soft_BTV in soft:
        is_end_BT = (soft_BTV.argmax(-1) == ord("\n")) & (soft_BTV.sum(-1) > 0.5)
        behind_BT = is_end_BT.cumsum(1) - is_end_BT.int() > 0
        ended += int(behind_BT.sum())
        assert not soft_BTV[behind_BT].any()
    assert ended > 0


def test_a_short_adversarial_part_leaves_sentences_as_long_as_they_were(gan: MakeConfig) -> None:
    """With one learning rate for everything they become ten times as long, or two words."""
    default = GanObjectiveConfig()
    cfg = gan(
        run="long",
        rates=(default.generator_lr, default.discriminator_lr),
        pretrain_share=0.6,
        max_steps=200,
        batch_size=32,
    )
    cfg = replace(
        cfg,
        optimizer=AdamwConfig(lr=0.02),
        save=replace(cfg.save, every_steps=120, keep_every=120),
        eval=replace(cfg.eval, every_steps=200),
    )
    pretrain.run(cfg)
    assert cfg.run.dir is not None
    device, lengths = resolve_device(cfg.device), []
    for step in (120, 200):
        stored = ExistingRunConfig(path=cfg.run.dir, checkpoint=step_directory(step))
        loaded = load_run(stored, device=device, console=Console(silent=True))
        drawn = draw_sentences(loaded.model, 300, eos_id=loaded.tokenizer.eos_id, seed=1, device=device)
        lengths.append(sum(map(len, drawn)) / len(drawn))
    assert lengths[1] == pytest.approx(lengths[0], rel=0.2)


def test_from_a_file_to_sentences_that_repeat_their_word(
    lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"model=relgan objective=gan dataset=text dataset.path={lines} dataset.valid_fraction=0.2 tokenizer=word"
    words += " model.d_embed=16 model.num_filters=8 model.num_representations=2 model.dropout_input=0"
    words += " model.dropout_output=0 objective.pretrain_share=0.95 objective.num_samples=100 objective.length=7"
    words += " optimizer.lr=0.02 train.max_steps=150 train.batch_size=32 device=cpu device.threads=1"
    words += f" run.dir={tmp_path / 'r'}"
    assert cli.main(["pretrain", *words.split()]) == 0
    capsys.readouterr()
    own = f"run={tmp_path / 'r'} device=cpu device.threads=1"
    assert cli.main(f"generate {own} --num-samples 20".split()) == 0
    sentences = capsys.readouterr().out.splitlines()
    assert len(sentences) == 20
    assert sum(len(set(s.split())) == 1 for s in sentences) >= 16
    assert len({s.split()[0] for s in sentences if s}) >= 3
    assert cli.main(f"eval-ppl {own} split=valid checks=false bootstrap=0".split()) == 0
    out = capsys.readouterr().out
    assert "sentence: text/valid" in out
    first_word_and_end = next(line for line in out.splitlines() if line.strip().startswith("perplexity per"))
    assert float(first_word_and_end.split()[-1]) < 2.0


def test_objective_and_model_must_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "model=relgan"]) == 2
    assert "needs objective=gan" in capsys.readouterr().err
    assert cli.main(["pretrain", "model=relgan", "objective=vae"]) == 2
    assert "needs objective=gan" in capsys.readouterr().err


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_finetuning_with_an_adapter_is_refused_before_anything_is_prepared_and_works_without_one(
    gan: MakeConfig, lines: Path, tmp_path: Path, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = gan(max_steps=2)
    pretrain.run(base)
    words = ["finetune", f"run={base.run.dir}", f"run.dir={tmp_path / 'new'}", "device=cpu", "dataset=text"]
    words += ["train.max_steps=2", "train.batch_size=4", "train.seq_len=16"]
    assert cli.main([*words, "dataset.path=nowhere", f"adapter={adapter}"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"error: adapter has no use with {base.run.dir}, which was trained with objective=gan")
    assert cli.main([*words, f"dataset.path={lines}"]) == 0

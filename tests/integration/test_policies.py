"""What a run does about batches that are not finite, saves that fail, limits of time and memory, and how it replays.

Numbers in names (row_58 ...) are the rows of the project's fault table.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from stopping import assert_same, signal_after, tensors_in
from torch import Tensor

from lmkit import horizon, judging, products, session
from lmkit.commands import finetune, pretrain, training
from lmkit.commands import replay as replaying
from lmkit.commands.replay import replay
from lmkit.config.commands import FinetuneConfig, PretrainConfig
from lmkit.config.machine import Precision
from lmkit.config.model import RecurrentConfig
from lmkit.config.optimization import PlateauConfig
from lmkit.config.training import (
    EvalConfig,
    LogConfig,
    NonFinite,
    OnSaveError,
    OnUsr1,
    RunConfig,
    SaveConfig,
    TrainConfig,
)
from lmkit.console import Console, format_number
from lmkit.data.batches import Batch
from lmkit.errors import ConfigError, DivergedError, ResourceError, StoppedError
from lmkit.session import Session
from lmkit.signals import SAVING, STOPPING
from lmkit.store import checkpoint_writer, saving, storage
from lmkit.store.browse import Status, read_journal, status_of
from lmkit.store.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint
from lmkit.store.found import read_metrics, read_result
from lmkit.store.runs import Run
from lmkit.tasks import Validation
from lmkit.tasks.language import LanguageModelling
from lmkit.timing import Timing
from lmkit.train import Trainer

MakeConfig = Callable[..., PretrainConfig]
LSTM = RecurrentConfig(d_embed=24, d_hidden=32, num_layers=1, dropout_recurrent=0.2)


def path_of(config: PretrainConfig) -> Path:
    assert config.run.dir is not None
    return Path(config.run.dir)


def tensors_of(config: PretrainConfig, step: int | None = None) -> dict[str, Tensor]:
    return tensors_in(path_of(config), step)


def journal(config: PretrainConfig, event: str) -> list[dict[str, Any]]:
    return [row for row in read_journal(path_of(config)) if row["event"] == event]


def valid_rows(config: PretrainConfig) -> list[tuple[int, float]]:
    return [(row["step"], row["valid_loss"]) for row in read_metrics(path_of(config)) if "valid_loss" in row]


def poison(patch: pytest.MonkeyPatch, *steps: int, factor: float = math.nan, only_gradient: bool = False) -> None:
    """Multiply the loss of these steps, or its gradient only, by a factor."""
    original = Trainer.run_micro_batch

    def run_micro_batch(self: Trainer, batch: Batch, micro: int, progress: float) -> Any:
        loss, state = original(self, batch, micro, progress)
        if self.state.step + 1 in steps:
            if only_gradient and loss.requires_grad:
                loss.register_hook(lambda grad: grad * factor)
            elif not only_gradient:
                loss = loss * factor
        return loss, state

    patch.setattr(Trainer, "run_micro_batch", run_micro_batch)


@pytest.fixture(autouse=True)
def _quiet_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)


@pytest.fixture(autouse=True)
def _same_handlers() -> Iterator[None]:
    """A run puts back every signal handler that it found."""
    numbers = [getattr(signal, name) for name in (*STOPPING, *SAVING, "SIGUSR1") if hasattr(signal, name)]
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


# Numbers


@pytest.mark.parametrize("only_gradient", [False, True], ids=["loss", "gradient"])
def test_row_58_a_step_that_is_not_finite_ends_the_run_with_7_and_its_batch_is_written_out(
    only_gradient: bool, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(config(), log=LogConfig(every_steps=1))
    with monkeypatch.context() as patch:
        poison(patch, 7, only_gradient=only_gradient)
        with pytest.raises(DivergedError, match=r"step 7 is not finite .*nonfinite-step-000007\.json") as caught:
            pretrain.run(cfg)
    assert caught.value.exit_code == 7
    record = json.loads((path_of(cfg) / "nonfinite-step-000007.json").read_text(encoding="utf-8"))
    assert record["step"] == 7
    assert (record["loss"] == "NaN") is not only_gradient
    assert record["grad_norm"] == "NaN"
    assert 0 < record["lr"] <= 3e-3
    assert len(record["rows"]) == 4
    assert all(bytes(row["ids"]).decode("utf-8", "replace") == row["text"] for row in record["rows"])
    newest = latest_checkpoint(path_of(cfg), pytest.fail)
    assert newest is not None
    assert newest.name == "step-000000000006"


def test_row_58_the_weights_after_a_bad_step_are_those_before_it(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config()
    found: dict[str, Tensor] = {}
    original = Session._leave_out

    def leave_out(self: Session, *args: Any) -> bool:
        found.update({name: p.detach().clone() for name, p in self.trainer.model.named_parameters()})
        return original(self, *args)

    monkeypatch.setattr(Session, "_leave_out", leave_out)
    poison(monkeypatch, 7, only_gradient=True)
    with pytest.raises(DivergedError):
        pretrain.run(cfg)
    saved = tensors_of(cfg, 6)
    assert found
    assert all(torch.equal(tensor, saved[name]) for name, tensor in found.items())


@pytest.mark.parametrize("policy", [NonFinite.skip, NonFinite.rollback])
def test_row_62_the_logged_loss_of_a_bad_step_is_nan(
    policy: NonFinite, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(config(nonfinite=policy), log=LogConfig(every_steps=1))
    poison(monkeypatch, 5)
    pretrain.run(cfg)
    rows = {row["step"]: row for row in read_metrics(path_of(cfg)) if "loss" in row}
    assert math.isnan(rows[5]["loss"])
    assert math.isnan(rows[5]["grad_norm"])
    assert all(math.isfinite(row["loss"]) for step, row in rows.items() if step != 5)
    assert [rows[step]["skipped"] for step in (4, 5, 12)] == [0, 1, 1]


def test_row_59_a_skipped_batch_changes_nothing_and_is_counted(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(config(nonfinite=NonFinite.skip), save=SaveConfig(every_steps=1, keep=20))
    poison(monkeypatch, 5, 9, only_gradient=True)
    result = pretrain.run(cfg)
    assert_same(tensors_of(cfg, 4), tensors_of(cfg, 5))
    newest = latest_checkpoint(path_of(cfg), pytest.fail)
    assert newest is not None
    state = load_checkpoint(newest, with_optimizer=False).state
    assert state["skipped_steps"] == [5, 9]
    assert state["step"] == 12
    assert result["trained_tokens"] == state["num_targets"] == 10 * 4 * 16
    assert [row["step"] for row in journal(cfg, "nonfinite")] == [5, 9]


def test_row_59_the_number_of_skips_is_bounded(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 3, 5, 6)
    with pytest.raises(DivergedError, match=r"step 6 .*more than train\.max_skips=2"):
        pretrain.run(config(nonfinite=NonFinite.skip, max_skips=2))


@pytest.mark.parametrize(("policy", "stop_at"), [(NonFinite.skip, 6), (NonFinite.rollback, 4), (NonFinite.rollback, 7)])
def test_row_59_skips_and_rollbacks_are_the_same_after_a_resume(
    policy: NonFinite, stop_at: int, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = (config(LSTM, run=name, nonfinite=policy, max_skips=2, ema_decay=0.9) for name in ("run", "other"))
    poison(monkeypatch, 5, 9)
    pretrain.run(whole)
    with monkeypatch.context() as patch:
        signal_after(patch, stop_at)
        with pytest.raises(StoppedError):
            pretrain.run(pieces)
    pretrain.run(replace(pieces, resume=True))
    assert_same(tensors_of(whole), tensors_of(pieces))


def test_row_60_a_rollback_goes_back_to_the_checkpoint_and_passes_the_batch_over(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rolled, skipped = config(nonfinite=NonFinite.rollback), config(run="other", nonfinite=NonFinite.skip)
    rolled = replace(rolled, log=LogConfig(every_steps=1))
    poison(monkeypatch, 8)
    pretrain.run(rolled)
    pretrain.run(skipped)
    assert [row["skipped"] for row in journal(rolled, "rollback")] == [[8]]
    assert [row["step"] for row in journal(rolled, "rollback")] == [6]
    assert_same(tensors_of(rolled), tensors_of(skipped))
    rows = read_metrics(path_of(rolled))
    assert [row["step"] for row in rows if "valid_loss" in row] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_row_59_a_validation_that_is_not_finite_ends_the_run_as_diverged_with_its_checkpoints_untouched(
    loss: float, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config()
    validate = LanguageModelling.validate

    def broken(self: LanguageModelling, **options: Any) -> Any:
        found = validate(self, **options)
        return replace(found, loss=loss) if journal(cfg, "save") else found

    monkeypatch.setattr(LanguageModelling, "validate", broken)
    with pytest.raises(DivergedError, match="validation loss after step"):
        pretrain.run(cfg)
    assert [row["policy"] for row in journal(cfg, "nonfinite")] == ["stop"]
    assert status_of(path_of(cfg)) is Status.diverged
    newest = latest_checkpoint(path_of(cfg), pytest.fail)
    assert newest is not None
    assert all(math.isfinite(value) for value in load_checkpoint(newest, with_optimizer=False).state["valid_losses"])


def test_row_50_a_signal_after_the_last_step_ends_the_command_and_loses_nothing(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config()
    with monkeypatch.context() as patch:
        patch.setattr(training, "plot_run", lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(StoppedError, match=r"stopped by SIGTERM after the last step, which is saved in"):
            pretrain.run(cfg)
    assert read_result(path_of(cfg)) is None
    assert status_of(path_of(cfg)) is Status.stopped
    with pytest.raises(ConfigError, match="it has made no step 13"):
        replay(path_of(cfg), 13, Console())
    assert pretrain.run(replace(cfg, resume=True))["step"] == 12
    assert [row["step"] for row in read_metrics(path_of(cfg)) if "loss" in row][-1] == 12


def test_row_50_a_signal_between_the_end_in_the_journal_and_the_result_waits_for_the_result(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, write = config(), Run.write_result

    def asked(self: Run, *args: Any, **keys: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        write(self, *args, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_result", asked)
        with pytest.raises(StoppedError, match=r"stopped by SIGTERM when .* was finished; .* resume=true"):
            pretrain.run(cfg)
    assert (read_result(path_of(cfg)) or {})["step"] == 12
    assert status_of(path_of(cfg)) is Status.finished


def test_a_run_that_ended_without_its_result_writes_it_when_it_goes_on(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_result", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pretrain.run(cfg)
    assert len(journal(cfg, "finished")) == 1
    before = tensors_of(cfg)
    pretrain.run(replace(cfg, resume=True))
    assert (read_result(path_of(cfg)) or {})["step"] == 12
    assert status_of(path_of(cfg)) is Status.finished
    assert len({step for step, _ in valid_rows(cfg)}) == len(valid_rows(cfg))
    assert_same(before, tensors_of(cfg))


def test_row_60_a_run_that_fails_before_its_first_checkpoint_rolls_back_to_its_start(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(nonfinite=NonFinite.rollback)
    poison(monkeypatch, 1)
    assert pretrain.run(cfg)["step"] == 12
    assert [row["step"] for row in journal(cfg, "rollback")] == [0]


def test_row_60_a_spike_is_noticed_and_passed_over_also_after_a_resume(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"nonfinite": NonFinite.skip, "spike_nats": 2.0}
    whole, pieces = config(**options), config(run="other", **options)
    poison(monkeypatch, 6, factor=100.0)
    pretrain.run(whole)
    assert [row["step"] for row in journal(whole, "nonfinite")] == [6]
    with monkeypatch.context() as patch:
        signal_after(patch, 5)
        with pytest.raises(StoppedError):
            pretrain.run(pieces)
    pretrain.run(replace(pieces, resume=True))
    assert_same(tensors_of(whole), tensors_of(pieces))


def test_row_60_a_spike_ends_the_run_by_default(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 6, factor=100.0)
    with pytest.raises(DivergedError, match="step 6 is a spike"):
        pretrain.run(config(spike_nats=2.0))


# Replay


def digest_of(folder: Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        whole.update(f"{path.relative_to(folder)} {path.stat().st_mtime_ns}".encode())
        whole.update(path.read_bytes() if path.is_file() else b"")
    return whole.hexdigest()


@pytest.mark.parametrize(
    ("step", "train"), [(1, {}), (6, {}), (12, {}), (7, {"micro_batch_size": 2, "ema_decay": 0.9})]
)
def test_a_replayed_step_has_the_numbers_of_the_run_and_leaves_it_as_it_is(
    step: int, train: dict[str, Any], config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate, losses = LanguageModelling.validate, [0]

    def rising(self: LanguageModelling, **options: Any) -> Any:
        found = validate(self, **options)
        losses[0] += 1
        return replace(found, loss=found.loss * (1 + 0.01 * losses[0]))

    monkeypatch.setattr(LanguageModelling, "validate", rising)
    cfg = replace(config(LSTM, **train), log=LogConfig(every_steps=1), save=SaveConfig(every_steps=5))
    cfg = replace(cfg, schedule=PlateauConfig(patience=0))
    pretrain.run(cfg)
    rates = [row["lr"] for row in read_metrics(path_of(cfg)) if "lr" in row]
    assert rates[-1] < max(rates)  # it follows the validations, which the replay does not do again
    before = digest_of(path_of(cfg))
    again = replay(path_of(cfg), step, Console())
    assert digest_of(path_of(cfg)) == before
    logged = next(row for row in read_metrics(path_of(cfg)) if row["step"] == step and "loss" in row)
    assert (again["loss"], again["grad_norm"], again["lr"]) == (logged["loss"], logged["grad_norm"], logged["lr"])
    assert again["num_targets"] == sum(len(row["ids"]) for row in again["rows"])
    nats = sum(row["nats_per_token"] * len(row["ids"]) for row in again["rows"])
    assert nats / again["num_targets"] == pytest.approx(again["loss"], rel=1e-5)


def test_a_run_of_a_card_that_is_not_here_is_replayed_on_the_cpu(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = replace(config(), log=LogConfig(every_steps=1))
    pretrain.run(cfg)
    find = replaying._find_start

    def of_a_card(*args: Any) -> Any:
        found = find(*args)
        found.config["device"]["type"] = "cuda"
        return found

    monkeypatch.setattr(replaying, "_find_start", of_a_card)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    logged = next(row for row in read_metrics(path_of(cfg)) if row["step"] == 7 and "loss" in row)
    assert replay(path_of(cfg), 7, Console())["loss"] == logged["loss"]
    assert "device.type=cuda is not available here: replaying on the CPU" in capsys.readouterr().err


def test_a_step_that_was_not_finite_is_replayed_with_its_rows_even_before_the_first_checkpoint(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config()
    poison(monkeypatch, 2)
    with pytest.raises(DivergedError):
        pretrain.run(cfg)
    assert list_checkpoints(path_of(cfg)) == []
    again = replay(path_of(cfg), 2, Console())
    assert math.isnan(again["loss"])
    assert again["from"] == "the start of the run"
    record = json.loads((path_of(cfg) / "nonfinite-step-000002.json").read_text(encoding="utf-8"))
    assert [row["ids"] for row in again["rows"]] == [row["ids"] for row in record["rows"]]


def test_a_step_after_a_rollback_is_replayed_without_the_batch_that_was_left_out(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(config(nonfinite=NonFinite.rollback), log=LogConfig(every_steps=1))
    with monkeypatch.context() as patch:
        poison(patch, 11)
        pretrain.run(cfg)
    logged = next(row for row in read_metrics(path_of(cfg)) if row["step"] == 12 and "loss" in row)
    assert replay(path_of(cfg), 12, Console())["loss"] == logged["loss"]


@pytest.mark.parametrize("step", [2, 6])
def test_a_step_of_a_finetuned_run_is_replayed_from_its_base_or_its_checkpoint(
    step: int, config: MakeConfig, tmp_path: Path
) -> None:
    base = config()
    pretrain.run(base)
    tuned = FinetuneConfig(
        dataset=base.dataset,
        optimizer=base.optimizer,
        schedule=base.schedule,
        device=base.device,
        train=replace(base.train, max_steps=6),
        log=LogConfig(every_steps=1),
        save=SaveConfig(every_steps=3),
        run=RunConfig(dir=str(tmp_path / "tuned"), path=str(path_of(base))),
    )
    finetune.run(tuned)
    logged = next(row for row in read_metrics(tmp_path / "tuned") if row["step"] == step and "loss" in row)
    again = replay(tmp_path / "tuned", step, Console())
    assert (again["loss"], again["grad_norm"]) == (logged["loss"], logged["grad_norm"])
    assert again["from"] == ("the start of the run" if step == 2 else "step-000000000003")


def test_a_step_that_no_run_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint and no record of step 3"):
        replay(tmp_path, 3, Console())
    with pytest.raises(ConfigError, match="step=0"):
        replay(tmp_path, 0, Console())


def test_a_step_behind_the_end_of_a_run_is_refused(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config()
    with monkeypatch.context() as patch:
        signal_after(patch, 6)
        with pytest.raises(StoppedError):
            pretrain.run(cfg)
    for last in (6, 12):
        assert replay(path_of(cfg), last, Console())["step"] == last
        capsys.readouterr()
        with pytest.raises(ConfigError, match=rf"last step of .* is {last}: it has made no step {last + 1}; name one"):
            replay(path_of(cfg), last + 1, Console())
        assert capsys.readouterr().err == ""  # nothing was trained first
        pretrain.run(replace(cfg, resume=True))


# Saves that fail


class FailingWrites:
    """Makes the saves with these numbers (from 1) fail, as a full disk does."""

    def __init__(self, patch: pytest.MonkeyPatch, numbers: set[int], error: Exception | None = None) -> None:
        self.count = 0
        original = checkpoint_writer.CheckpointWriter._write

        def write(writer: Any, staged: Any) -> Path:
            self.count += 1
            if self.count in numbers:
                raise error or OSError(28, "No space left on device")
            return original(writer, staged)

        patch.setattr(checkpoint_writer.CheckpointWriter, "_write", write)


@pytest.mark.parametrize(("keep_every", "fixed"), [(None, {2, 12}), (4, {2, 4, 8, 12})])
def test_where_saving_is_dear_the_first_and_last_state_are_saved_and_the_best_and_what_keep_every_says(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, keep_every: int | None, fixed: set[int]
) -> None:
    dear = replace(config(), save=SaveConfig(keep=9, keep_every=keep_every))
    with monkeypatch.context() as patch:
        patch.setattr(saving, "may_save", lambda cost_s, *_: cost_s == 0.0)
        pretrain.run(dear)
    losses = {row["step"]: row["valid_loss"] for row in read_metrics(path_of(dear)) if "valid_loss" in row}
    assert list(losses) == [2, 4, 6, 8, 10, 12]
    best = min(losses, key=lambda step: losses[step])
    assert {int(path.name[-12:]) for path in list_checkpoints(path_of(dear))} == fixed | {best}
    usual = replace(config(run="usual"), save=SaveConfig(keep=9))
    pretrain.run(usual)
    assert len(list_checkpoints(path_of(usual))) == 6
    assert_same(tensors_of(dear), tensors_of(usual))


def test_a_run_that_evaluates_seldom_saves_by_the_clock(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "OFFER_EVERY_S", 0.0)
    cfg = replace(config(), eval=EvalConfig(every_steps=100), save=SaveConfig(keep=99))
    pretrain.run(cfg)
    assert [row["step"] for row in journal(cfg, "save")] == list(range(1, 13))
    other = replace(config(run="other"), eval=EvalConfig(every_steps=100), save=SaveConfig(keep=99, every_steps=5))
    pretrain.run(other)
    assert [row["step"] for row in journal(other, "save")] == [5, 10, 12]
    assert_same(tensors_of(cfg), tensors_of(other))


COST = checkpoint_writer.Cost(copy_s=0.02, cpu_s=0.05, wall_s=0.08)


def test_a_budget_keeps_back_twice_the_time_of_a_save(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[float] = []
    refit = horizon.Budget.refit

    def record(budget: horizon.Budget, *args: Any) -> horizon.Horizon:
        kept.append(budget.save_s)
        return refit(budget, *args)

    monkeypatch.setattr(horizon.Budget, "refit", record)
    monkeypatch.setattr(checkpoint_writer, "Cost", lambda *_: COST)
    pretrain.run(replace(config(budget="1h"), save=SaveConfig(every_steps=1)))
    assert set(kept) == {0.0, 0.2}


def test_row_28_training_goes_on_over_saves_that_fail_and_ends_well_if_the_last_one_does_not(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FailingWrites(monkeypatch, {2, 3, 4})
    cfg = config()
    assert pretrain.run(cfg)["step"] == 12
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 3
    assert all("No space left on device; free some disk space" in line for line in warnings)
    assert [p.name[-2:] for p in list_checkpoints(path_of(cfg))] == ["10", "12"]


def test_row_28_a_run_whose_last_save_fails_ends_with_6_and_names_what_is_whole(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config()
    with monkeypatch.context() as patch:
        FailingWrites(patch, {6, 7, 8})
        with pytest.raises(ResourceError, match=r"the last save failed \(newest whole checkpoint: step-000000000010\)"):
            pretrain.run(cfg)
    assert not (path_of(cfg) / "result.json").exists()
    assert pretrain.run(replace(cfg, resume=True))["step"] == 12


def test_row_28_with_on_error_stop_a_save_that_fails_twice_ends_the_run(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(config(), save=SaveConfig(on_error=OnSaveError["stop"]))
    FailingWrites(monkeypatch, {2, 3})
    with pytest.raises(ResourceError, match="No space left") as caught:
        pretrain.run(cfg)
    assert caught.value.exit_code == 6
    assert [p.name[-2:] for p in list_checkpoints(path_of(cfg))] == ["02"]


def test_row_14_a_writer_that_dies_is_noticed_and_the_save_is_tried_again_at_once(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = replace(config(max_steps=100), save=SaveConfig(every_steps=20, keep=99))
    FailingWrites(monkeypatch, {1}, RuntimeError("the writer was killed"))
    pretrain.run(cfg)
    failed = journal(cfg, "save failed")
    assert [row["step"] for row in failed] == [20]
    assert "the writer was killed" in failed[0]["error"]
    losses = {row["step"]: row["valid_loss"] for row in read_metrics(path_of(cfg)) if "valid_loss" in row}
    assert losses[20] == min(loss for step, loss in losses.items() if step <= 20)  # and so it is tried again itself
    assert [row["step"] for row in journal(cfg, "save")] == [20, 40, 60, 80, 100]


@pytest.mark.parametrize(
    ("primitive", "number"), [("sync_file", errno.EIO), ("rename", errno.EXDEV), ("rename", errno.EACCES)]
)
def test_rows_12_13_a_save_whose_sync_or_rename_fails_is_made_anew_and_changes_no_byte(
    primitive: str, number: int, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, other = config(), config(run="other")
    pretrain.run(plain)
    original, calls = getattr(storage, primitive), [0]

    def fail_at_the_third_call(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(number, "failed")
        original(*args)

    monkeypatch.setattr(storage, primitive, fail_at_the_third_call)
    pretrain.run(other)
    assert calls[0] > 3
    assert_same(tensors_of(plain), tensors_of(other))


# Memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
    ids=["cuda", "python", "cpu"],
)
def test_row_35_out_of_memory_saves_the_last_step_and_says_what_would_fit(
    error: Exception, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, other = config(micro_batch_size=4), config(run="other", micro_batch_size=4)
    pretrain.run(plain)
    with monkeypatch.context() as patch:
        original = Trainer.run_micro_batch

        def run_micro_batch(self: Trainer, batch: Batch, micro: int, progress: float) -> Any:
            if self.state.step == 6:
                raise error
            return original(self, batch, micro, progress)

        patch.setattr(Trainer, "run_micro_batch", run_micro_batch)
        with pytest.raises(
            ResourceError, match=r"out of memory in step 7 with train\.batch_size=4 in parts of 4"
        ) as caught:
            pretrain.run(other)
    assert caught.value.exit_code == 6
    assert "saved up to step 6" in str(caught.value)
    assert "train.micro_batch_size=2" in str(caught.value)
    asked = {"OutOfMemoryError": "asked for 2.50 GiB", "RuntimeError": "asked for 8 bytes"}
    assert asked.get(type(error).__name__, "") in str(caught.value)
    pretrain.run(replace(other, resume=True))
    assert_same(tensors_of(plain), tensors_of(other))


def test_row_65_an_operation_without_a_deterministic_version_is_named_and_the_last_step_saved(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, other = config(), config(run="other")
    pretrain.run(plain)
    original = Trainer.run_micro_batch

    def run_micro_batch(self: Trainer, batch: Batch, micro: int, progress: float) -> Any:
        if self.state.step == 6:
            torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))  # which of the two it is is not defined
        return original(self, batch, micro, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_micro_batch", run_micro_batch)
        with pytest.raises(ConfigError, match="torch has no deterministic put_") as caught:
            pretrain.run(replace(other, device=replace(other.device, deterministic=True)))
    assert caught.value.exit_code == 2
    newest = latest_checkpoint(path_of(other), pytest.fail)
    assert newest is not None
    assert newest.name == "step-000000000006"
    pretrain.run(replace(other, resume=True))
    assert not torch.are_deterministic_algorithms_enabled()
    assert_same(tensors_of(plain), tensors_of(other))


def test_row_35_memory_that_runs_out_within_the_update_does_not_save_a_half_made_step(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config()
    original = torch.optim.AdamW.step

    def step(self: Any, *args: Any) -> Any:
        original(self, *args)
        if float(self.state[self.param_groups[0]["params"][0]]["step"]) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(ResourceError, match=r"out of memory in step 6.*saved up to step 4"):
        pretrain.run(cfg)
    newest = latest_checkpoint(path_of(cfg), pytest.fail)
    assert newest is not None
    assert newest.name == "step-000000000004"


def test_row_67_a_carried_state_survives_another_micro_batch_size(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = {"dropout_input": 0.0, "dropout_hidden": 0.0, "dropout_output": 0.0}
    plain = RecurrentConfig(d_embed=24, d_hidden=32, num_layers=1, **none)
    whole, pieces = config(plain), config(plain, run="other")
    pretrain.run(whole)
    with monkeypatch.context() as patch:
        signal_after(patch, 5)
        with pytest.raises(StoppedError):
            pretrain.run(pieces)
    for size, stop in ((1, 7), (4, 9), (2, None)):
        smaller = config(plain, run="other", micro_batch_size=size, resume=True)
        with monkeypatch.context() as patch:
            if stop is None:
                pretrain.run(smaller)
                continue
            signal_after(patch, stop)
            with pytest.raises(StoppedError):
                pretrain.run(smaller)
    ours, theirs = tensors_of(pieces), tensors_of(whole)
    for name in theirs:
        if not name.startswith("carry/"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


# Requests


def test_row_53_a_stop_during_validation_saves_at_once_and_validates_after_the_resume(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = (
        replace(config(run=name, ema_decay=0.9), schedule=PlateauConfig(patience=0)) for name in ("run", "other")
    )
    pretrain.run(whole)
    with monkeypatch.context() as patch:
        judge_alone = judging._judge_alone
        seen: list[int] = []

        def interrupted(trainer: Trainer, *others: Any) -> Any:
            validate = trainer.task.validate

            def asked(*, progress: Callable[[int], None], **keys: Any) -> Validation:
                def ask(num_tokens: int) -> None:
                    seen.append(num_tokens)
                    signal.raise_signal(signal.SIGTERM)
                    progress(num_tokens)

                return validate(progress=ask, **keys)

            if trainer.state.step == 6:
                patch.setattr(trainer.task, "validate", asked)
            return judge_alone(trainer, *others)

        patch.setattr(judging, "_judge_alone", interrupted)
        with pytest.raises(StoppedError, match="stopped by SIGTERM after step 6"):
            pretrain.run(pieces)
    assert len(seen) == 1
    pretrain.run(replace(pieces, resume=True))
    assert_same(tensors_of(whole), tensors_of(pieces))
    rows = [[row["valid_loss"] for row in read_metrics(path_of(c)) if "valid_loss" in row] for c in (whole, pieces)]
    assert rows[0] == rows[1]


def test_row_53_a_stop_after_the_last_step_resumes_to_the_same_result(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = config(), config(run="other")
    expected = pretrain.run(whole)
    with monkeypatch.context() as patch:
        signal_after(patch, 12)
        with pytest.raises(StoppedError, match="after step 12"):
            pretrain.run(pieces)
    result = pretrain.run(replace(pieces, resume=True))
    assert result["best_valid_loss"] == expected["best_valid_loss"]
    assert_same(tensors_of(whole), tensors_of(pieces))


def test_row_53_a_stop_between_the_last_save_and_the_result_leaves_one_row_of_the_last_validation(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = config(), config(run="other")
    pretrain.run(whole)
    with monkeypatch.context() as patch:
        patch.setattr(training, "plot_run", lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(StoppedError, match="after the last step"):
            pretrain.run(pieces)
    pretrain.run(replace(pieces, resume=True))
    assert valid_rows(whole) == valid_rows(pieces)


def test_row_53_a_validation_that_was_put_off_by_a_stop_is_one_row_also_if_the_run_is_killed_after_it(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = (replace(config(run=name), save=SaveConfig(every_steps=4)) for name in ("run", "other"))
    pretrain.run(whole)
    with monkeypatch.context() as patch:
        signal_after(patch, 6)
        with pytest.raises(StoppedError, match="after step 6"):
            pretrain.run(pieces)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pretrain.run(replace(pieces, resume=True))
    pretrain.run(replace(pieces, resume=True))
    assert valid_rows(whole) == valid_rows(pieces)


def test_row_60_a_rollback_to_a_stop_before_a_validation_keeps_that_validation(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"nonfinite": NonFinite.rollback, "max_skips": 2}
    whole, pieces = (replace(config(run=name, **options), save=SaveConfig(every_steps=4)) for name in ("run", "other"))
    poison(monkeypatch, 7)
    pretrain.run(whole)
    with monkeypatch.context() as patch:
        signal_after(patch, 6)
        with pytest.raises(StoppedError, match="after step 6"):
            pretrain.run(pieces)
    pretrain.run(replace(pieces, resume=True))
    assert [row["step"] for row in journal(pieces, "rollback")] == [6]
    assert valid_rows(whole) == valid_rows(pieces)
    assert_same(tensors_of(whole), tensors_of(pieces))


def test_the_steps_since_the_last_line_of_the_log_are_logged_when_a_run_is_stopped(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    each, cfg = (
        replace(config(run="each"), log=LogConfig(every_steps=1)),
        replace(config(), log=LogConfig(every_steps=5)),
    )
    pretrain.run(each)
    with monkeypatch.context() as patch:
        signal_after(patch, 7)
        with pytest.raises(StoppedError):
            pretrain.run(cfg)
    pretrain.run(replace(cfg, resume=True))
    losses, means = ({r["step"]: r["loss"] for r in read_metrics(path_of(c)) if "loss" in r} for c in (each, cfg))
    parts = {5: range(1, 6), 7: range(6, 8), 10: range(8, 11), 12: range(11, 13)}
    assert means == {step: pytest.approx(fmean(losses[k] for k in steps)) for step, steps in parts.items()}


def test_the_last_line_shows_the_validation_of_the_last_step(
    config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is written after that one, and showed the one before."""
    cfg = replace(config(max_steps=4), log=LogConfig(every_steps=1))  # validated at steps 2 and 4
    pretrain.run(cfg)
    loss = [row["valid_loss"] for row in read_metrics(path_of(cfg)) if "valid_loss" in row][-1]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("training ")]
    assert lines[-1].endswith(f"  valid ppl/token {format_number(math.exp(loss))}")


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_row_51_52_a_signal_that_saves_lets_the_run_go_on(
    name: str, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"there is no {name} here")
    cfg = replace(config(on_usr1=OnUsr1.save), save=SaveConfig(every_steps=100, keep=9))
    signal_after(monkeypatch, 5, number)
    assert pretrain.run(cfg)["step"] == 12
    assert [int(p.name[-12:]) for p in list_checkpoints(path_of(cfg))] == [5, 12]
    assert [(row["signal"], row["step"]) for row in journal(cfg, "signal")] == [(name, 5)]


def test_row_50_the_second_signal_ends_the_run_now(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config()
    for _ in range(2):
        signal_after(monkeypatch, 5, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(cfg)
    assert [p.name[-2:] for p in list_checkpoints(path_of(cfg))] == ["02", "04"]
    assert status_of(path_of(cfg)) is Status.stopped
    assert replay(path_of(cfg), 7, Console())["step"] == 7  # it may have made steps that it has not logged
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_row_53_a_run_that_is_stopped_before_its_first_step_counts_as_stopped(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config()
    monkeypatch.setattr(training, "build_trainer", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(StoppedError, match="stopped by SIGTERM before the first step"):
        pretrain.run(cfg)
    assert status_of(path_of(cfg)) is Status.stopped


def test_row_53_a_stop_before_the_first_step_is_told_so(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    original = pretrain.prepare

    def prepare(*args: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return original(*args)

    cfg = config()
    monkeypatch.setattr(pretrain, "prepare", prepare)
    with pytest.raises(StoppedError, match="stopped by SIGTERM before the first step"):
        pretrain.run(cfg)
    assert not path_of(cfg).exists()


def test_row_79_a_stop_within_the_accumulation_waits_for_the_end_of_the_step(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = (config(LSTM, run=name, micro_batch_size=1) for name in ("run", "other"))
    pretrain.run(whole)
    with monkeypatch.context() as patch:
        original = Trainer.run_micro_batch

        def run_micro_batch(self: Trainer, batch: Batch, micro: int, progress: float) -> Any:
            if (self.state.step, micro) == (4, 2):
                signal.raise_signal(signal.SIGTERM)
            return original(self, batch, micro, progress)

        patch.setattr(Trainer, "run_micro_batch", run_micro_batch)
        with pytest.raises(StoppedError, match="after step 5"):
            pretrain.run(pieces)
    pretrain.run(replace(pieces, resume=True))
    assert_same(tensors_of(whole), tensors_of(pieces))


def test_a_sample_is_drawn_after_each_validation_without_disturbing_the_training(config: MakeConfig) -> None:
    plain, sampled = config(run="plain"), config(run="sampled")
    sampled = replace(sampled, eval=replace(sampled.eval, sample_tokens=12))
    for cfg in (plain, sampled):
        pretrain.run(cfg)
    assert_same(tensors_of(plain), tensors_of(sampled))
    rows = [row for row in read_metrics(path_of(sampled)) if "valid_loss" in row]
    assert rows
    assert all(isinstance(row["sample"], str) and row["sample"] for row in rows)


def test_a_time_limit_stops_and_saves_like_a_signal(config: MakeConfig) -> None:
    cfg = config(max_steps=100_000, time_limit="1")
    with pytest.raises(StoppedError, match=r"stopped by train\.time_limit after step [0-9]+; .*resume=true"):
        pretrain.run(cfg)
    newest = latest_checkpoint(path_of(cfg), pytest.fail)
    assert newest is not None
    assert journal(cfg, "stopped")[0]["step"] == load_checkpoint(newest, with_optimizer=False).step > 0


def test_what_comes_before_the_first_step_is_not_taken_for_its_time(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared_for_long(trainer: Trainer, train: TrainConfig, started: float, **rest: Any) -> Timing:
        return Timing(trainer, train, started - 5000.0, **rest)

    monkeypatch.setattr(training, "Timing", prepared_for_long)
    assert pretrain.run(config(time_limit="1h"))["step"] == 12  # a step of 5000 s would have to end before the limit


def test_the_end_of_a_slurm_job_stops_and_saves_too(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time())))
    with pytest.raises(StoppedError, match="stopped by SLURM_JOB_END_TIME after step 1"):
        pretrain.run(config())


# Workers


@pytest.mark.parametrize("model", [None, LSTM], ids=["windows", "lanes"])
def test_row_73_workers_change_no_byte_also_over_a_stop_with_another_number_of_them(
    model: RecurrentConfig | None, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = () if model is None else (model,)
    whole, pieces = config(*models, workers=0), config(*models, run="other", workers=3)
    pretrain.run(whole)
    for workers, stop in ((3, 4), (0, 7)):
        with monkeypatch.context() as patch:
            signal_after(patch, stop)
            with pytest.raises(StoppedError):
                pretrain.run(config(*models, run="other", workers=workers, resume=True))
    pretrain.run(config(*models, run="other", workers=3, resume=True))
    assert_same(tensors_of(whole), tensors_of(pieces))


def test_no_thread_is_left_when_a_run_with_workers_has_ended(config: MakeConfig) -> None:
    import threading

    before = threading.active_count()
    pretrain.run(config(workers=3))
    assert threading.active_count() == before


# Another environment


def test_row_64_a_resume_with_other_threads_says_that_bits_may_differ(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config()
    with monkeypatch.context() as patch:
        signal_after(patch, 5)
        with pytest.raises(StoppedError):
            pretrain.run(cfg)
    capsys.readouterr()
    pretrain.run(replace(cfg, resume=True, device=replace(cfg.device, threads=2)))
    assert "not promised bit for bit: threads 1 -> 2" in capsys.readouterr().err
    assert journal(cfg, "environment")[0]["changed"] == ["threads 1 -> 2"]


def test_row_64_a_resume_on_another_device_or_cpu_says_that_bits_may_differ(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config()
    prefers_onednn = products.prefers_onednn()
    monkeypatch.setattr(products, "prefers_onednn", lambda: prefers_onednn)
    with monkeypatch.context() as patch:
        signal_after(patch, 5)
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
        with pytest.raises(StoppedError):
            pretrain.run(cfg)
    capsys.readouterr()
    other = replace(cfg.device, precision=Precision.bf16)
    here = torch.backends.cpu.get_cpu_capability()
    pretrain.run(replace(cfg, resume=True, device=other))
    changed = [f"instructions another -> {here}", "device cpu fp32 -> cpu bf16"]
    assert f"not promised bit for bit: {', '.join(changed)}" in capsys.readouterr().err
    assert journal(cfg, "environment")[0]["changed"] == changed

"""A run is continued with something changed: what would change its numbers is refused, the rest is noted.

Numbers in names (row_66 ...) are the rows of the project's fault table.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness import Lmkit, digests, forge, forge_config
from stopping import signal_after

from lmkit import judging
from lmkit.commands import training
from lmkit.commands.new_data import DataOrder, follow
from lmkit.commands.replay import replay
from lmkit.console import Console
from lmkit.data.batches import Lanes
from lmkit.data.prepared import cache_dir, open_prepared
from lmkit.errors import DataError
from lmkit.store.browse import read_journal
from lmkit.store.checkpoint import Snapshot, latest_checkpoint, list_checkpoints, load_checkpoint
from lmkit.store.found import read_metrics, read_result
from lmkit.store.manifest import STATE, canonical_json, step_of
from lmkit.tasks.language import LanguageModelling
from lmkit.train import Trainer

DEVICE = ["device=cpu", "device.threads=1"]


def content(folder: Path) -> dict[str, bytes]:
    """Everything in a run that a refused command must leave alone: all but logs and locks."""
    names = {"journal.jsonl", "LOCK", "LOCK.info"}
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in names
    }


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["model.d_embed=24"], "model.d_embed: 16 -> 24"),
        (["model.num_layers=2"], "model.num_layers: 1 -> 2"),
        (["model=gru"], "model.cell: lstm -> gru"),
        (["optimizer=sgd"], "optimizer.kind: adamw -> sgd"),
        (["seed=2"], "seed: 1 -> 2"),
        (["train.batch_size=8"], "train.batch_size: 4 -> 8"),
        (["train.seq_len=8"], "train.seq_len: 16 -> 8"),
        (["train.order=windows"], "train.order: auto -> windows"),
        (["tokenizer=char"], "tokenizer: "),
        (["train.batch_size=8", "model.d_embed=24"], "model.d_embed: 16 -> 24, train.batch_size: 4 -> 8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_66_71_a_key_that_decides_what_is_computed_is_refused_with_both_values(
    small: list[str], trained: Path, lmkit: Lmkit, words: list[str], difference: str
) -> None:
    before = content(trained)
    done = lmkit(*small, f"run.dir={trained}", "resume=true", "train.max_steps=14", *words)
    assert done.code == 2, done.err
    assert difference in done.error
    assert "finetune" in done.error
    assert content(trained) == before


def test_row_66_a_run_of_another_order_of_the_data_is_refused(
    small: list[str], trained: Path, lmkit: Lmkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*small, f"run.dir={trained}", "resume=true", "train.max_steps=14"]
    with monkeypatch.context() as patch:
        patch.setattr(training, "ORDER", "2")
        done = lmkit(*words)
        assert done.code == 2, done.err
        assert "because this changed: order: 1 -> 2" in done.error
    info = json.loads((trained / "run.json").read_bytes())
    del info["digests"]["order"]  # as in the runs of a version that did not write it down yet
    (trained / "run.json").write_text(json.dumps(info), encoding="utf-8")
    assert lmkit(*words).code == 0


def test_row_67_a_key_that_only_says_how_is_accepted_and_journalled(
    small: list[str], trained: Path, lmkit: Lmkit, tmp_path: Path
) -> None:
    changes = [
        "eval.every_steps=3", "save.every_steps=2", "log.every_steps=2", "save.keep=5", "device.threads=2",
        "device.type=auto", "train.workers=2",
    ]  # fmt: skip
    done = lmkit(*small, f"run.dir={trained}", "resume=true", "train.max_steps=16", *changes)
    assert done.code == 0, done.err
    assert latest_checkpoint(trained, pytest.fail) == trained / "checkpoints" / "step-000000000016"
    noted = next(event["keys"] for event in read_journal(trained) if event["event"] == "changed")
    asked = dict(word.split("=") for word in [*changes, "train.max_steps=16"])
    assert [change.partition(": ")[0] for change in noted] == sorted(asked)  # and nothing of how it was started
    assert [change.rpartition(" -> ")[2] for change in noted] == [asked[key] for key in sorted(asked)]
    assert f"going on with other values than before: {', '.join(noted)}\n" in done.err
    done = lmkit(*small, f"run.dir={trained}", "resume=true", "train.max_steps=18", *changes)
    assert "going on with other values than before: train.max_steps: 16 -> 18\n" in done.err


def test_row_67_another_micro_batch_of_the_same_batch_goes_on_from_the_same_state(
    small: list[str], trained: Path, lmkit: Lmkit
) -> None:
    done = lmkit(*small, f"run.dir={trained}", "resume=true", "train.max_steps=16", "train.micro_batch_size=2")
    assert done.code == 0, done.err
    rows = read_metrics(trained)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 17))


def test_row_68_a_stored_key_of_a_newer_version_is_named(trained: Path, lmkit: Lmkit) -> None:
    newest = list_checkpoints(trained)[-1]
    forge_config(newest, lambda config: config["model"].update(hyper_gain=1.5))
    done = lmkit("generate", f"run={newest}", *DEVICE)
    assert done.code == 4, done.err
    assert "model has unknown keys: hyper_gain" in done.error
    assert "newer lmkit" in done.error


@pytest.mark.parametrize("section", ["train", "model", None])
def test_row_68_a_run_of_a_newer_version_is_not_continued_without_its_settings(
    small: list[str], trained: Path, lmkit: Lmkit, section: str | None
) -> None:
    newest = list_checkpoints(trained)[-1]
    forge_config(newest, lambda config: (config if section is None else config[section]).update(hyper_gain=1.5))
    done = lmkit(*small, f"run.dir={trained}", "resume=true", "train.max_steps=14")
    assert done.code == 4, done.err
    assert "hyper_gain" in done.error
    assert "was made by lmkit " in done.error


@pytest.mark.parametrize("part", ["state", "horizon"])
def test_row_68_a_stored_state_of_a_newer_version_is_named(
    small: list[str], trained: Path, lmkit: Lmkit, part: str
) -> None:
    for path in list_checkpoints(trained):
        state = json.loads((path / STATE).read_bytes())
        (state if part == "state" else state["horizon"])["momentum"] = 0.5
        forge(path, STATE, canonical_json(state))
    for words in ([*small, f"run.dir={trained}", "resume=true"], ["runs", "replay", f"{trained}", "step=12"]):
        done = lmkit(*words)
        assert done.code == 4, done.err
        assert re.search(r"state\.json was made by lmkit .* has unknown keys: momentum; .*update lmkit$", done.error)


def test_row_68_a_command_and_a_configuration_of_a_newer_version_are_named(
    small: list[str], trained: Path, lmkit: Lmkit
) -> None:
    for path in list_checkpoints(trained):
        forge_config(path, lambda config: config.update(command="distil"))
    for words in ([*small, f"run.dir={trained}", "resume=true"], ["runs", "replay", f"{trained}", "step=12"]):
        done = lmkit(*words)
        assert done.code == 4, done.err
        assert re.search(r"config\.json was made by lmkit .*: command='distil' is unknown; .*update lmkit$", done.error)


@pytest.mark.parametrize("part", ["task", "fitted"])
def test_row_68_what_a_newer_version_has_stored_of_a_regression_is_named(
    lmkit: Lmkit, tmp_path: Path, part: str
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("x,y\n" + "".join(f"{n},{2 * n}\n" for n in range(20)), encoding="utf-8")
    words = ["task=regress", f"task.data={rows}", "task.target=y", "task.numeric=[x]", "train.max_steps=2"]
    assert lmkit("finetune", *words, f"run.dir={tmp_path}/run", *DEVICE).code == 0

    def change(config: dict[str, Any]) -> None:
        (config["task"] if part == "task" else config["fitted"]["target"])["hyper_gain"] = 1.5

    for path in list_checkpoints(tmp_path / "run"):
        forge_config(path, change)
    done = lmkit("finetune", f"run={tmp_path}/run", f"predict={rows}", *DEVICE)
    assert done.code == 4, done.err
    assert re.search(r"config\.json does not describe .* has unknown keys: hyper_gain; .*update lmkit$", done.error)


def test_row_68_a_finetuning_of_a_newer_version_is_not_continued_without_its_settings(
    lmkit: Lmkit, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("x,y\n" + "".join(f"{n},{2 * n}\n" for n in range(20)), encoding="utf-8")
    words = ["task=regress", f"task.data={rows}", "task.target=y", "task.numeric=[x]", f"run.dir={tmp_path}/run"]
    assert lmkit("finetune", *words, "train.max_steps=2", *DEVICE).code == 0
    for path in list_checkpoints(tmp_path / "run"):
        forge_config(path, lambda config: config["model"].update(hyper_gain=1.5))
    done = lmkit("finetune", *words, "train.max_steps=4", "resume=true", *DEVICE)
    assert done.code == 4, done.err
    assert re.search(r"made by lmkit .*: config\.model has unknown keys: hyper_gain; .*update lmkit$", done.error)


@pytest.mark.parametrize("change", ["data", "tokenizer"])
def test_rows_69_71_other_data_is_refused_also_where_only_the_checkpoints_are_left(
    small: list[str], lmkit: Lmkit, own_corpus: Path, tmp_path: Path, change: str
) -> None:
    words = [*small, f"dataset.path={own_corpus}", f"run.dir={tmp_path}/run"]
    assert lmkit(*words).code == 0
    (tmp_path / "run" / "run.json").unlink()
    text = (own_corpus / "03.txt").read_bytes()
    if change == "data":
        (own_corpus / "03.txt").write_bytes(text.replace(b"the", b"teh"))
    other = [] if change == "data" else ["tokenizer=char"]
    done = lmkit(*words, *other, "resume=true", "train.max_steps=14")
    assert done.code == 2, done.err
    assert "cannot be resumed because this changed: " in done.error
    assert f"{change}: " in done.error
    assert not (tmp_path / "run" / "run.json").exists()
    (own_corpus / "03.txt").write_bytes(text)
    done = lmkit(*words, "resume=true", "train.max_steps=14")
    assert done.code == 0, done.err
    assert list_checkpoints(tmp_path / "run")[-1].name == "step-000000000014"


def test_row_19_a_damaged_checkpoint_is_skipped_also_where_run_json_is_missing(
    small: list[str], trained: Path, lmkit: Lmkit
) -> None:
    (trained / "run.json").unlink()
    (list_checkpoints(trained)[-1] / "MANIFEST.json").unlink()
    done = lmkit(*small, f"run.dir={trained}", "resume=true", "train.max_steps=14")
    assert done.code == 0, done.err
    assert "skipped a damaged checkpoint" in done.err


@pytest.mark.parametrize("how", ["links", "gone"])
def test_row_19_a_run_whose_checkpoints_are_links_or_gone_does_not_begin_anew(
    small: list[str], trained: Path, lmkit: Lmkit, tmp_path: Path, how: str
) -> None:
    metrics = (trained / "metrics.jsonl").read_bytes()
    for path in list_checkpoints(trained):
        moved = path.rename(tmp_path / path.name)
        if how == "links":
            path.symlink_to(moved)
    done = lmkit(*small, f"run.dir={trained}", "resume=true", "train.max_steps=14")
    assert done.code == 4, done.err
    assert ("is a symbolic link" if how == "links" else "was saved after step 12") in done.error
    assert (trained / "metrics.jsonl").read_bytes() == metrics
    for path in tmp_path.glob("step-*"):
        (trained / "checkpoints" / path.name).unlink(missing_ok=True)
        path.rename(trained / "checkpoints" / path.name)
    done = lmkit(*small, f"run.dir={trained}", "resume=true", "train.max_steps=14")
    assert done.code == 0, done.err


@pytest.fixture
def own_corpus(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus, to be changed."""
    return Path(shutil.copytree(corpus, tmp_path / "texts"))


@pytest.mark.parametrize("change", ["same size and time", "appended", "a file more", "a file less", "renamed"])
def test_rows_69_70_other_data_under_the_same_names_is_refused(
    small: list[str], lmkit: Lmkit, own_corpus: Path, tmp_path: Path, change: str
) -> None:
    words = [*small, f"dataset.path={own_corpus}", f"run.dir={tmp_path}/run"]
    assert lmkit(*words).code == 0
    before = content(tmp_path / "run")
    path = own_corpus / "03.txt"
    text, stat = path.read_bytes(), path.stat()
    if change == "same size and time":
        path.write_bytes(text.replace(b"the", b"teh"))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size
    elif change == "appended":
        path.write_bytes(text + b"one more line\n")
    elif change == "a file more":
        (own_corpus / "zz.txt").write_bytes(text + b"x\n")
    else:
        path.rename(own_corpus / ("zz.txt" if change == "renamed" else "03.gone"))
    done = lmkit(*words, "resume=true", "train.max_steps=14")
    assert done.code == 2, done.err
    assert "cannot be resumed because this changed: data: " in done.error
    table = [line.split() for line in done.err.splitlines()]
    assert ["key", "the", "run", "now"] in table
    assert [len(row) for row in table if row[:1] == ["data"]] == [3]
    assert content(tmp_path / "run") == before


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The records of one kind in a run's journal, without time and process."""
    found = [record for record in read_journal(run_dir) if record.pop("event") == name]
    return [{key: value for key, value in record.items() if key not in ("time", "pid")} for record in found]


@pytest.fixture
def grown(small: list[str], lmkit: Lmkit, own_corpus: Path, tmp_path: Path) -> list[str]:
    """The words that continue a finished run, in ``run``, for 8 more steps; its text has grown since."""
    words = [*small, f"dataset.path={own_corpus}"]
    assert lmkit(*words, f"run.dir={tmp_path}/run").code == 0
    (own_corpus / "03.txt").write_bytes((own_corpus / "03.txt").read_bytes() + b"the bird sat on one more line.\n")
    return [*words, "resume=true", "train.max_steps=20"]


NEW_DATA = "run.allow_data_change=true"


def test_row_70_new_data_are_taken_where_that_is_asked_for_and_their_order_begins_anew(
    grown: list[str], lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    info = json.loads((run_dir / "run.json").read_bytes())
    refused = lmkit(*grown, f"run.dir={run_dir}")
    assert refused.code == 2, refused.err
    assert NEW_DATA in refused.error
    seen: list[tuple[int, bool, list[int]]] = []
    train_step = Trainer.train_step

    def noted(self: Trainer, batch: Any) -> Any:
        seen.append((self.state.step, batch.starts_text, batch.targets_BT[0].tolist()))
        return train_step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", noted)
    done = lmkit(*grown, f"run.dir={run_dir}", NEW_DATA)
    assert done.code == 0, done.err
    assert done.err.count("the data changed: behind step 12 they come in a new order (number 1)") == 1
    assert [step for step, _, _ in seen] == list(range(12, 20))  # the count of steps goes on
    assert [starts for _, starts, _ in seen] == [True] + 7 * [False]  # with the beginning of an epoch
    now = json.loads((run_dir / "run.json").read_bytes())
    before, new = info["digests"]["data"], now["digests"]["data"]
    assert before != new
    assert now == {**info, "digests": info["digests"] | {"data": new}, "former_data": [before]}
    assert seen[0][2] == open_prepared(cache_dir() / "prepared" / new).splits["train"].tokens[:16].tolist()
    assert events(run_dir, "data changed") == [{"from": before, "to": new, "step": 12, "order": 1}]
    newest = load_checkpoint(list_checkpoints(run_dir)[-1], with_optimizer=False)
    assert newest.config["data_order"] == {"number": 1, "first_step": 12, "data": new}
    assert read_metrics(run_dir)[-1]["step"] == 20


@pytest.mark.parametrize("order", [[], ["train.shuffle=blocks", "train.seq_len_jitter=true"]])
def test_row_70_a_run_with_new_data_goes_on_without_the_key_to_the_same_bytes(
    small: list[str], lmkit: Lmkit, own_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: list[str]
) -> None:
    words = [*small, f"dataset.path={own_corpus}", *order]
    assert lmkit(*words, f"run.dir={tmp_path}/first").code == 0
    (own_corpus / "03.txt").unlink()
    words += ["resume=true", "train.max_steps=20"]
    for name in ("whole", "stopped", "killed"):
        shutil.copytree(tmp_path / "first", tmp_path / name)
    assert lmkit(*words, f"run.dir={tmp_path}/whole", NEW_DATA).code == 0
    with monkeypatch.context() as patch:
        signal_after(patch, 15)
        assert lmkit(*words, f"run.dir={tmp_path}/stopped", NEW_DATA).code == 75
    with monkeypatch.context() as patch:  # before the first checkpoint of the new data

        def killed(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(training, "_train", killed)
        assert lmkit(*words, f"run.dir={tmp_path}/killed", NEW_DATA).code == 130
    for name in ("stopped", "killed"):
        done = lmkit(*words, f"run.dir={tmp_path}/{name}")
        assert done.code == 0, done.err
        assert digests(tmp_path / name) == digests(tmp_path / "whole"), name
    assert [record["step"] for record in events(tmp_path / "stopped", "data changed")] == [12]
    done = lmkit(*words, f"run.dir={tmp_path}/whole")
    assert "nothing to do" in done.err


def test_row_70_behind_an_older_checkpoint_the_new_data_begin_anew_once_more(
    grown: list[str], lmkit: Lmkit, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert lmkit(*grown, f"run.dir={run_dir}", "save.keep=9", NEW_DATA).code == 0
    for path in list_checkpoints(run_dir):
        if step_of(path.name) > 8:
            (path / "MANIFEST.json").unlink()
    done = lmkit(*grown, f"run.dir={run_dir}", "train.max_steps=21")
    assert done.code == 0, done.err
    assert [(record["step"], record["order"]) for record in events(run_dir, "data changed")] == [(12, 1), (8, 1)]
    newest = load_checkpoint(list_checkpoints(run_dir)[-1], with_optimizer=False)
    assert (newest.step, newest.config["data_order"]["first_step"]) == (21, 8)


def test_row_70_the_data_of_before_can_come_back_in_an_order_of_their_own(
    grown: list[str], lmkit: Lmkit, own_corpus: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    first = json.loads((run_dir / "run.json").read_bytes())["digests"]["data"]
    assert lmkit(*grown, f"run.dir={run_dir}", NEW_DATA).code == 0
    text = (own_corpus / "03.txt").read_bytes()
    (own_corpus / "03.txt").write_bytes(text.replace(b"the bird sat on one more line.\n", b""))
    assert lmkit(*grown, f"run.dir={run_dir}", "train.max_steps=24").code == 2
    done = lmkit(*grown, f"run.dir={run_dir}", "train.max_steps=24", NEW_DATA)
    assert done.code == 0, done.err
    info = json.loads((run_dir / "run.json").read_bytes())
    assert info["digests"]["data"] == info["former_data"][0] == first
    assert [(record["step"], record["order"]) for record in events(run_dir, "data changed")] == [(12, 1), (20, 2)]


def test_row_70_losses_of_the_data_before_neither_end_a_run_early_nor_are_its_best(
    grown: list[str], lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge_alone = judging._judge_alone

    def harder(trainer: Trainer, *others: Any) -> Any:
        """A text whose losses are above all before, and fall: 84, 80, 76, 72."""
        found, sample = judge_alone(trainer, *others)
        return replace(found, loss=100.0 - trainer.state.step), sample

    monkeypatch.setattr(judging, "_judge_alone", harder)
    done = lmkit(*grown, "train.max_steps=28", "train.patience=2", f"run.dir={tmp_path}/run", NEW_DATA)
    assert done.code == 0, done.err
    result = read_result(tmp_path / "run")
    assert result is not None
    assert (result["step"], result["best_valid_loss"]) == (28, 72.0)


@pytest.mark.parametrize(
    ("before", "share", "since"),
    [([1.0, 2.0, 0.5], 0.5, None), ([1.0, 2.0, 3.0], 0.25, 12)],
    ids=["no average yet", "averaging"],
)
def test_row_70_plateaus_and_the_beginning_of_an_average_go_by_losses_of_one_text(
    small: list[str],
    lmkit: Lmkit,
    own_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: list[float],
    share: float,
    since: int | None,
) -> None:
    """The losses of the new text are above those before, and fall: the rate stays where it was, and so does the mean.

    ``share``: what the plateaus before have left of the rate.
    """
    losses, judge_alone = [*before, 9.0, 8.0, 7.0, 6.0], judging._judge_alone

    def given(trainer: Trainer, *others: Any) -> Any:
        found, sample = judge_alone(trainer, *others)
        return replace(found, loss=losses[trainer.state.step // 4 - 1]), sample

    monkeypatch.setattr(judging, "_judge_alone", given)
    words = [
        *small, f"dataset.path={own_corpus}", "schedule=plateau", "schedule.patience=0", "schedule.warmup_ratio=0",
        "train.average=nt_asgd", "train.asgd_patience=1", f"run.dir={tmp_path}/run",
    ]  # fmt: skip
    assert lmkit(*words).code == 0
    (own_corpus / "03.txt").unlink()
    assert lmkit(*words, "resume=true", "train.max_steps=24", NEW_DATA).code == 0
    assert lmkit(*words, "resume=true", "train.max_steps=28").code == 0
    rates = {row["step"]: row["lr"] for row in read_metrics(tmp_path / "run") if "lr" in row}
    assert {rates[step] / rates[1] for step in range(13, 29)} == {share}
    state = load_checkpoint(list_checkpoints(tmp_path / "run")[-1], with_optimizer=False).state
    assert (state["averaged_since"], state["data_changes"]) == (since, [12])


@pytest.mark.parametrize("bad_step", [None, 10])
def test_row_70_a_validation_that_was_due_when_the_data_changed_is_not_taken_for_one_of_the_data_before(
    small: list[str],
    lmkit: Lmkit,
    own_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bad_step: int | None,
) -> None:
    """The losses of the new text are above that before: one of them behind it would be a plateau, the rate half.

    bad_step: of a batch that is not finite, so that the run goes back to where the data changed.
    """
    losses, judge_alone = {4: 1.0, 8: 9.0, 12: 8.0, 16: 7.0, 20: 6.0}, judging._judge_alone

    def given(trainer: Trainer, *others: Any) -> Any:
        found, sample = judge_alone(trainer, *others)
        return replace(found, loss=losses[trainer.state.step]), sample

    monkeypatch.setattr(judging, "_judge_alone", given)
    words = [
        *small, f"dataset.path={own_corpus}", "schedule=plateau", "schedule.patience=0", "schedule.warmup_ratio=0",
        "train.nonfinite=rollback", f"run.dir={tmp_path}/run",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        signal_after(patch, 8)
        assert lmkit(*words).code == 75
    (own_corpus / "03.txt").unlink()
    run_micro_batch = Trainer.run_micro_batch

    def poisoned(self: Trainer, *args: Any) -> Any:
        loss, state = run_micro_batch(self, *args)
        return loss * (np.nan if self.state.step + 1 == bad_step else 1.0), state

    monkeypatch.setattr(Trainer, "run_micro_batch", poisoned)
    assert lmkit(*words, "resume=true", "train.max_steps=20", NEW_DATA).code == 0
    assert len({row["lr"] for row in read_metrics(tmp_path / "run") if "lr" in row}) == 1
    state = load_checkpoint(list_checkpoints(tmp_path / "run")[-1], with_optimizer=False).state
    assert (state["valid_steps"], state["data_changes"]) == ([4, 12, 16, 20], [8])


def test_row_70_a_run_that_has_no_step_left_for_the_new_data_has_their_loss_as_its_best(
    small: list[str], lmkit: Lmkit, own_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge_alone = judging._judge_alone

    def given(trainer: Trainer, *others: Any) -> Any:
        found, sample = judge_alone(trainer, *others)
        return replace(found, loss=float(trainer.state.step)), sample

    monkeypatch.setattr(judging, "_judge_alone", given)
    words = [*small, f"dataset.path={own_corpus}", f"run.dir={tmp_path}/run"]
    with monkeypatch.context() as patch:
        signal_after(patch, 12)
        assert lmkit(*words).code == 75
    (own_corpus / "03.txt").unlink()
    assert lmkit(*words, "resume=true", NEW_DATA).code == 0
    result = read_result(tmp_path / "run")
    assert result is not None
    assert (result["step"], result["best_valid_loss"]) == (12, 12.0)


def test_row_70_the_key_changes_nothing_where_the_data_did_not(
    small: list[str], trained: Path, lmkit: Lmkit, tmp_path: Path
) -> None:
    twin = shutil.copytree(trained, tmp_path / "twin")
    words = [*small, "resume=true", "train.max_steps=16"]
    assert lmkit(*words, f"run.dir={trained}").code == 0
    assert lmkit(*words, f"run.dir={twin}", NEW_DATA).code == 0
    assert digests(twin) == digests(trained)
    assert (twin / "run.json").read_bytes() == (trained / "run.json").read_bytes()
    assert events(twin, "data changed") == []


def test_rows_70_71_another_vocabulary_is_refused_although_other_data_are_allowed(
    small: list[str], lmkit: Lmkit, own_corpus: Path, tmp_path: Path
) -> None:
    words = [*small, f"dataset.path={own_corpus}", "tokenizer=char", f"run.dir={tmp_path}/run"]
    assert lmkit(*words).code == 0
    before = content(tmp_path / "run")
    (own_corpus / "03.txt").write_bytes((own_corpus / "03.txt").read_bytes() + "a quite new letter: ß\n".encode())
    done = lmkit(*words, "resume=true", "train.max_steps=20", NEW_DATA)
    assert done.code == 2, done.err
    assert "cannot be resumed because this changed: tokenizer: " in done.error
    assert "data" not in done.error.replace(str(tmp_path), "")
    assert content(tmp_path / "run") == before
    (tmp_path / "run" / "run.json").unlink()  # so that the checkpoints alone tell
    done = lmkit(*words, "resume=true", "train.max_steps=20", NEW_DATA)
    assert done.code == 2, done.err
    assert "cannot be resumed because this changed: tokenizer: " in done.error
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("why", ["fitted", "counted", "not resumed"])
def test_row_70_what_cannot_go_on_with_other_data_is_refused_in_any_case(
    small: list[str], lmkit: Lmkit, own_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    words = [*small, f"dataset.path={own_corpus}", f"run.dir={tmp_path}/run"]
    if why == "counted":
        words = [word for word in words if not word.startswith(("model", "train", "eval", "log"))] + ["model=kn5"]
    if why == "not resumed":
        done = lmkit(*words, NEW_DATA)
        assert done.code == 2, done.err
        assert "run.allow_data_change=true needs resume=true" in done.error
        return
    assert lmkit(*words).code == 0
    (tmp_path / "run" / "result.json").unlink()
    before = content(tmp_path / "run")
    (own_corpus / "03.txt").unlink()
    if why == "fitted":
        monkeypatch.setattr(LanguageModelling, "fitted", lambda self: {"labels": ["a", "b"]})
    done = lmkit(*words, "resume=true", NEW_DATA)
    assert done.code == 2, done.err
    assert ("has learnt labels from other data" if why == "fitted" else "was counted on other data") in done.error
    assert content(tmp_path / "run") == before


def test_row_70_steps_of_the_new_data_are_replayed_and_those_of_the_old_are_not(
    grown: list[str], lmkit: Lmkit, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert lmkit(*grown, f"run.dir={run_dir}", "save.keep=9", NEW_DATA).code == 0
    logged = {row["step"]: row["loss"] for row in read_metrics(run_dir) if "loss" in row}
    result = replay(run_dir, 14, Console(io.StringIO()))
    assert (result["loss"], result["from"]) == (logged[14], "step-000000000012")
    for step in (6, 12):
        with pytest.raises(DataError, match="changed since"):
            replay(run_dir, step, Console(io.StringIO()))


def test_row_70_batches_that_were_to_be_left_out_are_not_those_of_the_new_data() -> None:
    """As behind a rollback: step 9 was done once, and is to be left out when it comes again."""
    snapshot = Snapshot(7, {}, {}, {"skipped_steps": [3, 9]}, {})
    said: list[Any] = []
    job: Any = SimpleNamespace(
        model_config=SimpleNamespace(trains_by_counting=False),
        task=SimpleNamespace(fitted=dict, batches=Lanes(np.arange(50), 9, 2, 5)),
        run=SimpleNamespace(take_data=said.append, journal=lambda event, fields: said.append(event)),
        place=SimpleNamespace(console=Console(io.StringIO())),
    )
    follow(job, DataOrder(1, 7, "new"), snapshot, "old", ["older"])
    assert snapshot.state["skipped_steps"] == [3]
    assert said == [["older", "old"], "data changed"]


def test_row_70_an_order_in_a_checkpoint_that_means_nothing_is_refused(
    grown: list[str], lmkit: Lmkit, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert lmkit(*grown, f"run.dir={run_dir}", NEW_DATA).code == 0
    for number in (0, -1, "1", True, 1.5, None):
        forge_config(list_checkpoints(run_dir)[-1], lambda config, n=number: config["data_order"].update(number=n))
        done = lmkit(*grown, f"run.dir={run_dir}", "train.max_steps=24")
        assert done.code == 4, done.err
        assert "data_order.number" in done.error


def test_row_71_the_tokenizer_of_another_run_in_a_checkpoint_is_refused(
    small: list[str], trained: Path, lmkit: Lmkit, tmp_path: Path
) -> None:
    words = [word for word in small if word != "tokenizer=byte"]
    assert lmkit(*words, "tokenizer=char", f"run.dir={tmp_path}/other").code == 0
    newest, other = list_checkpoints(trained)[-1], list_checkpoints(tmp_path / "other")[-1]
    forge(newest, "tokenizer/tokenizer.json", (other / "tokenizer" / "tokenizer.json").read_bytes())
    done = lmkit("generate", f"run={newest}", *DEVICE)
    assert done.code == 4, done.err
    assert "257" in done.error  # both sizes are named


def test_row_74_a_checkpoint_can_be_continued_twice_to_the_same_bytes_and_a_finished_run_has_nothing_to_do(
    small: list[str], trained: Path, lmkit: Lmkit, tmp_path: Path
) -> None:
    twin = shutil.copytree(trained, tmp_path / "twin")
    for run_dir in (trained, twin):
        assert lmkit(*small, f"run.dir={run_dir}", "resume=true", "train.max_steps=16").code == 0
    assert digests(trained) == digests(twin)
    before = content(trained)
    done = lmkit(*small, f"run.dir={trained}", "resume=true", "train.max_steps=16")
    assert done.code == 0, done.err
    assert "nothing to do" in done.err
    assert content(trained) == before


def test_row_74_a_finished_run_that_was_given_more_steps_and_stopped_among_them_goes_on(
    small: list[str], trained: Path, lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = shutil.copytree(trained, tmp_path / "twin")
    words = [*small, "resume=true", "train.max_steps=20"]
    assert lmkit(*words, f"run.dir={trained}").code == 0
    with monkeypatch.context() as patch:
        signal_after(patch, 15)
        assert lmkit(*words, f"run.dir={twin}").code == 75
    done = lmkit(*words, f"run.dir={twin}")
    assert done.code == 0, done.err
    assert digests(twin) == digests(trained)
    assert "nothing to do" in lmkit(*words, f"run.dir={twin}").err


def test_row_78_the_batch_of_any_step_is_found_without_reading_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order itself is timed in test_batches.py; here: one position is asked for, whatever the step."""

    class Counting:
        """A train split of a trillion tokens that notes how many of them are looked at."""

        looked_at = 0

        def __len__(self) -> int:
            return 10**12

        def __getitem__(self, positions: Any) -> Any:
            self.looked_at += positions.size
            return np.zeros(positions.shape, np.uint16)

    looked = set()
    for step in (10, 10**9):
        tokens = Counting()
        Lanes(tokens, 1, 8, 16)[step]  # type: ignore[arg-type]
        looked.add(tokens.looked_at)
    assert looked == {2 * 8 * 16}


@pytest.mark.parametrize("micro", [0, 1])
def test_row_79_a_stop_in_the_middle_of_accumulation_saves_whole_steps_only(
    small: list[str], lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro: int
) -> None:
    words = [*small, "train.micro_batch_size=2"]
    assert lmkit(*words, f"run.dir={tmp_path}/whole").code == 0
    seen = [0]
    forward = Trainer.__post_init__

    def watched(self: Trainer) -> None:
        forward(self)
        loss = self.task.loss

        def stop_there(*args: Any) -> Any:
            if seen[0] == 2 * 5 + micro:
                signal.raise_signal(signal.SIGTERM)
            seen[0] += 1
            return loss(*args)

        self.task.loss = stop_there  # type: ignore[method-assign]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "__post_init__", watched)
        done = lmkit(*words, f"run.dir={tmp_path}/run")
    assert done.code == 75, done.err
    assert [path.name for path in list_checkpoints(tmp_path / "run")][-1] == "step-000000000006"
    assert lmkit(*words, f"run.dir={tmp_path}/run", "resume=true").code == 0
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["train.seq_len=400", "train.max_epochs=3", "train.max_steps=null"], (4, 8)),  # 4 batches an epoch
        (["train.seq_len=7000", "train.max_steps=5"], (1, 4)),  # an epoch of one batch
        (["train.batch_size=512", "train.max_steps=4"], (1, 3)),  # more rows than the text fills
    ],
    ids=["epoch end", "one batch", "small text"],
)
def test_row_80_a_stop_at_the_end_of_an_epoch_changes_no_byte(
    small: list[str], lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], steps: Any
) -> None:
    words = [*small, *words]
    assert lmkit(*words, f"run.dir={tmp_path}/whole").code == 0
    for step in steps:
        run_dir = f"run.dir={tmp_path}/run{step}"
        with monkeypatch.context() as patch:
            signal_after(patch, step)
            done = lmkit(*words, run_dir)
        assert done.code == 75, done.err
        assert lmkit(*words, run_dir, "resume=true").code == 0
        assert digests(tmp_path / f"run{step}") == digests(tmp_path / "whole")

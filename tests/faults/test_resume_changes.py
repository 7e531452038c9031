"""A run is continued with something changed: what would change its numbers is refused, the rest is noted.

Numbers in names (row_66 ...) are the rows of the project's fault table.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from harness import Lmkit, digests, forge, forge_config

from lmkit.commands import training
from lmkit.data.batches import Lanes
from lmkit.session import Session
from lmkit.store.checkpoint import latest_checkpoint, list_checkpoints
from lmkit.store.found import read_metrics
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
    assert latest_checkpoint(trained) == trained / "checkpoints" / "step-000000000016"
    events = [json.loads(line) for line in (trained / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    noted = " ".join(next(event["keys"] for event in events if event["event"] == "changed"))
    for change in [*changes, "train.max_steps=16"]:
        key, _, value = change.partition("=")
        assert f"{key}: " in noted
        assert f"-> {value}" in noted


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


def test_row_78_the_batch_of_any_step_is_found_without_reading_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order itself is timed in test_batches.py; here: one position is asked for, whatever the step."""
    import numpy as np

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


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGTERM when a step is done."""
    follow = Session._follow_clock

    def followed(self: Session, *args: Any) -> Any:
        result = follow(self, *args)
        if self.state.step == step:
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(Session, "_follow_clock", followed)


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
            stop_after(step, patch)
            done = lmkit(*words, run_dir)
        assert done.code == 75, done.err
        assert lmkit(*words, run_dir, "resume=true").code == 0
        assert digests(tmp_path / f"run{step}") == digests(tmp_path / "whole")

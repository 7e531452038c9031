"""Checkpoints of older formats are read as today's, step by step; a newer format is refused by name and never skipped.

There is one format so far, so that version 0 (and -1) are made up here.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from storing import ByteTokenizer, open_run, save_checkpoint

from lmkit.commands.replay import replay
from lmkit.console import Console
from lmkit.errors import CheckpointError
from lmkit.store import manifest as mf
from lmkit.store import migrations
from lmkit.store.audit import audit_checkpoint
from lmkit.store.checkpoint import (
    Snapshot,
    best_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_latest,
    resolve_checkpoint,
)
from lmkit.store.checkpoint_writer import CheckpointWriter
from lmkit.store.found import FoundRun
from lmkit.store.listing import read_json_entry, valid_loss
from lmkit.store.manifest import read_manifest, verify_checkpoint
from lmkit.store.migrations import NewerFormatError, migrate
from lmkit.store.runs import Run
from lmkit.store.tensorfile import write_tensors

Change = Callable[[dict[str, Any]], dict[str, Any]]


def renamed(old: str, new: str) -> Change:
    """A step in which a key got another name."""
    return lambda content: {(new if key == old else key): value for key, value in content.items()}


FROM_0: dict[str, Change] = {
    mf.MANIFEST: renamed("hashes", "digests"),
    mf.STATE: renamed("loss", "valid_nats_per_token"),
    mf.CONFIG: renamed("net", "model"),
    mf.MODEL: renamed("w", "weight"),
}


def snapshot(step: int, loss: float) -> Snapshot:
    weight = torch.arange(12, dtype=torch.float32).reshape(4, 3) + step
    return Snapshot(
        step=step,
        model={"weight": weight, "head": weight},
        optimizer={"weight/momentum": weight * 2},
        state={"valid_nats_per_token": loss, "tokens": step},
        config={"model": {"kind": "tiny"}},
    )


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run with the checkpoints of steps 1 and 2, of which the second is the best."""
    path = tmp_path / "run"
    with open_run(path) as made:
        made.begin(seed=1, command=["pretrain"], digests={})
        for step in (1, 2):
            save_checkpoint(made, snapshot(step, 5.0 - step), keep=2)
        yield made


def second(run: Run) -> Path:
    return run.path / "checkpoints" / mf.step_directory(2)


def rewrite_manifest(checkpoint: Path, change: Change) -> None:
    """Change a manifest and seal it again."""
    body = change(json.loads((checkpoint / mf.MANIFEST).read_bytes()))
    del body["self"]
    body["self"] = hashlib.sha256(mf.canonical_json(body)).hexdigest()
    (checkpoint / mf.MANIFEST).write_bytes(mf.canonical_json(body))


def make_older(checkpoint: Path) -> None:
    """Rewrite a checkpoint as version 0 would have written it."""
    loaded = load_checkpoint(checkpoint, with_optimizer=True)
    table = {"head": read_manifest(checkpoint).tensors[mf.MODEL]["head"]}
    (checkpoint / mf.MODEL).unlink()
    entry = write_tensors(checkpoint / mf.MODEL, {"head": loaded.model["head"]}, table)
    changed = {mf.MODEL: entry}
    for name, change, data in (
        (mf.STATE, renamed("valid_nats_per_token", "loss"), loaded.state),
        (mf.CONFIG, renamed("model", "net"), loaded.config),
    ):
        raw = mf.canonical_json(change(data))
        (checkpoint / name).write_bytes(raw)
        changed[name] = mf.FileEntry(name, len(raw), hashlib.sha256(raw).hexdigest())

    def downgrade(data: dict[str, Any]) -> dict[str, Any]:
        for listed in data["files"]:
            entry = changed.get(listed["path"])
            listed |= {} if entry is None else {"bytes": entry.bytes, "sha256": entry.sha256}
        data["aliases"][mf.MODEL] = {"w": "head"}
        return renamed("digests", "hashes")(data) | {"version": 0}

    rewrite_manifest(checkpoint, downgrade)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def older(run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Step 2 in the format of version 0, from which there is a step."""
    make_older(second(run))
    monkeypatch.setitem(migrations.STEPS, 0, FROM_0)
    return second(run)


def test_row_75_an_older_checkpoint_is_read_as_todays_and_stays_as_it_is(run: Run, older: Path) -> None:
    before = content(older)
    loaded, expected = load_checkpoint(older, with_optimizer=True), snapshot(2, 3.0)
    assert loaded.model.keys() == expected.model.keys()
    assert all(torch.equal(loaded.model[name], expected.model[name]) for name in expected.model)
    assert loaded.model["weight"] is loaded.model["head"]
    assert torch.equal(loaded.optimizer["weight/momentum"], expected.optimizer["weight/momentum"])
    assert (loaded.step, loaded.state, loaded.config) == (2, expected.state, expected.config)
    assert valid_loss(older) == 3.0
    assert read_json_entry(older, mf.CONFIG) == expected.config
    manifest = verify_checkpoint(older)
    assert manifest.version == 0
    assert manifest.digest == json.loads(before[mf.MANIFEST])["self"]
    assert latest_checkpoint(run.path, pytest.fail) == best_checkpoint(run.path, pytest.fail) == older
    assert content(older) == before


def test_row_75_a_run_goes_on_from_an_older_checkpoint_in_todays_format(run: Run, older: Path) -> None:
    new = save_checkpoint(run, snapshot(3, 4.5), keep=1)
    assert read_manifest(new).version == migrations.VERSION
    assert older.is_dir()  # it counts as the best
    assert not (run.path / "checkpoints" / mf.step_directory(1)).exists()


def test_row_75_steps_are_taken_one_version_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(migrations.STEPS, -1, {"state.json": renamed("a", "b")})
    monkeypatch.setitem(migrations.STEPS, 0, {"state.json": renamed("b", "c"), "config.json": renamed("a", "z")})
    assert migrate(Path("x/state.json"), {"a": 1}, -1) == {"c": 1}
    assert migrate(Path("x/state.json"), {"a": 1}, 0) == {"a": 1}
    assert migrate(Path("x/config.json"), {"a": 1}, -1) == {"z": 1}
    assert migrate(Path("x/state.json"), {"a": 1, "b": 2}, migrations.VERSION) == {"a": 1, "b": 2}


def test_row_75_steps_lead_from_every_version_to_todays() -> None:
    assert sorted(migrations.STEPS) == list(range(1, migrations.VERSION))


def test_row_75_an_older_version_without_a_step_is_refused(run: Run) -> None:
    make_older(second(run))
    with pytest.raises(CheckpointError, match="unknown format version 0"):
        verify_checkpoint(second(run))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data | {"surprise": 1}, "damaged"),
        (renamed("hashes", "other"), "malformed"),
        (renamed("files", "other"), "malformed"),
        (lambda data: data | {"step": -1}, "malformed"),
    ],
)
def test_row_75_an_older_manifest_is_checked_as_strictly_as_todays(older: Path, change: Change, message: str) -> None:
    rewrite_manifest(older, change)
    with pytest.raises(CheckpointError, match=rf"MANIFEST\.json is {message}"):
        read_manifest(older)


def test_row_75_an_older_checkpoint_is_believed_only_if_it_matches_its_digests(older: Path) -> None:
    raw = (older / mf.MANIFEST).read_bytes()
    (older / mf.MANIFEST).write_bytes(raw.replace(b'"step": 2', b'"step": 3'))
    with pytest.raises(CheckpointError, match="does not match its own SHA-256"):
        read_manifest(older)
    (older / mf.MANIFEST).write_bytes(raw)
    state = (older / mf.STATE).read_bytes()
    (older / mf.STATE).write_bytes(state.replace(b"3.0", b"4.0"))
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        load_checkpoint(older, with_optimizer=True)


def test_row_75_content_that_does_not_fit_its_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(migrations.STEPS, 0, {"state.json": lambda content: {"step": content["steps"]["done"]}})
    for bad in ({}, {"steps": 1}, {"steps": {}}):
        with pytest.raises(CheckpointError, match=r"state\.json does not fit format version 0"):
            migrate(Path("x/state.json"), bad, 0)


def make_newer(checkpoint: Path, lmkit: Any = "9.1.2") -> None:
    rewrite_manifest(checkpoint, lambda data: data | {"version": 7, "layout": [1], "environment": {"lmkit": lmkit}})


@pytest.mark.parametrize(
    ("lmkit", "remedy"),
    [
        ("9.1.2", "update lmkit to 9.1.2 or newer"),
        ("2.0.0rc1", "update lmkit to 2.0.0rc1 or newer"),
        ("evil\nerror: all is well", "update lmkit to read it"),
        (["x"], "update lmkit to read it"),
    ],
)
def test_row_76_a_newer_format_is_refused_with_the_version_that_is_needed(run: Run, lmkit: Any, remedy: str) -> None:
    make_newer(second(run), lmkit)
    for read in (read_manifest, verify_checkpoint, lambda path: load_checkpoint(path, with_optimizer=False)):
        with pytest.raises(NewerFormatError) as refused:
            read(second(run))
        assert refused.value.problem.endswith(f"MANIFEST.json has format version 7, newer than {migrations.VERSION}")
        assert refused.value.remedy == remedy
        assert refused.value.exit_code == 4


def test_row_76_no_older_checkpoint_is_taken_in_place_of_a_newer_format(run: Run) -> None:
    """It would throw away what the newer lmkit has trained, and call it damaged."""
    make_newer(second(run))
    for find in (
        lambda: load_latest(run.path, pytest.fail),
        lambda: latest_checkpoint(run.path, pytest.fail),
        lambda: best_checkpoint(run.path, pytest.fail),
        lambda: resolve_checkpoint(FoundRun(run.path), "best", pytest.fail),
        lambda: replay(run.path, 3, Console(io.StringIO())),
    ):
        with pytest.raises(NewerFormatError, match="update lmkit"):
            find()
    assert resolve_checkpoint(FoundRun(run.path), mf.step_directory(1), pytest.fail).name == mf.step_directory(1)
    assert audit_checkpoint(second(run)).damage[0].endswith("; update lmkit to 9.1.2 or newer")


def test_row_76_retention_leaves_a_newer_format_alone(run: Run) -> None:
    make_newer(second(run))
    before = content(second(run))
    warnings: list[str] = []
    with open_run(run.path.parent / "other") as other:
        other.begin(seed=1, command=["pretrain"], digests={})
        second(run).rename(other.path / "checkpoints" / mf.step_directory(2))
        with CheckpointWriter(other, ByteTokenizer(), keep=1, warn=warnings.append) as writer:
            for step in (3, 4, 5):
                writer.submit(snapshot(step, 1.0 / step))
        assert content(other.path / "checkpoints" / mf.step_directory(2)) == before
    assert ["newer" in warning for warning in warnings] == [True]


def test_row_76_a_damaged_version_number_is_damage_and_no_newer_format(run: Run) -> None:
    path = second(run) / mf.MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 3'))
    warnings: list[str] = []
    found = load_latest(run.path, warnings.append)
    assert found is not None
    assert found[1].step == 1
    assert "does not match its own SHA-256" in warnings[0]

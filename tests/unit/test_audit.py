"""An audit names every damaged file and nothing else, and changes nothing."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from storing import open_run, save_checkpoint

from lmkit.errors import CheckpointError
from lmkit.store.audit import audit_checkpoint, audit_log, audit_run
from lmkit.store.checkpoint import Snapshot

FILES = ["config.json", "model.safetensors", "optim.safetensors", "state.json", "tokenizer/tokenizer.json"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 1 and 2."""
    path = tmp_path_factory.mktemp("audit") / "run"
    with open_run(path) as run:
        run.begin(seed=1, command=["lmkit", "pretrain"], digests={})
        for step in (1, 2):
            weights = torch.arange(20.0) + step
            snapshot = Snapshot(step, {"weight": weights}, {"weight/momentum": -weights}, {"step": step}, {})
            save_checkpoint(run, snapshot, keep=9)
            run.log_metrics({"step": step, "loss": 1.0})
    return path


@pytest.fixture
def run_dir(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step-000000000002"


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_whole_run_is_whole_and_stays_as_it_is(run_dir: Path) -> None:
    before = tree(run_dir)
    audit = audit_run(run_dir)
    assert audit.is_whole
    assert [a.path.name for a in audit.checkpoints] == ["step-000000000001", "step-000000000002"]
    assert all(a.manifest is not None and not a.damage and not a.unlisted for a in audit.checkpoints)
    assert (audit.litter, audit.damage) == ((), ())
    assert [(log.name, log.num_rows, log.bad_lines) for log in audit.logs] == [
        ("metrics.jsonl", 2, ()),
        ("journal.jsonl", 5, ()),
    ]
    assert tree(run_dir) == before


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_is_found_and_its_file_alone_is_named(run_dir: Path, name: str, seed: int) -> None:
    path, generator = newest(run_dir) / name, random.Random(seed)
    raw = bytearray(path.read_bytes())
    raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
    path.write_bytes(raw)
    audit = audit_run(run_dir)
    assert not audit.is_whole
    assert audit.num_damaged == 1
    (damage,) = audit.checkpoints[1].damage
    assert damage.startswith(f"{Path(name)} is damaged: SHA-256 ")
    assert not audit.checkpoints[0].damage


def test_every_damaged_file_of_a_checkpoint_is_named(run_dir: Path) -> None:
    (newest(run_dir) / "state.json").unlink()
    (newest(run_dir) / "model.safetensors").write_bytes(b"short")
    damage = audit_checkpoint(newest(run_dir)).damage
    assert [text.split()[0] for text in damage] == ["model.safetensors", "state.json"]
    assert "5 bytes" in damage[0]
    assert "missing" in damage[1]


def test_without_hashing_only_presence_and_size_are_seen(run_dir: Path) -> None:
    path = newest(run_dir) / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert not audit_checkpoint(newest(run_dir), hashes=False).damage
    path.write_bytes(raw[:-1])
    assert len(audit_checkpoint(newest(run_dir), hashes=False).damage) == 1


def test_a_damaged_manifest_is_one_damage_and_nothing_behind_it_is_trusted(run_dir: Path) -> None:
    path = newest(run_dir) / "MANIFEST.json"
    path.write_bytes(path.read_bytes().replace(b'"step": 2', b'"step": 3'))
    audit = audit_checkpoint(newest(run_dir))
    assert audit.manifest is None
    assert len(audit.damage) == 1
    assert audit.damage[0].startswith("MANIFEST.json ")


def test_a_file_that_the_manifest_does_not_name_is_a_note_and_no_damage(run_dir: Path) -> None:
    (newest(run_dir) / "notes.txt").write_text("mine", encoding="utf-8")
    (newest(run_dir) / "tokenizer" / "more.bin").write_bytes(b"x")
    audit = audit_run(run_dir)
    assert audit.is_whole
    assert audit.checkpoints[1].unlisted == ("notes.txt", "tokenizer/more.bin")


def test_litter_is_reported_and_no_damage(run_dir: Path) -> None:
    (run_dir / "checkpoints" / ".tmp-step-000000000003-1-aa").mkdir()
    (run_dir / ".trash-x-1-bb").mkdir()
    audit = audit_run(run_dir)
    assert audit.is_whole
    assert audit.litter == (".trash-x-1-bb", "checkpoints/.tmp-step-000000000003-1-aa")


def test_torn_lines_of_a_log_are_counted_and_no_damage(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "lo\n[1]\n\n{"step": 4}\n{"st')
    log = audit_log(run_dir / "metrics.jsonl")
    assert log is not None
    assert (log.num_rows, log.bad_lines) == (3, (3, 4, 7))
    assert audit_run(run_dir).is_whole


def test_a_log_that_cannot_be_read_is_damage_and_a_missing_one_is_not(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").unlink()
    assert audit_run(run_dir).is_whole
    (run_dir / "metrics.jsonl").mkdir()
    assert not audit_run(run_dir).is_whole


@pytest.mark.parametrize("name", ["run.json", "result.json", "pinned.json"])
def test_a_damaged_file_of_the_run_itself_is_named(run_dir: Path, name: str) -> None:
    (run_dir / name).write_bytes(b'{"torn')
    audit = audit_run(run_dir)
    assert not audit.is_whole
    assert len(audit.damage) == 1
    assert audit.damage[0].startswith(f"{name} ")


def test_a_run_without_a_checkpoint_is_not_whole(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    audit = audit_run(run_dir)
    assert audit.checkpoints == ()
    assert not audit.is_whole


def test_a_checkpoint_that_its_run_retires_in_the_meantime_is_left_out(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def retire_then_fail(path: Path) -> None:
        shutil.rmtree(path)
        raise CheckpointError(f"{path} is missing")

    monkeypatch.setattr("lmkit.store.audit.read_manifest", retire_then_fail)
    assert audit_run(run_dir).checkpoints == ()

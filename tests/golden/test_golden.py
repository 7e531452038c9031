"""Checkpoints as each format version wrote them are read, mean the same and can be continued, for ever."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from make import CASES, EXPECTED, GOLDEN, answers, config, load, write_corpus

from lmkit.commands import pretrain
from lmkit.store.checkpoint import latest_checkpoint, load_checkpoint
from lmkit.store.manifest import read_manifest, step_directory, verify_checkpoint
from lmkit.store.migrations import VERSION

ALL = [folder for folder in sorted(GOLDEN.glob("checkpoint-v*/*")) if folder.is_dir()]
each = pytest.mark.parametrize("golden", ALL, ids=lambda path: f"{path.parent.name}-{path.name}")


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_row_75_every_version_and_family_has_a_golden_checkpoint() -> None:
    assert {path.parent.name for path in ALL} == {f"checkpoint-v{version}" for version in range(1, VERSION + 1)}
    assert {path.name for path in ALL if path.parent.name == f"checkpoint-v{VERSION}"} == set(CASES)


@each
def test_row_75_a_golden_checkpoint_is_whole_and_of_its_version(golden: Path) -> None:
    manifest = verify_checkpoint(golden)
    assert golden.parent.name == f"checkpoint-v{manifest.version}"
    assert manifest.digest == json.loads((golden / "MANIFEST.json").read_bytes())["self"]
    names = {entry.path for entry in manifest.files} | {"MANIFEST.json"}
    assert {p.relative_to(golden).as_posix() for p in golden.rglob("*") if p.is_file()} == names


@each
def test_row_75_the_model_of_a_golden_checkpoint_says_what_it_said(golden: Path) -> None:
    expected = json.loads((golden.parent / EXPECTED).read_bytes())[golden.name]
    found = answers(load(golden))
    assert found["ids"] == expected["ids"]
    assert found["nats"] == pytest.approx(expected["nats"], abs=1e-6)
    assert found["logits"] == pytest.approx(expected["logits"], abs=1e-6)


@each
def test_row_75_a_golden_checkpoint_can_be_continued(golden: Path, tmp_path: Path) -> None:
    counted = CASES[golden.name][0].trains_by_counting
    step = read_manifest(golden).step
    run_dir = tmp_path / f"run-{golden.name}"
    write_corpus(tmp_path / "corpus")
    shutil.copytree(golden, run_dir / "checkpoints" / step_directory(step))
    result = pretrain.run(config(golden.name, steps=step + 2, resume=True))
    assert result["step"] == (1 if counted else step + 2)
    newest = latest_checkpoint(run_dir, pytest.fail)
    assert newest is not None
    assert newest.name == step_directory(result["step"])
    before, after = (load_checkpoint(path, with_optimizer=True) for path in (golden, newest))
    assert before.model.keys() == after.model.keys()
    assert before.optimizer.keys() == after.optimizer.keys()
    if not counted:
        events = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
        assert {event["step"] for event in events if event["event"] == "save"} == {step + 2}  # not from the beginning

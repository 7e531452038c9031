"""Checkpoints as each format version wrote them are read, mean the same and can be continued, for ever."""

from __future__ import annotations

import importlib
import json
import pkgutil
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from make import CASES, EXPECTED, GOLDEN, TUNED, answers, load, prepare_folder, train

import lmkit.models
from lmkit.models.base import Head, LanguageModel
from lmkit.models.vae import GivenLatent
from lmkit.store.browse import read_journal
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


def below(base: type) -> set[type]:
    """The classes of lmkit.models that are derived from one."""
    found = {cls for direct in base.__subclasses__() for cls in (direct, *below(direct))}
    return {cls for cls in found if cls.__module__.startswith("lmkit.models.")}


def test_row_75_every_version_and_family_has_a_golden_checkpoint() -> None:
    assert {path.parent.name for path in ALL} == {f"checkpoint-v{version}" for version in range(1, VERSION + 1)}
    newest = [path for path in ALL if path.parent.name == f"checkpoint-v{VERSION}"]
    assert {path.name for path in newest} == {*CASES, *TUNED}
    for module in pkgutil.iter_modules(lmkit.models.__path__):
        importlib.import_module(f"lmkit.models.{module.name}")
    models = [load(path).model for path in newest if path.name in CASES]
    assert below(LanguageModel) - {GivenLatent} == {type(model) for model in models}  # that one is a VAE's
    assert below(Head) <= {type(model.head) for model in models}


@each
def test_row_75_a_golden_checkpoint_is_whole_and_of_its_version(golden: Path) -> None:
    manifest = verify_checkpoint(golden)
    assert golden.parent.name == f"checkpoint-v{manifest.version}"
    assert manifest.digest == json.loads((golden / "MANIFEST.json").read_bytes())["self"]
    names = {entry.path for entry in manifest.files} | {"MANIFEST.json"}
    assert {p.relative_to(golden).as_posix() for p in golden.rglob("*") if p.is_file()} == names


@each
def test_row_75_the_model_of_a_golden_checkpoint_says_what_it_said(golden: Path) -> None:
    prepare_folder(golden.parent)
    expected = json.loads((golden.parent / EXPECTED).read_bytes())[golden.name]
    found = answers(golden.name, golden)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        same = values if isinstance(values[0], str) else pytest.approx(values, abs=1e-5)
        assert found[name] == same, name


@each
def test_row_75_a_golden_checkpoint_can_be_continued(golden: Path, tmp_path: Path) -> None:
    counted = golden.name in CASES and CASES[golden.name].model.trains_by_counting
    step = read_manifest(golden).step
    run_dir = tmp_path / f"run-{golden.name}"
    prepare_folder(golden.parent)
    shutil.copytree(golden, run_dir / "checkpoints" / step_directory(step))
    result = train(golden.name, steps=step + 2, resume=True)
    assert result["step"] == (1 if counted else step + 2)
    newest = latest_checkpoint(run_dir, pytest.fail)
    assert newest is not None
    assert newest.name == step_directory(result["step"])
    before, after = (load_checkpoint(path, with_optimizer=True) for path in (golden, newest))
    assert before.model.keys() == after.model.keys()
    assert before.optimizer.keys() == after.optimizer.keys()
    if not counted:
        saves = (event["step"] for event in read_journal(run_dir) if event["event"] == "save")
        assert set(saves) == {step + 2}  # not from the beginning

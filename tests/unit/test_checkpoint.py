"""Checkpoints come back bit for bit, are what they say they are, and the right ones are kept and found."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from storing import ByteTokenizer, open_run, save_checkpoint
from torch import Tensor

from lmkit import __version__
from lmkit.commands.runs_show import _checkpoint_lines
from lmkit.errors import CheckpointError, DivergedError, ResourceError
from lmkit.store import checkpoint_writer, staging, storage, tensorfile
from lmkit.store.browse import read_journal
from lmkit.store.checkpoint import (
    Snapshot,
    best_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    resolve_checkpoint,
)
from lmkit.store.checkpoint_writer import CheckpointWriter
from lmkit.store.found import FoundRun
from lmkit.store.manifest import Manifest, read_manifest, verify_checkpoint
from lmkit.store.runs import Run

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def snapshot(step: int, loss: float | None = None, **state: Any) -> Snapshot:
    weights = torch.arange(12, dtype=torch.float32).reshape(4, 3) + step
    return Snapshot(
        step=step,
        model={"weight": weights, "bias": weights[0] * 0.1},
        optimizer={"weight/momentum": weights * 2},
        state={"valid_nats_per_token": loss, **state},
        config={"model": {"kind": "tiny"}},
    )


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with open_run(tmp_path / "run") as made:
        made.begin(seed=1, command=["pretrain"], digests={"data": "key"})
        yield made


def save_all(run: Run, losses: dict[int, float | None], *, keep: int, every: int | None = None) -> None:
    with CheckpointWriter(run, ByteTokenizer(), keep=keep, keep_every=every, warn=pytest.fail) as writer:
        for step, loss in losses.items():
            writer.submit(snapshot(step, loss))


def steps(run: Run) -> list[int]:
    return [read_manifest(path).step for path in list_checkpoints(run.path)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_type_come_back_bit_for_bit(run: Run, dtype: torch.dtype) -> None:
    values = torch.arange(24).remainder(2 if dtype == torch.bool else 24)
    model = {
        "matrix": values.reshape(4, 6).to(dtype),
        "transposed": values.reshape(4, 6).to(dtype).t(),
        "strided": values.to(dtype)[::3],
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.empty(0, 3).to(dtype),
    }
    path = save_checkpoint(run, Snapshot(3, model, {}, {}, {}), keep=1)
    loaded = load_checkpoint(path, with_optimizer=True)
    assert loaded.model.keys() == model.keys()
    for name, tensor in model.items():
        assert loaded.model[name].dtype == dtype
        assert loaded.model[name].shape == tensor.shape
        assert bits(loaded.model[name]) == bits(tensor)


def test_a_model_without_tensors_is_saved(run: Run) -> None:
    path = save_checkpoint(run, Snapshot(3, {}, {}, {"tokens": 1}, {}), keep=1)
    loaded = load_checkpoint(path, with_optimizer=True)
    assert (loaded.model, loaded.state) == ({}, {"tokens": 1})


def test_state_config_optimizer_and_tokenizer_come_back(run: Run) -> None:
    saved = snapshot(12, 4.25, numbers=[0.1, 1e-300, 2**60], text="é")
    path = save_checkpoint(run, saved, keep=1)
    loaded = load_checkpoint(path, with_optimizer=True)
    assert (loaded.step, loaded.state, loaded.config) == (12, saved.state, saved.config)
    assert torch.equal(loaded.optimizer["weight/momentum"], saved.optimizer["weight/momentum"])
    assert load_checkpoint(path, with_optimizer=False).optimizer == {}
    assert json.loads((path / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")) == {"kind": "byte"}


def test_manifest_records_run_step_and_digests(run: Run) -> None:
    manifest = read_manifest(save_checkpoint(run, snapshot(12), keep=1))
    assert (manifest.run_id, manifest.step) == (run.run_id, 12)
    assert manifest.digests["tokenizer"] == ByteTokenizer.digest
    assert manifest.digests["data"] == "key"
    assert set(manifest.environment) == {"lmkit", "python", "torch", "platform", "threads", "instructions"}


def test_a_run_is_saved_while_another_lmkit_is_installed_and_records_the_one_that_runs(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", gone)
    path = save_checkpoint(run, snapshot(1), keep=2)
    assert read_manifest(path).environment["lmkit"] == __version__


def test_a_checkpoint_is_a_plain_safetensors_file_for_other_tools(run: Run) -> None:
    saved = snapshot(1)
    path = save_checkpoint(run, saved, keep=1)
    others_view = safetensors.torch.load_file(path / "model.safetensors")
    assert others_view.keys() == saved.model.keys()
    assert all(torch.equal(others_view[name], tensor) for name, tensor in saved.model.items())


def test_without_optimizer_tensors_there_is_no_optimizer_file(run: Run) -> None:
    path = save_checkpoint(run, Snapshot(1, {"counts": torch.arange(3)}, {}, {}, {}), keep=1)
    assert not (path / "optim.safetensors").exists()
    assert load_checkpoint(path, with_optimizer=True).optimizer == {}


def test_tied_tensors_are_stored_once_and_come_back_tied(run: Run) -> None:
    weight = torch.randn(50, 20)
    model = {"embedding": weight, "head": weight.detach(), "slice": weight[:10], "transposed": weight.t()}
    path = save_checkpoint(run, Snapshot(1, model, {}, {}, {}), keep=1)
    manifest = read_manifest(path)
    assert manifest.aliases == {"model.safetensors": {"head": "embedding"}}
    assert set(manifest.tensors["model.safetensors"]) == {"embedding", "slice", "transposed"}
    loaded = load_checkpoint(path, with_optimizer=False).model
    assert loaded["head"] is loaded["embedding"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.items())


def test_a_tensor_may_have_another_shape_or_type_at_the_next_save(run: Run) -> None:
    shapes = [torch.zeros(2, 3), torch.ones(4, 3), torch.ones(4, 3, dtype=torch.float64), torch.ones(0)]
    with CheckpointWriter(run, ByteTokenizer(), keep=len(shapes), warn=pytest.fail) as writer:
        for step, tensor in enumerate(shapes, start=1):
            writer.submit(Snapshot(step, {"weight": torch.ones(1)}, {"carry/0/h": tensor}, {}, {}))
    for path, tensor in zip(list_checkpoints(run.path), shapes, strict=True):
        assert bits(load_checkpoint(path, with_optimizer=True).optimizer["carry/0/h"]) == bits(tensor)
        assert load_checkpoint(path, with_optimizer=True).optimizer["carry/0/h"].shape == tensor.shape


def test_the_same_state_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    first = save_checkpoint(run, snapshot(5, 1.0), keep=1)
    with open_run(tmp_path / "other") as other:
        second = save_checkpoint(other, snapshot(5, 1.0), keep=1)
    assert read_manifest(first).files == read_manifest(second).files


def test_changing_tensors_and_state_after_submit_does_not_change_what_is_saved(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = threading.Event()
    write = checkpoint_writer.write_tensors

    def write_late(*args: Any) -> Any:
        assert changed.wait(120)
        return write(*args)

    monkeypatch.setattr(checkpoint_writer, "write_tensors", write_late)
    taken = snapshot(7, history=[1])
    expected = {name: tensor.clone() for name, tensor in taken.model.items()}
    with CheckpointWriter(run, ByteTokenizer(), keep=1, warn=pytest.fail) as writer:
        writer.submit(taken)
        for tensor in (*taken.model.values(), *taken.optimizer.values()):
            tensor.fill_(-1)
        taken.state["history"].append(2)
        changed.set()
    loaded = load_checkpoint(run.path / "checkpoints" / "step-000000000007", with_optimizer=True)
    assert all(torch.equal(loaded.model[name], tensor) for name, tensor in expected.items())
    assert loaded.state["history"] == [1]


def test_leaving_the_writer_waits_for_the_save_even_on_an_exception(run: Run) -> None:
    def train() -> None:
        with CheckpointWriter(run, ByteTokenizer(), keep=1, warn=pytest.fail) as writer:
            writer.submit(snapshot(1))
            raise RuntimeError("training broke")

    with pytest.raises(RuntimeError, match="training broke"):
        train()
    assert steps(run) == [1]
    verify_checkpoint(list_checkpoints(run.path)[0])


def test_the_newest_and_the_best_are_kept(run: Run) -> None:
    save_all(run, {1: 5.0, 2: 3.0, 3: None, 4: 4.0, 5: 4.5}, keep=2)
    assert steps(run) == [2, 4, 5]


def test_a_new_best_releases_the_old_one(run: Run) -> None:
    save_all(run, {1: 3.0, 2: 4.0, 3: 2.0, 4: 5.0}, keep=1)
    assert steps(run) == [3, 4]


def test_a_writer_that_resumes_keeps_the_best_of_the_sessions_before(run: Run) -> None:
    save_all(run, {1: 3.0, 2: 4.0}, keep=1)
    save_all(run, {3: 5.0, 4: 5.0}, keep=1)
    assert steps(run) == [1, 4]


def test_a_run_that_goes_on_does_not_hash_all_that_it_keeps_before_it_deletes_anything(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(run, {2: 5.0, 3: 3.0, 4: 4.0, 6: 4.5, 8: 4.2, 9: 6.0}, keep=1, every=2)
    assert steps(run) == [2, 3, 4, 6, 8, 9]
    hashed: list[str] = []
    verify = checkpoint_writer.verify_checkpoint

    def noted(path: Path, **options: bool) -> Manifest:
        hashed.append(path.name[-1])
        return verify(path, **options)

    monkeypatch.setattr(checkpoint_writer, "verify_checkpoint", noted)
    save_all(run, {10: 7.0, 11: 8.0}, keep=1, every=2)
    assert steps(run) == [2, 3, 4, 6, 8, 10, 11]
    assert sorted(hashed) == sorted("0139")  # both new ones, the best one, and the one that gives way


def test_where_the_data_changed_the_best_is_one_of_the_present_data_and_that_of_the_others_stays(run: Run) -> None:
    save_all(run, {1: 1.0, 2: 1.5}, keep=2)
    run.digests = {"data": "another key"}
    save_all(run, {3: 2.5, 4: 2.0, 5: 2.6, 6: 2.7}, keep=2)
    assert steps(run) == [1, 4, 5, 6]
    best = best_checkpoint(run.path, pytest.fail)
    assert best is not None
    assert best.name == "step-000000000004"
    assert [line.split()[0] for line in _checkpoint_lines(run.path) if line.endswith("best")] == ["4"]


def test_best_is_the_lowest_validation_loss_and_the_newest_of_equals(run: Run) -> None:
    save_all(run, {1: 3.0, 2: 3.0, 3: None, 4: 9.0}, keep=9)
    best = best_checkpoint(run.path, pytest.fail)
    latest = latest_checkpoint(run.path, pytest.fail)
    assert best is not None
    assert best.name == "step-000000000002"
    assert latest is not None
    assert latest.name == "step-000000000004"


def test_best_is_the_latest_where_nothing_was_evaluated(run: Run) -> None:
    save_all(run, {1: None, 2: None}, keep=9)
    best = best_checkpoint(run.path, pytest.fail)
    assert best is not None
    assert best.name == "step-000000000002"


def test_order_is_that_of_the_steps_and_not_of_the_clock(run: Run) -> None:
    save_all(run, {9: None, 10: None, 100: None}, keep=9)
    assert steps(run) == [9, 10, 100]


def test_resolve_finds_best_latest_and_names(run: Run) -> None:
    save_all(run, {1: 1.0, 2: 2.0, 3: 3.0}, keep=9)
    found = FoundRun(run.path)
    names = [resolve_checkpoint(found, which, pytest.fail).name for which in ("best", "latest", "step-000000000002")]
    assert names == ["step-000000000001", "step-000000000003", "step-000000000002"]
    with pytest.raises(CheckpointError, match="step-000000000001, step-000000000002"):
        resolve_checkpoint(found, "step-000000000004", pytest.fail)
    with pytest.raises(CheckpointError, match="there are best, latest"):
        resolve_checkpoint(found, "../../elsewhere", pytest.fail)


def test_a_run_without_checkpoints_has_none_and_resolving_says_so(run: Run) -> None:
    assert latest_checkpoint(run.path, pytest.fail) is None
    assert best_checkpoint(run.path, pytest.fail) is None
    assert load_latest(run.path, pytest.fail) is None
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        resolve_checkpoint(FoundRun(run.path), "best", pytest.fail)


def test_what_others_read_again_goes_through_the_cache(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(run, snapshot(1), keep=1)
    asked: list[bool] = []
    read_whole = tensorfile.read_whole

    def record(*args: Any, once: bool) -> Tensor:
        asked.append(once)
        return read_whole(*args, once=once)

    monkeypatch.setattr(tensorfile, "read_whole", record)
    load_checkpoint(path, with_optimizer=True)
    load_latest(run.path, pytest.fail)
    assert asked == [True] * 4
    asked.clear()
    load_checkpoint(path, with_optimizer=False)
    load_checkpoint(path, with_optimizer=True, shared=True)
    load_latest(run.path, pytest.fail, shared=True)
    assert asked == [False] * 5


def test_saving_the_same_state_twice_keeps_the_first(run: Run) -> None:
    first = save_checkpoint(run, snapshot(1), keep=1)
    before = (first / "MANIFEST.json").stat().st_ino
    assert save_checkpoint(run, snapshot(1), keep=1) == first
    assert (first / "MANIFEST.json").stat().st_ino == before


def test_saving_another_state_of_the_same_step_replaces_it(run: Run) -> None:
    save_checkpoint(run, snapshot(1, note="old"), keep=1)
    path = save_checkpoint(run, snapshot(1, note="new"), keep=1)
    assert load_checkpoint(path, with_optimizer=False).state["note"] == "new"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_saved(run: Run, value: float) -> None:
    bad = snapshot(2)
    bad.model["bias"][1] = value
    save_checkpoint(run, snapshot(1), keep=1)
    with pytest.raises(DivergedError, match="bias holds NaN or infinity at step 2"):
        save_checkpoint(run, bad, keep=1)
    assert steps(run) == [1]


def test_state_that_is_not_json_is_refused_before_anything_is_written(run: Run) -> None:
    with CheckpointWriter(run, ByteTokenizer(), keep=1, warn=pytest.fail) as writer:
        with pytest.raises(ValueError, match="not JSON compliant"):
            writer.submit(snapshot(1, loss_now=float("nan")))
        with pytest.raises(TypeError, match="not JSON serializable"):
            writer.submit(snapshot(1, thing=object()))
    assert list((run.path / "checkpoints").iterdir()) == []


def test_buffers_are_made_once_and_reused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    empty = torch.empty
    monkeypatch.setattr(staging.torch, "empty", lambda *a, **k: made.append(a) or empty(*a, **k))
    with CheckpointWriter(run, ByteTokenizer(), keep=2, warn=pytest.fail) as writer:
        for step in range(1, 5):
            writer.submit(snapshot(step))
    assert len(made) == 3


def test_events_are_journalled_and_nothing_temporary_is_left(run: Run) -> None:
    save_all(run, {1: None, 2: None, 3: None}, keep=2)
    assert [event["event"] for event in read_journal(run.path)] == ["start", *["save", "verify"] * 3, "retire"]
    assert not [p for p in (run.path / "checkpoints").iterdir() if p.name.startswith(".")]


def test_a_copied_checkpoint_is_valid_wherever_it_is(run: Run, tmp_path: Path) -> None:
    path = save_checkpoint(run, snapshot(1), keep=1)
    copy = tmp_path / "elsewhere" / "my model"
    copy.mkdir(parents=True)
    for entry in path.rglob("*"):
        if entry.is_file():
            target = copy / entry.relative_to(path)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(entry.read_bytes())
    assert load_checkpoint(copy, with_optimizer=True).step == 1


@pytest.mark.parametrize("handed", [True, False])
def test_a_signal_while_a_save_is_handed_over_neither_fails_nor_hangs(
    run: Run, handed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python raises KeyboardInterrupt between any two operations: before the thread has been told, or after."""

    class Interrupted:
        def __init__(self, queue: Any) -> None:
            self.queue = queue

        def put(self, item: Any) -> None:
            if handed:
                self.queue.put(item)
            raise KeyboardInterrupt

    writer = CheckpointWriter(run, ByteTokenizer(), keep=2, warn=pytest.fail)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_handed", Interrupted(writer._handed))
        with pytest.raises(KeyboardInterrupt):
            writer.submit(snapshot(3))
    closing = threading.Thread(target=writer.close, daemon=True)
    closing.start()
    closing.join(120)
    assert not closing.is_alive()
    assert [found.name for found in list_checkpoints(run.path)] == (["step-000000000003"] if handed else [])


def test_a_save_is_busy_until_it_is_done_and_leaves_no_thread(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, go_on = threading.Event(), threading.Event()
    write = checkpoint_writer.write_tensors

    def slow(*args: Any) -> Any:
        begin.set()
        assert go_on.wait(120)
        return write(*args)

    monkeypatch.setattr(checkpoint_writer, "write_tensors", slow)
    before = threading.active_count()
    with CheckpointWriter(run, ByteTokenizer(), keep=2, warn=pytest.fail) as writer:
        assert not writer.busy
        writer.submit(snapshot(1))
        assert begin.wait(120)
        assert writer.busy
        go_on.set()
        writer.wait()
        assert not writer.busy
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_without_a_thread_there_is_no_writer_and_a_clear_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with pytest.raises(ResourceError, match=r"cannot save checkpoints.*can't start new thread.*ulimit -u"):
        CheckpointWriter(run, ByteTokenizer(), keep=2, warn=pytest.fail)


def test_a_step_that_cannot_be_replaced_keeps_its_old_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(run, snapshot(1, 5.0), keep=1)
    before = read_manifest(path)
    rename = storage.rename

    def refuse(source: Path, target: Path) -> None:
        if source.name.startswith(storage.TMP_PREFIX):
            raise OSError(errno.EPERM, "no")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "rename", refuse)
        with pytest.raises(ResourceError, match="cannot save checkpoint"):
            save_checkpoint(run, snapshot(1, 4.0), keep=1)
    assert verify_checkpoint(path) == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    save_checkpoint(run, snapshot(1, 4.0), keep=1)
    assert verify_checkpoint(path) != before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_went_wrong_with_a_save_does_not_hide_why_training_ended(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(checkpoint_writer, "write_tensors", broken)
    warnings: list[str] = []

    def train() -> None:
        with CheckpointWriter(run, ByteTokenizer(), keep=1, warn=warnings.append) as writer:
            writer.submit(snapshot(1))
            raise DivergedError("the loss is NaN")

    with pytest.raises(DivergedError, match="the loss is NaN"):
        train()
    assert warnings == ["the last save failed: can't start new thread"]

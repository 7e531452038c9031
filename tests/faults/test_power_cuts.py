"""Power cuts at every operation: in a save, while one is replaced or retired, in a small file, and soon after a kill.

Numbers in names (row_11 ...) are the rows of the project's fault table. What a cut may leave is in power_cut.py.
"""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from harness import FailPoint
from power_cut import PowerCut, Tree, build, read_tree
from snapshots import assert_is_snapshot, save, snapshot
from storing import ByteTokenizer

from lmkit.store import storage
from lmkit.store.checkpoint import best_checkpoint, latest_checkpoint, list_checkpoints, load_checkpoint
from lmkit.store.checkpoint_writer import CheckpointWriter
from lmkit.store.found import CHECKPOINTS
from lmkit.store.manifest import step_directory
from lmkit.store.runs import Run


def recorded_save(run: Run, patch: pytest.MonkeyPatch, step: int, loss: float | None, *, keep: int) -> PowerCut:
    """Save in the run; what that did to the folder of its checkpoints."""
    with CheckpointWriter(run, ByteTokenizer(), keep=keep, warn=print) as writer, patch.context() as recording:
        cut = PowerCut(recording, run.path / CHECKPOINTS)
        writer.submit(snapshot(step, loss))
        writer.wait()
    return cut


@contextlib.contextmanager
def found(tree: Tree, tmp_path: Path) -> Iterator[Path]:
    """A run directory with these checkpoints and remains, as the next start finds it."""
    run_dir = tmp_path / "after"
    (run_dir / CHECKPOINTS).mkdir(parents=True)
    build(tree, run_dir / CHECKPOINTS)
    yield run_dir
    shutil.rmtree(run_dir)


def newest(run_dir: Path) -> Path:
    """The newest checkpoint, which must be whole, and so must be whatever looks newer."""
    path = latest_checkpoint(run_dir, warn=lambda text: pytest.fail(f"committed but damaged: {text}"))
    assert path is not None
    assert_is_snapshot(path)
    return path


def test_row_11_a_power_cut_anywhere_leaves_the_old_or_the_new_checkpoint(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, 1)
    cut = recorded_save(run, monkeypatch, 2, None, keep=2)
    committed = max(index for index, path in cut.calls("sync_directory") if path == ".")
    assert cut.calls("create_file")[-1][1].endswith("/MANIFEST.json")
    seen = set()
    for at, tree in cut.states(random.Random(11)):
        with found(tree, tmp_path) as run_dir:
            path = newest(run_dir)
        assert path.name == step_directory(2) or at <= committed
        seen.add(path.name)
    assert seen == {step_directory(1), step_directory(2)}


def test_row_11_a_power_cut_while_the_only_checkpoint_is_replaced_leaves_one_of_the_two(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, 2)
    cut = recorded_save(run, monkeypatch, 2, 3.0, keep=2)
    assert cut.calls("remove_directory")
    losses = set()
    for _, tree in cut.states(random.Random(12), draws=4):
        with found(tree, tmp_path) as run_dir:
            storage.sweep(run_dir / CHECKPOINTS)
            assert [path.name for path in (run_dir / CHECKPOINTS).iterdir()] == [step_directory(2)]
            losses.add(load_checkpoint(newest(run_dir), with_optimizer=False).state["valid_nats_per_token"])
    assert losses == {None, 3.0}


def test_rows_9_11_a_power_cut_while_older_checkpoints_are_retired_leaves_those_that_retention_keeps(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step, loss in ((1, 5.0), (2, 3.0), (3, 4.0), (4, 4.0)):
        save(run, step, loss, keep=4)
    cut = recorded_save(run, monkeypatch, 5, 4.5, keep=2)
    assert [path.name for path in list_checkpoints(run.path)] == [step_directory(step) for step in (2, 4, 5)]
    whole = cut.before | read_tree(run.path / CHECKPOINTS)
    commit, *retirements = [index for index, _ in cut.calls("rename")]
    assert cut.log[commit + 1] == ("sync_directory", (".",))
    assert len(retirements) == 2
    seen = set()
    for at, tree in cut.states(random.Random(9), begin=commit, draws=4):
        listed = {name for name in tree if name.startswith("step-")}
        assert [name for name in listed if tree[name] != whole[name]] == [], "a half-deleted one is listed"
        # two that are newest and the best one; the older ones, too, until the new one is there for certain
        kept = (2, 4, 5) if at > commit + 1 else (1, 2, 3, 4)
        assert {step_directory(step) for step in kept} <= listed
        with found(tree, tmp_path) as run_dir:
            storage.sweep(run_dir / CHECKPOINTS)
            assert {path.name for path in (run_dir / CHECKPOINTS).iterdir()} == listed
            assert newest(run_dir).name == max(listed)
            best = best_checkpoint(run_dir, pytest.fail)
            assert best is not None
            assert best.name == step_directory(2)
        seen.add(tuple(sorted(int(name.removeprefix("step-")) for name in listed)))
    assert seen >= {(1, 2, 3, 4), (1, 2, 3, 4, 5), (1, 2, 4, 5), (2, 4, 5)}


@pytest.mark.parametrize("old", [None, b"old " * 200], ids=["new", "there"])
def test_row_11_a_power_cut_leaves_a_small_file_as_it_was_or_as_it_was_to_be_and_whole(
    old: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run" / "result.json"
    path.parent.mkdir()
    if old is not None:
        path.write_bytes(old)
    first, second = b"first " * 3000, b"second " * 100
    with monkeypatch.context() as patch:
        cut = PowerCut(patch, path.parent)
        storage.replace_file(path, first)
        between = len(cut.log)
        storage.replace_file(path, second)
    seen = set()
    for at, tree in cut.states(random.Random(13), draws=12):
        content = tree.pop(path.name, None)
        assert content != old or at < between
        assert content != first or at < len(cut.log)
        assert content in (old, first) or (content == second and at > between)
        assert all(name.startswith(storage.TMP_PREFIX) for name in tree)
        seen.add(content)
    assert seen == {old, first, second}


# Killed, started again, and then the power fails


class Killed(BaseException):
    """Ends what is done as a kill does: whoever would clean up cannot."""


def stop(name: str, args: tuple[Any, ...]) -> None:
    raise Killed


OLD, NEW = ({"a": bytes([number]) * 100, "b": bytes([number]) * 100} for number in (1, 2))
STEP, TEMPORARY = step_directory(1), f".tmp-{step_directory(1)}-1-ab"


def replaced(folder: Path) -> None:
    storage.replace_directory(folder / TEMPORARY, folder / STEP)


def discarded(folder: Path) -> None:
    storage.discard(folder / STEP)


@pytest.mark.parametrize(
    ("work", "ends"),
    [(replaced, [{STEP: OLD}, {STEP: NEW}]), (discarded, [{STEP: OLD}, {}])],
    ids=["replaced", "discarded"],
)
def test_rows_9_11_a_power_cut_soon_after_a_kill_leaves_a_directory_whole_or_none(
    work: Callable[[Path], None], ends: list[Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep of the start after the kill must not trust that what it sees is on the disk."""
    rng = random.Random(14)
    seen = []
    for killed_at in count():
        folder = tmp_path / str(killed_at)
        folder.mkdir()
        killed = True
        build({STEP: OLD, TEMPORARY: NEW}, folder)
        with monkeypatch.context() as patch:
            cut = PowerCut(patch, folder)
            with monkeypatch.context() as kills, contextlib.suppress(Killed):
                FailPoint(kills, killed_at, stop)
                work(folder)
                killed = False
            started = len(cut.log)
            storage.sweep(folder)
        for _, tree in cut.states(rng, begin=started):
            after = tmp_path / "after"
            after.mkdir()
            build(tree, after)
            storage.sweep(after)
            left = read_tree(after)
            assert left in ends, (killed_at, cut.log)
            seen.append(left)
            shutil.rmtree(after)
        if not killed:
            break
    assert all(end in seen for end in ends)

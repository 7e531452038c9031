"""Files of tensors that were made to do harm: refused before memory is taken for what they say, with one short line.

Numbers in names (row_85 ...) are the rows of the project's fault table.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from children import NOT_HERE
from harness import Lmkit, Start, forge

from lmkit.errors import LmkitError
from lmkit.hf import adapters, weights
from lmkit.hf.families import FAMILIES
from lmkit.store import manifest
from lmkit.store.checkpoint import list_checkpoints, load_checkpoint
from lmkit.store.manifest import MANIFEST, MODEL, TensorSpec
from lmkit.store.tensorfile import header_bytes

MOST_BYTES = 200 << 20
"""What all the attacks together may take of memory."""

Attack = Callable[[Path], None]
"""Damages the checkpoint in a folder."""

NAMES = [
    "../../../etc/cron.d/x", "/etc/passwd", "a/../../b", "..", "a\\..\\b", "\\x", "nul\x00", "escape\x1b[2J",
    "line\nbreak", "tab\t", "delete\x7f", "next\x85line", "w" * 1_000_000, "", "__metadata__",
]  # fmt: skip
"""What no tensor is called."""


def change_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as an attacker would: with a right digest of itself."""
    found = json.loads((checkpoint / MANIFEST).read_bytes())
    change(found)
    del found["self"]
    found["self"] = hashlib.sha256(manifest.canonical_json(found)).hexdigest()
    (checkpoint / MANIFEST).write_bytes(manifest.canonical_json(found))


def table(tensors: dict[str, str]) -> Attack:
    """The manifest lists other tensors than the file has, and none of them twice."""

    def change(found: dict[str, Any]) -> None:
        found["tensors"][MODEL] = tensors
        found["aliases"].pop(MODEL, None)

    return lambda checkpoint: change_manifest(checkpoint, change)


def raw_table(entries: Callable[[], str]) -> Attack:
    """The same, in a manifest without blanks, of which more fits into the longest one that is read."""

    def attack(checkpoint: Path) -> None:
        found = json.loads((checkpoint / MANIFEST).read_bytes())
        found["tensors"][MODEL] = "HERE"
        text = json.dumps(found, separators=(",", ":")).replace('"HERE"', entries())
        (checkpoint / MANIFEST).write_text(text, encoding="ascii")

    return attack


def tensors(specs: dict[str, TensorSpec]) -> Attack:
    """Manifest and file agree on these tensors of zeros."""

    def attack(checkpoint: Path) -> None:
        forge(checkpoint, MODEL, header_bytes(specs) + bytes(sum(spec.num_bytes for spec in specs.values())))
        table({name: str(spec) for name, spec in specs.items()})(checkpoint)

    return attack


def header(change: Callable[[dict[str, Any]], Any]) -> Attack:
    """The file has another header, of the same length where that is possible, and the manifest knows its hash."""

    def attack(checkpoint: Path) -> None:
        data = (checkpoint / MODEL).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        made = change(json.loads(data[8:end]))
        text = made if isinstance(made, bytes) else json.dumps(made, separators=(",", ":")).encode()
        text = text.ljust(end - 8)
        forge(checkpoint, MODEL, len(text).to_bytes(8, "little") + text + data[end:])

    return attack


def header_length(number: int) -> Attack:
    """The first 8 bytes of the file say that the header has another length."""

    def attack(checkpoint: Path) -> None:
        data = (checkpoint / MODEL).read_bytes()
        forge(checkpoint, MODEL, number.to_bytes(8, "little") + data[8:])

    return attack


def offsets(change: Callable[[list[list[int]]], None]) -> Attack:
    """The header's tensors lie elsewhere."""

    def changed(found: dict[str, Any]) -> dict[str, Any]:
        change([entry["data_offsets"] for name, entry in found.items() if name != "__metadata__"])
        return found

    return header(changed)


def overlap(places: list[list[int]]) -> None:
    for place in places:
        place[:] = [0, place[1] - place[0]]


def swap(places: list[list[int]]) -> None:
    places[0][:], places[1][:] = list(places[1]), list(places[0])


def enlarge(found: dict[str, Any]) -> dict[str, Any]:
    return {name: entry | ({"shape": [1 << 62]} if "shape" in entry else {}) for name, entry in found.items()}


def listed(number: int) -> str:
    """So many tensors in the manifest."""
    return "{" + ",".join(f'"t{i}":"F32[]"' for i in range(number)) + "}"


def many(number: int, shape: str, data: str) -> bytes:
    """A header of so many tensors."""
    entries = (f'"t{i}":{{"dtype":"F32","shape":[{shape}],"data_offsets":[{data}]}}' for i in range(number))
    return ("{" + ",".join(entries) + "}").encode()


ATTACKS: dict[str, Attack] = {
    "a million tensors in the manifest": raw_table(lambda: listed(1_000_000)),
    "as many as fit into it": raw_table(lambda: listed(900_000)),
    "as many as may be parsed": raw_table(lambda: listed(199_000)),
    "one too many": raw_table(lambda: listed(manifest.MAX_TENSORS + 1)),
    "empty lists": raw_table(lambda: "[" + ",".join(["[]"] * 5_000_000) + "]"),
    "lists in lists": raw_table(lambda: "[" * 390_000),
    "half a character": table({"\ud800": "F32[1]"}),
    "huge": table({"weight": "F32[999999999999,999999999999]"}),
    "huge in 16 dimensions": table({"weight": f"F32[{','.join(['999999999999999'] * 16)}]"}),
    "17 dimensions": table({"weight": f"F32[{','.join(['1'] * 17)}]"}),
    "less than nothing": table({"weight": "F32[20,-20]"}),
    "a float": table({"weight": "F32[1e9]"}),
    "empty and huge": tensors({"weight": TensorSpec("F32", (0, 999_999_999_999_999, 999_999_999_999_999))}),
    **{f"name {number}": tensors({name: TensorSpec("F32", (4,))}) for number, name in enumerate(NAMES)},
    "a million tensors in the header": header(lambda found: many(1_000_000, "1", "0,4")),
    "names in the header": header(lambda found: {f"../{name}": entry for name, entry in found.items()}),
    "another name": header(lambda found: {name.upper(): entry for name, entry in found.items()}),
    "twice the same": header(lambda found: json.dumps(found)[:-1].encode() + b"," + json.dumps(found)[1:].encode()),
    "huge in the header": header(enlarge),
    "lists in lists in the header": header(lambda found: b"[" * 1_000_000),
    "no text": header(lambda found: b"\xff" * 100),
    "overlapping": offsets(overlap),
    "swapped": offsets(swap),
    "beyond the end": offsets(lambda places: places[-1].__setitem__(1, 10**15)),
    "before the beginning": offsets(lambda places: places[0].__setitem__(0, -8)),
    **{f"header of {number} bytes": header_length(number) for number in (0, 1, 100_000_000, 1 << 63, (1 << 64) - 1)},
}


def status(name: str) -> int:
    """A number of bytes that Linux knows of this process."""
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) << 10


def refuse_all(read: Callable[[Path], object], good: Path, attacks: Path, codes: set[int]) -> None:
    """Read each file of a folder, in a child. Raises if one is not refused shortly, or all take too much memory.

    A good one is read before, so that the code to do it is in memory already.
    """
    read(good)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here on
    except OSError:
        raise SystemExit(NOT_HERE) from None
    start = status("VmRSS")
    for attack in sorted(attacks.iterdir()):
        try:
            read(attack)
        except LmkitError as error:
            message = str(error)
            if error.exit_code not in codes or str(attack) not in message or len(message) > len(str(attack)) + 500:
                raise
        else:
            raise ValueError(f"{attack.name} was read")
        if (taken := status("VmHWM") - start) > MOST_BYTES:
            raise ValueError(f"{attack.name} took {taken >> 20} MB of memory")


def read_checkpoint(path: Path) -> None:
    load_checkpoint(path, with_optimizer=False)


def read_checkpoint_to_resume(path: Path) -> None:
    load_checkpoint(path, with_optimizer=True)


def test_row_85_a_checkpoint_with_a_crafted_table_or_header_is_refused_in_little_memory(
    trained: Path, lmkit: Lmkit, start: Start, tmp_path: Path
) -> None:
    good, attacks = list_checkpoints(trained)[-1], tmp_path / "attacks"
    for number, attack in enumerate(ATTACKS.values()):
        attack(Path(shutil.copytree(good, attacks / f"{number:02d}")))
    for read in (read_checkpoint, read_checkpoint_to_resume):
        child = start("--version", setup=[partial(refuse_all, read, good, attacks, {4})])
        assert child.wait() == 0, f"{child.text}\n{dict(enumerate(ATTACKS))}"
    for path in sorted(attacks.iterdir()):
        done = lmkit("generate", f"run={path}", "-n", "1", "device=cpu", "device.threads=1")
        assert done.code == 4, done.err
        assert str(path) in done.error
        assert len(done.error) < 1000


def test_row_85_a_tensor_that_no_memory_holds_is_refused_though_the_file_seems_to_have_it(
    trained: Path, lmkit: Lmkit, start: Start, tmp_path: Path
) -> None:
    good = list_checkpoints(trained)[-1]
    path = Path(shutil.copytree(good, tmp_path / "attacks" / "sparse"))
    spec = TensorSpec("F32", (1 << 40,))
    tensors({})(path)
    with (path / MODEL).open("r+b") as file:
        file.write(header_bytes({"weight": spec}))
        try:
            file.truncate(file.tell() + spec.num_bytes)
        except OSError:
            pytest.skip("needs a file system with large sparse files")
        size = file.seek(0, 2)

    def believe(found: dict[str, Any]) -> None:
        found["tensors"][MODEL] = {"weight": str(spec)}
        for entry in found["files"]:
            if entry["path"] == MODEL:
                entry["bytes"] = size

    change_manifest(path, believe)
    for read in (read_checkpoint, read_checkpoint_to_resume):
        child = start("--version", setup=[partial(refuse_all, read, good, tmp_path / "attacks", {6})])
        assert child.wait() == 0, child.text
    done = lmkit("generate", f"run={path}", "-n", "1", "device=cpu", "device.threads=1")
    assert done.code == 6, done.err
    assert "more than the memory of this machine" in done.error


def tensor_file(path: Path, text: bytes, num_bytes: int = 0) -> None:
    """A safetensors file with this header and so many bytes of zeros."""
    path.mkdir(parents=True)
    (path / weights.WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
    shutil.copyfile(path / weights.WEIGHTS, path / adapters.WEIGHTS)


def entry_of(name: str, shape: list[int], places: list[int]) -> bytes:
    return json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": places}}).encode()


def read_foreign(folder: Path) -> None:
    weights.read_weights(folder, FAMILIES["llama"])


def read_adapter(folder: Path) -> None:
    adapters._read_weights(folder / adapters.WEIGHTS, "")


def test_row_85_a_file_of_another_program_with_a_crafted_header_is_refused_in_little_memory(
    start: Start, tmp_path: Path
) -> None:
    good, attacks = tmp_path / "good", tmp_path / "attacks"
    tensor_file(good, entry_of("weight", [4], [0, 16]), 16)
    tensor_file(attacks / "a million tensors", many(1_000_000, "0", "0,0"))
    tensor_file(attacks / "as many as fit", many(135_000, "0", "0,0"))
    tensor_file(attacks / "huge", entry_of("weight", [1 << 60], [0, 16]), 16)
    tensor_file(attacks / "beyond the end", entry_of("weight", [1 << 40], [0, 4 << 40]), 16)
    both = json.loads(entry_of("a", [4], [0, 16])) | json.loads(entry_of("b", [4], [0, 16]))
    tensor_file(attacks / "overlapping", json.dumps(both).encode(), 16)
    for number, name in enumerate(NAMES):
        if name != "__metadata__":
            tensor_file(attacks / f"name {number}", entry_of(name, [4], [0, 16]), 16)
    for read in (read_foreign, read_adapter):
        child = start("--version", setup=[partial(refuse_all, read, good, attacks, {3, 4})])
        assert child.wait() == 0, child.text

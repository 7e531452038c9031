"""Input that was made to do harm: nothing in it is run, nothing outside is touched, and the answer is one line.

Every attack tries to make a file, the canary. Numbers in names (row_81 ...) are the rows of the project's fault table.
"""

from __future__ import annotations

import ast
import base64
import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import zstandard
from harness import Lmkit, forge, forge_config

import lmkit as package
from lmkit.config.data import HfTokenizerConfig, SentencePieceTokenizerConfig
from lmkit.data import textfiles
from lmkit.errors import DataError
from lmkit.store.checkpoint import list_checkpoints
from lmkit.tokenizers import load_tokenizer, probe, train_tokenizer
from lmkit.tokenizers.base import FORMAT, VERSION, digest_of

DEVICE = ["device=cpu", "device.threads=1"]


class Bomb:
    """Unpickling it makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def payload(canary: Path) -> bytes:
    """A pickle that makes the canary, checked to be live."""
    data = pickle.dumps(Bomb(canary))
    pickle.loads(data)
    assert canary.exists()
    canary.unlink()
    return data


# Code in data


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "state.json", "config.json"])
def test_row_81_a_pickle_in_place_of_a_checkpoints_file_is_not_run(
    trained: Path, payload: bytes, canary: Path, small: list[str], lmkit: Lmkit, name: str
) -> None:
    for checkpoint in list_checkpoints(trained):
        forge(checkpoint, name, payload)
    done = lmkit("generate", f"run={trained}", "run.checkpoint=latest", *DEVICE)
    if name != "optim.safetensors":  # which is not needed to generate, and not read
        assert done.code == 4, done.err
        assert name in done.error
    done = lmkit(*small, f"run.dir={trained}", "resume=true", "train.max_steps=14")
    assert done.code == 4, done.err
    assert name in done.error
    assert not canary.exists()


@pytest.mark.parametrize("ending", [".pt", ".bin", ".pkl", ".safetensors", ".txt", ".jsonl", ".json"])
def test_row_81_a_pickle_given_as_a_run_a_corpus_or_a_tokenizer_is_not_run(
    payload: bytes, canary: Path, lmkit: Lmkit, tmp_path: Path, ending: str
) -> None:
    path = tmp_path / f"innocent{ending}"
    path.write_bytes(payload)
    for words, code in [
        (["generate", f"run={path}"], 4),
        (["finetune", "dataset=pydocs", f"run={path}"], 4),
        (["prepare", "dataset=text", f"dataset.path={path}"], 3),
        (["prepare", "dataset=jsonl", f"dataset.path={path}"], 3),
        (["prepare", "dataset=pydocs", "tokenizer=hf", f"tokenizer.path={path}"], 3),
    ]:
        done = lmkit(*words)
        assert done.code == code, done.err
        assert str(path) in done.error
    assert not canary.exists()


CODE_KEYS: list[Callable[[dict[str, Any], str], None]] = [
    lambda config, canary: config["model"].update({"_target_": "os.system", "_args_": [f"touch {canary}"]}),
    lambda config, canary: config["model"].update({"kind": "os.system"}),
    lambda config, canary: config["model"].update({"kind": "lmkit.models.recurrent.RecurrentModel"}),
    lambda config, canary: config["model"].update({"kind": ["recurrent"]}),
    lambda config, canary: config["model"].pop("kind"),
    lambda config, canary: config.update({"model": {}}),
    lambda config, canary: config.update({"dataset": {}}),
    lambda config, canary: config["model"].update({"kind": "text"}),
    lambda config, canary: config["dataset"].update({"()": "os.system", "command": f"touch {canary}"}),
    lambda config, canary: config["dataset"].update({"_target_": "subprocess.call", "_partial_": True}),
    lambda config, canary: config["model"].update({"d_hidden": "${oc.env:HOME}"}),
    lambda config, canary: config["model"].update({"d_hidden": f"!!python/object/apply:os.system ['touch {canary}']"}),
    lambda config, canary: config["model"].update({"__class__": "posix.system", "__reduce__": [canary]}),
    lambda config, canary: config.update({"vocab_size": "__import__('os').getpid()"}),
    lambda config, canary: config.update({"model": f"os.system('touch {canary}')"}),
]


@pytest.mark.parametrize("number", range(len(CODE_KEYS)))
def test_rows_82_83_no_key_or_value_of_a_stored_configuration_chooses_code(
    trained: Path, canary: Path, lmkit: Lmkit, number: int
) -> None:
    newest = list_checkpoints(trained)[-1]
    forge_config(newest, lambda config: CODE_KEYS[number](config, str(canary)))
    done = lmkit("generate", f"run={newest}", "-n", "1", *DEVICE)
    assert done.code == 4, done.err
    assert f"{newest}/config.json" in done.error
    assert not canary.exists()


def test_row_82_an_interpolation_in_a_stored_text_stays_a_text(
    trained: Path, lmkit: Lmkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    newest = list_checkpoints(trained)[-1]
    forge_config(newest, lambda config: config["dataset"].update({"path": "/nowhere/${oc.env:SECRET}"}))
    done = lmkit("generate", f"run={newest}", "-n", "1", *DEVICE)
    assert done.code == 0, done.err
    assert "hunter2" not in done.out + done.err


@pytest.mark.parametrize(
    "word",
    [
        "model._target_=os.system", "+model._target_=os.system", "hydra/launcher=submitit", "hydra.run.dir=/tmp/x",
        "hydra.job_logging.handlers.x.()=os.system", "~model", "model=../../../etc/passwd", "model=/etc/passwd",
        "run.root=${oc.env:HOME}", "seed=${eval:1}", "dataset.path=${now:%Y}", "--config-dir=/tmp", "-cd=/tmp",
        "--config-path=/tmp", "-cn=evil", "recipe=../../evil",
    ],
)  # fmt: skip
def test_row_82_the_command_line_reaches_no_part_of_hydra_that_runs_code(
    small: list[str], lmkit: Lmkit, word: str
) -> None:
    done = lmkit(*small, word)
    assert done.code == 2, done.err
    assert len(done.err.splitlines()) == 1
    assert done.error
    assert list(Path.cwd().iterdir()) == []


ALLOWED_IMPORTS = {
    "__init__.py",
    "averaging.py",
    "cli.py",
    "device.py",
    "hf/exporting.py",
    "hf/onnx_file.py",
    "launch.py",
    "loggers.py",
}
"""Modules that import by a name: of a command, a public name or an optional package, each from a table in the code."""


def test_row_83_nothing_imports_by_a_name_that_comes_from_a_file() -> None:
    folder = Path(package.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                place = f"{path.relative_to(folder)}:{node.lineno} calls {called}"
                if called.split(".")[-1] in ("import_module", "__import__", "find_spec", "run_path", "locate"):
                    assert path.relative_to(folder).as_posix() in ALLOWED_IMPORTS, place
                assert called.split(".")[-1] not in ("instantiate", "get_class", "get_object", "get_method"), place
                assert called not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "marshal.loads"), place


# Native libraries

BASE_JSON: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None, "post_processor": None, "decoder": None,
    "model": {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]],
    },
}  # fmt: skip


def tokenizer_json(path: Path, **changes: Any) -> Path:
    """A tokenizer.json; changes of ``model`` are put into it."""
    spec = json.loads(json.dumps(BASE_JSON))
    spec["model"] |= changes.pop("model", {})
    path.write_text(json.dumps(spec | changes), encoding="utf-8")
    return path


def regex(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


BROKEN_CHARSMAP = base64.b64encode(struct.pack("<I", 0xFFFFFFFF) + bytes(5)).decode()


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"merges": [["a", "zz"]]}},
        {"model": {"vocab": {"a": 0, "b": 1}, "merges": ["a b"]}},
        {"model": {"vocab": {"a": 2**32 - 1}}},
        {"model": {"vocab": {"a": -1}}},
        {"model": {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 5}},
        {"pre_tokenizer": regex("(((")},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": BROKEN_CHARSMAP}},
        {"normalizer": {"type": "os.system"}},
    ],
    ids=range(8),
)
def test_row_87_a_crafted_tokenizer_json_ends_in_the_child_that_tries_it(
    lmkit: Lmkit, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = tokenizer_json(tmp_path / "tokenizer.json", **changes)
    done = lmkit("prepare", "dataset=pydocs", "tokenizer=hf", f"tokenizer.path={path}")
    assert done.code == 3, done.err
    assert f"{path} is not a usable tokenizer.json" in done.error


@pytest.mark.slow
def test_row_87_a_tokenizer_json_that_needs_all_time_or_memory_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tokenizer_json(tmp_path / "slow.json", pre_tokenizer=regex("(.*a){25}"))
    for name, value, message in (("WALL_SECONDS", 2.0, "takes more than 2 s"), ("CPU_SECONDS", 2, "more than 2 s")):
        with monkeypatch.context() as patch:
            patch.setattr(probe, name, value)
            begun = time.monotonic()
            with pytest.raises(DataError, match=rf"slow\.json .*{message}"):
                train_tokenizer(HfTokenizerConfig(path=str(slow)), lambda: iter(()))
            assert time.monotonic() - begun < 15
    monkeypatch.setattr(probe, "MEMORY_BYTES", 1 << 30)
    more = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 2000}
    huge = tokenizer_json(tmp_path / "huge.json", normalizer={"type": "Sequence", "normalizers": [more] * 4})
    with pytest.raises(DataError, match=r"huge\.json .* crashed, or needed more than"):
        train_tokenizer(HfTokenizerConfig(path=str(huge)), lambda: iter(()))


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": regex("(a+)+$")},  # the regular expression gives up: a panic, which is no Exception
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}},
    ],
    ids=["panic", "missing special token"],
)
def test_row_87_a_text_that_the_library_cannot_encode_is_one_line(
    lmkit: Lmkit, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = tokenizer_json(tmp_path / "tokenizer.json", **changes)
    text = tmp_path / "text.txt"
    text.write_text("".join("a" * 500 + "!\n" for _ in range(20)), encoding="utf-8")
    done = lmkit("prepare", "dataset=text", f"dataset.path={text}", "tokenizer=hf", f"tokenizer.path={path}")
    assert done.code == 3, done.err
    assert "cannot encode the text" in done.error


def test_row_87_dropout_and_post_processing_of_the_file_change_no_text(tmp_path: Path) -> None:
    forgetful = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
    path = tokenizer_json(tmp_path / "tokenizer.json", model={"dropout": 0.5}, post_processor=forgetful)
    tokenizer = train_tokenizer(HfTokenizerConfig(path=str(path)), lambda: iter(()))
    assert {tuple(tokenizer.encode("abababab")) for _ in range(20)} == {(2, 2, 2, 2)}


def protobuf(number: int, data: bytes) -> bytes:
    """A field of a message that holds bytes."""
    size, length = b"", len(data)
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + data


def piece(text: bytes, score: float, kind: int = 1) -> bytes:
    return protobuf(1, protobuf(1, text) + b"\x15" + struct.pack("<f", score) + bytes([3 << 3, kind]))


def charsmap(units: list[int], strings: bytes = b"\0") -> bytes:
    blob = b"".join(struct.pack("<I", unit) for unit in units)
    return protobuf(3, protobuf(2, struct.pack("<I", len(blob)) + blob + strings))


MODEL_ATTACKS = {
    "piece of 5 MB": piece(b"x" * 5_000_000, 1.0),
    "score of NaN": piece(b"the", float("nan")),
    "endless score": piece(b"the", float("inf")),
    "wild size of the charsmap": protobuf(3, protobuf(2, struct.pack("<I", 0xFFFFFFFF) + b"abcd")),
    "wild offsets in the charsmap": charsmap([0x7FFFFFFF] * 256),
    "string without an end": charsmap([1 << 8 | 1 << 10] * 512, b"abc"),
    "byte piece given twice": piece(b"<0x41>", 1.0, kind=6),
    "cut off": None,
}


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    text = "the cat sat on the mat\n" * 50
    train_tokenizer(SentencePieceTokenizerConfig(vocab_size=300), lambda: iter([text])).save(folder)
    return folder


@pytest.mark.parametrize("attack", MODEL_ATTACKS)
def test_row_86_a_crafted_sentencepiece_model_ends_in_the_child_that_tries_it(
    sentencepiece_folder: Path, tmp_path: Path, attack: str
) -> None:
    good = (sentencepiece_folder / "sentencepiece.model").read_bytes()
    added = MODEL_ATTACKS[attack]
    model = good[:-20] if added is None else good + added
    header = json.loads((sentencepiece_folder / "tokenizer.json").read_text(encoding="utf-8"))
    header["digest"] = digest_of("sentencepiece", model)
    (tmp_path / "tokenizer.json").write_text(json.dumps(header), encoding="utf-8")
    (tmp_path / "sentencepiece.model").write_bytes(model)
    with pytest.raises(DataError, match=r"sentencepiece\.model is damaged") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.exit_code == 3


def test_rows_86_87_a_crash_of_the_child_is_an_error_here(
    sentencepiece_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_tokenizer(sentencepiece_folder).kind == "sentencepiece"
    crashed = subprocess.CompletedProcess([], -11, b"", b"")
    monkeypatch.setenv("LMKIT_CACHE", str(tmp_path))  # where it was not found good
    monkeypatch.setattr(probe.subprocess, "run", lambda *_, **__: crashed)
    with pytest.raises(DataError, match="crashed"):
        load_tokenizer(sentencepiece_folder)


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the tokenizers that a child process has tried since."""
    tried: list[str] = []
    run = subprocess.run

    def noted(command: list[str], **options: Any) -> Any:
        tried.append(command[4])
        return run(command, **options)

    monkeypatch.setattr(probe.subprocess, "run", noted)
    return tried


@pytest.fixture
def subwords(small: list[str], lmkit: Lmkit, tmp_path: Path) -> Path:
    """A finished run with a sentencepiece tokenizer."""
    words = [word for word in small if word != "tokenizer=byte"]
    words += ["tokenizer=sentencepiece", "tokenizer.vocab_size=300", "train.max_steps=4"]
    done = lmkit(*words, f"run.dir={tmp_path}/subwords")
    assert done.code == 0, done.err
    return tmp_path / "subwords"


def forge_tokenizer(checkpoint: Path, kind: str, file: str, content: bytes) -> None:
    """Give a checkpoint another tokenizer, of another library."""
    header = {"format": FORMAT, "version": VERSION, "kind": kind, "digest": digest_of(kind, content), "data": None}
    forge(checkpoint, f"tokenizer/{file}", content)
    forge(checkpoint, "tokenizer/tokenizer.json", json.dumps(header).encode())


def test_rows_86_87_the_tokenizer_of_a_run_is_tried_once_and_of_an_own_run_never(
    tries: list[str], subwords: Path, lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", f"run={subwords}", "-n", "1", *DEVICE]
    assert lmkit(*words).code == 0
    assert tries == []
    monkeypatch.setenv("LMKIT_CACHE", str(tmp_path / "of somebody else"))
    assert [lmkit(*words).code for _ in range(2)] == [0, 0]
    assert tries == ["sentencepiece"]
    (tmp_path / "no folder").touch()
    monkeypatch.setenv("LMKIT_CACHE", str(tmp_path / "no folder"))
    assert [lmkit(*words).code for _ in range(2)] == [0, 0]
    assert tries == ["sentencepiece"] * 3


@pytest.mark.parametrize(("kind", "library"), [("sentencepiece", "sentencepiece"), ("hf", "tokenizers")])
def test_rows_86_87_another_version_of_the_library_tries_a_file_again(
    sentencepiece_folder: Path,
    tries: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    library: str,
) -> None:
    monkeypatch.setenv("LMKIT_CACHE", str(tmp_path / "cache"))
    path = tokenizer_json(tmp_path / "tokenizer.json")

    def load() -> None:
        if kind == "hf":
            train_tokenizer(HfTokenizerConfig(path=str(path)), lambda: iter(()))
        else:
            load_tokenizer(sentencepiece_folder)

    installed, asked = metadata.version, list[str]()

    def version_of(name: str, newer: str) -> str:
        asked.append(name)
        return newer if name == library else installed(name)

    for newer, expected in (("0.1.0", 1), ("0.1.0", 1), ("0.1.1", 2), ("0.1.0", 2)):
        monkeypatch.setattr(metadata, "version", partial(version_of, newer=newer))
        load()
        assert tries == [kind] * expected
    assert library in asked


def test_rows_86_87_what_was_trained_here_is_tried_by_a_newer_library(
    tries: list[str], subwords: Path, lmkit: Lmkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", f"run={subwords}", "-n", "1", *DEVICE]
    assert lmkit(*words).code == 0
    assert tries == []
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "99.0" if name == "sentencepiece" else installed(name))
    assert [lmkit(*words).code for _ in range(2)] == [0, 0]
    assert tries == ["sentencepiece"]


def test_rows_86_87_a_library_without_metadata_is_of_one_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert probe._version("sentencepiece") == probe._version(None) == "unknown"


@pytest.mark.parametrize("attack", ["wild offsets in the charsmap", "cut off"])
def test_row_86_a_crafted_model_in_a_forged_run_ends_in_the_child_that_tries_it(
    subwords: Path, tries: list[str], lmkit: Lmkit, attack: str
) -> None:
    newest = list_checkpoints(subwords)[-1]
    good = (newest / "tokenizer" / "sentencepiece.model").read_bytes()
    added = MODEL_ATTACKS[attack]
    forge_tokenizer(newest, "sentencepiece", "sentencepiece.model", good[:-20] if added is None else good + added)
    for _ in range(2):  # what was found bad is tried again
        done = lmkit("generate", f"run={newest}", "-n", "1", *DEVICE)
        assert done.code == 3, done.err
        assert f"{newest}/tokenizer/sentencepiece.model is damaged" in done.error
    assert tries == ["sentencepiece"] * 2


def test_row_87_a_tokenizer_json_in_a_forged_run_that_needs_all_time_is_stopped(
    trained: Path, lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "CPU_SECONDS", 2)
    slow = tokenizer_json(tmp_path / "slow.json", pre_tokenizer=regex("(.*a){25}"))
    newest = list_checkpoints(trained)[-1]
    forge_tokenizer(newest, "hf", "hf.json", slow.read_bytes())
    done = lmkit("generate", f"run={newest}", "-n", "1", *DEVICE)
    assert done.code == 3, done.err
    assert f"{newest}/tokenizer/hf.json is damaged" in done.error


# Archives


def tar_bytes(*members: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return out.getvalue()


def tar_member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = 4 if kind == tarfile.REGTYPE else 0
    return info


def zip_bytes(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return out.getvalue()


def escaping_archives(outside: Path) -> dict[str, bytes]:
    tar = tar_bytes(
        tar_member("../../outside/slip"), tar_member(f"{outside}/absolute"), tar_member("a", tarfile.SYMTYPE, "/etc"),
        tar_member("a/passwd"), tar_member("b", tarfile.LNKTYPE, "/etc/passwd"), tar_member("null", tarfile.CHRTYPE),
        tar_member("same"), tar_member("SAME"), tar_member("same"),
    )  # fmt: skip
    packed = zip_bytes("../../outside/slip", f"{outside}/absolute", "same.txt", "SAME.TXT")
    return {
        "corpus.txt": tar, "corpus.txt.gz": gzip.compress(tar), "corpus.txt.zst": zstandard.compress(packed),
        "corpus.jsonl": packed, "corpus.tar.gz": gzip.compress(tar), "corpus.zip": packed, "corpus.jsonl.gz": packed,
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(escaping_archives(Path("/x"))))
def test_row_88_archives_are_refused_and_nothing_is_unpacked(lmkit: Lmkit, tmp_path: Path, name: str) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside" / "here"
    outside.mkdir()
    inside.mkdir(parents=True)
    (inside / name).write_bytes(escaping_archives(outside)[name])
    before = sorted(tmp_path.rglob("*"))
    for kind in ("text", "jsonl"):
        for path in (inside / name, inside):
            done = lmkit("prepare", f"dataset={kind}", f"dataset.path={path}")
            assert done.code == 3, done.err
            assert str(path) in done.error
    assert sorted(tmp_path.rglob("*")) == before


def bombs() -> dict[str, bytes]:
    """Files of a few kB that hold 32 MB."""
    packed = gzip.compress(b"a" * (32 << 20))
    lines = zstandard.compress(b"word " * (7 << 20), 1)
    return {"bomb.txt.gz": packed, "bomb.txt.zst": lines, "nested.txt.gz": gzip.compress(packed)}


@pytest.mark.parametrize("name", sorted(bombs()))
def test_row_89_an_archive_bomb_is_stopped_early_and_leaves_nothing(
    lmkit: Lmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("LMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(textfiles, "FREE_BYTES", 4 << 20)
    path = tmp_path / name
    path.write_bytes(bombs()[name])
    read: list[int] = []
    decode = textfiles._decode
    monkeypatch.setattr(
        textfiles, "_decode", lambda path, data, offset: read.append(len(data)) or decode(path, data, offset)
    )
    done = lmkit("prepare", "dataset=text", f"dataset.path={path}", "tokenizer=byte")
    assert done.code == 3, done.err
    assert str(path) in done.error
    assert "as no text does" in done.error or "holds gzip data" in done.error
    assert sum(read) <= 8 << 20
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"] == []


def test_row_89_text_that_compresses_very_well_is_still_text(tmp_path: Path) -> None:
    path = tmp_path / "poem.txt.gz"
    path.write_bytes(gzip.compress(b"a rose is a rose\n" * 2_000_000))
    assert sum(map(len, textfiles.text_blocks(textfiles.Part(path)))) == 34_000_000


# Words of the command line


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch canary']", "&a [*a,*a]", "*a", "{a: &a [x], b: *a}", "- - - -",
        "x" * 3_000_000, "[" * 100_000, "1" * 100_000, "\x00", "\n\nseed: 2", "!!binary aGk=", "<<: *a",
    ],
    ids=range(12),
)  # fmt: skip
@pytest.mark.parametrize("key", ["model.d_hidden", "dataset.valid_fraction", "optimizer.lr"])
def test_row_90_a_value_is_no_yaml_whatever_it_looks_like(lmkit: Lmkit, small: list[str], key: str, value: str) -> None:
    begun = time.process_time()
    done = lmkit(*small, f"{key}={value}")
    assert time.process_time() - begun < 60
    assert done.code == 2, done.err
    assert key in done.error
    assert len(done.err) < 1500
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../../x", "a\nb", "; touch canary", "$(touch canary)", "`touch canary`", "|x", "-rf"]
)
def test_row_92_a_name_is_a_name_and_no_command(lmkit: Lmkit, small: list[str], name: str) -> None:
    """``run.dir`` is where the user says, whatever it is called; names taken from data are in test_runs.py."""
    before = {path.name for path in Path.cwd().iterdir()}
    done = lmkit(*small, f"run.dir={name}", "train.max_steps=1")
    assert done.code == 0, done.err
    assert Path(name).is_dir()
    assert {path.name for path in Path.cwd().iterdir()} - before <= {Path(name).name}


@pytest.mark.parametrize("text", ["</s>", "<|endoftext|>", "<eos>", "<eod>", "<unk>", "<0x41>", "<s>", "▁"])
def test_row_93_a_prompt_that_looks_like_a_control_token_is_plain_text(trained: Path, lmkit: Lmkit, text: str) -> None:
    done = lmkit("generate", f"run={trained}", "--prompt", f"a{text}b", "-n", "0", *DEVICE)
    assert done.code == 0, done.err
    assert done.out == f"a{text}b\n"

"""Readers of what others may have written, fed with anything: each gives a value or an LmkitError, and nothing else.

The manifest of a checkpoint (row_22), the index of prepared data (row_101), stored configurations (row_82), text and
records of bytes (rows_95, 100).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard
from harness import Lmkit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmkit.config import ROOTS
from lmkit.config.data import DatasetConfig, JsonlConfig, TextConfig, TokenizerConfig
from lmkit.config.model import ModelConfig
from lmkit.config.plain import from_plain, to_plain
from lmkit.data import textfiles
from lmkit.data.corpus import open_corpus
from lmkit.data.survey import Surveyor, digest_of
from lmkit.data.tokenfiles import open_prepared
from lmkit.errors import LmkitError
from lmkit.store.checkpoint import load_checkpoint
from lmkit.store.manifest import canonical_json, parse_json, read_manifest

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("${oc.env:HOME}"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def value_or_lmkit_error(read: Callable[[], Any]) -> Any:
    """What ``read`` gives, None for an LmkitError; anything else is a failure of the test."""
    try:
        return read()
    except LmkitError:
        return None


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in JSON data."""
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def put(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of JSON data with another value at one place."""
    if not path:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = put(data[path[0]], path[1:], value)
    return copy


@st.composite
def damaged(draw: st.DrawFn, data: Any) -> Any:
    """JSON data with other values at one to three places, or without one of its keys."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(data))))
        data = put(data, path, draw(anything))
    if isinstance(data, dict) and data and draw(st.booleans()):
        data = {key: value for key, value in data.items() if key != draw(st.sampled_from(sorted(data)))}
    return data


# Manifests


@fuzz
@given(raw=st.binary(max_size=200) | anything.map(lambda value: json.dumps(value).encode()))
def test_row_22_fuzz_strict_json_of_any_bytes(raw: bytes) -> None:
    value_or_lmkit_error(lambda: parse_json(raw, Path("MANIFEST.json")))


def test_row_22_fuzz_a_manifest_with_anything_at_any_place(trained: Path) -> None:
    (checkpoint, *_) = sorted((trained / "checkpoints").iterdir())
    path = checkpoint / "MANIFEST.json"
    good = json.loads(path.read_bytes())

    @fuzz
    @given(data=damaged(good), sealed=st.booleans())
    def check(data: Any, sealed: bool) -> None:
        try:
            if sealed and isinstance(data, dict):
                body = {key: value for key, value in data.items() if key != "self"}
                data = body | {"self": hashlib.sha256(canonical_json(body)).hexdigest()}
            path.write_bytes(canonical_json(data))
        except (ValueError, RecursionError):  # NaN has no canonical form
            path.write_text(json.dumps(data), encoding="utf-8")
        value_or_lmkit_error(lambda: read_manifest(checkpoint))
        value_or_lmkit_error(lambda: load_checkpoint(checkpoint, with_optimizer=True))

    check()


# Prepared data


def test_row_101_fuzz_an_index_with_anything_at_any_place(
    lmkit: Lmkit, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMKIT_CACHE", str(tmp_path / "cache"))
    assert lmkit("prepare", *small[1:4]).code == 0
    (folder,) = (tmp_path / "cache" / "prepared").iterdir()
    path = folder / "index.json"
    good = json.loads(path.read_bytes())

    @fuzz
    @given(data=damaged(good))
    def check(data: Any) -> None:
        if isinstance(data, dict):
            data.pop("self", None)
            data = data | {"self": digest_of(data)}
        path.write_text(json.dumps(data), encoding="utf-8")
        found = value_or_lmkit_error(lambda: open_prepared(folder))
        if found is not None:
            for split in found.splits.values():
                assert split.tokens.max() < found.tokenizer.vocab_size
                assert len(split.tokens) == split.num_tokens

    check()


@fuzz
@given(raw=st.binary(max_size=300))
def test_row_101_fuzz_an_index_of_any_bytes(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "index.json").write_bytes(raw)
        assert value_or_lmkit_error(lambda: open_prepared(Path(folder))) is None


# Stored configurations


@fuzz
@given(data=anything, base=st.sampled_from([ModelConfig, DatasetConfig, TokenizerConfig, *ROOTS.values()]))
def test_row_82_fuzz_a_configuration_of_any_data(data: Any, base: type) -> None:
    value_or_lmkit_error(lambda: from_plain(base, data))


def test_row_82_fuzz_a_configuration_with_anything_at_any_place(trained: Path) -> None:
    (checkpoint, *_) = sorted((trained / "checkpoints").iterdir())
    stored = json.loads((checkpoint / "config.json").read_bytes())

    pretrain = {key: value for key, value in stored.items() if key not in ("command", "vocab_size")}
    assert from_plain(ROOTS["pretrain"], pretrain).seed == 1

    @fuzz
    @given(data=damaged(pretrain))
    def check(data: Any) -> None:
        found = value_or_lmkit_error(lambda: from_plain(ROOTS["pretrain"], data))
        if found is not None:
            again = from_plain(ROOTS["pretrain"], to_plain(found))
            assert json.dumps(to_plain(again)) == json.dumps(to_plain(found))  # as texts, since NaN is not itself

    check()


# Text


packings = st.sampled_from([("a.txt", bytes), ("a.txt.gz", gzip.compress), ("a.txt.zst", zstandard.compress)])
texts = st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))


@fuzz
@given(data=st.binary(max_size=80) | texts, packing=packings, block=st.integers(1, 40))
def test_row_95_fuzz_text_of_any_bytes(data: bytes, packing: tuple[str, Callable[[bytes], bytes]], block: int) -> None:
    name, pack = packing
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / name
        path.write_bytes(pack(data))
        patch.setattr(textfiles, "BLOCK_BYTES", block)
        patch.setattr(textfiles, "MAX_LINE_BYTES", 2 * block)
        found = value_or_lmkit_error(lambda: "".join(textfiles.text_blocks(textfiles.Part(path))))
        if found is not None:
            assert found == data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")


@fuzz
@given(data=st.binary(max_size=80), name=st.sampled_from(["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl"]))
def test_rows_95_99_100_fuzz_a_corpus_of_any_bytes(data: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        config = JsonlConfig(path=str(path)) if name.endswith("jsonl") else TextConfig(path=str(path))
        config = replace(config, valid_fraction=0.0, test_fraction=0.0)
        value_or_lmkit_error(lambda: Surveyor(open_corpus(config), lambda _: None).run(lambda _: None))


@fuzz
@given(record=anything | st.fixed_dictionaries({"text": anything}))
def test_row_100_fuzz_a_record_of_any_json(record: Any) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        path = folder / "a.jsonl"
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
        corpus = open_corpus(JsonlConfig(path=str(path), valid_fraction=0.0, test_fraction=0.0))
        found = value_or_lmkit_error(lambda: Surveyor(corpus, lambda _: None).run(lambda _: None))
        text = record.get("text") if isinstance(record, dict) else None
        assert found is not None or not isinstance(text, str) or not text.strip(), "there is a text"
    finally:
        shutil.rmtree(folder)

"""Corpora by their configuration: the embedded text, the benchmark sets, own text and the Hugging Face hub.

The only module that imports ``datasets``.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lmkit.config.data import (
    BenchmarkConfig,
    CleaningConfig,
    DatasetConfig,
    HubConfig,
    JsonlConfig,
    PydocsConfig,
    TextConfig,
)
from lmkit.data import textfiles
from lmkit.data.benchmarks import BENCHMARKS, Benchmark, Expected
from lmkit.data.cleaning import Piece, document_pieces, end_line, one_document
from lmkit.data.documents import SPLITS, Corpus, RecordCorpus, hash_fraction, held_out_shares
from lmkit.data.owntext import JsonlCorpus, TextCorpus
from lmkit.data.textfiles import Part
from lmkit.errors import ConfigError, DataError

_HUB_TIMEOUT_S = 10.0


def open_corpus(config: DatasetConfig) -> Corpus:
    """The corpus of a configuration. Raises DataError if its files are missing or the hub cannot be reached."""
    if isinstance(config, PydocsConfig):
        if config.path is not None:
            raise ConfigError(f"dataset.path={config.path} has no use with dataset=pydocs", "set dataset=text")
        return PydocsCorpus(config)
    if isinstance(config, BenchmarkConfig):
        return BenchmarkCorpus(config)
    if isinstance(config, TextConfig):
        return TextCorpus(config)
    if isinstance(config, JsonlConfig):
        return JsonlCorpus(config)
    if isinstance(config, HubConfig):
        return HubCorpus(config)
    raise TypeError(f"no corpus for {type(config).__name__}")


class PydocsCorpus(Corpus):
    """The reference topics of the running CPython, one document a topic, split by a hash of the topic's name.

    Many topics repeat parts of longer ones ("while" is a section of "compound"). Those that bring less than half new
    text are left out, so that nothing of valid and test is also in train.
    """

    name = "pydocs"
    _SALT = "325"  # chosen so that the shares by characters are close to 80, 10 and 10 %

    def __init__(self, config: PydocsConfig) -> None:
        super().__init__(config.cleaning)
        self.source = f"pydoc_data.topics of {platform.python_implementation()} {platform.python_version()}"

    def _read(self, splits: Collection[str]) -> Iterator[tuple[str, Piece]]:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise DataError(
                "this Python comes without pydoc_data, the text of dataset=pydocs", "use dataset=text dataset.path=DIR"
            ) from error
        for topic in _without_repeats(topics):
            share = hash_fraction(f"{self._SALT}:{topic}".encode())
            split = "test" if share < 0.1 else "valid" if share < 0.2 else "train"
            if split in splits:
                for piece in document_pieces(topics[topic]):
                    yield split, piece


def _without_repeats(topics: Mapping[str, str]) -> list[str]:
    """Names of the topics at least half of whose text is in no longer topic, sorted. Compared by paragraphs."""
    seen: set[str] = set()
    kept = []
    for topic in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = {" ".join(paragraph.split()) for paragraph in topics[topic].split("\n\n")}
        new = sum(map(len, paragraphs - seen))
        if 2 * new >= sum(map(len, paragraphs)):
            kept.append(topic)
        seen |= paragraphs
    return sorted(kept)


class BenchmarkCorpus(Corpus):
    """Penn Treebank or WikiText: from ``dataset.path``, from LMKIT_DATA or from the hub; one document a split."""

    def __init__(self, config: BenchmarkConfig) -> None:
        if config.cleaning != CleaningConfig():
            raise ConfigError(
                f"dataset.cleaning changes {config.name.value}, whose text is fixed", "use dataset=text to clean it"
            )
        super().__init__(None)
        self.name = config.name.value
        self.benchmark: Benchmark = BENCHMARKS[config.name]
        self.word_level = self.benchmark.word_level
        self._folder = self._find_folder(config.path)
        place = self._folder if self._folder else f"{self.benchmark.repo} on the Hugging Face hub"
        self.source = f"{self.benchmark.title} from {place}"

    def fingerprint(self) -> Mapping[str, Any] | None:
        if self._folder is None:
            return {"repo": self.benchmark.repo, "revision": self.benchmark.revision, "set": self.name}
        stamps = textfiles.stamp_files(map(self._file, SPLITS))
        return None if stamps is None else {"set": self.name, "files": stamps}

    def check(self, split: str, num_lines: int, num_words: int, num_bytes: int, text_digest: str) -> None:
        expected = self.benchmark.expected[split]
        found = Expected(num_lines, num_words - num_lines, num_bytes, text_digest)
        wrong = [
            f"{key.replace('num_', '')} {_show(getattr(expected, key))} expected, {_show(getattr(found, key))} found"
            for key in ("lines", "words", "num_bytes", "sha256")
            if getattr(expected, key) not in (None, getattr(found, key))
        ]
        if wrong:
            raise DataError(
                f"the {split} split of {self.name} ({self.source}) is not the known text: {'; '.join(wrong)}",
                f"point dataset.path to the original files ({self.benchmark.files.format(split=split)}), "
                "or read other text with dataset=text",
            )

    def _find_folder(self, path: str | None) -> Path | None:
        benchmark = self.benchmark
        if path is not None:
            folder = Path(os.path.expanduser(path)).absolute()
            candidates = [folder, folder / benchmark.folder]
        elif root := os.environ.get("LMKIT_DATA"):
            candidates = [Path(os.path.expanduser(root)).absolute() / benchmark.folder]
        else:
            return None
        for candidate in candidates:
            missing = [name for split in SPLITS if not os.path.isfile(candidate / (name := self._file_name(split)))]
            if not missing:
                return candidate
            if len(missing) < len(SPLITS):
                raise DataError(f"{candidate} lacks {', '.join(missing)}", "put the three original files there")
        if path is None and not os.path.isdir(candidates[0]):
            return None
        names = ", ".join(map(self._file_name, SPLITS))
        remedy = "set dataset.path to the folder of the original files"
        raise DataError(f"{candidates[0]} does not hold {names}", remedy)

    def _file_name(self, split: str) -> str:
        return self.benchmark.files.format(split=split)

    def _file(self, split: str) -> Path:
        assert self._folder is not None
        return self._folder / self._file_name(split)

    def _read(self, splits: Collection[str]) -> Iterator[tuple[str, Piece]]:
        for split in (split for split in SPLITS if split in splits):
            blocks = textfiles.text_blocks(Part(self._file(split))) if self._folder else self._hub_blocks(split)
            for piece in end_line(one_document(blocks)):
                yield split, Piece(self.benchmark.canonical(piece.text), piece.ends_document)

    def _hub_blocks(self, split: str) -> Iterator[str]:
        benchmark = self.benchmark
        hub_split = {"train": "train", "valid": "validation", "test": "test"}[split]
        remedy = (
            f"download its original files ({benchmark.files.format(split='*')}) and set dataset.path=DIR, "
            f"or LMKIT_DATA to the folder that holds {benchmark.folder}/"
        )
        table = load_hub_split(benchmark.repo, benchmark.config_name, benchmark.revision, hub_split, remedy)
        for rows in _column(table, benchmark.column, f"{benchmark.repo} {hub_split}"):
            yield benchmark.lines_of_rows(rows)


class HubCorpus(RecordCorpus):
    """Any dataset of the Hugging Face hub, one document a row."""

    name = "hub"

    def __init__(self, config: HubConfig) -> None:
        if config.path is not None:
            raise ConfigError(f"dataset.path={config.path} has no use with dataset=hub", "set dataset=text or jsonl")
        super().__init__(config.cleaning)
        self._config = config
        hub_splits = {"train": config.train_split, "valid": config.valid_split, "test": config.test_split}
        self._hub_splits = {split: name for split, name in hub_splits.items() if name is not None}
        self._own = tuple(self._hub_splits)
        self._held_out = held_out_shares(config.valid_fraction, config.test_fraction, self._own)
        self.splits = tuple(split for split in SPLITS if split in self._hub_splits or split in self._held_out)
        revision = f" at {config.revision}" if config.revision else ""
        self.source = f"{config.name}{revision} on the Hugging Face hub"
        self._tables: dict[str, Any] = {}

    def fingerprint(self) -> Mapping[str, Any] | None:
        files = [Path(file["filename"]) for split in self._own for file in self._table(split).cache_files]
        stamps = textfiles.stamp_files(files)
        if not stamps:
            return None
        return {
            "hub": self._config.name,
            "column": self._config.column,
            "splits": self._hub_splits,
            "held_out": self._held_out,
            "files": stamps,
        }

    def _table(self, split: str) -> Any:
        if split not in self._tables:
            config = self._config
            remedy = "check dataset.name and the network, or read files with dataset=text or dataset=jsonl"
            name = self._hub_splits[split]
            self._tables[split] = load_hub_split(config.name, config.config_name, config.revision, name, remedy)
        return self._tables[split]

    def _texts(self, split: str) -> Iterator[str]:
        for rows in _column(self._table(split), self._config.column, f"{self._config.name} {self._hub_splits[split]}"):
            yield from rows


def load_hub_split(repo: str, config_name: str | None, revision: str | None, split: str, remedy: str) -> Any:
    """A split of a hub dataset as a ``datasets.Dataset``; from the local cache if the hub cannot be reached.

    A dead network is noticed within seconds by one small request, since the library itself would try for long.
    """
    import datasets
    import huggingface_hub

    problem = None
    with contextlib.ExitStack() as stack:
        if not datasets.config.HF_HUB_OFFLINE:
            try:
                huggingface_hub.HfApi().dataset_info(repo, revision=revision, timeout=_HUB_TIMEOUT_S)
            except Exception as error:  # the library lets errors of several HTTP clients through
                problem = f"the hub cannot be reached or does not have it ({_first_line(error)})"
                stack.enter_context(_offline())
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        try:
            return datasets.load_dataset(repo, config_name, revision=revision, split=split)
        except Exception as error:
            problem = problem or _first_line(error)
            raise DataError(f"cannot load {repo} ({split}) through datasets: {problem}", remedy) from error


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let ``datasets`` look into its local cache only."""
    import datasets
    import huggingface_hub

    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = False


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _column(table: Any, column: str, where: str) -> Iterator[list[str]]:
    """The strings of one column of a ``datasets.Dataset``, a thousand rows at a time."""
    if column not in table.column_names:
        raise DataError(
            f"{where} has no column '{column}' but {', '.join(table.column_names)}", "set dataset.column=NAME"
        )
    number = 0
    for batch in table.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        rows = batch.column(column).to_pylist()
        for row in rows:
            if not isinstance(row, str):
                raise DataError(
                    f"{where}, row {number}: column '{column}' holds {type(row).__name__}, not text",
                    "set dataset.column=NAME to one that holds text in every row",
                )
            number += 1
        yield rows


def _show(value: int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else value

"""Preparation: read, clean and tokenize a corpus once, into a content-addressed cache.

The folder of a result is named by the SHA-256 of the text of all splits, the tokenizer, the cleaning options and the
format version, so data is never stale and is shared between runs. It appears by one rename when it is complete; what a
killed process leaves begins with ``.tmp-``, and the next one removes it. Peak memory does not depend on the size of the
corpus.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import filelock

from lmkit.config.data import DatasetConfig, HfTokenizerConfig, TokenizerConfig
from lmkit.config.plain import to_plain
from lmkit.console import Console, format_count
from lmkit.data.cleaning import VERSION as CLEANING_VERSION
from lmkit.data.corpus import open_corpus
from lmkit.data.documents import Corpus
from lmkit.data.survey import VERSION as TEXT_VERSION
from lmkit.data.survey import Survey, Surveyor, digest_of, recall, remember
from lmkit.data.tokenfiles import (
    FORMAT,
    INDEX,
    VERSION,
    PreparedData,
    Split,
    SplitWriter,
    open_prepared,
    read_index,
    write_index,
)
from lmkit.data.workers import count_words, encoded
from lmkit.errors import DataError, ResourceError
from lmkit.store import storage
from lmkit.store.cache import cache_dir
from lmkit.tokenizers import HfTokenizer, Tokenizer, train_tokenizer
from lmkit.tokenizers.probe import vouch

__all__ = ["PreparedData", "Split", "cache_dir", "open_prepared", "prepare", "text_digest_of"]

PREPARED, SURVEYS, SAME = "prepared", "surveys", "same"
"""Folders of the cache: the results, what one pass over a text found, and which result is the same as another."""
_QUIET_S = 1.0
"""No progress is shown before this time, since most preparations are over by then."""
_TRIED_LINES, _LINE_CHARS = 1000, 1000
"""How many lines of train, and how much of each, show whether a tokenizer made elsewhere gives the text back."""


def prepare(
    dataset: DatasetConfig,
    tokenizer: TokenizerConfig | Tokenizer,
    console: Console | None = None,
    *,
    force: bool = False,
) -> PreparedData:
    """Read, clean and tokenize a corpus, or find the result of an earlier preparation of the same text.

    A tokenizer configuration is trained on the split train; an existing tokenizer is used as it is. The text is read
    once if it is short, else twice (a tokenizer that is trained in several passes reads train again). Two processes
    that prepare the same data do it once: the second waits. Raises DataError (text, tokenizer), ResourceError (disk).
    """
    console = console or Console(io.StringIO())
    if isinstance(tokenizer, HfTokenizerConfig):
        tokenizer = train_tokenizer(tokenizer, lambda: iter(()))
    corpus = open_corpus(dataset)
    try:
        return _Preparation(corpus, dataset, tokenizer, console, force).run()
    except OSError as error:
        raise ResourceError(
            f"cannot write prepared data to {cache_dir()}: {error.strerror or error}",
            "free disk space, or set LMKIT_CACHE to another folder",
        ) from error


def text_digest_of(key: str, split: str) -> str | None:
    """SHA-256 of the text of a split of the prepared data with this key; None where the cache does not hold them."""
    with contextlib.suppress(DataError, OSError, KeyError, TypeError, ValueError):
        found = read_index(_place(cache_dir(), Path(key).name) / INDEX)
        return str(found["splits"][split]["text_digest"])
    return None


class _Preparation:
    def __init__(
        self,
        corpus: Corpus,
        dataset: DatasetConfig,
        tokenizer: TokenizerConfig | Tokenizer,
        console: Console,
        force: bool,
    ) -> None:
        self.corpus, self.console, self.force = corpus, console, force
        self.root = cache_dir()
        self.folder = self.root / PREPARED
        self.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else None
        self.config = None if isinstance(tokenizer, Tokenizer) else tokenizer
        self.identity = {
            "format": [FORMAT, VERSION, TEXT_VERSION],
            "tokenizer": tokenizer.digest if isinstance(tokenizer, Tokenizer) else to_plain(tokenizer),
            "cleaning": asdict(dataset.cleaning),
        }
        self.request = digest_of([self.identity, to_plain(dataset), os.getcwd()])[:32]
        """Names the work: who wants the same takes turns."""

    def run(self) -> PreparedData:
        data = self._run()
        for split, found in data.report["repeats"].items():
            if found["in_train"]:
                total = data.splits[split].num_documents
                self.console.warn(f"{found['in_train']:,} of {total:,} documents of {split} stand in train, too")
        if change := data.report.get("changes_text"):
            self.console.warn(
                f"the tokenizer does not give the text back: {change[0]!r} (blanks left out) comes back as"
                f" {change[1]!r}; numbers per word, byte and character are lower than for all of the text"
            )
        return data

    def _run(self) -> PreparedData:
        if found := self._find(self._recall(), warn=False):  # it may be replaced just now
            return found
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._lock())
            except OSError:  # what cannot be written may still hold the same text, of files with other dates
                nothing_there = self.force or not self.folder.is_dir()
                if nothing_there or (found := self._find(self._survey(), warn=False)) is None:
                    raise
                return found
            self._sweep()
            fingerprint = self._fingerprint()
            survey = None if self.force else recall(self.root / SURVEYS, fingerprint)
            if found := self._find(survey):
                return found
            if survey is None:
                survey = self._survey()
                if fingerprint == self._fingerprint():
                    remember(self.root / SURVEYS, fingerprint, survey, self._scratch(SURVEYS))
                if found := self._find(survey):
                    return found
            return self._build(survey)

    def _fingerprint(self) -> Mapping[str, Any] | None:
        fingerprint = self.corpus.fingerprint()
        if fingerprint is None:
            return None
        version = [TEXT_VERSION, CLEANING_VERSION]
        return {"version": version, "cleaning": self.identity["cleaning"], "corpus": dict(fingerprint)}

    def _recall(self) -> Survey | None:
        return recall(self.root / SURVEYS, self._fingerprint())

    def _key(self, survey: Survey, tokenizer: str | None = None) -> str:
        """Names the result. tokenizer: digest of the one to name it by; None: what was asked for."""
        texts = {split: [counts.text_digest, counts.documents_digest] for split, counts in survey.counts.items()}
        asked = self.identity["tokenizer"] if tokenizer is None else tokenizer
        return digest_of({**self.identity, "tokenizer": asked, "texts": texts})

    def _note(self, survey: Survey, tokenizer: Tokenizer, key: str) -> None:
        """Let what was prepared for a configuration be found by the tokenizer that was trained, which runs ask for."""
        (self.root / SAME).mkdir(exist_ok=True)
        note = self.root / SAME / self._key(survey, tokenizer.digest)
        storage.replace_file(note, key.encode(), self._scratch(SAME))

    def _scratch(self, folder: str) -> Path:
        """A name for what is not whole yet, in the folder that it will be in, any of which may be a link to another
        disk; ``_sweep`` finds it and can tell whose it is."""
        return self.root / folder / storage.scratch_name(storage.TMP_PREFIX, self.request)

    def _find(self, survey: Survey | None, *, warn: bool = True) -> PreparedData | None:
        if survey is None or self.force:
            return None
        key = self._key(survey)
        path = _place(self.root, key)
        if not path.is_dir():
            return None
        try:
            data = self._open(path, key, survey)
        except DataError as error:
            if warn:
                self.console.warn(f"{error.problem}; preparing it again")
            return None
        wanted = {split: counts.text_digest for split, counts in survey.counts.items()}
        other_text = {split: found.text_digest for split, found in data.splits.items()} != wanted
        if other_text or (self.config is None and data.tokenizer.digest != self.identity["tokenizer"]):
            return None  # a damaged note led elsewhere
        return data

    def _open(self, path: Path, key: str, survey: Survey) -> PreparedData:
        """Open a result and report of it what is asked for now: it may have been made of other files, which left the
        same text."""
        data = open_prepared(path)
        return replace(data, key=key, name=self.corpus.name, report=data.report | self._report(survey))

    def _report(self, survey: Survey) -> dict[str, Any]:
        return {"source": self.corpus.source, "cleaning": survey.cleaning, "repeats": survey.repeats}

    def _survey(self) -> Survey:
        start_s = time.monotonic()
        with self.console.progress(None, f"reading {self.corpus.name}") as bar:

            def progress(num_bytes: int) -> None:
                if time.monotonic() - start_s > _QUIET_S:
                    bar.update(num_bytes, text=f"{num_bytes / 1e6:.0f} MB")

            def train(lines: Callable[[], Iterator[str]]) -> None:
                if self.config is not None:
                    self.tokenizer = train_tokenizer(self.config, lines, count_words)

            return Surveyor(self.corpus, progress).run(train)

    def _train_text(self, survey: Survey) -> Iterator[str]:
        if survey.pieces is None:
            return (piece.text for piece in self.corpus.pieces("train"))
        return (piece.text for split, piece in survey.pieces if split == "train")

    def _build(self, survey: Survey) -> PreparedData:
        if self.tokenizer is None:
            assert self.config is not None
            self.tokenizer = train_tokenizer(self.config, lambda: self._train_text(survey), count_words)
        if self.config is not None:
            vouch(self.tokenizer)  # it was trained here, just now
        key = self._key(survey)
        temporary = self._scratch(PREPARED)
        temporary.mkdir()
        try:
            splits = self._encode(survey, self.tokenizer, temporary)
            report = self._report(survey)
            if isinstance(self.tokenizer, HfTokenizer):
                lines = (line[:_LINE_CHARS] for text in self._train_text(survey) for line in text.split("\n"))
                report["changes_text"] = self.tokenizer.first_change(islice(lines, _TRIED_LINES))
            write_index(temporary, key, self.corpus.name, self.tokenizer, splits, report)
            self._publish(temporary, self.folder / key)
            if self.config is not None:
                self._note(survey, self.tokenizer, key)
        finally:
            if temporary.exists():
                storage.remove_tree(temporary)
        return self._open(self.folder / key, key, survey)

    def _encode(self, survey: Survey, tokenizer: Tokenizer, folder: Path) -> dict[str, dict[str, Any]]:
        """Write the token files; returns what the index says of each split."""
        done, start_s = 0, time.monotonic()
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(self.console.progress(survey.total_bytes, f"tokenizing {self.corpus.name}"))
            writers = {split: stack.enter_context(SplitWriter(folder, split, tokenizer)) for split in survey.counts}
            for split, piece, ids in encoded(tokenizer, self.corpus.read() if survey.pieces is None else survey.pieces):
                done += writers[split].add(piece, ids)
                if time.monotonic() - start_s > _QUIET_S:
                    bar.update(done, tokens=format_count(sum(writer.num_tokens for writer in writers.values())))
        entries = {}
        for split, counts in survey.counts.items():
            found = writers[split].counter.finish()
            if found != counts:
                raise DataError(f"the text of {self.corpus.source} changed while it was read", "run again")
            if writers[split].num_tokens == 0:
                raise DataError(f"the tokenizer makes no tokens of the {split} split", "choose another tokenizer")
            entries[split] = vars(counts) | writers[split].entry()
        return entries

    def _publish(self, temporary: Path, target: Path) -> None:
        """One rename makes the folder visible. What another process has made meanwhile stays: it may be reading it."""
        for path in sorted(temporary.rglob("*")):
            if path.is_dir():
                storage.sync_directory(path)
        storage.sync_directory(temporary)
        if target.exists() and (self.force or not _is_whole(target)):
            with contextlib.suppress(FileNotFoundError):  # another process may sweep it at the same time
                storage.discard(target)
        try:
            storage.rename(temporary, target)
        except OSError:
            if not target.is_dir():
                raise
        storage.sync_directory(target.parent)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        locks = self.root / "locks"
        for folder in (locks, self.folder):
            folder.mkdir(parents=True, exist_ok=True)
        lock = _file_lock(locks, self.request)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            self.console.say("waiting for another process that prepares the same data")
            lock.acquire()
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and not storage.has_no_locks(error):
                raise
            raise ResourceError(
                f"{locks} is on a file system without locks", "set LMKIT_CACHE to a local disk"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _sweep(self) -> None:
        """Remove what killed preparations left: ours, and those of others whose lock is free."""
        for path in sorted(p for folder in (PREPARED, SURVEYS, SAME) for p in (self.root / folder).glob(".*")):
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # another process may be at it as well
                if path.name.startswith(storage.TMP_PREFIX):
                    request = path.name.removeprefix(storage.TMP_PREFIX).split("-")[0]
                    if request != self.request:
                        stack.enter_context(_file_lock(self.root / "locks", request).acquire(blocking=False))
                    storage.remove_tree(path)
                elif path.name.startswith(storage.TRASH_PREFIX):
                    storage.remove_tree(path)


def _place(root: Path, key: str) -> Path:
    """The folder of a result, or that of the same one under another key (see ``_note``)."""
    folder = root / PREPARED
    with contextlib.suppress(OSError, ValueError):
        if not (folder / key).is_dir():
            return folder / Path((root / SAME / key).read_text(encoding="ascii")).name
    return folder / key


def _is_whole(path: Path) -> bool:
    """Whether a folder holds the data that its name is the key of, undamaged."""
    with contextlib.suppress(DataError):
        return open_prepared(path).key == path.name
    return False


def _file_lock(folder: Path, request: str) -> filelock.BaseFileLock:
    """A kernel lock, which the system frees when its holder ends in whatever way."""
    return filelock.FileLock(folder / f"{request}.lock", fallback_to_soft=False)

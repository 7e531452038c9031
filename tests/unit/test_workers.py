"""Encoding and counting on several cores gives what one core gives, and ends cleanly whatever happens."""

from __future__ import annotations

import contextlib
import gc
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lmkit.config.data import (
    ByteTokenizerConfig,
    SentencePieceTokenizerConfig,
    TextConfig,
    TokenizerConfig,
    WordTokenizerConfig,
)
from lmkit.data import workers
from lmkit.data.cleaning import Piece
from lmkit.data.prepared import prepare
from lmkit.errors import DataError, ResourceError
from lmkit.tokenizers import Tokenizer, train_tokenizer

TEXTS = [f"{'the cat sat on the mat ' * (i % 7)}word{i % 50}\n我喜欢学习 <eos>\u2581\n" for i in range(400)] + [
    "",
    "\n",
]


@pytest.fixture(autouse=True)
def two_children_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small messages, nothing dealt with in this process."""
    monkeypatch.setattr(workers, "HERE_CHARS", 0)
    monkeypatch.setattr(workers, "_GROUP_CHARS", 1000)
    monkeypatch.setattr(workers, "usable_cores", lambda: 2)


def trained(config: TokenizerConfig | None = None) -> Tokenizer:
    return train_tokenizer(config or WordTokenizerConfig(), lambda: iter(TEXTS))


def items() -> list[tuple[str, Piece]]:
    return [("train" if i % 3 else "valid", Piece(text, i % 2 == 0)) for i, text in enumerate(TEXTS)]


def children() -> list[psutil.Process]:
    """Processes of this module, of which others may run that some other test has started."""
    mine = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE and workers.__name__ in " ".join(process.cmdline()):
                mine.append(process)
    return mine


@pytest.mark.parametrize("config", [WordTokenizerConfig(), SentencePieceTokenizerConfig(vocab_size=300)])
def test_pieces_come_back_in_order_with_the_ids_of_one_core(config: TokenizerConfig) -> None:
    tokenizer = trained(config)
    found = list(workers.encoded(tokenizer, items()))
    assert [(split, piece) for split, piece, _ in found] == items()
    assert [ids.tolist() for *_, ids in found] == [tokenizer.encode(text).tolist() for text in TEXTS]


def test_words_are_counted_as_on_one_core_whatever_the_text_holds() -> None:
    texts = [*TEXTS, "a\ud800 b\u00a0c\x1fd\x85e\u2028f"]
    assert workers.count_words(iter(texts)) == Counter(word for text in texts for word in text.split())


def test_the_beginning_is_dealt_with_here_and_a_child_is_started_only_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = trained()
    monkeypatch.setattr(workers, "HERE_CHARS", sum(map(len, TEXTS[:100])))
    found = [ids.tolist() for *_, ids in workers.encoded(tokenizer, items())]
    assert found == [tokenizer.encode(text).tolist() for text in TEXTS]
    monkeypatch.setattr(workers, "_Children", None)
    assert len(list(workers.encoded(tokenizer, items()[:100]))) == 100
    assert workers.count_words(TEXTS[:100])["the"] > 0
    assert len(list(workers.encoded(trained(ByteTokenizerConfig()), items()))) == len(TEXTS)
    monkeypatch.setattr(workers, "usable_cores", lambda: 1)
    assert len(list(workers.encoded(tokenizer, items()))) == len(TEXTS)


def test_prepared_data_does_not_depend_on_who_encoded_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("".join(TEXTS * 3), encoding="utf-8", newline="\n")
    indices = []
    for cores in (1, 2):
        monkeypatch.setenv("LMKIT_CACHE", str(tmp_path / f"cache{cores}"))
        monkeypatch.setattr(workers, "usable_cores", lambda cores=cores: cores)
        indices.append(prepare(TextConfig(path=str(tmp_path / "a.txt")), WordTokenizerConfig()).path / "index.json")
    assert indices[0].parent.name == indices[1].parent.name
    assert indices[0].read_bytes() == indices[1].read_bytes()


def test_what_the_tokenizer_refuses_is_the_same_error() -> None:
    tokenizer = trained(SentencePieceTokenizerConfig(vocab_size=300))
    with pytest.raises(DataError, match="lone surrogate"):
        list(workers.encoded(tokenizer, [*items(), ("train", Piece("a\ud800", True))]))
    assert children() == []


def test_a_child_that_dies_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = workers._running

    def doomed(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
        with real([command[0], "-c", "import os; os.read(0, 1); os._exit(9)"]) as process:
            yield process

    monkeypatch.setattr(workers, "_running", contextlib.contextmanager(doomed))
    with pytest.raises(ResourceError, match=r"died \(exit code 9\)"):
        list(workers.encoded(trained(), items()))
    with pytest.raises(ResourceError, match=r"died \(exit code 9\)"):
        workers.count_words(TEXTS)
    assert children() == []


def test_signals_that_reach_the_children_do_not_end_them() -> None:
    """Only the process that asks decides what they mean: it may want to save and to go on."""
    tokenizer = trained()
    stream = workers.encoded(tokenizer, items())
    found = [next(stream)[2].tolist()]
    for process in children():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            process.send_signal(number)
    found += [ids.tolist() for *_, ids in stream]
    assert found == [tokenizer.encode(text).tolist() for text in TEXTS]


def test_an_error_that_nobody_thought_of_is_told_too() -> None:
    class Strange(type(trained())):  # type: ignore[misc]
        def content(self) -> bytes:
            return b"\xff"

    with pytest.raises(DataError, match="cannot be encoded: 'utf-8' codec"):
        list(workers.encoded(Strange(["a"]), items()))
    assert children() == []


def test_no_process_is_left_by_who_stops_half_way() -> None:
    stream = workers.encoded(trained(), items())
    next(stream)
    assert len(children()) == 2
    del stream
    gc.collect()
    assert children() == []


def test_an_interrupted_count_leaves_no_process() -> None:
    def texts() -> Iterator[str]:
        yield from TEXTS
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workers.count_words(texts())
    assert children() == []

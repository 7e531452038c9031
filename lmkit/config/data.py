"""Configuration of corpora and tokenizers. Values only: nothing here imports torch or touches a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from lmkit.config.check import Problems


class BenchmarkName(Enum):
    """The standard corpora whose text, counts and checksums are known."""

    ptb = "ptb"
    wikitext2 = "wikitext2"
    wikitext103 = "wikitext103"
    wikitext2_raw = "wikitext2_raw"
    wikitext103_raw = "wikitext103_raw"


@dataclass(kw_only=True)
class CleaningConfig:
    """What is done to the documents of a corpus before they are tokenized. All off for the benchmark sets."""

    normalize_nfc: bool = False
    """Normalise the text to Unicode NFC."""
    strip_control: bool = False
    """Remove control characters (category Cc) but tab and newline; what keeps two words apart becomes a blank."""
    drop_duplicates: bool = False
    """Drop documents that are exact copies of an earlier document of the same split."""
    min_chars: int = 0
    """Drop documents shorter than this many characters (>= 0), the end of the last line not counted."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.at_least(0, "dataset.cleaning", self, "min_chars")


@dataclass(kw_only=True)
class DatasetConfig:
    """Base of the ``dataset`` group."""

    path: str | None = None
    """Folder or file to read the corpus from instead of the hub; null: the embedded text, LMKIT_DATA or the hub."""
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    """Cleaning steps."""


@dataclass(kw_only=True)
class PydocsConfig(DatasetConfig):
    """The reference texts that ship inside CPython (``pydoc_data.topics``), split by topic. Needs no download."""


@dataclass(kw_only=True)
class BenchmarkConfig(DatasetConfig):
    """Penn Treebank and WikiText, checked against their known counts and checksums."""

    name: BenchmarkName = BenchmarkName.ptb
    """Which benchmark set."""


@dataclass(kw_only=True)
class TextConfig(DatasetConfig):
    """Own text: a file or a folder of .txt, .txt.gz or .txt.zst files, one document a file."""

    valid_fraction: float = 0.05
    """Share of the documents (of fewer than 20: of the text of each, by lines) that goes to valid (0 to 0.5)."""
    test_fraction: float = 0.05
    """The same for test (0 to 0.5)."""

    def __post_init__(self) -> None:
        _check_fractions(self.valid_fraction, self.test_fraction)


@dataclass(kw_only=True)
class JsonlConfig(DatasetConfig):
    """Own text in JSON lines (.jsonl, .jsonl.gz, .jsonl.zst): one document a line, in one field."""

    text_field: str = "text"
    """Name of the field that holds the text."""
    valid_fraction: float = 0.05
    """Share of the documents that go to valid (0 to 0.5)."""
    test_fraction: float = 0.05
    """Share of the documents that go to test (0 to 0.5)."""

    def __post_init__(self) -> None:
        _check_fractions(self.valid_fraction, self.test_fraction)


@dataclass(kw_only=True)
class HubConfig(DatasetConfig):
    """Any dataset of the Hugging Face hub: one document a row."""

    name: str = "???"
    """Name on the hub, e.g. ``roneneldan/TinyStories``."""
    config_name: str | None = None
    """Configuration (subset) of the dataset; null: the default one."""
    revision: str | None = None
    """Git revision to pin; null: the newest, whose content digest is then recorded."""
    column: str = "text"
    """Column that holds the text."""
    train_split: str = "train"
    """Split to train on."""
    valid_split: str | None = None
    """Split to validate on; null: ``valid_fraction`` of the training documents."""
    test_split: str | None = None
    """Split to test on; null: ``test_fraction`` of the training documents."""
    valid_fraction: float = 0.05
    """Share of the training documents held out where there is no valid split (0 to 0.5)."""
    test_fraction: float = 0.05
    """Share of the training documents held out where there is no test split (0 to 0.5)."""

    def __post_init__(self) -> None:
        _check_fractions(self.valid_fraction, self.test_fraction)


def _check_fractions(valid: float, test: float) -> None:
    with Problems() as check:
        check(0.0 <= valid <= 0.5, "dataset.valid_fraction", valid, "must be between 0 and 0.5")
        check(0.0 <= test <= 0.5, "dataset.test_fraction", test, "must be between 0 and 0.5")


@dataclass(kw_only=True)
class TokenizerConfig:
    """Base of the ``tokenizer`` group."""


@dataclass(kw_only=True)
class WordTokenizerConfig(TokenizerConfig):
    """Words split at white space, ``<unk>`` for unknown ones, ``<eos>`` at each line end. Vocabulary from train."""

    vocab_size: int | None = None
    """Keep this many types, <unk> and <eos> included, the most frequent first; null: all."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.at_least(3, "tokenizer", self, "vocab_size", or_null=True)


@dataclass(kw_only=True)
class CharTokenizerConfig(TokenizerConfig):
    """Unicode characters of train; unknown ones become ``<unk>``."""


@dataclass(kw_only=True)
class ByteTokenizerConfig(TokenizerConfig):
    """The 256 UTF-8 bytes and one end-of-document token. Nothing is ever unknown."""


class SentencePieceKind(Enum):
    """Algorithms of sentencepiece that lmkit trains."""

    unigram = "unigram"
    bpe = "bpe"


@dataclass(kw_only=True)
class SentencePieceTokenizerConfig(TokenizerConfig):
    """A sentencepiece model trained in place on train, with byte fallback, so that every text round-trips."""

    vocab_size: int = 4096
    """Number of pieces, control and byte pieces included (>= 300); fewer if the text does not support so many."""
    algorithm: SentencePieceKind = SentencePieceKind.unigram
    """Algorithm: unigram or bpe."""
    max_sentences: int = 500_000
    """Train on at most this many lines, evenly drawn, to bound memory (>= 1)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check(self.vocab_size >= 300, "tokenizer.vocab_size", self.vocab_size, "must be >= 300 (256 are bytes)")
            check.at_least(1, "tokenizer", self, "max_sentences")


@dataclass(kw_only=True)
class HfTokenizerConfig(TokenizerConfig):
    """A ``tokenizer.json`` of the Hugging Face tokenizers library."""

    path: str = "???"
    """Path of the tokenizer.json file, or of the folder that holds it."""

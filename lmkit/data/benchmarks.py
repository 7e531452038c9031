"""The standard corpora: where they come from, what their files are called, and what their text must be.

Canonical form of a word-level set: the words of each line (split at white space) joined by one blank, then "\\n".
It is the same whichever mirror the text came from. The raw sets are kept as they are. Sources: Mikolov et al. 2010
(Penn Treebank, 10,000 types), Merity et al. 2016 (WikiText). The checksums of the canonical forms were computed from
the original files; those of WikiText-2-raw are the widely published ones of its files; of WikiText-103 only counts are
known, and the hub's commit.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmkit.config.data import BenchmarkName

_SPACES = tuple(chr(code) for code in range(0x3001) if chr(code).isspace() and chr(code) not in " \n")
_ASCII_SPACES = tuple(space for space in _SPACES if space.isascii())


@dataclass(frozen=True)
class Expected:
    """What one split must be; None: not known."""

    lines: int
    words: int | None = None
    """Words without the <eos> of each line."""
    num_bytes: int | None = None
    sha256: str | None = None
    """Of the canonical form (word-level sets) or of the file (raw sets)."""


@dataclass(frozen=True)
class Benchmark:
    """One standard corpus."""

    title: str
    folder: str
    """Name of its folder in LMKIT_DATA and in the original archive."""
    files: str
    """Original file names, with {split}."""
    repo: str
    """Dataset on the hub."""
    config_name: str | None
    revision: str
    """Commit of the hub dataset, or a branch name where the text is pinned by its checksum alone."""
    column: str
    word_level: bool
    expected: dict[str, Expected]

    def canonical(self, text: str) -> str:
        """Whole lines of a file in the form that is checked and tokenized."""
        return canonical_lines(text) if self.word_level else text

    def lines_of_rows(self, rows: list[str]) -> str:
        """Rows of the hub's table as lines of the original file: its blank lines " \\n" are empty rows there."""
        return "".join([row if row.endswith("\n") else row + "\n" if row else " \n" for row in rows])


def canonical_lines(text: str) -> str:
    """Whole lines with their words joined by single blanks; white space other than "\\n" separates words."""
    text = with_plain_spaces(text)
    while "  " in text:
        text = text.replace("  ", " ")
    text = text.replace(" \n", "\n").replace("\n ", "\n")
    return text[1:] if text.startswith(" ") else text


def with_plain_spaces(text: str) -> str:
    """The text with a blank for every character of white space but "\\n"."""
    for space in _ASCII_SPACES if text.isascii() else _SPACES:
        if space in text:
            text = text.replace(space, " ")
    return text


_WIKITEXT_REPO = "Salesforce/wikitext"
_WIKITEXT_COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"

BENCHMARKS = {
    BenchmarkName.ptb: Benchmark(
        title="Penn Treebank",
        folder="ptb",
        files="ptb.{split}.txt",
        repo="ptb-text-only/ptb_text_only",
        config_name=None,  # the only one of the branch, whatever it is called there
        revision="refs/convert/parquet",
        column="sentence",
        word_level=True,
        expected={
            "train": Expected(
                42_068, 887_521, None, "5145926136ee9aef6f359b267ac09cc8a920879cd71725de17c490dd111d2998"
            ),
            "valid": Expected(3_370, 70_390, None, "fadf6277290823f881b7bf39b84e88536c87a859cd629dcfd1d2dfdef06097cf"),
            "test": Expected(3_761, 78_669, None, "c2f8c16a611595d31da5acdb7a61d50e7d5e95f6b9c05fceda5f5ddc4383e791"),
        },
    ),
    BenchmarkName.wikitext2: Benchmark(
        title="WikiText-2",
        folder="wikitext-2",
        files="wiki.{split}.tokens",
        repo=_WIKITEXT_REPO,
        config_name="wikitext-2-v1",
        revision=_WIKITEXT_COMMIT,
        column="text",
        word_level=True,
        expected={
            "train": Expected(
                36_718, 2_051_910, None, "f7ee69acf5cc3fd2321929d3e32dd6defd8199abe0cb95063b2b9f092584f96f"
            ),
            "valid": Expected(3_760, 213_886, None, "4427e8fc24d5ceaaff4f1d9ee42f4e82172572b107d6a4e1f32d84fa7913c3ff"),
            "test": Expected(4_358, 241_211, None, "f68796e87c3250872a5a82da5027c4f75494ca617fbad67e36acce8a057ff3e8"),
        },
    ),
    BenchmarkName.wikitext103: Benchmark(
        title="WikiText-103",
        folder="wikitext-103",
        files="wiki.{split}.tokens",
        repo=_WIKITEXT_REPO,
        config_name="wikitext-103-v1",
        revision=_WIKITEXT_COMMIT,
        column="text",
        word_level=True,
        expected={
            "train": Expected(1_801_350, 103_227_021 - 1_801_350),
            "valid": Expected(3_760, 213_886),
            "test": Expected(4_358, 241_211),
        },
    ),
    BenchmarkName.wikitext2_raw: Benchmark(
        title="WikiText-2 raw",
        folder="wikitext-2-raw",
        files="wiki.{split}.raw",
        repo=_WIKITEXT_REPO,
        config_name="wikitext-2-raw-v1",
        revision=_WIKITEXT_COMMIT,
        column="text",
        word_level=False,
        expected={
            "train": Expected(
                36_718, None, 10_940_747, "6707892fa3788b5ab9ed78ab5ff37d9fe825f6011a2ad4fcd6a6d467f0e7da57"
            ),
            "valid": Expected(
                3_760, None, 1_146_846, "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7"
            ),
            "test": Expected(
                4_358, None, 1_290_590, "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
            ),
        },
    ),
    BenchmarkName.wikitext103_raw: Benchmark(
        title="WikiText-103 raw",
        folder="wikitext-103-raw",
        files="wiki.{split}.raw",
        repo=_WIKITEXT_REPO,
        config_name="wikitext-103-raw-v1",
        revision=_WIKITEXT_COMMIT,
        column="text",
        word_level=False,
        expected={"train": Expected(1_801_350), "valid": Expected(3_760), "test": Expected(4_358)},
    ),
}

"""Texts whose words were separated from their punctuation, made readable again for models of ordinary text.

``wikitext_pages``, ``wikitext_detokenize`` and ``count_words_lm_eval`` do what the task ``wikitext`` (version 2) of
EleutherAI/lm-evaluation-harness does, its oddities included: lm_eval/tasks/wikitext/preprocess_wikitext.py and, for the
pages, lm_eval/datasets/wikitext/wikitext.py, the script that loaded them before the dataset
EleutherAI/wikitext_document_level took its place. They lose information: the original text cannot be had back.

``gpt2_detokenize`` stands in for the invertible de-tokenizers of Radford et al. 2019, section 3.1, and openai/gpt-2
issue 78, which were never published: known are their purpose (undo separated punctuation and contractions, as far as
possible), that they can be inverted, and that perplexities were then taken per token of the original text. Every rule
below is ours, but for the number 1 in place of PTB's N, "$1" and "#1", which are those of NVIDIA/Megatron-LM,
tasks/zeroshot_gpt/detokenizer.py. <unk> stays as it is. That ours can be inverted is not claimed but made so: where
the rules would lose a word's boundaries, the words are left apart. So perplexities under it are near the published
ones at best, and not those.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lmkit.errors import ConfigError

GptText = Literal["wikitext", "ptb"]


def wikitext_pages(text: str) -> list[str]:
    """The articles of a WikiText split, each from its heading " = Title = " on, lines as they are.

    What stands before the first heading is a page too unless it is blank; the last page is one even if it is blank.
    """
    pages: list[str] = []
    lines: list[str] = []
    for line in text.split("\n"):
        if _is_title(line):
            page = "\n".join(lines)
            if page.strip():
                pages.append(page)
            lines = []
        lines.append(line)
    return [*pages, "\n".join(lines)]


def _is_title(line: str) -> bool:
    """Whether a line is a heading of the first level: one equals sign on each side."""
    heading = line.replace("= = =", "===").replace("= =", "==").strip()
    return heading.startswith("= ") and heading.endswith(" =")


_LM_EVAL_RULES: tuple[tuple[str | re.Pattern[str], str], ...] = (
    ("s '", "s'"),
    (re.compile(r"/' [0-9]/"), "/'[0-9]/"),  # the slashes were meant as delimiters: it never meets a year like ' 90s
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    (re.compile(r"\(\s*([^)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r'"\s*([^"]*?)\s*"'), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)
"""Plain strings are replaced as they stand, patterns as regular expressions, one rule after the other."""


def wikitext_detokenize(page: str) -> str:
    """lm-evaluation-harness's ``wikitext_detokenizer``: its rules in its order, the one that never fires included."""
    for found, replacement in _LM_EVAL_RULES:
        page = page.replace(found, replacement) if isinstance(found, str) else found.sub(replacement, page)
    return page


def count_words_lm_eval(page: str) -> int:
    """What lm-evaluation-harness divides by, of the page before de-tokenization.

    Ends of line are not counted, but a page that begins or ends with white space has an empty word there.
    """
    return len(re.split(r"\s+", page))


@dataclass(frozen=True)
class _Rules:
    """How the words of a line are printed, and how a printed chunk is cut into words again."""

    joined: Callable[[list[str]], list[bool]]
    """Of each word of a line, whether it is printed without a blank before it."""
    printed: Callable[[str], str]
    """A word as it is printed."""
    split: Callable[[str], list[str]]
    """The words of a chunk: printed words without blanks between them."""


def gpt2_detokenize(text: str, dataset: GptText) -> str:
    """De-tokenize word-level text, line by line; ``gpt2_tokenize`` has every word of every line back.

    Words that belong together are printed as one chunk if the chunk can be cut into the same words again, else one by
    one. A word that would itself be cut into several (an abbreviation that no rule knows) is printed behind two blanks
    instead of one, which says that it is whole: 2 of the 241,211 words of WikiText-2's test split, none of PTB. Blanks
    around and between the words of a line carry nothing and are not kept. Raises ConfigError for a dataset that has no
    rules.
    """
    rules = _rules_of(dataset)
    return "\n".join(_print_line([word for word in line.split(" ") if word], rules) for line in text.split("\n"))


def gpt2_tokenize(text: str, dataset: GptText) -> str:
    """The inverse of ``gpt2_detokenize``: the words of each line, joined by one blank."""
    rules = _rules_of(dataset)
    return "\n".join(" ".join(_read_line(line, rules)) for line in text.split("\n"))


def _rules_of(dataset: str) -> _Rules:
    if dataset not in _RULES:
        raise ConfigError(f"there is no de-tokenizer for {dataset!r}", f"choose one of {', '.join(_RULES)}")
    return _RULES[dataset]


def _print_line(words: list[str], rules: _Rules) -> str:
    chunks: list[str] = []
    groups: list[list[str]] = []
    for word, is_joined in zip(words, rules.joined(words), strict=True):
        if is_joined and groups:
            groups[-1].append(word)
        else:
            groups.append([word])
    for group in groups:
        chunk = "".join(map(rules.printed, group))
        if rules.split(chunk) == group:
            chunks.append(chunk)
        else:
            chunks += [_print_word(word, rules) for word in group]
    return " ".join(chunks)


def _print_word(word: str, rules: _Rules) -> str:
    for printed in (rules.printed(word), word):
        if rules.split(printed) == [word]:
            return printed
    return " " + word


def _read_line(line: str, rules: _Rules) -> list[str]:
    words: list[str] = []
    is_whole = False
    for chunk in line.split(" "):
        if chunk:
            words += [chunk] if is_whole else rules.split(chunk)
        is_whole = not chunk
    return words


_ABBREVIATIONS = (
    "Bros Capt Co Col Corp Cpl Dr Fr Ft Gen Gov Inc Jr Lt Ltd Mr Mrs Ms Mt No Nos Op Prof Rev Sgt Sr St ca cf ed etc "
    "pp var vols vs"
)
_HAS_OWN_PERIOD = re.compile(rf"(?:[^\W\d_]\.)+|\.+|(?:{_ABBREVIATIONS.replace(' ', '|')})\.")
"""Words that end with a period: initials, U.S. and the like, ellipses and common abbreviations."""
# A word may be <unk>, hence > and <.
_INFIX = re.compile(r"((?<=[\w>])-(?=[\w<])|(?<=[\d>])[.,](?=[\d<]))")
_ALONE = re.compile(r"""[,;:!?()\[\]{}"%$£€]""")
_APOSTROPHE = re.compile(r"(?<=[\w>])'(?=\w)|(?<=s)'(?!\w)")
_BEHIND = re.compile(r"[,.;:!?)\]}%]|'\w.*")
"""Words printed right behind the one before: punctuation, 's, 't, 'Brien."""
_BEFORE = frozenset("([{$£€")
_INFIXES = {"@-@": "-", "@,@": ",", "@.@": "."}


def _wikitext_joined(words: list[str]) -> list[bool]:
    """As above; quotation marks open and close in turn, ' belongs to a plural, = makes headings."""
    joined, num_quotes, joins_next = [], 0, True
    for before, word in zip(["", *words], words, strict=False):
        is_closing = word == '"' and num_quotes % 2 == 1
        is_plural = word == "'" and before.endswith("s")
        is_heading = before == word == "="
        joined.append(
            joins_next or word in _INFIXES or is_closing or is_plural or is_heading or bool(_BEHIND.fullmatch(word))
        )
        num_quotes += word == '"'
        joins_next = word in _BEFORE or word in _INFIXES or (word == '"' and not is_closing)
    return joined


def _wikitext_printed(word: str) -> str:
    return _INFIXES.get(word, word)


def _wikitext_split(chunk: str) -> list[str]:
    if chunk in _INFIXES:
        return [chunk]
    words = []
    for i, part in enumerate(_INFIX.split(chunk)):
        if i % 2:
            words.append(f"@{part}@")
            continue
        spaced = _APOSTROPHE.sub(" '", _ALONE.sub(r" \g<0> ", part)).replace("==", "= =").replace("==", "= =")
        for word in spaced.split():
            ends_sentence = len(word) > 1 and word.endswith(".") and not _HAS_OWN_PERIOD.fullmatch(word)
            words += [word[:-1], "."] if ends_sentence else [word]
    return words


_CONTRACTION = re.compile(r"n't|'(?:s|re|ve|m|ll|d)")
_CONTRACTED = re.compile(r"(.+?)(n't|'(?:s|re|ve|m|ll|d)|(?<=s)')")
_AMOUNT = re.compile(r"(.*[$#])?1")


def _ptb_joined(words: list[str]) -> list[bool]:
    """Contractions, the ' of a plural, and amounts of money: $ and # (pounds) before a number."""
    return [
        bool(_CONTRACTION.fullmatch(word))
        or (word == "'" and before.endswith("s"))
        or (word == "N" and before.endswith(("$", "#")))
        for before, word in zip(["", *words], words, strict=False)
    ]


def _ptb_printed(word: str) -> str:
    return "1" if word == "N" else word.replace("\\/", "/")


def _ptb_split(chunk: str) -> list[str]:
    if contracted := _CONTRACTED.fullmatch(chunk):
        return [*_ptb_split(contracted[1]), contracted[2]]
    if amount := _AMOUNT.fullmatch(chunk):
        return [amount[1], "N"] if amount[1] else ["N"]
    return [chunk.replace("/", "\\/")]


_RULES = {
    "wikitext": _Rules(_wikitext_joined, _wikitext_printed, _wikitext_split),
    "ptb": _Rules(_ptb_joined, _ptb_printed, _ptb_split),
}

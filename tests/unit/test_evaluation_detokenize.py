"""De-tokenizers, against texts worked out by hand, and the laws that they keep."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkit.errors import ConfigError
from lmkit.evaluation.detokenize import (
    GptText,
    count_words_lm_eval,
    gpt2_detokenize,
    gpt2_tokenize,
    wikitext_detokenize,
    wikitext_pages,
)

PIECES = ["'", "s", "'s", "n't", "N", "$", "c$", "@-@", "@,@", "@.@", "=", '"', "(", ")", "[", "]", ".", ",", ";", "%"]
PIECES += ["a", "word", "<unk>", "U.S.", "St.", "al.", "1", "1,0", "a-b", "x's", "\\/", "a/b", "°", "\xa0", "é", "'80s"]


def texts(gaps: list[str], pieces: list[str] = PIECES) -> st.SearchStrategy[str]:
    """Pieces with gaps before, between and behind them."""
    pair = st.tuples(st.sampled_from(pieces), st.sampled_from(gaps)).map("".join)
    return st.tuples(st.sampled_from(gaps), st.lists(pair, max_size=12).map("".join)).map("".join)


def words_of_lines(text: str) -> str:
    return "\n".join(" ".join(word for word in line.split(" ") if word) for line in text.split("\n"))


# Pages


def test_an_article_reaches_from_its_title_to_the_next_and_keeps_its_lines() -> None:
    text = " \n = One = \n \n Text . \n \n = = Part = = \n = = = Deep = = = \n = Two = \n End . \n"
    assert wikitext_pages(text) == [
        " = One = \n \n Text . \n \n = = Part = = \n = = = Deep = = = ",
        " = Two = \n End . \n",
    ]


def test_text_before_the_first_title_is_a_page_and_white_space_is_not() -> None:
    assert wikitext_pages(" Preface . \n = One = \n") == [" Preface . ", " = One = \n"]
    assert wikitext_pages(" \n\n = One = \n") == [" = One = \n"]


def test_the_last_page_is_there_even_if_it_is_blank() -> None:
    assert wikitext_pages("") == [""]
    assert wikitext_pages(" \n") == [" \n"]


@pytest.mark.parametrize(
    ("line", "is_title"),
    [
        (" = Title = ", True),
        ("= Title =", True),
        (" = a = b = ", True),
        (" = = Part = = ", False),
        (" = = = Part = = = ", False),
        (" = = = = Part = = = = ", False),
        (" = Title ", False),
        (" =Title= ", False),
        (" = ", False),
        (" = = ", False),
    ],
)
def test_a_title_has_one_equals_sign_on_each_side(line: str, is_title: bool) -> None:
    assert len(wikitext_pages(f"before\n{line}\nbehind")) == 1 + is_title


@given(texts([" ", "\n", " \n", "\n \n", "\n = ", " = \n"]))
def test_pages_are_the_text_but_for_line_ends_and_blank_parts_between_them(text: str) -> None:
    pages = wikitext_pages(text)
    assert "".join("".join(pages).split()) == "".join(text.split())
    assert all(page.strip() for page in pages[:-1])


# lm-evaluation-harness


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        # Contractions and plurals.
        ("The dog 's bone", "The dog's bone"),
        ("the players ' union", "the players' union"),
        ("she didn 't", "she didn 't"),
        # Numbers.
        ("a well @-@ known 1 @,@ 000 and 2 @.@ 5", "a well-known 1,000 and 2.5"),
        # Punctuation with a blank on both sides.
        ("Yes , no ; a : b . C ! D ? E", "Yes, no; a: b. C! D? E"),
        ("the end .", "the end ."),
        ("the end . \n next", "the end.\nnext"),
        # Brackets and quotes lose the white space inside, even of a line end.
        ("f ( x ) [ y ] { z }", "f (x) [y] {z}"),
        ('say " yes " now', 'say "yes" now'),
        ("say ' yes ' now", "say 'yes' now"),
        ("( a \n b )", "(a\nb)"),
        ("( one\n )", "(one)"),
        # Headings, degrees, blanks at line ends, N of the Penn Treebank.
        (" = Title = \n = = Part = = \n", " = Title =\n== Part ==\n"),
        (" = = = Part = = = ", " === Part === "),
        (" = = = = Part = = = = ", " ==== Part ==== "),
        ("20 ° C", "20°C"),
        (" a \n \n b ", " a\n\nb "),
        ("in N or N", "in 1 or N"),
    ],
)
def test_lm_eval_prints_words_as_worked_out_by_hand(page: str, expected: str) -> None:
    assert wikitext_detokenize(page) == expected


def test_rules_act_in_their_order() -> None:
    # A plural is joined before quotes are paired, so that its mark opens a quote.
    assert wikitext_detokenize("the dogs ' bowl ' s") == "the dogs'bowl' s"
    # A separator takes the blanks that the comma before it would have needed.
    assert wikitext_detokenize("a , @-@ b") == "a ,-b"
    # Quotes are paired before 's is joined, so that its mark opens one too.
    assert wikitext_detokenize("it 's what ' they 's") == "it's what' they's"


def test_the_rule_with_literal_slashes_fires_on_nothing_but_literal_slashes() -> None:
    assert wikitext_detokenize("the ' 9 inch") == "the ' 9 inch"
    assert wikitext_detokenize("/' 5/") == "/'[0-9]/"


@given(texts([" ", " ", "\n", " \n "], [piece for piece in PIECES if piece not in ("N", "@-@", "@,@", "@.@")]))
def test_without_its_own_symbols_lm_eval_changes_white_space_only(text: str) -> None:
    assert "".join(wikitext_detokenize(text).split()) == "".join(text.split())


def test_lm_eval_counts_words_and_an_empty_one_at_each_edge_of_white_space() -> None:
    assert count_words_lm_eval("one two\nthree") == 3
    assert count_words_lm_eval(" one \n \n two \n") == 4
    assert count_words_lm_eval("") == 1
    assert count_words_lm_eval(" ") == 2


@given(texts([" ", "\n", "\t", "  "], ["a", "bc", "é", "@-@"]))
def test_lm_eval_counts_words_plus_edges(text: str) -> None:
    edges = bool(re.match(r"\s", text)) + bool(re.search(r"\s$", text)) if text.strip() else 2 if text else 1
    assert count_words_lm_eval(text) == len(text.split()) + edges


# GPT-2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the dog 's bone , it isn 't theirs .", "the dog's bone, it isn't theirs."),
        ("the players ' union", "the players' union"),
        ("O 'Brien", "O'Brien"),
        ("a well @-@ known 1 @,@ 000 @.@ 5 %", "a well-known 1,000.5%"),
        ('He said : " yes ! " ( " no " )', 'He said: "yes!" ("no")'),
        (" = Title = \n = = Part = = \n", "= Title =\n== Part ==\n"),
        ("US $ 5 and £ 6", "US $5 and £6"),
        ("the U.S. Navy of St. John , J. Doe .", "the U.S. Navy of St. John, J. Doe."),
        ("a <unk> @-@ like <unk> .", "a <unk>-like <unk>."),
        # Words left apart because "ca." would be read as one word, and a word that would be read as two.
        ("( ca . )", "( ca . )"),
        ("Foo et al. said", "Foo et  al. said"),
        ("al. said", " al. said"),
        ("( foo , @-@", "( foo , @-@"),
    ],
)
def test_wikitext_is_printed_for_gpt2_as_worked_out_by_hand(text: str, expected: str) -> None:
    assert gpt2_detokenize(text, "wikitext") == expected
    assert gpt2_tokenize(expected, "wikitext") == words_of_lines(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" it was n't black monday \n", "it wasn't black monday\n"),
        ("they 've said he 'll go", "they've said he'll go"),
        ("the companies ' products in N", "the companies' products in 1"),
        ("$ N a share c$ N # N N N", "$1 a share c$1 #1 1 1"),
        ("mgm\\/ua 's <unk>", "mgm/ua's <unk>"),
        ("the '80s", "the '80s"),
        ("o'brien could n't", "o'brien couldn't"),
        # Words that the corpus does not have.
        ("1 and a/b", " 1 and  a/b"),
    ],
)
def test_ptb_is_printed_for_gpt2_as_worked_out_by_hand(text: str, expected: str) -> None:
    assert gpt2_detokenize(text, "ptb") == expected
    assert gpt2_tokenize(expected, "ptb") == words_of_lines(text)


@pytest.mark.parametrize("dataset", ["wikitext", "ptb"])
@given(text=texts([" ", " ", "  ", "\n", " \n ", ""]))
def test_no_text_loses_a_word_to_gpt2s_format(dataset: GptText, text: str) -> None:
    assert gpt2_tokenize(gpt2_detokenize(text, dataset), dataset) == words_of_lines(text)


@pytest.mark.parametrize("dataset", ["wikitext", "ptb"])
@given(text=st.text())
def test_no_text_of_any_characters_loses_a_word_to_gpt2s_format(dataset: GptText, text: str) -> None:
    assert gpt2_tokenize(gpt2_detokenize(text, dataset), dataset) == words_of_lines(text)


@pytest.mark.parametrize("dataset", ["wikitext", "ptb"])
@given(text=texts([" ", "\n"], [piece for piece in PIECES if piece not in ("N", "@-@", "@,@", "@.@", "\\/")]))
def test_without_numbers_and_separators_gpt2s_format_changes_blanks_only(dataset: GptText, text: str) -> None:
    assert gpt2_detokenize(text, dataset).replace(" ", "") == text.replace(" ", "")


def test_a_dataset_without_rules_is_refused() -> None:
    with pytest.raises(ConfigError, match="no de-tokenizer for 'enwik8'; choose one of wikitext, ptb"):
        gpt2_detokenize("a", "enwik8")  # type: ignore[arg-type]


needs_corpora = pytest.mark.skipif(
    "LMKIT_DATA" not in os.environ, reason="LMKIT_DATA does not name a folder with the corpora"
)


@pytest.mark.corpora
@needs_corpora
@pytest.mark.parametrize(("split", "num_pages"), [("valid", 60), ("test", 62)])
def test_wikitext2_has_as_many_pages_as_its_document_level_dataset(split: str, num_pages: int) -> None:
    pages = wikitext_pages(corpus("wikitext-2", f"wiki.{split}.tokens"))
    assert len(pages) == num_pages
    assert all(re.match(r" = [^=]", page) for page in pages)


@pytest.mark.corpora
@needs_corpora
@pytest.mark.parametrize(
    ("dataset", "folder", "name"), [("wikitext", "wikitext-2", "wiki.valid.tokens"), ("ptb", "ptb", "ptb.test.txt")]
)
def test_real_text_keeps_its_words_in_gpt2s_format_and_almost_none_is_escaped(
    dataset: GptText, folder: str, name: str
) -> None:
    text = corpus(folder, name)
    printed = gpt2_detokenize(text, dataset)
    assert gpt2_tokenize(printed, dataset) == words_of_lines(text)
    assert len(re.findall(r"(?m)^ | {2}", printed)) < 1e-4 * len(text.split())
    assert len(printed.split()) < (0.9 if dataset == "wikitext" else 0.98) * len(text.split())


def corpus(folder: str, name: str) -> str:
    return (Path(os.environ["LMKIT_DATA"]) / folder / name).read_text(encoding="utf-8")

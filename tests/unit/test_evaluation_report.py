"""The report: bins that lose no token, a page that no text can break, colours that everybody can read."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest

from lmkit.evaluation.report import (
    Bar,
    Nats,
    Report,
    ShownToken,
    by_frequency,
    by_length,
    by_position,
    render,
)
from lmkit.evaluation.report_assets import COLOURS

NAN = float("nan")
HOSTILE = [
    "</script><script>document.documentElement.dataset.hacked = 1</script>",
    "<unk>",
    '"quoted" it\'s',
    "&amp; <!-- <b>",
    "]]> --> <style>*{display:none}</style>",
    "\u202eright to left\u2066",
    "שלום مرحبا 日本 é 👩‍👧",
    "\x00\x07\x1b[31m\x7f\x85",
    "\r\n",
    "\u2028\u200b\ufeff",
    "\ud800",
    "\\u003c \\ ${x} `",
    "",
    " ",
]


def report(**changes: object) -> Report:
    base = Report(
        title="a title",
        rows=[("word_ppl", "89.49")],
        protocol={"context": 128},
        by_position=[Bar("0", 5.0, 10), Bar("1", 3.0, 30)],
        by_frequency=[Bar("never", 9.0, 4)],
        by_length=[Bar("1", 2.0, 7)],
        text=[ShownToken("the", 1.0), ShownToken(" cat", 2.0), ShownToken("\n", 0.1), ShownToken("sat", 9.0)],
        text_note="the first 4 tokens",
        warnings=[],
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


class Page(HTMLParser):
    """The elements of a page, its scripts by id, and the tokens of the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.content: dict[str, str] = {}
        self.tokens: list[str] = []
        self.seen = ""
        self._raw: str | None = None
        self._in_text = self._in_token = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag in ("script", "style"):
            self._raw = attributes.get("id") or tag
            assert self._raw not in self.content
            self.content[self._raw] = ""
        if tag == "div":
            self._in_text = attributes.get("id") == "text"
        self._in_token = self._in_text and tag == "span"
        if self._in_token:
            self.tokens.append("")

    def handle_endtag(self, tag: str) -> None:
        self._raw = None
        self._in_token = False
        self._in_text = self._in_text and tag != "div"

    def handle_data(self, data: str) -> None:
        if self._raw is not None:
            self.content[self._raw] += data
            return
        self.seen += data
        if self._in_token:
            self.tokens[-1] += data

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


# --- bins ------------------------------------------------------------------------------------------------------------

Binning = Callable[[Nats, np.random.Generator], list[Bar]]
BINNINGS: dict[str, Binning] = {
    "position": lambda nats_N, rng: by_position(nats_N, rng.integers(0, 100_000, len(nats_N))),
    "two positions": lambda nats_N, rng: by_position(nats_N, rng.integers(0, 5, len(nats_N)), num_bins=2),
    "frequency": lambda nats_N, rng: by_frequency(
        nats_N, rng.integers(0, 50, len(nats_N)), (10 ** rng.uniform(-1, 7, 50)).astype(np.int64)
    ),
    "length": lambda nats_N, rng: by_length(nats_N, rng.integers(1, 3_000_000, len(nats_N))),
}


@pytest.mark.parametrize("name", BINNINGS)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 5000])
def test_every_scored_token_is_in_exactly_one_bar_and_the_mean_is_kept(name: str, num_tokens: int) -> None:
    rng = np.random.default_rng(num_tokens)
    nats_N = rng.exponential(5.0, num_tokens).astype(np.float32)
    nats_N[rng.random(num_tokens) < 0.1] = np.nan
    bars = BINNINGS[name](nats_N, rng)
    scored = nats_N[~np.isnan(nats_N)].astype(np.float64)
    assert sum(bar.num_tokens for bar in bars) == len(scored)
    assert math.fsum(bar.nats_per_token * bar.num_tokens for bar in bars) == pytest.approx(scored.sum())
    assert all(bar.num_tokens > 0 for bar in bars)
    assert len({bar.label for bar in bars}) == len(bars)


def labels_of(bars: list[Bar]) -> dict[str, list[float]]:
    """Label -> how many tokens, and their mean."""
    return {bar.label: [bar.num_tokens, bar.nats_per_token] for bar in bars}


def test_positions_are_in_octaves_and_the_last_bin_is_open() -> None:
    nats_N = np.arange(9, dtype=np.float32)
    bars = by_position(nats_N, np.array([0, 1, 2, 3, 4, 7, 8, 15, 900]), num_bins=5)
    assert labels_of(bars) == {"0": [1, 0], "1": [1, 1], "2-3": [2, 2.5], "4-7": [2, 4.5], "8+": [3, 7]}


def test_frequencies_are_in_decades_of_the_count_in_train() -> None:
    counts_V = np.array([0, 1, 2, 9, 10, 99, 100, 9_999, 99_999, 100_000])
    bars = by_frequency(np.ones(20, dtype=np.float32), np.repeat(np.arange(10), 2), counts_V)
    assert [(bar.label, bar.num_tokens) for bar in bars] == [
        ("never", 2),
        ("1", 2),
        ("2-9", 4),
        ("10-99", 4),
        ("100-999", 2),
        ("1,000-9,999", 2),
        ("10,000-99,999", 2),
        ("100,000+", 2),
    ]


def test_lengths_are_in_half_octaves() -> None:
    bars = by_length(np.ones(12, dtype=np.float32), np.arange(1, 13))
    assert [(bar.label, bar.num_tokens) for bar in bars] == [
        ("1", 1),
        ("2", 1),
        ("3", 1),
        ("4-5", 2),
        ("6-7", 2),
        ("8-11", 4),
        ("12-15", 1),
    ]


def test_a_token_that_stands_nowhere_is_an_error_unless_it_is_not_scored() -> None:
    with pytest.raises(ValueError, match="negative"):
        by_position(np.ones(2, dtype=np.float32), np.array([-1, 0]))
    assert by_position(np.array([np.nan, 2], dtype=np.float32), np.array([-1, 0])) == [Bar("0", 2.0, 1)]


# --- page ------------------------------------------------------------------------------------------------------------


def test_the_page_is_a_function_of_the_report() -> None:
    assert render(report()) == render(report())


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_adds_an_element_to_the_page_or_breaks_out_of_its_script(text: str) -> None:
    plain = Page(render(report(warnings=["w"], text=[ShownToken("x", 3.0, (("y", 0.5),))])))
    hostile = Page(
        render(
            report(
                title=text,
                rows=[(text, text)],
                protocol={text: [text, {text: text}]},
                by_position=[Bar(text, 5.0, 10), Bar("1", 3.0, 30)],
                text=[ShownToken(text, 3.0, ((text, 0.5),))],
                text_note=text,
                warnings=[text],
            )
        )
    )
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert [set(attributes) for _, attributes in hostile.elements] == [set(attrs) for _, attrs in plain.elements]
    assert hostile.content["script"] == plain.content["script"]
    assert json.loads(hostile.content["protocol"]) == {text: [text, {text: text}]}
    assert not set("<>&") & set(hostile.content["protocol"] + hostile.content["alternatives"])


@pytest.mark.parametrize("text", HOSTILE)
def test_a_page_is_valid_utf8_without_invisible_characters(text: str) -> None:
    page = render(report(title=text, text=[ShownToken(text, 3.0, ((text, 0.5),))], warnings=[text]))
    assert page.encode().decode() == page
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]", page)


def test_the_tokens_joined_are_the_text_with_marks_where_something_cannot_be_seen() -> None:
    texts = ["The", " cat", "\t", "sat", "\n", "  ", "x", "", "\x1b", "\n\n", "<eod>", " "]
    page = render(report(text=[ShownToken(text, 1.0) for text in texts]))
    assert Page(page).tokens == ["The", "cat", "⇥\t", "sat", "↵\n", "  ", "x", "▪", "␛", "↵\n↵\n", "<eod>", " "]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" cat", " [cat]"),
        ("cat ", "[cat] "),
        (" a cat ", " [a cat] "),
        ("  cat", "[  cat]"),
        (" ", "[ ]"),
        ("<eos>\n", "[<eos>↵\n]"),
    ],
)
def test_one_blank_beside_a_word_stands_outside_of_its_colour_and_none_is_lost(text: str, shown: str) -> None:
    page = render(report(text=[ShownToken(text, 1.0)]))
    (line,) = re.findall("<p>(.*)</p>\n</div>", page[page.index('<div id="text"') :], re.DOTALL)
    assert unescape(line.replace('<span class="s2">', "[").replace("</span>", "]")) == shown


def test_a_line_of_text_is_a_paragraph_and_none_is_empty() -> None:
    texts = ["a", " b", "\n", "\n", "c", "\n"]
    page = render(report(text=[ShownToken(text, 1.0) for text in texts]))
    paragraphs = re.findall("<p>(.*?)</p>", page[page.index('<div id="text"') :], re.DOTALL)
    assert [re.sub("<[^>]*>", "", paragraph) for paragraph in paragraphs] == ["a b↵\n", "↵\n", "c↵\n"]


@pytest.mark.parametrize("index", range(len(COLOURS)))
def test_a_token_has_the_colour_of_the_band_that_its_surprisal_lies_in(index: int) -> None:
    low = COLOURS[index].from_bits
    high = COLOURS[index + 1].from_bits if index + 1 < len(COLOURS) else 1000.0
    for bits in (low + 1e-6, high - 1e-6):
        page = render(report(text=[ShownToken("token", bits * math.log(2))]))
        assert f'<span class="s{index}">token</span>' in page


def test_certainty_that_rounding_made_better_than_certain_has_the_first_colour() -> None:
    assert '<span class="s0">token</span>' in render(report(text=[ShownToken("token", -1e-7)]))


def test_a_token_that_was_not_scored_has_no_colour_and_does_not_count() -> None:
    page = Page(render(report(text=[ShownToken("first", NAN), ShownToken(" second", math.log(8))])))
    assert ("span", {"class": "unscored"}) in page.elements
    assert "2 tokens, 1 of them not scored: 2.08 nats (3.00 bits) per token on average, perplexity 8.00." in page.seen
    assert json.loads(page.content["alternatives"])["tokens"][0][0] is None


def test_the_numbers_of_a_token_stand_once_in_one_block_and_each_text_once() -> None:
    alternatives = (("a", 0.5), ("<b>", 0.25))
    page = Page(render(report(text=[ShownToken("x", 2.0, alternatives), ShownToken("y", 3.0, alternatives[::-1])])))
    assert json.loads(page.content["alternatives"]) == {
        "words": ["a", "<b>"],
        "tokens": [[2.0, -1, 0, 0.5, 1, 0.25], [3.0, -1, 1, 0.25, 0, 0.5]],
    }


@pytest.mark.parametrize(
    ("text", "alternatives", "which"),
    [
        (" b", (("a", 0.5), ("b", 0.25)), 1),  # a word, and its name
        ("<eos>\n", (("a", 0.25), ("<eos>", 0.25)), 1),
        ("\n", (("a", 0.5), ("<eos>", 0.25)), 1),  # another name: known by its probability
        (" b", (("b", 0.5), ("▁b", 0.25)), 1),  # the same word without its blank has another probability
        (" b", (("a", 0.25), ("b", 0.25), ("c", 0.25)), 1),  # equally probable: known by its name
        ("x", (("a", 0.25), ("b", 0.25)), -1),  # equally probable strangers
        ("x", (("a", 0.5), ("b", 0.3)), -1),
        ("x", (), -1),
    ],
)
def test_the_token_is_found_among_the_alternatives(
    text: str, alternatives: tuple[tuple[str, float], ...], which: int
) -> None:
    page = Page(render(report(text=[ShownToken(text, -math.log(0.25), alternatives)])))
    assert json.loads(page.content["alternatives"])["tokens"][0][1] == which


def test_the_most_surprising_tokens_lead_to_their_places() -> None:
    nats = np.random.default_rng(1).permutation(30).astype(float)
    page = Page(render(report(text=[ShownToken(f" w{i}", float(n)) for i, n in enumerate(nats)])))
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links == [f"#token-{i}" for i in np.argsort(-nats)[:10]]


def test_a_large_text_is_one_plain_element_a_token() -> None:
    num_tokens = 20_000
    token = ShownToken(" word", 3.0, tuple((f"w{i}", 0.05) for i in range(8)))
    end = dataclasses.replace(token, text="\n")
    page = Page(render(report(text=[end if i % 25 == 24 else token for i in range(num_tokens)])))
    spans = [attributes for tag, attributes in page.elements if tag == "span"]
    assert len(page.tokens) == num_tokens
    assert all(set(attributes) <= {"class"} for attributes in spans)
    assert len(page.elements) < num_tokens + num_tokens // 25 + 400


def test_the_page_loads_nothing_and_its_policy_allows_only_its_own_script_and_style() -> None:
    text = render(report(warnings=["w"]))
    page = Page(text)
    for tag, attributes in page.elements:
        assert not set(attributes) & {"src", "srcset", "action", "data", "poster", "background", "xlink:href", "style"}
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("href", "#").startswith("#"), tag  # type: ignore[union-attr]
    assert "link" not in page.tags()
    assert not re.search(r"url\(|@import|https?:|//[a-z]", text)
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    sums = {tag: b64encode(sha256(page.content[tag].encode()).digest()).decode() for tag in ("script", "style")}
    assert policy == (f"default-src 'none'; style-src 'sha256-{sums['style']}'; script-src 'sha256-{sums['script']}'")


def test_every_chart_has_a_title_a_description_and_its_numbers_as_a_table() -> None:
    text = render(report())
    page = Page(text)
    ids = {attributes.get("id") for _, attributes in page.elements}
    charts = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(charts) == 3
    for chart in charts:
        assert chart["role"] == "img"
        assert set((chart["aria-labelledby"] or "").split()) <= ids
    figure = text[text.index('<figure id="by-position"') : text.index("</figure>")]
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", figure[figure.index("<tbody>") :])
    assert cells == ["0", "5.000", "148.41", "10", "25.0%", "35.7%", "1", "3.000", "20.09", "30", "75.0%", "64.3%"]
    assert "mean 3.50" in figure


def test_bars_are_as_long_as_their_loss() -> None:
    text = render(report(by_position=[Bar("0", 5.0, 10), Bar("1", 2.5, 30), Bar("2-3", 0.0, 1)]))
    figure = text[text.index('<figure id="by-position"') : text.index("</figure>")]
    first, second, third = map(float, re.findall(r'class="bar"[^>]* width="([0-9.]+)"', figure))
    assert first == 2 * second
    assert third == 0.5, "a bar without loss is a hairline"


def test_what_there_is_nothing_of_is_left_out() -> None:
    page = Page(render(report(by_position=[], by_frequency=[], by_length=[], text=[], rows=[], protocol={})))
    assert not page.tags() & {"figure", "svg", "span", "details"}
    assert "Where the loss is" not in page.seen
    assert set(page.content) == {"style", "protocol", "script"}


def test_warnings_stand_before_the_numbers() -> None:
    text = render(report(warnings=["the split was seen in training"]))
    assert text.index("the split was seen in training") < text.index('id="numbers"')


def test_the_protocol_is_json_for_programs_and_words_for_people() -> None:
    protocol = {"context": None, "carries_state": True, "ppl": float("inf"), "cache": {"size": 100, "sizes": [1, 2.5]}}
    page = Page(render(report(protocol=protocol)))
    assert json.loads(page.content["protocol"]) == protocol | {"ppl": "inf"}
    for row in ("contextnone", "carries_stateyes", "pplinf", "cachesize: 100, sizes: 1, 2.5"):
        assert row in page.seen


# --- colours ---------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colour", COLOURS, ids=lambda colour: f"{colour.from_bits:g} bits")
def test_text_can_be_read_on_every_colour_in_both_schemes(colour: object) -> None:
    """Contrast of at least 4.5, as WCAG asks for text."""
    assert contrast(colour.light, colour.light_ink) >= 4.5  # type: ignore[attr-defined]
    assert contrast(colour.dark, colour.dark_ink) >= 4.5  # type: ignore[attr-defined]


def test_more_surprise_is_further_from_the_page_in_lightness_alone() -> None:
    light = [luminance(colour.light) for colour in COLOURS]
    dark = [luminance(colour.dark) for colour in COLOURS]
    assert light == sorted(light, reverse=True)
    assert dark == sorted(dark)
    assert [colour.from_bits for colour in COLOURS] == sorted({colour.from_bits for colour in COLOURS})

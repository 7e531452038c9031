"""A report of an evaluation as one HTML page: numbers, protocol, where the loss is, and the text coloured by surprisal.

``render`` is a pure function of plain data. The page loads nothing (its Content-Security-Policy forbids it), so that it
can be mailed, archived and opened from the disk. What the model would rather have written stands in one JSON block that
the script decodes for the token under the pointer or the keyboard's focus: 20,000 tokens are 20,000 plain elements of
ten classes. ``#token-17`` behind the page's address opens that token.

Shape letters: N tokens, V vocabulary. Surprisal is -log2 p, in bits; loss is the same in nats.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmkit.evaluation.report_assets import COLOURS, SCRIPT, STYLE
from lmkit.evaluation.report_text import FOOTER, as_json, escape, for_people, page_start, pairs, running, visible

Nats = NDArray[np.float32]
Integers = NDArray[np.integer[Any]]

HALF_OCTAVES = [1, 2, *(edge << k for k in range(20) for edge in (3, 4))]
"""1, 2, 3, 4, 6, 8, 12, 16 ..."""
BANDS = [0, 1, 2, *(10**k for k in range(1, 6))]
"""0, 1, 2, 10, 100 ... 100,000."""

NUM_MOST_SURPRISING = 10
NUM_TOKENS_BEFORE = 12
"""How much of the text before it the table of the most surprising tokens shows of each."""


@dataclass(frozen=True)
class Bar:
    """The tokens of one bin."""

    label: str
    nats_per_token: float
    num_tokens: int


@dataclass(frozen=True)
class ShownToken:
    """A token of the text that is shown."""

    text: str
    """With the blank or the line end that belongs to it: the texts of all tokens, joined, are the text."""
    nats: float
    """NaN: not scored."""
    alternatives: tuple[tuple[str, float], ...] = ()
    """The most probable tokens, as people should see them, and their probabilities, in descending order."""


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    title: str
    rows: list[tuple[str, str]]
    """Names and values of the numbers."""
    protocol: dict[str, Any]
    """How the numbers were taken; what JSON can hold."""
    by_position: list[Bar]
    by_frequency: list[Bar]
    by_length: list[Bar]
    text: list[ShownToken]
    text_note: str
    """Which part of the split is shown."""
    warnings: list[str]


def by_position(nats_N: Nats, positions_N: Integers, num_bins: int = 14) -> list[Bar]:
    """Loss by position in context: 0, 1, 2-3, 4-7 ..., the last of ``num_bins`` bins open.

    As in the others below, each scored token is in exactly one bar (NaN: not scored), and empty bars are left out.
    """
    return _bars(nats_N, positions_N, [0, *(1 << k for k in range(num_bins - 1))])


def by_frequency(nats_N: Nats, tokens_N: Integers, train_counts_V: Integers) -> list[Bar]:
    """Loss by how often the token occurs in the training split: never, 1, 2-9, 10-99 ..."""
    return _bars(nats_N, np.asarray(train_counts_V)[tokens_N], BANDS, zero="never")


def by_length(nats_N: Nats, line_lengths_N: Integers) -> list[Bar]:
    """Loss by the length, in tokens (at least 1), of the line that the token stands in: 1, 2, 3, 4-5, 6-7, 8-11 ..."""
    return _bars(nats_N, line_lengths_N, HALF_OCTAVES)


def _bars(nats_N: Nats, values_N: Integers, edges: Sequence[int], zero: str = "0") -> list[Bar]:
    """A bin reaches from its edge to the next one, the last is open. Raises ValueError for values below the first."""
    scored_N = ~np.isnan(nats_N)
    bins_N = np.searchsorted(edges, np.asarray(values_N)[scored_N], side="right") - 1
    num_tokens = np.bincount(bins_N, minlength=len(edges))
    nats = np.bincount(bins_N, weights=nats_N[scored_N].astype(np.float64), minlength=len(edges))
    labels = [_label(low, high, zero) for low, high in zip(edges, [*edges[1:], None], strict=True)]
    return [Bar(labels[i], float(nats[i] / num_tokens[i]), int(num_tokens[i])) for i in np.flatnonzero(num_tokens)]


def _label(low: int, high: int | None, zero: str) -> str:
    """Of the bin of ``low`` to below ``high``."""
    if high is None:
        return f"{low:,}+"
    if high == low + 1:
        return f"{low:,}" if low else zero
    return f"{low:,}-{high - 1:,}"


# --- page ------------------------------------------------------------------------------------------------------------


def render(report: Report) -> str:
    """The page. Every text is escaped, and whatever cannot be seen is shown as a mark."""
    style, script = _style(), SCRIPT.strip()
    protocol = [(key, for_people(value)) for key, value in report.protocol.items()]
    parts = [
        page_start(report.title, style, script),
        f"<header><h1>{escape(report.title)}</h1></header>\n<main>",
        *_warnings(report.warnings),
        '<div class="pair">',
        pairs("Numbers", "numbers", report.rows),
        pairs("Protocol", "protocol-table", protocol),
        "</div>",
        *_charts(report),
        *_text_section(report.text, report.text_note),
        FOOTER,
        f'<script type="application/json" id="protocol">{as_json(report.protocol)}</script>',
        f"<script>{script}</script>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _style() -> str:
    """The style sheet with the colours of both schemes; paper is always light."""
    light = "".join(f"--s{i}:{colour.light};--i{i}:{colour.light_ink};" for i, colour in enumerate(COLOURS))
    dark = "".join(f"--s{i}:{colour.dark};--i{i}:{colour.dark_ink};" for i, colour in enumerate(COLOURS))
    classes = "".join(f".s{i}{{background:var(--s{i});color:var(--i{i})}}\n" for i in range(len(COLOURS)))
    schemes = f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    return schemes + classes + STYLE.strip()


def _warnings(warnings: Sequence[str]) -> list[str]:
    if not warnings:
        return []
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return [f'<section class="warnings" aria-label="Warnings"><ul>{items}</ul></section>']


# --- charts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chart:
    id: str
    heading: str
    what: str
    unit: str
    bars: list[Bar]


def _charts(report: Report) -> list[str]:
    charts = [
        _Chart("by-position", "by position in context", "tokens of context before it", "position", report.by_position),
        _Chart("by-frequency", "by word frequency", "times the token occurs in train", "times", report.by_frequency),
        _Chart("by-length", "by line length", "tokens in the line it stands in", "length", report.by_length),
    ]
    figures = [_figure(chart) for chart in charts if chart.bars]
    if not figures:
        return []
    return ['<section><h2>Where the loss is</h2><div class="charts">', *figures, "</div></section>"]


WIDTH, ROW, TOP, LEFT, BAR_WIDTH = 380, 22, 24, 100, 164
"""Of a chart, in its own units: about pixels."""


def _figure(chart: _Chart) -> str:
    """Bars of nats per token with the mean over all of them, the counts beside them, and the same as a table."""
    num_tokens = sum(bar.num_tokens for bar in chart.bars)
    nats = sum(bar.nats_per_token * bar.num_tokens for bar in chart.bars)
    mean, longest = nats / num_tokens, max(bar.nats_per_token for bar in chart.bars)
    scale = BAR_WIDTH / longest if longest > 0 else 0.0
    bottom = TOP + ROW * len(chart.bars)
    x = LEFT + mean * scale
    marks = [
        f'<line class="mean" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{bottom + 4}"/>',
        f'<text class="quiet middle" x="{x:.1f}" y="{bottom + 16}">mean {mean:.2f}</text>',
        f'<text class="quiet" x="{LEFT}" y="14">nats per token</text>',
        f'<text class="quiet end" x="{WIDTH}" y="14">tokens</text>',
    ]
    rows = []
    for y, bar in zip(range(TOP, bottom, ROW), chart.bars, strict=True):
        label, width = escape(bar.label), bar.nats_per_token * scale
        share, part = bar.num_tokens / num_tokens, bar.nats_per_token * bar.num_tokens / nats if nats else 0.0
        ppl = _perplexity(bar.nats_per_token)
        marks.append(
            f'<g class="row"><title>{label}: {bar.nats_per_token:.4f} nats per token (perplexity {ppl}), '
            f"{bar.num_tokens:,} tokens: {share:.1%} of the tokens, {part:.1%} of the loss</title>"
            f'<rect class="hit" x="0" y="{y}" width="{WIDTH}" height="{ROW}"/>'
            f'<rect class="bar" x="{LEFT}" y="{y + 3}" width="{max(width, 0.5):.1f}" height="{ROW - 6}"/>'
            f'<text class="end" x="{LEFT - 8}" y="{y + 15}">{label}</text>'
            f'<text class="value" x="{LEFT + width + 5:.1f}" y="{y + 15}">{bar.nats_per_token:.2f}</text>'
            f'<text class="quiet end" x="{WIDTH}" y="{y + 15}">{bar.num_tokens:,}</text></g>'
        )
        numbers = (f"{bar.nats_per_token:.3f}", ppl, f"{bar.num_tokens:,}", f"{share:.1%}", f"{part:.1%}")
        rows.append(f'<tr><th scope="row">{label}</th>' + "".join(f"<td>{n}</td>" for n in numbers) + "</tr>")
    heads = (chart.unit, "nats", "perplexity", "tokens", "of tokens", "of loss")
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    return (
        f'<figure id="{chart.id}"><figcaption>Loss {chart.heading} <small>{chart.what}</small></figcaption>\n'
        f'<svg viewBox="0 0 {WIDTH} {bottom + 20}" role="img" aria-labelledby="{chart.id}-title {chart.id}-desc">'
        f'<title id="{chart.id}-title">Loss {chart.heading}</title>'
        f'<desc id="{chart.id}-desc">Bars of nats per token {chart.heading}: {chart.what}. The mean is {mean:.2f}. '
        f"The table below holds the same.</desc>\n" + "\n".join(marks) + "</svg>\n"
        f'<details><summary>as a table</summary><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details></figure>"
    )


def _perplexity(nats_per_token: float) -> str:
    if nats_per_token > 20:
        return f"e^{nats_per_token:.1f}"
    return f"{math.exp(nats_per_token):,.2f}" if nats_per_token < 7 else f"{math.exp(nats_per_token):,.0f}"


# --- text ------------------------------------------------------------------------------------------------------------


HINT = (
    '<p class="hint">Hover over a token, or tab into the text and move with the arrow keys, to see what the model '
    "expected there. Click or press Enter to keep it open; the page's address then points to it. Escape closes.</p>"
)


def _text_section(tokens: Sequence[ShownToken], note: str) -> list[str]:
    if not tokens:
        return []
    scored = [token.nats for token in tokens if not math.isnan(token.nats)]
    mean = math.fsum(scored) / len(scored) if scored else 0.0
    unscored = f", {len(tokens) - len(scored):,} of them not scored" if len(scored) < len(tokens) else ""
    summary = (
        f"{len(tokens):,} tokens{unscored}: {mean:.2f} nats ({mean / math.log(2):.2f} bits) per token on average, "
        f"perplexity {_perplexity(mean)}."
    )
    return [
        f"<section><h2>The text, coloured by surprisal</h2>\n<p>{escape(note)}</p>\n<p>{summary}</p>",
        _legend(scored),
        HINT,
        "<noscript><p>What the model expected is shown by a script, which this browser does not run.</p></noscript>",
        _most_surprising(tokens),
        '<div id="text" role="group" aria-label="Text, token by token" lang="" translate="no">',
        _lines(tokens),
        "</div>\n</section>",
        '<div id="popup" role="status" hidden></div>',
        f'<script type="application/json" id="alternatives">{_alternatives(tokens)}</script>',
    ]


def _lines(tokens: Sequence[ShownToken]) -> str:
    """A paragraph a line: each has a direction of writing of its own, and is laid out alone."""
    spans = "".join(_span(token) + ("</p>\n<p>" if token.text.endswith("\n") else "") for token in tokens)
    return f"<p>{spans}</p>".removesuffix("\n<p></p>")


def _span(token: ShownToken) -> str:
    """The one blank before or after a word stays outside of the colour."""
    before, core, after = _parts(token.text)
    return f'{before}<span class="{_class(token.nats)}">{running(core)}</span>{after}'


def _parts(text: str) -> tuple[str, str, str]:
    """A single blank before, the rest, a single blank after; anything else that is white belongs to the rest."""
    core = text.removeprefix(" ").removesuffix(" ")
    if core != core.strip(" ") or not core:
        return "", text, ""
    before, after = text.startswith(" "), text.endswith(" ")
    return " " * before, core, " " * after


def _class(nats: float) -> str:
    """The class of a token's colour."""
    if math.isnan(nats):
        return "unscored"
    bits = max(nats / math.log(2), 0.0)  # rounding may make certainty cost a little less than nothing
    return f"s{bisect_right(COLOURS, bits, key=lambda colour: colour.from_bits) - 1}"


def _legend(scored: Sequence[float]) -> str:
    counts = Counter(map(_class, scored))
    items = []
    for i, colour in enumerate(COLOURS):
        last = i + 1 == len(COLOURS)
        label = f"{colour.from_bits:g}+" if last else f"{colour.from_bits:g}-{COLOURS[i + 1].from_bits:g}"
        share = counts[f"s{i}"] / max(len(scored), 1)
        items.append(f'<li><span class="s{i}">{label}</span><small>{share:.0%}</small></li>')
    return (
        '<div class="legend"><p id="scale">Surprisal in bits (1 bit: probability 1/2, 10 bits: 1/1024), '
        f'and the share of tokens</p><ol aria-labelledby="scale">{"".join(items)}</ol></div>'
    )


def _most_surprising(tokens: Sequence[ShownToken]) -> str:
    order = sorted((i for i, token in enumerate(tokens) if not math.isnan(token.nats)), key=lambda i: -tokens[i].nats)
    rows = []
    for i in order[:NUM_MOST_SURPRISING]:
        token, first = tokens[i], tokens[i].alternatives[:1]
        before = escape("".join(token.text for token in tokens[max(0, i - NUM_TOKENS_BEFORE) : i]))
        blank, core, _ = _parts(token.text)
        marked = f'{blank}<mark class="{_class(token.nats)}">{escape(visible(core))}</mark>'
        expected = "".join(f"<bdi>{escape(visible(text))}</bdi> {p:.0%}" for text, p in first)
        rows.append(
            f'<tr><td><a href="#token-{i}">{token.nats / math.log(2):.1f}</a></td>'
            f"<td><bdi>{before}{marked}</bdi></td><td>{expected}</td></tr>"
        )
    return (
        f"<details><summary>The {len(rows)} most surprising tokens</summary>"
        '<div class="wide"><table id="most-surprising"><thead><tr><th scope="col">bits</th><th scope="col">token</th>'
        f'<th scope="col">expected</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div></details>'
    )


def _alternatives(tokens: Sequence[ShownToken]) -> str:
    """JSON: ``words`` holds each text once; a token is [nats or null, which alternative it is or -1, word, p, ...]."""
    words: dict[str, int] = {}
    rows: list[list[float | None]] = []
    for token in tokens:
        row: list[float | None] = [None if math.isnan(token.nats) else round(token.nats, 4), _which(token)]
        for text, probability in token.alternatives:
            row += [words.setdefault(visible(text), len(words)), float(f"{probability:.4g}")]
        rows.append(row)
    return as_json({"words": list(words), "tokens": rows})


def _which(token: ShownToken) -> int:
    """Which alternative the token is, or -1: that of its probability, and where several have it, of its text too."""
    p = math.exp(-token.nats)
    near = [i for i, (_, other) in enumerate(token.alternatives) if math.isclose(p, other, rel_tol=1e-3)]
    same = [i for i in near if _bare(token.alternatives[i][0]) == _bare(token.text)]
    return same[0] if same else near[0] if len(near) == 1 else -1


def _bare(text: str) -> str:
    """Without line end and blank, which sentencepiece and byte-level BPE write as a letter in a token's name."""
    return text.strip("\n \u2581\u0120")

"""The page of ``lmkit runs report``: curves as SVG, tables, samples; a pure function of plain data, like the page of
eval-ppl, whose look it has. It runs no script and loads nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lmkit.console import format_number
from lmkit.evaluation.report_assets import STYLE
from lmkit.evaluation.report_text import FOOTER, escape, page_start, pairs, running
from lmkit.plots import Curve

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 250, 62, 12, 12, 36
"""Of a chart and of the room around its axes, in its own units: about pixels."""
MOST_POINTS = 600
"""A longer curve is drawn by the lowest and highest value of stretches of it."""
MOST_MARKS = 60

CHART_STYLE = """
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { max-width: 40rem; }
.grid { stroke: var(--rule); }
.axis { stroke: var(--quiet); }
.curve { fill: none; stroke-width: 1.3; stroke-linejoin: round; }
.c0 { stroke: var(--bar); fill: var(--bar); } .c1 { stroke: var(--second); fill: var(--second); }
.curve.c0, .curve.c1 { fill: none; }
.curve.c1 { stroke-width: 2; }
:root { --second: #d1495b; }
@media screen and (prefers-color-scheme: dark) { :root { --second: #f08a97; } }
.key { display: inline-block; width: 1.4em; height: 0.25em; vertical-align: middle; margin: 0 0.4em 0 0.8em; }
.k0 { background: var(--bar); } .k1 { background: var(--second); }
pre.sample {
  white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); padding: 0.6rem 0.9rem; border-radius: 6px;
}
#incidents td:first-child, #incidents th:first-child { white-space: nowrap; }
"""


@dataclass(frozen=True)
class Chart:
    """Curves over the steps that share one vertical axis."""

    id: str
    heading: str
    unit: str
    curves: dict[str, Curve]
    """Name -> (steps, values); what is not finite is left out and counted. The second one is drawn with marks."""
    from_zero: bool = False


@dataclass(frozen=True)
class RunPage:
    """All that the page shows."""

    title: str
    lead: str
    """What has become of the run, in one line."""
    numbers: list[tuple[str, str]]
    protocol: list[tuple[str, str]]
    """How the numbers were taken, with the digests of what they were taken on."""
    charts: list[Chart]
    samples: list[tuple[int, str]]
    """Step and text, the oldest first."""
    incidents: list[tuple[str, str, str]]
    """Time, event, details."""
    environment: list[tuple[str, str]]
    config: list[tuple[str, str]]
    command: str


def render(page: RunPage) -> str:
    """The page as text. Every text in it is escaped."""
    style = STYLE.strip() + CHART_STYLE
    parts = [
        page_start(page.title, style),
        f"<header><h1>{escape(page.title)}</h1><p>{escape(page.lead)}</p></header>\n<main>",
        '<div class="pair">',
        pairs("Numbers", "numbers", page.numbers),
        pairs("Protocol and digests", "protocol", page.protocol),
        "</div>",
        *_charts(page.charts),
        *_samples(page.samples),
        *_incidents(page.incidents),
        '<div class="pair">',
        pairs("Configuration", "config", page.config),
        pairs("Environment", "environment", page.environment),
        "</div>",
        f'<section><h2>Command</h2><pre class="sample" id="command">{escape(page.command)}</pre></section>',
        f"{FOOTER}\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _samples(samples: Sequence[tuple[int, str]]) -> list[str]:
    if not samples:
        return []
    shown = [
        f"<details{' open' if i == len(samples) - 1 else ''}><summary>step {step:,}</summary>"
        f'<pre class="sample" lang="" translate="no">{running(text)}</pre></details>'
        for i, (step, text) in enumerate(samples)
    ]
    return ['<section id="samples"><h2>Samples</h2>', *shown, "</section>"]


def _incidents(incidents: Sequence[tuple[str, str, str]]) -> list[str]:
    if not incidents:
        return ['<section id="incidents"><h2>Incidents</h2><p>none</p></section>']
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in incidents)
    head = "".join(f'<th scope="col">{name}</th>' for name in ("time (UTC)", "event", "details"))
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return [f'<section id="incidents"><h2>Incidents</h2>{table}</section>']


# --- charts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axes:
    """From steps and values to places in the drawing."""

    x0: float
    x1: float
    y0: float
    y1: float

    def place(self, x: float, y: float) -> str:
        return f"{self.x(x):.1f},{self.y(y):.1f}"

    def x(self, step: float) -> float:
        return LEFT + (step - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)


def _charts(charts: Sequence[Chart]) -> list[str]:
    figures = [figure for chart in charts if (figure := _figure(chart))]
    return ['<section><h2>Curves</h2><div class="charts">', *figures, "</div></section>"] if figures else []


def _figure(chart: Chart) -> str:
    """The chart, its key, and the values of its last curve as a table; nothing if there is no value."""
    finite = {name: _finite(curve) for name, curve in chart.curves.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return ""
    axes = _axes([point for points in finite.values() for point in points], from_zero=chart.from_zero)
    order = list(chart.curves)
    drawn = [mark for name, points in finite.items() for mark in _curve(axes, points, name, order.index(name))]
    keys = "".join(f'<span class="key k{order.index(name)}"></span>{escape(name)}' for name in finite)
    num_lost = sum(len(chart.curves[name][0]) - len(points) for name, points in finite.items())
    lost = f"; {num_lost} values that are not finite are left out" if num_lost else ""
    low, high = min(y for p in finite.values() for _, y in p), max(y for p in finite.values() for _, y in p)
    return (
        f'<figure id="{chart.id}"><figcaption>{escape(chart.heading)}'
        f"<small>{escape(chart.unit)}{escape(lost)}{keys if len(order) > 1 else ''}</small></figcaption>\n"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.heading)} over the steps, '
        f'from {format_number(low)} to {format_number(high)}">\n'
        + "\n".join([*_grid(axes), *drawn])
        + "</svg>\n"
        + _table(order[-1], finite.get(order[-1], []))
        + "</figure>"
    )


def _finite(curve: Curve) -> list[tuple[float, float]]:
    return [(x, y) for x, y in zip(*curve, strict=True) if math.isfinite(x) and math.isfinite(y)]


def _axes(points: Sequence[tuple[float, float]], *, from_zero: bool) -> _Axes:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = (min(0.0, *ys) if from_zero else min(ys)), max(ys)
    room = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    left, right = min(xs), max(xs)
    return _Axes(left - (left == right), right + (left == right), low if from_zero else low - room, high + room)


def _grid(axes: _Axes) -> Iterator[str]:
    for value in _ticks(axes.y0, axes.y1, 5):
        y = axes.y(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="quiet end" x="{LEFT - 6}" y="{y + 4:.1f}">{_tick_text(value)}</text>'
    for value in _ticks(axes.x0, axes.x1, 6):
        x = axes.x(value)
        yield f'<text class="quiet middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}">{_tick_text(value)}</text>'
    bottom = HEIGHT - BOTTOM
    yield f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    yield f'<text class="quiet end" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}">step</text>'


def _ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` round values between the two."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    spacing = next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor >= raw)
    return [spacing * i for i in range(math.ceil(low / spacing), math.floor(high / spacing) + 1)]


def _tick_text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _curve(axes: _Axes, points: Sequence[tuple[float, float]], name: str, number: int) -> Iterator[str]:
    places = " ".join(axes.place(x, y) for x, y in thinned(points))
    if len(points) > 1:
        yield f'<polyline class="curve c{number}" points="{places}"/>'
    if len(points) == 1 or (number == 1 and len(points) <= MOST_MARKS):
        for x, y in points:
            yield (
                f'<circle class="c{number}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3">'
                f"<title>{escape(name)} at step {x:,.0f}: {format_number(float(y))}</title></circle>"
            )


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points, or where there are too many the lowest and the highest of each of MOST_POINTS / 2 stretches."""
    if len(points) <= MOST_POINTS:
        return list(points)
    kept, number = [], MOST_POINTS // 2
    for i in range(number):
        stretch = points[i * len(points) // number : (i + 1) * len(points) // number]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def _table(name: str, points: Sequence[tuple[float, float]]) -> str:
    """The values as a table, where there are few enough to read."""
    if not 0 < len(points) <= MOST_MARKS:
        return ""
    rows = "".join(f'<tr><th scope="row">{x:,.0f}</th><td>{format_number(float(y))}</td></tr>' for x, y in points)
    head = f'<tr><th scope="col">step</th><th scope="col">{escape(name)}</th></tr>'
    return f"<details><summary>as a table</summary><table><thead>{head}</thead><tbody>{rows}</tbody></table></details>"

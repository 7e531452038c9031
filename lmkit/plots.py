"""The curves of runs, drawn into a PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from lmkit.store import storage
from lmkit.store.found import read_metrics

Curve = tuple[Sequence[float], Sequence[float]]
"""xs, ys."""


def plot_run(run_dir: Path, warn: Callable[[str], None], unit: str) -> None:
    """Draw the curves of a run's metrics.jsonl into its loss.png; a failure is only a warning.

    unit: what the losses are of; perplexities go with those of tokens only, and validations of examples (classes,
    numbers) are judged by another measure than what is learnt.
    """
    try:
        rows = read_metrics(run_dir)
        curves = {
            name: ([r["step"] for r in rows if key in r], [r[key] for r in rows if key in r])
            for name, key in (("train loss", "loss"), ("valid loss", "valid_loss"), ("learning rate", "lr"))
        }
        apart = unit == "example"
        plot_curves(run_dir / "loss.png", curves, title=run_dir.name, per_token=unit == "token", apart=apart)
    except Exception as error:  # a broken matplotlib raises anything, and the run behind it may have taken days
        warn(f"no plot: {str(error) or type(error).__name__}")


def plot_curves(path: Path, curves: Mapping[str, Curve], *, title: str, per_token: bool, apart: bool) -> None:
    """Write a PNG of a run's curves, name -> (xs, ys): losses above, learning rate below.

    A name that begins with ``train`` is drawn thin, with its running mean on top; one that begins with ``valid`` with
    a mark at each point and its lowest value named; ``learning rate`` gets a panel of its own. Where there are several
    of either, ``train X`` and ``valid X`` share the colour of X. Where losses are in nats per token (``per_token``) the
    right axis reads as perplexity; where those of validation are another measure than those of training (``apart``)
    they have the right axis for themselves. Values that are not finite are left out; an empty curve or a single point
    is no error.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses = {_drawable(name): points for name, curve in curves.items() if (points := _finite_points(curve))[0]}
    rates = losses.pop("learning rate", None)
    figure = Figure(figsize=(8, 4.4 if rates is None else 5.2), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if rates is not None:
        axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        rate_axes.plot(*rates, color="#7a5195", linewidth=1.4, marker="o" if len(rates[0]) == 1 else "")
        rate_axes.set_ylabel("learning rate")
        rate_axes.set_ylim(bottom=0)
        rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        _plain_look(rate_axes)
        rate_axes.set_xlabel("step")
    else:
        axes = figure.subplots()
        axes.set_xlabel("step")
    train = {name: curve for name, curve in losses.items() if _is_train(name)}
    if apart and 0 < len(train) < len(losses):
        right = axes.twinx()
        _plot_losses(axes, losses, train, per_token=False, title="loss in training", legend="upper center")
        rest = {name: curve for name, curve in losses.items() if name not in train}
        _plot_losses(right, losses, rest, per_token=False, title="valid loss (task.metric)", legend="upper right")
        right.grid(visible=False)
        right.spines["right"].set_visible(True)
    else:
        _plot_losses(axes, losses, losses, per_token=per_token)
    if title:
        axes.set_title(_drawable(title), loc="left", fontsize=11)
    drawn = io.BytesIO()
    canvas.print_figure(drawn, format="png")
    storage.replace_file(path, drawn.getvalue())


def _drawable(text: str) -> str:
    """The text without half characters, as in the name of a run that is not UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _plot_losses(
    axes: Any,
    every: Mapping[str, Curve],
    losses: Mapping[str, Curve],
    *,
    per_token: bool,
    title: str = "loss",
    legend: str = "upper right",
) -> None:
    """Some of the losses of a figure, or all of them."""
    own = _run_colors(every)
    colors = iter(["#ef5675", "#2f9e77", "#ffa600", "#955196"])
    for name, (xs, ys) in losses.items():
        shared = own.get(name.partition(" ")[2])
        if _is_train(name):
            if shared is None:
                axes.plot(xs, ys, color="#8fb3d9", linewidth=0.8, alpha=0.7)
            marker, width = "o" if len(xs) == 1 else "", 1.8 if shared is None else 0.9
            color = shared or "#003f5c"
            axes.plot(xs, _smoothed(ys), color=color, linewidth=width, marker=marker, markersize=4, label=name)
        else:
            lowest = f"{min(ys):.3f} (perplexity {_perplexity_text(min(ys))})" if per_token else f"{min(ys):.4g}"
            marker = "o" if len(xs) <= 60 else ""
            color = shared or next(colors, "#555555")
            axes.plot(xs, ys, color=color, linewidth=1.6, marker=marker, markersize=4, label=f"{name}, lowest {lowest}")
    low, high = _loss_limits(losses)
    axes.set_ylim(low, high)
    axes.set_ylabel("loss (nats per token)" if per_token else title)
    _plain_look(axes)
    if losses:
        axes.legend(frameon=False, loc=legend)
    if not per_token:
        return
    right = axes.secondary_yaxis("right")
    right.set_ylabel("perplexity")
    places = _perplexity_ticks(low, high)
    right.set_yticks([math.log(place) for place in places], [f"{place:,.10g}" for place in places])
    right.minorticks_off()
    right.spines["right"].set_visible(False)


def _run_colors(losses: Mapping[str, Curve]) -> dict[str, str]:
    """The colour of each run X of ``train X`` and ``valid X``; empty where there is one run only."""
    runs = list(dict.fromkeys(name.partition(" ")[2] for name in losses))
    is_one = sum(map(_is_train, losses)) <= 1 and sum(not _is_train(name) for name in losses) <= 1
    colors = ["#2a6fbb", "#e4572e", "#2f9e77", "#a23e8c", "#c98a00", "#3d3d45", "#17a2b8", "#8a5a2b"]
    return {} if is_one else {run: colors[i % len(colors)] for i, run in enumerate(runs) if run}


def _plain_look(axes: Any) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _finite_points(curve: Curve) -> tuple[list[float], list[float]]:
    points = [(float(x), float(y)) for x, y in zip(*curve, strict=True) if math.isfinite(x) and math.isfinite(y)]
    return [x for x, _ in points], [y for _, y in points]


def _smoothed(ys: Sequence[float]) -> list[float]:
    """Centred running mean over about a fortieth of the curve; the window shrinks at both ends: no lag."""
    radius = min(len(ys) // 80, 200)
    sums = [0.0, *accumulate(ys)]
    smooth = []
    for i in range(len(ys)):
        r = min(radius, i, len(ys) - 1 - i)
        smooth.append((sums[i + r + 1] - sums[i - r]) / (2 * r + 1))
    return smooth


def _loss_limits(losses: Mapping[str, Curve]) -> tuple[float, float]:
    """Limits that show every smoothed value but not the spikes of single steps."""
    values = [y for name, (_, ys) in losses.items() for y in (_smoothed(ys) if _is_train(name) else ys)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.08 * (high - low) or 0.5
    return max(low - 1.5 * margin, min(low, 0.0)), high + margin


def _is_train(name: str) -> bool:
    return name.startswith("train")


def _perplexity_ticks(low: float, high: float) -> list[float]:
    """A few round perplexities (>= 1) whose logarithms lie between ``low`` and ``high``, linear where few fit."""
    if high > 25:
        return []
    if high - low > math.log(5):
        for steps in ([1], [1, 3], [1, 2, 5]):
            ticks = [step * 10.0**power for power in range(12) for step in steps]
            ticks = [tick for tick in ticks if low <= math.log(tick) <= high]
            if len(ticks) >= 4:
                break
        return ticks
    first, last = math.exp(max(low, 0.0)), math.exp(max(high, 0.0))
    for spacing in (factor * 10.0**power for power in range(-4, 12) for factor in (1, 2, 5)):
        if (last - first) / spacing <= 7:
            return [spacing * i for i in range(math.ceil(first / spacing), math.floor(last / spacing) + 1)]
    return []


def _perplexity_text(nats: float) -> str:
    return f"{math.exp(nats):,.4g}" if nats < 100 else "inf"

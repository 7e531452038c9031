"""A text scored with everything that the configuration asks for; what must be chosen is chosen on valid.

The members of the mixture come from the evaluator, on valid as on the split that is asked for. Here they are averaged
with weights, and temperature, theta and weights are found.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmkit.config.commands import EvalPplConfig
from lmkit.config.evaluation import NeuralCacheConfig
from lmkit.errors import ConfigError
from lmkit.evaluation.caches import filled, theta_grid
from lmkit.evaluation.evaluator import Evaluator, Nats, Passage
from lmkit.evaluation.mixture import best_weights, mixed
from lmkit.evaluation.plan import Indices, Windows
from lmkit.evaluation.scoring import TokenScores, own_scores
from lmkit.evaluation.temperature import GRID, TemperatureSearch
from lmkit.models.base import Scores


@dataclass
class Choice:
    """What was chosen, and how."""

    temperature: float = 1.0
    theta: float | None = None
    weights: list[float] = field(default_factory=list)
    on_valid: list[str] = field(default_factory=list)
    """Names of what was fitted on valid."""


@dataclass(frozen=True)
class Outcome:
    """A scored text."""

    scores: TokenScores
    """Of the whole mixture."""
    windows: Windows
    members: list[str]
    """Names of the members, the run's own first."""
    choice: Choice
    has_accuracy: bool
    """Whether scores.correct_N means anything: a mixture's most probable token is not computed."""
    member_nats: list[Nats]
    """Of each member alone; infinite where a cache does not hold the token."""


def evaluate(evaluator: Evaluator, split_name: str) -> Outcome:
    """Choose on valid what must be chosen, then score the split."""
    cfg = evaluator.cfg
    names = _member_names(cfg)
    choice = _choose(evaluator, len(names))
    passage = evaluator.passage(split_name)
    own, caches = evaluator.own(passage, choice.temperature, None if choice.theta is None else [choice.theta])
    base, others = evaluator.ensemble_nats(passage, own.nats_N), evaluator.mix_nats(passage)
    nats = _members(base, caches[choice.theta], others)
    total_N = nats[0] if len(nats) == 1 else mixed(nats, choice.weights)
    has_accuracy = len(nats) == 1 and not cfg.mc_samples and not cfg.ensemble
    scores = TokenScores(total_N, own.correct_N)
    return Outcome(scores, evaluator.windows(passage), names, choice, has_accuracy, nats)


def kind_of(cfg: EvalPplConfig) -> str:
    """What was done beyond static scoring, in the words of the published results; ``static`` if nothing."""
    parts = {
        "temperature": cfg.temperature == "valid" or float(cfg.temperature) != 1.0,
        "mc-dropout": cfg.mc_samples > 0,
        "cache": cfg.cache is not None,
        "dynamic": cfg.dynamic is not None,
        "ensemble": bool(cfg.ensemble),
        "mixture": bool(cfg.mix),
    }
    return " + ".join(name for name, used in parts.items() if used) or "static"


def as_json(choice: Choice, members: list[str]) -> dict[str, Any]:
    """What was chosen, as JSON data."""
    return {
        "temperature": choice.temperature,
        "theta": choice.theta,
        "weights": dict(zip(members, choice.weights, strict=True)) if len(members) > 1 else None,
        "fitted_on_valid": choice.on_valid,
    }


def _member_names(cfg: EvalPplConfig) -> list[str]:
    """The run (or ensemble), the cache, and what it is interpolated with. Raises ConfigError for bad weights and
    for one name of two."""
    names = ["ensemble" if cfg.ensemble else "run"]
    if cfg.cache is not None:
        names.append("neural cache" if isinstance(cfg.cache, NeuralCacheConfig) else "unigram cache")
    names += cfg.mix
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(
            f"mix={','.join(cfg.mix)}: two members are called {twice}", "name each once, a folder as ./NAME"
        )
    given = cfg.weights.split(",")
    if cfg.weights not in ("valid", "equal") and len(given) != len(names):
        raise ConfigError(f"weights={cfg.weights} are {len(given)}, for {', '.join(names)}", "give one each")
    return names


def _members(base_N: Nats, cache_N: Nats | None, others: list[Nats]) -> list[Nats]:
    """The members in the order of their names."""
    return [base_N, *([] if cache_N is None else [filled(cache_N, base_N)]), *others]


def _choose(evaluator: Evaluator, num_members: int) -> Choice:
    cfg, choice = evaluator.cfg, Choice()
    wants_theta = isinstance(cfg.cache, NeuralCacheConfig) and cfg.cache.theta is None
    fits_weights = num_members > 1 and cfg.weights == "valid"
    if cfg.temperature == "valid":
        choice.temperature = _best_temperature(evaluator)
        choice.on_valid.append("temperature")
    else:
        choice.temperature = float(cfg.temperature)
    if isinstance(cfg.cache, NeuralCacheConfig):
        choice.theta = cfg.cache.theta
    if wants_theta:
        choice.on_valid.append("theta")
    if fits_weights:
        choice.on_valid.append("weights")
    if not fits_weights:
        equal = [1 / num_members] * num_members
        choice.weights = equal if cfg.weights in ("valid", "equal") else list(map(float, cfg.weights.split(",")))
    if wants_theta or fits_weights:
        _fit(evaluator, choice, fits_weights)
    return choice


def _best_temperature(evaluator: Evaluator) -> float:
    passage = evaluator.passage("valid")
    search = TemperatureSearch(evaluator.loaded.model)
    evaluator.one_pass(passage, evaluator.windows(passage), search.scorer, "finding the temperature on valid")
    best = search.best()
    if not GRID[0] + 1e-6 < best < GRID[-1] - 1e-6:
        evaluator.console.warn(
            f"the best temperature on valid is at an end of what is searched, {GRID[0]} to {GRID[-1]}: a better one may"
            " lie beyond; temperature=NUMBER tries it"
        )
    return best


def _fit(evaluator: Evaluator, choice: Choice, fits_weights: bool) -> None:
    """Theta and weights: of each theta the best weights (or those of the choice), of these the best."""
    passage = evaluator.passage("valid")
    own, caches = evaluator.own(passage, choice.temperature, _thetas(evaluator, choice, passage))
    others, base = evaluator.mix_nats(passage), evaluator.ensemble_nats(passage, own.nats_N)
    fits: list[tuple[float, float | None, list[float]]] = []
    for theta, cache in caches.items():
        members = _members(base, cache, others)
        weights = best_weights(members) if fits_weights else choice.weights
        fits.append((float(np.nansum(mixed(members, weights), dtype=np.float64)), theta, weights))
    _, choice.theta, choice.weights = min(fits, key=lambda fit: fit[0])


def _thetas(evaluator: Evaluator, choice: Choice, passage: Passage) -> list[float] | None:
    """Values of theta to try: that given, a grid, or None without a neural cache."""
    if not isinstance(evaluator.cfg.cache, NeuralCacheConfig):
        return None
    return [choice.theta] if choice.theta is not None else theta_grid(_hidden(evaluator, passage))


def _hidden(evaluator: Evaluator, passage: Passage) -> Tensor:
    """Hidden vectors of the first window, at most 256 of them."""
    windows = evaluator.windows(passage).take(np.arange(1))
    windows = Windows(
        windows.begins_W, windows.begins_W, np.minimum(windows.ends_W, windows.begins_W + 256), windows.prefix_W
    )
    found: list[Tensor] = []

    def scorer(hidden_ND: Tensor, targets_N: Tensor, positions_N: Indices) -> Scores:
        found.append(hidden_ND)
        return own_scores(evaluator.loaded.model)(hidden_ND, targets_N, positions_N)

    evaluator.one_pass(passage, windows, scorer, batch_size=1)
    return torch.cat(found)

"""Interpolated modified Kneser-Ney n-gram model, estimated by counting (Chen & Goodman 1999, equations 23 to 27).

For a history h, h' being h without its oldest token, and c the number of times (see ``estimate``) that w follows h,

    P(w | h) = (c(hw) - D(c(hw))) / c(h) + b(h) P(w | h'),     b(h) = sum of D(c(hw)) over w / c(h),

where the last term of P(w) is b / V. Each length of n-gram has its own discounts D(1), D(2) and D(3 and more).

Shape letters beyond models/base.py: C contexts and G n-grams of one length, H = order - 1 tokens of history.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmkit.config.model import NgramConfig
from lmkit.errors import DataError
from lmkit.models.base import IGNORE, Head, LanguageModel, Scores, State

NO_TOKEN = -1
"""Fills a history where the text has no token, or none that belongs to the same sentence."""
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""Discounts of counts 1, 2 and more where the text is too small to estimate them (as KenLM's --discount_fallback)."""


@dataclass(frozen=True)
class Level:
    """All n-grams of one length, and their contexts, that is, all their tokens but the last.

    A context's id is its place in ``contexts_C``. Contexts are looked up from the newest token to the oldest and
    n-grams by context and last token, so that a context's n-grams lie side by side.
    """

    contexts_C: Tensor
    """int64, increasing: id of the context without its oldest token, times V, plus that token. The empty context: 0."""
    backoffs_C: Tensor
    """float32, b(h)."""
    ngrams_G: Tensor
    """int64, increasing: id of the context times V, plus the last token."""
    probs_G: Tensor
    """float32, P(w | h)."""


LEVEL_TABLES = ("contexts", "backoffs", "ngrams", "probs")


def estimate(tokens: NDArray[np.integer[Any]], *, order: int, vocab_size: int, eos_id: int) -> list[Level]:
    """Count a text, the first token following ``eos_id``, and return the levels 1..order.

    No context reaches back past an ``eos_id``, which stands at its start as the sentence begin. n-grams of full length
    and n-grams behind a sentence begin count how often they occur, all others how many different tokens precede them
    (SRILM's ngram-count -kndiscount -interpolate, all minimum counts 1). Everything is computed in float64.
    """
    contexts, ngrams, occurrences = _count(tokens, order, vocab_size, eos_id)
    lower = [np.zeros(len(ngrams[0]), dtype=np.int64)]
    for k in range(1, order):
        shorter = contexts[k][ngrams[k] // vocab_size] // vocab_size * vocab_size + ngrams[k] % vocab_size
        lower.append(np.searchsorted(ngrams[k - 1], shorter))
    probs = np.full(1, 1.0 / vocab_size)
    levels = []
    for k in range(order):
        counts, context_G = occurrences[k], ngrams[k] // vocab_size
        if k + 1 < order:
            preceding = np.bincount(lower[k + 1], minlength=len(counts))
            begins = contexts[k][context_G] % vocab_size == eos_id if k else np.zeros(len(counts), dtype=np.bool_)
            counts = np.where(begins, counts, preceding)
        discounts_G = np.array((0.0, *discounts(counts)))[np.minimum(counts, 3)]
        total_C = np.bincount(context_G, weights=counts, minlength=len(contexts[k]))
        backoffs = np.bincount(context_G, weights=discounts_G, minlength=len(contexts[k])) / total_C
        probs = (counts - discounts_G) / total_C[context_G] + backoffs[context_G] * probs[lower[k]]
        tables = contexts[k], backoffs.astype(np.float32), ngrams[k], probs.astype(np.float32)
        levels.append(Level(*(torch.from_numpy(table) for table in tables)))
    return levels


def _count(
    tokens: NDArray[np.integer[Any]], order: int, vocab_size: int, eos_id: int
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """contexts_C and ngrams_G of each level as in Level, and how often each n-gram occurs."""
    text = np.concatenate([[eos_id], tokens]).astype(np.int64)
    index_N = np.arange(len(tokens))
    available_N = index_N + 1 - np.maximum.accumulate(np.where(text[:-1] == eos_id, index_N, 0))
    context_N = np.zeros(len(tokens), dtype=np.int64)
    contexts, ngrams, occurrences = [np.zeros(1, dtype=np.int64)], [], []
    for k in range(order):
        if k:
            inside = available_N[index_N] >= k
            index_N, context_N = index_N[inside], context_N[inside]
            keys, context_N = np.unique(context_N * vocab_size + text[index_N - k + 1], return_inverse=True)
            contexts.append(keys)
        keys, number = np.unique(context_N * vocab_size + text[index_N + 1], return_counts=True)
        ngrams.append(keys)
        occurrences.append(number)
    return contexts, ngrams, occurrences


def discounts(counts: NDArray[np.int64]) -> tuple[float, float, float]:
    """D(1), D(2) and D(3 and more) from the numbers of n-grams counted once to four times (equation 26)."""
    n1, n2, n3, n4 = (int(n) for n in np.bincount(np.minimum(counts, 5), minlength=6)[1:5])
    if min(n1, n2, n3, n4) == 0:
        return FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    found = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
    return found if all(0 < d < i for i, d in enumerate(found, 1)) else FALLBACK_DISCOUNTS


class KneserNeyHead(Head):
    """Scores (N, H) histories. Holds the levels as buffers ``contexts_1``, ``backoffs_1`` ... and ``eos``.

    Before counting there is nothing but the unigram level's b = 1: every token has probability 1 / V.
    """

    eos: Tensor

    def __init__(self, order: int, vocab_size: int) -> None:
        super().__init__()
        self.order, self.vocab_size = order, vocab_size
        none = torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        first = Level(torch.zeros(1, dtype=torch.int64), torch.ones(1), none[2], none[3])
        self.register_buffer("eos", torch.tensor(NO_TOKEN))
        for name, tensor in _named([first] + [Level(*none)] * (order - 1)).items():
            self.register_buffer(name, tensor)
        for k in range(1, order + 1):
            for name in (f"starts_{k}", f"best_tokens_{k}"):
                self.register_buffer(name, none[0], persistent=False)
            self.register_buffer(f"best_probs_{k}", none[1], persistent=False)
        self._derive()

    def level(self, k: int) -> Level:
        """The n-grams of length k, 1 to order."""
        return Level(*(self.get_buffer(f"{name}_{k}") for name in LEVEL_TABLES))

    def set_levels(self, levels: Sequence[Level], eos_id: int) -> None:
        """Replace everything; the device stays."""
        self._assign({"eos": torch.tensor(eos_id), **_named(levels)})

    def loss(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        return self.score(hidden_ND, targets_N).nats_N.sum()

    @torch.no_grad()
    def score(self, hidden_ND: Tensor, targets_N: Tensor) -> Scores:
        scored_N = targets_N != IGNORE
        safe_N = targets_N.where(scored_N, 0)
        probs_N = self.backoffs_1[0] / self.vocab_size  # type: ignore[operator]
        best_N = self.best_tokens_1.expand(len(targets_N))  # type: ignore[operator]
        for k, found_N, context_N in self._contexts(hidden_ND):
            level = self.level(k)
            if k > 1 and len(level.contexts_C):
                probs_N = torch.where(found_N, level.backoffs_C[context_N] * probs_N, probs_N)
                best_N = torch.where(found_N, self.get_buffer(f"best_tokens_{k}")[context_N], best_N)
            index_N, stored_N = _find(level.ngrams_G, context_N * self.vocab_size + safe_N, found_N)
            if len(level.ngrams_G):
                probs_N = torch.where(stored_N, level.probs_G[index_N], probs_N)
        nats_N = (-probs_N.expand(len(targets_N)).log()).where(scored_N, 0.0)
        return Scores(nats_N, (best_N == safe_N) & scored_N)

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        probs_NV = self._unigrams().repeat(len(hidden_ND), 1)
        for k, found_N, context_N in self._contexts(hidden_ND):
            level, rows_M = self.level(k), found_N.nonzero().squeeze(1)
            if k == 1 or len(rows_M) == 0:
                continue
            context_M = context_N[rows_M]
            probs_NV[rows_M] *= level.backoffs_C[context_M, None]
            starts_C = self.get_buffer(f"starts_{k}")
            sizes_M = starts_C[context_M + 1] - starts_C[context_M]
            first_M = starts_C[context_M] - (sizes_M.cumsum(0) - sizes_M)
            index = torch.arange(int(sizes_M.sum()), device=rows_M.device) + first_M.repeat_interleave(sizes_M)
            tokens = level.ngrams_G[index] % self.vocab_size
            probs_NV[rows_M.repeat_interleave(sizes_M), tokens] = level.probs_G[index]
        return probs_NV.log_()

    def _contexts(self, hidden_ND: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of each level k: whether the last k - 1 tokens of each history are a context, and its id (0 if not)."""
        found_N = torch.ones(len(hidden_ND), dtype=torch.bool, device=hidden_ND.device)
        context_N = torch.zeros(len(hidden_ND), dtype=torch.int64, device=hidden_ND.device)
        yield 1, found_N, context_N
        for k in range(2, self.order + 1):
            token_N = hidden_ND[:, self.order - k]
            keys_N = context_N * self.vocab_size + token_N
            context_N, found_N = _find(self.get_buffer(f"contexts_{k}"), keys_N, found_N & (token_N != NO_TOKEN))
            yield k, found_N, context_N

    def _unigrams(self) -> Tensor:
        """P(w), (V,)."""
        level = self.level(1)
        probs_V = (level.backoffs_C / self.vocab_size).repeat(self.vocab_size)
        probs_V[level.ngrams_G] = level.probs_G
        return probs_V

    def _derive(self) -> None:
        """Where each context's n-grams start, and the most probable token after each context.

        A token that does not follow h in the counts has P(w | h) = b(h) P(w | h'), and one that does has more than
        that. So the best token after h is the best of its own n-grams or else the best one after h'.
        """
        for k in range(1, self.order + 1):
            level = self.level(k)
            num_contexts, device = len(level.contexts_C), level.contexts_C.device
            context_G = level.ngrams_G // self.vocab_size
            ids_C = torch.arange(num_contexts, device=device)
            starts = torch.searchsorted(level.ngrams_G, torch.arange(num_contexts + 1, device=device) * self.vocab_size)
            setattr(self, f"starts_{k}", starts)
            if k == 1:
                best_probs_C, best_tokens_C = self._unigrams().max(0, keepdim=True)
            else:
                own_C = torch.zeros(num_contexts, device=device).scatter_reduce_(0, context_G, level.probs_G, "amax")
                is_best = (level.probs_G == own_C[context_G]).nonzero().squeeze(1)
                first_C = is_best[torch.searchsorted(context_G[is_best], ids_C)]
                own_tokens_C = level.ngrams_G[first_C] % self.vocab_size
                parent_C = level.contexts_C // self.vocab_size
                lower_C, lower_tokens_C = level.backoffs_C * best_probs_C[parent_C], best_tokens_C[parent_C]
                takes_lower_C = (lower_C > own_C) | ((lower_C == own_C) & (lower_tokens_C < own_tokens_C))
                best_probs_C = torch.where(takes_lower_C, lower_C, own_C)
                best_tokens_C = torch.where(takes_lower_C, lower_tokens_C, own_tokens_C)
            setattr(self, f"best_probs_{k}", best_probs_C)
            setattr(self, f"best_tokens_{k}", best_tokens_C)

    def _assign(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor.to(self.eos.device, copy=True))
        self._derive()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Buffers of any length are taken if together they are a model; else none is."""
        names = ["eos", *(f"{name}_{k}" for k in range(1, self.order + 1) for name in LEVEL_TABLES)]
        unexpected_keys += [
            key for key in state_dict if key.startswith(prefix) and key.removeprefix(prefix) not in names
        ]
        missing = [prefix + name for name in names if prefix + name not in state_dict]
        missing_keys += missing
        if missing:
            return
        tensors = {name: state_dict[prefix + name] for name in names}
        try:
            _check(tensors, self.order, self.vocab_size)
        except ValueError as error:
            error_msgs.append(f"{prefix}{error}")
        else:
            self._assign(tensors)


def _named(levels: Sequence[Level]) -> dict[str, Tensor]:
    return {
        f"{name}_{k}": getattr(level, f"{name}_{'C' if name in ('contexts', 'backoffs') else 'G'}")
        for k, level in enumerate(levels, 1)
        for name in LEVEL_TABLES
    }


def _find(sorted_G: Tensor, keys_N: Tensor, asked_N: Tensor) -> tuple[Tensor, Tensor]:
    """Place of each key (0 where it is not) and whether it is there; keys that are not asked for never are."""
    if len(sorted_G) == 0:
        return torch.zeros_like(keys_N), torch.zeros_like(asked_N)
    index_N = torch.searchsorted(sorted_G, keys_N).clamp_(max=len(sorted_G) - 1)
    found_N = asked_N & (sorted_G[index_N] == keys_N)
    return index_N.where(found_N, 0), found_N


def _check(tensors: Mapping[str, Tensor], order: int, vocab_size: int) -> None:
    """Raise ValueError, naming the tensor, unless they are tables as ``estimate`` makes them or as before counting.

    That is: types and lengths fit, keys increase and name a token and an existing context, every context has an n-gram,
    probabilities and backoffs are above 0 and at most 1.
    """
    eos = tensors["eos"]
    _require(eos.dtype == torch.int64 and eos.ndim == 0, "eos", "is not one int64")
    _require(NO_TOKEN <= int(eos) < vocab_size, "eos", f"is {int(eos)}, not one of {vocab_size} tokens")
    num_shorter = 0
    for k in range(1, order + 1):
        names = [f"{table}_{k}" for table in LEVEL_TABLES]
        for name, dtype in zip(names, (torch.int64, torch.float32) * 2, strict=True):
            _require(tensors[name].dtype == dtype and tensors[name].ndim == 1, name, f"is not a vector of {dtype}")
        contexts_C, backoffs_C, ngrams_G, probs_G = (tensors[name] for name in names)
        _require(len(backoffs_C) == len(contexts_C), names[1], f"has {len(backoffs_C)} values, not {len(contexts_C)}")
        _require(len(probs_G) == len(ngrams_G), names[3], f"has {len(probs_G)} values, not {len(ngrams_G)}")
        if k == 1:
            _require(contexts_C.tolist() == [0], names[0], "is not the empty context")
        _check_keys(names[0], contexts_C, num_shorter * vocab_size if k > 1 else 1)
        _check_keys(names[2], ngrams_G, len(contexts_C) * vocab_size)
        with_ngrams = len((ngrams_G // vocab_size).unique_consecutive())
        _require(with_ngrams == len(contexts_C) or (k == 1 and with_ngrams == 0), names[2], "leaves out a context")
        for name in (names[1], names[3]):
            _require(bool(((tensors[name] > 0) & (tensors[name] <= 1)).all()), name, "is not above 0 and at most 1")
        num_shorter = len(contexts_C)


def _check_keys(name: str, keys: Tensor, limit: int) -> None:
    _require(bool((keys[1:] > keys[:-1]).all()), name, "does not increase")
    _require(len(keys) == 0 or (int(keys[0]) >= 0 and int(keys[-1]) < limit), name, f"is not within 0 and {limit}")


def _require(holds: bool, name: str, problem: str) -> None:
    if not holds:
        raise ValueError(f"{name} {problem}")


@dataclass(frozen=True)
class NgramState(State):
    """The last H tokens, most recent last; NO_TOKEN where there is none of the same sentence."""

    history_BH: Tensor

    def detach(self) -> NgramState:
        return self

    def select(self, rows: Tensor) -> NgramState:
        return NgramState(self.history_BH[rows])

    def tensors(self) -> dict[str, Tensor]:
        return {"history": self.history_BH}


class KneserNey(LanguageModel):
    """Its hidden vectors are the last H tokens themselves; the head looks them up."""

    head: KneserNeyHead

    def __init__(self, config: NgramConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.context = config, vocab_size, None
        self.head = KneserNeyHead(config.order, vocab_size)

    def fit(self, tokens: NDArray[np.integer[Any]], *, eos_id: int, line_ends: bool) -> None:
        self.head.set_levels(
            estimate(tokens, order=self.config.order, vocab_size=self.vocab_size, eos_id=eos_id), eos_id
        )

    def forward(
        self, tokens_BT: Tensor, state: NgramState | None = None, *, use_state: bool = False
    ) -> tuple[Tensor, NgramState]:
        size = self.config.order - 1
        before_BH = tokens_BT.new_full((len(tokens_BT), size), NO_TOKEN) if state is None else state.history_BH
        if size == 0:
            return tokens_BT.new_zeros((*tokens_BT.shape, 0)), NgramState(before_BH)
        history_BTH = torch.cat([before_BH, tokens_BT], 1).unfold(1, size, 1)[:, 1:]
        ends_BTH = history_BTH == self.head.eos
        later_BTH = ends_BTH.flip(2).cumsum(2).flip(2) - ends_BTH.long()
        history_BTH = history_BTH.masked_fill(later_BTH > 0, NO_TOKEN)
        return history_BTH, NgramState(torch.cat([before_BH[:, None], history_BTH], 1)[:, -1])

    def num_parameters(self) -> int:
        """Number of n-grams stored, of all lengths."""
        return sum(len(self.head.level(k).ngrams_G) for k in range(1, self.config.order + 1))

"""Interpolated modified Kneser-Ney n-gram model, estimated by counting.

Source: Chen & Goodman 1999, "An empirical study of smoothing techniques for language modeling". For a history h, h'
being h without its oldest token, and c the number of times (see ``estimate``) that w follows h,

    P(w | h) = (c(hw) - D(c(hw))) / c(h) + b(h) P(w | h'),     b(h) = sum of D(c(hw)) over w / c(h),

where the last term of P(w) is b / V. Each length of n-gram has its own discounts D(1), D(2) and D(3 and more).

Shape letters beyond models/base.py: C contexts and G n-grams of one length, H = order - 1 tokens of history.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lmkit.config.model import NgramConfig
from lmkit.errors import DataError
from lmkit.ids import check_text
from lmkit.models.base import IGNORE, Head, LanguageModel, Scores, State
from lmkit.models.counts import TABLES, Level, estimate

NO_TOKEN = -1
"""Fills a history where the text has no token, or none that belongs to the same sentence."""


class KneserNeyHead(Head):
    """Scores (N, H) histories. Holds the levels as buffers ``contexts_1``, ``log_backoffs_1`` ..., and ``eos``.

    Before counting there is nothing but b = 1 of the empty context: every token has probability 1 / V.
    """

    eos: Tensor

    def __init__(self, order: int, vocab_size: int) -> None:
        super().__init__()
        self.order, self.vocab_size = order, vocab_size
        keys, values = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        first = Level(torch.zeros(1, dtype=torch.int64), torch.zeros(1), keys, values)
        self.register_buffer("eos", torch.tensor(NO_TOKEN))
        self.tilt_V: nn.Parameter | None = None
        for name, tensor in _named([first] + [Level(keys, values, keys, values)] * (order - 1)).items():
            self.register_buffer(name, tensor.clone())
        for k in range(1, order + 1):
            self.register_buffer(f"best_tokens_{k}", keys, persistent=False)
        self._find_best_tokens()

    def level(self, k: int) -> Level:
        """The n-grams of length k, 1 to order."""
        return Level(*(self.get_buffer(f"{table}_{k}") for table in TABLES))

    def set_levels(self, levels: Sequence[Level], eos_id: int) -> None:
        """Replace everything; the device stays."""
        self._assign({"eos": torch.tensor(eos_id), **_named(levels)})

    @contextlib.contextmanager
    def tilted(self) -> Iterator[None]:
        """Within it, each word's probability is multiplied by a factor of its own, and normalised again.

        The logarithms of the factors, ``tilt_V``, begin at 0 and are what dynamic evaluation learns: adaptation of the
        unigram marginals (Kneser, Peters & Klakow 1997), here by gradient.
        """
        self.tilt_V = nn.Parameter(torch.zeros(self.vocab_size, device=self.eos.device))
        try:
            yield
        finally:
            self.tilt_V = None

    def loss(self, hidden_ND: Tensor, targets_N: Tensor, weights_N: Tensor | None = None) -> Tensor:
        """As Head.loss; differentiable by the tilt, where there is one."""
        if self.tilt_V is None:
            nats_N = self.score(hidden_ND, targets_N).nats_N
        else:
            nats_N = F.cross_entropy(self.logits(hidden_ND), targets_N, ignore_index=IGNORE, reduction="none")
        return nats_N.sum() if weights_N is None else nats_N @ weights_N

    @torch.no_grad()
    def score(self, hidden_ND: Tensor, targets_N: Tensor) -> Scores:
        if self.tilt_V is not None:
            logits_NV = self.logits(hidden_ND)
            nats_N = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="none")
            return Scores(nats_N, logits_NV.argmax(1) == targets_N)
        scored_N = targets_N != IGNORE
        safe_N = targets_N.where(scored_N, 0)
        _require_tokens(safe_N, self.vocab_size)
        log_probs_N = self._log_uniform().expand(len(targets_N))
        best_N = torch.zeros_like(safe_N)
        for k, context_N, found_N in self._contexts(hidden_ND):
            level = self.level(k)
            backed_off_N = log_probs_N + _take(level.log_backoffs_C, context_N, found_N, torch.zeros_like(log_probs_N))
            place_N, stored_N = _find(level.ngrams_G, context_N * self.vocab_size + safe_N, found_N)
            log_probs_N = _take(level.log_probs_G, place_N, stored_N, backed_off_N)
            best_N = _take(self.get_buffer(f"best_tokens_{k}"), context_N, found_N, best_N)
        return Scores((-log_probs_N).where(scored_N, 0.0), (best_N == safe_N) & scored_N)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """(N, V) float32 log-probabilities, plus the tilt where there is one."""
        log_probs_NV = self._log_probs(hidden_ND)
        return log_probs_NV if self.tilt_V is None else log_probs_NV + self.tilt_V

    @torch.no_grad()
    def _log_probs(self, hidden_ND: Tensor) -> Tensor:
        unigrams = self.level(1)
        log_probs_V = (self._log_uniform() + unigrams.log_backoffs_C).repeat(self.vocab_size)
        log_probs_V[unigrams.ngrams_G] = unigrams.log_probs_G
        log_probs_NV = log_probs_V.repeat(len(hidden_ND), 1)
        for k, context_N, found_N in islice(self._contexts(hidden_ND), 1, None):
            level, rows_M = self.level(k), found_N.nonzero().squeeze(1)
            if len(rows_M) == 0:
                break
            context_M = context_N[rows_M]
            log_probs_NV[rows_M] += level.log_backoffs_C[context_M, None]
            starts_M, ends_M = (
                torch.searchsorted(level.ngrams_G, ids_M * self.vocab_size) for ids_M in (context_M, context_M + 1)
            )
            sizes_M = ends_M - starts_M
            shift_M = starts_M - (sizes_M.cumsum(0) - sizes_M)
            places = torch.arange(int(sizes_M.sum()), device=rows_M.device) + shift_M.repeat_interleave(sizes_M)
            tokens = level.ngrams_G[places] % self.vocab_size
            log_probs_NV[rows_M.repeat_interleave(sizes_M), tokens] = level.log_probs_G[places]
        return log_probs_NV

    def _contexts(self, hidden_ND: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of each level k: the id of each history's last k - 1 tokens as a context (0 if none), and if it is one."""
        context_N = torch.zeros(len(hidden_ND), dtype=torch.int64, device=hidden_ND.device)
        found_N = torch.ones_like(context_N, dtype=torch.bool)
        yield 1, context_N, found_N
        for k in range(2, self.order + 1):
            token_N = hidden_ND[:, self.order - k]
            found_N = found_N & (token_N != NO_TOKEN)
            context_N, found_N = _find(self.get_buffer(f"contexts_{k}"), context_N * self.vocab_size + token_N, found_N)
            yield k, context_N, found_N

    def _log_uniform(self) -> Tensor:
        return torch.full((1,), -math.log(self.vocab_size), device=self.eos.device)

    def _find_best_tokens(self) -> None:
        """Set best_tokens_k, int64 (C,): the most probable token after each context, of equals the smallest.

        A token that does not follow h in the counts has P(w | h) = b(h) P(w | h'), and one that does has more than
        that. So the best token after h is the best of its own n-grams or else the best one after h'.
        """
        lower_C, lower_tokens_C = self._log_uniform(), torch.zeros_like(self.eos)[None]
        for k in range(1, self.order + 1):
            level = self.level(k)
            context_G = level.ngrams_G // self.vocab_size
            parents_C = level.contexts_C // self.vocab_size
            lower_C, lower_tokens_C = lower_C[parents_C] + level.log_backoffs_C, lower_tokens_C[parents_C]
            own_C = torch.full_like(lower_C, -torch.inf).scatter_reduce_(0, context_G, level.log_probs_G, "amax")
            is_best_G = level.log_probs_G == own_C[context_G]
            tokens_G = (level.ngrams_G % self.vocab_size).where(is_best_G, self.vocab_size)
            own_tokens_C = torch.full_like(level.contexts_C, self.vocab_size)
            own_tokens_C.scatter_reduce_(0, context_G, tokens_G, "amin")
            takes_own_C = (own_C > lower_C) | ((own_C == lower_C) & (own_tokens_C < lower_tokens_C))
            lower_C = torch.where(takes_own_C, own_C, lower_C)
            lower_tokens_C = torch.where(takes_own_C, own_tokens_C, lower_tokens_C)
            setattr(self, f"best_tokens_{k}", lower_tokens_C)

    def _assign(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor.to(self.eos.device, copy=True))
        self._find_best_tokens()

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
        names = ["eos", *(f"{table}_{k}" for k in range(1, self.order + 1) for table in TABLES)]
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
    named: dict[str, Tensor] = {}
    for k, level in enumerate(levels, 1):
        tensors = level.contexts_C, level.log_backoffs_C, level.ngrams_G, level.log_probs_G
        named |= {f"{table}_{k}": tensor for table, tensor in zip(TABLES, tensors, strict=True)}
    return named


def _find(sorted_G: Tensor, keys_N: Tensor, asked_N: Tensor) -> tuple[Tensor, Tensor]:
    """Place of each key (0 where it is not) and whether it is there; keys that are not asked for never are."""
    if len(sorted_G) == 0:
        return torch.zeros_like(keys_N), torch.zeros_like(asked_N)
    index_N = torch.searchsorted(sorted_G, keys_N).clamp_(max=len(sorted_G) - 1)
    found_N = asked_N & (sorted_G[index_N] == keys_N)
    return index_N.where(found_N, 0), found_N


def _check(tensors: Mapping[str, Tensor], order: int, vocab_size: int) -> None:
    """Raise ValueError, naming the tensor, unless they are tables as ``estimate`` makes them or as before counting.

    That is: types and lengths fit, keys increase and each names a token and an existing context,
    logarithms of probabilities and backoffs are finite and at most 0.
    """
    eos = tensors["eos"]
    _require(eos.dtype == torch.int64 and eos.ndim == 0, "eos", "is not one int64")
    _require(NO_TOKEN <= int(eos) < vocab_size, "eos", f"is {int(eos)}, not one of {vocab_size} tokens")
    num_shorter = 0
    for k in range(1, order + 1):
        names = [f"{table}_{k}" for table in TABLES]
        for name, dtype in zip(names, (torch.int64, torch.float32) * 2, strict=True):
            _require(tensors[name].dtype == dtype and tensors[name].ndim == 1, name, f"is not a vector of {dtype}")
        contexts_C, log_backoffs_C, ngrams_G, log_probs_G = (tensors[name] for name in names)
        _require(len(log_backoffs_C) == len(contexts_C), names[1], f"does not have {len(contexts_C)} values")
        _require(len(log_probs_G) == len(ngrams_G), names[3], f"does not have {len(ngrams_G)} values")
        if k == 1:
            _require(contexts_C.tolist() == [0], names[0], "is not the empty context")
        _check_keys(names[0], contexts_C, num_shorter * vocab_size if k > 1 else 1)
        _check_keys(names[2], ngrams_G, len(contexts_C) * vocab_size)
        for name in (names[1], names[3]):
            values = tensors[name]
            _require(bool((values.isfinite() & (values <= 0)).all()), name, "is not finite and at most 0")
        num_shorter = len(contexts_C)


def _check_keys(name: str, keys: Tensor, limit: int) -> None:
    _require(bool((keys[1:] > keys[:-1]).all()), name, "does not increase")
    _require(len(keys) == 0 or (int(keys[0]) >= 0 and int(keys[-1]) < limit), name, f"is not within 0 and {limit}")


def _take(values_G: Tensor, places_N: Tensor, found_N: Tensor, other_N: Tensor) -> Tensor:
    """The values at the places where something was found, elsewhere other_N."""
    return torch.where(found_N, values_G[places_N], other_N) if len(values_G) else other_N


def _require_tokens(tokens: Tensor, vocab_size: int) -> None:
    if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size):
        raise IndexError(f"token ids {int(tokens.min())} to {int(tokens.max())} are not all below {vocab_size}")


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
    """The hidden vector of a position is its history itself: the last H tokens, most recent last, int64.

    The history restarts with each eos, which stays as the sentence begin; NO_TOKEN fills what is before it.
    """

    head: KneserNeyHead

    def __init__(self, config: NgramConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.context = config, vocab_size, None
        self.receptive_field = max(config.order - 1, 1)
        self.head = KneserNeyHead(config.order, vocab_size)

    def fit(self, tokens: NDArray[np.integer[Any]], *, eos_id: int) -> None:
        """Count the tokens (1-D, of any integer type), the first one following ``eos_id``; every token is a target.

        Contexts do not reach across ``eos_id``, be it the end of a line or of a document. That comes nearer to the
        published perplexities than carrying them across lines, which gives 0.1 to 0.2 % less on word-level PTB and
        1 % less on WikiText-2.
        Takes about 0.2 KB of memory a token. Raises DataError for a text that is empty or does not fit the vocabulary.
        """
        if len(tokens) == 0:
            raise DataError("the training text is empty", "choose another dataset")
        check_text(tokens, self.vocab_size)
        if not 0 <= eos_id < self.vocab_size:
            raise DataError(f"eos_id={eos_id} does not fit the model's vocabulary of {self.vocab_size}")
        order = self.config.order
        self.head.set_levels(estimate(tokens, order=order, vocab_size=self.vocab_size, eos_id=eos_id), eos_id)

    def forward(
        self, tokens_BT: Tensor, state: NgramState | None = None, *, use_state: bool = False
    ) -> tuple[Tensor, NgramState]:
        """As LanguageModel.forward; hidden is (B, T, H) int64 and the state is always returned."""
        _require_tokens(tokens_BT, self.vocab_size)
        size = self.config.order - 1
        before_BH = tokens_BT.new_full((len(tokens_BT), size), NO_TOKEN) if state is None else state.history_BH
        if size == 0:
            return tokens_BT.new_zeros((*tokens_BT.shape, 0)), NgramState(before_BH)
        history_BTH = torch.cat([before_BH, tokens_BT], 1).unfold(1, size, 1)
        is_end_BTH = (history_BTH == self.head.eos).long()
        ends_behind_BTH = is_end_BTH.flip(2).cumsum(2).flip(2) - is_end_BTH
        history_BTH = history_BTH.masked_fill(ends_behind_BTH > 0, NO_TOKEN)
        return history_BTH[:, 1:], NgramState(history_BTH[:, -1])

    def state_from_tensors(self, tensors: dict[str, Tensor]) -> NgramState:
        """The inverse of NgramState.tensors."""
        return NgramState(tensors["history"])

    def num_parameters(self) -> int:
        """Number of n-grams stored, of all lengths."""
        return sum(len(self.head.level(k).ngrams_G) for k in range(1, self.config.order + 1))

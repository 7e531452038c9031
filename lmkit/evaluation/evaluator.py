"""One run and what it is mixed with on one text, by one protocol and with whatever goes beyond static scoring.

Everything is a member of a mixture: a member gives the nats of each token, on its own. So temperature, dynamic
evaluation and MC dropout change how the run itself is scored; caches, n-grams and other runs are further members.
``choosing`` averages them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from lmkit.config.commands import EvalPplConfig
from lmkit.config.data import BenchmarkConfig, DatasetConfig
from lmkit.config.evaluation import (
    DynamicConfig,
    DynamicRmsConfig,
    NeuralCacheConfig,
    SentenceProtocolConfig,
    UnigramCacheConfig,
)
from lmkit.config.plain import to_plain
from lmkit.console import Console
from lmkit.data.benchmarks import BENCHMARKS
from lmkit.data.corpus import open_corpus
from lmkit.data.prepared import PreparedData, prepare, text_digest_of
from lmkit.device import Device
from lmkit.errors import CheckpointError, ConfigError, DataError
from lmkit.evaluation.baselines import kn5_nats, unigram_nats
from lmkit.evaluation.caches import NeuralCache, unigram_cache
from lmkit.evaluation.dynamic import Steps, adapting, score_dynamic, steps_for
from lmkit.evaluation.mixture import averaged
from lmkit.evaluation.plan import Reach, Windows
from lmkit.evaluation.protocols import Material, Protocol, Source, build_protocol
from lmkit.evaluation.scoring import Scorer, TokenScores, own_scores, score
from lmkit.evaluation.temperature import tempered
from lmkit.ids import check_text
from lmkit.loading import LoadedRun, folder_of, load_run
from lmkit.rng import derive_key
from lmkit.store.checkpoint import BEST, LATEST

Nats = NDArray[np.float32]

COUNTING_SEQ_LEN = 4096
"""Tokens per forward pass of a model that counts: its history is short, so that nothing speaks for fewer."""
COUNTED = ("kn5", "unigram")
"""Members that are estimated from train on the spot."""


@dataclass(frozen=True)
class Passage:
    """A split as the protocol reads it."""

    source: Source
    material: Material
    name: str
    """valid, test or train."""


Own = tuple[TokenScores, dict[float | None, Nats | None]]
"""The run's scores, and theta -> nats under the cache alone; theta is None where there is none."""


class Evaluator:
    """Scores splits of a prepared corpus with a run, and with the other members, as the configuration says."""

    def __init__(self, cfg: EvalPplConfig, loaded: LoadedRun, device: Device, console: Console) -> None:
        self.cfg, self.loaded, self.device, self.console = cfg, loaded, device, console
        self.dataset: DatasetConfig = loaded.dataset if cfg.dataset is None else cfg.dataset
        self.word_level = isinstance(self.dataset, BenchmarkConfig) and BENCHMARKS[self.dataset.name].word_level
        by_sentence = cfg.protocol is None and loaded.model_config.objective == "gan"
        protocol = SentenceProtocolConfig() if by_sentence else cfg.protocol
        self.protocol: Protocol = build_protocol(protocol, word_level=self.word_level)
        self.reach = self._reach(loaded, cfg.context, cfg.stride)
        self._others: dict[str, LoadedRun] = {}
        for name in (*cfg.ensemble, *(name for name in cfg.mix if name not in COUNTED)):
            self.with_same_tokens(name)  # what cannot be mixed is refused before anything is prepared or scored
        self.prepared: PreparedData = prepare(self.dataset, loaded.tokenizer, console)
        self._passages: dict[str, Passage] = {}
        self._steps: Steps | None = None
        self._own_scored: dict[tuple[str, float], Own] = {}
        self._others_scored: dict[tuple[str, str], Nats] = {}

    def passage(self, split_name: str) -> Passage:
        """A split, read as the protocol reads it. Raises DataError for an id in it that is not in the vocabulary."""
        if split_name not in self._passages:
            splits = self.prepared.splits
            if split_name not in splits:
                raise DataError(f"{self.prepared.name} has no {split_name} split", f"it has {', '.join(splits)}")
            check_text(splits[split_name].tokens, self.loaded.tokenizer.vocab_size)
            source = Source(
                self.prepared.name,
                split_name,
                splits[split_name],
                self.loaded.tokenizer,
                functools.cache(lambda: "".join(piece.text for piece in open_corpus(self.dataset).pieces(split_name))),
            )
            self._passages[split_name] = Passage(source, self.protocol.material(source), split_name)
        return self._passages[split_name]

    @functools.cached_property
    def knows_train(self) -> bool:
        """Whether the run, or what it was finetuned from, has learnt the train split of this corpus: by its text if the
        run's data are still in the cache, else by the configuration, which is all that is known of a base."""
        train, learnt = self.prepared.splits.get("train"), text_digest_of(self.loaded.data_digest, "train")
        if self.loaded.config.get("corpus") == to_plain(self.dataset):
            return True
        if train is None or learnt is None:
            return self.dataset == self.loaded.dataset
        return train.text_digest == learnt

    def windows(self, passage: Passage, reach: Reach | None = None) -> Windows:
        """What is scored of a split."""
        return self.protocol.windows(passage.material, passage.source, reach or self.reach)

    def seq_len(self, run: LoadedRun, reach: Reach) -> int:
        """Tokens per forward pass: whole windows, or pieces with carried state."""
        if run.model_config.trains_by_counting:
            return COUNTING_SEQ_LEN
        return reach.context or self.cfg.seq_len

    def _reach(self, run: LoadedRun, context: int | None, stride: int | None) -> Reach:
        return self.protocol.reach(
            context, stride, run.context, run.model.context, carries_state=run.model_config.carries_state
        )

    def own(self, passage: Passage, temperature: float, thetas: list[float] | None) -> Own:
        """The run's own scores; those of a split that has been scored to choose on are not computed again."""
        key = passage.name, temperature
        wanted: list[float | None] = [None] if thetas is None else [*thetas]
        known = self._own_scored.get(key)
        if known is None or not all(theta in known[1] for theta in wanted):
            known = self._own_scored[key] = self._score_own(passage, temperature, thetas)
        return known

    def _score_own(self, passage: Passage, temperature: float, thetas: list[float] | None) -> Own:
        cfg, model = self.cfg, self.loaded.model
        scorer: Scorer = own_scores(model) if temperature == 1.0 else tempered(model, temperature)
        windows, cache = self.windows(passage), None
        if thetas is not None and cfg.cache is not None:
            cache = NeuralCache(len(passage.material.tokens), cfg.cache.window, thetas)
            scorer = cache.wrap(scorer)
        batch_size = 1 if cache is not None else cfg.batch_size
        if cfg.dynamic is not None:
            with adapting(model):
                own = self._dynamic(cfg.dynamic, passage, windows, scorer)
        elif cfg.mc_samples:
            own = self._mc_dropout(passage, windows, scorer)
        else:
            own = self.one_pass(passage, windows, scorer, batch_size=batch_size)
        if cache is not None:
            return own, dict(zip(cache.thetas, cache.nats_KN, strict=True))
        if isinstance(cfg.cache, UnigramCacheConfig):
            counted = unigram_cache(passage.material.tokens, cfg.cache.window)
            return own, {None: np.where(own.scored_N, counted, np.nan).astype(np.float32)}
        return own, {None: None}

    def _mc_dropout(self, passage: Passage, windows: Windows, scorer: Scorer) -> TokenScores:
        """Probabilities averaged over passes with dropout (Gal & Ghahramani 2016)."""
        if self.cfg.cache is not None and isinstance(self.cfg.cache, NeuralCacheConfig):
            raise ConfigError("a neural cache cannot be combined with mc_samples", "leave one of them out")
        passes = []
        with torch.random.fork_rng():
            for sample in range(self.cfg.mc_samples):
                torch.manual_seed(derive_key(self.cfg.seed, "mc-dropout", str(sample)))
                label = f"pass {sample + 1} of {self.cfg.mc_samples}"
                passes.append(self.one_pass(passage, windows, scorer, label, dropout=True))
                if sample == 1 and np.array_equal(passes[0].nats_N, passes[1].nats_N, equal_nan=True):
                    raise ConfigError(
                        f"mc_samples={self.cfg.mc_samples}: {self.loaded.path} has no dropout, all passes are the same",
                        "leave it out",
                    )
        return TokenScores(averaged([one.nats_N for one in passes]), passes[0].correct_N)

    def _dynamic(self, config: DynamicConfig, passage: Passage, windows: Windows, scorer: Scorer) -> TokenScores:
        """Scores of a run that goes on learning from what it has scored; the statistics of train are taken once."""
        model, context = self.loaded.model, self.reach.context
        if self._steps is None:
            split = self.prepared.splits.get("train")
            if split is None and isinstance(config, DynamicRmsConfig):
                raise DataError(f"{self.prepared.name} has no train split for the statistics", "use dynamic=sgd")
            train = np.zeros(0, np.int64) if split is None else split.tokens
            with self.console.progress(None, "statistics of gradients on train") as bar:
                self._steps = steps_for(
                    model,
                    config,
                    train,
                    self.loaded.tokenizer.eos_id,
                    context=context,
                    device=self.device,
                    progress=bar.update,
                )
        with self.console.progress(windows.num_scored, f"dynamic evaluation on {passage.name}") as bar:
            return score_dynamic(
                model,
                passage.material.tokens,
                windows,
                config,
                self._steps,
                device=self.device,
                scorer=scorer,
                progress=bar.update,
            )

    def one_pass(
        self,
        passage: Passage,
        windows: Windows,
        scorer: Scorer,
        label: str = "",
        *,
        batch_size: int | None = None,
        dropout: bool = False,
    ) -> TokenScores:
        """What ``scorer`` makes of one static pass of the run over ``windows`` of a split."""
        label = label or f"scoring {self.prepared.name} {passage.name}"
        with self.console.progress(windows.num_scored, label) as bar:
            return score(
                self.loaded.model,
                passage.material.tokens,
                windows,
                seq_len=self.seq_len(self.loaded, self.reach),
                batch_size=batch_size or self.cfg.batch_size,
                device=self.device,
                scorer=scorer,
                dropout=dropout,
                progress=bar.update,
            )

    def ensemble_nats(self, passage: Passage, own_nats_N: Nats) -> Nats:
        """The average of the run's probabilities with those of the runs in ``ensemble``."""
        if not self.cfg.ensemble:
            return own_nats_N
        return averaged([own_nats_N, *(self.run_nats(name, passage) for name in self.cfg.ensemble)])

    def mix_nats(self, passage: Passage) -> list[Nats]:
        """Nats of each model in ``mix``."""
        return [
            self.counted_nats(name, passage) if name in COUNTED else self.run_nats(name, passage)
            for name in self.cfg.mix
        ]

    def _once(self, name: str, passage: Passage, scored: Callable[[], Nats]) -> Nats:
        """A member's nats, computed when they are asked for first."""
        key = name, passage.name
        if key not in self._others_scored:
            self._others_scored[key] = scored()
        return self._others_scored[key]

    def counted_nats(self, name: str, passage: Passage) -> Nats:
        """Nats under ``kn5`` or ``unigram`` of train, or ``uniform`` ones, at the tokens that the protocol scores."""
        return self._once(name, passage, lambda: self._count(name, passage))

    def _count(self, name: str, passage: Passage) -> Nats:
        tokens, tokenizer = passage.material.tokens, self.loaded.tokenizer
        scored_N = self.windows(passage).positions_in_context(len(tokens)) >= 0
        if name == "uniform":
            return np.where(scored_N, np.log(tokenizer.vocab_size), np.nan).astype(np.float32)
        if passage.material.changes:
            raise ConfigError(
                f"{name} is counted on the text as prepared, protocol={self.protocol.name} changes it",
                "leave it out, or use protocol=stream",
            )
        if "train" not in self.prepared.splits:
            raise DataError(f"{self.prepared.name} has no train split to count {name} on", f"leave {name} out")
        train = self.prepared.splits["train"].tokens
        if name == "kn5":  # reads as a run of model=kn5 does: its history is carried, whatever windows this run has
            windows = self.windows(passage, self.reach if self.protocol.never_carries_state else Reach(None, None))
            return kn5_nats(train, tokens, tokenizer.eos_id, tokenizer.vocab_size, windows=windows)
        nats_N = unigram_nats(train, tokens, tokenizer.vocab_size)
        return np.where(scored_N, nats_N, np.nan).astype(np.float32)

    def run_nats(self, name: str, passage: Passage) -> Nats:
        """Static nats of another run on the same tokens, by the same protocol. Raises ConfigError for other tokens."""
        other = self.with_same_tokens(name)
        return self._once(name, passage, lambda: self._score_other(other, passage).nats_N)

    def with_same_tokens(self, name: str) -> LoadedRun:
        """Another run. Raises ConfigError if it has other tokens."""
        other = self.other(name)
        if other.tokenizer.digest != self.loaded.tokenizer.digest:
            raise ConfigError(
                f"run {other.path} has another tokenizer than {self.loaded.path}", "mix runs with the same tokenizer"
            )
        return other

    def other(self, name: str) -> LoadedRun:
        """Another run by its path, loaded once. Raises CheckpointError if there is none."""
        if name not in self._others:
            if not os.path.isdir(os.path.expanduser(folder_of(name, self.cfg.run.root))):
                raise CheckpointError(
                    f"there is no run {name}",
                    f"ensemble, mix and compare name folders of runs, and mix {' or '.join(COUNTED)}, too",
                )
            named = self.cfg.run.checkpoint
            checkpoint = named if named in (BEST, LATEST) else BEST
            config = replace(self.cfg.run, path=name, checkpoint=checkpoint)
            self._others[name] = load_run(config, device=self.device, console=self.console)
        return self._others[name]

    def _score_other(self, other: LoadedRun, passage: Passage) -> TokenScores:
        windowed = not other.model_config.carries_state or self.protocol.never_carries_state
        reach = self._reach(other, *((self.cfg.context, self.cfg.stride) if windowed else (None, None)))
        windows = self.protocol.windows(passage.material, passage.source, reach)
        with self.console.progress(windows.num_scored, f"scoring {passage.name} with {other.path.name}") as bar:
            return score(
                other.model,
                passage.material.tokens,
                windows,
                seq_len=self.seq_len(other, reach),
                batch_size=self.cfg.batch_size,
                device=self.device,
                progress=bar.update,
            )

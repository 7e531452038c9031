"""Catastrophic forgetting: what finetuning does to the perplexity on the text that the base run had learnt."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from lmkit.config.data import DatasetConfig
from lmkit.config.plain import from_plain
from lmkit.console import Console, format_number
from lmkit.data.prepared import PreparedData, prepare
from lmkit.device import Device
from lmkit.errors import ConfigError, LmkitError
from lmkit.evaluation.plan import Reach, Segments
from lmkit.evaluation.scoring import perplexity, summarize
from lmkit.loading import LoadedRun
from lmkit.models.base import LanguageModel
from lmkit.tasks import Task, Validation
from lmkit.tasks.language import CARRIED_SEGMENT, LanguageModelling

SHOWN = ("token_ppl", "word_ppl", "bits_per_byte")


def corpus_of(base: LoadedRun) -> DatasetConfig | None:
    """The text that a run learnt last as a language model; None if that is not known."""
    if base.config and (base.config.get("task") or {}).get("kind", "lm") == "lm":
        return base.dataset
    data = base.config.get("corpus")
    try:
        return None if data is None else from_plain(DatasetConfig, data, where="corpus")
    except ConfigError:
        return None


@dataclass
class Forgetting:
    """Scores the valid split of the base run's corpus, as that run did, before and after the finetuning."""

    model: LanguageModel
    """The base's model, which the finetuning changes."""
    corpus: PreparedData
    context: int | None
    device: Device
    micro_batch_size: int
    seconds: float = 0.0
    """What the scoring before took, and the one after will take."""
    before: dict[str, Any] = field(default_factory=dict)
    task_before: dict[str, Any] | None = None
    """The same numbers of the new corpus, where the task is to learn one."""

    @classmethod
    def watch(
        cls,
        base: LoadedRun,
        corpus: DatasetConfig | None,
        *,
        device: Device,
        micro_batch_size: int,
        console: Console,
    ) -> Forgetting | None:
        """None, with a warning, where the corpus cannot be had."""
        if corpus is None:
            console.warn(f"it is not known what {base.path} was trained on: forgetting is not measured")
            return None
        try:
            prepared = prepare(corpus, base.tokenizer, console)
        except LmkitError as error:
            console.warn(
                f"forgetting is not measured, since the text of {base.path} cannot be prepared: {error.problem}"
            )
            return None
        if "valid" not in prepared.splits:
            console.warn(f"forgetting is not measured, since {prepared.name} has no valid split")
            return None
        return cls(base.model, prepared, base.context, device, micro_batch_size)

    def measure_before(self, task: Task) -> None:
        """Score the model as it is now; to be called before the first step, or before a checkpoint is put back."""
        start = time.monotonic()
        self.before = self._score()
        self.seconds = time.monotonic() - start
        if isinstance(task, LanguageModelling):
            found = task.validate(
                device=self.device, micro_batch_size=self.micro_batch_size, progress=lambda _: None
            ).result
            self.task_before = {name: found[name] for name in SHOWN}

    def added_to(self, validation: Validation) -> Validation:
        """The last validation with the numbers before and after. Scores the model as it is now."""
        after = self._score()
        result = {"dataset": self.corpus.name, "split": "valid", "before": self.before, "after": after}
        name = f"{self.corpus.name}, which the base run learnt: valid perplexity per token"
        rows = [(name, _shown(self.before["token_ppl"], after["token_ppl"]))]
        if self.task_before is not None:
            found = validation.result
            result["new_corpus_before"] = self.task_before
            name = f"{found['dataset']}: valid perplexity per token"
            rows.insert(0, (name, _shown(self.task_before["token_ppl"], found["token_ppl"])))
        return replace(validation, result={**validation.result, "forgetting": result}, rows=[*validation.rows, *rows])

    def _score(self) -> dict[str, Any]:
        split = self.corpus.splits["valid"]
        whole = Segments.whole(len(split.tokens), self.corpus.tokenizer.eos_id)
        tally = perplexity(
            self.model,
            split.tokens,
            Reach(self.context, self.context).windows(whole),
            seq_len=max(self.context or 0, CARRIED_SEGMENT),
            batch_size=self.micro_batch_size,
            device=self.device,
        )
        found = summarize(tally, split)
        return {name: found[name] for name in SHOWN}


def _shown(before: float, after: float) -> str:
    change = 100 * (after / before - 1)
    return f"{format_number(before)} before, {format_number(after)} after ({change:+.1f} %)"

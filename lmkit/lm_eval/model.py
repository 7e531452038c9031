"""What lm-evaluation-harness asks of a model, answered by a run with lmkit's own scoring and sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from lmkit.config.evaluation import LmEvalWikitextProtocolConfig
from lmkit.config.generation import SamplingConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.training import ExistingRunConfig
from lmkit.console import Console
from lmkit.device import Device, resolve_device
from lmkit.errors import ConfigError
from lmkit.evaluation.plan import NO_PREFIX, Segments, Tokens, Windows, rolling, unbroken
from lmkit.evaluation.protocols import build_protocol
from lmkit.evaluation.scoring import TokenScores, score
from lmkit.generate import generate, read_prompt
from lmkit.loading import load_run

ARGUMENTS = ("run", "checkpoint", "adapter", "context", "batch_size", "max_batch_size", "device")
GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
BATCH_SIZE = 16
"""Where the harness is to choose one; it changes the speed, not the number."""
SEQ_LEN = 1024
"""Tokens per forward pass of a model with carried state; changes the speed, not the number."""
DEFAULT_DEVICE = "cuda:0"
"""What the harness says unless it is told otherwise; it means as much as device=auto."""
MAX_NEW_TOKENS = 256
"""Where a task does not say, as the harness's own models do it."""


class RunModel(LM):  # type: ignore[misc]
    """``--model lmkit --model_args run=DIR``. A text begins behind the run's end token, as in training."""

    def __init__(
        self,
        run: str | None = None,
        checkpoint: str = "best",
        adapter: str | None = None,
        context: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """run, checkpoint and adapter: as for eval-ppl; context: tokens that a prediction may see, by default what the
        run was trained on; device: cpu, cuda, cuda:1 or mps. max_batch_size is not used: nothing is tried out.

        Raises ConfigError for a value of the wrong kind, and what ``load_run`` raises.
        """
        super().__init__()
        given = batch_size is not None and not str(batch_size).startswith("auto")
        self.batch_size = _whole("batch_size", batch_size) if given else BATCH_SIZE
        self.where: Device = resolve_device(_device(device))
        self._device = self.where.torch_device
        stored = ExistingRunConfig(path=None if run is None else str(run), checkpoint=str(checkpoint))
        adapter = None if adapter is None else str(adapter)
        self.console = Console()
        self.loaded = load_run(stored, device=self.where, console=self.console, adapter=adapter)
        self.tokenizer = self.loaded.tokenizer
        self.reach = build_protocol(LmEvalWikitextProtocolConfig(), word_level=False).reach(
            None if context is None else _whole("context", context),
            None,
            self.loaded.context,
            self.loaded.model.context,
            carries_state=self.loaded.model_config.carries_state,
        )

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> RunModel:
        """The same from --model_args. Raises ConfigError for a name that it does not know."""
        unknown = [name for name in arg_dict if name not in ARGUMENTS]
        if unknown:
            raise ConfigError(f"model_args has {', '.join(unknown)}", f"it may have {', '.join(ARGUMENTS)}")
        more = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**(more | arg_dict))

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        return {
            "model_num_parameters": self.loaded.model.num_parameters(),
            "model_checkpoint": str(self.loaded.checkpoint),
            "model_sha": self.loaded.checkpoint_digest,
            "model_context": self.reach.context,
        }

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(sum of log p, whether each token is the most probable) of each continuation behind its context.

        A context longer than the model's is cut from the left. An empty continuation has probability one. Warns where
        words of the continuations are not in the vocabulary: each of them has the probability of the unknown word.
        """
        pairs = [self._split(*request.args) for request in requests]
        unknown = sum(int(np.count_nonzero(ids[at:] == self.tokenizer.unk_id)) for ids, at in pairs)
        if unknown:
            scored = sum(len(ids) - at for ids, at in pairs)
            self.console.warn(
                f"{unknown:,} of the {scored:,} tokens to be scored are not in the vocabulary (tokenizer="
                f"{self.tokenizer.kind}); each has the probability of the unknown one, whatever it was"
            )
        text = np.concatenate([ids for ids, _ in pairs]) if pairs else np.empty(0, dtype=np.int64)
        ends = np.cumsum([len(ids) for ids, _ in pairs])
        scores = self._score(text, self._continuations(pairs), disable_tqdm)
        answers = []
        for request, (ids, at), end in zip(requests, pairs, ends, strict=True):
            where = slice(int(end) - len(ids) + at, int(end))
            answer = (_log_probability(scores, where), bool(scores.correct_N[where].all()))
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
            answers.append(answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each text, in windows side by side, as eval-ppl protocol=lm-eval-wikitext cuts them.

        Raises ConfigError for a closed vocabulary, whose <unk> would make any text probable.
        """
        if self.tokenizer.ends_lines:
            raise ConfigError(
                f"perplexity of free text needs a run that can read any, not tokenizer={self.tokenizer.kind}",
                "use lmkit eval-ppl, or a run with subwords or bytes",
            )
        encoded = [self.tokenizer.encode(request.args[0]) for request in requests]
        text = np.concatenate(encoded) if encoded else np.empty(0, dtype=np.int64)
        ends_S = np.cumsum([len(ids) for ids in encoded], dtype=np.int64)
        segments = Segments(np.append(0, ends_S)[:-1], ends_S, self.tokenizer.eos_id)
        windows = unbroken(segments) if self.reach.context is None else rolling(segments, self.reach.context)
        scores = self._score(text, windows, disable_tqdm)
        answers = []
        for request, begin, end in zip(requests, segments.begins_S, segments.ends_S, strict=True):
            answers.append(_log_probability(scores, slice(int(begin), int(end))))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to a stop string, the end token, or so many tokens; greedily unless do_sample.

        Raises ConfigError for a generation argument that lmkit does not have.
        """
        answers = []
        for index, request in enumerate(tqdm(requests, desc="lmkit: texts", disable=disable_tqdm)):
            context, options = request.args[0], normalize_gen_kwargs(request.args[1], MAX_NEW_TOKENS)
            limit = options["max_gen_toks"]
            (sample,) = generate(
                self.loaded.model,
                self.tokenizer,
                read_prompt(self.tokenizer, context, context=self.reach.context, max_new_tokens=limit),
                sampling=_sampling(options),
                device=self.where,
                max_new_tokens=limit,
                stop=options["until"],
                prompt_index=index,
                context=self.reach.context,
            )
            self.cache_hook.add_partial("generate_until", request.args, sample.text)
            answers.append(sample.text)
        return answers

    def _split(self, context: str, continuation: str) -> tuple[Tokens, int]:
        """Ids of both together, and where the continuation begins among them.

        As the harness does it: blanks at the end of the context belong to the continuation. If the last token of the
        context reaches into the continuation, that token is the continuation's.
        """
        bare = context.rstrip()
        whole = self.tokenizer.encode(context + continuation)
        if bare == context + continuation:
            return whole, len(whole)
        return whole, max(0, min(len(self.tokenizer.encode(bare)), len(whole) - 1))

    def _continuations(self, pairs: Sequence[tuple[Tokens, int]]) -> Windows:
        """Windows that end with each text and score its continuation; one longer than a window takes several."""
        rows, begin = [], 0
        for ids, at in pairs:
            end, scored = begin + len(ids), begin + at
            length = self.reach.context or max(1, len(ids))
            while scored < end:
                last = min(end, scored + length)
                first = max(begin, last - length)
                rows.append((first, scored, last, self.tokenizer.eos_id if first == begin else NO_PREFIX))
                scored = last
            begin = end
        return Windows(*np.array(rows, dtype=np.int64).reshape(-1, 4).T)

    def _score(self, text: Tokens, windows: Windows, silent: bool) -> TokenScores:
        if len(text) == 0:
            return TokenScores(np.empty(0, dtype=np.float32), np.empty(0, dtype=np.bool_))
        with tqdm(total=windows.num_scored, desc="lmkit: tokens", disable=silent) as bar:
            return score(
                self.loaded.model,
                text,
                windows,
                seq_len=self.reach.context or SEQ_LEN,
                batch_size=self.batch_size,
                device=self.where,
                progress=_told(bar),
            )


def _told(bar: Any) -> Callable[[int], None]:
    """A progress bar as ``score`` tells it: how many tokens are done in all."""

    def tell(done: int) -> None:
        bar.update(done - bar.n)

    return tell


def _log_probability(scores: TokenScores, where: slice) -> float:
    return 0.0 - float(scores.nats_N[where].sum(dtype=np.float64))


def _sampling(options: Mapping[str, Any]) -> SamplingConfig:
    unknown = [name for name in options if name not in GENERATION]
    if unknown:
        raise ConfigError(f"generation_kwargs has {', '.join(unknown)}", f"it may have {', '.join(GENERATION)}")
    filters = {name: options[name] for name in ("top_k", "top_p", "min_p", "repetition_penalty") if name in options}
    temperature = float(options.get("temperature", 1.0)) if options["do_sample"] else 0.0
    return SamplingConfig(temperature=temperature, **filters)


def _whole(name: str, value: object) -> int:
    text = str(value)
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ConfigError(f"model_args {name}={value} must be a whole number >= 1")
    return int(text)


def _device(name: str | None) -> DeviceConfig:
    kind, _, index = ("auto" if name in (None, DEFAULT_DEVICE) else str(name)).partition(":")
    if kind not in DeviceType.__members__ or not (index == "" or (index.isascii() and index.isdigit())):
        raise ConfigError(f"device={name} is no device", f"use {', '.join(DeviceType.__members__)} or cuda:NUMBER")
    return DeviceConfig(type=DeviceType[kind], index=int(index) if index else None)

"""How others read and count a text: each protocol as windows over tokens, and one number made of the scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import StringIO
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lmkit.config.evaluation import (
    AwdLstmProtocolConfig,
    Gpt2PaperProtocolConfig,
    HfStridedProtocolConfig,
    LmEvalWikitextProtocolConfig,
    MikolovProtocolConfig,
    ProtocolConfig,
    SentenceProtocolConfig,
    StreamProtocolConfig,
    StripesProtocolConfig,
    TransformerXlProtocolConfig,
)
from lmkit.data.tokenfiles import Split
from lmkit.errors import ConfigError
from lmkit.evaluation.detokenize import count_words_lm_eval, gpt2_detokenize, wikitext_detokenize, wikitext_pages
from lmkit.evaluation.plan import (
    Indices,
    Reach,
    Segments,
    Tokens,
    Windows,
    check_window,
    rolling,
    strided,
    unbroken,
)
from lmkit.tokenizers import Tokenizer
from lmkit.tokenizers.lines import line_enders

ALL_SCORED = "given the end token"
FIRST_LEFT_OUT = "not scored"


@dataclass(frozen=True)
class Source:
    """A split, and a way to its text."""

    name: str
    """Short name of the corpus."""
    split_name: str
    split: Split
    tokenizer: Tokenizer
    read: Callable[[], str]
    """Reads the text of the split as it was before tokenization."""


@dataclass(frozen=True)
class Material:
    """A text as a protocol reads it. Counts are those of the original text."""

    tokens: Tokens
    document_ends: Indices
    """Offset in ``tokens`` after each document."""
    num_words: int
    """White-space separated words."""
    num_lines: int
    num_bytes: int
    num_chars: int
    changes: str
    """What was done to the text before tokenization, for people; empty: nothing."""
    words_of_documents: tuple[int, ...] = ()
    """Words of each document where the protocol counts them by document."""


@dataclass(frozen=True)
class Headline:
    """exp(nats / count), and per what that is."""

    per: str
    nats: float
    count: float


class Protocol(ABC):
    """One convention. ``first_token`` and ``reset`` say for people what its windows mean."""

    name: ClassVar[str]
    first_token: ClassVar[str] = ALL_SCORED
    reset: ClassVar[str] = "at the start of the text"
    """Where the model's memory begins anew."""
    never_carries_state: ClassVar[bool] = False
    """Models with carried state read windows, too."""

    def material(self, source: Source) -> Material:
        """The text to score; as it was prepared unless a protocol says otherwise."""
        split = source.split
        return Material(
            tokens=split.tokens,
            document_ends=np.asarray(split.document_ends, dtype=np.int64),
            num_words=split.num_words - split.num_lines,
            num_lines=split.num_lines,
            num_bytes=split.num_bytes,
            num_chars=split.num_chars,
            changes="",
        )

    def reach(
        self, context: int | None, stride: int | None, trained: int | None, limit: int | None, *, carries_state: bool
    ) -> Reach:
        """From the keys ``context`` and ``stride``, the sequence length of training and the longest that the model can
        read (None: any)."""
        if carries_state:
            if context is not None or stride is not None:
                raise ConfigError("context and stride do not apply to a run whose state carries the past", "omit them")
            return Reach(None, None)
        context = context or trained
        if context is None:
            raise ConfigError("the model's context is unbounded", "choose one with context=TOKENS")
        stride = stride or self.default_stride(context)
        check_window(context, stride, limit)
        return Reach(context, stride)

    def default_stride(self, context: int) -> int:
        """Half the context."""
        return max(1, context // 2)

    @abstractmethod
    def windows(self, material: Material, source: Source, reach: Reach) -> Windows:
        """What is scored and from what."""

    def num_stripes(self, source: Source) -> int | None:
        """How many stripes the split is cut into; None: into none."""
        return None

    def headline(self, nats_N: NDArray[np.float32], windows: Windows, material: Material) -> Headline:
        """The protocol's own number; per word, ends of line counted, unless it says otherwise."""
        return Headline("word, ends of line counted", _total(nats_N), float(material.num_words + material.num_lines))

    def weights(self, windows: Windows, num_tokens: int) -> NDArray[np.float64]:
        """(num_tokens,) what the nats of each token are multiplied by in the protocol's own number."""
        return np.ones(num_tokens)


class Stream(Protocol):
    """The text as one stream, every token scored once."""

    name = "stream"

    def windows(self, material: Material, source: Source, reach: Reach) -> Windows:
        return reach.windows(Segments.whole(len(material.tokens), source.tokenizer.eos_id))


class Mikolov(Stream):
    """Stream over word-level text (Mikolov et al. 2010): ends of line are scored and counted, so is <unk>."""

    name = "mikolov"


class Sentence(Protocol):
    """Each line on its own; tokens that end a document without being text are left out."""

    name = "sentence"
    reset = "at the start of each line"

    def material(self, source: Source) -> Material:
        material = super().material(source)
        if source.tokenizer.ends_lines:
            return material
        is_text_N = material.tokens != source.tokenizer.eos_id
        ends_D = np.append(0, np.cumsum(is_text_N))[material.document_ends]
        return replace(material, tokens=material.tokens[is_text_N], document_ends=ends_D)

    def windows(self, material: Material, source: Source, reach: Reach) -> Windows:
        is_end_N = line_enders(source.tokenizer)[material.tokens]
        if not is_end_N.any():
            kind = source.tokenizer.kind
            raise ConfigError(
                f"protocol=sentence: no token of the run's tokenizer ({kind}) ends a line", "use protocol=stream"
            )
        return reach.windows(Segments.ending_with(is_end_N, source.tokenizer.eos_id))


class Stripes(Protocol):
    """Equal stripes, the rest of the text left out, each stripe's first token only an input."""

    first_token = FIRST_LEFT_OUT
    reset = "at the start of each stripe"

    def __init__(self, config: StripesProtocolConfig) -> None:
        self.config = config

    def num_stripes(self, source: Source) -> int:
        return self.config.valid_stripes if source.split_name == "valid" else self.config.test_stripes

    def windows(self, material: Material, source: Source, reach: Reach) -> Windows:
        return reach.windows(Segments.stripes(len(material.tokens), self.num_stripes(source)))

    def headline(self, nats_N: NDArray[np.float32], windows: Windows, material: Material) -> Headline:
        return Headline("token scored", _total(nats_N), float(windows.num_scored))


class TransformerXl(Stripes):
    """Transformer-XL's eval.py: the mean over the tokens that are scored."""

    name = "transformer-xl"


class AwdLstm(Stripes):
    """AWD-LSTM's main.py: sums over the length - 1 targets of a stripe and divides by its length."""

    name = "awd-lstm"

    def headline(self, nats_N: NDArray[np.float32], windows: Windows, material: Material) -> Headline:
        in_stripes = int(windows.ends_W.max())
        return Headline("token, each stripe's unscored first one counted", _total(nats_N), float(in_stripes))


class HfStrided(Protocol):
    """The loop of Hugging Face's page on perplexity of fixed-length models: per token of the tokenizer.

    The mean of each window is weighted by its targets less one, whether or not the first of them was scored, as there.
    Rows are joined by two newlines before tokenization, as there, unless lines end in a token.
    """

    name = "hf-strided"
    first_token = FIRST_LEFT_OUT
    reset = "at the start of each window"
    never_carries_state = True

    def __init__(self, config: HfStridedProtocolConfig) -> None:
        self.config = config

    def material(self, source: Source) -> Material:
        material = super().material(source)
        if source.tokenizer.ends_lines:
            return material
        is_wikitext = source.name.startswith("wikitext")
        rows = [_hub_row(line, is_wikitext) for line in StringIO(source.read(), newline="\n")]
        tokens = source.tokenizer.encode("\n\n".join(rows))
        changes = "rows joined by two newlines"
        return replace(material, tokens=tokens, document_ends=np.array([len(tokens)]), changes=changes)

    def reach(
        self, context: int | None, stride: int | None, trained: int | None, limit: int | None, *, carries_state: bool
    ) -> Reach:
        context = context or min(self.config.max_length, trained or self.config.max_length)
        if context < 2:
            problem = f"context={context}: protocol=hf-strided scores no first token of a window"
            raise ConfigError(problem, "give 2 or more, or use protocol=stream")
        stride = stride or max(1, context * self.config.stride // self.config.max_length)
        check_window(context, stride, limit)
        return Reach(context, stride)

    def windows(self, material: Material, source: Source, reach: Reach) -> Windows:
        context = reach.context or self.config.max_length
        return strided(len(material.tokens), context, reach.stride or context)

    def headline(self, nats_N: NDArray[np.float32], windows: Windows, material: Material) -> Headline:
        weights_N = np.where(np.isnan(nats_N), 0.0, self.weights(windows, len(nats_N)))
        return Headline("token, windows weighted as in that loop", _total(nats_N * weights_N), float(weights_N.sum()))

    def weights(self, windows: Windows, num_tokens: int) -> NDArray[np.float64]:
        """Tokens of a window with n labels of which m are scored: (n - 1) / m; 0 where none is."""
        weights_N = np.zeros(num_tokens)
        labels_W = np.diff(windows.ends_W, prepend=0)
        for scored, end, num_labels in zip(windows.scored_W, windows.ends_W, labels_W, strict=True):
            if end > scored:
                weights_N[scored:end] = (num_labels - 1) / (end - scored)
        return weights_N


class LmEvalWikitext(Protocol):
    """Pages of WikiText, detokenised and scored one by one in windows side by side; per word of the original page."""

    name = "lm-eval-wikitext"
    reset = "at the start of each page"

    def material(self, source: Source) -> Material:
        _require_open_vocabulary(self.name, source.tokenizer)
        text = source.read()
        pages = wikitext_pages(text)
        encoded = [source.tokenizer.encode(wikitext_detokenize(page)) for page in pages]
        return replace(
            super().material(source),
            tokens=np.concatenate(encoded),
            document_ends=np.cumsum([len(ids) for ids in encoded]),
            num_bytes=sum(len(page.encode()) for page in pages),
            num_chars=sum(map(len, pages)),
            changes="cut into pages and detokenised as by lm-evaluation-harness",
            words_of_documents=tuple(map(count_words_lm_eval, pages)),
        )

    def default_stride(self, context: int) -> int:
        """Windows side by side."""
        return context

    def windows(self, material: Material, source: Source, reach: Reach) -> Windows:
        ends_S = material.document_ends
        segments = Segments(np.append(0, ends_S)[:-1], ends_S, source.tokenizer.eos_id)
        return unbroken(segments) if reach.context is None else rolling(segments, reach.context)

    def headline(self, nats_N: NDArray[np.float32], windows: Windows, material: Material) -> Headline:
        return Headline(
            "word as counted by lm-evaluation-harness", _total(nats_N), float(sum(material.words_of_documents))
        )


class Gpt2Paper(Stream):
    """Detokenised text as one stream, per word of the original text, ends of line counted (Radford et al. 2019)."""

    name = "gpt2-paper"

    def __init__(self, config: Gpt2PaperProtocolConfig) -> None:
        self.config = config

    def material(self, source: Source) -> Material:
        _require_open_vocabulary(self.name, source.tokenizer)
        text = gpt2_detokenize(source.read(), "ptb" if source.name == "ptb" else "wikitext")
        tokens = source.tokenizer.encode(text)
        return replace(
            super().material(source),
            tokens=tokens,
            document_ends=np.array([len(tokens)]),
            changes="detokenised as for GPT-2",
        )

    def default_stride(self, context: int) -> int:
        """That of the protocol, at most the context."""
        return min(self.config.stride, context)


def build_protocol(config: ProtocolConfig | None, *, word_level: bool) -> Protocol:
    """The protocol of a configuration; None: mikolov for word-level benchmark sets, else stream."""
    if config is None:
        return Mikolov() if word_level else Stream()
    if isinstance(config, AwdLstmProtocolConfig):
        return AwdLstm(config)
    if isinstance(config, TransformerXlProtocolConfig):
        return TransformerXl(config)
    if isinstance(config, HfStridedProtocolConfig):
        return HfStrided(config)
    if isinstance(config, LmEvalWikitextProtocolConfig):
        return LmEvalWikitext()
    if isinstance(config, Gpt2PaperProtocolConfig):
        return Gpt2Paper(config)
    plain: dict[type, type[Protocol]] = {
        StreamProtocolConfig: Stream,
        MikolovProtocolConfig: Mikolov,
        SentenceProtocolConfig: Sentence,
    }
    return plain[type(config)]()


def _hub_row(line: str, is_wikitext: bool) -> str:
    """A line as the row of the hub's table: WikiText keeps the newline but of blank lines, others have none."""
    if not is_wikitext:
        return line.removesuffix("\n")
    return line if line.strip() else ""


def _total(nats_N: NDArray[np.floating[Any]]) -> float:
    return float(np.nansum(nats_N, dtype=np.float64))


def _require_open_vocabulary(name: str, tokenizer: Tokenizer) -> None:
    if tokenizer.ends_lines:
        raise ConfigError(
            f"protocol={name} changes the text, which the closed vocabulary of tokenizer={tokenizer.kind} cannot read",
            "use protocol=mikolov, or a run with subwords or bytes",
        )


def describe(protocol: Protocol, reach: Reach, memory: str, limit: int | None) -> dict[str, Any]:
    """The part of the protocol block that windows and reach decide; ``memory``: what a carried state holds; ``limit``:
    the longest window that the model can read (None: any)."""
    if reach.context is not None:
        more = f" of the model's {limit}" if limit is not None and reach.context < limit else ""
        memory = f"windows of {reach.context}{more} tokens, stride {reach.stride}"
    return {
        "name": protocol.name,
        "first_token": protocol.first_token,
        "memory_starts": protocol.reset,
        "memory": memory,
        "context": reach.context,
        "stride": reach.stride,
    }

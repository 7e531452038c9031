"""Configuration of lmkit generate, and how the next token is drawn, there and wherever else a model writes text."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmkit.config.check import Problems
from lmkit.config.machine import DeviceConfig
from lmkit.config.training import ExistingRunConfig


@dataclass(kw_only=True)
class SamplingConfig:
    """How the next token is drawn. Filters apply in the order of the keys."""

    repetition_penalty: float = 1.0
    """Divide positive (multiply negative) logits of the prompt's tokens and of those generated, in a chat of those of
    the answer alone (> 0; 1: off; Keskar et al. 2019)."""
    temperature: float = 1.0
    """Divide the logits by this (>= 0); 0 is greedy."""
    top_k: int | None = None
    """Keep the k most probable tokens (>= 1); null: all."""
    top_p: float | None = None
    """Keep the smallest set of tokens whose probability reaches p (0 < p <= 1; Holtzman et al. 2020); null: all."""
    min_p: float | None = None
    """Keep tokens at least p times as probable as the best one (0 <= p <= 1); null: all."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.positive("sampling", self, "repetition_penalty")
            check.not_negative("sampling", self, "temperature")
            check.at_least(1, "sampling", self, "top_k", or_null=True)
            check(
                self.top_p is None or 0 < self.top_p <= 1,
                "sampling.top_p",
                self.top_p,
                "must be above 0 and at most 1, or null",
            )
            check(
                self.min_p is None or 0 <= self.min_p <= 1,
                "sampling.min_p",
                self.min_p,
                "must be between 0 and 1, or null",
            )


@dataclass(kw_only=True)
class VaeGenerateConfig:
    """What a sentence VAE writes instead of sentences from the prior."""

    reconstruct: str | None = None
    """Read this sentence, and write it again from its latent vector."""
    interpolate_from: str | None = None
    """Write sentences on the straight line from the latent vector of this sentence."""
    interpolate_to: str | None = None
    """To that of this one."""
    steps: int = 7
    """Sentences on the line, both ends included (>= 2)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.at_least(2, "vae", self, "steps")
            used = self.interpolate_from is not None or self.steps == VaeGenerateConfig.steps
            check(used, "vae.steps", self.steps, "needs vae.interpolate_from and vae.interpolate_to")
            check(
                (self.interpolate_from is None) == (self.interpolate_to is None),
                "vae.interpolate_to" if self.interpolate_to is None else "vae.interpolate_from",
                None,
                "is missing: give both ends",
            )


@dataclass(kw_only=True)
class GenerateConfig:
    """lmkit generate: continue a prompt. Text goes to stdout, everything else to stderr."""

    run: ExistingRunConfig = field(default_factory=ExistingRunConfig)
    """Run to generate with."""
    adapter: str | None = None
    """Folder of an adapter that was finetuned from the run, as in RUN/adapter; null: none."""
    max_new_tokens: int = 100
    """Tokens to generate per sample (>= 0); also -n N."""
    num_samples: int = 1
    """Samples per prompt (>= 1); also --num-samples N."""
    stop: list[str] = field(default_factory=list)
    """Stop strings: a sample ends before the first of them; also --stop TEXT, repeatable."""
    stop_at_eos: bool = True
    """End a sample at an end-of-document token (for ``word``: never, since <eos> only ends a line)."""
    stream: bool = True
    """Print the text as it is generated when there is one sample."""
    chat: bool = False
    """Take each prompt as what a user says to a run of task=instruct or prefer, and print the answers only."""
    interactive: bool = False
    """Read what the user says line by line and answer; also --chat without a prompt on a terminal."""
    system: str | None = None
    """System prompt of the conversation; null: that of the run; empty: none."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling."""
    vae: VaeGenerateConfig = field(default_factory=VaeGenerateConfig)
    """Sentence VAEs only."""
    device: DeviceConfig = field(default_factory=DeviceConfig)
    """Device."""
    seed: int = 1
    """Seed of sampling (>= 0); also --seed N."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        with Problems() as check:
            check.at_least(0, "", self, "max_new_tokens")
            check.at_least(1, "", self, "num_samples")
            chats = self.chat or self.interactive
            check(self.system is None or chats, "system", self.system, "needs --chat or --interactive")
            check.at_least(0, "", self, "seed")

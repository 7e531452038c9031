"""lmkit generate: continue prompts. The text goes to standard output, everything else to standard error."""

from __future__ import annotations

import sys
import time
from typing import Any

from lmkit.config.commands import GenerateConfig
from lmkit.console import Console, format_number
from lmkit.device import resolve_device
from lmkit.generate import generate, read_prompt
from lmkit.loading import load_run


def run(cfg: GenerateConfig, prompts: list[str]) -> list[dict[str, Any]]:
    """Continue each prompt ``num_samples`` times; prints prompt and continuation, and returns them.

    A single sample is printed as it is generated. Several are printed one after the other, each ended by a newline,
    with a line on standard error before each that says which it is.
    """
    console = Console()
    device = resolve_device(cfg.device)
    loaded = load_run(cfg.run, device=device, console=console)
    several = len(prompts) * cfg.num_samples > 1
    streams = cfg.stream and not several
    results = []
    num_tokens, start = 0, time.monotonic()
    for index, text in enumerate(prompts):
        prompt = read_prompt(loaded.tokenizer, text, context=loaded.model.context, max_new_tokens=cfg.max_new_tokens)
        if prompt.num_dropped:
            console.warn(
                f"the prompt is longer than the context of {loaded.model.context} tokens: its first"
                f" {prompt.num_dropped} tokens are not read"
            )
        if prompt.unknown:
            console.warn(f"not in the vocabulary, read as <unk>: {' '.join(prompt.unknown)}")
        if streams:
            _write(text)
        samples = generate(
            loaded.model,
            loaded.tokenizer,
            prompt,
            sampling=cfg.sampling,
            device=device,
            max_new_tokens=cfg.max_new_tokens,
            num_samples=cfg.num_samples,
            stop=cfg.stop,
            stop_at_eos=cfg.stop_at_eos,
            seed=cfg.seed,
            prompt_index=index,
            on_text=_write if streams else None,
        )
        for number, sample in enumerate(samples):
            num_tokens += sample.num_tokens
            results.append(
                {
                    "prompt": text,
                    "sample": number + 1,
                    "text": sample.text,
                    "num_tokens": sample.num_tokens,
                    "finish": sample.finish,
                }
            )
            if several:
                console.say(f"--- prompt {index + 1} of {len(prompts)}, sample {number + 1} of {cfg.num_samples}")
            _write("\n" if streams else f"{text}{sample.text}\n")
    seconds = time.monotonic() - start
    console.say(f"{num_tokens} tokens, {format_number(num_tokens / max(seconds, 1e-9))} tokens/s")
    return results


def _write(text: str) -> None:
    """Write to standard output as UTF-8, whatever the locale says, and at once."""
    buffer = getattr(sys.stdout, "buffer", None)
    if buffer is None:
        sys.stdout.write(text)
    else:
        sys.stdout.flush()
        buffer.write(text.encode("utf-8", "replace"))
    sys.stdout.flush()

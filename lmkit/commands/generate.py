"""lmkit generate: continue prompts. The text goes to standard output, everything else to standard error."""

from __future__ import annotations

import time
from typing import Any

from lmkit.commands import generate_vae
from lmkit.commands.chat import Chat, answer_prompts, check_words, converse
from lmkit.commands.output import write_text
from lmkit.config.generation import GenerateConfig
from lmkit.console import Console, format_number, plural
from lmkit.device import resolve_device
from lmkit.generate import generate, read_prompt, warn_of_unknown
from lmkit.loading import load_run


def run(cfg: GenerateConfig, prompts: list[str]) -> list[dict[str, Any]]:
    """Continue each prompt ``num_samples`` times; prints prompt and continuation, and returns them.

    A single sample is printed as it is generated, unless ``stream`` is false. Several are printed one after the other,
    each ended by a newline, with a line on standard error before each that says which it is.
    """
    chats = cfg.chat or cfg.interactive
    if chats:
        check_words(cfg, prompts)
    console = Console()
    device = resolve_device(cfg.device)
    loaded = load_run(cfg.run, device=device, console=console, adapter=cfg.adapter, latent=True)
    if loaded.model_config.objective == "vae":
        return generate_vae.run(cfg, loaded, prompts, device, console)
    generate_vae.refuse(cfg, loaded)
    if chats:
        chat = Chat.begin(cfg, loaded, device, console)
        return answer_prompts(chat, prompts) if prompts else converse(chat)
    several = len(prompts) * cfg.num_samples > 1
    streams = cfg.stream and not several
    results: list[dict[str, Any]] = []
    stop = [*cfg.stop, "\n"] if loaded.model_config.objective == "gan" else cfg.stop  # it learnt single sentences
    start = time.monotonic()
    for index, text in enumerate(prompts):
        prompt = read_prompt(loaded.tokenizer, text, context=loaded.context, max_new_tokens=cfg.max_new_tokens)
        if prompt.num_dropped:
            console.warn(
                f"the prompt does not fit into the context of {loaded.context} tokens together with what is to be"
                f" generated: its first {prompt.num_dropped} tokens are not read"
            )
        warn_of_unknown(loaded.tokenizer, prompt.text, console)
        if streams:
            write_text(prompt.text)
        samples = generate(
            loaded.model,
            loaded.tokenizer,
            prompt,
            sampling=cfg.sampling,
            device=device,
            max_new_tokens=cfg.max_new_tokens,
            num_samples=cfg.num_samples,
            stop=stop,
            stop_at_eos=cfg.stop_at_eos,
            seed=cfg.seed,
            prompt_index=index,
            context=loaded.context,
            on_text=write_text if streams else None,
        )
        for number, sample in enumerate(samples, start=1):
            results.append({"prompt": prompt.text, "sample": number, **vars(sample)})
            if several:
                console.say(f"--- prompt {index + 1} of {len(prompts)}, sample {number} of {cfg.num_samples}")
            write_text("\n" if streams else f"{prompt.text}{sample.text}\n")
    seconds = time.monotonic() - start
    num_tokens = sum(result["num_tokens"] for result in results)
    console.say(f"{plural(num_tokens, 'token')}, {format_number(num_tokens / max(seconds, 1e-9))} tokens/s")
    return results

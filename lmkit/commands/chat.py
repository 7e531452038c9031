"""lmkit generate --chat and --interactive: a conversation with a run that was finetuned for conversations."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lmkit.commands.output import write_text
from lmkit.config.generation import GenerateConfig
from lmkit.console import Console
from lmkit.data.chat import ChatTemplate, Conversation, Turn
from lmkit.device import Device
from lmkit.errors import ConfigError
from lmkit.generate import Prompt, Sample, generate, last_to_read, warn_of_unknown
from lmkit.loading import LoadedRun
from lmkit.tasks.chat import template_of_run

HELP = "/reset begins anew, /exit or the end of the input leaves, Ctrl-C stops an answer"


@dataclass
class Chat:
    """A conversation that goes on turn by turn; every answer depends on (seed, its number) and what was said."""

    cfg: GenerateConfig
    loaded: LoadedRun
    template: ChatTemplate
    device: Device
    console: Console
    turns: list[Turn] = field(default_factory=list)
    num_asked: int = 0

    @classmethod
    def begin(cls, cfg: GenerateConfig, loaded: LoadedRun, device: Device, console: Console) -> Chat:
        """Raises ConfigError if the run knows no template."""
        template = template_of_run(loaded)
        if template is None:
            raise ConfigError(
                f"{loaded.path} was not finetuned for conversations",
                "leave out --chat, or make a run with lmkit finetune task=instruct task.data=FILE",
            )
        system = template.system if cfg.system is None else cfg.system
        return cls(cfg, loaded, replace(template, system=system), device, console)

    def answer(self, text: str, on_text: Callable[[str], None] | None) -> list[Sample]:
        """Samples of an answer to what the user says now. The first is what the conversation goes on with."""
        tokenizer, cfg = self.loaded.tokenizer, self.cfg
        if self.template.content(text, tokenizer) != text and not tokenizer.ends_lines:
            self.console.warn("the prompt holds words of the chat template: a blank was put into each")
        samples = generate(
            self.loaded.model,
            tokenizer,
            self._prompt(text),
            sampling=cfg.sampling,
            device=self.device,
            max_new_tokens=cfg.max_new_tokens,
            num_samples=cfg.num_samples,
            stop=[*cfg.stop, "\n"] if tokenizer.ends_lines else cfg.stop,
            stop_at_eos=cfg.stop_at_eos,
            seed=cfg.seed,
            prompt_index=self.num_asked,
            context=self.loaded.context,
            on_text=on_text,
        )
        self.say(text, samples[0].text)
        return samples

    def say(self, prompt: str, response: str) -> None:
        """Remember a turn."""
        self.turns.append(Turn(prompt, response))
        self.num_asked += 1

    def _prompt(self, text: str) -> Prompt:
        """What the model reads: as many of the last turns as fit, so that half of the context is left to answer in."""
        tokenizer, context = self.loaded.tokenizer, self.loaded.context
        ids = self._ids(text)
        while self.turns and context is not None and len(ids) + min(self.cfg.max_new_tokens, context // 2) > context:
            self.console.warn(f"the conversation is longer than the context of {context}: its first turn is forgotten")
            del self.turns[0]
            ids = self._ids(text)
        kept = ids
        if context is not None and len(ids) > context:
            kept = last_to_read(ids, context, self.cfg.max_new_tokens)
        if dropped := len(ids) - len(kept):
            self.console.warn(f"the prompt does not fit into the context of {context}: {dropped} tokens are not read")
        warn_of_unknown(tokenizer, text, self.console)
        # no text_ids: sampling.repetition_penalty must not keep an answer from the words of what was asked
        return Prompt(text, kept, [], dropped)

    def _ids(self, text: str) -> list[int]:
        return self.template.encode_prompt(Conversation(tuple(self.turns)), text, self.loaded.tokenizer)


def check_words(cfg: GenerateConfig, prompts: Sequence[str]) -> None:
    """Raises ConfigError for words of --chat and --interactive that do not fit together, whatever the run."""
    if cfg.interactive and prompts:
        raise ConfigError("--interactive reads the prompts itself", "leave out --prompt, or use --chat")
    if not (prompts or cfg.interactive or sys.stdin.isatty()):
        raise ConfigError("--chat needs --prompt TEXT", "write --interactive to read lines from standard input")
    if cfg.num_samples > 1 and not prompts:
        raise ConfigError(f"num_samples={cfg.num_samples} has no use with --interactive", "leave it out")
    if cfg.num_samples > 1 and len(prompts) > 1:
        raise ConfigError(
            f"num_samples={cfg.num_samples}: with {len(prompts)} prompts it is open which answer goes on",
            "ask for one sample, or give one prompt",
        )


def answer_prompts(chat: Chat, prompts: list[str]) -> list[dict[str, Any]]:
    """Answer each prompt as the next turn of one conversation; only the answers go to standard output."""
    results: list[dict[str, Any]] = []
    streams = chat.cfg.stream and chat.cfg.num_samples == 1
    for prompt in prompts:
        for number, sample in enumerate(chat.answer(prompt, write_text if streams else None), start=1):
            results.append({"prompt": prompt, "sample": number, **vars(sample)})
            if chat.cfg.num_samples > 1:
                chat.console.say(f"--- sample {number} of {chat.cfg.num_samples}")
            write_text("\n" if streams else f"{sample.text}\n")
    return results


def converse(chat: Chat) -> list[dict[str, Any]]:
    """Read lines from standard input and answer each, until /exit or the end of the input; returns the answers."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    chat.console.say(HELP)
    results: list[dict[str, Any]] = []
    while (line := _read_line(chat.console)) is not None:
        if line.strip() == "/exit":
            break
        if line.strip() == "/reset":
            chat.turns.clear()
            chat.console.say("a new conversation")
        elif line.strip():
            results.append(_answer_line(chat, line))
    return results


def _answer_line(chat: Chat, line: str) -> dict[str, Any]:
    """Answer a line as the text grows; what was said until Ctrl-C stays part of the conversation."""
    said: list[str] = []

    def on_text(text: str) -> None:
        said.append(text)
        write_text(text)

    try:
        (sample,) = chat.answer(line, on_text)
    except KeyboardInterrupt:
        sample = Sample("".join(said), 0, "interrupted")
        chat.say(line, sample.text)
        chat.console.say()
        chat.console.say("stopped")
    write_text("\n")
    return {"prompt": line, "sample": 1, **vars(sample)}


def _read_line(console: Console) -> str | None:
    """The next line without its end; None at the end of the input. Ctrl-C at the prompt asks again."""
    asks = sys.stdin.isatty()
    while True:
        try:
            if asks:
                _load_line_editing()
                return input("> " if sys.stdout.isatty() else "")
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not asks:
                raise
            console.say()
            console.say(HELP)


def _load_line_editing() -> None:
    """Arrow keys and history at the prompt, where Python has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() uses it once it is loaded

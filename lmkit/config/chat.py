"""Configuration of ``task=instruct`` and ``task=prefer``: conversations and how they are written as text."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lmkit.config.check import Problems
from lmkit.config.tasks import TaskConfig

TEMPLATES = {
    "plain": ("{prompt}\n{response}\n", "{system}\n"),
    "chatml": (
        "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{response}\n",
        "<|im_start|>system\n{system}<|im_end|>\n",
    ),
    "alpaca": ("### Instruction:\n{prompt}\n\n### Response:\n{response}\n\n", "{system}\n\n"),
    "llama2": ("[INST] {prompt} [/INST]\n{response}\n", "<<SYS>>\n{system}\n<</SYS>>\n\n"),
}
"""Built-in templates by name: the text of a turn, the text of the system prompt."""


class TooLong(Enum):
    """What to do with an example of more than ``train.seq_len`` tokens."""

    error = "error"
    drop = "drop"
    left = "left"
    right = "right"


@dataclass(kw_only=True)
class ChatTaskConfig(TaskConfig):
    """Base of the tasks whose examples are conversations. Answers end in the tokenizer's end token."""

    data: str = "???"
    """Conversations to learn from: a .jsonl, .json, .csv or .tsv file, or hub:NAME (split train)."""
    valid: str | None = None
    """Conversations to judge on: a file, or hub:NAME (split validation); null: ``valid_fraction`` of the data."""
    valid_fraction: float = 0.05
    """Share of the conversations, by a hash of their text, held out where ``valid`` is null (above 0 to 0.5)."""
    prompt: str = "prompt"
    """Column of what the user says."""
    system: str | None = None
    """System prompt that every conversation begins with; null: none, or that of the run started from."""
    template: str | None = None
    """plain, chatml, alpaca, llama2, or a text with {prompt} and {response}; null: that of the run, else plain."""
    system_template: str | None = None
    """Text around {system}, for a template of your own; null: the built-in's, or a line."""
    truncation: TooLong = TooLong.error
    """Examples longer than train.seq_len: error, drop them, or cut them at the left (start) or right (end)."""

    def __post_init__(self) -> None:
        with Problems() as check:
            held_out = self.valid_fraction
            check(0 < held_out <= 0.5, "task.valid_fraction", held_out, "must be above 0 and at most 0.5")
            check(
                self.template is None or self.template in TEMPLATES or _is_turn(self.template),
                "task.template",
                self.template,
                f"must be {', '.join(TEMPLATES)}, or a text that holds {{prompt}} and after it {{response}}, each once",
            )
            check(
                self.system_template is None or self.system_template.count("{system}") == 1,
                "task.system_template",
                self.system_template,
                "must hold {system} once",
            )
            self._check(check)

    def _check(self, check: Problems) -> None:
        """Checks of the subclass, reported together with those of the base."""


def _is_turn(text: str) -> bool:
    once = text.count("{prompt}") == text.count("{response}") == 1
    return once and text.index("{prompt}") < text.index("{response}")


@dataclass(kw_only=True)
class InstructTaskConfig(ChatTaskConfig):
    """Answers to prompts and in conversations: the loss counts the answers only."""

    response: str = "response"
    """Column of the answer."""
    messages: str | None = None
    """Column of a conversation, a list of {role, content}, in place of prompt and response; null: none."""
    packing: bool = True
    """Put several examples into one row, none of which sees another; models that carry a state take one a row."""
    exact_match: int = 200
    """Answer at most this many valid conversations greedily and count those answered word for word (>= 0); not those
    whose last answer task.truncation cut."""

    def _check(self, check: Problems) -> None:
        check.at_least(0, "task", self, "exact_match")


@dataclass(kw_only=True)
class PreferTaskConfig(ChatTaskConfig):
    """Of two answers the chosen one: direct preference optimization (DPO; Rafailov et al. 2023)."""

    chosen: str = "chosen"
    """Column of the better answer."""
    rejected: str = "rejected"
    """Column of the worse answer."""
    beta: float = 0.1
    """How closely the model is held to the run it starts from (> 0)."""
    label_smoothing: float = 0.0
    """Share of the pairs taken to be the wrong way round (0 to below 0.5)."""
    sft_weight: float = 0.0
    """Weight of the chosen answer's nats per token in the loss of its pair (>= 0)."""

    def _check(self, check: Problems) -> None:
        check.positive("task", self, "beta")
        share = self.label_smoothing
        check(0 <= share < 0.5, "task.label_smoothing", share, "must be at least 0 and below 0.5")
        check.not_negative("task", self, "sft_weight")
        check(self.chosen != self.rejected, "task.rejected", self.rejected, "must be another column than task.chosen")

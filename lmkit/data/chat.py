"""Conversations as tokens: chat templates, and which tokens are an answer.

A template is the text of one turn with ``{prompt}`` and ``{response}``; a conversation is the system text and then turn
after turn. It is filled in by plain replacement, so no text can run code. Every answer ends in the tokenizer's end
token, which no text encodes to: that token, not the words of the template, is what ends a turn. What stands behind
``{response}`` in the template leads over to the next turn and is never learnt.

So that a prompt cannot look like a turn of its own, a blank is put into each marker of the template that it holds:
``<|im_end|>`` becomes ``< |im_end|>``, in training and in generation alike. Word tokenizers, whose end token ends a
line, read the line ends inside a prompt or answer as blanks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from lmkit.config.chat import TEMPLATES, ChatTaskConfig
from lmkit.tokenizers import Tokenizer

_PLACES = re.compile(r"\{(?:prompt|response|system)\}")


@dataclass(frozen=True)
class Turn:
    """What the user said and what was answered."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Conversation:
    """A system prompt, if any, and turns."""

    turns: tuple[Turn, ...]
    system: str | None = None


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model reads it: ids[0] is the end token, with which every text begins."""

    ids: list[int]
    learnt: list[bool]
    """Whether each id is of an answer, its end token included."""
    cut: bool = field(default=False, compare=False)
    """Whether its start or its end was left out, so that it fits."""


@dataclass(frozen=True)
class ChatTemplate:
    """How conversations are written."""

    turn: str
    """Text of a turn, with {prompt} and {response}."""
    around_system: str
    """Text of the system prompt, with {system}."""
    system: str | None = None
    """System prompt of conversations that bring none."""

    @classmethod
    def of(cls, config: ChatTaskConfig) -> ChatTemplate:
        """The template of a task; ``template`` null is ``plain``."""
        name = config.template or "plain"
        turn, around_system = TEMPLATES.get(name, (name, "{system}\n"))
        return cls(turn, config.system_template or around_system, config.system)

    @cached_property
    def markers(self) -> list[str]:
        """Words of the template that content must not hold: at least two characters, not all of them letters, digits
        or blanks."""
        pieces = [
            line.strip() for text in (self.turn, self.around_system) for line in _PLACES.sub("\n", text).split("\n")
        ]
        return [p for p in dict.fromkeys(pieces) if len(p) > 1 and not all(c.isalnum() or c.isspace() for c in p)]

    def content(self, text: str, tokenizer: Tokenizer) -> str:
        """A prompt, answer or system prompt as it is read: no marker of the template is left in it."""
        if not tokenizer.ends_lines:
            return _broken(text, self.markers)
        return _broken(" ".join(text.split()), [" ".join(marker.split()) for marker in self.markers])

    def encode(self, conversation: Conversation, tokenizer: Tokenizer) -> Encoded:
        """The tokens of a conversation and which of them are learnt."""
        ids, learnt = [tokenizer.eos_id], [False]
        for number, turn in enumerate(conversation.turns):
            before = self._before_answer(conversation, number, tokenizer)
            answer = [*self._ids(self.content(turn.response, tokenizer), tokenizer), tokenizer.eos_id]
            ids += before + answer
            learnt += [False] * len(before) + [True] * len(answer)
        return Encoded(ids, learnt)

    def encode_prompt(self, conversation: Conversation, prompt: str, tokenizer: Tokenizer) -> list[int]:
        """The tokens up to where the answer to ``prompt`` begins, behind the turns of the conversation."""
        longer = Conversation((*conversation.turns, Turn(prompt, "")), conversation.system)
        return self.encode(longer, tokenizer).ids[:-1]

    def _before_answer(self, conversation: Conversation, number: int, tokenizer: Tokenizer) -> list[int]:
        """What stands between the end of the answer before (or the start) and an answer."""
        ahead, _, behind = self.turn.partition("{response}")
        prompt = self.content(conversation.turns[number].prompt, tokenizer)
        text = ahead.replace("{prompt}", prompt)
        system = self.system if conversation.system is None else conversation.system
        if number > 0:
            text = (behind.removeprefix("\n") if tokenizer.ends_lines else behind) + text
        elif system:
            text = self.around_system.replace("{system}", self.content(system, tokenizer)) + text
        return self._ids(text, tokenizer)

    def _ids(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """Token ids; without end tokens where these do more than end a line."""
        ids = [int(i) for i in tokenizer.encode(text)]
        return ids if tokenizer.ends_lines else [i for i in ids if i != tokenizer.eos_id]


def _broken(text: str, markers: Sequence[str]) -> str:
    """The text with a blank in the first word of two characters or more of each marker in it."""
    while found := [marker for marker in markers if marker in text]:
        for marker in found:
            word = re.search(r"\S\S", marker)  # more blanks between words are nothing new to a word tokenizer
            cut = 1 if word is None else word.start() + 1
            text = text.replace(marker, f"{marker[:cut]} {marker[cut:]}")
    return text


def answers_of(encoded: Encoded) -> list[tuple[int, int]]:
    """(start, end) of each answer in the ids, its end token included."""
    edges = [0, *(i for i, (a, b) in enumerate(pairwise(encoded.learnt), start=1) if a != b), len(encoded.ids)]
    return [(start, end) for start, end in pairwise(edges) if encoded.learnt[start]]


def has_whole_answer(encoded: Encoded, eos_id: int) -> bool:
    """Whether the last answer was not cut, and something of what it answers is left."""
    start, end = answers_of(encoded)[-1]
    return not encoded.cut or (start > 1 and encoded.ids[end - 1] == eos_id)

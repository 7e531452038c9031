"""The words of a conversation reach generate as they were written."""

from __future__ import annotations

from typing import Any


def test_a_chat_without_a_prompt_has_none(lmkit: Any) -> None:
    assert lmkit("generate", "--chat", "--interactive") == 0
    assert lmkit.prompts == [[]]
    assert (lmkit.configs[0].chat, lmkit.configs[0].interactive) == (True, True)


def test_each_prompt_of_a_chat_is_kept(lmkit: Any) -> None:
    assert lmkit("generate", "--chat", "--prompt", "a", "-p", "{b}", "--system", "be, kind = good") == 0
    assert lmkit.prompts == [["a", "{b}"]]
    assert lmkit.configs[0].system == "be, kind = good"


def test_a_template_is_text(lmkit: Any) -> None:
    text = "Q: {prompt}, [x]\nA: {response}\n"
    assert lmkit.config("finetune", "task=instruct", "task.data=d.jsonl", f"task.template={text}").task.template == text
    assert "must be plain, chatml" in lmkit.refused("finetune", "task=instruct", "task.data=d", "task.template=chat")


def test_a_task_needs_its_data(lmkit: Any) -> None:
    for task in ("instruct", "prefer"):
        assert "task.data must be given" in lmkit.refused("finetune", f"task={task}")

"""task=instruct and task=prefer from a raw file to answers: learning, resuming, chatting, and what is refused."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import pretrain_small
from stopping import assert_same, signal_after, tensors_in

from lmkit import cli
from lmkit.commands import chat, finetune
from lmkit.commands.replay import replay
from lmkit.config.adapter import AdapterConfig
from lmkit.config.chat import ChatTaskConfig, InstructTaskConfig, PreferTaskConfig, TooLong
from lmkit.config.commands import FinetuneConfig
from lmkit.config.data import ByteTokenizerConfig, PydocsConfig, TextConfig, TokenizerConfig, WordTokenizerConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import ModelConfig, RecurrentConfig, TransformerConfig
from lmkit.config.optimization import AdamwConfig, CosineConfig
from lmkit.config.softmax import SoftmaxConfig
from lmkit.config.training import EvalConfig, LogConfig, RunConfig, TrainConfig
from lmkit.console import Console
from lmkit.errors import DataError, StoppedError
from lmkit.store.checkpoint import latest_checkpoint, load_checkpoint
from lmkit.store.found import read_metrics

CPU = DeviceConfig(type=DeviceType.cpu, threads=1)
MODELS: dict[str, ModelConfig] = {
    "transformer": TransformerConfig(d_model=32, num_layers=2, num_heads=2, context=64, dropout=0.1),
    "lstm": RecurrentConfig(d_embed=48, d_hidden=96, num_layers=1, dropout_recurrent=0.1),
    "memory": TransformerConfig(d_model=32, num_layers=2, num_heads=2, context=64, memory_tokens=32),
}
ANSWERS = {"cat": "a mat", "dog": "under the tree", "bird": "flew", "the": "cat ran", "sat": "on a mat", "ran": "bird"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Path]:
    """A run of each model with byte tokens, and one with word tokens; hardly trained."""
    root = tmp_path_factory.mktemp("bases")
    made = {}
    wanted: list[tuple[str, ModelConfig, TokenizerConfig]] = [
        *((name, model, ByteTokenizerConfig()) for name, model in MODELS.items()),
        ("word", MODELS["transformer"], WordTokenizerConfig()),
    ]
    for name, model, tokenizer in wanted:
        train = TrainConfig(batch_size=4, seq_len=32, max_steps=4)
        pretrain_small(root / name, TextConfig(path=str(corpus)), model, tokenizer, train, lr=3e-3)
        made[name] = root / name
    return made


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def questions(tmp_path: Path) -> str:
    return write_rows(tmp_path / "d.jsonl", [{"prompt": p, "response": r} for p, r in ANSWERS.items()])


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rows = [{"prompt": p, "chosen": r, "rejected": r[::-1]} for p, r in ANSWERS.items()]
    return write_rows(tmp_path / "p.jsonl", rows)


def tuning(task: ChatTaskConfig, base: Path, run: Path, *, lr: float = 3e-3, **train: Any) -> FinetuneConfig:
    return FinetuneConfig(
        task=task,
        dataset=PydocsConfig(),
        optimizer=AdamwConfig(lr=lr),
        schedule=CosineConfig(),
        device=CPU,
        train=TrainConfig(**{"batch_size": 4, "seq_len": 48, "max_steps": 12, **train}),
        eval=EvalConfig(every_steps=4),
        log=LogConfig(every_steps=1),
        run=RunConfig(path=str(base), dir=str(run), root=str(run.parent)),
    )


def answers(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What lmkit generate prints."""
    capsys.readouterr()
    assert cli.main(["generate", *words, "--temperature", "0", "device=cpu", "device.threads=1"]) == 0
    return capsys.readouterr().out


# Runs


@pytest.mark.parametrize("name", ["transformer", "lstm", "prefer"])
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bytes(
    name: str, bases: dict[str, Path], questions: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task: ChatTaskConfig = InstructTaskConfig(data=questions, exact_match=2)
    if name == "prefer":
        task = PreferTaskConfig(data=pairs, sft_weight=0.1, label_smoothing=0.1)
    base = bases.get(name, bases["transformer"])
    finetune.run(tuning(task, base, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        signal_after(patch, 5)
        with pytest.raises(StoppedError):
            finetune.run(tuning(task, base, tmp_path / "pieces", micro_batch_size=4))
    finetune.run(replace(tuning(task, base, tmp_path / "pieces"), resume=True))
    assert_same(tensors_in(tmp_path / "whole"), tensors_in(tmp_path / "pieces"))


def test_validation_and_greedy_answers_do_not_change_what_is_learnt(
    bases: dict[str, Path], questions: str, tmp_path: Path
) -> None:
    task = InstructTaskConfig(data=questions)
    finetune.run(tuning(task, bases["transformer"], tmp_path / "often"))
    rarely = tuning(replace(task, exact_match=0), bases["transformer"], tmp_path / "rarely")
    finetune.run(replace(rarely, eval=EvalConfig(every_steps=12)))
    assert_same(tensors_in(tmp_path / "often"), tensors_in(tmp_path / "rarely"))


def test_a_step_is_replayed_with_the_loss_of_the_run(bases: dict[str, Path], questions: str, tmp_path: Path) -> None:
    finetune.run(tuning(InstructTaskConfig(data=questions), bases["transformer"], tmp_path / "run"))
    found = replay(tmp_path / "run", 7, Console())
    logged = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row}
    assert found["loss"] == logged[7]
    for row in found["rows"]:
        learnt = "".join(chr(i) if i < 256 else "|" for i in row["ids"]).split("|")[:-1]
        assert set(learnt) <= set(ANSWERS.values())
        assert all(answer in row["text"] for answer in learnt)
    total = sum(row["nats_per_token"] * len(row["ids"]) for row in found["rows"])
    assert total / found["num_targets"] == pytest.approx(found["loss"], rel=1e-4)


# Learning and answering


@pytest.mark.parametrize("name", ["transformer", "lstm", "memory", "word"])
def test_from_a_file_to_answers_on_the_command_line(
    name: str, bases: dict[str, Path], questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"{tmp_path / 'run'}"
    words = [f"run={bases[name]}", f"run.dir={run}", "device=cpu", "device.threads=1", "optimizer.lr=1e-2"]
    task = [f"task.data={questions}", f"task.valid={questions}", "task.template=llama2"]
    steps = 300 if name == "lstm" else 200
    shape = ["train.seq_len=64", "train.batch_size=6", f"train.max_steps={steps}", f"eval.every_steps={steps}"]
    assert cli.main(["finetune", "task=instruct", *task, *words, *shape]) == 0
    shown = capsys.readouterr().err
    assert "valid exact match, greedy" in shown
    # [INST] is no word of the corpus
    assert ("6 prompts hold text that the tokenizer does not know" in shown) is (name == "word")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["exact_match"] == 1.0
    assert result["num_answered"] == 6
    assert result["answer_ppl"] == pytest.approx(math.exp(result["answer_nats"] / result["num_answer_tokens"]))
    for prompt, answer in ANSWERS.items():
        assert answers(capsys, f"run={run}", "--chat", "--prompt", prompt) == f"{answer}\n"
    both = answers(capsys, f"run={run}", "--chat", "--prompt", "cat", "-n", "20", "num_samples=2")
    assert both == "a mat\na mat\n"


def test_answers_that_were_cut_are_not_asked_for_word_for_word(
    bases: dict[str, Path], questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = InstructTaskConfig(data=questions, valid=questions, truncation=TooLong.right)
    cfg = tuning(task, bases["transformer"], tmp_path / "run", lr=1e-2, seq_len=12, batch_size=6, max_steps=200)
    result = finetune.run(replace(cfg, eval=EvalConfig(every_steps=200)))
    assert (result["exact_match"], result["num_answered"], result["num_answers_cut"]) == (1.0, 4, 2)
    shown = capsys.readouterr().err
    assert "valid: 2 of 6 answers were cut (task.truncation): exact match leaves them out" in shown
    assert "4 of 4 (2 cut ones left out)" in shown


def test_an_answer_of_unknown_words_is_no_exact_match(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"prompt": p, "response": "zwölf Boxkämpfer" if p == "cat" else r} for p, r in ANSWERS.items()]
    path = write_rows(tmp_path / "d.jsonl", rows)
    task = InstructTaskConfig(data=path, valid=path)
    cfg = tuning(task, bases["word"], tmp_path / "run", lr=1e-2, seq_len=32, batch_size=6, max_steps=200)
    result = finetune.run(replace(cfg, eval=EvalConfig(every_steps=200)))
    assert result["answer_accuracy"] == 1.0
    assert (result["exact_match"], result["num_answered"]) == (5 / 6, 6)


def test_the_dataset_of_the_first_run_stays_that_of_the_tuned_one(
    bases: dict[str, Path], questions: str, tmp_path: Path
) -> None:
    task = InstructTaskConfig(data=questions, template="Q {prompt} A {response}.", system="be kind")
    finetune.run(tuning(task, bases["transformer"], tmp_path / "run", max_steps=2))
    stored = load_checkpoint(latest_checkpoint(tmp_path / "run", pytest.fail), with_optimizer=False).config  # type: ignore[arg-type]
    assert stored["dataset"]["kind"] == "text"
    assert stored["task"]["template"] == "Q {prompt} A {response}."


def test_preferences_take_over_the_template_and_are_learnt(
    bases: dict[str, Path], questions: str, pairs: str, tmp_path: Path
) -> None:
    task = InstructTaskConfig(data=questions, template="Q {prompt} A {response}.", system="be kind")
    finetune.run(tuning(task, bases["transformer"], tmp_path / "first", max_steps=2))
    prefer = tuning(PreferTaskConfig(data=pairs, valid=pairs), tmp_path / "first", tmp_path / "second", max_steps=60)
    result = finetune.run(prefer)
    stored = load_checkpoint(latest_checkpoint(tmp_path / "second", pytest.fail), with_optimizer=False).config  # type: ignore[arg-type]
    assert (stored["task"]["template"], stored["task"]["system"]) == ("Q {prompt} A {response}.", "be kind")
    first = next(row["loss"] for row in read_metrics(tmp_path / "second") if "loss" in row)
    assert first == pytest.approx(math.log(2), abs=1e-5)
    assert result["reward_accuracy"] == 1.0
    assert result["reward_margin"] > 0.5
    assert result["preference_loss"] < 0.5


def test_the_template_that_is_taken_over_is_stored_by_several_processes_too(
    bases: dict[str, Path], questions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which one process plays: where there are several, what is set up has a configuration of its own."""
    task = InstructTaskConfig(data=questions, template="Q {prompt} A {response}.", system="be kind")
    finetune.run(tuning(task, bases["transformer"], tmp_path / "first", max_steps=2))
    monkeypatch.setattr(finetune, "_started_alike", lambda cfg, world, console: replace(cfg, run=replace(cfg.run)))
    finetune.run(tuning(InstructTaskConfig(data=questions), tmp_path / "first", tmp_path / "second", max_steps=2))
    stored = load_checkpoint(latest_checkpoint(tmp_path / "second", pytest.fail), with_optimizer=False).config  # type: ignore[arg-type]
    assert (stored["task"]["template"], stored["task"]["system"]) == ("Q {prompt} A {response}.", "be kind")


def test_an_adapter_alone_on_the_base_answers_as_its_run_does(
    bases: dict[str, Path], questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = InstructTaskConfig(data=questions, valid=questions, template="Q {prompt} A {response}.", system="be kind")
    cfg = tuning(task, bases["transformer"], tmp_path / "run", lr=3e-2, max_steps=40, seq_len=64, batch_size=6)
    finetune.run(replace(cfg, adapter=AdapterConfig(rank=8)))
    words = ["--chat", "-p", "dog", "-p", "cat", "-n", "12"]
    folder = tmp_path / "run" / "adapter"
    own = answers(capsys, f"run={tmp_path / 'run'}", *words)
    assert answers(capsys, f"run={bases['transformer']}", f"adapter={folder}", *words) == own
    origin = json.loads((folder / "lmkit.json").read_text(encoding="utf-8"))
    origin["task"] = {"kind": "instruct", "template": "no places"}
    (folder / "lmkit.json").write_text(json.dumps(origin), encoding="utf-8")
    assert cli.main(["generate", f"run={bases['transformer']}", f"adapter={folder}", *words]) == 4
    assert "lmkit.json does not describe a task" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["transformer", "lstm"])
def test_what_softmax_adds_to_the_loss_is_learnt_from_on_answers_too(
    name: str, bases: dict[str, Path], questions: str, tmp_path: Path
) -> None:
    task, losses = InstructTaskConfig(data=questions, exact_match=0), {}
    cases = {
        "plain": SoftmaxConfig(),
        "smooth": SoftmaxConfig(label_smoothing=0.3),
        "penalty": SoftmaxConfig(ar_alpha=5.0, tar_beta=5.0),
    }
    for case, softmax in cases.items():
        finetune.run(replace(tuning(task, bases[name], tmp_path / case, max_steps=2), softmax=softmax))
        losses[case] = [row["loss"] for row in read_metrics(tmp_path / case) if "loss" in row]
    for case in ("smooth", "penalty"):
        assert losses[case][0] == losses["plain"][0]  # neither is a part of the loss that is shown
        assert losses[case][1] != losses["plain"][1]


# Talking


@pytest.fixture(scope="module")
def talker(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run that answers."""
    tmp_path = tmp_path_factory.mktemp("talker")
    questions = write_rows(tmp_path / "d.jsonl", [{"prompt": p, "response": r} for p, r in ANSWERS.items()])
    task = InstructTaskConfig(data=questions, valid=questions, exact_match=0)
    finetune.run(
        tuning(task, bases["transformer"], tmp_path / "talker", lr=1e-2, max_steps=120, seq_len=64, batch_size=6)
    )
    return str(tmp_path / "talker")


def test_lines_are_answered_until_the_end_of_the_input(
    talker: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("cat\n\n/reset\ndog\n/reset\nbird"))
    assert answers(capsys, f"run={talker}", "--interactive") == "a mat\nunder the tree\nflew\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("cat\n/exit\ndog\n"))
    assert answers(capsys, f"run={talker}", "--interactive") == "a mat\n"


def test_input_that_is_not_utf8_is_answered_too(
    talker: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.TextIOWrapper(io.BytesIO(b"caf\xe9 \x00\n/reset\r\ncat\r\n"), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", raw)
    out = answers(capsys, f"run={talker}", "--interactive", "-n", "9")
    assert out.endswith("\na mat\n")


def prompts_read(monkeypatch: pytest.MonkeyPatch, note: Callable[[Any, list[int]], Any]) -> list[Any]:
    """What ``note`` makes of the tokenizer and of each prompt that a chat is going to read."""
    read: list[Any] = []
    original = chat.generate

    def generate(model: Any, tokenizer: Any, prompt: Any, **kwargs: Any) -> Any:
        read.append(note(tokenizer, prompt.ids))
        return original(model, tokenizer, prompt, **kwargs)

    monkeypatch.setattr(chat, "generate", generate)
    return read


def test_a_conversation_goes_on_until_it_is_reset(
    talker: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = prompts_read(monkeypatch, lambda tokenizer, ids: tokenizer.decode(ids))
    monkeypatch.setattr(sys, "stdin", io.StringIO("cat\ndog\n/reset\nbird\n"))
    first = answers(capsys, f"run={talker}", "--interactive", "--system", "be kind", "-n", "9").split("\n")[0]
    assert read == ["be kind\ncat\n", f"be kind\ncat\n{first}\ndog\n", "be kind\nbird\n"]


def test_ctrl_c_stops_the_answer_and_what_was_said_stays_in_the_conversation(
    talker: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def write_text(text: str) -> None:
        written.append(text)
        if "".join(written) == "under":
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "write_text", write_text)
    monkeypatch.setattr(sys, "stdin", io.StringIO("dog\n/reset\nbird\n"))
    assert cli.main(["generate", f"run={talker}", "--interactive", "--temperature", "0"]) == 0
    assert "".join(written) == "under\nflew\n"
    assert "stopped" in capsys.readouterr().err


def test_a_conversation_that_outgrows_the_context_forgets_its_first_turns(
    talker: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for i in range(6) for word in ("--prompt", f"question {i}")]
    assert cli.main(["generate", f"run={talker}", "--chat", "-n", "5", *words]) == 0
    assert "its first turn is forgotten" in capsys.readouterr().err


def test_of_a_turn_that_is_too_long_as_much_is_read_as_leaves_room_to_answer(
    talker: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = prompts_read(monkeypatch, lambda _, ids: len(ids))
    for num_new in ("5", "99"):
        assert cli.main(["generate", f"run={talker}", "--chat", "-n", num_new, "--prompt", "x" * 200]) == 0
    assert read == [60, 32]  # beside the 4 that the fifth new token is drawn from; at least half of 64
    assert "of 64: 142 tokens are not read" in capsys.readouterr().err


# Refused


def test_a_run_that_was_not_tuned_for_conversations_holds_none(
    bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", f"run={bases['transformer']}", "--chat", "--prompt", "x"]) == 2
    assert "was not finetuned for conversations; leave out --chat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chat"], "--chat needs --prompt TEXT"),
        (["--interactive", "--prompt", "x"], "--interactive reads the prompts itself"),
        (["--interactive", "num_samples=2"], "num_samples=2 has no use"),
        (["--chat", "--prompt", "x", "--prompt", "y", "num_samples=2"], "which answer goes on"),
        (["--prompt", "x", "--system", "y"], "system=y needs --chat"),
    ],
)
def test_words_of_a_chat_that_do_not_fit_together_are_refused_before_a_run_is_read(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert cli.main(["generate", "run=missing", *words]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            InstructTaskConfig(data="", truncation=TooLong.error),
            r"is too long: .* tokens do not fit into train.seq_len=4",
        ),
        (InstructTaskConfig(data="", truncation=TooLong.drop), "no train example fits into train.seq_len=4"),
        (PreferTaskConfig(data="", truncation=TooLong.drop), r"no train \(chosen\) example fits"),
    ],
    ids=["error", "drop", "prefer"],
)
def test_examples_that_are_all_too_long_are_refused(
    task: ChatTaskConfig, message: str, bases: dict[str, Path], questions: str, pairs: str, tmp_path: Path
) -> None:
    task = replace(task, data=pairs if isinstance(task, PreferTaskConfig) else questions)
    with pytest.raises(DataError, match=message):
        finetune.run(tuning(task, bases["transformer"], tmp_path / "run", seq_len=4))
    assert not (tmp_path / "run").exists()


def test_equal_answers_of_a_pair_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(DataError, match=r"p\.jsonl, line 1: chosen and rejected answer are the same"):
        finetune.run(tuning(PreferTaskConfig(data=data), bases["transformer"], tmp_path / "run"))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["task.data=missing.jsonl", "train.seq_len=64"], 3, "missing.jsonl does not exist"),
        ([], 2, "task.data must be given"),
        (["task.data=x.jsonl", "task.template={prompt}"], 2, "task.template={prompt} must be plain"),
        (["task.data=DATA", "train.seq_len=65"], 2, "train.seq_len=65 is longer than model.context=64"),
        (["task.data=DATA", "softmax=sampled"], 2, "softmax=sampled has no use with task=instruct"),
        (
            ["task.data=DATA", "train.seq_len=64", "task.response=answer"],
            3,
            "line 1 has no column 'answer' but prompt, response",
        ),
    ],
)
def test_what_is_wrong_with_a_task_is_told_in_one_line(
    words: list[str], code: int, message: str, bases: dict[str, Path], questions: str, capsys: Any
) -> None:
    words = [word.replace("DATA", questions) for word in words]
    assert cli.main(["finetune", "task=instruct", f"run={bases['transformer']}", *words, "device=cpu"]) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last

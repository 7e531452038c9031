"""Finetuning by adapters and by parts of a model, replay of the old corpus, and what is reported about forgetting."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import pretrain_small
from stopping import assert_same, signal_after, tensors_in

from lmkit import cli
from lmkit.commands import eval_ppl, finetune, pretrain
from lmkit.commands import generate as generate_command
from lmkit.commands.forgetting import Forgetting
from lmkit.commands.replay import replay as replay_step
from lmkit.commands.resuming import check_resumable
from lmkit.config.adapter import AdapterConfig, TuneConfig
from lmkit.config.commands import EvalPplConfig, FinetuneConfig, PretrainConfig
from lmkit.config.data import ByteTokenizerConfig, TextConfig
from lmkit.config.generation import GenerateConfig, SamplingConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import ModelConfig, RecurrentConfig, TransformerConfig
from lmkit.config.optimization import AdamwConfig, CosineConfig, MuonConfig, OptimizerConfig, SgdConfig
from lmkit.config.softmax import SampledSoftmaxConfig
from lmkit.config.tasks import ClassifyTaskConfig, LmTaskConfig, RegressTaskConfig, RowsTaskConfig
from lmkit.config.training import EvalConfig, ExistingRunConfig, LogConfig, RunConfig, SaveConfig, TrainConfig
from lmkit.console import Console
from lmkit.device import resolve_device
from lmkit.errors import CheckpointError, ConfigError, StoppedError
from lmkit.store.browse import read_newest_config
from lmkit.store.checkpoint import latest_checkpoint, load_checkpoint
from lmkit.store.found import read_metrics
from lmkit.tasks import Task
from lmkit.tasks.language import LanguageModelling
from lmkit.timing import Timing

CPU = DeviceConfig(type=DeviceType.cpu, threads=1)
MODELS: dict[str, ModelConfig] = {
    "transformer": TransformerConfig(d_model=32, num_layers=2, num_heads=2, context=32, dropout=0.1),
    "lstm": RecurrentConfig(d_embed=24, d_hidden=32, num_layers=2, dropout_recurrent=0.1),
}
LORA = AdapterConfig(rank=4, dropout=0.1)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    for name, model in MODELS.items():
        train = TrainConfig(batch_size=8, seq_len=32, max_steps=40)
        pretrain_small(root / name, TextConfig(path=str(corpus)), model, ByteTokenizerConfig(), train)
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of another domain: rows of digits that count up."""
    folder = tmp_path_factory.mktemp("numbers")
    generator = random.Random(1)
    for number in range(24):
        starts = [generator.randrange(1000) for _ in range(12)]
        text = "".join(" ".join(str(start + i) for i in range(6)) + "\n" for start in starts)
        (folder / f"{number:02d}.txt").write_text(text, encoding="utf-8", newline="\n")
    return folder


def tuning(
    base: Path, data: Path, run: Path, *, optimizer: OptimizerConfig | None = None, **keys: Any
) -> FinetuneConfig:
    stream = {} if isinstance(keys.get("task"), RowsTaskConfig) else {"seq_len": 16}
    train = {"batch_size": 4, "max_steps": 12, **stream, **keys.pop("train", {})}
    return FinetuneConfig(
        dataset=TextConfig(path=str(data)),
        optimizer=optimizer or AdamwConfig(lr=1e-2),
        schedule=CosineConfig(),
        device=CPU,
        train=TrainConfig(**train),
        eval=EvalConfig(every_steps=4),
        log=LogConfig(every_steps=1),
        save=SaveConfig(every_steps=3),
        run=RunConfig(path=str(base), dir=str(run), root=str(run.parent)),
        **keys,
    )


def evaluated(run: Path, **keys: Any) -> dict[str, Any]:
    checkpoint = keys.pop("checkpoint", "best")
    existing = ExistingRunConfig(path=str(run), checkpoint=checkpoint)
    cfg = EvalPplConfig(run=existing, split="valid", device=CPU, baselines=False, checks=False, bootstrap=0, **keys)
    return eval_ppl.run(cfg)


# Training


CASES: dict[str, dict[str, Any]] = {
    "lora": {"adapter": LORA},
    "dora": {"adapter": replace(LORA, use_dora=True), "optimizer": SgdConfig(lr=0.1, momentum=0.9)},
    "muon, unfrozen bit by bit": {"optimizer": MuonConfig(), "tune": TuneConfig(unfreeze=True, layer_decay=0.5)},
    "lora, unfrozen bit by bit": {"adapter": LORA, "tune": TuneConfig(unfreeze=True)},
    "last layer": {"tune": TuneConfig(last_layers=1), "train": {"ema_decay": 0.9}},
    "replay": {"task": LmTaskConfig(replay=0.25)},
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bytes(
    case: str, bases: dict[str, Path], numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _resumes(bases["transformer"], numbers, tmp_path, monkeypatch, CASES[case])


@pytest.mark.parametrize("case", ["last layer", "replay", "muon, unfrozen bit by bit"])
def test_a_recurrent_run_that_is_stopped_and_resumed_ends_with_the_same_bytes(
    case: str, bases: dict[str, Path], numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _resumes(bases["lstm"], numbers, tmp_path, monkeypatch, CASES[case])


def _resumes(base: Path, data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]) -> None:
    whole = finetune.run(tuning(base, data, folder / "whole", **keys))
    with monkeypatch.context() as patch:
        signal_after(patch, 5)
        with pytest.raises(StoppedError):
            finetune.run(tuning(base, data, folder / "pieces", **keys))
    pieces = finetune.run(replace(tuning(base, data, folder / "pieces", **keys), resume=True))
    assert_same(tensors_in(folder / "whole"), tensors_in(folder / "pieces"))
    for result in (whole, pieces):
        for name in ("token_ppl", "word_ppl"):
            assert result["forgetting"]["after"][name] == whole["forgetting"]["after"][name]
            assert result["forgetting"]["before"][name] == whole["forgetting"]["before"][name]


def test_a_run_without_a_name_for_its_start_goes_on_from_its_own_whatever_was_finished_since(
    bases: dict[str, Path], numbers: Path, tmp_path: Path
) -> None:
    shutil.copytree(bases["transformer"], tmp_path / "base")

    def config(max_steps: int, *, resume: bool) -> FinetuneConfig:
        cfg = tuning(tmp_path / "base", numbers, tmp_path / "run", train={"max_steps": max_steps})
        return replace(cfg, run=replace(cfg.run, path=None), resume=resume)

    finetune.run(config(3, resume=False))
    shutil.copytree(bases["transformer"], tmp_path / "later")  # the newest finished run is now the run itself
    assert finetune.run(config(6, resume=True))["step"] == 6
    newest = latest_checkpoint(tmp_path / "run", pytest.fail)
    assert newest is not None
    assert load_checkpoint(newest, with_optimizer=False).config["base"].startswith(str(tmp_path / "base"))


def test_a_run_that_started_from_a_copied_checkpoint_goes_on_from_it(
    bases: dict[str, Path], numbers: Path, tmp_path: Path
) -> None:
    newest = latest_checkpoint(bases["transformer"], pytest.fail)
    assert newest is not None
    copy = Path(shutil.copytree(newest, tmp_path / newest.name))
    cfg = tuning(copy, numbers, tmp_path / "run", train={"max_steps": 2})
    finetune.run(cfg)
    cfg = tuning(copy, numbers, tmp_path / "run", train={"max_steps": 3})
    assert finetune.run(replace(cfg, run=replace(cfg.run, path=None), resume=True))["step"] == 3


def test_a_run_of_pretrain_is_not_continued_by_finetune(bases: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["transformer"], base)
    cfg = tuning(base, corpus, base, train={"batch_size": 8, "seq_len": 32, "max_steps": 60})
    with pytest.raises(ConfigError, match="cannot be resumed"):
        finetune.run(replace(cfg, resume=True))
    with pytest.raises(ConfigError, match="command: pretrain -> finetune"):  # where the data is the same, too
        check_resumable({"command": "pretrain"}, {"command": "finetune"})


def test_a_step_of_a_run_with_an_adapter_is_replayed_bit_for_bit(
    bases: dict[str, Path], numbers: Path, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"adapter": LORA, "tune": TuneConfig(unfreeze=True), "task": LmTaskConfig(replay=0.5)}
    finetune.run(tuning(bases["transformer"], numbers, tmp_path / "run", **keys))
    for step in (2, 8):
        logged = next(row for row in read_metrics(tmp_path / "run") if row["step"] == step and "loss" in row)
        again = replay_step(tmp_path / "run", step, Console())
        assert (again["loss"], again["grad_norm"]) == (logged["loss"], logged["grad_norm"])


@pytest.mark.parametrize("key", ["adapter", "tune"])
def test_a_run_cannot_be_resumed_with_another_adapter_or_other_parts(
    key: str, bases: dict[str, Path], numbers: Path, tmp_path: Path
) -> None:
    cfg = tuning(bases["transformer"], numbers, tmp_path / "run", adapter=LORA, train={"max_steps": 2})
    finetune.run(cfg)
    others: dict[str, Any] = {"adapter": replace(LORA, alpha=3.0), "tune": TuneConfig(unfreeze=True)}
    with pytest.raises(ConfigError, match=rf"{key}\."):
        finetune.run(replace(cfg, resume=True, train=replace(cfg.train, max_steps=4), **{key: others[key]}))


def test_a_run_cannot_be_resumed_from_another_base(bases: dict[str, Path], numbers: Path, tmp_path: Path) -> None:
    cfg = tuning(bases["transformer"], numbers, tmp_path / "run", train={"max_steps": 2})
    finetune.run(cfg)
    shutil.copytree(bases["transformer"], tmp_path / "moved")
    moved = replace(cfg, run=replace(cfg.run, path=str(tmp_path / "moved")), resume=True)
    finetune.run(moved)
    finetune.run(tuning(bases["transformer"], numbers, tmp_path / "other", train={"max_steps": 1}))
    other = replace(cfg, run=replace(cfg.run, path=str(tmp_path / "other")), resume=True)
    with pytest.raises(ConfigError, match=r"cannot be resumed because this changed: base_sha256: "):
        finetune.run(other)
    (tmp_path / "run" / "run.json").unlink()  # the checkpoints know it as well
    with pytest.raises(ConfigError, match=r"cannot be resumed with other values \(base_sha256: "):
        finetune.run(other)


def test_a_run_that_goes_on_says_if_its_base_is_gone_and_takes_it_from_where_it_is_now(
    bases: dict[str, Path], numbers: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(bases["transformer"], tmp_path / "base"))
    cfg = tuning(base, numbers, tmp_path / "run", train={"max_steps": 2})
    finetune.run(cfg)
    moved = base.rename(tmp_path / "moved")
    longer = replace(cfg, resume=True, train=replace(cfg.train, max_steps=4))
    with pytest.raises(CheckpointError, match=r"/base/checkpoints/step-\d+, from which .*/run began, is not there"):
        finetune.run(replace(longer, run=replace(cfg.run, path=None)))
    assert finetune.run(replace(longer, run=replace(cfg.run, path=str(moved))))["step"] == 4


def test_an_adapter_trains_beside_a_base_that_keeps_every_bit_and_is_reported(
    bases: dict[str, Path], numbers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = finetune.run(
        tuning(bases["transformer"], numbers, tmp_path / "run", adapter=LORA, train={"max_steps": 30})
    )
    base = tensors_in(bases["transformer"], with_optimizer=False)
    tuned = tensors_in(tmp_path / "run", with_optimizer=False)
    assert all(torch.equal(tuned[name], tensor) for name, tensor in base.items())
    num_trained = sum(tensor.numel() for name, tensor in tuned.items() if name not in base)
    assert result["num_parameters"] == num_trained
    err = capsys.readouterr().err
    num_all = num_trained + sum(t.numel() for name, t in base.items() if name != "head.weight")
    assert f"training {num_trained:,} of {num_all:,} parameters" in err
    found = result["forgetting"]
    assert found["new_corpus_before"]["token_ppl"] > 1.3 * result["token_ppl"]
    assert found["after"]["token_ppl"] > found["before"]["token_ppl"]
    assert found["before"]["token_ppl"] == pytest.approx(evaluated(bases["transformer"])["token_ppl"], rel=0.2)
    assert "which the base run learnt: valid perplexity per token" in err


@pytest.mark.parametrize(("base", "seq_len", "said"), [("transformer", 16, 1), ("transformer", 32, 0), ("lstm", 16, 0)])
def test_a_run_that_is_to_be_read_in_shorter_windows_than_its_base_says_so(
    bases: dict[str, Path],
    numbers: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    base: str,
    seq_len: int,
    said: int,
) -> None:
    finetune.run(tuning(bases[base], numbers, tmp_path / "run", train={"seq_len": seq_len, "max_steps": 2}))
    line = f"evaluated, and generate, with windows of 16 tokens ({bases[base]}: 32)\n"
    assert capsys.readouterr().err.count(line) == said


def test_what_is_not_unfrozen_yet_does_not_move(bases: dict[str, Path], numbers: Path, tmp_path: Path) -> None:
    tune = TuneConfig(unfreeze=True)
    cfg = tuning(
        bases["transformer"], numbers, tmp_path / "run", tune=tune, train={"max_steps": 8}, optimizer=MuonConfig()
    )
    finetune.run(replace(cfg, save=SaveConfig(every_steps=1, keep=20)))
    base = tensors_in(bases["transformer"], with_optimizer=False)
    moved_at: dict[str, int] = {}
    for step in range(1, 9):
        path = tmp_path / "run" / "checkpoints" / f"step-{step:012d}"
        now = load_checkpoint(path, with_optimizer=False).model
        for name, tensor in now.items():
            if not torch.equal(tensor, base[name]):
                moved_at.setdefault(name, step)
    first = {"final_norm": 1, "blocks.1": 3, "blocks.0": 5, "embedding": 7}  # of 8 steps, 4 depths
    for name, step in first.items():
        assert {at for n, at in moved_at.items() if n.startswith(name)} == {step}, name


# Replay and forgetting


def test_replay_mixes_in_rows_of_the_old_corpus_and_so_less_is_forgotten(
    bases: dict[str, Path], numbers: Path, tmp_path: Path
) -> None:
    found = {}
    for share in (0.0, 0.5):
        cfg = tuning(bases["transformer"], numbers, tmp_path / str(share), train={"max_steps": 40, "batch_size": 8})
        found[share] = finetune.run(replace(cfg, task=LmTaskConfig(replay=share)))["forgetting"]
    before = found[0.0]["before"]["token_ppl"]
    assert found[0.5]["before"]["token_ppl"] == before
    assert found[0.0]["after"]["token_ppl"] > 2 * found[0.5]["after"]["token_ppl"]


def test_every_batch_has_the_share_of_old_rows_as_a_function_of_the_step(bases: dict[str, Path], numbers: Path) -> None:
    cfg = tuning(bases["transformer"], numbers, numbers, task=LmTaskConfig(replay=0.25), train={"batch_size": 8})
    batches = finetune.set_up(cfg, resolve_device(CPU), Console()).task.batches
    again = finetune.set_up(cfg, resolve_device(CPU), Console()).task.batches

    def decode(ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    seen: list[list[str]] = []
    for step in (0, 3, batches.steps_per_epoch + 1):
        rows = batches[step].rows(decode)
        is_new = [set(row["text"]) <= set("0123456789 \n") for row in rows]
        assert is_new == [True] * 6 + [False] * 2
        assert rows == again[step].rows(decode)
        seen.append([row["text"] for row in rows])
    assert len({texts[-1] for texts in seen}) == len({texts[0] for texts in seen}) == 3


def test_a_sampled_softmax_expects_the_words_of_the_old_corpus_where_it_is_replayed(
    bases: dict[str, Path], numbers: Path
) -> None:
    """By the counts of the new text alone each letter would stand for many, in every row that it is not in."""
    cfg = tuning(bases["transformer"], numbers, numbers, task=LmTaskConfig(replay=0.5), train={"batch_size": 8})
    cfg = replace(cfg, softmax=SampledSoftmaxConfig(num_frequent=4, num_sampled=30))
    task = finetune.set_up(cfg, resolve_device(CPU), Console()).task
    assert isinstance(task, LanguageModelling)
    batch, head = task.batches[0], task.model.eval().head
    targets_N = batch.targets_BT.flatten()
    torch.manual_seed(1)
    with torch.no_grad():
        hidden_ND = task.model(batch.inputs_BT)[0].flatten(0, 1)
        exact = float(head.loss(hidden_ND, targets_N)) / len(targets_N)
        sampled = [float(task.objective(head, hidden_ND, targets_N)) / len(targets_N) for _ in range(50)]
    # somewhat less, since what neither text has is hardly ever drawn; 3 nats more by the counts of the new one
    assert sum(sampled) / len(sampled) == pytest.approx(exact, abs=1.0)


def test_a_share_of_no_row_is_refused(bases: dict[str, Path], numbers: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.replay=0\.1 of train\.batch_size=4 is 0 sequences"):
        finetune.run(tuning(bases["transformer"], numbers, tmp_path / "run", task=LmTaskConfig(replay=0.1)))
    with pytest.raises(ConfigError, match=r"task\.replay=1 must be"):
        LmTaskConfig(replay=1.0)


@pytest.mark.parametrize("known", [True, False])
def test_the_time_says_that_the_scoring_of_what_is_forgotten_is_in_it(
    known: bool,
    bases: dict[str, Path],
    numbers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not known:
        monkeypatch.setattr(finetune, "corpus_of", lambda base: None)
    finetune.run(tuning(bases["lstm"], numbers, tmp_path / "run", train={"max_steps": 1}))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.split()[:1] == ["time"]]
    assert line.endswith(", the scoring before training included") == known


def test_a_finetuned_run_has_learnt_what_its_base_has(
    bases: dict[str, Path], corpus: Path, numbers: Path, tmp_path: Path
) -> None:
    finetune.run(tuning(bases["lstm"], numbers, tmp_path / "run", train={"max_steps": 1}))

    def told(run: Path, text: Path) -> Any:
        page = tmp_path / "page.html"
        found = evaluated(run, dataset=TextConfig(path=str(text)), report=str(page))["trained_on_this_dataset"]
        assert ("may not be what the model has learnt" in page.read_text(encoding="utf-8")) != found
        return found

    assert (told(tmp_path / "run", numbers), told(tmp_path / "run", corpus)) == (True, True)
    assert (told(bases["lstm"], numbers), told(bases["lstm"], corpus)) == (False, True)


def test_without_the_old_corpus_there_is_a_warning_and_no_number(
    bases: dict[str, Path], numbers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.txt").write_text("the cat sat on a mat\n" * 200, encoding="utf-8")
    config = tuning(bases["lstm"], data, tmp_path / "first", train={"max_steps": 1})
    finetune.run(config)
    (data / "a.txt").unlink()
    result = finetune.run(tuning(tmp_path / "first", numbers, tmp_path / "second", train={"max_steps": 1}))
    assert "forgetting" not in result
    assert "forgetting is not measured" in capsys.readouterr().err


def test_a_classifier_with_an_adapter_reports_forgetting_predicts_and_is_no_language_model(
    bases: dict[str, Path], numbers: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"{'cat dog' if i % 2 else '12 34'} {i}", "label": "ab"[i % 2]} for i in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = ClassifyTaskConfig(data=str(data))
    cfg = tuning(bases["transformer"], numbers, tmp_path / "run", task=task, adapter=LORA, train={"max_steps": 25})
    result = finetune.run(cfg)
    assert result["forgetting"]["after"]["token_ppl"] != result["forgetting"]["before"]["token_ppl"]
    assert "new_corpus_before" not in result["forgetting"]
    existing = RunConfig(path=str(tmp_path / "run"), root=str(tmp_path))
    predicted = finetune.run(
        replace(cfg, predict=str(data), task=LmTaskConfig(), adapter=None, run=existing, output=str(tmp_path / "p"))
    )
    assert predicted["accuracy"] >= 0.9
    refused = rf"run is a classifier; use lmkit finetune run={tmp_path / 'run'} predict=FILE"
    with pytest.raises(ConfigError, match=refused):
        evaluated(tmp_path / "run")
    after = evaluated(bases["transformer"], adapter=str(tmp_path / "run" / "adapter"))
    assert after["token_ppl"] != evaluated(bases["transformer"])["token_ppl"]


@pytest.mark.parametrize("adapter", [None, LORA])
def test_a_classifier_is_a_base_by_the_language_model_inside_it(
    adapter: AdapterConfig | None, bases: dict[str, Path], numbers: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"{'cat dog' if i % 2 else '12 34'} {i}", "label": "ab"[i % 2], "n": i} for i in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = ClassifyTaskConfig(data=str(data))
    first = tuning(bases["transformer"], numbers, tmp_path / "one", task=task, adapter=adapter, train={"max_steps": 4})
    learnt = finetune.run(first)["forgetting"]
    regress = RegressTaskConfig(data=str(data), text="text", target="n")
    for name, next_task in (("again", task), ("number", regress), ("text", LmTaskConfig())):
        cfg = tuning(tmp_path / "one", numbers, tmp_path / name, task=next_task, train={"max_steps": 2})
        found = finetune.run(replace(cfg, run=replace(cfg.run, checkpoint="latest")))["forgetting"]
        assert found["dataset"] == learnt["dataset"]
        assert found["before"]["token_ppl"] == pytest.approx(learnt["after"]["token_ppl"], rel=1e-4)
        replay_step(tmp_path / name, 2, Console())
    alone = RegressTaskConfig(data=str(data), numeric=["n"], target="m")
    data.write_text("".join(json.dumps({"n": i, "m": i * i}) + "\n" for i in range(40)), encoding="utf-8")
    finetune.run(tuning(bases["transformer"], numbers, tmp_path / "alone", task=alone, train={"max_steps": 2}))
    with pytest.raises(ConfigError, match=r"alone is a regression on numbers alone; name a run that has read texts"):
        finetune.run(tuning(tmp_path / "alone", numbers, tmp_path / "none"))


# Adapters in other commands


@pytest.mark.parametrize("dora", [False, True])
def test_a_run_and_its_adapter_on_the_base_give_the_same_numbers_and_text(
    dora: bool, bases: dict[str, Path], numbers: Path, tmp_path: Path
) -> None:
    adapter = replace(LORA, use_dora=dora)
    finetune.run(tuning(bases["transformer"], numbers, tmp_path / "run", adapter=adapter, train={"max_steps": 20}))
    dataset = TextConfig(path=str(numbers))
    folder = str(tmp_path / "run" / "adapter")
    whole = evaluated(tmp_path / "run", dataset=dataset, context=16)
    alone = evaluated(bases["transformer"], dataset=dataset, adapter=folder, context=16)
    base = evaluated(bases["transformer"], dataset=dataset, context=16)
    assert whole["nats"] == alone["nats"] < 0.9 * base["nats"]
    assert len({found["checkpoint_digest"] for found in (whole, alone, base)}) == 3
    texts = [
        generate_command.run(
            GenerateConfig(
                run=ExistingRunConfig(path=str(run)),
                adapter=given,
                max_new_tokens=10,  # with the prompt 16, the context of the run; that of its base is longer
                sampling=SamplingConfig(temperature=0.0),
                device=CPU,
            ),
            ["12 13"],
        )[0]["text"]
        for run, given in ((tmp_path / "run", None), (bases["transformer"], folder))
    ]
    assert texts[0] == texts[1]


def test_a_run_with_an_adapter_is_a_base_for_the_next(bases: dict[str, Path], numbers: Path, tmp_path: Path) -> None:
    first = finetune.run(tuning(bases["transformer"], numbers, tmp_path / "first", adapter=LORA))
    second = finetune.run(
        tuning(tmp_path / "first", numbers, tmp_path / "second", adapter=LORA, train={"max_steps": 2})
    )
    assert second["forgetting"]["new_corpus_before"]["token_ppl"] == pytest.approx(first["token_ppl"], rel=1e-4)
    assert second["forgetting"]["dataset"] == first["dataset"]


def test_a_run_tells_that_its_base_had_a_base_itself_and_goes_on(
    bases: dict[str, Path], numbers: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for base, run in ((bases["lstm"], first), (first, second)):
        finetune.run(tuning(base, numbers, run, train={"max_steps": 2}))
    assert [read_newest_config(run)[1].get("base_had_base") for run in (first, second)] == [None, True]
    longer = replace(tuning(first, numbers, second, train={"max_steps": 4}), resume=True)
    assert finetune.run(longer)["step"] == 4


def test_a_run_tells_that_its_base_had_gone_on_with_other_data(
    bases: dict[str, Path], numbers: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(bases["lstm"], tmp_path / "base"))
    pretrain.run(
        PretrainConfig(
            dataset=TextConfig(path=str(numbers)),
            tokenizer=ByteTokenizerConfig(),
            model=MODELS["lstm"],
            optimizer=AdamwConfig(lr=1e-2),
            schedule=CosineConfig(),
            device=CPU,
            train=TrainConfig(batch_size=8, seq_len=32, max_steps=44),
            run=RunConfig(dir=str(base), root=str(tmp_path), allow_data_change=True),
            resume=True,
        )
    )
    finetune.run(tuning(base, numbers, tmp_path / "run", train={"max_steps": 2}))
    assert read_newest_config(tmp_path / "run")[1].get("base_had_base") is True


def test_an_adapter_of_another_base_is_refused_with_the_name_of_its_own(
    bases: dict[str, Path], numbers: Path, tmp_path: Path
) -> None:
    finetune.run(tuning(bases["transformer"], numbers, tmp_path / "run", adapter=LORA, train={"max_steps": 2}))
    with pytest.raises(CheckpointError, match=r"another checkpoint; name that one: run=.*bases\d+/transformer/"):
        evaluated(tmp_path / "run", adapter=str(tmp_path / "run" / "adapter"))


def test_from_the_command_line(
    bases: dict[str, Path], numbers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"run={bases['transformer']}", "device=cpu", "device.threads=1"]
    shape = ["train.max_steps=3", "train.batch_size=4", "train.seq_len=16", f"run.dir={tmp_path / 'run'}"]
    data = ["dataset=text", f"dataset.path={numbers}"]
    lora = [
        "adapter=dora",
        "adapter.rank=2",
        "adapter.targets=attention.*,down",
        "tune.unfreeze=true",
        "task.replay=0.5",
    ]
    assert cli.main(["finetune", *words, *data, *lora, *shape]) == 0
    description = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (description["r"], description["use_dora"], len(description["target_modules"])) == (2, True, 6)
    capsys.readouterr()
    adapter = [f"adapter={tmp_path / 'run' / 'adapter'}"]
    assert cli.main(["generate", *words, *adapter, "--prompt", "1 2", "-n", "4"]) == 0
    assert "DoRA of rank 2, " in capsys.readouterr().err
    assert cli.main(["eval-ppl", *words, *adapter, "checks=false", "baselines=false"]) == 0
    assert cli.main(["eval-ppl", *words, f"adapter={tmp_path / 'none'}"]) == 4
    assert "holds no adapter_config.json; name a folder that does" in capsys.readouterr().err
    nowhere = ["dataset=text", "dataset.path=nowhere"]  # which is not asked for before
    assert cli.main(["finetune", *words, *nowhere, "adapter=lora", "adapter.targets=q_proj", *shape[:3]]) == 2
    assert "adapter.targets=q_proj matches no linear layer of the model; it has blocks.*" in capsys.readouterr().err
    assert cli.main(["finetune", *words, *nowhere]) == 2
    said = "train.seq_len=128 is longer than model.context=32; set train.seq_len=32 or less\n"
    assert capsys.readouterr().err.endswith(said)


def test_it_is_told_how_much_of_a_text_is_unknown_to_the_words_of_the_run(
    corpus: Path, numbers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["device=cpu", "device.threads=1", "train.max_steps=2", "train.batch_size=4", "train.seq_len=16"]
    shape = ["tokenizer=word", "model=lstm", "model.d_embed=8", "model.d_hidden=8", f"run.dir={tmp_path / 'base'}"]
    assert cli.main(["pretrain", "dataset=text", f"dataset.path={corpus}", *shape, *words]) == 0
    capsys.readouterr()
    tuned = ["dataset=text", f"dataset.path={numbers}", f"run={tmp_path / 'base'}", f"run.dir={tmp_path / 'tuned'}"]
    assert cli.main(["finetune", *tuned, *words]) == 0
    assert " % of the tokens are <unk>\n" in capsys.readouterr().err


def test_the_time_of_the_scoring_after_a_finetuning_is_kept_back_once(
    bases: dict[str, Path], numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[float] = []
    measure = Forgetting.measure_before

    def measured(self: Forgetting, task: Task) -> None:
        measure(self, task)
        self.seconds = 1000.0

    def follow(self: Timing) -> None:
        assert self.budget is not None
        kept.append(self.budget.reserve_s)
        original(self)

    original = Timing.follow
    monkeypatch.setattr(Forgetting, "measure_before", measured)
    monkeypatch.setattr(Timing, "follow", follow)
    train = {"max_steps": 2, "budget": "2h"}
    done = finetune.run(tuning(bases["transformer"], numbers, tmp_path / "run", train=train))
    longer = tuning(bases["transformer"], numbers, tmp_path / "run", train={**train, "max_steps": 4}, resume=True)
    assert done["elapsed_s"] < 1000.0  # it is not counted as time that has passed
    assert finetune.run(longer)["elapsed_s"] < 1000.0
    assert kept == [1000.0] * 4

"""task=classify and task=regress from a raw file to predictions, by the command line and after a kill."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from stopping import assert_same, signal_after, tensors_in

from lmkit import cli
from lmkit.commands import finetune
from lmkit.commands import replay as replay_command
from lmkit.commands.predict import _output_path
from lmkit.commands.replay import replay
from lmkit.config.adapter import AdapterConfig
from lmkit.config.commands import FinetuneConfig, PretrainConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import ModelConfig, RecurrentConfig, TransformerConfig
from lmkit.config.optimization import AdamwConfig, CosineConfig, SgdConfig
from lmkit.config.tasks import ClassifyTaskConfig, NetworkActivation, NetworkConfig, RegressTaskConfig, TaskConfig
from lmkit.config.training import EvalConfig, LogConfig, RunConfig, SaveConfig, TrainConfig
from lmkit.console import Console, format_number
from lmkit.device import resolve_device
from lmkit.errors import ConfigError, DataError, ResourceError, StoppedError
from lmkit.store.browse import Status, read_summary, status_of
from lmkit.store.found import read_metrics
from lmkit.store.runs import Run
from lmkit.tasks.classify import Classify
from lmkit.train import Trainer

MakeConfig = Callable[..., PretrainConfig]
GOOD, BAD = ["good", "great", "lovely"], ["bad", "awful", "dull"]
REST = ["the", "film", "was", "a", "story", "of", "some", "people", "in", "a", "town"]
MODELS: dict[str, ModelConfig] = {
    "lstm": RecurrentConfig(d_embed=24, d_hidden=24, num_layers=1),
    "transformer": TransformerConfig(d_model=32, num_layers=2, num_heads=2, context=80),
}


def review(draw: random.Random, label: str) -> str:
    words = [draw.choice(REST) for _ in range(draw.randint(2, 6))]
    words.insert(draw.randrange(len(words) + 1), draw.choice(GOOD if label == "good" else BAD))
    return " ".join(words)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reviews(path: Path, number: int, seed: int) -> Path:
    draw = random.Random(seed)
    labels = ["good" if draw.random() < 0.4 else "bad" for _ in range(number)]
    return write_jsonl(path, [{"text": review(draw, label), "label": label, "n": i} for i, label in enumerate(labels)])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small language models of reviews, one of each family."""
    folder = tmp_path_factory.mktemp("bases")
    draw = random.Random(9)
    text = "".join(review(draw, draw.choice(["good", "bad"])) + "\n" for _ in range(300))
    (folder / "text.txt").write_text(text, encoding="utf-8", newline="\n")
    words = ["pretrain", "dataset=text", f"dataset.path={folder / 'text.txt'}", "tokenizer=word", "device=cpu"]
    words += ["train.max_steps=15", "train.batch_size=8", "train.seq_len=16", "device.threads=1"]
    shapes = {
        "lstm": ["model=lstm", "model.d_embed=24", "model.d_hidden=24", "model.num_layers=1"],
        "transformer": ["model=tiny", "model.d_model=32", "model.num_layers=2", "model.num_heads=2"],
    }
    for name, shape in shapes.items():
        assert cli.main([*words, *shape, f"run.dir={folder / name}"]) == 0
    return {name: folder / name for name in shapes}


@pytest.mark.parametrize(
    "words",
    [
        ["softmax=sampled"],
        ["softmax.label_smoothing=0.1", "softmax.ar_alpha=1"],
        ["train.order=windows", "train.shuffle=documents", "train.seq_len_jitter=true"],
        ["train.seq_len=16", "eval.sample_tokens=60"],
    ],
)
def test_what_is_for_a_loss_over_words_or_for_a_stream_of_tokens_is_refused_where_it_would_do_nothing(
    words: list[str], bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = reviews(tmp_path / "rows.jsonl", 20, seed=1)
    run = [f"run={bases['lstm']}", f"run.dir={tmp_path / 'run'}", f"task.data={data}", "device=cpu"]
    assert cli.main(["finetune", "task=classify", *run, *words]) == 2
    found = capsys.readouterr().err.splitlines()[-1]
    assert all(f"{word} has no use with task=classify" in found for word in words)
    assert not (tmp_path / "run").exists()


def config_of(task: TaskConfig, run: Path, base: Path | None = None, **train: Any) -> FinetuneConfig:
    return FinetuneConfig(
        task=task,
        dataset=pydocs(),
        optimizer=AdamwConfig(lr=3e-3) if base is not None else SgdConfig(lr=0.1, momentum=0.9),
        schedule=CosineConfig(),
        device=DeviceConfig(type=DeviceType.cpu, threads=1),
        train=TrainConfig(**{"batch_size": 8, "max_steps": 12, "micro_batch_size": 4} | train),
        log=LogConfig(every_steps=1),
        eval=EvalConfig(every_steps=4),
        run=RunConfig(dir=str(run), path=None if base is None else str(base)),
    )


def pydocs() -> Any:
    from lmkit.config.data import PydocsConfig

    return PydocsConfig()


def test_a_classifier_remembers_the_length_that_the_language_model_inside_it_was_trained_on(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    task = ClassifyTaskConfig(data=str(reviews(tmp_path / "rows.jsonl", 20, seed=1)))
    learnt = finetune.run(config_of(task, tmp_path / "one", bases["transformer"], max_steps=2))["forgetting"]
    cfg = config_of(task, tmp_path / "two", tmp_path / "one", max_steps=1)
    found = finetune.run(replace(cfg, run=replace(cfg.run, checkpoint="latest")))["forgetting"]
    assert found["before"]["token_ppl"] == pytest.approx(learnt["after"]["token_ppl"], rel=1e-4)


@pytest.mark.parametrize("task", ["lm", "instruct"])
def test_what_an_adaptive_softmax_is_made_of_is_refused_in_finetuning(
    task: str, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"run={bases['lstm']}", f"task={task}", *["task.data=x.jsonl"] * (task == "instruct"), "softmax=adaptive"]
    assert cli.main(["finetune", *words, "softmax.cutoffs=5,9", "softmax.div_value=2", "device=cpu"]) == 2
    found = capsys.readouterr().err.splitlines()[-1]
    assert "softmax.cutoffs=[5,9] has no use in finetuning" in found
    assert "softmax.div_value=2 has no use in finetuning" in found


def house_maker() -> Any:
    path = Path(__file__).parents[2] / "scripts" / "make_houses.py"
    spec = importlib.util.spec_from_file_location("make_houses", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# From raw file to prediction


@pytest.mark.parametrize("family", ["lstm", "transformer"])
def test_from_labelled_texts_to_predictions_for_new_ones(
    family: str, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, new = reviews(tmp_path / "train.jsonl", 240, 1), reviews(tmp_path / "new.jsonl", 60, 2)
    run = tmp_path / "run"
    words = ["finetune", "task=classify", f"task.data={data}", f"run={bases[family]}", f"run.dir={run}", "device=cpu"]
    words += ["device.threads=1", "optimizer.lr=1e-2", "train.max_epochs=6", "task.class_weights=balanced"]
    words += ["task.metric=macro_f1"]
    assert cli.main([*words, f"predict={new}"]) == 0
    shown = capsys.readouterr().err
    assert "macro F1" in shown
    assert "is 'good', predicted as" in shown
    progress = [line for line in shown.splitlines() if line.startswith("training ")]
    assert "  valid macro F1 " in progress[-1]
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert result["labels"] == ["bad", "good"]
    assert sum(map(sum, result["confusion"])) == result["num_examples"] == 24
    assert sum(result["train_counts"]) == 216
    bad, good = (216 / (2 * count) for count in result["train_counts"])
    assert f"class weights: 'bad' {bad:.4g}, 'good' {good:.4g}\n" in shown
    rows = read_jsonl(tmp_path / "new.predictions.jsonl")
    given = read_jsonl(new)
    assert [row["text"] for row in rows] == [row["text"] for row in given]
    assert all(0.5 <= row["probability"] <= 1 for row in rows)
    right = sum(row["prediction"] == row["label"] for row in rows)
    assert right >= 0.9 * len(rows)  # always saying 'bad' gets 60 %

    unlabelled = write_jsonl(tmp_path / "other.jsonl", [{"text": row["text"]} for row in given])
    assert cli.main(["finetune", f"run={run}", f"predict={unlabelled}", f"output={tmp_path / 'o.jsonl'}"]) == 0
    again = read_jsonl(tmp_path / "o.jsonl")
    assert [(r["prediction"], r["probability"]) for r in again] == [(r["prediction"], r["probability"]) for r in rows]


@pytest.mark.parametrize("activation", list(NetworkActivation))
def test_a_network_trained_by_sgd_on_house_prices_comes_near_the_noise_it_cannot_explain(
    activation: NetworkActivation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    floors = house_maker().make_houses(tmp_path, num_train=1200, num_valid=800, seed=3)
    task = RegressTaskConfig(
        data=str(tmp_path / "train.csv"),
        valid=str(tmp_path / "valid.csv"),
        target="price",
        numeric=["area", "rooms", "age", "distance", "floor", "garden"],
        network=NetworkConfig(d_hidden=32, activation=activation),
    )
    cfg = config_of(task, tmp_path / "run", batch_size=50, micro_batch_size=None, max_steps=400)
    cfg = replace(cfg, log=LogConfig(every_steps=400), eval=EvalConfig(every_steps=200))
    result = finetune.run(replace(cfg, predict=str(tmp_path / "valid.csv"), output=str(tmp_path / "out.jsonl")))
    assert result["rmse"] < 1.12 * floors["on_valid"]["numbers"]
    assert result["target_std"] > 3 * result["rmse"]
    rows = read_jsonl(tmp_path / "out.jsonl")
    errors = [row["prediction"] - float(row["price"]) for row in rows]
    rmse = (sum(e * e for e in errors) / len(errors)) ** 0.5
    assert rmse == pytest.approx(result["prediction"]["rmse"], rel=1e-5)
    # What is learnt and what is judged are of different units: neither side by side nor on one axis.
    judged = next(row["valid_rmse"] for row in read_metrics(tmp_path / "run") if "valid_rmse" in row)
    assert f"  valid RMSE {format_number(judged)}" in capsys.readouterr().err
    assert cli.main(["runs", "report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert '<figure id="loss">' in page
    assert '<figure id="valid-loss">' in page
    assert abs(rmse - min(row["valid_rmse"] for row in read_metrics(tmp_path / "run") if "valid_rmse" in row)) < 1e-2


def test_a_listing_that_is_read_beside_the_numbers_tells_more_than_the_numbers(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    draw = random.Random(4)
    rows = []
    for _ in range(300):
        label, size = draw.choice(["good", "bad"]), draw.uniform(0, 10)
        rows.append({"text": review(draw, label), "size": size, "target": 3 * size + (20 if label == "good" else 0)})
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = {}
    for text in ("text", None):
        task = RegressTaskConfig(data=str(data), text=text, numeric=["size"], dropout=0.0)
        base = bases["lstm"] if text else None
        found[text] = finetune.run(config_of(task, tmp_path / str(text), base, max_steps=100, micro_batch_size=None))
    assert found[None]["rmse"] > 8.5  # the 20 of the text, unseen, leave 10
    assert found["text"]["rmse"] < 5
    predicted = write_jsonl(tmp_path / "new.jsonl", [{"text": "good film", "size": 5, "x": {"y": [1]}}])
    assert cli.main(["finetune", f"run={tmp_path / 'text'}", f"predict={predicted}"]) == 0
    (row,) = read_jsonl(tmp_path / "new.predictions.jsonl")
    assert row["x"] == {"y": ["1"]}
    assert row["prediction"] == pytest.approx(35, abs=12)


def test_a_run_that_numbers_alone_do_not_start_from_is_told(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tasks_of(tmp_path)["numbers"]
    finetune.run(config_of(task, tmp_path / "run", bases["lstm"], max_steps=2))
    assert f"warning: run={bases['lstm']} is not used: task.text names no column" in capsys.readouterr().err
    finetune.run(config_of(task, tmp_path / "alone", max_steps=2))
    assert "is not used" not in capsys.readouterr().err


def test_of_a_pair_both_texts_are_read(bases: dict[str, Path], tmp_path: Path) -> None:
    draw = random.Random(5)
    rows = []
    for _ in range(200):
        first, second = (draw.choice(["good", "bad"]) for _ in range(2))
        rows.append({"first": first, "second": second, "label": f"{first} {second}"})
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    task = ClassifyTaskConfig(data=str(path), text="first", pair="second", dropout=0.0)
    cfg = config_of(task, tmp_path / "run", bases["lstm"], max_steps=60, micro_batch_size=None)
    result = finetune.run(replace(cfg, optimizer=AdamwConfig(lr=1e-2), eval=EvalConfig()))
    assert len(result["labels"]) == 4
    assert result["accuracy"] == 1.0


# Laws


def tasks_of(folder: Path) -> dict[str, TaskConfig]:
    data = str(reviews(folder / "data.jsonl", 60, 1))
    rows = [{"n": i, "m": (i * 7) % 11} for i in range(60)]
    numbers = str(write_jsonl(folder / "numbers.jsonl", rows))
    return {
        "classify": ClassifyTaskConfig(data=data, class_weights="balanced"),
        "regress": RegressTaskConfig(data=data, target="n", text="text", valid_fraction=0.2),
        "numbers": RegressTaskConfig(data=numbers, target="n", numeric=["m"]),
    }


@pytest.mark.parametrize(
    ("kind", "family", "stop_at"),
    [("classify", "transformer", 6), ("classify", "lstm", 8), ("regress", "lstm", 9), ("numbers", "", 5)],
)
def test_a_run_that_was_stopped_and_resumed_is_the_same_bit_for_bit(
    kind: str, family: str, stop_at: int, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks_of(tmp_path)[kind]
    base = None if kind == "numbers" else bases[family]
    whole, pieces = (config_of(task, tmp_path / name, base, ema_decay=0.9) for name in ("whole", "pieces"))
    finetune.run(whole)
    with monkeypatch.context() as patch:
        signal_after(patch, stop_at)
        with pytest.raises(StoppedError):
            finetune.run(pieces)
    finetune.run(replace(pieces, resume=True))
    assert_same(tensors_in(tmp_path / "whole"), tensors_in(tmp_path / "pieces"))
    losses = [[row.get("loss") for row in read_metrics(tmp_path / name)] for name in ("whole", "pieces")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("kind", "micro", "advice"),
    [
        ("classify", 4, r"of 4 and texts of up to \d+ tokens \(task\.max_tokens\); .*train\.micro_batch_size=2$"),
        ("regress", 1, r"of 1 and texts of .*; use a smaller model or \(in a new run\) a lower task\.max_tokens, or"),
        ("numbers", 1, r"of 1; .*; use a smaller model, or another device$"),
    ],
)
def test_where_memory_runs_out_the_advice_names_what_limits_the_length_of_a_row(
    kind: str, micro: int, advice: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_step(self: Trainer, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "train_step", train_step)
    base = None if kind == "numbers" else bases["lstm"]
    cfg = config_of(tasks_of(tmp_path)[kind], tmp_path / "run", base, micro_batch_size=micro)
    with pytest.raises(ResourceError, match=advice) as caught:
        finetune.run(cfg)
    assert "seq_len" not in str(caught.value)


def test_predictions_do_not_depend_on_the_batch_size(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for family, base in bases.items():
        cfg = config_of(tasks_of(tmp_path)["classify"], tmp_path / family, base)
        finetune.run(cfg)
        found = []
        for size in (1, 7, 32):
            monkeypatch.setattr("lmkit.commands.predict.PREDICT_BATCH", size)
            finetune.run(predicting(cfg, tmp_path / "data.jsonl", tmp_path / "out.jsonl"))
            found.append(read_jsonl(tmp_path / "out.jsonl"))
        for other in found[1:]:
            assert [row["prediction"] for row in other] == [row["prediction"] for row in found[0]]
            assert [r["probability"] for r in other] == pytest.approx([r["probability"] for r in found[0]], abs=1e-5)


def test_predictions_go_beside_what_is_read(tmp_path: Path) -> None:
    for name in ("new.jsonl", "new.csv.gz", "new.TSV.ZST"):
        cfg = replace(config_of(ClassifyTaskConfig(data="train.csv"), tmp_path / "run"), predict=str(tmp_path / name))
        assert _output_path(cfg) == tmp_path / "new.predictions.jsonl"


def predicting(cfg: FinetuneConfig, file: Path, output: Path) -> FinetuneConfig:
    """The configuration of predicting with the run that ``cfg`` makes."""
    from lmkit.config.tasks import LmTaskConfig

    path = cfg.run.dir
    return replace(cfg, task=LmTaskConfig(), run=RunConfig(path=path), predict=str(file), output=str(output))


@pytest.mark.parametrize("adapter", [None, AdapterConfig(rank=2)], ids=["full", "lora"])
def test_a_file_is_predicted_by_the_best_checkpoint_as_it_was_judged(
    adapter: AdapterConfig | None, bases: dict[str, Path], tmp_path: Path
) -> None:
    valid = reviews(tmp_path / "valid.jsonl", 50, 3)
    task = ClassifyTaskConfig(data=str(reviews(tmp_path / "data.jsonl", 60, 1)), valid=str(valid))
    cfg = config_of(task, tmp_path / "run", bases["transformer"], max_steps=30)
    cfg = replace(cfg, adapter=adapter, optimizer=AdamwConfig(lr=1e-2))
    result = finetune.run(replace(cfg, predict=str(valid), output=str(tmp_path / "out.jsonl")))
    judged = [row["valid_accuracy"] for row in read_metrics(tmp_path / "run") if "valid_accuracy" in row]
    assert result["prediction"]["accuracy"] == max(judged) > judged[0]
    assert result["prediction"]["num_labelled"] == 50


def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(bases: dict[str, Path], tmp_path: Path) -> None:
    task = replace(tasks_of(tmp_path)["classify"], dropout=0.0)  # type: ignore[type-var]
    norms = []
    for size in (1, 8, 24):
        cfg = config_of(task, tmp_path / str(size), bases["transformer"], batch_size=24, micro_batch_size=size)
        finetune.run(replace(cfg, train=replace(cfg.train, max_steps=2)))
        norms.append([row["grad_norm"] for row in read_metrics(tmp_path / str(size)) if "loss" in row])
    for other in norms[1:]:
        assert other == pytest.approx(norms[0], rel=1e-3)


def test_a_replayed_step_has_the_loss_of_the_run_example_by_example(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config_of(tasks_of(tmp_path)["classify"], tmp_path / "run", bases["lstm"])
    finetune.run(replace(cfg, save=SaveConfig(every_steps=5)))
    logged = next(row for row in read_metrics(tmp_path / "run") if row["step"] == 7 and "loss" in row)
    again = replay(tmp_path / "run", 7, Console())
    assert (again["loss"], again["grad_norm"]) == (logged["loss"], logged["grad_norm"])
    assert again["num_targets"] == len(again["rows"])
    assert sum(row["nats_per_token"] for row in again["rows"]) / again["num_targets"] == pytest.approx(
        logged["loss"], rel=1e-5
    )
    numbers = write_jsonl(tmp_path / "n.jsonl", [{"n": i, "m": (i * 7) % 11} for i in range(60)])
    task = RegressTaskConfig(data=str(numbers), target="n", numeric=["m"])
    finetune.run(replace(config_of(task, tmp_path / "numbers"), save=SaveConfig(every_steps=5)))
    logged = next(row for row in read_metrics(tmp_path / "numbers") if row["step"] == 7 and "loss" in row)
    again = replay(tmp_path / "numbers", 7, Console())
    assert again["loss"] == logged["loss"]
    assert len(again["rows"]) == again["num_targets"]
    assert all("nats_per_token" not in row for row in again["rows"])
    assert cli.main(["runs", "replay", str(tmp_path / "numbers"), "step=7"]) == 0
    monkeypatch.setattr(replay_command, "ORDER", "2")
    with pytest.raises(DataError, match="in another order of its data"):
        replay(tmp_path / "numbers", 7, Console())


def test_the_best_checkpoint_and_patience_go_by_the_metric(bases: dict[str, Path], tmp_path: Path) -> None:
    cfg = config_of(tasks_of(tmp_path)["classify"], tmp_path / "run", bases["lstm"], patience=2, max_steps=400)
    result = finetune.run(cfg)
    rows = [row for row in read_metrics(tmp_path / "run") if "valid_loss" in row]
    assert all(row["valid_loss"] == pytest.approx(1 - row["valid_accuracy"]) for row in rows)
    best = min(range(len(rows)), key=lambda i: rows[i]["valid_loss"])
    assert result["step"] < 400
    assert len(rows) - 1 - best == 2
    summary = read_summary(tmp_path / "run")
    assert (summary.best_valid_loss, summary.token_ppl) == (rows[best]["valid_loss"], None)


# What is refused


def test_what_does_not_fit_is_refused_in_one_line(bases: dict[str, Path], tmp_path: Path, config: MakeConfig) -> None:
    good = reviews(tmp_path / "good.jsonl", 30, 1)
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"text": "a", "label": "meh"}])
    few = write_jsonl(tmp_path / "few.jsonl", [{"text": "a"}] * 10)
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    classify = ClassifyTaskConfig(data=str(good))
    base = bases["transformer"]

    def refused(error: type[Exception], text: str, task: TaskConfig, **more: Any) -> None:
        with pytest.raises(error, match=text):
            finetune.run(replace(config_of(task, tmp_path / "never", base), **more))
        assert not (tmp_path / "never").exists()

    refused(DataError, r"odd\.jsonl, line 1: the label 'meh'", replace(classify, valid=str(odd)))
    refused(DataError, "no column 'label'", replace(classify, data=str(few)))
    refused(DataError, "holds no rows", replace(classify, data=str(tmp_path / "empty.jsonl")))
    refused(ConfigError, r"task\.max_tokens=999 is more than the model's context", replace(classify, max_tokens=999))
    refused(DataError, "which is no number", RegressTaskConfig(data=str(good), target="label", text="text"))
    refused(DataError, "holds no rows", classify, predict=str(tmp_path / "empty.jsonl"))
    refused(DataError, "lacks 'text'", classify, predict=str(write_jsonl(tmp_path / "x.jsonl", [{"words": "a"}])))
    refused(ConfigError, "the directory .* does not exist", classify, predict=str(few), output="/nowhere/at/all.jsonl")


def test_a_label_that_the_draw_would_hold_out_whole_is_learnt(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"text": "good film", "label": label} for label in ["good", "bad"] * 6 + ["odd"]]
    task = ClassifyTaskConfig(data=str(write_jsonl(tmp_path / "rows.jsonl", rows)), valid_fraction=0.5)
    cfg = config_of(task, tmp_path / "run", bases["lstm"])
    for seed in range(1, 9):
        made = finetune.set_up(replace(cfg, seed=seed), resolve_device(cfg.device), Console()).task
        assert isinstance(made, Classify)
        assert made.labels == ["bad", "good", "odd"]
        assert 2 not in made.valid.targets_N
        assert len(made.train) + len(made.valid) == 13
    alone = write_jsonl(tmp_path / "valid.jsonl", rows[-1:])
    task = replace(task, data=str(write_jsonl(tmp_path / "rows.jsonl", rows[:-1])), valid=str(alone))
    with pytest.raises(DataError, match=r"valid\.jsonl, line 1: the label 'odd' does not occur"):
        finetune.set_up(replace(cfg, task=task), resolve_device(cfg.device), Console())


def test_a_signal_while_the_training_is_written_down_as_finished_ends_the_command_before_it_predicts(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = reviews(tmp_path / "rows.jsonl", 30, 1)
    cfg = config_of(ClassifyTaskConfig(data=str(rows)), tmp_path / "run", bases["lstm"], max_steps=2)
    cfg = replace(cfg, predict=str(rows))
    write_result = Run.write_result

    def signalled(run: Run, *args: Any, **keys: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        write_result(run, *args, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_result", signalled)
        with pytest.raises(StoppedError, match=r"stopped by SIGTERM when .* was finished; .* resume=true"):
            finetune.run(cfg)
    assert status_of(tmp_path / "run") is Status.finished
    assert not (tmp_path / "rows.predictions.jsonl").exists()
    finetune.run(replace(cfg, resume=True))
    assert len(read_jsonl(tmp_path / "rows.predictions.jsonl")) == 30


def test_predictions_are_refused_where_there_is_no_classifier_or_not_what_it_reads(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    good = reviews(tmp_path / "good.jsonl", 30, 1)
    cfg = config_of(ClassifyTaskConfig(data=str(good)), tmp_path / "run", bases["lstm"], max_steps=2)
    finetune.run(cfg)
    use = predicting(cfg, good, tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match=r"predicts no labels or numbers \(task=lm\)"):
        finetune.run(replace(use, run=RunConfig(path=str(bases["lstm"]))))
    with pytest.raises(DataError, match="lacks 'text'; it has words"):
        finetune.run(replace(use, predict=str(write_jsonl(tmp_path / "x.jsonl", [{"words": "a"}]))))
    with pytest.raises(DataError, match="already has a column 'prediction'"):
        finetune.run(replace(use, predict=str(write_jsonl(tmp_path / "y.jsonl", [{"text": "a", "prediction": "b"}]))))
    with pytest.raises(ConfigError, match="is the file that is read"):
        finetune.run(replace(use, output=str(good)))
    with pytest.raises(ConfigError, match=r"predictions are JSON lines; name it with \.jsonl"):
        finetune.run(replace(use, output=str(tmp_path / "out.CSV")))
    with pytest.raises(DataError, match="does not exist"):
        finetune.run(replace(use, predict=str(tmp_path / "none.jsonl")))
    with pytest.raises(ConfigError, match=r"output=.*needs predict=FILE"):
        replace(use, predict=None)


def test_rows_of_the_hub_are_predicted_whatever_their_other_columns_hold(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["a good film"], "when": [datetime(2020, 1, 2)]})
    monkeypatch.setattr("lmkit.data.corpus.load_hub_split", lambda *_: table)
    task = ClassifyTaskConfig(data=str(reviews(tmp_path / "data.jsonl", 30, 1)))
    cfg = config_of(task, tmp_path / "run", bases["lstm"], max_steps=2)
    finetune.run(replace(cfg, predict="hub:a/b", output=str(tmp_path / "out.jsonl")))
    (row,) = read_jsonl(tmp_path / "out.jsonl")
    assert (row["text"], row["when"]) == ("a good film", "2020-01-02 00:00:00")
    assert row["prediction"] in ("good", "bad")


def test_rows_whose_label_is_unknown_are_predicted_and_left_out_of_the_scores(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    good = reviews(tmp_path / "good.jsonl", 30, 1)
    cfg = config_of(ClassifyTaskConfig(data=str(good)), tmp_path / "run", bases["lstm"], max_steps=2)
    finetune.run(cfg)
    rows = [{"text": "good film", "label": "good"}, {"text": "film", "label": "?"}]
    found = finetune.run(predicting(cfg, write_jsonl(tmp_path / "x.jsonl", rows), tmp_path / "out.jsonl"))
    assert (found["num_rows"], found["num_labelled"]) == (2, 1)
    assert sum(map(sum, found["confusion"])) == 1


def test_a_csv_with_quotes_and_line_ends_in_its_texts_is_read_and_written_whole(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    good = reviews(tmp_path / "good.jsonl", 30, 1)
    cfg = config_of(ClassifyTaskConfig(data=str(good)), tmp_path / "run", bases["lstm"], max_steps=2)
    finetune.run(cfg)
    texts = ['a "good" film', "two\nlines", "", "好 film"]
    with (tmp_path / "new.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["text", "id"], *([text, 1] for text in texts)])
    finetune.run(predicting(cfg, tmp_path / "new.csv", tmp_path / "out.jsonl"))
    assert [row["text"] for row in read_jsonl(tmp_path / "out.jsonl")] == texts

"""What task=classify and task=regress compute: weights, losses, scores, compared with numbers made by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lmkit.config.machine import Precision
from lmkit.config.tasks import ClassifyMetric, ClassifyTaskConfig, NetworkConfig, RegressTaskConfig
from lmkit.config.training import TrainConfig
from lmkit.data.examples import Examples, RowReader, Scale
from lmkit.data.rows import Record
from lmkit.device import Device
from lmkit.errors import ConfigError, DataError
from lmkit.tasks.classify import (
    Classify,
    alike_notes,
    class_weights,
    confusion,
    f1_scores,
    find_labels,
    label_ids,
    predictions,
    score_rows,
    summary,
)
from lmkit.tasks.regress import Regress
from lmkit.tasks.regress import predictions as regress_predictions
from lmkit.tasks.regress import summary as regress_summary
from lmkit.tasks.rows import split_notes, table_value
from lmkit.tokenizers import ByteTokenizer

CPU = Device(torch.device("cpu"), Precision.fp32, False, False, "cpu")


class FirstToken(nn.Module):
    """Logits that a table holds for each token; that of a text is its second one, after the end token."""

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, num_labels, generator=torch.Generator().manual_seed(0)))

    def forward(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        return self.table[tokens_BT[:, 1]]


def examples_of(labels: list[int], tokens: list[int]) -> Examples:
    texts = [np.array([0, token], dtype=np.int64) for token in tokens]
    return Examples(texts, np.zeros((len(labels), 0), np.float32), np.array(labels))


def task_of(labels: list[int], valid: Examples | None = None, num_labels: int = 2, **options: Any) -> Classify:
    config = ClassifyTaskConfig(data="rows.csv", **options)
    train = examples_of(labels, [i % 10 for i in range(len(labels))])
    names = [f"l{i}" for i in range(num_labels)]
    train_config = TrainConfig(batch_size=len(labels))
    return Classify(FirstToken(num_labels), config, ByteTokenizer(), train, valid or train, train_config, names, seed=1)


def summed_loss(task: Classify) -> Tensor:
    return task.loss(task.model, task.batches[0], None, 0.0)[0]


def test_balanced_weights_are_those_of_reweighting_by_hand() -> None:
    labels = [0] * 6 + [1] * 2
    task = task_of(labels, class_weights="balanced")
    batch = task.batches[0]
    nats = F.cross_entropy(task.model(batch.tokens_BT, batch.lengths_B), batch.targets_B, reduction="none")
    by_label = [nats[batch.targets_B == label].mean() for label in (0, 1)]
    expected = len(labels) * (by_label[0] + by_label[1]) / 2  # the mean over labels of the mean of each
    torch.testing.assert_close(summed_loss(task), expected)
    hand = task_of(labels, class_weights=f"{8 / (2 * 6)},{8 / (2 * 2)}")
    torch.testing.assert_close(summed_loss(hand), expected)


def test_a_weight_of_two_is_the_example_twice() -> None:
    weighted = task_of([0, 1, 1], class_weights="1,2")
    plain = task_of([0, 1, 1])
    batch = plain.batches[0]
    nats = plain.losses(plain.outputs(plain.model, batch), batch.targets_B)
    torch.testing.assert_close(summed_loss(weighted), nats.sum() + nats[batch.targets_B == 1].sum())


def test_weights_that_do_not_fit_the_labels_are_refused_with_their_names() -> None:
    config = ClassifyTaskConfig(data="x", class_weights="1,2,3")
    with pytest.raises(ConfigError, match=r"has 3 numbers, but there are 2 labels; .*no, yes"):
        class_weights(config, ["no", "yes"], np.array([1, 1]))
    for text in ("1,-2", "heavy", "1,nan", ""):
        with pytest.raises(ConfigError, match=r"task\.class_weights"):
            ClassifyTaskConfig(data="x", class_weights=text)


def test_confusion_and_f1_are_those_counted_by_hand() -> None:
    targets = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    predicted = np.array([0, 1, 0, 1, 2, 2, 2, 0, 2])
    table = confusion(targets, predicted, 4)
    assert table.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [1, 0, 3, 0], [0, 0, 0, 0]]
    f1 = f1_scores(table)
    assert f1[:3].tolist() == pytest.approx([2 * 2 / 6, 2 * 1 / 4, 2 * 3 / 8])
    assert math.isnan(f1[3])
    assert summary(table) == {"accuracy": pytest.approx(6 / 9), "macro_f1": pytest.approx((2 / 3 + 1 / 2 + 3 / 4) / 3)}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_f1_is_the_harmonic_mean_of_precision_and_recall_over_labels_that_occur(pairs: list[tuple[int, int]]) -> None:
    found = summary(confusion(*(np.array(side) for side in zip(*pairs, strict=True)), 4))
    scores = []
    for label in {label for pair in pairs for label in pair}:
        hits = sum(t == p == label for t, p in pairs)
        precision = hits / max(1, sum(p == label for _, p in pairs))
        recall = hits / max(1, sum(t == label for t, _ in pairs))
        scores.append(0.0 if hits == 0 else 2 * precision * recall / (precision + recall))
    assert found["macro_f1"] == pytest.approx(sum(scores) / len(scores))
    assert found["accuracy"] == pytest.approx(sum(t == p for t, p in pairs) / len(pairs))


@pytest.mark.parametrize("metric", list(ClassifyMetric))
def test_the_validation_loss_is_one_less_the_metric_and_does_not_depend_on_the_batch_size(
    metric: ClassifyMetric,
) -> None:
    valid = examples_of([0, 1, 1, 0, 1], [3, 4, 5, 6, 7])
    task = task_of([0, 1], valid, metric=metric)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = [task.validate(device=CPU, micro_batch_size=size, progress=lambda _: None) for size in (1, 2, 5)]
    assert torch.equal(torch.get_rng_state(), before)
    assert found[0].result == found[1].result == found[2].result
    assert found[0].loss == pytest.approx(1 - found[0].result[metric.name])
    predicted = task.model.table.argmax(1)[[3, 4, 5, 6, 7]].numpy()  # type: ignore[operator,union-attr]
    assert found[0].result["confusion"] == confusion(valid.targets_N, predicted, 2).tolist()


def rows(*labels: str) -> list[Record]:
    return [Record(f"file.csv, line {i}", {"label": label}) for i, label in enumerate(labels, start=2)]


def test_labels_are_sorted_and_one_that_training_has_not_is_refused_by_name_and_place() -> None:
    labels = find_labels(rows("b", "a", "b"), "label")
    assert labels == ["a", "b"]
    with pytest.raises(DataError, match=r"file\.csv, line 3: the label 'c' does not occur .*'a', 'b'"):
        label_ids(rows("a", "c"), "label", labels, strict=True)
    assert label_ids(rows("b", "c"), "label", labels, strict=False).tolist() == [1, -1]


def test_labels_that_look_alike_are_told() -> None:
    labels = find_labels(rows("spam", "ham", "spam ", "caf\u00e9", "cafe\u0301", "Spam"), "label")
    first, second = alike_notes(labels)
    assert first.startswith(r"the labels 'cafe\u0301' and 'caf\xe9' look alike but are two")
    assert second.startswith("the labels 'spam' and 'spam ' look alike but are two")
    assert list(alike_notes(["1", "10", "1.0", "Yes", "yes"])) == []


def test_an_empty_label_is_refused_in_training_and_unknown_in_prediction() -> None:
    with pytest.raises(DataError, match=r"column 'label' is empty; give the label, or remove the row"):
        find_labels(rows("a", "b", " "), "label")
    unlabelled = [*rows("b", ""), Record("x, line 3", {"label": None})]
    assert label_ids(unlabelled, "label", ["a", "b"], strict=False).tolist() == [1, -1, -1]


def test_rows_of_which_some_lack_the_label_are_judged_by_those_that_have_it() -> None:
    config = ClassifyTaskConfig(data="x")
    records = [*rows("a", "b"), Record("file.jsonl, line 3", {"text": "c"})]
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    added, numbers, shown = predictions(config, {"labels": ["a", "b"]}, logits, records)
    assert [row["prediction"] for row in added] == ["a", "a", "b"]
    assert (numbers["num_labelled"], numbers["accuracy"]) == (2, 0.5)
    assert ("rows with a known label", "2 of 3") in shown
    assert "num_labelled" not in predictions(config, {"labels": ["a", "b"]}, logits[2:], records[2:])[1]


def test_a_label_that_neither_occurs_nor_is_predicted_has_no_f1_to_show() -> None:
    confusion_CC = confusion(np.array([0, 0]), np.array([0, 0]), 2)
    shown = score_rows(summary(confusion_CC), confusion_CC, ["a", "b"])
    assert [value.split("F1 ")[1] for _, value in shown[-2:]] == ["100.0 %", "-"]


def test_a_single_label_and_a_column_that_is_no_label_are_refused() -> None:
    with pytest.raises(DataError, match="only the label 'a'"):
        find_labels(rows("a", "a"), "label")
    with pytest.raises(DataError, match=r"40 different labels in 40 rows; .*task=regress"):
        find_labels(rows(*map(str, range(40))), "label")


def test_texts_to_judge_on_that_are_learnt_from_too_are_told() -> None:
    reader = RowReader(ClassifyTaskConfig(data="x"), ByteTokenizer(), 9, {})
    train, valid = (
        reader.examples([Record("x", {"text": text}) for text in texts]) for texts in (["a", "b", "a"], ["c", "a"])
    )
    assert list(split_notes(reader, train, valid, of_texts=True)) == ["1 of 2 texts of valid stand in train, too"]
    assert list(split_notes(reader, train, valid, of_texts=False)) == []


def test_regression_scores_are_those_of_their_formulas() -> None:
    found = regress_summary(np.array([1.0, 2.0, 6.0]), np.array([1.0, 4.0, 5.0]))
    assert found["mse"] == pytest.approx(5 / 3)
    assert found["rmse"] == pytest.approx(math.sqrt(5 / 3))
    assert found["mae"] == pytest.approx(1.0)
    assert found["r2"] == pytest.approx(1 - 5 / (2.3333333**2 + 0.6666667**2 + 1.6666667**2))
    assert "r2" not in regress_summary(np.array([1.0, 2.0]), np.array([3.0, 3.0]))


def test_targets_that_are_all_the_same_have_no_r2_whatever_their_mean_is_rounded_to() -> None:
    assert "r2" not in regress_summary(np.array([0.1, 0.2, 0.3]), np.array([0.1, 0.1, 0.1]))


class Mean(nn.Module):
    """Says the mean of the target in the training rows, whatever it reads."""

    def forward(self, tokens_BT: Tensor, lengths_B: Tensor, numeric_BK: Tensor) -> Tensor:
        return torch.zeros(len(lengths_B))


def test_what_the_mean_is_worth_is_judged_on_the_rows_that_the_model_is_judged_on() -> None:
    tokens = [np.array([0], dtype=np.int64)] * 2
    train, valid = (
        Examples(tokens, np.zeros((2, 1), np.float32), np.array(targets, np.float32)) for targets in ([-1, 1], [3, 5])
    )
    config = RegressTaskConfig(data="x", numeric=["a"])
    scales = Scale(10.0, 2.0), {"a": Scale(0.0, 1.0)}
    task = Regress(Mean(), config, ByteTokenizer(), train, valid, TrainConfig(batch_size=2), *scales, seed=1)
    shown = dict(task.validate(device=CPU, micro_batch_size=2, progress=lambda _: None).rows)
    assert shown["RMSE"] == shown["RMSE of always saying the mean of train"] == "8.2462"  # of errors 6 and 10


def test_predictions_far_from_zero_keep_the_digits_in_which_they_differ() -> None:
    config = RegressTaskConfig(data="x", target="sold_at", numeric=["a"])
    fitted = {"target": {"mean": 1.7e9, "std": 100.0}, "numeric": {"a": {"mean": 0.0, "std": 1.0}}}
    outputs = torch.tensor([0.0, 0.25, -1.5], dtype=torch.float64)
    added, _, _ = regress_predictions(config, fitted, outputs, [Record("x", {"a": "1"})] * 3)
    assert [row["prediction"] for row in added] == [1_700_000_000.0, 1_700_000_025.0, 1_699_999_850.0]
    assert table_value(1 / 3) == table_value(1 / 3, 1.0) == 0.3333333
    assert math.isnan(table_value(math.nan, 1.0))
    assert table_value(math.inf, 1.0) == math.inf


def test_configurations_that_make_no_sense_are_refused_with_all_their_problems() -> None:
    with pytest.raises(ConfigError, match=r"task\.valid_fraction.*task\.max_tokens.*task\.text"):
        ClassifyTaskConfig(data="x", valid_fraction=0.9, max_tokens=1, text=None)
    with pytest.raises(ConfigError, match=r"task\.numeric=\[\] needs columns, or task\.text"):
        RegressTaskConfig(data="x")
    with pytest.raises(ConfigError, match=r"task\.target=a is also a column"):
        RegressTaskConfig(data="x", numeric=["a"], target="a")
    with pytest.raises(ConfigError, match=r"d_hidden"):
        NetworkConfig(d_hidden=0)

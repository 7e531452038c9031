"""A text, or a pair of texts, to a label: cross-entropy, accuracy, macro F1, confusion matrix. What task=classify does.

The labels are those of the training rows, as text, in sorted order; they are stored with the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unicodedata import normalize

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lmkit.config.tasks import ClassifyMetric, ClassifyTaskConfig
from lmkit.config.training import TrainConfig
from lmkit.console import Console, plural
from lmkit.data.examples import ExampleBatch, Examples, RowReader, read_split
from lmkit.data.rows import Record
from lmkit.device import Device
from lmkit.errors import ConfigError, DataError
from lmkit.models.base import LanguageModel, State
from lmkit.models.classifier import Classifier
from lmkit.tasks.base import Validation
from lmkit.tasks.rows import Fitted, RowsTask, all_outputs, longest_text, split_notes, table_value
from lmkit.tokenizers import Tokenizer

Counts = NDArray[np.int64]
MOST_SHOWN = 10
"""Labels up to which the table at the end shows them one by one."""
UNKNOWN = -1
"""Target of a row whose label is not known."""


class Classify(RowsTask):
    """Cross-entropy of the label; the loss of an example is multiplied by the weight of its label."""

    config: ClassifyTaskConfig

    def __init__(
        self,
        model: nn.Module,
        config: ClassifyTaskConfig,
        tokenizer: Tokenizer,
        train: Examples,
        valid: Examples,
        train_config: TrainConfig,
        labels: list[str],
        *,
        seed: int,
    ) -> None:
        self.labels = labels
        self.counts_C = np.bincount(train.targets_N, minlength=len(labels))
        self.weights_C = torch.tensor(class_weights(config, labels, self.counts_C), dtype=torch.float32)
        super().__init__(model, config, tokenizer, train, valid, train_config, seed=seed)

    def fitted(self) -> dict[str, Any]:
        return {"labels": self.labels}

    def outputs(self, forward: nn.Module, batch: ExampleBatch) -> Tensor:
        logits_BC: Tensor = forward(batch.tokens_BT, batch.lengths_B)
        return logits_BC

    def losses(self, outputs: Tensor, targets_B: Tensor) -> Tensor:
        if self.weights_C.device != outputs.device:
            self.weights_C = self.weights_C.to(outputs.device)
        return F.cross_entropy(outputs, targets_B, reduction="none") * self.weights_C[targets_B]

    @torch.no_grad()
    def row_losses(self, forward: nn.Module, batch: ExampleBatch, state: State | None) -> list[float]:
        losses: list[float] = self.losses(self.outputs(forward, batch), batch.targets_B).cpu().double().tolist()
        return losses

    def shown_valid(self, loss: float) -> tuple[str, str]:
        name = "accuracy" if self.config.metric is ClassifyMetric.accuracy else "macro F1"
        return f"valid {name}", f"{100 * (1 - loss):.2f} %"

    def validate(self, *, device: Device, micro_batch_size: int, progress: Callable[[int], None]) -> Validation:
        logits_NC = all_outputs(
            self.model, self.outputs, self.valid, device=device, batch_size=micro_batch_size, progress=progress
        )
        targets_N = torch.from_numpy(self.valid.targets_N)
        nats = float(F.cross_entropy(logits_NC, targets_N))
        confusion_CC = confusion(self.valid.targets_N, logits_NC.argmax(1).numpy(), len(self.labels))
        scores = {**summary(confusion_CC), "cross_entropy": nats}
        chosen = scores["accuracy" if self.config.metric is ClassifyMetric.accuracy else "macro_f1"]
        return Validation(
            loss=1.0 - chosen,
            metrics={f"valid_{name}": value for name, value in scores.items()},
            text=f"valid accuracy {100 * scores['accuracy']:.2f} %  macro F1 {100 * scores['macro_f1']:.2f} %"
            f"  cross-entropy {nats:.4f} nats",
            result={
                "split": "valid",
                "num_examples": len(self.valid),
                **scores,
                "labels": self.labels,
                "train_counts": self.counts_C.tolist(),
                "confusion": confusion_CC.tolist(),
            },
            rows=score_rows(scores, confusion_CC, self.labels),
        )


def build_task(
    config: ClassifyTaskConfig,
    backbone: LanguageModel,
    tokenizer: Tokenizer,
    train_config: TrainConfig,
    console: Console,
    *,
    seed: int,
) -> Classify:
    """Read the rows, learn the labels, and put a new head on the backbone. Raises ConfigError, DataError."""
    max_tokens = longest_text(config, backbone)
    train_records, valid_records = read_split(config, seed)
    if config.valid is None:
        train_records, valid_records = with_all_labels(train_records, valid_records, config.label)
    labels = find_labels(train_records, config.label)
    reader = RowReader(config, tokenizer, max_tokens, {})
    train, valid = (
        reader.examples(records, label_ids(records, config.label, labels, strict=True))
        for records in (train_records, valid_records)
    )
    for note in (*alike_notes(labels), *split_notes(reader, train, valid, of_texts=True)):
        console.warn(note)
    model = build_model(config, backbone, len(labels), seed=seed)
    task = Classify(model, config, tokenizer, train, valid, train_config, labels, seed=seed)
    if config.class_weights != "none":
        weights = zip(labels[:MOST_SHOWN], task.weights_C.tolist(), strict=False)
        more = ", ..." if len(labels) > MOST_SHOWN else ""
        console.say(f"class weights: {', '.join(f'{label[:30]!r} {weight:.4g}' for label, weight in weights)}{more}")
    return task


def build_model(config: ClassifyTaskConfig, backbone: LanguageModel, num_labels: int, *, seed: int) -> Classifier:
    """A new classifier on a backbone."""
    return Classifier(backbone, num_labels, pooling=config.pooling, dropout=config.dropout, seed=seed)


def with_all_labels(train: list[Record], valid: list[Record], column: str) -> tuple[list[Record], list[Record]]:
    """The two parts of a draw, but that held-out rows of a label that no training row has are training rows.

    Where that would leave nothing to judge on, the parts are as they were.
    """
    known = {record.text(column) for record in train}
    judged = [record for record in valid if record.text(column) in known]
    alone = [record for record in valid if record.text(column) not in known]
    return (train + alone, judged) if judged else (train, valid)


def find_labels(records: Sequence[Record], column: str) -> list[str]:
    """The labels in sorted order. Raises DataError if one is empty, if there is only one, or nearly one a row."""
    if empty := next((record for record in records if not record.text(column).strip()), None):
        raise DataError(f"{empty.where}, column '{column}' is empty", "give the label, or remove the row")
    counts = Counter(record.text(column) for record in records)
    if len(counts) < 2:
        raise DataError(f"column '{column}' holds only the label {min(counts)!r}", "there must be two or more")
    if len(counts) > max(20, len(records) // 2):
        raise DataError(
            f"column '{column}' holds {len(counts)} different labels in {len(records)} rows",
            "name the column of the label (task.label), or use task=regress for numbers",
        )
    return sorted(counts)


def alike_notes(labels: Sequence[str]) -> Iterator[str]:
    """What to tell of labels that look alike: blanks around them, or characters composed otherwise, make them two."""
    first: dict[str, str] = {}
    for label in labels:
        other = first.setdefault(normalize("NFC", label).strip(), label)
        if other != label:
            yield f"the labels {other!a} and {label!a} look alike but are two: write them alike if they are one"


def label_ids(records: Sequence[Record], column: str, labels: list[str], *, strict: bool) -> Counts:
    """(N,) the number of each row's label. A label that is not among them: DataError if strict, else UNKNOWN.

    So is one that is null or not there, as in rows still to be labelled.
    """
    known = {label: number for number, label in enumerate(labels)}
    told = [strict or record.values.get(column) is not None for record in records]
    found = [known.get(record.text(column), UNKNOWN) if t else UNKNOWN for record, t in zip(records, told, strict=True)]
    ids = np.array(found, dtype=np.int64)
    if strict and (ids == UNKNOWN).any():
        record = records[int(np.argmax(ids == UNKNOWN))]
        shown = ", ".join(map(repr, labels[:20]))
        raise DataError(
            f"{record.where}: the label {record.text(column)!r} does not occur in the training rows ({shown})",
            "repair the row, or give training rows of that label",
        )
    return ids


def class_weights(config: ClassifyTaskConfig, labels: list[str], counts_C: Counts) -> list[float]:
    """The weight of each label; balanced: N / (C x its training rows), so that all labels weigh the same together."""
    given = config.weight_list
    if given is None:
        if config.class_weights == "none":
            return [1.0] * len(labels)
        return [int(counts_C.sum()) / (len(labels) * int(count)) for count in counts_C]
    if len(given) != len(labels):
        raise ConfigError(
            f"task.class_weights={config.class_weights} has {len(given)} numbers, but there are {len(labels)} labels",
            f"give one for each of {', '.join(labels)[:200]}, in this order",
        )
    return given


def confusion(targets_N: Counts, predicted_N: Counts, num_labels: int) -> Counts:
    """(C, C): rows of the label in the row that were predicted as the label of the column."""
    flat = np.bincount(targets_N * num_labels + predicted_N, minlength=num_labels**2)
    return flat.reshape(num_labels, num_labels)


def f1_scores(confusion_CC: Counts) -> NDArray[np.float64]:
    """(C,) F1 = 2 TP / (2 TP + FP + FN) of each label; NaN where a label neither occurs nor is predicted."""
    hits_C = np.diag(confusion_CC).astype(np.float64)
    seen_C = confusion_CC.sum(0) + confusion_CC.sum(1)
    scores_C: NDArray[np.float64] = np.divide(2 * hits_C, seen_C, out=np.full(len(hits_C), np.nan), where=seen_C > 0)
    return scores_C


def summary(confusion_CC: Counts) -> dict[str, float]:
    """Accuracy, and macro F1: the mean over the labels that occur or are predicted."""
    accuracy = float(np.trace(confusion_CC) / confusion_CC.sum())
    return {"accuracy": accuracy, "macro_f1": float(np.nanmean(f1_scores(confusion_CC)))}


def score_rows(scores: dict[str, float], confusion_CC: Counts, labels: list[str]) -> list[tuple[str, str]]:
    """The numbers for the table at the end: name, value."""
    rows = [
        ("accuracy", f"{100 * scores['accuracy']:.2f} %"),
        ("macro F1", f"{100 * scores['macro_f1']:.2f} %"),
    ]
    if "cross_entropy" in scores:
        rows.append(("cross-entropy", f"{scores['cross_entropy']:.4f} nats"))
    if len(labels) > MOST_SHOWN:
        return [*rows, ("confusion matrix", f"{len(labels)} labels: see result.json")]
    width = max(len(str(count)) for count in confusion_CC.flat)
    for label, counts, f1 in zip(labels, confusion_CC, f1_scores(confusion_CC), strict=True):
        cells = " ".join(f"{count:>{width}}" for count in counts)
        shown = "-" if np.isnan(f1) else f"{100 * f1:.1f} %"
        rows.append((f"is {label[:30]!r}, predicted as", f"{cells}   F1 {shown}"))
    return rows


def predictions(
    config: ClassifyTaskConfig, fitted: Fitted, logits_NC: Tensor, records: Sequence[Record]
) -> tuple[list[dict[str, Any]], dict[str, Any], list[tuple[str, str]]]:
    """What to add to each row; the numbers of the rows whose label is known, if any; and those for a table."""
    labels: list[str] = list(fitted["labels"])
    probabilities_NC = logits_NC.softmax(1)
    best_N = probabilities_NC.argmax(1).numpy()
    added = [
        {"prediction": labels[best], "probability": table_value(float(row[best]))}
        for best, row in zip(best_N, probabilities_NC, strict=True)
    ]
    counts = Counter(labels[best] for best in best_N)
    rows = [(f"predicted {label[:30]!r}", plural(counts[label], "row")) for label in labels[:MOST_SHOWN]]
    numbers: dict[str, Any] = {"predicted": dict(counts)}
    if any(config.label in record.values for record in records):
        targets_N = label_ids(records, config.label, labels, strict=False)
        known = targets_N != UNKNOWN
        numbers["num_labelled"] = int(known.sum())
        if known.any():
            confusion_CC = confusion(targets_N[known], best_N[known], len(labels))
            scores = summary(confusion_CC)
            numbers |= {**scores, "labels": labels, "confusion": confusion_CC.tolist()}
            rows.append(("rows with a known label", f"{int(known.sum())} of {len(records)}"))
            rows += score_rows(scores, confusion_CC, labels)
    return added, numbers, rows

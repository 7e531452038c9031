"""A text, numbers or both to a number: mean squared error, RMSE, MAE, R^2. What task=regress does.

Numbers and target are standardised by mean and standard deviation of the training rows, which are stored with the run;
every metric is in the target's own units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lmkit.config.plain import from_plain
from lmkit.config.tasks import RegressMetric, RegressTaskConfig
from lmkit.config.training import TrainConfig
from lmkit.console import Console, format_number
from lmkit.data.examples import ExampleBatch, Examples, RowReader, Scale, number_of, numbers, read_split
from lmkit.data.rows import Record
from lmkit.device import Device
from lmkit.errors import DataError
from lmkit.models.base import LanguageModel
from lmkit.models.classifier import NumberRegressor, TextRegressor
from lmkit.tasks.base import Validation
from lmkit.tasks.rows import Fitted, RowsTask, all_outputs, longest_text, split_notes, table_value
from lmkit.tokenizers import Tokenizer


class Regress(RowsTask):
    """Squared error of the standardised target."""

    config: RegressTaskConfig

    def __init__(
        self,
        model: nn.Module,
        config: RegressTaskConfig,
        tokenizer: Tokenizer,
        train: Examples,
        valid: Examples,
        train_config: TrainConfig,
        target: Scale,
        numeric: Mapping[str, Scale],
        *,
        seed: int,
    ) -> None:
        self.target, self.numeric = target, dict(numeric)
        super().__init__(model, config, tokenizer, train, valid, train_config, seed=seed)

    def fitted(self) -> dict[str, Any]:
        scales = {name: {"mean": scale.mean, "std": scale.std} for name, scale in self.numeric.items()}
        return {"target": {"mean": self.target.mean, "std": self.target.std}, "numeric": scales}

    def outputs(self, forward: nn.Module, batch: ExampleBatch) -> Tensor:
        y_B: Tensor = forward(batch.tokens_BT, batch.lengths_B, batch.numeric_BK)
        return y_B

    def losses(self, outputs: Tensor, targets_B: Tensor) -> Tensor:
        return (outputs - targets_B).square()

    def shown_valid(self, loss: float) -> tuple[str, str]:
        if self.config.metric is RegressMetric.mse:
            return "valid RMSE", format_number(math.sqrt(loss))
        return "valid MAE", format_number(loss)

    def validate(self, *, device: Device, micro_batch_size: int, progress: Callable[[int], None]) -> Validation:
        y_N = all_outputs(
            self.model, self.outputs, self.valid, device=device, batch_size=micro_batch_size, progress=progress
        )
        scale = self.target
        targets_N = self.valid.targets_N.astype(np.float64) * scale.std + scale.mean
        scores = summary(y_N.numpy() * scale.std + scale.mean, targets_N)
        baseline = summary(np.full_like(targets_N, scale.mean), targets_N)["rmse"]
        r2 = f"{scores['r2']:.4f}" if "r2" in scores else "-"
        return Validation(
            loss=scores["mse" if self.config.metric is RegressMetric.mse else "mae"],
            metrics={f"valid_{name}": value for name, value in scores.items()},
            text=f"valid RMSE {format_number(scores['rmse'])}  MAE {format_number(scores['mae'])}  R^2 {r2}",
            result={
                "split": "valid",
                "num_examples": len(self.valid),
                **scores,
                "target_mean": scale.mean,
                "target_std": scale.std,
            },
            rows=[*score_rows(scores), ("RMSE of always saying the mean of train", format_number(baseline))],
        )


def build_task(
    config: RegressTaskConfig,
    backbone: LanguageModel | None,
    tokenizer: Tokenizer,
    train_config: TrainConfig,
    console: Console,
    *,
    seed: int,
) -> Regress:
    """Read the rows, learn means and standard deviations, and make the model. Raises ConfigError, DataError."""
    max_tokens = longest_text(config, backbone)
    train_records, valid_records = read_split(config, seed)
    targets = [numbers(records, config.target) for records in (train_records, valid_records)]
    target = Scale.of(targets[0], config.target)
    numeric = {name: Scale.of(numbers(train_records, name), name) for name in config.numeric}
    reader = RowReader(config, tokenizer, max_tokens, numeric)
    train, valid = (
        reader.examples(records, target.standardise(values).astype(np.float32))
        for records, values in zip((train_records, valid_records), targets, strict=True)
    )
    for note in split_notes(reader, train, valid, of_texts=config.text is not None):
        console.warn(note)
    model = build_model(config, backbone, seed=seed)
    return Regress(model, config, tokenizer, train, valid, train_config, target, numeric, seed=seed)


def build_model(config: RegressTaskConfig, backbone: LanguageModel | None, *, seed: int) -> nn.Module:
    """A new network on numbers, or on a backbone's vector of the text with the numbers beside it."""
    if backbone is None:
        return NumberRegressor(config.network, len(config.numeric), seed=seed)
    return TextRegressor(
        backbone, config.network, len(config.numeric), pooling=config.pooling, dropout=config.dropout, seed=seed
    )


def summary(predicted_N: NDArray[np.float64], targets_N: NDArray[np.float64]) -> dict[str, float]:
    """Mean squared error, its root, mean absolute error; R^2 = 1 - MSE / variance where the targets vary."""
    errors_N = predicted_N - targets_N
    mse = float(np.mean(errors_N**2))
    scores = {"mse": mse, "rmse": math.sqrt(mse), "mae": float(np.mean(np.abs(errors_N)))}
    variance = float(targets_N.var())
    varies = bool(targets_N.min() < targets_N.max())  # the variance of three times 0.1 is not 0 but 2e-34
    return {**scores, "r2": 1.0 - mse / variance} if varies and variance > 0 else scores


def score_rows(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The numbers for the table at the end: name, value."""
    rows = [("RMSE", format_number(scores["rmse"])), ("MAE", format_number(scores["mae"]))]
    return [*rows, ("R^2", f"{scores['r2']:.4f}")] if "r2" in scores else rows


def scales_of(config: RegressTaskConfig, fitted: Fitted) -> tuple[Scale, dict[str, Scale]]:
    """The scale of the target and those of the numeric columns, in the order in which the model reads them.

    Raises ConfigError for a scale with keys that this version does not know.
    """
    numeric = {name: from_plain(Scale, fitted["numeric"][name], where=f"fitted.{name}") for name in config.numeric}
    return from_plain(Scale, fitted["target"], where="fitted.target"), numeric


def predictions(
    config: RegressTaskConfig, fitted: Fitted, outputs_N: Tensor, records: Sequence[Record]
) -> tuple[list[dict[str, Any]], dict[str, Any], list[tuple[str, str]]]:
    """What to add to each row; the numbers of the rows whose target is known, if any; and those for a table."""
    scale, _ = scales_of(config, fitted)
    predicted_N = outputs_N.numpy() * scale.std + scale.mean
    added = [{"prediction": table_value(float(value), scale.std)} for value in predicted_N]
    numbers_found: dict[str, Any] = {"mean_prediction": float(predicted_N.mean())}
    rows = [("mean prediction", format_number(float(predicted_N.mean())))]
    known = [(i, value) for i, record in enumerate(records) if (value := _known(record, config.target)) is not None]
    if known:
        scores = summary(predicted_N[[i for i, _ in known]], np.array([value for _, value in known]))
        numbers_found |= {"num_labelled": len(known), **scores}
        rows += [("rows with a known target", f"{len(known)} of {len(records)}"), *score_rows(scores)]
    return added, numbers_found, rows


def _known(record: Record, column: str) -> float | None:
    """The number in a column; None where there is none."""
    if column not in record.values:
        return None
    try:
        return number_of(record, column)
    except DataError:
        return None

"""Averages of the weights: what they are the mean of, and when they begin."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lmkit.averaging import WeightAverage, average_begins, build_average, is_nonmonotonic
from lmkit.config.training import Average, TrainConfig
from lmkit.errors import ConfigError
from lmkit.horizon import Horizon


def trajectory(num_steps: int) -> list[float]:
    return [float(3 * n * n % 7 + n) for n in range(1, num_steps + 1)]


def averaged(average: WeightAverage, model: nn.Linear, values: list[float], since: int | None) -> float:
    """The average after the weight took ``values``, one a step."""
    for step, value in enumerate(values, start=1):
        nn.init.constant_(model.weight, value)
        average.update(model, step, since if since is None or step > since else None)
    return average.tensors()["weight"].item()


@pytest.mark.parametrize("since", [0, 1, 4, 9])
def test_a_uniform_average_is_the_mean_of_the_weights_behind_its_start(since: int) -> None:
    model, values = nn.Linear(1, 1, bias=False), trajectory(10)
    mean = sum(values[since:]) / len(values[since:])
    assert averaged(WeightAverage(model, None), model, values, since) == pytest.approx(mean)


def test_before_its_start_a_uniform_average_is_the_weights_to_the_last_bit() -> None:
    torch.manual_seed(0)
    model = nn.Linear(7, 7)
    average = WeightAverage(model, None)
    nn.init.normal_(model.weight)
    average.update(model, 5, None)
    assert torch.equal(average.tensors()["weight"], model.weight)


def test_an_average_of_floating_ulps_loses_nothing_it_should_keep() -> None:
    model = nn.Linear(1, 1, bias=False)
    assert averaged(WeightAverage(model, None), model, [0.1] * 50, 0) == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize(
    ("losses", "patience", "begins"),
    [
        ([], 2, False),
        ([5.0, 4.0, 3.0, 2.0, 1.0], 2, False),
        ([5.0, 4.0, 3.0, 3.5], 1, False),
        ([5.0, 3.0, 3.0, 3.5], 1, True),
        ([5.0, 3.0, 4.0, 3.5], 2, False),
        ([3.0, 5.0, 4.0, 3.5], 2, True),
        ([3.0, 5.0, 4.0, 3.5, 1.0, 0.5], 2, True),
    ],
)
def test_nt_asgd_begins_as_in_algorithm_1_and_never_ends(losses: list[float], patience: int, begins: bool) -> None:
    assert is_nonmonotonic(losses, patience) is begins
    config = TrainConfig(average=Average.nt_asgd, asgd_patience=patience)
    assert average_begins(config, 0.5, [losses]) is begins
    assert average_begins(config, 0.5, [losses, [9.0, 8.0, 7.0, 6.0]]) is begins, "of other data, which they are above"


def as_in_awd_lstm(losses: list[float], patience: int) -> bool:
    """The condition of salesforce/awd-lstm-lm's main.py, one evaluation after the other."""
    logs: list[float] = []
    for loss in losses:
        if len(logs) > patience and loss > min(logs[:-patience]):
            return True
        logs.append(loss)
    return False


def test_nt_asgd_begins_when_the_authors_code_does() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        losses = torch.randint(0, 12, (9,), generator=generator).float().sort(descending=True).values
        losses = losses + torch.randint(0, 4, (9,), generator=generator)
        for patience in (1, 2, 5):
            assert is_nonmonotonic(losses.tolist(), patience) is as_in_awd_lstm(losses.tolist(), patience)


@pytest.mark.parametrize("fifths", [1, 2, 3, 4])
def test_swa_begins_with_the_very_step_behind_its_share(fifths: int) -> None:
    """Also where rounding has put the progress of that step a little below its share: 28 x (1 / 35) < 0.8."""
    swa = TrainConfig(average=Average.swa, swa_start=fifths / 5)
    for num_steps in range(5, 400, 5):
        horizon, first = Horizon(1.0 / num_steps), fifths * num_steps // 5
        assert [average_begins(swa, horizon.progress(step), []) for step in (first - 1, first)] == [False, True]


def test_swa_begins_at_its_share_of_the_run_and_ema_needs_no_start() -> None:
    swa = TrainConfig(average=Average.swa, swa_start=0.5)
    assert [average_begins(swa, p, [[9.0, 1.0, 5.0, 8.0]]) for p in (0.0, 0.49, 0.5, 1.0)] == [False, False, True, True]
    assert not average_begins(TrainConfig(ema_decay=0.9), 1.0, [[1.0, 2.0, 3.0]])


@pytest.mark.parametrize(
    ("config", "decay"),
    [
        (TrainConfig(ema_decay=0.9), 0.9),
        (TrainConfig(average=Average.ema, ema_decay=0.9), 0.9),
        (TrainConfig(average=Average.swa), None),
        (TrainConfig(average=Average.nt_asgd), None),
    ],
)
def test_the_configuration_chooses_the_average(config: TrainConfig, decay: float | None) -> None:
    model = nn.Linear(1, 1)
    sgd = torch.optim.SGD(model.parameters())
    average = build_average(config, model, sgd)
    assert average is not None
    assert average.decay == decay
    assert build_average(TrainConfig(), model, sgd) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"average": Average.ema}, "train.average=ema needs train.ema_decay"),
        ({"average": Average.swa, "ema_decay": 0.9}, "train.average=swa excludes train.ema_decay"),
        ({"swa_start": 1.0, "asgd_patience": 0}, r"train.swa_start=1 .*train.asgd_patience=0"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**settings)  # type: ignore[arg-type]

"""Laws of the learning-rate schedules."""

from __future__ import annotations

import pytest

from lmkit.config.optimization import (
    ConstantConfig,
    CosineConfig,
    InverseSqrtConfig,
    LinearConfig,
    PlateauConfig,
    ScheduleConfig,
    StepDecayConfig,
    WsdConfig,
)
from lmkit.horizon import Horizon
from lmkit.schedules import lr_factor, num_plateaus

ALL: list[ScheduleConfig] = [
    ConstantConfig(),
    CosineConfig(),
    LinearConfig(),
    WsdConfig(),
    StepDecayConfig(),
    InverseSqrtConfig(),
    PlateauConfig(),
]


@pytest.mark.parametrize("config", ALL, ids=lambda c: type(c).__name__)
def test_factor_stays_between_0_and_1_and_warms_up_from_above_0(config: ScheduleConfig) -> None:
    factors = [lr_factor(config, step, step / 1000) for step in range(1001)]
    assert all(0.0 <= f <= 1.0 for f in factors)
    assert 0.0 < factors[0] < factors[10] < factors[19]
    assert max(factors) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("config", "end"), [(CosineConfig(final_ratio=0.1), 0.1), (LinearConfig(), 0.0), (WsdConfig(), 0.0)]
)
def test_decaying_schedules_end_at_the_final_ratio(config: ScheduleConfig, end: float) -> None:
    assert lr_factor(config, 1000, 1.0) == pytest.approx(end)


def test_cosine_is_halfway_at_half_time() -> None:
    assert lr_factor(CosineConfig(warmup_ratio=0.0), 500, 0.5) == pytest.approx(0.5)


def test_step_decay_halves_the_rate_of_each_epoch_after_the_fourth_of_thirteen() -> None:
    config = StepDecayConfig(hold_ratio=4 / 13, num_falls=9, warmup_ratio=0.0)
    steps_per_epoch = 2_324
    for epoch in range(13):
        for step in (0, 1, steps_per_epoch - 1):
            done = (epoch * steps_per_epoch + step) / (13 * steps_per_epoch)
            assert lr_factor(config, epoch * steps_per_epoch + step, done) == 0.5 ** max(0, epoch - 3)
    assert lr_factor(config, 13 * steps_per_epoch, 1.0) == 0.5**9


@pytest.mark.parametrize("fifths", [1, 2, 3, 4])
def test_the_first_fall_is_at_the_very_step_where_the_constant_part_ends(fifths: int) -> None:
    """Also where rounding has put the progress of that step a little below its share: 7 x (1 / 35) < 0.2."""
    config = StepDecayConfig(hold_ratio=fifths / 5, num_falls=3, warmup_ratio=0.0)
    for num_steps in range(5, 400, 5):
        horizon, first = Horizon(1.0 / num_steps), fifths * num_steps // 5
        assert [lr_factor(config, step, horizon.progress(step)) for step in (first - 1, first)] == [1.0, 0.5]


def test_wsd_is_constant_until_its_decay() -> None:
    config = WsdConfig(decay_ratio=0.25)
    assert lr_factor(config, 700, 0.74) == 1.0
    assert lr_factor(config, 875, 0.875) == pytest.approx(0.5)


def test_inverse_sqrt_follows_vaswani() -> None:
    for warmup in (1, 2, 100):  # his counts the first update at the peak, too
        config = InverseSqrtConfig(warmup_steps=warmup - 1)
        for step in range(1, 401):
            his = min(step**-0.5, step * warmup**-1.5) / warmup**-0.5
            assert lr_factor(config, step - 1, step / 400) == pytest.approx(his)


def test_warmup_steps_count_updates() -> None:
    config = ConstantConfig(warmup_steps=4)
    assert [lr_factor(config, step, 0.0) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("kind", [CosineConfig, LinearConfig])
def test_a_decay_begins_at_the_peak_whether_the_warm_up_is_given_in_steps_or_as_a_share(
    kind: type[CosineConfig | LinearConfig],
) -> None:
    by_steps, by_share = kind(warmup_steps=400), kind(warmup_ratio=0.4)
    assert lr_factor(by_steps, 400, 0.4) == 1.0
    for step in range(400, 1001):
        assert lr_factor(by_steps, step, step / 1000) == pytest.approx(lr_factor(by_share, step, step / 1000))


def test_plateau_falls_once_per_stretch_without_improvement() -> None:
    assert num_plateaus([5.0, 4.0, 3.0], patience=1) == 0
    assert num_plateaus([5.0, 5.1, 5.2], patience=1) == 1
    assert num_plateaus([5.0, 5.1, 5.2, 5.3, 5.4], patience=1) == 2
    assert lr_factor(PlateauConfig(factor=0.5, patience=0), 9, 0.9, [[3.0, 3.1]]) == 0.5
    assert lr_factor(PlateauConfig(factor=0.5, patience=0, min_ratio=0.3), 9, 0.9, [[3.0] + [3.1] * 9]) == 0.3


def test_plateaus_of_other_data_stay_and_losses_are_not_compared_with_those_before() -> None:
    config = PlateauConfig(factor=0.5, patience=0)
    for losses, factor in (([], 0.5), ([9.0], 0.5), ([9.0, 8.0], 0.5), ([9.0, 8.0, 8.5], 0.25), ([1.0, 2.0], 0.25)):
        assert lr_factor(config, 9, 0.9, [[3.0, 3.1], losses]) == factor

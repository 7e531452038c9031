"""Laws of the training step: the cut of a batch does not matter, bad batches leave no trace, the horizon ends."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lmkit.heads
from lmkit import errors, revocable
from lmkit.averaging import WeightAverage
from lmkit.config.machine import DeviceConfig, DeviceType, Precision
from lmkit.config.optimization import (
    AdadeltaConfig,
    AdagradConfig,
    AdamConfig,
    AdamwConfig,
    ConstantConfig,
    MuonConfig,
    NadamConfig,
    OptimizerConfig,
    RmspropConfig,
    ScheduleFreeConfig,
    SgdConfig,
)
from lmkit.data.batches import Batch
from lmkit.device import resolve_device
from lmkit.errors import is_out_of_memory
from lmkit.horizon import Horizon
from lmkit.models.base import IGNORE, Head, LanguageModel, Scores, State
from lmkit.objectives import ExactSoftmax
from lmkit.optim import build_optimizer, is_on_host
from lmkit.snapshots import restore_trainer, trainer_tensors
from lmkit.tasks.language import NextToken
from lmkit.train import Trainer, TrainState, fit, pays_to_read_late

VOCAB = 11
OPTIMIZERS = [
    SgdConfig(lr=0.5),
    SgdConfig(lr=0.5, momentum=0.9),
    AdagradConfig(),
    AdadeltaConfig(),
    RmspropConfig(),
    RmspropConfig(momentum=0.9),
    AdamConfig(),
    AdamwConfig(),
    NadamConfig(),
    MuonConfig(),
    ScheduleFreeConfig(),
]
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
fused_or_not = pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])


@dataclass(frozen=True)
class Sum(State):
    total_B: Tensor

    def detach(self) -> Sum:
        return Sum(self.total_B.detach())

    def select(self, rows: Tensor) -> Sum:
        return Sum(self.total_B[rows])

    def tensors(self) -> dict[str, Tensor]:
        return {"total": self.total_B}


class PlainHead(Head):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCAB, 4) * 0.1)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND @ self.weight.T

    def loss(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.logits(hidden_ND), targets_N, reduction="sum", ignore_index=IGNORE)

    def score(self, hidden_ND: Tensor, targets_N: Tensor) -> Scores:
        raise AssertionError("not needed here")


class Toy(LanguageModel):
    """The hidden vector is the embedding plus a carried running sum, so that losing the state would be seen."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vocab_size, self.context = VOCAB, None
        self.embedding = nn.Embedding(VOCAB, 4)
        self.dropout = nn.Dropout(dropout)
        self.head = PlainHead()

    def forward(self, tokens_BT: Tensor, state: Any = None, *, use_state: bool = False) -> tuple[Tensor, Any]:
        start = 0.0 if state is None else state.total_B[:, None]
        total_BT = start + tokens_BT.cumsum(1) * 0.01
        return self.dropout(self.embedding(tokens_BT)) + total_BT[..., None], Sum(total_BT[:, -1])

    def state_from_tensors(self, tensors: dict[str, Tensor]) -> Sum:
        return Sum(tensors["total"])


class Random:
    steps_per_epoch = 4

    def __getitem__(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, VOCAB, (6, 6), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[0, 1:] = IGNORE
        return Batch(tokens[:, :-1], targets, starts_text=step % self.steps_per_epoch == 0)


def trainer(
    micro: int = 6,
    optimizer: OptimizerConfig | None = None,
    max_steps: int = 8,
    dropout: float = 0.0,
    fused: bool = False,
    precision: Precision = Precision.fp32,
    **options: Any,
) -> Trainer:
    model = Toy(dropout)
    config = optimizer or SgdConfig(lr=0.5)
    if isinstance(config, ScheduleFreeConfig):
        pytest.importorskip("schedulefree")
    return Trainer(
        task=NextToken(model, Random(), ExactSoftmax()),
        model=model,
        optimizer=build_optimizer(config, model, fused=fused),
        optimizer_config=config,
        schedule=ConstantConfig(warmup_ratio=0.0),
        device=replace(resolve_device(DeviceConfig(type=DeviceType.cpu, threads=1)), precision=precision),
        seed=3,
        micro_batch_size=micro,
        state=TrainState(horizon=Horizon(1 / max_steps)),
        **options,
    )


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_the_update_does_not_depend_on_how_the_batch_is_cut(micro: int) -> None:
    whole, cut = trainer(6), trainer(micro)
    for a, b in zip(fit(whole, Random()), fit(cut, Random()), strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.num_targets == b.num_targets == 6 * 5 - 4
    for p, q in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_same_seed_trains_the_same_bits_and_dropout_is_keyed_by_the_step() -> None:
    first, second = trainer(3, dropout=0.5), trainer(3, dropout=0.5)
    losses = [r.loss for r in fit(first, Random())]
    torch.randn(1000)  # a draw elsewhere must not shift the run
    assert losses == [r.loss for r in fit(second, Random())]


def poison(t: Trainer, *steps: int, where: str = "gradient") -> None:
    """Make the loss or the gradient of these steps NaN."""
    original = t.model.head.loss

    def loss(hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        if t.state.step + 1 in steps and where == "loss":
            return hidden_ND.sum() * float("nan")
        if t.state.step + 1 in steps:
            hidden_ND.register_hook(lambda grad: grad * float("inf"))
        return original(hidden_ND, targets_N)

    t.model.head.loss = loss  # type: ignore[method-assign]


def weights(t: Trainer) -> dict[str, Tensor]:
    """Parameters and optimizer state, as copies."""
    model, extra = trainer_tensors(t)
    return {
        name: tensor.clone() for name, tensor in (model | extra).items() if not name.startswith(("carry/", "guard/"))
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@fused_or_not
@every_optimizer
def test_row_58_a_step_that_is_not_finite_changes_nothing_and_neither_do_those_after_it(
    optimizer: OptimizerConfig, fused: bool, late: bool, where: str
) -> None:
    t = trainer(optimizer=optimizer, fused=fused, reads_late=late)
    t.train_step(Random()[0])
    before = weights(t)
    poison(t, 2, where=where)
    bad = t.train_step(Random()[1])
    assert same(weights(t), before)
    assert bad.left_out
    assert not math.isfinite(bad.loss if where == "loss" else bad.grad_norm)
    if late:  # at once, the caller knows before the next step
        assert not t.train_step(Random()[2]).left_out
        assert same(weights(t), before)


@pytest.mark.parametrize("part_bytes", [1, revocable.PART_BYTES], ids=["one by one", "at once"])
@fused_or_not
@every_optimizer
def test_row_59_reading_late_trains_the_same_bits_as_reading_at_once(
    optimizer: OptimizerConfig, fused: bool, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocable, "PART_BYTES", part_bytes)
    finals = []
    for late in (False, True):
        t = trainer(3, optimizer=optimizer, fused=fused, reads_late=late, max_skips=3, dropout=0.3, max_steps=11)
        t.average = WeightAverage(t.model, 0.9)
        poison(t, 1, 6, 7)
        reports = list(fit(t, Random()))
        assert [r.step for r in reports if r.left_out] == [1, 6, 7]
        finals.append((weights(t), [r.grad_norm for r in reports if not r.left_out]))
    assert finals[0][1] == finals[1][1]
    assert same(finals[0][0], finals[1][0])


@pytest.mark.parametrize("optimizer", [AdamwConfig(), MuonConfig()], ids=lambda o: type(o).__name__)
def test_row_59_a_step_too_large_for_fp16_is_no_update_and_no_fault_of_the_batch(optimizer: OptimizerConfig) -> None:
    """The scale begins at 65,536; the gradient of the sixth batch is too large even for a smaller one."""
    finals = []
    for late in (False, True):
        t = trainer(optimizer=optimizer, fused=True, max_steps=8, precision=Precision.fp16, reads_late=late)
        poison(t, 6)
        steps, before = [], weights(t)
        for report in fit(t, Random()):
            assert not report.left_out
            steps += [report.step] * same(weights(t), before)
            before = weights(t)
        assert 6 in steps
        assert t.scaler.get_scale() == 65_536.0 * 0.5 ** len(steps)
        finals.append((weights(t), steps))
    assert finals[0][1] == finals[1][1]
    assert same(finals[0][0], finals[1][0])


def test_row_59_a_parameter_that_thaws_is_not_updated_once_too_many_were_left_out() -> None:
    t = trainer(optimizer=AdamwConfig(), fused=True, reads_late=True, max_skips=0)
    t.frozen_until = {"head.weight": 0.5}
    poison(t, 4)
    for step in range(4):
        t.train_step(Random()[step])
    before = weights(t)
    assert not t.train_step(Random()[4]).left_out
    assert same(weights(t), before)


@pytest.mark.parametrize("bad", [(5,), (4,), (4, 5)], ids=str)
@pytest.mark.parametrize(
    "optimizer", [MuonConfig(), AdamwConfig(), SgdConfig(lr=0.5, momentum=0.9)], ids=lambda o: type(o).__name__
)
def test_row_59_a_parameter_that_thaws_beside_a_bad_batch_trains_the_same_bits(
    optimizer: OptimizerConfig, bad: tuple[int, ...]
) -> None:
    """It has no state to put back when the fifth batch, the first for it, is bad."""
    finals = []
    for late in (False, True):
        t = trainer(optimizer=optimizer, fused=True, reads_late=late, max_skips=2)
        t.frozen_until = {"head.weight": 0.5}
        poison(t, *bad)
        assert [r.step for r in fit(t, Random()) if r.left_out] == list(bad)
        finals.append(weights(t))
    assert same(*finals)


def test_row_59_no_update_is_made_once_more_were_left_out_than_allowed() -> None:
    t = trainer(optimizer=AdamwConfig(), fused=True, reads_late=True, max_skips=1)
    t.train_step(Random()[0])
    poison(t, 2, 4)
    t.train_step(Random()[1])
    after_first = weights(t)
    t.train_step(Random()[2])
    after_good = weights(t)
    assert not same(after_first, after_good)
    t.train_step(Random()[3])
    t.train_step(Random()[4])
    assert same(after_good, weights(t))


@fused_or_not
@every_optimizer
def test_reading_late_reads_nothing_from_the_device_within_a_step(
    optimizer: OptimizerConfig, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors count as the device's, but for the numbers that the optimizer keeps on the host. The only flag that
    is read is that of the step before, which is there by then."""
    monkeypatch.setattr(lmkit.heads, "drops_unscored", lambda device: False)
    made: list[str] = []

    def read_later(flag: Tensor) -> Callable[[], bool]:
        step = t.state.step
        with ReadsNothing.lifted():
            value = bool(flag)

        def read() -> bool:
            assert t.state.step == step + 1
            made.append("read")
            return value

        return read

    monkeypatch.setattr(revocable, "read_later", read_later)
    t = trainer(3, optimizer=optimizer, fused=fused, reads_late=True)
    t.average = WeightAverage(t.model, 0.9)
    t.spike_nats = 100.0
    t.train_step(Random()[0])
    counts = {step: Random()[step].num_targets for step in (1, 2)}
    on_host = [
        value
        for slots in t.optimizer.state.values()
        for slot, value in slots.items()
        if isinstance(value, Tensor) and is_on_host(t.optimizer, slot)
    ]

    def fail(*_: object) -> None:
        raise AssertionError("waits for the device")

    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, fail)
    for step, count in counts.items():
        batch = Random()[step]
        monkeypatch.setattr(Batch, "num_targets", count)
        with ReadsNothing(on_host):
            report = t.train_step(batch)
            with pytest.raises(AssertionError, match="waits"):
                _ = report.loss
    has_host_numbers = bool(on_host) or isinstance(optimizer, ScheduleFreeConfig)
    assert made == ["read"] * has_host_numbers


class ReadsNothing(TorchDispatchMode):
    """Where a GPU would make the host wait: values that become Python's, and shapes that depend on values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2", "bincount")
    active = True

    def __init__(self, on_host: list[Tensor]) -> None:
        super().__init__()
        self.on_host = {t.data_ptr() for t in on_host}

    @classmethod
    @contextlib.contextmanager
    def lifted(cls) -> Iterator[None]:
        cls.active = False
        yield
        cls.active = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if self.active and (name in self.WAITS or masks) and args[0].data_ptr() not in self.on_host:
            raise AssertionError(f"waits for the device: {name}")
        return func(*args, **(kwargs or {}))


def test_a_late_read_is_for_cards() -> None:
    cpu = resolve_device(DeviceConfig(type=DeviceType.cpu, threads=1))
    assert not pays_to_read_late(cpu)
    assert pays_to_read_late(replace(cpu, torch_device=torch.device("cuda")))


def test_row_60_a_loss_far_above_its_running_mean_changes_nothing() -> None:
    t = trainer(spike_nats=1.0)
    for step in range(3):
        assert not t.train_step(Random()[step]).left_out
    before, mean = weights(t), t.mean_nats.clone()
    original = t.model.head.loss
    t.model.head.loss = lambda h, y: original(h, y) + 1.2 * (6 * 5 - 4)  # type: ignore[method-assign]
    assert t.train_step(Random()[3]).left_out
    assert same(weights(t), before)
    assert torch.equal(t.mean_nats, mean)


def test_a_batch_that_is_passed_over_counts_as_a_step_without_targets() -> None:
    t = trainer(max_steps=4)
    t.state.skipped_steps = [3]
    seen: list[int] = []

    class Watched(Random):
        def __getitem__(self, step: int) -> Batch:
            seen.append(step)
            return super().__getitem__(step)

    reports = list(fit(t, Watched()))
    assert seen == [0, 1, 3]
    assert [r.num_targets for r in reports] == [26, 26, 0, 26]
    assert t.state.num_targets == 3 * 26
    assert math.isnan(reports[2].loss)  # nobody knows it
    assert not reports[2].left_out


@pytest.mark.parametrize("begins_at", [0, 2, 3])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_batch_that_is_passed_over_leaves_the_average_that_leaving_it_out_does(
    decay: float | None, begins_at: int
) -> None:
    found = trainer(max_skips=1, average_begins=lambda state: state.step >= begins_at)
    known = trainer(average_begins=lambda state: state.step >= begins_at)
    poison(found, 3)
    known.state.skipped_steps = [3]
    for t in (found, known):
        t.average = WeightAverage(t.model, decay)
        list(fit(t, Random()))
    assert found.state.averaged_since == known.state.averaged_since == begins_at
    assert same(weights(found), weights(known))


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_tensors_restore_a_trainer_whatever_its_micro_batch_size(size: int) -> None:
    first, second = trainer(2, optimizer=AdamwConfig()), trainer(size, optimizer=AdamwConfig())
    for step in range(3):
        first.train_step(Random()[step])
    second.state = TrainState.from_json(first.state.to_json())
    restore_trainer(second, *trainer_tensors(first))
    assert same(weights(first), weights(second))
    rows = [torch.cat([s.total_B for s in t.carry if s is not None]) for t in (first, second)]
    assert torch.equal(*rows)
    assert len(second.carry) == 6 // size


@pytest.mark.parametrize(("data_changes", "kept"), [([], True), ([1], True), ([1, 3], False)])
def test_the_running_mean_of_the_loss_is_not_kept_for_other_data(data_changes: list[int], kept: bool) -> None:
    first, second = trainer(spike_nats=1.0), trainer(spike_nats=1.0)
    for step in range(3):
        first.train_step(Random()[step])
    second.train_step(Random()[0])  # as before a rollback
    second.state = TrainState.from_json(first.state.to_json() | {"data_changes": data_changes})
    restore_trainer(second, *trainer_tensors(first))
    assert float(second.mean_nats) == (float(first.mean_nats) if kept else math.inf)


def test_a_saved_tensor_that_this_version_does_not_know_is_refused_by_name() -> None:
    model, extra = trainer_tensors(trainer())
    with pytest.raises(errors.CheckpointError, match=r"saved 'noise/scale', .* does not know; .*update lmkit"):
        restore_trainer(trainer(), model, extra | {"noise/scale": torch.zeros(1)})


def test_clipping_bounds_the_update() -> None:
    t = trainer(optimizer=SgdConfig(lr=1.0, clip_norm=0.01))
    before = torch.cat([p.detach().flatten().clone() for p in t.model.parameters()])
    t.train_step(Random()[0])
    after = torch.cat([p.detach().flatten() for p in t.model.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 3, 7, 49, 1000])
def test_a_horizon_in_steps_ends_after_exactly_that_many(steps: int) -> None:
    horizon = Horizon(1.0 / steps)
    assert horizon.progress(steps) == 1.0
    assert horizon.progress(steps - 1) < 1.0


def test_a_refitted_horizon_never_jumps_and_reaches_its_end() -> None:
    horizon = Horizon(1e-9)
    horizon.refit(10, 100.0)
    before = horizon.progress(40)
    horizon.refit(40, 30.0)
    assert horizon.progress(40) == pytest.approx(before)
    assert horizon.progress(70) == 1.0


def test_train_state_survives_json() -> None:
    state = TrainState(step=3, valid_losses=[2.5], horizon=Horizon(0.1, 2, 0.2))
    assert TrainState.from_json(state.to_json()) == state


def test_losses_are_told_apart_by_their_data() -> None:
    state = TrainState(valid_losses=[3.0, 2.0, 9.0, 5.0], valid_steps=[4, 8, 12, 20])
    assert state.losses_by_data() == [[3.0, 2.0, 9.0, 5.0]]
    state.data_changes = [8, 10, 20]
    assert state.losses_by_data() == [[3.0, 2.0], [], [9.0, 5.0], []]


def test_the_average_of_constant_weights_is_those_weights_and_swapping_restores() -> None:
    model = Toy()
    average = WeightAverage(model, 0.9)
    average.update(model, 1)
    original = model.embedding.weight.detach().clone()
    with torch.no_grad():
        model.embedding.weight.add_(1.0)
    average.update(model, 100)
    with average.applied(model):
        torch.testing.assert_close(model.embedding.weight, original + 0.1)
    torch.testing.assert_close(model.embedding.weight, original + 1.0)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("Storage size calculation overflowed with sizes=[10000000000, 10000000000]"), True),
        (
            ValueError("array is too big; `arr.size * arr.dtype.itemsize` is larger than the maximum possible"),
            True,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_what_is_taken_for_a_want_of_memory(error: Exception, found: bool) -> None:
    assert is_out_of_memory(error) is found


def test_an_error_that_python_cannot_name_is_want_of_memory_only_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = SystemError("error return without exception set")
    assert not is_out_of_memory(error)
    monkeypatch.setattr(errors, "LITTLE_MEMORY", 1 << 60)
    assert is_out_of_memory(error)

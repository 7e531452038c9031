"""What checkpoints cost: the stall of a save, the share of a run's time, the way back to the position, loading.

    python scripts/bench_checkpoint.py [--rounds 7] [--model small] [--vocab 10000] [--run-s 600] [--folder DIR]

A Transformer with AdamW is trained on random tokens and saved as a run saves it. What is compared is measured in turns
within a round, only ratios and differences within a round count, and medians are printed with their range.

- stall: how long training stands still for a save (collecting the tensors, copying them, telling the writer), divided
  by a plain copy of the same bytes into memory that is there already. Goal: at most 1.3
- cost: what all saves of a run of --run-s seconds at the default cadence take of its time: after each of 10
  evaluations, or more seldom where lmkit.store.saving.may_save says so. For each save: a block of steps with it, less a
  block without, so that steps which become slower while it is written count. For the last one, which the run waits for,
  all of its time. Goal: at most 1 %. How much time lies between two saves, and so may be lost, is printed beside it
- position: from tokens, sizes, seed and step to the first batch after resuming, at step 10 and at step 10^9 of a corpus
  of 10^13 tokens. Goal: below 10 ms
- load: bytes a second of loading a checkpoint, every file hashed, divided by those of reading the same files one after
  the other into one small buffer, both from the disk (the cached pages are dropped; Linux only). Goal: at least 70 %.
  Beside it stands reading them into new memory, as whoever wants the bytes must: that ratio is what hashing costs.
  Cached is the same with the files in memory, without a goal
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import TransformerConfig
from lmkit.config.optimization import AdamwConfig, CosineConfig
from lmkit.config.training import SaveConfig
from lmkit.data.batches import Lanes, Windows
from lmkit.device import resolve_device
from lmkit.horizon import NUM_EVALS, Horizon
from lmkit.objectives import ExactSoftmax
from lmkit.optim import build_optimizer
from lmkit.snapshots import trainer_tensors
from lmkit.store import manifest, storage
from lmkit.store.checkpoint import Snapshot, latest_checkpoint, load_checkpoint
from lmkit.store.runs import Run
from lmkit.store.saving import Saves, may_save
from lmkit.tasks.language import NextToken
from lmkit.tokenizers import ByteTokenizer
from lmkit.train import Trainer, TrainState

BATCH, SEQ_LEN = 16, 128
HUGE = 10**13
"""Tokens of the corpus in which the position is restored."""
MODELS = {
    "tiny": TransformerConfig(d_model=128, num_layers=4, num_heads=4),
    "small": TransformerConfig(d_model=256, num_layers=6, num_heads=8),
    "medium": TransformerConfig(d_model=512, num_layers=8, num_heads=8, num_kv_heads=4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--vocab", type=int, default=10_000)
    parser.add_argument("--run-s", type=int, default=600, help="length of the run whose saves are added up")
    parser.add_argument("--threads", type=int, help="default: one for each core; fewer where the machine is shared")
    parser.add_argument("--folder", type=Path, help="where to write, so as to measure that disk")
    args = parser.parse_args()
    trainer, batches = make_trainer(args.model, args.vocab, args.threads)
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as folder,
        Run.create(Path(folder) / "run", root=folder, dataset="d", model="m", resume=False, warn=print) as run,
        Saves(run, ByteTokenizer(), SaveConfig(), print) as saves,
    ):
        run.begin(seed=1, command=["bench"], digests={})
        trainer.train_step(batches[0])
        num_bytes = sum(t.numel() * t.element_size() for t in distinct(trainer))
        print(
            f"model={args.model}, vocabulary {args.vocab:,}: {trainer.model.num_parameters():,} parameters,"
            f" {num_bytes / 1e6:.0f} MB a checkpoint, {torch.get_num_threads()} threads, {args.rounds} rounds"
        )
        stall_s = bench_stall(trainer, saves, args.rounds)
        bench_cost(trainer, batches, saves, args.rounds, args.run_s, stall_s)
        bench_position(args.rounds)
        saves.wait()
        newest = latest_checkpoint(run.path, print)
        if newest is None:
            raise SystemExit("nothing was saved")
        bench_load(newest, args.rounds)


def make_trainer(name: str, vocab_size: int, threads: int | None) -> tuple[Trainer, Windows]:
    """A trainer and its batches, before the first step."""
    device = resolve_device(DeviceConfig(type=DeviceType.cpu, threads=threads))
    model = MODELS[name].build(vocab_size, seed=1)
    optimizer_config = AdamwConfig()
    tokens = np.random.default_rng(0).integers(0, vocab_size, 1_000_000).astype(np.uint16)
    batches = Windows(tokens, 0, BATCH, SEQ_LEN, seed=1)
    trainer = Trainer(
        task=NextToken(model, batches, ExactSoftmax()),
        model=model,
        optimizer=build_optimizer(optimizer_config, model, fused=device.fused),
        optimizer_config=optimizer_config,
        schedule=CosineConfig(),
        device=device,
        seed=1,
        micro_batch_size=BATCH,
        state=TrainState(horizon=Horizon(1e-6)),
    )
    return trainer, batches


def distinct(trainer: Trainer) -> list[torch.Tensor]:
    """The tensors of a checkpoint, tied ones once."""
    model, extra = trainer_tensors(trainer)
    return list({t.data_ptr(): t.detach() for t in (*model.values(), *extra.values())}.values())


def save(trainer: Trainer, saves: Saves) -> None:
    """What a run does at a save while training goes on. Each save gets a step of its own."""
    model, extra = trainer_tensors(trainer)
    trainer.state.step += 1
    state = trainer.state.to_json()
    saves.save(Snapshot(trainer.state.step, model, extra, state, {"model": {"kind": "transformer"}}))


def seconds(action: Callable[[], object]) -> float:
    """How long it takes; what it returns is freed after that."""
    start = time.perf_counter()
    result = action()
    took_s = time.perf_counter() - start
    del result
    return took_s


def show(name: str, values: list[float], unit: str, goal: str = "") -> float:
    """Print and return the median."""
    median = statistics.median(values)
    print(f"{name:<34} {median:9.3f} {unit:<3} ({min(values):.3f} to {max(values):.3f})  {goal}", flush=True)
    return median


def bench_stall(trainer: Trainer, saves: Saves, rounds: int) -> float:
    """How long training stands still for a save, seconds."""
    first_s = seconds(lambda: save(trainer, saves))
    saves.wait()
    tensors = distinct(trainer)
    buffers = [t.clone() for t in tensors]

    def copy() -> None:
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor)

    copy()
    stalls, copies = [], []
    for _ in range(rounds):
        copies.append(seconds(copy))
        stalls.append(seconds(lambda: save(trainer, saves)))
        saves.wait()
    show("plain copy", [1e3 * s for s in copies], "ms")
    stall_ms = show("stall of a save", [1e3 * s for s in stalls], "ms")
    show("stall of the first save", [1e3 * first_s], "ms")
    show("stall / copy", [a / b for a, b in zip(stalls, copies, strict=True)], "x", "goal: at most 1.3")
    return stall_ms / 1e3


def default_cadence(cost_s: float, whole_s: float, run_s: int) -> list[int]:
    """The seconds at which a run saves before its end, if each save takes so much of training's time, and so long."""
    times: list[int] = []
    held = False
    for second in range(1, run_s):
        held = held or second % (run_s // NUM_EVALS) == 0
        known = (cost_s, whole_s) if times else (0.0, 0.0)
        if held and may_save(*known, len(times) * cost_s, second):
            times.append(second)
            held = False
    return times


def bench_cost(trainer: Trainer, batches: Windows, saves: Saves, rounds: int, run_s: int, stall_s: float) -> None:
    def saved() -> None:
        save(trainer, saves)
        saves.wait()

    whole = [seconds(saved) for _ in range(3)]
    step_s = statistics.median(seconds(lambda: trainer.train_step(batches[trainer.state.step])) for _ in range(3))
    num_steps = max(2, round(3 * statistics.median(whole) / step_s))

    def train() -> None:
        for _ in range(num_steps):
            trainer.train_step(batches[trainer.state.step])

    def train_and_save() -> None:
        save(trainer, saves)
        train()
        saves.wait()

    extra, costs, wholes = [], [], []
    for number in range(rounds):
        order = (train, train_and_save) if number % 2 else (train_and_save, train)
        took = {block: seconds(block) for block in order}
        extra.append(took[train_and_save] - took[train])
        costs.append(saves.last_cost_s)
        wholes.append(saves.last_s)
    show(f"a step ({BATCH} x {SEQ_LEN} tokens)", [step_s], "s")
    last_s = show("a save as a whole, written, verified", whole, "s")
    one_s = show(f"a save beside {num_steps} steps", extra, "s")
    reckoned = show("what the run reckons with", costs, "s"), show("and for its last one", wholes, "s")
    times = default_cadence(*reckoned, run_s)
    num_copies = NUM_EVALS - 1 - len(times)  # that gave way to a newer one
    longest_s = max(b - a for a, b in pairwise([0, *times, run_s]))
    print(f"saves in {run_s} s: {len(times) + 1}, at most {longest_s} s apart")
    total_s = len(times) * one_s + num_copies * stall_s + last_s
    show("cost of these saves", [100 * total_s / run_s], "%", "goal: at most 1")
    show(f"cost if all {NUM_EVALS} were made", [100 * ((NUM_EVALS - 1) * one_s + last_s) / run_s], "%")


def bench_position(rounds: int) -> None:
    tokens = np.broadcast_to(np.uint16(7), (HUGE,))
    for step in (10, 10**9):
        ways: dict[str, Callable[[], Windows | Lanes]] = {
            "windows": lambda: Windows(tokens, 0, BATCH, SEQ_LEN, seed=1),
            "lanes": lambda: Lanes(tokens, 0, BATCH, SEQ_LEN),
        }
        for name, make in ways.items():
            times = [1e3 * seconds(lambda make=make, step=step: make()[step]) for _ in range(10 * rounds)]
            show(f"position, {name}, step {step:,}", times, "ms", "goal: below 10")


def bench_load(checkpoint: Path, rounds: int) -> None:
    entries = manifest.read_manifest(checkpoint).files
    num_bytes = sum(entry.bytes for entry in entries)
    piece = memoryview(bytearray(storage.PIECE_BYTES))

    def discard() -> None:
        for entry in entries:
            with manifest.open_entry(checkpoint, entry) as file:
                while file.readinto(piece):
                    pass

    def read() -> list[torch.Tensor]:
        memories = []
        for entry in entries:
            memories.append(torch.empty(entry.bytes, dtype=torch.uint8))
            with manifest.open_entry(checkpoint, entry) as file:
                file.readinto(memories[-1].numpy().data)
        return memories

    def load() -> Snapshot:
        return load_checkpoint(checkpoint, with_optimizer=True)

    def drop() -> None:
        for entry in entries:
            with manifest.open_entry(checkpoint, entry) as file:
                storage.drop_cache(file)

    for name, before, goal in (("disk", drop, "goal: at least 70"), ("cached", discard, "")):
        rates: dict[Callable[[], object], list[float]] = {discard: [], read: [], load: []}
        for number in range(rounds):
            for way in list(rates)[:: 1 if number % 2 else -1]:
                before()
                rates[way].append(num_bytes / 1e6 / seconds(way))
        show(f"read and discard, {name}", rates[discard], "MB/s")
        show(f"read into new memory, {name}", rates[read], "MB/s")
        show(f"load, {name}", rates[load], "MB/s")
        for other, text, aim in ((read, "read into new memory", ""), (discard, "read and discard", goal)):
            ratios = [100 * a / b for a, b in zip(rates[load], rates[other], strict=True)]
            show(f"load / {text}, {name}", ratios, "%", aim)


if __name__ == "__main__":
    main()

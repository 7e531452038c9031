"""How training scales over processes: measured on this machine, and computed for 64 GPUs.

    python scripts/bench_scaling.py [--processes 1 2 4] [--rounds 2] [--steps 20] [--model tiny] [--json FILE]
    python scripts/bench_scaling.py --computed-only

Measured: tokens/s of ``lmkit pretrain parallel=ddp`` under torchrun with gloo, on text that is made up, the same global
batch (32 x 64) for any number of processes, each with its share of it as one micro-batch, as lmkit takes it by itself,
and with cores / processes threads. The runs are interleaved over the rounds; the median line of each run's
metrics.jsonl counts (the first is left out), and then the best round. What one agreement of the processes and one sum
of the gradients take is timed on its own. The peak of memory is the largest that the metrics of the first process show.
Runs that trained other models or numbers of tokens are refused.

Computed: a ring all-reduce over N GPUs sends 2 (N - 1) / N x (bytes of the gradients, fp32) over each link, and takes
2 (N - 1) hops (Patarasu & Yuan 2009) of 5 us. The slowest link is the network of a node of 8 GPUs. A step computes
6 x parameters x tokens operations at 40 % of an H100's 989 TFLOP/s (bf16). lmkit sums after the last micro-batch, so
the two times add; more tokens a GPU and step (micro-batches) make the sum's share smaller.

--json writes both as rows; those that were computed say so in their name and by ``computed``, and have no peak.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers import at_least, write_rows

SEQ_LEN, BATCH = 64, 32
GPUS, TOKENS_PER_GPU = 64, 8192
FLOPS = 0.4 * 989e12
HOP_S = 5e-6
MODELS = {"GPT-2 124M": 124e6, "350M": 350e6, "1.3B": 1.3e9, "7B": 7e9}
NETWORKS = {"10 Gb/s": 10, "100 Gb/s": 100, "400 Gb/s": 400, "8 x 400 Gb/s": 3200}
"""Network of a node, and its bandwidth in Gb/s."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=at_least(1), nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=at_least(1), default=2)
    parser.add_argument("--steps", type=at_least(4), default=20, help="of which every second one is a line")
    parser.add_argument("--threads", type=int, help="threads of each process instead of cores / processes")
    parser.add_argument("--model", default="tiny", help="preset of a model")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--computed-only", action="store_true")
    parser.add_argument("--collectives", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.collectives is not None:
        print(json.dumps(collectives(args.collectives)))
        return
    rows = []
    if not args.computed_only:
        rows = measured(args.processes, args.rounds, args.steps, args.model, args.threads)
        show_measured(rows)
    show_computed(computed())
    write_rows(args.json, [*rows, *computed()])


def torchrun(processes: int, *words: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *launcher, *words]


def measured(processes: list[int], rounds: int, steps: int, model: str, threads: int | None) -> list[dict[str, Any]]:
    """One row for each number of processes."""
    runs: dict[int, list[dict[str, Any]]] = {number: [] for number in processes}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        words = [f"w{number}" for number in range(500)]
        drawn = random.Random(1).choices(words, k=60_000)
        lines = [" ".join(drawn[i : i + 12]) + "\n" for i in range(0, len(drawn), 12)]
        text.write_text("".join(lines), encoding="utf-8", newline="\n")
        for turn in range(rounds):
            for number in processes:
                runs[number].append(train(number, text, Path(folder) / f"run-{turn}-{number}", steps, model, threads))
    refuse_unlike(runs)
    rows: list[dict[str, Any]] = []
    for number, of_number in runs.items():
        speeds = [run["tokens_per_s"] for run in of_number]
        row = {
            "name": f"lmkit, {number} process{'es' if number > 1 else ''}",
            "tokens_per_s": max(speeds),
            "peak_bytes": max(run["peak_bytes"] for run in of_number),
            "computed": False,
            "processes": number,
            "rounds": speeds,
            "model": model,
            "num_parameters": of_number[0]["num_parameters"],
            "ratio": max(speeds) / (rows[0]["tokens_per_s"] if rows else max(speeds)),
        }
        rows.append(row | time_collectives(number, row["num_parameters"]))
    return rows


def train(processes: int, text: Path, run: Path, steps: int, model: str, threads: int | None) -> dict[str, int | float]:
    """Train once by that many processes; speed, memory and what they trained."""
    command = [
        *("-m", "lmkit", "pretrain", "dataset=text", f"dataset.path={text}", "tokenizer=byte"),
        *(f"model={model}", "device=cpu", f"train.batch_size={BATCH}"),
        *(f"train.seq_len={SEQ_LEN}", f"train.max_steps={steps}", f"run.dir={run}", "log.every_steps=2"),
        *("eval.every_steps=1000000", f"save.every_steps={steps}", "parallel=ddp"),
        f"device.threads={'null' if threads is None else threads}",
    ]
    done = subprocess.run(torchrun(processes, *command), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    logged = [line for line in lines if "tokens_per_s" in line]
    return {
        "tokens_per_s": statistics.median(line["tokens_per_s"] for line in logged[1:]),
        "peak_bytes": max(line["memory_bytes"] for line in logged),
        "num_tokens": logged[-1]["num_targets"],
        "num_parameters": json.loads((run / "result.json").read_text(encoding="utf-8"))["num_parameters"],
    }


def refuse_unlike(runs: dict[int, list[dict[str, Any]]]) -> None:
    """SystemExit if any two runs trained models of other sizes or other numbers of tokens."""
    work = {number: [(run["num_parameters"], run["num_tokens"]) for run in of] for number, of in runs.items()}
    if len({pair for pairs in work.values() for pair in pairs}) > 1:
        raise SystemExit(f"the runs did not do the same work (parameters, tokens by number of processes): {work}")


def time_collectives(processes: int, num_parameters: int) -> dict[str, float]:
    """What ``collectives`` finds in that many processes."""
    words = [str(Path(__file__).resolve()), "--collectives", str(num_parameters)]
    done = subprocess.run(torchrun(processes, *words), capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    times: dict[str, float]
    times, _ = json.JSONDecoder().raw_decode(line)  # another process may have written into its end
    return times


def collectives(num_parameters: int) -> dict[str, float]:
    """In each process that torchrun started: milliseconds of an agreement and of a sum of the gradients."""
    import torch

    from lmkit.config.parallel import DdpConfig
    from lmkit.distributed import find_world

    config = DdpConfig()
    world = find_world(config)
    torch.set_num_threads(1)
    with world.joined(torch.device("cpu"), config):
        p = torch.nn.Parameter(torch.zeros(num_parameters))
        p.grad = torch.ones_like(p)
        times: dict[str, list[float]] = {"agree_ms": [], "sum_gradients_ms": []}
        for _ in range(20):
            start = time.perf_counter()
            world.agree([0.0] * 7, [False, False])
            times["agree_ms"].append(time.perf_counter() - start)
            start = time.perf_counter()
            world.sum_gradients([p], torch.zeros(()))
            times["sum_gradients_ms"].append(time.perf_counter() - start)
        return {name: 1000 * statistics.median(values) for name, values in times.items()}


def computed() -> list[dict[str, Any]]:
    """One row for each model and network."""
    table = []
    for model, parameters in MODELS.items():
        sent_bytes = 2 * (GPUS - 1) / GPUS * 4 * parameters
        compute_s = 6 * parameters * TOKENS_PER_GPU / FLOPS
        for network, gigabits in NETWORKS.items():
            sum_s = sent_bytes / (gigabits * 1e9 / 8) + 2 * (GPUS - 1) * HOP_S
            share = compute_s / (compute_s + sum_s)
            table.append(
                {
                    "name": f"computed: {model}, {GPUS} GPUs, {network}",
                    "tokens_per_s": GPUS * TOKENS_PER_GPU / (compute_s + sum_s),
                    "peak_bytes": None,
                    "computed": True,
                    "model": model,
                    "network": network,
                    "sent_bytes": sent_bytes,
                    "sum_s": sum_s,
                    "compute_s": compute_s,
                    "efficiency": share,
                }
            )
    return table


def show_measured(rows: list[dict[str, Any]]) -> None:
    print("| processes | tokens/s | against the first | one agreement | one sum of the gradients |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['processes']} | {row['tokens_per_s']:,.0f} | {row['ratio']:.2f} |"
            f" {row['agree_ms']:.2f} ms | {row['sum_gradients_ms']:.1f} ms |"
        )
    print()


def show_computed(rows: list[dict[str, Any]]) -> None:
    print(f"{GPUS} GPUs, {TOKENS_PER_GPU:,} tokens a GPU and step; time of computing + of summing, and efficiency")
    print(f"| model | sent by each | computing | {' | '.join(NETWORKS)} |")
    print(f"|---|---|---|{'---|' * len(NETWORKS)}")
    for model in MODELS:
        own = [row for row in rows if row["model"] == model]
        cells = " | ".join(f"+ {1000 * row['sum_s']:,.0f} ms, {100 * row['efficiency']:.0f} %" for row in own)
        print(f"| {model} | {own[0]['sent_bytes'] / 1e9:.2f} GB | {1000 * own[0]['compute_s']:,.0f} ms | {cells} |")


if __name__ == "__main__":
    main()

"""Speed and memory of training: lmkit beside ``transformers`` and plain PyTorch loops.

    python scripts/bench_train.py [--family transformer|lstm] [--rounds 3] [--steps 3] [--micro_batch 16] [--json FILE]
    python scripts/bench_train.py --scaling [--plot FILE.png] [--json FILE]
    python scripts/bench_train.py --device cuda --size gpt2_124m --precision bf16 --compile on --steps 20

All ways take the same random tokens (32 x 128, vocabulary 10,000) through a model of the same shape (d_model 256,
6 layers, 8 heads; LSTM: 2 layers of 256) in fp32 (``--precision bf16``: with bf16 products) with AdamW and clipping,
without dropout, each in a process of its own and in interleaved rounds; the first round warms up, medians are printed.
Numbers of parameters more than 1 % apart and different numbers of tokens are refused. ``--size gpt2_124m`` is the shape
of ``model=gpt2`` with GPT-2's vocabulary and windows of 1,024 tokens; each number of a shape can be given by itself.

- lmkit: lmkit.train.Trainer, which is what ``lmkit pretrain`` runs; a Llama-shaped block (--model gpt2 for GPT-2's)
- transformers: GPT2LMHeadModel in the usual loop (left out when it is not installed)
- plain: the shortest sensible loop with torch's own modules
- gemm: products of 1024 x 1024 matrices (on a card: 8192 x 8192) in the precision of the run: what the machine gives,
  which on a card is less than its data sheet says. The share of it counts 6 x parameters + 12 x layers x width x
  context operations a token, as papers do: attention over whole windows, though half of it is masked and need not be
  computed. That is 2.6 % more than the operations needed in the small shape, and 7 % more in gpt2_124m.

On a CPU lmkit takes the fused AdamW and the others torch's default, which is not fused there.

``--device cuda`` measures on a card: all ways have weights and batches there and fused AdamW, the clock waits for the
card, and memory is the peak that torch has allocated there. ``--compile on`` compiles each way's model (of lmkit: what
``device.compile`` does, all but the head's products). With bf16 lmkit computes its LSTM layers in TF32 there, and
autocast takes those of the plain loop to fp16. All ways keep their memory from round to round, so a large shape may
need a smaller ``--batch``, or ``--ways lmkit``. None of this has been run on a card yet: there was none at hand. On
CPUs it is tested but for the waiting and the memory.

``--scaling`` measures lmkit alone while one of layers, width, context, vocabulary and batch changes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from peers import Peer, Work, at_least, is_installed, measure_in_turns, peak_bytes, serve, table, write_rows

LEARNING_RATE, CLIP_NORM = 1e-3, 1.0


@dataclass(frozen=True)
class Shape:
    """What is trained, and on how much at a time."""

    layers: int = 6
    width: int = 256
    heads: int = 8
    context: int = 128
    vocabulary: int = 10_000
    batch: int = 32
    micro_batch: int = 0
    """Rows of the batch that lmkit takes at a time, 0 for all, as the others do."""
    precision: str = "fp32"
    """fp32 or bf16, of the products; parameters stay in fp32. lmkit: device.precision; the others: torch.autocast."""
    device: str = "cpu"
    compile: str = "off"
    """lmkit: device.compile; the others: torch.compile of what computes the loss."""

    def arguments(self) -> list[str]:
        return [word for field in fields(self) for word in (f"--{field.name}", str(getattr(self, field.name)))]


SIZES = {"small": Shape(), "gpt2_124m": Shape(layers=12, width=768, heads=12, context=1024, vocabulary=50_257)}
CHOICES = {"precision": ["fp32", "bf16"], "device": ["cpu", "cuda"], "compile": ["off", "on"]}
GRID: dict[str, list[int]] = {
    "layers": [2, 4, 6, 8],
    "width": [128, 256, 384, 512],
    "context": [64, 128, 256, 512],
    "vocabulary": [1_000, 10_000, 50_000],
    "batch": [4, 8, 16, 32],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["transformer", "lstm"], default="transformer")
    parser.add_argument("--size", choices=SIZES, default="small", help="the shape that the numbers below change")
    parser.add_argument("--model", choices=["llama", "gpt2"], help="lmkit's block (default: llama; gpt2_124m: gpt2)")
    parser.add_argument("--ways", nargs="+", choices=NAMES, default=NAMES, metavar="WAY", help="default: all")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="measured rounds")
    parser.add_argument("--steps", type=at_least(1), default=3, help="optimizer steps a round")
    parser.add_argument("--threads", type=int, default=0, help="threads of each (default: the cores)")
    for field in fields(Shape):
        default = field.default
        what = f"default {default}{'; LSTM: 2' if field.name == 'layers' else ''}"
        parser.add_argument(f"--{field.name}", type=type(default), choices=CHOICES.get(field.name), help=what)
    parser.add_argument("--scaling", action="store_true", help="how lmkit's speed and memory grow")
    parser.add_argument("--plot", type=Path, default=Path("scaling.png"), help="where --scaling draws")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    given = {field.name: getattr(args, field.name) for field in fields(Shape) if getattr(args, field.name) is not None}
    shape = replace(SIZES[args.size], **({"layers": 2} if args.family == "lstm" else {}) | given)
    if args.model is None:
        args.model = "gpt2" if args.size == "gpt2_124m" else "llama"
    if args.serve:
        set_up(args.serve, shape, args.threads)
        serve(on_device(WAYS[args.family, args.serve](shape, args.steps, args.model), shape.device))
        return
    write_rows(args.json, scaling(args, shape) if args.scaling else compare(args, shape))


def arguments_of(args: argparse.Namespace, shape: Shape) -> list[str]:
    """What the process of each way is started with."""
    options = ["--family", args.family, "--model", args.model, "--steps", str(args.steps)]
    return [*options, "--threads", str(args.threads), *shape.arguments()]


def compare(args: argparse.Namespace, shape: Shape) -> list[dict[str, Any]]:
    names = [name for name in args.ways if (args.family, name) in WAYS]
    if "transformers" in names and not is_installed("transformers"):
        names.remove("transformers")
    if not names:
        raise SystemExit("none of these ways can be measured here")
    arguments = arguments_of(args, shape)
    gemm = Peer.start("gemm", __file__, arguments)
    peers = measure_in_turns(names, __file__, arguments, args.rounds, beside=gemm)
    table(peers, f"{args.family}, {shape}, {args.rounds} rounds")
    print(f"  products alone {gemm.tokens_per_s() / 1e9:.0f} GFLOP/s")
    rows = []
    for peer in peers:
        flops = flops_per_token(args.family, peer.num_parameters, shape)
        share = flops * peer.num_tokens / gemm.num_tokens
        share /= statistics.median(m / g for m, g in zip(peer.seconds[1:], gemm.seconds[1:], strict=True))
        flops_per_s = flops * peer.tokens_per_s()
        print(f"  {peer.name:<14} {flops_per_s / 1e9:.0f} GFLOP/s, {100 * share:.0f} % of it")
        rows.append(row_of(peer, args, shape, flops_per_s=flops_per_s, matrix_share=share))
    return rows


def row_of(peer: Peer, args: argparse.Namespace, shape: Shape, **facts: Any) -> dict[str, Any]:
    """A row with all that tells the rows of different calls apart (threads: 0 for the cores).

    The others have GPT-2's blocks, whatever lmkit has, and take the batch at once.
    """
    block = args.model if peer.name == "lmkit" else "gpt2"
    micro_batch = shape.micro_batch if peer.name == "lmkit" else 0
    return peer.row(
        family=args.family,
        block="lstm" if args.family == "lstm" else block,
        threads=args.threads,
        **asdict(replace(shape, micro_batch=micro_batch or shape.batch)),
        **facts,
    )


def flops_per_token(family: str, num_parameters: int, shape: Shape) -> int:
    attention = 12 * shape.layers * shape.width * shape.context if family == "transformer" else 0
    return 6 * num_parameters + attention


def scaling(args: argparse.Namespace, base: Shape) -> list[dict[str, Any]]:
    rows = []
    for name, values in GRID.items():
        for value in values:
            shape = replace(base, **{name: value})
            (peer,) = measure_in_turns(["lmkit"], __file__, arguments_of(args, shape), args.rounds)
            rows.append(row_of(peer, args, shape, varied=name, value=value))
            print(
                f"{name:<11} {value:7,}  {peer.tokens_per_s():9,.0f} tokens/s  {peer.peak_bytes / 1e9:5.2f} GB",
                flush=True,
            )
    draw(rows, args.plot)
    print(f"drawn: {args.plot}")
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens a second above, peak memory below, one column for each thing that was varied."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(GRID), figsize=(3 * len(GRID), 5), sharey="row", layout="constrained")
    for column, name in enumerate(GRID):
        of = [row for row in rows if row["varied"] == name]
        values = [row["value"] for row in of]
        axes[0, column].plot(values, [row["tokens_per_s"] for row in of], marker="o")
        axes[1, column].plot(values, [row["peak_bytes"] / 1e9 for row in of], marker="o")
        axes[1, column].set_xlabel(name)
        for row in (0, 1):
            axes[row, column].set_xscale("log", base=2)
            axes[row, column].set_xticks(values, [f"{value:,}" for value in values], minor=False)
    for row in (0, 1):
        axes[row, 0].set_ylim(bottom=0)  # shared; once all is drawn, for it ends the scaling to what is drawn later
    axes[0, 0].set_ylabel("tokens/s")
    axes[1, 0].set_ylabel("peak memory, GB")
    figure.savefig(path, dpi=120)


def set_up(way: str, shape: Shape, threads: int) -> None:
    """What all ways have alike: threads and, on a card, TF32 in fp32 products, which lmkit switches on for itself.

    Before that, lmkit has its threads wait for each other as its command does, which OpenMP reads when torch is loaded.
    """
    if way == "lmkit":
        from lmkit.cli import limit_spinning

        limit_spinning("pretrain")
    import torch

    from lmkit.device import available_cores

    torch.set_num_threads(threads or available_cores())
    if shape.device == "cuda":
        torch.set_float32_matmul_precision("high")


def on_device(work: Work, device: str) -> Work:
    """The work as it is measured there: the clock waits until a card is done, and it is its memory that counts."""
    import torch

    on_card = device == "cuda"

    def run() -> int:
        num_tokens = work.run()
        if on_card:
            torch.cuda.synchronize()
        return num_tokens

    return replace(work, run=run, memory=torch.cuda.max_memory_allocated if on_card else peak_bytes)


def lmkit_work(family: str, shape: Shape, steps: int, block: str) -> Work:
    import torch

    from lmkit.config.machine import DeviceConfig, DeviceType, Precision, Switch
    from lmkit.config.optimization import AdamwConfig, ConstantConfig
    from lmkit.data.batches import Batch
    from lmkit.device import resolve_device
    from lmkit.horizon import Horizon
    from lmkit.objectives import ExactSoftmax
    from lmkit.optim import build_optimizer
    from lmkit.tasks.language import NextToken
    from lmkit.train import Trainer, TrainState, pays_to_read_late

    config = DeviceConfig(
        type=DeviceType[shape.device],
        precision=Precision[shape.precision],
        compile=Switch[shape.compile],
        threads=torch.get_num_threads(),
    )
    device = resolve_device(config)
    model = lmkit_config(family, shape, block).build(shape.vocabulary, seed=1).to(device.torch_device)

    class Random:
        steps_per_epoch = 1_000_000

        def __getitem__(self, step: int) -> Batch:
            rows_BT = random_tokens(shape, step)
            return Batch(rows_BT[:, :-1], rows_BT[:, 1:], starts_text=False)

    adamw = AdamwConfig(lr=LEARNING_RATE, clip_norm=CLIP_NORM)
    batches = Random()
    trainer = Trainer(
        task=NextToken(model, batches, ExactSoftmax()),
        model=model,
        optimizer=build_optimizer(adamw, model, fused=device.fused),
        optimizer_config=adamw,
        schedule=ConstantConfig(warmup_ratio=0.0),
        device=device,
        seed=1,
        micro_batch_size=shape.micro_batch or shape.batch,
        state=TrainState(horizon=Horizon(1e-6)),
        reads_late=pays_to_read_late(device),
    )

    def run() -> int:
        return sum(trainer.train_step(batches[trainer.state.step]).num_targets for _ in range(steps))

    return Work(run, model.num_parameters())


def lmkit_config(family: str, shape: Shape, block: str) -> Any:
    """The configuration of lmkit's model."""
    from lmkit.config.model import Activation, Norm, Positions, RecurrentConfig, TransformerConfig

    if family == "lstm":
        return RecurrentConfig(
            num_layers=shape.layers,
            d_embed=shape.width,
            d_hidden=shape.width,
            dropout_embed=0.0,
            dropout_input=0.0,
            dropout_hidden=0.0,
            dropout_output=0.0,
            dropout_recurrent=0.0,
        )
    config = TransformerConfig(
        d_model=shape.width, num_layers=shape.layers, num_heads=shape.heads, context=shape.context
    )
    config.d_ff = 43 * shape.width // 16  # three matrices of this width are as large as GPT-2's two of 4 x width
    if block == "gpt2":
        config.d_ff = 4 * shape.width
        config.positions, config.norm, config.activation = Positions.learned, Norm.layernorm, Activation.gelu
        config.gated, config.bias = False, True
    return config


def random_tokens(shape: Shape, step: int) -> Any:
    """(B, T + 1) ids of a step, on the host, the same for every way."""
    import torch

    generator = torch.Generator().manual_seed(step)
    return torch.randint(shape.vocabulary, (shape.batch, shape.context + 1), generator=generator)


def plain_loop(model: Any, loss_of: Callable[[Any, Any], Any], shape: Shape, steps: int) -> Work:
    """The usual loop around a model, which lies on the device: zero, loss, backward, clip, step."""
    import itertools

    import torch

    from lmkit.data.batches import to_device

    device = torch.device(shape.device)
    fused = device.type == "cuda" or None  # there the usual loop has fused kernels, too
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=fused)
    if shape.compile == "on":
        loss_of = torch.compile(loss_of)
    numbers = itertools.count()

    def run() -> int:
        for _ in range(steps):
            rows_BT = to_device(random_tokens(shape, next(numbers)), device)  # as lmkit: a card is not waited for
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(shape.device, torch.bfloat16, enabled=shape.precision == "bf16"):
                loss = loss_of(rows_BT[:, :-1], rows_BT[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
        return steps * shape.batch * shape.context

    return Work(run, sum(p.numel() for p in model.parameters()))


def transformers_work(shape: Shape, steps: int, block: str) -> Work:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=shape.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).train().to(shape.device)

    def loss_of(inputs_BT: Any, targets_BT: Any) -> Any:
        logits_BTV = model(inputs_BT, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.reshape(-1))

    return plain_loop(model, loss_of, shape, steps)


def plain_gpt(shape: Shape, steps: int, block: str) -> Work:
    import torch
    import torch.nn.functional as F
    from torch import nn

    width = shape.width

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Any) -> Any:
            q, k, v = (
                t.unflatten(2, (shape.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(width, 2)
            )
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    embedding, positions = nn.Embedding(shape.vocabulary, width), nn.Embedding(shape.context, width)
    blocks, norm = nn.Sequential(*(Block() for _ in range(shape.layers))), nn.LayerNorm(width)
    model = nn.ModuleList([embedding, positions, blocks, norm])
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.02)
    model.to(shape.device)

    def loss_of(inputs_BT: Any, targets_BT: Any) -> Any:
        numbers_T = torch.arange(inputs_BT.shape[1], device=inputs_BT.device)
        hidden = norm(blocks(embedding(inputs_BT) + positions(numbers_T)))
        logits_BTV = F.linear(hidden, embedding.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.reshape(-1))

    return plain_loop(model, loss_of, shape, steps)


def plain_lstm(shape: Shape, steps: int, block: str) -> Work:
    import torch.nn.functional as F
    from torch import nn

    embedding = nn.Embedding(shape.vocabulary, shape.width)
    lstm = nn.LSTM(shape.width, shape.width, shape.layers)
    output = nn.Linear(shape.width, shape.vocabulary)
    output.weight = embedding.weight
    nn.init.normal_(embedding.weight, std=0.1)
    model = nn.ModuleList([embedding, lstm, output]).to(shape.device)
    state: Any = None

    def loss_of(inputs_BT: Any, targets_BT: Any) -> Any:
        nonlocal state
        hidden, state = lstm(embedding(inputs_BT.T), state)
        state = tuple(t.detach() for t in state)
        return F.cross_entropy(output(hidden).flatten(0, 1), targets_BT.T.reshape(-1))

    return plain_loop(model, loss_of, shape, steps)


def gemm_work(shape: Shape, steps: int, block: str) -> Work:
    """Square products, by the faster library; the tokens that it counts are operations."""
    import torch

    from lmkit import products

    size = 8192 if shape.device == "cuda" else 1024  # large enough for the rate of the device
    dtype = torch.bfloat16 if shape.precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size).to(shape.device, dtype) for _ in range(2))

    @torch.no_grad()
    def run() -> int:
        for _ in range(20):
            products.linear(a, b)
        return 20 * 2 * size**3

    return Work(run, 0)


WAYS: dict[tuple[str, str], Callable[[Shape, int, str], Work]] = {
    ("transformer", "lmkit"): lambda *args: lmkit_work("transformer", *args),
    ("transformer", "transformers"): transformers_work,
    ("transformer", "plain"): plain_gpt,
    ("transformer", "gemm"): gemm_work,
    ("lstm", "lmkit"): lambda *args: lmkit_work("lstm", *args),
    ("lstm", "plain"): plain_lstm,
    ("lstm", "gemm"): gemm_work,
}
NAMES = ["lmkit", "plain", "transformers"]
"""Of the ways that are compared, in the order of the table."""


if __name__ == "__main__":
    main()

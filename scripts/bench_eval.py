"""Speed and memory of scoring: lmkit's eval-ppl beside a bare forward pass and the usual strided loop.

    python scripts/bench_eval.py [--rounds 3] [--tokens 16384] [--vocab 10000] [--memory]

All ways score the same random tokens with a Transformer of the same shape (d_model 256, 6 layers, 8 heads, context 128,
stride 64), one after the other in every round, and only ratios within a round count; the medians are printed.

- bare: the same windows through model and head in batches, logits in the same chunks, nothing collected or checked
- lmkit: lmkit.evaluation.score, which is what eval-ppl runs
- checks: the proofs of eval-ppl, as a share of the scoring
- hf: the strided loop of Hugging Face's documentation with a GPT-2 of the same shape (when transformers is installed)

``--memory`` scores with the vocabulary of WikiText-103 (267,735) and model=small and prints the peak memory of the
process.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import psutil
import torch
from peers import is_installed, peak_bytes

from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import TransformerConfig
from lmkit.device import resolve_device
from lmkit.evaluation.checks import prove
from lmkit.evaluation.plan import Segments, sliding
from lmkit.evaluation.scoring import batches, score

CONTEXT, STRIDE, BATCH = 128, 64, 16
WIKITEXT103_TYPES = 267_735


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--vocab", type=int, default=10_000)
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    if args.memory:
        memory(min(args.tokens, 4096))
    else:
        speed(args.rounds, args.tokens, args.vocab)


def speed(rounds: int, num_tokens: int, vocab_size: int) -> None:
    device = resolve_device(DeviceConfig(type=DeviceType.cpu))
    model = TransformerConfig(context=CONTEXT).build(vocab_size, seed=1).eval()
    tokens = np.random.default_rng(0).integers(0, vocab_size, num_tokens).astype(np.uint16)
    windows = sliding(Segments.whole(num_tokens, 0), CONTEXT, STRIDE)

    def lmkit() -> None:
        score(model, tokens, windows, seq_len=CONTEXT, batch_size=BATCH, device=device)

    @torch.inference_mode()
    def bare() -> None:
        for batch in batches(windows, BATCH):
            positions = batch.begins_W[:, None] + np.arange(batch.longest)
            inputs = torch.from_numpy(tokens[np.clip(positions - 1, 0, num_tokens - 1)].astype(np.int64))
            wanted = (positions >= batch.scored_W[:, None]) & (positions < batch.ends_W[:, None])
            hidden, _ = model(inputs)
            targets = torch.from_numpy(tokens[positions[wanted]].astype(np.int64))
            model.head.score(hidden[torch.from_numpy(wanted)], targets)

    def checks() -> None:
        prove(model, tokens, windows, seq_len=CONTEXT, batch_size=BATCH, device=device, seed=1)

    ways: dict[str, Callable[[], None]] = {"bare": bare, "lmkit": lmkit, "checks": checks}
    if is_installed("transformers"):
        ways["hf"] = strided_loop(tokens, vocab_size)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    print(f"{num_tokens:,} tokens, vocabulary {vocab_size:,}, {torch.get_num_threads()} threads, {rounds} rounds")
    for name, times in seconds.items():
        median = statistics.median(times[1:])
        ratio = statistics.median(mine / bare for mine, bare in zip(times[1:], seconds["bare"][1:], strict=True))
        print(f"{name:<7} {median:7.2f} s  {num_tokens / median:9,.0f} tokens/s  {ratio:6.3f} x bare")


def strided_loop(tokens: np.ndarray, vocab_size: int) -> Callable[[], None]:
    """The loop as it is usually written: one window at a time, logits of all positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=vocab_size, n_positions=CONTEXT, n_embd=256, n_layer=6, n_head=8)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.from_numpy(tokens.astype(np.int64))[None]

    @torch.no_grad()
    def loop() -> None:
        total = count = previous_end = 0
        for begin in range(0, ids.shape[1], STRIDE):
            end = min(begin + CONTEXT, ids.shape[1])
            labels = ids[:, begin:end].clone()
            labels[:, : previous_end - begin] = -100
            num = int((labels != -100).sum()) - 1
            total += float(model(ids[:, begin:end], labels=labels).loss) * num
            count += num
            previous_end = end
            if end == ids.shape[1]:
                break
        math.exp(total / count)

    return loop


def memory(num_tokens: int) -> None:
    device = resolve_device(DeviceConfig(type=DeviceType.cpu))
    model = TransformerConfig(context=512).build(WIKITEXT103_TYPES, seed=1).eval()
    tokens = np.random.default_rng(0).integers(0, WIKITEXT103_TYPES, num_tokens).astype(np.uint32)
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    windows = sliding(Segments.whole(num_tokens, 0), 512, 256)
    score(model, tokens, windows, seq_len=512, batch_size=16, device=device)
    seconds = time.perf_counter() - start
    print(
        f"vocabulary {WIKITEXT103_TYPES:,}, model=small, {model.num_parameters():,} parameters: {before / 1e9:.2f} GB"
        f" before scoring, peak {peak_bytes() / 1e9:.2f} GB, {num_tokens / seconds:,.0f} tokens/s"
    )


if __name__ == "__main__":
    main()

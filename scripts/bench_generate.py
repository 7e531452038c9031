"""Speed and memory of generation: lmkit beside ``transformers``, batch 1 and 16, greedy and sampled.

    python scripts/bench_generate.py [--rounds 3] [--model gpt2|llama] [--json FILE]

Both continue the same 32 tokens by 256 with a model of the same shape (d_model 256, 6 layers, 8 heads, vocabulary
10,000), lmkit through lmkit.generate.generate, which is what ``lmkit generate`` runs, transformers through its
``generate`` with its cache. Each runs in a process of its own; rounds are interleaved, the first one warms up, and
medians are printed. Without transformers its rows are left out. Different numbers of parameters or tokens are refused.
The samples of a batch share the prompt: lmkit reads it once for all of them, transformers once for each.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from peers import Work, at_least, is_installed, measure_in_turns, serve, table, write_rows

D_MODEL, NUM_LAYERS, NUM_HEADS, D_FF, CONTEXT, VOCAB = 256, 6, 8, 1024, 512, 10_000
PROMPT_TOKENS, NEW_TOKENS = 32, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least(1), default=3, help="measured rounds")
    parser.add_argument("--model", choices=["gpt2", "llama"], default="gpt2", help="shape of the blocks")
    parser.add_argument("--batch", type=at_least(1), nargs="+", default=[1, 16], help="samples at once")
    parser.add_argument("--threads", type=int, default=None, help="threads of each (default: the cores)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--sampled", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        build = {"lmkit": lmkit_work, "transformers": transformers_work}[args.serve]
        serve(build(args.model, args.batch[0], args.sampled, args.threads))
        return
    names = ["lmkit", "transformers"] if is_installed("transformers") else ["lmkit"]
    rows = []
    for batch, sampled in itertools.product(args.batch, [False, True]):
        arguments = ["--model", args.model, "--batch", str(batch), *["--sampled"] * sampled]
        if args.threads:
            arguments += ["--threads", str(args.threads)]
        peers = measure_in_turns(names, __file__, arguments, args.rounds)
        how = "sampled" if sampled else "greedy"
        table(peers, f"{args.model}, batch {batch}, {how}, {args.rounds} rounds")
        rows += [peer.row(model=args.model, batch=batch, sampling=how) for peer in peers]
    write_rows(args.json, rows)


def lmkit_work(shape: str, batch: int, sampled: bool, threads: int | None) -> Work:
    from lmkit.cli import limit_spinning

    limit_spinning("generate")  # as the command does before torch is loaded

    from lmkit.config.generation import SamplingConfig
    from lmkit.config.machine import DeviceConfig, DeviceType
    from lmkit.config.model import Activation, Norm, Positions, TransformerConfig
    from lmkit.device import resolve_device
    from lmkit.generate import generate, read_prompt
    from lmkit.tokenizers import WordTokenizer

    device = resolve_device(DeviceConfig(type=DeviceType.cpu, threads=threads))
    config = TransformerConfig(d_model=D_MODEL, num_layers=NUM_LAYERS, num_heads=NUM_HEADS, d_ff=D_FF, context=CONTEXT)
    if shape == "gpt2":
        config.positions, config.norm, config.activation = Positions.learned, Norm.layernorm, Activation.gelu
        config.gated, config.bias = False, True
    model = config.build(VOCAB, seed=1).eval()
    tokenizer = WordTokenizer([f"w{i}" for i in range(VOCAB - 2)])
    text = " ".join(f"w{i}" for i in range(PROMPT_TOKENS - 1))
    prompt = read_prompt(tokenizer, text, context=CONTEXT, max_new_tokens=NEW_TOKENS)
    sampling = SamplingConfig(temperature=1.0 if sampled else 0.0)

    def run() -> int:
        samples = generate(
            model,
            tokenizer,
            prompt,
            sampling=sampling,
            device=device,
            max_new_tokens=NEW_TOKENS,
            num_samples=batch,
        )
        return sum(sample.num_tokens for sample in samples)

    return Work(run, model.num_parameters())


def transformers_work(shape: str, batch: int, sampled: bool, threads: int | None) -> Work:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from lmkit.device import available_cores

    torch.set_num_threads(threads or available_cores())
    if shape == "gpt2":
        gpt2 = GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=D_MODEL, n_layer=NUM_LAYERS, n_head=NUM_HEADS)
        model = GPT2LMHeadModel(gpt2).eval()
    else:
        llama = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=D_MODEL,
            intermediate_size=D_FF,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=NUM_HEADS,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(llama).eval()
    ids = torch.arange(1, PROMPT_TOKENS + 1).expand(batch, -1).contiguous()
    options = {"do_sample": True, "top_k": 0} if sampled else {"do_sample": False}

    @torch.inference_mode()
    def run() -> int:
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
            eos_token_id=None,
            **options,
        )
        return int(made[:, PROMPT_TOKENS:].numel())

    return Work(run, sum(p.numel() for p in model.parameters()))


if __name__ == "__main__":
    main()

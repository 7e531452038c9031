"""Adversarial training beside the temperature curve of the maximum-likelihood model that it started from.

Language GANs tend to look good by one number and bad by another; a maximum-likelihood model moves along the same curve
of quality against diversity by its sampling temperature alone (Caccia et al. 2020, "Language GANs falling short"). So
no number is printed without the curve. Needs nltk: pip install 'lmkit[gan]'.

    python scripts/check_gan.py FOLDER [KEY=VALUE ...]     the keys are those of lmkit pretrain
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lmkit import cli
from lmkit.config.generation import SamplingConfig
from lmkit.config.machine import DeviceConfig
from lmkit.config.training import ExistingRunConfig
from lmkit.console import Console
from lmkit.data.prepared import prepare
from lmkit.device import resolve_device
from lmkit.evaluation.bleu import ORDERS, bleu, self_bleu
from lmkit.loading import load_run
from lmkit.store.manifest import step_directory
from lmkit.tasks.gan import draw_sentences, lm_scores
from lmkit.tasks.sentences import sentences_of

TEMPERATURES = (0.7, 0.85, 1.0, 1.15)
NUM_SCORED = 1000
"""Sentences whose LM scores are taken."""
LENGTH_MAY_MOVE = 0.2
"""By how much adversarial training may change the mean length of sentences without having collapsed."""
NUM_BLEU = 200
"""Sentences, and references, that BLEU is counted on."""
WORDS = (
    "model=relgan objective=gan dataset=ptb tokenizer=word softmax=sampled schedule=linear schedule.warmup_ratio=0.05"
    " optimizer.lr=0.005 optimizer.weight_decay=0 optimizer.clip_norm=0.25 init.embeddings=cooccurrence"
    " train.batch_size=32 train.seq_len=60 objective.generator_lr=0.2 objective.discriminator_lr=0.2"
)


Row = tuple[str, list[list[str]], dict[str, float]]
"""Name, sentences, LM scores."""


def value_of(words: list[str], key: str, default: str) -> str:
    """The last value of a key among words."""
    return next((word.partition("=")[2] for word in reversed(words) if word.startswith(f"{key}=")), default)


def mean_length(samples: list[list[str]]) -> float:
    return sum(map(len, samples)) / len(samples)


def length_of(rows: list[Row], name: str) -> float:
    """Words of the sentences in the row of that name."""
    return next(mean_length(samples) for row, samples, _ in rows if row == name)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    steps, share = (
        int(value_of(words, "train.max_steps", "500")),
        float(value_of(words, "objective.pretrain_share", "0.8")),
    )
    boundary = round(steps * share)
    run = folder / "gan"
    if not (run / "result.json").exists():
        own = [f"train.max_steps={steps}", f"objective.pretrain_share={share}", f"save.every_steps={boundary}"]
        own += [f"save.keep_every={boundary}", f"eval.every_steps={boundary}", f"run.dir={run}"]
        if cli.main(["pretrain", *WORDS.split(), *words, *own]) != 0:
            sys.exit(1)
    console, device = Console(), resolve_device(DeviceConfig(threads=1))
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name, step, temperatures in (("maximum likelihood", boundary, TEMPERATURES), ("GAN", steps, (1.0,))):
        config = ExistingRunConfig(path=str(run), checkpoint=step_directory(step))
        loaded = load_run(config, device=device, console=console)
        prepared = prepare(loaded.dataset, loaded.tokenizer, console)
        text = [loaded.tokenizer.token_text(i) for i in range(loaded.tokenizer.vocab_size)]
        valid = sentences_of(prepared.splits["valid"], loaded.tokenizer)
        real = [valid.tokens[b:e] for b, e in zip(valid.begins_S, valid.ends_S, strict=True)]
        references = [[text[i] for i in ids[:-1]] for ids in real[NUM_BLEU : 2 * NUM_BLEU]]
        for temperature in temperatures:
            drawn = draw_sentences(
                loaded.model,
                NUM_SCORED,
                eos_id=loaded.tokenizer.eos_id,
                seed=1,
                device=device,
                sampling=SamplingConfig(temperature=temperature),
            )
            samples = [[text[i] for i in ids if i != loaded.tokenizer.eos_id] for ids in drawn[:NUM_BLEU]]
            rows.append((f"{name}, temperature {temperature}", samples, lm_scores(drawn, prepared)))
    own_text = [[text[i] for i in ids[:-1]] for ids in real[:NUM_BLEU]]
    rows.append(("real text", own_text, {}))
    header = [*(f"BLEU-{n}" for n in ORDERS), *(f"self-{n}" for n in ORDERS), "LM", "reverse LM", "words"]
    print(f"\n{'':<36}" + "".join(f"{name:>11}" for name in header))
    for name, samples, scores in rows:
        quality, sameness = bleu(samples, references), self_bleu(samples)
        values = [f"{100 * quality[n]:.1f}" for n in ORDERS] + [f"{100 * sameness[n]:.1f}" for n in ORDERS]
        values += [f"{scores[key]:.3f}" if key in scores else "-" for key in ("lm_score", "reverse_lm_score")]
        values.append(f"{mean_length(samples):.1f}")
        print(f"{name:<36}" + "".join(f"{value:>11}" for value in values))
    print(
        f"\nBLEU and self-BLEU in % of {NUM_BLEU} sentences against {NUM_BLEU} of valid (high BLEU: fluent; high"
        f" self-BLEU: monotonous).\nLM: nats per token of {NUM_SCORED} samples under a 5-gram model of train; reverse"
        " LM: of valid under a 5-gram model of the samples; lower is better."
    )
    pretrained, adversarial = (length_of(rows, f"{name}, temperature 1.0") for name in ("maximum likelihood", "GAN"))
    kept = abs(adversarial / pretrained - 1) <= LENGTH_MAY_MOVE
    print(
        f"{'reached' if kept else 'MISSED '}  length of sentences {adversarial / pretrained - 1:+.0%} after"
        f" {steps - boundary} adversarial steps (at most {LENGTH_MAY_MOVE:.0%} either way)"
    )
    for name, samples, _ in rows:
        print(f"\n{name}:")
        for sample in samples[:3]:
            print(f"  {' '.join(sample)}")


if __name__ == "__main__":
    main()

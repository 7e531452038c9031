"""The sentence VAE beside an LSTM language model of the same size, data and steps, both by the sentence protocol.

The language model is the VAE without its latent units (model.d_latent=0): the same decoder, trained by the same recipe
in the same order. Its perplexity is exact; the VAE's is an upper bound.

    python scripts/check_vae.py FOLDER [KEY=VALUE ...]     the keys are those of lmkit pretrain
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lmkit import cli

SAMPLES = 50


def lmkit(*words: str) -> None:
    if cli.main(list(words)) != 0:
        sys.exit(1)


def numbers_of(run: Path, words: list[str]) -> dict[str, Any]:
    """Train a run unless it is there, and its numbers on test."""
    if not (run / "result.json").exists():
        lmkit("pretrain", "recipe=ptb_vae", *words, f"run.dir={run}")
    output = run / "test.json"
    if not output.exists():
        device = [word for word in words if word.startswith("device")]
        lmkit("eval-ppl", f"run={run}", f"latent_samples={SAMPLES}", f"output={output}", *device)
    numbers: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return numbers


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    plain = numbers_of(folder / "lm", [*words, "model.d_latent=0"])
    vae = numbers_of(folder / "vae", words)
    print(f"\n{'PTB test, sentence protocol':<44}{'LSTM LM':>12}{'VAE':>12}")
    for name, key, form in (
        ("perplexity per word (VAE: at most)", "word_ppl_bound", ".2f"),
        ("perplexity per word by the ELBO (VAE: at most)", "elbo_word_ppl_bound", ".2f"),
        ("reconstruction, nats per sentence", "reconstruction_nats", ".2f"),
        ("KL, nats per sentence", "kl_nats", ".2f"),
        ("mutual information, nats", "mutual_information_nats", ".2f"),
        ("active units", "active_units", "d"),
    ):
        print(f"{name:<44}{format(plain[key], form):>12}{format(vae[key], form):>12}")
    goals = {
        "KL of at least 5 nats": vae["kl_nats"] >= 5,
        "at least 20 active units": vae["active_units"] >= 20,
        f"bound by {SAMPLES} samples not worse than the LSTM": vae["word_ppl_bound"] <= plain["word_ppl_bound"],
    }
    for goal, reached in goals.items():
        print(f"{'reached' if reached else 'MISSED '}  {goal}")


if __name__ == "__main__":
    main()

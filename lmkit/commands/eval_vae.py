"""eval-ppl of a sentence VAE: bounds on the perplexity, each marked as one, by the sentence protocol."""

from __future__ import annotations

import time
from typing import Any, cast

from lmkit.commands.output import output_path, write_json, write_text
from lmkit.config.commands import EvalPplConfig
from lmkit.config.evaluation import SentenceProtocolConfig
from lmkit.console import Console, table_lines
from lmkit.data.prepared import prepare
from lmkit.device import Device
from lmkit.errors import ConfigError, DataError
from lmkit.evaluation.checks import check_vocabulary
from lmkit.evaluation.latent import score_sentences
from lmkit.loading import LoadedRun
from lmkit.models.vae import VaeLstm
from lmkit.tasks.sentences import sentences_of
from lmkit.tasks.vae import latent_numbers, latent_rows


def run(cfg: EvalPplConfig, loaded: LoadedRun, device: Device, console: Console) -> dict[str, Any]:
    """Score the split by ``latent_samples`` draws per sentence; returns what is written to ``output``."""
    _refuse_what_needs_next_words(cfg, loaded)
    output = None if cfg.output is None else output_path(cfg.output)
    prepared = prepare(loaded.dataset if cfg.dataset is None else cfg.dataset, loaded.tokenizer, console)
    if cfg.split not in prepared.splits:
        raise DataError(f"{prepared.name} has no {cfg.split} split", f"it has {', '.join(prepared.splits)}")
    split, model = prepared.splits[cfg.split], cast(VaeLstm, loaded.model)
    check_vocabulary(model, split.tokens, f"{prepared.name} {cfg.split}")
    start = time.monotonic()
    scores = score_sentences(
        model,
        sentences_of(split, loaded.tokenizer),
        num_samples=cfg.latent_samples,
        seed=cfg.seed,
        batch_size=cfg.batch_size * 16,
        device=device,
    )
    numbers = latent_numbers(scores, split, cfg.latent_samples, cfg.seed)
    result = {
        **numbers,
        "kind": "bound",
        "dataset": prepared.name,
        "split": cfg.split,
        "run": str(loaded.path),
        "checkpoint": loaded.checkpoint.name,
        "checkpoint_digest": loaded.checkpoint_digest,
        "text_digest": split.text_digest,
        "eval_seconds": time.monotonic() - start,
        "protocol_line": f"sentence: {prepared.name}/{cfg.split}; each line on its own, first token given the end"
        f" token, <eos> scored and counted; UPPER BOUND by {cfg.latent_samples} importance samples (seed {cfg.seed}),"
        " not to be mixed up with exact perplexities",
    }
    title = f"{prepared.name} {cfg.split}, {loaded.checkpoint.name}"
    rows = [*latent_rows(numbers), ("tokens scored", f"{numbers['num_tokens']:,}")]
    rows.append(("sentences", f"{numbers['num_sentences']:,}"))
    write_text("\n".join([*table_lines(title, rows), f"protocol: {result['protocol_line']}"]) + "\n")
    if output is not None:
        write_json(output, result)
    return result


def refuse(cfg: EvalPplConfig, loaded: LoadedRun) -> None:
    """Raise ConfigError if ``latent_samples`` is given for a run that is no sentence VAE."""
    if cfg.latent_samples != EvalPplConfig.latent_samples:
        raise ConfigError(
            f"latent_samples={cfg.latent_samples} has no use with {loaded.path}, which is no sentence VAE",
            "leave it out",
        )


def _refuse_what_needs_next_words(cfg: EvalPplConfig, loaded: LoadedRun) -> None:
    """Raise ConfigError that names every key which asks for the probability of single words."""
    given = {
        "context": cfg.context,
        "stride": cfg.stride,
        "temperature": None if cfg.temperature != "valid" and float(cfg.temperature) == 1.0 else cfg.temperature,
        "mc_samples": cfg.mc_samples or None,
        "dynamic": cfg.dynamic,
        "cache": cfg.cache,
        "ensemble": cfg.ensemble or None,
        "mix": cfg.mix or None,
        "weights": None if cfg.weights == EvalPplConfig.weights else cfg.weights,
        "compare": cfg.compare or None,
        "word_probs": cfg.word_probs,
        "report": cfg.report,
        "bootstrap": None if cfg.bootstrap in (0, EvalPplConfig.bootstrap) else cfg.bootstrap,
        "protocol": None if isinstance(cfg.protocol, SentenceProtocolConfig) else cfg.protocol,
    }
    refused = [key for key, value in given.items() if value is not None]
    if refused:
        raise ConfigError(
            f"{', '.join(refused)} cannot be used with {loaded.path}: a sentence VAE only gives a bound for whole"
            " sentences, by protocol=sentence",
            "leave it out" if len(refused) == 1 else "leave them out",
        )

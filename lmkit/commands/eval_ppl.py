"""lmkit eval-ppl: perplexity of a run over a split, with every number, how it was taken, and proof that it is right."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmkit.commands import eval_vae
from lmkit.commands.eval_table import table
from lmkit.commands.output import output_path, write_file, write_json, write_text
from lmkit.config.commands import EvalPplConfig
from lmkit.config.data import BenchmarkConfig
from lmkit.console import Console
from lmkit.device import resolve_device
from lmkit.errors import ConfigError, DataError
from lmkit.evaluation import checks
from lmkit.evaluation.baselines import compressed_bits_per_byte
from lmkit.evaluation.choosing import Outcome, as_json, evaluate, kind_of
from lmkit.evaluation.evaluator import Evaluator, Passage
from lmkit.evaluation.numbers import Units, bootstrap, summary, units_of
from lmkit.evaluation.protocols import Protocol, describe
from lmkit.evaluation.published import published_kind, standing
from lmkit.evaluation.scoring import TokenScores, exp
from lmkit.evaluation.wordprobs import (
    aligned,
    best_mixture,
    compare_units,
    read_word_probs,
    word_probs_text,
)
from lmkit.loading import LoadedRun, folder_of, load_run
from lmkit.tokenizers.base import UNK
from lmkit.tokenizers.lines import line_enders

MAX_BASELINE_TOKENS = 5_000_000
"""Larger training texts are not counted for kn5 on the spot."""
MAX_COMPRESSED_BYTES = 20_000_000


def run(cfg: EvalPplConfig) -> dict[str, Any]:
    """Score the split; the table goes to standard output, the numbers to ``output`` and back to the caller."""
    console = Console()
    output = None if cfg.output is None else output_path(cfg.output)
    word_probs = None if cfg.word_probs is None else output_path(cfg.word_probs, "word_probs")
    report = None if cfg.report is None else output_path(cfg.report, "report")
    device = resolve_device(cfg.device)
    loaded = load_run(cfg.run, device=device, console=console, adapter=cfg.adapter, latent=True)
    if loaded.model_config.objective == "vae":
        return eval_vae.run(cfg, loaded, device, console)
    eval_vae.refuse(cfg, loaded)
    evaluator = Evaluator(cfg, loaded, device, console)
    opponents = {name: _opponent(evaluator, name) for name in cfg.compare}  # errors come before the work
    passage = evaluator.passage(cfg.split)
    checks.check_vocabulary(loaded.model, passage.material.tokens, f"{passage.source.name} {cfg.split}")
    start = time.monotonic()
    outcome = evaluate(evaluator, cfg.split)
    seconds = time.monotonic() - start
    result = _numbers(evaluator, passage, outcome)
    result |= {"eval_seconds": seconds, "protocol": _protocol(evaluator, passage, outcome, result)}
    result["protocol_line"] = protocol_line(result["protocol"])
    if cfg.checks:
        result["checks"] = _checks(evaluator, passage, outcome)
    if cfg.baselines:
        result["baselines"] = _baselines(evaluator, passage, outcome)
    result["comparisons"] = [_compared(evaluator, passage, outcome, *named, result) for named in opponents.items()]
    write_text("\n".join(table(result)) + "\n")
    if word_probs is not None:
        write_file(word_probs, word_probs_text(outcome.scores.nats_N).encode(), "word_probs")
    if report is not None:
        from lmkit.commands.eval_report import page

        write_file(report, page(evaluator, passage, outcome, result).encode(), "report")
    if output is not None:
        write_json(output, result)
    return result


def _numbers(evaluator: Evaluator, passage: Passage, outcome: Outcome) -> dict[str, Any]:
    cfg, loaded, protocol = evaluator.cfg, evaluator.loaded, evaluator.protocol
    result = summary(
        outcome.scores,
        passage.material,
        passage.source,
        protocol,
        outcome.windows,
        has_accuracy=outcome.has_accuracy,
    )
    interval = None
    if cfg.bootstrap:
        interval = bootstrap(_units(evaluator, passage, outcome, outcome.scores.nats_N), cfg.bootstrap, cfg.seed)
    result["interval"] = None if interval is None else asdict(interval)
    result["kind"] = kind_of(cfg)
    result["chosen"] = as_json(outcome.choice, outcome.members)
    heads = [protocol.headline(nats_N, outcome.windows, passage.material) for nats_N in outcome.member_nats]
    result["members_alone"] = {
        name: exp(head.nats / head.count) if np.isfinite(head.nats) else None
        for name, head in zip(outcome.members, heads, strict=True)
    }
    result["num_unknown"] = _num_unknown(passage)
    rank = None
    may_rank = result["ppl"] is not None and cfg.adapter is None and not result["num_unknown"]
    if isinstance(evaluator.dataset, BenchmarkConfig) and may_rank:
        name = evaluator.dataset.name.value
        configs = [loaded.config, *(evaluator.other(other).config for other in cfg.ensemble)]
        kinds = [published_kind(result["kind"], config, name) for config in configs]
        kind = next((one for one in kinds if one != result["kind"]), result["kind"])
        rank = standing(name, protocol.name, kind, cfg.split, result["ppl"])
    result["standing"] = [] if rank is None else rank.lines()
    return result | {
        "dataset": evaluator.prepared.name,
        "source": evaluator.prepared.report["source"],
        "split": cfg.split,
        "run": str(loaded.path),
        "checkpoint": loaded.checkpoint.name,
        "adapter": cfg.adapter,
        "step": loaded.step,
        "checkpoint_digest": loaded.checkpoint_digest,
        "text_digest": passage.source.split.text_digest,
        "tokenizer": loaded.tokenizer.kind,
        "num_types": loaded.tokenizer.vocab_size,
        "tokenizer_digest": loaded.tokenizer.digest,
        "device": evaluator.device.description,
        "precision": evaluator.device.precision.name,
        "trained_on_this_dataset": evaluator.knows_train,
    }


def _num_unknown(passage: Passage) -> int:
    """Tokens <unk> of the text as it is read that stand for what the vocabulary lacks: a word <unk> in it is none."""
    source, unk_id = passage.source, passage.source.tokenizer.unk_id
    number = 0 if unk_id is None else int((passage.material.tokens == unk_id).sum())
    if number and source.tokenizer.ends_lines:
        number -= sum(line.split().count(UNK) for line in source.read().split("\n"))
    return number


def _units(evaluator: Evaluator, passage: Passage, outcome: Outcome, nats_N: NDArray[np.float32]) -> Units:
    """Parts of the text that give the protocol's own number; of tokens without nats, neither nats nor count."""
    head = evaluator.protocol.headline(outcome.scores.nats_N, outcome.windows, passage.material)
    weights_N = evaluator.protocol.weights(outcome.windows, len(nats_N))
    count = head.count * weights_N[~np.isnan(nats_N)].sum() / weights_N[outcome.scores.scored_N].sum()
    scores = TokenScores(nats_N, outcome.scores.correct_N)
    return units_of(scores, passage.material, passage.source, float(count), weights_N)


def _protocol(evaluator: Evaluator, passage: Passage, outcome: Outcome, result: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is needed to repeat the number."""
    cfg, loaded = evaluator.cfg, evaluator.loaded
    return {
        **describe(evaluator.protocol, evaluator.reach, loaded.model_config.memory, loaded.model.context),
        "stripes": evaluator.protocol.num_stripes(passage.source),
        "text": f"{evaluator.prepared.name}/{passage.name}",
        "text_changes": passage.material.changes or "none",
        "text_sha256": passage.source.split.text_digest,
        "tokenizer": f"{loaded.tokenizer.kind}, {loaded.tokenizer.vocab_size:,} types",
        "tokenizer_sha256": loaded.tokenizer.digest,
        "model_sha256": loaded.checkpoint_digest,
        "eos": "scored and counted" if result["eos"]["count"] else "none in the text",
        "unk": _unk(evaluator, result),
        "per": result["ppl_per"],
        "kind": result["kind"],
        "temperature": outcome.choice.temperature,
        "mc_samples": cfg.mc_samples,
        "dynamic": None if cfg.dynamic is None else {"rule": type(cfg.dynamic).__name__} | asdict(cfg.dynamic),
        "cache": None
        if cfg.cache is None
        else {"rule": type(cfg.cache).__name__} | asdict(cfg.cache) | {"theta": outcome.choice.theta},
        "members": result["chosen"]["weights"],
        "ensemble": list(cfg.ensemble),
        "fitted_on_valid": outcome.choice.on_valid,
        "precision": evaluator.device.precision.name,
    }


def _unk(evaluator: Evaluator, result: Mapping[str, Any]) -> str:
    """What <unk> stands for: words of the text itself, in word-level sets, or those that the vocabulary lacks."""
    number = result["num_unk"]
    if evaluator.word_level:
        lacking = result["num_unknown"]
        return f"scored and counted, {lacking:,} of them for words of the text" if lacking else "scored and counted"
    return f"{number:,} scored and counted" if number else "none in the text"


def protocol_line(protocol: Mapping[str, Any]) -> str:
    """The protocol on one line, for people."""
    parts = [
        f"{protocol['name']}: {protocol['text']}"
        + ("" if protocol["text_changes"] == "none" else f" ({protocol['text_changes']})"),
        f"tokens {protocol['tokenizer']}",
        f"{protocol['memory']}, begun {protocol['memory_starts']}"
        + ("" if protocol["stripes"] is None else f" ({protocol['stripes']} stripes)")
        + _begun_once(protocol),
        f"first token {protocol['first_token']}",
        f"eos {protocol['eos']}",
        f"<unk> {protocol['unk']}",
        f"{protocol['kind']}",
        f"temperature {protocol['temperature']:.4g}",
        f"{protocol['precision']}",
        f"text {protocol['text_sha256'][:8]}, model {protocol['model_sha256'][:8]}",
    ]
    return "; ".join(parts)


def _begun_once(protocol: Mapping[str, Any]) -> str:
    """What goes on from line to line (or stripe, page, window) where the model's memory begins anew at each."""
    ways = (("cache", "cache"), ("dynamic", "dynamic evaluation"))
    used = " and ".join(shown for key, shown in ways if protocol[key] is not None)
    return f", {used} {Protocol.reset}" if used and protocol["memory_starts"] != Protocol.reset else ""


NOT_COMPARED = (
    *("model_sha256", "memory", "precision", "members", "ensemble", "eos"),
    *("tokenizer", "tokenizer_sha256", "context", "stride"),
)
"""What belongs to a model and not to the way of counting; context and stride count where both have windows, and the
tokenizer where tokens are what is counted."""


def protocol_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """In what two protocols differ so that their numbers must not be compared; empty: they may be."""
    ours, theirs = _without_fitted(ours), _without_fitted(theirs)
    names = [name for name in (*ours, *theirs) if name not in NOT_COMPARED]
    if ours.get("context") and theirs.get("context"):
        names += ["context", "stride"]
    if str(ours.get("per")).startswith("token"):
        names.append("tokenizer_sha256")
    return [
        f"{name}: {_short(ours.get(name))} here, {_short(theirs.get(name))} there"
        for name in dict.fromkeys(names)
        if ours.get(name) != theirs.get(name)
    ]


def _without_fitted(protocol: Mapping[str, Any]) -> Mapping[str, Any]:
    """The protocol with what was fitted on valid named as such: the value, as a weight, belongs to a model."""
    fitted, cache = protocol.get("fitted_on_valid"), protocol.get("cache")
    named: dict[str, Any] = {}
    if isinstance(fitted, list) and "temperature" in fitted:
        named["temperature"] = "valid"
    if isinstance(fitted, list) and "theta" in fitted and isinstance(cache, Mapping):
        named["cache"] = {**cache, "theta": "valid"}
    return {**protocol, **named}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _checks(evaluator: Evaluator, passage: Passage, outcome: Outcome) -> dict[str, Any]:
    cfg, start = evaluator.cfg, time.monotonic()
    proved = checks.prove(
        evaluator.loaded.model,
        passage.material.tokens,
        outcome.windows,
        seq_len=evaluator.seq_len(evaluator.loaded, evaluator.reach),
        batch_size=cfg.batch_size,
        device=evaluator.device,
        seed=cfg.seed,
    )
    seen = None
    if cfg.split != "train" and "train" in evaluator.prepared.splits:
        seen = checks.overlap(
            evaluator.prepared.splits["train"].tokens,
            passage.source.split.tokens,
            line_enders(evaluator.loaded.tokenizer),
        ).as_dict()
    seconds = time.monotonic() - start
    return {**proved.as_dict(), "overlap_with_train": seen, "seconds": seconds, "each_token_once": True}


def _baselines(evaluator: Evaluator, passage: Passage, outcome: Outcome) -> dict[str, Any]:
    """Perplexities of simple models by the same protocol, and how far compressors get."""
    cfg, train = evaluator.cfg, evaluator.prepared.splits.get("train")
    own_kn = evaluator.loaded.model_config.trains_by_counting
    names = ["uniform"]
    # of a train split that the run has not learnt, what is counted on it would be the only one to know the text
    alike = cfg.split != "train" or evaluator.knows_train
    if not alike:
        evaluator.console.say("no unigrams and kn5: they would be counted on the very text that is scored")
    if train is not None and alike and not passage.material.changes:
        names += ["unigram"] if own_kn or train.num_tokens > MAX_BASELINE_TOKENS else ["unigram", "kn5"]
    found: dict[str, Any] = {}
    for name in names:
        nats_N = evaluator.counted_nats(name, passage)
        head = evaluator.protocol.headline(nats_N, outcome.windows, passage.material)
        found[name] = exp(head.nats / head.count)
    if passage.source.split.num_bytes <= MAX_COMPRESSED_BYTES:
        bits = compressed_bits_per_byte(passage.source.read().encode())
        found |= {f"{name}_bits_per_byte": value for name, value in bits.items()}
    return found


Opponent = LoadedRun | dict[str, Any] | NDArray[np.float64]
"""What is compared with: a run, a result of eval-ppl (its protocol and ppl), or nats from a file."""


def _opponent(evaluator: Evaluator, name: str) -> Opponent:
    """What ``compare`` names. Raises ConfigError, CheckpointError or DataError for what is none."""
    path = Path(os.path.expanduser(folder_of(name, evaluator.cfg.run.root)))
    if not path.exists():
        raise ConfigError(f"compare={name} does not exist", "name a run, a file of probabilities or a result in JSON")
    if not path.is_dir():
        return _read_result(path) if path.suffix.lower() == ".json" else read_word_probs(path)
    other = evaluator.other(name)
    if other.tokenizer.digest == evaluator.loaded.tokenizer.digest:
        return other
    raise ConfigError(
        f"compare={name} has other tokens than {evaluator.loaded.path}, which single words cannot be paired with",
        "compare their results in JSON: compare=RESULT.json",
    )


def _read_result(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"protocol": dict(found["protocol"]), "ppl": float(found["ppl"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"compare={path} is not a result of eval-ppl ({error})", "write one with output=FILE") from None


def _compared(
    evaluator: Evaluator, passage: Passage, outcome: Outcome, name: str, opponent: Opponent, result: Mapping[str, Any]
) -> dict[str, Any]:
    """One opponent against this run, or why they cannot be compared."""
    if isinstance(opponent, dict):
        differences = protocol_differences(result["protocol"], opponent["protocol"])
        comparable = {"ppl": result["ppl"], "other_ppl": opponent["ppl"]} if not differences else {}
        return {"name": name, "not_comparable": differences, **comparable}
    if isinstance(opponent, LoadedRun):
        paired = _paired(evaluator, passage, outcome, name, evaluator.run_nats(name, passage))
        return {**paired, "other_kind": "static"}
    theirs_N = aligned(opponent, outcome.scores.scored_N, Path(name))
    return _paired(evaluator, passage, outcome, name, theirs_N.astype(np.float32))


def _paired(
    evaluator: Evaluator, passage: Passage, outcome: Outcome, name: str, theirs_N: NDArray[np.float32]
) -> dict[str, Any]:
    """Both on the tokens that both score, as the protocol counts."""
    cfg = evaluator.cfg
    ours_N = np.where(np.isnan(theirs_N), np.nan, outcome.scores.nats_N).astype(np.float32)
    theirs_N = np.where(np.isnan(ours_N), np.nan, theirs_N).astype(np.float32)
    if not evaluator.protocol.weights(outcome.windows, len(ours_N))[~np.isnan(ours_N)].any():
        return {"name": name, "not_comparable": ["no token that both score counts"]}
    weight, mixture_N = best_mixture(ours_N, theirs_N)
    ours, theirs, mixture = (_units(evaluator, passage, outcome, nats_N) for nats_N in (ours_N, theirs_N, mixture_N))
    compared = compare_units(name, ours, theirs, cfg.bootstrap, cfg.seed)
    mixture_ppl = exp(float(mixture.nats_U.sum() / mixture.counts_U.sum()))
    return compared.as_dict() | {"weight": weight, "mixture_ppl": mixture_ppl, "not_comparable": []}

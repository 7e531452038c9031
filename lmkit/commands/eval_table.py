"""What eval-ppl prints: the numbers, per what each is, what they are compared with, and how they were taken."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from lmkit.console import format_duration, format_number, table_lines
from lmkit.evaluation import checks


def table(result: Mapping[str, Any]) -> list[str]:
    """The result for people. Each perplexity says per what."""
    title = f"{result['dataset']} {result['split']} ({result['source']}), {result['checkpoint']}"
    lines = table_lines(title, facts(result))
    lines += [
        text for part in (_chosen_lines, _baseline_lines, _comparison_lines, _check_lines) for text in part(result)
    ]
    return [*lines, *result["standing"], f"protocol: {result['protocol_line']}"]


def facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the numbers."""
    return list(_rows(result))


def _rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    marked = "" if result["kind"] == "static" else f" [{result['kind']}]"
    yield f"perplexity per {result['ppl_per']}{marked}", _number(result["ppl"])
    if interval := result["interval"]:
        label = f"  {100 * interval['level']:.0f} % interval, {interval['num_units']:,} {interval['unit']}s resampled"
        yield label, f"{_number(interval['low'])} to {_number(interval['high'])}"
    if result["word_ppl"] is not None and result["word_ppl"] != result["ppl"]:
        yield "perplexity per word, ends of line counted", _number(result["word_ppl"])
    if result["word_ppl_eos_not_counted"] is not None:
        yield "perplexity per word, ends of line not counted", _number(result["word_ppl_eos_not_counted"])
    if result["token_ppl"] not in (result["word_ppl"], result["ppl"]):
        yield f"perplexity per token ({result['tokenizer']})", _number(result["token_ppl"])
    for name, shown in (("eos", "<eos>"), ("unk", "<unk>"), ("eos_and_unk", "<eos> and <unk>")):
        counts = [result[part]["count"] for part in name.split("_and_")]
        if all(counts):
            yield f"perplexity per token, {shown} left out", _number(result[f"token_ppl_without_{name}"])
    if result["bits_per_byte"] is not None:
        yield "bits per byte", f"{result['bits_per_byte']:.4f}"
        yield "bits per character", f"{result['bits_per_char']:.4f}"
    if result["accuracy"] is not None:
        yield "accuracy, next token", f"{100 * result['accuracy']:.2f} %"
    yield "negative log-likelihood, nats", f"{result['nats']:,.2f}"
    yield "tokens scored", f"{result['num_tokens']:,}"
    if result["num_tokens_left_out"]:
        yield "tokens left out by the protocol", f"{result['num_tokens_left_out']:,}"
    if result["num_words"] is not None:
        yield "words and ends of line", f"{result['num_words']:,}"
    for part, shown in (("eos", "<eos>"), ("unk", "<unk>")):
        if share := result[part]["count"]:
            cost = result[part]
            text = (
                f"{share:,} = {100 * cost['share_of_tokens']:.1f} % of tokens, {100 * cost['share_of_nats']:.1f} % of"
            )
            yield f"{shown}, share and cost", f"{text} nats, perplexity per {shown} {_number(cost['ppl'])}"
    if result["num_bytes"] is not None:
        yield "bytes", f"{result['num_bytes']:,}"
        yield "characters", f"{result['num_chars']:,}"
    speed = result["num_tokens"] / max(result["eval_seconds"], 1e-9)
    yield "time", f"{format_duration(result['eval_seconds'])}, {format_number(speed)} tokens/s"


def _number(value: float | None) -> str:
    return "-" if value is None else format_number(value)


def _chosen_lines(result: Mapping[str, Any]) -> Iterator[str]:
    chosen = result["chosen"]
    fitted = ", fitted on valid" if chosen["fitted_on_valid"] else ""
    if result["split"] == "valid" and fitted:
        fitted += ", which is the text scored here"
    parts = []
    if chosen["temperature"] != 1.0:
        parts.append(f"temperature {chosen['temperature']:.4g}")
    if chosen["theta"] is not None:
        parts.append(f"theta {chosen['theta']:.4g}")
    if chosen["weights"]:
        parts.append("weights " + ", ".join(f"{name} {weight:.4f}" for name, weight in chosen["weights"].items()))
    if parts:
        yield f"chosen: {'; '.join(parts)}{fitted}"
    alone = [f"{name} {_number(ppl)}" for name, ppl in result["members_alone"].items() if ppl is not None]
    if len(result["members_alone"]) > 1:
        yield f"each alone: {', '.join(alone)}"


def _baseline_lines(result: Mapping[str, Any]) -> Iterator[str]:
    found = result.get("baselines")
    if not found:
        return
    models = [f"{name} {_number(found[name])}" for name in ("uniform", "unigram", "kn5") if name in found]
    yield f"for comparison, by the same protocol: {', '.join(models)}"
    bits = [
        f"{name} {found[f'{name}_bits_per_byte']:.3f}" for name in ("xz", "gzip") if f"{name}_bits_per_byte" in found
    ]
    if bits and result["bits_per_byte"] is not None:
        lacking = f" (of {lacks:,} tokens only that they are <unk>)" if (lacks := result["num_unknown"]) else ""
        yield f"bits per byte: this model {result['bits_per_byte']:.3f}{lacking}, {', '.join(bits)}"


def _comparison_lines(result: Mapping[str, Any]) -> Iterator[str]:
    for found in result["comparisons"]:
        other = found.get("other_kind", result["kind"])
        there = "there" if other == result["kind"] else f"there ({other})"
        if found["not_comparable"]:
            yield f"not comparable with {found['name']}: {'; '.join(found['not_comparable'])}"
        elif "low" not in found:
            yield f"against {found['name']}: {_number(found['ppl'])} here, {_number(found['other_ppl'])} there"
        else:
            chance = (
                f" (95 %: {found['low']:+.4f} to {found['high']:+.4f}, paired over {found['num_units']:,}"
                f" {found['unit']}s), better in {100 * found['better']:.1f} % of resamples"
            )
            yield (
                f"against {found['name']}: {_number(found['ppl'])} here, {_number(found['other_ppl'])} {there};"
                f" {found['nats_per_count']:+.4f} nats better here{'' if math.isnan(found['better']) else chance};"
                f" best mixture on this text: {found['weight']:.3f} of it gives {_number(found['mixture_ppl'])}"
            )


def _check_lines(result: Mapping[str, Any]) -> Iterator[str]:
    found = result.get("checks")
    if not found:
        return
    yield (
        f"checked in {format_duration(found['seconds'])}: each token once, one by one as in batches"
        f" ({found['batch_difference']:.1g} nats), softmax sums to one ({found['softmax_difference']:.1g}),"
        f" no look ahead ({found['leak']:.1g})"
    )
    if seen := found["overlap_with_train"]:
        whose = "" if result["trained_on_this_dataset"] else " of this dataset, which may not be what the run learnt"
        yield (
            f"lines of at least {checks.MIN_LINE} tokens that also stand in train{whose}: {seen['num_seen']:,} of"
            f" {seen['num_lines']:,} ({100 * seen['share_of_tokens']:.2f} % of their tokens)"
        )

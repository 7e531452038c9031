"""The HTML page of eval-ppl: what is shown of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmkit.commands.eval_table import facts
from lmkit.evaluation.choosing import Outcome
from lmkit.evaluation.evaluator import Evaluator, Passage
from lmkit.evaluation.plan import Indices, Windows
from lmkit.evaluation.report import Report, ShownToken, by_frequency, by_length, by_position, render
from lmkit.evaluation.scoring import own_scores, score
from lmkit.heads import rows_per_chunk
from lmkit.initialise import token_counts
from lmkit.models.base import Scores
from lmkit.tokenizers.base import BytesDecoder
from lmkit.tokenizers.lines import line_enders

NUM_ALTERNATIVES = 5


def page(evaluator: Evaluator, passage: Passage, outcome: Outcome, result: Mapping[str, Any]) -> str:
    """The page as text."""
    nats_N, tokens = outcome.scores.nats_N, passage.material.tokens
    positions_N = np.maximum(outcome.windows.positions_in_context(len(tokens)), 0)
    counts_V = None
    if "train" in evaluator.prepared.splits:
        train = evaluator.prepared.splits["train"].tokens
        counts_V = token_counts(train, evaluator.loaded.tokenizer.vocab_size).numpy()
    shown = min(evaluator.cfg.report_tokens, len(tokens))
    warnings = []
    if result["kind"] != "static":
        warnings.append(f"Scores are {result['kind']}; the alternatives shown are those of the static model.")
    if not result["trained_on_this_dataset"]:
        warnings.append("This dataset may not be what the model has learnt.")
    return render(
        Report(
            title=f"{result['dataset']} {result['split']}: perplexity {result['ppl']:.2f} per {result['ppl_per']}",
            rows=facts(result),
            protocol=dict(result["protocol"]),
            by_position=by_position(nats_N, positions_N),
            by_frequency=[] if counts_V is None else by_frequency(nats_N, np.asarray(tokens), counts_V),
            by_length=by_length(nats_N, _line_lengths(evaluator, tokens)),
            text=_shown_tokens(evaluator, passage, outcome, shown),
            text_note=f"The first {shown:,} of {len(tokens):,} tokens of {result['dataset']} {result['split']}",
            warnings=warnings,
        )
    )


def _line_lengths(evaluator: Evaluator, tokens: NDArray[Any]) -> NDArray[np.int64]:
    """(N,) tokens of the line that each token stands in."""
    is_end_N = line_enders(evaluator.loaded.tokenizer)[tokens]
    line_N = np.append(0, np.cumsum(is_end_N))[:-1]
    lengths: NDArray[np.int64] = np.bincount(line_N)[line_N]
    return lengths


def _shown_tokens(evaluator: Evaluator, passage: Passage, outcome: Outcome, shown: int) -> list[ShownToken]:
    tokenizer, tokens = evaluator.loaded.tokenizer, passage.material.tokens
    ids, probs = _alternatives(evaluator, passage, outcome.windows, shown)
    texts = _texts(evaluator, tokens[:shown])
    return [
        ShownToken(
            texts[i],
            float(outcome.scores.nats_N[i]),
            tuple((tokenizer.token_text(int(k)), float(p)) for k, p in zip(ids[i], probs[i], strict=True) if p > 0),
        )
        for i in range(shown)
    ]


def _texts(evaluator: Evaluator, tokens: NDArray[Any]) -> list[str]:
    """Texts that joined are the text; the names of the tokens where a tokenizer only decodes as a whole."""
    tokenizer = evaluator.loaded.tokenizer
    if tokenizer.ends_lines:
        return [
            f"{tokenizer.token_text(int(i))}\n" if int(i) == tokenizer.eos_id else f"{tokenizer.token_text(int(i))} "
            for i in tokens
        ]
    decoder = tokenizer.decoder()
    if not isinstance(decoder, BytesDecoder):  # what a token adds to the text is not known
        return [f"{tokenizer.token_text(int(i))} " for i in tokens]
    return [tokenizer.token_text(int(i)) if i == tokenizer.eos_id else decoder.push(int(i)) for i in tokens]


def _alternatives(
    evaluator: Evaluator, passage: Passage, windows: Windows, shown: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(shown, k) most probable tokens of the static model before each of the first tokens, and their probabilities."""
    model = evaluator.loaded.model
    k = min(NUM_ALTERNATIVES, model.vocab_size)
    ids, probs = np.zeros((shown, k), np.int64), np.zeros((shown, k), np.float32)
    first = windows.take((windows.begins_W < shown) & (windows.scored_W < shown))
    if shown == 0 or len(first.begins_W) == 0:
        return ids, probs
    first = Windows(first.begins_W, first.scored_W, np.minimum(first.ends_W, shown), first.prefix_W)

    def scorer(hidden_ND: Tensor, targets_N: Tensor, positions_N: Indices) -> Scores:
        size = rows_per_chunk(model.vocab_size, hidden_ND.device)
        for begin in range(0, len(targets_N), size):
            top = torch.softmax(model.head.logits(hidden_ND[begin : begin + size]), 1).topk(k, 1)
            ids[positions_N[begin : begin + size]] = top.indices.cpu().numpy()
            probs[positions_N[begin : begin + size]] = top.values.cpu().numpy()
        return own_scores(model)(hidden_ND, targets_N, positions_N)

    score(
        model,
        passage.material.tokens,
        first,
        seq_len=evaluator.seq_len(evaluator.loaded, evaluator.reach),
        batch_size=evaluator.cfg.batch_size,
        device=evaluator.device,
        scorer=scorer,
    )
    return ids, probs

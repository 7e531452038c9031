"""eval-ppl on tiny trained runs of each family: everything it can do, and what every number must have in common."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import pretrain_small

from lmkit.commands import eval_ppl
from lmkit.config.commands import EvalPplConfig
from lmkit.config.data import (
    BenchmarkConfig,
    BenchmarkName,
    ByteTokenizerConfig,
    CharTokenizerConfig,
    DatasetConfig,
    HfTokenizerConfig,
    SentencePieceTokenizerConfig,
    TextConfig,
    TokenizerConfig,
    WordTokenizerConfig,
)
from lmkit.config.evaluation import (
    AwdLstmProtocolConfig,
    DynamicRmsConfig,
    DynamicSgdConfig,
    Gpt2PaperProtocolConfig,
    HfStridedProtocolConfig,
    LmEvalWikitextProtocolConfig,
    MikolovProtocolConfig,
    NeuralCacheConfig,
    ProtocolConfig,
    SentenceProtocolConfig,
    StreamProtocolConfig,
    TransformerXlProtocolConfig,
    UnigramCacheConfig,
)
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import Cell, ModelConfig, NgramConfig, RecurrentConfig, TransformerConfig
from lmkit.config.training import ExistingRunConfig, TrainConfig
from lmkit.data.benchmarks import BENCHMARKS, Expected
from lmkit.errors import CheckpointError, ConfigError, DataError
from lmkit.evaluation.numbers import percentiles
from lmkit.evaluation.scoring import score
from lmkit.evaluation.temperature import GRID, TemperatureSearch
from lmkit.models.transformer import Transformer

CPU = DeviceConfig(type=DeviceType.cpu, threads=1)
LSTM = RecurrentConfig(d_embed=12, d_hidden=16, num_layers=1, dropout_output=0.3)
TRANSFORMER = TransformerConfig(d_model=16, num_layers=1, num_heads=2, context=16, dropout=0.2)
RUNS: dict[str, tuple[ModelConfig, TokenizerConfig, int]] = {
    "lstm": (LSTM, WordTokenizerConfig(), 1),
    "other_step": (LSTM, WordTokenizerConfig(), 3),
    "lstm2": (LSTM, WordTokenizerConfig(), 2),
    "gru": (RecurrentConfig(cell=Cell.gru, d_embed=12, d_hidden=16, num_layers=1), WordTokenizerConfig(), 1),
    "transformer": (TRANSFORMER, WordTokenizerConfig(), 1),
    "kn": (NgramConfig(order=3), WordTokenizerConfig(), 1),
    "bytes": (TRANSFORMER, ByteTokenizerConfig(), 1),
    "byte_lstm": (LSTM, ByteTokenizerConfig(), 1),
    "byte_kn": (NgramConfig(order=5), ByteTokenizerConfig(), 1),
}
LEARNING = ["lstm", "gru", "transformer"]
WORDS = [*LEARNING, "kn"]
BYTES = ["bytes", "byte_lstm"]

Folder = Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Folder]:
    """A folder with a run of each name in RUNS."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LMKIT_DATA", raising=False)
        torch.set_num_threads(1)
        for name, (model, tokenizer, seed) in RUNS.items():
            train_run(folder / name, corpus, model, tokenizer, seed, 20 if name == "other_step" else 25)
        yield folder


def train_run(
    run: Path,
    text: Path | DatasetConfig,
    model: ModelConfig,
    tokenizer: TokenizerConfig,
    seed: int = 1,
    steps: int = 25,
) -> None:
    """A run of a few steps on a corpus, or on the files of a folder."""
    dataset = TextConfig(path=str(text), valid_fraction=0.1, test_fraction=0.1) if isinstance(text, Path) else text
    train = TrainConfig(batch_size=4, seq_len=16, max_steps=steps)
    pretrain_small(run, dataset, model, tokenizer, train, seed=seed)


def evaluate(runs: Folder, name: str, **fields: Any) -> dict[str, Any]:
    """eval-ppl run=NAME, by default without baselines and with few resamples."""
    fields = {"baselines": False, "bootstrap": 200} | fields
    return eval_ppl.run(EvalPplConfig(run=ExistingRunConfig(path=str(runs / name)), device=CPU, **fields))


def probs_of(runs: Folder, name: str, path: Path, **fields: Any) -> np.ndarray:
    """The probability of each scored token, as written by word_probs."""
    evaluate(runs, name, word_probs=str(path), **({"checks": False} | fields))
    return np.array([float(line) for line in path.read_text(encoding="utf-8").splitlines()])


@pytest.fixture(scope="module")
def static_ppl(runs: Folder) -> Callable[[str], float]:
    """The number of a run under the default protocol."""

    @cache
    def number(name: str) -> float:
        return float(evaluate(runs, name, checks=False)["ppl"])

    return number


def ppl(probs: np.ndarray) -> float:
    return math.exp(-float(np.log(probs).mean()))


# Protocols


PROTOCOLS: dict[str, ProtocolConfig] = {
    "stream": StreamProtocolConfig(),
    "mikolov": MikolovProtocolConfig(),
    "sentence": SentenceProtocolConfig(),
    "awd-lstm": AwdLstmProtocolConfig(test_stripes=3, valid_stripes=2),
    "transformer-xl": TransformerXlProtocolConfig(test_stripes=3, valid_stripes=2),
    "hf-strided": HfStridedProtocolConfig(max_length=12, stride=6),
}
DETOKENISED: dict[str, ProtocolConfig] = {
    "lm-eval-wikitext": LmEvalWikitextProtocolConfig(),
    "gpt2-paper": Gpt2PaperProtocolConfig(stride=4),
}
CASES = [(name, run) for name in PROTOCOLS for run in [*WORDS, *BYTES]] + [(n, r) for n in DETOKENISED for r in BYTES]


@pytest.mark.parametrize(("name", "run"), CASES)
def test_every_protocol_takes_every_family_and_says_how_the_number_was_taken(
    name: str, run: str, runs: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, probs = tmp_path / "result.json", tmp_path / "probs.txt"
    result = evaluate(
        runs,
        run,
        protocol=(PROTOCOLS | DETOKENISED)[name],
        output=str(out),
        word_probs=str(probs),
        compare=[str(runs / run)],
        baselines=True,
    )
    stored = json.loads(out.read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(result))
    assert stored["protocol"]["name"] == name
    for digest in ("text_sha256", "tokenizer_sha256", "model_sha256"):
        assert re.fullmatch("[0-9a-f]{64}", stored["protocol"][digest])
    assert stored["kind"] == stored["protocol"]["kind"] == "static"
    assert stored["interval"]["low"] <= stored["ppl"] <= stored["interval"]["high"]
    lines = np.array([float(line) for line in probs.read_text(encoding="utf-8").splitlines()])
    assert len(lines) == stored["num_tokens"]
    assert ppl(lines) == pytest.approx(stored["token_ppl"], rel=1e-6)
    if stored["ppl_per"].startswith("word") and run in BYTES:
        assert stored["ppl"] > 10 * stored["token_ppl"], "a word is several bytes"
    else:
        assert stored["ppl"] == pytest.approx(stored["token_ppl"], rel=0.06), "these protocols differ by a token or so"
    against = stored["comparisons"][0]
    assert (against["nats_per_count"], against["low"], against["high"]) == (0.0, 0.0, 0.0), "itself"
    shown = capfd.readouterr().out
    assert f"protocol: {name}: text/test" in shown
    assert f"perplexity per {stored['ppl_per']}" in shown


@pytest.mark.parametrize(
    "name",
    PROTOCOLS,
)
def test_a_comparison_shows_the_very_number_that_is_shown_above_it(name: str, runs: Folder) -> None:
    result = evaluate(runs, "lstm", protocol=PROTOCOLS[name], compare=[str(runs / "gru")], checks=False)
    against = result["comparisons"][0]
    assert against["ppl"] == pytest.approx(result["ppl"], rel=1e-7)
    other = evaluate(runs, "gru", protocol=PROTOCOLS[name], checks=False)
    assert against["other_ppl"] == pytest.approx(other["ppl"], rel=1e-6)


@pytest.mark.parametrize("name", DETOKENISED)
def test_words_cannot_be_detokenised(name: str, runs: Folder) -> None:
    with pytest.raises(ConfigError, match=f"protocol={name} changes the text"):
        evaluate(runs, "lstm", protocol=DETOKENISED[name])


@pytest.mark.parametrize(("name", "run"), [case for case in CASES if case[1] in ("lstm", "bytes")])
def test_no_perplexity_is_printed_without_saying_per_what(
    name: str, run: str, runs: Folder, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluate(runs, run, protocol=(PROTOCOLS | DETOKENISED)[name], baselines=True, compare=[str(runs / run)])
    shown = capfd.readouterr().out
    assert "perplexity per " in shown
    assert re.findall(r"perplexity(?! per )[^\n]*", shown) == []


def test_the_numbers_of_one_pass_agree_with_each_other(runs: Folder) -> None:
    for run in (*WORDS, *BYTES):
        found = evaluate(runs, run)
        nats = found["nats"]
        assert found["word_ppl"] == pytest.approx(math.exp(nats / found["num_words"]))
        assert found["token_ppl"] == pytest.approx(math.exp(nats / found["num_tokens"]))
        assert found["bits_per_byte"] == pytest.approx(nats / found["num_bytes"] / math.log(2))
        assert found["bits_per_char"] == pytest.approx(nats / found["num_chars"] / math.log(2))
        assert found["num_bytes"] > found["num_chars"] > found["num_words"]
    words = [evaluate(runs, run, checks=False)["num_words"] for run in ("lstm", "bytes")]
    assert words[0] == words[1], "of the same text, whatever the tokenizer"


# What may change a number, and what may not


@pytest.mark.parametrize("run", ["lstm", "transformer", "kn"])
@pytest.mark.parametrize("name", ["stream", "sentence", "awd-lstm", "hf-strided"])
def test_batch_size_and_seq_len_never_change_the_number(run: str, name: str, runs: Folder) -> None:
    found = [
        evaluate(runs, run, protocol=PROTOCOLS[name], batch_size=batch_size, seq_len=seq_len, checks=False)["ppl"]
        for batch_size, seq_len in ((16, 1024), (3, 7))
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("field", ["context", "stride"])
@pytest.mark.parametrize("run", ["lstm", "gru", "kn"])
def test_context_and_stride_are_refused_where_a_state_carries_the_past(field: str, run: str, runs: Folder) -> None:
    with pytest.raises(ConfigError, match="context and stride do not apply"):
        evaluate(runs, run, **{field: 4})


def test_context_and_stride_change_the_number_of_a_transformer_and_are_in_its_protocol(runs: Folder) -> None:
    first = evaluate(runs, "transformer", checks=False)
    assert (first["protocol"]["context"], first["protocol"]["stride"]) == (16, 8)
    others = [evaluate(runs, "transformer", checks=False, **f) for f in ({"context": 4}, {"stride": 16}, {"stride": 1})]
    assert len({found["ppl"] for found in (first, *others)}) == 4
    assert [(o["protocol"]["context"], o["protocol"]["stride"]) for o in others] == [(4, 2), (16, 16), (16, 1)]
    with pytest.raises(ConfigError, match="context=17"):
        evaluate(runs, "transformer", context=17)
    with pytest.raises(ConfigError, match="stride=9"):
        evaluate(runs, "transformer", context=8, stride=9)
    with pytest.raises(ConfigError, match="context=1: protocol=hf-strided scores no first token of a window"):
        evaluate(runs, "transformer", context=1, protocol=PROTOCOLS["hf-strided"], cache=NeuralCacheConfig())


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_every_split_can_be_scored(split: str, runs: Folder) -> None:
    found = evaluate(runs, "kn", split=split)
    assert found["protocol"]["text"] == f"text/{split}"
    assert (found["checks"]["overlap_with_train"] is None) is (split == "train")


# Beyond static scoring


BEYOND: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": "valid"},
    "a given temperature": {"temperature": "1.3"},
    "mc-dropout": {"mc_samples": 3},
    "unigram cache": {"cache": UnigramCacheConfig(window=100)},
    "neural cache": {"cache": NeuralCacheConfig(window=100)},
    "neural cache, theta given": {"cache": NeuralCacheConfig(window=100, theta=0.3)},
    "dynamic sgd": {"dynamic": DynamicSgdConfig(seq_len=5, lr=0.1)},
    "dynamic rms": {"dynamic": DynamicRmsConfig(seq_len=5)},
    "kn5": {"mix": ["kn5"]},
    "unigram": {"mix": ["unigram"]},
    "given weights": {"mix": ["kn5", "unigram"], "weights": "0.5,0.3,0.2"},
    "equal weights": {"mix": ["kn5"], "weights": "equal"},
    "all of it": {
        "temperature": "valid",
        "dynamic": DynamicSgdConfig(seq_len=5, lr=0.1),
        "cache": NeuralCacheConfig(window=50),
        "mix": ["kn5"],
    },
}


@pytest.mark.parametrize("what", BEYOND)
@pytest.mark.parametrize("run", LEARNING)
def test_each_way_beyond_static_scoring_works_for_each_family_and_is_marked(
    what: str,
    run: str,
    runs: Folder,
    static_ppl: Callable[[str], float],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    static = static_ppl(run)
    capfd.readouterr()
    found = evaluate(runs, run, output=str(tmp_path / "out.json"), **BEYOND[what])
    shown = capfd.readouterr().out
    stored = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert stored["kind"] != "static"
    assert stored["protocol"]["kind"] == stored["kind"]
    assert f"[{stored['kind']}]" in shown.splitlines()[2], "in the line of the number itself"
    assert f"; {stored['kind']};" in shown.splitlines()[-1], "and in the protocol"
    assert math.isfinite(found["ppl"])
    if not found["chosen"]["fitted_on_valid"]:
        assert found["ppl"] != static
    if "mix" in BEYOND[what] or "cache" in BEYOND[what]:
        assert found["accuracy"] is None
        assert sum(found["chosen"]["weights"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "what", ["unigram cache", "neural cache", "dynamic sgd", "dynamic rms", "temperature", "unigram", "given weights"]
)
def test_what_n_grams_can_do_too(what: str, runs: Folder) -> None:
    assert evaluate(runs, "kn", **BEYOND[what])["kind"] != "static"


@pytest.mark.parametrize("what", ["temperature", "unigram cache", "neural cache", "kn5", "unigram"])
@pytest.mark.parametrize("run", ["lstm", "transformer"])
def test_what_is_fitted_on_valid_is_no_worse_there_than_without_it(what: str, run: str, runs: Folder) -> None:
    static = evaluate(runs, run, split="valid", checks=False)
    found = evaluate(runs, run, split="valid", checks=False, **BEYOND[what])
    assert found["chosen"]["fitted_on_valid"]
    assert found["nats"] <= static["nats"] * (1 + 1e-5)


def test_only_what_was_fitted_on_valid_says_so(runs: Folder) -> None:
    assert evaluate(runs, "lstm", checks=False, **BEYOND["a given temperature"])["chosen"]["fitted_on_valid"] == []
    assert evaluate(runs, "lstm", checks=False, **BEYOND["given weights"])["chosen"]["fitted_on_valid"] == []
    found = evaluate(runs, "lstm", checks=False, **BEYOND["neural cache"])["chosen"]
    assert found["fitted_on_valid"] == ["theta", "weights"]
    assert found["theta"] > 0


def test_theta_is_the_best_one_for_the_weights_that_are_given(runs: Folder) -> None:
    def found(weights: str, theta: float | None = None, split: str = "valid") -> dict[str, Any]:
        cache = NeuralCacheConfig(window=20, theta=theta)
        return evaluate(runs, "gru", split=split, checks=False, cache=cache, weights=weights)

    some, much = found("0.99,0.01"), found("0.1,0.9")
    thetas = some["chosen"]["theta"], much["chosen"]["theta"]
    assert thetas[0] != thetas[1]
    assert some["nats"] < found("0.99,0.01", thetas[1])["nats"]
    assert much["nats"] < found("0.1,0.9", thetas[0])["nats"]
    assert found("0,1", split="test")["nats"] == math.inf, "most words are not in the cache, whatever theta is"


@pytest.mark.parametrize(("best", "told"), [(GRID[0], True), (1.2, False), (GRID[-1], True)])
def test_a_best_temperature_at_an_end_of_the_search_is_told(
    best: float, told: bool, runs: Folder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TemperatureSearch, "best", lambda search: best)
    assert evaluate(runs, "lstm", temperature="valid", checks=False)["chosen"]["temperature"] == best
    assert ("at an end of what is searched, 0.6 to 1.7" in capfd.readouterr().err) is told


def test_mixing_with_kn5_is_the_weighted_sum_of_probabilities(runs: Folder, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    own = probs_of(runs, "lstm", path)
    alone = probs_of(runs, "lstm", path, mix=["kn5"], weights="0,1")
    mixed = probs_of(runs, "lstm", path, mix=["kn5"], weights="0.25,0.75")
    np.testing.assert_allclose(mixed, 0.25 * own + 0.75 * alone, rtol=1e-5)
    np.testing.assert_allclose(probs_of(runs, "lstm", path, mix=["kn5"], weights="1,0"), own, rtol=1e-5)
    result = evaluate(runs, "lstm", baselines=True)
    assert ppl(alone) == pytest.approx(result["baselines"]["kn5"], rel=1e-5), "kn5 is the baseline of that name"


@pytest.mark.parametrize("protocol", ["stream", "sentence", "awd-lstm", "transformer-xl"])
@pytest.mark.parametrize("run", BYTES)
def test_kn5_reads_by_the_protocol_as_a_run_of_it_does(run: str, protocol: str, runs: Folder, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    counted = probs_of(runs, run, path, mix=["kn5"], weights="0,1", protocol=PROTOCOLS[protocol])
    of_a_run = probs_of(runs, "byte_kn", path, protocol=PROTOCOLS[protocol])
    np.testing.assert_allclose(counted, of_a_run, rtol=1e-5)


def test_mixing_with_another_run_is_the_weighted_sum_of_its_probabilities(runs: Folder, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    first, second = (probs_of(runs, name, path) for name in ("lstm", "transformer"))
    mixed = probs_of(runs, "lstm", path, mix=[str(runs / "transformer")], weights="0.6,0.4")
    np.testing.assert_allclose(mixed, 0.6 * first + 0.4 * second, rtol=1e-5)
    found = evaluate(runs, "lstm", mix=[str(runs / "transformer")])
    assert set(found["chosen"]["weights"]) == {"run", str(runs / "transformer")}
    assert found["chosen"]["fitted_on_valid"] == ["weights"]


def test_an_ensemble_is_the_average_of_the_probabilities(runs: Folder, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    names = ("lstm", "lstm2", "transformer")
    alone = [probs_of(runs, name, path) for name in names]
    together = probs_of(runs, "lstm", path, ensemble=[str(runs / name) for name in names[1:]])
    np.testing.assert_allclose(together, sum(alone) / 3, rtol=1e-5)
    found = evaluate(runs, "lstm", ensemble=[str(runs / "lstm2")])
    assert found["kind"] == "ensemble"
    assert found["accuracy"] is None
    assert found["protocol"]["ensemble"] == [str(runs / "lstm2")]


def test_an_ensemble_with_itself_is_the_run_itself(runs: Folder) -> None:
    for run in ("lstm", "transformer"):
        alone = evaluate(runs, run, checks=False)
        assert evaluate(runs, run, checks=False, ensemble=[str(runs / run)])["nats"] == pytest.approx(alone["nats"])


@pytest.mark.parametrize("fields", [{"stride": 2}, {"context": 8}, {"context": 6, "stride": 1}])
def test_context_and_stride_apply_to_the_other_runs_as_well(fields: dict[str, int], runs: Folder) -> None:
    name = str(runs / "transformer")
    alone = evaluate(runs, "transformer", checks=False, **fields)
    for beyond in ({"ensemble": [name]}, {"mix": [name], "weights": "equal"}):
        found = evaluate(runs, "transformer", checks=False, **beyond, **fields)
        assert found["nats"] == pytest.approx(alone["nats"], rel=1e-6)
    against = evaluate(runs, "transformer", checks=False, compare=[name], **fields)["comparisons"][0]
    assert against["nats_per_count"] == 0.0


def test_each_member_alone_is_counted_as_by_the_protocol(runs: Folder) -> None:
    name, protocol = str(runs / "transformer"), HfStridedProtocolConfig(max_length=8, stride=4)
    found = evaluate(runs, "lstm", protocol=protocol, mix=[name], weights="0.5,0.5", checks=False)["members_alone"]
    for member, run in (("run", "lstm"), (name, "transformer")):
        alone = evaluate(runs, run, protocol=protocol, checks=False)["ppl"]
        assert found[member] == pytest.approx(alone, rel=1e-6)


def test_tokens_that_not_all_runs_score_are_not_counted(runs: Folder, tmp_path: Path) -> None:
    """Windows side by side leave out their first tokens: every 32nd for the one run, every 16th for the other."""
    protocol, path = HfStridedProtocolConfig(max_length=32, stride=32), tmp_path / "p.txt"
    for fields in ({"ensemble": [str(runs / "transformer")]}, {"mix": [str(runs / "transformer")], "weights": "equal"}):
        probs = probs_of(runs, "lstm", path, protocol=protocol, **fields)
        found = evaluate(runs, "lstm", protocol=protocol, checks=False, **fields)
        assert found["ppl"] == pytest.approx(ppl(probs), rel=1e-6)
        assert found["interval"]["low"] <= found["ppl"] <= found["interval"]["high"]


def test_a_cache_in_the_mixture_counts_what_stands_before(runs: Folder, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    own = probs_of(runs, "lstm", path)
    half = probs_of(runs, "lstm", path, cache=UnigramCacheConfig(window=30), weights="0.5,0.5")
    cache = 2 * half - own
    assert cache[0] == pytest.approx(own[0], rel=1e-4), "nothing stands before the first token"
    counts = cache[1:] * np.minimum(np.arange(1, len(own)), 30)
    np.testing.assert_allclose(counts, counts.round(), atol=1e-3)


def test_mc_dropout_is_repeatable_by_seed_and_more_passes_are_another_number(runs: Folder) -> None:
    def nats(**fields: Any) -> float:
        found = evaluate(runs, "lstm", checks=False, **fields)["nats"]
        assert isinstance(found, float)
        return found

    torch.manual_seed(5)
    first = nats(mc_samples=3)
    torch.manual_seed(6)
    assert nats(mc_samples=3) == first
    assert nats(mc_samples=3, seed=2) != first
    assert nats(mc_samples=4) != first


def test_temperature_1_is_the_run_itself(runs: Folder) -> None:
    for run in WORDS:
        own = evaluate(runs, run, checks=False)
        one = evaluate(runs, run, checks=False, temperature="1.0")
        assert (one["nats"], one["kind"]) == (own["nats"], "static")


def test_each_member_has_a_name_and_a_weight(runs: Folder) -> None:
    with pytest.raises(ConfigError, match="are 3, for run, kn5"):
        evaluate(runs, "lstm", mix=["kn5"], weights="0.2,0.3,0.5")
    with pytest.raises(ConfigError, match="are 2, for run"):
        evaluate(runs, "lstm", weights="0.5,0.5")
    with pytest.raises(ConfigError, match="mix=kn5,kn5: two members are called kn5; name each once"):
        evaluate(runs, "lstm", mix=["kn5", "kn5"])  # their weights would be told as one


@pytest.mark.parametrize("field", ["ensemble", "mix"])
def test_runs_with_another_tokenizer_are_refused(field: str, runs: Folder) -> None:
    with pytest.raises(ConfigError, match="has another tokenizer than"):
        evaluate(runs, "lstm", **{field: [str(runs / "bytes")]})


@pytest.mark.parametrize("field", ["ensemble", "mix"])
def test_a_run_that_is_not_there_is_a_clear_error(field: str, runs: Folder) -> None:
    with pytest.raises((CheckpointError, ConfigError), match="nowhere"):
        evaluate(runs, "lstm", **{field: [str(runs / "nowhere")]})


def test_a_cache_under_a_protocol_that_leaves_tokens_out(runs: Folder) -> None:
    for config in (UnigramCacheConfig(), NeuralCacheConfig(theta=0.3)):
        found = evaluate(runs, "lstm", protocol=PROTOCOLS["transformer-xl"], cache=config)
        assert found["num_tokens_left_out"] > 0
        assert math.isfinite(found["ppl"])


def test_a_cache_goes_on_from_line_to_line_also_where_each_is_read_on_its_own(runs: Folder, tmp_path: Path) -> None:
    path, caches = tmp_path / "p.txt", []
    for protocol in (StreamProtocolConfig(), SentenceProtocolConfig()):
        own = probs_of(runs, "lstm", path, protocol=protocol)
        half = probs_of(runs, "lstm", path, protocol=protocol, cache=UnigramCacheConfig(window=30), weights="0.5,0.5")
        caches.append((2 * half - own)[1:])
    np.testing.assert_allclose(*caches, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"cache": NeuralCacheConfig(window=20, theta=0.3), "weights": "equal"}, "cache"),
        ({"dynamic": DynamicSgdConfig(lr=0.1)}, "dynamic evaluation"),
        ({"cache": UnigramCacheConfig(), "dynamic": DynamicSgdConfig(lr=0.1)}, "cache and dynamic evaluation"),
    ],
)
def test_the_protocol_says_what_goes_on_where_the_memory_begins_anew(
    fields: dict[str, Any], shown: str, runs: Folder
) -> None:
    for protocol, begun in (
        (StreamProtocolConfig(), "begun at the start of the text;"),
        (SentenceProtocolConfig(), f"begun at the start of each line, {shown} at the start of the text;"),
    ):
        found = evaluate(runs, "lstm", protocol=protocol, checks=False, bootstrap=0, **fields)
        assert begun in found["protocol_line"]


# Comparisons


def test_a_comparison_with_a_run_is_that_with_its_file_of_probabilities(runs: Folder, tmp_path: Path) -> None:
    path = tmp_path / "lstm2.txt"
    evaluate(runs, "lstm2", word_probs=str(path))
    by_run, by_file = (
        evaluate(runs, "lstm", compare=[other], checks=False)["comparisons"][0]
        for other in (str(runs / "lstm2"), str(path))
    )
    for name in ("ppl", "other_ppl", "weight", "mixture_ppl", "better", "unit", "num_units"):
        assert by_file[name] == (
            by_run[name] if isinstance(by_run[name], str) else pytest.approx(by_run[name], rel=1e-5)
        )
    assert by_file["nats_per_count"] == pytest.approx(by_run["nats_per_count"], abs=1e-6)
    assert by_run["low"] <= by_run["nats_per_count"] <= by_run["high"]
    assert by_run["mixture_ppl"] <= min(by_run["ppl"], by_run["other_ppl"]) * (1 + 1e-6)


def test_a_run_that_is_compared_with_is_scored_statically_and_that_is_told(
    runs: Folder, capfd: pytest.CaptureFixture[str]
) -> None:
    static = evaluate(runs, "lstm2", checks=False)["ppl"]
    cases: list[tuple[dict[str, Any], str]] = [({}, "there;"), ({"temperature": "1.2"}, "there (static);")]
    for fields, told in cases:
        found = evaluate(runs, "lstm", compare=[str(runs / "lstm2")], checks=False, **fields)["comparisons"][0]
        assert found["other_ppl"] == pytest.approx(static, rel=1e-6)
        assert f" {told} " in capfd.readouterr().out


def test_a_file_without_the_first_token_compares_the_others(runs: Folder, tmp_path: Path) -> None:
    probs = probs_of(runs, "lstm2", tmp_path / "all.txt")
    lines = (tmp_path / "all.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    shorter = tmp_path / "published.txt"
    shorter.write_text("".join(lines[1:]), encoding="utf-8")
    found = evaluate(runs, "lstm", compare=[str(shorter)], checks=False)["comparisons"][0]
    own = probs_of(runs, "lstm", tmp_path / "own.txt")
    assert found["ppl"] == pytest.approx(ppl(own[1:]), rel=1e-5)
    assert found["other_ppl"] == pytest.approx(ppl(probs[1:]), rel=1e-5)
    assert found["nats_per_count"] == pytest.approx(math.log(ppl(probs[1:]) / ppl(own[1:])), abs=1e-5)


def test_tokens_that_weigh_unlike_others_are_compared_by_their_weights(runs: Folder, tmp_path: Path) -> None:
    """The first window of hf-strided weighs a token by 1, later ones of n new tokens by (n - 1) / n."""
    protocol, path = HfStridedProtocolConfig(max_length=8, stride=4), tmp_path / "all.txt"
    ours, theirs = (-np.log(probs_of(runs, run, path, protocol=protocol)) for run in ("lstm", "lstm2"))
    weights = np.full(len(ours), 3 / 4)
    weights[:7] = 1.0
    if rest := (len(ours) - 7) % 4:
        weights[-rest:] = (rest - 1) / rest
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    found = evaluate(runs, "lstm", protocol=protocol, compare=[str(path)], checks=False)["comparisons"][0]
    for name, nats in (("ppl", ours), ("other_ppl", theirs)):
        assert found[name] == pytest.approx(math.exp(np.average(nats[1:], weights=weights[1:])), rel=1e-5)


def test_the_interval_resamples_lines_by_the_weights_of_their_own_tokens(runs: Folder, tmp_path: Path) -> None:
    """The first window of hf-strided weighs a token by 1, later ones of n new tokens by (n - 1) / n."""
    lines = ["the cat sat", "on the mat and the dog ran under a tree", "a bird", "the dog sat on the cat and ran"]
    (tmp_path / "text.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    fields: dict[str, Any] = {
        "dataset": TextConfig(path=str(tmp_path / "text.txt"), valid_fraction=0.0, test_fraction=0.0),
        "split": "train",
        "protocol": HfStridedProtocolConfig(max_length=8, stride=4),
    }
    nats = -np.log(probs_of(runs, "lstm", tmp_path / "p.txt", **fields))
    assert len(nats) == 26, "all but the first"
    weights = np.array(7 * [1.0] + 16 * [3 / 4] + 3 * [2 / 3])
    ends = np.cumsum([len(line.split()) + 1 for line in lines])[:-1] - 1
    weighted_U, weights_U = ([part.sum() for part in np.split(x, ends)] for x in (nats * weights, weights))
    draw, ratios = np.random.default_rng(5), []
    for _ in range(200):
        chosen = draw.integers(4, size=4)
        ratios.append(sum(weighted_U[u] for u in chosen) / sum(weights_U[u] for u in chosen))
    found = evaluate(runs, "lstm", checks=False, seed=5, **fields)
    assert found["ppl"] == pytest.approx(math.exp(np.average(nats, weights=weights)), rel=1e-5)
    low, high = percentiles(np.array(ratios))
    assert found["interval"]["low"] == pytest.approx(math.exp(low), rel=1e-5)
    assert found["interval"]["high"] == pytest.approx(math.exp(high), rel=1e-5)


def test_without_an_interval_nothing_is_counted_for_one(runs: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_ppl, "units_of", lambda *_: pytest.fail("the parts are not needed"))
    assert evaluate(runs, "lstm", checks=False, bootstrap=0)["interval"] is None


def test_where_no_token_that_both_score_counts_there_is_nothing_to_compare(runs: Folder, tmp_path: Path) -> None:
    """In windows of one new token, hf-strided only counts that of the first one."""
    fields: dict[str, Any] = {"protocol": HfStridedProtocolConfig(max_length=2, stride=1), "checks": False}
    path = tmp_path / "all.txt"
    probs_of(runs, "lstm2", path, **fields)
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    found = evaluate(runs, "lstm", compare=[str(path)], **fields)["comparisons"][0]
    assert found == {"name": str(path), "not_comparable": ["no token that both score counts"]}


def test_a_file_of_another_text_and_a_name_of_nothing_are_errors(runs: Folder, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("0.5\n0.5\n", encoding="utf-8")
    with pytest.raises(DataError, match="has 2 lines"):
        evaluate(runs, "lstm", compare=[str(tmp_path / "short.txt")])
    with pytest.raises(ConfigError, match="does not exist"):
        evaluate(runs, "lstm", compare=[str(tmp_path / "nothing.txt")])
    for text in ("[1]", "[" * 100_000):
        (tmp_path / "no.json").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="is not a result of eval-ppl"):
            evaluate(runs, "lstm", compare=[str(tmp_path / "no.json")])


def test_what_cannot_be_compared_or_mixed_with_is_refused_before_anything_is_scored(
    runs: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it was scored")

    monkeypatch.setattr("lmkit.evaluation.evaluator.score", scored)
    (tmp_path / "no.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "no.txt").write_text("two\n", encoding="utf-8")
    for name in ("nothing.txt", "no.json", "no.txt"):
        with pytest.raises((ConfigError, DataError)):
            evaluate(runs, "lstm", compare=[str(tmp_path / name)])
    for key in ("compare", "ensemble", "mix"):
        with pytest.raises(ConfigError, match=r"other tokens|another tokenizer"):
            evaluate(runs, "lstm", **{key: [str(runs / "bytes")]})
    for key, name in (("ensemble", "kn5"), ("ensemble", "nowhere"), ("mix", "nowhere")):
        with pytest.raises(CheckpointError, match=f"there is no run {name}; ensemble, mix and compare name folders"):
            evaluate(runs, "lstm", **{key: [name]})


def test_a_run_with_other_tokens_is_not_paired(runs: Folder) -> None:
    with pytest.raises(ConfigError, match="has other tokens than"):
        evaluate(runs, "lstm", compare=[str(runs / "bytes")])


def test_results_of_the_same_protocol_are_compared(
    runs: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    other = evaluate(runs, "lstm2", output=str(path))
    capfd.readouterr()
    for name in ("lstm", "kn", "transformer"):
        found = evaluate(runs, name, compare=[str(path)])["comparisons"][0]
        assert found["not_comparable"] == []
        assert found["other_ppl"] == other["ppl"]
        assert f"against {path}:" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("fields", "difference"),
    [
        ({"protocol": SentenceProtocolConfig()}, "name: "),
        ({"split": "valid"}, "text_sha256: "),
        ({"temperature": "1.2"}, "temperature: "),
        ({"dynamic": DynamicSgdConfig()}, "kind: "),
        ({"cache": UnigramCacheConfig(), "weights": "equal"}, "cache: "),
        ({"protocol": TransformerXlProtocolConfig(test_stripes=3)}, "first_token: "),
    ],
)
def test_results_of_different_protocols_are_not_compared(
    fields: dict[str, Any],
    difference: str,
    runs: Folder,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "result.json"
    other = evaluate(runs, "lstm", output=str(path), **fields)
    capfd.readouterr()
    found = evaluate(runs, "lstm", compare=[str(path)])["comparisons"][0]
    shown = capfd.readouterr().out
    assert any(text.startswith(difference) for text in found["not_comparable"])
    assert not {"ppl", "other_ppl", "nats_per_count"} & set(found)
    assert f"not comparable with {path}" in shown
    assert f"against {path}" not in shown
    assert f"{other['ppl']:.4f}" not in shown


@pytest.mark.parametrize("what", ["temperature", "neural cache"])
def test_what_was_fitted_on_valid_belongs_to_a_model_and_not_to_the_protocol(
    what: str, runs: Folder, tmp_path: Path
) -> None:
    path = tmp_path / "result.json"
    other = evaluate(runs, "lstm2", output=str(path), **BEYOND[what])
    found = evaluate(runs, "lstm", compare=[str(path)], **BEYOND[what])
    key = "temperature" if what == "temperature" else "theta"
    assert found["chosen"][key] != other["chosen"][key]
    assert found["comparisons"][0]["not_comparable"] == []
    assert found["comparisons"][0]["other_ppl"] == other["ppl"]


def test_which_runs_an_ensemble_is_made_of_belongs_to_a_model_and_not_to_the_protocol(
    runs: Folder, tmp_path: Path
) -> None:
    path = tmp_path / "result.json"
    other = evaluate(runs, "lstm", ensemble=[str(runs / "gru")], output=str(path))
    found = evaluate(runs, "lstm", ensemble=[str(runs / "lstm2")], compare=[str(path)])["comparisons"][0]
    assert (found["not_comparable"], found["other_ppl"]) == ([], other["ppl"])
    alone = evaluate(runs, "lstm", compare=[str(path)])["comparisons"][0]
    assert alone["not_comparable"] == ["kind: static here, ensemble there"]


def test_results_of_different_tokenizers_are_compared_unless_one_has_words_that_it_does_not_know(
    runs: Folder, corpus: Path, tmp_path: Path
) -> None:
    spelled, few = tmp_path / "spelled.json", tmp_path / "few.json"
    evaluate(runs, "byte_lstm", output=str(spelled))
    train_run(runs / "pieces", corpus, LSTM, SentencePieceTokenizerConfig(vocab_size=300))
    train_run(runs / "few", corpus, LSTM, WordTokenizerConfig(vocab_size=8))
    number = evaluate(runs, "few", output=str(few))["num_unk"]
    assert number > 0
    for name in ("lstm", "pieces"):
        found = evaluate(runs, name, compare=[str(spelled), str(few)])
        first, second = (one["not_comparable"] for one in found["comparisons"])
        assert first == []
        assert second == [f"unk: none in the text here, {number:,} scored and counted there"]
        assert "; <unk> none in the text;" in found["protocol_line"]


def test_results_by_sentence_are_compared_whether_lines_end_in_eos_or_in_a_newline(
    runs: Folder, tmp_path: Path
) -> None:
    fields = {"protocol": SentenceProtocolConfig(), "checks": False}
    path = tmp_path / "result.json"
    other = evaluate(runs, "byte_lstm", output=str(path), **fields)
    found = evaluate(runs, "lstm", compare=[str(path)], **fields)
    assert (found["protocol"]["eos"], other["protocol"]["eos"]) == ("scored and counted", "none in the text")
    against = found["comparisons"][0]
    assert (against["not_comparable"], against.get("other_ppl")) == ([], other["ppl"])


def test_results_per_token_of_different_tokenizers_are_not_compared(runs: Folder, tmp_path: Path) -> None:
    fields = {"protocol": TransformerXlProtocolConfig(test_stripes=2)}
    path = tmp_path / "result.json"
    evaluate(runs, "byte_lstm", output=str(path), **fields)
    found = evaluate(runs, "lstm", compare=[str(path)], **fields)["comparisons"][0]
    assert any(text.startswith("tokenizer_sha256: ") for text in found["not_comparable"])
    assert "other_ppl" not in found
    assert evaluate(runs, "byte_kn", compare=[str(path)], **fields)["comparisons"][0]["not_comparable"] == []


@pytest.fixture
def ptb(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BenchmarkConfig:
    """The corpus as if it were the Penn Treebank, with an <unk> in each split."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]
    parts = {"train": "".join(texts[:20]), "valid": "".join(texts[20:25]), "test": "".join(texts[25:])}
    parts = {split: f"{text}<unk>\n" for split, text in parts.items()}
    for split, text in parts.items():
        (tmp_path / f"ptb.{split}.txt").write_text(text, encoding="utf-8")
    expected = {split: Expected(text.count("\n")) for split, text in parts.items()}
    known = replace(BENCHMARKS[BenchmarkName.ptb], expected=expected)
    monkeypatch.setitem(BENCHMARKS, BenchmarkName.ptb, known)
    return BenchmarkConfig(path=str(tmp_path))


def test_only_a_run_that_learnt_nothing_else_stands_among_the_static_results_of_a_corpus(
    runs: Folder, ptb: BenchmarkConfig
) -> None:
    train_run(runs / "ptb", ptb, LSTM, WordTokenizerConfig())
    (place, *_), other = (evaluate(runs, run, checks=False, dataset=ptb)["standing"] for run in ("ptb", "lstm"))
    assert place.startswith("published static results, ptb test, protocol mikolov: place ")
    assert other == []


def test_an_ensemble_stands_among_others_only_if_each_of_its_runs_learnt_nothing_else(
    runs: Folder, ptb: BenchmarkConfig, tmp_path: Path
) -> None:
    (tmp_path / "text").mkdir()
    for split in ("train", "valid", "test"):
        shutil.copyfile(tmp_path / f"ptb.{split}.txt", tmp_path / "text" / f"{split}.txt")
    train_run(runs / "of_ptb", ptb, LSTM, WordTokenizerConfig())
    train_run(runs / "of_text", TextConfig(path=str(tmp_path / "text")), LSTM, WordTokenizerConfig())
    own, other = (
        evaluate(runs, "of_ptb", checks=False, ensemble=[str(runs / name)])["standing"]
        for name in ("of_ptb", "of_text")
    )
    assert own[0].startswith("published ensemble results, ptb test, protocol mikolov: place ")
    assert other == []


def test_a_run_that_lacks_words_of_a_corpus_has_no_place_and_is_compared_with_no_other(
    runs: Folder, ptb: BenchmarkConfig, tmp_path: Path
) -> None:
    path = tmp_path / "result.json"
    for name, vocab_size in (("ptb_all", None), ("ptb_few", 8)):
        train_run(runs / name, ptb, LSTM, WordTokenizerConfig(vocab_size=vocab_size))
    whole = evaluate(runs, "ptb_all", output=str(path))
    assert (whole["num_unk"], whole["num_unknown"], whole["protocol"]["unk"]) == (1, 0, "scored and counted")
    few = evaluate(runs, "ptb_few", compare=[str(path)])
    assert few["num_unknown"] == few["num_unk"] - 1 > 0
    assert few["standing"] == []
    (difference,) = few["comparisons"][0]["not_comparable"]
    assert difference.startswith("unk: scored and counted, ")
    assert f"scored and counted, {few['num_unknown']:,} of them for words of the text" in few["protocol_line"]


def test_windows_of_another_size_are_another_protocol(runs: Folder, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    evaluate(runs, "transformer", output=str(path), stride=1)
    found = evaluate(runs, "transformer", compare=[str(path)])["comparisons"][0]
    assert found["not_comparable"] == ["stride: 8 here, 1 there"]


def test_the_number_of_stripes_belongs_to_the_protocol(runs: Folder, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    evaluate(runs, "lstm", protocol=TransformerXlProtocolConfig(test_stripes=3), output=str(path))
    found = evaluate(runs, "lstm", protocol=TransformerXlProtocolConfig(test_stripes=2), compare=[str(path)])
    assert found["comparisons"][0]["not_comparable"] == ["stripes: 2 here, 3 there"]
    assert "begun at the start of each stripe (2 stripes);" in found["protocol_line"]


# Checks, reports, intervals


def test_the_checks_are_in_the_result_and_can_be_left_out(runs: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    for run in [*WORDS, *BYTES]:
        found = evaluate(runs, run)["checks"]
        assert found["leak"] == 0.0
        assert max(found["batch_difference"], found["softmax_difference"]) < 1e-3
        assert found["overlap_with_train"]["num_lines"] > 0
        assert "checked in" in capfd.readouterr().out
    assert "checks" not in evaluate(runs, "lstm", checks=False)
    assert "checked in" not in capfd.readouterr().out


def test_a_run_whose_model_sees_the_future_prints_no_number(
    runs: Folder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    forward = Transformer.forward

    def peeking(self: Transformer, tokens_BT: torch.Tensor, state: Any = None, *, use_state: bool = False) -> Any:
        hidden_BTD, state = forward(self, tokens_BT, state, use_state=use_state)
        return hidden_BTD + hidden_BTD.roll(-1, 1), state

    monkeypatch.setattr(Transformer, "forward", peeking)
    with pytest.raises(CheckpointError, match="sees the future"):
        evaluate(runs, "transformer")
    assert "perplexity" not in capfd.readouterr().out


def test_train_of_another_corpus_is_not_taken_for_what_the_run_learnt(
    runs: Folder, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = TextConfig(path=str(corpus / "00.txt"), valid_fraction=0.2, test_fraction=0.2)
    for dataset, whose in ((None, ":"), (other, " of this dataset, which may not be what the run learnt:")):
        evaluate(runs, "lstm", dataset=dataset)
        assert f"lines of at least 8 tokens that also stand in train{whose} " in capfd.readouterr().out


def test_whether_a_run_has_learnt_a_text_is_told_by_the_text_and_not_by_where_it_lies(
    runs: Folder, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, copy = (Path(shutil.copytree(corpus, tmp_path / name)) for name in ("own", "copy"))
    train_run(runs / "copied", own, LSTM, WordTokenizerConfig())
    elsewhere = TextConfig(path=str(copy), valid_fraction=0.1, test_fraction=0.1)

    def told(dataset: DatasetConfig | None) -> Any:
        return evaluate(runs, "copied", dataset=dataset, checks=False)["trained_on_this_dataset"]

    assert (told(None), told(elsewhere)) == (True, True)
    for path in own.iterdir():
        path.write_text(path.read_text(encoding="utf-8").replace(".", " ."), encoding="utf-8")
    assert (told(None), told(elsewhere)) == (False, True)
    monkeypatch.setenv("LMKIT_CACHE", str(tmp_path / "cache"))  # where nothing tells what the run has read
    assert (told(None), told(elsewhere)) == (True, False)


def test_baselines_are_of_the_same_protocol(runs: Folder) -> None:
    for protocol in (None, PROTOCOLS["transformer-xl"]):
        found = evaluate(runs, "lstm", baselines=True, protocol=protocol)["baselines"]
        assert found["uniform"] > found["unigram"] > 1
        assert found["kn5"] < found["uniform"]
        assert found["xz_bits_per_byte"] > 0
    assert "kn5" not in evaluate(runs, "kn", baselines=True)["baselines"]
    detokenised = evaluate(runs, "bytes", baselines=True, protocol=DETOKENISED["gpt2-paper"])["baselines"]
    assert not {"kn5", "unigram"} & set(detokenised)


def test_bits_per_byte_of_a_run_that_lacks_words_of_the_text_are_marked_beside_those_of_compressors(
    runs: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Such a run says less of the text than they do. <unk> in the text is a word that each knows."""
    text = tmp_path / "text.txt"
    for words, mark in (("the <unk> sat", ""), ("the <unk> zebra", " (of 9 tokens only that they are <unk>)")):
        text.write_text(f"{words}\n" * 9, encoding="utf-8")
        other = TextConfig(path=str(text), valid_fraction=0.0, test_fraction=0.0)
        found = evaluate(runs, "lstm", baselines=True, dataset=other, split="train")
        assert (found["num_unk"], found["num_unknown"]) == (9 + 9 * bool(mark), 9 * bool(mark))
        assert f"this model {found['bits_per_byte']:.3f}{mark}, xz " in capfd.readouterr().out


def test_what_only_the_text_as_the_protocol_reads_it_has_of_unknown_characters_is_marked_too(
    runs: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The rules of lm-evaluation-harness write 1 for N, which the run never saw; it knows <unk> by its letters."""
    text = tmp_path / "text.txt"
    text.write_text("the N cat <unk> sat\n" * 100, encoding="utf-8")
    dataset = TextConfig(path=str(text), valid_fraction=0.1, test_fraction=0.1)
    train_run(runs / "characters", dataset, LSTM, CharTokenizerConfig())
    protocol = LmEvalWikitextProtocolConfig()
    found = evaluate(runs, "characters", baselines=True, checks=False, protocol=protocol)
    assert found["num_unknown"] == found["num_unk"] > 0
    assert f" (of {found['num_unk']} tokens only that they are <unk>), xz " in capfd.readouterr().out


def test_no_baseline_is_counted_on_the_very_text_that_the_run_has_not_learnt(
    runs: Folder, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = TextConfig(path=str(corpus / "00.txt"), valid_fraction=0.0, test_fraction=0.0)
    found = evaluate(runs, "lstm", baselines=True, dataset=other, split="train")
    assert not {"kn5", "unigram"} & set(found["baselines"])
    assert "no unigrams and kn5: they would be counted on the very text that is scored" in capfd.readouterr().err
    assert "kn5" in evaluate(runs, "lstm", baselines=True, split="train")["baselines"], "both have learnt that"


@pytest.mark.parametrize("run", ["lstm", "transformer", "kn", "bytes"])
def test_a_report_is_one_page_without_the_network(run: str, runs: Folder, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    evaluate(runs, run, report=str(path), checks=False)
    page = path.read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>")
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_a_tokenizer_that_only_decodes_as_a_whole_is_scored_and_shown(
    runs: Folder, corpus: Path, tmp_path: Path
) -> None:
    words = sorted({word for path in corpus.iterdir() for word in re.findall(r"\w+|[^\w\s]+", path.read_text())})
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(["[UNK]", *words])}, "unk_token": "[UNK]"}
    spec = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}, "decoder": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    train_run(runs / "whole", corpus, LSTM, HfTokenizerConfig(path=str(tmp_path)))
    found = evaluate(runs, "whole", report=str(tmp_path / "page.html"))
    assert (found["unk"]["count"], found["num_types"]) == (0, len(words) + 2)
    assert found["interval"] is None, "no token ends a line"
    with pytest.raises(ConfigError, match=r"no token of the run's tokenizer \(hf\) ends a line"):
        evaluate(runs, "whole", protocol=SentenceProtocolConfig())
    assert f'<span class="s0">{words[0]}</span>' in re.sub(r'"s\d"', '"s0"', (tmp_path / "page.html").read_text())


def test_without_resamples_there_is_no_interval(runs: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    found = evaluate(runs, "lstm", bootstrap=0, compare=[str(runs / "lstm2")])
    assert found["interval"] is None
    shown = capfd.readouterr().out
    assert "nan" not in shown
    assert "resamples" not in shown


def test_a_word_that_only_a_cache_of_weight_1_speaks_for_is_infinitely_surprising(runs: Folder, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    found = evaluate(
        runs, "lstm", cache=UnigramCacheConfig(), weights="0,1", output=str(path), compare=[str(runs / "gru")]
    )
    assert found["ppl"] == found["token_ppl"] == math.inf
    assert found["members_alone"]["run"] == pytest.approx(evaluate(runs, "lstm")["ppl"])
    assert "NaN" not in path.read_text(encoding="utf-8")


def test_a_split_that_is_not_there_is_named(runs: Folder, corpus: Path) -> None:
    dataset = TextConfig(path=str(corpus), valid_fraction=0.1, test_fraction=0.0)
    with pytest.raises(DataError, match=r"has no test split; it has train, valid"):
        evaluate(runs, "lstm", dataset=dataset)


def test_only_what_needs_a_train_split_says_that_there_is_none(runs: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmkit.evaluation import evaluator

    prepare = evaluator.prepare

    def without_train(*args: Any) -> Any:
        data = prepare(*args)
        return replace(data, splits={name: split for name, split in data.splits.items() if name != "train"})

    monkeypatch.setattr(evaluator, "prepare", without_train)
    with pytest.raises(DataError, match="use dynamic=sgd"):
        evaluate(runs, "lstm", dynamic=DynamicRmsConfig())
    with pytest.raises(DataError, match="has no train split to count kn5 on"):
        evaluate(runs, "lstm", mix=["kn5"])
    assert math.isfinite(evaluate(runs, "lstm", dynamic=DynamicSgdConfig(lr=0.1))["ppl"])


def test_files_that_cannot_be_written_are_refused_before_the_work(runs: Folder, tmp_path: Path) -> None:
    for field in ("output", "word_probs", "report"):
        with pytest.raises(ConfigError, match=f"{field}=.*does not exist"):
            evaluate(runs, "lstm", **{field: str(tmp_path / "nowhere" / "file")})


def test_a_checkpoint_that_is_named_is_that_of_the_run_itself(runs: Folder) -> None:
    run = ExistingRunConfig(path=str(runs / "lstm"), checkpoint="step-000000000025")
    cfg = EvalPplConfig(run=run, device=CPU, ensemble=[str(runs / "other_step")], checks=False, baselines=False)
    assert eval_ppl.run(cfg)["step"] == 25


@pytest.mark.parametrize("run", ["lstm", "bytes"])
@pytest.mark.parametrize("protocol", [None, HfStridedProtocolConfig(max_length=8, stride=4)])
def test_a_uniform_model_is_compared_by_the_same_protocol(
    run: str, protocol: ProtocolConfig | None, runs: Folder
) -> None:
    result = evaluate(runs, run, protocol=protocol, baselines=True)
    per_token = math.log(257 if run == "bytes" else result["num_types"])
    if protocol is not None or run == "lstm":  # per token, or per word where each is one
        assert result["baselines"]["uniform"] == pytest.approx(math.exp(per_token), rel=1e-5)
    else:
        nats_per_word = per_token * result["num_tokens"] / result["num_words"]
        assert math.log(result["baselines"]["uniform"]) == pytest.approx(nats_per_word, rel=1e-5)


@pytest.mark.parametrize("fields", [{"mix": ["kn5"]}, {"cache": NeuralCacheConfig(window=20)}, {"mix": ["unigram"]}])
def test_what_was_scored_to_choose_on_is_not_scored_again(
    fields: dict[str, Any], runs: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmkit.evaluation import evaluator

    scored: list[int] = []

    def counting(*args: Any, **keys: Any) -> Any:
        scores = score(*args, **keys)
        scored.append(int(scores.scored_N.sum()))
        return scores

    monkeypatch.setattr(evaluator, "score", counting)
    num_tokens = evaluate(runs, "lstm", split="valid", checks=False, **fields)["num_tokens"]
    assert scored.count(num_tokens) == 1

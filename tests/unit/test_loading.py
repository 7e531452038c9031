"""Loading a run, and the two commands that only read one: eval-ppl and generate."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from storing import save_checkpoint

from lmkit.commands import eval_ppl
from lmkit.commands import generate as generate_command
from lmkit.config.commands import EvalPplConfig
from lmkit.config.data import TextConfig
from lmkit.config.generation import GenerateConfig, SamplingConfig
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.config.model import ModelConfig, RecurrentConfig, TransformerConfig
from lmkit.config.plain import to_plain
from lmkit.config.training import RunConfig
from lmkit.console import Console
from lmkit.device import resolve_device
from lmkit.errors import CheckpointError, ConfigError
from lmkit.loading import find_checkpoint, load_run
from lmkit.store.checkpoint import Snapshot
from lmkit.store.lock import acquire
from lmkit.store.runs import Run
from lmkit.tokenizers import WordTokenizer

CPU = DeviceConfig(type=DeviceType.cpu, threads=1)
TOKENIZER = WordTokenizer(["the", "company", "said", "it", "would"])
LINES = "the company said it would\nit said the company\n" * 30
SEQ_LEN = 8


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("LMKIT_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_run(
    folder: Path,
    model_config: ModelConfig,
    *,
    vocab_size: int = TOKENIZER.vocab_size,
    change: dict[str, Any] | None = None,
) -> RunConfig:
    """A finished run of an untrained model on files below ``folder``."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    for split in ("train", "valid", "test"):
        (data / f"{split}.txt").write_text(LINES, encoding="utf-8", newline="\n")
    model = model_config.build(vocab_size, seed=1)
    config = {
        "command": "pretrain",
        "vocab_size": vocab_size,
        "seed": 1,
        "model": to_plain(model_config),
        "dataset": to_plain(TextConfig(path=str(data))),
        "train": {"seq_len": SEQ_LEN},
        **(change or {}),
    }
    with Run.create(None, root=str(folder / "runs"), dataset="text", model="m", resume=False, warn=print) as run:
        run.begin(seed=1, command=["lmkit"], digests={})
        save_checkpoint(run, Snapshot(3, dict(model.state_dict()), {}, {}, config), TOKENIZER, keep=1)
        run.journal("finished", {"step": 3})
        run.write_result({"step": 3})
    return RunConfig(path=str(run.path), root=str(folder / "runs"))


FAMILIES = [
    pytest.param(TransformerConfig(d_model=16, num_layers=1, num_heads=2, context=32), id="transformer"),
    pytest.param(RecurrentConfig(d_embed=8, d_hidden=8), id="lstm"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_run_is_the_model_that_was_saved_ready_to_evaluate(tmp_path: Path, family: ModelConfig) -> None:
    loaded = load_run(make_run(tmp_path, family), device=resolve_device(CPU), console=Console(io.StringIO()))
    expected = family.build(TOKENIZER.vocab_size, seed=1).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())
    assert loaded.tokenizer.digest == TOKENIZER.digest
    assert not loaded.model.training
    assert (loaded.step, loaded.model_config) == (3, family)
    assert loaded.context == (None if family.carries_state else SEQ_LEN)


def test_without_a_path_the_newest_finished_run_is_taken_and_named(tmp_path: Path) -> None:
    config = make_run(tmp_path, RecurrentConfig(d_embed=8, d_hidden=8))
    said = io.StringIO()
    loaded = load_run(replace(config, path=None), device=resolve_device(CPU), console=Console(said))
    assert str(loaded.path) == config.path
    assert str(config.path) in said.getvalue()
    assert "step-" in said.getvalue()


def test_a_run_is_found_by_its_name_in_the_root_where_there_is_no_such_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(tmp_path, RecurrentConfig(d_embed=8, d_hidden=8))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    named = replace(config, path=Path(str(config.path)).name)
    assert str(find_checkpoint(named, Console(io.StringIO()))[0].path) == config.path
    evaluated = evaluate(config, ensemble=[str(named.path)])
    assert evaluated["kind"] == "ensemble"
    against = evaluate(config, compare=[str(named.path)])["comparisons"][0]
    assert (against["name"], against["nats_per_count"]) == (named.path, 0.0)
    (tmp_path / "elsewhere" / str(named.path)).mkdir()
    with pytest.raises(CheckpointError, match=r"elsewhere/.* is not a run directory"):
        find_checkpoint(named, Console(io.StringIO()))


def test_a_run_that_has_not_come_to_its_end_is_named_as_such(tmp_path: Path) -> None:
    config = make_run(tmp_path, RecurrentConfig(d_embed=8, d_hidden=8))
    run_dir = Path(str(config.path))

    def said(path: Path = run_dir) -> str:
        text = io.StringIO()
        load_run(replace(config, path=str(path)), device=resolve_device(CPU), console=Console(text))
        return text.getvalue()

    assert "the run" not in said()
    copied = shutil.copytree(run_dir / "checkpoints" / "step-000000000003", tmp_path / "copied")
    assert "the run" not in said(copied)
    (run_dir / "result.json").unlink()
    assert "(the run was broken off before its end)" in said()
    lock = acquire(run_dir)
    try:
        assert "(the run is still training)" in said()
    finally:
        lock.release()


def test_a_tokenizer_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    config = make_run(tmp_path, RecurrentConfig(d_embed=8, d_hidden=8), vocab_size=11)
    with pytest.raises(CheckpointError, match=rf"has {TOKENIZER.vocab_size} entries, the model 11"):
        load_run(config, device=resolve_device(CPU), console=Console(io.StringIO()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": to_plain(RecurrentConfig(d_embed=8, d_hidden=9))}, "the weights do not fit the configuration: "),
        ({"model": to_plain(RecurrentConfig(d_embed=8, d_hidden=8, num_layers=3))}, "the weights do not fit"),
        ({"model": {"kind": "nonsense"}}, "describe a run: model.kind='nonsense' is unknown"),
        ({"model": None}, "describe a run: model must be an object"),
        ({"dataset": {"kind": "text", "surprise": 1}}, "describe a run: dataset has unknown keys: surprise"),
        ({"train": {}}, "describe a run: 'seq_len'"),
        ({"seed": "x"}, "describe a run: invalid literal"),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights_is_a_checkpoint_error(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    config = make_run(tmp_path, RecurrentConfig(d_embed=8, d_hidden=8), change=change)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_run(config, device=resolve_device(CPU), console=Console(io.StringIO()))
    assert "\n" not in str(caught.value)


def evaluate(config: RunConfig, **keys: Any) -> dict[str, Any]:
    return eval_ppl.run(EvalPplConfig(run=config, device=CPU, **keys))


@pytest.mark.parametrize("family", FAMILIES)
def test_eval_ppl_scores_every_token_and_writes_the_numbers_it_prints(
    tmp_path: Path, family: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run(tmp_path, family)
    result = evaluate(config, output=str(tmp_path / "out.json"))
    shown = capsys.readouterr()
    assert result["num_tokens"] == result["num_words"] == 60 * 5.5
    assert result["num_bytes"] == len(LINES)
    assert result["word_ppl"] == pytest.approx(result["token_ppl"])
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == result
    assert f"{result['word_ppl']:.4f}" in shown.out
    assert "perplexity per word" in shown.out
    assert "protocol: " in shown.out
    assert "run: " in shown.err
    assert "run: " not in shown.out


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_size_and_segment_length_do_not_change_the_number(tmp_path: Path, family: ModelConfig) -> None:
    config = make_run(tmp_path, family)
    nats = [evaluate(config, batch_size=b, seq_len=s)["nats"] for b, s in ((1, 5), (7, 64), (100, 1000))]
    assert nats == pytest.approx([nats[0]] * 3, rel=1e-6)


def test_windows_default_to_the_length_of_training_and_half_of_it_and_may_be_longer(tmp_path: Path) -> None:
    config = make_run(tmp_path, TransformerConfig(d_model=16, num_layers=1, num_heads=2, context=32))
    default, longer = evaluate(config), evaluate(config, context=32, stride=1)
    assert (default["protocol"]["context"], default["protocol"]["stride"]) == (SEQ_LEN, SEQ_LEN // 2)
    assert "windows of 8 of the model's 32 tokens, stride 4" in default["protocol_line"]
    assert (longer["protocol"]["context"], longer["protocol"]["stride"]) == (32, 1)
    assert "windows of 32 tokens, stride 1" in longer["protocol_line"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"context": 33}, "context=33 must be between 1 and the model's context of 32"),
        ({"context": 4, "stride": 5}, "stride=5 must be between 1 and context=4"),
        ({"stride": 9}, "stride=9 must be between 1 and context=8"),
    ],
)
def test_an_impossible_window_is_refused_before_data_is_prepared(
    tmp_path: Path, keys: dict[str, int], said: str
) -> None:
    config = make_run(tmp_path, TransformerConfig(d_model=16, num_layers=1, num_heads=2, context=32))
    with pytest.raises(ConfigError, match=said):
        evaluate(config, **keys)
    assert not (tmp_path / "cache").exists()


def test_a_window_is_refused_for_a_model_with_carried_state(tmp_path: Path) -> None:
    config = make_run(tmp_path, RecurrentConfig(d_embed=8, d_hidden=8))
    with pytest.raises(ConfigError, match="context and stride do not apply"):
        evaluate(config, stride=3)


@pytest.mark.parametrize("name", ["missing/out.json", "data"])
def test_an_output_that_cannot_be_written_is_refused_before_the_run_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(ConfigError, match="output="):
        evaluate(RunConfig(path=str(tmp_path / "no-run")), output=str(tmp_path / name))


def test_eval_ppl_writes_nothing_into_the_run(tmp_path: Path) -> None:
    config = make_run(tmp_path, RecurrentConfig(d_embed=8, d_hidden=8))
    before = {path: path.stat().st_mtime_ns for path in Path(str(config.path)).rglob("*")}
    evaluate(config)
    assert {path: path.stat().st_mtime_ns for path in Path(str(config.path)).rglob("*")} == before


class Binary:
    """A standard output of bytes, in an encoding that cannot show everything."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        self.text = io.TextIOWrapper(self.buffer, encoding="ascii", write_through=True)

    @contextlib.contextmanager
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", self.text)
            yield


def write(
    monkeypatch: pytest.MonkeyPatch, config: RunConfig, prompts: list[str], **keys: Any
) -> tuple[str, list[dict[str, Any]]]:
    out = Binary()
    with out.installed(monkeypatch):
        results = generate_command.run(GenerateConfig(run=config, device=CPU, **keys), prompts)
    return out.buffer.getvalue().decode("utf-8"), results


@pytest.mark.parametrize("stream", [True, False])
def test_generate_prints_prompt_and_continuation_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    config = make_run(tmp_path, RecurrentConfig(d_embed=8, d_hidden=8))
    shown, (result,) = write(monkeypatch, config, ["the company"], max_new_tokens=12, stream=stream)
    assert shown == f"the company{result['text']}\n"
    assert (result["num_tokens"], result["finish"]) == (12, "length")
    assert (shown, [result]) == write(monkeypatch, config, ["the company"], max_new_tokens=12)


def test_several_samples_follow_each_other_and_are_named_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run(tmp_path, RecurrentConfig(d_embed=8, d_hidden=8))
    shown, results = write(monkeypatch, config, ["the", "it said"], max_new_tokens=5, num_samples=2)
    assert shown == "".join(f"{r['prompt']}{r['text']}\n" for r in results)
    assert [(r["prompt"], r["sample"]) for r in results] == [("the", 1), ("the", 2), ("it said", 1), ("it said", 2)]
    assert "--- prompt 2 of 2, sample 1 of 2" in capsys.readouterr().err


def test_what_is_not_read_of_a_prompt_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run(tmp_path, TransformerConfig(d_model=16, num_layers=1, num_heads=2, context=32))
    text = " ".join(["the"] * 20 + ["我"])
    shown, _ = write(monkeypatch, config, [text], max_new_tokens=9, sampling=SamplingConfig(top_k=3))
    said = capsys.readouterr().err
    assert shown.startswith(text)
    assert "17 tokens are not read" in said
    assert "read as <unk>: " in said


def test_of_many_unknown_words_the_first_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run(tmp_path, RecurrentConfig(d_embed=8, d_hidden=8))
    write(monkeypatch, config, [" ".join(map(str, range(1000)))], max_new_tokens=1)
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning"))
    assert warning.startswith("warning: not in the vocabulary, read as <unk>: 0 1 2 3 ")
    assert warning.endswith(" ... (1,000 in all)")
    assert len(warning) < 300


def test_the_prompts_of_a_run_have_their_own_randomness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_run(tmp_path, RecurrentConfig(d_embed=8, d_hidden=8))
    _, results = write(monkeypatch, config, ["the", "the"], max_new_tokens=20)
    assert results[0]["text"] != results[1]["text"]
    assert all(r["num_tokens"] == 20 for r in results)

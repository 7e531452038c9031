"""lmkit export: the whole folder or none, with a card that says where it comes from."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from storing import open_run, save_checkpoint

from lmkit import cli, presets
from lmkit.arguments import parse
from lmkit.commands import export
from lmkit.config.data import TextConfig
from lmkit.config.export import ExportConfig, ExportFormat
from lmkit.config.model import ModelConfig, RecurrentConfig, TransformerConfig
from lmkit.config.plain import from_plain, to_plain
from lmkit.config.training import ExistingRunConfig
from lmkit.errors import ConfigError, DataError
from lmkit.hf import exporting, import_hf
from lmkit.hf.exporting import Source, export_as
from lmkit.store import storage
from lmkit.store.checkpoint import VALID_LOSS, Snapshot, load_checkpoint
from lmkit.store.runs import Run
from lmkit.sweep import combinations
from lmkit.tokenizers import ByteTokenizer, WordTokenizer

TOKENIZER = WordTokenizer(["the", "company", "said"])
MODEL = TransformerConfig(d_model=16, num_layers=1, num_heads=2, context=16)
RESULT = {"step": 3, "split": "valid", "dataset": "text", "token_ppl": 12.5, "word_ppl": 12.5, "num_tokens": 73760}


def make_run(
    root: Path, model_config: ModelConfig = MODEL, losses: dict[int, float | None] | None = None, text: str = "corpus"
) -> Path:
    """A finished run of an untrained model; losses: of valid at each step that was saved."""
    model = model_config.build(TOKENIZER.vocab_size, seed=1)
    config = {
        "command": "pretrain",
        "vocab_size": TOKENIZER.vocab_size,
        "seed": 1,
        "model": to_plain(model_config),
        "dataset": to_plain(TextConfig(path=text)),
        "train": {"seq_len": 8},
    }
    with Run.create(None, root=str(root), dataset="text", model="m", resume=False, warn=print) as run:
        run.begin(seed=1, command=["lmkit", "pretrain", "model=small"], digests={"data": "d" * 64})
        for step, loss in (losses or {3: None}).items():
            state = {} if loss is None else {VALID_LOSS: loss}
            save_checkpoint(run, Snapshot(step, dict(model.state_dict()), {}, state, config), TOKENIZER, keep=9)
        run.write_result(RESULT)
    return run.path


def config(run: Path, to: Path, kind: ExportFormat = ExportFormat.hf) -> ExportConfig:
    return ExportConfig(run=ExistingRunConfig(path=str(run), root=str(run.parent)), to=str(to), format=kind)


def test_the_folder_holds_the_model_and_a_card_with_its_origin(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    result = export.run(config(run, tmp_path / "out" / "deep"))
    folder = tmp_path / "out" / "deep"
    assert import_hf(folder).tokenizer.encode("the company\nsaid so").tolist() == [2, 3, 1, 4, 0]
    card = (folder / "README.md").read_text(encoding="utf-8")
    for part in ("lmkit pretrain model=small", "12.5000", "73,760", "corpus", "d" * 64, TOKENIZER.digest, "valid"):
        assert part in card
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert f"| {name} | {digest} |" in card
        assert result["digests"][name] == digest
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["deep"]


def test_the_card_has_the_perplexity_of_the_weights_that_are_exported(tmp_path: Path) -> None:
    """The best ones are often not the last, of which result.json speaks."""
    run = make_run(tmp_path / "runs", losses={2: 1.5, 3: 2.0, 4: None})
    cards = {}
    for which in ("best", "step-000000000003", "step-000000000004"):
        cfg = config(run, tmp_path / which, ExportFormat.safetensors)
        export.run(replace(cfg, run=replace(cfg.run, checkpoint=which)))
        cards[which] = (tmp_path / which / "README.md").read_text(encoding="utf-8")
    best, result, unknown = cards.values()
    assert "Taken after step 2 over" in best
    assert f"| perplexity per token | {math.exp(1.5):.4f} |" in best
    assert "12.5" not in best
    assert "Taken after step 3 over" in result
    assert "| perplexity per token | 12.5000 |" in result
    assert "No result" in unknown
    assert "12.5" not in unknown


def test_the_card_tells_of_the_data_of_the_weights_that_are_exported(tmp_path: Path) -> None:
    """The run has gone on with other data behind step 3, of which result.json speaks."""
    run = make_run(tmp_path / "runs", losses={2: 1.5, 3: 2.0})
    old = load_checkpoint(run / "checkpoints" / "step-000000000003", with_optimizer=False)
    order = {"number": 1, "first_step": 3, "data": "e" * 64}
    with open_run(run, resume=True) as going_on:
        going_on.digests["data"] = "e" * 64
        new = replace(old, step=4, state={VALID_LOSS: 1.0}, config={**old.config, "data_order": order})
        save_checkpoint(going_on, new, TOKENIZER, keep=9)
    found = "| perplexity per token | {:.4f} |".format
    for step, data, numbers in ((2, "d", found(math.exp(1.5))), (3, "d", found(12.5)), (4, "e", "No result")):
        cfg = config(run, tmp_path / f"{step}", ExportFormat.safetensors)
        export.run(replace(cfg, run=replace(cfg.run, checkpoint=f"step-{step:012}")))
        card = (tmp_path / f"{step}" / "README.md").read_text(encoding="utf-8")
        assert f"| data | {data * 64} |" in card
        assert numbers in card


def test_the_text_of_a_run_may_have_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", text="caf\udce9.txt")
    export.run(config(run, tmp_path / "out", ExportFormat.safetensors))
    assert r'"path": "caf\udce9.txt"' in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_an_empty_folder_is_used_and_any_other_left_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    export.run(config(run, tmp_path / "empty", ExportFormat.safetensors))
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine", encoding="utf-8")
    for name, problem in (("full", "is not empty"), ("file", "is not a folder"), ("empty", "is not empty")):
        with pytest.raises(ConfigError, match=problem):
            export.run(config(run, tmp_path / name))
    assert (tmp_path / "full" / "file").read_text(encoding="utf-8") == "mine"


def test_an_export_that_fails_its_check_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> float:
        raise DataError("the exported model computes something else")

    run = make_run(tmp_path / "runs")
    monkeypatch.setattr(exporting, "compare_logits", refuse)
    before = sorted(tmp_path.iterdir())
    for kind in (ExportFormat.hf, ExportFormat.safetensors):
        with pytest.raises(DataError, match="computes something else"):
            export.run(config(run, tmp_path / "out", kind))
    assert sorted(tmp_path.iterdir()) == before


def test_all_files_and_their_names_are_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "runs")
    synced: list[int] = []
    in_time: list[int] = []
    sync_file, sync_directory, rename = storage.sync_file, storage.sync_directory, storage.rename

    def file_noted(descriptor: int) -> None:
        sync_file(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    def names_noted(path: Path) -> None:
        sync_directory(path)
        synced.append(path.stat().st_ino)

    def last(source: Path, target: Path) -> None:
        in_time.extend(synced)
        rename(source, target)

    monkeypatch.setattr(storage, "sync_file", file_noted)
    monkeypatch.setattr(storage, "sync_directory", names_noted)
    monkeypatch.setattr(storage, "rename", last)
    out = tmp_path / "out"
    export.run(config(run, out, ExportFormat.safetensors))
    assert [path for path in (out, *out.rglob("*")) if path.stat().st_ino not in in_time] == []


def test_what_killed_exports_to_the_same_folder_have_left_is_removed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stay = [f".tmp-out-{os.getpid()}-0123abcd", f".tmp-other-{gone.pid}-0123abcd", ".tmp-out", ".tmp-out-mine"]
    for name in (f".tmp-out-{gone.pid}-0123abcd", *stay):
        (tmp_path / "models" / name / "tokenizer").mkdir(parents=True)
        (tmp_path / "models" / name / "model.safetensors").write_bytes(b"half")
    export.run(config(run, tmp_path / "models" / "out", ExportFormat.safetensors))
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == sorted([*stay, "out"])


def test_where_memory_runs_out_for_the_check_by_transformers_the_folder_is_not_to_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes")

    quiet = SimpleNamespace(set_verbosity_error=lambda: None, disable_progress_bar=lambda: None)
    model = SimpleNamespace(from_pretrained=full)
    library = SimpleNamespace(__version__="5", logging=quiet, AutoModelForCausalLM=model)
    monkeypatch.setitem(sys.modules, "transformers", library)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        exporting._check_with_transformers(None, tmp_path)  # type: ignore[arg-type]


def test_a_model_with_a_memory_is_read_again_as_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", replace(MODEL, memory_tokens=3))
    export.run(config(run, tmp_path / "out", ExportFormat.safetensors))
    model, _ = exporting.read_plain(tmp_path / "out")
    assert model.config.memory_tokens == 3
    with pytest.raises(ConfigError, match=r"no model\.memory_tokens=3; use format=safetensors or format=onnx"):
        export.run(config(run, tmp_path / "hf"))


def test_what_is_no_transformer_is_refused_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", RecurrentConfig(d_embed=8, d_hidden=8))
    with pytest.raises(ConfigError, match="is a Recurrent"):
        export.run(config(run, tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("embedding.weight", True),
        ("blocks.11.feed_forward.gate_up.bias", True),
        ("blocks.0.attention.q_norm.weight", True),
        ("head.weight", True),
        ("head.bias", False),
        ("blocks.0.attention.qkv.lora_a", False),
        ("blocks.0.attention.qkv.base.weight", False),
        ("head.clusters.0.weight", False),
    ],
)
def test_parameters_that_no_other_program_reads_are_told_apart(name: str, plain: bool) -> None:
    assert (export.PLAIN.fullmatch(name) is not None) == plain


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "runs")
    assert cli.main(["export", f"run={run}", f"to={tmp_path}/out", "format=safetensors"]) == 0
    assert "logits differ by at most 0.0e+00" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["vocab_size"] == 5
    assert cli.main(["export", f"run={run}", f"to={tmp_path}/out"]) == 2
    assert cli.main(["export", f"run={run}", f"to={tmp_path}/x", "format=pickle"]) == 2
    assert "hf, gguf, safetensors or onnx" in capsys.readouterr().err
    assert cli.main(["export", f"run={run}"]) == 2
    assert "to must be given" in capsys.readouterr().err


def test_jobs_of_a_multirun_get_folders_of_their_own() -> None:
    jobs = combinations(parse("export", ["-m", "run=a,b", "to=out"]))
    assert [Path(job.values["to"]).as_posix() for job in jobs] == ["out/0", "out/1"]


TRANSFORMERS = [
    name
    for name in presets.names_in("model")
    if presets.schema_name("model", name) == "transformer" and name != "transformer_xl"  # memory: no stock class
]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_transformer_preset_has_a_stock_architecture(tmp_path: Path, name: str) -> None:
    values = yaml.safe_load((presets.config_dir() / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    del values["defaults"]
    preset = from_plain(TransformerConfig, values)
    small = replace(preset, d_model=4 * preset.num_heads, num_layers=2, context=16)
    model = small.build(257, seed=1).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    export_as(ExportFormat.hf, Source(model, small, ByteTokenizer()), tmp_path)  # type: ignore[arg-type]
    assert import_hf(tmp_path).model_config.num_layers == 2

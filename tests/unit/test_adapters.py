"""Adapter folders: written and read back, by lmkit and by peft, and what is refused."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmkit.config.adapter import AdapterConfig
from lmkit.config.model import TransformerConfig
from lmkit.config.tasks import Pooling
from lmkit.errors import CheckpointError
from lmkit.hf.adapters import CONFIG, ORIGIN, WEIGHTS, Origin, read_adapter, write_adapter
from lmkit.hf.weights import write_weights
from lmkit.lora import adapter_tensors, add_adapter
from lmkit.models.base import LanguageModel
from lmkit.models.classifier import Classifier
from lmkit.store import storage

VOCAB, BASE = 13, "ab" * 32
PREFIX = "base_model.model.blocks.0.attention.qkv"
TOKENS = torch.arange(16)[None] % VOCAB
KINDS = [
    AdapterConfig(rank=3, alpha=5.0),
    AdapterConfig(rank=4, targets=["attention.*"], use_rslora=True),
    AdapterConfig(rank=2, targets=["blocks.1.*"], use_dora=True),
]


def base(d_model: int = 16) -> LanguageModel:
    config = TransformerConfig(d_model=d_model, num_layers=2, num_heads=2, context=16)
    model = config.build(VOCAB, seed=1).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5.0)
    return model


def trained(config: AdapterConfig) -> LanguageModel:
    model = base()
    add_adapter(model, config, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapter_tensors(dict(model.named_parameters())).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.2)
    return model


def written(folder: Path, config: AdapterConfig = KINDS[0]) -> LanguageModel:
    model = trained(config)
    write_adapter(folder, config, adapter_tensors(model.state_dict()), Origin("runs/x", BASE))
    return model


@torch.no_grad()
def logits(model: torch.nn.Module, head: LanguageModel | None = None) -> Tensor:
    owner = model if head is None else head
    assert isinstance(owner, LanguageModel)
    return owner.head.logits(model(TOKENS)[0].flatten(0, 1))


@pytest.mark.parametrize("config", KINDS)
def test_a_folder_read_back_is_the_same_adapter_bit_for_bit(config: AdapterConfig, tmp_path: Path) -> None:
    model, other = written(tmp_path / "a", config), base()
    found = read_adapter(tmp_path / "a", other, BASE)
    assert torch.equal(logits(other), logits(model))
    assert found.description.startswith("DoRA" if config.use_dora else "LoRA (rsLoRA)" if config.use_rslora else "LoRA")
    assert f"of rank {config.rank}, {model.num_parameters():,} parameters" in found.description


@pytest.mark.extra("hf")
@pytest.mark.parametrize("config", KINDS)
def test_peft_puts_a_folder_on_the_model_and_computes_the_same(config: AdapterConfig, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, plain = written(tmp_path / "a", config), base()
    tuned = peft.PeftModel.from_pretrained(plain, tmp_path / "a")
    torch.testing.assert_close(logits(tuned, plain), logits(model), rtol=1e-4, atol=1e-5)
    assert (logits(model) - logits(base())).abs().max() > 0.01


@pytest.mark.extra("hf")
@pytest.mark.parametrize("config", KINDS)
def test_a_folder_that_peft_writes_is_read(config: AdapterConfig, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    targets = ["qkv", "down"]
    made = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=False,
    )
    plain = base()
    tuned = peft.get_peft_model(plain, made)
    tuned.eval().save_pretrained(tmp_path / "a")
    other = base()
    read_adapter(tmp_path / "a", other, BASE)
    torch.testing.assert_close(logits(other), logits(tuned, plain), rtol=1e-4, atol=1e-5)


def classifier(folder: Path) -> Classifier:
    """One with a trained adapter and head, written to the folder."""
    model = Classifier(trained(KINDS[0]), 3, pooling=Pooling.mean, dropout=0.0, seed=1).eval()
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([1.0, -2.0, 3.0]))
    weights = model.state_dict()
    head = {name: weights[name] for name in ("head.weight", "head.bias")}
    origin = Origin("runs/x", BASE, "backbone.", {"kind": "classify"})
    write_adapter(folder, KINDS[0], {**adapter_tensors(weights), **head}, origin)
    return model


def test_the_folder_of_a_classifier_holds_its_head_and_puts_its_adapter_on_the_language_model(tmp_path: Path) -> None:
    model, plain = classifier(tmp_path / "a"), base()
    found = read_adapter(tmp_path / "a", plain, BASE)
    assert found.task == {"kind": "classify"}
    assert isinstance(model.backbone, LanguageModel)
    assert torch.equal(logits(plain), logits(model.backbone))
    assert torch.equal(load_file(tmp_path / "a" / WEIGHTS)["base_model.model.head.bias"], model.head.bias)
    assert json.loads((tmp_path / "a" / CONFIG).read_text(encoding="utf-8"))["modules_to_save"] == ["model.head"]


@pytest.mark.extra("hf")
def test_peft_makes_the_same_classifier_of_the_folder_with_its_head(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = classifier(tmp_path / "a")
    plain = Classifier(base(), 3, pooling=Pooling.mean, dropout=0.0, seed=2).eval()
    lengths_B = torch.tensor([TOKENS.shape[1]])
    with torch.no_grad():
        tuned = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
        torch.testing.assert_close(tuned(TOKENS, lengths_B), model(TOKENS, lengths_B), rtol=1e-4, atol=1e-5)


def test_writing_again_replaces_the_folder_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(storage, "sync_file", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    written(tmp_path / "a")
    synced.clear()
    written(tmp_path / "a", KINDS[2])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [CONFIG, WEIGHTS, ORIGIN]
    assert {path.stat().st_ino for path in (tmp_path / "a").iterdir()} <= set(synced)
    assert "use_dora" in (tmp_path / "a" / CONFIG).read_text(encoding="utf-8")


def test_an_adapter_that_is_there_stays_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "a")
    before = (tmp_path / "a" / CONFIG).read_bytes()
    rename = storage.rename

    def full(source: Path, target: Path) -> None:
        if source.name.startswith(storage.TMP_PREFIX):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    monkeypatch.setattr(storage, "rename", full)
    with pytest.raises(OSError, match="No space"):
        written(tmp_path / "a", KINDS[2])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / CONFIG).read_bytes() == before


def test_what_the_system_refuses_is_an_error_of_the_system_and_no_bug(tmp_path: Path) -> None:
    """As a full disk; the library has an error of its own for all of them."""
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        write_weights(tmp_path / "none" / WEIGHTS, {"a": torch.zeros(9)})


def test_the_names_are_those_of_peft(tmp_path: Path) -> None:
    written(tmp_path / "a", KINDS[2])
    names = set(load_file(tmp_path / "a" / WEIGHTS))
    layer = "base_model.model.blocks.1.feed_forward.down"
    assert {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight", f"{layer}.lora_magnitude_vector"} <= names
    assert len(names) == 4 * 3


def test_a_folder_belongs_to_one_checkpoint_and_to_a_model_of_its_shape(tmp_path: Path) -> None:
    written(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"was finetuned from another checkpoint; name that one: run=runs.x"):
        read_adapter(tmp_path / "a", base(), "cd" * 32)
    (tmp_path / "a" / ORIGIN).unlink()
    read_adapter(tmp_path / "a", base(), "cd" * 32)
    with pytest.raises(CheckpointError, match=r"is \[3, 16\], not \[3, 32\].* and \d+ more; name the run"):
        read_adapter(tmp_path / "a", base(32), BASE)


Change = Callable[[Path], object]


def config_with(**values: Any) -> Change:
    def change(folder: Path) -> None:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | values
        (folder / CONFIG).write_text(json.dumps(data), encoding="utf-8")

    return change


def weights_with(**values: Tensor | None) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        for name, tensor in values.items():
            key = f"{PREFIX}.{name}.weight"
            tensors.pop(key, None)
            if tensor is not None:
                tensors[key] = tensor
        save_file(tensors, folder / WEIGHTS)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "holds no adapter_config.json"),
        (lambda folder: (folder / CONFIG).write_text("{"), "adapter_config.json is damaged"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "holds no object"),
        (lambda folder: (folder / CONFIG).write_text("[" * 100_000), "adapter_config.json is damaged"),
        (lambda folder: (folder / WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 64), "adapter_model.safetensors is damaged"),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8]), "is damaged"),
        (config_with(r=5), r"lora_A.weight is \[3, 16\], but adapter_config.json says r=5"),
        (config_with(r=10**12), "but adapter_config.json says r=1000000000000"),
        (config_with(r=True), "adapter_config.json is damaged"),
        (config_with(r=0), "adapter.rank=0 must be >= 1"),
        (config_with(lora_alpha="x"), "adapter_config.json is damaged"),
        (config_with(target_modules=None), "adapter_config.json is damaged"),
        (config_with(target_modules=["q_proj"]), r"does not fit the model: adapter.targets=q_proj matches no linear"),
        (config_with(target_modules=["qkv"]), "is unknown"),
        (config_with(use_dora=True), "lora_magnitude_vector is missing"),
        (config_with(peft_type="IA3"), "peft_type='IA3' is not LORA"),
        (config_with(rank_pattern={"qkv": 2}), 'rank_pattern={"qkv": 2} is not supported'),
        (config_with(init_lora_weights="pissa_niter_16"), 'init_lora_weights="pissa_niter_16" is not supported'),
        (config_with(modules_to_save=["head"]), "modules_to_save=.* is not supported"),
        (weights_with(lora_A=None), "attention.qkv.lora_A.weight is missing"),
        (weights_with(lora_C=torch.zeros(3)), "attention.qkv.lora_C.weight is unknown"),
        (weights_with(lora_B=torch.zeros(3, 48)), r"lora_B.weight is \[3, 48\], not \[48, 3\]"),
        (weights_with(lora_B=torch.full((48, 3), torch.nan)), "lora_B.weight is not finite"),
    ],
)
def test_a_folder_that_is_damaged_or_does_not_fit_is_one_clear_line(
    change: Change, message: str, tmp_path: Path
) -> None:
    written(tmp_path / "a")
    change(tmp_path / "a")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(tmp_path / "a", base(), BASE)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "a") in str(caught.value)
    assert caught.value.exit_code == 4

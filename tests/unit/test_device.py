"""The device is picked sensibly, and never silently something else than was asked for."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lmkit.config.machine import DeviceConfig, DeviceType, Precision, Switch
from lmkit.device import attention_of_any_shape, available_cores, resolve_device
from lmkit.errors import ResourceError, undetermined

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@pytest.fixture(autouse=True)
def _restore_threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@no_cuda
def test_auto_on_a_cpu_is_fp32_and_says_so() -> None:
    device = resolve_device(DeviceConfig(type=DeviceType.cpu))
    assert (device.torch_device.type, device.precision, device.compile) == ("cpu", Precision.fp32, False)
    assert "cpu" in device.description
    assert "fp32" in device.description


@no_cuda
@pytest.mark.parametrize(
    "config",
    [
        DeviceConfig(type=DeviceType.cuda),
        DeviceConfig(type=DeviceType.cpu, index=0),
        DeviceConfig(type=DeviceType.cpu, precision=Precision.fp16),
    ],
)
def test_what_is_not_there_is_refused_by_name(config: DeviceConfig) -> None:
    with pytest.raises(ResourceError, match=r"device\.") as caught:
        resolve_device(config)
    assert caught.value.exit_code == 6
    assert caught.value.remedy


def test_determinism_is_what_the_last_configuration_asks_for() -> None:
    device = resolve_device(DeviceConfig(type=DeviceType.cpu, deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert device.description.endswith("deterministic")
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    refused = undetermined(caught.value)
    assert refused is not None
    assert "put_" in str(refused)
    assert undetermined(RuntimeError("shapes differ")) is None
    assert "deterministic" not in resolve_device(DeviceConfig(type=DeviceType.cpu)).description
    assert not torch.are_deterministic_algorithms_enabled()


def test_threads_are_set_as_asked() -> None:
    resolve_device(DeviceConfig(type=DeviceType.cpu, threads=1))
    assert torch.get_num_threads() == 1
    assert available_cores() >= 1


def test_autocast_changes_the_matrix_products_only_where_asked() -> None:
    a = torch.randn(4, 4)
    with resolve_device(DeviceConfig(type=DeviceType.cpu, compile=Switch.off)).autocast():
        assert (a @ a).dtype == torch.float32
    with resolve_device(DeviceConfig(type=DeviceType.cpu, precision=Precision.bf16)).autocast():
        assert (a @ a).dtype == torch.bfloat16


KEEPING_AND_GIVING_BACK = """
import ctypes, psutil, resource, sys, torch
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.device import give_back_freed_memory, resolve_device
if not hasattr(ctypes.CDLL(None), "mallopt"):
    sys.exit("no glibc")
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def fill():
    blocks = [torch.ones(n, 1_000_000) for n in (3, 12, 30)]
if "keep" in sys.argv:
    resolve_device(DeviceConfig(type=DeviceType.cpu))
taken = []
for _ in range(8):
    before = pages()
    fill()
    taken.append(pages() - before)
held = psutil.Process().memory_info().rss
give_back_freed_memory()
print(min(taken), held - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_what_a_step_frees_is_kept_until_it_is_to_be_given_back() -> None:
    def measured(*arguments: str) -> tuple[int, int]:
        command = [sys.executable, "-c", KEEPING_AND_GIVING_BACK, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "no glibc" in done.stderr:
            pytest.skip("no glibc")
        pages, given_back = done.stdout.split()
        return int(pages), int(given_back)

    (pages, given_back), (pages_by_default, _) = measured("keep"), measured()
    assert 20 * pages < pages_by_default
    assert given_back > 100_000_000


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A pretended card, and all that compiling for it takes."""
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": "pretended",
        "set_device": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/cc")
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    return monkeypatch


def test_on_a_card_it_compiles(card: pytest.MonkeyPatch) -> None:
    device = resolve_device(DeviceConfig())
    assert (device.compile, device.precision) == (True, Precision.bf16)
    assert device.description == "cuda:0 (pretended), bf16, Transformers compiled"
    assert resolve_device(DeviceConfig(compile=Switch.on)).description == "cuda:0 (pretended), bf16, compiled"


@pytest.mark.parametrize(
    ("owner", "name", "lack"),
    [
        (importlib.util, "find_spec", "the package triton"),
        (shutil, "which", "a C compiler"),
        (Path, "is_file", "Python's header files (Python.h)"),
    ],
)
def test_on_a_card_without_what_compiling_takes_it_says_so_or_refuses(
    card: pytest.MonkeyPatch, owner: object, name: str, lack: str
) -> None:
    card.setattr(owner, name, lambda _: None)
    device = resolve_device(DeviceConfig())
    assert not device.compile
    assert device.description == f"cuda:0 (pretended), bf16, not compiled for want of {lack}"
    with pytest.raises(ResourceError, match=re.escape(lack)):
        resolve_device(DeviceConfig(compile=Switch.on))
    assert not resolve_device(DeviceConfig(compile=Switch.off)).compile


def test_attention_of_any_shape_is_not_left_to_cudnn_and_what_was_allowed_comes_back() -> None:
    allowed = torch.backends.cuda.cudnn_sdp_enabled
    assert allowed()
    with contextlib.suppress(ValueError), attention_of_any_shape():
        assert not allowed()
        with attention_of_any_shape():
            assert not allowed()
        assert not allowed()
        raise ValueError
    assert allowed()


@pytest.mark.parametrize(
    ("owner", "name", "lack"),
    [(shutil, "which", "a C++ compiler (g++; the variable CXX"), (Path, "is_file", "Python's header files (Python.h)")],
)
def test_what_compiling_for_a_cpu_takes_is_looked_for_before_any_work(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, lack: str
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/g++")
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    config = DeviceConfig(type=DeviceType.cpu, threads=1, compile=Switch.on)
    assert resolve_device(config).compile
    monkeypatch.setattr(owner, name, lambda _: None)
    with pytest.raises(ResourceError, match=re.escape(lack)):
        resolve_device(config)

"""The device is picked sensibly, and never silently something else than was asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lmkit.config.machine import DeviceConfig, DeviceType, Precision, Switch
from lmkit.device import available_cores, resolve_device
from lmkit.errors import ResourceError

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


PAGES_TAKEN_AGAIN = """
import ctypes, resource, sys, torch
from lmkit.config.machine import DeviceConfig, DeviceType
from lmkit.device import resolve_device
if "keep" in sys.argv:
    resolve_device(DeviceConfig(type=DeviceType.cpu))
def fill():
    blocks = [torch.ones(n, 1_000_000) for n in (3, 12, 30)]
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fill()
has_glibc = hasattr(ctypes.CDLL(None), "mallopt")
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before if has_glibc else "no glibc")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_what_a_step_frees_is_not_given_back_to_the_system() -> None:
    def pages(*arguments: str) -> str:
        command = [sys.executable, "-c", PAGES_TAKEN_AGAIN, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    kept = pages("keep")
    if kept == "no glibc":
        pytest.skip(kept)
    assert 20 * int(kept) < int(pages())

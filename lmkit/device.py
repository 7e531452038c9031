"""Where and how to compute: one decision, taken once, and said in one line."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from lmkit.config.machine import DeviceConfig, DeviceType, Precision, Switch
from lmkit.console import plural
from lmkit.distributed import SINGLE, World
from lmkit.errors import ConfigError, ResourceError

SHAPE_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""How many shapes oneDNN, and torch's way to it, keep prepared: by themselves 1,024 each, of up to 2 MB. Training has
some ten. Where lengths change from step to step, what is kept lies scattered over the heap, and keeps what is freed
between from being used for larger blocks: with train.seq_len_jitter ptb_cpu_30min grew from 0.7 to 2.4 GB."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt, from malloc.h: from how many free bytes on they are given back, and how many blocks at most
have a mapping of their own, which is given back whenever such a block is freed."""


@dataclass(frozen=True)
class Device:
    """The resolved device."""

    torch_device: torch.device
    precision: Precision
    """fp32, bf16 or fp16: the format of matrix products; parameters stay in fp32."""
    compile: bool
    """Whether models are compiled for training; for device.compile=auto only those without recurrent layers are."""
    fused: bool
    """Whether the optimizer may use torch's fused kernels."""
    description: str
    """One line for people: what was picked."""

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Context in which a forward pass runs in the chosen precision."""
        if self.precision is Precision.fp32:
            yield
            return
        dtype = torch.bfloat16 if self.precision is Precision.bf16 else torch.float16
        with torch.autocast(self.torch_device.type, dtype=dtype):
            yield

    def synchronize(self) -> None:
        """Wait until the device has done everything it was given, before a clock is read."""
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize(self.torch_device)
        elif self.torch_device.type == "mps":
            torch.mps.synchronize()

    def peak_bytes(self) -> int:
        """Memory in use: allocated peak on CUDA, resident size of the process elsewhere (bytes)."""
        if self.torch_device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.torch_device))
        return int(psutil.Process().memory_info().rss)


@contextlib.contextmanager
def attention_of_any_shape() -> Iterator[None]:
    """Context for what reads other shapes again and again, as generation does with each token.

    In half precision on Hopper and Blackwell cards torch 2.13 leaves attention to cuDNN, which makes a plan for each
    new shape and keeps it: some 40 ms of the host, once in training, with each token in generation. The others whose
    kernels torch has need none.
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def resolve_device(config: DeviceConfig, world: World = SINGLE) -> Device:
    """Turn the configuration into a device that exists here; the processes on a machine share its cores and cards.

    Only ``auto`` chooses; a device or precision that was asked for by name and is not available is a ResourceError.
    On CPUs ``auto`` never picks bf16: without AVX512-BF16 or AMX it is emulated, a hundred times slower than fp32, and
    with them, where it is faster, whoever wants each digit should have to ask for it.
    """
    if world.shards and config.compile is Switch.on:
        raise ConfigError("device.compile=on does not go with parallel=fsdp", "leave it out, or use parallel=ddp")
    if world.shards and config.precision is Precision.fp16:
        raise ConfigError("device.precision=fp16 does not go with parallel=fsdp", "use bf16, or parallel=ddp")
    set_determinism(config.deterministic)
    kind = config.type
    if kind is DeviceType.auto:
        kind = DeviceType.cpu
        if torch.cuda.is_available():
            kind = DeviceType.cuda
        elif torch.backends.mps.is_available():
            kind = DeviceType.mps
    for name in SHAPE_CACHES:
        os.environ.setdefault(name, "16")
    if kind is DeviceType.cpu:
        keep_freed_memory()
    if config.threads is not None or kind is DeviceType.cpu:
        torch.set_num_threads(config.threads or max(1, available_cores() // world.local_size))
    if kind is DeviceType.cuda:
        return _resolve_cuda(config, world)
    if config.index is not None:
        raise ResourceError(f"device.index={config.index} needs device=cuda", "leave device.index out")
    precision = Precision.fp32 if config.precision is Precision.auto else config.precision
    if kind is DeviceType.mps:
        if not torch.backends.mps.is_available():
            raise ResourceError("device.type=mps is not available here", "use device=auto or device=cpu")
        name = "mps (Apple GPU)"
    else:
        if precision is Precision.fp16:
            raise ResourceError("device.precision=fp16 needs a GPU", "use device.precision=fp32")
        name = f"cpu, {plural(torch.get_num_threads(), 'thread')}"
    compiled = config.compile is Switch.on
    if compiled and kind is DeviceType.cpu:
        _refuse_lack(compiler_lack(on_card=False))
    fused = config.fused is not Switch.off
    return Device(torch.device(kind.name), precision, compiled, fused, _describe(name, precision, compiled, config))


def _resolve_cuda(config: DeviceConfig, world: World) -> Device:
    if not torch.cuda.is_available():
        raise ResourceError("device.type=cuda is not available here", "use device=auto or device=cpu")
    count = torch.cuda.device_count()
    index = config.index
    if world.local_size > 1:
        if index is not None:
            raise ConfigError(f"device.index={index} puts {world.local_size} processes on one card", "leave it out")
        index = world.local_rank
    elif index is None:
        index = torch.cuda.current_device()
    if index >= count:
        raise ResourceError(f"device.index={index} is not there", f"this machine has {count}, numbered from 0")
    precision = config.precision
    bf16 = torch.cuda.get_device_capability(index) >= (8, 0)
    if precision is Precision.auto:
        precision = Precision.bf16 if bf16 else Precision.fp32
    elif precision is Precision.bf16 and not bf16:
        raise ResourceError("device.precision=bf16 is not supported by this GPU", "use device.precision=fp16 or fp32")
    torch.set_float32_matmul_precision("high")
    torch.cuda.set_device(index)
    compiled = config.compile is not Switch.off and not world.shards
    lack = compiler_lack(on_card=True) if compiled else None
    if config.compile is Switch.on:
        _refuse_lack(lack)
    compiled = compiled and lack is None
    name = f"cuda:{index} ({torch.cuda.get_device_name(index)})"
    description = _describe(name, precision, compiled, config)
    if lack is not None:
        description += f", not compiled for want of {lack}"
    fused = config.fused is not Switch.off
    return Device(torch.device("cuda", index), precision, compiled, fused, description)


def _refuse_lack(lack: str | None) -> None:
    if lack is not None:
        raise ResourceError(f"device.compile=on needs {lack}, which is not here", "install it, or leave compile out")


def compiler_lack(*, on_card: bool) -> str | None:
    """What torch.compile needs for a card, or for this CPU, and is missing here; None: nothing that can be seen before
    it is used."""
    if on_card and importlib.util.find_spec("triton") is None:
        return "the package triton"
    if on_card and not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        return "a C compiler"
    cxx = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if not on_card and shutil.which(cxx) is None:
        return f"a C++ compiler ({cxx}; the variable CXX names another)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's header files (Python.h)"
    return None


def _describe(name: str, precision: Precision, compiled: bool, config: DeviceConfig) -> str:
    what = "compiled" if config.compile is Switch.on else "Transformers compiled"
    parts = [name, precision.name, *[what] * compiled, *["deterministic"] * config.deterministic]
    return ", ".join(parts)


def set_determinism(wanted: bool) -> None:
    """Allow only operations whose result is the same each time, or all; see ``errors.undetermined``."""
    if wanted == torch.are_deterministic_algorithms_enabled():
        return
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs, and reads when it begins
    torch.use_deterministic_algorithms(wanted)
    # to fill it takes time, and nothing here reads memory before it is written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for what is asked for next, instead of giving it back to the system.

    Every step asks for the same large blocks. If they were given back, each of their pages would be taken and cleared
    again at the next step: tens of thousands of page faults, 5 to 35 % of its time. With glibc only; see mallopt(3).
    """
    _call_glibc("mallopt", M_MMAP_MAX, 0)
    _call_glibc("mallopt", M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Give back what was kept; for the moment before the first step, which needs other blocks than what was before."""
    _call_glibc("malloc_trim", 0)


def _call_glibc(name: str, *arguments: int) -> None:
    """Call a function of the C library, if it is one that has it."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)


def available_cores() -> int:
    """Cores that this process may use: the smaller of the physical cores and the allowed CPUs."""
    allowed = len(psutil.Process().cpu_affinity()) if psutil.LINUX or psutil.WINDOWS else psutil.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))

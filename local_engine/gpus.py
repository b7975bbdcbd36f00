"""What a machine has for engines: its GPUs, their slices, its cores and memory.

Owns the reading of NVML, which is optional (`nvidia-ml-py`): a machine without it, or without a GPU, is a CPU
machine. Refuses to know pools. A GPU is named by its uuid everywhere but for people, who may give its index; a GPU
cut by MIG is its slices, each a device of its own.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or one MIG slice of it. `memory_bytes` is all of it, free or not."""

    index: int  # as nvidia-smi counts; a slice has that of its GPU
    uuid: str  # GPU-... or MIG-...
    name: str
    memory_bytes: int

    @property
    def is_slice(self) -> bool:
        return self.uuid.startswith("MIG-")


@dataclass(frozen=True, slots=True)
class Machine:
    """The GPUs this process may use, in nvidia-smi's order; none on a CPU machine."""

    gpus: tuple[Gpu, ...] = ()
    cpus: int = 1
    memory_bytes: int = 0  # of the machine, not of the GPUs


@dataclass(frozen=True, slots=True)
class GpuReading:
    """What a GPU is doing. Shares are from 0 to 1; a slice has no utilisation of its own (None)."""

    uuid: str
    utilisation: float | None
    memory_used_bytes: int
    memory_bytes: int


class Nvml:
    """NVML, opened once. `library` is the module `pynvml` or something that behaves like it."""

    def __init__(self, library: Any) -> None:
        """Raises the library's NVMLError where there is no driver."""
        self._library = library
        library.nvmlInit()

    def gpus(self) -> list[Gpu]:
        return [gpu for gpu, _ in self._devices()]

    def readings(self) -> list[GpuReading]:
        """One for each of `gpus`."""
        return [self._reading(gpu, handle) for gpu, handle in self._devices()]

    def close(self) -> None:
        self._library.nvmlShutdown()

    def _reading(self, gpu: Gpu, handle: Any) -> GpuReading:
        used = int(self._library.nvmlDeviceGetMemoryInfo(handle).used)
        try:
            rates = self._library.nvmlDeviceGetUtilizationRates(handle)
        except self._library.NVMLError:
            return GpuReading(
                gpu.uuid, None, used, gpu.memory_bytes
            )  # not for slices, nor for some old boards
        return GpuReading(gpu.uuid, rates.gpu / 100, used, gpu.memory_bytes)

    def _devices(self) -> Iterator[tuple[Gpu, Any]]:
        library = self._library
        for index in range(library.nvmlDeviceGetCount()):
            handle = library.nvmlDeviceGetHandleByIndex(index)
            slices = list(self._slices(handle))
            for device in slices or [handle]:
                # A slice's own name is its GPU's, with the profile.
                yield (
                    Gpu(
                        index,
                        _text(library.nvmlDeviceGetUUID(device)),
                        _text(library.nvmlDeviceGetName(device)),
                        int(library.nvmlDeviceGetMemoryInfo(device).total),
                    ),
                    device,
                )

    def _slices(self, handle: Any) -> Iterator[Any]:
        library = self._library
        try:
            mode, _pending = library.nvmlDeviceGetMigMode(handle)
            if mode != library.NVML_DEVICE_MIG_ENABLE:
                return
            count = library.nvmlDeviceGetMaxMigDeviceCount(handle)
        except library.NVMLError:
            return  # a GPU that cannot be cut
        for number in range(count):
            try:
                yield library.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
            except library.NVMLError:
                continue  # an empty place


def open_nvml() -> Nvml | None:
    """NVML, if it is installed and a driver answers."""
    try:
        library = import_module("pynvml")
    except ImportError:
        return None
    try:
        return Nvml(library)
    except library.NVMLError:
        return None


def discover(nvml: Nvml | None, environ: Mapping[str, str]) -> Machine:
    """This machine, as far as `CUDA_VISIBLE_DEVICES` lets it be seen."""
    found = nvml.gpus() if nvml is not None else []
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(tuple(_visible(found, environ.get(_VISIBLE))), _usable_cpus(), memory_bytes)


def this_machine(environ: Mapping[str, str]) -> Machine:
    """`discover` with NVML as it is installed, which is let go of again."""
    nvml = open_nvml()
    try:
        return discover(nvml, environ)
    finally:
        if nvml is not None:
            nvml.close()


def find(gpus: Iterable[Gpu], wanted: int | str) -> Gpu | None:
    """The GPU that an operator means by an index or by the beginning of a uuid; None: there is no such one."""
    found = [gpu for gpu in gpus if _is_meant(gpu, wanted)]
    return found[0] if len(found) == 1 else None


def _visible(gpus: list[Gpu], visible: str | None) -> Iterable[Gpu]:
    if visible is None:
        return gpus
    named = []
    for word in re.split(r"\s*,\s*", visible.strip()):
        gpu = find(gpus, int(word) if word.isdecimal() else word)
        if gpu is None:
            break  # CUDA itself stops at the first that is not there
        named.append(gpu)
    return named


def _is_meant(gpu: Gpu, wanted: int | str) -> bool:
    if isinstance(wanted, int):
        return gpu.index == wanted
    return bool(wanted) and gpu.uuid.startswith(wanted)


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)

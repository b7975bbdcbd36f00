"""What the GPUs of engines are doing, for operators: read when somebody looks, at most once a second.

Owns the one NVML of the parent process. A machine without one says nothing, which is no error. Refuses to know pools.
"""

import time
from collections.abc import Callable, Iterable
from typing import Final

from local_engine.gpus import Gpu, GpuReading, Nvml, open_nvml

_FRESH_S: Final = 1.0


class GpuWatch:
    """`opened` is called once, when somebody first looks."""

    def __init__(self, opened: Callable[[], Nvml | None] = open_nvml) -> None:
        self._open = opened
        self._nvml: Nvml | None = None
        self._is_open = False
        self._readings: dict[str, GpuReading] = {}
        self._read_at = float("-inf")

    def load(self, gpus: Iterable[Gpu]) -> dict[str, float]:
        """Of all these together: `gpu` and `gpu_memory`, shares from 0 to 1; what is not known is left out."""
        wanted = [gpu.uuid for gpu in gpus]
        if not wanted:
            return {}
        self._read()
        found = [self._readings[uuid] for uuid in wanted if uuid in self._readings]
        told: dict[str, float] = {}
        busy = [reading.utilisation for reading in found if reading.utilisation is not None]
        if busy:
            told["gpu"] = round(sum(busy) / len(busy), 3)
        size = sum(reading.memory_bytes for reading in found)
        if size:
            told["gpu_memory"] = round(sum(reading.memory_used_bytes for reading in found) / size, 3)
        return told

    def close(self) -> None:
        if self._nvml is not None:
            self._nvml.close()
            self._nvml = None

    def _read(self) -> None:
        now = time.monotonic()
        if now - self._read_at < _FRESH_S:
            return
        self._read_at = now
        if not self._is_open:
            self._is_open, self._nvml = True, self._open()
        if self._nvml is not None:
            self._readings = {reading.uuid: reading for reading in self._nvml.readings()}

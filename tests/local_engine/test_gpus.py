from types import SimpleNamespace

import pytest

from local_engine.gpus import Gpu, Nvml, discover, find, open_nvml
from tests.local_engine.plan_cases import GIB, MACHINE, SLICED


class FakeNvmlError(Exception):
    pass


class FakeNvml:
    """Two GPUs, the second cut into two slices with an empty place between. Behaves as `pynvml`."""

    NVMLError = FakeNvmlError
    NVML_DEVICE_MIG_ENABLE = 1
    opened = 0

    def nvmlInit(self):
        self.opened += 1

    def nvmlShutdown(self):
        self.opened -= 1

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return ("gpu", index)

    def nvmlDeviceGetMigMode(self, handle):
        if handle == ("gpu", 0):
            raise FakeNvmlError("not supported")
        return 1, 1

    def nvmlDeviceGetMaxMigDeviceCount(self, handle):
        return 3

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, number):
        if number == 1:
            raise FakeNvmlError("not found")
        return ("slice", number)

    def nvmlDeviceGetUUID(self, device):
        return (b"GPU-%d" if device[0] == "gpu" else b"MIG-%d") % device[1]

    def nvmlDeviceGetName(self, device):
        return "H100"

    def nvmlDeviceGetMemoryInfo(self, device):
        whole = 80 if device[0] == "gpu" else 40
        return SimpleNamespace(total=whole * GIB, used=10 * GIB)

    def nvmlDeviceGetUtilizationRates(self, device):
        if device[0] == "slice":
            raise FakeNvmlError("not supported")
        return SimpleNamespace(gpu=37)


GPUS = (
    Gpu(0, "GPU-0", "H100", 80 * GIB),
    Gpu(1, "MIG-0", "H100", 40 * GIB),
    Gpu(1, "MIG-2", "H100", 40 * GIB),
)


@pytest.fixture
def nvml():
    return Nvml(FakeNvml())


def test_a_gpu_that_is_cut_is_its_slices(nvml):
    assert discover(nvml, {}).gpus == GPUS


def test_a_slice_has_memory_of_its_own_and_no_utilisation(nvml):
    assert [(reading.utilisation, reading.memory_bytes) for reading in nvml.readings()] == [
        (0.37, 80 * GIB),
        (None, 40 * GIB),
        (None, 40 * GIB),
    ]


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        ("MIG-2, GPU-0", (GPUS[2], GPUS[0])),
        ("0", (GPUS[0],)),
        ("GPU-0,GPU-9,MIG-0", (GPUS[0],)),  # CUDA stops at the first that is not there
        ("", ()),
        ("-1", ()),
    ],
)
def test_only_what_cuda_would_see_is_there(nvml, visible, seen):
    assert discover(nvml, {"CUDA_VISIBLE_DEVICES": visible}).gpus == seen


def test_a_gpu_is_meant_by_its_index_or_the_beginning_of_its_uuid():
    assert find(MACHINE.gpus, 3) is MACHINE.gpus[3]
    assert find(MACHINE.gpus, "GPU-00000005") is MACHINE.gpus[5]
    assert find(MACHINE.gpus, "GPU-") is None  # all of them
    assert find(SLICED.gpus, 0) is None  # two slices
    assert find(MACHINE.gpus, "") is None


def test_nvml_is_let_go_of(nvml):
    library = nvml._library
    nvml.close()
    assert library.opened == 0


def test_a_machine_without_gpus_has_cores_and_memory():
    machine = discover(None, {})
    assert machine.gpus == ()
    assert machine.cpus >= 1
    assert machine.memory_bytes > 1 << 28
    nvml = open_nvml()  # none here, or a real one: both are fine
    if nvml is not None:
        nvml.close()

"""What GPUs are doing, read when somebody looks."""

from gateway.gpu_watch import GpuWatch
from local_engine.gpus import Gpu, Nvml

GIB = 1 << 30


class FakeNvml:
    """Three GPUs; the last one has no utilisation of its own, as a slice has not."""

    NVML_DEVICE_MIG_ENABLE = 1

    class NVMLError(Exception):
        pass

    def __init__(self):
        self.calls = 0
        self.is_open = False

    def nvmlInit(self):
        self.is_open = True

    def nvmlShutdown(self):
        self.is_open = False

    def nvmlDeviceGetCount(self):
        self.calls += 1
        return 3

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetMigMode(self, handle):
        raise self.NVMLError

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-{handle}"

    def nvmlDeviceGetName(self, handle):
        return b"Test GPU"

    def nvmlDeviceGetMemoryInfo(self, handle):
        return type("Memory", (), {"total": 80 * GIB, "used": 20 * (handle + 1) * GIB})

    def nvmlDeviceGetUtilizationRates(self, handle):
        if handle == 2:
            raise self.NVMLError
        return type("Rates", (), {"gpu": 40 + 20 * handle})


def gpus(*indexes):
    return [Gpu(index, f"GPU-{index}", "Test GPU", 80 * GIB) for index in indexes]


def test_the_gpus_of_an_engine_are_told_together():
    watch = GpuWatch(lambda: Nvml(FakeNvml()))
    assert watch.load(gpus(0)) == {"gpu": 0.4, "gpu_memory": 0.25}
    assert watch.load(gpus(0, 1)) == {"gpu": 0.5, "gpu_memory": 0.375}
    assert watch.load(gpus(2)) == {"gpu_memory": 0.75}
    assert watch.load(gpus(7)) == {}


def test_they_are_read_once_for_all_engines_and_only_when_there_are_some():
    library = FakeNvml()
    watch = GpuWatch(lambda: Nvml(library))
    assert watch.load([]) == {}
    assert not library.is_open
    for _ in range(20):
        watch.load(gpus(0))
    assert library.calls <= 2  # a second may pass
    watch.close()
    assert not library.is_open


def test_a_machine_without_a_driver_is_asked_once():
    asked = []
    watch = GpuWatch(lambda: asked.append(1))
    assert watch.load(gpus(0)) == watch.load(gpus(1)) == {}
    assert asked == [1]
    watch.close()

"""What GPUs are doing, read when somebody looks."""

from gateway.gpu_watch import GpuWatch
from local_engine.gpus import Gpu, GpuReading

GIB = 1 << 30


class PlayedNvml:
    """Two GPUs, and a slice that has no utilisation of its own."""

    def __init__(self):
        self.reads = 0
        self.is_open = True

    def readings(self):
        self.reads += 1
        busy = (0.4, 0.6, None)
        return [
            GpuReading(f"GPU-{place}", share, 20 * (place + 1) * GIB, 80 * GIB)
            for place, share in enumerate(busy)
        ]

    def close(self):
        self.is_open = False


def gpus(*indexes):
    return [Gpu(index, f"GPU-{index}", "Test GPU", 80 * GIB) for index in indexes]


def test_the_gpus_of_an_engine_are_told_together():
    watch = GpuWatch(PlayedNvml)
    assert watch.load(gpus(0)) == {"gpu": 0.4, "gpu_memory": 0.25}
    assert watch.load(gpus(0, 1)) == {"gpu": 0.5, "gpu_memory": 0.375}
    assert watch.load(gpus(2)) == {"gpu_memory": 0.75}
    assert watch.load(gpus(7)) == {}


def test_they_are_read_once_for_all_engines_and_only_when_there_are_some():
    made = []
    watch = GpuWatch(lambda: made.append(PlayedNvml()) or made[0])
    assert watch.load([]) == {}
    assert not made
    watch.load(gpus(0))
    watch.load(gpus(1))
    assert made[0].reads <= 2  # a second may pass
    watch.close()
    assert not made[0].is_open


def test_a_machine_without_a_driver_is_asked_once():
    asked = []
    watch = GpuWatch(lambda: asked.append(1))
    assert watch.load(gpus(0)) == watch.load(gpus(1)) == {}
    assert asked == [1]
    watch.close()

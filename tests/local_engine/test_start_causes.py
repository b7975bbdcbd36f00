"""What is said of a failed start, against logs recorded from vLLM 0.32 on the CPU and the words of CUDA and PyTorch."""

import re
from pathlib import Path

import pytest

from local_engine.start_causes import SIGNS, cause_of

LOGS = Path(__file__).parent / "start_logs"
RECORDED = {
    "bad_flag": ("bad_flag", "unrecognized arguments: --no-such-flag"),
    "missing_weights": ("missing_weights", "Cannot find any model weights with `/models/noweights`"),
    "missing_folder": ("missing_weights", "/models/nowhere"),
    "not_in_cache": ("missing_weights", "Cannot find an appropriate cached snapshot folder"),
    "kv_too_small": ("kv_too_small", "No available memory for the cache blocks"),
    "memory_taken": ("memory_taken", "is less than desired CPU memory utilization (0.999, 12.83 GiB)"),
    "port_taken": ("port_taken", "Address already in use"),
    "model_too_long": ("model_too_long", "User-specified max_model_len (9999999)"),
    "heads_not_divisible": ("bad_setting", "must be divisible by tensor parallel size (3)."),
    "sleep_unsupported": ("bad_setting", "Sleep mode is not supported on current platform."),
    "no_vllm": ("no_vllm", "headgate[vllm]"),
    "broken_command": ("cpu_command", "local_engine/vllm_cpu.py, serve]"),
    "unknown_parser": ("unknown", "invalid tool call parser: nonsense"),
}
# As their sources have them; there is no GPU to record them on.
QUOTED = {
    # torch/csrc and c10/cuda/CUDACachingAllocator.cpp
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB": (
        "out_of_memory"
    ),
    # vllm/v1/worker/utils.py
    "ValueError: Free memory on device cuda:0 (10.2/79.1 GiB) on startup is less than desired GPU memory utilization "
    "(0.92, 72.8 GiB). Decrease GPU memory utilization.": "memory_taken",
    # vllm/v1/core/kv_cache_utils.py
    "ValueError: To serve at least one request with the models's max seq len (131072), (16.00 GiB KV cache is needed, which is "
    "larger than the available KV cache memory (4.10 GiB).": "kv_too_small",
    # torch/cuda/__init__.py
    "RuntimeError: No CUDA GPUs are available": "no_cuda",
    "RuntimeError: Found no NVIDIA driver on your system.": "no_cuda",
    "ImportError: libcuda.so.1: cannot open shared object file: No such file or directory": "no_cuda",
    # vllm/config/device.py
    "RuntimeError: Failed to infer device type, please set the environment variable": "no_cuda",
    # vllm/config/parallel.py
    "ValueError: World size (8) is larger than the number of available GPUs (4) in this node.": "too_few_gpus",
    # torch/_inductor/exc.py
    "torch._inductor.exc.InductorError: InvalidCxxCompiler: No working C++ compiler found": "no_compiler",
    "OSError: [Errno 28] No space left on device": "no_disk",
    "ModuleNotFoundError: No module named 'vllm'": "no_vllm",
    "cannot start vllm: No such file or directory": "no_vllm",
    "cannot start /opt/engine: Permission denied": "no_command",
}


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_log_gives_its_cause_in_one_line(name: str):
    kind, text = RECORDED[name]
    cause = cause_of((LOGS / f"{name}.log").read_text(), 1)
    assert cause.kind == kind
    assert text in cause.text
    assert "\n" not in cause.text
    assert len(cause.text) < 600


@pytest.mark.parametrize("line", QUOTED)
def test_the_words_of_libraries_give_their_cause(line: str):
    cause = cause_of(f"(EngineCore pid=7) ERROR 11-20 15:56:31 [core.py:1510] {line}\nmore\n", 1)
    assert cause.kind == QUOTED[line], cause


def test_every_row_of_the_table_is_tested():
    seen = {kind for kind, _ in RECORDED.values()} | set(QUOTED.values())
    assert {sign.kind for sign in SIGNS} <= seen


def test_what_cannot_get_better_by_itself_is_told_from_what_may():
    final = {name: cause_of((LOGS / f"{name}.log").read_text(), 1).is_final for name in RECORDED}
    assert final["bad_flag"]
    assert final["missing_weights"]
    assert not final["port_taken"]
    assert not final["memory_taken"]
    assert not final["unknown_parser"]


def test_a_log_that_says_nothing_is_told_by_how_it_ended():
    assert cause_of("", 137).kind == "killed"
    assert cause_of("loading ...\n", 3).text == "it ended with code 3, and its log does not say why"
    assert cause_of("", 128 + 11).text.startswith("it was ended by SIGSEGV")
    assert cause_of("", None).text.startswith("it ended")


def test_the_last_error_before_vllms_own_summary_is_shown():
    log = (
        "Traceback (most recent call last):\nsome.module.FirstError: not this\nlib.other.RealError: this it is\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert cause_of(log, 1).text == "it ended with code 1: lib.other.RealError: this it is"


def test_an_access_log_or_a_prompt_in_it_is_no_cause():
    """Only what stands where an error stands."""
    assert not re.search("CUDA", cause_of('INFO: "GET /health HTTP/1.1" 200 OK\n', 1).text)

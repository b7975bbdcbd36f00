"""Runs a command that dies with whoever started it: `python leash.py PARENT_PID COMMAND ...`.

Asks the kernel for SIGKILL at the parent's death, then becomes the command. A parent that is killed cannot end
its children itself; without this an engine would keep its memory and its port. Run as a file, not imported, so
that it starts without the package. Elsewhere than on Linux it only becomes the command.
"""

import ctypes
import os
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def main(argv: list[str]) -> None:
    """Never returns."""
    parent, command = int(argv[1]), argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            # It died before the request to the kernel: the signal will never come.
            sys.exit(1)
    os.execvp(command[0], command)  # noqa: S606 - becoming the command is the point


if __name__ == "__main__":
    main(sys.argv)

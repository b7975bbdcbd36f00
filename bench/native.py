"""The programs the bench needs: its own two C programs, compiled on demand, and nginx and wrk from the system.

Nothing is downloaded here. A missing program raises BenchError with the sentence that says how to get it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE / "build"
FLAGS = ("-O2", "-g", "-std=gnu11", "-Wall", "-Wextra")


class BenchError(Exception):
    """The bench cannot run; the text says what to do about it."""


def compile_program(name: str) -> Path:
    """Path of the compiled `name`.c; compiled again only when a source is newer."""
    source, program = HERE / f"{name}.c", BUILD / name
    newest = max(source.stat().st_mtime, (HERE / "wire.h").stat().st_mtime)
    if program.exists() and program.stat().st_mtime >= newest:
        return program
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise BenchError("the bench needs a C compiler: apt-get install gcc libc6-dev")
    BUILD.mkdir(exist_ok=True)
    draft = program.with_suffix(f".{os.getpid()}")  # nobody who compiles beside us runs half of it
    command = [compiler, *FLAGS, "-o", str(draft), str(source), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{source.name} does not compile:\n{done.stderr}")
    draft.replace(program)
    return program


def find(name: str, package: str) -> str:
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin")
    if path is None:
        raise BenchError(f"the bench needs {name}: apt-get install {package}")
    return path


def version(*command: str) -> str:
    """The first line a program says about itself, or "unknown"."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0].strip() if lines else "unknown"

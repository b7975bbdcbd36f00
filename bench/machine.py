"""What the figures were measured on: versions, kernel, processor, date, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

from bench import native

PACKAGES = ("uvloop", "httptools", "msgspec", "apsw", "orjson")


def describe(targets: Mapping[str, str]) -> dict[str, str]:
    """Names and values for the head of the report, the targets' versions last."""
    about = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": native.version("git", "-C", str(native.HERE.parent), "describe", "--always", "--dirty"),
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }
    for name in PACKAGES:
        try:
            about[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            about[name] = "not installed"
    about["wrk"] = native.version("wrk", "-v").split(" [")[0]
    builds = {"headgate", "headgate-compiled"}  # the others are these with another configuration
    return about | {
        name: version
        for name, version in targets.items()
        if name in builds or not name.startswith("headgate")
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()

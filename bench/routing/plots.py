"""Small pictures for the report: first tokens, hits and throughput against load, and the price of the same trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from bench.routing.figures import Figures

COLOURS = {
    "session": "#1b6ca8",
    "prefix": "#2a9d8f",
    "round-robin": "#c1121f",
    "least-loaded": "#e9a23b",
    "pure-affinity": "#7b5ea7",
    "random": "#8d99ae",
}
# The same figures give the same file.
mpl.rcParams.update({"svg.hashsalt": "headgate", "font.size": 8, "svg.fonttype": "none"})


def against_load(points: Mapping[str, Sequence[tuple[int, Figures]]], slo_s: float, folder: Path) -> Path:
    figure, (first, hits, rate) = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained")
    for policy, series in points.items():
        loads = [population for population, _ in series]
        given = {"color": COLOURS[policy], "label": policy, "marker": ".", "linewidth": 1}
        first.plot(loads, [f.ttft_p90 for _, f in series], **given)
        hits.plot(loads, [100 * f.hit_rate for _, f in series], **given)
        rate.plot(loads, [f.per_s for _, f in series], **given)
    first.set_yscale("log")
    first.axhline(slo_s, color="black", linewidth=0.5, linestyle=":")
    first.set_title("first token, p90 (s)")
    hits.set_title("hit rate (%)")
    rate.set_title("requests/s")
    for axis in (first, hits, rate):
        axis.set_xlabel("conversations under way")
    rate.legend(frameon=False, fontsize=7)
    return _write(figure, folder / "load.svg")


def prices(costs: Mapping[str, tuple[float, float]], folder: Path) -> Path:
    """Dollars, and of which for answers, by policy."""
    figure, axis = plt.subplots(figsize=(4.5, 1.9), layout="constrained")
    names = list(costs)[::-1]
    axis.barh(names, [costs[name][0] for name in names], color=[COLOURS[name] for name in names])
    axis.barh(names, [costs[name][1] for name in names], color="white", alpha=0.5)
    axis.set_title("the same conversations, priced ($; light: answers)")
    return _write(figure, folder / "price.svg")


def _write(figure: plt.Figure, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path

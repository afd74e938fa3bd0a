"""TPOT against the budget, with the bounds: what `benchmark.py --plot` draws, also from several of its JSON files.

    python -m moe_jax.analysis.budget_plot OUTPUT FILE.json [FILE.json ...]      writes OUTPUT.png and OUTPUT.svg

Needs matplotlib (pip install 'moe_jax[plot]').
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError
from moe_jax.outputs import writing


def require() -> None:
    """Raises UserError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install 'moe_jax[plot]'")


def draw(documents: Sequence[dict[str, Any]], output: Path) -> list[Path]:
    """Draws the runs of the first batch size and prompt length; one panel.

    Args:
      documents: of `benchmark.py --output_json`, of one model and link.
      output: path without ending.

    Returns:
      The files written, .png and .svg.

    Raises:
      UserError: no matplotlib, documents that do not belong together, or a full disk.
    """
    require()
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    from matplotlib import pyplot

    links = {document["simulated_link_gbps"] for document in documents}
    if len(links) > 1:
        raise UserError("a plot shows one link, these files have several: " + ", ".join(map(str, links)))
    simulated = links.pop()
    runs = [run for document in documents for run in document["runs"]]
    first = (runs[0]["batch"], runs[0]["prompt_length"], runs[0]["expert_bytes"])
    runs = [run for run in runs if (run["batch"], run["prompt_length"], run["expert_bytes"]) == first]
    runs.sort(key=lambda run: run["budget_share"])
    share = [100 * run["budget_share"] for run in runs]

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for index, (name, points) in enumerate(by_mode(runs).items()):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker="os^vDPX*<>"[index % 10], label=name)
    for name, label, style in (
        ("bound_serial_s", "C + T (no overlap)", "--"),
        ("bound_overlap_s", "max(C, T) (perfect overlap)", ":"),
        ("machine_s", "both at once, no dependencies", "-."),
    ):
        axes.plot(
            share,
            [1e3 * run["bounds"][name] for run in runs],
            style,
            marker="_",
            color="black",
            linewidth=1,
            label=label,
        )
    axes.set_xlabel("device budget, % of all experts")
    axes.set_ylabel("ms per output token" + (f", *simulated* link of {simulated:g} GB/s" if simulated else ""))
    axes.set_ylim(bottom=0)
    batch, length, expert = first
    title = f"experts of {expert / 1e6:.2f} MB, batch {batch}, prompts of {length} tokens"
    axes.set_title(f"SIMULATED LINK: {title}" if simulated else title)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    files = [output.with_name(output.name + ending) for ending in (".png", ".svg")]
    for file in files:
        with writing(file):
            figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return files


def by_mode(runs: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """(budget in % of all experts, TPOT in ms) of every mode; a mode with a budget of its own stands at that."""
    found: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        experts = run["experts_in_budget"] / run["budget_share"]
        for row in run["modes"]:
            at = 100 * row["experts"] / experts if row["experts"] else 100 * run["budget_share"]
            found.setdefault(row["name"], []).append((at, 1e3 * row["tpot_s"]["mean"]))
    return found


if __name__ == "__main__":
    try:
        if len(sys.argv) < 3:
            raise UserError("usage: python -m moe_jax.analysis.budget_plot OUTPUT FILE.json [FILE.json ...]")
        for written in draw([json.loads(Path(name).read_text()) for name in sys.argv[2:]], Path(sys.argv[1])):
            print(f"wrote {written}")
    except (UserError, OSError, ValueError) as error:
        sys.exit(f"budget_plot: error: {error}")

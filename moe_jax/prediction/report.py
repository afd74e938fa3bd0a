"""What a person sees of a training run: a progress bar, and tables of recall."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moe_jax.prediction.interface import Spec
from moe_jax.prediction.metrics import Scores


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """A bar on standard error; gives a function of (steps done, values to show, kept until replaced)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[shown]}"), console=Console(stderr=True)) as bar:
        task, seen = bar.add_task(title, total=total, shown=""), {}

        def advance(done: int, values: Mapping[str, float]) -> None:
            seen.update(values)
            bar.update(task, completed=done, shown=" ".join(f"{name} {value:.4f}" for name, value in seen.items()))

        yield advance


def print_scores(scores: Mapping[str, Scores], spec: Spec) -> None:
    """By predictor: recall and the quality of probabilities by horizon, wrapped targets apart; recall by layer."""
    console = Console()
    console = Console(width=max(console.width, 110)) if not console.is_terminal else console
    shown = lambda value: "-" if value is None else f"{100 * value:.1f}"
    titles = {
        "recall": f"recall@{spec.top_k} on the test texts in %, mean over layers, by layers ahead",
        "calibration_error": "calibration error of the probabilities in % (probability against observed share)",
        "brier": "Brier score of the probabilities in % (mean squared error over experts)",
    }
    for field, title in titles.items():
        means = Table(title=title)
        for heading in ("predictor", "target in", *map(str, range(1, spec.horizon + 1))):
            means.add_column(heading, justify="right")
        for wrapped, where in ((False, "same token"), (True, "next token")):
            for name, score in scores.items():
                means.add_row(name, where, *map(shown, score.by_horizon(field, wrapped)))
            means.add_section()
        console.print(means)
    beginning = Table(title="layer 0, from the token's embedding where a predictor reads it, else from the last layer")
    beginning.add_column("predictor", justify="right")
    beginning.add_column("recall", justify="right")
    for name, score in scores.items():
        beginning.add_row(name, shown(score.layer_0()))
    console.print(beginning)
    chosen = [h for h in (1, 2, 4, 8) if h <= spec.horizon]
    layers = Table(title=f"by layer: {' / '.join(scores)}; * the target is in the next token")
    for heading in ("layer", *(f"{h} ahead" for h in chosen)):
        layers.add_column(heading, justify="right")
    for layer in range(spec.num_layers):
        cells = [" / ".join(shown(score.recall[layer, h - 1]) for score in scores.values()) for h in chosen]
        marks = ["*" if layer + h >= spec.num_layers else " " for h in chosen]
        layers.add_row(str(layer), *(cell + mark for cell, mark in zip(cells, marks, strict=True)))
    console.print(layers)

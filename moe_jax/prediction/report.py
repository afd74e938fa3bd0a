"""What a person sees of a training run: tables of recall."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_jax.prediction.interface import Spec
from moe_jax.prediction.metrics import Scores


@dataclasses.dataclass(frozen=True)
class Fitted:
    """One fit of an ablation: its loss, and of its best look at the validation texts the recall over all places and
    horizons, the step, and the scores."""

    loss: str
    recall: float
    step: int
    seconds: float
    scores: Scores

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"scores": self.scores.to_dict()}


def print_ablation(fits: Sequence[Fitted], spec: Spec) -> None:
    """Recall and Brier score by horizon of every fit, and which has the highest recall."""
    table = Table(title=f"recall@{spec.top_k} on the validation texts in %, mean over layers, by layers ahead")
    for heading in ("loss", "target in", *map(str, range(1, spec.horizon + 1)), "Brier", "all", "step", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for wrapped, where in ((False, "same token"), (True, "next token")):
        for fit in fits:
            brier = [b for b in fit.scores.by_horizon("brier", wrapped) if b is not None]
            own = [fit.loss, where, *map(_percent, fit.scores.by_horizon("recall", wrapped))]
            whole = [f"{100 * fit.recall:.2f}", str(fit.step), f"{fit.seconds:.0f}"]
            table.add_row(*own, _percent(sum(brier) / len(brier) if brier else None), *([""] * 3 if wrapped else whole))
        table.add_section()
    console = Console()
    Console(width=max(console.width, 140) if not console.is_terminal else None).print(table)
    best = max(fits, key=lambda fit: fit.recall)
    print(f"highest recall over all layers and horizons: {best.loss}, {100 * best.recall:.2f}%")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def print_scores(scores: Mapping[str, Scores], spec: Spec) -> None:
    """By predictor: recall and the quality of probabilities by horizon, wrapped targets apart; recall by layer."""
    console = Console()
    console = Console(width=max(console.width, 110)) if not console.is_terminal else console
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
                means.add_row(name, where, *map(_percent, score.by_horizon(field, wrapped)))
            means.add_section()
        console.print(means)
    beginning = Table(title="layer 0, from the token's embedding where a predictor reads it, else from the last layer")
    beginning.add_column("predictor", justify="right")
    beginning.add_column("recall", justify="right")
    for name, score in scores.items():
        beginning.add_row(name, _percent(score.layer_0()))
    console.print(beginning)
    chosen = [h for h in (1, 2, 4, 8) if h <= spec.horizon]
    layers = Table(title=f"by layer: {' / '.join(scores)}; * the target is in the next token")
    for heading in ("layer", *(f"{h} ahead" for h in chosen)):
        layers.add_column(heading, justify="right")
    for layer in range(spec.num_layers):
        cells = [" / ".join(_percent(score.recall[layer, h - 1]) for score in scores.values()) for h in chosen]
        marks = ["*" if layer + h >= spec.num_layers else " " for h in chosen]
        layers.add_row(str(layer), *(cell + mark for cell, mark in zip(cells, marks, strict=True)))
    console.print(layers)


def later_use(network: float | None, averages: float | None, kept: bool) -> str:
    """A line on the network of later use: its loss on the validation texts, and that without it, nats per expert."""
    if network is None or averages is None:
        return "later use of an expert: the validation texts are too short to tell; the network is not kept"
    what = f"later use of an expert: {network:.4f} nats on the validation texts, by recent use alone {averages:.4f}"
    return what if kept else f"{what}; the network is not kept"

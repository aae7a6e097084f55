"""The picture of a law fitted on own runs: their losses, the best loss of each budget, and its band."""

from __future__ import annotations

import html

from pretrain.planning.run_fits import FittedLaw, fit_lines
from pretrain.planning.scaling_laws import best_point
from pretrain.planning.svg import COLOURS, Chart

STEPS = 80  # points of a curve


def fit_page(fitted: FittedLaw) -> str:
    """A self-contained HTML page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Scaling law of own runs</title></head>'
        f"<body><h1>Scaling law of {len(fitted.points)} runs</h1>{fit_chart(fitted)}"
        f"<pre>{html.escape(chr(10).join(fit_lines(fitted)))}</pre></body></html>\n"
    )


def fit_chart(fitted: FittedLaw) -> str:
    """Loss against compute: points are runs, the line the best that a budget should reach."""
    least, most = (pick(point.flops for point in fitted.points) for pick in (min, max))
    budgets = [least * (1000 * most / least) ** (step / (STEPS - 1)) for step in range(STEPS)]
    best = [best_point(fitted.law, flops).loss for flops in budgets]
    bands = [fitted.band(flops) for flops in budgets]
    highest = max(*(point.loss for point in fitted.points), *(high for _, high in bands))
    chart = Chart(
        title="loss of own runs, and the best that a budget should reach",
        x_label="FLOPs of training (6 x parameters x tokens)",
        y_label="loss (nats per token)",
        x_range=(budgets[0] / 2, budgets[-1]),
        y_range=(0.95 * min(low for low, _ in bands), 1.03 * highest),
        x_log=True,
        width=900,
        height=520,
        legend_x=600,
    )
    lows, highs = [low for low, _ in bands], [high for _, high in bands]
    chart.band(budgets, lows, highs, name="90% of the laws that fit", colour=COLOURS[0])
    chart.line(budgets, best, name="best size and tokens", colour=COLOURS[0])
    chart.points(
        [point.flops for point in fitted.points],
        [point.loss for point in fitted.points],
        name="runs",
        colour=COLOURS[1],
        notes=[f"{p.name}: {p.parameters:,} parameters, {p.tokens:,} tokens, {p.loss:.3f}" for p in fitted.points],
    )
    return chart.text()

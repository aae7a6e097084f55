"""What `pretrain plan --flops` shows: sizes, tokens and losses that a compute budget buys, by every law."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.planning.scaling_laws import FACTORS, LAWS, Point, around, best_point, extra_flops


def budget_lines(flops: float, unique_tokens: float | None) -> Iterator[str]:
    """The optimum by each law, and what smaller or larger models than the first law's optimum would cost."""
    told = "" if unique_tokens is None else f", {unique_tokens / 1e9:,.1f} billion unique tokens"
    yield f"{flops:.3g} FLOPs (6 a parameter and token){told}"
    yield f"{'law':<12}{'parameters':>12}{'tokens':>10}{'a param.':>10}{'epochs':>8}{'loss':>8}"
    for law in LAWS.values():
        yield f"{law.name:<12}{_cells(best_point(law, flops, unique_tokens))}"
    law = next(iter(LAWS.values()))
    yield f"the same budget on other sizes, by {law.name}; extra: FLOPs beyond what that loss needs"
    for factor, point in zip(FACTORS, around(law, flops, unique_tokens), strict=True):
        extra = extra_flops(law, point)
        kind = "over-trained" if factor < 1 else "under-trained" if factor > 1 else "best"
        yield f"{kind:<13}{_cells(point)[1:]}   {extra:.0%} extra"
    if unique_tokens is not None:
        yield "repeated tokens count less each time (Muennighoff et al. 2023); up to 4 epochs nearly as fresh ones"
    yield from (f"{law.name}: {law.source}" for law in LAWS.values())


def _cells(point: Point) -> str:
    size = f"{point.parameters / 1e9:,.2f}B"
    tokens = f"{point.tokens / 1e9:,.0f}B"
    return f"{size:>12}{tokens:>10}{point.tokens_per_parameter:>10.1f}{point.epochs:>8.1f}{point.loss:>8.3f}"

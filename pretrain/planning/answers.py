"""Answers a request for layouts: search, explanation, recipe. Composition only."""

from __future__ import annotations

from pathlib import Path

from pretrain.errors import ConfigError
from pretrain.planning.layouts import build_config, read_choice, refusals
from pretrain.planning.plan_text import plan_values, print_explanation, print_json, print_plans, request_values
from pretrain.planning.recipe import write_recipe
from pretrain.planning.request import Request
from pretrain.planning.search import Plan, best_plans, make_plan, search


def answer(request: Request, *, explain: str | None, write: Path | None, as_json: bool) -> None:
    """Print what was asked for, and write the recipe.

    Raises:
        ConfigError: nothing fits, or the layout to write is refused or does not fit.
    """
    chosen: Plan | None = None
    if explain is None:
        plans = search(request)
        chosen = plans[0]
        print_plans(plans, as_json=as_json)
    else:
        choice = read_choice(explain)
        config = build_config(request, choice)
        problems = refusals(request, choice, config)
        if not problems:
            chosen = make_plan(request, choice, config)
        if as_json:
            told = {"plan": plan_values(chosen), "fits": chosen.fits} if chosen else {}
            refused = [problem.found for problem in problems]
            print_json({"request": request_values(request), **told, "refused": refused})
        else:
            best = best_plans(request)
            print_explanation(request, choice, best[0] if best else None)
        if write is not None and chosen is None:
            raise ConfigError(*problems)
    if write is not None and chosen is not None:
        written = write_recipe(chosen, write)
        if not as_json:
            print_written(written, chosen)


def print_written(paths: list[Path], plan: Plan) -> None:
    """Name the files and the command that checks them."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    console.print(f"wrote {', '.join(map(str, paths))}", markup=False)
    console.print(f"check it: pretrain check {paths[0]} --world-size {plan.request.devices}", markup=False)

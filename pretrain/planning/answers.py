"""Answers a request for layouts: search, explanation, recipe. Composition only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pretrain.errors import ConfigError, Problem
from pretrain.planning.layouts import build_config, read_choice, refusals
from pretrain.planning.page import plan_page
from pretrain.planning.plan_text import plan_values, print_explanation, print_json, print_plans, request_values
from pretrain.planning.recipe import write_recipe
from pretrain.planning.request import Request, read_count
from pretrain.planning.search import Plan, best_plans, fitting_plans, make_plan, search


def answer(request: Request, *, explain: str | None, write: Path | None, page: Path | None, as_json: bool) -> None:
    """Print what was asked for, and write the recipe and the page.

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
    if page is not None:
        shown = [chosen] if explain is not None and chosen is not None else search(request)
        write_page(page, plan_page(shown, fitting_plans(request)))
    if write is not None and chosen is not None:
        written = write_recipe(chosen, write)
        if not as_json:
            print_written(written, chosen)


def write_page(path: Path, text: str) -> None:
    """Write an HTML page.

    Raises:
        ConfigError: the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(Problem(f"--html {path}: {error}", "a place for a file", "name another one")) from error


def print_written(paths: list[Path], plan: Plan) -> None:
    """Name the files and the command that checks them."""
    written = ", ".join(map(str, paths))
    print_lines([f"wrote {written}", f"check it: pretrain check {paths[0]} --world-size {plan.request.devices}"])


def print_budget(flops: str, unique_tokens: str | None) -> None:
    """Print what a compute budget buys.

    Raises:
        ConfigError: a number is none.
    """
    from pretrain.planning.budget_text import budget_lines

    budget = read_count(flops, "--flops")
    unique = read_count(unique_tokens, "--unique-tokens") if unique_tokens is not None else None
    if budget < 1e12:
        raise ConfigError(Problem(f"--flops is {flops}", "1e12 or more", "write, for example, --flops 1e23"))
    print_lines(budget_lines(budget, unique))


def print_fit(runs: Sequence[Path], page: Path | None) -> None:
    """Fit a law on own runs, print it, and draw it.

    Raises:
        DataError: folders are no finished runs, or too few.
    """
    from pretrain.planning.fit_page import fit_page
    from pretrain.planning.run_fits import fit_lines, fit_runs, read_points

    fitted = fit_runs(read_points(runs))
    print_lines(fit_lines(fitted))
    place = page or Path("scaling-law.html")
    write_page(place, fit_page(fitted))
    print_lines([f"wrote {place}"])


def print_scale(request: Request) -> None:
    """Print how a model's run grows from 1,000 to 100,000 devices, and what of the suite grows with it."""
    from pretrain.planning.at_scale import scale_lines

    print_lines(scale_lines(request))


def print_calibration(path: Path) -> None:
    """Measure the device and write what was found.

    Raises:
        ConfigError: the place cannot be written.
    """
    from pretrain.planning.calibration import calibrate, save_calibration

    found = calibrate(lambda line: print_lines([line]))
    save_calibration(found, path)
    print_lines([f"wrote {path}: plan with --gpus {found.device.node_devices}x{path}"])


def print_lines(lines: Iterable[str]) -> None:
    """Print lines as they come."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in lines:
        console.print(line)

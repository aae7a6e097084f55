"""The pipeline's timeline, the page that shows it, and the report at scale."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from pretrain.models.pipeline_stages import bubble_fraction
from pretrain.planning.at_scale import SIZES, scale_lines, suite_parts
from pretrain.planning.page import memory_of_ranks, plan_page, timeline_of
from pretrain.planning.request import build_request
from pretrain.planning.search import Plan, fitting_plans, search
from pretrain.planning.svg import ticks
from pretrain.planning.timeline import play


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    return search(build_request(model="13b", nodes=2, gpus="8xA100-80", tokens="300B", global_batch="1M"))


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 3), (2, 2), (4, 8), (8, 32)])
def test_1f1b_waits_as_long_as_the_formula_says(ranks: int, micro_batches: int) -> None:
    told = play(
        ranks=ranks,
        micro_batches=micro_batches,
        forward=(1.0,) * ranks,
        backward=(2.0,) * ranks,
        is_bidirectional=False,
    )
    assert told.bubble == pytest.approx(bubble_fraction(ranks, micro_batches))


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 4), (2, 4), (4, 32), (8, 64)])
def test_dualpipev_waits_about_half_as_long(ranks: int, micro_batches: int) -> None:
    stages = 2 * ranks
    told = play(
        ranks=ranks,
        micro_batches=micro_batches,
        forward=(1.0,) * stages,
        backward=(2.0,) * stages,
        is_bidirectional=True,
    )
    half = (ranks - 1) / 2 / (micro_batches + (ranks - 1) / 2)
    assert half <= told.bubble + 1e-9
    assert told.bubble <= 1.3 * half


@pytest.mark.parametrize("is_bidirectional", [False, True])
def test_a_timeline_keeps_every_order(is_bidirectional: bool) -> None:
    stages = 8 if is_bidirectional else 4
    told = play(
        ranks=4,
        micro_batches=12,
        forward=tuple(1 + 0.1 * stage for stage in range(stages)),
        backward=(2.5,) * stages,
        is_bidirectional=is_bidirectional,
    )
    ends = {(work.kind, work.stage, work.micro_batch): work.end for work in told.work}
    assert len(ends) == len(told.work) == 2 * stages * 12
    for work in told.work:
        if work.kind == "forward" and work.stage:
            assert work.start >= ends["forward", work.stage - 1, work.micro_batch]
        if work.kind == "backward":
            before = ("backward", work.stage + 1) if work.stage < stages - 1 else ("forward", work.stage)
            assert work.start >= ends[(*before, work.micro_batch)]  # type: ignore[index]
    for rank in range(4):
        mine = sorted((work for work in told.work if work.rank == rank), key=lambda work: work.start)
        assert all(one.end <= other.start + 1e-9 for one, other in pairwise(mine))


def test_the_page_is_whole_and_needs_no_network(plans: list[Plan]) -> None:
    page = plan_page(plans, fitting_plans(plans[0].request))
    HTMLParser().feed(page)
    assert not re.search(r'(src|href)="|<script|url\(', page)
    assert page.count("<svg") == page.count("</svg>") >= 4
    deep = next(plan for plan in plans if plan.work.pipeline > 1)
    assert f"rank {deep.work.pipeline - 1}" in page
    assert str(plans[0].choice) in page


def test_the_fullest_rank_is_the_plan_s_memory(plans: list[Plan]) -> None:
    deep = next(plan for plan in plans if plan.work.pipeline > 1)
    ranks = memory_of_ranks(deep)
    assert len(ranks) == deep.work.pipeline
    assert max(ranks, key=lambda memory: memory.total) == deep.memory


def test_a_timeline_of_a_plan_is_as_long_as_its_step_says(plans: list[Plan]) -> None:
    deep = next(plan for plan in plans if plan.work.pipeline > 1 and not plan.work.is_bidirectional)
    told = timeline_of(deep)
    drawn = max(work.micro_batch for work in told.work) + 1
    step = deep.step
    of_each = (
        step.linear + step.attention + step.memory_bound + step.loss + step.recomputation
    ) / deep.work.micro_batches
    assert told.end == pytest.approx(of_each * (drawn + deep.work.pipeline - 1), rel=0.12)


def test_what_grows_with_ranks_is_named() -> None:
    request = build_request(model="7b", nodes=1, gpus="8xA100-80", tokens="1T")
    parts = {part.name: part for part in suite_parts(request)}
    assert all(len(part.values) == len(SIZES) for part in parts.values())
    assert parts["process groups made"].values[0] == 125 + 8
    assert parts["process groups made"].growth == pytest.approx(1, abs=0.05)
    assert parts["record of its files at a save"].growth < 0.1
    lines = list(scale_lines(request))
    named = [line for line in lines if line.startswith("- ")]
    assert any("process groups made" in line for line in named)
    assert not any("record of its files" in line for line in named)
    assert sum(line.strip().startswith("100,000") for line in lines) == 1


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 79, is_log=False) == [0, 20, 40, 60]
    assert ticks(1e17, 3e22, is_log=True)[:2] == [1e17, 1e18]
    assert ticks(1, 30, is_log=True) == pytest.approx([1, 2, 5, 10, 20])

"""Requests, layouts and recipes: what fits, what is refused and why, and that recipes pass `pretrain check`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.__main__ import run_command_line
from pretrain.config import load_config
from pretrain.errors import ConfigError
from pretrain.planning.deepspeed_settings import OF_STAGE
from pretrain.planning.goodput import best_interval, kept_share
from pretrain.planning.layouts import Choice, build_config, read_choice, refusals
from pretrain.planning.recipe import write_recipe
from pretrain.planning.request import Request, build_request, find_model, read_count
from pretrain.planning.search import make_plan, search, slower_because
from pretrain.run_plan import plan_run
from tests.architecture.source_files import REPOSITORY

DAY = 86400


def request_of(model: str = "13b", nodes: int = 4, **changes: str | int | None) -> Request:
    words = {"gpus": "8xA100-80", "tokens": "300B", **changes}
    return build_request(model=model, nodes=nodes, **words)  # type: ignore[arg-type]


@pytest.mark.parametrize(("model", "nodes"), [("1b", 1), ("13b", 4), ("70b", 16), ("8x7b", 4)])
def test_recipes_are_what_was_planned(model: str, nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for plan in search(request_of(model, nodes), count=3):
        written = write_recipe(plan, Path("out/recipe.yaml"))
        config = load_config(written[0])
        checked = plan_run(config, plan.request.devices)
        assert checked.memory == plan.memory
        assert checked.batch.tokens_per_step == plan.request.global_batch_tokens
        assert checked.batch.accumulation == plan.work.micro_batches
        assert plan.fits
        assert run_command_line(["check", str(written[0]), "--world-size", str(plan.request.devices), "--json"]) == 0


def test_plans_come_fastest_first_and_say_why_the_others_lose() -> None:
    plans = search(request_of())
    times = [plan.step.total for plan in plans]
    assert times == sorted(times)
    assert len({str(plan.choice) for plan in plans}) == len(plans)
    assert "slower" in slower_because(plans[-1], plans[0])
    assert plans[0].days == pytest.approx(300e9 / plans[0].tokens_per_second / plans[0].goodput.share / DAY)
    assert plans[0].cost == pytest.approx(plans[0].days * 24 * 32 * 1.8)


def test_settings_are_those_of_the_shipped_files() -> None:
    for stage, values in OF_STAGE.items():
        shipped = json.loads((REPOSITORY / "ds_configs" / f"zero{stage}.json").read_text(encoding="utf-8"))
        assert shipped["zero_optimization"] == values


@pytest.mark.parametrize(
    "choice",
    [
        Choice(),
        Choice(zero_stage=3, recomputation="full", micro_batch_size=4),
        Choice(tensor=4, pipeline=2, schedule="dualpipev"),
        Choice(engine="fsdp"),
        Choice(expert=4, micro_batch_size=2),
        Choice(zero_stage=3, offload="all", sequence=2),
    ],
)
def test_a_layout_is_spelled_as_it_is_read(choice: Choice) -> None:
    assert read_choice(str(choice)) == choice


def test_layouts_are_read_in_short() -> None:
    assert read_choice("tp4 pp2 mb1 zero1 recompute=full") == Choice(tensor=4, pipeline=2, recomputation="full")
    with pytest.raises(ConfigError, match="'wide=3'"):
        read_choice("wide=3,micro=1")


def test_the_table_refuses_layouts_and_says_why() -> None:
    request = request_of()
    choice = read_choice("zero=3,pipeline=2,tensor=3,micro=1")
    found = " ".join(problem.found for problem in refusals(request, choice, build_config(request, choice)))
    assert "pipeline parallelism with ZeRO stage 3" in found
    assert "parallel.tensor is 3" in found
    assert "cannot be shared" in found


def test_memory_of_a_layout_that_does_not_fit() -> None:
    request = request_of()
    choice = read_choice("zero=1,micro=1")
    plan = make_plan(request, choice, build_config(request, choice))
    assert not plan.fits
    assert plan.needed_bytes > plan.memory.total


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"model": "1T", "nodes": 1, "gpus": "1xA100-80"}, ("does not fit 1 x 1 a100-80", "--nodes")),
        ({"global_batch": "1000001"}, ("1000001 tokens", "999424")),
        ({"gpus": "8xB900"}, ("unknown GPU 'B900'", "H200-141")),
        ({"model": "lama-7b"}, ("unknown model", "llama-7b")),
        ({"tokens": "many"}, ("--tokens is 'many'", "300B")),
        ({"model": "8x7b", "global_batch": "8192"}, ("is 2 rows", "--global-batch 131072")),
        ({"model": "7b", "sequence_length": 10_000_000}, ("the model promises 4096 positions", "at most 4096")),
    ],
)
def test_impossible_requests_get_the_reason_and_the_nearest(words: dict[str, str | int], expected: tuple[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        search(request_of(**words))  # type: ignore[arg-type]
    for part in expected:
        assert part in str(caught.value)


def test_the_nearest_request_works() -> None:
    with pytest.raises(ConfigError) as caught:
        search(request_of("70b", 1, gpus="2xA100-40"))
    nodes = int(caught.value.problems[0].change.split("--nodes ")[1].split()[0])
    assert search(request_of("70b", nodes, gpus="2xA100-40"))


def test_round_batches_are_made_to_divide() -> None:
    assert request_of(global_batch="4M").global_batch_rows == 1024
    assert request_of(nodes=3, global_batch="4M").global_batch_rows % 24 == 0
    assert request_of(nodes=1000, model="7b").global_batch_rows % 125 == 0
    assert request_of(global_batch="4194304").global_batch_tokens == 4_194_304


def test_sizes_make_models_of_about_that_many_parameters() -> None:
    for size in ("30m", "3b", "30b", "1T"):
        request = request_of(size, 64)
        assert request.shape_parameters == pytest.approx(read_count(size, ""), rel=0.08)
    assert find_model("13B") == {"preset": "llama-13b"}


def test_saving_interval_is_daly_s_and_near_the_best() -> None:
    told = best_interval(stall=30, write=0, failure=DAY, restart=600)
    assert told.interval_seconds == pytest.approx((2 * 30 * DAY) ** 0.5, rel=0.02)  # Young's first order
    around = [
        kept_share(told.interval_seconds * factor, stall=30, write=0, failure=DAY, restart=600) for factor in (0.7, 1.4)
    ]
    assert told.share > max(around)
    assert told.share == pytest.approx(
        1 - 30 / told.interval_seconds - (600 + told.interval_seconds / 2) / DAY, abs=0.002
    )
    assert best_interval(stall=30, write=7200, failure=DAY, restart=600).interval_seconds == 7200
    assert best_interval(stall=100, write=0, failure=10, restart=600).share < 1e-3


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    words = ["plan", "--model", "7b", "--nodes", "2", "--tokens", "100B"]
    assert run_command_line([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plans"][0]["needed_bytes"] < 80 * 2**30
    assert run_command_line([*words, "--explain", "zero=3,micro=1,recompute=full", "--write", str(recipe)]) == 0
    assert "recomputation" in capsys.readouterr().out
    assert recipe.is_file()
    assert run_command_line([*words, "--explain", "zero=3,pipeline=2", "--write", str(recipe)]) == 64
    assert run_command_line(["plan"]) == 64
    assert run_command_line([*words[:-1], "x"]) == 64

"""`pretrain check` refuses layouts that cannot be, each with its reason and a change that then passes; and draws those
that can."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pretrain.__main__ import run_command_line

ROOT = Path(__file__).parents[2]
DENSE = "launch/recipes/a100/llama-7b-1-node.yaml"
SPARSE = "launch/recipes/a100/qwen3-30b-a3b-1-node.yaml"
NO_FILE = "parallel.deepspeed_config=null"
PIPELINE = f"parallel.engine=auto parallel.pipeline=2 {NO_FILE}"
WHOLE_EXPERTS = "parallel.expert=1"

# recipe, what is asked for on 8 ranks, part of the reason, what mends it
ILLEGAL = [
    (DENSE, f"{PIPELINE} parallel.zero_stage=3", "so they cannot be cut", "parallel.zero_stage=1"),
    (DENSE, f"{PIPELINE} parallel.zero_stage=1 parallel.sequence=2", "pass whole rows on", "parallel.sequence=1"),
    (DENSE, "parallel.tensor=2 parallel.sequence=2", "both exchange attention's heads", "parallel.sequence=1"),
    (DENSE, "parallel.tensor=3", "8 ranks cannot be shared by tensor 3", "parallel.tensor=2"),
    (DENSE, f"parallel.zero_stage=0 parallel.sequence=2 {NO_FILE}", "names no data-parallel", "parallel.zero_stage=1"),
    (DENSE, f"parallel.zero_stage=1 parallel.engine=plain {NO_FILE}", "is one process", "parallel.engine=zero"),
    (DENSE, f"parallel.zero_stage=3 parallel.engine=accelerate {NO_FILE}", "the zero engine's", "parallel.engine=zero"),
    (DENSE, "parallel.data_parallel=shard", "FSDP2 is the accelerate", "parallel.data_parallel=replicate"),
    (DENSE, f"parallel.offload_parameters=cpu {NO_FILE}", "which stage 3 alone makes", "parallel.zero_stage=3"),
    (
        *(DENSE, "parallel.offload_optimizer=nvme parallel.offload_folder=/fast"),
        *("offload to the host's memory alone", "parallel.offload_optimizer=cpu"),
    ),
    (SPARSE, f"{WHOLE_EXPERTS} parallel.tensor=2", "parallel.expert shares its experts", "parallel.tensor=1"),
    (
        *(SPARSE, f"{WHOLE_EXPERTS} parallel.zero_stage=1 {PIPELINE}"),
        *("losses of its routers would have to travel", "parallel.pipeline=1"),
    ),
    (SPARSE, f"{WHOLE_EXPERTS} parallel.sequence=2", "were not compared with whole ones", "parallel.sequence=1"),
    (SPARSE, "parallel.expert=3", "but a layer has 128 experts", "parallel.expert=2"),
]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def check(recipe: str, ranks: int, overrides: str) -> int:
    return run_command_line(["check", recipe, *overrides.split(), "--world-size", str(ranks)])


@pytest.mark.parametrize(("recipe", "overrides", "reason", "mend"), ILLEGAL, ids=[row[1] for row in ILLEGAL])
def test_refused_with_the_reason_and_mended_by_one_change(
    recipe: str, overrides: str, reason: str, mend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(recipe, 8, overrides) == 64
    told = " ".join(capsys.readouterr().err.split())
    assert reason in told
    assert "allowed:" in told
    assert mend.split(maxsplit=1)[0] in told.partition("change:")[2]
    assert check(recipe, 8, f"{overrides} {mend}") == 0


def test_the_grid_of_sixteen_nodes_keeps_tensor_ranks_within_a_node(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("launch/recipes/a100/llama-70b-16-nodes.yaml", 128, "") == 0
    printed = capsys.readouterr().out
    nodes = re.findall(r"^node (\d+)\n  pipeline (\d) +data +(\d) \|((?: +\d+)+)$", printed, re.MULTILINE)
    assert [int(number) for number, *_ in nodes] == list(range(16))
    assert [(int(stage), int(data)) for _, stage, data, _ in nodes] == [(s, d) for s in range(4) for d in range(4)]
    assert [[int(rank) for rank in ranks.split()] for *_, ranks in nodes] == [
        list(range(8 * node, 8 * node + 8)) for node in range(16)
    ]

"""The table counts each case once, and every wrong outcome is there with the command that runs it again."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.report import add_outcome, missing_lines, read_outcomes, report_lines
from tests.chaos.session import Outcome


def outcome(seed: int, *problems: tuple[str, str], kind: str = "kill", group: str = "rank, save") -> Outcome:
    values = {"what": "done", "faults": 1, "seconds": 1.0, "commit": "abc" if seed == 1 else "def"}
    return Outcome(kind=kind, seed=seed, group=group, problems=problems, **values)


def test_outcomes_of_sessions_add_up_and_a_second_run_of_a_case_replaces_the_first(tmp_path: Path) -> None:
    file = tmp_path / "outcomes.jsonl"
    earlier = [outcome(2, ("lost", "gone")), outcome(1), outcome(7)]
    later = [outcome(2), outcome(3, ("hang", "stood")), outcome(5, kind="damage", group="cut")]
    for one in earlier + later:
        add_outcome(file, one)
    lines = report_lines(read_outcomes(file))
    assert "| **kill** | **all** | 4 | 4 | 0 | 0 | 1 | 0 | 0 |" in lines
    assert "| **all** |  | 5 | 5 | 0 | 0 | 1 | 0 | 0 |" in lines
    assert "- kill: 1 to 3, 7" in lines
    assert "`python -m tests.chaos --kind kill --seed 3 --count 1`: done" in lines
    assert "- hang: stood" in lines
    assert "- 4 of commit def" in lines
    assert not any("gone" in line for line in lines)
    (said,) = [line for line in missing_lines(read_outcomes(file)) if line]
    assert said.startswith("Fewer than the full table has: kill 4 of 100, damage 1 of 50, ")

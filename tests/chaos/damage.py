"""Flipped bits and lost ends of checkpoint files: found before a value is used, named, passed over for an older one.

What must hold: `pretrain checkpoint verify` names the file, so does the start that passes a checkpoint over, and the
end is that of an undisturbed run to the last bit.
"""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint.folder import list_checkpoints
from pretrain.checkpoint.inspection import find_faults
from tests.chaos.case import OTHER, UNDETECTED, Case
from tests.chaos.results import newest_whole

TARGETS = ("newest", "older", "newest two", "all", "pointers")
WEIGHTS = (10, 3, 4, 2, 2)
STORAGE_FAILED = 74


def run_case(case: Case) -> None:
    """Damage files of a stopped run, then go on with it."""
    layout, undisturbed = case.choose_layout()
    case.copy_stopped(undisturbed)
    checkpoints = list_checkpoints(case.run_folder / "checkpoints")
    target = case.random.choices(TARGETS, WEIGHTS)[0]
    chosen = {
        "newest": checkpoints[-1:],
        "older": [case.random.choice(checkpoints[:-1])],
        "newest two": checkpoints[-2:],
        "all": checkpoints,
        "pointers": [],
    }[target]
    files = [case.random.choice(sorted(checkpoint.iterdir())) for checkpoint in chosen]
    if target == "pointers":
        files = [case.run_folder / "checkpoints" / name for name in ("latest", "best")]
    kept = {file: file.read_bytes() for file in files}
    done = {file: damage(case, file) for file in files}
    case.group = f"{'; '.join(sorted({what.split(' at ')[0].split(' to ')[0] for what in done.values()}))}"
    case.what = f"{layout.name}: {', '.join(f'{file.parent.name}/{file.name} {what}' for file, what in done.items())}"
    case.faults_done += len(files)
    for checkpoint, file in zip(chosen, files, strict=False):
        if not any(file.name in fault for fault in find_faults(checkpoint)):
            case.wrong(UNDETECTED, f"verify calls {checkpoint.name} whole")
    if target == "all":
        life = case.live(layout)
        if set(life.exit_codes) != {STORAGE_FAILED} or "verifies" not in life.log():
            case.wrong(OTHER, f"with no whole checkpoint left the run ended with {life.exit_codes}")
        back = case.random.choice(files)
        back.write_bytes(kept[back])
    rejected = [path for path in chosen if find_faults(path)]
    expected = newest_whole(case.run_folder)
    life = case.finish(layout, undisturbed)
    for path, file in zip(chosen, files, strict=False):
        is_passed_over = path in rejected and _step(path) > expected
        if is_passed_over and not _names(life.log(), path, file):
            case.wrong(UNDETECTED, f"the start that passed {path.name} over does not name {file.name}")


def damage(case: Case, file: Path) -> str:
    """Flip a bit or cut the end off; returns what was done."""
    content = bytearray(file.read_bytes())
    if case.random.random() < 0.6:
        place, bit = case.random.randrange(len(content)), case.random.randrange(8)
        content[place] ^= 1 << bit
        file.write_bytes(content)
        return f"bit flipped at {place}:{bit}"
    length = case.random.choice((0, case.random.randrange(len(content)), len(content) - 1))
    file.write_bytes(content[:length])
    return f"cut to {length} of {len(content)}"


def _names(log: str, checkpoint: Path, file: Path) -> bool:
    return any("is rejected" in line and checkpoint.name in line and file.name in line for line in log.splitlines())


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])

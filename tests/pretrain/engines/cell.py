"""One cell of the parity matrix: a case on so many ranks, its name, and what it shows. Which there are: matrix.py."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pretrain.compatibility import LAYOUT_USES, Choice, choose_engine
from pretrain.refused_pairs import Feature
from tests.pretrain.engines.cases import Case


@dataclass(frozen=True)
class Cell:
    """A case on so many ranks."""

    ranks: int
    case: Case
    slow: bool = False  # takes ranks or time, and repeats what another cell shows
    fresh: bool = False  # needs processes of its own, because the engine leaves traces in them

    def __str__(self) -> str:
        """What differs from the usual case, and the ranks."""
        usual = Case()
        different = [
            f"{field.name}={value}" if not isinstance(value, bool) else field.name
            for field in fields(Case)
            if (value := getattr(self.case, field.name)) != getattr(usual, field.name)
        ]
        return " ".join([*different, f"x{self.ranks}"])

    @property
    def features(self) -> list[Feature]:
        """What the compatibility table sees in it."""
        config = self.case.config
        run = Choice(config=config, engine=choose_engine(config, self.ranks), world_size=self.ranks)
        return [feature for feature, is_used in LAYOUT_USES.items() if is_used(run)]

    @property
    def aspects(self) -> set[object]:
        """What it shows: each way to share the work, alone and all that it uses together, and whatever else matters."""
        case, used = self.case, self.features
        engine = used[0]
        shared = [feature for feature in used if "parallelism" in feature or "offload" in feature]
        return {
            *((feature, case.precision) for feature in used if "recomputation" not in feature),
            *used,
            (case.zero_stage == 3, *shared),  # gathered weights meet the other ways
            (engine, case.zero_stage, case.precision) if engine == "engine zero" else engine,
            (engine, case.model_type) if engine == "engine pipeline" or case.tensor > 1 else case.model_type,
            (engine, "tied", case.tied),
            (engine, "accumulates", case.global_batch_size > case.micro_batch_size * self.ranks),
            (engine, "batch ramp", case.small_steps > 0),
            (engine, "sizes that do not divide", bool(case.model) and not shared),
            ("file", case.ds_config, case.zero_stage, case.sizes_divided_by > 1),
        }

"""What every section of the run configuration is: strict, frozen, and able to refuse keys that exclude one another.

Owns no key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from pretrain.errors import Problem


class Section(BaseModel):
    """A group of keys: unknown keys are errors, values are not coerced, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """Keys of this section, as written, that exclude or need one another."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Section:
        if problems := list(self.contradictions(dict(self))):
            raise ValueError("; ".join(problem.found for problem in problems))
        return self

"""A pipeline's instructions as parts of a step: DeepSpeed's schedule says what each is, and we count its time.

Owns no schedule; step_parts.py owns the counting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pretrain.engines.step_parts import Part, StepParts

# by the names of DeepSpeed's instructions; loading micro-batches and clearing belong to none
PARTS: dict[str, Part] = {
    "ForwardPass": "forward_backward",
    "BackwardPass": "forward_backward",
    "OptimizerStep": "optimizer",
    "ReduceGrads": "communication",
    "ReduceTiedGrads": "communication",
    "SendActivation": "communication",
    "RecvActivation": "communication",
    "SendGrad": "communication",
    "RecvGrad": "communication",
}


def count_instructions(engine: Any, parts: StepParts) -> None:
    """Let one of DeepSpeed's pipeline engines count its instructions; what they do stays as it is."""
    engine._INSTRUCTION_MAP = {
        instruction: _counted(run, PARTS[instruction.__name__], parts) if instruction.__name__ in PARTS else run
        for instruction, run in engine._INSTRUCTION_MAP.items()
    }


def _counted(run: Callable[..., None], name: Part, parts: StepParts) -> Callable[..., None]:
    def counted(engine: Any, **named: Any) -> None:
        with parts.part(name):
            run(engine, **named)

    return counted

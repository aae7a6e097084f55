"""What `accelerate launch` asks for through its ACCELERATE_* variables, laid over the run configuration.

Reads a mapping of variables that it is given; refuses contradictions before any process group exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pretrain.config import RunConfig
from pretrain.errors import ConfigError, Problem

_PREFIX = "ACCELERATE_DEEPSPEED_"
_NOT_HERE = {  # variable -> the values that change nothing
    _PREFIX + "OFFLOAD_OPTIMIZER_DEVICE": ("none",),
    _PREFIX + "OFFLOAD_PARAM_DEVICE": ("none",),
}


@dataclass(frozen=True, kw_only=True)
class AccelerateRequest:
    """The launcher's wish for an engine; an empty one changes nothing."""

    uses_deepspeed: bool = False
    config_file: str | None = None
    numbers: Mapping[str, str] = field(default_factory=dict)  # key of the run configuration -> value asked for
    unsupported: tuple[str, ...] = ()

    def apply_to(self, config: RunConfig) -> RunConfig:
        """The run configuration with the launcher's engine and DeepSpeed file in it.

        Raises:
            ConfigError: with every contradiction.
        """
        if not self.uses_deepspeed and not self.unsupported:
            return config
        problems = list(self._problems(config))
        if problems:
            raise ConfigError(*problems)
        parallel = config.parallel.model_copy(
            update={"engine": "zero", "deepspeed_config": self.config_file or config.parallel.deepspeed_config}
        )
        return config.model_copy(update={"parallel": parallel})

    def _problems(self, config: RunConfig) -> Iterator[Problem]:
        for name in self.unsupported:
            yield Problem(f"accelerate launch sets {name}", "DeepSpeed or plain processes", "leave that option out")
        if config.parallel.engine not in ("auto", "zero"):
            yield Problem(
                f"accelerate launch asks for DeepSpeed, parallel.engine is {config.parallel.engine}",
                "auto or zero",
                "set parallel.engine=auto, or launch without --use_deepspeed",
            )
        own = config.parallel.deepspeed_config
        if self.config_file and own and own != self.config_file:
            yield Problem(
                f"accelerate launch names {self.config_file}, parallel.deepspeed_config is {own}",
                "one DeepSpeed file",
                "give it in one of the two places",
            )
        for key, asked in self.numbers.items():
            found = _run_value(config, key)
            if _canonical(asked) != _canonical(found):
                yield Problem(
                    f"accelerate launch asks for {key} = {asked}, the run configuration says {found}",
                    "one value",
                    f"change {key} in the run configuration, or the option of accelerate launch",
                )


def read_accelerate_request(environment: Mapping[str, str]) -> AccelerateRequest:
    """Read the variables that `accelerate launch` exports; all of them may be absent."""
    unsupported = ["ACCELERATE_USE_FSDP"] if environment.get("ACCELERATE_USE_FSDP") == "true" else []
    if environment.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return AccelerateRequest(unsupported=tuple(unsupported))
    unsupported += [name for name, idle in _NOT_HERE.items() if environment.get(name, idle[0]) not in idle]
    file = environment.get(_PREFIX + "CONFIG_FILE")
    named = file if file and file != "none" else None
    asked = {
        "parallel.zero_stage": environment.get(_PREFIX + "ZERO_STAGE"),
        "optimizer.clip_norm": environment.get("ACCELERATE_GRADIENT_CLIPPING"),
        "precision": environment.get("ACCELERATE_MIXED_PRECISION"),
    }
    # with a file, accelerate exports its own defaults beside it (mixed precision "no"): then the file speaks, not they
    numbers = {} if named else {key: value for key, value in asked.items() if value and value not in ("none", "no")}
    return AccelerateRequest(uses_deepspeed=True, config_file=named, numbers=numbers, unsupported=tuple(unsupported))


def _run_value(config: RunConfig, key: str) -> object:
    section, _, name = key.partition(".")
    value = getattr(config, section)
    return getattr(value, name) if name else value


def _canonical(value: object) -> object:
    try:
        return float(str(value))
    except ValueError:
        return str(value)

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
_NOT_IN_FSDP = {  # the same; weights are grouped by decoder layer, and checkpoints are ours
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "false"),
    "FSDP_OFFLOAD_PARAMS": ("false",),
    "FSDP_AUTO_WRAP_POLICY": ("NO_WRAP", "TRANSFORMER_BASED_WRAP"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("false",),
    "FSDP_IGNORED_MODULES": ("",),
}


@dataclass(frozen=True, kw_only=True)
class AccelerateRequest:
    """The launcher's wish for an engine; an empty one changes nothing."""

    uses_deepspeed: bool = False
    uses_fsdp: bool = False
    config_file: str | None = None
    numbers: Mapping[str, str] = field(default_factory=dict)  # key of the run configuration -> value asked for
    unsupported: Mapping[str, str] = field(default_factory=dict)  # variable = value -> what would be possible

    def apply_to(self, config: RunConfig) -> RunConfig:
        """The run configuration with the launcher's engine and DeepSpeed file in it.

        Raises:
            ConfigError: with every contradiction.
        """
        if not self.engine:
            return config
        problems = list(self._problems(config))
        if problems:
            raise ConfigError(*problems)
        file = self.config_file or config.parallel.deepspeed_config
        changes = {"deepspeed_config": file} if self.uses_deepspeed else {"data_parallel": "shard"}
        parallel = config.parallel.model_copy(update={"engine": self.engine, **changes})
        return config.model_copy(update={"parallel": parallel})

    @property
    def engine(self) -> str | None:
        """The engine asked for; None where the launcher starts processes and no more."""
        if self.uses_deepspeed:
            return "zero"
        return "accelerate" if self.uses_fsdp else None

    def _problems(self, config: RunConfig) -> Iterator[Problem]:
        library, option = ("DeepSpeed", "--use_deepspeed") if self.uses_deepspeed else ("FSDP", "--use_fsdp")
        for setting, allowed in self.unsupported.items():
            yield Problem(f"accelerate launch sets {setting}", allowed, "leave that option out, or change it to this")
        if config.parallel.engine not in ("auto", self.engine):
            yield Problem(
                f"accelerate launch asks for {library}, parallel.engine is {config.parallel.engine}",
                f"auto or {self.engine}",
                f"set parallel.engine=auto, or launch without {option}",
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
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        return _read_fsdp_request(environment)
    if environment.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return AccelerateRequest()
    file = environment.get(_PREFIX + "CONFIG_FILE")
    named = file if file and file != "none" else None
    asked = {
        "parallel.zero_stage": environment.get(_PREFIX + "ZERO_STAGE"),
        "optimizer.clip_norm": environment.get("ACCELERATE_GRADIENT_CLIPPING"),
        "precision": environment.get("ACCELERATE_MIXED_PRECISION"),
    }
    # with a file, accelerate exports its own defaults beside it (mixed precision "no"): then the file speaks, not they
    numbers = {} if named else _given(asked)
    return AccelerateRequest(
        uses_deepspeed=True, config_file=named, numbers=numbers, unsupported=_unsupported(environment, _NOT_HERE)
    )


def _read_fsdp_request(environment: Mapping[str, str]) -> AccelerateRequest:
    unsupported = dict(_unsupported(environment, _NOT_IN_FSDP))
    if environment.get("FSDP_VERSION", "1") != "2":
        unsupported = {"FSDP_VERSION = 1, its default": "FSDP2: add --fsdp_version 2"}  # its other options differ
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        unsupported["ACCELERATE_USE_DEEPSPEED beside ACCELERATE_USE_FSDP"] = "one of them"
    recomputes = environment.get("FSDP_ACTIVATION_CHECKPOINTING") == "true"
    asked = {
        "precision": environment.get("ACCELERATE_MIXED_PRECISION"),
        "execution.recomputation": "full" if recomputes else None,
    }
    return AccelerateRequest(uses_fsdp=True, numbers=_given(asked), unsupported=unsupported)


def _unsupported(environment: Mapping[str, str], idle: Mapping[str, tuple[str, ...]]) -> Mapping[str, str]:
    return {
        f"{name} = {environment[name]}": " or ".join(values)
        for name, values in idle.items()
        if environment.get(name, values[0]) not in values
    }


def _given(asked: Mapping[str, str | None]) -> Mapping[str, str]:
    return {key: value for key, value in asked.items() if value and value not in ("none", "no")}


def _run_value(config: RunConfig, key: str) -> object:
    section, _, name = key.partition(".")
    value = getattr(config, section)
    return getattr(value, name) if name else value


def _canonical(value: object) -> object:
    try:
        return float(str(value))
    except ValueError:
        return str(value)

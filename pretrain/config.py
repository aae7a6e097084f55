"""The run configuration: every key of a run YAML, its unit, default and meaning.

Reads YAML and dotted overrides, reports all problems at once, and writes the resolved copy. Says nothing about which
features work together (compatibility.py) nor what numbers follow from it (batch_plan.py, models/).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pretrain.errors import ConfigError, Problem

Precision = Literal["fp32", "bf16", "fp16"]
EngineName = Literal["auto", "plain", "zero", "pipeline", "accelerate"]
Recomputation = Literal["none", "full"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]


class Section(BaseModel):
    """A group of keys: unknown keys are errors, values are not coerced, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(BaseModel):
    """A `transformers` causal LM: `model_type` or `preset` or `weights`, and any field of that configuration."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model_type: str | None = None
    preset: str | None = None
    weights: str | None = None  # a Hugging Face folder: architecture and starting weights come from it

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if sum(source is not None for source in (self.model_type, self.preset, self.weights)) != 1:
            raise ValueError("exactly one of model_type, preset, weights must be given")
        return self

    @property
    def fields(self) -> dict[str, Any]:
        """The given fields of the `transformers` configuration, without the key that names the source."""
        return dict(self.__pydantic_extra__ or {})


class Source(Section):
    """One corpus of a mixture."""

    path: str
    weight: float = Field(default=1.0, gt=0)  # share of the samples, relative to the other sources' weights
    name: str | None = None  # shown in reports; the folder's name where not given


class DataSection(Section):
    """What to read."""

    train: str | list[Source]
    validation: dict[str, str] = Field(default_factory=dict)  # name -> dataset folder
    tokenizer: str | None = None  # folder; its hash must equal the datasets'; default: the one kept with the data
    verify: Literal["sizes", "hashes"] = "sizes"  # what is checked of every shard before the first step
    workers: int = Field(default=2, ge=0)  # threads that read ahead
    prefetch_micro_batches: int = Field(default=16, ge=1)

    @property
    def sources(self) -> list[Source]:
        """The training corpora; a single folder is a mixture of one."""
        return [Source(path=self.train)] if isinstance(self.train, str) else list(self.train)


class RampStage(Section):
    """A smaller global batch at the start of training."""

    until_tokens: int = Field(gt=0)  # this stage ends once so many tokens were seen
    global_batch_size: int = Field(gt=0)  # rows


class BatchSection(Section):
    """How many tokens make a step."""

    sequence_length: int = Field(gt=0)  # tokens
    micro_batch_size: int = Field(gt=0)  # rows, one forward of one rank
    global_batch_size: int = Field(gt=0)  # rows, one step of the whole job
    ramp: list[RampStage] = Field(default_factory=list)


class OptimizerSection(Section):
    """How a gradient becomes an update."""

    name: Literal["adamw"] = "adamw"
    learning_rate: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)  # on matrices only; see optimization/parameter_groups.py
    clip_norm: float | None = Field(default=1.0, gt=0)  # global L2 norm; null: no clipping


class ScheduleSection(Section):
    """The learning-rate multiplier by step."""

    name: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "cosine"
    total_steps: int | None = Field(default=None, gt=0)  # exactly one of total_steps, total_tokens
    total_tokens: int | None = Field(default=None, gt=0)
    warmup_steps: int | None = Field(default=None, ge=0)  # at most one of warmup_steps, warmup_tokens
    warmup_tokens: int | None = Field(default=None, ge=0)
    decay_fraction: float = Field(default=0.2, ge=0, le=1)  # wsd: share of all steps spent decaying at the end
    final_fraction: float = Field(default=0.1, ge=0, le=1)  # linear, cosine, wsd: multiplier at the last step

    @model_validator(mode="after")
    def _one_unit(self) -> ScheduleSection:
        if (self.total_steps is None) == (self.total_tokens is None):
            raise ValueError("exactly one of total_steps, total_tokens must be given")
        if self.warmup_steps is not None and self.warmup_tokens is not None:
            raise ValueError("at most one of warmup_steps, warmup_tokens can be given")
        return self


class LossSection(Section):
    """What is minimised: cross-entropy, mean over the target tokens of the global batch."""

    z_loss: float = Field(default=0.0, ge=0)  # weight of mean(logsumexp(logits)^2)
    chunk_tokens: int = Field(default=1024, gt=0)  # tokens whose logits exist at one time


class ParallelSection(Section):
    """How ranks share the work. Sizes multiply: world = data x tensor x pipeline x sequence."""

    engine: EngineName = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 1
    tensor: int = Field(default=1, ge=1)  # ranks
    pipeline: int = Field(default=1, ge=1)  # ranks
    sequence: int = Field(default=1, ge=1)  # ranks
    expert: int = Field(default=1, ge=1)  # ranks
    deepspeed_config: str | None = None  # a file of DeepSpeed-only keys, such as ds_configs/zero2.json


class ExecutionSection(Section):
    """How the same mathematics is computed."""

    attention: Attention = "auto"  # auto: flash-attn where it is installed and the device has it, else sdpa
    compile: bool = False  # torch.compile, layer by layer
    recomputation: Recomputation = "none"  # activation checkpointing: full recomputes every layer in backward


class CheckpointSection(Section):
    """When state is saved, and what is kept."""

    every_steps: int | None = Field(default=None, gt=0)  # null: only at the end and when told to stop
    keep_last: int = Field(default=3, ge=1)
    keep_best: int = Field(default=1, ge=0)  # by the first validation set's loss


class EvaluationSection(Section):
    """When and how much is validated."""

    every_steps: int | None = Field(default=None, gt=0)  # null: only at the end
    max_rows: int | None = Field(default=None, gt=0)  # rows of each set; null: all of it
    early_stopping_patience: int | None = Field(default=None, gt=0)  # evaluations without a better loss


class ReportingSection(Section):
    """Where numbers go besides metrics.jsonl."""

    every_steps: int = Field(default=1, ge=1)
    mlflow: bool = True
    mlflow_uri: str | None = None  # null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder
    mlflow_experiment: str = "athanor"
    tensorboard: bool = True
    wandb: bool = False
    wandb_mode: Literal["offline", "online"] = "offline"  # offline: files in the run folder, sent later by `wandb sync`
    console: bool = True


class GuardSection(Section):
    """What happens when a step goes wrong."""

    on_non_finite: Literal["skip", "stop"] = "skip"
    max_skipped_in_a_row: int = Field(default=10, ge=1)  # then the run ends as diverged
    on_spike: Literal["ignore", "warn"] = "warn"


class RunConfig(Section):
    """All of one run. Sections not given take their defaults."""

    name: str
    run_folder: str | None = None  # null: runs/<name> below the current folder
    seed: int = Field(default=0, ge=0)
    model: ModelSection
    data: DataSection
    batch: BatchSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    loss: LossSection = LossSection()
    precision: Precision = "bf16"
    parallel: ParallelSection = ParallelSection()
    execution: ExecutionSection = ExecutionSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    reporting: ReportingSection = ReportingSection()
    guard: GuardSection = GuardSection()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run_folder) if self.run_folder else Path("runs") / self.name


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run YAML and apply `section.key=value` overrides (values are YAML).

    Raises:
        ConfigError: with every problem of the file and the overrides, spelling suggestions included.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.safe_load(text) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(Problem(f"{path}: {error}", "a readable YAML file", "check the path and the file")) from error
    if not isinstance(values, dict):
        raise ConfigError(
            Problem(f"{path} holds a {type(values).__name__}", "a mapping of sections", "see launch/recipes")
        )
    problems = [problem for override in overrides if (problem := _apply_override(values, override))]
    try:
        config = RunConfig.model_validate(_tuples(values))
    except ValidationError as error:
        raise ConfigError(*problems, *_problems(error)) from error
    if problems:
        raise ConfigError(*problems)
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration, defaults included, as YAML that `load_config` reads back equal."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def _apply_override(values: dict[str, Any], override: str) -> Problem | None:
    path, separator, raw = override.partition("=")
    if not separator or not path:
        return Problem(
            f"override {override!r}", "section.key=value", "write, for example, optimizer.learning_rate=3e-4"
        )
    *sections, key = path.split(".")
    target = values
    for section in sections:
        inner = target.setdefault(section, {})
        if not isinstance(inner, dict):
            return Problem(f"override {override!r}: {section} is not a section", "section.key=value", "check the name")
        target = inner
    try:
        target[key] = _number(yaml.safe_load(raw))
    except yaml.YAMLError as error:
        return Problem(f"override {override!r}: {error}", "a YAML value", "quote the value")
    return None


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _tuples(value: Any) -> Any:
    """Strict validation wants a float where YAML gives text like 1e-3, and a tuple for a pair."""
    if isinstance(value, dict):
        return {
            key: tuple(inner) if key == "betas" and isinstance(inner, list) else _tuples(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_tuples(inner) for inner in value]
    return _number(value)


def _problems(error: ValidationError) -> Iterator[Problem]:
    for fault in error.errors():
        place = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            yield _unknown_key(fault["loc"])
        elif fault["type"] == "missing":
            yield Problem(f"{place} is not given", "a value", f"add {place}: to the file")
        else:
            found = f"{place or 'the run'}: {fault['msg']}"
            shown = "" if isinstance(fault["input"], dict) else f" (found {fault['input']!r})"
            allowed = str(fault.get("ctx", {}).get("expected", "see pretrain/config.py"))
            yield Problem(found + shown, allowed, f"change {place or 'the file'}")


def _unknown_key(location: tuple[int | str, ...]) -> Problem:
    *sections, key = location
    model: Any = RunConfig
    for section in sections:
        if isinstance(section, int) or section not in getattr(model, "model_fields", {}):
            continue
        annotation = model.model_fields[section].annotation
        candidates = (annotation, *get_args(annotation))
        nested = [
            arg for candidate in candidates for arg in (candidate, *get_args(candidate)) if hasattr(arg, "model_fields")
        ]
        model = nested[0] if nested else model
    known = list(model.model_fields)
    near = difflib.get_close_matches(str(key), known, n=1)
    place = ".".join(map(str, location))
    change = f"did you mean {'.'.join([*map(str, sections), near[0]])}?" if near else f"remove {place}"
    return Problem(f"unknown key {place}", ", ".join(known), change)

"""The run configuration: every key of a run YAML, its unit, default and meaning.

Reads YAML and dotted overrides, reports all problems at once, and writes the resolved copy. Says nothing about which
features work together (compatibility.py) nor what numbers follow from it (batch_plan.py, models/).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from pretrain.config_changes import apply_change, sections_of, without_empty_sections
from pretrain.config_data import DataSection
from pretrain.config_files import read_extended
from pretrain.config_problems import problems_of, without_faults
from pretrain.config_section import Section
from pretrain.errors import ConfigError, Problem
from pretrain.yaml_text import write_yaml

EXAMPLE = "optimizer.learning_rate=3e-4"  # of an override

Precision = Literal["fp32", "bf16", "fp16"]
EngineName = Literal["auto", "plain", "zero", "pipeline", "accelerate"]
Recomputation = Literal["none", "full", "selective"]
Offload = Literal["none", "cpu", "nvme"]
Attention = Literal["auto", "flash_attention_2", "varlen", "sdpa", "eager"]


class LoraSection(Section):
    """Low-rank adapters beside frozen weights: what is trained in their place (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)  # an adapter's product counts alpha / rank times
    targets: list[str] | None = None  # names of linears, such as q_proj; null: all linears of the layers
    dropout: float = Field(default=0.0, ge=0, lt=1)  # of what adapters read


class ModelSection(Section):
    """A `transformers` causal LM: `model_type` or `preset` or `weights`, and any field of that configuration."""

    model_config = ConfigDict(extra="allow")

    model_type: str | None = None
    preset: str | None = None
    # a Hugging Face folder, or what `pretrain import` made of one: architecture and starting weights come from it
    weights: str | None = None
    lora: LoraSection | None = None  # train adapters beside the weights of an imported folder; null: all weights

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """See Section."""
        sources = ("model_type", "preset", "weights")
        named = [f"model.{source}" for source in sources if given.get(source) is not None]
        if len(named) != 1:
            found = " and ".join(named) + " are both given" if named else "the model section names no model"
            yield Problem(
                found,
                "exactly one of model.model_type, model.preset, model.weights",
                "keep one of them" if named else "add, for example, model.preset=gpt2-125m",
            )
        if given.get("lora") is not None and given.get("weights") is None:
            yield Problem(
                "model.lora is given, and no weights that adapters could be trained beside",
                "model.weights: a folder that `pretrain import` wrote",
                "import a model and set model.weights, or leave model.lora out",
            )

    @property
    def fields(self) -> dict[str, Any]:
        """The given fields of the `transformers` configuration, without the key that names the source."""
        return dict(self.__pydantic_extra__ or {})


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


Decay = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Decay, Decay], BeforeValidator(lambda pair: tuple(pair) if isinstance(pair, list) else pair)]


class OptimizerSection(Section):
    """How a gradient becomes an update."""

    name: Literal["adamw"] = "adamw"
    learning_rate: float = Field(gt=0)
    betas: Betas = (0.9, 0.95)  # decay of the running mean of the gradient and of its square
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
    stop_at_step: int | None = Field(default=None, gt=0)  # save and end here, to go on later; null: at the last step
    decay_fraction: float = Field(default=0.2, ge=0, le=1)  # wsd: share of all steps spent decaying at the end
    final_fraction: float = Field(default=0.1, ge=0, le=1)  # linear, cosine, wsd: multiplier at the last step

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """See Section."""
        total, warmup = (
            [f"schedule.{name}_{unit}" for unit in ("steps", "tokens") if given.get(f"{name}_{unit}") is not None]
            for name in ("total", "warmup")
        )
        if len(total) != 1:
            found = " and ".join(total) + " are both given" if total else "the schedule has no length"
            change = "keep one of them" if total else "add, for example, schedule.total_steps=1000"
            yield Problem(found, "exactly one of schedule.total_steps, schedule.total_tokens", change)
        if len(warmup) > 1:
            found = " and ".join(warmup) + " are both given"
            yield Problem(found, "at most one of schedule.warmup_steps, schedule.warmup_tokens", "keep one of them")


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
    expert: int = Field(default=1, ge=1)  # of the data ranks, those that share a model's experts
    pipeline_schedule: Literal["1f1b", "dualpipev"] = "1f1b"  # order of forwards and backwards in a pipeline
    data_parallel: Literal["replicate", "shard"] = "replicate"  # accelerate engine: DDP, or FSDP2
    offload_optimizer: Offload = "none"  # where fp32 weights and moments lie between steps
    offload_parameters: Offload = "none"  # stage 3: where the shards of the weights lie
    offload_folder: str | None = None  # nvme: a folder on each node's fast disk
    deepspeed_config: str | None = None  # a file of DeepSpeed-only keys, such as ds_configs/zero2.json

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """See Section."""
        wants_disk = "nvme" in (given.get("offload_optimizer"), given.get("offload_parameters"))
        if wants_disk and given.get("offload_folder") is None:
            yield Problem(
                "offload to nvme names no folder",
                "parallel.offload_folder: a folder on each node's fast disk",
                "add, for example, parallel.offload_folder=/local/offload",
            )

    @field_validator("zero_stage", mode="before")
    @classmethod
    def _no_truth_value(cls, value: object) -> object:
        return str(value).lower() if isinstance(value, bool) else value  # Python takes true for 1


class ExecutionSection(Section):
    """How the same mathematics is computed."""

    # auto: the first that can run of flash-attn (a package), varlen (torch's own kernel; CUDA, half precision), sdpa
    attention: Attention = "auto"
    compile: bool = False  # torch.compile, layer by layer
    kernels: Literal["torch", "liger"] = "torch"  # liger: its fused norms, feed-forwards and rotary embedding, on GPUs
    # activation checkpointing: full runs layers again in backward, selective all of a layer but its attention
    recomputation: Recomputation = "none"
    recompute_every: int = Field(default=1, ge=1)  # recompute only in each so many-th layer, 1 is all of them

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """See Section."""
        if given.get("recompute_every", 1) != 1 and given.get("recomputation", "none") == "none":
            yield Problem(
                f"execution.recompute_every is {given['recompute_every']}, but nothing is recomputed",
                "execution.recomputation full or selective beside it",
                "set execution.recomputation=full, or leave execution.recompute_every out",
            )


class CheckpointSection(Section):
    """When state is saved, and what is kept."""

    every_steps: int | None = Field(default=None, gt=0)  # null: only at the end and when told to stop
    asynchronous: bool = True  # copy the state to the host's memory, and write it behind training
    canary: bool = True  # keep the loss of a few rows, and refuse to go on where it is another after loading
    keep_last: int = Field(default=3, ge=1)
    keep_every_steps: int | None = Field(default=None, gt=0)  # keep all checkpoints of these steps; null: of none
    keep_best: int = Field(default=1, ge=0)  # by best_metric
    # its name in metrics.jsonl, such as tasks/NAME/acc; for early stopping as well; null: first validation set's loss
    best_metric: str | None = None
    best_mode: Literal["min", "max"] | None = None  # null: min for losses, perplexities and bits per byte, else max
    local_folder: str | None = None  # on this node's own disk, instead of the run folder; one node only
    durable: str | None = None  # folder or URL (s3://...) of this run alone for copies; null: none, or the run folder
    durable_every_steps: int | None = Field(default=None, gt=0)  # null: only the last checkpoint is copied

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """See Section."""
        if given.get("durable_every_steps") and not (given.get("durable") or given.get("local_folder")):
            yield Problem(
                "checkpoint.durable_every_steps is given, and nothing is copied anywhere",
                "checkpoint.durable or checkpoint.local_folder beside it",
                "add, for example, checkpoint.durable=s3://bucket/run, or leave it out",
            )


class EvaluationSection(Section):
    """When and how much is validated."""

    every_steps: int | None = Field(default=None, gt=0)  # null: only at the end
    max_rows: int | None = Field(default=None, gt=0)  # rows of each set; null: all of it
    early_stopping_patience: int | None = Field(default=None, gt=0)  # evaluations without a better best_metric
    tasks: list[str] = Field(default_factory=list)  # of lm-evaluation-harness (extra eval), or task files
    task_folder: str | None = None  # of task files; they may run code that lies beside them
    tasks_every_steps: int | None = Field(default=None, gt=0)  # null: whenever there is validation
    task_documents: int | None = Field(default=None, gt=0)  # the first ones of each task; null: all
    task_shots: int | None = Field(default=None, ge=0)  # examples before each question; null: as the task says

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """See Section."""
        others = ("task_folder", "tasks_every_steps", "task_documents", "task_shots")
        useless = [f"evaluation.{key}" for key in others if given.get(key) is not None]
        if useless and not given.get("tasks"):
            change = "add, for example, evaluation.tasks=[corpus_completion], or leave them out"
            yield Problem(f"{', '.join(useless)} without a task", "evaluation.tasks beside them", change)


class ReportingSection(Section):
    """Where numbers go besides metrics.jsonl."""

    every_steps: int = Field(default=1, ge=1)
    # null: never; costs a pass over weights and moments, at those of these steps that have a line
    update_ratios_every_steps: int | None = Field(default=None, ge=1)
    mlflow: bool = True
    mlflow_uri: str | None = None  # null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder
    mlflow_experiment: str = "athanor"
    tags: dict[str, str] = Field(default_factory=dict)  # of the MLflow run
    tensorboard: bool = True
    wandb: bool = False
    wandb_mode: Literal["offline", "online"] = "offline"  # offline: files in the run folder, sent later by `wandb sync`
    console: bool = True


class GuardSection(Section):
    """What happens when a step goes wrong."""

    # skip: leave the weights as they are, and roll back once too many steps in a row were skipped
    on_non_finite: Literal["skip", "rollback", "stop"] = "skip"
    max_skipped_in_a_row: int = Field(default=10, ge=1)  # then the run rolls back
    # of the loss or the gradient norm; skip: an update whose gradient norm is a spike is not applied
    on_spike: Literal["ignore", "warn", "skip", "rollback"] = "warn"
    spike_score: float = Field(default=8.0, gt=0)  # robust deviations above the median of the window
    spike_window_steps: int = Field(default=128, ge=32)
    spikes_before_rollback: int = Field(default=3, ge=1)  # in a row
    rollback_margin_steps: int = Field(
        default=0, ge=0
    )  # before and after the bad ones, whose rows are left out as well
    max_rollbacks: int = Field(default=3, ge=0)  # to one checkpoint, then the run ends as diverged
    max_rollbacks_of_run: int = Field(default=30, ge=0)
    # compare what data and tensor ranks hold in common, bit by bit; null: never
    compare_replicas_every_steps: int | None = Field(default=1000, gt=0)
    find_slow_ranks_every_steps: int | None = Field(default=100, gt=0)  # and name them in the log; null: never
    slow_rank_ratio: float = Field(default=1.5, gt=1)  # own time a step, against the median of all ranks
    stop_margin_seconds: float = Field(default=60, ge=0)  # kept before a time limit besides the last step and save


class DeadlineSection(Section):
    """How long a phase may take before the run ends with the stacks of all ranks; null: for ever."""

    start_seconds: float | None = Field(default=3600, gt=0)  # opening data, building, restoring; also of a rollback
    first_step_seconds: float | None = Field(default=3600, gt=0)  # compiles kernels
    step_seconds: float | None = Field(default=900, gt=0)
    save_seconds: float | None = Field(default=1800, gt=0)  # for which training stands still; also of the end
    evaluation_seconds: float | None = Field(default=3600, gt=0)
    heartbeat_seconds: float = Field(default=5, gt=0)  # a sign of life of each rank, kept in memory by rank 0


class RunConfig(Section):
    """All of one run. Sections not given take their defaults."""

    name: str = Field(pattern=r"^[^/\\]*[^/\\.][^/\\]*$")  # a folder's name
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
    deadlines: DeadlineSection = DeadlineSection()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run_folder) if self.run_folder else Path("runs") / self.name


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run YAML, with the file it extends, and apply `section.key=value` overrides (values are YAML).

    Raises:
        ConfigError: with every problem of the file and the overrides, spelling suggestions included.
    """
    values = read_extended(Path(path))
    problems = [
        problem for override in overrides if (problem := apply_change(values, override, RunConfig, example=EXAMPLE))
    ]
    return _validate(without_empty_sections(values, RunConfig), problems)


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration, defaults included, as YAML that `load_config` reads back equal."""
    path.write_text(write_yaml(config.model_dump(mode="json")), encoding="utf-8")


def _validate(values: dict[str, Any], problems: list[Problem]) -> RunConfig:
    for name, section in sections_of(RunConfig).items():
        if isinstance(values.get(name), dict):
            problems += section.contradictions(values[name])
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        refusal = ConfigError(*problems, *problems_of(error, RunConfig))
        with suppress(ValidationError):
            refusal.remainder = RunConfig.model_validate(without_faults(values, error))
        raise refusal from error
    if problems:
        raise ConfigError(*problems)
    return config

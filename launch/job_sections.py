"""The sections of a job description that belong to one back end each, with their units, defaults and meaning.

What all back ends share is job.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from pretrain.config_section import Section
from pretrain.errors import Problem

PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9_./:@-]*[A-Za-z0-9])?$")]


class EnvironmentSection(Section):
    """Which variables the ranks get. Nothing else of the caller's environment travels."""

    allow: list[str] = []  # names of the caller's variables, or PREFIX_*; beside launch/travelling.py's list
    set: dict[str, str] = {}  # values that stand in this file: no secrets
    secrets_file: str | None = None  # NAME=VALUE lines, mode 0600, at this path on every node; read there, never copied


class DeepSpeedSection(Section):
    """`--on deepspeed`."""

    ssh: bool = True  # false: the same command is started on every node with --node-rank, and nothing goes over ssh
    ssh_config: str | None = None  # a file for ssh -F; null: the user's own


class AccelerateSection(Section):
    """`--on accelerate`."""

    zero_stage: Literal[0, 1, 2, 3] | None = None  # null: the run configuration says it; else both must say the same
    deepspeed_config: str | None = None  # a ds_configs file, in the place of zero_stage

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Iterator[Problem]:
        """See Section."""
        if given.get("zero_stage") is not None and given.get("deepspeed_config") is not None:
            yield Problem(
                "accelerate.zero_stage and accelerate.deepspeed_config are both given", "one of them", "keep one"
            )


class SlurmSection(Section):
    """`--on slurm`."""

    partition: PlainName | None = None
    account: PlainName | None = None
    qos: PlainName | None = None
    constraint: PlainName | None = None
    reservation: PlainName | None = None
    exclude: list[str] = []  # host names that the job must not get
    cpus_per_task: int | None = Field(None, ge=1)  # of the one task a node; null: the cluster's default
    exclusive: bool = False
    signal_seconds: int = Field(180, ge=10)  # how long before the time limit ranks are told to save
    most_requeues: int = Field(1000, ge=0)  # preemptions and time limits after which the job stays ended


class KubernetesSection(Section):
    """`--on kubernetes`."""

    kind: Literal["TrainJob", "JobSet"] = "TrainJob"
    namespace: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")] = "default"
    runtime: PlainName = "torch-distributed"  # of a TrainJob: the ClusterTrainingRuntime
    volume_claim: PlainName | None = None  # a claim that all pods can write, for data and run folders
    mount_path: str = "/workspace/runs"
    secret: PlainName | None = None  # a Secret whose keys become variables of the ranks
    cpu: PlainName | None = None  # of a pod, such as "96"
    memory: PlainName | None = None  # of a pod, such as 900Gi
    shared_memory: PlainName = "64Gi"  # /dev/shm of a pod
    infiniband: PlainName | None = None  # resource of the network plugin, such as rdma/rdma_shared_device_a
    node_selector: dict[str, str] = {}


class ComposeSection(Section):
    """`--on compose`: containers of this machine as nodes."""

    shared_memory: PlainName = "16gb"
    volumes: list[str] = []  # SOURCE:TARGET[:ro], besides the working folder
    infiniband: bool = False  # /dev/infiniband in every container


class SkyPilotSection(Section):
    """`--on skypilot`."""

    accelerators: PlainName | None = None  # null: A100-80GB:<gpus_per_node>
    cloud: PlainName | None = None
    region: PlainName | None = None
    use_spot: bool = False
    disk_gigabytes: int = Field(512, ge=50)
    setup: str = "bash docker/install.sh"  # run once on every node, in the working folder

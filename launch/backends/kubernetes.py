"""`--on kubernetes`: a Kubeflow TrainJob with its TrainingRuntime, or a plain JobSet.

One pod a node, one agent a pod; a failure that a new start cannot mend ends the job instead of restarting it.
"""

from __future__ import annotations

from typing import Any

from launch.backends.containers import IMAGE_FOLDER, agent_words, container_variables, require_image
from launch.backends.place import Place
from launch.job import Job
from launch.rendering import Command, RenderedFile, Rendering, yaml_for_others
from pretrain.errors import ENDINGS

CONTAINER = "node"
POINTLESS_TO_RESTART = [int(code) for code, ending in ENDINGS.items() if code and not ending.restart_helps]
TRAINER_LABEL = "trainer.kubeflow.org/trainjob-ancestor-step"


def render_kubernetes(job: Job, place: Place) -> Rendering:
    """Render the manifests, and the command that hands them in."""
    image = require_image(job, "kubernetes")
    variables = container_variables(job, place, "the manifest")
    build = _train_job if job.kubernetes.kind == "TrainJob" else _job_set
    text = "---\n".join(yaml_for_others(manifest) for manifest in build(job, image, variables))
    file = RenderedFile(path=place.status(job) / "kubernetes.yaml", text=text)
    words = ("kubectl", "apply", "--namespace", job.kubernetes.namespace, "--filename", str(file.path))
    return Rendering(
        files=(file,),
        commands=(Command(words=words),),
        environment=dict(place.environment),
        notes=(f"afterwards: kubectl logs --follow --namespace {job.kubernetes.namespace} NAME-OF-A-POD",),
    )


def _train_job(job: Job, image: str, variables: dict[str, str]) -> list[dict[str, Any]]:
    # Kubeflow's torch plugin sets PET_* in the container that is called as here; the agent reads them
    words = agent_words(
        job, node_rank="PET_NODE_RANK", address="from:PET_MASTER_ADDR", port="from:PET_MASTER_PORT", logs=_logs(job)
    )
    template = {
        "metadata": {"labels": {TRAINER_LABEL: "trainer"}},
        "spec": {**_failure_policy(), "backoffLimit": 0, "template": {"spec": _pod(job, image, words, variables)}},
    }
    runtime = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": _metadata(job) | {"labels": {"trainer.kubeflow.org/framework": "torch"}},
        "spec": {
            "mlPolicy": {"numNodes": job.nodes, "torch": {}},
            "template": {
                "spec": {**_restarts(job), "replicatedJobs": [{"name": "node", "replicas": 1, "template": template}]}
            },
        },
    }
    train_job = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(job),
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": job.name},
            "trainer": {
                "image": image,
                "numNodes": job.nodes,
                "numProcPerNode": job.gpus_per_node,
                "command": words,
                "resourcesPerNode": _resources(job),
            },
        },
    }
    return [runtime, train_job]


def _job_set(job: Job, image: str, variables: dict[str, str]) -> list[dict[str, Any]]:
    # JobSet's names: <set>-<replicated job>-<index>-<pod>.<set>
    first_pod = f"{job.name}-node-0-0.{job.name}"
    words = agent_words(job, node_rank="JOB_COMPLETION_INDEX", address=first_pod, logs=_logs(job))
    nodes = {
        "parallelism": job.nodes,
        "completions": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        **_failure_policy(),
        "template": {"spec": _pod(job, image, words, variables)},
    }
    return [
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": _metadata(job),
            "spec": {
                "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
                **_restarts(job),
                "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": nodes}}],
            },
        }
    ]


def _metadata(job: Job) -> dict[str, Any]:
    return {"name": job.name, "namespace": job.kubernetes.namespace}


def _logs(job: Job) -> str:
    return f"{job.kubernetes.mount_path}/{job.name}/launch" if job.kubernetes.volume_claim else job.logs


def _restarts(job: Job) -> dict[str, Any]:
    """The whole set starts again together, unless a pod said that this is pointless."""
    rule = {"name": "pointless", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {"failurePolicy": {"maxRestarts": job.restarts, "rules": [rule]}}


def _failure_policy() -> dict[str, Any]:
    codes = {"containerName": CONTAINER, "operator": "In", "values": POINTLESS_TO_RESTART}
    return {"podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": codes}]}}


def _pod(job: Job, image: str, words: list[str], variables: dict[str, str]) -> dict[str, Any]:
    options = job.kubernetes
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]  # noqa: S108 - a mount of the pod
    volumes: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": options.shared_memory}}
    ]
    if options.volume_claim:
        mounts.append({"name": "runs", "mountPath": options.mount_path})
        volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": options.volume_claim}})
    security: dict[str, Any] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    if options.infiniband:
        security["capabilities"]["add"] = ["IPC_LOCK"]
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": image,
        "workingDir": IMAGE_FOLDER,
        "command": [word.replace("$(", "$$(") for word in words],
        "env": [{"name": name, "value": value.replace("$(", "$$(")} for name, value in variables.items()],
        "resources": _resources(job),
        "securityContext": security,
        "volumeMounts": mounts,
    }
    if options.secret:
        container["envFrom"] = [{"secretRef": {"name": options.secret}}]
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": int(job.grace_seconds) + 15,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000},
        "containers": [container],
        "volumes": volumes,
    }
    if options.node_selector:
        pod["nodeSelector"] = options.node_selector
    return pod | ({"activeDeadlineSeconds": job.time_limit_seconds} if job.time_limit_seconds else {})


def _resources(job: Job) -> dict[str, Any]:
    options = job.kubernetes
    limits: dict[str, Any] = {}
    if job.accelerator == "gpu":
        limits["nvidia.com/gpu"] = job.gpus_per_node
    limits |= {name: value for name, value in (("cpu", options.cpu), ("memory", options.memory)) if value}
    if options.infiniband:
        limits[options.infiniband] = 1
    return {"limits": limits, "requests": dict(limits)}

"""Checks manifests: pods by the schemas of Kubernetes itself, TrainJob, TrainingRuntime and JobSet by their keys.

The keys are those of jobset.x-k8s.io/v1alpha2 and trainer.kubeflow.org/v1alpha1 as their projects' definitions of
August 2026 list them; values below them are looked at where Kubernetes has a schema for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

ANY: Mapping[str, Any] = {}  # keys that are not looked at
FAILURE_POLICY = {
    "maxRestarts": int,
    "restartStrategy": str,
    "rules": [
        {
            "name": str,
            "action": ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
            "onJobFailureReasons": ("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "PodFailurePolicy"),
            "targetReplicatedJobs": list,
        }
    ],
}
JOB_SET_SPEC = {
    "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool, "subdomain": str},
    "failurePolicy": FAILURE_POLICY,
    "successPolicy": {"operator": str, "targetReplicatedJobs": list},
    "startupPolicy": {"startupPolicyOrder": str},
    "suspend": bool,
    "ttlSecondsAfterFinished": int,
    "replicatedJobs": [{"name": str, "replicas": int, "groupName": str, "dependsOn": list, "template": ANY}],
}
SCHEMAS: Mapping[tuple[str, str], Any] = {
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): JOB_SET_SPEC,
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): {
        "mlPolicy": {"numNodes": int, "torch": ANY},
        "podGroupPolicy": ANY,
        "template": {"metadata": ANY, "spec": JOB_SET_SPEC},
    },
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): {
        "runtimeRef": {"apiGroup": str, "kind": ("TrainingRuntime", "ClusterTrainingRuntime"), "name": str},
        "trainer": {
            "image": str,
            "command": list,
            "args": list,
            "env": list,
            "numNodes": int,
            "numProcPerNode": int,
            "resourcesPerNode": {"limits": ANY, "requests": ANY, "claims": list},
        },
        "suspend": bool,
        "activeDeadlineSeconds": int,
        "runtimePatches": list,
    },
}


def faults(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest; empty where nothing is."""
    schema = SCHEMAS[manifest["apiVersion"], manifest["kind"]]
    found = [f"unknown key {key}" for key in set(manifest) - {"apiVersion", "kind", "metadata", "spec"}]
    found += _differences(manifest["spec"], schema, "spec")
    for template in _job_templates(manifest["spec"]):
        found += _job_faults(manifest, template)
    return found


def _differences(value: Any, schema: Any, place: str) -> Iterator[str]:
    if schema is ANY:
        return
    if isinstance(schema, Mapping):
        if not isinstance(value, Mapping):
            yield f"{place} is no mapping"
            return
        yield from (f"{place}.{key} is unknown" for key in value if key not in schema)
        for key in schema.keys() & value.keys():
            yield from _differences(value[key], schema[key], f"{place}.{key}")
    elif isinstance(schema, list):
        for number, entry in enumerate(value):
            yield from _differences(entry, schema[0], f"{place}[{number}]")
    elif isinstance(schema, tuple):
        yield from (f"{place}: {one!r}" for one in (value if isinstance(value, list) else [value]) if one not in schema)
    elif not isinstance(value, schema) or (schema is int and isinstance(value, bool)):
        yield f"{place} is {value!r}"


def _job_templates(spec: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    job_set = spec.get("template", {}).get("spec", spec)
    yield from (job["template"] for job in job_set.get("replicatedJobs", []))


def _job_faults(manifest: dict[str, Any], template: dict[str, Any]) -> Iterator[str]:
    """Check the Job that the controller will make, by Kubernetes' own schema."""
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": manifest["metadata"], "spec": template["spec"]}
    try:
        validator.validate(job, validator.latest_version(), strict=True)
    except validator.ValidationError as error:
        yield f"{'.'.join(str(part) for part in error.path)}: {error.message}"

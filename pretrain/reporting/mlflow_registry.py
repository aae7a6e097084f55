"""Puts an exported model into MLflow's model registry, as a version that knows the run it came from."""

from __future__ import annotations

from pathlib import Path

from pretrain.reporting.mlflow_run import MlflowIdentity, MlflowRun

ARTIFACT = "model"  # the folder of the run's artifacts


def register_model(identity: MlflowIdentity, folder: Path, name: str, *, step: int) -> str:
    """Upload a Hugging Face folder to the run and register it under a name, which is made where it is new.

    Returns:
        The new version.
    """
    from mlflow.exceptions import MlflowException

    run = MlflowRun.connect(identity)
    assert run is not None, "connect makes it"
    artifact = f"{ARTIFACT}/step-{step:08d}"
    run.client.log_artifacts(run.run_id, str(folder), artifact)
    try:
        run.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{run.artifact_uri}/{artifact}"
    version = run.client.create_model_version(name, source, run.run_id, tags={"athanor.step": str(step)})
    return str(version.version)

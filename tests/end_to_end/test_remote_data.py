"""A run on datasets behind an S3 URL equals the run on the folders; a storage that lost a shard ends it as bad data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data_tools.storages import s3_server
from tests.launch import jobs

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]  # six processes
URL = "s3://corpora/tiny"
DATA = 65


def test_train_check_and_evaluate_from_s3(tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="s3:// needs s3fs")
    boto3 = pytest.importorskip("boto3")
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    local = jobs.write_tiny_run(tmp_path / "local.yaml", data=tiny_dataset)
    words = [f"data.train={URL}", f"data.validation.main={URL}", f"data.cache={tmp_path / 'cache'}"]
    words.append(f"run_folder={tmp_path / 'remote'}")
    with s3_server() as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="corpora")
        jobs.run(["data-tools", "upload", tiny_dataset, URL], log=tmp_path / "upload.log")
        checked = jobs.run(["pretrain", "check", local, *words], log=tmp_path / "check.log")
        assert "is fetched when the run starts" in checked
        assert not (tmp_path / "cache").exists()
        jobs.run(["pretrain", "train", local], log=tmp_path / "local.log")
        jobs.run(["pretrain", "train", local, *words], log=tmp_path / "remote.log")
        assert jobs.losses(tmp_path / "remote") == jobs.losses(tmp_path / "local")
        assert "main" in jobs.run(["pretrain", "evaluate", tmp_path / "remote"], log=tmp_path / "evaluate.log")

        for entry in client.list_objects_v2(Bucket="corpora", Prefix="tiny/train/shard")["Contents"]:
            client.delete_object(Bucket="corpora", Key=entry["Key"])
        words[2:] = [f"data.cache={tmp_path / 'other'}", f"run_folder={tmp_path / 'lost'}"]
        written = jobs.run(["pretrain", "train", local, *words], log=tmp_path / "lost.log", expected=DATA)
        assert "is missing; the manifest says" in written
        assert "Traceback" not in written

"""The same merge from and into an object store: moto's server on this machine speaks S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("distributed", reason="needs Dask's distributed")
pytest.importorskip("s3fs", reason="needs s3fs")
moto = pytest.importorskip("moto.server", reason="needs moto[server]")

import s3fs  # noqa: E402

from peft_ref.checkpoints.cluster import merge_on  # noqa: E402
from peft_ref.cli import main  # noqa: E402
from peft_ref.errors import MergeError  # noqa: E402
from tests.checkpoints.test_cluster import bytes_of, cluster, made, planned  # noqa: E402, F401

SETTINGS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="module")
def store() -> Iterator[s3fs.S3FileSystem]:
    """Before the cluster: its workers take the address of the store from the environment."""
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SETTINGS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        yield s3fs.S3FileSystem(skip_instance_cache=True)
    server.stop()


def test_a_store_gets_the_bytes_that_threads_write(store: Any, cluster: Any, made: Path, tmp_path: Path) -> None:  # noqa: F811
    store.mkdir("models")
    store.put(str(made / "base"), "models/base", recursive=True)
    store.put(str(made / "adapter"), "models/adapter", recursive=True)
    where = ("s3://models/base", [("s3://models/adapter", 1.0)], "s3://models/out")
    merge_on(cluster.scheduler_address, *where, planned)
    store.invalidate_cache()
    store.get("models/out", str(tmp_path / "out"), recursive=True)
    assert bytes_of(tmp_path / "out") == bytes_of(made / "here")
    assert sorted(name.rpartition("/")[2] for name in store.ls("models")) == ["adapter", "base", "out"]
    with pytest.raises(MergeError, match="not empty"):
        merge_on(cluster.scheduler_address, *where, planned)


def test_what_lies_elsewhere_is_told_by_its_address_before_it_is_fetched(
    store: Any,
    cluster: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After the test above, which put it there."""
    call = ["merge", "s3://models/base", "s3://models/adapter", "-o", "s3://models/dry", "--scheduler", cluster.scheduler_address]
    assert main([*call, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("s3://models/base -> s3://models/dry: ")
    assert not store.exists("models/dry")
    assert main([*call[:1], "s3://nobody/base", *call[2:]]) == 1
    assert capsys.readouterr().err.startswith("peft-ref merge: s3://nobody/base cannot be read: ")

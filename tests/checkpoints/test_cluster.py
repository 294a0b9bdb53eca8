"""The same merge on a Dask cluster: the same bytes, also where a worker is killed in the middle, and over fsspec's addresses."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

distributed = pytest.importorskip("distributed", reason="needs Dask's distributed")

from peft_ref.checkpoints.cluster import merge_on  # noqa: E402
from peft_ref.checkpoints.engine import execute  # noqa: E402
from peft_ref.checkpoints.plan import Plan, Source  # noqa: E402
from peft_ref.checkpoints.planning import plan  # noqa: E402
from peft_ref.checkpoints.todo import Progress  # noqa: E402
from peft_ref.cli import main  # noqa: E402
from peft_ref.errors import ConfigError, FileFormatError, MergeError  # noqa: E402
from peft_ref.files.adapter import AdapterFile, AdapterModule, save_adapter  # noqa: E402
from peft_ref.files.config import AdapterConfig  # noqa: E402
from peft_ref.graph.targets import Targets  # noqa: E402
from peft_ref.layers import Linear  # noqa: E402
from peft_ref.methods.lora import LoRA, Params  # noqa: E402

LAYERS, SIZE, RANK = 24, 256, 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A real one: a scheduler, and two workers in processes of their own, that are not started again."""
    root = Path(__file__).resolve().parents[2]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "backends"), os.environ.get("PYTHONPATH", "")])
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50) as made:
        yield made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of as many shards as layers, and an adapter on all of them."""
    folder, rng = tmp_path_factory.mktemp("cluster"), np.random.default_rng(0)
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text('{"model_type": "llama"}')
    names = [f"model.layers.{n}.self_attn.q_proj" for n in range(LAYERS)]
    shards = {name: f"model-{n + 1:05d}-of-{LAYERS:05d}.safetensors" for n, name in enumerate(names)}
    for name, file in shards.items():
        save_file({f"{name}.weight": rng.normal(size=(SIZE, SIZE)).astype(np.float16)}, folder / "base" / file, {"format": "pt"})
    index = {"metadata": {"total_size": 2 * LAYERS * SIZE**2}, "weight_map": {f"{name}.weight": file for name, file in shards.items()}}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    method, layer = LoRA(r=RANK, lora_alpha=6), Linear(in_features=SIZE, out_features=SIZE)
    numbers = {
        name: Params(rng.normal(size=(RANK, SIZE)).astype(np.float32), rng.normal(size=(SIZE, RANK)).astype(np.float32), None)
        for name in names
    }
    modules = {name: AdapterModule(method, layer, params) for name, params in numbers.items()}
    config = AdapterConfig(method=method, targets=Targets(target_modules=["q_proj"]))
    save_adapter(folder / "adapter", AdapterFile(config=config, modules=modules))
    execute(plan(folder / "base", [Source(folder / "adapter")]), folder / "here", threads=1)
    return folder


def planned(base: Path, sources: Sequence[Source]) -> Plan:
    return plan(base, sources)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_workers_write_the_bytes_that_threads_write(cluster: Any, made: Path, tmp_path: Path) -> None:
    merge_on(cluster.scheduler_address, str(made / "base"), [(str(made / "adapter"), 1.0)], str(tmp_path / "out"), planned)
    assert bytes_of(tmp_path / "out") == bytes_of(made / "here")
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "something was left behind"


def test_addresses_are_fetched_and_stored_shard_by_shard(cluster: Any, made: Path, tmp_path: Path) -> None:
    base, adapter, out = (f"file://{path}" for path in (made / "base", made / "adapter", tmp_path / "out"))
    merge_on(cluster.scheduler_address, base, [(adapter, 1.0)], out, planned)
    assert bytes_of(tmp_path / "out") == bytes_of(made / "here")
    with pytest.raises(MergeError, match="not empty"):
        merge_on(cluster.scheduler_address, base, [(adapter, 1.0)], out, planned)


def test_an_adapter_for_another_model_is_one_error_and_nothing_is_left(cluster: Any, made: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for path in (made / "adapter").iterdir():
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes().replace(b"q_proj", b"k_proj"))
    with pytest.raises(Exception, match="k_proj"):
        merge_on(cluster.scheduler_address, str(made / "base"), [(str(tmp_path / "other"), 1.0)], str(tmp_path / "out"), planned)
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_no_scheduler_is_said(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_ref.checkpoints.cluster.PATIENCE", 1)
    with pytest.raises(ConfigError, match="no Dask scheduler"):
        merge_on("tcp://127.0.0.1:9", str(made / "base"), [(str(made / "adapter"), 1.0)], str(tmp_path / "out"), planned)


def test_the_verb_takes_a_scheduler(cluster: Any, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    call = ["merge", str(made / "base"), str(made / "adapter"), "-o", str(out), "--scheduler", cluster.scheduler_address, "--json"]
    assert main(call) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(out)
    assert bytes_of(out) == bytes_of(made / "here")


def test_a_killed_worker_changes_nothing(cluster: Any, made: Path, tmp_path: Path) -> None:
    """Last: the cluster has one worker less afterwards."""
    with distributed.Client(cluster) as client:
        client.amm.stop()
        workers = {address: info["pid"] for address, info in client.run(lambda: {"pid": os.getpid()}).items()}
        victim, pid = next(iter(workers.items()))
        killed: list[int] = []

        def kill(progress: Progress) -> None:
            if not killed and progress.shards < progress.of:
                killed.append(len(client.processing()[victim]))
                os.kill(pid, signal.SIGKILL)

        assert len(workers) == 2
        merge_on(cluster.scheduler_address, str(made / "base"), [(str(made / "adapter"), 1.0)], str(tmp_path / "out"), planned, tell=kill)
    assert killed
    assert killed[0] > 0, "the one that was killed had nothing to do"
    assert bytes_of(tmp_path / "out") == bytes_of(made / "here")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_address_wants_a_scheduler(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", f"file://{made}/base", str(made / "adapter"), "-o", "out"]) == 1
    assert "base is an address" in (said := capsys.readouterr().err)
    assert "Give --scheduler" in said


def test_an_address_where_nothing_lies_is_named(cluster: Any, made: Path, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"file://.*/nowhere cannot be read: FileNotFoundError"):
        merge_on(cluster.scheduler_address, f"file://{tmp_path}/nowhere", [(str(made / "adapter"), 1.0)], str(tmp_path / "out"), planned)


def test_a_dry_run_of_addresses_calls_them_so(cluster: Any, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = (f"file://{made}/{name}" for name in ("base", "adapter"))
    assert main(["merge", base, adapter, "-o", "file:///out", "--scheduler", cluster.scheduler_address, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["base"], told["out"], told["adapters"][0]["folder"]) == (base, "file:///out", adapter)

"""Modules beside a run's file, in processes of Ray that started elsewhere and on other nodes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from elpo_ray.cluster.cluster import Cluster
from elpo_ray.cluster.user_code import UserCode
from elpo_ray.config import Config, TaskConfig
from elpo_ray.config.model import ModelConfig
from elpo_ray.config.run import ClusterConfig

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    project = tmp_path / "project"
    project.mkdir()
    (project / "price_list.py").write_text(
        "from pathlib import Path\n"
        "def price():\n"
        "    return int((Path(__file__).parent / 'price.txt').read_text())\n"
    )
    (project / "price.txt").write_text("7")
    (project / "weights.bin").write_bytes(b"x" * (2 << 20))
    return project


@pytest.fixture
def head(tmp_path: Path) -> Iterator[str]:
    """The address of a Ray whose processes start in another folder than this one."""
    code = (
        "import ray, sys\n"
        "own = {'_temp_dir': sys.argv[1], '_node_ip_address': '127.0.0.1'}\n"
        "ray.init('local', include_dashboard=False, num_cpus=1, **own)\n"
        "print('address', ray.get_runtime_context().gcs_address, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with tempfile.TemporaryDirectory(prefix="um", dir="/tmp", ignore_cleanup_errors=True) as temp:
        process = subprocess.Popen(
            [sys.executable, "-c", code, temp], cwd=tmp_path, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            yield next(line.split()[1] for line in lines if line.startswith("address"))
        finally:
            process.communicate(timeout=60)


def config(folder: Path, address: str | None = None) -> Config:
    return Config(
        task=TaskConfig(modules=[str(folder)]),
        model=ModelConfig(path="none"),
        cluster=ClusterConfig(gpus=False, address=address, dashboard=False),
    )


def on_a_worker(folder: str) -> Any:
    """On a worker: the price, where its module lies, the working directory, what lies beside."""

    def look() -> tuple[int, str, str, list[str]]:  # sent by value, unlike a function of this file
        UserCode().install([folder])
        import price_list  # type: ignore[import-not-found]

        place = Path(price_list.__file__)
        beside = sorted(path.name for path in place.parent.iterdir())
        return price_list.price(), str(place), os.getcwd(), beside

    task: Any = ray.remote(look)
    return ray.get(task.options(num_cpus=0).remote(), timeout=120)


def test_a_worker_of_a_local_ray_imports_them_from_their_folder(folder: Path) -> None:
    with Cluster(config(folder), learner=False, engines=False):
        price, place, where, _ = on_a_worker(str(folder))
    assert (price, place) == (7, str(folder / "price_list.py"))
    assert not Path(where).is_relative_to(folder)


def test_a_node_without_the_folder_gets_a_copy_without_large_files(folder: Path, head: str) -> None:
    with Cluster(config(folder, head), learner=False, engines=False):
        price, place, _, names = on_a_worker("/not/on/this/node")
        here = on_a_worker(str(folder))[1]
    assert price == 7
    assert re.search(r"/elpo_ray_modules/0/price_list\.py$", place), place
    assert {"price_list.py", "price.txt"} <= set(names) and "weights.bin" not in names
    assert here == place or here == str(folder / "price_list.py")


def test_a_second_ray_in_one_process_is_refused(folder: Path) -> None:
    with (
        Cluster(config(folder), learner=False, engines=False),
        pytest.raises(ValueError, match=r"Ray runs in this process already; call ray\.shutdown"),
    ):
        Cluster(config(folder))
    assert not ray.is_initialized()

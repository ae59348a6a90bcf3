"""What is said of GPUs that a run asks for, before anything starts on them."""

from __future__ import annotations

import re

import pytest

from elpo_ray.cluster import devices
from elpo_ray.cluster.devices import check_build, check_gpus
from elpo_ray.config import Config
from elpo_ray.config.run import ClusterConfig


def on_gpus(**cluster: object) -> Config:
    return Config(cluster=ClusterConfig(gpus=True, **cluster))  # type: ignore[arg-type]


def test_a_machine_without_gpus_is_told_from_one_with_too_few() -> None:
    config = on_gpus(rollout_workers=2, learner_ranks=2)
    check_gpus(config, 4)
    with pytest.raises(ValueError, match=r"4 GPUs asked for .* this machine has 3; lower cluster"):
        check_gpus(config, 3)
    with pytest.raises(ValueError, match=r"this machine has 0; run it on a machine") as none:
        check_gpus(config, 0)
    assert "cluster=local" in str(none.value) and "lower" not in str(none.value)
    with pytest.raises(ValueError, match="the Ray cluster has 0; run it in a Ray cluster with"):
        check_gpus(on_gpus(address="auto"), 0)


@pytest.mark.parametrize("build", ["2.13.0+cpu", "2.11.0+cpu"])
def test_packages_for_cpu_are_refused_on_a_machine_with_gpus(
    build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "version", lambda name: build)
    said = re.escape(f"cluster.gpus=True: torch {build} is built for CPU; make clean, then")
    with pytest.raises(ValueError, match=said):
        check_build(on_gpus())
    check_build(Config(cluster=ClusterConfig(gpus=False)))
    check_build(on_gpus(address="auto"))  # its machines have packages of their own
    monkeypatch.setattr(devices, "version", lambda name: build.replace("+cpu", "+cu130"))
    check_build(on_gpus())

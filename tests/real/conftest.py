"""What several tests start once: a run, an engine, ranks of a learner."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from transformers import Qwen2ForCausalLM

from elpo_ray.rollout.engine import Engine
from tests.real.engines import build_qwen2, publish, running
from tests.real.runs import Story, tell


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs keep the models of their cold starts."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Story:
    """A whole run; nobody changes its folder."""
    return tell(tmp_path_factory.mktemp("runs"), cache)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that ranks of a learner load."""
    from tests.real.ranks import build_model  # with the learner, which most tests here do not need

    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ranks of a learner leave things."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Qwen2ForCausalLM]:
    """The folder and the model that `engine` starts with."""
    folder = tmp_path_factory.mktemp("qwen2")
    return folder, build_qwen2(folder)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def running_engine(qwen2: tuple[Path, Qwen2ForCausalLM]) -> AsyncIterator[Engine]:
    async with running(qwen2[0]) as engine:
        yield engine


@pytest_asyncio.fixture(loop_scope="session")
async def engine(running_engine: Engine, qwen2: tuple[Path, Qwen2ForCausalLM]) -> Engine:
    """The one engine that tests share, with the weights of `qwen2` again. Its tests run in the
    session's event loop."""
    if running_engine.version:
        await publish(running_engine, qwen2[1])
    return running_engine

"""The model, the task's data and what runs the tool calls: can they be used as they are?"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from elpo_ray.config import Config
from elpo_ray.config.rollout import Preload
from elpo_ray.config.rules import require
from elpo_ray.doctor.finding import Finding, failure, ok, warning
from elpo_ray.doctor.network import hub_answers
from elpo_ray.models.folder import check_model_path, check_weights
from elpo_ray.runs.folder import run_of
from elpo_ray.tasks import make_task
from elpo_ray.tools.catalog import schemas
from elpo_ray.training.checks import check, check_model, check_prompts

HUB_TIMEOUT_S = 10.0


def model_files(path: str | None) -> Iterator[Finding]:
    """The files of a model folder, or whether a hub name can be had."""
    if path is None:
        yield ok("model", "the tiny one, built by the run")
        return
    check_model_path(path)
    folder = Path(path)
    if not folder.exists():
        yield from _hub(path)
        return
    run = run_of(folder)
    if run is not None:
        checkpoint = run.newest_checkpoint()
        yield ok("model", f"the newest weights of a run, {checkpoint or folder / 'model'}")
        return
    files = check_weights(folder)
    size = sum(file.stat().st_size for file in files)
    yield ok("model", f"{folder}: {len(files)} weight files, {size / 2**30:.2f} GiB")


def _hub(name: str) -> Iterator[Finding]:
    reachable = hub_answers()
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        yield ok("model", f"{name} is in this node's cache, {len(check_weights(folder))} files")
        return
    except LocalEntryNotFoundError:
        pass
    try:
        if not reachable:
            raise ConnectionError("no connection to it")
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except (HfHubHTTPError, OSError) as fault:
        reason = " ".join(str(fault).split())[:160]
        yield failure(
            "model",
            f"{name}: not in this node's cache, and the hub does not give it ({reason})",
            f"download it where there is a network (hf download {name}) and name the folder with "
            "model.path, or share the cache by HF_HOME",
        )
    else:
        yield warning(
            "model",
            f"{name}: not in this node's cache yet, the hub has it",
            f"download it before the job: hf download {name}",
        )


def data(config: Config) -> Iterator[Finding]:
    """Files and values that the schema alone cannot see, and the first problems themselves."""
    check(config)
    task = make_task(config.task, config.trainer.seed)
    task.train_problem(0)
    held_out = task.eval_problems(config.task.eval_problems)
    yield ok("data", f"task {config.task.name}: training problems, {len(held_out)} held out")


def template(config: Config, folder: Path) -> Iterator[Finding]:
    """The chat template of `folder` with the task's tools, which makes the round trip of every
    model, and the lengths of the prompts."""
    from elpo_ray.chat.template import Chat  # with transformers: seconds to import

    tools = schemas(config.task, config.sandbox)
    chat = Chat.from_folder(str(folder), tools, config.model)
    if chat.format is None:
        yield ok("chat template", "no tools: every turn is an answer")
    else:
        names = ", ".join(tool["function"]["name"] for tool in tools)
        parser = chat.format.parser
        yield ok("chat template", f"tools {names}: calls there and back in the format {parser}")
    check_prompts(config, make_task(config.task, config.trainer.seed), folder)
    yield ok("prompts", f"fit model.max_context={config.model.max_context}")


def architecture(config: Config, folder: Path) -> Iterator[Finding]:
    """Whether the learner can train the model, and how."""
    notice = check_model(config, folder)
    if notice is None:
        yield ok(
            "architecture", f"can be trained with learner.packing={config.learner.packing.value}"
        )
    else:
        yield warning("architecture", notice, "nothing: only the saving is lost")


def sandbox(config: Config) -> Iterator[Finding]:
    """A call in the sandbox that the run would have, seen at work."""
    from elpo_ray.tools.sandbox_host import sandbox_of
    from sandbox.results import SandboxUnavailable

    settings = dataclasses.replace(config.sandbox, preload=Preload.none)

    async def tier() -> str:
        box = sandbox_of(settings, config.cluster)
        try:
            session = await box.open()
            result = await session.call("1 + 1")
        finally:
            await box.close()
        require(result.value == "2", "sandbox", result, "see python -m sandbox.check")
        return result.isolation

    try:
        found = asyncio.run(tier())
    except SandboxUnavailable as fault:
        detail, _, remedy = " ".join(str(fault).split()).partition("; ")
        yield failure("sandbox", detail, f"{remedy or 'see docs/isolation.md'}")
        return
    wanted = settings.isolation.value
    if settings.allow_degraded and found == "weak":
        yield warning(
            "sandbox",
            f"tier {found}: code is not isolated",
            "only for code you trust; python -m sandbox.check says what is missing",
        )
    else:
        yield ok("sandbox", f"tier {found}, seen at work ({wanted} is asked for)")

"""The policy's sampler: vLLM's `AsyncLLM`, token ids in, turns out.

Invariants: ids are never re-tokenised (vLLM gets no tokenizer at all); every turn was sampled under
exactly one version of the weights and says which; no cached block outlives the version that
computed it (the cache is emptied at an update, and salted with the version besides).

vLLM is imported inside functions: it reads its environment, which `_launch` sets, when imported.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import forkserver
from multiprocessing.forkserver import ForkServer
from pathlib import Path
from typing import Any

from elpo_ray.config.model import ModelConfig, Precision
from elpo_ray.config.rollout import EngineConfig, Transfer
from elpo_ray.config.run import ClusterConfig
from elpo_ray.types import FinishReason, InfrastructureError, Sampling, Turn
from elpo_ray.weights.host import Inbox, checkpoint_shapes
from elpo_ray.weights.protocol import WireTensor

CPU_BATCHED_TOKENS = 4096
"""Least token budget of one engine step on CPU."""
CPU_BLOCK_SIZE = 32
"""Tokens of a cache block on CPU: vLLM's default of 128 is longer than an agent's turn, so most of
a shared prefix would be computed again."""
_SERVERS: dict[str, ForkServer] = {}
"""The servers of this process that vLLM's is forked from, by their environment."""


class Engine:
    """One vLLM engine. Everything but `generate` is called by one caller at a time."""

    def __init__(
        self,
        path: str | Path,
        model: ModelConfig,
        config: EngineConfig,
        cluster: ClusterConfig,
        seed: int,
    ) -> None:
        """`path` is a local Hugging Face folder, `config.transfer` anything but `auto`."""
        self._path = Path(path)
        self._model = model
        self._config = config
        self._seed = seed
        self._gpus = cluster.gpus
        self._sleeps = cluster.gpus and cluster.colocated
        self._host_transfer = config.transfer is Transfer.host
        self._threads = cluster.engine_threads
        self._stop_ids: list[int] = []
        self._llm: Any = None
        self._inbox: Inbox | None = None
        self._collecting = False
        """Between the beginning of an update and its loading (host memory)."""
        self._taking = asyncio.Lock()
        """Parts may come while another is being taken: they wait, as does `abandon_update`."""
        self._asleep = False
        self._ids = itertools.count()
        self.version = 0
        """Version of the weights now served; 0 = those of the folder."""

    # --- start and end ---

    async def start(self) -> None:
        """Load the model and start vLLM's process; returns when it can serve.

        Raises ValueError for a folder that names no end-of-turn token and for settings vLLM
        rejects, InfrastructureError if its process dies.
        """
        try:
            self._llm = await asyncio.to_thread(self._launch)
        except (RuntimeError, EOFError, ConnectionError) as error:
            raise InfrastructureError(f"vLLM did not start on {self._path}: {error}") from error
        await self._llm.update_weight_version(str(self.version))

    async def stop(self) -> None:
        """End vLLM's processes. Turns still being sampled fail with InfrastructureError."""
        llm, self._llm = self._llm, None
        if self._inbox is not None:
            self._inbox.close()
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)

    def end_turns_at(self, token_ids: Sequence[int]) -> None:
        """End turns at these tokens too: those of the chat template, some of which a folder may not
        name (the one after a call is not always the one after an answer)."""
        self._stop_ids = sorted({*self._stop_ids, *token_ids})

    def check(self) -> None:
        """Raise InfrastructureError if vLLM's process is gone, which nothing mends."""
        if self._llm is not None and self._llm.errored:
            raise InfrastructureError("vLLM's process has died")

    def _launch(self) -> Any:
        variables = self._variables()
        with _environment(variables):
            server = None if self._gpus else _fork_server(variables)
            from vllm.config import WeightTransferConfig
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            self._stop_ids = end_of_turn_ids(self._path)
            config, context = self._config, self._model.max_context
            platform: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization}
            if not self._gpus:
                platform = {
                    "kv_cache_memory_bytes": config.kv_cache_gib << 30,
                    "block_size": CPU_BLOCK_SIZE,
                    # vLLM's CPU runner dies on a seeded request whose prompt is cut in chunks
                    # ("CPU Generator does not use offset"): a step must hold any prompt whole.
                    "enable_chunked_prefill": False,
                    "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, context),
                }
            args = AsyncEngineArgs(
                model=str(self._path),
                skip_tokenizer_init=True,
                dtype="float32" if self._model.precision is Precision.fp32 else "bfloat16",
                max_model_len=context,
                seed=self._seed,
                tensor_parallel_size=config.tensor_parallel_size,
                distributed_executor_backend="mp" if config.tensor_parallel_size > 1 else "uni",
                max_num_seqs=config.max_num_seqs,
                enforce_eager=config.enforce_eager,
                enable_prefix_caching=True,
                scheduling_policy="priority",
                logprobs_mode="processed_logprobs",
                weight_transfer_config=WeightTransferConfig(backend=config.transfer.value),
                enable_sleep_mode=self._sleeps,
                generation_config="vllm",
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **platform,
            )
            with _forking_from(server):
                return AsyncLLM.from_engine_args(args)

    def _variables(self) -> dict[str, str]:
        """Environment of vLLM's processes."""
        variables = {
            "ELPO_RAY_ENGINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "PYTHONWARNINGS": "ignore",
            # vLLM's own default is fork, until it finds that CUDA is in use or Ray around it.
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }
        if not self._gpus:
            variables |= {
                # The worker in the engine's process instead of a third one: 1.7 times as fast.
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                # Threads neither pinned nor spinning: spinning ones run 5 times slower as soon
                # as other actors share the cores.
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": str(self._threads),
                "OMP_WAIT_POLICY": "PASSIVE",
                # Huge pages: new weights load in two thirds of the time.
                "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
            }
        elif self._model.precision is Precision.fp32:
            # Triton, whose kernel computes attention then, would multiply in tf32.
            variables["TRITON_F32_DEFAULT"] = "ieee"
        if self._config.transfer is Transfer.ipc:
            # The handles of the learner's memory, which arrive as a pickle.
            variables["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        return variables

    # --- sampling ---

    async def generate(self, prefix: Sequence[int], sampling: Sampling) -> Turn:
        """See `Policy`. Waits while weights are updated.

        At temperature 0 (greedy) log-probs and entropies are those of temperature 1. Raises
        ValueError if `prefix` leaves no room in the context, InfrastructureError if vLLM fails.
        """
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if len(prefix) >= self._model.max_context:
            raise ValueError(
                f"prefix of {len(prefix)} tokens: must be below "
                f"model.max_context={self._model.max_context}"
            )
        if self._llm is None:
            raise InfrastructureError("the engine is not running")
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            stop_token_ids=self._stop_ids,
            logprobs=1,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        prompt = tokens_input(list(prefix), cache_salt=f"weights-{self.version}")
        priority, number = 0 if sampling.warm else 1, str(next(self._ids))
        last = None
        try:
            async for output in self._llm.generate(prompt, params, number, priority=priority):
                last = output
        except (EngineDeadError, EngineGenerateError) as error:
            raise InfrastructureError(f"vLLM failed: {error!r}") from error
        if last is None or last.outputs[0].finish_reason not in ("stop", "length"):
            raise InfrastructureError("vLLM aborted the request")
        return _turn(last.outputs[0], last.num_cached_tokens or 0)

    # --- device sharing ---

    async def sleep(self) -> None:
        """Let turns in flight finish, hold back new ones, leave the GPU: weights to host memory,
        cache dropped. Weights can be updated meanwhile. On CPU nothing is moved."""
        if not self._asleep:
            await self._llm.sleep(level=1, mode="wait")
            self._asleep = True

    async def wake(self) -> None:
        """Take the GPU again, and the turns that were held back."""
        if self._asleep:
            await self._llm.wake_up()
            self._asleep = False

    # --- weights ---

    async def begin_update(self) -> None:
        """Let turns in flight finish, hold back new ones, empty the prefix cache."""
        if self._asleep:  # the cache is empty and stays away
            await self._llm.wake_up(["weights"])
        else:
            await self._llm.pause_generation(mode="wait", clear_cache=True)
        if self._host_transfer:
            self._inbox = self._inbox or Inbox(checkpoint_shapes(self._path))
            self._inbox.begin()
            self._collecting = True
        else:
            await self._llm.start_weight_update()

    async def receive(self, part: Sequence[WireTensor] | dict[str, Any]) -> None:
        """Take a part of the weights: a bucket in host memory, or vLLM's update info, whose tensors
        arrive by NCCL or IPC. Raises WeightSyncError on a bad bucket; the old weights stay."""
        if isinstance(part, dict):
            await self._update(part)
        else:
            assert self._inbox is not None and self._collecting, "receive() outside an update"
            async with self._taking:
                await asyncio.to_thread(self._inbox.accept, part)

    async def finish_update(self, version: int) -> None:
        """Serve the new weights as `version`.

        Raises WeightSyncError (host memory) if any are missing, InfrastructureError if vLLM fails,
        after which its weights are undefined and the engine must be restarted.
        """
        if self._inbox is not None and self._collecting:
            self._inbox.check_complete()
            self._collecting = False
            await self._llm.start_weight_update()
            for file in self._inbox.files:
                await self._update({"path": str(file)})
        await self._llm.finish_weight_update(str(version))
        self.version = version
        await self._resume()

    async def abandon_update(self) -> None:
        """Go on with the old weights after a failed or incomplete update (host memory).

        Does nothing once loading has begun: such an engine has finished, or is broken and stays
        paused."""
        async with self._taking:
            if self._collecting:
                self._collecting = False
                await self._resume()

    async def _resume(self) -> None:
        """Take up turns again after an update; a sleeping engine does so in `wake`."""
        if not self._asleep:
            await self._llm.resume_generation()

    async def join_transfer(self, init_info: dict[str, Any]) -> None:
        """Agree with the learner on a transfer by NCCL or IPC (GPU); `init_info` is vLLM's."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info))

    async def _update(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        try:
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info))
        except Exception as error:  # vLLM reports a failure in its process as a bare Exception
            raise InfrastructureError(f"vLLM could not load the weights: {error}") from error


def end_of_turn_ids(folder: Path) -> list[int]:
    """Token ids that end a turn: those of the generation config (else the model config) and the
    tokenizer's end-of-sequence token. Raises ValueError if the folder names none."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        eos = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        if eos is not None:
            ids.update([eos] if isinstance(eos, int) else eos)
            break
    if (folder / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        token_id = AutoTokenizer.from_pretrained(folder).eos_token_id
        ids.update([] if token_id is None else [token_id])
    if not ids:
        raise ValueError(
            f"model.path={str(folder)!r}: no end-of-turn token; set eos_token_id in config.json"
        )
    return sorted(ids)


def _turn(completion: Any, cached_tokens: int) -> Turn:
    """A turn from vLLM's completion, whose flat log-probs alternate token and entropy."""
    from elpo_ray.rollout.vllm_plugin import ENTROPY_ID

    columns, token_ids = completion.logprobs, completion.token_ids
    if len(columns.token_ids) != 2 * len(token_ids) or columns.token_ids[1] != ENTROPY_ID:
        raise InfrastructureError(
            "vLLM returned no entropies: its process has not loaded elpo_ray.rollout.vllm_plugin; "
            "install this package (pip install -e .) so that its entry point is found"
        )
    versions = {span.version for span in completion.weight_versions}
    assert len(versions) == 1, f"a turn under several weight versions: {versions}"
    return Turn(
        token_ids=tuple(token_ids),
        logprobs=tuple(columns.logprobs[0::2]),
        entropies=tuple(columns.logprobs[1::2]),
        finish=FinishReason(completion.finish_reason),
        weight_version=int(versions.pop()),
        cached_tokens=cached_tokens,
    )


def _fork_server(variables: dict[str, str]) -> ForkServer:
    """A process that imports vLLM and does nothing else, to fork vLLM's process from: it has the
    environment of this moment, and neither the threads nor the connections of this process, a Ray
    actor, of which no fork is safe. It is not the server that Python shares within a process, which
    others may have started with another environment. CUDA survives no fork: on GPUs vLLM spawns, so
    that a script which starts an engine there needs `if __name__ == "__main__":`."""
    server = _SERVERS.setdefault(str(sorted(variables.items())), ForkServer())
    server.set_forkserver_preload(["elpo_ray.rollout.vllm_core"])
    server.ensure_running()
    return server


@contextlib.contextmanager
def _forking_from(server: ForkServer | None) -> Iterator[None]:
    """Have vLLM, whose own setting knows fork and spawn only, start its process from `server`."""
    if server is None:
        yield
        return
    import vllm.v1.engine.utils

    utils: Any = vllm.v1.engine.utils
    before = utils.get_mp_context, forkserver.connect_to_new_process
    utils.get_mp_context = partial(multiprocessing.get_context, "forkserver")
    forkserver.connect_to_new_process = server.connect_to_new_process
    try:
        yield
    finally:
        utils.get_mp_context, forkserver.connect_to_new_process = before


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started inside; vLLM's own changes go too."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)

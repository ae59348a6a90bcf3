"""The part of this package that runs inside vLLM's processes, loaded by vLLM as a general plugin.

Three additions, in processes started by `engine.Engine` (others see an untouched vLLM):

* Exact entropies. vLLM returns log-probs of the top k only. Where one extra log-prob is asked for,
  the sampler returns the full-vocabulary entropy in its place, under the token id `ENTROPY_ID`.
  Both samplers are covered: `v1.sample.sampler` (V1 model runner, every CPU run) and
  `v1.worker.gpu.sample` (V2 model runner, the default where Triton drives a GPU).
* The weight-transfer backend `host`: full tensors in a safetensors file, for engines anywhere.
* An engine process ends when the process that owns it has died.

They reach into vLLM's internals, hence the check of its version.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import vllm
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.sampler import Sampler

SUPPORTED_VLLM = "0.32."
ENGINE_MARK = "ELPO_RAY_ENGINE"
"""Environment variable of the processes that apply this plugin: those of an `Engine`."""
HOST_BACKEND = "host"
ENTROPY_ID = -1
"""Token id under which a row's entropy is returned; no vocabulary contains it."""


def register() -> None:
    """Apply the plugin once to this process. Raises RuntimeError on another vLLM than ours."""
    if ENGINE_MARK not in os.environ:
        return
    if not vllm.__version__.startswith(SUPPORTED_VLLM):
        raise RuntimeError(
            f"vllm=={vllm.__version__}: elpo_ray.rollout.vllm_plugin changes vLLM's sampler and is "
            f"written for {SUPPORTED_VLLM}x; install that version"
        )
    if HOST_BACKEND in WeightTransferEngineFactory._registry:
        return
    WeightTransferEngineFactory.register_engine(HOST_BACKEND, HostWeightTransferEngine)
    patched = staticmethod(with_entropy_v1(Sampler.gather_logprobs))
    Sampler.gather_logprobs = patched  # type: ignore[method-assign]
    if current_platform.is_cuda_alike():  # torch's own question would start CUDA here
        from vllm.v1.worker.gpu.sample import sampler as sampler_v2

        patched_v2 = with_entropy_v2(sampler_v2.compute_topk_scores)  # type: ignore[attr-defined]
        sampler_v2.compute_topk_scores = patched_v2  # type: ignore[attr-defined]
    owner = multiprocessing.parent_process()  # the one that asked for this process, if forked too
    if owner is not None:
        threading.Thread(target=_die_with, args=(owner,), daemon=True).start()


def _die_with(owner: BaseProcess) -> None:
    """End this process with its owner: vLLM's engine process outlives a killed one."""
    owner.join()
    os._exit(1)


# --- entropy --------------------------------------------------------------------------------------


def entropy(logprobs: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of each row: [n, vocab] log-probs (-inf allowed) -> [n]."""
    rows: torch.Tensor = torch.special.entr(logprobs.exp()).sum(dim=-1)
    return rows


def with_entropy_v1(gather: Callable[..., LogprobsTensors]) -> Callable[..., LogprobsTensors]:
    """Wrap `Sampler.gather_logprobs`, which is given the whole rows of log-probs."""

    @wraps(gather)
    def gather_logprobs(
        logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor
    ) -> LogprobsTensors:
        if num_logprobs != 1:
            return gather(logprobs, num_logprobs, token_ids)
        sampled = logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
        return _columns(token_ids, sampled, entropy(logprobs))

    return gather_logprobs


def with_entropy_v2(compute: Callable[..., LogprobsTensors]) -> Callable[..., LogprobsTensors]:
    """Wrap `compute_topk_scores`, which is given the logits after temperature, top-k and top-p."""

    @wraps(compute)
    def compute_topk_scores(
        logits: torch.Tensor,
        num_logprobs: int,
        sampled_token_ids: torch.Tensor,
        cu_num_logits: Any = None,
        **kwargs: Any,
    ) -> LogprobsTensors:
        if num_logprobs != 1:
            return compute(logits, num_logprobs, sampled_token_ids, cu_num_logits, **kwargs)
        scores = compute(logits, 0, sampled_token_ids, cu_num_logits, **kwargs)
        # In slices: a whole [sequences, vocab] float32 copy would be outside vLLM's memory plan.
        entropies = [
            entropy(rows.log_softmax(-1, torch.float32)) for rows in torch.split(logits, 32)
        ]
        columns = _columns(sampled_token_ids, scores.logprobs[:, 0], torch.cat(entropies))
        return scores._replace(
            logprob_token_ids=columns.logprob_token_ids, logprobs=columns.logprobs
        )

    return compute_topk_scores


def _columns(
    token_ids: torch.Tensor, sampled: torch.Tensor, extra: torch.Tensor
) -> LogprobsTensors:
    """vLLM's two-column form: sampled token and its log-prob, `ENTROPY_ID` and the entropy."""
    ids = token_ids.to(torch.int32)
    return LogprobsTensors(
        logprob_token_ids=torch.stack((ids, torch.full_like(ids, ENTROPY_ID)), dim=1),
        logprobs=torch.stack((sampled, extra), dim=1),
        selected_token_ranks=torch.zeros_like(ids),
    )


# --- weights through host memory ----------------------------------------------------------------


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    """One part of the weights."""

    path: str
    """A safetensors file of full tensors under the checkpoint's names, readable by the worker."""


class HostWeightTransferEngine(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
    """Loads weights from files in host memory through vLLM's layerwise reload.

    On CPU vLLM multiplies with a packed copy of a linear layer's weights. The reload packs the
    layers anew that it reprocesses; the output head and the embedding are updated in place and
    keep multiplying with their old copy unless packed once more at the end. Experts are packed when
    their kernel is built and not again, so that a reload leaves them in the checkpoint's order,
    which the kernel would misread.
    """

    init_info_cls = HostInitInfo
    update_info_cls = HostUpdateInfo

    def init_transfer_engine(self, init_info: HostInitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: HostUpdateInfo) -> None:
        model: Any = self.model
        model.load_weights(load_file(update_info.path).items())

    def finish_weight_update(self) -> None:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)  # type: ignore[no-untyped-call]
        if self.device.type != "cpu":
            return
        for module in self.model.modules():
            weight = getattr(module, "weight", None)
            if hasattr(module, "cpu_linear") and weight is not None and weight.numel():
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)
            kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
            if kernel is not None and hasattr(module, "w13_weight"):
                kernel.fused_experts.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Nothing to release."""

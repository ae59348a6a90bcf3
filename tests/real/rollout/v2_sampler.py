"""vLLM's sampler of its second model runner on CPU, by Triton's interpreter, with our entropies.

A script, since the interpreter must be chosen before Triton is imported:
`python -m tests.real.rollout.v2_sampler` prints a JSON object.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
import triton.language
import vllm.triton_utils as triton_utils
from vllm.sampling_params import SamplingParams

triton_utils.triton, triton_utils.tl = triton, triton.language  # type: ignore[misc]
triton_utils.HAS_TRITON = True  # type: ignore[misc]

from vllm.v1.sample.ops import topk_topp_sampler  # noqa: E402
from vllm.v1.worker.gpu import buffer_utils  # noqa: E402
from vllm.v1.worker.gpu.sample import sampler as sampler_v2  # noqa: E402
from vllm.v1.worker.gpu.states import RequestState  # noqa: E402

from elpo_ray.rollout.vllm_plugin import ENTROPY_ID, with_entropy_v2  # noqa: E402

VOCAB = 700


@dataclass(frozen=True)
class Request:
    temperature: float
    top_p: float
    seed: int


REQUESTS = [
    Request(temperature, top_p, seed)
    for seed in range(6)
    for temperature, top_p in ((1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (0.0, 1.0))
]


def sampled(logits: torch.Tensor, requests: list[Request]) -> tuple[torch.Tensor, Any]:
    """Token ids and log-prob tensors of one step. Row i of `logits` is that of request i."""
    count = len(requests)
    states = RequestState(count, 64, 256, 0, VOCAB, torch.device("cpu"))
    config: Any = SimpleNamespace(reasoning_config=None)
    sampler = sampler_v2.Sampler(
        config, count, VOCAB, torch.device("cpu"), states, logprobs_mode="processed_logprobs"
    )
    for i, request in enumerate(requests):
        states.add_request(str(i), 3, [5, 6, 7], 0, 9)
        slot = states.req_id_to_index[str(i)]
        sampler.add_request(
            slot,
            SamplingParams(
                temperature=request.temperature, top_p=request.top_p, seed=request.seed, logprobs=1
            ),
        )
    states.apply_staged_writes()
    sampler.apply_staged_writes()
    slots = torch.tensor([states.req_id_to_index[str(i)] for i in range(count)], dtype=torch.int32)
    rows = torch.arange(count, dtype=torch.int32)
    ends = torch.arange(count + 1, dtype=torch.int32)
    lengths = torch.full((count,), 3, dtype=torch.int32)
    batch: Any = SimpleNamespace(
        num_reqs=count,
        expanded_idx_mapping=slots,
        idx_mapping=slots,
        idx_mapping_np=slots.numpy(),
        cu_num_logits=ends,
        cu_num_logits_np=ends.numpy(),
        expanded_local_pos=torch.zeros_like(rows),
        positions=torch.full((count,), 2, dtype=torch.int64),
        logits_indices=rows.long(),
        input_ids=torch.full((count,), 7, dtype=torch.int32),
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
    )
    output = sampler(logits.clone(), batch)
    return output.sampled_token_ids[:, 0], output.logprobs_tensors


def distribution(row: torch.Tensor, request: Request) -> torch.Tensor:
    """The log-probabilities that a token is drawn from; greedy: those of temperature 1."""
    logprobs = (row.double() / (request.temperature or 1.0)).log_softmax(-1)
    if request.top_p < 1:
        order = logprobs.argsort(descending=True)
        before = logprobs[order].exp().cumsum(-1) - logprobs[order].exp()
        logprobs[order[before >= request.top_p]] = -torch.inf
        logprobs = logprobs.log_softmax(-1)
    return logprobs


def errors(dtype: torch.dtype) -> dict[str, Any]:
    """Largest errors, and whether a seed decides the token, alone as in a crowd."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(len(REQUESTS), VOCAB)).to(dtype)
    ids, scores = sampled(logits, REQUESTS)
    lists = scores.to_cpu_nonblocking().tolists()
    logp, entropy = [], []
    for i, request in enumerate(REQUESTS):
        exact = distribution(logits[i], request)
        logp.append(abs(float(exact[ids[i]]) - float(lists.logprobs[i, 0])))
        terms = torch.special.entr(exact.exp())
        entropy.append(abs(float(terms.sum()) - float(lists.logprobs[i, 1])))
    alone = [int(sampled(logits[i : i + 1], [REQUESTS[i]])[0]) for i in range(4)]
    marks = np.asarray(lists.logprob_token_ids)
    greedy = [i for i, request in enumerate(REQUESTS) if request.temperature == 0]
    return {
        "logp": max(logp),
        "entropy": max(entropy),
        "alone_and_in_a_crowd": alone == ids[:4].tolist(),
        "marked": bool((marks[:, 1] == ENTROPY_ID).all() and (marks[:, 0] == ids.numpy()).all()),
        "greedy": bool((ids[greedy] == logits[greedy].argmax(-1)).all()),
        "different_tokens": len(set(ids.tolist())),
    }


def main() -> None:
    topk_topp_sampler.HAS_TRITON = False  # its kernel is beyond the interpreter: PyTorch instead
    buffer_utils.UvaBuffer = buffer_utils.NonUvaBuffer  # type: ignore[misc, assignment]
    compute = with_entropy_v2(sampler_v2.compute_topk_scores)  # type: ignore[attr-defined]
    sampler_v2.compute_topk_scores = compute  # type: ignore[attr-defined]
    report = {str(dtype): errors(dtype) for dtype in (torch.float32, torch.bfloat16)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()

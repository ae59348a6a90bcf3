"""A mini-batch of trees through the learner, with shared prefixes against flat."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.learner import Case, Variant, compare, grown
from elpo_ray.config.learner import AttentionBackend
from elpo_ray.learner.speed import mfu


def measure(*, tiny: bool, seconds: float) -> dict[str, Any]:
    """The best of some rounds. `mfu` counts no recomputed pass."""
    rng = np.random.default_rng(0)
    if tiny:
        torch.set_num_threads(1)  # seconds are processor time there, and idle threads spin
        backend, device = AttentionBackend.blocks, torch.device("cpu")
        case = Case("ELPO", "quickstart", [grown(rng, 60, (30, 20), 6, [3, 5, 4])], 8192)
    else:
        backend, device = AttentionBackend.paths, torch.device("cuda")
        case = Case("ELPO", "Qwen2.5-1.5B", [grown(rng, 600, (400, 200), 6, [3, 5, 4])], 32768)
    variants = [Variant("flat", backend, None), Variant("tree", backend, 0.0)]
    found = compare(case, variants, 3, device, seconds)
    tree, flat = found["tree"], found["flat"]
    peaks = {"tree_peak_gb": tree["peak_mb"] / 1e3, "flat_peak_gb": flat["peak_mb"] / 1e3}
    out = {
        "flat_s": flat["seconds"],
        "tree_s": tree["seconds"],
        "flat_tokens": flat["tokens"],
        "tree_tokens": tree["tokens"],
        "speedup": tree["speedup"],
        "speedup_predicted": found["speedup_predicted"],
        "share_of_predicted": tree["share_of_predicted"],
        "loss_error": tree["loss_error"],
        "grad_norm_error": tree["grad_norm_error"],
        **peaks,
    }
    if not tiny:
        for name, run in (("flat", flat), ("tree", tree)):
            out[f"{name}_mfu"] = mfu(run["tflops"] * 1e12 * run["seconds"], run["seconds"], 1)
    return out

"""Imports of vLLM's process on CPU, made once by the server that it is forked from (`engine`)."""

import gc

gc.disable()  # during the imports, a quarter of whose time it would take
import vllm.v1.engine.core  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401

import elpo_ray.rollout.vllm_plugin  # noqa: E402, F401

gc.enable()

"""Imports of vLLM's process on CPU, made once by the server that it is forked from (`engine`)."""

from elpo_ray.collector import importing

with importing():
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401

    import elpo_ray.vllm_plugin  # noqa: F401

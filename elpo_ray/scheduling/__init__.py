"""How inputs come to rollout workers and their trees come back: pulled, streamed, never lost.

A worker says how much room it has and gets as many inputs (`runner`); whatever completes goes to
the queue's owner at once (`jobs`); the queue knows who holds what, and hands the inputs of a dead
worker out again from where they were (`queue`). Knows no Ray: `cluster` carries the messages.
"""

from elpo_ray.scheduling.jobs import Job, Report, SetAside, WorkerUnusable
from elpo_ray.scheduling.queue import Batch, InputQueue, TreeBatch
from elpo_ray.scheduling.runner import JobRunner

__all__ = [
    "Batch",
    "InputQueue",
    "Job",
    "JobRunner",
    "Report",
    "SetAside",
    "TreeBatch",
    "WorkerUnusable",
]

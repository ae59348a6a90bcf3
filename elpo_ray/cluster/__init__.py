"""The only Ray: which actors there are, where they live, and how the driver speaks to them.

An actor is a plain class with what Ray adds: `LearnerActor` is a learner rank that publishes,
`SandboxActor` a sandbox host, `RolloutActor` holds one engine and the trees beside it. The driver
sees two groups with ordinary blocking methods (`LearnerGroup`, `RolloutGroup`). Every wait has a
deadline (`cluster.call_timeout_s`) whose miss names the actor and the phase (`waits`).
"""

from elpo_ray.cluster.cluster import Cluster
from elpo_ray.cluster.gauges import Gauges
from elpo_ray.cluster.learner import LearnerGroup
from elpo_ray.cluster.rollouts import RolloutGroup
from elpo_ray.cluster.waits import LearnerLost

__all__ = ["Cluster", "Gauges", "LearnerGroup", "LearnerLost", "RolloutGroup"]

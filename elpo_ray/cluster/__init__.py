"""The only Ray: which actors there are, where they live, and how the driver speaks to them.

Actors are thin: each holds one plain class and forwards to it (`actors`). The driver sees two
groups with ordinary blocking methods (`groups.LearnerGroup`, `rollouts.RolloutGroup`). Every wait
has a deadline (`cluster.call_timeout_s`) whose miss names the actor and the phase.
"""

from elpo_ray.cluster.cluster import Cluster
from elpo_ray.cluster.gauges import Gauges
from elpo_ray.cluster.groups import LearnerGroup, LearnerLost
from elpo_ray.cluster.rollouts import RolloutGroup

__all__ = ["Cluster", "Gauges", "LearnerGroup", "LearnerLost", "RolloutGroup"]

"""The learner: a Hugging Face causal LM under DeepSpeed, one `LearnerRank` a process."""

from elpo_ray.learner.backend import LearnerSettings, RankProcess
from elpo_ray.learner.loss import Objective
from elpo_ray.learner.rank import LearnerRank
from elpo_ray.learner.stats import UpdateStats

__all__ = ["LearnerRank", "LearnerSettings", "Objective", "RankProcess", "UpdateStats"]

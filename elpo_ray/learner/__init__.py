"""The learner: a Hugging Face causal LM under DeepSpeed, one `LearnerRank` a process."""

from elpo_ray.learner.backend import RankProcess
from elpo_ray.learner.rank import LearnerRank
from elpo_ray.learner.settings import LearnerSettings, Objective
from elpo_ray.learner.stats import UpdateStats

__all__ = ["LearnerRank", "LearnerSettings", "Objective", "RankProcess", "UpdateStats"]

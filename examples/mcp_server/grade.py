"""The reward: the last turn is the number of crates."""

from elpo_ray import Problem, Step


def exact(problem: Problem, steps: list[Step]) -> bool:
    return steps[-1].action_text.strip() == problem.ground_truth

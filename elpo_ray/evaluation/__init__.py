"""How good a model is: samples of held-out problems from the rollout stack, and their statistics.

`estimators` and `summary` are arithmetic on samples; `source` and `bench` say what is measured;
`run` samples what is missing; `report` shows it.
"""

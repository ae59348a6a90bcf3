"""How good a model is: samples of held-out problems on the rollout stack, and what follows of them.

`estimators` and `summary` are arithmetic on samples; `source` and `bench` say what is measured;
`run` samples what is missing; `report` shows it.
"""

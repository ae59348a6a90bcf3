"""Grading: whether an answer is the right one. What that is worth is the task's reward.

`answers` reads the answer out of a turn. `equality` decides mathematical equality, in processes of
its own (`pool` and `child`): `notation` (with `vocabulary`) brings a text into one spelling,
`readings` (with `leaves`, `units`, `regions`) finds what it can mean, `formulas` and `evaluation`
compare values. `programs` runs a submitted program on its tests in the sandbox.
Invariant: a grader that fails says so (`Verdict.UNDECIDED`); it never calls an answer wrong.
"""

"""What the paper measures beside benchmark scores: is the named step the one that mattered?

Each analysis is two plain functions: one spends completions on one input through a
`rollout.TreeRollout` and returns records, the other sums the records of all inputs up.
"""

"""Checks of a machine before a run: each does on a small scale what a run will do.

Two callers: `elpo_ray.doctor` on one machine, `launch.preflight` on every node of a job. A check
takes what it needs as plain arguments and returns `Finding`s; none of them changes anything that
stays. `catalog` says which checks a configuration calls for.
"""

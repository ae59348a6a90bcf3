"""`python -m elpo_ray.analyze analysis=localization model=… tasks=[countdown]`: the paper's own
analyses of where trajectories go wrong.

Exit codes: 0 done; 1 problems were lost, run it again; 2 a mistake in the call or an unusable model
or file, one line on stderr and nothing started; 130 on Ctrl-C, with everything finished kept.
"""

from __future__ import annotations

from elpo_ray.config import CONF_DIR
from elpo_ray.config.compose import Command, measured_tasks
from elpo_ray.config.measure import AnalyzeConfig


def run(config: AnalyzeConfig) -> int:
    tasks = measured_tasks(config)
    from elpo_ray.evaluation.analysis.run import analyze

    analyze(config, tasks)
    return 0


main = Command(AnalyzeConfig, "analyze", run, CONF_DIR / "measure", groups=["cluster", "algorithm"])

if __name__ == "__main__":
    main()

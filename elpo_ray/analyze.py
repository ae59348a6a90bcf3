"""`python -m elpo_ray.analyze analysis=localization model=… 'tasks=[countdown]'`: the paper's own
analyses of where trajectories go wrong.

Exit codes: `config.arguments`. After 1 (problems were lost) or 130 the same command goes on.
"""

from __future__ import annotations

from elpo_ray.config import CONF_DIR
from elpo_ray.config.compose import Command, measured_tasks
from elpo_ray.config.measure import AnalyzeConfig


def run(config: AnalyzeConfig) -> int:
    """Make the configured analysis and return the exit code."""
    tasks = measured_tasks(config)
    print(f"{config.model}: {config.analysis.value} on {', '.join(tasks)}", flush=True)
    from elpo_ray.evaluation.analysis.run import analyze

    analyze(config, tasks)
    return 0


main = Command(AnalyzeConfig, "analyze", run, CONF_DIR / "measure", groups=["cluster", "algorithm"])

if __name__ == "__main__":
    main()

"""`python -m elpo_ray.evaluate model=… 'tasks=[aime24]' n=32`: avg@n, Pass@K, Major@K.

Exit codes: `config.arguments`. After 1 (samples were lost) or 130 the same command goes on.
"""

from __future__ import annotations

from elpo_ray.config import CONF_DIR
from elpo_ray.config.compose import Command, measured_tasks
from elpo_ray.config.measure import EvaluateConfig


def run(config: EvaluateConfig) -> int:
    """Measure the configured model and return the exit code."""
    tasks = measured_tasks(config)
    print(f"{config.model}: n={config.n} on {', '.join(tasks)}", flush=True)
    from elpo_ray.evaluation.run import evaluate

    evaluate(config, tasks)
    return 0


main = Command(EvaluateConfig, "evaluate", run, CONF_DIR / "measure", groups=["cluster"])

if __name__ == "__main__":
    main()

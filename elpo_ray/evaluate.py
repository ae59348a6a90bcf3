"""`python -m elpo_ray.evaluate model=… tasks=[aime24] n=32`: avg@n, Pass@K, Major@K.

Exit codes: 0 done; 1 samples were lost, run it again; 2 a mistake in the call or an unusable model
or file, one line on stderr and nothing started; 130 on Ctrl-C, with everything finished kept.
"""

from __future__ import annotations

from elpo_ray.config import CONF_DIR
from elpo_ray.config.compose import Command, measured_tasks
from elpo_ray.config.measure import EvaluateConfig


def run(config: EvaluateConfig) -> int:
    tasks = measured_tasks(config)
    from elpo_ray.evaluation.run import evaluate

    evaluate(config, tasks)
    return 0


main = Command(EvaluateConfig, "evaluate", run, CONF_DIR / "measure", groups=["cluster"])

if __name__ == "__main__":
    main()

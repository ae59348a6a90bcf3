"""Looking at a machine before it is trusted with a run: each probe does the thing itself, in small.

Two callers: `elpo_ray.doctor` on one machine, `launch.preflight` on every node of a job. A probe
takes what it needs as plain arguments and returns `Finding`s; none of them changes anything that
stays. `catalog` says which probes a configuration calls for.
"""

from elpo_ray.probes.catalog import engine_probes, node_probes, shared_probes
from elpo_ray.probes.finding import Finding, Probe, Status, examine, failure, ok, warning

__all__ = [
    "Finding",
    "Probe",
    "Status",
    "engine_probes",
    "examine",
    "failure",
    "node_probes",
    "ok",
    "shared_probes",
    "warning",
]

"""The Grafana dashboard: rows of panels over the metrics that the actors report to Ray.

`write` makes the files of `python -m launch monitoring FOLDER`. Ray puts `ray_` before the name of
each metric (`elpo_ray/cluster/gauges.py`).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WIDTH, _HEIGHT, _A_ROW = 8, 7, 3


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph."""

    title: str
    queries: dict[str, str]
    """PromQL by legend; `{{actor}}` in a legend is the actor's name."""
    unit: str = "short"
    """Grafana's name of the unit: percentunit, s, bytes, …"""


_SESSION = 'SessionName=~"$session"'


def _gauge(name: str) -> str:
    return f"ray_elpo_{name}{{{_SESSION}}}"


def _rate(name: str) -> str:
    return f"rate({_gauge(name)}[2m])"


ROWS: dict[str, list[Panel]] = {
    "Learning": [
        Panel(
            "Held-out pass@1",
            {
                "all problems": _gauge("eval_pass_at_1"),
                "lower end, 95 %": _gauge("eval_pass_at_1_low"),
                "upper end, 95 %": _gauge("eval_pass_at_1_high"),
            },
            "percentunit",
        ),
        Panel(
            "Held-out pass@1 of each benchmark",
            {"{{__name__}}": f'{{__name__=~"ray_elpo_eval_.+_pass_at_1",{_SESSION}}}'},
            "percentunit",
        ),
        Panel("Reward", {"mean": _gauge("reward")}),
        Panel("pass@1 of the step's inputs", {"pass@1": _gauge("pass_at_1")}, "percentunit"),
        Panel("Weight version", {"{{actor}}": _gauge("worker_weight_version")}),
        Panel("Entropy", {"root": _gauge("entropy_root"), "after a tool": _gauge("entropy_tool")}),
        Panel(
            "Clipped tokens",
            {
                "low, in ELC": _gauge("clip_low_inside"),
                "low, outside": _gauge("clip_low_outside"),
                "high": _gauge("clip_high"),
            },
            "percentunit",
        ),
        Panel("Gradient norm", {"norm": _gauge("grad_norm")}),
    ],
    "Search": [
        Panel(
            "Budget of a step",
            {
                "from the prompt": _gauge("rollouts_root"),
                "probes": _gauge("rollouts_probe"),
                "lost, not charged": _gauge("rollouts_lost"),
            },
        ),
        Panel(
            "Searches",
            {"begun": _gauge("searches"), "critical step found": _gauge("critical_found")},
        ),
        Panel("Depth of the critical step", {"depth": _gauge("critical_depth")}),
    ],
    "Rollouts": [
        Panel("Trajectories under way", {"{{actor}}": _gauge("worker_episodes")}),
        Panel("Turns in the engine", {"{{actor}}": _gauge("worker_turns")}),
        Panel("Tokens a second", {"{{actor}}": _rate("worker_tokens")}),
        Panel(
            "Engine idle while trajectories wait",
            {"{{actor}}": f"{_rate('worker_idle_s')} / {_rate('worker_busy_s')}"},
            "percentunit",
        ),
        Panel("Cached prefix of probes", {"hit": _gauge("probe_prefix_hit")}, "percentunit"),
        Panel("Stale tokens", {"share": _gauge("stale_tokens")}, "percentunit"),
    ],
    "Tools": [
        Panel("Calls a second", {"{{actor}}": _rate("sandbox_calls")}),
        Panel(
            "Time of a call",
            {
                "{{actor}} p50": _gauge("sandbox_call_p50_s"),
                "{{actor}} p99": _gauge("sandbox_call_p99_s"),
                "{{actor}} queue p99": _gauge("sandbox_queue_p99_s"),
            },
            "s",
        ),
        Panel(
            "Calls by outcome, a second",
            {
                kind: f"sum({_rate(f'sandbox_calls_{kind}')})"
                for kind in ("ok", "error", "timeout", "memory", "sandbox_failure")
            },
        ),
        Panel("Kept states", {"{{actor}}": _gauge("sandbox_live_snapshots")}),
        Panel("Memory of kept states", {"{{actor}}": _gauge("sandbox_snapshot_bytes")}, "bytes"),
        Panel(
            "Forks and replays a second",
            {
                "forks": f"sum({_rate('sandbox_forks')})",
                "replays": f"sum({_rate('sandbox_replays')})",
            },
        ),
    ],
    "Time and faults": [
        Panel(
            "Seconds of a step",
            {phase: _gauge(f"seconds_{phase}") for phase in ("grow", "update", "sync", "other")},
            "s",
        ),
        Panel("Engine against learner: k3", {"k3": _gauge("mismatch_k3")}),
        Panel(
            "Faults",
            {
                "workers restarted": _gauge("faults_restarts"),
                "inputs queued again": _gauge("faults_inputs_requeued"),
                "inputs set aside": _gauge("faults_inputs_set_aside"),
                "leaves without a verdict": _gauge("ungraded"),
            },
        ),
    ],
}


def write(folder: Path) -> None:
    """Put the dashboard, the alerts and the configuration of Prometheus into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "grafana.json").write_text(json.dumps(grafana(), indent=1), encoding="utf-8")
    for file in Path(__file__).parent.glob("*.yaml"):
        shutil.copyfile(file, folder / file.name)


def grafana() -> dict[str, Any]:
    """The dashboard in Grafana's JSON model."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, members in ROWS.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": _WIDTH * _A_ROW, "h": 1},
            }
        )
        y += 1
        for index, panel in enumerate(members):
            place = {"x": index % _A_ROW * _WIDTH, "y": y, "w": _WIDTH, "h": _HEIGHT}
            panels.append(_panel(len(panels) + 1, panel, place))
            y += _HEIGHT * (index % _A_ROW == _A_ROW - 1 or index == len(members) - 1)
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "uid": "elpo-ray",
        "title": "elpo_ray",
        "tags": ["elpo_ray", "ray"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Prometheus", "type": "datasource",
                 "query": "prometheus"},
                {"name": "session", "label": "Ray session", "type": "query",
                 "datasource": source, "query": "label_values(ray_elpo_reward, SessionName)",
                 "refresh": 2, "includeAll": True, "allValue": ".*", "multi": True},
            ]
        },
        "panels": panels,
    }  # fmt: skip


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    targets = [
        {"refId": chr(ord("A") + at), "expr": query, "legendFormat": legend, "datasource": source}
        for at, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "datasource": source,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": targets,
    }

"""Who may import whom: frameworks stay at the edge and imports point down."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "elpo_ray").rglob("*.py")) + sorted((ROOT / "sandbox").rglob("*.py"))

EDGES = {
    "ray": {"cluster/"},
    "vllm": {"engine.py", "vllm_core.py", "vllm_plugin.py", "gpu_transfer.py"},
    "deepspeed": {"learner/"},
    "peft": {"learner/lora.py"},
    "hydra": {"command.py", "config/errors.py"},
    "wandb": {"trackers.py"},
    "mlflow": {"trackers.py"},
    "datasets": {"tasks/sources.py"},
    "math_verify": {"grading/equality.py"},
}
"""A framework may be imported only by these files of elpo_ray (a trailing / names a folder)."""

LAYERS = [
    {"types", "config", "load", "collector"},
    {"tree", "config/errors"},
    {"dump"},
    {"interfaces", "loss"},
    {"growth", "credit", "calls", "grading", "chat", "tiny", "model_folder"},
    {"episode", "forest", "tasks", "weights"},
    {"samples", "rollout"},
    {"analysis", "dispatch"},
    {
        "engine",
        "endpoint",
        "vllm_core",
        "vllm_plugin",
        "gpu_transfer",
        "learner",
        "tools",
        "sandbox_host",
        "trackers",
        "metrics",
        "runs",
        "report",
        "checks",
    },
    {"cluster"},
    {"cold_start", "evaluation", "schedule", "interrupts"},
    {"probes"},
    {"driver", "command"},
    {"supervised"},
    {"main", "sft", "simulate", "evaluate", "analyze", "doctor", "view", "compare"},
    {"cli"},
]
"""Modules and packages of elpo_ray, bottom first; imports within a layer are allowed."""


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def inside(path: Path) -> str:
    return path.relative_to(ROOT / "elpo_ray").as_posix()


@pytest.mark.parametrize("framework", EDGES)
def test_a_framework_is_imported_only_at_its_edge(framework: str) -> None:
    allowed = EDGES[framework]
    for path in FILES:
        if framework not in {name.split(".")[0] for name in imports(path)}:
            continue
        assert path.is_relative_to(ROOT / "elpo_ray"), f"{path} imports {framework}"
        name = inside(path)
        assert any(name == a or (a[-1] == "/" and name.startswith(a)) for a in allowed), (
            f"{name} imports {framework}"
        )


def test_imports_point_down() -> None:
    layer = {name: depth for depth, names in enumerate(LAYERS) for name in names}
    for path in FILES:
        if not path.is_relative_to(ROOT / "elpo_ray"):
            continue
        module = inside(path).split("/")[0].removesuffix(".py")
        if module == "__init__":
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "elpo_ray" or len(parts) == 1 or parts[1] == module:
                continue
            assert layer[parts[1]] <= layer[module], f"{inside(path)} imports {name}, above it"


def test_the_sandbox_knows_nothing_of_the_trainer() -> None:
    for path in (ROOT / "sandbox").rglob("*.py"):
        foreign = {name.split(".")[0] for name in imports(path)} & {"elpo_ray", "ray", "torch"}
        assert not foreign, f"{path.name} imports {foreign}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("elpo_ray.credit", {"torch", "ray", "vllm", "deepspeed", "hydra"}),
        ("elpo_ray.growth", {"torch", "ray", "vllm", "deepspeed", "hydra"}),
        ("elpo_ray.config", {"torch", "ray", "vllm", "deepspeed", "hydra"}),
        ("elpo_ray.driver", {"vllm", "deepspeed", "torch", "transformers", "wandb"}),
        ("elpo_ray.main", {"vllm", "deepspeed", "ray", "torch", "transformers"}),
        ("elpo_ray.cli", {"vllm", "deepspeed", "ray", "torch", "transformers"}),
        ("elpo_ray.cluster.actors", {"vllm", "deepspeed", "torch", "transformers"}),
        ("elpo_ray.view.__main__", {"torch", "ray", "vllm", "deepspeed", "hydra", "wandb"}),
        ("elpo_ray.simulate", {"torch", "ray", "vllm", "deepspeed", "hydra", "numpy"}),
        ("sandbox", {"torch", "ray", "numpy"}),
    ],
)
def test_importing_stays_light(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(' '.join(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(done.stdout.split())
    assert not loaded & absent

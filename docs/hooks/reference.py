"""Adds the configuration reference, made from the schema, to the pages."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from elpo_ray.config.reference import markdown


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "configuration.md", content=markdown()))
    return files

"""The light project of the pipeline tests, for faults that need DVC and git but not the harness."""

from tests.pipelines.conftest import _offline_tools, built, built_template, light, template

__all__ = ["_offline_tools", "built", "built_template", "light", "template"]

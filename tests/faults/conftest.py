"""The light project of the pipeline tests, for faults that need DVC and git but not the harness."""

import logging
from collections.abc import Iterator

import pytest

from tests.pipelines.conftest import _offline_tools, built, built_template, light, template

__all__ = ["_offline_tools", "built", "built_template", "light", "template"]


@pytest.fixture(autouse=True)
def _no_dvc_logs_after_a_test() -> Iterator[None]:
    """DVC called in this process logs to the streams of that moment, which are closed after the test."""
    yield
    for name in logging.root.manager.loggerDict:
        if name.startswith("dvc"):
            logging.getLogger(name).handlers.clear()

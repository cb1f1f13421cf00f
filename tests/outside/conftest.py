"""Tests that need software outside this project's environment run only with `make test-outside`."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "outside" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("outside")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]

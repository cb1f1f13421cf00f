"""What needs software that does not fit into this project's environment runs in the lane `make test-outside` alone."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "outside" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("outside")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]

"""Tests of the choice of callbacks of a run."""

import pytest

from callbacks import CALLBACKS
from lit_vlm.config.callbacks import (
    DEFAULT_CALLBACKS,
    ONLY_KEYWORD,
    REQUIRED_CALLBACKS,
    SETTING_CALLBACKS,
    choose_callbacks,
    find_callback_errors,
)
from lit_vlm.config.schema import RunConfig


def list_chosen(*names, export=True, profile=False):
    return [name for name in choose_callbacks(names, export=export, profile=profile) if name not in REQUIRED_CALLBACKS]


def test_every_own_callback_is_registered_and_the_schema_has_the_defaults():
    assert {*DEFAULT_CALLBACKS, *REQUIRED_CALLBACKS, *SETTING_CALLBACKS} == CALLBACKS.keys()
    assert tuple(RunConfig().callbacks) == DEFAULT_CALLBACKS
    assert not list(find_callback_errors([*CALLBACKS, ONLY_KEYWORD, "my.Own"]))
    (message,) = find_callback_errors(["thruput"])
    assert "there is no callback thruput" in message


@pytest.mark.parametrize("name", ["", ".x", "a.", "my..x", "my.1x", "my. x"])
def test_a_callback_that_is_no_import_path_is_refused_with_an_example(name):
    (message,) = find_callback_errors([name])
    assert (repr(name) if name else "an empty name") in message and "my_package.MyCallback" in message


@pytest.mark.parametrize("name", ["report", "my.Own"])
def test_a_callback_that_is_named_twice_is_refused(name):
    (message,) = find_callback_errors([name, "guard", name])
    assert f"'{name}' stands there more than once" in message


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (DEFAULT_CALLBACKS, [*DEFAULT_CALLBACKS, "export"]),
        (["my.Own"], [*DEFAULT_CALLBACKS, "my.Own", "export"]),
        (["my.Own", "other.Own"], [*DEFAULT_CALLBACKS, "my.Own", "other.Own", "export"]),
        (["profile"], [*DEFAULT_CALLBACKS, "export", "profile"]),
        (["throughput", "profile"], ["throughput", "export", "profile"]),
        (["guard", "my.Own"], ["guard", "my.Own", "export"]),
        (["only", "my.Own"], ["my.Own", "export"]),
        (["only"], ["export"]),
        ([], ["export"]),
        (["export"], ["export"]),
    ],
)
def test_user_callbacks_are_added_and_export_depends_on_no_list(names, found):
    assert list_chosen(*names) == found
    assert list_chosen(*names, export=False) == [name for name in found if name != "export"]

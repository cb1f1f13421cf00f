"""Which callbacks a run has."""

import pytest

from callbacks import CALLBACKS
from lit_vlm.config.callbacks import ALWAYS, BY_SETTING, DEFAULT, ONLY, choose_callbacks, mistakes_in_callbacks
from lit_vlm.config.schema import RunConfig


def chosen(*names, export=True, profile=False):
    return [name for name in choose_callbacks(names, export=export, profile=profile) if name not in ALWAYS]


def test_every_callback_of_ours_is_known_and_the_schema_has_the_default_ones():
    assert {*DEFAULT, *ALWAYS, *BY_SETTING} == CALLBACKS.keys()
    assert tuple(RunConfig().callbacks) == DEFAULT
    assert not list(mistakes_in_callbacks([*CALLBACKS, ONLY, "my.Own"]))
    (mistake,) = mistakes_in_callbacks(["thruput"])
    assert "there is no callback thruput" in mistake


@pytest.mark.parametrize("name", ["", ".x", "a.", "my..x", "my.1x", "my. x"])
def test_a_callback_that_is_no_import_path_is_refused_with_what_one_is(name):
    (mistake,) = mistakes_in_callbacks([name])
    assert (repr(name) if name else "an empty name") in mistake and "my_package.MyCallback" in mistake


@pytest.mark.parametrize("name", ["report", "my.Own"])
def test_a_callback_that_is_named_twice_is_refused(name):
    (mistake,) = mistakes_in_callbacks([name, "guard", name])
    assert f"'{name}' stands there more than once" in mistake


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (DEFAULT, [*DEFAULT, "export"]),
        (["my.Own"], [*DEFAULT, "my.Own", "export"]),
        (["my.Own", "other.Own"], [*DEFAULT, "my.Own", "other.Own", "export"]),
        (["profile"], [*DEFAULT, "export", "profile"]),
        (["throughput", "profile"], ["throughput", "export", "profile"]),
        (["guard", "my.Own"], ["guard", "my.Own", "export"]),
        (["only", "my.Own"], ["my.Own", "export"]),
        (["only"], ["export"]),
        ([], ["export"]),
        (["export"], ["export"]),
    ],
)
def test_own_callbacks_are_added_and_the_export_hangs_on_no_list(names, found):
    assert chosen(*names) == found
    assert chosen(*names, export=False) == [name for name in found if name != "export"]

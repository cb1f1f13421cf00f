"""Tests of the choice of callbacks of a run."""

import pytest

from callbacks import get_callback_class, make_callbacks
from lit_vlm.config import ConfigError, parse
from lit_vlm.config.callbacks import (
    CALLBACKS,
    ONLY_KEYWORD,
    Use,
    choose_callbacks,
    find_callback_errors,
    list_callbacks,
)
from lit_vlm.config.overrides import add_implied_overrides, quote_value
from lit_vlm.config.schema import RunConfig, StageConfig
from lit_vlm.config.settings import get_setting_type
from lit_vlm.config.user_classes import inspect_class, read_constructor
from lit_vlm.types import UserError

DEFAULT_CALLBACKS = list_callbacks(Use.default)
# Constructor arguments that are no settings
GIVEN_BY_THE_RUN = {"run_dir", "say", "fingerprint", "belongs", "benchmark_slices"}


def list_chosen(*names, export=True, profile=False):
    return [
        name
        for name in choose_callbacks(names, export=export, profile=profile)
        if name not in list_callbacks(Use.always)
    ]


def test_the_registry_is_the_one_list_of_callbacks():
    assert tuple(RunConfig().callbacks) == DEFAULT_CALLBACKS
    assert not list(find_callback_errors([*CALLBACKS, ONLY_KEYWORD, "my.Own"]))
    (message,) = find_callback_errors(["thruput"])
    assert "there is no callback thruput" in message
    for name, entry in CALLBACKS.items():
        constructor = inspect_class(get_callback_class(name))
        assert constructor == read_constructor(entry.class_path)
        assert {*constructor.names} - GIVEN_BY_THE_RUN == {*entry.arguments, *entry.settings}, name
        assert all(get_setting_type(setting, StageConfig) is not None for setting in entry.settings.values())


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


# Arguments

OWN_CALLBACKS = """
import lightning as L
assert False, "the class is imported"
class Every(L.Callback):
    def __init__(self, every: int = 5, *, folder=None): ...
class Plain(Every): ...
class Needy(L.Callback):
    def __init__(self, path, **more): ...
class Silent(L.Callback): ...
class Unknown(some.Base): ...
"""


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    """A package `own_package` whose `__init__` takes its classes from a module."""
    folder = tmp_path / "own_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("from .impl import Every, Needy as Renamed\nfrom lightning import Callback\n")
    (folder / "impl.py").write_text(OWN_CALLBACKS)
    monkeypatch.syspath_prepend(tmp_path)
    read_constructor.cache_clear()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"own_package.impl.Every": {"evry": 1}}, "has no argument evry; it has every, folder. Did you mean every?"),
        ({"own_package.Every": {"evry": 1}}, "has no argument evry; it has every, folder. Did you mean every?"),
        ({"own_package.impl.Plain": {"evry": 1}}, "has no argument evry; it has every, folder. Did you mean every?"),
        ({"own_package.impl.Silent": {"every": 1}}, "has no argument every; it has none."),
        ({"own_package.Callback": {"every": 1}}, "has no argument every; it has none."),
        ("own_package.Renamed", "it needs path: write {own_package.Renamed: {path: ...}}."),
        ({"samples": {"shwn": 1}}, "samples has no argument shwn; it has shown, max_new_tokens. Did you mean shown?"),
        (
            {"samples": {"max_samples": 1}},
            "max_samples of samples is a setting of its own, data.validation.max_samples",
        ),
        ({"throughput": {"every": 1}}, "throughput has no argument every; it has none."),
        ({"only": {"every": 1}}, "only is no callback and has no arguments, found every."),
        ({"guard": 3}, "each is a name, or a name with its arguments"),
        (3, "each is a name, or a name with its arguments"),
    ],
)
def test_an_unknown_argument_is_refused_by_name_without_importing_the_class(own_package, item, message):
    (error,) = find_callback_errors([item])
    assert message in error


def test_arguments_that_the_source_does_not_tell_are_left_to_the_run(own_package):
    items = [
        {"own_package.impl.Needy": {"path": 1, "other": 2}},
        {"own_package.impl.Unknown": {"a": 1}},
        {"no.Such": {"a": 1}},
    ]
    assert not list(find_callback_errors(items))


@pytest.mark.parametrize(
    ("override", "stored"),
    [
        ("callbacks=[throughput,profile]", ["throughput", "profile"]),
        ("callbacks={throughput: {}, my_package.My: {every: 10}}", ["throughput", {"my_package.My": {"every": 10}}]),
        ("callbacks=[guard,{my_package.My: {every: 1e3}}]", ["guard", {"my_package.My": {"every": 1000.0}}]),
        (
            '{"callbacks": {"my_package.My": {"name": "a: b"}, "guard": null}}',
            [{"my_package.My": {"name": "a: b"}}, "guard"],
        ),
    ],
)
def test_callbacks_take_arguments_on_the_command_line(override, stored):
    assert parse(["experiment=tiny/1_align", override]).config.callbacks == stored


def test_callbacks_take_arguments_in_a_file_and_the_last_setting_replaces_the_others(tmp_path):
    path = tmp_path / "experiment" / "own" / "1_align.yaml"
    path.parent.mkdir(parents=True)
    text = "callbacks:\n  throughput: {}\n  samples: {shown: 8}\n  my_package.My: {every: 10}\n"
    path.write_text(f"# @package _global_\ndefaults:\n  - /experiment/tiny/1_align\n{text}")
    overrides = [f"--config-dir={tmp_path}", "experiment=own/1_align"]
    stored = ["throughput", {"samples": {"shown": 8}}, {"my_package.My": {"every": 10}}]
    assert parse(overrides).config.callbacks == stored
    assert parse([*overrides, "callbacks={my_package.My: {after: 1}}"]).config.callbacks == [
        {"my_package.My": {"after": 1}}
    ]
    assert choose_callbacks(stored, export=False, profile=False)["samples"] == {"shown": 8}
    path.write_text(path.read_text().replace("shown", "shwn"))
    with pytest.raises(ConfigError, match="samples has no argument shwn"):
        parse(overrides)


def test_each_value_of_a_comma_list_is_expanded():
    (override,) = add_implied_overrides(["callbacks={my.A: {b: 1}},{my.A: {b: 2}}"])
    assert override == "callbacks=[{my.A:{b:1}}],[{my.A:{b:2}}]"
    assert quote_value([{"my.A": {"b": 1}}]) == "[{my.A:{b:1}}]"


def test_a_callback_is_made_with_its_arguments(tmp_path, monkeypatch):
    (tmp_path / "own_made.py").write_text(
        "import lightning as L\nclass Every(L.Callback):\n    def __init__(self, every=5):\n        self.every = int(every)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    chosen = choose_callbacks([{"own_made.Every": {"every": 10}, "samples": {"shown": 8}}], export=False, profile=False)
    made = {type(callback).__name__: callback for callback in make_callbacks(chosen, tmp_path, max_samples=7)}
    assert made["Every"].every == 10
    assert (made["Samples"].shown, made["Samples"].max_samples) == (8, 7)
    for arguments, message in (
        ({"evry": 1}, "has no argument evry; it has every"),
        ({"every": "x"}, "Every: invalid literal"),
    ):
        with pytest.raises(UserError, match=message):
            make_callbacks({"own_made.Every": arguments}, tmp_path)

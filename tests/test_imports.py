"""Imports without the garbage collector: what they promise to the code around them."""

import gc
import sys

import pytest

from lit_vlm.imports import pause_collector


def test_no_collection_runs_during_an_import_and_its_objects_are_frozen(tmp_path, monkeypatch):
    text = "import gc\nenabled = gc.isenabled()\nobjects = [[number] for number in range(10_000)]\n"
    (tmp_path / "imported_for_a_test.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "imported_for_a_test", raising=False)
    frozen = gc.get_freeze_count()
    with pause_collector():
        import imported_for_a_test
    assert not imported_for_a_test.enabled
    assert gc.isenabled() and gc.get_freeze_count() > frozen + 10_000


def test_nothing_is_frozen_where_all_is_imported_already():
    frozen = gc.get_freeze_count()
    with pause_collector():
        import json  # noqa: F401
    assert gc.isenabled() and gc.get_freeze_count() <= frozen


def test_a_caller_that_switched_the_collector_off_keeps_it_off():
    frozen = gc.get_freeze_count()
    gc.disable()
    try:
        with pause_collector(), pytest.raises(ZeroDivisionError), pause_collector():
            raise ZeroDivisionError
        assert not gc.isenabled() and gc.get_freeze_count() <= frozen
    finally:
        gc.enable()

"""Pytest plugin that writes the messages of all `UserError`s, by test, to the file named by RECORDED_ERRORS."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from lit_vlm.types import UserError

FOUND: dict[str, list[str]] = {}
TEMPORARY_FOLDER = re.compile(r"/\S*?/pytest-of-\w+/pytest-\d+(/popen-\w+)?")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    messages: list[str] = []
    init = UserError.__init__

    def record_and_init(self, *args):
        init(self, *args)
        messages.append(str(self))

    UserError.__init__ = record_and_init
    try:
        return (yield)
    finally:
        UserError.__init__ = init
        texts = sorted({TEMPORARY_FOLDER.sub("TMP", text) for text in messages})
        if texts:
            FOUND[item.nodeid] = texts


def pytest_sessionfinish():
    Path(os.environ["RECORDED_ERRORS"]).write_text(json.dumps(FOUND, ensure_ascii=False), encoding="utf-8")

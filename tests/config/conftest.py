"""Fixtures of the config tests: each test starts without Hydra state, without a sweep, in its own folder."""

import sys

import pytest
from hydra.core.global_hydra import GlobalHydra


@pytest.fixture(autouse=True)
def clean_hydra(monkeypatch: pytest.MonkeyPatch, tmp_path):
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    # Training in the same process flushes the smallest numbers, which are bounds here, to zero
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()

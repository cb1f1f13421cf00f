"""W&B's client in this process, connected to a server on the loopback interface."""

import os

import pytest
import wandb

from sweeps.wandb_server import LoopbackServer


@pytest.fixture
def session(tmp_path, monkeypatch):
    """Return a function that connects this process's client to a server; no file of the user is read or written."""

    def connect(url: str, key: str | None = None) -> None:
        wandb.teardown()
        for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_HTTP_TIMEOUT"]:
            monkeypatch.delenv(name)
        variables = {"WANDB_BASE_URL": url, "HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "home" / "netrc")}
        variables |= {
            "WANDB_ERROR_REPORTING": "false",
            "NO_PROXY": "127.0.0.1",
            "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1",
        }
        variables |= {"WANDB_API_KEY": key} if key else {}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    (tmp_path / "home").mkdir()
    yield connect
    if wandb.run is not None:
        wandb.finish()
    wandb.teardown()


@pytest.fixture
def server(session):
    with LoopbackServer() as loopback:
        session(loopback.url, loopback.environment()["WANDB_API_KEY"])
        yield loopback
        assert loopback.unknown == []

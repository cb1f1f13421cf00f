import pytest
from clients import Client

from sweeps.wandb_server import LoopbackServer


@pytest.fixture
def server():
    with LoopbackServer() as loopback:
        yield loopback
        assert loopback.unknown == [], "the client asks for what the server does not know: has wandb moved?"


@pytest.fixture
def client(server, tmp_path) -> Client:
    (tmp_path / "client").mkdir()
    return Client(server, tmp_path / "client")

"""W&B server on the loopback interface, with only what `wandb sweep`, `wandb agent`, `wandb.init` and `wandb sync` need.

It makes it possible to try and test the real client, agent and command line without an account: `make sweep-demo`,
`tests/sweep/`. Names of operations and fields are those that the client (0.31) sends. Other requests are collected in
`LoopbackServer.unknown`, so that a changed client is noticed. Search and early stopping are those of `lit_vlm.sweep.search`.
"""

from sweeps.wandb_server.server import LoopbackServer
from sweeps.wandb_server.state import RunState, ServerState, SweepState

__all__ = ["LoopbackServer", "RunState", "ServerState", "SweepState"]

"""A W&B server on the loopback interface: what `wandb sweep`, `wandb agent`, `wandb.init` and `wandb sync` need, and no more.

It exists so that the real client, agent and command line can be tried and tested without an account: `make sweep-demo`,
`tests/sweep/`. Names of operations and fields are those that the client (0.31) sends; what it asks beyond them is kept in
`Loopback.unknown`, so that a client that changed is noticed. Searches and early stopping are `lit_vlm.sweep.search`'s.
"""

from lit_vlm.sweep.loopback.server import Loopback
from lit_vlm.sweep.loopback.state import RunState, State, SweepState

__all__ = ["Loopback", "RunState", "State", "SweepState"]

"""Exit statuses of a training process besides 0 (done) and 1 (failed), for a scheduler to act on."""

from __future__ import annotations

RESTART = 75  # EX_TEMPFAIL: a restart from the last checkpoint resolves it
STUCK = 76  # a rank made no progress within the timeout; stacks and sample ids are in the run folder
INTERRUPTED = 130  # Ctrl-C, by shell convention: state is saved, and only a person should start it again
TERMINATED = 143  # SIGTERM, by the same convention, outside of a step: usually another rank failed


class CoordinatedExit(SystemExit):
    """Exit of all ranks at the same point, where they may still wait for each other. Any other SystemExit is of one rank."""


class EarlyStoppingExit(CoordinatedExit):
    """Exit for early stopping by a sweep or by a person in W&B. The state is saved, and the run counts as done: status 0."""

    def __init__(self) -> None:
        super().__init__(0)


class RollbackRequest(Exception):
    """Request to roll back all ranks to the last checkpoint, in the same process. The step is listed in `skipped.jsonl`."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step  # step of the plan, counted from 0

"""Exit codes of a training process beside 0 (done) and 1 (failed); a scheduler acts on them."""

from __future__ import annotations

RESTART = 75  # EX_TEMPFAIL: nothing is wrong that a start from the last checkpoint would not mend
STUCK = 76  # a rank did not answer within its time limit; stacks and sample ids are in the run's folder
INTERRUPTED = 130  # Ctrl-C, by the custom of shells: state is saved, and nobody should start it again but the person
TERMINATED = 143  # SIGTERM, by the same custom, where no step was under way: most often another rank failed


class LeftTogether(SystemExit):
    """All ranks leave at the same place, and may wait for each other once more. Any other SystemExit is one rank's."""


class StoppedEarly(LeftTogether):
    """A sweep, or a person at W&B's page, wants no more of this run. Its state is saved, and it counts as done: status 0."""

    def __init__(self) -> None:
        super().__init__(0)


class RollBack(Exception):
    """All ranks go back to the last checkpoint, in the same process. The step is listed in `skipped.jsonl`."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step  # of the plan, counted from 0

"""Exit codes of a training process beside 0 (done) and 1 (failed); a scheduler acts on them."""

from __future__ import annotations

RESTART = 75  # EX_TEMPFAIL: nothing is wrong that a start from the last checkpoint would not mend
STUCK = 76  # a rank did not answer within its time limit; stacks and sample ids are in the run's folder

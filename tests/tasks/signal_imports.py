"""A signal at each import of a run: `python tests/tasks/signal_imports.py RESULT run.py OVERRIDE... [-- OVERRIDE...]...`.

The overrides after each `--` are another run. At each import the handler does all its work except ending the process, so
one process passes all imports. At every hundredth import, and at libraries that catch exceptions of an import, a fork is
really ended, with every exception around the import suppressed. RESULT is the result as JSON.
"""

import contextlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lit_vlm.fault_tolerance import signals
from lit_vlm.fault_tolerance.exit_status import INTERRUPTED, RESTART, TERMINATED

STATUS = {signal.SIGTERM: TERMINATED, signal.SIGINT: INTERRUPTED, signal.SIGUSR1: RESTART}
IN_EARNEST = (
    "pandas",
    "pandas.core",
    "pyarrow",
    "torch",
    "transformers",
    "lightning",
    "hydra",
    "numpy",
    "peft",
    "wandb",
)
end = signals._exit_now
codes: list[int] = []
record = {"points": 0, "while training": 0, "in earnest": [], "faults": []}


class Points:
    """Import hook before all other finders."""

    def find_spec(self, name, path=None, target=None):
        current = signals.get_signal_handler()
        if current is None or os.getpid() != current.pid:
            return None
        if current.listener is not None:  # the training loop acts on the signal at the end of the step
            record["while training"] += 1
            return None
        number = list(STATUS)[record["points"] % len(STATUS)]
        if name in IN_EARNEST or record["points"] % 100 == 0:
            self.end_fork(name, number)
        os.kill(os.getpid(), number)
        if codes != [STATUS[number]]:
            record["faults"].append([name, number.name, codes[:]])
        codes.clear()
        current.is_exiting, current.interrupted_at = False, None
        record["points"] += 1
        return None

    def end_fork(self, name, number):
        pid = os.fork()
        if pid == 0:
            signals.get_signal_handler().pid, signals._exit_now = os.getpid(), end
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), number)
            os._exit(99)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        record["in earnest"].append(name)
        if status != STATUS[number]:
            record["faults"].append([name, number.name, status])


def main(result: str, script: str, *overrides: str) -> None:
    signals._exit_now = codes.append
    sys.meta_path.insert(0, Points())
    while overrides:
        place = overrides.index("--") if "--" in overrides else len(overrides)
        sys.argv = [script, *overrides[:place]]
        runpy.run_path(script, run_name="__main__")
        signals.get_signal_handler().final_status = None
        overrides = overrides[place + 1 :]
    Path(result).write_text(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])

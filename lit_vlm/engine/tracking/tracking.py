"""The trackers of a run from its first start in this process to its end, whichever way it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning.pytorch.loggers import Logger

from lit_vlm.config.schema import LoggerConfig
from lit_vlm.config.settings import did_you_mean, nearest
from lit_vlm.engine.exits import INTERRUPTED, RESTART, TERMINATED, LeftTogether, StoppedEarly
from lit_vlm.engine.ranks import in_sweep
from lit_vlm.engine.run_folder import RunFolder, is_rank_zero
from lit_vlm.engine.signals import current
from lit_vlm.engine.tracking import connection, facts
from lit_vlm.engine.tracking.metrics_csv import MetricsCsv
from lit_vlm.engine.tracking.tensorboard import make_tensorboard
from lit_vlm.engine.tracking.wandb_run import EXIT_CODES, WandbRun
from lit_vlm.secrets import redacted_text
from lit_vlm.types import UserError


class Tracking:
    """A context around all starts of a run in one process: `loggers` for each, and one end.

    Args:
        logger: the settings.
        run_dir: the run's folder.
        experiment: of the command line, for the name of its group.
        say: takes what the user should know.
        patience: of `WandbRun`.
    """

    def __init__(
        self,
        logger: LoggerConfig,
        run_dir: Path,
        experiment: str | None,
        say: Callable[[str], None],
        patience: float | None = None,
    ) -> None:
        self.logger, self.run_dir, self.experiment = logger, run_dir, experiment
        wanted = connection.is_wanted(logger) and is_rank_zero()
        self.wandb = WandbRun(logger, run_dir, say, patience) if wanted else None
        self._folder: RunFolder | None = None

    def check(self, folder: RunFolder) -> None:
        """Before anything is built.

        Raises:
            UserError: no login, one that the server refuses, a package that is missing, other values than the sweep's.
        """
        if not is_rank_zero():
            return
        if self.logger.tensorboard:
            make_tensorboard(self.run_dir)
        if self.wandb is not None:
            facts.require_sweep_values(folder.manifest["config"])
            self.wandb.log_in(begun_before=folder.goes_on)

    def loggers(self) -> list[Logger]:
        """Of one start: the table first, which tells the others what of it counts."""
        table: list[Logger] = [MetricsCsv(self.run_dir)]
        table += [make_tensorboard(self.run_dir)] if self.logger.tensorboard else []
        return table + ([self.wandb] if self.wandb is not None else [])

    def known(self, folder: RunFolder) -> dict[str, Any]:
        """What the manifest keeps for the trackers."""
        tracking = folder.manifest["tracking"]
        if self.wandb is None:
            return tracking
        return tracking | {"wandb": facts.known_run(folder, self.logger, self.experiment)}

    def open(self, folder: RunFolder) -> None:
        """Once the manifest says what will be run."""
        self._folder = folder
        if self.wandb is not None:
            self._note(folder, **self.wandb.open(folder, folder.manifest["tracking"]["wandb"]))

    def require_metric(self, figures: dict[str, Any]) -> None:
        """`logger.metric` was logged, or is among the figures.

        Raises:
            UserError: naming what was logged that comes nearest.
        """
        if self.logger.metric and is_rank_zero():
            require_logged(
                self.logger.metric, {*MetricsCsv(self.run_dir).logged(), *facts.summary_of({"figures": figures}, "")}
            )

    def finish(self, folder: RunFolder) -> None:
        """The run is done, and its manifest says so."""
        if self.wandb is None:
            return
        if not self.wandb.offline:
            self._note(folder, behind=True)  # until the server has all of it
        names = self.wandb.close("finished", facts.summary_of(folder.manifest, "finished"), uploads=True)
        self._note(folder, behind=self.wandb.behind, **({"artifacts": names} if names else {}))

    def catch_up(self, folder: RunFolder) -> None:
        """Send what the server lacks of a run that is finished."""
        known = (folder.manifest.get("tracking") or {}).get("wandb") or {}
        if self.wandb is None or not known.get("behind"):
            return
        self.wandb.log_in(begun_before=True)
        if not self.wandb.offline:
            self.send_whole(folder, finished=True)

    def send_whole(self, folder: RunFolder, *, finished: bool) -> None:
        """Send what the server lacks of a run that no process trains, from its files."""
        assert self.wandb is not None
        self.open(folder)
        self.wandb.replay_whole()
        if finished:
            self.finish(folder)
            return
        status = "stopped early" if folder.manifest.get("status") == "stopped" else "preempted"
        self.wandb.close(status, facts.summary_of(folder.manifest, status))
        self._note(folder, behind=True)  # its end is still to come

    def _note(self, folder: RunFolder, **known: Any) -> None:
        tracking = folder.manifest["tracking"]
        folder.update(tracking=tracking | {"wandb": tracking["wandb"] | known})

    # ---- a run that does not come to its end

    def __enter__(self) -> Tracking:
        if (signals := current()) is not None:
            signals.before_leaving = lambda code: self._exit_status(SystemExit(code))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (signals := current()) is not None:
            signals.before_leaving = None
        if error is None or self.wandb is None or self._folder is None:
            return
        code = self._exit_status(error)
        if isinstance(error, SystemExit) and error.code != code:
            raise SystemExit(code) from error

    def _exit_status(self, error: BaseException) -> Any:
        """End the run of W&B; returns the status that the process is to end with, which inside an agent W&B decides."""
        code = getattr(error, "code", None)
        if self.wandb is None or self._folder is None:
            return code
        ended = EXIT_CODES[self.leave(error)]
        return ended if code in (RESTART, TERMINATED) and in_sweep() else code

    def leave(self, error: BaseException) -> str:
        """Say how the run ended, and end its run of W&B. Where ranks leave together the others wait for this: the first that
        is gone ends a step of Slurm, and the client with it."""
        status = self._status(error)
        if self.wandb is None or self._folder is None:
            return status
        summary = facts.summary_of(self._folder.manifest, status)
        if status == "failed":
            summary["error"] = redacted_text(f"{type(error).__name__}: {error}".splitlines()[0])
        if status == "stopped early" and not self._folder.finished:
            self._folder.update(status="stopped")
        self.wandb.close(status, summary)
        return status

    def _status(self, error: BaseException) -> str:
        """How a run ended. Inside an agent a signal is the sweep's wish, or the end of the agent itself: then another agent
        gets the run. Where a step was under way, the ranks have asked already (`callbacks/preemption.py`)."""
        if isinstance(error, StoppedEarly):
            return "stopped early"
        if isinstance(error, KeyboardInterrupt) or getattr(error, "code", None) == INTERRUPTED:
            return "interrupted"
        if not isinstance(error, SystemExit) or error.code not in (RESTART, TERMINATED):
            return "failed"
        asked = not isinstance(error, LeftTogether) and in_sweep() and self.wandb is not None
        return "stopped early" if asked and self.wandb.is_asked_to_stop() else "preempted"


def require_logged(metric: str, names: set[str]) -> None:
    """UserError when a metric is none of these, with the nearest of them."""
    if metric in names:
        return
    found = did_you_mean(nearest(metric, sorted(names)))
    raise UserError(
        f"logger.metric={metric}: this run logs no such metric, so a sweep that optimises it would learn nothing.{found} It"
        f" logs {', '.join(sorted(names)) or 'nothing'}."
    )

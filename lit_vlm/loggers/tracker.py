"""Lifecycle of a run's loggers, from its first start in this process to its end, also after an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lit_vlm.config.schema import LoggerConfig
from lit_vlm.distributed.ranks import is_in_sweep
from lit_vlm.fault_tolerance.exit_status import INTERRUPTED, RESTART, TERMINATED, CoordinatedExit, EarlyStoppingExit
from lit_vlm.fault_tolerance.signals import get_signal_handler
from lit_vlm.loggers import run_metadata, wandb_client
from lit_vlm.loggers.run_metadata import EXIT_CODES
from lit_vlm.redaction import redact_text
from lit_vlm.runs.run_folder import RunFolder, is_rank_zero
from lit_vlm.types import UserError, find_nearest, format_suggestion

if TYPE_CHECKING:  # the loggers import Lightning, which a finished run does not need
    from lightning.pytorch.loggers import Logger

    from lit_vlm.loggers.wandb_logger import WandbRun


class RunTracker:
    """Context manager around all starts of a run in one process. It makes the loggers of each start and closes them once.

    Args:
        logger: the logger settings.
        run_dir: the run folder.
        experiment: name of the experiment on the command line, for the name of the W&B group.
        say: called with each message for the user.
        timeout_seconds: see `WandbRun`.
    """

    def __init__(
        self,
        logger: LoggerConfig,
        run_dir: Path,
        experiment: str | None,
        say: Callable[[str], None],
        timeout_seconds: float | None = None,
    ) -> None:
        self.logger, self.run_dir, self.experiment = logger, run_dir, experiment
        self.wandb: WandbRun | None = None
        if wandb_client.is_enabled(logger) and is_rank_zero():
            from lit_vlm.loggers.wandb_logger import WandbRun

            self.wandb = WandbRun(logger, run_dir, say, timeout_seconds)
        self._folder: RunFolder | None = None

    def check(self, folder: RunFolder) -> None:
        """Check the loggers before anything is built.

        Raises:
            UserError: no login, a refused login, a missing package, or values other than those of the sweep.
        """
        if not is_rank_zero():
            return
        if self.logger.tensorboard:
            from lit_vlm.loggers.file_loggers import make_tensorboard_logger

            make_tensorboard_logger(self.run_dir)
        if self.wandb is not None:
            run_metadata.require_sweep_values(folder.manifest["config"])
            self.wandb.verify_login(has_earlier_run=folder.is_resumed)

    def make_loggers(self) -> list[Logger]:
        """Make the loggers of one start. The CSV logger comes first: the others replay the rows that it keeps."""
        from lit_vlm.loggers.file_loggers import MetricsCsv, make_tensorboard_logger

        table: list[Logger] = [MetricsCsv(self.run_dir)]
        table += [make_tensorboard_logger(self.run_dir)] if self.logger.tensorboard else []
        return table + ([self.wandb] if self.wandb is not None else [])

    def get_tracking_record(self, folder: RunFolder) -> dict[str, Any]:
        """Return the tracking entry for the manifest."""
        tracking = folder.manifest["tracking"]
        if self.wandb is None:
            return tracking
        return tracking | {"wandb": run_metadata.get_run_record(folder, self.logger, self.experiment)}

    def open(self, folder: RunFolder) -> None:
        """Open the W&B run, once the manifest is complete."""
        self._folder = folder
        if self.wandb is not None:
            self._update_record(folder, **self.wandb.open(folder, folder.manifest["tracking"]["wandb"]))

    def require_metric(self, figures: dict[str, Any]) -> None:
        """Require that `logger.metric` was logged or is among the figures.

        Raises:
            UserError: names the nearest metric that was logged.
        """
        if self.logger.metric and is_rank_zero():
            from lit_vlm.loggers.file_loggers import MetricsCsv

            require_logged_metric(
                self.logger.metric,
                {*MetricsCsv(self.run_dir).read_metric_names(), *run_metadata.build_summary({"figures": figures}, "")},
            )

    def finish(self, folder: RunFolder) -> None:
        """Upload the results and close the W&B run of a finished run, after its manifest was updated."""
        if self.wandb is None:
            return
        if not self.wandb.offline:
            self._update_record(folder, behind=True)  # until the server has everything
        names = self.wandb.close("finished", run_metadata.build_summary(folder.manifest, "finished"), upload=True)
        self._update_record(folder, behind=self.wandb.behind, **({"artifacts": names} if names else {}))

    def send_missing(self, folder: RunFolder) -> None:
        """Send the rows and files of a finished run that the server lacks."""
        known = (folder.manifest.get("tracking") or {}).get("wandb") or {}
        if self.wandb is None or not known.get("behind"):
            return
        self.wandb.verify_login(has_earlier_run=True)
        if not self.wandb.offline:
            self.send_all(folder, finished=True)

    def send_all(self, folder: RunFolder, *, finished: bool) -> None:
        """Send everything that the server lacks of a run that is not training, from the files of its run folder."""
        assert self.wandb is not None
        self.open(folder)
        self.wandb.replay_all()
        if finished:
            self.finish(folder)
            return
        status = "stopped early" if folder.manifest.get("status") == "stopped" else "preempted"
        self.wandb.close(status, run_metadata.build_summary(folder.manifest, status))
        self._update_record(folder, behind=True)  # the run has not finished yet

    def _update_record(self, folder: RunFolder, **values: Any) -> None:
        tracking = folder.manifest["tracking"]
        folder.update(tracking=tracking | {"wandb": tracking["wandb"] | values})

    # ---- a run that ends with an error or a signal

    def __enter__(self) -> RunTracker:
        if (signals := get_signal_handler()) is not None:
            signals.before_exit = lambda code: self._close_and_get_exit_code(SystemExit(code))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (signals := get_signal_handler()) is not None:
            signals.before_exit = None
        if error is None or self.wandb is None or self._folder is None:
            return
        code = self._close_and_get_exit_code(error)
        if isinstance(error, SystemExit) and error.code != code:
            raise SystemExit(code) from error

    def _close_and_get_exit_code(self, error: BaseException) -> Any:
        """Close the W&B run. Returns the exit code of the process; inside a sweep agent W&B decides it."""
        code = getattr(error, "code", None)
        if self.wandb is None or self._folder is None:
            return code
        ended = EXIT_CODES[self.close_after_error(error)]
        return ended if code in (RESTART, TERMINATED) and is_in_sweep() else code

    def close_after_error(self, error: BaseException) -> str:
        """Close the W&B run with the status that belongs to an error. Returns the status.

        In a coordinated exit the other ranks wait for this: the first rank that ends also ends the Slurm step, and the
        client with it.
        """
        status = self._get_end_status(error)
        if self.wandb is None or self._folder is None:
            return status
        summary = run_metadata.build_summary(self._folder.manifest, status)
        if status == "failed":
            summary["error"] = redact_text(f"{type(error).__name__}: {error}".splitlines()[0])
        if status == "stopped early" and not self._folder.is_finished:
            self._folder.update(status="stopped")
        self.wandb.close(status, summary)
        return status

    def _get_end_status(self, error: BaseException) -> str:
        """Return how a run ended: a key of `EXIT_CODES`.

        Inside a sweep agent a signal means that the sweep stops the run, or that the agent itself ends; then another agent
        gets the run. After a signal during a step the ranks have asked the server already (`callbacks/preemption.py`).
        """
        if isinstance(error, EarlyStoppingExit):
            return "stopped early"
        if isinstance(error, KeyboardInterrupt) or getattr(error, "code", None) == INTERRUPTED:
            return "interrupted"
        if not isinstance(error, SystemExit) or error.code not in (RESTART, TERMINATED):
            return "failed"
        if isinstance(error, CoordinatedExit) or not is_in_sweep() or self.wandb is None:
            return "preempted"
        return "stopped early" if self.wandb.is_asked_to_stop() else "preempted"


def require_logged_metric(metric: str, names: set[str], setting: str = "logger.metric") -> None:
    """Require that the metric of a setting is one of the logged names.

    Raises:
        UserError: suggests the nearest name.
    """
    if metric in names:
        return
    found = format_suggestion(find_nearest(metric, sorted(names)))
    raise UserError(
        f"{setting}={metric}: this run logs no such metric, so nothing could be chosen by it.{found} It logs"
        f" {', '.join(sorted(names)) or 'nothing'}."
    )

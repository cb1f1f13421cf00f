"""Buffer of log rows: all values of one optimizer step become one row, which is sent once and complete.

W&B accepts each step only once. A row that is sent before its second half is logged (the held-out loss after the training
loss) would lose that half if the process is killed in between. So a row is buffered until the next step begins.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lit_vlm.compat.wandb import encode_table
from lit_vlm.config.schema import LoggerConfig
from lit_vlm.fault_tolerance.signals import StopRequest, get_signal_handler
from lit_vlm.loggers import run_metadata, wandb_client
from lit_vlm.loggers.file_loggers import MetricsCsv
from lit_vlm.loggers.run_metadata import EXIT_CODES
from lit_vlm.loggers.wandb_client import LoginRefusedError, build_table, call_with_timeout, read_samples
from lit_vlm.redaction import redact_text
from lit_vlm.runs.run_folder import RunFolder
from lit_vlm.types import UserError


class RowBuffer:
    """Buffer that merges logged values into one row for each optimizer step and sends complete rows.

    Args:
        send: called with an optimizer step, counted from 0, and all values logged for it.
        first_step: earlier steps were sent by an earlier start.
    """

    def __init__(self, send: Callable[[int, dict[str, Any]], None], first_step: int = 0) -> None:
        self._send, self.first_step = send, first_step
        self._step, self._row = first_step, dict[str, Any]()

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Add values to the row of a step. Steps come in order; values of a step that was sent already are ignored."""
        if step < self.first_step:
            return
        if step > self._step:
            self.flush()
            self._step = step
        self._row |= values

    def flush(self) -> None:
        """Send the buffered row."""
        if self._row:
            row, self._row = self._row, {}
            self.first_step = self._step + 1
            self._send(self._step, row)

    def drop_pending(self) -> None:
        """Drop the buffered row: the start that resumes logs it again."""
        self._row = {}


class BackgroundCaller:
    """Queue of calls that a daemon thread runs in order. The thread starts with the first call and ends with the process.

    Args:
        on_error: called in the thread with the error of a call; the next calls run all the same.
    """

    def __init__(self, on_error: Callable[[Exception], None]) -> None:
        self._on_error = on_error
        self._calls: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[[], object]) -> None:
        """Add a call to the queue."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run_calls, name="tracking", daemon=True)
            self._thread.start()
        self._calls.put(call)

    def wait(self, seconds: float) -> bool:
        """Wait until all calls submitted so far have run, at most `seconds`. Returns whether they have."""
        done = threading.Event()
        self.submit(done.set)
        return done.wait(seconds)

    def _run_calls(self) -> None:
        while True:
            call = self._calls.get()
            try:
                call()
            except Exception as error:
                self._on_error(error)


GRACE_SECONDS = 10  # for the client itself, on top of its own timeout


class WandbRun(Logger):
    """Logger that sends rows to W&B from rank 0, one row for each optimizer step. Steps that the server has are skipped.

    The object survives a restart within the process: the next start uses the same object.

    Attributes:
        offline: this process sends nothing.
        behind: the server lacks rows or files of this run.
        stop_requested: the server requests that the run stops.

    Args:
        logger: the logger settings.
        run_dir: the run folder; the client writes to `wandb/` in it.
        say: called with each message for the user.
        timeout_seconds: timeout of the client for accepting and for sending rows; None: the timeouts of a training run.
    """

    def __init__(
        self, logger: LoggerConfig, run_dir: Path, say: Callable[[str], None], timeout_seconds: float | None = None
    ) -> None:
        super().__init__()
        self.timeout_seconds = timeout_seconds
        self.logger, self.run_dir, self.say = logger, Path(run_dir), say
        self.offline = wandb_client.is_offline(logger)
        self.behind = self.stop_requested = False
        self._run: Any = None
        self._row_buffer = RowBuffer(self._send)
        self._sender = BackgroundCaller(self._handle_client_failure)
        self._pending_tables: dict[str, Any] = {}  # tables that were not ready in time for their own row

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return self._run.id if self._run else ""

    @property
    def save_dir(self) -> str:
        return str(self.run_dir)

    @property
    def experiment(self) -> Any:
        """The client's own run; None before `open`, on other ranks, and after a failure of the client."""
        return self._run

    # ---- the start

    def verify_login(self, *, has_earlier_run: bool) -> None:
        """Verify the login, before anything is built.

        Args:
            has_earlier_run: there is a run to resume; then a refused login only switches to offline.

        Raises:
            UserError: no login; or a refused login, if there is no run to resume.
        """
        if self.offline or self._run is not None:
            return
        try:
            problem = wandb_client.verify_login()
        except LoginRefusedError as error:
            if not has_earlier_run:
                raise UserError(
                    f"logger.wandb=true: Weights & Biases refuses the login: {error}. Log in anew with `wandb login --relogin`,"
                    " set another WANDB_API_KEY, or set logger.offline=true."
                ) from None
            problem = f"it refuses the login ({error})"
        if problem:
            self._set_offline(problem)

    def open(self, folder: RunFolder, run_record: dict[str, Any]) -> dict[str, Any]:
        """Start the W&B run or resume it. Returns its new entry for the manifest.

        Args:
            run_record: its entry in the manifest, with `id` and `group`.
        """
        if self._run is None:
            self._start_run(folder, run_record)
        run = self._run
        if run is None or self.offline:
            return run_record
        return run_record | {"entity": run.entity, "project": run.project, "url": run.url, "online": True}

    def _start_run(self, folder: RunFolder, run_record: dict[str, Any]) -> None:
        manifest = folder.manifest
        init_kwargs = {"name": manifest["name"], "group": run_record["group"], "job_type": manifest["stage"]}
        if self.offline and (run_record.get("online") or wandb_client.is_synced(self.run_dir)):
            self.behind = True
            self.say(
                "W&B: a part of this run is there already, so nothing is written offline. metrics.csv has all of it; the same"
                " command sends what is missing, once the server can be reached."
            )
            return
        # a lambda: the client deep-copies its settings, and a bound method would copy this object, too
        init_args = self.logger, self.run_dir, run_record, lambda: self._on_stop_request()
        try:
            config = run_metadata.build_config(folder)
            init_kwargs |= {"config": config, "finish_seconds": self.timeout_seconds}
            self._run = wandb_client.init_run(*init_args, offline=self.offline, **init_kwargs)
        except Exception as error:  # the client raises many kinds of errors, and none of them may stop the training
            if self.offline:
                self._handle_client_failure(error)
                return
            self._set_offline(_get_first_line(error))
            self._start_run(folder, run_record)
            return
        self._row_buffer = RowBuffer(self._send, first_step=self._run.starting_step)
        self.say(self._describe_location())
        self._link_parent(run_metadata.get_parent_run(folder))

    def _link_parent(self, parent: dict[str, Any]) -> None:
        if self.offline or not parent:
            return
        try:
            call_with_timeout(wandb_client.ANSWER_SECONDS, lambda: wandb_client.link_parent_model(self._run, parent))
        except Exception as error:
            self.say(f"W&B: the model that this run starts from is not linked: {_get_first_line(error)}")

    def _set_offline(self, reason: str) -> None:
        self.offline = self.behind = True
        self.say(f"W&B: {reason}. This start continues without it; the next one tries the server anew.")

    def _describe_location(self) -> str:
        if not self.offline:
            return f"W&B: {self._run.url}"
        return f"W&B: written to the run's folder; once it has ended, send it with `{wandb_client.format_sync_command(self.run_dir)}`"

    # ---- rows

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the config was sent at the start of the run."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add metrics to the row of a step, counted from 0; the row is sent when the next step begins."""
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        self._row_buffer.add(self._row_buffer.first_step if step is None else step, values)

    @rank_zero_only
    def log_samples(self, phase: str, rows: list[dict[str, Any]], step: int) -> None:
        """Log a table of held-out samples, with the rows of `samples.jsonl`.

        Only for a table does the client send a request to the server first. This waits for it, at most as long as at the
        start; a table that is not ready by then joins a later row.
        """
        run, name = self._run, f"samples/{phase}"
        if run is None or not rows or step < self._row_buffer.first_step:
            return
        try:
            table = call_with_timeout(
                self.timeout_seconds or wandb_client.ANSWER_SECONDS,
                lambda: self._pending_tables.setdefault(
                    name, encode_table(run, name, build_table(self.run_dir, rows), step)
                ),
            )
        except TimeoutError:
            return
        except Exception as error:
            self.say(f"W&B: the table {name} is left out ({_get_first_line(error)}); samples.jsonl has it.")
            return
        self._pending_tables.pop(name, None)
        self._row_buffer.add(step, {name: table})

    @rank_zero_only
    def replay(self, rows: list[dict[str, Any]]) -> None:
        """Log the kept rows of an earlier start again, after a resume; steps that the server has are skipped."""
        self._row_buffer.drop_pending()
        if rows:
            self.log_samples("before", read_samples(self.run_dir, "before"), step=0)
        for row in rows:
            self.log_metrics({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

    def replay_all(self) -> None:
        """Log all rows of a finished run again, from its files."""
        rows = MetricsCsv(self.run_dir).read_rows()
        self.replay(rows)
        last = max((int(row["step"]) for row in rows), default=0)
        self.log_samples("after", read_samples(self.run_dir, "after"), step=last)

    def _send(self, step: int, row: dict[str, Any]) -> None:
        if self._run is not None:
            row |= {name: self._pending_tables.pop(name) for name in list(self._pending_tables)}
            self._sender.submit(lambda: self._run and self._run.log(row, step=step, commit=True))

    # ---- the end

    def _on_stop_request(self) -> None:
        """Handle a stop request, from a sweep or from the web page. The client calls this in a thread of its own."""
        self.stop_requested = True
        if (signals := get_signal_handler()) is not None:
            signals.submit(StopRequest.early_stop)

    def is_asked_to_stop(self) -> bool:
        """Ask the server whether it requests a stop. Rank 0 uses this after a signal, because a signal does not name its sender."""
        if self._run is not None and not self.offline and not self.stop_requested:
            run = self._run
            self.stop_requested = wandb_client.is_stop_requested(run.entity, run.project, run.id)
        return self.stop_requested

    def close(self, status: str, summary: dict[str, Any], *, upload: bool = False) -> dict[str, str]:
        """Close the W&B run, with timeouts. Returns the names of the uploaded artifacts.

        Args:
            status: a key of `EXIT_CODES`.
            summary: fields for search and comparison of runs.
            upload: upload the artifacts that `logger.artifacts` lists.
        """
        if self._run is None:
            return {}
        self._row_buffer.flush()
        if not self._sender.wait(self.timeout_seconds or wandb_client.ANSWER_SECONDS):
            self._handle_client_failure(TimeoutError("it takes no rows"))
        names: dict[str, str] = {}
        self._call_client(lambda: self._run.summary.update(summary))
        if upload and self.logger.artifacts:
            self._call_client(
                lambda: names.update(wandb_client.upload_artifacts(self._run, self.run_dir, self.logger.artifacts))
            )
        if status == "preempted":
            self._call_client(lambda: self._run.mark_preempting())
        self._close_run(EXIT_CODES[status])
        return names

    def _close_run(self, exit_code: int) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        try:
            call_with_timeout(run.settings.finish_timeout + GRACE_SECONDS, lambda: run.finish(exit_code=exit_code))
            (wandb_client.move_closed_offline_runs if self.offline else wandb_client.delete_staged_files)(self.run_dir)
        except Exception as error:
            self.behind = True
            self.say(
                f"W&B: not everything could be uploaded ({_get_first_line(error)}). metrics.csv has all of it; the same command"
                " sends what is missing, once the server can be reached."
            )

    def _call_client(self, call: Callable[[], Any]) -> None:
        if self._run is None:
            return
        try:
            call()
        except Exception as error:  # a failure of the client must not stop the training
            self._handle_client_failure(error)

    def _handle_client_failure(self, error: Exception) -> None:
        run, self._run, self.behind = self._run, None, True
        self.say(
            f"W&B: its client gave up ({_get_first_line(error)}); training continues without it. metrics.csv has all of it; the same"
            " command sends what is missing."
        )
        if run is not None:
            with suppress(Exception):  # the client has failed already
                call_with_timeout(GRACE_SECONDS, lambda: run.finish(exit_code=1))


def _get_first_line(error: BaseException) -> str:
    text = redact_text(str(error)).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")

"""Pipeline: runs all stages of a recipe in order, each as an ordinary run in its own process. Finished stages are skipped.

On one device the processes come from a server that has imported what a stage needs (`stage_server.py`).
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TypeAlias

from lit_vlm.config import Run, build_stage_overrides, list_stages, parse
from lit_vlm.config.overrides import get_override_key, quote_value
from lit_vlm.config.pair_stages import PAIR_STAGES, is_pair_stage
from lit_vlm.config.schema import TrainerConfig
from lit_vlm.evaluation.exam import find_missing_items, make_items
from lit_vlm.fault_tolerance.exit_status import INTERRUPTED, RESTART, TERMINATED
from lit_vlm.fault_tolerance.oom import BUDGET_FILE as BUDGET
from lit_vlm.fault_tolerance.signals import EXIT_STATUS, STOP_REQUESTS, StopRequest
from lit_vlm.reports.exam import collect_columns, find_answers, list_exams, make_exam_table
from lit_vlm.reports.report import make_scores_table, make_summary_table, write_report
from lit_vlm.runs.run_folder import read_manifest
from lit_vlm.tasks.stage_server import ForkedProcess, StageServer, can_fork_stages
from lit_vlm.tasks.terminal import console, say
from lit_vlm.types import UserError

SHUTDOWN_TIMEOUT_SECONDS = 300  # that torchrun waits for its ranks after a signal
PROC_DIR = Path("/proc")
RUN_SCRIPT = Path(__file__).resolve().parents[2] / "run.py"
Process: TypeAlias = subprocess.Popen[bytes] | ForkedProcess
Start: TypeAlias = Callable[[list[str]], Process]  # starts a command


def run_pipeline(run: Run) -> None:
    """Run all stages of the recipe; at the end print the summary table and write the report.

    Raises:
        UserError: a stage failed. It has printed its own error; the next start resumes with this stage.
    """
    started = time.monotonic()
    with StageServer(_disable_signals) as server:
        folders = run_stages(run.config.recipe, run.overrides, server)
    if folders:
        show_results(run.config.recipe, Path(run.config.run_dir), folders, time.monotonic() - started)


def run_stages(recipe: str, given: list[str], server: StageServer) -> list[Path]:
    """Run the stages and their exams in order; return their run folders, [] if early stopping of a sweep ended a stage.

    Args:
        given: overrides of the pipeline.

    Raises:
        UserError: a stage failed.
    """
    stages, folders = list_stages(recipe, given), []
    for number, experiment in enumerate(stages, 1):
        overrides = [f"experiment={experiment}", *build_stage_overrides(given, experiment)]
        stage = parse(overrides)
        console.rule(f"{number}/{len(stages)}  {experiment}", align="left")
        start = choose_start(stage.dir, stage.config.trainer, server, overwrite=stage.config.overwrite)
        devices, max_oom_retries = stage.config.trainer.devices, stage.config.guard.max_oom_retries
        exit_code = run_stage(stage.dir, overrides, devices, max_oom_retries, start)
        if exit_code in (RESTART, INTERRUPTED, TERMINATED):  # the stage has reported the reason
            raise SystemExit(exit_code)
        if exit_code:
            raise UserError(
                f"{experiment} ended with exit status {exit_code}; see above. `python run.py` resumes it when that is mended."
            )
        if (read_manifest(stage.dir) or {}).get("status") == "stopped":  # early stopping of a sweep ended this run
            return []
        folders.append(stage.dir)
        exam_items = 1 if stage.config.debug else stage.config.evaluate.exam_items
        if stage.config.evaluate.exam_items != 0 and not is_pair_stage(stage.config.stage):
            take_exam(stage.dir, overrides, exam_items, server.start if can_fork_stages() else None)
    return folders


def choose_start(run_dir: Path, trainer: TrainerConfig, server: StageServer, *, overwrite: bool) -> Start | None:
    """Choose how the process of a stage starts: from the server, if the stage trains on one device of this machine.

    A finished stage only says so, which needs none of what the server imports.
    """
    is_finished = (read_manifest(run_dir) or {}).get("status") == "finished" and not overwrite
    is_alone = trainer.devices == 1 and trainer.num_nodes == 1
    return server.start if can_fork_stages() and is_alone and not is_finished else None


def show_results(recipe: str, run_dir: Path, folders: list[Path], seconds: float) -> None:
    """Write the report of all stages, print the tables of their results, and name the model."""
    report = run_dir / _get_report_name(recipe, folders)
    write_report(report, folders, recipe)
    console.print(make_summary_table(folders))
    console.print(make_scores_table(folders))
    if exams := list_exams(folders):
        console.print(make_exam_table(exams))
        for column in collect_columns(exams):
            if column.note:
                console.print(f"{column.title}: {column.note}.", soft_wrap=True, markup=False)
    console.print(f"{seconds:.0f} s in all. Report: {report}", soft_wrap=True)
    if not (folders[-1] / "hf").is_dir():
        console.print(
            f"No model (export=false); python run.py task=export init_from={folders[-1]} makes it.", soft_wrap=True
        )
        return
    answers = (read_manifest(folders[-1]) or {}).get("stage") not in PAIR_STAGES
    hint = f"   Ask it: python run.py task=chat init_from={folders[-1] / 'hf'} image=PICTURE" if answers else ""
    console.print(f"Model: {folders[-1] / 'hf'}{hint}", soft_wrap=True)


def take_exam(run_dir: Path, overrides: list[str], exam_items: int | None, start: Start | None = None) -> None:
    """Take the exam with the model of a finished stage, in a process of its own, unless it has been taken.

    A failed exam does not stop the pipeline: the report shows no scores of this stage.

    Args:
        start: see `run_process`.
    """
    model = run_dir / "hf"
    if not model.is_dir():
        say(f"No exam: {run_dir} has no model (export=false).")
        return
    answers = find_answers(run_dir)
    if answers is not None and not list(find_missing_items(answers, make_items(exam_items))):
        return
    dropped = ("task", "init_from", "overwrite", "run_name", "evaluate.exam_items")
    kept = [text for text in overrides if get_override_key(text) not in dropped]
    own = [f"evaluate.exam_items={'null' if exam_items is None else exam_items}"]
    command = build_command(1, ["task=exam", *kept, *own, f"init_from={quote_value(model.as_posix())}"])
    exit_code, _ = run_process(command, start)
    if exit_code in (RESTART, INTERRUPTED, TERMINATED):
        raise SystemExit(exit_code)
    if exit_code:
        say(f"The exam of {model} ended with exit status {exit_code}; see above. The same command takes it again.")


def run_stage(
    run_dir: Path, overrides: list[str], devices: int, max_oom_retries: int, start: Start | None = None
) -> int:
    """Run a stage to its end and return its exit status.

    torchrun always exits with 1, whatever the exit status of its ranks is. So after a signal this function returns the status
    that the ranks have. After out of memory the ranks halve the micro-batch budget; then the stage restarts at once, at most
    guard.max_oom_retries times.

    Args:
        start: see `run_process`.
    """
    for _ in range(1 + max_oom_retries):
        budget = _read_budget(run_dir)
        status, stop_requests = run_process(build_command(devices, overrides), start)
        if not status or devices == 1:
            break
        if stop_requests:
            return INTERRUPTED if StopRequest.interrupt in stop_requests else RESTART
        if _read_budget(run_dir) in ("", budget):
            break
    return status


def _read_budget(folder: Path) -> str:
    """Read the micro-batch budget that ranks wrote after out of memory; "" if there is none."""
    file = folder / BUDGET
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def run_process(command: list[str], start: Start | None = None) -> tuple[int, list[StopRequest]]:
    """Run a process to its end and forward to it the signals that this process receives.

    A child without a signal handler has not started its work yet, so it is killed. If the child finishes successfully
    although a signal came, this process then ends by that signal.

    Args:
        start: starts the process; None: it is a child of this process.

    Returns:
        The exit status, and the stop requests that were received.
    """
    received: list[int] = []
    process: Process | None = None

    def forward_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            _send_signal(process, number)

    old_handlers = {number: signal.signal(number, forward_signal) for number in STOP_REQUESTS}
    try:
        process = (start or _start_child)(command)
        for number in received:  # received before the process existed
            _send_signal(process, number)
        status = process.wait()
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
    if received and status == 0:
        signal.raise_signal(received[0])
    stop_requests = [STOP_REQUESTS[signal.Signals(number)] for number in received]
    return EXIT_STATUS[stop_requests[0]] if received and status == -signal.SIGKILL else status, stop_requests


def _start_child(command: list[str]) -> subprocess.Popen[bytes]:
    # the terminal sends Ctrl-C to the child as well, perhaps before its Python is set up
    return subprocess.Popen(command, preexec_fn=_disable_signals if PROC_DIR.is_dir() else None)


def _disable_signals() -> None:
    """Ignore all stop signals until the child installs its own handlers."""
    for number in STOP_REQUESTS:
        signal.signal(number, signal.SIG_IGN)


def _send_signal(process: Process, number: int) -> None:
    """Send a signal to a process that handles it; kill one that does not handle it yet."""
    if _has_signal_handler(process.pid, number):
        process.send_signal(number)
    else:
        process.kill()


def _has_signal_handler(pid: int, number: int) -> bool:
    """Return whether the process has a handler for this signal; True on a system without /proc."""
    try:
        lines = (PROC_DIR / str(pid) / "status").read_text().splitlines()
    except OSError:
        return True
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def build_command(devices: int, overrides: list[str]) -> list[str]:
    """Build the command line of a stage: one process, or one process per device with torchrun."""
    if devices == 1:
        return [sys.executable, str(RUN_SCRIPT), *overrides]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={devices}",
        f"--shutdown-timeout={SHUTDOWN_TIMEOUT_SECONDS}",
        f"--signals-to-handle={','.join(number.name for number in STOP_REQUESTS)}",
        str(RUN_SCRIPT),
        *overrides,
    ]


def _get_report_name(recipe: str, folders: list[Path]) -> str:
    """Return the report's path below run_dir: the recipe's name, and the hash of the last run if settings were changed."""
    name = (read_manifest(folders[-1]) or {})["name"]
    suffix = name.removeprefix(recipe).split("-", 1)
    return f"{recipe}/report{'-' + suffix[1] if len(suffix) > 1 else ''}.html"

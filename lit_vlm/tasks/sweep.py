"""task=sweep: runs the trials of a sweep file, each as an ordinary run in its own process. Read top to bottom."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lit_vlm.cluster.batch_script import build_step_command
from lit_vlm.cluster.slurm import get_environment_outside_job, get_own_job, is_preempted, requeue
from lit_vlm.config import ConfigError, Run, parse
from lit_vlm.config.overrides import add_implied_overrides, quote_value
from lit_vlm.config.parse import collect_override_errors
from lit_vlm.config.schema import DataConfig, TrainerConfig
from lit_vlm.config.slurm_options import GPU_ACCELERATORS, get_cpus_per_task
from lit_vlm.config.sweep_overrides import get_trial_overrides
from lit_vlm.config.task_settings import TrialsConfig
from lit_vlm.fault_tolerance.exit_status import INTERRUPTED, RESTART
from lit_vlm.fault_tolerance.signals import StopRequest
from lit_vlm.files import CorruptFileError, read_json, write_json
from lit_vlm.formatting import format_count
from lit_vlm.redaction import find_secret_errors
from lit_vlm.runs.run_folder import get_command_line, require_writable
from lit_vlm.sweep.report import SweepReport, make_parameter_table, make_trial_table, write_sweep_report
from lit_vlm.sweep.results import TrialRecord, find_best_trial
from lit_vlm.sweep.search import Search
from lit_vlm.sweep.sweep_file import (
    SearchMethod,
    SweepFile,
    build_trial_overrides,
    build_value_overrides,
    format_command,
    format_trial_command,
    try_read_sweep,
)
from lit_vlm.sweep.trial_runner import DeviceGroup, TrialProcess, TrialRunner, collect_records
from lit_vlm.sweep.validation import find_sweep_errors
from lit_vlm.tasks.pipeline import build_command
from lit_vlm.tasks.submit import find_queued_workers, submit_workers
from lit_vlm.tasks.terminal import console, say
from lit_vlm.types import UserError

DEFAULT_NUM_TRIALS = 20  # if neither the settings nor the file give a number
JOURNAL_FILE, SETTINGS_FILE, REPORT_FILE = "journal.log", "sweep.json", "sweep.html"


@dataclass(frozen=True, slots=True)
class Sweep:
    """Sweep: its name and folder, the file with its search space, and the overrides of every trial.

    Attributes:
        overrides: for every trial.
        overwrite: replace another or a finished sweep in the folder.
    """

    name: str
    dir: Path
    file: SweepFile
    overrides: list[str]
    trials: TrialsConfig
    seed: int
    overwrite: bool

    @property
    def metric(self) -> str:
        assert self.file.metric is not None
        return self.file.metric.name

    @property
    def num_trials(self) -> int | None:
        """Total number of trials; None: the size of the grid."""
        count = self.trials.count or self.file.run_cap
        return count if count or self.file.method is SearchMethod.grid else DEFAULT_NUM_TRIALS

    def build_overrides(self, number: int, parameters: dict[str, Any]) -> list[str]:
        """Build the overrides of a trial, with its run name."""
        return [
            *build_trial_overrides(self.file, parameters, self.overrides),
            f"run_name={quote_value(f'{self.name}/{number}')}",
        ]

    def create_search(self, journal_path: Path | None) -> Search:
        """Create the search; with a journal file it resumes what the file holds."""
        return Search(self.file, journal_path, seed=self.seed, max_trials=self.num_trials)


def run_sweep(run: Run) -> None:
    """Run all trials; then write the report and print the best command. The same command resumes an interrupted sweep.

    Raises:
        UserError: the file has errors, the folder holds another sweep, or the first trials all failed.
    """
    trials = run.config.trials
    sweep = load_sweep(
        run.name,
        run.dir,
        run.config.sweep or "",
        run.overrides,
        trials,
        seed=run.config.seed,
        overwrite=run.config.overwrite,
    )
    if trials.dry_run:
        show_plan(sweep)
    require_writable(run.dir)
    if trials.worker is not None:
        run_trials(sweep)
    elif trials.slurm:
        submit_workers(
            run.name,
            run.dir,
            run.overrides,
            trials,
            get_example_overrides(sweep),
            lambda: prepare_sweep_folder(sweep),
        )
    elif not trials.dry_run:
        with lock_sweep_folder(run.dir):
            prepare_sweep_folder(sweep)
            run_trials(sweep)


def load_sweep(
    name: str, folder: Path, path: str, given: list[str], trials: TrialsConfig, *, seed: int, overwrite: bool
) -> Sweep:
    """Load the sweep file and validate it against the schema; all errors are raised at once.

    Args:
        path: sweep file.
        given: overrides of the command line.
    """
    file, errors = try_read_sweep(Path(path).expanduser())
    if secret_errors := find_secret_errors(file.raw):
        raise ConfigError([f"{file.location}: {error}" for error in secret_errors])
    overrides = get_trial_overrides(given)
    errors += find_sweep_errors(file, overrides)
    if file.metric is None and not any("metric" in error for error in errors):
        errors.append(
            f"{file.location}: metric: is missing; say by what trials are compared, metric: {{name: val/loss}}."
        )
    if trials.carry_to and not errors:
        errors += _find_carry_to_errors(file, trials.carry_to)
    if errors:
        raise ConfigError(errors)
    return Sweep(name, folder, file, overrides, trials, seed, overwrite)


def _find_carry_to_errors(file: SweepFile, experiment: str) -> list[str]:
    """Find the parameters of the search space that the experiment of trials.carry_to refuses."""
    overrides = build_value_overrides({key: one.list_example_values()[0] for key, one in file.search_space.items()})
    errors_by_override = collect_override_errors(add_implied_overrides([f"experiment={experiment}", *overrides]))
    return [f"trials.carry_to={experiment}: {error}" for errors in errors_by_override.values() for error in errors]


def run_trials(sweep: Sweep) -> None:
    """Run trials in this process's children until none is left or a stop signal arrives."""
    trials = sweep.trials
    in_slurm = trials.worker is not None
    search = sweep.create_search(sweep.dir / JOURNAL_FILE)
    known_trials = search.list_trials()
    say(f"{sweep.name}: {_format_start(search, len(known_trials))}. Folder: {sweep.dir}")
    runner = TrialRunner(
        search,
        sweep.metric,
        sweep.dir,
        lambda number, parameters: make_trial_process(sweep, number, parameters),
        device_groups=[()]
        if in_slurm
        else assign_devices(parse(get_example_overrides(sweep)).config.trainer, trials.parallel),
        worker=trials.worker or 0,
        num_workers=trials.slurm or 1,
        say=say,
        on_change=lambda: try_write_report(sweep, search),
    )
    stop_requests = runner.run()
    if stop_requests:
        stop_sweep(sweep, stop_requests)
    if in_slurm and search.list_unfinished_trials():
        try_write_report(sweep, search)
        say(f"{sweep.name}: nothing is left to begin; other workers have trials under way.")
    else:
        show_results(sweep, search)


def _format_start(search: Search, num_known: int) -> str:
    """Format the first line: a new sweep, or one that resumes after `num_known` trials."""
    total = f"{search.max_trials:,}" if search.max_trials is not None else "all"
    return f"resumes after {num_known:,} of {total} trials" if num_known else f"{total} trials"


def make_trial_process(sweep: Sweep, number: int, parameters: dict[str, Any]) -> TrialProcess:
    """Make the process of a trial: a single process, torchrun with one per device, or a step of a Slurm job of several nodes."""
    overrides = sweep.build_overrides(number, parameters)
    trial_run = parse(overrides)
    config = trial_run.config
    in_step = sweep.trials.worker is not None and config.trainer.num_nodes > 1
    if in_step:
        environment = dict(os.environ)
        command = build_step_command(get_cpus_per_task(config.submit, config.data.num_workers), overrides)
    else:
        environment, command = get_environment_outside_job(), build_command(config.trainer.devices, overrides)
    return TrialProcess(number, parameters, trial_run.dir, command, environment, is_slurm_step=in_step)


def assign_devices(trainer: TrainerConfig, parallel: int | None) -> list[DeviceGroup]:
    """Assign a group of devices to each of the trials that run in parallel.

    Args:
        trainer: trainer settings of one trial.
        parallel: number of trials at a time; None: as many as the devices allow.

    Raises:
        UserError: a trial needs more devices than this machine has, or several machines.
    """
    if trainer.num_nodes > 1:
        raise UserError(
            f"A trial of {trainer.num_nodes} machines (trainer.num_nodes) needs a cluster: trials.slurm=<workers>."
        )
    devices = list_visible_devices() if trainer.accelerator in (*GPU_ACCELERATORS, "auto") else []
    if not devices:
        return [()] * (parallel or 1)
    num_devices = trainer.devices
    groups = [
        tuple(devices[start : start + num_devices]) for start in range(0, len(devices) - num_devices + 1, num_devices)
    ]
    if not groups:
        raise UserError(
            f"A trial needs {num_devices} devices (trainer.devices), and this machine shows {len(devices)}."
        )
    return [groups[index % len(groups)] for index in range(parallel or len(groups))]


def list_visible_devices() -> list[str]:
    """List the CUDA devices by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return given.split(",")[:count] if given else [str(number) for number in range(count)]


def get_example_overrides(sweep: Sweep) -> list[str]:
    """Return the overrides of one example trial. The devices that a trial needs do not depend on its values."""
    return sweep.build_overrides(
        0, {**sweep.file.fixed, **{key: one.list_example_values()[0] for key, one in sweep.file.search_space.items()}}
    )


@contextmanager
def lock_sweep_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of the sweep's folder. UserError if another process of this machine runs the sweep."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"The sweep in {folder} runs already, in another process. Let it end, or run more trials at a time with"
            " trials.parallel=..., or give this one a name of its own with run_name=..."
        ) from None
    try:
        yield
    finally:
        lock.release()


def prepare_sweep_folder(sweep: Sweep) -> None:
    """Prepare the folder: create it, resume the sweep in it, or with overwrite=true delete another or a finished sweep.

    Raises:
        UserError: the folder holds another sweep, or workers of this one are in the Slurm queue.
    """
    path, folder = sweep.dir / SETTINGS_FILE, sweep.dir
    if number := find_queued_workers(folder):
        raise UserError(
            f"{sweep.name}: its workers are in the queue already, as job {number}. `scancel {number}` ends them."
        )
    current = json.loads(json.dumps({"file": sweep.file.raw, "overrides": sweep.overrides}))
    known = read_settings(path, current)
    if known is not None and sweep.overwrite and (known != current or is_complete(sweep)):
        delete_trials(folder)
    elif known is not None and known != current:
        difference = "the sweep file" if known["file"] != current["file"] else "the overrides for its trials"
        raise UserError(
            f"{folder} holds a sweep that differs from this one in {difference}. Give this one a folder of its own with"
            " run_name=sweeps/<name>, or replace the old one and its trials with overwrite=true."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, current, indent=2)


def read_settings(path: Path, current: dict[str, Any]) -> dict[str, Any] | None:
    """Read the sweep file and the overrides that the folder's sweep was started with; None if there is none.

    If the file is damaged, this is reported and `current` takes its place: it is written again, and the search resumes from
    its journal.
    """
    try:
        known = read_json(path, "")
        if known is None or {"file", "overrides"} <= known.keys():
            return known
        problem = f"{path} is damaged: it lacks what every one has."
    except CorruptFileError as error:
        problem = str(error).strip()
    say(f"{problem} The sweep file and the overrides of this start are taken for the original ones.")
    return current


def is_complete(sweep: Sweep) -> bool:
    """Return whether all trials of the folder's sweep have an outcome."""
    search = sweep.create_search(sweep.dir / JOURNAL_FILE)
    return not search.list_unfinished_trials() and len(search.list_trials()) == search.max_trials


def delete_trials(folder: Path) -> None:
    """Delete the trials and the journal of a sweep."""
    for trial in folder.iterdir():
        if trial.is_dir() and trial.name.isdigit():
            shutil.rmtree(trial)
    for file in folder.glob(f"{JOURNAL_FILE}*"):
        file.unlink()


def stop_sweep(sweep: Sweep, stop_requests: list[StopRequest]) -> None:
    """Stop after the trials have saved: requeue the Slurm job if that was requested, report how to resume, and exit."""
    number = get_own_job() if sweep.trials.worker is not None else None
    if number and StopRequest.interrupt not in stop_requests:
        should_requeue = StopRequest.requeue in stop_requests or is_preempted(number)
        reason = requeue(number) if should_requeue else "it was asked to leave"
        say(f"{sweep.name}: saved; job {number} is {f'not requeued ({reason})' if reason else 'requeued'}.")
    say(f"{sweep.name}: stopped, its trials are saved. The same command resumes it.")
    raise SystemExit(INTERRUPTED if StopRequest.interrupt in stop_requests else RESTART)


def make_report(sweep: Sweep, search: Search) -> SweepReport:
    """Make the report of the trials so far."""
    records = collect_records(search, sweep.dir, sweep.metric)
    best = find_best_trial(records, sweep.file.goal)
    return SweepReport(
        sweep=sweep.file,
        records=records,
        total=search.max_trials,
        command=format_trial_command(sweep.file, best.parameters, sweep.overrides) if best else "",
        carried=format_carry_to_command(sweep, best) if best else "",
        own_command=get_command_line(),
    )


def try_write_report(sweep: Sweep, search: Search) -> None:
    """Write the report between trials. An error is only reported: it must not end hours of training."""
    try:
        write_sweep_report(sweep.dir / REPORT_FILE, make_report(sweep, search))
    except Exception as error:
        say(f"{sweep.dir / REPORT_FILE} could not be written: {error!r}")


def format_carry_to_command(sweep: Sweep, best: TrialRecord) -> str:
    """Format the command that uses the best values of the search space in another experiment; "" without trials.carry_to."""
    experiment = sweep.trials.carry_to
    values = {key: value for key, value in best.parameters.items() if key in sweep.file.search_space}
    return format_command([f"experiment={experiment}", *build_value_overrides(values)]) if experiment else ""


def show_results(sweep: Sweep, search: Search) -> None:
    """Write the report, show the table of trials, and print the command of the best trial.

    Raises:
        UserError: no trial finished.
    """
    report = make_report(sweep, search)
    write_sweep_report(sweep.dir / REPORT_FILE, report)
    console.print(make_trial_table(report))
    best = find_best_trial(report.records, sweep.file.goal)
    if best is None:
        raise UserError(f"No trial of {sweep.name} finished, so there is no best one. Page: {sweep.dir / REPORT_FILE}")
    say(f"Best: trial {best.number}, {sweep.metric} {best.logged_value:.5g}, in {best.folder}")
    say(f"  {report.command}")
    if report.carried:
        say(f"Carried over:\n  {report.carried}")
    say(f"Page: {sweep.dir / REPORT_FILE}")


def show_plan(sweep: Sweep) -> None:
    """Show the search space with ranges and comments, and the first commands. Nothing is run or written."""
    search = sweep.create_search(None)
    console.print(make_parameter_table(sweep.file))
    total = f"{search.max_trials:,} trials" if search.max_trials is not None else "trials without end"
    say(f"{sweep.file.method.value}, {total}, by {sweep.metric} ({sweep.file.goal.value}). The first ones:")
    for _ in range(3):
        if (trial := search.ask()) is not None:
            say(f"  {format_command(sweep.build_overrides(trial.number, trial.parameters))}")
    config = parse(get_example_overrides(sweep)).config
    if hint := format_missing_held_out(sweep.metric, config.data, config.seed):
        say(hint)


def format_missing_held_out(metric: str, data: DataConfig, seed: int) -> str:
    """Format the hint for trials whose metric needs held-out samples although none would be held out; empty otherwise."""
    from lit_vlm.data.sources import open_source

    if not metric.startswith(("val/", "score/")) or data.validation.sources:
        return ""
    sizes = []
    with suppress(UserError):  # a source that cannot be opened is the error of each trial
        for name, source in data.sources.items():
            sizes.append(len(open_source(name, source, max_image_pixels=data.max_image_pixels, seed=seed)))
    if not sizes or any(int(size * data.validation.fraction) for size in sizes):
        return ""
    return (
        f"No trial will log {metric}: data.validation.fraction={data.validation.fraction:g} holds out none of"
        f" {format_count(sum(sizes), 'record')}. Add data.validation.fraction=0.1 to the command."
    )

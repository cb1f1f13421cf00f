"""task=sweep: runs the trials of a sweep file, each as an ordinary run in its own process. Read top to bottom."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lit_vlm.config import ConfigError, Run, RunConfig, parse
from lit_vlm.config.job import GPU
from lit_vlm.config.overrides import quote, with_implied
from lit_vlm.config.parse import wrong_words
from lit_vlm.config.sweep import trial_overrides
from lit_vlm.engine.exits import INTERRUPTED, RESTART
from lit_vlm.engine.run_folder import require_writable
from lit_vlm.engine.signals import Ask
from lit_vlm.engine.slurm import is_preempted, outside_of_job, own_job, requeue
from lit_vlm.engine.slurm_script import step_command
from lit_vlm.files import DamagedFile, read_json, write_json
from lit_vlm.secrets import mistakes_of_secrets
from lit_vlm.sweep.file import Method, SweepFile, look_at
from lit_vlm.sweep.mistakes import mistakes_in_sweep
from lit_vlm.sweep.process import TrialProcess
from lit_vlm.sweep.records import TrialRecord, best_of
from lit_vlm.sweep.report import Page, write_sweep_report
from lit_vlm.sweep.search import Search
from lit_vlm.sweep.table import parameter_table, trial_table
from lit_vlm.sweep.trials import Place, Trials, records_of
from lit_vlm.sweep.words import command_line, command_of, trial_words, value_words
from lit_vlm.tasks.pipeline import command
from lit_vlm.tasks.sweep_slurm import queued_workers, submit_workers
from lit_vlm.tasks.terminal import console, say
from lit_vlm.types import UserError

COUNT = 20  # if neither the settings nor the file give a number
JOURNAL, SETTINGS, PAGE = "journal.log", "sweep.json", "sweep.html"


@dataclass(frozen=True, slots=True)
class Sweep:
    """Sweep: the file with its search space, the run with its folder, and the overrides of every trial."""

    run: Run
    file: SweepFile
    given: list[str]  # for every trial

    @property
    def metric(self) -> str:
        assert self.file.metric is not None
        return self.file.metric.name

    @property
    def count(self) -> int | None:
        """Total number of trials; None: the size of the grid."""
        count = self.run.config.trials.count or self.file.run_cap
        return count if count or self.file.method is Method.grid else COUNT

    def words(self, number: int, parameters: dict[str, Any]) -> list[str]:
        """Build the overrides of a trial, with its run name."""
        return [*trial_words(self.file, parameters, self.given), f"run_name={quote(f'{self.run.name}/{number}')}"]

    def search(self, journal: Path | None) -> Search:
        """Create the search; with a journal file it resumes what the file holds."""
        return Search(self.file, journal, seed=self.run.config.seed, most=self.count)


def sweep(run: Run) -> None:
    """Run all trials; then write the report and print the best command. The same command resumes an interrupted sweep.

    Raises:
        UserError: the file has errors, the folder holds another sweep, or the first trials all failed.
    """
    trials = run.config.trials
    sweep = read(run)
    if trials.dry_run:
        show_plan(sweep)
    require_writable(run.dir)
    if trials.worker is not None:
        carry_out(sweep)
    elif trials.slurm:
        submit_workers(run, first_words(sweep), lambda: settle_folder(sweep))
    elif not trials.dry_run:
        with alone(run.dir):
            settle_folder(sweep)
            carry_out(sweep)


def read(run: Run) -> Sweep:
    """Load the sweep file and validate it against the schema; all errors are raised at once."""
    file, errors = look_at(Path(run.config.sweep).expanduser())
    if secret_errors := mistakes_of_secrets(file.plain):
        raise ConfigError([f"{file.place}: {error}" for error in secret_errors])
    overrides = trial_overrides(run.overrides)
    errors += mistakes_in_sweep(file, overrides)
    if file.metric is None and not any("metric" in error for error in errors):
        errors.append(f"{file.place}: metric: is missing; say by what trials are compared, metric: {{name: val/loss}}.")
    if run.config.trials.carry_to and not errors:
        errors += _not_carried(file, run.config.trials.carry_to)
    if errors:
        raise ConfigError(errors)
    return Sweep(run, file, overrides)


def _not_carried(file: SweepFile, experiment: str) -> list[str]:
    """Find the parameters of the search space that the experiment of trials.carry_to refuses."""
    overrides = value_words({key: one.samples()[0] for key, one in file.swept.items()})
    errors_by_override = wrong_words(with_implied([f"experiment={experiment}", *overrides]))
    return [f"trials.carry_to={experiment}: {error}" for errors in errors_by_override.values() for error in errors]


def carry_out(job: Sweep) -> None:
    """Run trials in this process's children until none is left or a stop signal arrives."""
    run, trials = job.run, job.run.config.trials
    in_slurm = trials.worker is not None
    search = job.search(run.dir / JOURNAL)
    known_trials = search.trials()
    say(f"{run.name}: {_begins(search, len(known_trials))}. Folder: {run.dir}")
    runner = Trials(
        search,
        job.metric,
        run.dir,
        lambda number, parameters: make_process(job, number, parameters),
        places=[()] if in_slurm else places_of(parse(first_words(job)).config, trials.parallel),
        worker=trials.worker or 0,
        num_workers=trials.slurm or 1,
        say=say,
        on_change=lambda: try_page(job, search),
    )
    stop_requests = runner.run()
    if stop_requests:
        leave(job, stop_requests)
    if in_slurm and search.unfinished():
        try_page(job, search)
        say(f"{run.name}: nothing is left to begin; other workers have trials under way.")
    else:
        finish(job, search)


def _begins(search: Search, known: int) -> str:
    """Format the first line: a new sweep, or one that resumes after `num_known` trials."""
    total = f"{search.most:,}" if search.most is not None else "all"
    return f"goes on behind {known:,} of {total} trials" if known else f"{total} trials"


def make_process(job: Sweep, number: int, parameters: dict[str, Any]) -> TrialProcess:
    """Make the process of a trial: a single process, torchrun with one per device, or a step of a Slurm job of several nodes."""
    overrides = job.words(number, parameters)
    trial_run = parse(overrides)
    in_step = job.run.config.trials.worker is not None and trial_run.config.trainer.num_nodes > 1
    environment = dict(os.environ) if in_step else outside_of_job()
    trial_command = step_command(trial_run.config, overrides) if in_step else command(trial_run, overrides)
    return TrialProcess(number, parameters, trial_run.dir, trial_command, environment, in_step=in_step)


def places_of(config: RunConfig, parallel: int | None) -> list[Place]:
    """Assign a group of devices to each of the trials that run in parallel.

    Args:
        config: of one trial.
        parallel: number of trials at a time; None: as many as the devices allow.

    Raises:
        UserError: a trial needs more devices than this machine has, or several machines.
    """
    if config.trainer.num_nodes > 1:
        raise UserError(
            f"A trial of {config.trainer.num_nodes} machines (trainer.num_nodes) needs a cluster: trials.slurm=<workers>."
        )
    devices = visible_devices() if config.trainer.accelerator in (*GPU, "auto") else []
    if not devices:
        return [()] * (parallel or 1)
    num_devices = config.trainer.devices
    groups = [
        tuple(devices[start : start + num_devices]) for start in range(0, len(devices) - num_devices + 1, num_devices)
    ]
    if not groups:
        raise UserError(
            f"A trial needs {num_devices} devices (trainer.devices), and this machine shows {len(devices)}."
        )
    return [groups[index % len(groups)] for index in range(parallel or len(groups))]


def visible_devices() -> list[str]:
    """List the CUDA devices by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return given.split(",")[:count] if given else [str(number) for number in range(count)]


def first_words(job: Sweep) -> list[str]:
    """Return the overrides of one example trial. The devices that a trial needs do not depend on its values."""
    return job.words(0, {**job.file.fixed, **{key: one.samples()[0] for key, one in job.file.swept.items()}})


@contextmanager
def alone(folder: Path) -> Iterator[None]:
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


def settle_folder(job: Sweep) -> None:
    """Prepare the folder: create it, resume the sweep in it, or with overwrite=true delete another or a finished sweep.

    Raises:
        UserError: the folder holds another sweep, or workers of this one are in the Slurm queue.
    """
    path, folder = job.run.dir / SETTINGS, job.run.dir
    if number := queued_workers(folder):
        raise UserError(
            f"{job.run.name}: its workers are in the queue already, as job {number}. `scancel {number}` ends them."
        )
    current = json.loads(json.dumps({"file": job.file.plain, "overrides": job.given}))
    known = read_settings(path, current)
    if known is not None and job.run.config.overwrite and (known != current or is_complete(job)):
        empty(folder)
    elif known is not None and known != current:
        difference = "the sweep file" if known["file"] != current["file"] else "the overrides for its trials"
        raise UserError(
            f"{folder} holds a sweep that differs from this one in {difference}. Give this one a folder of its own with"
            " run_name=sweeps/<name>, or replace the old one and its trials with overwrite=true."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, current, indent=2)


def read_settings(path: Path, mine: dict[str, Any]) -> dict[str, Any] | None:
    """Read the sweep file and the overrides that the folder's sweep was started with; None if there is none.

    If the file is damaged, this is reported and `current` takes its place: it is written again, and the search resumes from
    its journal.
    """
    try:
        known = read_json(path, "")
        if known is None or {"file", "overrides"} <= known.keys():
            return known
        problem = f"{path} is damaged: it lacks what every one has."
    except DamagedFile as error:
        problem = str(error).strip()
    say(f"{problem} The sweep file and the words of this start are taken for those that it was begun with.")
    return mine


def is_complete(job: Sweep) -> bool:
    """Return whether all trials of the folder's sweep have an outcome."""
    search = job.search(job.run.dir / JOURNAL)
    return not search.unfinished() and len(search.trials()) == search.most


def empty(folder: Path) -> None:
    """Delete the trials and the journal of a sweep."""
    for trial in folder.iterdir():
        if trial.is_dir() and trial.name.isdigit():
            shutil.rmtree(trial)
    for file in folder.glob(f"{JOURNAL}*"):
        file.unlink()


def leave(job: Sweep, asked: list[Ask]) -> None:
    """Stop after the trials have saved: requeue the Slurm job if that was requested, report how to resume, and exit."""
    number = own_job() if job.run.config.trials.worker is not None else None
    if number and Ask.interrupt not in asked:
        should_requeue = Ask.requeue in asked or is_preempted(number)
        reason = requeue(number) if should_requeue else "it was asked to leave"
        say(f"{job.run.name}: saved; job {number} is {f'not requeued ({reason})' if reason else 'requeued'}.")
    say(f"{job.run.name}: stopped, its trials are saved. The same command goes on.")
    raise SystemExit(INTERRUPTED if Ask.interrupt in asked else RESTART)


def page_of(job: Sweep, search: Search) -> Page:
    """Make the report of the trials so far."""
    records = records_of(search, job.run.dir, job.metric)
    best = best_of(records, job.file.metric.goal)
    return Page(
        sweep=job.file,
        records=records,
        total=search.most,
        command=command_of(job.file, best.parameters, job.given) if best else "",
        carried=carried_command(job, best) if best else "",
    )


def try_page(job: Sweep, search: Search) -> None:
    """Write the report between trials. An error is only reported: it must not end hours of training."""
    try:
        write_sweep_report(job.run.dir / PAGE, page_of(job, search))
    except Exception as error:
        say(f"{job.run.dir / PAGE} could not be written: {error!r}")


def carried_command(job: Sweep, best: TrialRecord) -> str:
    """Format the command that uses the best values of the search space in another experiment; "" without trials.carry_to."""
    experiment = job.run.config.trials.carry_to
    values = {key: value for key, value in best.parameters.items() if key in job.file.swept}
    return command_line([f"experiment={experiment}", *value_words(values)]) if experiment else ""


def finish(job: Sweep, search: Search) -> None:
    """Write the report, show the table of trials, and print the command of the best trial.

    Raises:
        UserError: no trial finished.
    """
    report = page_of(job, search)
    write_sweep_report(job.run.dir / PAGE, report)
    console.print(trial_table(report))
    best = best_of(report.records, job.file.metric.goal)
    if best is None:
        raise UserError(f"No trial of {job.run.name} finished, so there is no best one. Page: {job.run.dir / PAGE}")
    say(f"Best: trial {best.number}, {job.metric} {best.value:.5g}, in {best.folder}")
    say(f"  {report.command}")
    if report.carried:
        say(f"Carried over:\n  {report.carried}")
    say(f"Page: {job.run.dir / PAGE}")


def show_plan(job: Sweep) -> None:
    """Show the search space with ranges and comments, and the first commands. Nothing is run or written."""
    search = job.search(None)
    console.print(parameter_table(job.file))
    total = f"{search.most:,} trials" if search.most is not None else "trials without end"
    say(f"{job.file.method.value}, {total}, by {job.metric} ({job.file.metric.goal.value}). The first ones:")
    for _ in range(3):
        if (trial := search.ask()) is not None:
            say(f"  {command_line(job.words(trial.number, trial.parameters))}")

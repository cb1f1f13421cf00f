"""Signals at random moments of a run's life: `python tests/tasks/signal_moments.py FOLDER [of each signal] [seed]`.

A chain is a run that is started, sent a signal and started again, until it has had all its signals; then it finishes. Half
of the chains start from a half-finished run. A moment is a share of the processor time of an undisturbed start, from the
first line of `run.py` to the end of the interpreter, so a busy machine has little effect. Every other moment is after the
imports. Each start must end with a documented status that matches its output, without a traceback and with whole files. The
last start of a chain must leave the model and the metrics of an undisturbed run.

Results are appended to FOLDER/moments.jsonl; the same command resumes after them.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from run_helpers import RUN, TINY, RunOutput, write_data_choice

from lit_vlm.checkpoint.folder import CheckpointFolder
from lit_vlm.checkpoint.resume import check_files, read_index
from lit_vlm.fault_tolerance.exit_status import INTERRUPTED, RESTART, TERMINATED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
AT_ONCE = {signal.SIGTERM: TERMINATED, signal.SIGINT: INTERRUPTED, signal.SIGUSR1: RESTART}
SAVED = AT_ONCE | {signal.SIGTERM: RESTART}
CHAIN = 24  # moments of one run
STEPS = 12
LIMIT = 600.0  # seconds of one start
ATTEMPTS = 8  # to send the signal before a run ends
KINDS = ([], ["data.num_workers=1"], [], ["logger.wandb=true", "logger.offline=true"])  # of chains, in turn
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1", "WANDB_SILENT": "true"}
IGNORED_FILES = (
    "held.json",
    "heartbeat",
    "stuck",
)  # they name the running process; what an ended process left in them has no effect


@dataclass
class Moment:
    """One signal and its result.

    Attributes:
        share: of the processor time of an undisturbed start.
        half: the chain started from a half-finished run.
        status: exit status of the process; None: it ended before the signal.
        answer: "left", "saved", "done" or "nothing", by the output.
        step: step of the newest checkpoint afterwards.
        seconds: time from the signal to the end.
    """

    number: int
    signal: str
    share: float
    kind: int
    half: bool
    status: int | None = None
    answer: str = ""
    step: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


@dataclass
class EndedProcess:
    status: int
    output: str
    signal_sent: bool  # before the end
    cpu_seconds: float  # processor time until the signal or the end
    first_output: float  # of these, before its first output
    seconds: float


class ReferenceRuns:
    """Folder with undisturbed runs to compare with."""

    def __init__(self, folder: Path, ranks: int = 1) -> None:
        self.folder, self.ranks = folder.resolve(), ranks
        self.folder.mkdir(parents=True, exist_ok=True)
        builtin = {"format": "builtin", "num_samples": 20}
        sources = {
            "caption": builtin | {"path": "caption", "language": "ko"},
            "text": builtin | {"path": "text", "language": "en"},
        }
        held_out = {"caption": builtin | {"path": "caption", "language": "en", "num_samples": 2}}
        validation = {"every_steps": 4, "max_samples": 1, "sources": held_out}
        self.overrides = [*TINY, "stage=sft", *write_data_choice(self.folder, sources=sources, validation=validation)]
        self.overrides += ["data.tokens_per_micro_batch=400", "trainer.log_every_n_steps=1", "max_new_tokens=8"]
        self.overrides += ["checkpoint.every_steps=1", f"trainer.max_steps={STEPS}"]
        if ranks > 1:
            self.overrides += [
                "trainer=ddp",
                "trainer.accelerator=cpu",
                f"trainer.devices={ranks}",
                "trainer.num_threads=1",
            ]
            self.overrides += ["trainer.precision=32-true"]

    def get_run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def start(
        self, name: str, extra: list[str], number: int = 0, is_due: Callable[[float], bool] = lambda used_seconds: False
    ) -> EndedProcess:
        """Start a run, and send it a signal when `is_due` is true of its processor time in seconds."""
        log = self.folder / "log.txt"
        command = [sys.executable]
        if self.ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
            command += ["--shutdown-timeout=120", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGUSR2"]
        command += [str(RUN), *self.overrides, f"run_name={name}", *extra]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, cwd=self.folder, env=os.environ | ENVIRONMENT, stdout=stream, stderr=stream
            )
        try:
            was_sent, used_seconds, first_output_at, at = _send_signal_when(process, number, is_due, log)
            status = process.wait(LIMIT)
        finally:
            process.kill()
        return EndedProcess(
            status, log.read_text(errors="replace"), was_sent, used_seconds, first_output_at, time.monotonic() - at
        )

    @cached_property
    def undisturbed(self) -> EndedProcess:
        """The undisturbed run."""
        shutil.rmtree(self.get_run_dir("whole"), ignore_errors=True)
        ended = self.start("whole", [])
        assert ended.status == 0, ended.output
        return ended

    @cached_property
    def half(self) -> EndedProcess:
        """A half-finished run. Its next start is measured on a copy."""
        shutil.rmtree(self.get_run_dir("half"), ignore_errors=True)
        shutil.rmtree(self.get_run_dir("rest"), ignore_errors=True)
        checkpoints = CheckpointFolder(self.get_run_dir("half") / "checkpoints")
        ended = self.start("half", [], signal.SIGTERM, lambda used_seconds: bool(checkpoints.list_steps()))
        assert checkpoints.list_steps() and "saved at step" in ended.output, ended.output
        shutil.copytree(self.get_run_dir("half"), self.get_run_dir("rest"))
        ended = self.start("rest", [])
        assert ended.status == 0, ended.output
        return ended


def _send_signal_when(
    process: subprocess.Popen, number: int, is_due: Callable[[float], bool], log: Path
) -> tuple[bool, float, float, float]:
    """Send the signal when it is due. Return whether it was sent, the processor time, that before output, and the clock."""
    clock = ((~process.pid) << 3) | 2  # clock_getcpuclockid(3)
    used_seconds, first_output_at, ready, end = 0.0, 0.0, False, time.monotonic() + LIMIT
    while time.monotonic() < end:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        used_seconds = time.clock_gettime(clock)
        first_output_at = first_output_at or (used_seconds if log.stat().st_size else 0.0)
        ready = ready or _has_signal_handlers(process.pid)
        if ready and is_due(used_seconds):
            os.kill(process.pid, number)
            return True, used_seconds, first_output_at, time.monotonic()
        time.sleep(0.001)
    return False, used_seconds, first_output_at, time.monotonic()


def _has_signal_handlers(pid: int) -> bool:
    """Return whether `run.py` blocks or handles signals. Before that, Python itself is starting."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigBlk:", "SigCgt:"))]
    return any(mask >> (signal.SIGUSR1 - 1) & 1 for mask in masks)


def sample_moments(of_each: int, seed: int) -> list[Moment]:
    """Sample all moments: evenly spread over the processor time for each signal, each at random within its part."""
    rng, count = Random(seed), of_each * len(SIGNALS)
    shares = {number: [(part + rng.random()) / of_each for part in range(of_each)] for number in SIGNALS}
    for found in shares.values():
        rng.shuffle(found)
    moments = []
    for n in range(count):
        number, chain = SIGNALS[n % len(SIGNALS)], n // CHAIN
        moments.append(
            Moment(n, number.name, shares[number].pop(), kind=chain % len(KINDS), half=chain // len(KINDS) % 2 == 1)
        )
    return moments


def run_moments(folder: Path, of_each: int, seed: int = 0, ranks: int = 1) -> list[Moment]:
    """Run all moments that FOLDER does not have already."""
    reference, results_file = ReferenceRuns(folder, ranks), folder / "moments.jsonl"
    lines = results_file.read_text().splitlines() if results_file.is_file() else []
    done = [Moment(**json.loads(line)) for line in lines]
    moments = sample_moments(of_each, seed)
    print(f"{len(moments)} moments, seed {seed}, {len(done)} known already; in {folder}", flush=True)
    assert [each.share for each in done] == [each.share for each in moments[: len(done)]], (
        "another seed, or another number"
    )
    for moment in moments[len(done) :]:
        run_moment(reference, moment)
        done.append(moment)
        with results_file.open("a") as stream:
            stream.write(json.dumps(asdict(moment)) + "\n")
        if moment.faults:
            print(f"{moment.number}: {moment.signal} at {moment.share:.4f}: {moment.faults}", flush=True)
        if (moment.number + 1) % CHAIN == 0 or moment.number + 1 == len(moments):
            print(format_table(done), flush=True)
    return done


def run_moment(reference: ReferenceRuns, moment: Moment) -> None:
    """Send one signal to the run of the moment's chain, and let the run finish at the end of the chain."""
    name, extra, number = f"chain-{moment.number // CHAIN}", KINDS[moment.kind], signal.Signals[moment.signal]
    behind_imports = moment.number // len(SIGNALS) % 2 == 1
    if moment.number % CHAIN == 0:
        shutil.rmtree(reference.get_run_dir(name), ignore_errors=True)
    measured = reference.half if moment.half else reference.undisturbed
    for _ in range(ATTEMPTS):
        if moment.half and not reference.get_run_dir(name).exists():
            shutil.copytree(reference.get_run_dir("half"), reference.get_run_dir(name))
        first_output = measured.first_output if behind_imports else 0.0
        after = first_output + moment.share * (measured.cpu_seconds - first_output)
        before = list_checkpoints(reference, name, moment)
        ended = reference.start(name, extra, number, lambda used_seconds, after=after: used_seconds >= after)
        moment.seconds = round(ended.seconds, 2)
        check_start(reference, name, moment, ended, before, number)
        last = moment.number % CHAIN == CHAIN - 1
        if moment.answer == "done" or last or not ended.signal_sent:
            check_end(reference, name, extra, moment)
            shutil.rmtree(reference.get_run_dir(name), ignore_errors=True)
        if ended.signal_sent or moment.faults:
            return
        measured = ended  # it ended sooner than the measured one


def check_start(
    reference: ReferenceRuns, name: str, moment: Moment, ended: EndedProcess, before: list[int], number: int
) -> None:
    """Check that the status matches the output, no file is torn and no checkpoint is lost."""
    output, faults = ended.output, moment.faults
    moment.status = ended.status if ended.signal_sent else None
    moment.answer, expected = "nothing", None
    if "saved at step" in output:
        moment.answer, expected = "saved", SAVED[number]
    elif "nothing is to be saved" in output:
        moment.answer, expected = "left", AT_ONCE[number]
    elif "done. Model" in output or "finished already" in output:
        moment.answer, expected = "done", 0
    if reference.ranks > 1 and moment.answer != "done":
        expected = 1  # the status of torchrun, for any status of its ranks
    if ended.status != expected:
        faults.append(f"status {ended.status} and not {expected}: {output[-1500:]}")
    torchruns = reference.ranks > 1 and "SignalException" in output
    if ("Traceback" in output and not torchruns) or "KeyboardInterrupt" in output:
        faults.append(f"a traceback: {output[-1500:]}")
    after = list_checkpoints(reference, name, moment)
    moment.step = after[0] if after else 0
    finished = (reference.get_run_dir(name) / "hf").is_dir()
    if before and not after and not finished:
        faults.append(f"checkpoints {before} are lost")
    if before and after and after[0] < before[0]:
        faults.append(f"went back from {before} to {after}")
    faults += find_torn_files(reference.get_run_dir(name))


def list_checkpoints(reference: ReferenceRuns, name: str, moment: Moment) -> list[int]:
    """Return the steps of the checkpoints, newest first, and check that each is whole."""
    folder = CheckpointFolder(reference.get_run_dir(name) / "checkpoints")
    steps = folder.list_steps()
    for step in steps:
        try:
            check_files(folder.get_step_path(step), read_index(folder.get_step_path(step)))
        except Exception as error:
            moment.faults.append(f"checkpoint {step}: {error}")
    return steps


def find_torn_files(run_dir: Path) -> list[str]:
    """Find torn files. Drafts of an ended process are ignored; their names begin with a dot."""
    faults = []
    for path in run_dir.rglob("*.json*"):
        inside = path.relative_to(run_dir).parts
        if any(part.startswith(".") for part in inside) or inside[0] in ("wandb", *IGNORED_FILES):
            continue
        try:
            texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            for text in texts:
                json.loads(text)
        except ValueError as error:
            faults.append(f"{path.relative_to(run_dir)} is torn: {error}")
    report = run_dir / "report.html"
    if report.is_file() and not report.read_text().rstrip().endswith("</html>"):
        faults.append("report.html is torn")
    return faults


def check_end(reference: ReferenceRuns, name: str, extra: list[str], moment: Moment) -> None:
    """Let the chain's run finish and compare it with the undisturbed run."""
    _ = reference.undisturbed
    ended = reference.start(name, extra)
    if ended.status != 0 or "Traceback" in ended.output:
        moment.faults.append(f"does not finish: {ended.output[-1500:]}")
        return
    one, other = RunOutput(reference.get_run_dir("whole")), RunOutput(reference.get_run_dir(name))
    if one.manifest["weights_digest"] != other.manifest["weights_digest"]:
        moment.faults.append("other weights")
    if read_metrics(one) != read_metrics(other):
        moment.faults.append("another metrics.csv")
    different = list_files(one.dir) ^ list_files(other.dir)
    if different:
        moment.faults.append(f"other files: {sorted(different)}")
    if "not finished" in (other.dir / "report.html").read_text():
        moment.faults.append("the report says that it is not finished")


def read_metrics(run: RunOutput) -> list[dict[str, str]]:
    """Read `metrics.csv` without times."""
    with (run.dir / "metrics.csv").open(newline="") as stream:
        found = list(csv.DictReader(stream))
    return [
        {key: value for key, value in row.items() if not key.startswith(("throughput/", "seconds"))} for row in found
    ]


def list_files(run_dir: Path) -> set[str]:
    names = {path.relative_to(run_dir) for path in run_dir.rglob("*")}
    return {str(name) for name in names if name.parts[0] not in ("wandb", *IGNORED_FILES)}


def format_table(moments: list[Moment]) -> str:
    lines = ["signal    moments   left  saved   done  late  faults  slowest"]
    for number in SIGNALS:
        of_signal = [one for one in moments if one.signal == number.name]
        counts = Counter("late" if one.status is None else one.answer for one in of_signal)
        shown = f"{counts['left']:6} {counts['saved']:6} {counts['done']:6} {counts['late']:5}"
        slowest = max((one.seconds for one in of_signal), default=0.0)
        lines.append(
            f"{number.name:8} {len(of_signal):8} {shown} {sum(bool(one.faults) for one in of_signal):7} {slowest:6.1f} s"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # also ends the running process
    where, of_each, seed = (*sys.argv[1:], *("", "200", "0")[len(sys.argv) - 1 :])
    sys.exit(any(one.faults for one in run_moments(Path(where), int(of_each), int(seed))))

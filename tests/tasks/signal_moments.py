"""Signals at random moments of a run's life: `python tests/tasks/signal_moments.py FOLDER [of each signal] [seed]`.

A chain is a run that is started, sent a signal and started again, until its moments are used up; then it is let finish. Half of
the chains begin with a run that has come half the way. A moment is a share of what the processor does for an undisturbed
start, from the first line of `run.py` to the end of the interpreter, so that a busy machine changes little; every other one
lies behind the imports. Each start must end with a documented status that fits what it said, without a traceback, and leave
whole files; the chain's last one must leave the model and the table of an undisturbed run.

What was seen is appended to FOLDER/moments.jsonl; the same command goes on behind it.
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

from run_helpers import RUN, TINY, Ran, own_choice

from lit_vlm.engine.checkpoint import CheckpointFolder, read_index
from lit_vlm.engine.checkpoint.read import check_files
from lit_vlm.engine.exits import INTERRUPTED, RESTART, TERMINATED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
AT_ONCE = {signal.SIGTERM: TERMINATED, signal.SIGINT: INTERRUPTED, signal.SIGUSR1: RESTART}
SAVED = AT_ONCE | {signal.SIGTERM: RESTART}
CHAIN = 24  # moments of one run
STEPS = 12
LIMIT = 600.0  # seconds of one start
ATTEMPTS = 8  # to meet a run before it is over
KINDS = ([], ["data.num_workers=1"], [], ["logger.wandb=true", "logger.offline=true"])  # of chains, in turn
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1", "WANDB_SILENT": "true"}
NO_FAULT_OF_OURS = (
    "held.json",
    "heartbeat",
    "stuck",
)  # say who runs, and what an ended process left there counts for nothing


@dataclass
class Moment:
    """One signal, and what came of it.

    Attributes:
        share: of an undisturbed start's life.
        half: the chain began with a run that had come half the way.
        status: of the process; None: it had ended before the signal.
        answer: "left", "saved", "done" or what else it said.
        step: of the newest checkpoint afterwards.
        seconds: from the signal to the end.
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
class Ended:
    status: int
    said: str
    sent: bool  # the signal, before the end
    life: float  # seconds of the processor
    spoke: float  # of these, before its first word
    seconds: float


class Place:
    """A folder with undisturbed runs to compare with."""

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
        self.words = [*TINY, "stage=sft", *own_choice(self.folder, sources=sources, validation=validation)]
        self.words += ["data.tokens_per_micro_batch=400", "trainer.log_every_n_steps=1", "max_new_tokens=8"]
        self.words += ["checkpoint.every_steps=1", f"trainer.max_steps={STEPS}"]
        if ranks > 1:
            self.words += [
                "trainer=ddp",
                "trainer.accelerator=cpu",
                f"trainer.devices={ranks}",
                "trainer.num_threads=1",
            ]
            self.words += ["trainer.precision=32-true"]

    def dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def start(
        self, name: str, more: list[str], number: int = 0, when: Callable[[float], bool] = lambda life: False
    ) -> Ended:
        """One start of a run, sent a signal when its life, in seconds of the processor's, has come so far."""
        log = self.folder / "log.txt"
        command = [sys.executable]
        if self.ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
            command += ["--shutdown-timeout=120", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGUSR2"]
        command += [str(RUN), *self.words, f"run_name={name}", *more]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, cwd=self.folder, env=os.environ | ENVIRONMENT, stdout=stream, stderr=stream
            )
        try:
            sent, life, spoke, at = _watch(process, number, when, log)
            status = process.wait(LIMIT)
        finally:
            process.kill()
        return Ended(status, log.read_text(errors="replace"), sent, life, spoke, time.monotonic() - at)

    @cached_property
    def whole(self) -> Ended:
        """The undisturbed run."""
        shutil.rmtree(self.dir("whole"), ignore_errors=True)
        ended = self.start("whole", [])
        assert ended.status == 0, ended.said
        return ended

    @cached_property
    def half(self) -> Ended:
        """A run that has come half the way; what its next start takes is measured on a copy."""
        shutil.rmtree(self.dir("half"), ignore_errors=True)
        shutil.rmtree(self.dir("rest"), ignore_errors=True)
        checkpoints = CheckpointFolder(self.dir("half") / "checkpoints")
        ended = self.start("half", [], signal.SIGTERM, lambda life: bool(checkpoints.list_steps()))
        assert checkpoints.list_steps() and "saved at step" in ended.said, ended.said
        shutil.copytree(self.dir("half"), self.dir("rest"))
        ended = self.start("rest", [])
        assert ended.status == 0, ended.said
        return ended


def _watch(
    process: subprocess.Popen, number: int, when: Callable[[float], bool], log: Path
) -> tuple[bool, float, float, float]:
    """Send the signal when it is time. Whether it was sent, the life so far, that before the first word, and when it was."""
    clock = ((~process.pid) << 3) | 2  # clock_getcpuclockid(3)
    life, spoke, ready, end = 0.0, 0.0, False, time.monotonic() + LIMIT
    while time.monotonic() < end:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        life = time.clock_gettime(clock)
        spoke = spoke or (life if log.stat().st_size else 0.0)
        ready = ready or _answers(process.pid)
        if ready and when(life):
            os.kill(process.pid, number)
            return True, life, spoke, time.monotonic()
        time.sleep(0.001)
    return False, life, spoke, time.monotonic()


def _answers(pid: int) -> bool:
    """Whether `run.py` has begun: it holds signals back, and then has handlers. Before, Python itself is starting."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigBlk:", "SigCgt:"))]
    return any(mask >> (signal.SIGUSR1 - 1) & 1 for mask in masks)


def drawn(of_each: int, seed: int) -> list[Moment]:
    """All moments: for each signal they are spread evenly over the life, each at random within its part of it."""
    dice, count = Random(seed), of_each * len(SIGNALS)
    shares = {number: [(place + dice.random()) / of_each for place in range(of_each)] for number in SIGNALS}
    for found in shares.values():
        dice.shuffle(found)
    moments = []
    for n in range(count):
        number, chain = SIGNALS[n % len(SIGNALS)], n // CHAIN
        moments.append(
            Moment(n, number.name, shares[number].pop(), kind=chain % len(KINDS), half=chain // len(KINDS) % 2 == 1)
        )
    return moments


def run_moments(folder: Path, of_each: int, seed: int = 0, ranks: int = 1) -> list[Moment]:
    """All of them, but those that FOLDER has already."""
    place, known = Place(folder, ranks), folder / "moments.jsonl"
    lines = known.read_text().splitlines() if known.is_file() else []
    seen = [Moment(**json.loads(line)) for line in lines]
    moments = drawn(of_each, seed)
    print(f"{len(moments)} moments, seed {seed}, {len(seen)} known already; in {folder}", flush=True)
    assert [one.share for one in seen] == [one.share for one in moments[: len(seen)]], "another seed, or another number"
    for moment in moments[len(seen) :]:
        follow(place, moment)
        seen.append(moment)
        with known.open("a") as stream:
            stream.write(json.dumps(asdict(moment)) + "\n")
        if moment.faults:
            print(f"{moment.number}: {moment.signal} at {moment.share:.4f}: {moment.faults}", flush=True)
        if (moment.number + 1) % CHAIN == 0 or moment.number + 1 == len(moments):
            print(table(seen), flush=True)
    return seen


def follow(place: Place, moment: Moment) -> None:
    """Send one signal to the run of the moment's chain, which is begun where it is not there, and at its end let finish."""
    name, more, number = f"chain-{moment.number // CHAIN}", KINDS[moment.kind], signal.Signals[moment.signal]
    behind_imports = moment.number // len(SIGNALS) % 2 == 1
    if moment.number % CHAIN == 0:
        shutil.rmtree(place.dir(name), ignore_errors=True)
    measured = place.half if moment.half else place.whole
    for _ in range(ATTEMPTS):
        if moment.half and not place.dir(name).exists():
            shutil.copytree(place.dir("half"), place.dir(name))
        spoke = measured.spoke if behind_imports else 0.0
        after = spoke + moment.share * (measured.life - spoke)
        before = checkpoints(place, name, moment)
        ended = place.start(name, more, number, lambda life, after=after: life >= after)
        moment.seconds = round(ended.seconds, 2)
        check_start(place, name, moment, ended, before, number)
        last = moment.number % CHAIN == CHAIN - 1
        if moment.answer == "done" or last or not ended.sent:
            check_end(place, name, more, moment)
            shutil.rmtree(place.dir(name), ignore_errors=True)
        if ended.sent or moment.faults:
            return
        measured = ended  # it was over sooner than the one that was measured


def check_start(place: Place, name: str, moment: Moment, ended: Ended, before: list[int], number: int) -> None:
    """The status fits what was said, no file is torn and no checkpoint lost."""
    said, faults = ended.said, moment.faults
    moment.status = ended.status if ended.sent else None
    moment.answer, wanted = "nothing", None
    if "saved at step" in said:
        moment.answer, wanted = "saved", SAVED[number]
    elif "nothing is to be saved" in said:
        moment.answer, wanted = "left", AT_ONCE[number]
    elif "done. Model" in said or "finished already" in said:
        moment.answer, wanted = "done", 0
    if place.ranks > 1 and moment.answer != "done":
        wanted = 1  # torchrun's, whatever its ranks end with
    if ended.status != wanted:
        faults.append(f"status {ended.status} and not {wanted}: {said[-1500:]}")
    torchruns = place.ranks > 1 and "SignalException" in said
    if ("Traceback" in said and not torchruns) or "KeyboardInterrupt" in said:
        faults.append(f"a traceback: {said[-1500:]}")
    after = checkpoints(place, name, moment)
    moment.step = after[0] if after else 0
    finished = (place.dir(name) / "hf").is_dir()
    if before and not after and not finished:
        faults.append(f"checkpoints {before} are lost")
    if before and after and after[0] < before[0]:
        faults.append(f"went back from {before} to {after}")
    faults += torn_files(place.dir(name))


def checkpoints(place: Place, name: str, moment: Moment) -> list[int]:
    """Their steps, newest first; each is whole."""
    folder = CheckpointFolder(place.dir(name) / "checkpoints")
    steps = folder.list_steps()
    for step in steps:
        try:
            check_files(folder.get_step_path(step), read_index(folder.get_step_path(step)))
        except Exception as error:
            moment.faults.append(f"checkpoint {step}: {error}")
    return steps


def torn_files(run_dir: Path) -> list[str]:
    """Of those that have their names; what a process left of a draft begins with a dot."""
    faults = []
    for path in run_dir.rglob("*.json*"):
        inside = path.relative_to(run_dir).parts
        if any(part.startswith(".") for part in inside) or inside[0] in ("wandb", *NO_FAULT_OF_OURS):
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


def check_end(place: Place, name: str, more: list[str], moment: Moment) -> None:
    """Let the chain's run finish: it is the undisturbed one."""
    _ = place.whole
    ended = place.start(name, more)
    if ended.status != 0 or "Traceback" in ended.said:
        moment.faults.append(f"does not finish: {ended.said[-1500:]}")
        return
    one, other = Ran(place.dir("whole")), Ran(place.dir(name))
    if one.manifest["weights_digest"] != other.manifest["weights_digest"]:
        moment.faults.append("other weights")
    if rows(one) != rows(other):
        moment.faults.append("another metrics.csv")
    different = files(one.dir) ^ files(other.dir)
    if different:
        moment.faults.append(f"other files: {sorted(different)}")
    if "not finished" in (other.dir / "report.html").read_text():
        moment.faults.append("the report says that it is not finished")


def rows(ran: Ran) -> list[dict[str, str]]:
    """`metrics.csv` without times."""
    with (ran.dir / "metrics.csv").open(newline="") as stream:
        found = list(csv.DictReader(stream))
    return [
        {key: value for key, value in row.items() if not key.startswith(("throughput/", "seconds"))} for row in found
    ]


def files(run_dir: Path) -> set[str]:
    names = {path.relative_to(run_dir) for path in run_dir.rglob("*")}
    return {str(name) for name in names if name.parts[0] not in ("wandb", *NO_FAULT_OF_OURS)}


def table(moments: list[Moment]) -> str:
    lines = ["signal    moments   left  saved   done  late  faults  slowest"]
    for number in SIGNALS:
        mine = [one for one in moments if one.signal == number.name]
        counts = Counter("late" if one.status is None else one.answer for one in mine)
        shown = f"{counts['left']:6} {counts['saved']:6} {counts['done']:6} {counts['late']:5}"
        slowest = max((one.seconds for one in mine), default=0.0)
        lines.append(
            f"{number.name:8} {len(mine):8} {shown} {sum(bool(one.faults) for one in mine):7} {slowest:6.1f} s"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # the run under way is ended, too
    where, of_each, seed = (*sys.argv[1:], *("", "200", "0")[len(sys.argv) - 1 :])
    sys.exit(any(one.faults for one in run_moments(Path(where), int(of_each), int(seed))))

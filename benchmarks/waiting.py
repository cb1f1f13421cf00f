"""CPU seconds that a user waits for: a finished run, a wrong path, preflight, the first optimizer step, the next stage.

    python benchmarks/waiting.py                            this build alone
    python benchmarks/waiting.py --other WORKTREE           beside another build, e.g. a worktree of an older commit
    python benchmarks/waiting.py --repeats 5 --only preflight

Each command is a process of its own, and both builds take turns. CPU seconds are those of all its processes: user and
system. `first step` counts up to the end of the first optimizer step. `next stage` counts from the last line of a pipeline's
stage to the first step of the stage after it. The `imports` row is `import lightning, transformers` alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "waiting.json"
STAGE = ["experiment=tiny/1_align", "trainer.max_steps=2", "trainer.num_threads=1"]
TICKS = os.sysconf("SC_CLK_TCK")
RATIOS = {"finished": 0.25, "wrong path": 0.25, "preflight": 0.4, "next stage": 0.4, "first step": 0.8}

FIRST_STEP = '''"""Callback that writes the CPU seconds of its session at the end of the first optimizer step."""
import lightning as L
import waiting_session


class FirstStep(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            waiting_session.write_seconds()
'''
SESSION = '''"""CPU seconds of all processes of this session."""
import os
from pathlib import Path


def sum_seconds(session):
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            total += sum(map(int, fields[11:15]))
    return total / os.sysconf("SC_CLK_TCK")


def write_seconds():
    with open(os.environ["WAITING_FILE"], "a") as stream:
        stream.write(f"{sum_seconds(os.getsid(0))}\\n")
'''


class Build:
    """Checkout of this project whose commands are measured.

    Args:
        root: its folder.
        folder: temporary folder for its runs and for the modules of the measurement.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root, folder
        folder.mkdir(parents=True)
        (folder / "first_step.py").write_text(FIRST_STEP, encoding="utf-8")
        (folder / "waiting_session.py").write_text(SESSION, encoding="utf-8")
        sys.path.insert(0, str(folder))
        self.run("prepared", [*STAGE, f"run_dir={folder / 'runs'}"])  # parts, index and a finished run

    def run(self, name: str, arguments: list[str]) -> None:
        """Run `run.py` in a session of its own, its output in a file."""
        process = self._start(arguments, (self.folder / f"{name}.txt").open("w"))
        process.wait()

    def _start(self, arguments: list[str], output: object) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.root), str(self.folder)]),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "WAITING_FILE": str(self.folder / "seconds.txt"),
        }
        return subprocess.Popen(
            [sys.executable, str(self.root / "run.py"), *arguments],
            cwd=self.folder,
            env=environment,
            stdout=output,  # type: ignore[call-overload]
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def measure_command(self, arguments: list[str]) -> float:
        """Measure a whole command, in CPU seconds."""
        before = os.times()
        self.run("command", arguments)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    def measure_first_step(self) -> float:
        """Measure from the command to the end of the first optimizer step, in CPU seconds; index and parts are there."""
        self._remove_runs("tiny")
        self.run("first_step", [*STAGE, f"run_dir={self.folder / 'runs'}", "callbacks=[first_step.FirstStep]"])
        return self._read_seconds()[0]

    def measure_next_stage(self) -> float:
        """Measure from the last line of each stage of a pipeline to the first step of the next, in CPU seconds, the median."""
        import waiting_session  # type: ignore[import-not-found]

        self._remove_runs("tiny")
        if (self.root / "lit_vlm/evaluation/exam.py").is_file():
            options = ["evaluate.exam_items=0", "callbacks=[first_step.FirstStep]"]
        else:  # a build of before the exam: no setting for it, and named callbacks replace those of the recipe
            options = ["callbacks=[throughput,language_loss,guard,export,samples,report,first_step.FirstStep]"]
        few = [*STAGE[1:], f"run_dir={self.folder / 'runs'}", *options]
        process = self._start(few, subprocess.PIPE)
        assert process.stdout is not None
        ends = [waiting_session.sum_seconds(process.pid) for line in process.stdout if ": done. Model:" in line]
        process.wait()
        starts = self._read_seconds()
        return statistics.median(start - end for end, start in zip(ends, starts[1:], strict=False))

    def _read_seconds(self) -> list[float]:
        path = self.folder / "seconds.txt"
        seconds = [float(line) for line in path.read_text().split()]
        path.unlink()
        return seconds

    def _remove_runs(self, recipe: str) -> None:
        shutil.rmtree(self.folder / "runs" / recipe, ignore_errors=True)

    def list_measurements(self) -> dict[str, Callable[[], float]]:
        """List the measurements by name."""
        runs = f"run_dir={self.folder / 'runs'}"
        looked, finished = f"run_dir={self.folder / 'looked'}", f"run_dir={self.folder / 'finished'}"
        self.run("finished", [*STAGE, finished])
        self.run("looked", ["task=preflight", *STAGE, looked])
        wrong = ["experiment=tiny/2_sft", "init_from=null", "data=llava_json", "data.sources.mine.path=mime.json", runs]
        return {
            "finished": lambda: self.measure_command([*STAGE, finished]),
            "wrong path": lambda: self.measure_command(wrong),
            "preflight": lambda: self.measure_command(["task=preflight", *STAGE, looked]),
            "first preflight": self._measure_first_preflight,
            "next stage": self.measure_next_stage,
            "first step": self.measure_first_step,
        }

    def _measure_first_preflight(self) -> float:
        folder = self.folder / "first"
        shutil.rmtree(folder, ignore_errors=True)
        return self.measure_command(["task=preflight", *STAGE, f"run_dir={folder}"])


def measure_imports() -> float:
    """Measure `import lightning, transformers` alone, in CPU seconds."""
    before = os.times()
    subprocess.run([sys.executable, "-c", "import lightning, transformers"], check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def measure(builds: dict[str, Build], repeats: int, only: str | None) -> dict[str, dict[str, float]]:
    """Measure all rows, the builds in turn; return the median of each row by build."""
    measurements = {name: build.list_measurements() for name, build in builds.items()}
    names = [name for name in next(iter(measurements.values())) if only in (None, name)]
    rows = {name: {build: list[float]() for build in builds} for name in names}
    for _ in range(repeats):
        for name in names:
            for build, functions in measurements.items():
                rows[name][build].append(functions[name]())
                print(f"{name}, {build}: {rows[name][build][-1]:.2f} CPU s", file=sys.stderr, flush=True)
    imports = statistics.median(measure_imports() for _ in range(repeats))
    found = {name: {build: statistics.median(values) for build, values in row.items()} for name, row in rows.items()}
    return {**found, "imports": dict.fromkeys(builds, imports)}


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """Format the rows as a table in Markdown, with the ratio to the other build and its goal."""
    builds = list(next(iter(rows.values())))
    lines = [f"| CPU s | {' | '.join(builds)} | ratio | goal |", f"|---|{'---:|' * (len(builds) + 2)}"]
    for name, row in rows.items():
        values = list(row.values())
        is_compared = len(values) > 1 and name != "imports"
        ratio = f"{values[0] / values[1]:.2f}" if is_compared else ""
        lines.append(
            f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} | {ratio} | {RATIOS.get(name, '') if is_compared else ''} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="root of the other build")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help="name of one row")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        builds = {"this": Build(ROOT, Path(name) / "this")}
        if arguments.other:
            builds["other"] = Build(arguments.other.resolve(), Path(name) / "other")
        rows = measure(builds, arguments.repeats, arguments.only)
    print(format_table(rows))
    if arguments.write:
        RESULT.write_text(json.dumps({"repeats": arguments.repeats, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""State of the server: runs, sweeps, agents, artifacts. It is kept in memory and ends with the process."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lit_vlm.sweep.search import Search
from lit_vlm.sweep.sweep_file import SweepFile, parse_sweep

ENTITY = "loopback"
PENDING, RUNNING, PREEMPTED = "pending", "running", "preempted"
FINISHED, FAILED, CRASHED, CANCELED = "finished", "failed", "crashed", "canceled"
ENDED = (FINISHED, FAILED, CRASHED)


@dataclass(slots=True)
class RunState:
    """State of one run.

    Attributes:
        config: as the client sends it, `{"stage": {"value": ...}}`, with W&B's own `_wandb`.
        history: rows in order, with `_step` and the logged metrics.
        events: rows of system metrics.
        starts: number of processes that started it; above one if it was resumed.
        stop: the server asked it to stop.
        files: uploaded files by name.
        used, logged: names of artifacts, as in "name:v0".
        last_heartbeat: time of the last message from its processes, in seconds of the monotonic clock.
    """

    name: str
    state: str = PENDING
    project: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    output: list[str] = field(default_factory=list)
    display_name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    sweep: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    number: int | None = None
    agent: str | None = None
    starts: int = 0
    stop: bool = False
    preempting: bool = False
    exit_code: int | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)
    last_heartbeat: float = field(default_factory=time.monotonic)

    @property
    def settings(self) -> dict[str, Any]:
        """Config as a user writes it: names and values, without W&B's own entry."""
        return {
            name: entry["value"] for name, entry in self.config.items() if name != "_wandb" and isinstance(entry, dict)
        }

    def values(self, metric: str) -> list[float]:
        """Return all logged values of a metric, oldest first."""
        return [float(row[metric]) for row in self.history if isinstance(row.get(metric), int | float)]

    def update(self, message: dict[str, Any]) -> None:
        """Update the run with a message of its process: rows by their offset in the file, the newest summary, the exit code."""
        self.last_heartbeat = time.monotonic()
        for name, chunk in (message.get("files") or {}).items():
            lines = chunk["content"]
            if name == "wandb-history.jsonl":
                self.history[chunk["offset"] :] = map(json.loads, lines)
            elif name == "wandb-events.jsonl":
                self.events[chunk["offset"] :] = map(json.loads, lines)
            elif name == "wandb-summary.json":
                self.summary = json.loads(lines[-1])
            elif name == "output.log":
                self.output[chunk["offset"] :] = lines
        self.preempting = message.get("preempting", self.preempting)
        if message.get("complete"):
            self.exit_code = message.get("exitcode", 0)
            final_state = FINISHED if self.exit_code == 0 else FAILED
            self.state = PREEMPTED if self.exit_code and self.preempting else final_state


@dataclass(slots=True)
class SweepState:
    """State of one sweep, with its search."""

    name: str
    project: str
    text: str
    file: SweepFile
    search: Search
    state: str = PENDING
    reported_runs: set[str] = field(default_factory=set)  # runs whose outcome was told to the search


@dataclass(slots=True)
class Artifact:
    """Version of an artifact, logged by a run."""

    name: str
    type: str
    state: str
    run: str
    digest: str
    version: int
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return f"{self.name}:v{self.version}"


class ServerState:
    """State of the whole server.

    Attributes:
        heartbeat_timeout: seconds without a message from agent or processes after which a run has crashed; W&B waits minutes.
        files: contents of uploads by path.
    """

    def __init__(self, heartbeat_timeout: float = 300.0) -> None:
        self.heartbeat_timeout = heartbeat_timeout
        self.runs: dict[str, RunState] = {}
        self.sweeps: dict[str, SweepState] = {}
        self.agents: dict[str, str] = {}  # agent -> sweep
        self.artifacts: dict[str, Artifact] = {}
        self.files: dict[str, bytes] = {}
        self._numbers = itertools.count(1)

    def next_id(self, kind: str) -> str:
        return f"{kind}{next(self._numbers):03d}"

    def get_run(self, name: str) -> RunState:
        """Return the run of this name; create it if it is new."""
        return self.runs.setdefault(name, RunState(name))

    def list_runs(self, sweep: str) -> list[RunState]:
        """List the runs of a sweep."""
        return [run for run in self.runs.values() if run.sweep == sweep]

    def add_sweep(self, project: str, text: str, raw: dict[str, Any]) -> SweepState:
        """Add a sweep with a new search.

        Args:
            text: the sweep file as YAML.
            raw: its content.
        """
        name = self.next_id("sweep")
        file = parse_sweep(raw, name)
        self.sweeps[name] = SweepState(name, project, text, file, Search(file))
        return self.sweeps[name]

    def mark_crashed_runs(self) -> Iterator[RunState]:
        """Mark runs as crashed if they sent no heartbeat for too long; yield these runs."""
        for run in self.runs.values():
            if run.state == RUNNING and time.monotonic() - run.last_heartbeat > self.heartbeat_timeout:
                run.state = CRASHED
                yield run

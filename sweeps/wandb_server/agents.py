"""GraphQL operations of `wandb sweep` and `wandb agent`: an agent gets its commands as the answer to its heartbeat."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import yaml

from lit_vlm.sweep.search import TrialOutcome
from sweeps.wandb_server.state import (
    CANCELED,
    CRASHED,
    ENDED,
    ENTITY,
    FAILED,
    FINISHED,
    PENDING,
    PREEMPTED,
    RUNNING,
    RunState,
    ServerState,
    SweepState,
)

Variables = dict[str, Any]
ENDED_SWEEP_STATES = (FINISHED, CANCELED, CRASHED)


class AgentOperations:
    """Operations about sweeps and agents."""

    def __init__(self, state: ServerState) -> None:
        self.state = state

    def op_UpsertSweep(self, variables: Variables) -> dict[str, Any]:
        state = self.state.sweeps.get(variables.get("id") or "")
        if state is not None:
            state.state = str(variables.get("state") or state.state).lower()
        else:
            text = variables["config"]
            state = self.state.add_sweep(variables.get("projectName") or "uncategorized", text, yaml.safe_load(text))
        project = {"id": state.project, "name": state.project, "entity": {"id": ENTITY, "name": ENTITY}}
        sweep = {"name": state.name, "project": project}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def op_SweepWithRuns(self, variables: Variables) -> dict[str, Any]:
        sweep = self.state.sweeps.get(variables["sweep"])
        if sweep is None:
            return {"project": {"sweep": None}}
        runs = [{"node": _make_node(run)} for run in self.state.list_runs(sweep.name)]
        empty_fields = dict.fromkeys(
            "description createdAt heartbeatAt updatedAt bestLoss controller scheduler".split()
        )
        fields = {
            "id": sweep.name,
            "name": sweep.name,
            "method": sweep.file.method,
            "state": sweep.state.upper(),
            "config": sweep.text,
            "earlyStopJobRunning": False,
            "runs": {"edges": runs},
        }
        return {"project": {"sweep": empty_fields | fields}}

    def op_CreateAgent(self, variables: Variables) -> dict[str, Any]:
        agent = self.state.next_id("agent")
        sweep = self.state.sweeps[variables["sweep"]]
        self.state.agents[agent] = sweep.name
        sweep.state = RUNNING if sweep.state == PENDING else sweep.state
        return {"createAgent": {"agent": {"id": agent}}}

    def op_Heartbeat(self, variables: Variables) -> dict[str, Any]:
        agent = variables["id"]
        sweep = self.state.sweeps[self.state.agents[agent]]
        alive = [name for name, on in json.loads(variables.get("runState") or "{}").items() if on]
        for run in self.state.list_runs(sweep.name):
            if run.name in alive:
                run.last_heartbeat = time.monotonic()
            elif run.agent == agent and run.state == PENDING:
                run.state = FAILED  # its process ended before its first message
        commands = list(self._iter_commands(sweep, agent, alive))
        return {"agentHeartbeat": {"agent": {"id": agent}, "commands": json.dumps(commands)}}

    def _iter_commands(self, sweep: SweepState, agent: str, alive: list[str]) -> Iterator[Variables]:
        """Iterate over the commands for an agent: stop its runs, or start the next one if none of its runs is alive."""
        self._update_search(sweep)
        for name in alive:
            run = self.state.get_run(name)
            run.stop = run.stop or sweep.state == CANCELED or self._should_stop_early(sweep, run)
            if run.stop:
                yield {"type": "stop", "run_id": name}
        if not alive:
            yield from self._next_command(sweep, agent)

    def _update_search(self, sweep: SweepState) -> None:
        """Tell the search the outcomes of runs that ended since the last heartbeat."""
        list(self.state.mark_crashed_runs())
        for run in self.state.list_runs(sweep.name):
            if run.state in ENDED and run.name not in sweep.reported_runs and run.number is not None:
                sweep.reported_runs.add(run.name)
                value = run.summary.get(sweep.file.metric.name) if sweep.file.metric else None
                outcome = TrialOutcome.stopped if run.stop else TrialOutcome.finished
                has_failed = run.state != FINISHED or (value is None and sweep.file.metric is not None)
                sweep.search.tell(run.number, value, TrialOutcome.failed if has_failed else outcome)

    def _should_stop_early(self, sweep: SweepState, run: RunState) -> bool:
        """Return whether early stopping ends this run."""
        metric = sweep.file.metric
        return bool(
            run.state == RUNNING
            and metric is not None
            and run.number is not None
            and sweep.search.check_early_stopping(run.number, run.values(metric.name))
        )

    def _next_command(self, sweep: SweepState, agent: str) -> Iterator[Variables]:
        """Yield the next command: resume a preempted run, start a new run, or exit if none remains."""
        if sweep.state in ENDED_SWEEP_STATES:
            yield {"type": "exit"}
            return
        preempted = [run for run in self.state.list_runs(sweep.name) if run.state == PREEMPTED]
        run = preempted[0] if preempted else self._create_run(sweep)
        if run is not None:
            kind, run.agent, run.state = "resume" if preempted else "run", agent, PENDING
            run.last_heartbeat = time.monotonic()
            arguments = {name: {"value": value} for name, value in run.parameters.items()}
            yield {"type": kind, "run_id": run.name, "program": sweep.file.program, "args": arguments}
        elif not any(run.state in (PENDING, RUNNING) for run in self.state.list_runs(sweep.name)):
            sweep.state = FINISHED
            yield {"type": "exit"}

    def _create_run(self, sweep: SweepState) -> RunState | None:
        """Create the run of the search's next suggestion; None if there is none."""
        suggestion = sweep.search.ask()
        if suggestion is None:
            return None
        run = self.state.get_run(f"{sweep.name}-{suggestion.number:02d}")
        run.sweep, run.project, run.number = sweep.name, sweep.project, suggestion.number
        run.parameters = suggestion.parameters
        return run


def _make_node(run: RunState) -> Variables:
    return {
        "name": run.name,
        "state": run.state,
        "config": json.dumps(run.config),
        "summaryMetrics": json.dumps(run.summary),
        "sampledHistory": [run.history],
        "exitcode": run.exit_code,
        "heartbeatAt": None,
        "shouldStop": run.stop,
        "stopped": run.stop,
        "failed": run.state == "failed",
        "running": run.state == RUNNING,
    }

"""GraphQL operations about account, runs and files, by the client's names. Answers hold the fields that it asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from sweeps.wandb_server.agents import AgentOperations
from sweeps.wandb_server.artifacts import ArtifactOperations
from sweeps.wandb_server.state import ENDED, ENTITY, PENDING, RUNNING, ServerState

Variables = dict[str, Any]
Operation = Callable[[Variables], dict[str, Any]]


class Operations:
    """Operations of the server: one method each, from the variables of a request to the `data` of the answer."""

    def __init__(self, state: ServerState, url: str) -> None:
        self.state, self.url = state, url
        self._handlers: list[Any] = [self, AgentOperations(state), ArtifactOperations(state, url)]

    def find(self, name: str) -> Operation | None:
        """Find the operation of this name; None if the server does not have it."""
        return next(
            (getattr(handler, f"op_{name}") for handler in self._handlers if hasattr(handler, f"op_{name}")), None
        )

    def store_file(self, path: str, body: bytes) -> None:
        """Store an uploaded file."""
        self.state.files[path] = body
        run, _, name = path.partition("/")
        if run in self.state.runs:
            self.state.runs[run].files[name] = body

    def append_rows(self, run: str, message: Variables) -> dict[str, Any]:
        """Append rows to a run; the answer tells the client whether the run must stop."""
        self.state.get_run(run).update(message)
        return {"limits": {}, "stopped": self.state.get_run(run).stop}

    def op_Viewer(self, _: Variables) -> dict[str, Any]:
        viewer = {
            "id": "user",
            "entity": ENTITY,
            "username": ENTITY,
            "name": ENTITY,
            "email": f"{ENTITY}@example.com",
            "admin": False,
            "flags": "{}",
            "deletedAt": None,
            "apiKeys": {"edges": []},
            "teams": {"edges": [{"node": {"name": ENTITY}}]},
        }
        return {"viewer": viewer}

    op_GetViewer = op_GetDefaultEntity = op_Viewer

    def op_ServerFeaturesQuery(self, _: Variables) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def op_ServerInfo(self, _: Variables) -> dict[str, Any]:
        versions = {"max_cli_version": "99.0.0", "min_cli_version": "0.1.0"}
        return {"serverInfo": {"cliVersionInfo": versions, "latestLocalVersionInfo": None}}

    def op_OrganizationCoreWeaveOrganizationID(self, _: Variables) -> dict[str, Any]:
        return {"organization": None}

    def op_UpsertBucket(self, variables: Variables) -> dict[str, Any]:
        name = variables.get("name") or variables.get("id") or self.state.next_id("run")
        run = self.state.get_run(name)
        inserted = run.state == PENDING and not run.starts
        if run.state != RUNNING:  # a start; for a running one the client only sends config and summary again
            run.starts += 1
            run.state, run.exit_code, run.preempting = RUNNING, None, False
        run.project = variables.get("project") or run.project
        for text, into in ((variables.get("config"), run.config), (variables.get("summaryMetrics"), run.summary)):
            into.update(json.loads(text) if text else {})
        renamed_fields = {"group": "groupName", "job_type": "jobType", "display_name": "displayName"}
        for attribute, variable in renamed_fields.items() | {("tags", "tags"), ("sweep", "sweep")}:
            if variables.get(variable):
                setattr(run, attribute, variables[variable])
        bucket = {
            "id": name,
            "name": name,
            "displayName": run.display_name or name,
            "description": None,
            "config": json.dumps(run.config),
            "sweepName": run.sweep,
            "project": self._make_project(run.project),
            "historyLineCount": len(run.history),
        }
        return {"upsertBucket": {"inserted": inserted, "bucket": bucket}}

    def op_RunResumeStatus(self, variables: Variables) -> dict[str, Any]:
        run, bucket = self.state.runs.get(variables["name"]), None
        if run is not None and run.starts:
            bucket = {
                "id": run.name,
                "name": run.name,
                "displayName": run.display_name or run.name,
                "tags": run.tags,
                "notes": None,
                "summaryMetrics": json.dumps(run.summary),
                "config": json.dumps(run.config),
                "historyLineCount": len(run.history),
                "logLineCount": len(run.output),
                "eventsLineCount": len(run.events),
                "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
                "eventsTail": json.dumps([json.dumps(row) for row in run.events[-1:]]),
                "wandbConfig": json.dumps({"t": 1}),
            }
        return {"model": {**self._make_project(variables.get("project")), "bucket": bucket}}

    def op_RunStoppedStatus(self, variables: Variables) -> dict[str, Any]:
        name = variables.get("runId") or variables.get("run") or variables.get("name")
        return {"project": {"run": {"stopped": self.state.get_run(str(name)).stop}}}

    def op_RunState(self, variables: Variables) -> dict[str, Any]:
        return {"project": {"run": {"state": self.state.get_run(variables["run"]).state}}}

    def op_StopRun(self, variables: Variables) -> dict[str, Any]:
        run = self.state.get_run(variables["id"])
        run.stop = run.state not in ENDED
        return {"stopRun": {"success": True, "clientMutationId": None}}

    def op_CreateRunFiles(self, variables: Variables) -> dict[str, Any]:
        run = variables["run"]
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/{run}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def op_MarkRunFilesUploaded(self, _: Variables) -> dict[str, Any]:
        return {"markRunFilesUploaded": {"success": True}}

    def op_NotifyScriptableRunAlert(self, _: Variables) -> dict[str, Any]:
        return {"notifyScriptableRunAlert": {"success": True}}

    def _make_project(self, name: str | None) -> dict[str, Any]:
        return {"id": f"project {name}", "name": name, "entity": {"id": ENTITY, "name": ENTITY}}

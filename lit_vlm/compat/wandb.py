"""Private parts of the W&B client: its GraphQL request, and the JSON form of a table."""

from __future__ import annotations

from typing import Any

_STOPPED_QUERY = (
    "query RunStoppedStatus($entityName: String, $projectName: String, $runId: String!)"
    " { project(name: $projectName, entityName: $entityName) { run(name: $runId) { stopped } } }"
)


def is_run_stopped(entity: str, project: str, run_id: str, timeout_seconds: int) -> bool:
    """Ask the server whether a run should stop.

    Raises:
        Exception: the server does not answer or does not know the run, or the client has changed.
    """
    import wandb

    variables = {"entityName": entity, "projectName": project, "runId": run_id}
    api = wandb.Api(timeout=timeout_seconds)
    data: Any = api._service_api.execute_graphql(_STOPPED_QUERY, variables=variables, timeout=timeout_seconds)
    return bool(data["project"]["run"]["stopped"])


def encode_table(run: Any, name: str, table: Any, step: int) -> Any:
    """Encode a table as the value of a history row. This copies its files to the run folder and starts their upload."""
    from wandb.sdk.data_types.utils import val_to_json

    return val_to_json(run, name, table, namespace=step)

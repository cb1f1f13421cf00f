"""W&B artifacts: upload of a run's results, and the link to the model that a stage starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODEL, LOCK, REPORT = "model", "lock", "report"
ARTIFACT_PATHS = {MODEL: "hf", LOCK: "mixture.lock", REPORT: "report.html"}


def upload_artifacts(run: Any, run_dir: Path, kinds: list[str]) -> dict[str, str]:
    """Upload the requested results that exist as artifacts. Returns the artifact name of each kind.

    The client reads the files in place, so a model takes no disk space a second time.

    Args:
        run: the client's run.
        kinds: keys of `ARTIFACT_PATHS`.
    """
    import wandb

    names = {}
    for kind in kinds:
        path = run_dir / ARTIFACT_PATHS[kind]
        if not path.exists():
            continue
        artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
        if path.is_dir():
            artifact.add_dir(str(path), policy="immutable", skip_cache=True)
        else:
            artifact.add_file(str(path), policy="immutable", skip_cache=True)
        run.log_artifact(artifact)
        names[kind] = artifact.name.partition(":")[0]
    return names


def link_parent_model(run: Any, parent: dict[str, Any]) -> bool:
    """Link this run to the model artifact of the run that it starts from. Returns False when that model is no artifact.

    Raises:
        Exception: an error of the client, when the server does not know the artifact.
    """
    name = (parent.get("artifacts") or {}).get(MODEL)
    if not name:
        return False
    project_path = "/".join(filter(None, (parent.get("entity"), parent.get("project"))))
    run.use_artifact(f"{project_path}/{name}:latest" if project_path else f"{name}:latest")
    return True

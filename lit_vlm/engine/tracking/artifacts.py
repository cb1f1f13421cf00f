"""A run's results as artifacts of W&B, and which of them a stage was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODEL, LOCK, REPORT = "model", "lock", "report"
FILES = {MODEL: "hf", LOCK: "mixture.lock", REPORT: "report.html"}


def upload(run: Any, run_dir: Path, asked: list[str]) -> dict[str, str]:
    """Hand over what is asked for and is there. Returns the artifacts' names, by what they are.

    The client reads the files where they lie: a model takes no room on the disk a second time.
    """
    import wandb

    names = {}
    for what in asked:
        path = run_dir / FILES[what]
        if not path.exists():
            continue
        artifact = wandb.Artifact(f"{what}-{run.id}", type=what)
        if path.is_dir():
            artifact.add_dir(str(path), policy="immutable", skip_cache=True)
        else:
            artifact.add_file(str(path), policy="immutable", skip_cache=True)
        run.log_artifact(artifact)
        names[what] = artifact.name.partition(":")[0]
    return names


def use_parent(run: Any, parent: dict[str, Any]) -> bool:
    """Note that this run starts from the model of another. False when that model is no artifact.

    Raises:
        Exception: the client's, when the server does not know it.
    """
    name = (parent.get("artifacts") or {}).get(MODEL)
    if not name:
        return False
    place = "/".join(filter(None, (parent.get("entity"), parent.get("project"))))
    run.use_artifact(f"{place}/{name}:latest" if place else f"{name}:latest")
    return True

"""Imports go one way. Each room names the only rooms that it may import; anything else fails here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BELOW_MODEL = {"types", "anyres", "secrets", "files", "config", "cost", "losses"}
MAY_IMPORT = {
    "types": {"anyres"},
    "anyres": set(),
    "secrets": {"secret_forms"},
    "secret_forms": set(),
    "files": {"types", "secrets"},
    "config": {"types", "anyres", "secrets"},
    "cost": {"types", "config"},
    "losses": {"types", "config"},
    "model": BELOW_MODEL,
    "data": BELOW_MODEL,  # never model: a processor is passed in, so the data side runs without weights
    "evaluation": {*BELOW_MODEL, "model", "data"},
    "curation": {*BELOW_MODEL, "model", "data", "evaluation"},
    "stages": {*BELOW_MODEL, "model", "data", "evaluation"},
    "engine": {*BELOW_MODEL, "model", "data", "evaluation", "stages"},
    "sweep": {*BELOW_MODEL, "model", "data", "evaluation", "curation", "stages", "engine"},
    "callbacks": {*BELOW_MODEL, "model", "data", "evaluation", "stages", "engine"},
    "tasks": {*BELOW_MODEL, "model", "data", "evaluation", "curation", "stages", "engine", "sweep", "callbacks"},
    "run": {"config", "engine", "secrets", "tasks", "types"},
}
FILES = sorted([*ROOT.glob("lit_vlm/**/*.py"), *ROOT.glob("callbacks/*.py"), ROOT / "run.py"])
HYDRAS_FRIENDS = {"config", "run"}


def room_of(module: str) -> str | None:
    """`lit_vlm.data.collate` -> `data`, `callbacks.export` -> `callbacks`, `torch.nn` -> None."""
    parts = module.split(".")
    name = parts[1] if parts[0] == "lit_vlm" and len(parts) > 1 else parts[0]
    return name if name in MAY_IMPORT else None


def imports_of(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "lit_vlm"
                else [node.module or ""]
            )
            yield from ((node.lineno, name) for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    relative = path.relative_to(ROOT)
    own = room_of(".".join(relative.with_suffix("").parts))
    for line, name in imports_of(path):
        other = room_of(name)
        if own and other and other != own:
            assert other in MAY_IMPORT[own], (
                f"{relative}:{line}: {own} imports {name}; {own} may import only {sorted(MAY_IMPORT[own])}"
            )
        if name.split(".")[0] in ("hydra", "omegaconf"):
            assert own in HYDRAS_FRIENDS, f"{relative}:{line}: only config and run.py know Hydra"


def test_every_room_is_known():
    rooms = {path.name.removesuffix(".py") for path in (ROOT / "lit_vlm").iterdir() if not path.name.startswith("_")}
    assert rooms <= set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles_or_trusts_unasked(path):
    text = path.read_text(encoding="utf-8")
    for call in (
        "torch.load(",
        "pickle.load",
        "LOAD_TRUNCATED_IMAGES",
        "trust_remote_code=True",
        "shell=True",
        "yaml.load(",
    ):
        assert call not in text, f"{path.relative_to(ROOT)} contains {call}"

"""Imports go one way. The table lists the only packages that each package may import; any other import fails."""

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
MAY_IMPORT_HYDRA = {"config", "run"}


def get_package(module: str) -> str | None:
    """Get the package of a module: `lit_vlm.data.collate` -> `data`, `callbacks.export` -> `callbacks`, `torch.nn` -> None."""
    parts = module.split(".")
    name = parts[1] if parts[0] == "lit_vlm" and len(parts) > 1 else parts[0]
    return name if name in MAY_IMPORT else None


def iter_imports(path: Path):
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
    package = get_package(".".join(relative.with_suffix("").parts))
    for line, name in iter_imports(path):
        imported = get_package(name)
        if package and imported and imported != package:
            assert imported in MAY_IMPORT[package], (
                f"{relative}:{line}: {package} imports {name}; {package} may import only {sorted(MAY_IMPORT[package])}"
            )
        if name.split(".")[0] in ("hydra", "omegaconf"):
            assert package in MAY_IMPORT_HYDRA, f"{relative}:{line}: only config and run.py know Hydra"


def test_every_package_is_listed():
    packages = {path.name.removesuffix(".py") for path in (ROOT / "lit_vlm").iterdir() if not path.name.startswith("_")}
    assert packages <= set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles_or_trusts_remote_code(path):
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

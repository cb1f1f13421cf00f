"""Imports go one way. The table lists the only packages that each package may import; any other import fails."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Modules that import no layer: registries whose names the configuration reads, without torch.
REGISTRIES = {"model.projectors", "losses.loss_types"}
BELOW_MODEL = {"types", "anyres", "redaction", "files", "config", "cost", "losses", *REGISTRIES}
RUN_ROOMS = {"cluster", "distributed", "checkpoint", "runs", "fault_tolerance", "loggers", "reports"}
MAY_IMPORT = {
    "types": {"anyres"},
    "anyres": set(),
    "redaction": {"secret_patterns"},
    "secret_patterns": set(),
    "files": {"types", "redaction"},
    **{registry: set() for registry in REGISTRIES},
    "config": {"types", "anyres", "redaction", *REGISTRIES},
    "cost": {"types", "config", *REGISTRIES},
    "losses": {"types", "config", *REGISTRIES},
    "model": BELOW_MODEL,
    "data": BELOW_MODEL,  # never model: a processor is passed in, so the data side runs without weights
    "evaluation": {*BELOW_MODEL, "model", "data"},
    "curation": {*BELOW_MODEL, "model", "data", "evaluation"},
    "stages": {*BELOW_MODEL, "model", "data", "evaluation"},
    "cluster": {*BELOW_MODEL, "data"},
    "distributed": {*BELOW_MODEL, "model", "data", "stages"},
    "checkpoint": {*BELOW_MODEL, "data", "distributed"},
    "runs": {*BELOW_MODEL, "model", "data", "distributed", "checkpoint"},
    "fault_tolerance": {*BELOW_MODEL, "data", "cluster", "distributed", "checkpoint", "runs"},
    "loggers": {*BELOW_MODEL, "distributed", "runs", "fault_tolerance"},
    "reports": {*BELOW_MODEL, "model", "data", "evaluation", "stages", "runs"},
    "sweep": {*BELOW_MODEL, "cluster", "runs", "fault_tolerance", "reports"},
    "callbacks": {*BELOW_MODEL, *RUN_ROOMS, "model", "data", "evaluation", "stages"},
    "tasks": {*BELOW_MODEL, *RUN_ROOMS, "model", "data", "evaluation", "curation", "stages", "sweep", "callbacks"},
    "run": {"config", "fault_tolerance", "redaction", "tasks", "types"},
}
FILES = sorted([*ROOT.glob("lit_vlm/**/*.py"), *ROOT.glob("callbacks/*.py"), ROOT / "run.py"])
MAY_IMPORT_HYDRA = {"config", "run"}


def get_package(module: str) -> str | None:
    """Get the package of a module: `lit_vlm.data.collate` -> `data`, `callbacks.export` -> `callbacks`, `torch.nn` -> None.

    A registry is a package of its own: `lit_vlm.model.projectors` -> `model.projectors`.
    """
    parts = module.split(".")
    if (registry := ".".join(parts[1:3])) in REGISTRIES:
        return registry
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


def iter_imported_modules(path: Path):
    """Iterate over the modules that a file imports, also inside functions and for type annotations."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


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
    assert all((ROOT / "lit_vlm" / f"{registry.replace('.', '/')}.py").is_file() for registry in REGISTRIES)


def test_modules_do_not_import_each_other_in_a_circle():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    imported = {name: set(iter_imported_modules(path)) & set(modules) for name, path in modules.items()}
    while True:  # take away what imports nothing, and what nothing imports, until only circles are left
        used = {other for others in imported.values() for other in others}
        left = {name: others for name, others in imported.items() if others and name in used}
        if left.keys() == imported.keys():
            break
        imported = {name: others & left.keys() for name, others in left.items()}
    assert imported == {}


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

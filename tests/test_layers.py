"""Imports go one way. The table lists the only packages that each package may import; any other import fails."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BELOW_MODEL = {"types", "anyres", "redaction", "files", "config", "cost", "losses"}
RUN_ROOMS = {"cluster", "distributed", "checkpoint", "runs", "fault_tolerance", "loggers", "reports"}
MAY_IMPORT = {
    "types": {"anyres"},
    "anyres": set(),
    "redaction": {"secret_patterns"},
    "secret_patterns": set(),
    "files": {"types", "redaction"},
    "config": {"types", "anyres", "redaction"},
    "cost": {"types", "config"},
    "losses": {"types", "config"},
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


MAX_TAKERS = 12


def list_config_takers(path: Path):
    """List the parameters and fields of a file that take the whole config: `Run` or `RunConfig`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            annotations = [
                argument.annotation for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            ]
        elif isinstance(node, ast.ClassDef):
            annotations = [field.annotation for field in node.body if isinstance(field, ast.AnnAssign)]
        else:
            continue
        for annotation in filter(None, annotations):
            names = {name.id for name in ast.walk(annotation) if isinstance(name, ast.Name)}
            if names & {"Run", "RunConfig"}:
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"


def test_only_tasks_and_run_take_the_whole_config_in_at_most_twelve_places():
    """`config` makes and checks it. Everybody else takes a section or plain values."""
    takers = [taker for path in FILES for taker in list_config_takers(path) if not taker.startswith("lit_vlm/config/")]
    assert all(taker.startswith(("run.py", "lit_vlm/tasks/")) for taker in takers), takers
    assert len(takers) <= MAX_TAKERS, takers


def test_train_once_is_at_most_60_lines_with_at_most_15_imports_in_its_file():
    tree = ast.parse((ROOT / "lit_vlm/tasks/train.py").read_text(encoding="utf-8"))
    (train_once,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train_once")
    assert train_once.end_lineno - train_once.lineno + 1 <= 60
    assert sum(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree)) <= 15

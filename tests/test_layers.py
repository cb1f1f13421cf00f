"""Imports go one way. The table lists the only packages that each package may import; any other import fails."""

import ast
import re
from pathlib import Path

import pytest

from lit_vlm.config.choices import Task

ROOT = Path(__file__).resolve().parents[1]
# Modules that import no layer: registries whose names the configuration reads, without torch.
REGISTRIES = {"model.projectors", "losses.loss_types", "evaluation.benchmarks"}
# Projectors that are exported with a model: the file runs without this package.
PROJECTOR_CODE = "model.projector_modules"
# Tasks of lmms-eval, which run in its environment without this package: scores that `data` and `evaluation` share with them
TASK_PACK = "evaluation.task_pack"
BELOW_MODEL = {
    "types",
    "anyres",
    "compat",
    "formatting",
    "redaction",
    "files",
    "imports",
    "config",
    "cost",
    "losses",
    *REGISTRIES,
    PROJECTOR_CODE,
    TASK_PACK,
}
RUN_ROOMS = {"cluster", "distributed", "checkpoint", "runs", "fault_tolerance", "loggers", "reports"}
MAY_IMPORT = {
    "types": {"anyres"},
    "anyres": set(),
    "compat": {"types"},
    "formatting": set(),
    "imports": set(),
    "messages": {"messages_ko"},
    "messages_ko": set(),
    "redaction": {"secret_patterns"},
    "secret_patterns": set(),
    "files": {"types", "redaction"},
    **{registry: set() for registry in REGISTRIES},
    "model.projectors": {PROJECTOR_CODE},
    PROJECTOR_CODE: set(),
    TASK_PACK: set(),
    "config": {"types", "anyres", "compat", "formatting", "redaction", *REGISTRIES},
    "cost": {"types", "config", "formatting", *REGISTRIES},
    "losses": {"types", "config", "compat", *REGISTRIES},
    "model": BELOW_MODEL,
    "data": BELOW_MODEL,  # never model: a processor is passed in, so the data side runs without weights
    "evaluation": {*BELOW_MODEL, "model", "data"},
    "curation": {*BELOW_MODEL, "model", "data", "evaluation"},
    "preferences": {*BELOW_MODEL, "model", "data", "evaluation"},
    "stages": {*BELOW_MODEL, "model", "data", "evaluation"},
    "serving": {*BELOW_MODEL, "model", "data", "evaluation"},
    "demo": {*BELOW_MODEL, "data", "serving", "reports"},
    "viewer": {*BELOW_MODEL, "data", "serving", "demo", "reports"},
    "cluster": {*BELOW_MODEL, "data"},
    "distributed": {*BELOW_MODEL, "model", "data", "stages"},
    "checkpoint": {*BELOW_MODEL, "data", "distributed"},
    "runs": {*BELOW_MODEL, "model", "data", "distributed", "checkpoint"},
    "fault_tolerance": {*BELOW_MODEL, "data", "cluster", "distributed", "checkpoint", "runs"},
    "loggers": {*BELOW_MODEL, "distributed", "runs", "fault_tolerance"},
    "reports": {*BELOW_MODEL, "messages", "model", "data", "evaluation", "curation", "stages", "runs"},
    "sweep": {*BELOW_MODEL, "messages", "evaluation", "cluster", "runs", "fault_tolerance", "reports"},
    "callbacks": {*BELOW_MODEL, *RUN_ROOMS, "model", "data", "evaluation", "stages"},
    "tasks": {
        *BELOW_MODEL,
        *RUN_ROOMS,
        "model",
        "data",
        "evaluation",
        "curation",
        "preferences",
        "stages",
        "serving",
        "demo",
        "viewer",
        "sweep",
        "callbacks",
    },
    "run": {"config", "fault_tolerance", "messages", "redaction", "tasks", "types"},
}
FILES = sorted([*ROOT.glob("lit_vlm/**/*.py"), *ROOT.glob("callbacks/*.py"), ROOT / "run.py"])
MAY_IMPORT_HYDRA = {"compat", "config", "run"}


def get_package(module: str) -> str | None:
    """Get the package of a module: `lit_vlm.data.collate` -> `data`, `callbacks.export` -> `callbacks`, `torch.nn` -> None.

    A registry and the task pack are packages of their own: `lit_vlm.model.projectors` -> `model.projectors`.
    """
    parts = module.split(".")
    if (part := ".".join(parts[1:3])) in {*REGISTRIES, PROJECTOR_CODE, TASK_PACK}:
        return part
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
    assert re.findall(r"torch\.load\((?!.*weights_only=True)", text) == []  # with it only tensors are read
    for call in (
        "pickle.load",
        "LOAD_TRUNCATED_IMAGES",
        "trust_remote_code=True",
        "shell=True",
        "yaml.load(",
    ):
        assert call not in text, f"{path.relative_to(ROOT)} contains {call}"


# the function of each task, `run_task` that calls it, `train_once`, and `make_job`; for stages of image-text pairs
# `train_pairs`, `train_pairs_once` and `preflight_pairs`
MAX_TAKERS = len(Task) + 6


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


def test_only_the_functions_of_tasks_and_few_others_take_the_whole_config():
    """`config` makes and checks it. Everybody else takes a section or plain values."""
    takers = [taker for path in FILES for taker in list_config_takers(path) if not taker.startswith("lit_vlm/config/")]
    assert all(taker.startswith(("run.py", "lit_vlm/tasks/")) for taker in takers), takers
    assert len(takers) <= MAX_TAKERS, takers


def test_train_once_is_at_most_60_lines_with_at_most_15_imports_in_its_file():
    tree = ast.parse((ROOT / "lit_vlm/tasks/train.py").read_text(encoding="utf-8"))
    (train_once,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train_once")
    assert train_once.end_lineno - train_once.lineno + 1 <= 60
    assert sum(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree)) <= 15


COMPAT = ROOT / "lit_vlm" / "compat"
OUTSIDE_COMPAT = [path for path in FILES if COMPAT not in path.parents]
INTERNAL_NAMES = {"fit_loop", "epoch_loop"}  # of Lightning: public names, and no documented interface
PRIVATE_NAME = re.compile(r"_(?!_)")


def list_private_uses(path: Path) -> dict[str, int]:
    """List name -> line of attributes and imports with a leading underscore. Names of Python's own are left out."""
    uses = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            uses[node.attr] = node.lineno
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("lit_vlm", "callbacks")):
            uses |= dict.fromkeys([*(node.module or "").split("."), *(alias.name for alias in node.names)], node.lineno)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
        ):
            uses |= {arg.value: arg.lineno for arg in node.args if isinstance(arg, ast.Constant) and arg.value != ""}
    return {name: line for name, line in uses.items() if name in INTERNAL_NAMES or PRIVATE_NAME.match(str(name))}


def list_own_names(path: Path) -> set[str]:
    """List the names that a file defines: functions, classes, fields, variables, attributes of self."""
    names = {"_exit"}  # os._exit is documented
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if getattr(node.value, "id", "") == "self" else set()
    return names


def test_private_parts_of_other_packages_are_used_in_compat_only():
    room = {name for path in COMPAT.glob("*.py") for name in list_private_uses(path)}
    own_names = {path: list_own_names(path) for path in OUTSIDE_COMPAT}
    all_own_names = set().union(*own_names.values())
    for path in OUTSIDE_COMPAT:
        for name, line in list_private_uses(path).items():
            # a name of the room may also be one of ours (`_metrics`); then only the file that defines it uses it
            assert name in (own_names[path] if name in room else all_own_names), (
                f"{path.relative_to(ROOT)}:{line}: {name} is a private part of another package; use it in lit_vlm/compat/,"
                " and check it in tests/compat/test_contracts.py"
            )


def test_each_module_of_compat_has_contract_tests():
    text = (ROOT / "tests" / "compat" / "test_contracts.py").read_text(encoding="utf-8")
    for path in COMPAT.glob("*.py"):
        for name in list_private_uses(path).keys() - list_own_names(path):
            assert name in text, f"{path.relative_to(ROOT)}: tests/compat/test_contracts.py does not check {name}"


OWN_DURABILITY = {  # the only other files that move or sync files themselves
    "lit_vlm/checkpoint/folder.py": "moves folders of many GB",
    "lit_vlm/checkpoint/write.py": "hashes and syncs tensors while it writes them",
    "lit_vlm/fault_tolerance/watchdog_thread.py": "syncs stacks before the process exits",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_replaced_by_one_implementation(path):
    name, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    if name != "lit_vlm/files.py" and name not in OWN_DURABILITY:
        for call in ("os.replace(", "os.rename(", "os.link(", "os.fsync(", "tempfile.mk"):
            assert call not in text, (
                f"{name} contains {call}...): use replace_file or atomic_folder of lit_vlm/files.py"
            )

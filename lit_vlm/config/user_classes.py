"""Classes of the user, named by an import path. Naming a class on the command line is the permission to run it.

`read_constructor` reads the arguments of a class from its source, without importing it: an error in them appears at once,
and on a machine without the packages that the class needs.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from lit_vlm.types import UserError, find_nearest, format_suggestion

MAX_FOLLOWED_IMPORTS = 5  # `from .impl import MyCallback` in an __init__.py is followed so many times


@dataclass(frozen=True, slots=True)
class Constructor:
    """Arguments of a class.

    Attributes:
        names: arguments that can be given by name.
        required: those without a default.
        takes_any: it has **arguments.
    """

    names: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    takes_any: bool = False


def is_class_path(name: str) -> bool:
    """Return True for the import path of a class: names with dots between them (my_package.MyClass)."""
    return "." in name and all(part.isidentifier() for part in name.split("."))


def instantiate(
    setting: str,
    class_path: str,
    is_valid: Callable[[type], bool],
    expected: str,
    remedy: str,
    arguments: Mapping[str, Any] | None = None,
) -> Any:
    """Instantiate the class at `package.module.Class`.

    Args:
        setting: key of the setting, for messages.
        is_valid: returns True if a class is of the required type.
        expected, remedy: what the class must be and how to correct the setting, as ends of sentences.
        arguments: arguments of the constructor; none if the setting cannot give any.

    Raises:
        UserError: the class does not exist, is of another type, or does not take these arguments.
    """
    target = import_class(setting, class_path, is_valid, expected, remedy)
    if arguments is not None and (errors := list(find_argument_errors(class_path, arguments, inspect_class(target)))):
        raise UserError(f"{setting}: {errors[0]}")
    try:
        return target(**arguments or {})
    except TypeError as error:
        found = "these arguments" if arguments else "arguments"
        reason = f"{setting}: {class_path} cannot be made {'with' if arguments else 'without'} {found} ({error})"
        raise UserError(f"{reason}. {'Correct them' if arguments else 'Give its arguments defaults'}.") from error
    except ValueError as error:  # a UserError as well
        raise UserError(f"{setting}: {class_path}: {error}") from error


def import_class(
    setting: str, class_path: str, is_valid: Callable[[type], bool], expected: str, remedy: str
) -> type[Any]:
    """Import the class at `package.module.Class`; see `instantiate`."""
    module, _, name = class_path.rpartition(".")
    try:
        target = getattr(import_module(module), name)
    except Exception as error:  # the module is the user's, and may raise anything
        is_known = isinstance(error, ImportError | AttributeError | ValueError)
        reason = (
            f"{setting}: {class_path} cannot be imported ({'' if is_known else f'{type(error).__name__}: '}{error})"
        )
        raise UserError(f"{reason}. Give the path of a class that Python can import from here.") from error
    if not (inspect.isclass(target) and is_valid(target)):
        raise UserError(f"{setting}: {class_path} is not {expected}. {remedy}.")
    return target


def inspect_class(target: type) -> Constructor | None:
    """Return the constructor's arguments of an imported class; None if Python does not know them."""
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return None
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    return Constructor(
        tuple(one.name for one in named),
        tuple(one.name for one in named if one.default is one.empty),
        any(one.kind is one.VAR_KEYWORD for one in parameters),
    )


def find_argument_errors(name: str, arguments: Mapping[str, Any], constructor: Constructor | None) -> Iterator[str]:
    """Yield an error message for each argument that a class does not have, and for those that it needs."""
    if constructor is None:
        return
    offered = f"it has {', '.join(constructor.names)}" if constructor.names else "it has none"
    for argument in arguments:
        if argument not in constructor.names and not constructor.takes_any:
            suggestion = format_suggestion(find_nearest(argument, constructor.names))
            yield f"{name} has no argument {argument}; {offered}.{suggestion}"
    missing = [argument for argument in constructor.required if argument not in arguments]
    if missing:
        example = ", ".join(f"{argument}: ..." for argument in missing)
        yield f"{name} cannot be made without arguments; it needs {', '.join(missing)}: write {{{name}: {{{example}}}}}."


# Reading without import


@cache
def read_constructor(class_path: str) -> Constructor | None:
    """Read the constructor's arguments of the class at `package.module.Class` from its source; None if that does not tell."""
    module, _, name = class_path.rpartition(".")
    return _read_class(module, name, MAX_FOLLOWED_IMPORTS)


def _read_class(module: str, name: str, imports_left: int) -> Constructor | None:
    spec = _find_spec(module)
    if spec is None or not (spec.origin or "").endswith(".py"):
        return None
    try:
        tree = ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _read_class_node(spec, node, imports_left)
        if isinstance(node, ast.ImportFrom) and imports_left:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    source = _resolve_module(spec, node)
                    return (
                        Constructor()
                        if _is_lightning_callback(source, alias.name)
                        else _read_class(source, alias.name, imports_left - 1)
                    )
    return None


def _read_class_node(spec: ModuleSpec, node: ast.ClassDef, imports_left: int) -> Constructor | None:
    if node.decorator_list or node.keywords:  # a dataclass, a metaclass
        return None
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return None if statement.decorator_list else _read_arguments(statement.args)
        if isinstance(statement, ast.FunctionDef) and statement.name == "__new__":
            return None
    if len(node.bases) != 1 or not imports_left:
        return None if node.bases else Constructor()
    base = node.bases[0]
    if isinstance(base, ast.Attribute):  # L.Callback
        return Constructor() if base.attr == "Callback" else None
    return _read_class(spec.name, base.id, imports_left - 1) if isinstance(base, ast.Name) else None


def _read_arguments(arguments: ast.arguments) -> Constructor:
    positional = [*arguments.posonlyargs, *arguments.args][1:]  # without self
    num_required = len(positional) - len(arguments.defaults)
    named = {argument.arg: number < num_required for number, argument in enumerate(positional)}
    named |= {
        argument.arg: default is None
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    }
    return Constructor(
        tuple(named), tuple(name for name, required in named.items() if required), arguments.kwarg is not None
    )


def _is_lightning_callback(module: str, name: str) -> bool:
    return name == "Callback" and module.split(".")[0] in ("lightning", "pytorch_lightning")


def _resolve_module(spec: ModuleSpec, node: ast.ImportFrom) -> str:
    """Return the absolute name of the module of a `from` import."""
    if not node.level:
        return node.module or ""
    is_package = spec.submodule_search_locations is not None
    parts = spec.name.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _find_spec(module: str) -> ModuleSpec | None:
    """Find a module without importing it or its packages."""
    first, *others = module.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return None
    name = first
    for part in others:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec

"""YAML reading that keeps the text of text settings unchanged.

YAML 1.1 reads `1:30:00` (as 5400), `1_000`, `0x1F` and `1e3` as numbers, and `on` and `no` as booleans. For a setting that is
text or an enum this is never intended. Hydra's command line converts fewer forms in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import lru_cache
from inspect import isclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from antlr4 import InputStream, Token
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from lit_vlm.compat.hydra import BaseFileSource, get_yaml_loader, read_header, register_file_source
from lit_vlm.config.callbacks import convert_to_list
from lit_vlm.config.settings import get_setting_type

KeyPath = tuple[str, ...]  # keys on the way to a value, without positions in lists
TextPredicate = Callable[[KeyPath, str], bool]  # True if the raw value at this key path is text
CONVERTED_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "timestamp"))
TEXT_TAG = "tag:yaml.org,2002:str"
VALUE_TAG, MERGE_TAG = "tag:yaml.org,2002:value", "tag:yaml.org,2002:merge"  # tags of = and <<, values of no setting
TOKEN_CONVERTERS: dict[int, Callable[[str], Any]] = {
    OverrideLexer.INT: int,
    OverrideLexer.FLOAT: float,
    OverrideLexer.BOOL: lambda text: text.lower() == "true",
}
OPENING_BRACKETS = (OverrideLexer.BRACKET_OPEN, OverrideLexer.BRACE_OPEN)
CLOSING_BRACKETS = (OverrideLexer.BRACKET_CLOSE, OverrideLexer.BRACE_CLOSE)


def read_yaml(text: str, keeps_text: TextPredicate, loader: type = yaml.SafeLoader) -> Any:
    """Read a YAML document. Keys are always text, and so are values for which `keeps_text` returns True.

    Raises:
        yaml.YAMLError: the text is not valid YAML.
    """
    reader = loader(text)
    try:
        node = reader.get_single_node()
        return None if node is None else reader.construct_document(_keep_text(node, (), keeps_text, ()))
    finally:
        reader.dispose()


def _keep_text(node: yaml.Node, keys: KeyPath, keeps_text: TextPredicate, ancestors: tuple[int, ...]) -> yaml.Node:
    """Copy a YAML node and tag the plain scalars that are meant as text."""
    if id(node) in ancestors:
        raise yaml.constructor.ConstructorError(None, None, "an alias leads back into itself", node.start_mark)
    ancestors = (*ancestors, id(node))
    if isinstance(node, yaml.ScalarNode):
        converted = node.tag in CONVERTED_TAGS and keeps_text(keys, node.value)
        tag = TEXT_TAG if node.style is None and (converted or node.tag in (VALUE_TAG, MERGE_TAG)) else node.tag
        return yaml.ScalarNode(tag, node.value, node.start_mark, node.end_mark, node.style)
    if isinstance(node, yaml.SequenceNode):
        items = [_keep_text(item, keys, keeps_text, ancestors) for item in node.value]
        return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark, node.flow_style)
    assert isinstance(node, yaml.MappingNode)
    pairs = []
    for key, value in node.value:
        if key.tag == MERGE_TAG:
            pairs.append((key, _keep_text(value, keys, keeps_text, ancestors)))
            continue
        name = _keep_text(key, (), lambda *_: True, ancestors)
        pairs.append((name, _keep_text(value, (*keys, str(key.value)), keeps_text, ancestors)))
    return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark, node.flow_style)


def is_text_type(hint: Any, raw_value: str) -> bool:
    """Return True if a value of this type, or an item of a list of this type, is text or this member of an enum."""
    if get_origin(hint) in (UnionType, Union, list):
        return any(is_text_type(option, raw_value) for option in get_args(hint))
    if isclass(hint) and issubclass(hint, Enum):
        return raw_value in hint.__members__
    return hint is str


def is_text_setting(key: str, raw_value: str) -> bool:
    """Return True if a setting, of any stage, keeps its raw value as text."""
    return is_text_type(get_setting_type(key), raw_value)


def read_settings(path: Path, package: str) -> Any:
    """Read a file of settings that belong to `package`; None for an empty file. The result is shared: do not change it."""
    stat = path.stat()
    return _read_settings_cached(path, package, (stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=256)
def _read_settings_cached(path: Path, package: str, _stamp: tuple[int, int]) -> Any:
    def keep_text(keys: KeyPath, written: str) -> bool:
        return keys[:1] not in (("defaults",), ("hydra",)) and is_text_setting(
            ".".join(filter(None, (package, *keys))), written
        )

    settings = read_yaml(path.read_text(encoding="utf-8"), keep_text, get_yaml_loader())
    if not package and isinstance(settings, dict) and "callbacks" in settings:
        settings["callbacks"] = convert_to_list(settings["callbacks"])
    return settings


class TextKeepingConfigSource(BaseFileSource):
    """Config source for Hydra that reads YAML files by the types of the schema."""

    def load_config(self, config_path: str) -> ConfigResult:
        path = self.get_path(config_path)
        if not path.is_file():
            return super().load_config(config_path)
        header = read_header(path.read_text(encoding="utf-8")[:512])
        try:
            settings = read_settings(path, _find_package(config_path, header))
        except yaml.YAMLError:
            super().load_config(config_path)  # raises an error that names the file
            raise
        if not (isinstance(settings, dict) and settings):
            return super().load_config(config_path)
        return ConfigResult(self.provider, f"{self.scheme()}://{self.path}", OmegaConf.create(settings), header)


def _find_package(config_path: str, header: dict[str, str | None]) -> str:
    """Find the package of a file's settings: from its first line, else from its group."""
    package = header.get("package")
    if package and package != "_group_":
        return "" if package == "_global_" else package
    group = config_path.rpartition("/")[0]
    return (
        "data.sources" if group == "data/source" else "" if group.startswith("experiment") else group.replace("/", ".")
    )


def register_yaml_source() -> None:
    """Make Hydra read its files through `TextKeepingConfigSource`."""
    register_file_source(TextKeepingConfigSource)


def quote_text(override: str) -> str:
    """Quote each element that Hydra would parse as a number or a boolean where the setting is text.

    `run_name=1e3` would become 1000.0, and `submit.setup=[true]` would become True. Elements of lists, of groups in braces
    and of comma lists are checked separately, each with its own key.
    """
    key, _, value = override.partition("=")
    lexer = OverrideLexer(InputStream(value))
    lexer.removeErrorListeners()
    lexer.mode(OverrideLexer.VALUE_MODE)
    tokens = lexer.getAllTokens()
    if not value or any(token.type == OverrideLexer.POPEN for token in tokens):  # choice(...), range(...): a sweep
        return override
    pieces, element = [f"{key}="], list[Token]()
    key_path = [key.lstrip("+~")]  # a key for each open bracket, empty for a list
    names_key = False  # the element is a key in braces
    for token in tokens:
        ends_key = names_key and token.type == OverrideLexer.COLON
        if not ends_key and token.type not in (OverrideLexer.COMMA, *OPENING_BRACKETS, *CLOSING_BRACKETS):
            element.append(token)
            continue
        text = "".join(token.text for token in element)
        if ends_key:
            key_path[-1] = text.strip()
        pieces += [text if ends_key else _quote_element(element, key_path), token.text]
        element = []
        if token.type in OPENING_BRACKETS:
            key_path.append("{" if token.type == OverrideLexer.BRACE_OPEN else "")
        elif token.type in CLOSING_BRACKETS and len(key_path) > 1:
            key_path.pop()
        names_key = not ends_key and token.type not in CLOSING_BRACKETS and key_path[-1] != "" and len(key_path) > 1
    return "".join([*pieces, _quote_element(element, key_path)])


def _quote_element(element: list[Token], key_path: list[str]) -> str:
    """Quote an element if it is a single token that Hydra would convert although the setting is text."""
    text = "".join(token.text for token in element)
    tokens = [token for token in element if token.type != OverrideLexer.WS]
    if len(tokens) != 1 or tokens[0].type not in TOKEN_CONVERTERS:
        return text
    raw_value = tokens[0].text
    changes = str(TOKEN_CONVERTERS[tokens[0].type](raw_value)) != raw_value
    return (
        text.replace(raw_value, f"'{raw_value}'")
        if changes and is_text_setting(".".join(filter(None, key_path)), raw_value)
        else text
    )

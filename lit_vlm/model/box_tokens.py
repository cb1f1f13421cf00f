"""Box tokens of an exported folder: special tokens, or ordinary added tokens, which every decoder keeps.

Ids and weights are the same in both forms. Decoding with `skip_special_tokens=True`, the default of chat servers, removes
special tokens from an answer, and with them the boxes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from lit_vlm.files import write_text_atomically
from lit_vlm.model.hub import raise_folder_errors
from lit_vlm.types import SPECIAL_TOKENS, UserError

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, MODEL_CARD_FILE = "tokenizer.json", "tokenizer_config.json", "README.md"
EXTRA_KEY = "extra_special_tokens"  # list of special tokens without a role, in tokenizer_config.json

_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
---

A model of transformers' class `{class_name}`, trained with lit_vlm.
"""
_CODE_NOTE = """\
transformers has no class with its projector: allow `trust_remote_code` when you load it, which runs `{code_file}` of this folder.
"""
_SPECIAL_NOTE = """\
The box tokens (`<obj>`, `<bbox>` and the other seven) are special tokens: decode answers with `skip_special_tokens=False`.
Chat servers remove special tokens by default, and with them the boxes.
"""
_ORDINARY_NOTE = """\
The box tokens (`<obj>`, `<bbox>` and the other seven) are ordinary added tokens: answers keep their boxes in chat servers and
in decoding with `skip_special_tokens=True`.
"""


def mark_box_tokens_special(tokenizer: PreTrainedTokenizerFast) -> None:
    """Mark the box tokens that a tokenizer has as special, in memory. Ids stay."""
    known = tokenizer.get_added_vocab()
    special = set(tokenizer.all_special_tokens)
    if ordinary := [token for token in SPECIAL_TOKENS if token in known and token not in special]:
        tokenizer.add_special_tokens({"additional_special_tokens": ordinary}, replace_extra_special_tokens=False)


def has_special_boxes(folder: Path) -> bool | None:
    """Return True if the box tokens of a model folder are special; None if it has no tokenizer or no box tokens.

    Raises:
        UserError: the tokenizer's file is damaged.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        return None
    flags = [entry["special"] for entry in _list_box_entries(_read_object(folder, TOKENIZER_FILE))]
    return all(flags) if flags else None


def set_special_boxes(folder: Path, is_special: bool) -> None:
    """Set the form of the box tokens in a model folder, and what its model card says. Weights and ids stay.

    `tokenizer.json` is written last, so an interrupted call is repeated by the next one.

    Raises:
        UserError: a file of the tokenizer is damaged.
        OSError: the folder cannot be written.
    """
    tokenizer, config = _read_object(folder, TOKENIZER_FILE), _read_object(folder, TOKENIZER_CONFIG_FILE)
    entries = _list_box_entries(tokenizer)
    boxes = [entry["content"] for entry in entries]
    others = [token for token in config.get(EXTRA_KEY) or [] if token not in boxes]
    config[EXTRA_KEY] = [*others, *boxes] if is_special else others
    for entry in entries:
        entry["special"] = is_special
    card = folder / MODEL_CARD_FILE
    if card.is_file():
        notes = (_ORDINARY_NOTE, _SPECIAL_NOTE) if is_special else (_SPECIAL_NOTE, _ORDINARY_NOTE)
        _write_text(card, card.read_text(encoding="utf-8").replace(*notes))
    for name, value in ((TOKENIZER_CONFIG_FILE, config), (TOKENIZER_FILE, tokenizer)):
        _write_text(folder / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def format_model_card(has_boxes: bool, class_name: str, code_file: str | None = None) -> str:
    """Format the model card of an exported folder whose box tokens, if any, are special.

    Args:
        class_name: transformers' class of the model.
        code_file: file of the folder with the code of its projector; None: transformers has it.
    """
    notes = [_CODE_NOTE.format(code_file=code_file)] if code_file else []
    return "\n".join([_CARD.format(class_name=class_name), *notes, *([_SPECIAL_NOTE] if has_boxes else [])])


def _list_box_entries(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in tokenizer.get("added_tokens") or [] if entry["content"] in SPECIAL_TOKENS]


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    with raise_folder_errors(str(folder), f"its {name} could not be read"):
        value = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise UserError(f"{folder / name}: holds {type(value).__name__} and no JSON object.")
        return value


def _write_text(path: Path, text: str) -> None:
    write_text_atomically(path, text, remove_secrets=False)  # a vocabulary may hold any text

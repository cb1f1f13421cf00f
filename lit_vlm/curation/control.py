"""Prompts without their control token: answers to them serve as rejected answers, which ignore `<gro>` or `<ocr>`."""

from __future__ import annotations

from dataclasses import replace

from lit_vlm.types import Content, Control, Role, Sample

ASKS_FOR_BOXES = (Control("<gro>"), Control("<ocr>"))


def without_control(sample: Sample) -> Sample | None:
    """Remove `<gro>` or `<ocr>`, and the line break after it, from the last question of a conversation.

    Returns:
        The changed sample; None if the last question has neither token.
    """
    at = next((n for n in reversed(range(len(sample.messages))) if sample.messages[n].role is Role.user), None)
    if at is None or not any(piece in ASKS_FOR_BOXES for piece in sample.messages[at].content):
        return None
    kept: list[Content] = []
    behind = False
    for piece in sample.messages[at].content:
        if piece in ASKS_FOR_BOXES:
            behind = True
            continue
        kept += [piece.lstrip("\n")] if behind and isinstance(piece, str) else [piece]
        behind = False
    asked = replace(sample.messages[at], content=tuple(piece for piece in kept if piece != ""))
    return replace(sample, messages=(*sample.messages[:at], asked, *sample.messages[at + 1 :]))

"""Prompts without their control token: answers to them serve as rejected answers, which ignore `<gro>` or `<ocr>`."""

from __future__ import annotations

from dataclasses import replace

from lit_vlm.types import ContentPart, ControlToken, Role, Sample

BOX_REQUEST_TOKENS = (ControlToken("<gro>"), ControlToken("<ocr>"))


def remove_control_token(sample: Sample) -> Sample | None:
    """Remove `<gro>` or `<ocr>`, and the line break after it, from the last question of a conversation.

    Returns:
        The changed sample; None if the last question has neither token.
    """
    position = next((n for n in reversed(range(len(sample.messages))) if sample.messages[n].role is Role.user), None)
    if position is None or not any(piece in BOX_REQUEST_TOKENS for piece in sample.messages[position].content):
        return None
    content: list[ContentPart] = []
    after_control = False
    for piece in sample.messages[position].content:
        if piece in BOX_REQUEST_TOKENS:
            after_control = True
            continue
        content += [piece.lstrip("\n")] if after_control and isinstance(piece, str) else [piece]
        after_control = False
    question = replace(sample.messages[position], content=tuple(piece for piece in content if piece != ""))
    return replace(sample, messages=(*sample.messages[:position], question, *sample.messages[position + 1 :]))

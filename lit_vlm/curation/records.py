"""Preference pairs as JSONL rows that `data=preference` reads, and the files of their images."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_vlm.curation.choice import AnswerPair
from lit_vlm.data.images import EncodedImage, FileImage, resolve_image_path
from lit_vlm.data.staging import resolve_original_path
from lit_vlm.files import atomic_write
from lit_vlm.types import ContentPart, ControlToken, ImagePlaceholder, LazyImage, Message, Role, Sample


def build_pair_row(sample: Sample, pair: AnswerPair, pair_kind: str, images: PairImages) -> dict[str, Any]:
    """Build the JSONL row of a pair. Its images are on disk when this returns.

    Control tokens are separate parts of the content, so that a reader cannot take text for a control token.

    Args:
        pair_kind: "response" or "control".
        images: resolves and saves the images.
    """
    prompt = sample.messages[:-1]
    slots = [piece.index for message in prompt for piece in message.content if isinstance(piece, ImagePlaceholder)]
    chosen, rejected = pair.chosen, pair.rejected
    return {
        "id": f"{sample.source}/{sample.id}/{pair_kind}",
        "pair": pair_kind,
        "kind": sample.kind.value,
        "language": sample.language.value,
        "prompt": [_convert_message(message) for message in prompt],
        "chosen": [_convert_message(Message(Role.assistant, chosen.content))],
        "rejected": [_convert_message(Message(Role.assistant, rejected.content))],
        "images": [images.resolve_path(sample.images[slot], sample.origin) for slot in slots],
        "scores": {"chosen": chosen.score, "rejected": rejected.score},
        "answers": {"chosen": chosen.origin.value, "rejected": rejected.origin.value},
        "origin": sample.origin,
        "marks": "text",  # control tokens and images are separate parts
    }


def _convert_message(message: Message) -> dict[str, Any]:
    """Convert a message: text alone becomes a string, other content a list of parts."""
    content = message.content
    if all(isinstance(piece, str) for piece in content):
        return {"role": message.role.value, "content": message.text}
    return {"role": message.role.value, "content": [_convert_part(piece) for piece in content]}


def _convert_part(piece: ContentPart) -> dict[str, str]:
    if isinstance(piece, ImagePlaceholder):
        return {"type": "image"}
    return (
        {"type": "control", "token": piece.token}
        if isinstance(piece, ControlToken)
        else {"type": "text", "text": piece}
    )


class PairImages:
    """Paths of images, relative to the folder of the pairs. An image without a file of its own is saved in `folder` first.

    Args:
        root: folder of the file of pairs, base of its relative paths.
        folder: folder below `root` for saved images; made when needed.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root.resolve(), folder
        self.outside: set[str] = set()  # folders of files that are not below `root`

    def resolve_path(self, image: LazyImage, origin: str) -> str:
        """Return the path of an image, relative to `root` where possible. An image without a file is saved first."""
        if isinstance(image, FileImage):
            location = resolve_original_path(resolve_image_path(image.path, image.root, origin))
            if location.is_relative_to(self.root):
                return location.relative_to(self.root).as_posix()
            return location.as_posix()
        data, ending = _encode_image(image)
        path = self.folder / f"{hashlib.sha256(data).hexdigest()[:24]}.{ending}"
        if not path.is_file():
            with atomic_write(path, "The pictures", "prefer.output") as draft:
                draft.write_bytes(data)
        return path.resolve().relative_to(self.root).as_posix()


def find_image_root(paths: Sequence[str]) -> str | None:
    """Find the common folder of all images outside the folder of the pairs; None if there are none."""
    outside = [os.path.dirname(path) for path in paths if os.path.isabs(path)]
    return os.path.commonpath(outside) if outside else None


def _encode_image(image: LazyImage) -> tuple[bytes, str]:
    """Return the encoded bytes of an image and its file ending; raw pixels are encoded as PNG."""
    if isinstance(image, EncodedImage):
        return image.read_encoded()
    stream = io.BytesIO()
    image.load().save(stream, format="PNG")
    return stream.getvalue(), "png"

"""Preference pairs as JSONL rows that `data=preference` reads, and the files of their images."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_vlm.curation.choice import Pair
from lit_vlm.data.images import EncodedImage, FileImage, locate
from lit_vlm.data.staging import original
from lit_vlm.files import written
from lit_vlm.types import Content, Control, ImageSlot, ImageSource, Message, Role, Sample


def pair_row(sample: Sample, pair: Pair, of: str, pictures: Pictures) -> dict[str, Any]:
    """Build the JSONL row of a pair. Its images are on disk when this returns.

    Control tokens are separate parts of the content, so that a reader cannot take text for a control token.

    Args:
        pair_kind: "response" or "control".
        images: resolves and saves the images.
    """
    prompt = sample.messages[:-1]
    slots = [piece.index for message in prompt for piece in message.content if isinstance(piece, ImageSlot)]
    chosen, rejected = pair.chosen, pair.rejected
    return {
        "id": f"{sample.source}/{sample.id}/{of}",
        "pair": of,
        "kind": sample.kind.value,
        "language": sample.language.value,
        "prompt": [_message(message) for message in prompt],
        "chosen": [_message(Message(Role.assistant, chosen.content))],
        "rejected": [_message(Message(Role.assistant, rejected.content))],
        "images": [pictures.path_of(sample.images[slot], sample.origin) for slot in slots],
        "scores": {"chosen": chosen.score, "rejected": rejected.score},
        "answers": {"chosen": chosen.origin.value, "rejected": rejected.origin.value},
        "origin": sample.origin,
        "marks": "text",  # control tokens and images are separate parts
    }


def _message(message: Message) -> dict[str, Any]:
    """Convert a message: text alone becomes a string, other content a list of parts."""
    content = message.content
    if all(isinstance(piece, str) for piece in content):
        return {"role": message.role.value, "content": message.text}
    return {"role": message.role.value, "content": [_part(piece) for piece in content]}


def _part(piece: Content) -> dict[str, str]:
    if isinstance(piece, ImageSlot):
        return {"type": "image"}
    return {"type": "control", "token": piece.token} if isinstance(piece, Control) else {"type": "text", "text": piece}


class Pictures:
    """Paths of images, relative to the folder of the pairs. An image without a file of its own is saved in `folder` first.

    Args:
        root: folder of the file of pairs, base of its relative paths.
        folder: folder below `root` for saved images; made when needed.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root.resolve(), folder
        self.outside: set[str] = set()  # folders of files that are not below `root`

    def path_of(self, image: ImageSource, origin: str) -> str:
        """Return the path of an image, relative to `root` where possible. An image without a file is saved first."""
        if isinstance(image, FileImage):
            location = original(locate(image.path, image.root, origin))
            if location.is_relative_to(self.root):
                return location.relative_to(self.root).as_posix()
            return location.as_posix()
        data, ending = _encoded(image)
        path = self.folder / f"{hashlib.sha256(data).hexdigest()[:24]}.{ending}"
        if not path.is_file():
            with written(path, "The pictures", "prefer.output") as draft:
                draft.write_bytes(data)
        return path.resolve().relative_to(self.root).as_posix()


def image_root(paths: Sequence[str]) -> str | None:
    """Find the common folder of all images outside the folder of the pairs; None if there are none."""
    outside = [os.path.dirname(path) for path in paths if os.path.isabs(path)]
    return os.path.commonpath(outside) if outside else None


def _encoded(image: ImageSource) -> tuple[bytes, str]:
    """Return the encoded bytes of an image and its file ending; raw pixels are encoded as PNG."""
    if isinstance(image, EncodedImage):
        return image.encoded()
    stream = io.BytesIO()
    image.load().save(stream, format="PNG")
    return stream.getvalue(), "png"

"""Fingerprints of records: 64-bit hashes of text, image names, and size and modification time of image files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence

from lit_vlm.data.index.sample_index import SampleIndex
from lit_vlm.data.lazy_images import (
    ArrayImage,
    BytesImage,
    FileImage,
    compute_image_hash,
    format_untrusted,
    hash_pixels,
    resolve_image_path,
)
from lit_vlm.types import ControlToken, Fault, ImagePlaceholder, LazyImage, Message, PreferencePair, Record, RecordError


def compute_digests(record: Record) -> tuple[int, int]:
    """Compute (digest, group): hash of messages and images, and hash of the images alone (without images: the digest)."""
    pictures = [get_image_key(record, number) for number in range(len(record.images))]
    if isinstance(record, PreferencePair):
        messages = (*record.prompt, record.chosen, record.rejected)
    else:
        messages = record.messages
    digest = _hash_parts([*(part for message in messages for part in _iter_message_bytes(message)), *pictures])
    return digest, _hash_parts(pictures) if pictures else digest


def get_image_key(record: Record, number: int) -> bytes:
    """Get the key of an image within its source: its path, or its content."""
    image = record.images[number]
    match image:
        case FileImage():
            return os.fsencode(image.path)
        case BytesImage():
            return hashlib.blake2b(image.data, digest_size=16).digest()
        case ArrayImage():
            return hash_pixels(image.array)
    name = getattr(image, "name", f"{record.source}/{record.id}#{number}")  # name of an archive member
    return name.encode(errors="surrogatepass")


def compute_stamp(record: Record) -> int:
    """Compute a stamp of the size and modification time of the record's image files; 0 without files."""
    stats = [part for image in record.images for part in _get_size_and_mtime(image)]
    return _hash_parts([repr(stats).encode()]) if any(stats) else 0


def _get_size_and_mtime(image: LazyImage) -> tuple[int, int]:
    member = getattr(image, "member", None)
    try:
        if isinstance(image, FileImage):
            status = _get_file_status(image)
        elif member is not None:
            status = os.stat(member.archive)
        else:
            return 0, 0
    except (OSError, RecordError):  # reading the image reports the error
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _get_file_status(image: FileImage) -> os.stat_result:
    try:
        return os.stat(f"{image.root}/{image.path}")
    except (OSError, ValueError):  # the name has another Unicode form, or does not exist
        return resolve_image_path(image.path, image.root, image.origin, image.more_roots).stat()


def _iter_message_bytes(message: Message) -> Iterable[bytes]:
    """Yield the parts of a message for hashing."""
    yield message.role.encode()
    if not message.supervised:
        yield b"untrained"
    for piece in message.content:
        match piece:
            case str():
                yield b"t" + piece.encode(errors="surrogatepass")
            case ControlToken():
                yield b"c" + piece.token.encode()
            case ImagePlaceholder():
                yield b"i%d" % piece.index


def _hash_parts(parts: Iterable[bytes]) -> int:
    return int.from_bytes(hashlib.blake2b(b"\x1f".join(parts), digest_size=8).digest(), "big")


CHANGED_RECORD_REMEDY = (
    "Bring the old files back, and the run resumes. To train on what is there now, run task=prepare to index what changed, then "
    "start a run under another name (run_name=...), or this one anew (overwrite=true or resume_from=none)"
)


def verify_unchanged(index: SampleIndex, samples: Sequence[int], records: Sequence[Record] | None = None) -> None:
    """Verify records against the index: raise RecordError if the text or an image file has changed.

    It reads size and modification time of each image file. If they differ, the contents are compared, so that copied and
    touched files pass. Call it after decoding, to detect also files that were replaced during decoding.

    Args:
        records: of the samples, as `SampleIndex.get_record` returns them; None: they are read.
    """
    for i, sample in enumerate(samples):
        source = index.sources[index.source_ids[sample]]
        record = records[i] if records is not None and index.turns[sample] < 0 else None
        if record is None:  # a shortened record was indexed before it was shortened
            record = source[int(index.position[sample])]
        if hasattr(source, "digest_of") and compute_digests(record)[0] != index.columns["digest"][sample]:
            raise _build_changed_error(record, "says something else, or names another picture,")
        if (
            compute_stamp(record) != index.columns["stamp"][sample]
            and compute_image_hash(record) != index.columns["content"][sample]
        ):
            raise _build_changed_error(record, f"{_describe_images(record)} something else")


def _describe_images(record: Record) -> str:
    names = [
        format_untrusted(str(getattr(image, "path", None) or getattr(image, "name", "an image")))
        for image in record.images
    ]
    return f"image {names[0]} holds" if len(names) == 1 else f"one of its images {', '.join(names[:4])} holds"


def _build_changed_error(record: Record, finding: str) -> RecordError:
    reason = f"{finding} than when it was indexed: a file was replaced since"
    return RecordError(record.origin, reason, CHANGED_RECORD_REMEDY, Fault.changed)

"""Change detection: verify that a record still has the text and the image bytes with which it was indexed."""

from __future__ import annotations

from collections.abc import Sequence

from lit_vlm.data.content import compute_image_hash
from lit_vlm.data.images import format_untrusted
from lit_vlm.data.index.columns import SampleIndex
from lit_vlm.data.index.fingerprint import compute_digests, compute_stamp
from lit_vlm.types import Fault, Record, RecordError

CHANGED_RECORD_REMEDY = (
    "Bring the old files back, and the run goes on. To train on what is there now, run task=prepare to index what changed, then "
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

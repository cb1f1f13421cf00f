"""Change detection: verify that a record still has the text and the image bytes with which it was indexed."""

from __future__ import annotations

from collections.abc import Sequence

from lit_vlm.data.content import content_of
from lit_vlm.data.images import shown
from lit_vlm.data.index.columns import Index
from lit_vlm.data.index.fingerprint import digests, stamp
from lit_vlm.types import Fault, Record, RecordError

REMEDY = (
    "Bring the old files back, and the run goes on. To train on what is there now, run task=prepare to index what changed, then "
    "start a run under another name (run_name=...), or this one anew (overwrite=true or resume_from=none)"
)


def require_as_indexed(index: Index, samples: Sequence[int], records: Sequence[Record] | None = None) -> None:
    """Verify records against the index: raise RecordError if the text or an image file has changed.

    It reads size and modification time of each image file. If they differ, the contents are compared, so that copied and
    touched files pass. Call it after decoding, to detect also files that were replaced during decoding.

    Args:
        records: of the samples, as `SampleIndex.get_record` returns them; None: they are read.
    """
    for i, sample in enumerate(samples):
        source = index.sources[index.source_of[sample]]
        record = records[i] if records is not None and index.turns[sample] < 0 else None
        if record is None:  # a shortened record was indexed before it was shortened
            record = source[int(index.position[sample])]
        if hasattr(source, "digest_of") and digests(record)[0] != index.columns["digest"][sample]:
            raise _changed(record, "says something else, or names another picture,")
        if stamp(record) != index.columns["stamp"][sample] and content_of(record) != index.columns["content"][sample]:
            raise _changed(record, f"{_named(record)} something else")


def _named(record: Record) -> str:
    names = [shown(str(getattr(image, "path", None) or getattr(image, "name", "an image"))) for image in record.images]
    return f"image {names[0]} holds" if len(names) == 1 else f"one of its images {', '.join(names[:4])} holds"


def _changed(record: Record, what: str) -> RecordError:
    reason = f"{what} than when it was indexed: a file was replaced since"
    return RecordError(record.origin, reason, REMEDY, Fault.changed)

"""A record that is read must be the one that was indexed: with the same words, and with pictures that hold the same bytes."""

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
    """Raise RecordError for a record whose words or picture files are others than when the index was built.

    Costs a look at the size and time of each picture; where these are others, its content is compared, so that copies and
    touched files pass. To be called once the pictures are decoded: a file that is replaced before is then found.

    Args:
        records: of the samples, as `Index.record` gives them; None: they are read.
    """
    for place, sample in enumerate(samples):
        source = index.sources[index.source_of[sample]]
        record = records[place] if records is not None and index.turns[sample] < 0 else None
        if record is None:  # of one that was shortened, the whole was indexed
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

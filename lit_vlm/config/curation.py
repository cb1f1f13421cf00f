"""Settings of task=curate; see the schema for how they are written."""

from __future__ import annotations

from dataclasses import dataclass

from lit_vlm.config.choices import Certainty, CurationMethod, DuplicateKind, PictureMatch
from lit_vlm.config.ranges import COUNT_OR_ZERO, SHARE_ABOVE_0, ranged


@dataclass(kw_only=True, slots=True)
class CurateConfig:
    """Settings of task=curate: find records of data.sources that should not be trained on, and select the others."""

    method: CurationMethod = CurationMethod.duplicates
    output: str | None = None  # folder of selections, lists and page; null: <run folder>/<method>
    duplicates: DuplicateKind = DuplicateKind.rows  # method=duplicates: which records are duplicates
    pictures: PictureMatch = PictureMatch.perceptual  # how far two pictures may differ and still be the same
    min_similarity: float = ranged(
        0.8, SHARE_ABOVE_0
    )  # duplicates=texts: estimated Jaccard similarity of two texts from which they are duplicates
    min_overlap: float = ranged(
        0.8, SHARE_ABOVE_0
    )  # method=contamination: share of a benchmark question's n-grams that a record must contain
    min_certainty: Certainty = Certainty.likely  # method=contamination: leave out records that are at least so sure
    num_shown: int = ranged(24, COUNT_OR_ZERO)  # examples on the page, of each result

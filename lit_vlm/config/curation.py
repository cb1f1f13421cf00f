"""Settings of task=curate; see the schema for how they are written."""

from __future__ import annotations

from dataclasses import dataclass, field

from lit_vlm.config.choices import BalanceGroup, Certainty, CurationMethod, DuplicateKind, PictureMatch, TextRule
from lit_vlm.config.ranges import COSINE, COUNT, COUNT_OR_ZERO, FOLDED, GRID, NODES, SHARE, SHARE_ABOVE_0, ranged


@dataclass(kw_only=True, slots=True)
class BalanceConfig:
    """Settings of curate.method=balance: groups of records, and how many of each stay."""

    by: list[BalanceGroup] = field(
        default_factory=lambda: [BalanceGroup.kind]
    )  # groups; with several the names are joined, e.g. caption/ko
    shares: dict[str, float] = ranged(
        dict, SHARE
    )  # share of a group in what stays, e.g. {ko: 0.5}; the other groups share the rest as they do now
    max_per_group: int | None = ranged(None, COUNT)  # maximum records of a group; null: no limit
    max_left_out: float = ranged(
        0.5, SHARE
    )  # maximum share of the records that the shares may leave out; beyond it they are reached in part
    lengths: list[int] = ranged(
        lambda: [64, 256, 1024, 4096], COUNT
    )  # by=length: first number of characters of each group but the first
    tile_size: int = ranged(384, COUNT)  # by=tiles: pixels along a side of a tile, those of the vision tower
    grid: int = ranged(6, GRID)  # by=tiles: maximum tiles per side
    concepts: str | None = None  # by=concept: text file with one concept a line, Korean or English
    max_per_concept: int = ranged(
        20_000, COUNT
    )  # by=concept: t, records above which those of a concept are sampled; MetaCLIP's for 400 million texts
    keep_unmatched: bool = False  # by=concept: keep the records that name no concept; MetaCLIP leaves them out


@dataclass(kw_only=True, slots=True)
class PruneConfig:
    """Settings of curate.method=prune: which captions leave."""

    kinds: list[str] = field(
        default_factory=lambda: ["caption", "image_only"]
    )  # kinds whose answers are captions (types.SampleKind)
    min_score: float | None = ranged(
        None, COSINE
    )  # with curate.model: captions of a lower score leave; null: see lowest_share
    lowest_share: float | None = ranged(
        None, SHARE
    )  # with curate.model, instead: this share of the captions leaves, those of the lowest scores
    rules: list[TextRule] = field(default_factory=lambda: list(TextRule))  # rules of text quality; []: none


@dataclass(kw_only=True, slots=True)
class CapfiltConfig:
    """Settings of curate.method=capfilt: the captioner, and the texts that stay."""

    captioner: str | None = (
        None  # local folder of a BlipForConditionalGeneration; null: the web texts alone are filtered
    )
    kinds: list[str] = field(
        default_factory=lambda: ["caption", "image_only"]
    )  # kinds whose answers are captions (types.SampleKind)
    min_score: float = ranged(
        0.5, SHARE
    )  # probability of a match from which a text stays; BLIP keeps what its filter calls a match


@dataclass(kw_only=True, slots=True)
class LabelsConfig:
    """Settings of curate.method=labels: which answers are classes, and which suspected records leave."""

    max_classes: int = ranged(100, COUNT)  # a source with more different answers has no classes
    min_pictures: int = ranged(
        10, FOLDED
    )  # a class with fewer different pictures is not checked: each of five parts is judged by the others
    min_quality: float | None = ranged(
        None, SHARE
    )  # suspected records leave if the probability of their label is lower; 1: all of them; null: none leaves


@dataclass(kw_only=True, slots=True)
class CurateConfig:
    """Settings of task=curate: find records of data.sources that should not be trained on, and select the others."""

    method: CurationMethod = CurationMethod.duplicates
    slurm: int | None = ranged(
        None, NODES
    )  # hash the records in so many jobs of a Slurm array, with submit.*, then search in one more; null: on this machine
    worker: int | None = ranged(None, COUNT_OR_ZERO)  # index of this job in the array, set by its script
    output: str | None = None  # folder of selections, lists and page; null: <run folder>/<method>
    duplicates: DuplicateKind = DuplicateKind.rows  # method=duplicates: which records are duplicates
    pictures: PictureMatch = (
        PictureMatch.perceptual
    )  # how far two pictures may differ and still be the same; contamination: embedding too
    min_cosine: float | None = ranged(
        None, COSINE
    )  # pictures=embedding: cosine from which two pictures are the same; it depends on the tower, e.g. 0.95
    min_similarity: float = ranged(
        0.8, SHARE_ABOVE_0
    )  # duplicates=texts: estimated Jaccard similarity of two texts from which they are duplicates
    min_overlap: float = ranged(
        0.8, SHARE_ABOVE_0
    )  # method=contamination: share of a benchmark question's n-grams that a record must contain
    min_certainty: Certainty = Certainty.likely  # method=contamination: leave out records that are at least so sure
    balance: BalanceConfig = field(default_factory=BalanceConfig)  # method=balance
    prune: PruneConfig = field(default_factory=PruneConfig)  # method=prune
    capfilt: CapfiltConfig = field(default_factory=CapfiltConfig)  # method=capfilt
    labels: LabelsConfig = field(default_factory=LabelsConfig)  # method=labels
    model: str | None = (
        None  # local folder. prune: SigLIP, SigLIP 2, CLIP, or BLIP for retrieval; capfilt: the last; labels, pictures=embedding: a tower
    )
    batch_size: int = ranged(32, COUNT)  # with curate.model: pictures that the model sees at once
    num_shown: int = ranged(24, COUNT_OR_ZERO)  # examples on the page, of each result


# method -> settings that only it reads
METHOD_SETTINGS = {
    CurationMethod.duplicates: ("duplicates", "pictures", "min_similarity"),
    CurationMethod.contamination: ("min_overlap", "min_certainty"),
    CurationMethod.balance: ("balance",),
    CurationMethod.prune: ("prune",),
    CurationMethod.capfilt: ("capfilt",),
    CurationMethod.labels: ("labels",),
}


def get_contamination_selection(run_dir: str, name: str) -> str:
    """Return the file in which a search for contamination leaves the selection of a source, unless curate.output says otherwise."""
    return f"{run_dir}/curate/{CurationMethod.contamination.value}/{name}.selection.json"

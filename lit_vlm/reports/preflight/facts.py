"""Facts that preflight collects, as plain data: printed on the terminal, rendered as a page and written as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from lit_vlm.config.choices import Certainty
from lit_vlm.reports.curation_examples import CurationExample


class Severity(StrEnum):
    """Severity of a finding."""

    failure = "failure"  # the run would stop with this error
    warning = "warning"  # it would run, but probably not as intended
    advice = "advice"


@dataclass(frozen=True, slots=True)
class Finding:
    """Problem or advice that the reader should act on."""

    level: Severity
    what: str
    remedy: str = ""


@dataclass(slots=True)
class SourceRow:
    """Statistics of one training source. Counts are of the records that were read; `scale` extrapolates them to all records."""

    name: str
    records: int  # on disk
    looked_at: int  # records that were read
    usable: int = 0  # of the records that were read, held-out ones included
    held_out: int = 0
    expected: int | None = None
    licence: str | None = None
    homepage: str | None = None
    quarantined: dict[str, int] = field(default_factory=dict)  # by fault
    image_root_error: str = ""  # message if all or nearly all of its images are missing
    kinds: dict[str, int] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    image_tokens: int = 0
    supervised: int = 0
    tiles: int = 0
    images: int = 0
    normalised: int = 0  # records whose text Unicode's NFC changed
    unread: dict[str, int] = field(default_factory=dict)  # unread keys, with the number of records that have them
    duplicates: int = 0  # records with the same text and images as another one
    fewer_tiles: int = 0  # records that get fewer tiles by the overlong policy
    fewer_turns: int = 0  # records that it truncates at a turn
    asked: float | None = None  # requested share of the mixture, 0 to 1
    asked_in: str | None = None  # unit of `asked`: samples or tokens
    share_samples: float = 0.0  # actual share of the sampled mixture
    share_tokens: float = 0.0
    passes: float = 0.0  # epochs over the source, on average

    @property
    def scale(self) -> float:
        """Records of the whole source for each record that was read."""
        return self.records / self.looked_at if self.looked_at else 1.0

    @property
    def estimated(self) -> bool:
        return self.looked_at < self.records

    @property
    def set_aside(self) -> int:
        return sum(self.quarantined.values())


@dataclass(frozen=True, slots=True)
class ShareRow:
    """Requested and actual share of one group of the mixture: a language, text alone, or a kind."""

    group: str
    name: str
    size: int  # number of samples that were read
    asked: float | None
    samples: float
    tokens: float


@dataclass(frozen=True, slots=True)
class SummaryStats:
    """Summary statistics of a number that each sample or pack has."""

    least: float
    mean: float
    median: float
    p95: float
    most: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Histogram with len(edges) - 1 counts for each series."""

    title: str
    unit: str
    edges: list[float]
    series: dict[str, list[int]]  # by language
    spread: SummaryStats
    log: bool = False
    cap: float | None = None  # limit of a micro-batch, if it is near the values
    cap_name: str = "cap"


@dataclass(frozen=True, slots=True)
class PlanFacts:
    """Statistics of the plan. Packs and balance are those of the first `steps_seen` steps."""

    steps: int
    steps_seen: int
    samples_per_step: float
    k: int
    world_size: int
    samples: int  # in all steps; so are the next three
    tokens: int
    supervised: int
    tiles: int
    pack_tokens: SummaryStats  # `least` is the 5th percentile
    pack_tiles: SummaryStats
    pack_samples: float  # on average
    most_tokens: int  # token limit of a micro-batch
    most_tiles: int  # tile limit of a micro-batch
    most_supervised: int  # maximum of a pack
    blank: float  # share of packs without a sample
    balance_ranks: float  # mean over largest FLOPs of the ranks, over all micro-steps of a step
    balance_micro: float  # the same over the packs that run at the same time
    padding: dict[str, float]  # share of token slots that are padding, for each way to make batches
    padding_batch: int  # samples of the padded batches


@dataclass(frozen=True, slots=True)
class PartRow:
    """Parameters and training of one part of the model."""

    part: str
    parameters: int
    trainable: int
    learning_rate: float | None
    how: str


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """Memory estimate of one device for one strategy."""

    name: str
    strategy: str  # value of trainer.strategy
    world_size: int
    parts: dict[str, float]  # bytes
    chosen: bool
    note: str = ""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    """Memory estimates of one device, for the run and its alternatives."""

    device: str
    capacity: float  # bytes
    compared: bool  # whether the run trains on that device
    tokens: int  # of the largest micro-batch
    tiles: int
    supervised: int
    at_caps: float  # bytes, for a micro-batch that reaches both limits
    rows: list[MemoryRow]


@dataclass(frozen=True, slots=True)
class StrategyFacts:
    """Strategy of the run and its communication. Seconds and bytes are simulated, of one optimizer step."""

    name: str  # value of trainer.strategy
    title: str
    asked: bool  # set by trainer.strategy; else chosen
    advised: str  # choice of trainer.strategy=auto
    reason: str  # for `advised`
    advised_fits: bool
    network: str
    step: float  # seconds
    communication: float  # seconds that the busier link is in use
    exposed: float  # seconds of it that do not overlap with compute
    inside: float  # bytes into a device from its own node
    outside: float  # bytes into a node from others
    level: str  # value of stage.activation_checkpointing
    level_asked: bool  # set by the settings; else chosen
    level_reason: str  # for `level`

    @property
    def share(self) -> float:
        """Share of the speed that the devices would have without communication."""
        return 1 - self.exposed / self.step if self.step else 1.0


@dataclass(frozen=True, slots=True)
class TimeFacts:
    """Estimate of the training time."""

    flops: float  # of the whole plan, with recomputation and reference model
    devices: int
    device: str
    peak: float  # FLOP/s
    utilisation: float
    balance: float
    network: float  # share of the speed that is left after waiting for the network
    seconds: float
    device_hours: float


@dataclass(frozen=True, slots=True)
class DiskRow:
    """Estimate of the disk space that one kind of file takes."""

    what: str
    bytes: float
    folder: str
    free: float  # bytes


@dataclass(frozen=True, slots=True)
class PromptPiece:
    """Piece of a rendered prompt. `kind`: text, control or image; all placeholders of an image are one piece."""

    text: str
    kind: str
    supervised: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class SampleImage:
    """Image on the page, with its caption."""

    caption: str
    source: str  # data: URL


@dataclass(frozen=True, slots=True)
class ShownSample:
    """Sample as the page shows it: its prompt in pieces, and its images."""

    source: str
    origin: str
    kind: str
    language: str
    tokens: int
    supervised: int
    tiles: int
    segments: list[tuple[str, list[PromptPiece]]]  # one; for a preference pair "chosen" and "rejected"
    pictures: list[SampleImage]
    marked: bool  # an image has boxes


@dataclass(frozen=True, slots=True)
class BadRecordExample:
    """First record of a source with this fault."""

    source: str
    fault: str
    count: int
    origin: str
    reason: str


@dataclass(frozen=True, slots=True)
class BenchmarkRow:
    """Benchmark that the records were compared with: its rows, those that cannot be read, and the records found by certainty."""

    name: str
    rows: int
    bad_rows: int
    records: dict[str, int]

    @property
    def num_sure(self) -> int:
        """Records that are certainly or likely of the benchmark."""
        return sum(count for certainty, count in self.records.items() if certainty != Certainty.possible.value)


@dataclass(frozen=True, slots=True)
class ContaminationFacts:
    """Comparison of the records with benchmarks.

    Attributes:
        records: number of records that were compared.
        unchecked: name of a benchmark that was not compared -> reason.
        lines: what was found, as task=curate lists it.
        examples: record beside row, the surest first.
    """

    records: int
    benchmarks: list[BenchmarkRow]
    unchecked: dict[str, str]
    lines: list[dict[str, Any]] = field(default_factory=list)
    examples: list[CurationExample] = field(default_factory=list)


@dataclass(slots=True)
class PreflightFacts:
    """All facts of a preflight. A fact that could not be determined is None or empty, and `findings` gives the reason."""

    name: str
    stage: str
    command: str
    moment: str
    starts_from: str = ""
    findings: list[Finding] = field(default_factory=list)
    sources: list[SourceRow] = field(default_factory=list)
    held_out: int = 0
    shares: list[ShareRow] = field(default_factory=list)
    histograms: list[Histogram] = field(default_factory=list)
    plan: PlanFacts | None = None
    parts: list[PartRow] = field(default_factory=list)
    memory: MemoryFacts | None = None
    strategy: StrategyFacts | None = None
    time: TimeFacts | None = None
    disk: list[DiskRow] = field(default_factory=list)
    samples: list[ShownSample] = field(default_factory=list)
    bad: list[BadRecordExample] = field(default_factory=list)
    contamination: ContaminationFacts | None = None  # None: evaluate.files is not set
    seconds: float = 0.0  # duration of the preflight itself

    def get_findings(self, level: Severity) -> list[Finding]:
        """Return the findings of one severity."""
        return [finding for finding in self.findings if finding.level is level]

    @property
    def would_run(self) -> bool:
        """True if there is no failure."""
        return not self.get_findings(Severity.failure)

    @property
    def estimated(self) -> bool:
        """True if some source was read in part only."""
        return any(row.estimated for row in self.sources)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values for JSON, without the images."""
        values = asdict(self)
        for sample in values["samples"]:
            sample["pictures"] = [picture["caption"] for picture in sample["pictures"]]
        if values["contamination"]:
            del values["contamination"]["examples"]
        return values | {"would_run": self.would_run}

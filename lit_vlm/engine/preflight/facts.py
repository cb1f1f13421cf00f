"""What preflight found, as plain data: collected once, shown on the terminal and on a page, written as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    failure = "failure"  # the run would end with this
    warning = "warning"  # it would run, and probably not as meant
    advice = "advice"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something the reader should act on."""

    level: Level
    what: str
    remedy: str = ""


@dataclass(slots=True)
class SourceRow:
    """One training source. Counts are of the records that were looked at; `scale` makes them the whole source's."""

    name: str
    records: int  # on disk
    looked_at: int
    usable: int = 0  # of those looked at, held-out ones included
    held_out: int = 0
    expected: int | None = None
    licence: str | None = None
    homepage: str | None = None
    quarantined: dict[str, int] = field(default_factory=dict)  # by fault
    kinds: dict[str, int] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    image_tokens: int = 0
    supervised: int = 0
    tiles: int = 0
    images: int = 0
    normalised: int = 0  # records whose text Unicode's NFC changed
    unread: dict[str, int] = field(default_factory=dict)  # keys that nothing is read from, and records that have them
    duplicates: int = 0  # records that say what another one says, with the same images
    fewer_tiles: int = 0  # records that the length policy cut into fewer tiles
    fewer_turns: int = 0  # records that it cut at a turn
    asked: float | None = None  # share of what is drawn, 0 to 1
    asked_in: str | None = None  # of samples or of tokens
    share_samples: float = 0.0  # as drawn
    share_tokens: float = 0.0
    passes: float = 0.0  # how often a sample is drawn, on average

    @property
    def scale(self) -> float:
        return self.records / self.looked_at if self.looked_at else 1.0

    @property
    def estimated(self) -> bool:
        return self.looked_at < self.records

    @property
    def set_aside(self) -> int:
        return sum(self.quarantined.values())


@dataclass(frozen=True, slots=True)
class ShareRow:
    """What was asked of the mixture beside what the draws hold: of languages, of text alone, of kinds."""

    group: str
    name: str
    size: int  # samples looked at
    asked: float | None
    samples: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Of a number that each sample or pack has."""

    least: float
    mean: float
    median: float
    p95: float
    most: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts between edges: len(edges) - 1 for each series."""

    title: str
    unit: str
    edges: list[float]
    series: dict[str, list[int]]  # by language
    spread: Spread
    log: bool = False
    cap: float | None = None  # what a micro-batch holds, where that is within reach


@dataclass(frozen=True, slots=True)
class PlanFacts:
    """What is read when. Packs and balance are those of the first `steps_seen` steps."""

    steps: int
    steps_seen: int
    samples_per_step: float
    k: int
    world_size: int
    samples: int  # drawn in all steps; the next four too
    tokens: int
    supervised: int
    tiles: int
    pack_tokens: Spread  # `least` is what all but 5 % of the packs reach
    pack_tiles: Spread
    pack_samples: float  # on average
    most_tokens: int  # cap
    most_tiles: int
    most_supervised: int  # of a pack
    blank: float  # share of packs without a sample
    balance_ranks: float  # mean over largest FLOPs of the ranks, over all micro-steps of a step
    balance_micro: float  # of the packs that run side by side
    padding: dict[str, float]  # share of token slots that hold nothing, by how batches are made
    padding_batch: int  # samples of the padded batches


@dataclass(frozen=True, slots=True)
class PartRow:
    """One part of the model."""

    part: str
    parameters: int
    trainable: int
    learning_rate: float | None
    how: str


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """The estimate of one device for one way to train."""

    name: str
    strategy: str  # of trainer.strategy
    world_size: int
    parts: dict[str, float]  # bytes
    chosen: bool
    note: str = ""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class MemoryFacts:
    device: str
    capacity: float  # bytes
    compared: bool  # whether the run is meant for that device
    tokens: int  # of the largest micro-batch
    tiles: int
    supervised: int
    at_caps: float  # bytes, if one filled both caps
    rows: list[MemoryRow]


@dataclass(frozen=True, slots=True)
class StrategyFacts:
    """How the devices share the work. Seconds and bytes are simulated, of an optimizer step."""

    name: str  # of trainer.strategy
    title: str
    asked: bool  # by trainer.strategy; else chosen
    advised: str  # what trainer.strategy=auto comes to
    reason: str  # why
    advised_fits: bool
    network: str
    step: float  # seconds
    communication: float  # seconds that the busier of the links is in use
    exposed: float  # seconds of it that no computing hides
    inside: float  # bytes into a device from its own node
    outside: float  # bytes into a node from others
    level: str  # of stage.activation_checkpointing
    level_asked: bool  # by the settings; else chosen
    level_reason: str  # why

    @property
    def share(self) -> float:
        """Of the speed that the devices would have if nothing had to be sent."""
        return 1 - self.exposed / self.step if self.step else 1.0


@dataclass(frozen=True, slots=True)
class TimeFacts:
    flops: float  # of the whole plan, recomputing and reference included
    devices: int
    device: str
    peak: float  # FLOP/s
    utilisation: float
    balance: float
    network: float  # share of the speed that is left while the network is waited for
    seconds: float
    device_hours: float


@dataclass(frozen=True, slots=True)
class DiskRow:
    what: str
    bytes: float
    folder: str
    free: float  # bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a prompt. `kind`: text, control or image; an image's placeholders are one piece."""

    text: str
    kind: str
    supervised: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class Picture:
    caption: str
    source: str  # data: address


@dataclass(frozen=True, slots=True)
class ShownSample:
    source: str
    origin: str
    kind: str
    language: str
    tokens: int
    supervised: int
    tiles: int
    segments: list[tuple[str, list[Piece]]]  # one; for a pair "chosen" and "rejected"
    pictures: list[Picture]
    marked: bool  # there are boxes on a picture


@dataclass(frozen=True, slots=True)
class BadExample:
    """The first record of a source with this fault."""

    source: str
    fault: str
    count: int
    origin: str
    reason: str


@dataclass(slots=True)
class Facts:
    """The whole of it. What could not be found out is None or empty, and `findings` says why."""

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
    bad: list[BadExample] = field(default_factory=list)
    seconds: float = 0.0  # that looking took

    def of_level(self, level: Level) -> list[Finding]:
        return [finding for finding in self.findings if finding.level is level]

    @property
    def would_run(self) -> bool:
        return not self.of_level(Level.failure)

    @property
    def estimated(self) -> bool:
        """Whether some source was looked at in part."""
        return any(row.estimated for row in self.sources)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without the pictures."""
        values = asdict(self)
        for sample in values["samples"]:
            sample["pictures"] = [picture["caption"] for picture in sample["pictures"]]
        return values | {"would_run": self.would_run}

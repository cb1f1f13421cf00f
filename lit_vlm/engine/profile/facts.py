"""Summary of a profiler trace: time of a step by phase and part, idle time, and matrix products by shape and dtype."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from lit_vlm.engine.profile.products import Product, products_of
from lit_vlm.engine.profile.rooms import DATA, REST, ROW, Rooms
from lit_vlm.engine.profile.trace import Trace, outermost

PHASES = (DATA, "forward", "backward", "communication", "optimizer")
PARTS = ("vision tower", "projector", "language model", "head", "reference", REST)


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds of one phase and part in a step. `idle`: time in which no operation runs."""

    phase: str
    part: str
    busy: float
    idle: float


@dataclass(slots=True)
class ProfileFacts:
    """Summary of a profiled training step."""

    name: str
    device: str
    precision: str
    on_gpu: bool
    num_steps: int
    tokens: float  # per step, like all fields below
    tiles: float
    milliseconds: float
    rows: list[Row]
    products: list[Product]  # the most expensive first
    others: list[tuple[str, float, float]]  # operation, calls, milliseconds: other operations, the most expensive first

    @property
    def data(self) -> float:
        """Milliseconds of waiting for data."""
        return sum(row.busy + row.idle for row in self.rows if row.phase == DATA)

    @property
    def idle(self) -> float:
        """Idle milliseconds, without waiting for data."""
        return sum(row.idle for row in self.rows if row.phase != DATA)

    @property
    def product_time(self) -> float:
        """Milliseconds in matrix products."""
        return sum(product.milliseconds for product in self.products)

    @property
    def wrong_types(self) -> list[Product]:
        """float32 products of a half-precision run. Outer products (rotary angles, in float32 on purpose) do not count."""
        half = self.precision.startswith(("bf16", "16"))
        return [one for one in self.products if half and "fp32" in one.dtype and not one.is_outer]


def facts_of(trace: Trace, num_steps: int, **about: Any) -> ProfileFacts:
    """Summarize a trace as milliseconds per optimizer step.

    Args:
        num_steps: optimizer steps in the trace.
        other_fields: the other fields of `ProfileFacts`.
    """
    classifier = Rooms(trace)
    on_gpu = bool(trace.launched)
    busy, idle = _on_gpu(trace, classifier) if on_gpu else _on_cpu(trace, classifier)
    total = sum(span.duration for span in classifier.phases.spans)
    scale = 1e-3 / num_steps
    rows = [
        Row(phase, part, busy.get((phase, part), 0.0) * scale, idle.get((phase, part), 0.0) * scale)
        for phase in PHASES
        for part in ("", *PARTS)
        if (phase, part) in busy or (phase, part) in idle
    ]
    products, others = products_of(trace, classifier, num_steps)
    return ProfileFacts(
        on_gpu=on_gpu,
        num_steps=num_steps,
        milliseconds=total * scale,
        rows=rows,
        products=products,
        others=others,
        **about,
    )


def _on_cpu(trace: Trace, rooms: Rooms) -> tuple[dict[ROW, float], dict[ROW, float]]:
    """Sum the time in operations, and the rest of each phase and part: Python code between operations."""
    busy: dict[ROW, float] = defaultdict(float)
    elapsed: dict[ROW, float] = defaultdict(float)
    for span in outermost(trace.ops):
        if row := rooms.of(span):
            busy[row] += span.duration
    for span in rooms.phases.spans:
        elapsed[span.name, REST if span.name in ("forward", "backward") else ""] += span.duration
    for span in rooms.parts.spans:
        if (row := rooms.of(span)) and row[0] == "forward":
            elapsed[row] += span.duration
            elapsed[row[0], REST] -= span.duration
    backward = sum(time for row, time in busy.items() if row[0] == "backward" and row[1] != REST)
    elapsed["backward", REST] -= backward  # in backward, parts have no time except that of their operations
    return dict(busy), {row: max(time - busy.get(row, 0.0), 0.0) for row, time in elapsed.items()}


def _on_gpu(trace: Trace, rooms: Rooms) -> tuple[dict[ROW, float], dict[ROW, float]]:
    """Sum the busy time of the device, by the part that launched the work, and the gaps, by the part that the device waits for.

    Work that overlaps on several streams counts once.
    """
    busy: dict[ROW, float] = defaultdict(float)
    idle: dict[ROW, float] = defaultdict(float)
    covered_until = rooms.phases.spans[0].start
    row: ROW | None = None
    for call, work in trace.launched:
        row = rooms.of(call)
        if row is None or work.end <= covered_until:
            continue
        idle[row] += max(work.start - covered_until, 0.0)
        busy[row] += work.end - max(work.start, covered_until)
        covered_until = work.end
    end = rooms.phases.spans[-1].end
    if row is not None:
        idle[row] += max(end - covered_until, 0.0)
    return dict(busy), dict(idle)

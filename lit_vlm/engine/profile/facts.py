"""A trace summed up: time of a step by part, its idle share, and its matrix products by shape and type."""

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
    """Milliseconds of a step. `idle`: nothing ran, and it was neither data nor anything else that was waited for."""

    phase: str
    part: str
    busy: float
    idle: float


@dataclass(slots=True)
class ProfileFacts:
    name: str
    device: str
    precision: str
    on_gpu: bool
    num_steps: int
    tokens: float  # per step, like all that follow
    tiles: float
    milliseconds: float
    rows: list[Row]
    products: list[Product]  # the costliest first
    others: list[tuple[str, float, float]]  # operation, calls, milliseconds: the costliest that are no products

    @property
    def data(self) -> float:
        return sum(row.busy + row.idle for row in self.rows if row.phase == DATA)

    @property
    def idle(self) -> float:
        return sum(row.idle for row in self.rows if row.phase != DATA)

    @property
    def product_time(self) -> float:
        return sum(product.milliseconds for product in self.products)

    @property
    def wrong_types(self) -> list[Product]:
        """float32 products of a run in half precision. Outer products (rotary angles, in float32 on purpose) sum over
        nothing and are none."""
        half = self.precision.startswith(("bf16", "16"))
        return [one for one in self.products if half and "fp32" in one.dtype and not one.is_outer]


def facts_of(trace: Trace, num_steps: int, **about: Any) -> ProfileFacts:
    """The trace as milliseconds per step.

    Args:
        num_steps: optimizer steps in it.
        about: the other fields of `ProfileFacts`.
    """
    rooms = Rooms(trace)
    on_gpu = bool(trace.launched)
    busy, idle = _on_gpu(trace, rooms) if on_gpu else _on_cpu(trace, rooms)
    total = sum(span.duration for span in rooms.phases.spans)
    scale = 1e-3 / num_steps
    rows = [
        Row(phase, part, busy.get((phase, part), 0.0) * scale, idle.get((phase, part), 0.0) * scale)
        for phase in PHASES
        for part in ("", *PARTS)
        if (phase, part) in busy or (phase, part) in idle
    ]
    products, others = products_of(trace, rooms, num_steps)
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
    """Time in operations, and what is left of each phase and part: the program between them."""
    busy: dict[ROW, float] = defaultdict(float)
    whole: dict[ROW, float] = defaultdict(float)
    for span in outermost(trace.ops):
        if row := rooms.of(span):
            busy[row] += span.duration
    for span in rooms.phases.spans:
        whole[span.name, REST if span.name in ("forward", "backward") else ""] += span.duration
    for span in rooms.parts.spans:
        if (row := rooms.of(span)) and row[0] == "forward":
            whole[row] += span.duration
            whole[row[0], REST] -= span.duration
    backward = sum(time for row, time in busy.items() if row[0] == "backward" and row[1] != REST)
    whole["backward", REST] -= backward  # whose parts have no time but that of their operations
    return dict(busy), {row: max(time - busy.get(row, 0.0), 0.0) for row, time in whole.items()}


def _on_gpu(trace: Trace, rooms: Rooms) -> tuple[dict[ROW, float], dict[ROW, float]]:
    """Time in which the device works, by who launched the work, and the gaps, by what the device waits for. What several
    streams do at once counts once."""
    busy: dict[ROW, float] = defaultdict(float)
    idle: dict[ROW, float] = defaultdict(float)
    now = rooms.phases.spans[0].start
    row: ROW | None = None
    for call, work in trace.launched:
        row = rooms.of(call)
        if row is None or work.end <= now:
            continue
        idle[row] += max(work.start - now, 0.0)
        busy[row] += work.end - max(work.start, now)
        now = work.end
    end = rooms.phases.spans[-1].end
    if row is not None:
        idle[row] += max(end - now, 0.0)
    return dict(busy), dict(idle)

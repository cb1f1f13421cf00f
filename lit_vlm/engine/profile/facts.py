"""Summary of a profiler trace: time of a step by phase and part, idle time, and matrix products by shape and dtype."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from lit_vlm.engine.profile.products import MatrixProduct, collect_products
from lit_vlm.engine.profile.rooms import DATA, REST, PhaseClassifier, PhasePart
from lit_vlm.engine.profile.trace import ProfilerTrace, find_outermost

PHASES = (DATA, "forward", "backward", "communication", "optimizer")
PARTS = ("vision tower", "projector", "language model", "head", "reference", REST)


@dataclass(frozen=True, slots=True)
class PhaseTime:
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
    rows: list[PhaseTime]
    products: list[MatrixProduct]  # the most expensive first
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
    def float32_products(self) -> list[MatrixProduct]:
        """float32 products of a half-precision run. Outer products (rotary angles, in float32 on purpose) do not count."""
        half = self.precision.startswith(("bf16", "16"))
        return [one for one in self.products if half and "fp32" in one.dtype and not one.is_outer]


def summarize_trace(trace: ProfilerTrace, num_steps: int, **other_fields: Any) -> ProfileFacts:
    """Summarize a trace as milliseconds per optimizer step.

    Args:
        num_steps: optimizer steps in the trace.
        other_fields: the other fields of `ProfileFacts`.
    """
    classifier = PhaseClassifier(trace)
    on_gpu = bool(trace.launches)
    busy, idle = _sum_gpu_times(trace, classifier) if on_gpu else _sum_cpu_times(trace, classifier)
    total = sum(span.duration for span in classifier.phases.spans)
    scale = 1e-3 / num_steps
    rows = [
        PhaseTime(phase, part, busy.get((phase, part), 0.0) * scale, idle.get((phase, part), 0.0) * scale)
        for phase in PHASES
        for part in ("", *PARTS)
        if (phase, part) in busy or (phase, part) in idle
    ]
    products, others = collect_products(trace, classifier, num_steps)
    return ProfileFacts(
        on_gpu=on_gpu,
        num_steps=num_steps,
        milliseconds=total * scale,
        rows=rows,
        products=products,
        others=others,
        **other_fields,
    )


def _sum_cpu_times(
    trace: ProfilerTrace, classifier: PhaseClassifier
) -> tuple[dict[PhasePart, float], dict[PhasePart, float]]:
    """Sum the time in operations, and the rest of each phase and part: Python code between operations."""
    busy: dict[PhasePart, float] = defaultdict(float)
    elapsed: dict[PhasePart, float] = defaultdict(float)
    for span in find_outermost(trace.ops):
        if row := classifier.classify(span):
            busy[row] += span.duration
    for span in classifier.phases.spans:
        elapsed[span.name, REST if span.name in ("forward", "backward") else ""] += span.duration
    for span in classifier.parts.spans:
        if (row := classifier.classify(span)) and row[0] == "forward":
            elapsed[row] += span.duration
            elapsed[row[0], REST] -= span.duration
    backward = sum(time for row, time in busy.items() if row[0] == "backward" and row[1] != REST)
    elapsed["backward", REST] -= backward  # in backward, parts have no time except that of their operations
    return dict(busy), {row: max(time - busy.get(row, 0.0), 0.0) for row, time in elapsed.items()}


def _sum_gpu_times(
    trace: ProfilerTrace, classifier: PhaseClassifier
) -> tuple[dict[PhasePart, float], dict[PhasePart, float]]:
    """Sum the busy time of the device, by the part that launched the work, and the gaps, by the part that the device waits for.

    Work that overlaps on several streams counts once.
    """
    busy: dict[PhasePart, float] = defaultdict(float)
    idle: dict[PhasePart, float] = defaultdict(float)
    covered_until = classifier.phases.spans[0].start
    row: PhasePart | None = None
    for call, work in trace.launches:
        row = classifier.classify(call)
        if row is None or work.end <= covered_until:
            continue
        idle[row] += max(work.start - covered_until, 0.0)
        busy[row] += work.end - max(work.start, covered_until)
        covered_until = work.end
    end = classifier.phases.spans[-1].end
    if row is not None:
        idle[row] += max(end - covered_until, 0.0)
    return dict(busy), dict(idle)

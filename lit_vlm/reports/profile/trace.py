"""Classification of trace spans by phase of the step and part of the model."""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA, VALIDATION, REST = "data", "validation", "rest"
PhasePart = tuple[str, str]  # (phase, part); the part is empty where there is none


class PhaseClassifier:
    """Classifier of host times by phase and part. Backward work belongs to the part that did the forward work."""

    def __init__(self, trace: ProfilerTrace) -> None:
        self.phases = SpanLookup(span for span in trace.phases if span.name != VALIDATION)
        self.parts = SpanLookup(trace.parts)
        self._forwards = [span.start for span in self.phases.spans if span.name == "forward"]
        self._nodes = {
            thread: SpanLookup(
                span for span in trace.ops if span.thread == thread and span.name.startswith(BACKWARD_NODE)
            )
            for thread in {span.thread for span in trace.ops}
        }
        self._part_by_node: dict[
            int, str
        ] = {}  # sequence number of an autograd node -> part; the last operation with it made the node
        for span in trace.ops:
            number = span.args.get("Sequence number")
            if number is not None and self._find_phase(span.start) == "forward":
                self._part_by_node[number] = self._find_part(span.start)

    def classify(self, span: TraceSpan) -> PhasePart | None:
        """Return phase and part of a span; None outside the steps."""
        phase = self._find_phase(span.start)
        if phase == "backward":
            node = self._nodes[span.thread].find_at(span.start) if span.thread in self._nodes else None
            number = node.args.get("Sequence number") if node else None
            return phase, self._part_by_node.get(number, REST) if number is not None else REST
        return (phase, self._find_part(span.start) if phase == "forward" else "") if phase else None

    def get_micro_batch(self, span: TraceSpan) -> int:
        """Return the number of the last micro-batch that began before the span."""
        return bisect_right(self._forwards, span.start)

    def _find_phase(self, time: float) -> str | None:
        found = self.phases.find_at(time)
        return found.name if found else None

    def _find_part(self, time: float) -> str:
        found = self.parts.find_at(time)
        return found.name if found else REST


PHASE_PREFIX, PART_PREFIX = "phase:", "part:"  # prefixes of our marks' names, see callbacks/profile.py
DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCH_CATEGORIES = ("cuda_runtime", "cuda_driver")
BACKWARD_NODE = "autograd::engine::evaluate_function"


@dataclass(slots=True)
class TraceSpan:
    """Event of a trace, from `start` to `end` in microseconds."""

    name: str
    start: float
    end: float
    thread: Any = None
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def duration(self) -> float:
        return self.end - self.start


@dataclass(slots=True)
class ProfilerTrace:
    """Spans of a trace, each list sorted by start. `launches`: (host span, device span) of each piece of device work."""

    ops: list[TraceSpan]
    phases: list[TraceSpan]
    parts: list[TraceSpan]
    launches: list[tuple[TraceSpan, TraceSpan]]


class SpanLookup:
    """Lookup by time of spans that do not overlap."""

    def __init__(self, spans: Iterable[TraceSpan]) -> None:
        self.spans = sorted(spans, key=lambda span: span.start)
        self._starts = [span.start for span in self.spans]

    def find_at(self, time: float) -> TraceSpan | None:
        """Find the span that contains a time; None if there is none."""
        place = bisect_right(self._starts, time) - 1
        return self.spans[place] if place >= 0 and time < self.spans[place].end else None


def read_trace(path: Path) -> ProfilerTrace:
    """Read a Chrome trace, .json or .json.gz."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
        events = json.load(stream)["traceEvents"]
    kinds: dict[str, list[TraceSpan]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and "dur" in event:
            start, args = float(event["ts"]), event.get("args") or {}
            span = TraceSpan(event["name"], start, start + float(event["dur"]), (event["pid"], event["tid"]), args)
            kinds[event.get("cat", "")].append(span)
    marks = sorted(kinds["user_annotation"], key=lambda span: span.start)
    return ProfilerTrace(
        ops=sorted(kinds["cpu_op"], key=lambda span: (span.start, -span.end)),
        phases=[_remove_prefix(span, PHASE_PREFIX) for span in marks if span.name.startswith(PHASE_PREFIX)],
        parts=[_remove_prefix(span, PART_PREFIX) for span in marks if span.name.startswith(PART_PREFIX)],
        launches=_match_launches(kinds),
    )


def find_outermost(ops: Iterable[TraceSpan]) -> list[TraceSpan]:
    """Find the operations of each thread that are inside no other operation."""
    ends: dict[Any, float] = {}
    found = []
    for span in ops:
        if span.start >= ends.get(span.thread, float("-inf")):
            ends[span.thread] = span.end
            found.append(span)
    return found


def _remove_prefix(span: TraceSpan, prefix: str) -> TraceSpan:
    return TraceSpan(span.name.removeprefix(prefix), span.start, span.end, span.thread, span.args)


def _match_launches(kinds: dict[str, list[TraceSpan]]) -> list[tuple[TraceSpan, TraceSpan]]:
    calls = {span.args.get("correlation"): span for kind in LAUNCH_CATEGORIES for span in kinds[kind]}
    on_device = sorted((span for kind in DEVICE_CATEGORIES for span in kinds[kind]), key=lambda span: span.start)
    return [(calls[key], span) for span in on_device if (key := span.args.get("correlation")) in calls]

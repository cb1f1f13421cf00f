"""Reader of PyTorch profiler traces, as plain spans: host operations, the device work they launch, and our own marks.

The trace is Chrome's format ("Trace Event Format"), which `torch.profiler` exports; times in it are microseconds.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

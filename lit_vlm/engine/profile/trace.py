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

PHASE, PART = "phase:", "part:"  # prefixes of our marks' names, see callbacks/profile.py
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCH = ("cuda_runtime", "cuda_driver")
BACKWARD_NODE = "autograd::engine::evaluate_function"


@dataclass(slots=True)
class Span:
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
class Trace:
    """Spans of a trace, each list sorted by start. `launches`: (host span, device span) of each piece of device work."""

    ops: list[Span]
    phases: list[Span]
    parts: list[Span]
    launched: list[tuple[Span, Span]]


class Ranges:
    """Lookup by time of spans that do not overlap."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self.spans = sorted(spans, key=lambda span: span.start)
        self._starts = [span.start for span in self.spans]

    def at(self, time: float) -> Span | None:
        """Find the span that contains a time; None if there is none."""
        place = bisect_right(self._starts, time) - 1
        return self.spans[place] if place >= 0 and time < self.spans[place].end else None


def read_trace(path: Path) -> Trace:
    """Read a Chrome trace, .json or .json.gz."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
        events = json.load(stream)["traceEvents"]
    kinds: dict[str, list[Span]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and "dur" in event:
            start, args = float(event["ts"]), event.get("args") or {}
            span = Span(event["name"], start, start + float(event["dur"]), (event["pid"], event["tid"]), args)
            kinds[event.get("cat", "")].append(span)
    marks = sorted(kinds["user_annotation"], key=lambda span: span.start)
    return Trace(
        ops=sorted(kinds["cpu_op"], key=lambda span: (span.start, -span.end)),
        phases=[_named(span, PHASE) for span in marks if span.name.startswith(PHASE)],
        parts=[_named(span, PART) for span in marks if span.name.startswith(PART)],
        launched=_launched(kinds),
    )


def outermost(ops: Iterable[Span]) -> list[Span]:
    """Find the operations of each thread that are inside no other operation."""
    ends: dict[Any, float] = {}
    found = []
    for span in ops:
        if span.start >= ends.get(span.thread, float("-inf")):
            ends[span.thread] = span.end
            found.append(span)
    return found


def _named(span: Span, prefix: str) -> Span:
    return Span(span.name.removeprefix(prefix), span.start, span.end, span.thread, span.args)


def _launched(kinds: dict[str, list[Span]]) -> list[tuple[Span, Span]]:
    calls = {span.args.get("correlation"): span for kind in LAUNCH for span in kinds[kind]}
    on_device = sorted((span for kind in DEVICE for span in kinds[kind]), key=lambda span: span.start)
    return [(calls[key], span) for span in on_device if (key := span.args.get("correlation")) in calls]

"""Classification of trace spans by phase of the step and part of the model."""

from __future__ import annotations

from bisect import bisect_right

from lit_vlm.engine.profile.trace import BACKWARD_NODE, Ranges, Span, Trace

DATA, VALIDATION, REST = "data", "validation", "rest"
ROW = tuple[str, str]  # (phase, part); the part is empty where there is none


class Rooms:
    """Classifier of host times by phase and part. Backward work belongs to the part that did the forward work."""

    def __init__(self, trace: Trace) -> None:
        self.phases = Ranges(span for span in trace.phases if span.name != VALIDATION)
        self.parts = Ranges(trace.parts)
        self._forwards = [span.start for span in self.phases.spans if span.name == "forward"]
        self._nodes = {
            thread: Ranges(span for span in trace.ops if span.thread == thread and span.name.startswith(BACKWARD_NODE))
            for thread in {span.thread for span in trace.ops}
        }
        self._part_of: dict[
            int, str
        ] = {}  # sequence number of an autograd node -> part; the last operation with it made the node
        for span in trace.ops:
            number = span.args.get("Sequence number")
            if number is not None and self._phase(span.start) == "forward":
                self._part_of[number] = self._part(span.start)

    def of(self, span: Span) -> ROW | None:
        """Return phase and part of a span; None outside the steps."""
        phase = self._phase(span.start)
        if phase == "backward":
            node = self._nodes[span.thread].at(span.start) if span.thread in self._nodes else None
            number = node.args.get("Sequence number") if node else None
            return phase, self._part_of.get(number, REST) if number is not None else REST
        return (phase, self._part(span.start) if phase == "forward" else "") if phase else None

    def turn(self, span: Span) -> int:
        """Return the number of the last micro-batch that began before the span."""
        return bisect_right(self._forwards, span.start)

    def _phase(self, time: float) -> str | None:
        found = self.phases.at(time)
        return found.name if found else None

    def _part(self, time: float) -> str:
        found = self.parts.at(time)
        return found.name if found else REST

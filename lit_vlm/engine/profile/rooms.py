"""Classification of trace spans by phase of the step and part of the model."""

from __future__ import annotations

from bisect import bisect_right

from lit_vlm.engine.profile.trace import BACKWARD_NODE, ProfilerTrace, SpanLookup, TraceSpan

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

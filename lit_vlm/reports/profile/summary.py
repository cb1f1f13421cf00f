"""Matrix products of a profiler trace, by shape and dtype, and the other operations by time."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from lit_vlm.reports.profile.trace import (
    DATA,
    REST,
    PhaseClassifier,
    PhasePart,
    ProfilerTrace,
    TraceSpan,
    find_outermost,
)

DTYPE_NAMES = {"float": "fp32", "double": "fp64", "c10::BFloat16": "bf16", "c10::Half": "fp16"}
# Operation -> positions of its two matrices among its inputs. Convolutions are included: they are products, too.
PRODUCT_OPERANDS = {
    "aten::mm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::bmm": (0, 1),
    "aten::baddbmm": (1, 2),
    "aten::_scaled_mm": (0, 1),
    "aten::convolution": (0, 1),
    "aten::convolution_backward": (1, 2),
}
ROW_AXIS, INNER_AXIS = (
    0,
    1,
)  # dimensions of a shape that hold a micro-batch's tokens, in forward and in weight gradients
DimensionSize = int | tuple[int, int]  # of a dimension; (minimum, maximum) if calls differ in it


@dataclass(slots=True)
class MatrixProduct:
    """Statistics of a matrix product of one shape and dtype, over all its calls in a step.

    `shape` is (rows, summed over, columns), `batch` the number of products in a call. A convolution has neither; `text`
    holds the shapes of its inputs.
    """

    name: str
    dtype: str
    shape: tuple[DimensionSize, ...] = ()
    batch: int = 1
    text: str = ""
    calls: float = 0.0  # per step, like all fields below
    flops: float = 0.0
    milliseconds: float = 0.0
    time_by_place: dict[PhasePart, float] = field(default_factory=lambda: defaultdict(float))  # milliseconds
    micro_batches: set[int] = field(default_factory=set)  # micro-batches with a call

    @property
    def is_outer(self) -> bool:
        """True for an outer product: the summed dimension has size 1."""
        return len(self.shape) == 3 and self.shape[INNER_AXIS] == 1

    @property
    def rate(self) -> float | None:
        """FLOP per second."""
        return self.flops / self.milliseconds * 1e3 if self.flops and self.milliseconds else None

    @property
    def costliest_place(self) -> PhasePart:
        """Phase and part with most of its time."""
        return max(self.time_by_place, key=self.time_by_place.__getitem__)

    @property
    def shape_text(self) -> str:
        """The shape as text."""
        many = f"{self.batch:,} of " if self.batch > 1 else ""
        return self.text or many + " × ".join(map(_format_size, self.shape))

    def add(self, other: MatrixProduct) -> None:
        """Add the calls of an equal product, or of one that differs in the number of tokens only."""
        self.calls, self.flops = self.calls + other.calls, self.flops + other.flops
        self.milliseconds += other.milliseconds
        self.micro_batches |= other.micro_batches
        for row, time in other.time_by_place.items():
            self.time_by_place[row] += time
        self.shape = tuple(_merge_sizes(one, two) for one, two in zip(self.shape, other.shape, strict=True))


def collect_products(
    trace: ProfilerTrace, classifier: PhaseClassifier, num_steps: int
) -> tuple[list[MatrixProduct], list[tuple[str, float, float]]]:
    """Collect the matrix products, with the operations inside them, and (name, calls, milliseconds) of all other operations.

    All numbers are per step; the most expensive come first.
    """
    self_times, scale = _compute_self_time(trace), 1e-3 / num_steps
    products: list[MatrixProduct] = []
    others: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    current: dict[Any, tuple[float, MatrixProduct]] = {}  # thread -> end of the current product, and the product
    for span in trace.ops:
        row = classifier.classify(span)
        if row is None:
            continue
        time = self_times[id(span)] * scale
        end, product = current.get(span.thread, (float("-inf"), None))
        if span.start >= end and span.name in PRODUCT_OPERANDS:
            product = _make_product(span, 1 / num_steps)
            product.micro_batches = {classifier.get_micro_batch(span)}
            current[span.thread] = span.end, product
            products.append(product)
        elif span.start >= end:
            others[span.name][0] += 1 / num_steps
            others[span.name][1] += time
            continue
        assert product is not None
        product.milliseconds += time
        product.time_by_place[row] += time
    other_operations = [(name, calls, time) for name, (calls, time) in others.items() if time > 0]
    merged = sorted(_merge_products(products), key=lambda one: -one.milliseconds)
    return merged, sorted(other_operations, key=lambda one: -one[2])


def _merge_products(products: list[MatrixProduct]) -> list[MatrixProduct]:
    """Merge products of equal shape. Also merge shapes that differ in one dimension only, if that joins more micro-batches:
    then the dimension is the number of tokens, the only one that varies between micro-batches.
    """
    micro_batches: dict[Any, set[int]] = defaultdict(set)
    for product in products:
        for key in _get_merge_keys(product):
            micro_batches[key] |= product.micro_batches
    merged: dict[Any, MatrixProduct] = {}
    for product in products:
        key = max(
            _get_merge_keys(product), key=lambda key: len(micro_batches[key])
        )  # at a tie the first key: the exact shape
        if key in merged:
            merged[key].add(product)
        else:
            merged[key] = product
    return list(merged.values())


def _get_merge_keys(product: MatrixProduct) -> list[Any]:
    """Return the keys by which products may merge: the exact shape, or the shape without the dimension of the tokens (rows or summed)."""
    identity = (product.name, product.dtype, product.batch, product.costliest_place)
    without_tokens = [
        (*identity, place, *product.shape[:place], *product.shape[place + 1 :]) for place in (ROW_AXIS, INNER_AXIS)
    ]
    return [(*identity, product.text, product.shape), *(without_tokens if product.shape else [])]


def _compute_self_time(trace: ProfilerTrace) -> dict[int, float]:
    """Compute the self time of each operation in microseconds, by its id(): device time if there is a device, else host time."""
    self_times = {id(span): 0.0 if trace.launches else span.duration for span in trace.ops}
    calls = [(call.start, 1, call, work.duration) for call, work in trace.launches]
    stacks: dict[Any, list[TraceSpan]] = defaultdict(list)
    for start, is_call, span, duration in sorted(
        [*((op.start, 0, op, 0.0) for op in trace.ops), *calls], key=_get_sort_key
    ):
        stack = stacks[span.thread]
        while stack and stack[-1].end <= start:
            stack.pop()
        if is_call:
            if stack:
                self_times[id(stack[-1])] += duration
            continue
        if stack and not trace.launches:
            self_times[id(stack[-1])] -= span.duration
        stack.append(span)
    return self_times


def _get_sort_key(entry: tuple[float, int, TraceSpan, float]) -> tuple[float, int, float]:
    start, is_call, span, _ = entry
    return start, is_call, -span.end  # of two that start at once, the longer one contains the other


def _make_product(span: TraceSpan, calls: float) -> MatrixProduct:
    """Make a product from one operation. `calls`: its weight, in calls per step."""
    shapes, types = span.args.get("Input Dims") or [], span.args.get("Input type") or []
    left, right = PRODUCT_OPERANDS[span.name]
    name = span.name.removeprefix("aten::")
    if max(left, right) >= len(shapes) or not shapes[left] or not shapes[right]:
        return MatrixProduct(name, "?", text="?", calls=calls)
    names = dict.fromkeys(DTYPE_NAMES.get(types[place], types[place].removeprefix("c10::")) for place in (left, right))
    one, other, dtype = shapes[left], shapes[right], " and ".join(names)
    if "convolution" in name:
        text = " with ".join(" × ".join(map(_format_size, shape)) for shape in (one, other))
        return MatrixProduct(name, dtype, text=text, calls=calls)
    batch = one[0] if len(one) == 3 else 1
    flops = 2.0 * batch * one[-2] * one[-1] * other[-1]
    return MatrixProduct(name, dtype, (one[-2], one[-1], other[-1]), batch, calls=calls, flops=flops * calls)


def _merge_sizes(one: DimensionSize, two: DimensionSize) -> DimensionSize:
    ends = [end for size in (one, two) for end in (size if isinstance(size, tuple) else (size,))]
    return min(ends) if min(ends) == max(ends) else (min(ends), max(ends))


def _format_size(size: DimensionSize) -> str:
    return f"{size[0]:,}\u2013{size[1]:,}" if isinstance(size, tuple) else f"{size:,}"


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
    command: str = ""  # command line of the run

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

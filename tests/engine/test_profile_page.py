"""Summary of a trace: time on host and device by phase and part, and the matrix products with their types and shapes."""

import gzip
import json

import pytest
from support import list_english

from lit_vlm.messages import set_language
from lit_vlm.reports.profile.page import collect_profile_findings, render_profile_page
from lit_vlm.reports.profile.summary import summarize_trace
from lit_vlm.reports.profile.trace import read_trace

ABOUT = {"name": "a <run>", "device": "a device", "precision": "bf16-mixed", "tokens": 10, "tiles": 2}
BF16, FP32 = "c10::BFloat16", "float"


class TraceWriter:
    """Writes a trace; times are in milliseconds."""

    def __init__(self):
        self.events, self.number = [], 0

    def add(self, category, name, start, end, thread=1, **args):
        times = {"ts": 1000 * start, "dur": 1000 * (end - start)}
        self.events.append({"ph": "X", "cat": category, "name": name, "pid": 0, "tid": thread, **times, "args": args})

    def mark(self, name, start, end):
        self.add("user_annotation", name, start, end)

    def add_op(self, name, start, end, *, sequence=None, thread=1, **args):
        self.add("cpu_op", name, start, end, thread, **args, **({"Sequence number": sequence} if sequence else {}))

    def add_matmul(self, start, end, shapes, dtype=BF16, name="aten::mm", **args):
        self.add_op(name, start, end, **{"Input Dims": shapes, "Input type": [dtype] * len(shapes)}, **args)

    def launch(self, start, on_device, end, thread=1, call="cudaLaunchKernel", kind="kernel"):
        self.number += 1
        self.add("cuda_runtime", call, start, start + 0.01, thread, correlation=self.number)
        self.add(kind, f"kernel {self.number}", on_device, end, 7, correlation=self.number)

    def add_step(self, start):
        """Add a step of 100 ms: data 0-10, forward -50 (language model 20-40), backward -90, optimizer -100."""
        for name, begin, end in (("data", 0, 10), ("forward", 10, 50), ("backward", 50, 90), ("optimizer", 90, 100)):
            self.mark(f"phase:{name}", start + begin, start + end)
        self.mark("part:language model", start + 20, start + 40)

    def summarize(self, tmp_path, steps=1, **about):
        path = tmp_path / "trace.json.gz"
        with gzip.open(path, "wt") as stream:
            json.dump({"traceEvents": [{"ph": "M", "name": "process_name"}, *self.events]}, stream)
        return summarize_trace(read_trace(path), steps, **(ABOUT | about))


def get_times(facts):
    return {(row.phase, row.part): (round(row.busy, 3), round(row.idle, 3)) for row in facts.rows}


def test_on_a_cpu_idle_time_is_the_time_without_an_operation(tmp_path):
    trace = TraceWriter()
    for start in (0, 200):  # time between steps, such as validation, belongs to no step
        trace.add_step(start)
        trace.add_op("aten::linear", start + 22, start + 32, sequence=5)
        trace.add_matmul(start + 23, start + 31, [[8, 4], [4, 2]], sequence=5)
        trace.add_op("aten::add", start + 42, start + 44, sequence=6)
        trace.add_op("autograd::engine::evaluate_function: MmBackward0", start + 55, start + 75, sequence=5)
        trace.add_matmul(start + 56, start + 66, [[4, 8], [8, 2]])
        trace.add_op("aten::mul_", start + 91, start + 96)
    trace.mark("phase:validation", 100, 200)
    trace.add_op("aten::mm", 120, 180)
    facts = trace.summarize(tmp_path, steps=2)
    assert get_times(facts) == {
        ("data", ""): (0, 10),
        ("forward", "language model"): (10, 10),
        ("forward", "rest"): (2, 18),
        ("backward", "language model"): (20, 0),
        ("backward", "rest"): (0, 20),
        ("optimizer", ""): (5, 5),
    }
    assert (facts.milliseconds, facts.data, facts.idle) == (100, 10, 53)
    assert [(one.shape_text, one.calls, one.milliseconds) for one in facts.products] == [
        ("4 × 8 × 2", 1, 10),
        ("8 × 4 × 2", 1, 8),
    ]
    assert dict((name, time) for name, _, time in facts.others)["aten::linear"] == 2  # without the product inside it
    assert facts.products[1].rate == pytest.approx(2 * 8 * 4 * 2 / 8e-3)


def test_on_a_gpu_time_is_device_time_and_belongs_to_the_part_that_launched_it(tmp_path):
    trace = TraceWriter()
    trace.add_step(0)
    trace.add_op("aten::to", 5, 6)
    trace.launch(5.5, 6, 8, call="cudaMemcpyAsync", kind="gpu_memcpy")
    trace.add_matmul(22, 23, [[8, 4], [4, 2]], sequence=5)
    trace.launch(22.5, 30, 60)  # the device lags behind the host
    trace.add_op("autograd::engine::evaluate_function: MmBackward0", 55, 57, sequence=5, thread=2)
    trace.add_matmul(55.5, 56.5, [[4, 8], [8, 2]], thread=2)
    trace.launch(56, 60, 80, thread=2)
    trace.launch(56.2, 70, 85, thread=2)  # at the same time on another stream: counted once
    trace.add_op("aten::_fused_adamw_", 91, 92)
    trace.launch(91.5, 92, 97)
    facts = trace.summarize(tmp_path)
    assert facts.on_gpu and facts.milliseconds == 100
    assert get_times(facts) == {
        ("data", ""): (2, 6),
        ("forward", "language model"): (30, 22),
        ("backward", "language model"): (25, 0),
        ("optimizer", ""): (5, 10),
    }
    assert {one.shape_text: one.milliseconds for one in facts.products} == {"4 × 8 × 2": 35, "8 × 4 × 2": 30}
    assert any("The GPU does nothing 32.0 % of the time" in what for _, what, _ in collect_profile_findings(facts))


def test_float32_products_of_a_half_precision_run_are_reported(tmp_path):
    trace = TraceWriter()
    trace.add_step(0)
    trace.add_matmul(21, 22, [[8, 4], [4, 2]])
    trace.add_matmul(
        23, 33, [[9, 4, 1], [9, 1, 7]], FP32, "aten::bmm"
    )  # an outer product, such as that of rotary angles
    assert trace.summarize(tmp_path).float32_products == []
    trace.add_matmul(33, 36, [[2], [8, 4], [4, 2]], FP32, "aten::addmm")
    (wrong,) = trace.summarize(tmp_path).float32_products
    assert (wrong.shape_text, wrong.dtype, wrong.costliest_place) == (
        "8 × 4 × 2",
        "fp32",
        ("forward", "language model"),
    )
    assert trace.summarize(tmp_path, precision="32-true").float32_products == []
    set_language("ko")
    page = render_profile_page(trace.summarize(tmp_path))
    assert list_english(page) == [] and "float32 행렬 곱이 1번" in page and "순전파: language model" in page
    set_language("en")
    page = render_profile_page(trace.summarize(tmp_path))
    assert "1 float32 product a step in a bf16-mixed run, 3.0 % of its\ntime" in page.replace("its time", "its\ntime")
    assert "a &lt;run&gt;" in page and "<script" not in page and "http" not in page


def test_shapes_that_differ_only_in_tokens_are_merged_and_layers_are_not(tmp_path):
    trace = TraceWriter()
    for number, tokens in enumerate((100, 120, 90)):
        start = 100 * number
        trace.add_step(start)
        for place, width in ((21, 8), (25, 16)):
            trace.add_matmul(start + place, start + place + 2, [[tokens, 4], [4, width]])
            trace.add_matmul(start + place + 40, start + place + 41, [[width, tokens], [tokens, 4]])
    facts = trace.summarize(tmp_path, steps=3)
    assert sorted((one.shape_text, one.calls) for one in facts.products) == [
        ("16 × 90\u2013120 × 4", pytest.approx(1)),
        ("8 × 90\u2013120 × 4", pytest.approx(1)),
        ("90\u2013120 × 4 × 16", pytest.approx(1)),
        ("90\u2013120 × 4 × 8", pytest.approx(1)),
    ]


def test_a_step_that_waits_for_data_is_reported(tmp_path):
    trace = TraceWriter()
    trace.mark("phase:data", 0, 30)
    trace.mark("phase:forward", 30, 100)
    trace.add_op("aten::add", 30, 99)
    facts = trace.summarize(tmp_path)
    assert [what for _, what, _ in collect_profile_findings(facts)] == ["30.0 % of the time is spent waiting for data."]
    assert facts.products == [] and "none" in render_profile_page(facts)

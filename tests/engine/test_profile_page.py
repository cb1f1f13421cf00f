"""A trace summed up: what ran when, on the host or on a device, by part; the products, their types and their shapes."""

import gzip
import json

import pytest

from lit_vlm.engine.profile.facts import summarize_trace
from lit_vlm.engine.profile.page import collect_profile_findings, render_profile_page
from lit_vlm.engine.profile.trace import read_trace

ABOUT = {"name": "a <run>", "device": "a device", "precision": "bf16-mixed", "tokens": 10, "tiles": 2}
BF16, FP32 = "c10::BFloat16", "float"


class Script:
    """Writes a trace, in milliseconds."""

    def __init__(self):
        self.events, self.number = [], 0

    def add(self, category, name, start, end, thread=1, **args):
        times = {"ts": 1000 * start, "dur": 1000 * (end - start)}
        self.events.append({"ph": "X", "cat": category, "name": name, "pid": 0, "tid": thread, **times, "args": args})

    def mark(self, name, start, end):
        self.add("user_annotation", name, start, end)

    def op(self, name, start, end, *, sequence=None, thread=1, **args):
        self.add("cpu_op", name, start, end, thread, **args, **({"Sequence number": sequence} if sequence else {}))

    def mm(self, start, end, shapes, dtype=BF16, name="aten::mm", **args):
        self.op(name, start, end, **{"Input Dims": shapes, "Input type": [dtype] * len(shapes)}, **args)

    def launch(self, start, on_device, end, thread=1, call="cudaLaunchKernel", kind="kernel"):
        self.number += 1
        self.add("cuda_runtime", call, start, start + 0.01, thread, correlation=self.number)
        self.add(kind, f"kernel {self.number}", on_device, end, 7, correlation=self.number)

    def step(self, start):
        """data 0-10, forward -50 (language model 20-40), backward -90, optimizer -100, of a hundred."""
        for name, begin, end in (("data", 0, 10), ("forward", 10, 50), ("backward", 50, 90), ("optimizer", 90, 100)):
            self.mark(f"phase:{name}", start + begin, start + end)
        self.mark("part:language model", start + 20, start + 40)

    def facts(self, tmp_path, steps=1, **about):
        path = tmp_path / "trace.json.gz"
        with gzip.open(path, "wt") as stream:
            json.dump({"traceEvents": [{"ph": "M", "name": "process_name"}, *self.events]}, stream)
        return summarize_trace(read_trace(path), steps, **(ABOUT | about))


def times(facts):
    return {(row.phase, row.part): (round(row.busy, 3), round(row.idle, 3)) for row in facts.rows}


def test_on_a_cpu_idle_is_what_no_operation_covers(tmp_path):
    script = Script()
    for start in (0, 200):  # what lies between, as a validation, is of no step
        script.step(start)
        script.op("aten::linear", start + 22, start + 32, sequence=5)
        script.mm(start + 23, start + 31, [[8, 4], [4, 2]], sequence=5)
        script.op("aten::add", start + 42, start + 44, sequence=6)
        script.op("autograd::engine::evaluate_function: MmBackward0", start + 55, start + 75, sequence=5)
        script.mm(start + 56, start + 66, [[4, 8], [8, 2]])
        script.op("aten::mul_", start + 91, start + 96)
    script.mark("phase:validation", 100, 200)
    script.op("aten::mm", 120, 180)
    facts = script.facts(tmp_path, steps=2)
    assert times(facts) == {
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
    assert dict((name, time) for name, _, time in facts.others)["aten::linear"] == 2  # without the product inside
    assert facts.products[1].rate == pytest.approx(2 * 8 * 4 * 2 / 8e-3)


def test_on_a_gpu_time_is_the_devices_and_work_counts_for_whom_launched_it(tmp_path):
    script = Script()
    script.step(0)
    script.op("aten::to", 5, 6)
    script.launch(5.5, 6, 8, call="cudaMemcpyAsync", kind="gpu_memcpy")
    script.mm(22, 23, [[8, 4], [4, 2]], sequence=5)
    script.launch(22.5, 30, 60)  # the device is behind the host
    script.op("autograd::engine::evaluate_function: MmBackward0", 55, 57, sequence=5, thread=2)
    script.mm(55.5, 56.5, [[4, 8], [8, 2]], thread=2)
    script.launch(56, 60, 80, thread=2)
    script.launch(56.2, 70, 85, thread=2)  # beside it on another stream: counts once
    script.op("aten::_fused_adamw_", 91, 92)
    script.launch(91.5, 92, 97)
    facts = script.facts(tmp_path)
    assert facts.on_gpu and facts.milliseconds == 100
    assert times(facts) == {
        ("data", ""): (2, 6),
        ("forward", "language model"): (30, 22),
        ("backward", "language model"): (25, 0),
        ("optimizer", ""): (5, 10),
    }
    assert {one.shape_text: one.milliseconds for one in facts.products} == {"4 × 8 × 2": 35, "8 × 4 × 2": 30}
    assert any("The GPU does nothing 32.0 % of the time" in what for _, what, _ in collect_profile_findings(facts))


def test_float32_products_of_a_half_precision_run_are_told(tmp_path):
    script = Script()
    script.step(0)
    script.mm(21, 22, [[8, 4], [4, 2]])
    script.mm(23, 33, [[9, 4, 1], [9, 1, 7]], FP32, "aten::bmm")  # an outer product, as of rotary angles
    assert script.facts(tmp_path).float32_products == []
    script.mm(33, 36, [[2], [8, 4], [4, 2]], FP32, "aten::addmm")
    (wrong,) = script.facts(tmp_path).float32_products
    assert (wrong.shape_text, wrong.dtype, wrong.costliest_place) == (
        "8 × 4 × 2",
        "fp32",
        ("forward", "language model"),
    )
    assert script.facts(tmp_path, precision="32-true").float32_products == []
    page = render_profile_page(script.facts(tmp_path))
    assert "1 float32 product a step in a bf16-mixed run, 3.0 % of its\ntime" in page.replace("its time", "its\ntime")
    assert "a &lt;run&gt;" in page and "<script" not in page and "http" not in page


def test_shapes_that_differ_in_their_tokens_are_one_and_layers_stay_apart(tmp_path):
    script = Script()
    for number, tokens in enumerate((100, 120, 90)):
        start = 100 * number
        script.step(start)
        for place, width in ((21, 8), (25, 16)):
            script.mm(start + place, start + place + 2, [[tokens, 4], [4, width]])
            script.mm(start + place + 40, start + place + 41, [[width, tokens], [tokens, 4]])
    facts = script.facts(tmp_path, steps=3)
    assert sorted((one.shape_text, one.calls) for one in facts.products) == [
        ("16 × 90\u2013120 × 4", pytest.approx(1)),
        ("8 × 90\u2013120 × 4", pytest.approx(1)),
        ("90\u2013120 × 4 × 16", pytest.approx(1)),
        ("90\u2013120 × 4 × 8", pytest.approx(1)),
    ]


def test_a_step_that_waits_for_data_is_told(tmp_path):
    script = Script()
    script.mark("phase:data", 0, 30)
    script.mark("phase:forward", 30, 100)
    script.op("aten::add", 30, 99)
    facts = script.facts(tmp_path)
    assert [what for _, what, _ in collect_profile_findings(facts)] == ["30.0 % of the time is spent waiting for data."]
    assert facts.products == [] and "none" in render_profile_page(facts)

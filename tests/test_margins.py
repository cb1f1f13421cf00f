"""Tools of the tests: margins of numeric comparisons, and float64 where the code asks for float32."""

import math

import numpy as np
import pytest
import torch
from float64 import Float64, restore_pixels
from margins import Recorder, summarize, watch


def compare_numbers():
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
    torch.testing.assert_close(one, other, atol=1.0, rtol=0)
    torch.testing.assert_close({"a": one}, {"a": other}, atol=0, rtol=0.4, msg="as a dictionary")
    assert torch.allclose(one, other, rtol=0, atol=1.5)
    np.testing.assert_allclose([1.0, 2.0], [1.0, 2.5], atol=2.0, rtol=0)
    assert pytest.approx(1.5, abs=2.5) == 1.0
    assert {"a": [1.0]}["a"] == pytest.approx([1.5], abs=3.0)
    assert pytest.approx([1.0, 2.5], abs=0.125) != [1.0, 2.0]
    torch.testing.assert_close(one, one)
    assert pytest.approx(2.5) == 2.5


def test_the_margin_of_each_comparison_is_tolerance_over_difference(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path / "margins")
    with monkeypatch.context() as patch:
        watch(recorder, patch)
        compare_numbers()
    found = [margin for margin, _ in recorder.sites.values()]
    assert [round(margin, 4) for margin in found] == [2, 2, 3, 4, 5, 6, 4, math.inf, math.inf]
    recorder.test = "tests/test_margins.py::a_test"
    recorder.write_test()
    lines = summarize([str(tmp_path / "margins")]).splitlines()
    assert lines[0] == "9 comparisons at 9 lines; 2 lines below a margin of 3"
    assert all("test_margins.py:" in line and line.endswith("::a_test") for line in lines[1:])


class Float32Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.float() * 3

    @staticmethod
    def backward(ctx, gradient):
        return gradient.float() / 3


def test_code_that_asks_for_float32_gets_float64_forward_and_backward():
    with Float64():
        values = torch.full((2,), 0.1, dtype=torch.float64, requires_grad=True)
        Float32Function.apply(values.softmax(0, dtype=torch.float32)).sum().backward()
        Float32Function.apply(values).sum().backward()
        assert values.grad.tolist() == [1 / 3, 1 / 3]
    assert torch.ones(1, dtype=torch.float32).dtype is torch.float32


def test_pixels_are_normalised_again_from_whole_numbers():
    pixels = torch.arange(256)
    exact = (pixels.double() / 255 - 0.5) / 0.5
    assert torch.equal(restore_pixels(exact.float()), exact)

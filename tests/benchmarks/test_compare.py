"""The comparison with other trainers: FLOP arithmetic, equality gate, timing, and end-to-end runs."""

import json
import re
from dataclasses import replace

import pytest
import torch

from benchmarks import classes, gpu
from benchmarks.compare import page, report
from benchmarks.compare.__main__ import RESULTS, Arguments, compare_peers, measure_ablations
from benchmarks.compare.cases import HF_TUNED, OURS, OURS_CACHED, TRL_SHIPPED, TRL_TUNED, make_case, resize_case
from benchmarks.compare.clock import compute_spread, measure_interleaved
from benchmarks.compare.contender import Ours, Placement, StepTimes
from benchmarks.compare.gate import check_equal, require_checkpointing
from benchmarks.compare.memory import measure_peak_memory
from benchmarks.compare.sizes import save_model
from benchmarks.compare.switches import ABLATIONS
from benchmarks.flops_bound import Recipe, RecordSize, compute_ratio_bound, compute_step_flops
from lit_vlm.anyres import ModelClass
from lit_vlm.cost.model_shape import ModelShape, TextShape, VisionShape
from lit_vlm.types import UserError

# Qwen2.5-7B's and SigLIP so400m's matrices, all 27 layers of the tower
QWEN_7B = ModelShape(TextShape(28, 3584, 28, 4, 128, 18944, 152064), VisionShape(27, 1152, 4304, 378, 729, 729))
TINY = ModelShape(TextShape(2, 4, 2, 1, 2, 8, 10), VisionShape(1, 4, 6, 4, 4, 4))  # 2-pixel patches of 12 numbers
QUICK = Arguments("align", "smallest", repeats=2, most=2, peaks=False)


@pytest.fixture(scope="module")
def save_placement(tmp_path_factory):
    def make_placement(case) -> Placement:
        return Placement(save_model(case.model_size, case.tiling, tmp_path_factory.mktemp("model") / "hf"))

    return make_placement


def make_small_case(stage, tiles=5):
    return resize_case(make_case(stage, "smallest", tiles), batch=3, steps=2)


# ---- arithmetic


def test_flops_of_a_step_by_hand():
    """Three prompt tokens, two answer tokens of which one is supervised, no image."""
    size = [RecordSize(3, (2,), (1,), 0)]
    layer = 2 * 4 * (4 + 2) + 3 * 4 * 8  # queries, output, keys, values; gate, up, down
    body, attention, head = 2 * 2 * layer * 5, 2 * 5**2 * 4 * 2, 2 * 4 * 10
    assert compute_step_flops(TINY, Recipe(), size) == 3 * (body + attention + head)
    assert compute_step_flops(TINY, Recipe(trains_language_model=False), size) == 2 * (body + head) + 3 * attention
    assert compute_step_flops(TINY, Recipe(recomputes=True), size) == 4 * (body + attention) + 3 * head
    assert compute_step_flops(TINY, Recipe(head_on_all_rows=True), size) == 3 * (body + attention + 5 * head)
    assert compute_step_flops(TINY, Recipe(dense_mask=True), size) == 3 * (body + 2 * attention + head)
    both = [*size, RecordSize(9, (1,), (1,), 0)]
    padded = 3 * (2 * body * 2 + 2 * attention * 4 + 2 * head)
    assert compute_step_flops(TINY, Recipe(pads=True), both) == padded
    assert compute_step_flops(TINY, Recipe(pads=True, micro_batches=2), both) == compute_step_flops(
        TINY, Recipe(), both
    )


def test_flops_of_a_tile_by_hand():
    """Four patches of twelve numbers, one layer of width four."""
    tile = 2 * 4 * (4 * 4**2 + 2 * 4 * 6) + 4 * 4**2 * 4 + 2 * 4 * 12 * 4
    first = second = 2 * 4 * 4 * 4
    one, two = ([RecordSize(3, (2,), (1,), tiles)] for tiles in (1, 2))

    def compute_difference(**recipe):
        return compute_step_flops(TINY, Recipe(**recipe), two) - compute_step_flops(TINY, Recipe(**recipe), one)

    assert compute_difference() == tile + 2 * first + 3 * second
    assert compute_difference(trains_tower=True) == 3 * (tile + first + second)
    assert compute_difference(trains_projector=False, tower_passes=4) == 4 * (tile + first + second)


def test_flops_of_a_pair_by_hand():
    """Prompt of three tokens, answers of two and one; shared: the prompt once, each answer attends to the prompt and itself."""
    pair = [RecordSize(3, (2, 1), (2, 1), 0)]
    layer, row = 2 * 4 * (4 + 2) + 3 * 4 * 8, 2 * 4 * 10 * 3
    shared = 2 * 2 * layer * 6 + 2 * (9 + 2 * 2 * 3 + 4 + 2 * 3 + 1) * 4 * 2
    apart = 2 * 2 * layer * 9 + 2 * (25 + 16) * 4 * 2
    assert compute_step_flops(TINY, Recipe(), pair) == 3 * (shared + row)
    assert compute_step_flops(TINY, Recipe(shares_prompt=False), pair) == 3 * (apart + row)
    assert compute_step_flops(TINY, Recipe(reference=1 / 3), pair) == pytest.approx((3 + 1 / 3) * (shared + row))


@pytest.mark.parametrize(
    ("recipe", "size", "teraflops"),
    [
        (Recipe(trains_language_model=False), RecordSize(734, (15,), (15,), 1), 20.655),
        (
            Recipe(trains_language_model=False, recomputes=True, head_on_all_rows=True),
            RecordSize(734, (15,), (15,), 1),
            32.143,
        ),
        (Recipe(), RecordSize(5 * 729 + 130, (120,), (120,), 5), 165.727),
        (Recipe(reference=1), RecordSize(3745, (150, 150), (150, 150), 5), 229.269),
        (
            Recipe(reference=1, shares_prompt=False, tower_passes=4),
            RecordSize(3745, (150, 150), (150, 150), 5),
            446.394,
        ),
    ],
)
def test_flops_of_7b_equal_an_independent_count(recipe, size, teraflops):
    """Counts of another implementation, which also counts a gradient into the frozen tower and the whole projector for pairs."""
    assert abs(compute_step_flops(QWEN_7B, recipe, [size]) / 1e12 / teraflops - 1) < 1e-3


def test_a_ratio_bound_is_computed_over_all_steps():
    steps = [[RecordSize(3, (2,), (1,), 0)], [RecordSize(9, (1,), (1,), 0)]]
    peer, least = Recipe(recomputes=True), Recipe()
    expected = sum(compute_step_flops(TINY, peer, s) for s in steps) / sum(
        compute_step_flops(TINY, least, s) for s in steps
    )
    assert compute_ratio_bound(TINY, peer, least, steps) == expected > 1.2


# ---- the gate


def test_the_gate_refuses_another_loss(save_placement):
    case = make_small_case("align")
    placement = save_placement(case)

    def disturb(contender: Ours) -> None:
        with torch.no_grad():
            contender.stage.model.lm_head.weight.mul_(1.01)

    with pytest.raises(UserError, match="compute different things: the loss .* No ratio is printed"):
        check_equal([Ours(case, placement), Ours(case, placement, name="other", change_stage=disturb)], case.batches)


def test_the_gate_refuses_other_gradients_behind_an_equal_loss(save_placement):
    case = make_small_case("align")
    placement = save_placement(case)

    def flip_gradient(contender: Ours) -> None:
        weight = contender.stage.model.model.multi_modal_projector.linear_1.weight
        weight.register_hook(lambda gradient: -gradient)

    with pytest.raises(UserError, match="the gradients of the first steps have a cosine of"):
        check_equal(
            [Ours(case, placement), Ours(case, placement, name="other", change_stage=flip_gradient)], case.batches
        )


def test_the_gate_refuses_other_trained_parts(save_placement):
    case = make_small_case("align")
    other = Ours(
        replace(case, options={"trainable": ["projector", "vision_tower"]}), save_placement(case), name="other"
    )
    with pytest.raises(UserError, match="both must freeze the same parts"):
        check_equal([Ours(case, save_placement(case)), other], case.batches)


def test_missing_activation_checkpointing_is_detected(save_placement):
    contender = Ours(
        make_small_case("sft"), save_placement(make_small_case("sft")), options={"activation_checkpointing": True}
    )
    require_checkpointing(contender, True)
    contender.stage.model.eval()  # the flags stay set, and transformers skips checkpointing
    with pytest.raises(UserError, match="does not recompute activations"):
        require_checkpointing(contender, True)


# ---- the clock


class ScriptedContender:
    def __init__(self, name, seconds):
        self.name, self.seconds, self.order = name, iter(seconds), []

    def repeat(self, batches):
        self.order.append(len(self.order))
        value = next(self.seconds)
        return StepTimes(value, value, 0.0, 0.0)


def test_measurements_repeat_only_until_the_spread_is_small():
    steady, noisy = ScriptedContender("calm", [1.0] * 20), ScriptedContender("wild", [1, 2, 1, 2, 1, *[1.0] * 15])
    times = measure_interleaved([steady, noisy], [], repeats=5, most=15)
    assert 5 < len(times["wild"]) == len(times["calm"]) < 15
    assert compute_spread([time.cpu for time in times["wild"]]) <= 0.10


def test_a_ratio_of_numbers_with_a_wide_spread_is_not_printed():
    rows = {
        name: {"spread": {"cpu": wide, "wall": 0.5}, "cpu_seconds": [value], "wall_seconds": [value]}
        for name, wide, value in (("ours", 0.02, 1.0), ("calm", 0.1, 2.0), ("wild", 0.11, 3.0))
    }
    assert report.compute_ratio(rows, "calm", "ours") == 2.0
    assert report.compute_ratio(rows, "wild", "ours") is None
    assert report.compute_ratio(rows, "calm", "ours", "wall") is None
    assert report.format_ratio(None) == "spread too wide"


# ---- end to end


def test_align_runs_end_to_end_and_executes_the_computed_flops(save_placement):
    case = make_small_case("align")
    result = compare_peers(case, save_placement(case), QUICK, say=lambda text: None)
    rows = result["contenders"]
    assert list(rows) == [OURS, TRL_SHIPPED, TRL_TUNED, HF_TUNED]
    for name in (OURS, HF_TUNED):
        executed = rows[name]["flops_per_sample"] * result["data"]["records"]
        assert abs(executed / rows[name]["arithmetic_flops"] - 1) < 0.03, name
    assert abs(rows[OURS]["executed_over_ideal"] - 1) < 0.03
    assert rows[OURS]["padding"] == 0 < rows[HF_TUNED]["padding"]
    assert all(row["tower_passes_per_tile"] == 1 for row in rows.values())
    assert result["gate"][TRL_TUNED]["updates"] > 0.999
    assert "GFLOP per sample" in report.render_text(result)


def test_dpo_runs_end_to_end_and_counts_tower_passes(save_placement):
    case = make_small_case("dpo")
    result = compare_peers(case, save_placement(case), QUICK, say=lambda text: None)
    rows = result["contenders"]
    assert list(rows) == [OURS, OURS_CACHED, TRL_SHIPPED, TRL_TUNED]
    assert rows[TRL_TUNED]["tower_passes_per_tile"] == 4
    assert rows[OURS]["tower_passes_per_tile"] == 1
    assert rows[OURS_CACHED]["tower_passes_per_tile"] == pytest.approx(
        4 / 3
    )  # once in the caching pass, then in each of three epochs
    cached_flops = rows[OURS_CACHED]["flops_per_sample"] * result["data"]["records"]
    assert (
        abs(cached_flops / rows[OURS_CACHED]["arithmetic_flops"] - 1) < 0.15
        and cached_flops < rows[OURS]["arithmetic_flops"]
    )
    assert result["gate"][TRL_SHIPPED]["logps"] == pytest.approx(0, abs=1e-5)
    assert [(bar["ours"], bar["asked"]) for bar in result["bars"]] == [(OURS, 1.7), (OURS, 2.1), (OURS_CACHED, 2.5)]


@pytest.mark.parametrize("stage", ["align", "anyres", "dpo"])
def test_a_disabled_optimisation_computes_the_same_and_costs_the_predicted_flops(stage, save_placement):
    case = make_small_case(stage)
    result = measure_ablations(case, save_placement(case), QUICK, say=lambda text: None)
    assert len(result["ladder"]) == sum(stage in switch.stages for switch in ABLATIONS.values())
    for row in result["ladder"]:
        # recomputation stops before a layer's last product, whose result is not needed again
        assert abs(row["executed"] / row["predicted"] - 1) < (0.10 if "checkpointing" in row["off"] else 0.05)
        assert row["predicted"] > 1.01


def test_the_gpu_benchmark_runs_on_a_cpu():
    rows = [row for row in gpu.ROWS if row.stage == "dpo"]
    result = gpu.run(rows, "cpu", "smallest", 2, deadline=float("inf"))
    (found,) = result["rows"].values()
    assert list(found) == [OURS, TRL_TUNED, TRL_SHIPPED] and not result["left_out"]
    assert all(
        row["loss_apart"] == pytest.approx(0, abs=2e-3) and row["ratio"] for name, row in found.items() if name != OURS
    )
    assert 0 < found[OURS]["of_gemm"] < 1
    assert "of the GEMM ceiling" in gpu.render_table(result)


def test_without_a_gpu_the_released_sizes_are_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="No GPU is here"):
        gpu.main([])


@pytest.mark.slow
def test_peak_memory_is_measured_in_a_separate_process(tmp_path):
    case = make_small_case("align")
    folder = save_model(case.model_size, case.tiling, tmp_path / "hf")
    peak = measure_peak_memory("align", "smallest", 5, OURS, folder, 3, 2)
    assert 0 < peak < 300e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage=aling"], "stage=aling: give one of align, sft"),
        (["stge=align"], "did you mean stage="),
        (["stage=align", "size=7b"], "Released sizes need a GPU"),
        (["stage=dpo", "tiles=3"], "tiles=3: give one of 1, 5"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Arguments.parse(arguments)


# ---- the page


def test_the_page_has_the_figures_of_its_json_files():
    """Figures that are not measured yet are empty on the page."""
    text, results = page.PAGE.read_text(encoding="utf-8"), page.read_results(RESULTS)
    shown = re.findall(
        r"<!-- figures of benchmarks/results/(\w+)\.json: (\w+) -->\n(.*?)<!-- /figures -->", text, re.DOTALL
    )
    assert len(shown) == text.count("<!-- figures of") > 10
    for name, title, table in shown:
        assert table.strip() == (report.render_tables(results[name])[title] if name in results else ""), (name, title)
    for name in re.findall(r"\(images/(compare_\w+)\.svg\)", text):
        assert (page.PICTURES / f"{name}.svg").read_text(encoding="utf-8") == page.draw_chart(results[name]), name


def test_a_bar_below_the_target_is_a_share_of_its_bound():
    for path in RESULTS.glob("compare_*.json"):
        for bar in json.loads(path.read_text()).get("bars", []):
            assert bar["bar"] == (bar["asked"] if bar["bound"] >= bar["asked"] else pytest.approx(0.85 * bar["bound"]))
            assert bar["reached"] == (bar["cpu"] is not None and bar["cpu"] >= bar["bar"])


def test_the_page_of_benchmarks_has_the_table_of_the_three_classes():
    result = json.loads(classes.RESULT.read_text(encoding="utf-8"))
    text = (page.PAGE.parent / "benchmarks.md").read_text(encoding="utf-8")
    assert f"<!-- table of benchmarks/results/classes.json -->\n{classes.make_table(result)}\n" in text
    assert result["date"] in text and set(result["classes"]) == set(ModelClass)

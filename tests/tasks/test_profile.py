"""Tests of trainer.profile=true: it writes a page and does not change the model."""

import pytest
import torch
from run_helpers import make_conversations, run, save_photos, write_records

from lit_vlm.reports.profile.summary import summarize_trace
from lit_vlm.reports.profile.trace import read_trace

ABOUT = {"name": "run", "device": "CPU", "precision": "32-true", "tokens": 1, "tiles": 1}


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    save_photos(folder)
    data = write_records(folder / "llava.json", make_conversations())
    names = ["data=llava_json", f"data.sources.mine.path={data}", f"run_dir={folder / 'runs'}", "callbacks=[export]"]
    return [*names, "stage=sft", "stage.learning_rate=1e-3", "trainer.max_steps=5"]


def read_facts(run_output, steps):
    return summarize_trace(read_trace(run_output.dir / "profile_trace.json.gz"), steps, **ABOUT)


def test_the_page_shows_where_the_time_is_spent_and_the_model_is_the_same(overrides):
    small = [
        *overrides,
        "data.tokens_per_micro_batch=600",
        "data.tiles_per_micro_batch=10",
        "data.validation.every_steps=4",
    ]
    plain, profiled = run(*small), run(*small, "trainer.profile=true")
    assert profiled.dir != plain.dir and not (plain.dir / "profile.html").exists()
    profiled_weights = profiled.load_weights()
    assert all(torch.equal(tensor, profiled_weights[key]) for key, tensor in plain.load_weights().items())
    page = (profiled.dir / "profile.html").read_text(encoding="utf-8")
    for text in ("profile of 3 steps", "Where a step&#39;s time goes", "Matrix products", "forward: vision tower"):
        assert text.replace("&#39;", "'") in page
    found = read_facts(profiled, 3)
    rows = {(row.phase, row.part) for row in found.rows}
    for phase in ("forward", "backward"):
        assert {(phase, part) for part in ("vision tower", "projector", "language model", "head")} <= rows
    assert {("data", ""), ("optimizer", "")} <= rows
    assert sum(row.busy + row.idle for row in found.rows) == pytest.approx(found.milliseconds, rel=0.02)
    assert found.products[0].dtype == "fp32" and 0 < found.product_time < found.milliseconds
    assert 0 <= found.idle < found.milliseconds
    assert profiled.manifest["plan"]["k"] > 1


def test_a_run_in_bfloat16_has_no_float32_product_and_one_step_is_enough(overrides):
    run_output = run(*overrides, "trainer.profile=true", "trainer.precision=bf16-mixed", "trainer.max_steps=1")
    page = (run_output.dir / "profile.html").read_text(encoding="utf-8")
    assert "profile of 1 step<" in page and "bf16" in page and "float32" not in page


def test_debug_profile_is_a_short_run_with_a_page_that_separates_the_dpo_reference_model(overrides, tmp_path):
    pairs = write_records(
        tmp_path / "pairs.jsonl", [{"prompt": f"{n}?", "chosen": "a", "rejected": "b"} for n in range(30)]
    )
    base = [*overrides, "stage=dpo", "data=preference", f"data.sources.mine.path={pairs}", "trainer.max_steps=50"]
    run_output = run(*base, "debug=profile")
    assert run_output.manifest["plan"]["steps"] == 6
    assert ("forward", "reference") in {(row.phase, row.part) for row in read_facts(run_output, 3).rows}

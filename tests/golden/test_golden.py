"""Tests that measure the recorded behaviour again and compare it; `net.py` defines and records it."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

import net

pytestmark = pytest.mark.long

LOSS_BOUND = 1e-5  # relative, of SGD on another processor: the bound of packed against single samples
ADAM_BOUND = 1e-3  # Adam divides by the root of tiny squares, so the order of a sum has more effect


def read_recorded(part: str) -> dict:
    file = net.HERE / f"{part}.json"
    if not file.is_file():
        pytest.skip(f"not recorded: python tests/golden/net.py {part}")
    return json.loads(file.read_text(encoding="utf-8"))


def convert_to_json(value):
    return json.loads(json.dumps(value))


def test_a_plan_gives_every_rank_the_same_samples_as_before():
    assert convert_to_json(net.measure_plans()) == read_recorded("plans")


def test_every_format_gives_the_same_token_ids_masks_and_tiles_as_before():
    assert convert_to_json(net.measure_forms()) == read_recorded("forms")


def test_every_documented_command_names_the_same_run_with_the_same_settings_as_before():
    before = read_recorded("commands")
    assert net.measure_commands() == before


def test_a_run_leaves_the_same_files_and_keys_as_before():
    assert net.measure_keys() == read_recorded("keys")


def test_a_user_error_reads_as_before():
    before = read_recorded("errors")
    assert net.measure_errors() == before


def test_losses_and_weights_after_eight_steps_of_each_stage_are_the_same_as_before():
    compare_runs(net.measure_runs(), read_recorded("runs"))


def test_a_recorded_run_killed_at_step_4_resumes_and_ends_as_before():
    after, output = net.resume_begun("begun")
    compare_runs(after, read_recorded("begun"))
    assert "step 4" in output, output


def test_a_recorded_finished_run_is_reported_as_finished_and_unchanged():
    after, output = net.resume_begun("finished")
    after["begun"] = after.pop("finished")
    compare_runs(after, read_recorded("begun"))
    assert "finished already" in output, output


def compare_runs(after: dict, before: dict) -> None:
    """Compare bit by bit on the processor that made the files, and within a bound on another one."""
    same = after.pop("processor") == before.pop("processor")
    assert after.keys() == before.keys()
    for name, now in after.items():
        then = before[name]
        assert now["figures"] == then["figures"], name
        if same:
            assert (now["losses"], now["weights"]) == (then["losses"], then["weights"]), name
        bound = LOSS_BOUND if name.endswith("SGD") else ADAM_BOUND
        assert all(math.isclose(a, b, rel_tol=bound) for a, b in zip(now["losses"], then["losses"], strict=True)), name
        assert now["norms"].keys() == then["norms"].keys(), name
        for key, norm in now["norms"].items():
            assert math.isclose(norm, then["norms"][key], rel_tol=bound, abs_tol=bound), (name, key)

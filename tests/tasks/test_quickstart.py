"""Tests of the quickstart at full length: the scores that the tiny model must reach."""

import json
import subprocess
import sys

import pytest
from transformers import AutoModelForImageTextToText

from benchmarks.quickstart import KIND_TITLES, RESULT, STAGES, compute_threshold
from lit_vlm.evaluation.exam import ALL_CELL, EXAM_FILE, read_answers
from lit_vlm.evaluation.exam_comparison import Verdict, compare_exams, format_verdicts


@pytest.fixture(scope="module")
def quickstart(repository, tmp_path_factory):
    """Run the four stages; returns the run folder and what was printed."""
    run_dir = tmp_path_factory.mktemp("quickstart")
    done = subprocess.run(
        [sys.executable, str(repository / "run.py"), f"run_dir={run_dir}"],
        capture_output=True,
        text=True,
        cwd=run_dir,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_quickstart_learns_to_describe_read_count_and_point_in_both_languages(quickstart):
    run_dir, printed = quickstart
    stages = [run_dir / "tiny" / name for name in STAGES]
    manifests = [json.loads((stage / "manifest.json").read_text()) for stage in stages]
    align, sft, highres, dpo = (manifest["figures"] for manifest in manifests)
    known = json.loads(RESULT.read_text(encoding="utf-8"))["stages"]  # the tables of the README are made of these
    for kind in KIND_TITLES:
        threshold = compute_threshold(known["2_sft"], kind)
        for language in ("ko", "en"):
            name = f"{kind}_{language}"
            assert sft["scores"]["before"][name] < 0.1 < threshold <= sft["scores"]["after"][name], name
    assert dpo["val/rewards/accuracies"] >= 0.8
    for stage, figures in zip(known, (align, sft, highres, dpo), strict=True):
        assert figures["samples"] == known[stage]["samples"][0], stage
        assert figures["tokens"] == pytest.approx(known[stage]["tokens"][0], rel=0.01), stage
    assert sft["samples"] > align["samples"] + highres["samples"] + dpo["samples"]
    assert max(figures["peak_memory_bytes"] for figures in (align, sft, highres, dpo)) < 3 * 2**30
    for parent, child in zip(manifests, manifests[1:], strict=False):
        assert child["parent"]["digest"] == parent["weights_digest"]
    assert "Held-out score after each stage" in printed
    assert (run_dir / "tiny" / "report.html").stat().st_size > 50_000
    assert AutoModelForImageTextToText.from_pretrained(stages[-1] / "hf").num_parameters() > 400_000


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_exam_of_the_quickstart_finds_what_sft_gained_and_no_stage_that_lost_as_a_whole(quickstart):
    for name, differences in compare_stages(quickstart):
        overall = next(one for one in differences if one.cell == ALL_CELL)
        assert overall.verdict is not Verdict.lost, (name, format_verdicts(differences))
        assert (name == "2_sft") <= (overall.verdict is Verdict.gained), (name, format_verdicts(differences))


@pytest.mark.long  # measured with one seed; another processor is another seed
@pytest.mark.timeout(2400)
def test_no_stage_of_the_quickstart_loses_in_a_cell_of_the_exam_that_it_takes(quickstart):
    for name, differences in compare_stages(quickstart):
        lost = [one.cell for one in differences if one.verdict is Verdict.lost]
        assert not lost, (name, format_verdicts(differences))


def compare_stages(quickstart):
    """Compare the exam of each stage with that of the stage before: pairs of stage and differences."""
    run_dir, _ = quickstart
    answers = [read_answers(run_dir / "tiny" / name / EXAM_FILE) for name in STAGES]
    assert all(answers)
    return [
        (name, compare_exams(before, after))
        for name, before, after in zip(STAGES[1:], answers, answers[1:], strict=False)
    ]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_runs_of_one_seed_on_one_machine_end_with_bitwise_equal_weights(repository, tmp_path):
    digests = set()
    for run_folder in ("first", "second"):
        overrides = [f"run_dir={tmp_path / run_folder}", "experiment=tiny/1_align", "trainer.max_steps=12"]
        done = subprocess.run(
            [sys.executable, str(repository / "run.py"), *overrides, "run_name=run", "data.validation.fraction=0.01"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        digests.add(json.loads((tmp_path / run_folder / "run/manifest.json").read_text())["weights_digest"])
    assert len(digests) == 1

"""Tests of the quickstart at full length: the scores that the tiny model must reach."""

import json
import subprocess
import sys

import pytest
from transformers import AutoModelForImageTextToText

from benchmarks.quickstart import KIND_TITLES, RESULT, compute_threshold


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_quickstart_learns_to_describe_read_count_and_point_in_both_languages(repository, tmp_path):
    done = subprocess.run(
        [sys.executable, str(repository / "run.py"), f"run_dir={tmp_path}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    stages = [tmp_path / "tiny" / name for name in ("1_align", "2_sft", "3_highres", "4_dpo")]
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
    assert "Held-out score after each stage" in done.stdout
    assert (tmp_path / "tiny" / "report.html").stat().st_size > 50_000
    assert AutoModelForImageTextToText.from_pretrained(stages[-1] / "hf").num_parameters() > 400_000


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

"""The report page: one self-contained file, safe, and complete whatever the run folder holds."""

import io
import json
import re

import pytest
from PIL import Image
from rich.console import Console
from support import list_english

from lit_vlm.formatting import format_duration, format_short
from lit_vlm.messages import set_language
from lit_vlm.reports.charts import ChartLine, compute_log_ticks, compute_ticks, draw_line_chart, reduce_points, smooth
from lit_vlm.reports.report import make_summary_row, make_summary_table, write_report
from lit_vlm.reports.run_record import read_run, split_group

INJECTION = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture
def folder(tmp_path):
    """Run folder of a finished run."""
    run = tmp_path / "2_sft"
    (run / "samples").mkdir(parents=True)
    Image.new("RGB", (224, 224), "red").save(run / "samples" / "a_before.png")
    Image.new("RGB", (224, 224), "blue").save(run / "samples" / "a_after.png")
    manifest = {
        "status": "finished",
        "name": "tiny/2_sft",
        "stage": "sft",
        "command": f"python run.py experiment=tiny/2_sft run_name='{INJECTION}'",
        "started": "2026-01-02T03:04:05+00:00",
        "finished": "2026-01-02T03:05:05+00:00",
        "git": {"commit": "0123456789abcdef", "dirty": True},
        "versions": {"torch": "2.13.0"},
        "data": {
            "mixture": [
                {"group": "source", "name": INJECTION, "size": 50, "size_tokens": 900, "drawn": 100, "repeats": 2.0}
                | {"asked": 0.2, "asked_in": "samples", "samples": 0.26, "tokens": 0.3},
                {"group": "source", "name": "b", "size": 500, "size_tokens": 9000, "drawn": 300, "repeats": 0.6}
                | {"asked": 0.8, "asked_in": "samples", "samples": 0.74, "tokens": 0.7},
                {"group": "language", "name": "ko", "size": 50, "size_tokens": 900, "drawn": 100, "repeats": 2.0}
                | {"asked": None, "asked_in": None, "samples": 0.26, "tokens": 0.3},
            ],
            "quarantined": {"b": 2},
            "unread": {"b": {f"model {INJECTION}": 1200, "messages[].name": 3}},
        },
        "trained": [
            {"part": "vision_tower", "parameters": 10, "trainable": 0, "how": "frozen"},
            {"part": "projector", "parameters": 18720, "trainable": 18720, "how": "all"},
        ],
        "plan": {"steps": 40, "k": 2, "global_batch_size": 10, "world_size": 1},
        "figures": {
            "steps": 40,
            "samples": 400,
            "tokens": 123456,
            "seconds": 61.0,
            "tokens_per_second": 2023.9,
            "loss_first": 6.5,
            "loss_last": 0.75,
            "data_wait": 0.021,
            "peak_memory_bytes": 2**30,
            "scores": {
                "before": {"caption_ko": 0.0, "multi_image_en": 0.5},
                "after": {"caption_ko": 0.9, "multi_image_en": 0.4},
            },
            "num_scored": {"caption_ko": 200, "multi_image_en": 10},
            "text_scores": {
                "before": {"chrf": {"caption_ko": 0.12}},
                "after": {"chrf": {"caption_ko": 0.87}, "anls": {"multi_image_en": 0.43}, INJECTION: {"x_ko": 0.5}},
            },
        },
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    rows = ["step,train/loss,val/loss,val/loss_ko,train/rewards/accuracies"]
    rows += [
        f"{step},{6.0 / (step + 1)},{'0.8' if step == 39 else ''},{'0.7' if step == 39 else ''},0.6"
        for step in range(40)
    ]
    (run / "metrics.csv").write_text("\n".join(rows) + "\n")
    sample = {"id": "x", "source": "s", "kind": "grounding", "language": "ko", "reference": "<obj>별</obj>"}
    sample["prompt"] = f"<image> {INJECTION} 어디?"
    lines = [
        {**sample, "phase": "before", "prediction": INJECTION, "score": 0.0, "images": ["samples/a_before.png"]},
        {
            **sample,
            "phase": "after",
            "prediction": "별\u2028끝",
            "score": 1.0,
            "text_scores": {"chrf": 0.77},
            "images": ["samples/a_after.png", "../../secret.png"],
        },
    ]
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (run / "samples.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    (run / "quarantine.jsonl").write_text(
        json.dumps({"source": "b", "origin": "t.jsonl:7", "reason": INJECTION}) + "\n"
    )
    (run / "config.yaml").write_text(f"run_name: {INJECTION}\n")
    return run


def render_page(folder, *more):
    path = folder.parent / "deep" / "report.html"
    write_report(path, [folder, *more], f"tiny {INJECTION}")
    return path.read_text(encoding="utf-8")


def test_the_report_is_one_file_that_loads_nothing(folder):
    page = render_page(folder)
    assert "http" not in page
    assert "@import" not in page and "url(" not in page and "<link" not in page
    sources = re.findall(r'\b(?:src|href)="([^"]*)"', page)
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)


def test_text_of_models_and_datasets_is_escaped(folder):
    page = render_page(folder)
    assert "<script" not in page
    assert "<img src=x" not in page
    assert (
        page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 7
    )  # title, command, source, prompt, prediction, reason, settings


def test_unread_keys_are_listed_with_their_counts(folder):
    page = render_page(folder)
    assert "b: nothing is read from model &lt;script&gt;" in page and "messages[].name (3)" in page


def test_pictures_outside_the_run_folder_are_not_embedded(folder):
    assert len(re.findall("<img ", render_page(folder))) == 2


def test_the_page_and_the_terminal_show_the_same_figures(folder):
    page = render_page(folder)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(make_summary_table([folder]))
    for text in (page, console.export_text()):
        for figure in (
            "tiny/2_sft",
            "1 min 1 s",
            "projector 18.7 k",
            "400",
            "123 k",
            "2,024",
            "6.50 \u2192 0.75",
            "0.25 \u2192 0.65",
        ):
            assert figure in text, figure
    assert "0123456789ab, with local changes" in page
    assert "0.00 \u2192 0.90" in page
    assert "chrF</th>" in page and "0.12 \u2192 0.87" in page and "ANLS</th>" in page and "0.43" in page
    assert 'title="chrF 0.77"' in page
    assert "held-out at the end 0.8 (ko 0.7)" in page
    assert "Reward accuracy" in page
    assert "26.0 %" in page and "2.00" in page  # share of the mixture and passes over the source
    assert "t.jsonl:7" in page
    assert "별\u2028끝" in page


def test_several_stages_are_compared(folder, tmp_path):
    second = tmp_path / "3_highres"
    second.mkdir()
    scores = {"before": {"caption_ko": 0.9}, "after": {"caption_ko": 0.3}}
    (second / "manifest.json").write_text(
        json.dumps({"name": "tiny/3_highres", "stage": "highres", "figures": {"scores": scores}})
    )
    page = render_page(folder, second)
    assert "Held-out score after each stage" in page
    assert page.index("<th colspan") < page.index("highres</th>")
    assert "0.30" in page
    assert "not finished" in page


@pytest.mark.parametrize("manifest", [None, "{}", '{"figures": null, "data": {}, "git": {}}', "{ half a fi"])
def test_an_empty_or_damaged_folder_still_has_a_page(manifest, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    if manifest is not None:
        (run / "manifest.json").write_text(manifest)
        (run / "samples.jsonl").write_text('{"phase": "before"}\n{"pha')
        (run / "metrics.csv").write_text("epoch,step,train/loss\n0,9,nan\n")
    assert "</html>" in render_page(run, tmp_path / "nowhere")
    make_summary_table([run])


def test_lines_are_smoothed_without_lag_and_thinned_without_losing_their_end():
    falling = [(step, 100.0 - step) for step in range(100)]
    assert smooth(falling, share=0.1) == falling
    long = [(step, float(step % 2)) for step in range(10_001)] + [(10_001, float("nan"))]
    assert len(reduce_points(long)) <= 400 and reduce_points(long)[-1][0] == 10_000


def test_ticks_are_round_numbers_between_the_ends():
    assert compute_ticks(0, 60) == [0, 20, 40, 60]
    assert compute_ticks(0.13, 0.41) == [0.2, 0.3, 0.4]
    assert compute_log_ticks(0.3, 6) == [0.5, 1, 2, 5]
    assert draw_line_chart([ChartLine("a", [], "main")], label="nothing") == ""
    assert "<circle" in draw_line_chart([ChartLine("one point", [(0, 1.0)], "main")], label="one")


def test_a_curve_of_two_points_is_a_table(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n0,3.5\n9,1.25\n", encoding="utf-8")
    (tmp_path / "manifest.json").write_text(json.dumps({"data": {"num_held_out": 0}}), encoding="utf-8")
    write_report(tmp_path / "report.html", [tmp_path], "two steps")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<svg" not in page and "step 10" in page and "3.5" in page and "1.25" in page
    assert "No sample was held out" in page and "data.validation.fraction=0.1" in page
    assert "Answers to held-out samples" not in page


def test_numbers_are_formatted_for_readers(tmp_path):
    counts = {0: "0", 9999: "9,999", 12_345: "12.3 k", 456_000: "456 k", 4_560_000: "4.56 M", 7.2e9: "7.20 G", None: ""}
    assert [format_short(count) for count in counts] == list(counts.values())
    assert [format_duration(s) for s in (3.54, 61, 3_720, None)] == ["3.5 s", "1 min 1 s", "1 h 2 min", ""]
    assert split_group("multi_image_ko") == ("multi_image", "ko")
    assert read_run(tmp_path / "none").name == "none"


def test_the_page_is_korean_but_for_what_models_and_data_say(folder, tmp_path):
    set_language("ko")
    page = render_page(folder)
    assert '<html lang="ko">' in page and "검증 샘플의 답변" in page and "학습 손실" in page
    assert list_english(page, INJECTION) == []


def test_the_summary_of_a_preference_stage_has_reward_and_ranking_accuracy(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["figures"] |= {
        "val/rewards/accuracies": 0.845,
        "val/reference_ranking_accuracy": 0.9,
        "val/ranking_accuracy": 0.94,
    }
    path.write_text(json.dumps(manifest))
    scores = make_summary_row(read_run(folder))[-1]
    assert scores[1:3] == ["reward accuracy 0.84", "ranking accuracy 0.90 → 0.94"]

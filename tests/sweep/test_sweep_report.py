"""Report page and tables of a sweep: complete, escaped, and with a note on reliability if there are few trials."""

import math
import re
from pathlib import Path

import pytest
from browsing import browser, find_page_faults  # noqa: F401
from rich.console import Console
from support import list_english

from lit_vlm.messages import set_language
from lit_vlm.sweep.report import (
    SweepReport,
    compute_axis_range,
    compute_relative_ranks,
    draw_trials,
    make_parameter_table,
    make_trial_table,
    write_sweep_report,
)
from lit_vlm.sweep.results import (
    TrialRecord,
    compute_importance,
    find_best_trial,
    find_varying_keys,
    get_reliability_note,
    list_edge_warnings,
)
from lit_vlm.sweep.sweep_file import Goal, parse_sweep

INJECTION = "<script>alert(1)</script>"
PARAMETERS = {
    "stage.learning_rate": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1},
    "stage.warmup": {"min": 0.0, "max": 0.3},
    "data.tiling": {"values": ["base", "anyres", INJECTION]},
    "seed": {"value": 3},
}


def make_sweep(goal="minimize", **keys):
    settings = {"method": "random", "metric": {"name": "val/loss", "goal": goal}, "parameters": PARAMETERS, **keys}
    return parse_sweep(settings, "sweeps/x.yaml")


def make_record(number: int, value: float | None = 1.0, state: str = "finished", **changed) -> TrialRecord:
    rate = 10 ** (-4 + 3 * ((number * 7) % 13) / 13)
    parameters = {
        "stage.learning_rate": rate,
        "stage.warmup": 0.02 * ((number * 5) % 13),
        "data.tiling": "base",
        "seed": 3,
    }
    return TrialRecord(number, parameters | changed, value, state, Path(f"runs/sweeps/x/{number}"), 61.0 + number)


def make_bowl_record(number: int) -> TrialRecord:
    """Return a trial whose value depends on the learning rate and hardly on the warm-up."""
    one = make_record(number)
    rate, warmup = one.parameters["stage.learning_rate"], one.parameters["stage.warmup"]
    return make_record(number, abs(math.log10(rate) + 1) + 0.01 * warmup)


def render_page(tmp_path, records, **keys) -> str:
    write_sweep_report(tmp_path / "sweep.html", SweepReport(make_sweep(), records, **keys))
    return (tmp_path / "sweep.html").read_text(encoding="utf-8")


def print_to_text(table) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_the_page_is_complete_and_self_contained(tmp_path):
    records = [make_bowl_record(n) for n in range(12)] + [
        make_record(12, 0.9, "stopped"),
        make_record(13, None, "failed"),
        make_record(14, None, "running"),
    ]
    text = render_page(tmp_path, records, total=20, command="python run.py a='한글 x'", carried="python run.py b=1")
    assert "<script" not in text and "http" not in text and " src=" not in text
    for word in ("15 of 20 trials: 12 finished, 1 stopped early, 1 failed, 1 under way", "한글 x", "python run.py b=1"):
        assert word in text
    assert text.count('<polyline class="trial') == 15
    assert text.count('class="trial best"') == 1 and text.count('class="trial stopped"') == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "sweep.html"]


def test_text_of_a_sweep_file_is_escaped(tmp_path):
    records = [make_bowl_record(0), make_record(1, 2.0, **{"data.tiling": INJECTION}), make_record(2, None, "failed")]
    text = render_page(tmp_path, records, command=INJECTION, carried=INJECTION)
    assert "<script" not in text and text.count("&lt;script&gt;") >= 3


@pytest.mark.parametrize(
    "records",
    [
        [],
        [make_record(0)],
        [make_record(0, None, "failed")],
        [make_record(0), make_record(1)],
        [make_record(n, None, "running") for n in range(3)],
    ],
)
def test_a_page_with_few_trials_reports_low_reliability(tmp_path, records):
    text = render_page(tmp_path, records)
    assert ("No trial has finished" in text) == (find_best_trial(records, "minimize") is None)
    assert "say nothing about which parameter matters" in text


def test_the_best_trial_is_a_finished_one_by_the_goal():
    records = [
        make_record(0, 3.0),
        make_record(1, 1.0, "stopped"),
        make_record(2, 2.0),
        make_record(3, 2.0),
        make_record(4, None),
    ]
    assert (find_best_trial(records, "minimize").number, find_best_trial(records, "maximize").number) == (2, 0)


def test_lines_of_the_chart_are_at_their_values():
    records = [
        make_record(0, 1.0, **{"stage.learning_rate": 1e-4}),
        make_record(1, 3.0, **{"stage.learning_rate": 1e-1}),
    ]
    records.append(make_record(2, 2.0, **{"stage.learning_rate": math.sqrt(1e-5)}))
    svg = draw_trials(records, make_sweep())
    points = {
        int(n): [tuple(map(float, p.split(","))) for p in path.split()]
        for path, n in re.findall(r'points="([^"]+)"><title>trial (\d)', svg)
    }
    bottom, top, middle = (points[n][0][1] for n in range(3))
    assert bottom > middle > top and middle == pytest.approx((bottom + top) / 2, abs=0.2)  # the axis is logarithmic
    ends = [points[n][-1][1] for n in (0, 2, 1)]
    assert ends == sorted(ends)  # the lowest loss is on top


@pytest.mark.parametrize(("goal", "sign"), [(Goal.minimize, 1.0), (Goal.maximize, -1.0)])
def test_a_diverged_trial_does_not_compress_the_axis(goal, sign):
    values = [sign * value for value in (1.0, 1.1, 1.2, 1.3, 1e9)]
    low, high = compute_axis_range(values, goal)
    assert high - low == pytest.approx(6 * 0.2) and sign in (low, high)
    assert compute_axis_range(values[:4], goal) == (min(values[:4]), max(values[:4]))


def test_colours_follow_the_rank():
    assert compute_relative_ranks([make_record(0, 1.0), make_record(1, 1e9), make_record(2, 2.0)], Goal.minimize) == {
        0: 1.0,
        1: 0.0,
        2: 0.5,
    }


def test_importance_and_direction_follow_the_data():
    first, second = compute_importance([make_bowl_record(n) for n in range(13)], make_sweep())
    assert (first.key, first.direction) == ("stage.learning_rate", "higher is better")
    assert first.share > 0.8 > second.share and first.correlation == pytest.approx(-1.0)
    better = compute_importance([make_bowl_record(n) for n in range(13)], make_sweep("maximize"))[0]
    assert better.direction == "lower is better"


def test_a_diverged_trial_does_not_dominate_the_importance():
    records = [*(make_bowl_record(n) for n in range(12)), make_record(12, 1e12, **{"stage.warmup": 0.24})]
    assert compute_importance(records, make_sweep())[0].key == "stage.learning_rate"


def test_the_best_category_is_named():
    chosen = [n // 3 % 2 for n in range(12)]
    records = [
        make_record(n, one + 0.01 * n, **{"data.tiling": ("base", "anyres")[one]}) for n, one in enumerate(chosen)
    ]
    found = {one.key: one for one in compute_importance(records, make_sweep())}
    assert found["data.tiling"].direction == "best: base" and found["data.tiling"].share > 0.5


def test_few_trials_give_only_a_hint():
    assert "a hint at the order" in get_reliability_note([make_record(n) for n in range(12)])
    assert compute_importance([make_bowl_record(n) for n in range(3)], make_sweep()) == []
    assert "hint" not in get_reliability_note([make_record(n) for n in range(60)])


def test_a_best_value_at_the_end_of_its_range_gives_a_warning():
    inside, below = make_record(8, 1.0), make_record(1, 0.5, **{"stage.learning_rate": 1.05e-4})
    assert list_edge_warnings([inside], make_sweep()) == []
    (warning,) = list_edge_warnings([inside, below], make_sweep())
    assert warning.startswith("stage.learning_rate: the best value, 0.000105, is at the lower end")


def test_only_varying_parameters_are_shown():
    assert find_varying_keys([make_bowl_record(0), make_bowl_record(1)]) == ["stage.learning_rate", "stage.warmup"]


def test_the_terminal_shows_the_same_as_the_page(tmp_path):
    text = print_to_text(
        make_trial_table(SweepReport(make_sweep(), [make_bowl_record(n) for n in range(12)], total=12))
    )
    assert "12 of 12 trials: 12 finished" in text and "stage.learning_rate: " in text and "hint at the order" in text
    assert "0.0001 to 0.1, logarithmic" in print_to_text(make_parameter_table(make_sweep()))


def test_the_page_is_korean(tmp_path):
    set_language("ko")
    records = [*map(make_bowl_record, range(12)), make_record(12, None, "failed"), make_record(13, 0.9, "stopped")]
    page = render_page(tmp_path, records, total=20)
    assert '<html lang="ko">' in page and "트라이얼 20개 중 14개: 완료 12개, 조기 종료 1개, 실패 1개" in page
    assert list_english(page) == []


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "ko"])
def test_the_page_fits_phone_and_paper(language, tmp_path, browser):  # noqa: F811
    set_language(language)
    records = [*map(make_bowl_record, range(12)), make_record(12, None, "failed"), make_record(13, 0.9, "stopped")]
    command = "python run.py task=sweep sweep=sweeps/x.yaml"
    assert f"<code>{command}</code>" in render_page(tmp_path, records, total=20, own_command=command)
    assert find_page_faults(browser, tmp_path / "sweep.html") == []

"""The fixed exam: its items, token obedience, the file of answers, and the paired comparison of two models."""

import hashlib
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from lit_vlm.config.parse import parse
from lit_vlm.config.ranges import SEED
from lit_vlm.data.sources import open_source
from lit_vlm.data.synthetic import PATHS
from lit_vlm.evaluation import exam
from lit_vlm.evaluation.exam import (
    EXAM_SEED,
    KINDS,
    ExamAnswers,
    ExamLog,
    compute_obedience,
    find_missing_items,
    get_identity,
    list_exam_metrics,
    make_items,
    read_answers,
    score_answer,
)
from lit_vlm.evaluation.exam_comparison import (
    ERROR_RATE,
    Verdict,
    compare_exams,
    compute_interval,
    format_verdicts,
)
from lit_vlm.types import Language, SampleKind, UserError

OBJECT = "<obj>빨간 원</obj><bbox>0.1, 0.3, 0.5, 0.8</bbox>"
LINE = "<char>백범로</char><bbox>0.1, 0.1, 0.5, 0.3</bbox>"


def answer_exam(tmp_path, answer, items_per_cell=3, name="exam.jsonl") -> ExamAnswers:
    """Answer the exam with a function of the item that returns a text."""
    rows = [score_answer(item, answer(item)) for item in make_items(items_per_cell)]
    return ExamAnswers(tmp_path / name, get_identity(), name, rows)


def get_reference(item) -> str:
    return item.sample.messages[-1].text


# ---- items


def test_each_kind_and_language_has_at_least_300_distinct_items_easy_and_hard():
    counts = Counter((item.kind, item.sample.language, item.hard) for item in make_items())
    assert {kind for kind, _, _ in counts} == {kind for kind in PATHS if kind is not SampleKind.preference}
    for kind in KINDS:
        for language in (Language.ko, Language.en):
            assert counts[kind, language, False] + counts[kind, language, True] >= 300
            assert min(counts[kind, language, False], counts[kind, language, True]) >= 100
            contents = [i.content for i in make_items() if (i.kind, i.sample.language) == (kind, language)]
            assert len(set(contents)) == len(contents)
    assert {item.instruction for item in make_items()} == {"gro", "ocr", "plain"}


def list_contents(sources, seed, *, held_out, count=150):
    """List the hashes of the first records of sources, as the exam hashes its items."""
    contents = set()
    for name, settings in sources.items():
        source = open_source(name, settings, max_image_pixels=10**8, seed=seed, held_out=held_out)
        contents |= {
            exam.ExamItem(source[number], 0, False).content
            for number in range(min(count, len(source)))
            if source[number].images or not held_out  # held-out texts come from one small world
        }
    return contents


@pytest.mark.parametrize(("stage", "seed"), [("2_sft", 0), ("3_highres", 2**32 - 1)])
def test_no_item_is_trained_on_or_held_out_by_any_run(stage, seed):
    """The seed of the exam is no setting; and the records themselves differ, here for the smallest and the largest seed."""
    assert not SEED.contains(EXAM_SEED)
    own = {item.content for item in make_items()}
    data = parse([f"experiment=tiny/{stage}"]).config.data
    assert not own & list_contents(data.sources, seed, held_out=False)
    assert not own & list_contents(data.validation.sources, seed, held_out=True)


def test_a_smaller_exam_is_a_part_of_a_larger_one():
    ids = [{item.sample.id for item in make_items(number)} for number in (1, 2, 7, None)]
    assert all(small < large for small, large in pairwise(ids))
    assert len(ids[0]) == 56 and len(ids[3]) == 8400


def test_the_items_are_those_of_this_version_of_the_exam():
    """If this fails, the items have changed: increase EXAM_VERSION."""
    samples = [item.sample for item in make_items(1)]
    texts = "|".join(message.text for sample in samples for message in sample.messages)
    assert exam.EXAM_VERSION == 1
    assert samples[1].id == f"caption-ko-hard-held_out-{EXAM_SEED}-0"
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "934d20ee34447363"


# ---- obedience


@pytest.mark.parametrize(
    ("instruction", "answer", "obeys"),
    [
        ("gro", OBJECT, 1),
        ("gro", f"여기 있습니다: {OBJECT}.", 1),
        ("gro", "빨간 원", 0),
        ("gro", LINE, 0),
        ("gro", "<obj>빨간 원</obj><bbox>0.1, 0.3, 0.5</bbox>", 0),  # three numbers
        ("gro", "<obj>빨간 원</obj><bbox>0.5, 0.3, 0.1, 0.8</bbox>", 0),  # reversed
        ("gro", "<obj>빨간 원</obj><bbox>0.1, 0.3, 0.5, 0.8", 0),  # cut
        ("gro", "", 0),
        ("ocr", f"{LINE}\n{LINE}", 1),
        ("ocr", "백범로", 0),
        ("ocr", OBJECT, 0),
        ("plain", "빨간 원", 1),
        ("plain", "", 1),
        ("plain", OBJECT, 0),
        ("plain", LINE, 0),
        ("plain", "<bbox>", 0),
    ],
)
def test_gro_asks_for_boxes_ocr_for_text_lines_and_a_plain_question_for_neither(instruction, answer, obeys):
    assert compute_obedience(instruction, answer) == obeys


def test_reference_answers_score_one_and_obey_in_every_cell(tmp_path):
    cells = answer_exam(tmp_path, get_reference).collect_cells()
    assert len(cells) == 56 + 12 + 1
    assert all(set(scores) == {1.0} for scores in cells.values())


def test_means_have_the_names_under_which_they_are_logged(tmp_path):
    means = answer_exam(tmp_path, lambda item: get_reference(item) if item.kind == "word" else "").compute_means()
    assert list(means) == list_exam_metrics()
    assert means["exam/word_ko"] == means["exam/obeys_plain_en"] == 1.0
    assert means["exam/caption_ko"] == means["exam/obeys_gro_ko"] == 0.0
    assert means["exam/mean"] == pytest.approx(1 / 14)


# ---- the file


def test_an_interrupted_exam_resumes_and_asks_no_item_twice(tmp_path):
    items = make_items(2)
    log = ExamLog(tmp_path / "exam.jsonl", "abc", "folder")
    assert log.open(overwrite=False).rows == []
    log.append([score_answer(item, "") for item in items[:50]])
    with log.path.open("ab") as stream:
        stream.write(b'{"id": "cut off')
    answers = log.open(overwrite=False)
    assert len(answers.rows) == 50 and answers.items_per_cell == 0
    missing = list(find_missing_items(answers, items))
    assert missing == list(items[50:])
    log.append([score_answer(item, "") for item in missing])
    answers = log.open(overwrite=False)
    assert not list(find_missing_items(answers, items)) and answers.items_per_cell == 2
    assert len(list(find_missing_items(answers, make_items(3)))) == 56  # more items go on where these end


def test_answers_of_other_weights_are_kept_under_another_name(tmp_path):
    path = tmp_path / "exam.jsonl"
    for weights in ("0123456789abcdef", "new"):
        log = ExamLog(path, weights, "folder")
        assert log.open(overwrite=False).rows == []
        log.append([score_answer(item, weights) for item in make_items(1)])
    assert read_answers(path).weights == "new"
    assert read_answers(tmp_path / "exam-0123456789ab.jsonl").rows[0]["answer"] == "0123456789abcdef"


def test_a_file_of_something_else_is_refused_and_stays(tmp_path):
    path = tmp_path / "exam.jsonl"
    path.write_text("mine\n", encoding="utf-8")
    with pytest.raises(UserError, match="was not written by task=exam"):
        ExamLog(path, "abc", "folder").open(overwrite=True)
    assert path.read_text(encoding="utf-8") == "mine\n"


@pytest.mark.parametrize("changed", [{"version": 2}, {"seed": 1}, {"generator_version": 99}])
def test_answers_to_another_exam_are_not_compared(tmp_path, changed):
    now = answer_exam(tmp_path, get_reference, 1)
    old = ExamAnswers(tmp_path / "old.jsonl", now.identity | changed, "old", now.rows)
    (name,) = changed
    with pytest.raises(UserError, match=rf"different exams \({name}: .*task=exam again"):
        compare_exams(old, now)


def test_answers_to_other_items_are_not_compared(tmp_path):
    now = answer_exam(tmp_path, get_reference, 2)
    with pytest.raises(UserError, match=r"different items \(56 are in one"):
        compare_exams(now, now.take(1))
    rows = [now.rows[0] | {"content": "another picture"}, *now.rows[1:]]
    with pytest.raises(UserError, match=r"different items \(2 are in one"):
        compare_exams(now, ExamAnswers(now.path, now.identity, "x", rows))


# ---- the comparison


def make_cell(*, gained: int = 0, lost: int = 0, total: int = 100) -> np.ndarray:
    return np.concatenate([np.ones(gained), -np.ones(lost), np.zeros(total - gained - lost)])


def test_a_stage_that_learns_one_kind_and_forgets_another_has_gained_and_lost_just_there(tmp_path):
    before = answer_exam(tmp_path, lambda item: get_reference(item) if item.kind == "word" else "-", 30)
    after = answer_exam(tmp_path, lambda item: get_reference(item) if item.kind == "caption" else "-", 30)
    verdicts = {one.cell: one.verdict for one in compare_exams(before, after)}
    cells = [f"{language}_{level}" for language in ("ko", "en") for level in ("easy", "hard")]
    assert {cell for cell, verdict in verdicts.items() if verdict is Verdict.gained} == {f"caption_{c}" for c in cells}
    assert {cell for cell, verdict in verdicts.items() if verdict is Verdict.lost} == {f"word_{c}" for c in cells}
    text = format_verdicts(compare_exams(before, after))
    assert text.startswith("gained in 4 of 69 cells, lost in 4 (word ko easy -1.00 [") and "no difference in 61" in text


def test_a_few_changed_answers_are_no_difference():
    assert compute_interval(make_cell(gained=8), 69)[0] <= 0  # 1/128 by chance, and there are 69 cells
    assert compute_interval(make_cell(gained=20), 69)[0] > 0
    assert compute_interval(make_cell(lost=20), 69)[1] < 0
    assert compute_interval(make_cell(), 69) == pytest.approx((0, 0), abs=0.06)


def test_more_cells_make_wider_intervals_and_one_cell_has_the_plain_95_percent():
    differences = make_cell(gained=20, lost=8)
    one, many = compute_interval(differences, 1), compute_interval(differences, 69)
    assert many[0] < one[0] < 0.12 < one[1] < many[1]
    error = differences.std() / 10
    assert one[1] - one[0] == pytest.approx(2 * 1.96 * error, rel=0.1)


def draw_null(rng: np.random.Generator, num_cases: int, num_cells: int, num_items: int):
    """Draw the gained and lost items of two models that are equally good; the share of changed answers differs by cell."""
    changed = rng.binomial(num_items, rng.uniform(0, 0.6, (num_cases, num_cells)))
    gained = rng.binomial(changed, 0.5)
    return gained, changed - gained


@pytest.mark.parametrize("num_items", [25, pytest.param(150, marks=pytest.mark.slow)])
def test_of_unchanged_models_at_least_95_percent_have_no_cell_that_gained_or_lost(num_items):
    num_cases, num_cells = 400, 69
    gained, lost = draw_null(np.random.default_rng(0), num_cases, num_cells, num_items)
    intervals = {
        (up, down): compute_interval(make_cell(gained=up, lost=down, total=num_items), num_cells)
        for up, down in set(zip(gained.ravel().tolist(), lost.ravel().tolist(), strict=True))
    }
    wrong = {pair for pair, (low, high) in intervals.items() if low > 0 or high < 0}
    cases = [
        any(pair in wrong for pair in zip(ups, downs, strict=True))
        for ups, downs in zip(gained.tolist(), lost.tolist(), strict=True)
    ]
    print(f"family-wise error {np.mean(cases):.4f}")
    assert np.mean(cases) <= ERROR_RATE


def test_a_paired_comparison_finds_what_an_unpaired_one_misses():
    """Two models agree on 90 of 100 items; the difference of their means is 0.1, far below the spread of two samples."""
    before = np.array([1.0] * 45 + [0.0] * 55)
    after = np.array([1.0] * 55 + [0.0] * 45)
    low, _ = compute_interval(after - before, 1)
    error = np.sqrt(before.var() / 100 + after.var() / 100)
    assert low > 0 > (after.mean() - before.mean()) - 1.96 * error


def test_a_comparison_gives_the_same_intervals_each_time():
    differences = np.random.default_rng(1).uniform(-1, 1, 60)
    first = compute_interval(differences, 12)
    assert compute_interval(np.random.default_rng(2).permutation(differences), 12) == first

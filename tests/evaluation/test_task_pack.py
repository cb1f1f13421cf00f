"""The scorers of the task pack, loaded as lmms-eval loads them: worked cases from each definition, and awkward answers."""

import base64
import importlib.util
import io
import json
import math
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from PIL import Image

from lit_vlm.evaluation.harness import read_task
from lit_vlm.evaluation.task_pack import box_scores
from lit_vlm.evaluation.task_pack.box_scores import match_boxes
from lit_vlm.evaluation.task_pack.choice_letters import read_choice_letter
from lit_vlm.evaluation.task_pack.popeval import compute_popeval, count_characters, make_region
from lit_vlm.evaluation.task_pack.task_rows import aggregate_mean, load_picture
from lit_vlm.types import SPECIAL_TOKENS

PACK = Path(box_scores.__file__).parent
PUBLISHED = json.loads(Path(__file__).with_name("published_rules.json").read_text(encoding="utf-8"))
OPTIONS = {"A": "빨간 원", "B": "파란 네모", "C": "노란 별", "D": "원"}


def load_task(name: str):
    """Load the Python file of a set by its path, without the package around it."""
    path = next(PACK.glob(f"*/{name}.py"))
    spec = importlib.util.spec_from_file_location(f"pack_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kreta, k_viscuit, koffvqa = load_task("kreta"), load_task("k_viscuit"), load_task("koffvqa")
ocr, grounding, captions = load_task("ocr_popeval"), load_task("grounding"), load_task("korean_captions")


# ---- the YAML files


class TaskLoader(yaml.SafeLoader):
    """YAML loader that keeps `!function module.name` as its text."""


TaskLoader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_every_function_that_a_task_names_exists():
    tasks = 0
    for path in [*PACK.glob("*/*.yaml"), *PACK.glob("*/_*_yaml")]:
        content = yaml.load(path.read_text(encoding="utf-8"), TaskLoader)
        names = [value for key, value in content.items() if key.startswith(("doc_to", "process")) and "." in str(value)]
        names += [metric["aggregation"] for metric in content.get("metric_list", [])]
        for name in names:
            module, _, function = name.partition(".")
            assert callable(getattr(load_task(module), function)), f"{path}: {name}"
        tasks += "task" in content
    assert tasks == 10


def test_the_digest_of_a_task_changes_with_a_score_that_tasks_share(tmp_path):
    shutil.copytree(PACK, tmp_path / "pack")
    task, shared = tmp_path / "pack/kreta/kreta_direct.yaml", tmp_path / "pack/choice_letters.py"
    _, before = read_task(task)
    assert read_task(task)[1] == before
    shared.write_text(shared.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    assert read_task(task)[1] != before


@pytest.mark.parametrize(
    ("module", "yaml_name", "row"),
    [
        (kreta, "kreta.yaml", dict.fromkeys("ABCD", "x") | {"answer": "A"}),
        (k_viscuit, "k_viscuit.yaml", {"options": list("wxyz"), "answer": 0}),
        (captions, "xm3600_ko.yaml", {"captions": ["빨간 원"]}),
        (grounding, "_grounding_template_yaml", {"answer": "<obj>원</obj><bbox>0, 0, 1, 1</bbox>"}),
        (ocr, "_popeval_template_yaml", {"ground_truth": "0,0,9,0,9,9,0,9,가", "image": Image.new("RGB", (9, 9))}),
    ],
)
def test_every_metric_of_a_task_is_scored_and_an_empty_answer_is_wrong(module, yaml_name, row):
    content = yaml.load(next(PACK.glob(f"*/{yaml_name}")).read_text(encoding="utf-8"), TaskLoader)
    scores = module.score_answer(row, [""])
    assert {metric["metric"] for metric in content["metric_list"]} <= scores.keys()
    for metric in content["metric_list"]:
        value = getattr(module, metric["aggregation"].partition(".")[2])([scores[metric["metric"]]])
        worst = 0 if metric["higher_is_better"] else 100
        best = {"kreta_acc_guess": 25.0, "grounding_outside": 0.0}.get(metric["metric"], worst)
        assert value == best or math.isnan(value), metric["metric"]


# ---- letters


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("a", "A"),
        ("(A)", "A"),
        ("A. 빨간 원", "A"),
        ("B) 파란 네모", "B"),
        ("Ａ", "A"),
        ("（Ａ）", "A"),
        ("정답은 A입니다", "A"),
        ("정답은 Ａ입니다.", "A"),
        ("답은 B 입니다", "B"),
        ("A입니다", "A"),
        ("정답: (B)", "B"),
        ("Answer: **D**", "D"),
        ("The answer is C.", "C"),
        ("I think the answer is option B", "B"),
        ("선택지 중 A가 정답입니다", "A"),
        ("A가 아니라 B입니다. 정답은 B입니다.", "B"),
        ("답: A\n\n설명: B는 네모이다.", "A"),
        ("B가 아니라 A입니다.", "A"),
        ("A입니다. B는 아닙니다.", "A"),
        ("It is A, not B", "A"),
        ("A가 아닙니다", None),
        ("파란 네모", "B"),
        ("빨간 원입니다.", "A"),  # D's "원" is part of it
        ("원", "D"),
        # None or several
        ("", None),
        ("모르겠습니다", None),
        ("죄송하지만 답할 수 없습니다.", None),
        ("I'm sorry, but I cannot help with that.", None),
        ("A와 B 모두", None),
        ("A, B", None),
        ("정답은 A 또는 B", None),
        ("The answer is A and B", None),
        ("A. 빨간 원\nB. 파란 네모", None),
        ("빨간 원과 파란 네모", None),
        ("정답은 E입니다", None),
        # No letters of an option
        ("A man is standing", None),
        ("A 3D model", None),
        ("CAT", None),
        ("B4 용지", None),
    ],
)
def test_a_letter_is_read_from_sentences_and_several_letters_are_none(answer, letter):
    assert read_choice_letter(answer, OPTIONS) == letter


# ---- KRETA


def test_kreta_reads_letters_as_the_published_script():
    letters = [case["letter"] for case in PUBLISHED["kreta"]]
    assert {*letters} == {None, "A", "B", "C", "D"}
    for case in PUBLISHED["kreta"]:
        options = dict(zip("ABCD", case["options"], strict=True))
        assert kreta.read_published_letter(case["answer"], options) == case["letter"], case


@pytest.mark.parametrize(
    ("answer", "published", "read"),
    [
        ("…따라서 답은 다음과 같습니다.\nAnswer: A", 1.0, 1.0),
        ("A", 1.0, 1.0),
        ("(A)", 1.0, 1.0),
        ("정답은 A입니다", None, 1.0),  # no space behind the letter: the published rule chooses at random
        ("Ａ", None, 1.0),
        ("A, B", 0.0, 0.0),
        ("모르겠습니다", None, 0.0),
        ("", None, 0.0),
    ],
)
def test_kreta_never_guesses_and_says_which_answers_it_did_not_read(answer, published, read):
    scores = kreta.score_answer({**OPTIONS, "answer": "A", "topic_difficulty": "System2"}, [answer])
    assert scores["kreta_unread"] == (published is None)
    assert scores["kreta_acc"] == scores["kreta_system2"] == (published or 0.0)
    assert scores["kreta_acc_guess"] == (0.25 if published is None else published)
    assert scores["kreta_read_letter"] == read
    assert scores["kreta_system1"] is None


def test_kreta_asks_as_its_authors_do():
    row = {"question": "가격은?", **dict(zip("ABCD", "1234", strict=True))}
    assert kreta.make_prompt(row, {"post_prompt": "P"}) == "Question: 가격은?\nOptions:\nA. 1\nB. 2\nC. 3\nD. 4\nP"


# ---- K-Viscuit


@pytest.mark.parametrize(
    ("answer", "exact", "read"),
    [
        ("B", 1, 1),
        (" B\n", 1, 1),
        ("B.", 0, 1),
        ("정답은 B입니다", 0, 1),
        ("Ｂ", 0, 1),
        ("b", 0, 1),
        ("A", 0, 0),
        ("", 0, 0),
    ],
)
def test_k_viscuit_counts_exactly_the_letter_and_beside_it_any_sentence(answer, exact, read):
    row = {"options": ["Bungeo-ppang", "Hwangnam-ppang", "Dakjuk", "Ice cream"], "answer": 1}
    scores = k_viscuit.score_answer(row, [answer])
    assert (scores["k_viscuit_exact"], scores["k_viscuit_read_letter"]) == (exact, read)


def test_k_viscuit_finds_the_pictures_of_its_published_folder(tmp_path, monkeypatch):
    Image.new("RGB", (3, 2), "red").save(tmp_path / "0.png")
    monkeypatch.setenv("K_VISCUIT_IMAGES", str(tmp_path))
    (picture,) = k_viscuit.load_pictures({"image_path": "0.png"})
    assert picture.size == (3, 2)


# ---- KOFFVQA


@pytest.mark.parametrize(
    ("review", "score"),
    [
        ("기준 1을 충족합니다.\n최종 점수: 10점 만점에 7점", 7),
        ("10점 만점에 **10**점", 10),
        ("최종 점수: 7/10", 7),
        ("점수는 0입니다", 0),
        ("10점 만점에 11점", None),
        ("3점이 아니라 100점", None),
        ("채점할 수 없습니다.", None),
        ("", None),
    ],
)
def test_koffvqa_reads_the_score_of_a_review_and_never_invents_one(review, score):
    assert koffvqa.parse_score(review) == score


@pytest.mark.parametrize(
    ("answer", "korean"),
    [("빨간 원입니다.", True), ("3", True), ("3,000", True), ("It is red.", False), ("NIKE입니다", True)],
)
def test_koffvqa_wants_korean_answers_or_none_but_numbers(answer, korean):
    assert koffvqa.is_korean(answer) is korean


@pytest.fixture
def judge(monkeypatch):
    """A judge that answers with the next of a list of reviews, and keeps the prompts."""
    reviews, prompts = [], []

    def ask(prompt: str) -> str:
        prompts.append(prompt)
        return reviews.pop(0)

    monkeypatch.setattr(koffvqa, "ask_judge", ask)
    monkeypatch.delenv("KOFFVQA_JUDGE_PROMPT", raising=False)
    return reviews, prompts


def test_koffvqa_leaves_out_what_the_judge_did_not_score(judge):
    reviews, prompts = judge
    reviews += ["10점 만점에 8점", "모르겠습니다", "", "10점 만점에 9점"]
    row = {"question": "무엇인가요?", "answer": "원이라고 하면 10점 {기준}"}
    answers = ["빨간 원", "원", "네모", "It is a circle", ""]
    scores = [koffvqa.score_answer(row, [answer]) for answer in answers]
    assert [score["koffvqa_score"] for score in scores] == [8, None, None, 0, 0]  # English and no answer: 0
    assert koffvqa.aggregate_score([score["koffvqa_score"] for score in scores]) == pytest.approx(10 * 8 / 3)
    assert koffvqa.aggregate_sum([score["koffvqa_unjudged"] for score in scores]) == 2
    assert len(prompts) == 4 and "원이라고 하면 10점 {기준}" in prompts[0] and "빨간 원" in prompts[0]


@pytest.fixture
def judge_server(monkeypatch):
    """A judge on this machine that answers with the next of a list: a status, or the text of its review."""
    replies: list[int | str] = []
    keys: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            keys.append(self.headers["Authorization"])
            reply = replies.pop(0)
            message = {"role": "assistant", "content": reply}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            body = json.dumps(
                {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": choices}
            )
            self.send_response(reply if isinstance(reply, int) else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_URL", f"http://127.0.0.1:{server.server_port}/v1/chat/completions")
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    monkeypatch.setenv("MODEL_VERSION", "judge")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(koffvqa, "MAX_RETRIES", 1)
    koffvqa._connect.cache_clear()
    yield replies, keys
    koffvqa._connect.cache_clear()
    server.shutdown()
    server.server_close()


def test_koffvqa_asks_a_real_endpoint_again_and_a_failed_request_is_no_score(judge_server, capsys):
    replies, keys = judge_server
    replies += [503, "10점 만점에 6점", 503, 503, 401]
    row = {"question": "무엇인가요?", "answer": "원이라고 하면 10점"}
    scores = [koffvqa.score_answer(row, ["빨간 원"])["koffvqa_score"] for _ in range(3)]
    assert scores == [6.0, None, None] and not replies  # asked again after 503, and not after 401
    assert set(keys) == {"Bearer key"}
    assert capsys.readouterr().err.count("the judge gave no review") == 2


def test_koffvqa_without_a_judge_stops_before_the_first_question(monkeypatch):
    monkeypatch.delenv("OPENAI_API_URL", raising=False)
    monkeypatch.setenv("MODEL_VERSION", "judge")
    with pytest.raises(ValueError, match="koffvqa needs a judge: OPENAI_API_URL not set"):
        koffvqa.check_judge([])
    monkeypatch.setenv("OPENAI_API_URL", "http://127.0.0.1:1/v1/chat/completions")
    assert koffvqa.check_judge(["row"]) == ["row"]


def test_koffvqa_takes_the_published_prompt_from_a_copy_of_its_file(tmp_path):
    file = tmp_path / "judges.py"
    file.write_text("import os\nbase_judge_prompt = '''\n질문 {0} 답변 {1} 기준 {2}\n'''.strip()\n", encoding="utf-8")
    prompt = koffvqa.load_judge_prompt(str(file))
    assert prompt.format(question="가", answer="나", rubric="다") == "질문 가 답변 나 기준 다"
    file.write_text("other = 1\n", encoding="utf-8")
    koffvqa.load_judge_prompt.cache_clear()
    with pytest.raises(ValueError, match="no base_judge_prompt"):
        koffvqa.load_judge_prompt(str(file))
    with pytest.raises(ValueError, match="Name src/judges.py"):
        koffvqa.load_judge_prompt(str(tmp_path / "none.py"))


# ---- PopEval


def make_regions(rows):
    return [make_region(text, [corners[i : i + 2] for i in range(0, 8, 2)]) for corners, text in rows]


def make_word(text, x1, y1, x2, y2):
    return make_region(text, [(x1, y1), (x2, y1), (x2, y2), (x1, y2)])


def test_popeval_counts_characters_as_the_published_script():
    for case in PUBLISHED["popeval"]:
        counts = count_characters(make_regions(case["predicted"]), make_regions(case["expected"]))
        assert [counts.taken, counts.predicted, counts.expected] == case["counts"], case
    assert sum(case["counts"][0] for case in PUBLISHED["popeval"]) > 200


def test_popeval_lets_one_prediction_cover_two_words_and_a_word_two_predictions():
    words = [make_word("서울", 0, 0, 20, 10), make_word("역", 22, 0, 30, 10)]
    joined = count_characters([make_word("서울역", 0, 0, 30, 10)], words)
    assert (joined.taken, joined.predicted, joined.expected) == (3, 3, 3)
    split = count_characters([make_word("서", 0, 0, 10, 10), make_word("울역", 10, 0, 30, 10)], words)
    assert split == joined
    spaced = count_characters([make_word("서울 역", 0, 0, 30, 10)], words)
    assert (spaced.taken, spaced.predicted) == (3, 4)  # a space is a character


def test_popeval_gives_nothing_for_the_right_text_in_another_place_or_a_letter_in_another_case():
    words = [make_word("Total", 0, 0, 20, 10)]
    assert count_characters([make_word("Total", 50, 50, 70, 60)], words).taken == 0
    assert count_characters([make_word("TOTAL", 0, 0, 20, 10)], words).taken == 1
    assert count_characters([make_word("Total", 20, 10, 30, 20)], words).taken == 5  # they touch in a corner
    assert count_characters([], words).taken == 0


def test_popeval_leaves_out_predictions_on_text_marked_as_unreadable():
    words = [make_word("###", 0, 0, 20, 10), make_word("가", 30, 0, 40, 10)]
    counts = count_characters([make_word("xyz", 1, 1, 19, 9), make_word("가", 30, 0, 40, 10)], words)
    assert (counts.taken, counts.predicted, counts.expected) == (1, 1, 1)


def test_popeval_is_taken_over_the_whole_set_and_without_any_text_is_zero():
    images = [count_characters([make_word("가나", 0, 0, 9, 9)], [make_word("가", 0, 0, 9, 9)])]
    images += [count_characters([], [make_word("다라마", 0, 0, 9, 9)])]
    scores = compute_popeval(images)
    assert scores == {"precision": 1 / 2, "recall": 1 / 4, "h": pytest.approx(1 / 3)}
    assert compute_popeval([])["h"] == 0


def test_boxes_without_area_are_no_error():
    point, line = make_word("가", 5, 5, 5, 5), make_word("가", 0, 5, 9, 5)
    for expected in (point, line):
        for predicted in (point, line, make_word("가", 0, 0, 9, 9)):
            assert count_characters([predicted], [expected]).taken == 1
        assert count_characters([make_word("가", 20, 20, 20, 20)], [expected]).taken == 0


def test_ground_truth_of_cord_and_both_icdar_years_is_read():
    quad = {"x1": 1, "y1": 2, "x2": 9, "y2": 2, "x3": 9, "y3": 5, "x4": 1, "y4": 5}
    cord = {"valid_line": [{"words": [{"text": "REAL", "quad": quad}]}], "dontcare": [[quad]], "meta": {}}
    assert [region.text for region in ocr.parse_ground_truth(json.dumps(cord))] == ["REAL", "###"]
    (word, unreadable) = ocr.parse_ground_truth("\ufeff377,117,463,117,465,130,378,130,a, b\n1,1,2,1,2,2,1,2,###\n")
    assert word.text == "a, b" and set(word.polygon) == {(377, 117), (463, 117), (465, 130), (378, 130)}
    assert unreadable.text == "###"
    assert [region.text for region in ocr.parse_ground_truth('38, 43, 920, 215, "Tid\\"dings"\n1 2 3 4 "x"')] == [
        'Tid"dings',
        "x",
    ]
    with pytest.raises(ValueError, match="line 2 of the ground truth"):
        ocr.parse_ground_truth('38, 43, 920, 215, "x"\nTiddings')


def test_ocr_answers_in_markup_become_pixels_and_unreadable_lines_are_left_out():
    row = {
        "image": Image.new("RGB", (100, 50)),
        "ground_truth": "10,10,30,10,30,20,10,20,백범로\n50,30,90,30,90,40,50,40,3",
    }
    right = "<char>백범로</char><bbox>0.1, 0.2, 0.3, 0.4</bbox>\n<char>3</char><bbox>0.5, 0.6, 0.9, 0.8</bbox>"
    broken = right.replace("0.5, 0.6, 0.9, 0.8", "0.9, 0.8, 0.5, 0.6")  # reversed
    assert ocr.aggregate_h([ocr.score_answer(row, [right])["popeval_h"]]) == 100
    assert ocr.score_answer(row, [broken])["popeval_h"] == [3, 3, 4]
    assert ocr.score_answer(row, ["백범로 3"])["popeval_unread"] == 1
    assert ocr.aggregate_recall([ocr.score_answer(row, ["백범로 3"])["popeval_recall"]]) == 0


def test_icdar_folders_become_a_file_that_the_task_reads(tmp_path):
    prepare = load_task("prepare_icdar").prepare_icdar
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "pictures/img_1.png")
    with pytest.raises(SystemExit, match="1 of 1 pictures lack their file, first gt_img_1.txt"):
        prepare(tmp_path / "pictures", tmp_path, tmp_path / "out.parquet")
    (tmp_path / "gt_img_1.txt").write_text("\ufeff0,0,40,0,40,20,0,20,서울", encoding="utf-8")
    assert prepare(tmp_path / "pictures", tmp_path, tmp_path / "out.parquet") == 1
    from datasets import Dataset

    (row,) = Dataset.from_parquet(str(tmp_path / "out.parquet"), cache_dir=str(tmp_path))
    answer = "<char>서울</char><bbox>0, 0, 1, 1</bbox>"
    assert row["image"].size == (40, 20)
    assert ocr.score_answer(row, [answer])["popeval_h"] == [2, 2, 2]


# ---- grounding


def test_control_tokens_of_the_pack_are_those_of_the_project():
    assert box_scores.CONTROL_TOKENS == SPECIAL_TOKENS


def score_grounding(answer, reference="<obj>원</obj><bbox>0.2, 0.2, 0.6, 0.6</bbox>"):
    return grounding.score_answer({"answer": reference}, [answer])


@pytest.mark.parametrize(
    ("box", "accuracy", "iou"),
    [
        ("0.2, 0.2, 0.6, 0.6", 1, 1),
        ("0.2, 0.2, 0.6, 0.4", 1, 0.5),  # exactly the limit
        ("0.2, 0.2, 0.6, 0.39", 0, 0.475),
        ("0.7, 0.7, 0.9, 0.9", 0, 0),
        ("0.2, 0.2, 1.4, 0.6", 0, 1 / 3),  # outside of the picture: not clipped
        ("128, 128, 384, 384", 0, 0),  # pixels instead of fractions
        ("0.6, 0.6, 0.2, 0.2", 0, 0),  # reversed
        ("0.2, 0.2, 0.6", 0, 0),
        ("0.2, 0.2, 0.6, nan", 0, 0),
        ("왼쪽 위", 0, 0),
    ],
)
def test_a_box_counts_from_half_overlap_and_an_unreadable_one_is_zero(box, accuracy, iou):
    scores = score_grounding(f"<obj>빨간 원</obj><bbox>{box}</bbox>입니다.")
    assert scores["grounding_acc_50"] == accuracy
    assert scores["grounding_iou"] == pytest.approx(iou)
    assert scores["grounding_unread"] == (box.count(",") != 3 or box.startswith("0.6, 0.6") or "nan" in box)
    assert scores["grounding_outside"] == (box.startswith("128") or "1.4" in box)


def test_boxes_match_one_to_one_and_missing_and_additional_boxes_cost_alike():
    two = "<obj>원</obj><bbox>0, 0, 0.4, 0.4<delim>0.5, 0.5, 0.9, 0.9</bbox>"
    swapped = "<obj>a</obj><bbox>0.5, 0.5, 0.9, 0.9</bbox> <obj>b</obj><bbox>0, 0, 0.4, 0.4</bbox>"
    one = "<obj>원</obj><bbox>0, 0, 0.4, 0.4</bbox>"
    assert score_grounding(swapped, two)["grounding_acc_50"] == 1
    assert score_grounding(one, two)["grounding_acc_50"] == score_grounding(two, one)["grounding_acc_50"] == 0.5
    assert score_grounding(one * 2, two)["grounding_iou"] == 0.5  # a box cannot be found twice


def test_the_assignment_finds_as_many_boxes_as_there_are_to_find():
    """The greedy choice of the best pair first would find one of the two."""
    expected = [(0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.8, 1.0)]
    predicted = [(0.0, 0.0, 0.9, 1.0), (0.0, 0.0, 0.45, 1.0)]
    overlaps = match_boxes(predicted, expected)
    assert sum(overlap >= 0.5 for overlap in overlaps) == 2


def test_without_an_object_the_right_answer_has_no_box():
    assert score_grounding("그런 것은 없습니다.", "없습니다.")["grounding_acc_50"] == 1
    assert score_grounding("<obj>원</obj><bbox>0, 0, 1, 1</bbox>", "없습니다.")["grounding_acc_50"] == 0


def test_refcoco_has_one_row_of_each_expression_with_its_box_in_pixels(tmp_path):
    from datasets import Dataset

    picture = io.BytesIO()
    Image.new("RGB", (200, 100)).save(picture, "PNG")
    rows = [
        {"image": {"bytes": picture.getvalue()}, "answer": ["red cup", "the cup"], "bbox": [20.0, 10.0, 100.0, 50.0]}
    ]
    first, second = grounding.split_expressions(Dataset.from_list(rows))
    assert grounding.make_refcoco_prompt(second) == "<gro>\nFind this in the picture: the cup"
    scores = grounding.score_refcoco_answer(first, ["<obj>red cup</obj><bbox>0.1, 0.1, 0.6, 0.6</bbox>"])
    assert scores["grounding_iou"] == pytest.approx(1)


def test_a_question_gets_the_token_that_asks_for_boxes_once():
    assert grounding.make_prompt({"question": "원을 찾아 주세요."}) == "<gro>\n원을 찾아 주세요."
    assert grounding.make_prompt({"question": "<gro>\n원"}) == "<gro>\n원"


# ---- captions and pictures


def test_korean_captions_count_syllables_and_no_spaces():
    row = {"captions": ["빨간 원이 있다.", "노란 별이 두 개 있다."]}
    assert captions.score_answer(row, ["빨간원이있다."]) == {
        "caption_chrf": 1.0,
        "caption_rouge_l": 1.0,
        "caption_not_korean": 0.0,
    }
    near, far = (captions.score_answer(row, [text])["caption_rouge_l"] for text in ("빨간 원은 있다.", "파란 네모 3개"))
    assert near == pytest.approx(5 / 6) and far < 0.3
    assert captions.score_answer(row, ["a red circle"])["caption_not_korean"] == 1


def test_pictures_are_read_from_each_published_form_and_broken_ones_are_named():
    memory = io.BytesIO()
    Image.new("RGB", (3, 2)).save(memory, "PNG")
    text = base64.b64encode(memory.getvalue()).decode()
    for value in (Image.open(memory), {"bytes": memory.getvalue()}, text, f"data:image/png;base64,{text}"):
        assert load_picture(value).size == (3, 2)
    for value, message in (
        ("???", "no valid base64"),
        (text[:40], "cannot be read"),
        (3, "found int"),
        (None, "NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            load_picture(value)


def test_a_mean_leaves_out_what_was_not_scored():
    assert aggregate_mean([1.0, None, 0.0]) == 0.5
    assert math.isnan(aggregate_mean([None]))

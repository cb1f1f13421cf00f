"""The recording endpoint: each request is asked once, errors are never kept as answers, and a killed process loses nothing."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from test_serve_task import find_free_port
from waiting import PATIENCE, until

from lit_vlm.serving.answer_log import (
    ChatAnswerLog,
    LoggedAnswer,
    RequestFolder,
    canonicalize_request,
    compute_request_key,
)
from lit_vlm.serving.recording_endpoint import (
    AnswerRecorder,
    RecordingMode,
    Upstream,
    create_recording_app,
    run_in_thread,
    run_recorder,
)
from lit_vlm.types import UserError

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")


class FakeModel:
    """Model whose answer repeats the question; `respond` may replace it."""

    def __init__(self):
        self.bodies = []
        self.respond = None
        self.gate = threading.Event()
        self.gate.set()
        self.app = FastAPI()
        self.app.add_api_route("/v1/chat/completions", self.complete, methods=["POST"])

    def complete(self, body: dict, request: Request):
        self.bodies.append({**body, "authorization": request.headers.get("authorization")})
        self.gate.wait(PATIENCE)
        if self.respond is not None and (response := self.respond(len(self.bodies))) is not None:
            return response
        text = f"답: {body['messages'][-1]['content']}"
        return make_completion(text)


def make_completion(text):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}


def make_image_part(data=PNG, kind="image/png"):
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


@pytest.fixture
def fake():
    return FakeModel()


@pytest.fixture
def upstream(fake):
    with run_in_thread(fake.app) as url:
        yield Upstream(url, model="theirs", timeout_seconds=PATIENCE)


@contextmanager
def record(tmp_path, upstream):
    recorder = AnswerRecorder(ChatAnswerLog(tmp_path / "answers.jsonl"), upstream=upstream)
    with run_recorder(recorder) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE)
        yield recorder, client


def ask(client, content, model="ours", **settings):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=model, messages=messages, **settings).choices[0].message.content


def key(content="?", **fields):
    return compute_request_key(canonicalize_request({"messages": [{"role": "user", "content": content}], **fields})[0])


def test_a_request_is_asked_once_and_then_answered_from_the_log(tmp_path, fake, upstream):
    with record(tmp_path, upstream) as (recorder, client):
        assert ask(client, "가", max_tokens=5) == ask(client, "가", max_tokens=5) == "답: 가"
        assert ask(client, "나", max_tokens=5) == "답: 나"
        assert (recorder.counts.received, recorder.counts.asked, recorder.counts.from_log) == (3, 2, 1)
        assert recorder.asking_seconds > 0
    with record(tmp_path, upstream) as (recorder, client):  # a new process reads the log
        assert ask(client, "가", max_tokens=5, model="another name") == "답: 가"
        assert (recorder.counts.asked, recorder.counts.from_log) == (0, 1)
    assert [body["model"] for body in fake.bodies] == ["theirs", "theirs"]
    usage = next(iter(ChatAnswerLog(tmp_path / "answers.jsonl"))).usage
    assert usage == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def test_what_changes_an_answer_changes_the_key_and_what_does_not_does_not():
    assert key(max_tokens=5) == key(max_tokens=5, model="a", user="b", temperature=None)
    assert key([make_image_part()]) == key([make_image_part(kind="image/jpeg")])
    different = [key(), key(max_tokens=5), key(max_tokens=6), key(temperature=1), key(seed=1), key("!")]
    different += [key([make_image_part()]), key([make_image_part(PNG + b"0")])]
    assert len(set(different)) == len(different)


def test_the_log_holds_digests_in_place_of_images(tmp_path, upstream):
    content = [make_image_part(), {"type": "text", "text": "무엇?"}]
    with record(tmp_path, upstream) as (_, client):
        ask(client, content)
    line = (tmp_path / "answers.jsonl").read_text(encoding="utf-8")
    assert (
        "sha256:" in line
        and "base64" not in json.loads(line)["request"]["messages"][0]["content"][0]["image_url"]["url"]
    )
    assert "무엇?" in line


def test_equal_requests_at_the_same_time_are_asked_once(tmp_path, fake, upstream):
    fake.gate.clear()
    with record(tmp_path, upstream) as (recorder, client), ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, client, "같은 질문") for _ in range(8)]
        until(lambda: recorder.counts.received == 8 and fake.bodies)
        fake.gate.set()
        assert {answer.result() for answer in answers} == {"답: 같은 질문"}
    assert len(fake.bodies) == 1


@pytest.mark.parametrize(
    ("response", "status"),
    [
        (JSONResponse({"error": {"message": "busy", "code": "rate"}}, 429), 429),
        (JSONResponse({"error": "broken"}, 500), 500),
        (Response("<html>", 200), 502),
        (JSONResponse({"choices": []}), 502),
        (JSONResponse(make_completion(None)), 502),
        (JSONResponse({}, 307, {"Location": "http://example.invalid/"}), 502),
    ],
    ids=["429", "500", "no JSON", "no choice", "no text", "redirect"],
)
def test_an_error_of_the_model_is_passed_on_and_never_logged_as_an_answer(tmp_path, fake, upstream, response, status):
    fake.respond = lambda number: response if number == 1 else None
    with record(tmp_path, upstream) as (recorder, client):
        with pytest.raises(openai.APIStatusError) as error:
            ask(client, "가")
        assert error.value.status_code == status
        assert not (tmp_path / "answers.jsonl").exists()
        ((question, text),) = recorder.failures.values()
        assert question == "가" and text.startswith(str(status))
        assert ask(client, "가") == "답: 가" and recorder.failures == {}


def test_an_endpoint_that_does_not_answer_is_an_error_with_its_address(tmp_path, fake, upstream):
    port = find_free_port()
    message = rf"127\.0\.0\.1:{port}/v1 cannot be reached"
    with (
        record(tmp_path, Upstream(f"http://127.0.0.1:{port}/v1")) as (_, client),
        pytest.raises(openai.APIStatusError, match=message),
    ):
        ask(client, "가")
    fake.gate.clear()
    with record(tmp_path, Upstream(upstream.base_url, timeout_seconds=0.2)) as (_, client):
        with pytest.raises(openai.APIStatusError, match=r"gave no answer within 0\.2 s"):
            ask(client, "가")
        fake.gate.set()


def test_an_empty_answer_is_an_answer(tmp_path, fake, upstream):
    fake.respond = lambda _: make_completion("")
    with record(tmp_path, upstream) as (recorder, client):
        assert ask(client, "가") == "" == ask(client, "가")
        assert recorder.counts.asked == 1


def test_the_key_is_sent_upstream_only_and_stands_in_no_file(tmp_path, fake, upstream):
    secret = Upstream(upstream.base_url, api_key="sk-" + "A1b2" * 8)
    with record(tmp_path, secret) as (_, client):
        ask(client, "가")
    assert fake.bodies[0]["authorization"] == f"Bearer {secret.api_key}"
    assert secret.api_key not in (tmp_path / "answers.jsonl").read_text() and secret.api_key not in repr(secret)


def test_replay_refuses_an_unknown_request_by_its_beginning_and_counts_it(tmp_path):
    log = ChatAnswerLog(tmp_path / "answers.jsonl")
    log.add(LoggedAnswer(key("아는 질문"), "B"))
    recorder = AnswerRecorder(log, RecordingMode.replay)
    with run_recorder(recorder) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        assert ask(client, "아는 질문") == "B"
        with pytest.raises(openai.NotFoundError, match="모르는 질문"):
            ask(client, "모르는 질문")
    assert (recorder.counts.from_log, recorder.counts.refused) == (1, 1)
    assert [question for question, _ in recorder.failures.values()] == ["모르는 질문"]


def test_collected_requests_can_be_answered_later_and_replayed(tmp_path):
    collected = RequestFolder(tmp_path / "requests")
    log = ChatAnswerLog(tmp_path / "answers.jsonl")
    content = [make_image_part(), {"type": "text", "text": "무엇?"}]
    with run_recorder(AnswerRecorder(log, RecordingMode.collect, requests=collected, placeholder="A")) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        assert ask(client, content, max_tokens=9) == ask(client, content, max_tokens=9) == "A"
    assert len(log) == 0 and len(collected) == 1 and len(RequestFolder(tmp_path / "requests")) == 1
    ((found_key, body),) = collected.read()
    assert body["messages"][0]["content"] == content and body["max_tokens"] == 9
    log.add(LoggedAnswer(found_key, "C"))
    with run_recorder(AnswerRecorder(log, RecordingMode.replay)) as url:
        assert ask(openai.OpenAI(base_url=url, api_key="none"), content, max_tokens=9) == "C"


def test_a_line_that_a_killed_process_cut_off_is_dropped_and_the_log_grows_on(tmp_path):
    path = tmp_path / "answers.jsonl"
    log = ChatAnswerLog(path)
    for number in range(3):
        log.add(LoggedAnswer(f"{number}", f"답 {number}"))
    path.write_bytes(path.read_bytes()[:-7])
    log = ChatAnswerLog(path)
    assert [answer.text for answer in log] == ["답 0", "답 1"]
    log.add(LoggedAnswer("2", "again"))
    assert [answer.text for answer in ChatAnswerLog(path)] == ["답 0", "답 1", "again"]


RECORD = """
import sys, time
from pathlib import Path
from lit_vlm.serving.answer_log import ChatAnswerLog
from lit_vlm.serving.recording_endpoint import AnswerRecorder, Upstream, run_recorder
with run_recorder(AnswerRecorder(ChatAnswerLog(Path(sys.argv[1])), upstream=Upstream(sys.argv[2])), int(sys.argv[3])):
    time.sleep(3600)
"""


def test_after_a_kill_only_the_missing_requests_are_asked(tmp_path, fake, upstream):
    path, port = tmp_path / "answers.jsonl", find_free_port()
    process = subprocess.Popen([sys.executable, "-c", RECORD, str(path), upstream.base_url, str(port)], cwd=os.getcwd())
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
    try:
        until(lambda: is_healthy(port))
        assert ask(client, "0") and ask(client, "1")
        fake.gate.clear()
        with ThreadPoolExecutor(1) as pool:
            unfinished = pool.submit(ask, client, "2")
            until(lambda: len(fake.bodies) == 3)
            process.send_signal(signal.SIGKILL)
            with pytest.raises(openai.APIConnectionError):
                unfinished.result()
    finally:
        process.kill()
        fake.gate.set()
        process.wait(PATIENCE)
    with record(tmp_path, upstream) as (recorder, client):
        assert [ask(client, str(number)) for number in range(4)] == [f"답: {number}" for number in range(4)]
        assert (recorder.counts.asked, recorder.counts.from_log) == (2, 2)


def is_healthy(port):
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


def test_unusable_requests_are_refused_and_other_sites_cannot_ask(tmp_path):
    recorder = AnswerRecorder(ChatAnswerLog(tmp_path / "answers.jsonl"), RecordingMode.replay)
    with run_in_thread(create_recording_app(recorder)) as url:
        post = httpx2.Client(trust_env=False).post
        for content in (
            b"{",
            b"[]",
            b'{"messages": 1}',
            b'{"messages": [], "stream": true}',
            b'{"messages": [], "n": 2}',
        ):
            assert post(f"{url}/chat/completions", content=content).status_code == 400
        foreign = post(f"{url}/chat/completions", content=b'{"messages": []}', headers={"Host": "example.com"})
        assert foreign.status_code == 400 and "host" in foreign.text.lower()
        port = int(url.split(":")[2].split("/")[0])
        with pytest.raises(UserError, match=f"Port {port} of 127.0.0.1"), run_recorder(recorder, port):
            pass

"""The client of a chat endpoint against a server that fails in many ways."""

import os
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from chat_server import KEY_VARIABLE, ChatServer, Fault, complete, cut_body, drip, keep_silent
from waiting import PATIENCE, until

from lit_vlm.config.task_settings import EndpointConfig
from lit_vlm.evaluation import endpoint as endpoint_module
from lit_vlm.evaluation.completion_client import EndpointError, extract_error_text, parse_retry_after
from lit_vlm.evaluation.endpoint import (
    ChatEndpoint,
    EndpointRequest,
    RequestFailure,
    make_lmms_eval_variables,
    read_api_key,
)
from lit_vlm.evaluation.reply_ledger import BudgetError, EndpointReply, ReplyLedger, TokenUsage, estimate_tokens
from lit_vlm.types import UserError

OVERLOADED = (429, {"error": {"message": "too many", "code": "rate_limit_exceeded"}}, {})


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
def make_endpoint(tmp_path):
    def make(url, key=None, on_wait=lambda reason, seconds: None, **settings):
        settings = {"endpoint": url, "model": "judge", "timeout_seconds": PATIENCE, **settings}
        ledger = ReplyLedger(tmp_path / "requests.jsonl", "judge.output")
        return ChatEndpoint(EndpointConfig(**settings), "judge", key, ledger, on_wait)

    return make


def ask(text, number=0):
    return EndpointRequest([{"role": "user", "content": text}], number, text)


def collect(endpoint, texts):
    return {request.tag: result for request, result in endpoint.send_all(map(ask, texts))}


def echo(number, body):
    return complete(f"to {body['messages'][0]['content']}")


def fail_first(fault):
    """Answer the first request with a fault, and the next ones well."""
    return lambda number, body: fault if number == 0 else echo(number, body)


def test_every_request_has_its_reply_and_no_more_than_concurrency_are_sent_at_once(make_endpoint):
    def answer(number, body):
        time.sleep(0.02)
        return echo(number, body)

    with ChatServer(answer) as server:
        found = collect(make_endpoint(server.url, concurrency=3), map(str, range(30)))
    assert {name: reply.text for name, reply in found.items()} == {str(n): f"to {n}" for n in range(30)}
    assert found["3"].usage == TokenUsage(100, 10) and found["3"].model == "judge-2026"
    assert server.max_at_once <= 3 and len(server.bodies) == 30


def test_requests_are_read_only_as_far_as_there_is_room(make_endpoint):
    taken, release = [], threading.Event()

    def answer(number, body):
        release.wait(PATIENCE)
        return echo(number, body)

    with ChatServer(answer) as server:
        replies = make_endpoint(server.url, concurrency=2).send_all(taken.append(n) or ask(str(n)) for n in range(50))
        reader = threading.Thread(target=lambda: list(replies))
        reader.start()
        until(lambda: len(server.bodies) == 2)
        assert len(taken) <= 2
        release.set()
        reader.join(PATIENCE)
    assert len(taken) == 50


def test_equal_requests_are_sent_once_and_equal_votes_each(make_endpoint):
    def answer(number, body):
        time.sleep(0.2)  # equal requests meet in flight
        return echo(number, body)

    with ChatServer(answer) as server:
        requests = [ask("a"), ask("a"), ask("a", number=1), ask("b")]
        results = list(make_endpoint(server.url, concurrency=4).send_all(requests))
        assert len(results) == 4 and len(server.bodies) == 3


@pytest.mark.parametrize(
    "fault",
    [
        OVERLOADED,
        (500, b"<html>oops</html>", {}),
        (503, b"", {}),
        (200, b'{"choices": [{"mess', {}),
        (200, b"\xff\xfe garbled", {}),
        (200, {"choices": []}, {}),
        (200, {"error": {"message": "late"}}, {}),
        (200, complete({"no": "text"}), {}),
        Fault(cut_body),
        Fault(lambda handler: handler.wfile.write(b"no HTTP at all\r\n\r\n")),
    ],
    ids=["429", "500", "503", "cut JSON", "garbled", "no choice", "error with 200", "no text", "cut body", "no HTTP"],
)
def test_a_fault_that_passes_costs_a_retry(make_endpoint, fault):
    reasons = []
    with ChatServer(fail_first(fault)) as server:
        client = make_endpoint(server.url, on_wait=lambda reason, seconds: reasons.append(reason))
        assert collect(client, ["a"])["a"].text == "to a"
    assert client.num_sent == 2 and client.num_retried == 1 and len(reasons) == 1


@pytest.mark.parametrize("fault", [keep_silent(3), Fault(drip)], ids=["silent", "a byte now and then"])
def test_a_reply_that_does_not_come_in_time_costs_a_retry(make_endpoint, fault):
    with ChatServer(fail_first(fault)) as server:
        assert collect(make_endpoint(server.url, timeout_seconds=0.5), ["a"])["a"].text == "to a"


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_no_thread_sends_a_request_before_the_time_of_retry_after(make_endpoint, form):
    times = []

    def answer(number, body):
        times.append(time.monotonic())
        if number:
            time.sleep(0.3 if number == 1 else 0)  # in flight while the endpoint asks for rest
            return echo(number, body)
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)  # whole seconds: 2 to 3 s
        return (429, b"", {"Retry-After": "1" if form == "seconds" else date})

    with ChatServer(answer) as server:
        collect(make_endpoint(server.url, concurrency=2), ["a", "b", "c", "d"])
    assert times[2] - times[0] >= 1.0 and len(times) == 5


def test_retry_after_is_read_as_seconds_or_as_a_date():
    assert parse_retry_after("2.5") == 2.5 and parse_retry_after("0") == 0.0
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert all(parse_retry_after(value) is None for value in (None, "", "soon", "-1", "nan", "inf"))


def test_a_rest_of_an_hour_ends_the_run_and_says_so(make_endpoint):
    server = ChatServer(lambda number, body: (429, b"", {"Retry-After": "3600"}))
    with server, pytest.raises(EndpointError, match="asks for 3600 s of rest"):
        collect(make_endpoint(server.url), ["a"])


def test_a_request_that_always_fails_is_a_failure_with_its_reason_and_is_asked_again_at_the_next_start(make_endpoint):
    def answer(number, body):
        text = body["messages"][0]["content"]
        return {"a": (500, b"broken", {}), "b": (400, {"error": {"message": "too long"}}, {})}.get(
            text, echo(number, body)
        )

    with ChatServer(answer) as server:
        found = collect(make_endpoint(server.url, max_retries=2), ["a", "b", "c"])
        assert found["a"] == RequestFailure("HTTP 500: broken") and found["b"] == RequestFailure("HTTP 400: too long")
        assert isinstance(found["c"], EndpointReply)
        assert sorted(body["messages"][0]["content"] for body in server.bodies) == ["a", "a", "a", "b", "c"]
        server.answer = echo
        assert all(
            isinstance(one, EndpointReply) for one in collect(make_endpoint(server.url), ["a", "b", "c"]).values()
        )
        assert len(server.bodies) == 7


def test_ten_failures_in_a_row_end_the_run(make_endpoint):
    with ChatServer(lambda number, body: (400, b"no", {})) as server:
        with pytest.raises(EndpointError, match=r"10 requests failed one after the other.*HTTP 400: no.*judge\.model"):
            collect(make_endpoint(server.url, concurrency=1), map(str, range(100)))
        assert len(server.bodies) == 10


def test_failures_between_replies_do_not_end_the_run(make_endpoint):
    with ChatServer(lambda number, body: (400, b"no", {}) if number % 2 else echo(number, body)) as server:
        found = collect(make_endpoint(server.url, concurrency=1), map(str, range(40)))
    assert sum(isinstance(reply, RequestFailure) for reply in found.values()) == 20


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, {"error": {"message": "no key"}}, r"HTTP 401: no key\. .*judge\.key_variable"),
        (403, b"", r"judge\.key_variable may not"),
        (404, {"error": {"message": "no such model"}}, r"no such model.*judge\.model"),
        (429, {"error": {"message": "pay", "code": "insufficient_quota"}}, "no credit"),
    ],
)
def test_an_error_that_no_retry_mends_ends_the_run_at_once(make_endpoint, status, body, message):
    with ChatServer(lambda number, _: (status, body, {})) as server:
        with pytest.raises(EndpointError, match=message):
            collect(make_endpoint(server.url, concurrency=1), ["a", "b"])
        assert len(server.bodies) == 1


def test_a_redirect_is_not_followed(make_endpoint):
    with ChatServer(echo) as other:
        server = ChatServer(lambda number, body: (307, b"", {"Location": f"{other.url}/chat/completions"}))
        with server, pytest.raises(EndpointError, match="Redirects are not followed"):
            collect(make_endpoint(server.url, key="k" * 20), ["a"])
        assert other.bodies == []


def test_an_endpoint_that_is_not_there_is_one_error_at_once(make_endpoint):
    with ChatServer(echo) as server:
        url = server.url
    client = make_endpoint(url)
    with pytest.raises(EndpointError, match=r"cannot be reached .*Start it, or correct judge\.endpoint"):
        collect(client, map(str, range(20)))
    assert client.num_retried == 0


def test_an_endpoint_that_dies_and_returns_costs_no_reply(make_endpoint):
    server = ChatServer(echo)
    client = make_endpoint(server.url, concurrency=2, max_retries=1000)
    replies = client.send_all(ask(str(number)) for number in range(20))
    found = [next(replies)]
    server.close()
    until(lambda: client.num_retried, said=lambda: "no retry")
    with ChatServer(echo, server.port) as again:
        found += list(replies)
        assert again.bodies
    assert sorted(int(request.tag) for request, _ in found) == list(range(20))
    assert all(isinstance(reply, EndpointReply) for _, reply in found)


def test_an_endpoint_that_stays_away_is_an_error_that_says_how_many_replies_are_kept(make_endpoint):
    server = ChatServer(echo)
    client = make_endpoint(server.url, concurrency=1, max_retries=2)
    replies = client.send_all(ask(str(number)) for number in range(2000))
    next(replies)
    server.close()
    with pytest.raises(EndpointError, match=r"\d+ repl(y is|ies are) kept; the same command asks only for the others"):
        list(replies)


def test_replies_are_kept_by_request_and_a_cut_last_line_is_dropped(make_endpoint, tmp_path):
    with ChatServer(echo) as server:
        collect(make_endpoint(server.url), ["a", "b", "c"])
        path = tmp_path / "requests.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
        found = collect(make_endpoint(server.url), ["a", "b", "c", "d"])
        assert len(server.bodies) == 5 and len(found) == 4
        assert len(ReplyLedger(path, "judge.output")) == 4
        collect(make_endpoint(server.url, model="another"), ["a"])  # another model is another request
        assert len(server.bodies) == 6
        collect(make_endpoint(server.url.replace("127.0.0.1", "localhost")), ["a"])  # another address is not
        assert len(server.bodies) == 6


def test_the_number_of_requests_is_limited_over_all_starts(make_endpoint):
    with ChatServer(echo) as server:
        for limit in (5, 8):
            with pytest.raises(BudgetError, match=rf"judge\.max_requests={limit} is reached"):
                collect(make_endpoint(server.url, max_requests=limit), map(str, range(20)))
            assert len(server.bodies) == limit


def test_the_cost_never_exceeds_its_limit_also_with_requests_in_flight(make_endpoint):
    prices = {"price_input": 0.0, "price_output": 1e6, "max_new_tokens": 10}  # a reply of ten tokens costs 10
    with ChatServer(echo) as server:
        client = make_endpoint(server.url, max_cost=55, **prices)
        with pytest.raises(BudgetError, match=r"judge\.max_cost=55 does not cover the next request: 50 is spent"):
            collect(client, map(str, range(20)))
        assert client.budget.cost == 50 and len(server.bodies) == 5
        with pytest.raises(BudgetError):  # what an earlier start spent counts
            collect(make_endpoint(server.url, max_cost=55, **prices), map(str, range(20)))
        assert len(server.bodies) == 5


def test_extra_fields_are_sent_and_null_removes_one(make_endpoint):
    with ChatServer(echo) as server:
        collect(make_endpoint(server.url, extra={"max_tokens": None, "max_completion_tokens": 5}), ["a"])
    (body,) = server.bodies
    assert body == {
        "model": "judge",
        "messages": [{"role": "user", "content": "a"}],
        "temperature": 0.0,
        "max_completion_tokens": 5,
    }


def test_the_key_comes_from_the_environment_and_is_written_nowhere(make_endpoint, tmp_path, monkeypatch):
    secret = "mypassword-" + "x7" * 10
    monkeypatch.setenv(KEY_VARIABLE, secret)
    settings = EndpointConfig(key_variable=KEY_VARIABLE)

    def answer(number, body):
        return complete(f"the key is {secret}") if number == 0 else (401, f"wrong key {secret}".encode(), {})

    with ChatServer(answer) as server:
        client = make_endpoint(server.url, key=read_api_key(settings, "judge"), concurrency=1)
        with pytest.raises(EndpointError) as error:
            collect(client, ["a", "b"])
        assert server.headers["Authorization"] == f"Bearer {secret}"
    assert secret not in str(error.value) and "wrong key" in str(error.value)
    assert all(secret not in file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(UserError, match=f"{KEY_VARIABLE}: this environment variable is not set"):
        read_api_key(settings, "judge")
    monkeypatch.setenv(KEY_VARIABLE, "two words")
    with pytest.raises(UserError, match="characters that no key has"):
        read_api_key(settings, "judge")
    assert read_api_key(EndpointConfig(), "judge") is None


def test_a_proxy_is_not_asked_for_an_endpoint_on_this_machine(make_endpoint, monkeypatch):
    with ChatServer(lambda number, body: (500, b"proxy", {})) as proxy, ChatServer(echo) as server:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        assert collect(make_endpoint(server.url), ["a"])["a"].text == "to a"
        assert proxy.bodies == []


def test_tokens_that_the_endpoint_does_not_report_are_estimated(make_endpoint):
    with ChatServer(lambda number, body: complete("한국어 answer") | {"usage": None}) as server:
        reply = collect(make_endpoint(server.url), ["질문 one"])["질문 one"]
    assert reply.usage == TokenUsage(4 + 2 + 1, 3 + 2, is_estimated=True)
    assert estimate_tokens("한국어") == 3 and estimate_tokens("eight ch") == 2 and estimate_tokens("") == 0


def test_an_error_body_is_shortened_and_in_one_line():
    assert extract_error_text(b'{"error": {"message": "a\\nb", "code": "c"}}') == "a b (c)"
    assert extract_error_text(b'{"error": "text"}') == '{"error": "text"}'
    assert len(extract_error_text(b"x" * 10_000)) == 303


def test_the_judge_tasks_of_lmms_eval_get_the_address_in_the_form_that_each_reads():
    settings = EndpointConfig(endpoint="http://127.0.0.1:8000/v1/", model="judge")
    assert make_lmms_eval_variables(settings, None, has_full_url=False) == {
        "API_TYPE": "openai",
        "OPENAI_API_URL": "http://127.0.0.1:8000/v1",
        "OPENAI_API_KEY": "none",
        "MODEL_VERSION": "judge",
    }
    found = make_lmms_eval_variables(settings, "key", has_full_url=True)
    assert found["OPENAI_API_URL"] == "http://127.0.0.1:8000/v1/chat/completions" and found["OPENAI_API_KEY"] == "key"
    assert "OPENAI_API_KEY" not in os.environ or os.environ["OPENAI_API_KEY"] != "key"

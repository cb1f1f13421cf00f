"""task=serve as a user starts it: a process that is asked, killed, started again and stopped."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from waiting import PATIENCE, until

from lit_vlm.config.parse import parse
from lit_vlm.model.build import build_model
from lit_vlm.model.export import export_model
from lit_vlm.tasks.serve import get_model_name, open_socket, read_token, serve
from lit_vlm.types import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(blueprint, tmp_path):
    export_model(build_model(blueprint), blueprint.tokenizer, blueprint.images, tmp_path / "mine" / "hf")
    return str(tmp_path / "mine" / "hf")


def find_free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def start_process(folder, tmp_path):
    """Return a function that starts task=serve on a port as a process, and waits until it serves."""

    def start(port):
        command = [sys.executable, str(ROOT / "run.py"), "task=serve", f"init_from={folder}", f"serve.port={port}"]
        output = tmp_path / "out.txt"
        with open(output, "w") as out:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, stdout=out, stderr=out, cwd=tmp_path, env=environment)
        until(lambda: "serving on" in output.read_text() or process.poll() is not None, said=output.read_text)
        return process, output.read_text

    return start


def test_a_server_that_was_killed_is_started_again_on_its_port_and_ends_with_ctrl_c(start_process):
    port = find_free_port()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
    messages = [{"role": "user", "content": "안녕하세요?"}]
    answers = []
    for end in (signal.SIGKILL, signal.SIGINT):
        process, read_output = start_process(port)
        found = client.chat.completions.create(model="mine", messages=messages, max_tokens=6)
        answers.append(found.choices[0].message.content)
        process.send_signal(end)
        process.wait(PATIENCE)
    assert answers[0] == answers[1]
    assert process.returncode == 130 and "Traceback" not in read_output()


def test_a_port_in_use_is_named_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        run = parse(["task=serve", "init_from=nowhere", f"serve.port={taken.getsockname()[1]}"])
        with pytest.raises(UserError, match="is in use on 127.0.0.1. Choose another port"):
            serve(run)
    with pytest.raises(UserError, match=r"serve\.host=203\.0\.113\.7"):
        open_socket("203.0.113.7", 0)


def test_an_address_that_other_machines_reach_needs_a_token(monkeypatch):
    monkeypatch.delenv("LIT_VLM_TOKEN", raising=False)
    assert read_token("127.0.0.1") is read_token("localhost") is read_token("::1") is None
    for host in ("0.0.0.0", "::", "192.0.2.1", "node7"):
        with pytest.raises(UserError, match="LIT_VLM_TOKEN is not set"):
            read_token(host)
    monkeypatch.setenv("LIT_VLM_TOKEN", "short")
    with pytest.raises(UserError, match="at least 16"):
        read_token("0.0.0.0")
    monkeypatch.setenv("LIT_VLM_TOKEN", "sixteen letters.")
    assert read_token("0.0.0.0") == "sixteen letters."


def test_a_model_is_named_after_its_run_or_folder(tmp_path):
    (tmp_path / "tiny" / "hf").mkdir(parents=True)
    assert get_model_name(str(tmp_path / "tiny" / "hf")) == get_model_name(str(tmp_path / "tiny")) == "tiny"
    assert get_model_name("llava-hf/llava-onevision-qwen2-0.5b-ov-hf") == "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"


def test_serve_without_a_model_or_with_a_folder_of_images_that_is_none_says_so(folder):
    with pytest.raises(UserError, match="task=serve needs a model"):
        serve(parse(["task=serve"]))
    with pytest.raises(UserError, match=r"serve\.image_root=.* is no folder"):
        serve(
            parse(["task=serve", f"init_from={folder}", "serve.image_root=nowhere", f"serve.port={find_free_port()}"])
        )

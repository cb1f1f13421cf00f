"""Tests of tracked runs: killed and started again, a metric that is never logged, secrets in every place."""

import csv
import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_helpers import RUN, TINY, RunOutput, make_conversations, save_photos, write_records
from waiting import PATIENCE

from sweeps.wandb_server import LoopbackServer

sys.path.append(str(Path(__file__).resolve().parents[1] / "config"))
from secret_cases import FORMS, INSIDE, LETTERS

LLAVA = ["stage=sft", "data=llava_json", "data.sources.mine.path=train.jsonl", "data.sources.mine.image_root=images"]
LLAVA += ["data.validation.fraction=0.4"]
TIMES = ("throughput/", "_runtime", "_timestamp", "samples/")


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    save_photos(folder / "images")
    write_records(folder / "train.jsonl", make_conversations())
    (folder / "home").mkdir()
    return folder


@pytest.fixture
def server():
    with LoopbackServer() as loopback:
        yield loopback
        assert loopback.unknown == []


def start_run(server, work_folder: Path, *overrides: str, **environment: str) -> subprocess.Popen:
    own_environment = {
        "HOME": str(work_folder / "home"),
        "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1",
        "OMP_NUM_THREADS": "1",
    }
    env = server.environment(**own_environment, NO_COLOR="1", PYTHONUNBUFFERED="1", **environment)
    command = [sys.executable, str(RUN), *TINY, *LLAVA, *overrides]
    return subprocess.Popen(
        command, cwd=work_folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_end(process: subprocess.Popen, limit: float = PATIENCE) -> tuple[int, str]:
    output, _ = process.communicate(timeout=limit)
    return process.returncode, output


def drop_run_specific(row: dict) -> dict:
    """Return the row without values that differ between runs."""
    return {key: value for key, value in row.items() if not key.startswith(TIMES)}


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_one_tracked_run_with_the_history_of_an_undisturbed_one(server, work_folder):
    overrides = ["logger=wandb", "trainer.max_steps=24", "trainer.log_every_n_steps=1", "checkpoint.every_steps=4"]
    overrides += [
        "checkpoint.asynchronous=false",
        "data.validation.every_steps=6",
        "callbacks=[throughput,guard,samples]",
    ]
    code, output = wait_for_end(start_run(server, work_folder, *overrides, "run_name=whole"))
    assert code == 0, output
    process, table = (
        start_run(server, work_folder, *overrides, "run_name=killed"),
        work_folder / "runs" / "killed" / "metrics.csv",
    )
    while not (table.is_file() and table.read_text().count("\n") > 10):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    wait_for_end(process)
    code, output = wait_for_end(start_run(server, work_folder, *overrides, "run_name=killed"))
    assert code == 0 and "resumes at step" in output, output
    ids = [RunOutput(work_folder / "runs" / name).manifest["tracking"]["wandb"]["id"] for name in ("whole", "killed")]
    undisturbed, killed = (server.runs[run_id] for run_id in ids)
    assert len(server.runs) == 2 and (killed.state, undisturbed.state) == ("finished", "finished")
    assert [row["_step"] for row in killed.history] == list(range(25))
    assert list(map(drop_run_specific, killed.history)) == list(map(drop_run_specific, undisturbed.history))
    logged = {int(row["step"]): float(row["train/loss"]) for row in read_rows(table) if row["train/loss"]}
    assert {row["_step"]: row["train/loss"] for row in killed.history if "train/loss" in row} == logged
    assert killed.summary["status"] == "finished" and killed.summary["steps"] == 24


def read_rows(table: Path) -> list[dict]:
    with table.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_a_metric_that_is_never_logged_fails_the_run_at_its_first_validation_and_marks_it(server, work_folder):
    overrides = ["logger=wandb", "logger.metric=val/los", "data.validation.every_steps=1", "run_name=mistyped"]
    code, output = wait_for_end(start_run(server, work_folder, *overrides))
    assert code == 1 and "Did you mean val/loss?" in output and "Traceback" not in output
    (run,) = server.runs.values()
    assert (run.state, run.exit_code, run.summary["status"]) == ("failed", 1, "failed")
    assert "logger.metric=val/los" in run.summary["error"]
    assert RunOutput(work_folder / "runs" / "mistyped").manifest["status"] != "finished"


@pytest.mark.slow
def test_a_second_start_of_a_running_run_is_refused_and_the_first_continues(server, work_folder):
    overrides = ["trainer.max_steps=5000", "run_name=twice", "callbacks=[throughput,guard]"]
    first, table = start_run(server, work_folder, *overrides), work_folder / "runs" / "twice" / "metrics.csv"
    while not table.is_file():
        assert first.poll() is None
        time.sleep(0.02)
    code, output = wait_for_end(start_run(server, work_folder, *overrides))
    assert code == 1 and f"process {first.pid} on " in output and "Traceback" not in output, output
    before = table.read_text().count("\n")
    while table.read_text().count("\n") <= before:
        assert first.poll() is None
        time.sleep(0.02)
    first.terminate()
    code, output = wait_for_end(first)
    assert code == 75 and "Asked to leave: saved at step" in output, output


# Secrets

PASSWORDS = {"DEPOT_TOKEN": f"depot-{LETTERS[:12]}", "DB_PASSWORD": "correct horse battery"}
PLANTED = [*FORMS.values(), *(secret for _, secret in INSIDE.values()), *PASSWORDS.values()]


def build_planted_overrides() -> list[str]:
    """Return overrides with all secrets: a JSON object of settings, plain overrides, lists, texts, tables."""
    settings = {
        "logger.tags": [value for name, value in FORMS.items() if name != "pem"],
        "submit.setup": [*(text for text, _ in INSIDE.values()), FORMS["pem"]],
        "submit.env.DB_PASSWORD": PASSWORDS["DB_PASSWORD"],
        "data.sources.mine.homepage": INSIDE["address"][0],
        "data.sources.mine.obtain": f"ask with {PASSWORDS['DEPOT_TOKEN']} or {FORMS['hugging_face']}",
        "data.sources.mine.licence": FORMS["github"],
        "logger.group": f"group of {FORMS['gitlab']}",
    }
    overrides = [f"data.sources.mine.split={FORMS['slack']}", f"prefer.judge='https://u:{INSIDE['address'][1]}@h/m'"]
    return [json.dumps(settings, ensure_ascii=False), *overrides]


@pytest.mark.slow
def test_25_planted_secrets_are_refused_by_every_task_and_never_shown_or_written(server, work_folder):
    assert len(set(PLANTED)) >= 25
    before = {path for path in work_folder.rglob("*") if path.is_file()}
    sweep = work_folder / "planted.yaml"
    sweep.write_text(
        f"method: grid\nmetric: {{name: val/loss}}\nparameters:\n  run_name: {{value: {FORMS['gitlab']}}}\n"
    )
    starts = [
        *(
            [*build_planted_overrides(), f"task={task}"]
            for task in ("train", "preflight", "prepare", "prefer", "submit", "sweep")
        ),
        ["-m", "seed=1,2", *build_planted_overrides()],
        ["--cfg", "job", *build_planted_overrides()],
        ["-m", "seed=1,2", "logger.group=${oc.env:DB_PASSWORD}"],
        ["run_name=x_${oc.env:DEPOT_TOKEN}"],
        ["task=sweep", f"sweep={sweep}"],
        [f"logger.tagz={FORMS['github']}"],
    ]
    processes = [start_run(server, work_folder, *overrides, **PASSWORDS) for overrides in starts]
    outputs = [wait_for_end(process) for process in processes]
    assert [code for code, _ in outputs] == [1] * len(starts), outputs
    assert all("holds a secret" in output and "Traceback" not in output for _, output in outputs), outputs
    keys = ("logger.tags", "submit.setup", "submit.env.DB_PASSWORD", "data.sources.mine.split", "prefer.judge")
    assert all(f"{key}: holds a secret" in outputs[0][1] for key in keys) and "logger.tagz: holds" in outputs[-1][1]
    assert [
        secret
        for secret in PLANTED
        for _, output in outputs
        for form in list_written_forms(secret)
        if form in output.encode()
    ] == []
    assert {path for path in work_folder.rglob("*") if path.is_file()} == {*before, sweep} and server.requests == []


@pytest.mark.slow
def test_secrets_of_the_environment_reach_no_file_terminal_or_server(server, work_folder):
    bodies = []
    real = server.answer
    server.answer = lambda method, path, key, body: bodies.append(body) or real(method, path, key, body)
    secrets = {**PASSWORDS, "OPENAI_KEY": FORMS["openai"], "HF_TOKEN": FORMS["hugging_face"], "JWT": FORMS["jwt"]}
    common = ["logger=wandb", "run_name=secret", "callbacks=[throughput,guard,samples,report]"]
    tracked = [*common, "logger.tensorboard=true", "logger.artifacts=[lock,report]"]
    tracked += ["checkpoint.every_steps=1", "checkpoint.keep_best=true", "data.validation.every_steps=1"]
    outputs = [wait_for_end(start_run(server, work_folder, *tracked, **secrets))]
    outputs.append(
        wait_for_end(start_run(server, work_folder, *common, "logger.offline=true", "run_name=offline", **secrets))
    )
    outputs.append(
        wait_for_end(start_run(server, work_folder, *common, "task=preflight", "run_name=before", **secrets))
    )
    assert [code for code, _ in outputs] == [0, 0, 0], outputs
    sinks = {str(path): path.read_bytes() for path in work_folder.rglob("*") if path.is_file()}
    sinks |= {f"request {number}": decompress_if_gzip(body) for number, body in enumerate(bodies)}
    sinks |= {f"terminal {number}": output.encode() for number, (_, output) in enumerate(outputs)}
    for names in ("manifest.json", "config.yaml", "report.html", "mixture.lock", ".wandb", "tfevents", "/index.json"):
        assert any(names in path for path in sinks), names
    found = {
        (secret, path)
        for secret in secrets.values()
        for path, body in sinks.items()
        if any(f in body for f in list_written_forms(secret))
    }
    assert found == set()


def list_written_forms(secret: str) -> list[bytes]:
    """Return the secret as it is, and as JSON and YAML write it."""
    return list({secret.encode(), json.dumps(secret)[1:-1].encode(), secret.splitlines()[-1].encode()} - {b""})


def decompress_if_gzip(body: bytes) -> bytes:
    return gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body

"""The loopback server with the real client."""

import subprocess
import sys

from waiting import PATIENCE

from sweeps.wandb_server import LoopbackServer

LOG = """
import wandb
run = wandb.init(project="p", id="one", resume="allow", config={"a": {"b": 1}}, group="chain", job_type="sft", tags=["t"])
for step in range(run.starting_step, run.starting_step + 3):
    run.log({"loss": 1.0 / (1 + step)}, step=step)
run.summary["done"] = True
"""
ARTIFACT = """
import wandb
with wandb.init(project="p", id="maker") as run:
    artifact = wandb.Artifact("model", type="model")
    artifact.add_file(__file__)
    run.log_artifact(artifact).wait()
    run.log({"table": wandb.Table(columns=["a"], data=[["한글"]])})
"""


def run_python(client, text, **environment):
    file = client.folder / "script.py"
    file.write_text(text, encoding="utf-8")
    return subprocess.run(
        [sys.executable, str(file)],
        env=client.environment(**environment),
        cwd=client.folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_a_run_is_recorded_and_resumes_under_its_id(server, client):
    assert run_python(client, LOG).returncode == 0
    run = server.runs["one"]
    assert (run.state, run.exit_code, run.starts) == ("finished", 0, 1)
    assert (run.group, run.job_type, run.tags, run.settings["a"]) == ("chain", "sft", ["t"], {"b": 1})
    assert [row["_step"] for row in run.history] == [0, 1, 2] and run.summary["done"] is True
    assert run_python(client, LOG + "\nimport sys; sys.exit(3)\n").returncode == 3
    assert [row["_step"] for row in run.history] == [0, 1, 2, 3, 4, 5]
    assert run.values("loss") == [1 / (1 + step) for step in range(6)]
    assert (run.state, run.exit_code, run.starts) == ("failed", 3, 2)


def test_an_offline_run_is_synced(server, client):
    assert run_python(client, LOG, WANDB_MODE="offline").returncode == 0
    assert "one" not in server.runs
    (folder,) = (client.folder / "wandb").glob("offline-run-*")
    client.run("sync", str(folder))
    assert [row["loss"] for row in server.runs["one"].history] == [1, 1 / 2, 1 / 3]
    assert server.runs["one"].settings["a"] == {"b": 1} and server.runs["one"].group == "chain"


def test_rows_survive_a_temporary_server_failure(server, client):
    text = LOG.replace('run.summary["done"]', 'print("logged", flush=True); input(); run.summary["done"]')
    file = client.folder / "script.py"
    file.write_text(text, encoding="utf-8")
    quick = {"WANDB_X_FILE_STREAM_RETRY_WAIT_MIN_SECONDS": "1", "WANDB_X_FILE_STREAM_RETRY_WAIT_MAX_SECONDS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(file)],
        env=client.environment(**quick),
        cwd=client.folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while "logged" not in process.stdout.readline():
        pass
    server.fail(500, count=4)
    process.communicate("\n", timeout=PATIENCE)
    assert process.returncode == 0 and server.runs["one"].state == "finished"
    assert [row["_step"] for row in server.runs["one"].history] == [0, 1, 2]


def test_a_foreign_api_key_is_refused(client):
    done = run_python(client, LOG, WANDB_API_KEY="f" * 40)
    assert done.returncode == 1 and "one" not in client.server.runs


def test_artifacts_and_tables_are_stored(server, client):
    done = run_python(client, ARTIFACT)
    assert done.returncode == 0, done.stderr
    artifact, table = server.state.artifacts.values()
    assert (artifact.path, artifact.type, artifact.state, artifact.run) == ("model:v0", "model", "COMMITTED", "maker")
    assert (table.type, table.state) == ("run_table", "COMMITTED")
    assert any(name.endswith("script.py") for name in server.state.files)
    assert "한글" in b"".join(server.state.files.values()).decode(errors="replace")


def test_unknown_requests_of_the_client_are_recorded():
    with LoopbackServer() as server:
        assert server.answer("GET", "/nothing", "x", b"")[0] == 401
        text = b'{"query": "query NewThing { a }", "variables": {}}'
        key = server.environment()["WANDB_API_KEY"]
        assert server.answer("POST", "/graphql", key, text) == (200, {"data": {}})
        assert server.unknown == ["NewThing"]

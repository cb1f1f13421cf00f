"""W&B's client against a server on the loopback interface: what arrives, how a run resumes, and what an outage costs."""

import json
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from tracking_cases import (
    get_history,
    log_steps,
    make_run_folder,
    make_saved_rows,
    open_hanging_port,
    open_refusing_port,
    start_run,
    write_samples,
)
from waiting import until

from lit_vlm.config.schema import LoggerConfig
from lit_vlm.loggers import run_metadata, wandb_client
from lit_vlm.loggers.file_loggers import MetricsCsv, make_tensorboard_logger
from lit_vlm.loggers.tracker import RunTracker, require_logged_metric
from lit_vlm.loggers.wandb_client import build_box_overlays
from lit_vlm.loggers.wandb_logger import RowBuffer
from lit_vlm.types import UserError

SECRET = "ghp_abcdefghijklmnopqrstuvwx"  # the secret in tracking_cases.CONFIG
ONE_WAIT = 30  # seconds: five times the usual wait, and less than the minutes that wandb waits on its own


@pytest.fixture
def short_timeouts(monkeypatch):
    """Return a context manager that waits two seconds for an answer instead of ten. Outside it the usual timeout holds."""

    @contextmanager
    def patch_timeouts():
        with monkeypatch.context() as patch:
            patch.setenv("WANDB_HTTP_TIMEOUT", "2")
            patch.setattr(wandb_client, "ANSWER_SECONDS", 2)
            patch.setattr(wandb_client, "FINISH_SECONDS", 3)
            yield

    return patch_timeouts


def get_run(server, folder):
    return server.runs[folder.manifest["tracking"]["wandb"]["id"]]


# Rows


def test_values_logged_in_one_step_become_one_row_sent_when_the_next_begins():
    sent = []
    rows = RowBuffer(lambda step, row: sent.append((step, row)), first_step=2)
    for step, name in ((0, "a"), (1, "a"), (2, "a"), (2, "b"), (4, "a")):
        rows.add(step, {name: step})
    assert sent == [(2, {"a": 2, "b": 2})]  # 0 and 1 existed already, 4 is not complete
    rows.flush()
    assert sent[1:] == [(4, {"a": 4})]
    rows.add(4, {"late": 1})
    rows.flush()
    assert len(sent) == 2


def test_the_table_reads_back_the_logged_numbers(tmp_path):
    rows = [
        {"train/loss": 0.1 + 0.2, "epoch": 0, "step": 0},
        {"val/loss": 1e-320, "step": 0},
        {"train/loss": 3.0, "step": 1},
    ]
    table = MetricsCsv(tmp_path)
    for row in rows:
        table.log_metrics({key: value for key, value in row.items() if key != "step"}, row["step"])
    assert MetricsCsv(tmp_path).go_on(2, {"late": 2.5, "step": 1}) == [*rows[:2], {"late": 2.5, "step": 1}]
    assert MetricsCsv(tmp_path).read_metric_names() == {"train/loss", "val/loss", "late"}


def test_rows_config_table_and_summary_arrive_and_secrets_do_not(server, tmp_path):
    folder, messages = make_run_folder(tmp_path / "run"), []
    tracker = start_run(folder, messages, tags=["한국어"])
    tracker.log_samples("before", write_samples(folder.path), step=0)
    log_steps(tracker, range(6))
    folder.manifest |= {
        "figures": {"tokens_per_second": 10.5, "scores": {"after": {"ocr_ko": 0.5}}},
        "weights_digest": "w",
    }
    tracker.close("finished", run_metadata.build_summary(folder.manifest, "finished"))
    run = get_run(server, folder)
    assert (run.state, run.exit_code, run.job_type, run.tags) == ("finished", 0, "sft", ["한국어"])
    assert (
        run.display_name == "tiny/2_sft" and run.group == f"tiny-{run.name}" and messages == [f"W&B: {get_url(folder)}"]
    )
    rows = get_history(run)
    assert [row["_step"] for row in rows] == list(range(6))
    assert [row["train/loss"] for row in rows] == [1.0 / (step + 3) for step in range(6)]
    assert [row.get("val/loss") for row in rows] == [2.0 / (step + 3) if step % 2 else None for step in range(6)]
    assert rows[0]["samples/before"]["_type"] == "table-file" and rows[0]["samples/before"]["nrows"] == 2
    assert run.settings["stage"]["learning_rate"] == 1e-3 and run.settings["run"]["code"]["commit"] == "0" * 40
    assert run.settings["run"]["plan"]["steps"] == 6 and run.settings["run"]["data"]["digest"] == "d" * 64
    summary = {
        key: run.summary[key] for key in ("tokens_per_second", "scores/after/ocr_ko", "weights_digest", "status")
    }
    assert list(summary.values()) == [10.5, 0.5, "w", "finished"] and run.summary["steps"] == 6
    assert SECRET not in json.dumps(run.config) and not find_files_with(tmp_path, SECRET)


def get_url(folder) -> str:
    return folder.manifest["tracking"]["wandb"]["url"]


def find_files_with(folder: Path, secret: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_boxes_become_overlays_with_labels_and_relative_coordinates(server, tmp_path):
    folder = make_run_folder(tmp_path / "run")
    tracker = start_run(folder, [])
    tracker.log_samples("before", write_samples(folder.path), step=0)
    tracker.close("finished", {})
    (table,) = (body for name, body in server.state.files.items() if name.endswith("samples/before.table.json"))
    content = json.loads(table)
    assert content["columns"][-2:] == ["picture", "picture_2"]
    one, two = content["data"]
    assert one[-2]["path"].endswith("a_plain.png") and set(one[-2]["boxes"]) == {"reference", "prediction"}
    (reference,), (prediction,) = (one[-2]["boxes"][layer] for layer in ("reference", "prediction"))
    assert reference["position"] == {"minX": 0.25, "maxX": 0.75, "minY": 0.1, "maxY": 0.5}
    assert (reference["box_caption"], prediction["box_caption"]) == ("고양이", "text")
    labels = content["column_types"]["params"]["type_map"]["picture"]["params"]["allowed_types"][0]["params"][
        "class_map"
    ]
    assert labels["params"]["val"] == {str(reference["class_id"]): "고양이", str(prediction["class_id"]): "text"}
    assert one[-1] is None and two[-1]["_type"] == "image-file" and not two[-1].get("boxes")


def test_no_boxes_make_no_layer():
    assert build_box_overlays([]) == {}


# Resumed runs


def test_a_resumed_run_continues_the_same_wandb_run_with_the_history_of_an_uninterrupted_one(server, tmp_path):
    whole = make_run_folder(tmp_path / "whole")
    tracker = start_run(whole, [])
    tracker.log_samples("before", write_samples(whole.path), step=0)
    log_steps(tracker, range(6))
    tracker.close("finished", {})
    cut = make_run_folder(tmp_path / "cut")
    tracker = start_run(cut, [])
    tracker.replay([])
    tracker.log_samples("before", write_samples(cut.path), step=0)
    log_steps(tracker, range(5))
    tracker.close("preempted", {})
    assert get_run(server, cut).state == "preempted" and len(get_run(server, cut).history) == 5
    tracker = start_run(cut, [], has_earlier_run=True)
    tracker.replay(make_saved_rows(range(2)))  # the checkpoint is from step 2; steps 2, 3 and 4 are computed again
    log_steps(tracker, range(2, 6))
    tracker.close("finished", {})
    assert get_run(server, cut).starts == 2 and get_run(server, cut).state == "finished"
    mine, theirs = get_history(get_run(server, cut)), get_history(get_run(server, whole))
    assert [{**row, "samples/before": None} for row in mine] == [{**row, "samples/before": None} for row in theirs]
    assert "samples/before" in mine[0] and not any("samples/before" in row for row in mine[1:])


def test_rows_that_never_arrived_are_sent_when_the_run_resumes(server, tmp_path):
    folder = make_run_folder(tmp_path / "run")
    tracker = start_run(folder, [])
    log_steps(tracker, range(2))
    tracker.close("failed", {})
    tracker = start_run(folder, [], has_earlier_run=True)
    tracker.replay(make_saved_rows(range(4)))  # 2 and 3 are only in the table
    log_steps(tracker, range(4, 6))
    tracker.close("finished", {})
    assert [row["train/loss"] for row in get_history(get_run(server, folder))] == [
        1.0 / (step + 3) for step in range(6)
    ]


def test_a_pipeline_is_one_group_and_each_stage_records_its_parent_run_and_model(server, tmp_path):
    first, second = (
        make_run_folder(tmp_path / "first"),
        make_run_folder(tmp_path / "second", parent=str(tmp_path / "first" / "hf")),
    )
    (first.path / "hf").mkdir(parents=True)
    (first.path / "hf" / "model.safetensors").write_bytes(b"weights")
    (first.path / "mixture.lock").write_text("{}")
    tracker = start_run(first, [], artifacts=["model", "lock"])
    names = tracker.close("finished", {}, upload=True)
    known = first.manifest["tracking"]["wandb"]
    first.update(tracking={"wandb": known | {"artifacts": names}})
    assert names == {"model": f"model-{known['id']}", "lock": f"lock-{known['id']}"}
    messages = []
    start_run(second, messages).close("finished", {})
    run = get_run(server, second)
    assert run.group == known["group"] == f"tiny-{known['id']}" and run.name != known["id"]
    assert run.settings["run"]["parent"]["id"] == known["id"] and run.settings["run"]["parent"]["url"] == known["url"]
    assert get_run(server, first).logged == [f"model-{known['id']}:v0", f"lock-{known['id']}:v0"]
    assert run.used == [f"model-{known['id']}:v0"], messages
    assert b"weights" in server.state.files.values()


# Logins and outages


def test_without_a_login_a_run_is_refused_with_three_remedies(session, tmp_path):
    with open_refusing_port() as url:
        session(url)
        with pytest.raises(UserError, match=r"wandb login.*WANDB_API_KEY.*logger\.offline=true"):
            start_run(make_run_folder(tmp_path), [])


def test_a_rejected_login_ends_a_new_run_and_moves_a_resumed_one_offline(server, session, tmp_path):
    session(server.url, "f" * 40)
    with pytest.raises(UserError, match="refuses the login"):
        start_run(make_run_folder(tmp_path / "new"), [])
    messages = []
    tracker = start_run(make_run_folder(tmp_path / "old"), messages, has_earlier_run=True)
    log_steps(tracker, range(2))
    tracker.close("finished", {})
    assert "it refuses the login" in messages[0] and f"task=sync sync={tmp_path}/old" in messages[1]
    assert list((tmp_path / "old" / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("dead", [open_refusing_port, open_hanging_port])
def test_a_dead_server_is_waited_for_once_and_the_run_continues_offline(session, short_timeouts, tmp_path, dead):
    with dead() as url, short_timeouts():
        session(url, "a" * 40)
        folder, messages = make_run_folder(tmp_path), []
        start_time = time.monotonic()
        tracker = start_run(folder, messages)
        assert time.monotonic() - start_time < ONE_WAIT and tracker.offline
        log_steps(tracker, range(3))
        tracker.close("finished", {})
        assert time.monotonic() - start_time < ONE_WAIT
    assert (
        "did not answer within" in messages[0] and "tries the server anew" in messages[0] and "task=sync" in messages[1]
    )
    assert list(folder.path.glob("wandb/offline-run-*/run-*.wandb"))


def test_a_server_that_fails_temporarily_receives_every_row(server, tmp_path):
    folder = make_run_folder(tmp_path)
    tracker = start_run(folder, [])
    log_steps(tracker, range(2))
    time.sleep(1.5)
    server.fail(500)
    start_time = time.monotonic()
    log_steps(tracker, range(2, 40))
    assert time.monotonic() - start_time < ONE_WAIT
    time.sleep(2.5)
    server.recover()
    tracker.close("finished", {})
    run = get_run(server, folder)
    assert [row["_step"] for row in get_history(run)] == list(range(40)) and run.state == "finished"


def test_a_server_that_stays_down_does_not_delay_the_end_and_the_same_command_sends_the_rest(
    server, monkeypatch, tmp_path
):
    folder, messages, table = make_run_folder(tmp_path), [], MetricsCsv(tmp_path)
    for values in make_saved_rows(range(6)):
        table.log_metrics({key: value for key, value in values.items() if key != "step"}, values["step"])
    with monkeypatch.context() as patch:  # read when the run is opened
        patch.setattr(wandb_client, "FINISH_SECONDS", 3)
        opened = open_tracking(folder, messages)
    with opened as tracking:
        log_steps(tracking.wandb, range(3))
        until(lambda: len(get_run(server, folder).history) == 2)
        server.fail(500)
        log_steps(tracking.wandb, range(3, 6))
        start_time = time.monotonic()
        tracking.finish(folder)
        assert time.monotonic() - start_time < ONE_WAIT
    assert (
        "not everything could be uploaded" in messages[-1] and "the same command sends what is missing" in messages[-1]
    )
    assert len(get_run(server, folder).history) == 2 and folder.manifest["tracking"]["wandb"]["behind"]
    server.recover()
    write_samples(folder.path, "after")
    again = RunTracker(LoggerConfig(wandb=True), folder.path, None, messages.append)
    again.send_missing(folder)
    assert [row["_step"] for row in get_history(get_run(server, folder))] == list(range(6)), messages
    assert "samples/after" in get_run(server, folder).history[-1] and get_run(server, folder).state == "finished"
    requests = len(server.requests)
    again.send_missing(folder)  # nothing is missing now
    assert len(server.requests) == requests


def open_tracking(folder, messages: list[str]) -> RunTracker:
    tracking = RunTracker(LoggerConfig(wandb=True), folder.path, None, messages.append)
    tracking.check(folder)
    folder.update(tracking=tracking.get_tracking_record(folder))
    tracking.open(folder)
    return tracking


def test_a_partly_uploaded_run_is_not_written_offline(server, session, short_timeouts, tmp_path):
    folder, messages = make_run_folder(tmp_path / "run"), []
    tracker = start_run(folder, messages)
    log_steps(tracker, range(3))
    tracker.close("preempted", {})
    with open_refusing_port() as url, short_timeouts():
        session(url, "a" * 40)
        tracker = start_run(folder, messages, has_earlier_run=True)
        tracker.replay(make_saved_rows(range(3)))
        log_steps(tracker, range(3, 5))
        tracker.close("preempted", {})
    assert "a part of this run is there already" in messages[-1] and not list(folder.path.glob("wandb/offline-run-*"))
    session(server.url, server.environment()["WANDB_API_KEY"])
    tracker = start_run(folder, messages, has_earlier_run=True)
    tracker.replay(make_saved_rows(range(5)))
    log_steps(tracker, range(5, 6))
    tracker.close("finished", {})
    assert [row["_step"] for row in get_history(get_run(server, folder))] == list(range(6))


def test_a_failing_client_does_not_stop_training(server, tmp_path, monkeypatch):
    messages = []
    tracker = start_run(make_run_folder(tmp_path), messages)
    log_steps(tracker, range(2))
    real = tracker.experiment
    monkeypatch.setattr(real, "log", lambda *args, **kwargs: 1 / 0)
    log_steps(tracker, range(2, 6))
    tracker.close("finished", {})
    assert [text for text in messages if "gave up" in text] and tracker.experiment is None


# Sweeps


def test_sweep_values_are_in_the_config_and_must_equal_those_of_the_run(server, tmp_path, monkeypatch, capfd):
    values = tmp_path / "values.yaml"
    values.write_text("wandb_version: 1\nseed:\n  value: 3\nstage.learning_rate:\n  value: 0.001\n")
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "trial7")
    monkeypatch.setenv("WANDB_PROJECT", "of the sweep")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(values))
    folder = make_run_folder(tmp_path / "run")
    run_metadata.require_sweep_values(folder.manifest["config"])
    start_run(folder, []).close("finished", {})
    run = server.runs["trial7"]
    assert folder.manifest["tracking"]["wandb"]["id"] == "trial7" and run.project == "of the sweep"
    assert run.settings["seed"] == 3 and run.settings["stage.learning_rate"] == run.settings["stage"]["learning_rate"]
    messages = capfd.readouterr()
    assert "locked" not in messages.err + messages.out and "Ignoring" not in messages.err + messages.out
    with pytest.raises(UserError, match=r"stage\.learning_rate is 0\.001 in the sweep and 0\.5 in this run.*args_json"):
        run_metadata.require_sweep_values({"seed": 3, "stage": {"learning_rate": 0.5}})


def test_a_stop_request_of_the_server_is_seen_by_the_next_query(server, tmp_path):
    folder = make_run_folder(tmp_path)
    tracker = start_run(folder, [])
    assert not tracker.is_asked_to_stop()
    get_run(server, folder).stop = True
    assert tracker.is_asked_to_stop()
    tracker.close("stopped early", {"status": "stopped early"})
    run = get_run(server, folder)
    assert (run.state, run.exit_code, run.summary["status"]) == ("finished", 0, "stopped early")


def test_a_metric_that_is_not_logged_is_reported_with_the_nearest_name():
    require_logged_metric("val/loss_ko", {"val/loss_ko"})
    with pytest.raises(UserError, match=r"logger\.metric=val/los_ko: .*Did you mean val/loss_ko\?"):
        require_logged_metric("val/los_ko", {"train/loss", "val/loss_ko"})
    with pytest.raises(UserError, match=r"checkpoint\.best_metric=exam/men: .*Did you mean exam/mean\?"):
        require_logged_metric("exam/men", {"exam/mean"}, "checkpoint.best_metric")


# TensorBoard


def read_scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(name)]


def test_tensorboard_files_of_a_resumed_run_have_every_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    for rows, steps in (([], range(4)), (make_saved_rows(range(2)), range(2, 6))):
        board = make_tensorboard_logger(tmp_path)
        board.replay(rows)
        for step in steps:
            board.log_metrics({"train/loss": float(step)}, step=step)
            if step % 2:
                board.log_metrics({"val/loss": 10.0 + step}, step=step)
        board.finalize("success")
        time.sleep(1.1)  # files are named by the second
    assert [step for step, _ in read_scalars(tmp_path, "train/loss")] == list(range(6))
    assert [step for step, _ in read_scalars(tmp_path, "val/loss")] == [1, 3, 5]
    board = make_tensorboard_logger(tmp_path)
    board.replay([])  # another run takes the folder
    board.log_metrics({"train/loss": 7.0}, step=0)
    board.finalize("success")
    assert read_scalars(tmp_path, "train/loss") == [(0, 7.0)]


def test_tensorboard_without_its_package_reports_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_vlm.loggers.file_loggers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install '\.\[tensorboard\]'"):
        make_tensorboard_logger(tmp_path)

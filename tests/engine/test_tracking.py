"""W&B's own client against a server on the loopback interface: what arrives, what goes on, and what an outage costs."""

import json
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from tracking_cases import (
    history,
    kept,
    log,
    port_that_hangs,
    port_that_refuses,
    run_folder,
    samples,
    started,
)
from waiting import until

from lit_vlm.config.schema import LoggerConfig
from lit_vlm.engine.tracking import MetricsCsv, RunTracker, connection, facts
from lit_vlm.engine.tracking.history import RowBuffer
from lit_vlm.engine.tracking.tables import build_box_overlays
from lit_vlm.engine.tracking.tensorboard import make_tensorboard_logger
from lit_vlm.engine.tracking.tracking import require_logged_metric
from lit_vlm.types import UserError

SECRET = "ghp_abcdefghijklmnopqrstuvwx"  # of tracking_cases.CONFIG
ONE_WAIT = 30  # seconds: five times what is seen, and less than the minutes that wandb waits by itself


@pytest.fixture
def soon(monkeypatch):
    """`with soon():` an outage is given two seconds instead of ten. A server that is there has the usual time."""

    @contextmanager
    def short():
        with monkeypatch.context() as patch:
            patch.setenv("WANDB_HTTP_TIMEOUT", "2")
            patch.setattr(connection, "ANSWER_SECONDS", 2)
            patch.setattr(connection, "FINISH_SECONDS", 3)
            yield

    return short


def the(server, folder):
    return server.runs[folder.manifest["tracking"]["wandb"]["id"]]


# Rows


def test_what_is_logged_of_one_step_becomes_one_row_sent_when_the_next_begins():
    sent = []
    rows = RowBuffer(lambda step, row: sent.append((step, row)), first_step=2)
    for step, name in ((0, "a"), (1, "a"), (2, "a"), (2, "b"), (4, "a")):
        rows.add(step, {name: step})
    assert sent == [(2, {"a": 2, "b": 2})]  # 0 and 1 were there already, 4 is not whole
    rows.flush()
    assert sent[1:] == [(4, {"a": 4})]
    rows.add(4, {"late": 1})
    rows.flush()
    assert len(sent) == 2


def test_the_table_gives_back_the_numbers_that_were_logged(tmp_path):
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
    folder, said = run_folder(tmp_path / "run"), []
    tracker = started(folder, said, tags=["한국어"])
    tracker.log_samples("before", samples(folder.path), step=0)
    log(tracker, range(6))
    folder.manifest |= {
        "figures": {"tokens_per_second": 10.5, "scores": {"after": {"ocr_ko": 0.5}}},
        "weights_digest": "w",
    }
    tracker.close("finished", facts.build_summary(folder.manifest, "finished"))
    run = the(server, folder)
    assert (run.state, run.exit_code, run.job_type, run.tags) == ("finished", 0, "sft", ["한국어"])
    assert (
        run.display_name == "tiny/2_sft" and run.group == f"tiny-{run.name}" and said == [f"W&B: {tracker_url(folder)}"]
    )
    rows = history(run)
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
    assert SECRET not in json.dumps(run.config) and not found_in(tmp_path, SECRET)


def tracker_url(folder) -> str:
    return folder.manifest["tracking"]["wandb"]["url"]


def found_in(folder: Path, secret: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_boxes_are_overlays_with_labels_and_shares_of_the_sides(server, tmp_path):
    folder = run_folder(tmp_path / "run")
    tracker = started(folder, [])
    tracker.log_samples("before", samples(folder.path), step=0)
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


# A run that goes on


def test_a_run_started_again_continues_the_same_run_and_its_history_is_that_of_one_never_left(server, tmp_path):
    whole = run_folder(tmp_path / "whole")
    tracker = started(whole, [])
    tracker.log_samples("before", samples(whole.path), step=0)
    log(tracker, range(6))
    tracker.close("finished", {})
    cut = run_folder(tmp_path / "cut")
    tracker = started(cut, [])
    tracker.replay([])
    tracker.log_samples("before", samples(cut.path), step=0)
    log(tracker, range(5))
    tracker.close("preempted", {})
    assert the(server, cut).state == "preempted" and len(the(server, cut).history) == 5
    tracker = started(cut, [], before=True)
    tracker.replay(kept(range(2)))  # the checkpoint was of step 2; 2, 3 and 4 are computed once more
    log(tracker, range(2, 6))
    tracker.close("finished", {})
    assert the(server, cut).starts == 2 and the(server, cut).state == "finished"
    mine, theirs = history(the(server, cut)), history(the(server, whole))
    assert [{**row, "samples/before": None} for row in mine] == [{**row, "samples/before": None} for row in theirs]
    assert "samples/before" in mine[0] and not any("samples/before" in row for row in mine[1:])


def test_rows_that_never_arrived_are_sent_by_the_next_start(server, tmp_path):
    folder = run_folder(tmp_path / "run")
    tracker = started(folder, [])
    log(tracker, range(2))
    tracker.close("failed", {})
    tracker = started(folder, [], before=True)
    tracker.replay(kept(range(4)))  # 2 and 3 are in the table alone
    log(tracker, range(4, 6))
    tracker.close("finished", {})
    assert [row["train/loss"] for row in history(the(server, folder))] == [1.0 / (step + 3) for step in range(6)]


def test_a_chain_is_one_group_and_knows_the_run_and_the_model_that_it_starts_from(server, tmp_path):
    first, second = (
        run_folder(tmp_path / "first"),
        run_folder(tmp_path / "second", parent=str(tmp_path / "first" / "hf")),
    )
    (first.path / "hf").mkdir(parents=True)
    (first.path / "hf" / "model.safetensors").write_bytes(b"weights")
    (first.path / "mixture.lock").write_text("{}")
    tracker = started(first, [], artifacts=["model", "lock"])
    names = tracker.close("finished", {}, upload=True)
    known = first.manifest["tracking"]["wandb"]
    first.update(tracking={"wandb": known | {"artifacts": names}})
    assert names == {"model": f"model-{known['id']}", "lock": f"lock-{known['id']}"}
    said = []
    started(second, said).close("finished", {})
    run = the(server, second)
    assert run.group == known["group"] == f"tiny-{known['id']}" and run.name != known["id"]
    assert run.settings["run"]["parent"]["id"] == known["id"] and run.settings["run"]["parent"]["url"] == known["url"]
    assert the(server, first).logged == [f"model-{known['id']}:v0", f"lock-{known['id']}:v0"]
    assert run.used == [f"model-{known['id']}:v0"], said
    assert b"weights" in server.state.files.values()


# Logins and outages


def test_without_a_login_a_run_is_refused_with_the_three_ways_out(session, tmp_path):
    with port_that_refuses() as url:
        session(url)
        with pytest.raises(UserError, match=r"wandb login.*WANDB_API_KEY.*logger\.offline=true"):
            started(run_folder(tmp_path), [])


def test_a_login_that_the_server_refuses_ends_a_new_run_and_takes_an_old_one_offline(server, session, tmp_path):
    session(server.url, "f" * 40)
    with pytest.raises(UserError, match="refuses the login"):
        started(run_folder(tmp_path / "new"), [])
    said = []
    tracker = started(run_folder(tmp_path / "old"), said, before=True)
    log(tracker, range(2))
    tracker.close("finished", {})
    assert "it refuses the login" in said[0] and f"task=sync sync={tmp_path}/old" in said[1]
    assert list((tmp_path / "old" / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("dead", [port_that_refuses, port_that_hangs])
def test_a_dead_server_is_waited_for_once_and_the_run_goes_on_offline(session, soon, tmp_path, dead):
    with dead() as url, soon():
        session(url, "a" * 40)
        folder, said = run_folder(tmp_path), []
        began = time.monotonic()
        tracker = started(folder, said)
        assert time.monotonic() - began < ONE_WAIT and tracker.offline
        log(tracker, range(3))
        tracker.close("finished", {})
        assert time.monotonic() - began < ONE_WAIT
    assert "did not answer within" in said[0] and "tries the server anew" in said[0] and "task=sync" in said[1]
    assert list(folder.path.glob("wandb/offline-run-*/run-*.wandb"))


def test_a_server_that_fails_for_a_while_gets_every_row(server, tmp_path):
    folder = run_folder(tmp_path)
    tracker = started(folder, [])
    log(tracker, range(2))
    time.sleep(1.5)
    server.fail(500)
    began = time.monotonic()
    log(tracker, range(2, 40))
    assert time.monotonic() - began < ONE_WAIT
    time.sleep(2.5)
    server.recover()
    tracker.close("finished", {})
    run = the(server, folder)
    assert [row["_step"] for row in history(run)] == list(range(40)) and run.state == "finished"


def test_a_server_that_does_not_come_back_holds_no_end_and_gets_the_rest_by_the_same_command(
    server, monkeypatch, tmp_path
):
    folder, said, table = run_folder(tmp_path), [], MetricsCsv(tmp_path)
    for values in kept(range(6)):
        table.log_metrics({key: value for key, value in values.items() if key != "step"}, values["step"])
    with monkeypatch.context() as patch:  # read when the run is opened
        patch.setattr(connection, "FINISH_SECONDS", 3)
        opened = tracking_of(folder, said)
    with opened as tracking:
        log(tracking.wandb, range(3))
        until(lambda: len(the(server, folder).history) == 2)
        server.fail(500)
        log(tracking.wandb, range(3, 6))
        began = time.monotonic()
        tracking.finish(folder)
        assert time.monotonic() - began < ONE_WAIT
    assert "not everything could be uploaded" in said[-1] and "the same command sends what is missing" in said[-1]
    assert len(the(server, folder).history) == 2 and folder.manifest["tracking"]["wandb"]["behind"]
    server.recover()
    samples(folder.path, "after")
    again = RunTracker(LoggerConfig(wandb=True), folder.path, None, said.append)
    again.send_missing(folder)
    assert [row["_step"] for row in history(the(server, folder))] == list(range(6)), said
    assert "samples/after" in the(server, folder).history[-1] and the(server, folder).state == "finished"
    requests = len(server.requests)
    again.send_missing(folder)  # nothing is missing any more
    assert len(server.requests) == requests


def tracking_of(folder, said: list[str]) -> RunTracker:
    tracking = RunTracker(LoggerConfig(wandb=True), folder.path, None, said.append)
    tracking.check(folder)
    folder.update(tracking=tracking.get_tracking_record(folder))
    tracking.open(folder)
    return tracking


def test_where_a_part_arrived_nothing_is_written_offline(server, session, soon, tmp_path):
    folder, said = run_folder(tmp_path / "run"), []
    tracker = started(folder, said)
    log(tracker, range(3))
    tracker.close("preempted", {})
    with port_that_refuses() as url, soon():
        session(url, "a" * 40)
        tracker = started(folder, said, before=True)
        tracker.replay(kept(range(3)))
        log(tracker, range(3, 5))
        tracker.close("preempted", {})
    assert "a part of this run is there already" in said[-1] and not list(folder.path.glob("wandb/offline-run-*"))
    session(server.url, server.environment()["WANDB_API_KEY"])
    tracker = started(folder, said, before=True)
    tracker.replay(kept(range(5)))
    log(tracker, range(5, 6))
    tracker.close("finished", {})
    assert [row["_step"] for row in history(the(server, folder))] == list(range(6))


def test_a_client_that_breaks_does_not_break_the_training(server, tmp_path, monkeypatch):
    said = []
    tracker = started(run_folder(tmp_path), said)
    log(tracker, range(2))
    real = tracker.experiment
    monkeypatch.setattr(real, "log", lambda *args, **kwargs: 1 / 0)
    log(tracker, range(2, 6))
    tracker.close("finished", {})
    assert [text for text in said if "gave up" in text] and tracker.experiment is None


# Sweeps


def test_values_of_a_sweep_stand_in_the_config_and_must_be_those_of_the_run(server, tmp_path, monkeypatch, capfd):
    values = tmp_path / "values.yaml"
    values.write_text("wandb_version: 1\nseed:\n  value: 3\nstage.learning_rate:\n  value: 0.001\n")
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "trial7")
    monkeypatch.setenv("WANDB_PROJECT", "of the sweep")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(values))
    folder = run_folder(tmp_path / "run")
    facts.require_sweep_values(folder.manifest["config"])
    started(folder, []).close("finished", {})
    run = server.runs["trial7"]
    assert folder.manifest["tracking"]["wandb"]["id"] == "trial7" and run.project == "of the sweep"
    assert run.settings["seed"] == 3 and run.settings["stage.learning_rate"] == run.settings["stage"]["learning_rate"]
    said = capfd.readouterr()
    assert "locked" not in said.err + said.out and "Ignoring" not in said.err + said.out
    with pytest.raises(UserError, match=r"stage\.learning_rate is 0\.001 in the sweep and 0\.5 in this run.*args_json"):
        facts.require_sweep_values({"seed": 3, "stage": {"learning_rate": 0.5}})


def test_a_stop_that_the_server_wants_is_known_at_once_when_it_is_asked(server, tmp_path):
    folder = run_folder(tmp_path)
    tracker = started(folder, [])
    assert not tracker.is_asked_to_stop()
    the(server, folder).stop = True
    assert tracker.is_asked_to_stop()
    tracker.close("stopped early", {"status": "stopped early"})
    run = the(server, folder)
    assert (run.state, run.exit_code, run.summary["status"]) == ("finished", 0, "stopped early")


def test_a_metric_that_is_not_logged_is_named_with_the_nearest():
    require_logged_metric("val/loss_ko", {"val/loss_ko"})
    with pytest.raises(UserError, match=r"logger\.metric=val/los_ko: .*Did you mean val/loss_ko\?"):
        require_logged_metric("val/los_ko", {"train/loss", "val/loss_ko"})


# TensorBoard


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(name)]


def test_tensorboard_files_of_a_run_that_goes_on_have_every_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    for rows, steps in (([], range(4)), (kept(range(2)), range(2, 6))):
        board = make_tensorboard_logger(tmp_path)
        board.replay(rows)
        for step in steps:
            board.log_metrics({"train/loss": float(step)}, step=step)
            if step % 2:
                board.log_metrics({"val/loss": 10.0 + step}, step=step)
        board.finalize("success")
        time.sleep(1.1)  # files are named by the second
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == list(range(6))
    assert [step for step, _ in scalars(tmp_path, "val/loss")] == [1, 3, 5]
    board = make_tensorboard_logger(tmp_path)
    board.replay([])  # another run takes the folder
    board.log_metrics({"train/loss": 7.0}, step=0)
    board.finalize("success")
    assert scalars(tmp_path, "train/loss") == [(0, 7.0)]


def test_tensorboard_without_its_package_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_vlm.engine.tracking.tensorboard.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install '\.\[tensorboard\]'"):
        make_tensorboard_logger(tmp_path)

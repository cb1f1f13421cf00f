"""Tests of task=prepare that is killed or finds a full disk: partial files are never used, and the next start resumes."""

import io
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
from mixture_cases import build_datamodule, build_sources, make_files, run_prepare
from run_helpers import run, write_data_choice
from waiting import PATIENCE

from lit_vlm.data.index import shard_cache
from lit_vlm.types import UserError

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def overrides(files, tmp_path, monkeypatch, tmp_path_factory) -> list[str]:
    """Overrides of a mixture of six formats, with small shards so that there are many moments to be killed at."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(shard_cache, "SHARD_RECORDS", 5)
    return [
        *write_data_choice(tmp_path, sources=build_sources(files), validation={"fraction": 0.1}),
        "data.index_workers=2",
    ]


def compute_outcome(overrides: list[str]) -> tuple[str, str, bytes]:
    """Return the digests of the training and held-out index, and the content of the lock file."""
    ready = run_prepare(*overrides)
    datamodule = build_datamodule(*overrides)
    datamodule.build_indexes()
    return (
        datamodule.index.compute_digest(),
        datamodule.held_out.compute_digest(),
        (ready.dir / "mixture.lock").read_bytes(),
    )


def list_leftovers(store: Path) -> list[str]:
    """List the temporary files."""
    return [path.name for path in store.rglob("*") if path.name.startswith(".") or path.suffix in (".part", ".tmp")]


def prepare_and_die_at_replace(number: int, overrides: list[str]) -> None:
    """Prepare, and die before the `number`-th rename of a temporary file."""
    remaining, replace = [number], os.replace

    def replace_or_die(*paths):
        remaining[0] -= 1
        if not remaining[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = replace_or_die
    run_prepare(*overrides)


@pytest.mark.slow
def test_preparing_killed_between_write_and_rename_ends_as_if_never_killed(overrides, tmp_path):
    undisturbed = compute_outcome([*overrides, "data.index_dir=whole", "run_name=whole"])
    killed = 0
    for number in (1, 3, 8, 8, 8, 8):
        job = FORK.Process(target=prepare_and_die_at_replace, args=(number, [*overrides, "run_name=cut"]))
        job.start()
        job.join(PATIENCE)
        killed += job.exitcode == -signal.SIGKILL
    assert killed >= 4 and list_leftovers(tmp_path / "runs" / "index")
    assert compute_outcome([*overrides, "run_name=cut"]) == undisturbed
    assert not list_leftovers(tmp_path / "runs" / "index")


@pytest.mark.slow
def test_preparing_killed_at_any_moment_ends_as_if_never_killed(overrides, tmp_path):
    start_time = time.monotonic()
    undisturbed = compute_outcome([*overrides, "data.index_dir=whole", "run_name=whole"])
    duration, rng, killed = time.monotonic() - start_time, random.Random(0), 0
    for _ in range(40):
        job = FORK.Process(target=run_prepare, args=(*overrides, "run_name=cut"))
        job.start()
        time.sleep(rng.uniform(0, duration / 2))
        job.kill()
        job.join(PATIENCE)
        killed += job.exitcode == -signal.SIGKILL
    assert killed > 10
    assert compute_outcome([*overrides, "run_name=cut"]) == undisturbed
    assert not list_leftovers(tmp_path / "runs" / "index")


def prepare_with_file_limit(limit: int, overrides: list[str], messages) -> None:
    """Prepare with a limit on the file size, which acts like a full disk. Put the error message, or ""."""
    sys.stdout = sys.stderr = io.StringIO()  # the captured output of pytest is a file too
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        run_prepare(*overrides)
        messages.put("")
    except BaseException as error:
        messages.put(f"{type(error).__name__}: {error}")


def read_error_within_limit(limit: int, overrides: list[str]) -> str:
    """Return the error of task=prepare if files can have at most `limit` bytes."""
    messages = FORK.SimpleQueue()
    job = FORK.Process(target=prepare_with_file_limit, args=(limit, overrides, messages))
    job.start()
    text = messages.get()
    job.join(PATIENCE)
    return text


@pytest.mark.slow
def test_a_full_disk_is_reported_and_preparing_resumes_when_there_is_room(overrides, tmp_path):
    """With each limit another file is the first that does not fit: record offsets, shards, plan."""
    # Also makes the parts of the tiny model
    undisturbed = compute_outcome([*overrides, "data.index_dir=whole", "run_name=whole"])
    for limit in (10, 150, 400, 1000, 2000, 3500):
        text = read_error_within_limit(limit, [*overrides, "run_name=full"])
        assert text.startswith("UserError: The index cannot be kept in ") and "File too large. Make room" in text, text
        assert str(tmp_path / "runs" / "index") in text and "set data.index_dir to another folder" in text
        assert not list_leftovers(tmp_path / "runs" / "index")
    assert compute_outcome([*overrides, "run_name=full"]) == undisturbed


def test_a_full_disk_for_the_run_folder_is_named(overrides, tmp_path):
    run_prepare(*overrides, "data.index_dir=whole", "run_name=whole")
    text = read_error_within_limit(3000, [*overrides, "data.index_dir=whole", "run_name=full"])
    folder = tmp_path / "runs" / "full"
    assert text.startswith(f"UserError: mixture.lock cannot be kept in {folder}: File too large.") and "run_dir" in text
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_created_is_named(overrides, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for task in (run_prepare, lambda *overrides: run(*overrides, "stage=sft")):
        with pytest.raises(UserError, match=r"cannot be kept in .*file/index.*set data\.index_dir to another folder"):
            task(*overrides, f"data.index_dir={tmp_path / 'file' / 'index'}")
    assert not (tmp_path / "runs" / "run").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_named(overrides, tmp_path):
    (tmp_path / "readable").mkdir(0o555)
    with pytest.raises(UserError, match=r"cannot be kept in .*readable.*Permission denied\..*set data\.index_dir"):
        run_prepare(*overrides, f"data.index_dir={tmp_path / 'readable'}")

"""curate.slurm: an array whose jobs hash a share of the records each, and one job that searches after them."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from fakes import get_path_with, make_fake_slurm, read_calls
from waiting import PATIENCE

from lit_vlm.config import ConfigError, parse
from lit_vlm.curation.features import FEATURES_FOLDER
from lit_vlm.data.index import shard_cache
from lit_vlm.data.index.shard_cache import SHARD_RECORDS
from lit_vlm.tasks.curate import curate

NUM_ROWS = 2 * SHARD_RECORDS + 100  # three blocks, the last one short
SLURM = ["curate.slurm=2", "submit.partition=cpu", "submit.cpus_per_task=1"]


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    folder = make_fake_slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", get_path_with(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def mixture(tmp_path) -> list[str]:
    """Rows of text, of which the last 100 repeat the first."""
    texts = [f"{number % (NUM_ROWS - 100)}번 질문" for number in range(NUM_ROWS)]
    rows = [{"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "네."}]} for text in texts]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return ["task=curate", "data=llava_json", f"data.sources.mine.path={path}", f"run_dir={tmp_path / 'runs'}"]


def list_hashed(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "runs/index" / FEATURES_FOLDER).glob("*.rows.npy")}


def start_worker(script: Path, number: int) -> subprocess.Popen:
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": str(number)}
    return subprocess.Popen(
        ["bash", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow  # three processes of run.py
def test_two_jobs_side_by_side_share_the_records_and_the_search_hashes_nothing(slurm, mixture, tmp_path, capsys):
    curate(parse([*mixture, *SLURM]))
    output = tmp_path / "runs/curate/duplicates"
    (array,), (dependency, _, after) = (call[1:] for call in read_calls(slurm, "sbatch"))
    assert (Path(array), Path(after)) == (output / "submit.sh", output / "search/submit.sh")
    assert dependency == "--dependency=afterok:101"
    script = Path(array).read_text()
    assert "#SBATCH --array=0-1" in script and "#SBATCH --partition=cpu" in script and "--gpus" not in script
    assert "written by task=curate" in script
    jobs = [start_worker(Path(array), number) for number in range(2)]
    said = [job.communicate(timeout=PATIENCE)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert "job 0 of 2: hashed 2 of 3 blocks" in said[0]
    assert "job 1 of 2: hashed 1 of 3 blocks" in said[1]
    hashed = list_hashed(tmp_path)
    assert len(hashed) == 3
    assert not (output / "summary.json").exists()
    subprocess.run(["bash", after], check=True, timeout=PATIENCE)  # the fake srun notes the command
    (arguments,) = read_calls(slurm, "srun")
    search = parse(arguments[next(n for n, word in enumerate(arguments) if word.endswith("run.py")) + 1 :])
    assert search.config.curate.slurm is None
    curate(search)
    assert list_hashed(tmp_path) == hashed
    selection = json.loads((output / "mine.selection.json").read_text())
    assert selection["left_out"] == [[NUM_ROWS - 100, NUM_ROWS - 1]]


def test_each_job_hashes_its_share_and_the_search_finds_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shard_cache, "SHARD_RECORDS", 10)
    texts = [f"{number}번" for number in range(24)] + ["0번"]
    rows = [[{"from": "human", "value": text}, {"from": "gpt", "value": "네."}] for text in texts]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows), encoding="utf-8")
    own = ["task=curate", "data=llava_json", f"data.sources.mine.path={path}", f"run_dir={tmp_path / 'runs'}"]
    own += ["data.index_workers=1"]
    for worker, blocks in ((1, 1), (0, 2)):
        curate(parse([*own, "curate.slurm=2", f"curate.worker={worker}"]))
        assert f"job {worker} of 2: hashed {blocks} of 3 blocks of records" in capsys.readouterr().out
        assert len(list_hashed(tmp_path)) == (1 if worker else 3)
    hashed = list_hashed(tmp_path)
    curate(parse(own))
    assert list_hashed(tmp_path) == hashed
    selection = json.loads((tmp_path / "runs/curate/duplicates/mine.selection.json").read_text())
    assert selection["left_out"] == [[24, 24]]


def test_a_dry_run_shows_both_scripts_and_submits_none(slurm, mixture, tmp_path, capsys):
    curate(parse([*mixture, *SLURM, "submit.dry_run=true"]))
    shown = capsys.readouterr().out
    assert "--array=0-1" in shown and 'curate.worker="$SLURM_ARRAY_TASK_ID"' in shown
    assert "--dependency=afterok:" in shown
    assert not read_calls(slurm, "sbatch")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["curate.worker=0"], "curate.slurm=<jobs>, which is not set"),
        (["curate.slurm=2", "curate.worker=2"], "numbered from 0"),
        (["curate.slurm=2", "curate.method=personal"], "curate.method=personal hashes none"),
        (["curate.slurm=2", "submit.container=x.sqsh"], "start on the node itself"),
        (["curate.slurm=2", "submit.time=soon"], "submit.time: expected minutes"),
        (["submit.dry_run=true"], "submit.dry_run: is read with"),
    ],
)
def test_settings_of_the_array_are_checked(overrides, message):
    with pytest.raises(ConfigError, match=message):
        parse(["task=curate", "data=llava_json", "data.sources.mine.path=x.json", *overrides])

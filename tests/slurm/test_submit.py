"""task=submit: the script is exact and readable, the chain is in order, and mistakes are told before anything is submitted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import calls, fake_slurm, with_path

from lit_vlm.config import ConfigError, parse
from lit_vlm.engine.slurm_script import script_of
from lit_vlm.tasks.submit import job_of, submit
from lit_vlm.types import UserError

STAGE = ("task=submit", "experiment=tiny/2_sft", "trainer=cpu", "data.num_workers=0")
RECIPE = ["tiny/1_align", "tiny/2_sft", "tiny/3_highres", "tiny/4_dpo"]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    folder = fake_slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", with_path(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def script(*words: str) -> str:
    return script_of(job_of(parse([*STAGE, *words])))


def options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def test_the_job_asks_for_what_the_trainer_needs():
    text = script("trainer=deepspeed_zero3", "trainer.num_nodes=8", "submit.partition=a100", "submit.time=2-00:00:00")
    wanted = "--nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=1 --partition=a100 --time=2-00:00:00"
    assert {*wanted.split(), "--requeue", "--open-mode=append", "--signal=USR1@120"} <= set(options(text))
    assert "\nexec srun --kill-on-bad-exit=1 " in text


def test_a_cpu_job_asks_for_no_gpu_and_what_is_not_set_is_left_to_the_cluster():
    names = {option.partition("=")[0] for option in options(script())}
    assert not names & {"--gpus-per-node", "--partition", "--account", "--qos", "--time", "--constraint", "--mem"}


def test_bash_hands_every_word_to_run_py_as_it_was_given(slurm, tmp_path):
    awkward = [
        "run_name='한국어 이름'",
        'run_dir="\'it\'s \\"quoted\\" $HOME `id` \\\\ #1\'"',
        "logger.tags=['a b','c;d','[e]','$(touch gone)']",
        "data.on_overlong=cut_turn",
    ]
    awkward[1] = "run_dir=" + str(tmp_path / "runs of 'two' $HOME")
    run = parse([*STAGE, *awkward])
    job = job_of(run)
    path = tmp_path / "job.sh"
    path.write_text(script_of(job), encoding="utf-8")
    subprocess.run(["bash", "-n", path], check=True)
    subprocess.run(["bash", path], check=True, cwd="/", timeout=60)
    (words,) = calls(slurm, "srun")
    start = next(place for place, word in enumerate(words) if word.endswith("run.py"))
    assert words[start - 1] == sys.executable
    again = parse(words[start + 1 :])
    assert (again.name, again.dir, again.config.logger.tags) == (run.name, run.dir, run.config.logger.tags)
    assert again.config.logger.tags[3] == "$(touch gone)" and not (tmp_path / "gone").exists()


def test_name_and_folder_are_those_of_the_direct_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["experiment=tiny/2_sft", "stage.learning_rate=3e-4", "trainer.max_steps=7"]
    direct = parse(words)
    submitted = parse(["task=submit", *words, "submit.partition=x", "submit.env.NCCL_DEBUG=INFO"])
    assert (submitted.name, submitted.dir) == (direct.name, direct.dir)
    assert parse(job_of(submitted).words).dir == direct.dir


def test_nodes_stay_offline_unless_told_otherwise_and_no_foreign_rendezvous_leaks_in(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    path = tmp_path / "job.sh"
    path.write_text(script("submit.env.WANDB_MODE=online", "submit.env.NCCL_IB_HCA='mlx5_0,mlx5_1'"))
    subprocess.run(["bash", path], check=True, timeout=60)
    seen = json.loads((slurm / "environment.json").read_text())
    assert (seen["HF_HUB_OFFLINE"], seen["WANDB_MODE"], seen["NCCL_IB_HCA"]) == ("1", "online", "mlx5_0,mlx5_1")
    assert "MASTER_ADDR" not in seen


def test_a_container_gets_its_own_python_and_our_folders(tmp_path):
    text = script(
        "submit.container=nvcr.io/x.sqsh", "submit.container_mounts=[/data:/data]", f"run_dir={tmp_path}/runs"
    )
    assert "--container-image=nvcr.io/x.sqsh" in text
    assert f"{tmp_path}/runs:{tmp_path}/runs,/data:/data" in text
    assert "\n  python " in text and f"{sys.executable} " not in text


def test_a_failing_set_up_line_fails_the_job_before_the_start(slurm, tmp_path):
    path = tmp_path / "job.sh"
    path.write_text(script("submit.setup=[module_that_is_not_there]"))
    assert subprocess.run(["bash", path], capture_output=True, timeout=60).returncode == 127
    assert not calls(slurm, "srun")


def test_a_dry_run_writes_and_prints_and_needs_no_slurm(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = parse([*STAGE, "submit.dry_run=true"])
    submit(run)
    written = (run.dir / "submit.sh").read_text(encoding="utf-8")
    said = capsys.readouterr().out
    assert written in said and f"sbatch --parsable {run.dir}/submit.sh" in said


def test_a_submitted_run_says_its_job_and_how_to_follow_it(slurm, capsys):
    run = parse([*STAGE, "logger.wandb=true"])
    submit(run)
    said = capsys.readouterr().out
    assert "job 101" in said and "squeue --me" in said and f"{run.dir}/slurm-*.log" in said and "scancel 101" in said
    assert f"wandb sync {run.dir}/wandb/offline-run-*" in said
    assert calls(slurm, "sbatch") == [["--parsable", str(run.dir / "submit.sh")]]


def test_a_recipe_is_a_chain_of_jobs_and_finished_stages_are_passed_by(slurm, capsys):
    run = parse(["task=submit", "recipe=tiny", "trainer=cpu"])
    stages = [parse([f"experiment={name}", "trainer=cpu"]) for name in RECIPE]
    stages[0].dir.mkdir(parents=True)
    (stages[0].dir / "manifest.json").write_text('{"status": "finished"}')
    submit(run)
    chain = "--kill-on-invalid-dep=yes"
    assert calls(slurm, "sbatch") == [
        ["--parsable", str(stages[1].dir / "submit.sh")],
        ["--parsable", "--dependency=afterok:101", chain, str(stages[2].dir / "submit.sh")],
        ["--parsable", "--dependency=afterok:102", chain, str(stages[3].dir / "submit.sh")],
    ]
    assert "tiny/1_align: finished already" in capsys.readouterr().out
    for stage in stages[1:]:
        text = (stage.dir / "submit.sh").read_text(encoding="utf-8")
        assert f"experiment={stage.experiment}" in text and "recipe=" not in text


def test_what_is_in_the_queue_is_not_submitted_again_but_waited_for(slurm, tmp_path, capsys):
    run = parse(["task=submit", "recipe=tiny", "trainer=cpu"])
    submit(run)
    fake_slurm(slurm, squeue="print('PENDING') if '--jobs=102' in sys.argv else sys.exit(1)")
    (slurm / "calls.jsonl").unlink()
    submit(run)
    assert [words[1] for words in calls(slurm, "sbatch")][1] == "--dependency=afterok:102"
    assert len(calls(slurm, "sbatch")) == 3 and "is in the queue already, as job 102" in capsys.readouterr().out


def test_a_finished_run_is_said_and_not_submitted(slurm, capsys):
    run = parse(list(STAGE))
    run.dir.mkdir(parents=True)
    (run.dir / "manifest.json").write_text('{"status": "finished"}')
    submit(run)
    assert not calls(slurm, "sbatch") and "finished already" in capsys.readouterr().out


def test_data_are_copied_once_per_node_and_named_as_before(slurm, tmp_path):
    data = tmp_path / "my data"
    data.mkdir()
    (data / "a.json").write_text("[]")
    words = ["data=llava_json", f"data.sources.mine.path='{data}/a.json'"]
    text = script(*words, "submit.stage_to=/scratch/$USER")
    path = tmp_path / "job.sh"
    path.write_text(text)
    subprocess.run(["bash", path], check=True, timeout=60)
    staging, start = calls(slurm, "srun")
    assert staging[-2:] == ["/scratch/$USER", str(data)] and "--ntasks-per-node=1" in staging
    assert json.loads((slurm / "environment.json").read_text())["LIT_VLM_STAGED"] == "/scratch/$USER"
    assert parse(start[start.index("task=train") :]).dir == parse(["experiment=tiny/2_sft", "trainer=cpu", *words]).dir


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["submit.gpus_per_node=8"], "trainer.accelerator=cpu"),
        (["trainer=ddp", "submit.gpus_per_node=4"], "4 GPUs for trainer.devices=8"),
        (["submit.time=soon"], "expected minutes"),
        (["submit.time='00:01:00'"], "so at once"),
        (["submit.signal_seconds=0"], "must be above 0"),
        (["submit.stage_to=scratch"], "must begin with /"),
        (["submit.container_mounts=[/a:/a]"], "there is no submit.container"),
        (["submit.extra=['--nodes=4']"], "follows from trainer.num_nodes"),
        (["submit.extra=[exclusive]"], "is an option of sbatch"),
        (["submit.env.WANDB_API_KEY=abc"], "for all to read"),
        (["submit.partitoin=x"], "Did you mean submit.partition?"),
    ],
)
def test_a_mistake_in_submit_is_named(words, said):
    with pytest.raises(ConfigError, match=said.replace("?", r"\?").replace(".", r"\.")):
        parse([*STAGE, *words])


def test_a_mistake_in_one_stage_of_the_ladder_stops_all_of_it(slurm):
    with pytest.raises(ConfigError, match="so at once"):
        parse(["task=submit", "recipe=tiny", "submit.time=1"])


def test_a_refusal_shows_what_slurm_said(slurm):
    fake_slurm(slurm, sbatch="sys.exit('sbatch: error: invalid partition specified: gpuu')")
    with pytest.raises(UserError, match="invalid partition specified: gpuu"):
        submit(parse([*STAGE, "submit.partition=gpuu"]))


def test_without_sbatch_the_way_out_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"submit\.dry_run=true"):
        submit(parse(list(STAGE)))
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_made_is_told_before_a_job_is_submitted(slurm, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        submit(parse([*STAGE, f"run_dir={tmp_path}/file/runs"]))
    assert not calls(slurm, "sbatch")


def test_m_with_submit_is_refused_without_a_traceback(repository, tmp_path):
    command = [sys.executable, str(repository / "run.py"), "-m", "task=submit", "experiment=tiny/2_sft", "seed=0,1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "submitit_slurm" in done.stderr and "Traceback" not in done.stderr


def test_a_grid_takes_its_resources_from_the_same_settings(slurm, repository, tmp_path):
    fake_slurm(slurm, sbatch="import shutil; shutil.copy(sys.argv[-1], here / 'grid.sh'); sys.exit('not now')")
    words = ["trainer=ddp", "trainer.num_nodes=2", "submit.partition=a100", "experiment=tiny/2_sft", "seed=0,1"]
    command = [sys.executable, str(repository / "run.py"), "-m", "hydra/launcher=submitit_slurm", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode and "not now" in done.stderr
    text = (slurm / "grid.sh").read_text(encoding="utf-8")
    for option in (
        "--nodes=2",
        "--ntasks-per-node=8",
        "--partition=a100",
        "--signal=USR1@120",
        "--requeue",
        "--array=0-1%2",
    ):
        assert f"#SBATCH {option}\n" in text
    assert "--kill-on-bad-exit=1" in text and "export HF_HUB_OFFLINE=1" in text


def test_the_script_of_a_run_is_where_its_log_is(slurm):
    run = parse(list(STAGE))
    submit(run)
    text = Path(run.dir / "submit.sh").read_text(encoding="utf-8")
    assert f"--output={run.dir}/slurm-%j.log" in options(text)

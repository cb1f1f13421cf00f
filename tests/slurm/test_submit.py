"""task=submit: exact batch scripts, job chains in order, and errors that are reported before anything is submitted."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import get_path_with, make_fake_slurm, read_calls
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from waiting import PATIENCE

from lit_vlm.cluster.batch_script import render_batch_script
from lit_vlm.config import ConfigError, parse
from lit_vlm.config.choices import Task
from lit_vlm.config.compose import CONF_DIR, VERSION_BASE
from lit_vlm.config.launcher import make_launcher_config, register_launcher
from lit_vlm.tasks import TASKS
from lit_vlm.tasks.submit import make_job, submit
from lit_vlm.types import UserError
from run import run_job

STAGE = ("task=submit", "experiment=tiny/2_sft", "trainer=cpu", "data.num_workers=0")
RECIPE = ["tiny/1_align", "tiny/2_sft", "tiny/3_highres", "tiny/4_dpo"]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    folder = make_fake_slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", get_path_with(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def make_script(*overrides: str) -> str:
    return render_batch_script(make_job(parse([*STAGE, *overrides])))


def list_options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def test_the_job_requests_the_resources_of_the_trainer():
    text = make_script(
        "trainer=deepspeed_zero3", "trainer.num_nodes=8", "submit.partition=a100", "submit.time=2-00:00:00"
    )
    wanted = "--nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=1 --partition=a100 --time=2-00:00:00"
    assert {*wanted.split(), "--requeue", "--open-mode=append", "--signal=USR1@120"} <= set(list_options(text))
    assert "\nexec srun --kill-on-bad-exit=1 " in text


def test_a_cpu_job_requests_no_gpu_and_unset_options_are_left_to_the_cluster():
    names = {option.partition("=")[0] for option in list_options(make_script())}
    assert not names & {"--gpus-per-node", "--partition", "--account", "--qos", "--time", "--constraint", "--mem"}


def test_bash_passes_every_override_to_run_py_unchanged(slurm, tmp_path):
    special_overrides = [
        "run_name='한국어 이름'",
        'run_dir="\'it\'s \\"quoted\\" $HOME `id` \\\\ #1\'"',
        "logger.tags=['a b','c;d','[e]','$(touch gone)']",
        "data.on_overlong=cut_turn",
    ]
    special_overrides[1] = "run_dir=" + str(tmp_path / "runs of 'two' $HOME")
    run = parse([*STAGE, *special_overrides])
    job = make_job(run)
    path = tmp_path / "job.sh"
    path.write_text(render_batch_script(job), encoding="utf-8")
    subprocess.run(["bash", "-n", path], check=True)
    subprocess.run(["bash", path], check=True, cwd="/", timeout=PATIENCE)
    (arguments,) = read_calls(slurm, "srun")
    start = next(index for index, word in enumerate(arguments) if word.endswith("run.py"))
    assert arguments[start - 1] == sys.executable
    parsed_run = parse(arguments[start + 1 :])
    assert (parsed_run.name, parsed_run.dir, parsed_run.config.logger.tags) == (
        run.name,
        run.dir,
        run.config.logger.tags,
    )
    assert parsed_run.config.logger.tags[3] == "$(touch gone)" and not (tmp_path / "gone").exists()


def test_run_name_and_run_folder_equal_those_of_the_direct_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["experiment=tiny/2_sft", "stage.learning_rate=3e-4", "trainer.max_steps=7"]
    direct = parse(overrides)
    submitted = parse(["task=submit", *overrides, "submit.partition=x", "submit.env.NCCL_DEBUG=INFO"])
    assert (submitted.name, submitted.dir) == (direct.name, direct.dir)
    assert parse(make_job(submitted).overrides).dir == direct.dir


def test_nodes_are_offline_by_default_and_a_foreign_rendezvous_is_unset(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    path = tmp_path / "job.sh"
    path.write_text(make_script("submit.env.WANDB_MODE=online", "submit.env.NCCL_IB_HCA='mlx5_0,mlx5_1'"))
    subprocess.run(["bash", path], check=True, timeout=PATIENCE)
    seen = json.loads((slurm / "environment.json").read_text())
    assert (seen["HF_HUB_OFFLINE"], seen["WANDB_MODE"], seen["NCCL_IB_HCA"]) == ("1", "online", "mlx5_0,mlx5_1")
    assert "MASTER_ADDR" not in seen


def list_mounts(text: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if "--container-mounts=" in line]
    return line.strip(" \\'").partition("=")[2].strip("'").split(",")


def test_a_container_uses_its_own_python_and_mounts_our_folders(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HOME", raising=False)
    text = make_script(
        "submit.container=nvcr.io/x.sqsh", "submit.container_mounts=[/data:/data]", f"run_dir={tmp_path}/runs"
    )
    assert "--container-image=nvcr.io/x.sqsh" in text
    assert list_mounts(text)[-2:] == [f"{tmp_path}/runs:{tmp_path}/runs", "/data:/data"]
    assert "\n  python " in text and f"{sys.executable} " not in text


def test_index_model_cache_and_node_copy_are_each_mounted_once_in_a_container(tmp_path, monkeypatch):
    model, cache, user_mount = tmp_path / "model", tmp_path / "cache", tmp_path / "given"
    for folder in (model, cache, user_mount / "model"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HF_HOME", str(cache))
    overrides = [f"run_dir={tmp_path}/runs", f"data.index_dir={tmp_path}/runs/index", f"init_from={user_mount}/model"]
    overrides += [f"model.vision_tower={model}", "model.language_model=Qwen/Qwen3-0.6B", "submit.container=x"]
    overrides += ["submit.stage_to=/scratch", f"submit.container_mounts=['{user_mount}:{user_mount}']"]
    found = list_mounts(make_script(*overrides))
    for path in (f"{tmp_path}/runs", "/scratch", str(model), str(cache), str(user_mount)):
        assert found.count(f"{path}:{path}") == 1
    assert not [mount for mount in found if "runs/index" in mount or "given/model" in mount or "Qwen" in mount]
    assert not [
        mount for mount in list_mounts(make_script(*overrides, "submit.stage_to='$TMPDIR'")) if "TMPDIR" in mount
    ]


@pytest.mark.parametrize("runtime", ["apptainer", "singularity"])
def test_apptainer_and_singularity_start_the_command_inside_srun(runtime, slurm, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HOME", raising=False)
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.json").write_text("[]")
    overrides = [
        "submit.container=/images/x.sif",
        f"submit.container_runtime={runtime}",
        "submit.container_mounts=[/data:/data]",
        "submit.stage_to=/scratch",
        "data=llava_json",
        f"data.sources.mine.path={data}/a.json",
    ]
    text = make_script(*overrides, f"run_dir={tmp_path}/runs")
    path = tmp_path / "job.sh"
    path.write_text(text)
    subprocess.run(["bash", path], check=True, timeout=PATIENCE)
    for arguments in read_calls(slurm, "srun"):  # of the copy of the data, and of the run
        start = arguments.index(runtime)
        command, bind, folder, image, python = arguments[start + 1 : start + 6]
        assert (command, folder, image, python) == ("exec", f"--pwd={tmp_path}", "/images/x.sif", "python")
        assert bind.startswith("--bind=") and bind.endswith(",/data:/data") and f"{tmp_path}:{tmp_path}" in bind
    assert "--container-image" not in text
    assert f"{runtime} exec --nv " in make_script(*overrides, "trainer=ddp")


def test_data_and_models_that_are_not_there_are_refused_before_a_job_is_queued(slurm, tmp_path):
    overrides = [*STAGE, "data=llava_json", f"data.sources.mine.path={tmp_path}/none.json"]
    with pytest.raises(UserError, match="none.json: no such file or folder"):
        submit(parse(overrides))
    with pytest.raises(UserError, match="nothing/hf: .* does not exist"):
        submit(parse([*STAGE, f"init_from={tmp_path}/nothing/hf"]))
    assert not read_calls(slurm, "sbatch") and not (tmp_path / "runs").exists()


def test_a_dry_run_shows_the_script_and_then_what_would_be_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    overrides = [*STAGE, "submit.dry_run=true", "data=llava_json", "data.sources.mine.path=none.json"]
    with pytest.raises(UserError, match=r"none\.json: no such file or folder.* So it would not be submitted\."):
        submit(parse(overrides))
    assert "#!/bin/bash" in capsys.readouterr().out


def test_an_index_folder_elsewhere_is_created_before_a_container_mounts_it(slurm, tmp_path):
    submit(parse([*STAGE, "submit.container=x", f"data.index_dir={tmp_path}/index"]))
    assert (tmp_path / "index").is_dir()


def test_setup_lines_may_use_unset_variables_and_our_lines_may_not(slurm, tmp_path):
    path = tmp_path / "job.sh"
    path.write_text(make_script("submit.setup=['echo found:$NOT_SET_AT_ALL:']") + "echo $NOT_SET_AT_ALL\n")
    done = subprocess.run(["bash", path], capture_output=True, text=True, timeout=PATIENCE)
    assert "found::" in done.stdout and done.returncode == 0 and len(read_calls(slurm, "srun")) == 1
    path.write_text(path.read_text().replace("exec srun", "echo $NOT_SET_AT_ALL; exec srun"))
    assert subprocess.run(["bash", path], capture_output=True, timeout=PATIENCE).returncode == 1


def test_a_failing_setup_line_fails_the_job_before_the_start(slurm, tmp_path):
    path = tmp_path / "job.sh"
    path.write_text(make_script("submit.setup=[module_that_is_not_there]"))
    assert subprocess.run(["bash", path], capture_output=True, timeout=PATIENCE).returncode == 127
    assert not read_calls(slurm, "srun")


def test_a_dry_run_writes_and_prints_and_needs_no_slurm(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = parse([*STAGE, "submit.dry_run=true"])
    submit(run)
    written = (run.dir / "submit.sh").read_text(encoding="utf-8")
    output = capsys.readouterr().out
    assert written in output and f"sbatch --parsable {run.dir}/submit.sh" in output


def test_a_submitted_run_prints_its_job_and_how_to_follow_it(slurm, capsys):
    run = parse([*STAGE, "logger.wandb=true"])
    submit(run)
    output = capsys.readouterr().out
    assert "job 101" in output and "squeue --me" in output and f"{run.dir}/slurm-*.log" in output
    assert "scancel --signal=TERM 101 " in output
    assert f"python run.py task=sync sync={run.dir}" in output
    assert read_calls(slurm, "sbatch") == [["--parsable", str(run.dir / "submit.sh")]]


def test_a_recipe_is_a_chain_of_jobs_without_finished_stages(slurm, capsys):
    run = parse(["task=submit", "recipe=tiny", "trainer=cpu"])
    stages = [parse([f"experiment={name}", "trainer=cpu"]) for name in RECIPE]
    stages[0].dir.mkdir(parents=True)
    (stages[0].dir / "manifest.json").write_text('{"status": "finished"}')
    submit(run)
    chain = "--kill-on-invalid-dep=yes"
    assert read_calls(slurm, "sbatch") == [
        ["--parsable", str(stages[1].dir / "submit.sh")],
        ["--parsable", "--dependency=afterok:101", chain, str(stages[2].dir / "submit.sh")],
        ["--parsable", "--dependency=afterok:102", chain, str(stages[3].dir / "submit.sh")],
    ]
    output = capsys.readouterr().out
    assert "tiny/1_align: finished already" in output and "scancel --signal=TERM 101 102 103 " in output
    for stage in stages[1:]:
        text = (stage.dir / "submit.sh").read_text(encoding="utf-8")
        assert f"experiment={stage.experiment}" in text and "recipe=" not in text


def test_each_stage_has_an_exam_job_on_one_device_that_no_later_stage_waits_for(slurm):
    overrides = ["recipe=tiny", "trainer=ddp", "trainer.devices=8", "submit.gpus_per_node=8"]
    submit(parse(["task=submit", *overrides, "submit.exam=true"]))
    stages = [parse([f"experiment={name}", *overrides[1:]]) for name in RECIPE]
    calls = [(arguments[1:-2], arguments[-1]) for arguments in read_calls(slurm, "sbatch")]
    assert [name for _, name in calls] == [
        str(folder / "submit.sh") for stage in stages for folder in (stage.dir, stage.dir / "exam")
    ]
    waits = [option[0].partition(":")[2] if option else "" for option, _ in calls]
    assert waits == ["", "101", "101", "103", "103", "105", "105", "107"]
    text = (stages[1].dir / "exam/submit.sh").read_text(encoding="utf-8")
    wanted = {"--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", f"--job-name={stages[1].name}/exam"}
    assert wanted <= set(list_options(text))
    start = text.index("task=exam")
    words = shlex.split(text[start:].replace("\\\n", " "))
    exam = parse(words)
    assert (exam.config.task, exam.init_from) == (Task.exam, str(stages[1].dir / "hf"))
    with pytest.raises(ConfigError, match="which export=false leaves out"):
        parse([*STAGE, "submit.exam=true", "export=false"])


def test_a_queued_job_is_not_submitted_again_but_waited_for(slurm, tmp_path, capsys):
    run = parse(["task=submit", "recipe=tiny", "trainer=cpu"])
    submit(run)
    make_fake_slurm(slurm, squeue="print('PENDING') if '--jobs=102' in sys.argv else sys.exit(1)")
    (slurm / "calls.jsonl").unlink()
    submit(run)
    assert [arguments[1] for arguments in read_calls(slurm, "sbatch")][1] == "--dependency=afterok:102"
    assert len(read_calls(slurm, "sbatch")) == 3 and "is in the queue already, as job 102" in capsys.readouterr().out


def test_a_finished_run_is_reported_and_not_submitted(slurm, capsys):
    run = parse(list(STAGE))
    run.dir.mkdir(parents=True)
    (run.dir / "manifest.json").write_text('{"status": "finished"}')
    submit(run)
    assert not read_calls(slurm, "sbatch") and "finished already" in capsys.readouterr().out


def test_data_are_copied_once_per_node_and_the_run_folder_stays_the_same(slurm, tmp_path):
    data = tmp_path / "my data"
    data.mkdir()
    (data / "a.json").write_text("[]")
    overrides = ["data=llava_json", f"data.sources.mine.path='{data}/a.json'"]
    text = make_script(*overrides, "submit.stage_to=/scratch/$USER")
    path = tmp_path / "job.sh"
    path.write_text(text)
    subprocess.run(["bash", path], check=True, timeout=PATIENCE)
    staging, start = read_calls(slurm, "srun")
    assert staging[-2:] == ["/scratch/$USER", str(data)] and "--ntasks-per-node=1" in staging
    assert json.loads((slurm / "environment.json").read_text())["LIT_VLM_STAGED"] == "/scratch/$USER"
    assert (
        parse(start[start.index("task=train") :]).dir == parse(["experiment=tiny/2_sft", "trainer=cpu", *overrides]).dir
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["submit.gpus_per_node=8"], "trainer.accelerator=cpu"),
        (["trainer=ddp", "submit.gpus_per_node=4"], "4 GPUs for trainer.devices=8"),
        (["submit.time=soon"], "expected minutes"),
        (["submit.time='00:01:00'"], "so at once"),
        (["submit.signal_seconds=0"], "must be above 0"),
        (["submit.stage_to=scratch"], "must begin with /"),
        (["submit.container_mounts=[/a:/a]"], "there is no submit.container"),
        (["submit.container_runtime=apptainer"], "there is no submit.container to run with it"),
        (["submit.container=/x.sif"], "write submit.container_runtime=apptainer"),
        (["submit.container=/x.sqsh", "submit.container_runtime=apptainer"], "write submit.container_runtime=pyxis"),
        (["submit.extra=['--nodes=4']"], "follows from trainer.num_nodes"),
        (["submit.extra=['-N 4']"], "follows from trainer.num_nodes"),
        (["submit.extra=['-n4']"], "follows from trainer.devices"),
        (["submit.extra=['--mem=4G']"], "follows from submit.memory"),
        (["submit.extra=['-t 10']"], "follows from submit.time"),
        (["submit.extra=['--array=0-3']"], "Several runs are a grid"),
        (["trainer=ddp", "submit.extra=['--gres=gpu:h100:8']"], "add submit.gpus_per_node=0"),
        (["trainer=ddp", "submit.gpus_per_node=0", "submit.extra=['--gres=nvme:1']"], "0 GPUs for trainer.devices=8"),
        (["submit.extra=[exclusive]"], "is an option of sbatch"),
        (["submit.env.WANDB_API_KEY=abcdefgh"], "holds a secret"),
        (["submit.partitoin=x"], "Did you mean submit.partition?"),
    ],
)
def test_an_error_in_the_submit_settings_is_reported(overrides, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?").replace(".", r"\.")):
        parse([*STAGE, *overrides])


@pytest.mark.parametrize("option", ["--gres=gpu:h100:8", "--gpus-per-node=h100:8", "-G h100:16"])
def test_an_option_for_a_type_of_gpu_replaces_the_general_gpu_option(option):
    found = list_options(make_script("trainer=ddp", "submit.gpus_per_node=0", f"submit.extra=['{option}']"))
    assert [line for line in found if "gpu" in line or "h100" in line] == [option]


@pytest.mark.parametrize("time", ["0", "UNLIMITED"])
def test_an_unlimited_time_is_passed_to_slurm(time):
    assert f"--time={time}" in list_options(make_script(f"submit.time={time}"))


def test_an_error_in_one_stage_stops_the_whole_pipeline(slurm):
    with pytest.raises(ConfigError, match="so at once"):
        parse(["task=submit", "recipe=tiny", "submit.time=1"])


def test_a_rejected_job_shows_the_message_of_slurm(slurm):
    make_fake_slurm(slurm, sbatch="sys.exit('sbatch: error: invalid partition specified: gpuu')")
    with pytest.raises(UserError, match="invalid partition specified: gpuu"):
        submit(parse([*STAGE, "submit.partition=gpuu"]))


def test_without_sbatch_the_error_names_a_remedy_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"submit\.dry_run=true"):
        submit(parse(list(STAGE)))
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_created_is_reported_before_a_job_is_submitted(slurm, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        submit(parse([*STAGE, f"run_dir={tmp_path}/file/runs"]))
    assert not read_calls(slurm, "sbatch")


def run_cli(repository, tmp_path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "run.py"), *overrides]
    own = {**os.environ, **environment}
    return subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True, timeout=PATIENCE)


GRID = ("-m", "hydra/launcher=submitit_slurm", "experiment=tiny/2_sft", "seed=0,1")


def test_multirun_with_submit_is_refused_without_a_traceback(repository, tmp_path):
    done = run_cli(repository, tmp_path, "-m", "task=submit", "experiment=tiny/2_sft", "seed=0,1")
    assert done.returncode == 1 and "submitit_slurm" in done.stderr and "Traceback" not in done.stderr


def test_a_grid_takes_its_resources_from_the_submit_settings(slurm, repository, tmp_path):
    make_fake_slurm(slurm, sbatch="import shutil; shutil.copy(sys.argv[-1], here / 'grid.sh'); sys.exit('not now')")
    overrides = [
        "trainer=ddp",
        "trainer.num_nodes=2",
        "submit.partition=a100",
        "submit.time=1-00:00:30",
        "submit.memory=0",
    ]
    overrides += ["submit.setup=['module load cuda']", "submit.env.NCCL_DEBUG=INFO", "submit.cpus_per_task=5"]
    done = run_cli(repository, tmp_path, *GRID, *overrides, "submit.extra=['--exclusive','-x bad1']")
    assert done.returncode == 1 and "not now" in done.stderr and "Traceback" not in done.stderr
    lines = (slurm / "grid.sh").read_text(encoding="utf-8").splitlines()
    wanted = "--nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=5 --partition=a100 --time=1441 --mem=0"
    wanted += " --signal=USR1@120 --requeue --array=0-1%2 --exclusive --exclude=bad1"
    assert {f"#SBATCH {option}" for option in wanted.split()} <= set(lines)
    for line in ("export HF_HUB_OFFLINE=1", "export NCCL_DEBUG=INFO", "module load cuda", "set -eo pipefail"):
        assert line in lines
    assert (
        "--kill-on-bad-exit=1 --cpus-per-task=5 " in lines[-1] or "--kill-on-bad-exit=1 --cpus-per-task=5 " in lines[-2]
    )


def test_a_grid_is_refused_without_slurm(repository, tmp_path):
    done = run_cli(repository, tmp_path, *GRID, PATH=str(tmp_path))
    assert done.returncode == 1 and "no sbatch and no srun" in done.stderr and "Traceback" not in done.stderr


def test_the_launcher_without_multirun_is_refused_and_nothing_trains_locally(repository, tmp_path):
    done = run_cli(repository, tmp_path, "hydra/launcher=submitit_slurm", "experiment=tiny/2_sft")
    assert done.returncode == 1 and "Add -m" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["submit.container=x"], "submit.container: a grid cannot do that"),
        (["submit.stage_to=/scratch"], "submit.stage_to: a grid cannot do that"),
        (["submit.dry_run=true"], "submit.dry_run: a grid cannot do that"),
        (["submit.time=soon"], "expected minutes"),
        (["submit.setup=['echo \\${HOME}']"], "write $NAME"),
        (["submit.setup=['echo ${HOME}']"], "Interpolation key 'HOME' not found"),
        (["submit.extra=['-N 4']"], "follows from trainer.num_nodes"),
        (["trainer.num_nodes=1,2"], "would differ in .*: nodes."),
        (["submit.partition=a,b"], "would differ in .*: partition."),
    ],
)
def test_unsupported_settings_of_a_grid_are_reported_before_it_starts(overrides, message):
    with pytest.raises(ConfigError, match=message.replace("$", r"\$")):
        register_launcher(["experiment=tiny/2_sft", "trainer=cpu", "seed=0,1", *overrides])


@pytest.mark.parametrize(("time", "minutes"), [("0", 0), ("UNLIMITED", 0), ("0:30", 1), ("2-0", 2880), (None, 1440)])
def test_a_grids_time_limit_is_in_minutes(time, minutes):
    config = parse([*STAGE, "submit.signal_seconds=10", *([f"submit.time='{time}'"] if time else [])]).config
    assert make_launcher_config(config).timeout_min == minutes


def test_an_exception_in_a_grid_job_is_a_failed_job(monkeypatch, capsys):
    def raise_error(_: object) -> None:
        raise ZeroDivisionError("of the job")

    monkeypatch.setitem(TASKS, Task.train, raise_error)
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base=VERSION_BASE):
        config = compose("config", overrides=["task=train", "experiment=tiny/2_sft"], return_hydra_config=True)
        monkeypatch.setattr(HydraConfig.instance(), "cfg", config)
        with pytest.raises(ZeroDivisionError):  # Hydra reports it after all jobs of the grid
            run_job(config)
        monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
        with pytest.raises(SystemExit) as exit_info:
            run_job(config)
    assert exit_info.value.code == 1 and "ZeroDivisionError: of the job" in capsys.readouterr().err


def test_the_batch_script_of_a_run_is_in_the_folder_of_its_log(slurm):
    run = parse(list(STAGE))
    submit(run)
    text = Path(run.dir / "submit.sh").read_text(encoding="utf-8")
    assert f"--output={run.dir}/slurm-%j.log" in list_options(text)

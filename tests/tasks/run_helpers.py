"""Photographs on disk, and runs as a user starts them: in this process, or as `python run.py`."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image
from waiting import PATIENCE

from lit_vlm.config import Run, parse
from lit_vlm.model.spec import ModelSpec
from lit_vlm.stages import Stage
from lit_vlm.tasks.build_stage import make_stage
from lit_vlm.tasks.curate import curate
from lit_vlm.tasks.open_run import RunPlace, open_sources
from lit_vlm.tasks.prepare_data import StageData, build_stage_data
from lit_vlm.tasks.train import train
from lit_vlm.tasks.train_steps import make_datamodule, resolve_model

RUN = Path(__file__).resolve().parents[2] / "run.py"
TINY = [
    "task=train",
    "model=tiny",
    "model.grid=2",
    "model.max_tiles=4",
    "trainer=tiny",
    "data.num_workers=0",
    "data.global_batch_size=4",
    "trainer.max_steps=3",
]
TWO = [  # ranks
    "trainer=ddp",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "trainer.precision=32-true",
    "trainer.num_threads=1",
]
PHOTOS = ("china.jpg", "flower.png", "고양이.png", "astronaut.jpg")


@cache
def _load_photo_arrays():
    from skimage import data
    from sklearn.datasets import load_sample_images

    return [*load_sample_images().images, data.chelsea(), data.astronaut()]


def save_photos(folder: Path) -> Path:
    """Save photographs of scikit-learn and scikit-image: 640 x 427, 640 x 427, 451 x 300, 512 x 512."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(PHOTOS, _load_photo_arrays(), strict=True):
        Image.fromarray(array).save(folder / name)
    return folder


def make_llava_record(*texts: str, **keys) -> dict:
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)], **keys}


def write_data_choice(folder: Path, **data) -> list[str]:
    """Write a user's YAML file with several sources. Return `--config-dir conf data=own`."""
    file = folder / "conf" / "data" / "own.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data), encoding="utf-8")  # JSON is YAML
    return ["--config-dir", str(folder / "conf"), "data=own"]


def make_turns(*texts) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def write_records(path: Path, records: list) -> Path:
    """Write a JSON list, JSONL or parquet, by the suffix. A record that is text is written unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list(records).to_parquet(path)
        return path
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n" if path.suffix == ".jsonl" else f"[{', '.join(lines)}]", encoding="utf-8")
    return path


def make_conversations(n: int = 12) -> list[dict]:
    """Return LLaVA records in both languages, with one, two or no photographs, and one or two turns."""
    records = []
    for i in range(n):
        photo, korean = PHOTOS[i % 4], i % 2
        question, answer = ("무엇이 보이나요?", "사진입니다.") if korean else ("What is it?", "A photograph.")
        second_turn = (
            ("색은요?", "여러 가지") if korean and i % 3 == 0 else ("Its colour?", "Many") if i % 3 == 0 else ()
        )
        if i % 4 == 3:
            records.append(make_llava_record(question, answer, *second_turn, id=str(i)))
        elif i % 6 == 5:
            records.append(
                make_llava_record(f"<image><image>\n{question}", answer, id=str(i), image=[photo, PHOTOS[0]])
            )
        else:
            records.append(make_llava_record(f"<image>\n{question}", answer, *second_turn, id=str(i), image=photo))
    return records


@dataclass
class RunOutput:
    """Files of a run."""

    dir: Path

    @property
    def manifest(self) -> dict:
        return json.loads((self.dir / "manifest.json").read_text(encoding="utf-8"))

    @property
    def hf(self) -> Path:
        return self.dir / "hf"

    def read_column(self, name: str) -> list[float]:
        with open(self.dir / "metrics.csv", encoding="utf-8", newline="") as stream:
            return [float(row[name]) for row in csv.DictReader(stream) if row.get(name)]

    def load_weights(self) -> dict:
        from safetensors.torch import load_file

        return load_file(self.hf / "model.safetensors")

    def take_snapshot(self) -> dict[str, tuple[int, int]]:
        """Return size and modification time of every file."""
        files = [path for path in sorted(self.dir.rglob("*")) if path.is_file()]
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def run(*overrides: str) -> RunOutput:
    """Run `python run.py <TINY> <overrides>` in this process."""
    job = parse([*TINY, *overrides])
    train(job)
    return RunOutput(job.dir)


def run_curate(folder: Path, *overrides: str) -> Path:
    """Run task=curate. Returns the folder of its results."""
    job = parse(["task=curate", f"run_dir={folder / 'runs'}", "data.index_workers=1", *overrides])
    curate(job)
    return job.dir / job.config.curate.method.value


def read_lines(path: Path) -> list:
    """Read the objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def open_place(job: Run) -> RunPlace:
    return RunPlace.from_settings(job.name, job.dir, job.config.run_dir, job.config.data.index_dir)


def build_data(job: Run, init_from: str | None = None) -> StageData:
    """Build the data of a stage as task=train does: processor and data module, nothing read yet."""
    config, place = job.config, open_place(job)
    model = resolve_model(place, config.model, config.data.tiling, init_from, config.seed)
    return build_stage_data(
        place,
        open_sources(config.data, place, config.seed),
        model.spec,
        template_date=model.settings.template_date,
        data=config.data,
        stage=config.stage,
        trainer=config.trainer,
        seed=config.seed,
        debug=config.debug,
        make=make_datamodule,
    )


def make_job_stage(job: Run, spec: ModelSpec) -> Stage:
    return make_stage(
        spec,
        job.config.stage,
        precision=job.config.trainer.precision,
        tiling=job.config.data.tiling.value,
        seed=job.config.seed,
    )


def run_process(
    *overrides: str, cwd: Path, ranks: int | None = None, limit: float = PATIENCE, base: list[str] = TINY
) -> subprocess.CompletedProcess:
    """Run `python run.py <TINY> <overrides>` as a process, under torchrun with `ranks`, for at most `limit` seconds."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *launcher, str(RUN), *base, *overrides]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=limit, check=False)

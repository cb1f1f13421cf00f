"""Records, as JSON files in this folder, the behaviour that a refactoring must not change.

    python tests/golden/net.py              writes every part again
    python tests/golden/net.py plans runs   writes these (`begun`: the run folders that are resumed)

`test_golden.py` measures again and compares. Numbers that depend on the processor are compared bit by bit if the same
processor made them, and within a bound otherwise.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE)]
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true", CUDA_VISIBLE_DEVICES="")

import torch
from made_records import write_forms

STEPS = 8
WORLD_SIZES = (1, 2, 8)
PLANNED_STEPS = 64  # of each plan; later steps come from the same code
STAGES = ("1_align", "2_sft", "3_highres", "4_dpo")
SMALL = [  # a short run of a recipe's stage
    f"trainer.max_steps={STEPS}",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "data.num_workers=0",
    "data.validation.max_samples=2",
    "checkpoint.every_minutes=null",
]


def compute_digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def describe_processor() -> str:
    """Return processor name, instruction set and torch version, which decide the order in which floats are summed."""
    names = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{(names or ['unknown'])[0]}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


# ---------------------------------------------------------------------------------------------------- plans

BUILTIN = {
    "caption_ko": {"format": "builtin", "path": "caption", "language": "ko", "num_samples": 300},
    "word_en": {"format": "builtin", "path": "word", "language": "en", "num_samples": 200, "hard": True},
    "document_ko": {"format": "builtin", "path": "document", "language": "ko", "num_samples": 150},
    "several_en": {"format": "builtin", "path": "multi_image", "language": "en", "num_samples": 120},
    "text_ko": {"format": "builtin", "path": "text", "language": "ko", "num_samples": 100},
}
OWN = ["experiment=tiny/2_sft", "init_from=null", "data=own", "data.global_batch_size=16"]
PLANS: dict[str, list[str]] = {
    "as shipped: align": ["experiment=tiny/1_align"],
    "as shipped: sft": ["experiment=tiny/2_sft", "init_from=null", "trainer.max_steps=64"],
    "as shipped: highres": ["experiment=tiny/3_highres", "init_from=null", "trainer.max_steps=64"],
    "as shipped: dpo": ["experiment=tiny/4_dpo", "init_from=null"],
    "by size": [*OWN],
    "weights": [*OWN, "data.sources.caption_ko.weight=3", *(f"data.sources.{n}.weight=1" for n in [*BUILTIN][1:])],
    "weights in tokens": [*OWN, "data.weights_in=tokens", *(f"data.sources.{n}.weight=1" for n in BUILTIN)],
    "temperature": [*OWN, "data.temperature=3"],
    "shares": [*OWN, "data.share.ko=0.7", "data.share.text_only=0.1"],
    "tokens of a step": [*OWN, "data.global_batch_tokens=4000", "trainer.max_epochs=1.5", "trainer.max_steps=null"],
    "small caps": [*OWN, "data.tokens_per_micro_batch=1200", "data.tiles_per_micro_batch=12", "data.tiling=anyres"],
    "repeats and counts": [
        *OWN,
        "trainer.max_steps=null",
        "data.sources.caption_ko.repeat=2",
        "data.sources.word_en.count=50",
        "data.sources.text_ko.fraction=0.5",
    ],
}


@contextmanager
def enter_own_folder() -> Iterator[Path]:
    """Enter a new temporary folder that holds `data=own`."""
    with tempfile.TemporaryDirectory() as name, chdir(name):
        write_choice(Path("conf/data/own.yaml"), {"sources": BUILTIN})
        yield Path(name)


def write_choice(path: Path, choice: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(choice, ensure_ascii=False), encoding="utf-8")  # JSON is YAML


def build_datamodule(*overrides: str):
    from lit_vlm.config import parse

    sys.path.append(str(ROOT / "tests" / "tasks"))
    from run_helpers import build_data

    return build_data(parse(["--config-dir", "conf", *overrides])).training_data


def measure_plans() -> dict[str, dict]:
    """Return steps, micro-batches and a digest of the samples of every rank, by setting and number of ranks."""
    found: dict[str, dict] = {}
    with enter_own_folder():
        for name, overrides in PLANS.items():
            datamodule = build_datamodule(*overrides)
            for world_size in WORLD_SIZES:
                plan = datamodule.make_plan(world_size)
                found.setdefault(name, {})[str(world_size)] = {
                    "steps": plan.num_steps,
                    "k": plan.accumulate_grad_batches,
                    "digest": compute_digest(
                        [read_step(plan, step) for step in range(min(plan.num_steps, PLANNED_STEPS))]
                    ),
                }
    return found


def read_step(plan, number: int) -> list:
    step = plan.get_step(number)
    packs = [plan.index.compute_keys([*pack]).tolist() if pack else [] for pack in step.packs]
    return [step.num_supervised, step.num_samples, step.num_tiles, step.num_chosen, packs]


# ---------------------------------------------------------------------------------------------------- formats


def measure_forms() -> dict[str, dict]:
    """Return token ids, masks and tiles of 200 records of each format, partly as digests."""
    from lit_vlm.data.collate import collate

    found = {}
    with enter_own_folder() as folder:
        for form, source in write_forms(folder / "forms").items():
            stage = "4_dpo" if form.startswith("preference") else "3_highres"
            write_choice(Path("conf/data/form.yaml"), {"sources": {form: source}})
            datamodule = build_datamodule(f"experiment=tiny/{stage}", "init_from=null", "data=form")
            (opened,) = datamodule.sources
            batches = [collate(datamodule.processor, [opened[number]]) for number in range(len(opened))]
            found[form] = {
                "records": len(batches),
                "tokens": sum(len(batch.input_ids) for batch in batches),
                "supervised": sum(int((batch.labels >= 0).sum()) for batch in batches),
                "tiles": sum(len(batch.tiles) for batch in batches),
                "token ids": compute_digest([batch.input_ids.tolist() for batch in batches]),
                "labels": compute_digest([batch.labels.tolist() for batch in batches]),
                "positions": compute_digest([batch.position_ids.tolist() for batch in batches]),
                "pixels": compute_digest(
                    [hashlib.sha256(batch.tiles.numpy().tobytes()).hexdigest() for batch in batches]
                ),
                "first": batches[0].input_ids.tolist(),
            }
    return found


# ---------------------------------------------------------------------------------------------------- runs


class PlainSteps(torch.optim.AdamW):
    """AdamW with the step of SGD, which shows a wrong gradient scale that Adam hides."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-10 * group["lr"])
        return loss


def measure_runs() -> dict[str, dict]:
    """Return losses of eight steps and the weights after them, for each stage, as shipped and with SGD."""
    found: dict[str, Any] = {"processor": describe_processor()}
    with tempfile.TemporaryDirectory() as name, chdir(name):
        for optimizer in ("as shipped", "SGD"):
            for stage in STAGES:
                found[f"{stage}, {optimizer}"] = measure_stage(stage, optimizer)
    return found


def measure_stage(stage: str, optimizer: str) -> dict[str, Any]:
    from lit_vlm.config import parse
    from lit_vlm.tasks.train import train

    run = parse([f"experiment=tiny/{stage}", f"run_dir=runs/{optimizer.replace(' ', '_')}", *SMALL])
    with mock.patch.object(torch.optim, "AdamW", PlainSteps if optimizer == "SGD" else torch.optim.AdamW):
        train(run)
    return measure_run(run.dir)


def measure_run(run: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    with (run / "metrics.csv").open(encoding="utf-8", newline="") as stream:
        losses = [float(row["train/loss"]) for row in csv.DictReader(stream) if row.get("train/loss")]
    weights = load_file(run / "hf" / "model.safetensors")
    return {
        "losses": losses,
        "weights": hashlib.sha256(b"".join(weights[key].numpy().tobytes() for key in sorted(weights))).hexdigest(),
        "norms": {key: float(value.double().norm()) for key, value in sorted(weights.items())},
        "figures": sorted(json.loads((run / "manifest.json").read_text(encoding="utf-8"))["figures"]),
    }


# ---------------------------------------------------------------------------------------------------- names and keys


def measure_commands() -> dict[str, dict]:
    """Return run name and digest of the config of each command in the documents."""
    from test_readme import DOCUMENTS, ENTRY, blocks, words_of

    from lit_vlm.config import parse
    from lit_vlm.config.overrides import split_flags

    found = {}
    with tempfile.TemporaryDirectory() as name, chdir(name):
        for path in DOCUMENTS:
            for block in blocks(path, "bash"):
                for file, body in re.findall(
                    r"^cat > (\S+\.yaml) <<'END'\n(.*?)^END$", block, re.MULTILINE | re.DOTALL
                ):
                    Path(file).parent.mkdir(parents=True, exist_ok=True)
                    Path(file).write_text(body, encoding="utf-8")
        lines = {line for path in DOCUMENTS for block in blocks(path, "bash") for line in block.splitlines()}
        for line in sorted(line for line in lines if ENTRY.match(line)):
            flags, overrides = split_flags(words_of(line))
            if not flags:
                run = parse(overrides)
                found[line] = {"name": run.name, "config": compute_digest(to_plain(asdict(run.config), name))}
    return found


def to_plain(value: Any, folder: str) -> Any:
    """Convert values to JSON types, and replace the current folder in paths."""
    if isinstance(value, dict):
        return {str(key): to_plain(item, folder) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item, folder) for item in value]
    if isinstance(value, Enum):
        return value.value
    return value.replace(folder, "HERE") if isinstance(value, str) else value


def measure_keys() -> dict[str, list[str]]:
    """Return the keys of the files of a run, which other programs and resumed runs read."""
    import yaml

    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder_name:
        make_begun(Path(folder_name))
        for name in ("begun", "finished"):
            run = Path(folder_name) / name / "runs" / "begun"
            found[f"{name}: files"] = sorted(
                re.sub(r"\d{3,}", "N", str(path.relative_to(run))) for path in run.rglob("*") if path.is_file()
            )
            found[f"{name}: manifest.json"] = sorted(
                iter_key_paths(json.loads((run / "manifest.json").read_text("utf-8")))
            )
            found[f"{name}: config.yaml"] = sorted(
                iter_key_paths(yaml.safe_load((run / "config.yaml").read_text("utf-8")))
            )
            for index in sorted(run.glob("checkpoints/*/*.json")):
                keys = iter_key_paths(json.loads(index.read_text("utf-8")))
                found[f"{name}: checkpoint {index.name}"] = sorted({re.sub(r"\d+", "N", key) for key in keys})
    return found


def iter_key_paths(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from iter_key_paths(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix


# ---------------------------------------------------------------------------------------------------- a recorded run

BEGUN = [
    "task=train",
    "stage=sft",
    "model=tiny",
    "model.vision_tower=parts/tower",
    "model.language_model=parts/language",
    "trainer=tiny",
    "data=begun",
    "data.num_workers=0",
    "data.global_batch_size=4",
    "stage.learning_rate=1e-3",
    "stage.parts.language_model.lora.rank=2",
    f"trainer.max_steps={STEPS}",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "checkpoint.every_steps=1",
    "checkpoint.every_minutes=null",
    "checkpoint.asynchronous=false",
    "data.validation.max_samples=2",
    "run_name=begun",
]
KILLED_AT = 4


# The run is always resumed here, since digests of a checkpoint contain absolute paths
BEGUN_FOLDER = Path("/tmp/lit_vlm-golden")


@contextmanager
def enter_fixed_folder() -> Iterator[None]:
    """Enter the fixed folder of these runs, emptied, one process at a time."""
    from filelock import FileLock

    with FileLock(f"{BEGUN_FOLDER}.lock"):
        shutil.rmtree(BEGUN_FOLDER, ignore_errors=True)
        BEGUN_FOLDER.mkdir()
        try:
            with chdir(BEGUN_FOLDER):
                yield
        finally:
            shutil.rmtree(BEGUN_FOLDER, ignore_errors=True)


def make_begun(target: Path = HERE) -> None:
    """Write `begun/`, the folder of a run killed at step 4, and `finished/`, the same run after its end."""
    from lit_vlm.model.tiny import make_language_model, make_vision_tower

    for name in ("begun", "finished"):
        shutil.rmtree(target / name, ignore_errors=True)
    with enter_fixed_folder():
        make_vision_tower(Path("parts/tower"), hidden_size=32, intermediate_size=32, num_attention_heads=1)
        make_language_model(
            Path("parts/language"),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
        kinds = ("caption", "text")
        sources = {kind: {"format": "builtin", "path": kind, "language": "ko", "num_samples": 30} for kind in kinds}
        write_choice(Path("conf/data/begun.yaml"), {"sources": sources})
        run_begun(kill_at=KILLED_AT)
        copy_begun(target / "begun")
        run_begun()
        copy_begun(target / "finished")


def copy_begun(copy: Path) -> None:
    """Copy the folder with the parts, the run and its settings, without the data index, which is built again."""
    shutil.copytree(BEGUN_FOLDER, copy, ignore=shutil.ignore_patterns("index"))


def resume_begun(name: str) -> tuple[dict[str, Any], str]:
    """Restart a committed run in the fixed folder.

    Returns:
        Its losses, weights and norms at the end, and the printed output.
    """
    with enter_fixed_folder():
        shutil.copytree(HERE / name, BEGUN_FOLDER, dirs_exist_ok=True)
        output = run_begun()
        return {"processor": describe_processor(), name: measure_run(BEGUN_FOLDER / "runs" / "begun")}, output


def measure_finished() -> dict[str, Any]:
    """Return losses, weights and norms of the committed finished run."""
    return {"processor": describe_processor(), "begun": measure_run(HERE / "finished" / "runs" / "begun")}


def run_begun(kill_at: int | None = None) -> str:
    """Run it in its own process, in the current folder. `kill_at`: SIGKILL in the step after that one."""
    import subprocess

    code = f"import net; net.start_begun({kill_at})"
    path = os.pathsep.join([str(HERE), str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", code], env=env, check=False, capture_output=True, text=True)
    assert ended.returncode == (-9 if kill_at else 0), ended.stdout + ended.stderr
    return ended.stdout


def start_begun(kill_at: int | None) -> None:
    import lightning as L

    from lit_vlm.config import parse
    from lit_vlm.tasks.train import train

    class Kill(L.Callback):
        def on_train_batch_start(self, trainer, *_: Any) -> None:
            if trainer.global_step == kill_at:
                os.kill(os.getpid(), 9)

    init = L.Trainer.__init__

    def init_with_kill(self, *args, callbacks=None, **kwargs):
        init(self, *args, callbacks=[*(callbacks or []), Kill()], **kwargs)

    with mock.patch.object(L.Trainer, "__init__", init_with_kill) if kill_at else mock.MagicMock():
        train(parse(["--config-dir", "conf", *BEGUN]))


# ---------------------------------------------------------------------------------------------------- errors


def measure_errors() -> dict[str, list[str]]:
    """Return test of tests/config -> messages of the `UserError`s that were created in it."""
    import subprocess

    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "errors.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "record_errors", "tests/config", "-m", "not long"]
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path, "RECORDED_ERRORS": str(out), "PYTEST_ADDOPTS": ""}
        subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text(encoding="utf-8"))


PARTS = {
    "plans": measure_plans,
    "forms": measure_forms,
    "runs": measure_runs,
    "commands": measure_commands,
    "keys": measure_keys,
    "errors": measure_errors,
}


def main(parts: list[str]) -> None:
    torch.set_num_threads(1)
    for part in parts or [*PARTS, "begun"]:
        if part == "begun":
            make_begun()
            found = measure_finished()
        else:
            found = PARTS[part]()
        text = json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True)
        (HERE / f"{part}.json").write_text(text + "\n", encoding="utf-8")
        print(f"{part}: written")


if __name__ == "__main__":
    main(sys.argv[1:])

"""An optimizer step of the tiny sft stage under Lightning and ZeRO beside a bare loop over the same DeepSpeed engine.

    python -m benchmarks.engine_step [--ranks 2] [--stage 2] [--batch 16] [--steps 60]

Both sides have the same model, micro-batches that are collated already, AdamW, clipping and DeepSpeed configuration, on
CPU processes with gloo and one thread each. Steps alternate, so that a busy machine is busy for both; losses must be equal
at each step. Our side runs the callbacks and the logger of a run. The median of the ratios goes to
benchmarks/results/engine_step.json with versions.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="disabled")
warnings.filterwarnings("ignore")

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from callbacks import make_callbacks
from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.builtin import BuiltinSource
from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.engine.deepspeed import ZeroStrategy
from lit_vlm.engine.run_folder import versions
from lit_vlm.engine.trainer import leave_process_group, quiet
from lit_vlm.model.build import Blueprint, draw_up
from lit_vlm.model.tiny import tiny_parts
from lit_vlm.stages import SFTStage
from lit_vlm.stages.optimizer import make_optimizer
from lit_vlm.types import Batch, Language

KINDS = ("caption", "grounding", "instruction", "multi_image")  # each pack has pictures
CALLBACKS = ["throughput", "guard", "heartbeat"]
WARM_UP = 5  # steps that are not counted
OUT = Path(__file__).parent / "results" / "engine_step.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, default=2, choices=(2, 3))
    parser.add_argument("--batch", type=int, default=16, help="samples of a rank and step")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        return one_rank(arguments)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}"]
    command = [sys.executable, *launcher, "-m", "benchmarks.engine_step", *sys.argv[1:]]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def one_rank(arguments: argparse.Namespace) -> None:
    quiet()
    logging.getLogger("lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Path(folder), arguments)
    if int(os.environ["RANK"]) == 0:
        OUT.parent.mkdir(exist_ok=True)
        name = f"zero{arguments.stage}, {result['ranks']} ranks of {arguments.batch} samples"
        known = json.loads(OUT.read_text()) if OUT.is_file() else {}
        OUT.write_text(json.dumps(known | {name: result}, indent=2) + "\n")
        print({key: value for key, value in result.items() if key != "versions"})
    leave_process_group()


class Alternate(L.Callback):
    """Behind each step of the trainer one of the bare loop; the seconds, of the clock and of this process, and the losses."""

    def __init__(self, step: Callable[[Batch], torch.Tensor]) -> None:
        self.step = step
        self.ours: list[tuple[float, float]] = []
        self.bare: list[tuple[float, float]] = []
        self.apart = 0.0  # largest relative difference of the losses
        self.began = (0.0, 0.0)

    def on_train_start(self, trainer, pl_module):
        self.began = now()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        ended = now()
        loss = self.step(batch)
        after = now()
        self.ours.append((ended[0] - self.began[0], ended[1] - self.began[1]))
        self.bare.append((after[0] - ended[0], after[1] - ended[1]))
        mine = float(pl_module._partial)
        self.apart = max(self.apart, abs(float(loss) - mine) / mine)
        self.began = now()


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def compare(folder: Path, arguments: argparse.Namespace) -> dict:
    """Raises SystemExit where the losses differ: a ratio between different computations means nothing."""
    tower, language = tiny_parts(folder / "parts")
    blueprint = draw_up(ModelConfig(vision_tower=tower, language_model=language, grid=2, max_tiles=4))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    alternate = Alternate(lambda batch: torch.tensor(0.0))
    strategy = Bare(blueprint, alternate, arguments.stage)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        precision="32-true",
        gradient_clip_val=1.0,
        max_epochs=1,
        logger=CSVLogger(folder),
        log_every_n_steps=10,
        callbacks=[*make_callbacks(CALLBACKS, folder), alternate],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = micro_batches(blueprint, arguments.batch, arguments.steps + WARM_UP, rank, world)
    trainer.fit(make_stage(blueprint), DataLoader(batches, batch_size=None, shuffle=False))  # type: ignore[arg-type]
    if alternate.apart > 1e-5:
        raise SystemExit(f"The losses differ by {alternate.apart:.1e}. No ratio is printed.")
    clocks = {}
    for number, clock in enumerate(("wall", "cpu")):
        ours, bare = ([pair[number] for pair in side[WARM_UP:]] for side in (alternate.ours, alternate.bare))
        ratios = [mine / other for mine, other in zip(ours, bare, strict=True)]
        clocks[clock] = {
            "median_ratio": statistics.median(ratios),
            "ours_ms": 1e3 * statistics.median(ours),
            "bare_ms": 1e3 * statistics.median(bare),
            "quartiles": statistics.quantiles(ratios),
        }
    return {
        **clocks,
        "largest_relative_difference": alternate.apart,
        "ranks": world,
        "batch": arguments.batch,
        "steps": arguments.steps,
        "load": os.getloadavg(),
        "versions": versions(),
    }


def make_stage(blueprint: Blueprint) -> SFTStage:
    return SFTStage(blueprint, learning_rate=1e-3, schedule="constant", warmup=0)


class Bare(ZeroStrategy):
    """Makes the bare loop's engine beside its own, once the processes know each other."""

    def __init__(self, blueprint: Blueprint, alternate: Alternate, stage: int) -> None:
        super().__init__(stage)
        self.blueprint, self.alternate = blueprint, alternate

    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        self.alternate.step = self.bare_loop()

    def bare_loop(self) -> Callable[[Batch], torch.Tensor]:
        import deepspeed

        stage = make_stage(self.blueprint)
        stage.configure_model()
        stage.set_modes()
        optimizer = make_optimizer(stage.model, stage.options)
        engine, *_ = deepspeed.initialize(model=stage.model, optimizer=optimizer, config=self.config)
        world = self.world_size

        def step(batch: Batch) -> torch.Tensor:
            (log_probs,) = engine(batch=batch)
            loss = -log_probs.sum() / batch.step_supervised_tokens
            engine.backward(loss * world)
            engine.step()
            return loss.detach()

        return step


def micro_batches(blueprint: Blueprint, size: int, steps: int, rank: int, world: int) -> list[Batch]:
    processor = Processor(blueprint.tokenizer, blueprint.images)
    count = size * world * steps // len(KINDS) + 1
    sources = [BuiltinSource(kind, kind, language=Language.ko, num_samples=count) for kind in KINDS]
    found = []
    for step in range(steps):
        packs = []
        for other in range(world):
            first = (step * world + other) * size
            samples = [sources[i % len(sources)][i // len(sources)] for i in range(first, first + size)]
            packs.append(collate(processor, samples))
        mine = packs[rank]
        mine.step_supervised_tokens = sum(pack.num_supervised_tokens for pack in packs)
        mine.step_tiles = sum(pack.num_tiles for pack in packs)
        found.append(mine)
    return found


if __name__ == "__main__":
    main()

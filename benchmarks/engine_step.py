"""Benchmark of the engine overhead: an optimizer step under Lightning and ZeRO against a bare loop over DeepSpeed.

    python -m benchmarks.engine_step [--ranks 2] [--stage 2] [--batch 16] [--steps 60]

The stage is the tiny sft stage. Both sides use the same model, collated micro-batches, AdamW, gradient clipping and DeepSpeed
configuration, on CPU processes with gloo and one thread each. Their steps alternate, so that load of the machine affects
both; losses must be equal at each step. Our side runs the callbacks and the logger of a run. The median of the ratios goes
to benchmarks/results/engine_step.json with versions.
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
from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.data.synthetic import BuiltinSource
from lit_vlm.distributed.trainer import close_process_group, disable_library_warnings
from lit_vlm.distributed.zero import ZeroStrategy
from lit_vlm.model.spec import ModelSpec, load_model_spec
from lit_vlm.model.tiny import make_tiny_parts
from lit_vlm.runs.run_folder import get_package_versions
from lit_vlm.stages import SFTStage
from lit_vlm.stages.optimizer import make_optimizer
from lit_vlm.types import Batch, Language

KINDS = ("caption", "grounding", "instruction", "multi_image")  # each micro-batch has images
CALLBACKS = ["throughput", "guard", "heartbeat"]
WARM_UP = 5  # warm-up steps, not measured
OUT = Path(__file__).parent / "results" / "engine_step.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stage", type=int, default=2, choices=(2, 3))
    parser.add_argument("--batch", type=int, default=16, help="samples of a rank and step")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        return run_rank(arguments)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}"]
    command = [sys.executable, *launcher, "-m", "benchmarks.engine_step", *sys.argv[1:]]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def run_rank(arguments: argparse.Namespace) -> None:
    """Run the benchmark on this rank; rank 0 writes the result."""
    disable_library_warnings()
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
    close_process_group()


class BareLoopCallback(L.Callback):
    """Runs a step of the bare loop after each step of the trainer, and records wall seconds, CPU seconds and losses."""

    def __init__(self, step: Callable[[Batch], torch.Tensor]) -> None:
        self.step = step
        self.trainer_seconds: list[tuple[float, float]] = []
        self.bare_seconds: list[tuple[float, float]] = []
        self.max_loss_difference = 0.0  # maximum relative difference of the losses
        self.start = (0.0, 0.0)

    def on_train_start(self, trainer, pl_module):
        self.start = read_clocks()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer_end = read_clocks()
        loss = self.step(batch)
        bare_end = read_clocks()
        self.trainer_seconds.append((trainer_end[0] - self.start[0], trainer_end[1] - self.start[1]))
        self.bare_seconds.append((bare_end[0] - trainer_end[0], bare_end[1] - trainer_end[1]))
        trainer_loss = float(pl_module._accumulated_loss)
        self.max_loss_difference = max(self.max_loss_difference, abs(float(loss) - trainer_loss) / trainer_loss)
        self.start = read_clocks()


def read_clocks() -> tuple[float, float]:
    """Read the wall clock and the CPU clock in seconds."""
    return time.perf_counter(), time.process_time()


def compare(folder: Path, arguments: argparse.Namespace) -> dict:
    """Measure the ratio of step times. Raise SystemExit if the losses differ: such a ratio would be meaningless."""
    tower, language = make_tiny_parts(folder / "parts")
    blueprint = load_model_spec(ModelConfig(vision_tower=tower, language_model=language, grid=2, max_tiles=4))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    alternate = BareLoopCallback(lambda batch: torch.tensor(0.0))
    strategy = BareLoopStrategy(blueprint, alternate, arguments.stage)
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
    batches = make_micro_batches(blueprint, arguments.batch, arguments.steps + WARM_UP, rank, world)
    trainer.fit(make_stage(blueprint), DataLoader(batches, batch_size=None, shuffle=False))  # type: ignore[arg-type]
    if alternate.max_loss_difference > 1e-5:
        raise SystemExit(f"The losses differ by {alternate.max_loss_difference:.1e}. No ratio is printed.")
    clocks = {}
    for i, clock in enumerate(("wall", "cpu")):
        ours, bare = (
            [pair[i] for pair in seconds[WARM_UP:]] for seconds in (alternate.trainer_seconds, alternate.bare_seconds)
        )
        ratios = [mine / other for mine, other in zip(ours, bare, strict=True)]
        clocks[clock] = {
            "median_ratio": statistics.median(ratios),
            "ours_ms": 1e3 * statistics.median(ours),
            "bare_ms": 1e3 * statistics.median(bare),
            "quartiles": statistics.quantiles(ratios),
        }
    return {
        **clocks,
        "largest_relative_difference": alternate.max_loss_difference,
        "ranks": world,
        "batch": arguments.batch,
        "steps": arguments.steps,
        "load": os.getloadavg(),
        "versions": get_package_versions(),
    }


def make_stage(blueprint: ModelSpec) -> SFTStage:
    return SFTStage(blueprint, learning_rate=1e-3, schedule="constant", warmup=0)


class BareLoopStrategy(ZeroStrategy):
    """ZeRO strategy that also creates the engine of the bare loop, after the process group is initialised."""

    def __init__(self, blueprint: ModelSpec, alternate: BareLoopCallback, stage: int) -> None:
        super().__init__(stage)
        self.blueprint, self.alternate = blueprint, alternate

    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        self.alternate.step = self.make_bare_step()

    def make_bare_step(self) -> Callable[[Batch], torch.Tensor]:
        """Make the step function of the bare loop over its own DeepSpeed engine."""
        import deepspeed

        stage = make_stage(self.blueprint)
        stage.configure_model()
        stage.set_train_modes()
        optimizer = make_optimizer(stage.model, stage.config)
        engine, *_ = deepspeed.initialize(model=stage.model, optimizer=optimizer, config=self.config)
        world = self.world_size

        def step(batch: Batch) -> torch.Tensor:
            (log_probs,) = engine(batch=batch)
            loss = -log_probs.sum() / batch.step_supervised_tokens
            engine.backward(loss * world)
            engine.step()
            return loss.detach()

        return step


def make_micro_batches(blueprint: ModelSpec, size: int, steps: int, rank: int, world: int) -> list[Batch]:
    """Make the collated micro-batches of this rank, one per step."""
    processor = Processor(blueprint.tokenizer, blueprint.images)
    count = size * world * steps // len(KINDS) + 1
    sources = [BuiltinSource(kind, kind, language=Language.ko, num_samples=count) for kind in KINDS]
    own_batches = []
    for step in range(steps):
        rank_batches = []
        for other_rank in range(world):
            first = (step * world + other_rank) * size
            samples = [sources[i % len(sources)][i // len(sources)] for i in range(first, first + size)]
            rank_batches.append(collate(processor, samples))
        own_batch = rank_batches[rank]
        own_batch.step_supervised_tokens = sum(other_batch.num_supervised_tokens for other_batch in rank_batches)
        own_batch.step_tiles = sum(other_batch.num_tiles for other_batch in rank_batches)
        own_batches.append(own_batch)
    return own_batches


if __name__ == "__main__":
    main()

"""Worker of test_pair_shards: short fits of the stages of image-text pairs on several ranks, replicated and sharded.

    torchrun --nproc-per-node=2 pair_shards_worker.py OUT TEXT_ENCODER LANGUAGE_MODEL STRATEGY...

In float64, so that two strategies differ by nothing but the order of sums; in float32 under ZeRO. Writes OUT/<stage>.<rank>.pt: of each strategy the
logged figures and, on rank 0, all weights and buffers.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "stages"), str(TESTS / "engine")]

import lightning as L
import torch
from float64 import Float64
from rank_cases import StateRecorder, StateRestorer, assemble
from test_pair_stages import SIZE, STEPS, build, build_blip_stage, fit, make_source

from callbacks.captions import PairExport
from lit_vlm.data.caption_pairs import CaptionDataModule
from lit_vlm.distributed.fsdp import FSDP2Strategy
from lit_vlm.distributed.trainer import close_process_group, disable_library_warnings
from lit_vlm.distributed.zero import ZeroStrategy
from lit_vlm.model.blip import make_captioner, save_blip, save_blip_part
from lit_vlm.model.blip_parts import build_blip_retrieval, load_captioner, tokenize_with_prompt
from lit_vlm.model.qformer.build import save_blip2, tokenize_captions
from lit_vlm.model.qformer.generation import build_blip2_generator, save_blip2_generator, tokenize_prompted
from lit_vlm.stages.caption_pairs import CaptionStage, GenerateStage, PairStage, RepresentStage, RetrievalStage

STAGES = ("represent", "generate", "blip_pretrain", "blip_caption", "blip_retrieval")
# At 1e-8 Adam amplifies the noise of a bias whose true gradient is zero
RATES: dict[str, Any] = {"learning_rate": 1e-3, "warmup_steps": 1, "adam_eps": 1e-6}


def build_stage(name: str, out: Path, text_encoder: str, language_model: str) -> tuple[PairStage, Any, Any]:
    """Build a stage, the function that tokenizes its texts, and the function that saves its model to a folder."""
    if name in ("represent", "generate"):
        model, tokenizer = build(text_encoder)
        if name == "represent":
            stage: PairStage = RepresentStage(model, num_candidates=3, **RATES)
            return stage, functools.partial(tokenize_captions, tokenizer, max_tokens=16), save_blip2
        generator, tokenizer = build_blip2_generator(model, language_model)
        tokenize = functools.partial(tokenize_prompted, tokenizer, num_queries=3, max_tokens=16)
        return GenerateStage(generator, tokenizer, **RATES), tokenize, save_blip2_generator
    stage, tokenizer = build_blip_stage(text_encoder)
    stage.model.temperature.data.fill_(0.6)  # above its limit, to which the first step sets it
    tokenize = functools.partial(tokenize_captions, tokenizer, max_tokens=16)
    if name == "blip_pretrain":
        return stage, tokenize, save_blip
    if name == "blip_retrieval":
        save_on_rank_zero(stage.model.retrieval, tokenizer, out / "retrieval")
        model, tokenizer = build_blip_retrieval(str(out / "retrieval"), global_batch_size=8, queue_size=16)
        model.temperature.data.fill_(0.6)
        save = lambda model, tokenizer, folder: save_blip_part(model.retrieval, tokenizer, folder)
        return RetrievalStage(model, 2, num_candidates=3, **RATES), tokenize, save
    save_on_rank_zero(make_captioner(stage.model), tokenizer, out / "captioner")
    captioner, tokenizer = load_captioner(str(out / "captioner"))
    tokenize = functools.partial(tokenize_with_prompt, tokenizer, prompt="a ", max_tokens=16)
    stage = CaptionStage(captioner, tokenizer, prompt="a ", generation={"num_beams": 2, "max_length": 8}, **RATES)
    return stage, tokenize, save_blip_part


def save_on_rank_zero(part: Any, tokenizer: Any, folder: Path) -> None:
    if torch.distributed.get_rank() == 0:
        save_blip_part(part, tokenizer, folder)
    torch.distributed.barrier()


def make_strategy(name: str) -> Any:
    if name == "ddp":
        return "ddp"
    if name.startswith("zero"):
        # With a threshold of 300 elements some weights are partitioned, and some stay gathered
        options = {"persistence_threshold": 300, "bucket_size": 100_000, "timeout": timedelta(minutes=10)}
        return ZeroStrategy(int(name.removeprefix("zero")[0]), offload=name.endswith("offload"), **options)
    options: dict[str, Any] = {"hybrid": True, "shard_size": 1} if name == "hsdp" else {}
    return FSDP2Strategy(timeout=timedelta(minutes=10), **options)


class ResultRecorder(L.Callback):
    """Records all weights at the end, and captions of a stage that writes some."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.captions: list[str] = []

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        model = pl_module.model
        if hasattr(pl_module, "tokenizer"):
            batch, was_training = next(iter(trainer.datamodule.val_dataloader())), model.training
            with pl_module.gather_weights():
                self.captions = pl_module.eval().predict_step(batch._replace(pixel_values=batch.pixel_values[:2]), 0)
            pl_module.train(was_training)
        whole = getattr(trainer.strategy, "whole_weights", lambda model: dict(model.named_parameters()).__getitem__)(
            model
        )
        self.weights = {key: whole(key).detach().clone() for key, _ in model.named_parameters()}
        self.weights |= {key: value.clone() for key, value in model.named_buffers()}


def train(
    name: str, strategy: str, out: Path, parts: tuple[str, str], *callbacks: Any, mode: Any, **options: Any
) -> dict[str, Any]:
    """Fit a stage; returns its figures, its captions if it writes some, and all its weights.

    Args:
        mode: in which the stage trains; under `Float64` its model is in float64.
    """
    stage, tokenize, save = build_stage(name, out, *parts)
    tokenizer = getattr(stage, "tokenizer", None) or tokenize.args[0]
    data = CaptionDataModule(
        [make_source()],
        [make_source(num_samples=9, held_out=True)],  # two batches on rank 0, and one on rank 1
        tokenize,
        image_size=SIZE,
        global_batch_size=8,
        num_steps=STEPS,
    )
    if isinstance(mode, Float64):
        stage.model.double()
        collate = data.collate
        data.collate = lambda pairs: (batch := collate(pairs))._replace(pixel_values=batch.pixel_values.double())
    recorder = ResultRecorder()
    export = PairExport(
        out / f"{name}-{strategy}{options.get('precision', '')}", lambda model, folder: save(model, tokenizer, folder)
    )
    options |= {"devices": 2, "strategy": make_strategy(strategy), "use_distributed_sampler": False}
    with mode:
        trainer = fit(stage, data, callbacks=[*callbacks, export, recorder], val_check_interval=2, **options)
    figures = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return {"figures": figures, "weights": recorder.weights, "captions": recorder.captions}


def main(out: str, text_encoder: str, language_model: str, *strategies: str) -> None:
    """Train each stage under DDP and under the strategies, each of them also resumed."""
    folder, parts = Path(out), (text_encoder, language_model)
    torch.set_num_threads(1)
    disable_library_warnings()
    for name in STAGES:
        # DeepSpeed's master weights are float32
        mode: Any = contextlib.nullcontext() if strategies[0].startswith("zero") else Float64()
        results: dict[str, Any] = {"ddp": train(name, "ddp", folder, parts, mode=mode)}
        for strategy in strategies:
            if strategy.endswith("offload") and name != "blip_pretrain":
                continue
            recorder = StateRecorder(2)
            results[strategy] = train(name, strategy, folder, parts, recorder, mode=mode)
            gathered: list[Any] = [None, None]
            torch.distributed.all_gather_object(gathered, recorder.pieces if recorder.writes else [])
            restorer = StateRestorer(2, assemble(gathered))
            results[f"{strategy} resumed"] = train(name, strategy, folder, parts, restorer, mode=mode)
        if strategies[0].startswith("zero") and name == "blip_pretrain":
            for strategy in ("ddp", "zero2", "zero3"):
                halved = train(name, strategy, folder, parts, mode=mode, precision="bf16-mixed")
                results[f"{strategy} bf16-mixed"] = halved
        rank = torch.distributed.get_rank()
        torch.save(results, folder / f"{name}.{rank}.pt")
    close_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

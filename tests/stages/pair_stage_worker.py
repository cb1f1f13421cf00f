"""Worker of test_pair_stages: a short fit and a validation of BLIP-2 and of BLIP on several ranks."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "stages")]

import torch
from test_pair_stages import build, build_blip_stage, fit, make_data

from lit_vlm.stages.caption_pairs import RepresentStage

if __name__ == "__main__":
    out, text_encoder = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    model, tokenizer = build(text_encoder)
    options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    # float64: recalls of one and of two ranks differ by no pair whose rank depends on rounding
    trainer = fit(RepresentStage(model, warmup_steps=2), make_data(tokenizer), **options, precision="64-true")
    recalls = {name: float(value) for name, value in trainer.callback_metrics.items() if "_to_" in name}
    torch.save({"weights": model.state_dict(), "recalls": recalls}, out / f"fit.{trainer.global_rank}.pt")
    stage, tokenizer = build_blip_stage(text_encoder)
    fit(stage, make_data(tokenizer), **options)
    torch.save(stage.model.state_dict(), out / f"blip.{trainer.global_rank}.pt")

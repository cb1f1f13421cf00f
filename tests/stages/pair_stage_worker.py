"""Worker of test_pair_stages: a short fit and a validation on several ranks."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "stages")]

import torch
from test_pair_stages import build, fit, make_data

from lit_vlm.stages.caption_pairs import RepresentStage

if __name__ == "__main__":
    out, text_encoder = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    model, tokenizer = build(text_encoder)
    options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    trainer = fit(RepresentStage(model, warmup_steps=2), make_data(tokenizer), **options)
    recalls = {name: float(value) for name, value in trainer.callback_metrics.items() if "_to_" in name}
    torch.save({"weights": model.state_dict(), "recalls": recalls}, out / f"fit.{trainer.global_rank}.pt")

"""Worker of test_qformer: the whole loss on several ranks, one pair on each, and BLIP's fine-tuning for retrieval."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "model"), str(ROOT / "engine")]

import torch
from test_blip import require_retrieval
from test_qformer import compute_pairs, compute_step

if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.save(compute_step(rank, world_size), Path(sys.argv[1]) / f"step.{rank}.pt")
    torch.save(compute_pairs(slice(rank, rank + 1)), Path(sys.argv[1]) / f"pair.{rank}.pt")
    require_retrieval(rank, world_size)
    torch.distributed.destroy_process_group()

"""Worker of test_contrastive: BLIP's losses, the queue and the gathered rows on several ranks."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "losses")]

import torch
from test_contrastive import compute_blip

from lit_vlm.losses.contrastive import find_matches, gather_with_gradient

if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.save(compute_blip(rank, world_size), Path(sys.argv[1]) / f"blip.{rank}.pt")
    rows = torch.tensor([[10.0 * rank, 10.0 * rank + 1]], requires_grad=True)
    gathered = gather_with_gradient(rows)
    weights = torch.tensor([[1.0], [2.0]]) * (
        rank + 1
    )  # row r counts r + 1 times on rank 0 and twice as often on rank 1
    (gathered * weights).sum().backward()
    found = {"rows": gathered.detach(), "gradient": rows.grad, "matches": find_matches(1)}
    torch.save(found, Path(sys.argv[1]) / f"gather.{rank}.pt")
    torch.distributed.destroy_process_group()

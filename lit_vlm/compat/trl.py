"""Private parts of TRL: the method that computes the preference losses.

TRL has no public loss function: all of it is in `DPOTrainer._compute_loss` (trl 1.16). That method reads about twelve
attributes of its trainer and calls the model once. `make_trainer` supplies those attributes, and `run_loss` a "model" that
returns scores that were computed before, so that no Trainer, process group or dataset of TRL's is created.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lit_vlm.types import UserError


def make_trainer(losses: list[tuple[str, float]], discopop_tau: float, options: dict[str, Any]) -> Any:
    """Make an object with the attributes that `DPOTrainer._compute_loss` reads from its trainer.

    Args:
        losses: name and weight of each loss.
        options: further attributes, with the names of `trl.DPOConfig`.
    """
    model: Any = nn.Module()
    model.is_gradient_checkpointing = False
    accelerator = SimpleNamespace(
        device=None,
        gather=None,
        gather_for_metrics=lambda x: x,
        unwrap_model=lambda m, *_, **__: m,
        autocast=contextlib.nullcontext,
    )
    return SimpleNamespace(
        **options,
        model=model,
        ref_model=None,
        accelerator=accelerator,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=discopop_tau),
        aux_loss_enabled=False,
        router_aux_loss_coef=0.0,
        precompute_ref_logps=False,
        loss_types=[name for name, _ in losses],
        loss_weights=[weight for _, weight in losses],
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )


def run_loss(
    trainer: Any, policy: Any, reference: Any, mask: Tensor, training: bool
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Run `DPOTrainer._compute_loss`; return loss [], rewards [2P] and metrics.

    Args:
        policy: scores under the model that trains, with the attributes that TRL reads from a model's output.
        reference: the same under the reference model.
        mask: [2P, A], True on an answer's own tokens.

    Raises:
        UserError: the installed TRL reads other attributes.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer.model.training = training
    gathered: list[Tensor] = []

    def gather(values: Tensor) -> Tensor:
        gathered.append(values)
        return values

    trainer.accelerator.gather = gather
    trainer.accelerator.device = mask.device
    trainer.ref_model = lambda **_: reference
    try:
        loss = DPOTrainer._compute_loss(trainer, lambda **_: policy, _make_inputs(mask), False)
    except (AttributeError, TypeError, KeyError) as error:
        raise UserError(
            f"trl {version('trl')} computes its preference losses in another way than the release this adapter was written for "
            f"({error}). Install that one: pip install 'trl==1.16.0'."
        ) from error
    recorded = trainer._metrics["train" if training else "eval"]
    metrics = {name: values[-1] for name, values in recorded.items() if name != "num_tokens"}
    recorded.clear()
    return loss, torch.cat(gathered[:2]), metrics  # TRL first gathers the rewards of chosen and rejected


def _make_inputs(mask: Tensor) -> dict[str, Tensor]:
    """Make TRL's batch, reduced to the answers: one position before each, which predicts its first token."""
    completion = torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1).long()
    return {"input_ids": torch.zeros_like(completion), "attention_mask": completion, "completion_mask": completion}

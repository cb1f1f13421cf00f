"""Equality check: loss, gradients and updates of all contenders must agree before a ratio is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from benchmarks.compare.contender import Contender
from lit_vlm.types import Record, UserError


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Tolerances of the equality check."""

    loss: float  # relative difference of the first loss
    gradients: float  # minimum cosine
    parameters: float  # minimum cosine after the steps
    logps: float  # relative difference for each response


FLOAT32 = Tolerance(loss=1e-5, gradients=0.9999, parameters=0.999, logps=1e-5)
BFLOAT16 = Tolerance(loss=2e-3, gradients=0.999, parameters=0.999, logps=2e-2)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """Results of the first steps of a contender."""

    loss: float
    losses: list[float]  # losses of the later steps
    logps: list[tuple[float, float]]
    gradients: Tensor  # [P] of all trained parameters, sorted by name
    parameters: Tensor  # [P] after the steps
    updates: Tensor  # [P] their change from the start


def check_equal(
    contenders: Sequence[Contender], batches: list[list[Record]], tolerance: Tolerance = FLOAT32
) -> dict[str, dict[str, float]]:
    """Run the steps with each contender and compare the results with those of the first one.

    Returns:
        The differences, by contender.

    Raises:
        UserError: the results differ. No ratio may be printed.
    """
    first, *others = [(contender.name, run_steps(contender, batches)) for contender in contenders]
    return {first[0]: {"loss": first[1].loss}} | {
        name: compare_results(*first, name, result, tolerance) for name, result in others
    }


def run_steps(contender: Contender, batches: list[list[Record]]) -> TrainingResult:
    """Run the steps with a contender and collect its results."""
    trained = contender.get_trained_parameters()
    names = sorted(trained)
    logps = [contender.compute_log_probs(record) for record in batches[0]] if contender.case.is_preference else []
    contender.clear()
    before = flatten([trained[name].detach() for name in names])
    loss = contender.backward(contender.prepare(batches[0]))
    gradients = flatten([_get_gradient(trained[name]) for name in names])
    contender.update()
    losses = []
    for records in batches[1:]:
        losses.append(contender.backward(contender.prepare(records)))
        contender.update()
    after = flatten([trained[name].detach() for name in names])
    return TrainingResult(loss, losses, logps, gradients, after, after - before)


def compare_results(
    ours: str, mine: TrainingResult, name: str, theirs: TrainingResult, tolerance: Tolerance
) -> dict[str, float]:
    """Compute the differences between two contenders.

    Raises:
        UserError: a difference exceeds its tolerance.
    """
    if len(mine.gradients) != len(theirs.gradients):
        raise UserError(
            f"{name} trains {len(theirs.gradients):,} parameters and {ours} {len(mine.gradients):,}. No ratio is printed; "
            "both must freeze the same parts."
        )
    differences = {
        "loss": _compute_relative_difference(theirs.loss, mine.loss),
        "gradients": _compute_cosine(theirs.gradients, mine.gradients),
        "parameters": _compute_cosine(theirs.parameters, mine.parameters),
        "updates": _compute_cosine(theirs.updates, mine.updates),
        "later_losses": max(
            [_compute_relative_difference(a, b) for a, b in zip(theirs.losses, mine.losses, strict=True)], default=0.0
        ),
    }
    pairs = [
        _compute_relative_difference(a, b)
        for one, two in zip(theirs.logps, mine.logps, strict=True)
        for a, b in zip(one, two, strict=True)
    ]
    differences["logps"] = max(pairs, default=0.0)
    limits = asdict(tolerance)
    for quantity in ("loss", "logps", "gradients", "parameters"):
        is_exceeded = (
            differences[quantity] > limits[quantity]
            if quantity in ("loss", "logps")
            else not differences[quantity] >= limits[quantity]
        )
        if is_exceeded:
            kind = "differ by" if quantity in ("loss", "logps") else "have a cosine of"
            raise UserError(
                f"{name} and {ours} compute different things: the {quantity} of the first steps {kind} {differences[quantity]:.3g} "
                f"(limit {limits[quantity]:g}; losses {theirs.loss:.7f} and {mine.loss:.7f}). No ratio is printed."
            )
    return differences


def require_checkpointing(contender: Contender, expected: bool) -> None:
    """Require that activation checkpointing is on or off, as expected.

    Flags alone are not enough: transformers skips the checkpointing of modules in eval mode.

    Raises:
        UserError: activations are recomputed unexpectedly, or not recomputed as expected.
    """
    modules = list(contender.models[0].modules())
    active = any(getattr(module, "gradient_checkpointing", False) and module.training for module in modules)
    if active != expected:
        raise UserError(
            f"{contender.name} {'recomputes' if active else 'does not recompute'} activations. No ratio is printed."
        )


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Flatten tensors into one float32 vector on the CPU."""
    return torch.cat([tensor.flatten().float().cpu() for tensor in tensors])


def _get_gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _compute_relative_difference(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-12)


def _compute_cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-300))

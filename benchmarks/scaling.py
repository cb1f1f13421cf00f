"""Communication of a training step: simulated, compared with published numbers, and counted in real processes.

    python -m benchmarks.scaling [--no-ranks]

Simulated: 0.5B to 72B (Qwen2.5 shapes with SigLIP so400m) on 8 to 512 GPUs and four fabrics: full fine-tuning in bf16-mixed
with activation checkpointing, 8,192 tokens per device and micro-step (ten tiles), H200 at 40 % of its peak, and the
strategy that `task=preflight` chooses. Counted: the bytes that 2 to 8 gloo processes of the tiny model send in a step,
compared with the formulas. The result goes to benchmarks/results/scaling.json with versions, its tables to docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_vlm.config.choices import ActivationCheckpointing, DeviceName, StrategyName
from lit_vlm.cost import (
    DEVICES,
    Cluster,
    CommunicationScheme,
    MicroBatchSize,
    ModelShape,
    ParameterCounts,
    TrainingOptions,
    TrainingSetup,
    choose_strategy,
    simulate_step,
)
from lit_vlm.cost.communication import (
    FABRICS,
    BytesPerValue,
    Fabric,
    LayerCost,
    StepTiming,
    compute_break_even_tokens,
    compute_step_traffic,
)
from lit_vlm.cost.layers import build_layer_costs
from lit_vlm.cost.memory import Precision

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "benchmarks/results/scaling.json", ROOT / "docs/scaling.md"
GPUS = (8, 16, 32, 64, 128, 256, 512)
SCHEMES = {
    "ZeRO-3": CommunicationScheme.zero3,
    "HSDP": CommunicationScheme.hsdp,
    "ZeRO++": CommunicationScheme.zeropp,
    "DDP": CommunicationScheme.ddp,
}
STRATEGIES = {
    "ZeRO-3": StrategyName.deepspeed_zero3,
    "HSDP": StrategyName.hsdp,
    "ZeRO++": StrategyName.deepspeed_zero3,
    "DDP": StrategyName.ddp,
}
SCHEME_TITLES = {
    StrategyName.ddp: "DDP",
    StrategyName.hsdp: "HSDP",
    StrategyName.fsdp2: "ZeRO-3",
    StrategyName.deepspeed_zero3: "ZeRO-3",
}
LOAD = MicroBatchSize(tokens=8192, tiles=10, supervised=900)
COUNTED_RUNS = [("ddp", 2), ("ddp", 4), ("ddp", 8), ("deepspeed_zero2", 2), ("deepspeed_zero3", 2), ("deepspeed_zero3", 4)] + [
    ("deepspeed_zero3", 8), ("fsdp2", 2), ("fsdp2", 4), ("fsdp2", 8), ("hsdp", 4), ("hsdp", 8)
]  # fmt: skip


@dataclass(frozen=True)
class LanguageModelSize:
    """Shape of a Qwen2.5 language model, from its config.json."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False

    def make_shape(self, tower_layers: int = 26) -> ModelShape:
        text = {
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
        }
        vision = {"hidden_size": 1152, "num_hidden_layers": tower_layers, "intermediate_size": 4304}
        return ModelShape.from_config(
            {"text_config": text, "vision_config": vision | {"image_size": 384, "patch_size": 14}}
        )


MODELS = {
    "0.5B": LanguageModelSize(896, 4864, 24, 14, 2, 151936, tied=True),
    "1.5B": LanguageModelSize(1536, 8960, 28, 12, 2, 151936, tied=True),
    "7B": LanguageModelSize(3584, 18944, 28, 28, 4, 152064),
    "14B": LanguageModelSize(5120, 13824, 48, 40, 8, 152064),
    "32B": LanguageModelSize(5120, 27648, 64, 40, 8, 152064),
    "72B": LanguageModelSize(8192, 29568, 80, 64, 8, 152064),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-ranks", action="store_true", help="keep the counts of the last run")
    arguments = parser.parse_args()
    from lit_vlm.runs.run_folder import get_package_versions

    result: dict[str, Any] = {"published": compare_published(), "simulated": simulate_all()}
    if arguments.no_ranks:
        result["counted"] = json.loads(RESULT.read_text())["counted"]
    else:
        result["counted"] = [compare_formula(count_bytes(strategy, ranks)) for strategy, ranks in COUNTED_RUNS]
    RESULT.write_text(json.dumps(result | {"versions": get_package_versions()}, indent=1) + "\n")
    write_page(result)
    for title, table in render_tables(result).items():
        print(f"\n{title}\n{table}")


# ---- simulated


def compare_published() -> list[dict[str, Any]]:
    """Compare with an older published estimate for Qwen2.5-14B without a tower.

    It assumes bfloat16 gradients, 8,192 tokens, 45 % of 989 TFLOP/s and samples of 4,096 tokens.
    """
    rows = []
    zero3 = {
        fabric.name: {gpus: _simulate_language_model(CommunicationScheme.zero3, gpus, fabric) for gpus in (16, 64, 128)}
        for fabric in FABRICS
    }
    for fabric, seconds in zip(
        FABRICS, ((0.22, 0.25, 0.28), (0.45, 0.81, 0.90), (0.89, 1.59, 1.73), (7.4, 13, 14)), strict=True
    ):
        for (gpus, timing), published_value in zip(zero3[fabric.name].items(), seconds, strict=True):
            rows.append(
                _make_row(
                    f"{fabric.name}: seconds of ZeRO-3's communication, {gpus} GPUs",
                    published_value,
                    timing.communication_seconds,
                    0.04,
                )
            )
    for fabric, published_value in zip(FABRICS, (1400, 4600, 9100, 74000), strict=True):
        tokens = compute_break_even_tokens(zero3[fabric.name][64], 8192)
        rows.append(
            _make_row(
                f"{fabric.name}: tokens from which on ZeRO-3's is hidden, 64 GPUs", published_value, round(tokens), 0.02
            )
        )
    node, ethernet = FABRICS[2], FABRICS[3]
    for scheme, gpus, fabric, k, published_value, tolerance in (
        (CommunicationScheme.zero3, 128, node, 1, 84, 0.10),
        (CommunicationScheme.zero3, 512, node, 1, 72, 0.10),
        (CommunicationScheme.hsdp, 128, node, 1, 99, 0.06),
        (CommunicationScheme.zero3, 16, ethernet, 1, 21, 0.05),
        (CommunicationScheme.zero3, 128, ethernet, 1, 11, 0.05),
        (CommunicationScheme.zeropp, 16, ethernet, 1, 79, 0.16),
        (CommunicationScheme.zeropp, 128, ethernet, 1, 43, 0.05),
        (CommunicationScheme.hsdp, 64, ethernet, 8, 100, 0.40),
    ):  # fmt: skip
        share = _simulate_language_model(scheme, gpus, fabric, k).efficiency
        title = f"{fabric.name}: % of the devices' speed, {scheme}, {gpus} GPUs, k = {k}"
        rows.append(_make_row(title, published_value, round(100 * share), tolerance))
    rows.append(
        _make_row(
            "into each of 2 nodes, ZeRO-3: GB per micro-step (M = 29.5 GB; 3M, half from outside)",
            44.3,
            _compute_outside_traffic(),
            0.01,
        )
    )
    return rows


def _make_row(title: str, known: float, found: float, tolerance: float) -> dict[str, Any]:
    return {"what": title, "published": known, "here": round(found, 3), "tolerance": tolerance}


def make_language_layers(
    model: LanguageModelSize, tokens: int = 8192, segment: int = 4096, rate: float = 0.45 * 989e12
) -> list[LayerCost]:
    """Make the layers of the language model as the published rows count: no tower, no projector, no recomputation."""
    text, supervised = model.make_shape(0).text, 0.3 * tokens
    body = 2.0 * tokens * (text.layer_parameters + segment * text.query_width) / rate
    table, head = (
        float(text.hidden_size * text.vocab_size),
        2.0 * supervised * text.hidden_size * text.vocab_size / rate,
    )
    layer = LayerCost(float(text.layer_parameters), float(text.layer_parameters), body, 2 * body)
    return [LayerCost(table, table, 0.0, 0.0), *[layer] * text.num_layers, LayerCost(table, table, head, 2 * head)]


def _simulate_language_model(scheme: CommunicationScheme, gpus: int, fabric: Fabric, k: int = 1) -> StepTiming:
    return simulate_step(
        scheme,
        make_language_layers(MODELS["14B"]),
        Cluster(gpus, fabric),
        num_micro_batches=k,
        bytes_per_value=BytesPerValue(gradient=2),
    )


def _compute_outside_traffic() -> float:
    return _simulate_language_model(CommunicationScheme.zero3, 16, FABRICS[0]).traffic.inter_node_bytes / 1e9


def make_situation(model: LanguageModelSize, gpus: int, fabric: Fabric, k: int = 1) -> TrainingSetup:
    """Make the setup for full fine-tuning of a model with its vision tower."""
    shape = model.make_shape()
    text = shape.text
    tables = text.hidden_size * text.vocab_size * (1 if model.tied else 2)
    total = (
        text.num_layers * text.layer_parameters
        + tables
        + shape.vision.num_layers * shape.vision.layer_parameters
        + shape.projector_parameters
    )
    largest = max(text.layer_parameters, text.hidden_size * text.vocab_size)
    return TrainingSetup(
        shape=shape,
        parameters=ParameterCounts(total, total, autocast=total, largest_layer=largest),
        training=TrainingOptions(
            Precision.from_name("bf16-mixed"), True, True, checkpointing=ActivationCheckpointing.full
        ),
        micro_batch=LOAD,
        world_size=gpus,
        devices_per_node=8,
        device=DEVICES[DeviceName.h200],
        fabric=fabric,
        num_micro_batches=k,
    )


def simulate_all() -> list[dict[str, Any]]:
    """Simulate the share of device speed that remains, for each model, fabric, number of GPUs and strategy that fits."""
    rows = []
    for k in (1, 8):
        for fabric in FABRICS:
            for name, model in MODELS.items():
                rows += [_simulate_cell(name, model, gpus, fabric, k) for gpus in GPUS]
    return rows


def _simulate_cell(name: str, model: LanguageModelSize, gpus: int, fabric: Fabric, k: int) -> dict[str, Any]:
    setup = make_situation(model, gpus, fabric, k)
    layers = build_layer_costs(
        setup.shape,
        setup.parameters,
        setup.training,
        setup.micro_batch,
        setup.device.peak_flops_per_second * setup.utilisation,
    )
    results: dict[str, Any] = {}
    for title, scheme in SCHEMES.items():
        if not setup.can_fit(STRATEGIES[title]):
            continue
        if gpus == 8 and scheme in (CommunicationScheme.hsdp, CommunicationScheme.zeropp):
            continue  # equals ZeRO-3 within one node
        timing = simulate_step(scheme, layers, Cluster(gpus, fabric), num_micro_batches=k)
        inside, outside = (
            round(size / 1e9, 2) for size in (timing.traffic.intra_node_bytes, timing.traffic.inter_node_bytes)
        )
        results[title] = {
            "share": round(timing.efficiency, 4),
            "exposed": round(timing.exposed_seconds, 4),
            "inside_gb": inside,
            "outside_gb": outside,
        }
    chosen = choose_strategy(setup)
    return {
        "model": name,
        "gpus": gpus,
        "fabric": fabric.name,
        "k": k,
        "chosen": chosen.strategy.value,
        "schemes": results,
    }


# ---- counted


def count_bytes(
    strategy: str, ranks: int, num_micro_batches: int = 1, precision: str = "32-true", timeout_seconds: float = 600
) -> dict[str, Any]:
    """Count the bytes that gloo processes send and hold in one step of the tiny model.

    Args:
        strategy: name of the strategy.
        ranks: number of processes.
        num_micro_batches: 1: a step is one micro-batch; more: a step has several, as many as the plan needs.
        precision: precision of the trainer.
        timeout_seconds: timeout in seconds.

    Raises:
        RuntimeError: the processes failed.
    """
    from lit_vlm.model.tiny import make_tiny_parts

    with tempfile.TemporaryDirectory() as folder:
        path, parts = Path(folder) / "out.json", make_tiny_parts(Path(folder) / "parts")
        arguments = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            "-m",
            "benchmarks.counting",
        ]
        arguments += [strategy, str(num_micro_batches), precision, str(path), *map(str, parts)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )
        if process.returncode:
            raise RuntimeError(f"{strategy} on {ranks} ranks: {process.stderr[-2000:]}")
        return json.loads(path.read_text())


def compare_formula(counted: dict[str, Any]) -> dict[str, Any]:
    """Compare the bytes received by each rank with the formulas of `lit_vlm.cost.communication`, and with their omissions."""
    ranks, k, strategy = counted["ranks"], counted["k"], counted["strategy"]
    group = max(1, ranks // 2) if strategy == "hsdp" else ranks
    scheme = {
        "ddp": CommunicationScheme.ddp,
        "deepspeed_zero2": CommunicationScheme.zero2,
        "hsdp": CommunicationScheme.hsdp,
    }.get(strategy, CommunicationScheme.zero3)
    size = 4.0 if counted["precision"] == "32-true" else 2.0
    layer = LayerCost(counted["total"], counted["trainable"], 1.0, 1.0)
    predicted = compute_step_traffic(
        scheme,
        [layer],
        Cluster(ranks, FABRICS[0], group),
        num_micro_batches=k,
        bytes_per_value=BytesPerValue(size, 4.0),
    )
    formula = (
        predicted.intra_node_bytes + predicted.inter_node_bytes / group
    )  # this rank's share of the traffic into its node
    group_share, replica_share = (group - 1) / group, (ranks // group - 1) / (ranks // group)
    sum_share = group_share if group == ranks else replica_share
    sent = counted["bytes"]
    received = group_share * (sent.get("all-gather", 0) + sent.get("reduce-scatter", 0)) + 2 * sum_share * sent.get(
        "all-reduce", 0
    )
    return counted | {
        "formula": round(formula),
        "came": round(received),
        "left_out": round(group_share * k * size * count_omitted_elements(counted)),
    }


def count_omitted_elements(counted: dict[str, Any]) -> int:
    """Count the elements that an engine gathers per micro-step beyond twice the model; negative if fewer."""
    if counted["strategy"] in ("fsdp2", "hsdp"):
        return -counted["root"]  # gathered once, and kept from the forward to the backward pass
    if counted["strategy"] == "deepspeed_zero3":
        # tied tables are gathered as embeddings and as head; weights without a gradient only in the forward pass
        return 2 * counted["table"] - (counted["total"] - counted["trainable"])
    return 0


# ---- tables


def render_tables(result: dict[str, Any]) -> dict[str, str]:
    """Render the tables as Markdown, by name."""
    tables_by_name = {
        "published": _render_published_table(result["published"]),
        "counted": _render_counted_table(result["counted"]),
    }
    for k in (1, 8):
        for fabric in FABRICS:
            rows = [row for row in result["simulated"] if row["fabric"] == fabric.name and row["k"] == k]
            tables_by_name[f"{fabric.name}, k = {k}"] = _render_share_table(rows)
    return tables_by_name


def _render_share_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | strategy | " + " | ".join(map(str, GPUS)) + " |", "|---|---|" + "---|" * len(GPUS)]
    for model in MODELS:
        cells = {row["gpus"]: row for row in rows if row["model"] == model}
        for scheme in SCHEMES:
            if any(scheme in row["schemes"] for row in cells.values()):
                values = [_render_share_cell(cells[gpus], scheme) for gpus in GPUS]
                lines.append(f"| {model} | {scheme} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _render_share_cell(row: dict[str, Any], scheme: str) -> str:
    if scheme not in row["schemes"]:
        return ""
    text = f"{100 * row['schemes'][scheme]['share']:.0f}"
    chosen = SCHEME_TITLES.get(StrategyName(row["chosen"])) == scheme
    return f"**{text}**" if chosen else text


def _render_published_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | published | here |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {row['what']} | {row['published']:,g} | {row['here']:,g} |" for row in rows)])


def _render_counted_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| strategy | ranks | received by each rank, bytes | formula | engine-specific | rest |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        rest = row["came"] - row["formula"] - row["left_out"]
        numbers = f"{row['came']:,} | {row['formula']:,} | {row['left_out']:+,} | {rest:,}"
        lines.append(f"| {row['strategy']} | {row['ranks']} | {numbers} |".replace("+0 |", "0 |"))
    return "\n".join(lines)


def write_page(result: dict[str, Any]) -> None:
    """Write the tables between the markers of docs/scaling.md."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in render_tables(result).items():
        marker = f"<!-- figures of benchmarks/results/scaling.json: {name} -->"
        pattern = re.compile(re.escape(marker) + r"\n.*?<!-- /figures -->", re.DOTALL)
        text = pattern.sub(lambda _, m=marker, t=table: f"{m}\n{t}\n<!-- /figures -->", text)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

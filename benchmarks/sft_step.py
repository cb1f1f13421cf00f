"""One optimizer step of the tiny sft stage beside TRL's SFTTrainer: same weights, same samples, equal loss first, then samples/s.

    python -m benchmarks.sft_step [--batch 32] [--repeats 7] [--steps 5]

Both sides read records, tile images, tokenise, collate, run forward and backward, clip and step AdamW, on one CPU
thread. TRL stands in two rows: as shipped (it recomputes activations) and tuned (it does not). Runs are interleaved;
medians and their ratio are printed. The result goes to benchmarks/results/sft_step.json with versions.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="disabled")
warnings.filterwarnings("ignore")

import torch
from transformers import LlavaOnevisionForConditionalGeneration

from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.builtin import BuiltinSource
from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.engine.run_folder import versions
from lit_vlm.engine.trainer import quiet
from lit_vlm.model.build import Blueprint, build, draw_up
from lit_vlm.model.export import export_model
from lit_vlm.model.hub import plain_processor
from lit_vlm.model.tiny import tiny_parts
from lit_vlm.stages import SFTStage
from lit_vlm.types import ImageSlot, Language, Sample

KINDS = ("caption", "word", "number", "grounding", "instruction", "text", "multi_image")
TEMPLATE = (  # ours, with the marks that TRL needs to know an answer
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' }}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>\n' }}{%- elif message['role'] == 'assistant' -%}"
    "{% generation %}{{ part['text'] + '<|im_end|>' }}{% endgeneration %}{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}"
    "{%- if message['role'] != 'assistant' -%}{{ '<|im_end|>' }}{%- endif -%}{{ '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Path(folder), arguments.batch, arguments.repeats, arguments.steps)
    out = Path(__file__).parent / "results" / "sft_step.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    show(result)


def compare(folder: Path, batch: int, repeats: int, steps: int) -> dict:
    """Check that the losses are equal, then time the contenders in turn.

    Raises:
        SystemExit: the losses differ; a ratio between different computations means nothing.
    """
    tower, language = tiny_parts(folder / "parts")
    blueprint = draw_up(ModelConfig(vision_tower=tower, language_model=language, grid=2, max_tiles=4))
    processor = Processor(blueprint.tokenizer, blueprint.images)
    export_model(build(blueprint), blueprint.tokenizer, blueprint.images, folder / "hf")
    sources = [
        BuiltinSource(kind, kind, language=lang, num_samples=1000)
        for kind in KINDS
        for lang in (Language.ko, Language.en)
    ]
    samples = [sources[i % len(sources)][i // len(sources)] for i in range(batch * (steps + 1))]
    batches = [samples[i : i + batch] for i in range(0, len(samples), batch)]
    contenders = {
        "lit_vlm": ours(blueprint, processor),
        "TRL SFTTrainer as shipped": trls(folder, processor, checkpointing=True),
        "TRL SFTTrainer tuned": trls(folder, processor, checkpointing=False),
    }
    losses = {name: step(batches[0]) for name, step in contenders.items()}
    worst = max(abs(loss - losses["lit_vlm"]) / losses["lit_vlm"] for loss in losses.values())
    if worst > 1e-5:
        raise SystemExit(f"The first losses differ by {worst:.1e}: {losses}. No ratio is printed.")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats):
        order = list(contenders) if repeat % 2 == 0 else list(contenders)[::-1]
        for name in order:
            began = time.perf_counter()
            for samples in batches[1:]:
                contenders[name](samples)
            times[name].append(batch * steps / (time.perf_counter() - began))
    return {
        "losses": losses,
        "largest_relative_difference": worst,
        "batch": batch,
        "samples_per_second": {name: sorted(values) for name, values in times.items()},
        "versions": versions(),
    }


def ours(blueprint: Blueprint, processor: Processor) -> Callable[[list[Sample]], float]:
    stage = SFTStage(blueprint)
    stage.configure_model()
    optimizer = torch.optim.AdamW(
        [p for p in stage.model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0, fused=True
    )

    def step(samples: list[Sample]) -> float:
        batch = collate(processor, samples)
        batch.step_supervised_tokens = batch.num_supervised_tokens
        loss = stage.step_loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def trls(folder: Path, processor: Processor, checkpointing: bool) -> Callable[[list[Sample]], float]:
    """TRL's collator and training_step, with an optimizer step behind it as in its loop."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = TEMPLATE
    plain = plain_processor(tokenizer, processor.images)
    options = SFTConfig(
        output_dir=str(folder / "trl"),
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_length=None,
        gradient_checkpointing=checkpointing,
        assistant_only_loss=True,
        learning_rate=1e-3,
        weight_decay=0.0,
        disable_tqdm=True,
    )
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder / "hf")
    first = BuiltinSource("caption", "caption", language=Language.ko, num_samples=1)[0]
    trainer = SFTTrainer(model, options, train_dataset=Dataset.from_list([row_of(first)]), processing_class=plain)
    if checkpointing:  # train() would do it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options.gradient_checkpointing_kwargs)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0, fused=True
    )

    def step(samples: list[Sample]) -> float:
        inputs = trainer.data_collator([row_of(sample) for sample in samples])
        count = (inputs["labels"][:, 1:] != -100).sum()
        loss = trainer.training_step(model, inputs, num_items_in_batch=count)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def row_of(sample: Sample) -> dict:
    messages = [
        {
            "role": message.role.value,
            "content": [
                {"type": "image"}
                if isinstance(piece, ImageSlot)
                else {"type": "text", "text": piece if isinstance(piece, str) else piece.token}
                for piece in message.content
            ],
        }
        for message in sample.messages
    ]
    for message in messages:  # neighbouring texts are one text
        parts: list[dict] = []
        for part in message["content"]:
            if parts and part["type"] == parts[-1]["type"] == "text":
                parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
            else:
                parts.append(part)
        message["content"] = parts
    return {"messages": messages, "images": [image.load() for image in sample.images]}


def show(result: dict) -> None:
    medians = {name: statistics.median(values) for name, values in result["samples_per_second"].items()}
    print(f"first loss: {', '.join(f'{name} {loss:.7f}' for name, loss in result['losses'].items())}")
    for name, median in medians.items():
        values = result["samples_per_second"][name]
        print(
            f"{name:28} {median:7.1f} samples/s  (from {values[0]:.1f} to {values[-1]:.1f})  lit_vlm / this = {medians['lit_vlm'] / median:.2f}"
        )


if __name__ == "__main__":
    main()

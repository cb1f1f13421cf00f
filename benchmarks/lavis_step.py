"""Benchmark of a step of BLIP-2's first stage beside LAVIS 1.0.2 in its environment, on one CPU thread.

    make oracle  # once, for the environment
    python -m benchmarks.lavis_step [--repeats 7] [--steps 3] [--docs]

Both sides have the same weights, encoded images, texts and optimizer (AdamW), without dropout; the frozen vision tower, which
is the same on both sides, is left out. First the losses of both with equal negatives are compared. Then both sides run in turn,
each in a process of its own: CPU seconds of forward, backward and optimizer step, medians; growth of the resident memory to its
peak during the steps; and FLOPs of forward and backward, counted by PyTorch with attention as matrix products. Their ratio is
the largest speed-up at equal FLOP/s. The result goes to benchmarks/results/lavis_step.json; `--docs` writes its table into
docs/qformer.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[1]
LAVIS_PYTHON = ROOT / ".venv-outside/lavis/bin/python"
WITHOUT_CUDA = ROOT / "tests/outside/without_cuda"  # torchvision with a CPU build of torch
RESULT = ROOT / "benchmarks/results/lavis_step.json"
DOCS = ROOT / "docs/qformer.md"
TABLE_PATTERN = re.compile(r"(?<=<!-- lavis-step-table -->\n).*?(?=<!-- /lavis-step-table -->)", re.DOTALL)

PAIRS, TOKENS, PATCHES, VISION_WIDTH, QUERIES, FEATURES = 32, 32, 65, 96, 32, 64
PAD, BOS = 0, 998
BERT = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": PAD,
}


# ---- what both sides do; this file also runs in LAVIS's environment


class Side:
    """One side: a model, and how it computes its loss."""

    def build(self) -> torch.nn.Module:
        raise NotImplementedError

    def compute_losses(self, negatives: tuple | None = None) -> list[torch.Tensor]:
        """Compute ITC, ITM and ITG, with given columns of the negatives or sampled ones."""
        raise NotImplementedError

    def step(self) -> None:
        """Run one optimizer step."""
        sum(self.compute_losses()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class LavisSide(Side):
    """LAVIS's `Blip2Qformer`, whose vision tower and tokenizer, which it would download, are replaced."""

    def build(self) -> torch.nn.Module:
        from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
        from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel

        torch.distributed.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
        model = Blip2Qformer.__new__(Blip2Qformer)
        torch.nn.Module.__init__(model)
        changes = {"encoder_width": VISION_WIDTH, "add_cross_attention": True, "cross_attention_freq": 2}
        model.Qformer = BertLMHeadModel(BertConfig(**BERT, **changes, query_length=QUERIES))
        model.visual_encoder, model.ln_vision = torch.nn.Identity(), torch.nn.LayerNorm(VISION_WIDTH)
        model.query_tokens = torch.nn.Parameter(torch.randn(1, QUERIES, BERT["hidden_size"]) * 0.02)
        model.vision_proj = torch.nn.Linear(BERT["hidden_size"], FEATURES)
        model.text_proj = torch.nn.Linear(BERT["hidden_size"], FEATURES)
        model.itm_head = torch.nn.Linear(BERT["hidden_size"], 2)
        model.temp = torch.nn.Parameter(0.07 * torch.ones([]))
        model.tokenizer, model.max_txt_len = self, TOKENS
        self.model, self.bos_token_id, self.pad_token_id = model, BOS, PAD
        return model

    def __call__(self, texts, **_):
        """Return the token ids, in the place of LAVIS's tokenizer."""

        class Texts(dict):
            def to(self, device):
                return self

        output = Texts(input_ids=self.ids.clone(), attention_mask=self.mask)
        output.input_ids, output.attention_mask = output["input_ids"], output["attention_mask"]
        return output

    def compute_losses(self, negatives=None):
        sample = torch.multinomial
        if negatives is not None:
            columns = iter([int(column) for part in negatives for column in part])
            torch.multinomial = lambda weights, number: torch.tensor([next(columns)])
        output = self.model({"image": self.images, "text_input": None})
        torch.multinomial = sample
        return [output["loss_itc"], output["loss_itm"], output["loss_lm"]]


class OurSide(Side):
    """`Blip2ForPretraining` with LAVIS's weights."""

    def build(self) -> torch.nn.Module:
        from transformers import BertConfig, Blip2ForImageTextRetrieval, Blip2VisionConfig

        from lit_vlm.model.qformer.pretraining import Blip2ForPretraining, make_blip2_config

        vision = Blip2VisionConfig(hidden_size=VISION_WIDTH, intermediate_size=8, num_hidden_layers=1, image_size=28)
        config = make_blip2_config(vision, BertConfig(**BERT), num_queries=QUERIES, feature_width=FEATURES)
        self.model = Blip2ForPretraining(Blip2ForImageTextRetrieval(config), BOS)
        self.model.retrieval.vision_model.post_layernorm.eps = 1e-5  # of LAVIS's ln_vision
        return self.model

    def load(self, weights):
        """Load LAVIS's weights; the vision tower, which no step uses, keeps its own."""
        from lit_vlm.model.qformer.lavis_weights import convert_lavis_weights

        missing, unexpected = self.model.load_state_dict(convert_lavis_weights(weights), strict=False)
        assert not unexpected and all("vision_model" in name for name in missing), (missing, unexpected)

    def compute_losses(self, negatives=None):
        embeds = self.model.retrieval.vision_model.post_layernorm(self.images)
        losses = self.model.compute_losses(embeds, self.ids, self.mask, negatives=negatives)
        return [losses.itc, losses.itm, losses.itg]


def run_side(name: str, folder: Path) -> None:
    """Serve one side: build it, print its losses and FLOPs, then a line of CPU seconds and peak memory for each line read."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    side = LavisSide() if name == "lavis" else OurSide()
    model = side.build()
    inputs = torch.load(folder / "inputs.pt", weights_only=True)
    side.images, side.ids, side.mask, images, texts = inputs["tensors"]
    if name == "lavis":
        torch.save(model.state_dict(), folder / "weights.pt")
    else:
        side.load(torch.load(folder / "weights.pt", weights_only=True))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    side.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05)
    model.train()
    losses = [float(loss.detach()) for loss in side.compute_losses((images, texts))]
    print(json.dumps({"losses": losses, "flops": count_flops(side), "torch": torch.__version__}), flush=True)
    side.step()
    for line in sys.stdin:
        before = reset_peak_memory()
        start = time.process_time()
        for _ in range(int(line)):
            side.step()
        seconds = (time.process_time() - start) / int(line)
        print(json.dumps({"seconds": seconds, "memory": read_memory("VmHWM") - before}), flush=True)


def count_flops(side: Side) -> int:
    """Count the FLOPs of forward and backward; attention as matrix products, because PyTorch counts no fused kernel of a CPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sum(side.compute_losses()).backward()
    side.model.zero_grad()
    return counter.get_total_flops()


def read_memory(name: str) -> int:
    """Read a field of /proc/self/status in bytes."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def reset_peak_memory() -> int:
    """Give free memory back, reset the peak of the resident memory, and return the resident memory in bytes."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return read_memory("VmRSS")


# ---- comparison


def make_inputs(folder: Path) -> None:
    """Write encoded images, texts of 8 to TOKENS tokens, and negatives."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(PAIRS, PATCHES, VISION_WIDTH, generator=generator)
    ids = torch.randint(3, BOS, (PAIRS, TOKENS), generator=generator)
    lengths = torch.randint(8, TOKENS + 1, (PAIRS, 1), generator=generator)
    mask = (torch.arange(TOKENS) < lengths).long()
    ids = ids.masked_fill(mask == 0, PAD)
    shifts = torch.randint(1, PAIRS, (2, PAIRS), generator=generator)
    negatives = (torch.arange(PAIRS) + shifts) % PAIRS
    torch.save({"tensors": [images, ids, mask, *negatives]}, folder / "inputs.pt")


def start_side(name: str, folder: Path) -> subprocess.Popen:
    python = LAVIS_PYTHON if name == "lavis" else sys.executable
    command = [str(python), "-W", "ignore", str(Path(__file__)), "--side", name, str(folder)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(WITHOUT_CUDA if name == "lavis" else ROOT),
    }
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def read_line(side: subprocess.Popen) -> dict:
    """Read the next line of JSON from a side."""
    while line := side.stdout.readline():
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit("A side ended early; see its error above.")


def compare(repeats: int, steps: int) -> dict:
    """Compare the losses, then measure both sides in turn."""
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name))
        sides, result = {}, {"repeats": repeats, "steps": steps}
        for key in ("lavis", "ours"):
            sides[key] = start_side(key, Path(name))
            result[key] = read_line(sides[key]) | {"rounds": []}
        for _ in range(repeats):
            for key, side in sides.items():
                side.stdin.write(f"{steps}\n")
                side.stdin.flush()
                result[key]["rounds"].append(read_line(side))
        for side in sides.values():
            side.stdin.close()
            side.wait()
    return result


def render_table(result: dict) -> str:
    """Render the figures of both sides and their ratios."""
    lavis, ours = result["lavis"], result["ours"]
    seconds, memory = (
        [median(entry[name] for entry in side["rounds"]) for side in (lavis, ours)] for name in ("seconds", "memory")
    )
    flops = [lavis["flops"], ours["flops"]]
    bound, ratio = flops[0] / flops[1], seconds[0] / seconds[1]
    difference = max(abs(a - b) for a, b in zip(lavis["losses"], ours["losses"], strict=True))
    rows = [
        ("largest difference of the three losses, nats", "", f"{difference:.1e}", ""),
        ("GFLOPs of forward and backward", *(f"{value / 1e9:.2f}" for value in flops), f"{bound:.2f}, the bound"),
        (
            "CPU seconds of a step",
            *(f"{value:.3f}" for value in seconds),
            f"{ratio:.2f}, {ratio / bound:.2f} of the bound",
        ),
        (
            "memory above the model's, MB",
            *(f"{value / 1e6:.0f}" for value in memory),
            f"{memory[1] / memory[0]:.2f} of LAVIS's",
        ),
    ]
    head = f"| torch {ours['torch']} and {lavis['torch']} | LAVIS 1.0.2 | here | ratio |\n|---|---|---|---|\n"
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--side", nargs=2, metavar=("NAME", "FOLDER"), help="serve one side; for the benchmark itself")
    parser.add_argument("--docs", action="store_true")
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side[0], Path(arguments.side[1]))
        return
    if not LAVIS_PYTHON.exists():
        raise SystemExit(f"{LAVIS_PYTHON.relative_to(ROOT)} is missing. Run `make oracle`, which installs LAVIS there.")
    result = compare(arguments.repeats, arguments.steps)
    print(render_table(result))
    if arguments.docs:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        text = DOCS.read_text(encoding="utf-8")
        DOCS.write_text(TABLE_PATTERN.sub(lambda _: render_table(result), text), encoding="utf-8")


if __name__ == "__main__":
    main()

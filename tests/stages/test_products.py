"""Computations of a step: every matrix product in bfloat16 if the precision asks for it, and no gradient of a frozen weight."""

import warnings

import lightning as L
import pytest
import torch
from support import blueprint_of, builtin, sample
from torch.utils.flop_counter import FlopCounterMode

from lit_vlm.anyres import Tiling
from lit_vlm.cost import ModelShape
from lit_vlm.data.collate import collate
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.processor import Processor
from lit_vlm.model.matmul_dtypes import MatmulDtypeCounter
from lit_vlm.stages import AlignStage, DPOStage, SFTStage

LORA = {"parts": {"language_model": {"lora": {"rank": 4, "dropout": 0.1}}}}
CASES = {
    "align": (AlignStage, {}),
    "sft": (SFTStage, {}),
    "sft selective": (SFTStage, {"activation_checkpointing": "selective"}),
    "sft lora": (SFTStage, LORA),
    "dpo": (DPOStage, {}),
    "dpo lora": (DPOStage, LORA),
}
WARNING = "computed products in float32"


class StepCounter(L.Callback):
    """Counts matrix products of one whole step: forward, backward, clipping, update."""

    def __init__(self):
        self.products = MatmulDtypeCounter()

    def on_train_batch_start(self, *_):
        self.products.__enter__()

    def on_train_batch_end(self, *_):
        self.products.__exit__(None, None, None)


def run_one_step(parts, case, precision) -> MatmulDtypeCounter:
    stage_class, options = CASES[case]
    dtype = "bfloat16" if precision == "bf16-true" else "float32"
    frozen_dtype = "bfloat16" if precision == "bf16-mixed" else None
    blueprint = blueprint_of(parts)
    stage = stage_class(blueprint, dtype=dtype, frozen_dtype=frozen_dtype, **options)
    kinds = ("preference",) if stage_class is DPOStage else ("caption", "text", "grounding")
    data = DataModule(
        Processor(blueprint.tokenizer, blueprint.images), builtin(*kinds, n=8), 0.0, global_batch_size=6, max_steps=1
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    step, more = StepCounter(), {"limit_val_batches": 0, "gradient_clip_val": 1.0, "num_sanity_val_steps": 0}
    L.Trainer(accelerator="cpu", precision=precision, callbacks=[step], **quiet, **more).fit(stage, data)
    return step.products


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("case", CASES)
def test_no_product_of_a_bfloat16_step_is_in_float32(small_parts, case, precision):
    """No exceptions: rotary angles and losses are not counted as products, and log-sums of attention not as factors."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        products = run_one_step(small_parts, case, precision)
    assert products.counts["mm", torch.bfloat16] > 20
    assert {dtype for _, dtype in products.counts} == {torch.bfloat16}, products.float32_counts
    assert any("backward" in name for name, _ in products.counts)
    assert not any(WARNING in str(warning.message) for warning in caught)


def test_the_dtype_counter_sees_float32_products_and_warns(small_parts, monkeypatch):
    assert {dtype for _, dtype in run_one_step(small_parts, "sft", "32-true").counts} == {torch.float32}

    def compute_in_float32(self, batch):
        with torch.autocast("cpu", enabled=False):
            weight = self.model.lm_head.weight
            return self.compute_token_losses(batch).sum() / 100 + (weight @ weight.T).sum() * 0.0

    monkeypatch.setattr(SFTStage, "compute_loss", compute_in_float32)
    with pytest.warns(UserWarning, match=r"computed products in float32 under half precision \(.*mm"):
        run_one_step(small_parts, "sft", "bf16-mixed")


def count_flops(stage_class, parts):
    """Return the FLOPs of matrix products in the forward pass, in the backward pass, and by part."""
    blueprint = blueprint_of(parts, Tiling.base, special_tokens=[])
    stage = stage_class(blueprint, tiling="base")
    stage.configure_model()
    records = [sample("무엇이 보이나요?", "빨간 원", (60, 60), seed=n) for n in range(3)]
    batch = collate(Processor(blueprint.tokenizer, blueprint.images), records)
    with FlopCounterMode(display=False) as forward:
        losses = stage.compute_token_losses(batch)
    with FlopCounterMode(display=False) as backward:
        losses.sum().backward()
    aten = torch.ops.aten
    counted = [
        sum(mode.get_flop_counts()["Global"].get(name, 0) for name in (aten.mm, aten.addmm, aten.bmm))
        for mode in (forward, backward)
    ]
    shape = ModelShape.from_config(blueprint.config.to_dict())
    patches, text = batch.num_tiles * shape.vision.num_patches, shape.text
    rows, queries = batch.num_supervised_tokens, sum(batch.trailing_tokens)
    work = {
        # in the last layer keys and values of all tokens, queries from the first loss row of each segment on, the rest of loss rows
        "language": 2
        * batch.num_tokens
        * ((text.num_layers - 1) * text.layer_parameters + 2 * text.hidden_size * text.key_width)
        + 2 * queries * text.hidden_size * text.query_width
        + 2 * rows * (text.hidden_size * text.query_width + 3 * text.hidden_size * text.intermediate_size),
        "head": 2 * batch.num_supervised_tokens * text.hidden_size * text.vocab_size,
        "projector": 2 * patches * shape.projector_parameters,
        "second": 2 * patches * text.hidden_size**2,
        "new tokens": 2 * batch.num_supervised_tokens * text.hidden_size * len(blueprint.new_tokens),
        "tower": 2 * patches * shape.vision.num_layers * shape.vision.layer_parameters,
    }
    return *counted, work


def test_frozen_parts_cost_no_gradient_of_a_weight(small_parts):
    """align: the language model's forward pass and input gradients, the tower's forward pass alone, exact to the FLOP."""
    forward, backward, work = count_flops(AlignStage, small_parts)
    language_flops = work["language"] + work["head"]
    assert forward == language_flops + work["new tokens"] + work["projector"] + work["tower"]
    # the projector's two weights and the input of the second: the gradient of the first's input is not needed
    assert backward == language_flops + 2 * work["new tokens"] + work["projector"] + work["second"]


def test_trainable_parts_cost_two_backward_passes(small_parts):
    forward, backward, work = count_flops(SFTStage, small_parts)
    assert forward == work["language"] + work["head"] + work["projector"] + work["tower"]
    assert backward == 2 * forward


@pytest.mark.parametrize("stage_class", [AlignStage, SFTStage])
def test_the_tower_keeps_one_hidden_state_and_no_layer_after_it(small_parts, stage_class):
    """Of three layers the second to last feeds the projector, so two are built."""
    blueprint = blueprint_of(small_parts)
    stage = stage_class(blueprint)
    stage.configure_model()
    tower, outputs = stage.model.model.vision_tower, []
    tower.register_forward_hook(lambda module, args, output: outputs.append(output))
    last = []
    tower.encoder.layers[-1].register_forward_hook(lambda module, args, output: last.append(output))
    batch = collate(Processor(blueprint.tokenizer, blueprint.images), [sample("무엇?", "원", (60, 60))])
    features = stage.model.model.encode_tiles(batch.tiles)
    kept_states = [state for state in outputs[0].hidden_states if state is not None]
    assert len(kept_states) == 1 and len(tower.encoder.layers) == 2
    assert torch.equal(features, last[0] if isinstance(last[0], torch.Tensor) else last[0][0])


def test_adamw_is_fused_and_clipping_uses_one_call_for_all_gradients(small_parts, monkeypatch):
    stage = SFTStage(blueprint_of(small_parts))
    stage.configure_model()
    stage._count_steps = lambda: 1
    assert all(group["fused"] for group in stage.configure_optimizers()["optimizer"].param_groups)
    calls, foreach = [], torch._foreach_norm
    monkeypatch.setattr(
        torch, "_foreach_norm", lambda tensors, *a, **k: (calls.append(len(tensors)), foreach(tensors, *a, **k))[1]
    )
    run_one_step(small_parts, "sft", "bf16-mixed")
    assert calls == [sum(1 for p in stage.model.parameters() if p.requires_grad)]

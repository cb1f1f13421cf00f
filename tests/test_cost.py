"""FLOPs, bytes and seconds, compared with cases computed by hand, counts of real models, and what autograd stores."""

import pytest
import torch
from alive import Alive
from support import blueprint_of, sample

from lit_vlm.anyres import Tiling
from lit_vlm.config.choices import ActivationCheckpointing as Level
from lit_vlm.config.choices import DeviceName
from lit_vlm.cost import DEVICES, Flops, MicroBatchSize, ModelShape, ParameterCounts, TrainingOptions, estimate_memory
from lit_vlm.cost.memory import (
    Precision,
    Sharding,
    compute_host_bytes,
    compute_state_bytes,
    compute_text_activation_bytes,
    compute_tile_activation_bytes,
)
from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.model.build import build_model
from lit_vlm.model.parts import freeze_except
from lit_vlm.model.tiny import make_language_model, make_vision_tower
from lit_vlm.stages import SFTStage
from lit_vlm.types import ModelPart

# Qwen2.5-7B and SigLIP-so400m with 26 layers, from their config.json
CONFIG = {
    "text_config": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    },
    "vision_config": {
        "hidden_size": 1152,
        "num_hidden_layers": 26,
        "intermediate_size": 4304,
        "image_size": 384,
        "patch_size": 14,
    },
}
SHAPE = ModelShape.from_config(CONFIG)
STAGES = {
    "align": (ModelPart.projector,),
    "language": (ModelPart.projector, ModelPart.language_model),
    "all": tuple(ModelPart),
}


def make_options(precision="bf16-mixed", stage="all", **more) -> TrainingOptions:
    trains = STAGES[stage]
    return TrainingOptions(
        Precision.from_name(precision),
        trains_language_model=ModelPart.language_model in trains,
        trains_tower=ModelPart.vision_tower in trains,
        **more,
    )


# ---- FLOPs


def test_weights_of_the_language_model_equal_those_counted_by_hand():
    attention = 3584 * 3584 * 2 + 3584 * 512 * 2
    assert SHAPE.text.layer_parameters == attention + 3 * 3584 * 18944
    assert SHAPE.text.num_layers * SHAPE.text.layer_parameters == pytest.approx(
        6.525e9, rel=1e-3
    )  # Qwen's body, without its tables
    assert SHAPE.text.hidden_size * SHAPE.text.vocab_size == pytest.approx(0.545e9, rel=1e-3)


def test_flops_of_an_alignment_sample_equal_those_computed_by_hand():
    """One 384-pixel tile and 20 tokens of text of which 15 are answers: 20.7 TFLOP with frozen towers."""
    flops = Flops.from_config(CONFIG, trains_tower=False, trains_language_model=False)
    tokens = 729 + 20
    tower = 2 * 26 * SHAPE.vision.layer_parameters * 729 + 4 * 729**2 * 1152 * 26
    body = 4 * 28 * SHAPE.text.layer_parameters * tokens + 3 * 2 * tokens**2 * 3584 * 28
    projector, head = 6 * 729 * (1152 * 3584 + 3584**2), 4 * 3584 * 152064 * 15
    assert flops.compute(tokens, tokens**2, 1, 15) == pytest.approx(tower + body + projector + head)
    assert abs(flops.compute(tokens, tokens**2, 1, 15) / 20.7e12 - 1) < 0.01


def test_recomputation_and_a_reference_model_add_forward_passes():
    options = {"trains_tower": False, "trains_language_model": True}
    plain = Flops.from_config(CONFIG, **options)
    assert Flops.from_config(CONFIG, **options, recomputed_share=1.0).per_token == pytest.approx(
        plain.per_token * 4 / 3
    )
    assert Flops.from_config(CONFIG, **options, recomputed_share=1.0).per_supervised == plain.per_supervised
    reference = Flops.from_config(CONFIG, **options, has_reference=True)
    assert reference.per_token == pytest.approx(plain.per_token * 4 / 3)
    assert (
        reference.per_tile < 1.1 * plain.per_tile
    )  # both models use the output of a frozen tower; a projector is small
    options["trains_tower"] = True
    plain, reference = (Flops.from_config(CONFIG, **options, has_reference=own) for own in (False, True))
    assert reference.per_tile == pytest.approx(plain.per_tile * 4 / 3)


def test_estimated_seconds_equal_those_computed_by_hand():
    h100 = DEVICES[DeviceName.h100]
    assert h100.estimate_seconds(989e12 * 3600, devices=8, utilisation=0.5) == pytest.approx(900)
    assert h100.estimate_seconds(989e12, devices=1, utilisation=0.4, balance=0.5) == pytest.approx(5)


def test_every_device_of_the_settings_has_its_figures():
    assert set(DEVICES) == set(DeviceName)
    assert all(
        1e10 < device.memory_bytes < 1e12 and 1e14 < device.peak_flops_per_second < 1e16 for device in DEVICES.values()
    )


# ---- states

PARAMETERS = ParameterCounts(total=8_000, trainable=7_000, autocast=7_500, autocast_frozen=500, largest_layer=100)


def sum_bytes(precision: str, sharding: Sharding, world_size: int = 1, **more) -> float:
    return sum(compute_state_bytes(PARAMETERS, make_options(precision, **more), sharding, world_size).values())


def test_state_bytes_on_one_device_equal_those_computed_by_hand():
    assert sum_bytes("32-true", Sharding.single) == 4 * 8_000 + (4 + 8) * 7_000
    assert sum_bytes("bf16-mixed", Sharding.single) == 4 * 8_000 + 2 * 7_500 + (4 + 8) * 7_000
    assert sum_bytes("bf16-mixed", Sharding.single, checkpointing=Level.full) == 4 * 8_000 + 2 * 7_000 + (4 + 8) * 7_000
    assert sum_bytes("bf16-true", Sharding.single) == 2 * 8_000 + (2 + 4) * 7_000


def test_frozen_matrices_are_stored_in_half_precision_and_not_copied():
    """Of 1,000 frozen weights 600 are in matrices; gradients cross 400 of these. The head's 100 are also a table."""
    frozen = ParameterCounts(
        total=8_000,
        trainable=7_000,
        autocast=7_500,
        autocast_frozen=500,
        frozen_matrices=600,
        autocast_frozen_matrices=400,
    )

    def compute_parts(precision: str, **more) -> dict[str, float]:
        return compute_state_bytes(frozen, make_options(precision, **more), Sharding.single)

    mixed = compute_parts("bf16-mixed")
    assert mixed["weights"] == 4 * 7_400 + 2 * 600 and mixed["half-precision copies"] == 2 * (7_000 + 100)
    assert compute_parts("bf16-mixed", checkpointing=Level.selective)["half-precision copies"] == 2 * 7_000
    assert (
        compute_parts("16-mixed")["weights"] == compute_parts("32-true")["weights"] == 4 * 8_000
    )  # only bfloat16 has float32's range
    assert (
        compute_parts("bf16-mixed", reference_parameters=8_000, reference_matrices=7_000)["reference model"]
        == 4 * 1_000 + 2 * 7_000
    )


def test_ddp_keeps_a_copy_and_its_buckets():
    single = sum_bytes("bf16-mixed", Sharding.single)
    assert sum_bytes("bf16-mixed", Sharding.ddp, 8) == single + 4 * 7_000
    assert sum_bytes("bf16-mixed", Sharding.ddp, 64) == sum_bytes("bf16-mixed", Sharding.ddp, 8)


def test_a_reference_model_adds_its_weights():
    assert (
        sum_bytes("bf16-mixed", Sharding.single, reference_parameters=8_000)
        == sum_bytes("bf16-mixed", Sharding.single) + 4 * 8_000
    )


def test_sharded_state_bytes_equal_those_computed_by_hand():
    """Gradients in float32: ZeRO's 18 bytes per trainable weight and FSDP2's 16; ZeRO-2 keeps 2 on each device."""
    assert sum_bytes("bf16-mixed", Sharding.zero2, 8) == 2 * 8_000 + 16 * 7_000 / 8
    assert sum_bytes("bf16-mixed", Sharding.zero3, 8) == pytest.approx(
        (2 * 1_000 + 18 * 7_000) / 8 + 2 * 8_000
    )  # gathered
    assert sum_bytes("bf16-mixed", Sharding.fsdp2, 8) == pytest.approx((2 * 1_000 + 16 * 7_000) / 8 + 2 * 2 * 100)
    assert sum_bytes("bf16-mixed", Sharding.hsdp, 8) == sum_bytes("bf16-mixed", Sharding.fsdp2, 8)  # a group of eight
    assert sum_bytes("bf16-mixed", Sharding.offload, 8) == 2 * 8_000
    sizes = [sum_bytes("bf16-mixed", Sharding.zero3, world) for world in (1, 2, 8, 64)]
    assert sizes == sorted(sizes, reverse=True)


def test_offloaded_states_are_counted_on_the_host():
    shared = compute_state_bytes(PARAMETERS, make_options("bf16-mixed"), Sharding.zero3, 16)
    assert compute_host_bytes(PARAMETERS, make_options("bf16-mixed"), 16, 8) == 8 * (
        sum(shared.values()) - shared["gathered layers"]
    )
    assert compute_host_bytes(PARAMETERS, make_options("bf16-mixed"), 1, 8) == 2 * 8_000 + 16 * 7_000


def test_the_number_of_gathered_weights_has_a_maximum():
    large = ParameterCounts(total=14 * 10**9, trainable=1, autocast=0)
    assert compute_state_bytes(large, make_options("bf16-mixed"), Sharding.zero3, 8)["gathered layers"] == 2e9


def test_full_fine_tuning_has_the_published_order_of_magnitude():
    """Full fine-tuning of 7.6 B in float32 with AdamW: 16 bytes each, 122 GB."""
    whole = ParameterCounts(total=int(7.62e9), trainable=int(7.62e9), autocast=0)
    assert sum(compute_state_bytes(whole, make_options("32-true"), Sharding.single).values()) == pytest.approx(
        122e9, rel=0.01
    )


# ---- activations


def test_activations_of_a_frozen_language_model_equal_those_computed_by_hand():
    """bfloat16: two norms' float32 inputs, q, k, v, output, and three of the feed-forward's width."""
    layer = 2 * (4 * 3584 + 4) + 2 * (2 * 3584 + 2 * 512 + 3 * 18944) + 4 * 28
    once = 4 * 3584 + 4 + 2 * 2 * 128
    assert compute_text_activation_bytes(SHAPE.text, make_options("bf16-true", "align")) == 28 * layer + once


def test_checkpointing_stores_one_layer_and_the_inputs_of_the_others():
    whole = compute_text_activation_bytes(SHAPE.text, make_options("bf16-mixed"))
    less = compute_text_activation_bytes(SHAPE.text, make_options("bf16-mixed", checkpointing=Level.full))
    assert 28 * 4 * 3584 < less < whole / 6


def test_selective_checkpointing_stores_matrix_products_and_attention():
    """bfloat16, 7B: q, k, v, attention, its projection, gate and up, and the layer's input: 42 % of all activations."""
    saved = 4 * 3584 + 2 * (2 * 3584 + 2 * 512 + 3584 + 2 * 18944) + 4 * 28
    some = compute_text_activation_bytes(SHAPE.text, make_options("bf16-mixed", checkpointing=Level.selective))
    least = compute_text_activation_bytes(SHAPE.text, make_options("bf16-mixed", checkpointing=Level.full))
    assert some - least == 28 * (saved - 4 * 3584)
    assert abs(saved / (compute_text_activation_bytes(SHAPE.text, make_options("bf16-mixed")) / 28) - 0.42) < 0.0084


def test_the_peak_is_the_sum_of_its_parts():
    load = MicroBatchSize(tokens=16384, tiles=16, supervised=2000)
    memory = estimate_memory(SHAPE, PARAMETERS, make_options(), load, Sharding.single)
    assert memory.total == sum(memory.parts.values())
    assert memory.parts["logits"] == 10 * 2000 * 152064
    assert memory.parts["activations of text"] == 16384 * compute_text_activation_bytes(SHAPE.text, make_options())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_estimated_activations_equal_what_autograd_stores(small_parts, precision, stage):
    """Within 10 % on the tiny model, logits within 20 % (their gradients are created after all activations are stored)."""
    blueprint = blueprint_of(small_parts, Tiling.base)
    batch = collate(Processor(blueprint.tokenizer, blueprint.images), [sample("무엇?" * 9, "원" * 9, (60, 60))] * 6)
    model = build_model(blueprint, torch.bfloat16 if precision == "bf16-true" else torch.float32)
    freeze_except(model, STAGES[stage])
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        saved, hidden = measure_saved_bytes(model, lambda: model.model(batch=batch))
        targets = batch.input_ids[batch.loss_positions + 1]
        logits, _ = measure_saved_bytes(model, lambda: model.lm_head(hidden[batch.loss_positions], targets)[0])

    shape, settings = ModelShape.from_config(blueprint.config.to_dict()), make_options(precision, stage)
    estimate = batch.num_tokens * compute_text_activation_bytes(shape.text, settings)
    tower = batch.num_tiles * compute_tile_activation_bytes(shape, settings)
    assert abs(saved / (estimate + tower) - 1) < 0.1
    size = 2 if precision.startswith("bf16") else 4  # stored in the type of the matrix product
    assert abs(logits / (size * len(targets) * shape.text.vocab_size) - 1) < 0.2


@pytest.fixture(scope="module")
def depths(tmp_path_factory) -> dict[int, tuple[str, str]]:
    """Parts with one and with three layers."""
    folder, parts = tmp_path_factory.mktemp("depths"), {}
    for number in (1, 3):
        tower, language = folder / f"tower{number}", folder / f"language{number}"
        small = {"hidden_size": 32, "intermediate_size": 48}
        make_vision_tower(tower, num_hidden_layers=number + 1, num_attention_heads=2, **small)
        make_language_model(language, num_hidden_layers=number, tie_word_embeddings=False, **small)
        parts[number] = (str(tower), str(language))
    return parts


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_layer_stores_what_its_level_of_checkpointing_estimates(depths, precision, stage):
    """The bytes alive after a forward pass of three layers minus those of one layer, within 1 %."""
    for level in (Level.selective, Level.full):
        (three, estimated), (one, less) = (measure_alive_bytes(depths[n], precision, stage, level) for n in (3, 1))
        assert abs((three - one) / (estimated - less) - 1) < 0.01, level


def measure_alive_bytes(parts, precision, stage, level) -> tuple[int, float]:
    """Return the bytes alive after a forward pass, and the estimate."""
    blueprint = blueprint_of(parts, Tiling.base)
    batch = collate(Processor(blueprint.tokenizer, blueprint.images), [sample("무엇?" * 9, "원" * 9, (60, 60))] * 6)
    mixed = precision == "bf16-mixed"
    sft_stage = SFTStage(
        blueprint,
        trainable=list(STAGES[stage]),
        activation_checkpointing=level.value,
        dtype="bfloat16" if precision == "bf16-true" else "float32",
        frozen_dtype="bfloat16" if mixed else None,
        tiling="base",
    )
    sft_stage.configure_model()
    with Alive() as alive:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            hidden = sft_stage.model.model(batch=batch)
        now = alive.now
    shape, settings = (
        ModelShape.from_config(blueprint.config.to_dict()),
        make_options(precision, stage, checkpointing=level),
    )
    text, tower = compute_text_activation_bytes(shape.text, settings), compute_tile_activation_bytes(shape, settings)
    assert hidden.requires_grad
    return now, batch.num_tokens * text + batch.num_tiles * tower


def measure_saved_bytes(model, forward) -> tuple[int, torch.Tensor]:
    """Return the bytes that `forward` saves for its backward pass, without weights and their copies, and its result."""
    sizes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.T.shape) for p in model.parameters() if p.ndim == 2}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def save_tensor(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in sizes:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save_tensor, lambda tensor: tensor):
        result = forward()
    return sum(storage.nbytes() for storage in saved.values()), result

"""Projectors: the recipe of CONTRIBUTING to add one, and what the registry says about those that exist."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stages.fits import fit
from support import blueprint_of, builtin
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_vlm.anyres import TileLayout, Tiling
from lit_vlm.config import parse
from lit_vlm.config.choices import ProjectorName
from lit_vlm.config.tasks import find_config_errors
from lit_vlm.cost import Flops, ModelShape, TrainingOptions
from lit_vlm.cost.memory import Precision, compute_tile_activation_bytes
from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.model.build import build_model
from lit_vlm.model.export import export_model
from lit_vlm.model.projectors import PROJECTORS, Projector, get_projector
from lit_vlm.model.skeleton import defer_weights, fill_skeleton
from lit_vlm.model.tiny import make_vision_tower
from lit_vlm.stages import AlignStage
from lit_vlm.types import UserError


class NormProjector(Projector):
    """A norm and one matrix: the projector that a reader of CONTRIBUTING might add."""

    name = "norm_linear"
    description = "LayerNorm, Linear"

    def build(self, config):
        width = config.vision_config.hidden_size
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.text_config.hidden_size, bias=False))

    def count_parameters(self, vision_width, text_width):
        return vision_width * text_width

    def count_activations(self, vision_width, text_width, patch_side):
        return patch_side**2 * 2 * vision_width


@pytest.fixture
def norm_spec(monkeypatch, small_parts):
    monkeypatch.setitem(PROJECTORS, NormProjector.name, NormProjector())
    return blueprint_of(small_parts, projector=NormProjector.name)


def test_a_projector_that_is_added_trains(norm_spec, tmp_path):
    before = {name: value.clone() for name, value in build_model(norm_spec).named_parameters()}
    stage, processor = AlignStage(norm_spec), Processor(norm_spec.tokenizer, norm_spec.images)
    fit(stage, processor, builtin("caption", n=16), tmp_path, max_steps=1, global_batch_size=4)
    after = dict(stage.model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if "projector" in name} == {
        f"model.multi_modal_projector.{name}" for name in ("0.weight", "0.bias", "1.weight")
    }
    with pytest.raises(UserError, match=r"norm_linear.*export=false.*mlp2x_gelu, linear"):
        export_model(stage.model, norm_spec.tokenizer, norm_spec.images, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_projector_that_is_added_has_the_same_initial_weights_in_a_sharded_model(norm_spec):
    expected = dict(build_model(norm_spec, seed=3).named_parameters())
    with defer_weights():
        skeleton = build_model(norm_spec, seed=3)
    fill_skeleton(skeleton, torch.float32)
    for name, value in skeleton.named_parameters():
        assert torch.equal(value, expected[name]), name


def test_a_projector_that_is_added_counts_in_the_cost_model(norm_spec, small_parts):
    config = norm_spec.config.to_dict()
    shape, usual = ModelShape.from_config(config), ModelShape.from_config(blueprint_of(small_parts).config.to_dict())
    vision, text = shape.vision.hidden_size, shape.text.hidden_size
    assert (shape.projector_parameters, usual.projector_parameters) == (vision * text, vision * text + text**2)
    align = {"trains_tower": False, "trains_language_model": False}
    saved = Flops.from_config(blueprint_of(small_parts).config.to_dict(), **align).per_tile
    saved -= Flops.from_config(config, **align).per_tile
    assert saved == 2 * 3 * shape.vision.num_patches * text**2  # forward, and backward for weights and input
    options = TrainingOptions(Precision.from_name("32-true"), trains_language_model=False, trains_tower=False)
    assert compute_tile_activation_bytes(shape, options) == 4 * shape.vision.num_patches * 2 * vision


def test_the_config_offers_the_registered_projectors():
    assert [name.value for name in ProjectorName] == list(PROJECTORS)


def test_a_run_whose_projector_cannot_be_exported_is_refused_before_it_starts(norm_spec):
    config = parse(["experiment=tiny/1_align"]).config
    config = replace(config, model=replace(config.model, projector=NormProjector.name))
    (error,) = find_config_errors(config)
    assert error.startswith("export: a model with model.projector=norm_linear cannot be exported")
    assert find_config_errors(replace(config, export=False)) == []


def test_an_unknown_projector_is_refused_by_name(small_parts):
    tower, language_model = small_parts
    with pytest.raises(
        UserError, match="there is no such projector; there are mlp2x_gelu, linear, ldpnetv2, c_abstractor, qformer"
    ):
        blueprint_of((tower, language_model), projector="mlp3x")


@pytest.mark.parametrize("name", [name for name, projector in PROJECTORS.items() if projector.is_in_transformers])
def test_plain_transformers_holds_these_projectors(small_parts, name):
    model = build_model(blueprint_of(small_parts, projector=name))
    assert type(model.model.multi_modal_projector).__module__.startswith("transformers.")


@pytest.fixture(autouse=True)
def small_qformer(monkeypatch):
    """A Q-Former of width 24 in the place of 768."""
    monkeypatch.setattr(PROJECTORS["qformer"], "width", 24)
    monkeypatch.setattr(PROJECTORS["qformer"], "num_heads", 2)


# Projectors that pool, with a tower of 18 x 18 patches: 324 become 144 tokens, in windows of different sizes.


@pytest.fixture(scope="module")
def wide_parts(tmp_path_factory, small_parts):
    folder = tmp_path_factory.mktemp("wide")
    make_vision_tower(
        folder,
        hidden_size=24,
        intermediate_size=32,
        num_attention_heads=2,
        image_size=72,
        patch_size=4,
        num_hidden_layers=2,
    )
    return str(folder), small_parts[1]


def make_patches(model, *, count: int = 2) -> torch.Tensor:
    vision = model.config.vision_config
    generator = torch.Generator().manual_seed(1)
    shape = count, (vision.image_size // vision.patch_size) ** 2, vision.hidden_size
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", PROJECTORS)
def test_the_registry_counts_tokens_weights_and_flops_of_the_module_itself(wide_parts, name):
    model, projector = build_model(blueprint_of(wide_parts, projector=name)).double(), PROJECTORS[name]
    module, shape = model.model.multi_modal_projector, ModelShape.from_config(model.config.to_dict())
    assert get_projector(model.config) is get_projector(model.config.to_dict()) is shape.projector is projector
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the counter knows no other on a CPU
        tokens = module(make_patches(model))
    assert tokens.shape == (2, projector.compute_token_side(18) ** 2, model.config.text_config.hidden_size)
    matrices = [
        p for name, p in module.named_parameters() if p.dim() > 1 and name not in ("positions.weight", "queries")
    ]
    assert sum(p.numel() for p in matrices) == shape.projector_parameters
    assert counter.get_total_flops() == 2 * shape.projector_flops


@pytest.mark.parametrize("name", PROJECTORS)
def test_the_registry_counts_the_values_that_a_projector_keeps_for_the_backward_pass(wide_parts, name):
    model = build_model(blueprint_of(wide_parts, projector=name)).double()
    module, shape = model.model.multi_modal_projector, ModelShape.from_config(model.config.to_dict())
    weights, kept = {p.data_ptr() for p in module.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights and tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(make_patches(model, count=1))
    assert output.requires_grad
    # norms keep two numbers of each position beside, gates one value of each channel
    assert shape.projector_activations <= sum(kept.values()) <= 1.15 * shape.projector_activations


def test_ldpnetv2_is_its_formula(wide_parts):
    """MLP on each patch, mean over the patches of a token's window, then a 3 x 3 convolution of each channel, added."""
    model = build_model(blueprint_of(wide_parts, projector="ldpnetv2")).double()
    module, patches = model.model.multi_modal_projector, make_patches(model, count=1)
    with torch.no_grad():
        hidden = torch.nn.functional.gelu(patches @ module.linear_1.weight.T + module.linear_1.bias)
        grid = (hidden @ module.linear_2.weight.T + module.linear_2.bias)[0].view(18, 18, -1)
        windows = [range(i * 18 // 12, -(-(i + 1) * 18 // 12)) for i in range(12)]  # adaptive pooling's
        pooled = torch.stack(
            [torch.stack([grid[list(rows)][:, list(columns)].mean((0, 1)) for columns in windows]) for rows in windows]
        )
        padded = torch.nn.functional.pad(pooled.permute(2, 0, 1), (1, 1, 1, 1))
        expected = pooled + module.conv.bias
        for row in range(3):
            for column in range(3):
                weight = module.conv.weight[:, 0, row, column]
                expected = expected + padded[:, row : row + 12, column : column + 12].permute(1, 2, 0) * weight
        torch.testing.assert_close(module(patches)[0], expected.flatten(0, 1), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", PROJECTORS)
def test_gradients_of_a_projector_are_those_of_finite_differences(wide_parts, name):
    model = build_model(blueprint_of(wide_parts, projector=name)).double()
    module, patches = model.model.multi_modal_projector, make_patches(model, count=1).requires_grad_()
    generator, step = torch.Generator().manual_seed(2), 1e-6
    leaves = [patches, *module.parameters()]
    directions = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in leaves]
    sizes = [p.shape for p in (module(patches),)]
    target = torch.randn(sizes[0], generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad((module(patches) * target).sum(), leaves)
    for leaf, direction, gradient in zip(leaves, directions, gradients, strict=True):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * step * direction
                values.append(float((module(patches) * target).sum()))
                leaf -= sign * step * direction
        assert float((gradient * direction).sum()) == pytest.approx(
            (values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-5
        )


def test_a_projector_that_does_not_fit_the_towers_grid_is_refused_with_both_shapes(small_parts):
    with pytest.raises(UserError, match=r"ldpnetv2 pools a tile to 12 x 12 tokens.*only 4 x 4 patches"):
        blueprint_of(small_parts, projector="ldpnetv2")


@pytest.mark.parametrize("name", ["ldpnetv2", "c_abstractor", "qformer"])
@pytest.mark.parametrize(
    "settings", [{}, {"model_class": "llava_next"}, {"model_class": "llava"}], ids=["ov", "next", "llava"]
)
def test_index_chat_template_and_forward_agree_on_the_tokens_of_a_resampled_tile(wide_parts, mixed, name, settings):
    tiles = {"grid": None, "max_tiles": None} if settings else {}
    spec = blueprint_of(wide_parts, projector=name, **tiles, **settings)
    model, processor = build_model(spec), Processor(spec.tokenizer, spec.images)
    assert spec.images.side == PROJECTORS[name].token_side
    for record in mixed:
        batch, cost = collate(processor, [record]), processor.compute_cost(record)
        features = model.model.compute_image_features(
            model.model.encode_images(batch), batch.layouts or [TileLayout(1, 0)]
        )
        placeholders = int((batch.input_ids == processor.image_token_id).sum())
        assert placeholders == cost.num_image_tokens == sum(layout.num_tokens for layout in batch.layouts)
        assert not batch.num_tiles or placeholders == sum(map(len, features))
        assert torch.isfinite(model(batch=batch)[0]).all()


@pytest.mark.parametrize("name", ["ldpnetv2", "c_abstractor", "qformer"])
def test_a_resampling_projector_learns_and_its_initial_weights_are_the_same_in_a_sharded_model(
    wide_parts, tmp_path, name
):
    spec = blueprint_of(wide_parts, Tiling.base, projector=name)
    expected = dict(build_model(spec, seed=3).named_parameters())
    with defer_weights():
        skeleton = build_model(spec, seed=3)
    fill_skeleton(skeleton, torch.float32)
    for parameter_name, value in skeleton.named_parameters():
        assert torch.equal(value, expected[parameter_name]), parameter_name
    stage, processor = AlignStage(spec), Processor(spec.tokenizer, spec.images)
    before = {key: value.clone() for key, value in build_model(spec).named_parameters()}
    fit(stage, processor, builtin("caption", n=16), tmp_path, max_steps=1, global_batch_size=4)
    for key, value in stage.model.named_parameters():
        if "multi_modal_projector" in key:
            assert not torch.equal(value, before[key]), key

"""Projectors: the recipe of CONTRIBUTING to add one, and what the registry says about those that exist."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stages.fits import fit
from support import blueprint_of, builtin
from torch import nn

from lit_vlm.config import parse
from lit_vlm.config.choices import ProjectorName
from lit_vlm.config.tasks import find_config_errors
from lit_vlm.cost import Flops, ModelShape, TrainingOptions
from lit_vlm.cost.memory import Precision, compute_tile_activation_bytes
from lit_vlm.data.processor import Processor
from lit_vlm.model.build import build_model
from lit_vlm.model.export import export_model
from lit_vlm.model.projectors import PROJECTORS, Projector, get_projector
from lit_vlm.model.skeleton import defer_weights, fill_skeleton
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

    def count_activations(self, vision_width, text_width):
        return 2 * vision_width


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
    with pytest.raises(UserError, match="there is no such projector; there are mlp2x_gelu, linear"):
        blueprint_of((tower, language_model), projector="mlp3x")


@pytest.mark.parametrize("name", PROJECTORS)
def test_plain_transformers_holds_an_exportable_projector(small_parts, name):
    spec = blueprint_of(small_parts, projector=name)
    model, projector = build_model(spec), PROJECTORS[name]
    assert projector.is_exportable
    assert get_projector(model.config) is get_projector(model.config.to_dict()) is projector
    module = model.model.multi_modal_projector
    shape = ModelShape.from_config(model.config.to_dict())
    assert sum(p.numel() for p in module.parameters() if p.dim() == 2) == shape.projector_parameters
    assert type(module).__module__.startswith("transformers.")

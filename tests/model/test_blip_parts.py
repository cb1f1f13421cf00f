"""BLIP's vision tower from a ViT, and for images of another size."""

import pytest
import torch
from transformers import BlipVisionModel, CLIPConfig, ViTConfig, ViTModel

from lit_vlm.model.blip_parts import load_blip_vision, resize_positions
from lit_vlm.model.tiny import make_tiny_blip_vision
from lit_vlm.types import UserError


def test_a_tower_from_a_vit_has_its_outputs(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vit = ViTModel(ViTConfig(**shape, image_size=28, patch_size=14), add_pooling_layer=False).eval()
    torch.nn.init.normal_(vit.embeddings.position_embeddings)
    vit.save_pretrained(tmp_path)
    tower = load_blip_vision(str(tmp_path)).eval()
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(
            tower(pixel_values=pixels).last_hidden_state, vit(pixels).last_hidden_state, rtol=0, atol=1e-5
        )
    with pytest.raises(UserError, match="stage.image_size=30: no multiple of the 14 pixels of a patch"):
        load_blip_vision(str(tmp_path), 30)


def test_resized_positions_are_those_of_transformers_interpolation():
    torch.manual_seed(0)
    tower = BlipVisionModel(make_tiny_blip_vision()).eval()
    pixels = torch.randn(1, 3, 84, 84)
    with torch.no_grad():
        expected = tower(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        resize_positions(tower, 84)
        torch.testing.assert_close(tower(pixel_values=pixels).last_hidden_state, expected, rtol=0, atol=1e-5)
    assert tower.config.image_size == 84


def test_another_model_is_no_tower_of_blip(tmp_path):
    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model.vision_tower=.* its model type is clip. BLIP's tower is a ViT"):
        load_blip_vision(str(tmp_path))

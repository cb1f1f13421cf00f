"""Folders of small models that match pictures with texts or caption pictures."""

import json
from pathlib import Path

import torch
from transformers import BlipVisionConfig, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from lit_vlm.model.blip import build_blip, save_blip, save_blip_run
from lit_vlm.model.tiny import make_text_encoder, make_wordpiece_tokenizer

SIDE = 28
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_dual_encoder(name: str, folder: Path) -> Path:
    """Make a small SigLIP or CLIP with random weights."""
    tokenizer = make_wordpiece_tokenizer()
    text = {**SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "bos_token_id": 2, "eos_token_id": 3}
    vision, size = {**SHAPE, "image_size": SIDE, "patch_size": 14}, {"height": SIDE, "width": SIDE}
    torch.manual_seed(0)
    if name == "siglip":
        SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    else:
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kind = {"siglip": "SiglipImageProcessor", "clip": "CLIPImageProcessor"}[name]
    processor = {"image_processor_type": kind, "size": size, "do_center_crop": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def make_blip(folder: Path) -> Path:
    """Make a small BLIP with random weights: folders retrieval and captions, and hf as a run leaves it."""
    make_text_encoder(folder / "bert", **SHAPE)
    vision = BlipVisionConfig(**SHAPE, image_size=SIDE, patch_size=14)
    model, tokenizer = build_blip(str(folder / "bert"), vision, global_batch_size=4, queue_size=8, feature_width=8)
    save_blip(model.eval(), tokenizer, folder)
    save_blip_run(model, tokenizer, folder / "hf")
    return folder

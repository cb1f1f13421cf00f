"""transformers' own processor of images and texts, without torchvision: tests and benchmarks compare ours with it."""

from __future__ import annotations

from transformers import LlavaOnevisionImageProcessorPil, LlavaOnevisionProcessor, PreTrainedTokenizerFast

from lit_vlm.anyres import ImageSettings


class PlainProcessor(LlavaOnevisionProcessor):
    """LlavaOnevisionProcessor without its video processor, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def make_plain_processor(tokenizer: PreTrainedTokenizerFast, images: ImageSettings) -> PlainProcessor:
    """Make plain transformers' processor of texts and images; tests and benchmarks compare ours with it."""
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": images.tile_size, "width": images.tile_size},
        image_grid_pinpoints=[list(pair) for pair in images.grid_pinpoints],
        image_mean=list(images.mean),
        image_std=list(images.std),
    )
    return PlainProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        num_image_tokens=images.side**2,
        vision_feature_select_strategy=images.select,
        vision_aspect_ratio=images.vision_aspect_ratio,
        chat_template=tokenizer.chat_template,
    )

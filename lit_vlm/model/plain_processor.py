"""Processors of plain transformers for the same images: their settings in an exported folder, and themselves for comparison."""

from __future__ import annotations

from typing import Any

from transformers import (
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lit_vlm.anyres import ImageSettings, ModelClass


class PlainProcessor(LlavaOnevisionProcessor):
    """LlavaOnevisionProcessor without its video processor, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


# Image processor and processor of each class; the files name the image processor without "Pil", which needs torchvision.
_CLASSES: dict[ModelClass, tuple[type[Any], type[Any], str]] = {
    ModelClass.llava: (LlavaImageProcessorPil, LlavaProcessor, "LlavaProcessor"),
    ModelClass.llava_next: (LlavaNextImageProcessorPil, LlavaNextProcessor, "LlavaNextProcessor"),
    ModelClass.llava_onevision: (LlavaOnevisionImageProcessorPil, PlainProcessor, "LlavaOnevisionProcessor"),
}


def make_plain_processor(tokenizer: PreTrainedTokenizerFast, images: ImageSettings) -> Any:
    """Make plain transformers' processor of texts and images; tests and benchmarks compare ours with it."""
    image_processor_class, processor_class, _ = _CLASSES[images.model_class]
    return processor_class(
        image_processor=image_processor_class(**_make_image_values(images)),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        **_make_token_values(images),
    )


def make_processor_config(images: ImageSettings) -> dict[str, Any]:
    """Make the content of `processor_config.json`."""
    image_processor = make_image_processor_config(images)
    name = _CLASSES[images.model_class][2]
    config = {"processor_class": name, "image_processor": image_processor}
    if images.model_class is ModelClass.llava_onevision:
        video = {key: image_processor[key] for key in ("image_mean", "image_std", "size", "resample")}
        config["video_processor"] = {"video_processor_type": "LlavaOnevisionVideoProcessor", **video}
        return config | {"image_token": "<image>", "video_token": "<video>", **_make_token_values(images)}
    return config | {"image_token": "<image>", **_make_token_values(images)}


def make_image_processor_config(images: ImageSettings) -> dict[str, Any]:
    """Make the content of `preprocessor_config.json`."""
    image_processor_class, _, processor_name = _CLASSES[images.model_class]
    values = _make_image_values(images)
    flags = {key: True for key in ("do_convert_rgb", "do_normalize", "do_pad", "do_rescale", "do_resize")}
    return {
        "image_processor_type": image_processor_class.__name__.removesuffix("Pil"),
        "processor_class": processor_name,
        **dict(sorted({**flags, "rescale_factor": images.do_rescale, **values}.items())),
    }


def _make_image_values(images: ImageSettings) -> dict[str, Any]:
    """Make the settings of the image processor that are not the same for every image."""
    square = {"height": images.tile_size, "width": images.tile_size}
    values: dict[str, Any] = {
        "image_mean": list(images.mean),
        "image_std": list(images.std),
        "resample": images.resample,
    }
    if images.model_class is ModelClass.llava:
        values |= {"do_pad": images.pad_to_square}
    else:
        values |= {"image_grid_pinpoints": [list(pair) for pair in images.grid_pinpoints]}
    if images.model_class is ModelClass.llava_onevision:
        return values | {"size": square}
    return values | {"size": {"shortest_edge": images.tile_size}, "crop_size": square, "do_center_crop": True}


def _make_token_values(images: ImageSettings) -> dict[str, Any]:
    """Make the settings from which the processor counts the placeholders of an image."""
    # CLIP's class token, which transformers counts and then removes
    class_token = 1 if images.select == "default" else 0
    if images.model_class is ModelClass.llava_onevision:
        return {
            "num_image_tokens": images.side**2 + class_token,
            "vision_feature_select_strategy": images.select,
            "vision_aspect_ratio": images.vision_aspect_ratio,
        }
    return {
        "patch_size": images.token_px,
        "num_additional_image_tokens": class_token,
        "vision_feature_select_strategy": images.select,
    }

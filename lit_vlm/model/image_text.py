"""Models that match pictures with texts or caption pictures, from local folders of transformers: SigLIP, SigLIP 2, CLIP and BLIP.

Shapes: B pictures with a text each, E width of the features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    LogitsProcessor,
    LogitsProcessorList,
    TopPLogitsWarper,
)

from lit_vlm.files import compute_weights_digest
from lit_vlm.model.blip import MATCHING_TOKEN
from lit_vlm.model.build import load_pretrained
from lit_vlm.model.hub import disable_transformers_logging, raise_folder_errors
from lit_vlm.types import UserError

DUAL_ENCODERS = ("siglip", "siglip2", "clip")  # model types
VISION_TOWERS = ("siglip_vision_model", "clip_vision_model", "dinov2")
MATCHERS = "SigLIP, SigLIP 2 or CLIP (both towers), or of BLIP for retrieval (BlipForImageTextRetrieval)"
NUCLEUS = 0.9  # top_p of BLIP's captioner (Li et al., arXiv 2201.12086, section 4.3)
REPETITION_PENALTY = 1.1  # as in BLIP's repository
MIN_CAPTION_TOKENS, MAX_CAPTION_TOKENS = 1, 20  # without [DEC]; BLIP's minimum of 5 counts [DEC] and "a picture of"
SAMPLING = (
    f"{NUCLEUS} {REPETITION_PENALTY} {MIN_CAPTION_TOKENS} {MAX_CAPTION_TOKENS}"  # captions of other values are others
)


class ImageTextScorer(Protocol):
    """Model that scores how well a text fits a picture.

    Attributes:
        score_name: what the score is.
        digest: of the folder's files; scores of another digest are others.
    """

    score_name: str
    digest: str

    def score(self, images: Sequence[Image], texts: Sequence[str]) -> Tensor:
        """Score pictures with a text each: [B] float32."""
        ...


class DualEncoder:
    """SigLIP, SigLIP 2 or CLIP: the score is the cosine of the features of picture and text."""

    score_name = "cosine of picture and text"

    def __init__(self, folder: Path, config: Any, device: torch.device) -> None:
        self.digest, self.device, self._config = compute_folder_digest(folder), device, config
        self._model = load_pretrained(AutoModel, str(folder), config, torch.float32, {}).to(device).eval()
        self._tokenizer, self._processor = load_inputs(folder)

    def score(self, images: Sequence[Image], texts: Sequence[str]) -> Tensor:
        return (self.embed_images(images) * self.embed_texts(texts)).sum(1)

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image]) -> Tensor:
        """Compute the features of pictures, [B, E] of length 1, on the CPU."""
        inputs = self._processor(images=list(images), return_tensors="pt").to(self.device)
        return F.normalize(self._model.get_image_features(**inputs).pooler_output, dim=-1).float().cpu()

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Compute the features of texts, [B, E] of length 1, on the CPU. All three models were trained on lower case."""
        is_clip, max_length = self._config.model_type == "clip", self._config.text_config.max_position_embeddings
        inputs = self._tokenizer(
            [text.lower() for text in texts],
            padding=True if is_clip else "max_length",  # SigLIP attends to padding, as in its training
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        ).to(self.device)
        mask = {"attention_mask": inputs["attention_mask"]} if is_clip else {}
        features = self._model.get_text_features(input_ids=inputs["input_ids"], **mask).pooler_output
        return F.normalize(features, dim=-1).float().cpu()


class VisionTower:
    """Vision tower alone, such as that of SigLIP or CLIP, or DINOv2: the features are its pooled output.

    Attributes:
        digest: of the folder's files.
    """

    def __init__(self, folder: Path, config: Any, device: torch.device) -> None:
        self.digest, self.device = compute_folder_digest(folder), device
        self._model = load_pretrained(AutoModel, str(folder), config, torch.float32, {}).to(device).eval()
        with disable_transformers_logging(), raise_folder_errors(str(folder), "no image processor can be read"):
            self._processor = AutoImageProcessor.from_pretrained(folder)

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image]) -> Tensor:
        """Compute the features of pictures, [B, E] of length 1, on the CPU."""
        inputs = self._processor(images=list(images), return_tensors="pt").to(self.device)
        return F.normalize(self._model(**inputs).pooler_output, dim=-1).float().cpu()


class BlipMatcher:
    """BLIP's image-text matching: the score is the probability that they match."""

    score_name = "probability of a match (ITM)"

    def __init__(self, folder: Path, config: Any, device: torch.device) -> None:
        self.digest, self.device = compute_folder_digest(folder), device
        model = load_pretrained(BlipForImageTextRetrieval, str(folder), config, torch.float32, {})
        self._model: Any = model.to(device).eval()
        self._tokenizer, self._processor = load_inputs(folder)
        self._max_length = config.text_config.max_position_embeddings
        token = self._tokenizer.convert_tokens_to_ids(MATCHING_TOKEN)
        is_known = MATCHING_TOKEN in self._tokenizer.get_vocab() and token < config.text_config.vocab_size
        self._matching_token = int(token) if is_known else None

    @torch.inference_mode()
    def score(self, images: Sequence[Image], texts: Sequence[str]) -> Tensor:
        pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
        inputs = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._max_length, return_tensors="pt"
        ).to(self.device)
        input_ids = inputs["input_ids"]
        if self._matching_token is not None:  # as in its training; transformers leaves [CLS] there
            input_ids[:, 0] = self._matching_token
        embeds = self._model.vision_model(pixel_values=pixels).last_hidden_state
        hidden = self._model.text_encoder(
            input_ids, attention_mask=inputs["attention_mask"], encoder_hidden_states=embeds
        ).last_hidden_state
        return self._model.itm_head(hidden[:, 0]).float().softmax(-1)[:, 1].cpu()


class BlipCaptioner:
    """BLIP's captioner: nucleus sampling, with a seed for each picture."""

    def __init__(self, folder: Path, config: Any, device: torch.device) -> None:
        self.digest, self.device = compute_folder_digest(folder), device
        model = load_pretrained(BlipForConditionalGeneration, str(folder), config, torch.float32, {})
        self._model: Any = model.to(device).eval()
        self._tokenizer, self._processor = load_inputs(folder)

    @torch.inference_mode()
    def caption(self, images: Sequence[Image], seeds: Sequence[int]) -> list[str]:
        """Write a caption for each picture by nucleus sampling. What is drawn depends on its seed alone, not on the other pictures."""
        pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
        ids = self._model.generate(
            pixels,
            do_sample=False,
            logits_processor=LogitsProcessorList([TopPLogitsWarper(NUCLEUS), GumbelNoise(seeds)]),
            repetition_penalty=REPETITION_PENALTY,
            max_new_tokens=MAX_CAPTION_TOKENS,
            min_new_tokens=MIN_CAPTION_TOKENS,
        )
        return [text.strip() for text in self._tokenizer.batch_decode(ids, skip_special_tokens=True)]


class GumbelNoise(LogitsProcessor):
    """Noise that makes the largest logit a sample of their softmax (Gumbel-max), with a generator of random numbers for each row.

    Args:
        seeds: of the rows.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Add the noise to the logits [B, V]."""
        draws = torch.stack([torch.rand(scores.shape[1], generator=one) for one in self._generators])
        return scores - torch.log(-torch.log(draws.clamp_min(torch.finfo(draws.dtype).tiny))).to(scores)


def choose_device() -> torch.device:
    """Choose the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_scorer(folder: Path, setting: str) -> ImageTextScorer:
    """Load a model that scores pictures with texts.

    Raises:
        UserError: the folder holds another model, or a part of one.
    """
    config, classes = read_model_config(folder, setting)
    if config.model_type in DUAL_ENCODERS:
        return DualEncoder(folder, config, choose_device())
    if config.model_type == "blip" and "BlipForImageTextRetrieval" in classes:
        return BlipMatcher(folder, config, choose_device())
    raise UserError(f"{setting}={folder}: {_describe_model(config, classes)}. Give a local folder of {MATCHERS}.")


def load_picture_encoder(folder: Path, setting: str) -> DualEncoder | VisionTower:
    """Load a model for the features of pictures. Raises UserError for another model."""
    config, classes = read_model_config(folder, setting)
    if config.model_type in DUAL_ENCODERS:
        return DualEncoder(folder, config, choose_device())
    if config.model_type in VISION_TOWERS:
        return VisionTower(folder, config, choose_device())
    raise UserError(
        f"{setting}={folder}: {_describe_model(config, classes)}. Give a local folder of SigLIP, SigLIP 2, CLIP, one of their vision "
        "towers, or DINOv2."
    )


def load_blip_matcher(folder: Path, setting: str) -> BlipMatcher:
    """Load BLIP's image-text matching. Raises UserError for another model."""
    return _load_blip(BlipMatcher, "BlipForImageTextRetrieval", folder, setting)


def load_captioner(folder: Path, setting: str) -> BlipCaptioner:
    """Load BLIP's captioner. Raises UserError for another model."""
    return _load_blip(BlipCaptioner, "BlipForConditionalGeneration", folder, setting)


def _load_blip(target: Any, class_name: str, folder: Path, setting: str) -> Any:
    config, classes = read_model_config(folder, setting)
    if config.model_type != "blip" or class_name not in classes:
        raise UserError(
            f"{setting}={folder}: {_describe_model(config, classes)}. Give a local folder of a {class_name}."
        )
    return target(folder, config, choose_device())


def read_model_config(folder: Path, setting: str) -> tuple[Any, list[str]]:
    """Read the config of a local folder, and the names of its model's classes.

    Raises:
        UserError: it is no folder of a model with safetensors.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{setting}={folder}: no model in this folder: it has no config.json. Give a local folder of a model."
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{setting}={folder}: has no weights as *.safetensors. Give a whole folder of a model.")
    with raise_folder_errors(str(folder), "its config.json cannot be read"):
        config = AutoConfig.from_pretrained(folder)
    return config, list(getattr(config, "architectures", None) or [])


def _describe_model(config: Any, classes: Sequence[str]) -> str:
    return f"its model type is {config.model_type}" + (f" ({', '.join(classes)})" if classes else "")


def load_inputs(folder: Path) -> tuple[Any, Any]:
    """Load the tokenizer and the image processor of a folder. Raises UserError if it has none."""
    with (
        disable_transformers_logging(),
        raise_folder_errors(str(folder), "no tokenizer and image processor can be read"),
    ):
        return AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)


def compute_folder_digest(folder: Path) -> str:
    """Compute a digest of the weights and of the JSON files of a model folder: 32 hexadecimal digits."""

    hasher = hashlib.sha256(compute_weights_digest(folder).encode())
    for file in sorted(folder.glob("*.json")):
        hasher.update(file.name.encode() + b"\0" + file.read_bytes())
    return hasher.hexdigest()[:32]

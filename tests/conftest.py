"""Tiny parts in the hub's layout and records of every shape; nothing here reaches for a network."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="offline", WANDB_SILENT="true")

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from lit_vlm.anyres import Tiling
from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.builtin import BuiltinSource
from lit_vlm.data.images import ArrayImage
from lit_vlm.data.processor import Processor
from lit_vlm.model.build import Blueprint, build, draw_up
from lit_vlm.model.tiny import make_language_model, make_vision_tower, tiny_parts
from lit_vlm.types import ImageSlot, Kind, Language, Message, Role, Sample

torch.set_num_threads(1)  # two threads on a busy machine are slower than one at this size


@pytest.fixture(autouse=True)
def _clean():
    yield
    GlobalHydra.instance().clear()
    torch.set_default_dtype(torch.float32)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> tuple[str, str]:
    return tiny_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def small_parts(tmp_path_factory) -> tuple[str, str]:
    """Smaller still, untied, for tests that train many times."""
    folder = tmp_path_factory.mktemp("small")
    make_vision_tower(folder / "tower", hidden_size=32, intermediate_size=48, num_attention_heads=2)
    make_language_model(folder / "language", hidden_size=32, intermediate_size=48, num_hidden_layers=2, tie_word_embeddings=False)
    return str(folder / "tower"), str(folder / "language")


def blueprint_of(parts: tuple[str, str], tiling: Tiling = Tiling.anyres, **settings) -> Blueprint:
    tower, language = parts
    return draw_up(ModelConfig(vision_tower=tower, language_model=language, **{"grid": 3, "max_tiles": 4, **settings}), tiling=tiling)


@pytest.fixture
def blueprint(small_parts) -> Blueprint:
    return blueprint_of(small_parts)


@pytest.fixture
def processor(blueprint) -> Processor:
    return Processor(blueprint.tokenizer, blueprint.images)


@pytest.fixture
def model(blueprint):
    return build(blueprint).eval()


def picture(height: int, width: int, seed: int = 0) -> ArrayImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return ArrayImage(pixels, f"picture {seed}")


def sample(question: str, answer: str, *sizes: tuple[int, int], seed: int = 0, name: str = "s") -> Sample:
    """One turn over pictures of these sizes."""
    images = tuple(picture(*size, seed=seed + i) for i, size in enumerate(sizes))
    slots = tuple(ImageSlot(i) for i in range(len(images)))
    messages = (Message(Role.user, (*slots, question)), Message(Role.assistant, (answer,)))
    return Sample(f"{name}{seed}", "test", f"test:{seed}", Kind.other, Language.ko, messages, images)


@pytest.fixture
def mixed() -> list[Sample]:
    """Text only, one image of several shapes, several images, several turns, Korean and English."""
    several_turns = Sample(
        "turns",
        "test",
        "test:turns",
        Kind.instruction,
        Language.en,
        (
            Message(Role.user, (ImageSlot(0), "What is this?")),
            Message(Role.assistant, ("A picture.",)),
            Message(Role.user, ("무슨 색인가요?",)),
            Message(Role.assistant, ("빨간색입니다.",)),
        ),
        (picture(40, 90, 7),),
    )
    return [
        sample("안녕하세요?", "네, 안녕하세요.", seed=1),
        sample("무엇이 보이나요?", "빨간 원", (56, 56), seed=2),
        sample("What do you see?", "a blue star and much more text", (150, 70), seed=3),
        sample("Which one?", "the second", (60, 50), (30, 90), seed=4),
        several_turns,
        sample("Read it.", "32", (33, 200), seed=6),
    ]


def builtin(*kinds: str, n: int = 64, language: Language = Language.ko, **options) -> list[BuiltinSource]:
    return [BuiltinSource(kind, kind, language=language, num_samples=n, **options) for kind in kinds]


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parents[1]

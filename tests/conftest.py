"""Shared fixtures: tiny model parts in the hub's layout and samples of every shape. Nothing here uses a network."""

from __future__ import annotations

import gc
import os
import sys

gc.disable()  # until all tests are collected: modules and tests stay to the end, so collections find nothing

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="offline", WANDB_SILENT="true")
os.environ["LC_ALL"] = "C.UTF-8"  # pages and messages in English

from pathlib import Path

import pytest
import torch
from float64 import Float64
from hydra.core.global_hydra import GlobalHydra
from support import blueprint_of, picture, sample

from lit_vlm.data.processor import Processor
from lit_vlm.messages import set_language
from lit_vlm.model.build import build_model
from lit_vlm.model.spec import ModelSpec
from lit_vlm.model.tiny import make_language_model, make_tiny_parts, make_vision_tower
from lit_vlm.types import ImagePlaceholder, Language, Message, Role, Sample, SampleKind

pytest_plugins = ["margins"]  # --margins=FILE


def pytest_collection_finish() -> None:
    gc.freeze()  # collections during the tests do not look at modules and collected tests
    gc.enable()


torch.set_num_threads(1)  # two threads on a busy machine are slower than one at this size


@pytest.fixture(autouse=True)
def _clean():
    streams = sys.stdout, sys.stderr
    yield
    sys.stdout, sys.stderr = streams  # main of run.py replaces them by streams that redact secrets
    GlobalHydra.instance().clear()
    set_language("auto")
    torch.set_default_dtype(torch.float32)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> tuple[str, str]:
    return make_tiny_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def small_parts(tmp_path_factory) -> tuple[str, str]:
    """Even smaller parts with untied embeddings, for tests that train many times."""
    folder = tmp_path_factory.mktemp("small")
    make_vision_tower(folder / "tower", hidden_size=32, intermediate_size=48, num_attention_heads=2)
    make_language_model(
        folder / "language", hidden_size=32, intermediate_size=48, num_hidden_layers=2, tie_word_embeddings=False
    )
    return str(folder / "tower"), str(folder / "language")


@pytest.fixture
def blueprint(small_parts) -> ModelSpec:
    return blueprint_of(small_parts)


@pytest.fixture
def processor(blueprint) -> Processor:
    return Processor(blueprint.tokenizer, blueprint.images)


@pytest.fixture
def model(blueprint):
    return build_model(blueprint).eval()


@pytest.fixture
def in_float64(model):
    """The model of the test in float64, for numeric comparisons: see `float64.py`."""
    with Float64():
        yield model.double()


@pytest.fixture
def mixed() -> list[Sample]:
    """Samples with text only, one image of several shapes, several images, several turns, Korean and English."""
    several_turns = Sample(
        "turns",
        "test",
        "test:turns",
        SampleKind.instruction,
        Language.en,
        (
            Message(Role.user, (ImagePlaceholder(0), "What is this?")),
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


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parents[1]

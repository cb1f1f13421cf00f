"""The viewer's application in this process, over built-in sources and a file with bad records."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from browsing import browser, open_page  # noqa: F401
from PIL import Image
from served import run_app, stop_servers

from lit_vlm.config.schema import SourceConfig
from lit_vlm.data.index.build import build_index
from lit_vlm.data.sources import open_source
from lit_vlm.data.synthetic import BuiltinSource
from lit_vlm.tasks.serve import list_loopback_names
from lit_vlm.types import Language
from lit_vlm.viewer.flags import FlaggedSource, RecordFlags
from lit_vlm.viewer.pages import create_view_app
from lit_vlm.viewer.samples import SampleTable

KINDS = ("grounding", "ocr", "multi_image", "text", "preference")


@dataclass
class Viewer:
    url: str
    table: Any


@pytest.fixture
def table(processor, tmp_path) -> SampleTable:
    """A table of built-in samples in both languages, and of a file with two equal records and two bad ones."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\n<b>굵게</b>?"}, {"from": "gpt", "value": "<script>x</script> <gro>"}]
    rows = [{"id": str(number), "image": "a.png", "conversations": turns} for number in range(2)]
    rows += [{"id": "2", "image": "none.png", "conversations": turns}, {"id": "3", "image": "a.png"}]
    (tmp_path / "mine.json").write_text(json.dumps(rows), encoding="utf-8")
    options = {"max_image_pixels": 10**8, "seed": 0, "cache": tmp_path / "cache"}
    mine = open_source("mine", SourceConfig(path=str(tmp_path / "mine.json"), format="llava"), **options)
    made = [
        BuiltinSource(f"{kind}_{language}", kind, language=language, num_samples=64)
        for kind in KINDS
        for language in (Language.ko, Language.en)
    ]
    sources = [*made, mine]
    parts = {"training": build_index(sources, processor), "held_out": build_index([], processor)}
    flags = RecordFlags(tmp_path / "flags", {"mine": FlaggedSource(mine), "ocr_ko": FlaggedSource(sources[2])})
    return SampleTable(parts, processor, flags)


@pytest.fixture
def viewer(table):
    """The viewer of this table, on a free port."""
    running = []
    app = create_view_app(table, "tiny/2_sft", None, list_loopback_names("127.0.0.1"))
    yield Viewer(run_app(app, [], running).url + "/", table)
    stop_servers(running)

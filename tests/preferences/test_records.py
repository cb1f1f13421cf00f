"""Pairs are read back as they were written, with control tokens and pictures."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from support import picture

from lit_vlm.config.choices import Format
from lit_vlm.config.schema import SourceConfig
from lit_vlm.data.lazy_images import BytesImage, FileImage
from lit_vlm.data.markup import build_object_mention
from lit_vlm.data.sources import open_source
from lit_vlm.preferences.generator import PairImages, build_pair_row, find_image_root
from lit_vlm.preferences.pairs import AnswerOrigin, AnswerPair, AnswerState, CandidateAnswer
from lit_vlm.types import Box, ControlToken, ImagePlaceholder, Language, Message, RecordError, Role, Sample, SampleKind

MINE = SourceConfig(format=Format.preference, kind="preference")  # as conf/data/preference.yaml


def read_back(tmp_path, *rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    MINE.path = str(path)
    source = open_source("mine", MINE, max_image_pixels=10**6)
    return [source[number] for number in range(len(source))]


def make_pair_row(tmp_path, content, images=(), chosen=("yes",), rejected=("no",), before=()):
    messages = (*before, Message(Role.user, content), Message(Role.assistant, ("known",)))
    sample = Sample("7", "source", "file:7", SampleKind.grounding, Language.ko, messages, images)
    answers = [
        CandidateAnswer(content, AnswerOrigin.sample, AnswerState.graded, score)
        for content, score in ((chosen, 1.0), (rejected, 0.0))
    ]
    return sample, build_pair_row(
        sample, AnswerPair(*answers), "control", PairImages(tmp_path, tmp_path / "pairs_files" / "images")
    )


def test_control_tokens_stay_control_tokens_and_text_that_looks_like_them_stays_text(tmp_path):
    mention = build_object_mention("별", Box(0.1, 0.2, 0.3, 0.4))
    question = (ImagePlaceholder(0), ControlToken("<gro>"), "\n<image> <gro> 어디? <|im_end|>")
    written_badly = (ControlToken("<obj>"), "별", ControlToken("<bbox>"), "<bbox>0.1")
    before = (Message(Role.system, ("be kind",)), Message(Role.user, ("hi",)), Message(Role.assistant, ("<ocr>",)))
    sample, row = make_pair_row(tmp_path, question, (picture(20, 30),), mention, written_badly, before)
    (pair,) = read_back(tmp_path, row)
    assert pair.prompt == sample.messages[:-1]
    assert (pair.chosen.content, pair.rejected.content) == (mention, written_badly)
    assert (pair.id, pair.kind, pair.language) == ("source/7/control", SampleKind.grounding, Language.ko)


def test_pictures_are_read_back_in_their_places(tmp_path):
    Image.fromarray(picture(9, 8, 1).array).save(tmp_path / "file.png")
    stream = io.BytesIO()
    Image.fromarray(picture(8, 16, 2).array).save(stream, format="JPEG")
    in_file = FileImage("file.png", tmp_path, "x", 10**6)
    in_bytes, in_memory = BytesImage(stream.getvalue(), "x", 10**6), picture(7, 9, 3)
    question = (ImagePlaceholder(2), "a", ImagePlaceholder(0), "b", ImagePlaceholder(1))
    sample, row = make_pair_row(tmp_path, question, (in_file, in_bytes, in_memory))
    assert row["images"][1] == "file.png"
    saved = sorted((tmp_path / "pairs_files" / "images").iterdir())
    assert sorted(path.suffix for path in saved) == [".jpeg", ".png"]
    assert stream.getvalue() in [path.read_bytes() for path in saved]  # with the encoding unchanged
    (pair,) = read_back(tmp_path, row)
    wanted = [sample.images[slot] for slot in (2, 0, 1)]
    assert [piece for piece in pair.prompt[0].content if isinstance(piece, str)] == ["a", "b"]
    for found, image in zip(pair.images, wanted, strict=True):
        assert np.array_equal(np.asarray(found.load()), np.asarray(image.load()))
    assert make_pair_row(tmp_path, question, sample.images)[1]["images"] == row["images"]  # saved once
    assert sorted((tmp_path / "pairs_files" / "images").iterdir()) == saved


def test_a_picture_elsewhere_is_written_with_its_path_and_the_folder_that_must_be_allowed(tmp_path):
    folder = tmp_path / "elsewhere" / "deep"
    folder.mkdir(parents=True)
    (tmp_path / "here").mkdir()
    Image.fromarray(picture(9, 8, 1).array).save(folder / "file.png")
    row = make_pair_row(tmp_path / "here", (ImagePlaceholder(0),), (FileImage("file.png", folder, "x", 10**6),))[1]
    assert row["images"] == [str(folder / "file.png")] and find_image_root(row["images"]) == str(folder)
    assert find_image_root(["pairs_files/images/1.png"]) is None
    (pair,) = read_back(tmp_path / "here", row)
    with pytest.raises(RecordError, match="leads out of"):
        pair.images[0].load()


def test_a_control_part_must_name_one_of_the_nine_tokens(tmp_path):
    row = make_pair_row(tmp_path, ("?",))[1]
    row["chosen"] = [{"role": "assistant", "content": [{"type": "control", "token": "<|im_end|>"}]}]
    with pytest.raises(RecordError, match="must be one of <gro>"):
        read_back(tmp_path, row)

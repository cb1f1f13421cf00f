"""Files of a folder that are read for a split, and settings that would have no effect."""

import os
import tarfile
import unicodedata

import pytest
from delivery import label, make_zip, open_mapped, picture
from source_cases import open_path, write

from lit_vlm.config import parse
from lit_vlm.config.choices import Format
from lit_vlm.config.mapping import BoxFormat, BoxFrame, BoxUnit, MappingConfig, RegionTask
from lit_vlm.config.schema import DataConfig, SourceConfig
from lit_vlm.config.stage_validation import find_unused_data_settings
from lit_vlm.data.readers.splits import infer_split, normalize_split
from lit_vlm.data.sources import open_source
from lit_vlm.types import UserError

ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def assert_refused(words, path, **options):
    with pytest.raises(UserError) as caught:
        open_path(path, **options)
    assert words in str(caught.value), caught.value


def write_files(folder, files):
    """Write files with these numbers of records, and return the folder."""
    for name, count in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, [ROW] * count)
    return folder


LAYOUTS = {
    "beside": {"train.jsonl": 3, "test.jsonl": 2},
    "words": {"chat_train.jsonl": 3, "chat.test.jsonl": 2},
    "shards": {"train-00000-of-00002.jsonl": 2, "train-00001-of-00002.jsonl": 1, "test-00000-of-00001.jsonl": 2},
    "clone": {"data/train-00000-of-00001.jsonl": 3, "data/test-00000-of-00001.jsonl": 2, "dataset_infos.json": 1},
    "folders": {"train/a.jsonl": 3, "test/b.jsonl": 2, ".git/c.json": 1},
    "deeper": {"data/Training/x/a.jsonl": 3, "data/Evaluation/x/a.jsonl": 2},
    "unnamed": {"chat.jsonl": 3, "chat_test.jsonl": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_of_several_splits_in_a_folder_must_be_chosen(tmp_path, layout):
    folder = write_files(tmp_path, LAYOUTS[layout])
    assert_refused("holds several splits: ", folder)
    assert_refused("data.sources.mine.split=train", folder)
    assert (len(open_path(folder, split="train")), len(open_path(folder, split="test"))) == (3, 2)
    assert_refused("data.sources.mine.split=validation: there is ", folder, split="validation")


def test_dots_in_a_path_are_no_part_of_the_suggested_setting(tmp_path):
    assert_refused(
        "Say which is meant: data.sources.mine.split=train.", write_files(tmp_path / "a.b/c.d", LAYOUTS["beside"])
    )


def test_validation_has_several_names(tmp_path):
    for number, word in enumerate(("validation", "valid", "val", "dev")):
        folder = write_files(tmp_path / str(number), {"train.jsonl": 1, f"{word}.jsonl": 2})
        assert len(open_path(folder, split="validation")) == len(open_path(folder, split=word)) == 2


def test_splits_of_the_hub_with_other_names_are_distinguished(tmp_path):
    names = ("train_sft", "train_gen", "test_sft")
    folder = write_files(tmp_path, {f"{name}-00000-of-00001.jsonl": number for number, name in enumerate(names, 1)})
    assert_refused("holds several splits: test_sft ", folder)
    assert_refused("split=train: several names say it: train_gen, train_sft", folder, split="train")
    assert [len(open_path(folder, split=name)) for name in names] == [1, 2, 3]
    assert len(open_path(folder, split="test")) == 3


def test_folders_of_one_split_are_read_completely(tmp_path):
    words = {"latest.jsonl": 1, "contest.jsonl": 2, "trainee.jsonl": 3, "a_train.jsonl": 1}
    assert len(open_path(write_files(tmp_path / "a", words))) == 7
    assert len(open_path(write_files(tmp_path / "b", {"test.jsonl": 2}))) == 2
    assert len(open_path(write_files(tmp_path / "c", {"x/a.jsonl": 2, "x/b.jsonl": 1}))) == 3


def test_a_split_that_is_in_no_file_name_is_refused(tmp_path):
    folder = write_files(tmp_path, {"a.jsonl": 1, "b.jsonl": 1})
    assert_refused("split=test: there is none in the names", folder, split="test")
    assert_refused("split=train has no effect: a.jsonl is one file", folder / "a.jsonl", split="train")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("1.Training/라벨/a.json", "train"), ("2.Validation/a.json", "validation"), ("TL_1.zip/a.json", "train"),
        ("VL_1.zip/a.json", "validation"), ("test/train.json", "train"), ("evaluation.json", "test"), ("a/b.json", None),
        ("a-dev-2.parquet", "validation"),
        ("train_test_split/train.jsonl", "train"), ("test_data/val.jsonl", "validation"), ("test_data/a.jsonl", "test"),
        ("train_test_split/a.jsonl", None), ("학습 데이터/Validation/a.jsonl", "validation"), ("학습.jsonl", "train"),
        ("훈련용/a.jsonl", "train"), ("검증데이터.jsonl", "validation"), ("평가.json", "test"), ("시험_1.json", "test"),
        (unicodedata.normalize("NFD", "테스트.json"), "test"), ("refcoco_testA.json", "testA"), ("testB.json", "testB"),
        ("test-dev.json", "test-dev"), ("devtest.json", "devtest"), ("minival.json", "minival"), ("hold-out.json", "test"),
        ("held_out.json", "test"), ("holdout.json", "test"), ("trainData.json", "train"), ("testData.json", "test"),
        ("traindata.json", "train"), ("testdata/a.json", "test"), ("valAnnotations.json", "validation"),
        ("protest.json", None), ("latestNews.json", None), ("학습용어.json", None), ("detrain.json", None), ("TLS.json", None),
    ],
)  # fmt: skip
def test_names_of_splits_are_those_of_datasets_and_of_aihub(path, split):
    assert infer_split(path) == split
    assert normalize_split("restval") is None


def test_a_folder_named_like_a_split_does_not_hide_the_splits_of_its_files(tmp_path):
    for number, (parent, other) in enumerate((("train_test_split", "test"), ("test_data", "val"))):
        folder = write_files(tmp_path / str(number), {f"{parent}/train.jsonl": 3, f"{parent}/{other}.jsonl": 2})
        assert_refused("holds several splits: ", folder)
        assert (len(open_path(folder, split="train")), len(open_path(folder, split=other))) == (3, 2)


@pytest.mark.parametrize("path", ["test_data/chat_train.jsonl", "train/chat_test.jsonl", "val/train/a.jsonl"])
def test_a_path_that_names_two_splits_is_refused_by_name(tmp_path, path):
    assert_refused(f"{path}: its names say several splits (", write_files(tmp_path, {path: 1}))
    if "chat" in path:  # a label file takes its split from its folder
        assert infer_split("Training/test_0001.json", is_label_file=True) == "train"


def test_parts_of_a_split_are_distinguished(tmp_path):
    folder = write_files(tmp_path, {"testA.jsonl": 1, "testB.jsonl": 2})
    assert_refused("holds several splits: testA ", folder)
    assert_refused("split=test: several names say it: testA, testB", folder, split="test")
    assert [len(open_path(folder, split=name)) for name in ("testA", "testB")] == [1, 2]
    (folder / "testB.jsonl").unlink()
    assert_refused("split=testB: there is testA", folder, split="testB")
    assert len(open_path(folder, split="test")) == 1


def test_mapped_labels_of_training_and_validation_are_not_mixed(tmp_path):
    for part, names in (("T", "ab"), ("V", "c")):
        make_zip(tmp_path / f"{part}L_1.zip", [(f"{name}.json", label({"answer": name})) for name in names])
        make_zip(tmp_path / f"{part}S_1.zip", [(f"{name}.jpg", picture()) for name in names])
    with pytest.raises(
        UserError, match=r"holds several splits: train \(TL_1.zip/a.json, .*\), validation \(VL_1.zip/c.json\)"
    ):
        open_mapped(tmp_path)
    assert [sample.messages[1].text for sample in open_mapped(tmp_path, split="validation")] == ["c"]
    assert [sample.messages[1].text for sample in open_mapped(tmp_path, split="train")] == ["a", "b"]


def test_a_pipe_or_a_device_is_refused_as_a_source(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "pipe.jsonl", "/dev/zero", "/dev/null"):
        assert_refused("is a pipe, a device or a socket; give a regular file or a folder", path)
    assert_refused("pipe.jsonl is no regular file. Take it out of the folder", write_files(tmp_path, {"a.jsonl": 1}))
    assert_refused("image_root=/dev/null is a pipe, a device", tmp_path / "a.jsonl", image_root="/dev/null")
    (tmp_path / "zips").mkdir()
    os.mkfifo(tmp_path / "zips" / "labels.zip")
    with pytest.raises(UserError, match=r"labels\.zip: is no regular file"):
        open_mapped(tmp_path / "zips")


# Settings without an effect


MADE = ["kind=ocr", "split=test", 'markup="on"', "marks=text", "image_root=x", "prompts=[q]"]
READ = ["hard=true", "hub_config=x", "revision=x", "max_tiles=2", "format=webdataset", "image_root=x"]
UNUSED = {  # overrides together with which the settings after them have no effect
    "made": ([], [f"data.sources.word_ko.{word}" for word in MADE]),
    "validation": ([], ["data.validation.sources.word_ko.weight=2", "data.validation.fraction=0.2"]),
    "read": (
        ["data=messages", "data.sources.mine.path=x", "data.tiling=base"],
        [f"data.sources.mine.{word}" for word in READ],
    ),
    "strategy": (["trainer.strategy=ddp"], ["trainer.shard_size=2"]),
    "loss": (
        ["stage=dpo", "data=preference", "data.sources.mine.path=x"],
        ["stage.discopop_tau=1", "stage.f_alpha_divergence_coef=1"],
    ),
}


@pytest.mark.parametrize("where", UNUSED)
def test_a_setting_without_effect_is_refused(where):
    overrides, settings = UNUSED[where]
    with pytest.raises(UserError) as caught:
        parse(["experiment=tiny/2_sft", *overrides, *settings])
    for setting in settings:
        key = setting.partition("=")[0]
        assert f"{key}: has no effect here (" in str(caught.value) or key.endswith(".format"), (key, caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"box_frame": BoxFrame.stored}, {"box_unit": BoxUnit.fractions}, {"box_format": BoxFormat.xywh},
        {"task": RegionTask.grounding}, {"size": ["w", "h"]}, {"join_record": "name"}, {"join_item": "image"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_regions_and_of_join_are_refused_without_regions_and_join(settings):
    def find_errors(**more):
        source = SourceConfig(path="x", format=Format.mapped, mapping=MappingConfig(answer="{a}", **settings, **more))
        return "".join(find_unused_data_settings(DataConfig(sources={"mine": source})))

    (setting,) = settings
    assert f"data.sources.mine.mapping.{setting}: has no effect here" in find_errors()
    assert not find_errors(regions="r", join="j")


def test_revision_of_a_local_hub_folder_and_image_root_of_a_tar_are_refused(tmp_path):
    with pytest.raises(UserError, match="revision has no effect: hub=.* is a folder here"):
        open_source("mine", SourceConfig(hub=str(tmp_path), revision="main"), max_image_pixels=10**6)
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        shard.addfile(tarfile.TarInfo("0.txt"))
    assert_refused(
        "image_root has no effect: the pictures are those of a.tar", tmp_path / "a.tar", image_root=str(tmp_path)
    )

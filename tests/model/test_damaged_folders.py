"""Model folders with a truncated, empty or invalid file: an error that names the folder, or a complete model."""

import json
import random
import shutil

import pytest
import torch

from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.processor import Processor, check_vocabulary
from lit_vlm.model.build import build_model
from lit_vlm.model.export import export_model
from lit_vlm.model.skeleton import defer_weights
from lit_vlm.model.spec import load_model_spec, read_tiling
from lit_vlm.types import UserError


@pytest.fixture(scope="module")
def whole(small_parts, tmp_path_factory):
    from support import blueprint_of

    blueprint = blueprint_of(small_parts)
    folder = tmp_path_factory.mktemp("whole") / "hf"
    export_model(build_model(blueprint), blueprint.tokenizer, blueprint.images, folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def load_folder(folder, deferred: bool = False):
    """Load a folder as a run does that starts from it."""
    blueprint = load_model_spec(
        ModelConfig(vision_tower="-", language_model="-"), str(folder), read_tiling(str(folder))
    )
    check_vocabulary(Processor(blueprint.tokenizer, blueprint.images))
    if not deferred:
        return build_model(blueprint)
    with defer_weights():
        return build_model(blueprint)


def get_load_error(folder) -> str:
    with pytest.raises(UserError) as caught:
        load_folder(folder)
    assert str(folder) in str(caught.value), caught.value
    return str(caught.value)


class FileCreator:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_weights_with_code_are_refused_and_the_code_does_not_run(copy, tmp_path):
    (copy / "model.safetensors").unlink()
    torch.save({"a": FileCreator(tmp_path / "ran")}, copy / "pytorch_model.bin")
    get_load_error(copy)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize("value", [-1, 0, "32", 1.5, None, [], True])
def test_an_impossible_size_is_reported(copy, part, value):
    config = json.loads((copy / "config.json").read_text())
    config[part]["hidden_size"] = value
    (copy / "config.json").write_text(json.dumps(config))
    get_load_error(copy)


@pytest.mark.parametrize("key", ["image_mean", "image_std"])
@pytest.mark.parametrize("value", [[0.5], "abc", [0.5, 0.5, "a"], [0.5, 0.5, float("inf")], {"a": 1}])
def test_an_invalid_mean_or_deviation_is_reported(copy, key, value):
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert key in get_load_error(copy)


FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "lit_vlm.json",
    "model.safetensors",
]
DAMAGE = {
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "half": lambda data: data[: len(data) // 2],
    "no object": lambda data: b"[]",
    "null": lambda data: b"null",
    "empty object": lambda data: b"{}",
    "no text": lambda data: b"\xff\xfe\x00" + data[:64],
    "garbage": lambda data: random.Random(0).randbytes(256),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_gives_an_error_with_the_folder_or_is_not_needed(copy, name, damage):
    """Some files are optional: the model is then complete without them."""
    path = copy / name
    assert path.is_file()
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    for deferred in (False, True):
        try:
            load_folder(copy, deferred)
        except UserError as error:
            assert str(copy) in str(error), error
            assert len(str(error)) < 1000


@pytest.mark.parametrize("content", [b"", b"\xff\xfe{{", b"   \n"])
def test_a_template_file_that_is_not_text_is_reported_by_its_name(whole, tmp_path, content):
    file = tmp_path / "t.jinja"
    file.write_bytes(content)
    model = ModelConfig(vision_tower="-", language_model="-", chat_template=str(file))
    with pytest.raises(UserError, match=rf"model.chat_template={file}: "):
        load_model_spec(model, str(whole))


def test_of_several_templates_the_default_one_is_used(copy):
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = [{"name": "default", "template": template}, {"name": "tools", "template": "x"}]
    path.write_text(json.dumps(config))
    assert load_folder(copy) is not None

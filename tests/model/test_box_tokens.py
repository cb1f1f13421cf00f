"""Box tokens of an exported folder as special tokens and as ordinary ones: same ids, one model, boxes kept or removed."""

import json
import shutil

import pytest
from support import blueprint_of
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from callbacks import make_callbacks
from lit_vlm.config import parse
from lit_vlm.config.callbacks import CALLBACKS
from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.processor import Processor
from lit_vlm.model.box_tokens import has_special_boxes, set_special_boxes
from lit_vlm.model.build import build_model
from lit_vlm.model.export import export_model
from lit_vlm.model.plain_processor import PlainProcessor
from lit_vlm.model.spec import load_model_spec
from lit_vlm.tasks.export import export
from lit_vlm.types import SPECIAL_TOKENS, UserError

ANSWER = "<gro>\n<obj>빨간 원</obj><bbox>0.1, 0.1, 0.6, 0.7</bbox>와 <char>글</char><delim> <ocr>end"


@pytest.fixture(scope="module")
def folders(small_parts, tmp_path_factory):
    """The same model exported in both forms: True -> special, False -> ordinary."""
    blueprint, root = blueprint_of(small_parts), tmp_path_factory.mktemp("boxes")
    model = build_model(blueprint)
    for is_special in (True, False):
        target = root / str(is_special)
        export_model(model, blueprint.tokenizer, blueprint.images, target, special_boxes=is_special)
    return {is_special: root / str(is_special) for is_special in (True, False)}


@pytest.fixture
def copies(folders, tmp_path):
    return {form: shutil.copytree(folder, tmp_path / str(form)) for form, folder in folders.items()}


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_ordinary_box_tokens_have_the_same_ids_and_survive_decoding_without_special_tokens(folders):
    special, ordinary = (AutoTokenizer.from_pretrained(folders[form]) for form in (True, False))
    ids = special(ANSWER)["input_ids"]
    assert ordinary(ANSWER)["input_ids"] == ids and len(special) == len(ordinary)
    assert ordinary.decode(ids, skip_special_tokens=True) == ANSWER == ordinary.decode(ids)
    removed = special.decode(ids, skip_special_tokens=True)
    assert not any(token in removed for token in SPECIAL_TOKENS)
    stream = DecodeStream(skip_special_tokens=True)  # of a streaming server
    assert "".join(stream.step(ordinary.backend_tokenizer, one) or "" for one in ids) == ANSWER
    end = ordinary.convert_tokens_to_ids("<|im_end|>")
    assert ordinary.decode([*ids, end], skip_special_tokens=True) == ANSWER
    assert PlainProcessor.from_pretrained(folders[False]).decode(ids, skip_special_tokens=True) == ANSWER


def test_both_forms_are_one_model_to_a_stage_that_starts_from_them(folders):
    specs = [
        load_model_spec(ModelConfig(special_tokens=list(SPECIAL_TOKENS)), init_from=str(f)) for f in folders.values()
    ]
    special, ordinary = (spec.tokenizer for spec in specs)
    assert special.backend_tokenizer.to_str() == ordinary.backend_tokenizer.to_str()
    assert special.all_special_tokens == ordinary.all_special_tokens
    assert len({Processor(spec.tokenizer, spec.images).digest for spec in specs}) == 1
    assert all(spec.new_tokens == [] and spec.special_tokens == list(SPECIAL_TOKENS) for spec in specs)


def test_only_the_tokenizer_and_the_model_card_differ_and_the_card_says_which(folders):
    special, ordinary = (read_files(folders[form]) for form in (True, False))
    different = {name for name in special if special[name] != ordinary[name]}
    assert different == {"README.md", "tokenizer.json", "tokenizer_config.json"} and special.keys() == ordinary.keys()
    assert "are special tokens" in special["README.md"].decode()
    assert "are ordinary added tokens" in ordinary["README.md"].decode()
    assert (has_special_boxes(folders[True]), has_special_boxes(folders[False])) == (True, False)


def test_the_form_is_changed_there_and_back(folders, copies):
    set_special_boxes(copies[True], False)
    assert read_files(copies[True]) == read_files(folders[False])
    set_special_boxes(copies[False], True)
    again = AutoTokenizer.from_pretrained(copies[False])
    assert again.backend_tokenizer.to_str() == AutoTokenizer.from_pretrained(folders[True]).backend_tokenizer.to_str()
    assert json.loads(read_files(copies[False])["tokenizer_config.json"]) == json.loads(
        read_files(folders[True])["tokenizer_config.json"]
    )
    assert read_files(copies[False])["README.md"] == read_files(folders[True])["README.md"]


def test_a_model_card_of_your_own_stays(copies):
    (copies[True] / "README.md").write_text("mine", encoding="utf-8")
    set_special_boxes(copies[True], False)
    assert (copies[True] / "README.md").read_text(encoding="utf-8") == "mine"


def test_an_interrupted_change_is_repeated_by_the_next_one(folders, copies, monkeypatch):
    from lit_vlm.model import box_tokens

    write = box_tokens._write_text

    def fail_at_tokenizer(path, text):
        if path.name == "tokenizer.json":
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(box_tokens, "_write_text", fail_at_tokenizer)
    with pytest.raises(UserError, match="No space left on device. Make room"):
        export(parse(["task=export", f"init_from={copies[True]}", "special_boxes=false"]))
    monkeypatch.undo()
    export(parse(["task=export", f"init_from={copies[True]}", "special_boxes=false"]))
    assert read_files(copies[True]) == read_files(folders[False])


def test_task_export_changes_a_finished_runs_model_without_a_checkpoint(folders, copies, tmp_path, capsys):
    shutil.move(copies[True], tmp_path / "run" / "hf")
    words = ["task=export", f"init_from={tmp_path / 'run'}", "special_boxes=false"]
    export(parse(words))
    assert read_files(tmp_path / "run" / "hf") == read_files(folders[False])
    assert "ordinary tokens now" in capsys.readouterr().out
    with pytest.raises(UserError, match="its model is in .*hf already"):
        export(parse(words))


def test_a_run_exports_the_form_of_its_setting(tmp_path):
    made = [make_callbacks(["export"], tmp_path, special_boxes=form)[-1].special_boxes for form in (True, False)]
    assert made == [True, False]
    assert CALLBACKS["export"].settings["special_boxes"] == "special_boxes"


def test_a_damaged_tokenizer_is_named(copies):
    (copies[True] / "tokenizer.json").write_text('{"added_tokens"', encoding="utf-8")
    with pytest.raises(UserError, match=r"its tokenizer\.json could not be read"):
        export(parse(["task=export", f"init_from={copies[True]}", "special_boxes=false"]))


def test_a_folder_without_box_tokens_has_neither_form(small_parts, tmp_path):
    assert has_special_boxes(tmp_path) is None
    blueprint = blueprint_of(small_parts, special_tokens=[])
    export_model(build_model(blueprint), blueprint.tokenizer, blueprint.images, tmp_path / "hf", special_boxes=False)
    assert has_special_boxes(tmp_path / "hf") is None
    assert "box tokens" not in (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")

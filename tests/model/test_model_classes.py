"""LLaVA 1.x and LLaVA-NeXT as OneVision: one flat forward pass, transformers' own classes, exports that these load."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from float64 import Float64, restore_pixels
from stages.fits import fit
from support import blueprint_of, builtin, picture, sample
from test_forward import get_gradients, make_plain_processor
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, CLIPVisionModel

from lit_vlm.anyres import ImageSettings, ModelClass, Tiling
from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.data.tiling import compute_decode_size, split_into_tiles
from lit_vlm.model.build import build_model
from lit_vlm.model.classes import get_model_class, get_transformers_class
from lit_vlm.model.export import export_model
from lit_vlm.model.generate import generate
from lit_vlm.model.projectors import PROJECTORS
from lit_vlm.model.skeleton import build_on_meta, defer_weights, fill_skeleton
from lit_vlm.model.spec import ModelSpec, load_model_spec
from lit_vlm.stages import DPOStage, SFTStage
from lit_vlm.stages.preference_metrics import PreferenceMetrics
from lit_vlm.types import ImagePlaceholder, Language, Message, PreferencePair, Role, SampleKind, UserError

NO_TILES = {"grid": None, "max_tiles": None}
CASES = {
    "llava, padded": {"model_class": ModelClass.llava},
    "llava, cropped, linear": {"model_class": ModelClass.llava, "pad_to_square": False, "projector": "linear"},
    "llava, LDPNetV2": {"model_class": ModelClass.llava, "projector": "ldpnetv2"},
    "llava-next": {"model_class": ModelClass.llava_next},
    "llava-next, C-Abstractor": {"model_class": ModelClass.llava_next, "projector": "c_abstractor"},
    "onevision, Q-Former": {"model_class": ModelClass.llava_onevision, "projector": "qformer", "max_tiles": 2},
    "onevision, LDPNetV2": {"model_class": ModelClass.llava_onevision, "projector": "ldpnetv2", "max_tiles": 2},
}
PLAIN_CASES = [name for name in CASES if "," not in name or "padded" in name or "linear" in name]


def make_clip_tower(folder: Path, **changes: int) -> str:
    """Save a CLIP tower with three layers, 56-pixel tiles of 16 patches, and its preprocessor as published."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(6)
    config = CLIPVisionConfig(**{**shape, "image_size": 56, "patch_size": 14, **changes})
    CLIPVisionModel(config).save_pretrained(folder)
    settings = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(autouse=True)
def small_qformer(monkeypatch):
    """A Q-Former of width 24 in the place of 768."""
    monkeypatch.setattr(PROJECTORS["qformer"], "width", 24)
    monkeypatch.setattr(PROJECTORS["qformer"], "num_heads", 2)


@pytest.fixture(scope="module")
def clip_towers(tmp_path_factory) -> dict[bool, str]:
    """A tower of 4 x 4 patches, and one of 18 x 18 for projectors that pool."""
    folder = tmp_path_factory.mktemp("clip")
    return {
        False: make_clip_tower(folder / "4x4"),
        True: make_clip_tower(folder / "18x18", image_size=72, patch_size=4, hidden_size=16, intermediate_size=24),
    }


def load_case(name: str, clip_towers, small_parts, tiling: Tiling = Tiling.anyres) -> ModelSpec:
    settings = CASES[name]
    tower = clip_towers[settings.get("projector") in ("ldpnetv2", "c_abstractor")]
    return blueprint_of((tower, small_parts[1]), tiling, **{**NO_TILES, **settings})


@pytest.fixture(params=CASES)
def case(request, clip_towers, small_parts) -> ModelSpec:
    return load_case(request.param, clip_towers, small_parts)


def make_inputs(spec: ModelSpec, record) -> dict:
    """Return what transformers' own processor makes of a record, with pixels in float64."""
    plain = make_plain_processor(Processor(spec.tokenizer, spec.images))
    messages = [
        {
            "role": message.role.value,
            "content": [
                {"type": "text", "text": piece} if isinstance(piece, str) else {"type": "image"}
                for piece in message.content
            ],
        }
        for message in record.messages
    ]
    text = plain.apply_chat_template(messages, tokenize=False)
    images = [image.load() for image in record.images]
    inputs = dict(plain(text=text, images=[images] if images else None, return_tensors="pt"))
    if images:
        mean, std = (torch.tensor(values)[:, None, None].double() for values in (spec.images.mean, spec.images.std))
        inputs["pixel_values"] = restore_pixels(inputs["pixel_values"], mean, std)
    return inputs


def test_our_forward_equals_the_classs_own_forward_on_its_own_processors_inputs(case, mixed):
    processor, model = Processor(case.tokenizer, case.images), build_model(case).eval().double()
    with Float64(), torch.no_grad():
        # transformers' class with the same weights; the projectors that it lacks come from the exported code's classes
        own = get_model_class(case.config)(case.config).double().eval()
        if not case.images.token_side:
            own.load_state_dict(model.state_dict())
        for record in mixed:
            batch, inputs = collate(processor, [record], step_supervised_tokens=1), make_inputs(case, record)
            assert inputs["input_ids"][0].tolist() == batch.input_ids.tolist()
            if case.images.token_side and case.images.model_class is not ModelClass.llava:
                continue  # plain transformers arranges patches, not tokens: see the test of the exported folder
            theirs = (model if case.images.token_side else own)(**inputs, use_cache=False).logits[0]
            torch.testing.assert_close(model.lm_head(model.model(batch=batch)), theirs, atol=1e-5, rtol=0)


def test_a_packed_batch_of_each_class_gives_the_loss_and_gradients_of_its_samples_one_by_one(case, mixed):
    processor, model = Processor(case.tokenizer, case.images), build_model(case).double()
    stage = SFTStage(model)
    stage.configure_model()
    with Float64():
        losses = stage.compute_token_losses(collate(processor, mixed))
        (losses.sum() / len(losses)).backward()
        together = get_gradients(model)
        model.zero_grad()
        alone = [stage.compute_token_losses(collate(processor, [record])) for record in mixed]
        assert sum(map(len, alone)) == len(losses)
        (sum(each.sum() for each in alone) / len(losses)).backward()
    assert float(losses.sum()) == pytest.approx(float(sum(each.sum() for each in alone)), rel=1e-9)
    torch.testing.assert_close(together, get_gradients(model), atol=1e-9, rtol=1e-6)


def load_exported(folder: Path, code: bool):
    """Load a folder in plain transformers."""
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=code).eval()


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_export_of_each_class_loads_in_plain_transformers_with_the_same_logits(case, mixed, tmp_path, lora):
    parts = {"language_model": {"lora": {"rank": 2}}, "vision_tower": {"lora": {"rank": 2}}} if lora else {}
    stage = SFTStage(case, parts=parts)
    stage.configure_model()
    with torch.no_grad():
        for name, parameter in stage.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model = stage.model.eval()
    export_model(model, case.tokenizer, case.images, tmp_path / "hf")
    has_code = bool(case.images.token_side)
    assert (tmp_path / "hf/projector_modules.py").exists() is has_code
    plain = load_exported(tmp_path / "hf", has_code)
    assert type(plain).__module__.startswith("transformers_modules." if has_code else "transformers.models.")
    processor, model, plain = Processor(case.tokenizer, case.images), model.double(), plain.double()
    with Float64(), torch.no_grad():
        for record in [*mixed, builtin("caption")[0][0]]:
            theirs = plain(**make_inputs(case, record)).logits[0]
            batch = collate(processor, [record])
            torch.testing.assert_close(theirs, model.lm_head(model.model(batch=batch)), atol=1e-5, rtol=1e-4)


def test_a_stage_of_each_class_starts_from_its_export_with_the_same_weights(case, tmp_path):
    model = build_model(case)
    export_model(model, case.tokenizer, case.images, tmp_path / "hf")
    again = load_model_spec(ModelConfig(), init_from=str(tmp_path / "hf"), tiling=case.images.tiling)
    assert (again.images, again.new_tokens) == (case.images, [])
    assert Processor(again.tokenizer, again.images).digest == Processor(case.tokenizer, case.images).digest
    loaded = build_model(again)
    with defer_weights():
        in_shards = build_model(load_model_spec(ModelConfig(), init_from=str(tmp_path / "hf")))
    fill_skeleton(in_shards, torch.float32)
    others = zip(loaded.named_parameters(), in_shards.named_parameters(), strict=True)
    for (name, value), ((other, a), (third, b)) in zip(model.named_parameters(), others, strict=True):
        assert name == other == third and torch.equal(value, a) and torch.equal(value, b), name


@pytest.mark.parametrize("name", PLAIN_CASES)
def test_weights_and_configs_of_each_class_are_written_as_transformers_writes_them(
    name, clip_towers, small_parts, tmp_path
):
    spec = load_case(name, clip_towers, small_parts)
    export_model(build_model(spec), spec.tokenizer, spec.images, tmp_path / "hf")
    load_exported(tmp_path / "hf", False).save_pretrained(tmp_path / "theirs")
    for path in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("llava, padded", "llava-next")), "llava, LDPNetV2"],
)
def test_plain_transformers_answers_from_the_folder_of_each_class_without_our_package(
    name, clip_towers, small_parts, tmp_path
):
    spec = load_case(name, clip_towers, small_parts)
    export_model(build_model(spec), spec.tokenizer, spec.images, tmp_path / "hf")
    picture(90, 60).load().save(tmp_path / "photo.png")
    class_name = "LlavaNext" if "next" in name else "Llava"
    program = f"""
import sys, json, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, {class_name}ImageProcessorPil, {class_name}Processor
code = {bool(spec.images.token_side)}
folder = {str(tmp_path / "hf")!r}
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=code)
settings = json.load(open(folder + "/processor_config.json"))
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=code)
processor = {class_name}Processor({class_name}ImageProcessorPil.from_pretrained(folder), tokenizer,
    chat_template=open(folder + "/chat_template.jinja").read(),
    **{{key: settings[key] for key in ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")}})
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "무엇이 보이나요?"}}]}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=text, images=Image.open({str(tmp_path / "photo.png")!r}), return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:].tolist())
assert not any(name.split(".")[0] in ("lit_vlm", "callbacks") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = load_model_spec(ModelConfig(), init_from=str(tmp_path / "hf"))
    batch = collate(Processor(again.tokenizer, again.images), [sample("무엇이 보이나요?", "x", (90, 60), seed=0)])
    assert json.loads(done.stdout.strip().splitlines()[-1]) == generate(build_model(again), batch, max_new_tokens=8)[0]


def test_without_its_code_a_model_with_a_pooling_projector_is_not_loaded_at_all(clip_towers, small_parts, tmp_path):
    spec = load_case("llava, LDPNetV2", clip_towers, small_parts)
    export_model(build_model(spec), spec.tokenizer, spec.images, tmp_path / "hf")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", trust_remote_code=False)


@pytest.mark.parametrize("name", ["llava, padded", "llava-next"])
def test_dpo_of_each_class_equals_the_loss_of_transformers_own_logits(name, clip_towers, small_parts):
    spec = load_case(name, clip_towers, small_parts)
    processor, policy = Processor(spec.tokenizer, spec.images), build_model(spec).double()
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.model.language_model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    pairs = [
        make_pair("뭐?", "빨간 원", "파란 별입니다", (150, 60)),
        make_pair("Same?", "yes", "no", (60, 50), (30, 90)),
    ]
    with Float64():
        stage = DPOStage(policy)
        stage.configure_model()
        stage.reference.load_state_dict(reference.state_dict(), strict=False)
        chosen = sum(processor.encode_sequences(pair)[0].num_supervised for pair in pairs)
        batch = collate(processor, pairs, step_pairs=len(pairs), step_chosen_tokens=chosen)
        ours, output = stage._compute_preference(batch, PreferenceMetrics(), True)
        with torch.no_grad():
            margins = []
            for pair in pairs:
                sums = [compute_answer_log_prob(m, spec, pair, a) for m in (policy, reference) for a in (0, 1)]
                margins.append((sums[0] - sums[1]) - (sums[2] - sums[3]))
    expected = -torch.nn.functional.logsigmoid(0.1 * torch.stack(margins)).mean()
    assert stage.config.beta == 0.1 and output is not None
    assert float(ours.detach()) == pytest.approx(float(expected), rel=1e-6)


def make_pair(question: str, chosen: str, rejected: str, *sizes: tuple[int, int]) -> PreferencePair:
    images = tuple(picture(*size, seed=i) for i, size in enumerate(sizes))
    prompt = (Message(Role.user, (*map(ImagePlaceholder, range(len(sizes))), question)),)
    answers = Message(Role.assistant, (chosen,)), Message(Role.assistant, (rejected,))
    return PreferencePair("p", "test", "test:0", SampleKind.other, Language.ko, prompt, *answers, images)


def compute_answer_log_prob(model, spec: ModelSpec, pair: PreferencePair, answer: int) -> torch.Tensor:
    """Return the sum of an answer's log-probabilities from transformers' own forward pass of one padded sequence."""
    message = (pair.chosen, pair.rejected)[answer]
    record = sample("?", "!")
    record = type(record)("s", "test", "test:0", SampleKind.other, Language.ko, (*pair.prompt, message), pair.images)
    sequence = Processor(spec.tokenizer, spec.images).encode_sequences(pair)[answer]
    inputs = make_inputs(spec, record)
    assert inputs["input_ids"][0].tolist() == sequence.input_ids.tolist()
    log_probs = model(**inputs, use_cache=False).logits[0].log_softmax(-1)[:-1]
    tokens = inputs["input_ids"][0, 1:, None]
    return log_probs.gather(1, tokens)[torch.from_numpy(sequence.supervised[1:])].sum()


# Pictures


@pytest.mark.parametrize("name", ["llava, padded", "llava, cropped, linear", "llava-next"])
@pytest.mark.parametrize("size", [(56, 56), (57, 113), (200, 31), (300, 400), (10, 150), (112, 168)])
def test_tiles_of_each_class_equal_those_of_transformers(name, size, clip_towers, small_parts):
    spec = load_case(name, clip_towers, small_parts)
    image = picture(*size).load()
    plain = make_plain_processor(Processor(spec.tokenizer, spec.images)).image_processor
    theirs = plain([image], return_tensors="pt")["pixel_values"]
    theirs = theirs[0] if spec.images.model_class is ModelClass.llava_next else theirs
    for alone in (True, False):  # several images of a sample are tiled as one is
        ours = torch.from_numpy(split_into_tiles(image, spec.images, single_image=alone)).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (spec.images.mean, spec.images.std))
        torch.testing.assert_close((ours - mean) / std, theirs.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", [336, 384])
def test_token_counts_of_llava_next_are_transformers_own(side, clip_towers, small_parts):
    spec = load_case("llava-next", clip_towers, small_parts)
    pinpoints = tuple((h * side, w * side) for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
    images = ImageSettings(side, 14, pinpoints, None, (0.5,) * 3, (0.5,) * 3, model_class=ModelClass.llava_next)
    plain, rng = make_plain_processor(Processor(spec.tokenizer, images)), random.Random(2)
    for _ in range(300):
        size = rng.randint(1, 4000), rng.randint(1, 4000)
        layout = images.compute_layout(*size, single_image=rng.random() < 0.5)
        assert plain._get_number_of_features(*size, side, side) == layout.num_tokens, size
    if side == 336:  # five views of 576 tokens and 24 newlines for each row of tiles, without those of padding
        assert images.compute_layout(672, 672).num_tokens == 576 + 48 * 49
        assert images.compute_layout(1000, 3000).num_tokens == 576 + 24 * 73


@pytest.mark.parametrize("name", ["llava, padded", "llava, cropped, linear"])
def test_llava_makes_one_view_of_any_picture_with_any_tiling(name, clip_towers, small_parts):
    for tiling in Tiling:
        images = load_case(name, clip_towers, small_parts, tiling).images
        for size in ((1, 20_000), (20_000, 1), (300, 70)):  # a line of pixels takes no gigabytes
            assert images.compute_layout(*size) == (1, 16, 0, 0, (0, 0, 0, 0), None)
            assert split_into_tiles(picture(*size).load(), images).shape == (1, 3, 56, 56)
            assert min(compute_decode_size(*size, images)) >= 1


@pytest.mark.parametrize("setting", ["grid", "max_tiles"])
def test_a_setting_of_tiles_that_a_class_does_not_have_is_refused_by_name(setting, clip_towers, small_parts):
    for model_class in (ModelClass.llava, ModelClass.llava_next):
        settings = {**NO_TILES, "model_class": model_class, setting: 2}
        if (model_class, setting) == (ModelClass.llava_next, "grid"):
            assert len(blueprint_of((clip_towers[False], small_parts[1]), **settings).images.grid_pinpoints) == 4
            continue
        with pytest.raises(UserError, match=rf"model.{setting}=2: has no effect.*model_class {model_class}"):
            blueprint_of((clip_towers[False], small_parts[1]), **settings)


def test_a_folder_of_llava_is_continued_with_the_crop_or_the_padding_that_it_names(clip_towers, small_parts, tmp_path):
    spec = load_case("llava, cropped, linear", clip_towers, small_parts)
    export_model(build_model(spec), spec.tokenizer, spec.images, tmp_path / "hf")
    for setting, expected in ((None, False), (True, True)):
        again = load_model_spec(ModelConfig(pad_to_square=setting), init_from=str(tmp_path / "hf"))
        assert again.images.pad_to_square is expected


@pytest.mark.parametrize("name", CASES)
def test_each_class_learns(name, clip_towers, small_parts, tmp_path):
    spec = load_case(name, clip_towers, small_parts, Tiling.base)
    stage, processor = SFTStage(spec, learning_rate=3e-3), Processor(spec.tokenizer, spec.images)
    stage.configure_model()
    source = builtin("caption", n=16)
    batch = collate(processor, [source[0][i] for i in range(8)])
    with torch.no_grad():
        before = float(stage.compute_token_losses(batch).mean())
    fit(stage, processor, source, tmp_path, max_steps=12, global_batch_size=8)
    with torch.no_grad():
        after = float(stage.compute_token_losses(batch).mean())
    assert after < 0.8 * before
    assert type(build_on_meta(spec.config)).__mro__[int(bool(spec.images.token_side))] is get_transformers_class(
        spec.images.model_class
    )

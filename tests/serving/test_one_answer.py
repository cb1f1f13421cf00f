"""One answer everywhere: the model in memory, its exported folder in plain transformers, and the served endpoint."""

import pytest
import torch
from served import make_data_url
from support import builtin
from transformers import AutoModelForImageTextToText

from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.evaluation.generation import get_end_of_answer_id
from lit_vlm.model.export import export_model
from lit_vlm.model.generate import generate
from lit_vlm.model.plain_processor import PlainProcessor
from lit_vlm.stages import SFTStage
from lit_vlm.types import SPECIAL_TOKENS, ImagePlaceholder, Language

KINDS = (("text", False), ("caption", False), ("ocr", True), ("grounding", True), ("multi_image", False))
TIE = 1e-4  # rounding decides the order of logits this close
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def records():
    """Forty questions: text alone, one picture, several tiles, boxes, two pictures; half of them Korean."""
    return [
        builtin(kind, language=language, hard=hard, held_out=True)[0][number]
        for kind, hard in KINDS
        for language in (Language.ko, Language.en)
        for number in range(4)
    ]


@pytest.fixture
def stage(blueprint):
    """A random model with LoRA that often writes control tokens; its adapters have an effect."""
    torch.manual_seed(5)
    stage = SFTStage(blueprint, parts={"language_model": {"lora": {"rank": 4}}})
    stage.configure_model()
    with torch.no_grad():
        for name, parameter in stage.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        ids = [blueprint.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
        new_tokens = getattr(stage.model, "new_tokens", None)
        rows = stage.model.lm_head.weight[ids] if new_tokens is None or new_tokens.head is None else new_tokens.head
        rows.mul_(8.0)
        if new_tokens is None or new_tokens.head is None:
            stage.model.lm_head.weight[ids] = rows
    stage.model.eval()
    return stage


def answer_in_memory(model, processor, records, stop_id):
    return [generate(model, collate(processor, [one]), NEW_TOKENS, eos_token_id=stop_id)[0] for one in records]


def make_parts(record, make_image_part):
    parts = []
    for piece in record.messages[0].content:
        if isinstance(piece, ImagePlaceholder):
            parts.append(make_image_part(record.images[piece.index].load()))
        else:
            parts.append({"type": "text", "text": getattr(piece, "token", piece)})
    return parts


def answer_in_transformers(folder, records, stop_id):
    """Answers of the exported folder, and of each token the distance between the two best logits."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = PlainProcessor.from_pretrained(folder)
    answers, gaps = [], []
    for record in records:
        messages = [{"role": "user", "content": make_parts(record, lambda _: {"type": "image"})}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        images = [image.load() for image in record.images]
        inputs = processor(text=text, images=[images] if images else None, return_tensors="pt")  # images of one text
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": stop_id, "pad_token_id": stop_id}
        output = model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
        answers.append(output.sequences[0, inputs["input_ids"].shape[1] :].tolist())
        best = torch.stack(output.logits)[:, 0].topk(2).values
        gaps.append((best[:, 0] - best[:, 1]).tolist())
    return answers, gaps


def answer_from_server(client, records):
    return [
        client.chat.completions.create(
            model="tiny",
            max_tokens=NEW_TOKENS,
            messages=[
                {
                    "role": "user",
                    "content": make_parts(
                        record, lambda image: {"type": "image_url", "image_url": {"url": make_data_url(image)}}
                    ),
                }
            ],
        )
        .choices[0]
        .message.content
        for record in records
    ]


def test_forty_answers_are_the_same_with_lora_in_memory_merged_in_plain_transformers_and_served(
    stage, blueprint, records, tmp_path, start_folder_server
):
    processor = Processor(blueprint.tokenizer, blueprint.images)
    stop_id = get_end_of_answer_id(processor)
    in_memory = answer_in_memory(stage.model, processor, records, stop_id)
    export_model(stage.model, blueprint.tokenizer, blueprint.images, tmp_path / "hf")
    plain, gaps = answer_in_transformers(tmp_path / "hf", records, stop_id)
    served = answer_from_server(start_folder_server(tmp_path / "hf"), records)
    texts = [processor.decode([token for token in ids if token != stop_id]) for ids in in_memory]
    different = []
    for number, (ours, theirs) in enumerate(zip(in_memory, plain, strict=True)):
        if ours != theirs:
            place = next(i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
            different += [number] * (gaps[number][place] >= TIE)
        else:
            assert served[number] == texts[number]
    assert len(different) <= 1, different
    assert sum(any(token in text for token in SPECIAL_TOKENS) for text in served) >= 10
    assert len(set(texts)) > 20

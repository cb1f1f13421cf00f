"""BLIP-2's first stage beside LAVIS 1.0.2: each pass and the whole losses with fixed negatives, in float64.

`make oracle` computes the numbers of `tests/oracle/lavis.json` with LAVIS's code.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from float64 import Float64
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    Blip2ForImageTextRetrieval,
    Blip2VisionConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from waiting import PATIENCE

from lit_vlm.model.qformer.generation import build_blip2_generator, make_caption_labels
from lit_vlm.model.qformer.lavis_weights import convert_lavis_weights, rename_lavis_weight
from lit_vlm.model.qformer.pretraining import Blip2ForPretraining, make_blip2_config

TESTS = Path(__file__).resolve().parents[1]
ORACLE = TESTS / "oracle"
sys.path += [str(ORACLE), str(TESTS / "engine")]
import made_weights as made
from rank_runs import run_ranks

LAVIS = json.loads((ORACLE / "lavis.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-10  # both sides compute in float64; the file has 13 digits


def make_model() -> Blip2ForPretraining:
    """Make the model with the made weights, by the names of LAVIS."""
    vision = Blip2VisionConfig(
        hidden_size=made.VISION_WIDTH,
        intermediate_size=2 * made.VISION_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=made.IMAGE_SIZE,
        patch_size=made.PATCH_SIZE,
        layer_norm_eps=1e-6,
    )
    text = BertConfig(
        vocab_size=made.VOCAB,
        hidden_size=made.HIDDEN,
        num_hidden_layers=made.LAYERS,
        num_attention_heads=made.HEADS,
        intermediate_size=made.INTERMEDIATE,
        max_position_embeddings=made.POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=made.PAD,
    )
    config = make_blip2_config(vision, text, num_queries=made.QUERIES, feature_width=made.FEATURES)
    model = Blip2ForPretraining(Blip2ForImageTextRetrieval(config), made.BOS)
    model.retrieval.vision_model.post_layernorm.eps = 1e-5  # of LAVIS's ln_vision
    with Float64():
        model.double()
    lavis = {name: torch.tensor(made.make_weight(name, shape)) for name, shape in list_lavis_shapes(model)}
    lavis["temp"] = torch.tensor(0.07, dtype=torch.float64)
    model.load_state_dict(convert_lavis_weights(lavis))
    return model


def list_lavis_shapes(model) -> list[tuple[str, tuple[int, ...]]]:
    """List the names and shapes of LAVIS's parameters, from those of ours."""
    back = {
        "retrieval.qformer.layernorm.": "Qformer.bert.embeddings.LayerNorm.",
        "retrieval.embeddings.": "Qformer.bert.embeddings.",
        "retrieval.qformer.": "Qformer.bert.",
        "attention.attention.": "attention.self.",
        "text_head.dense.": "Qformer.cls.predictions.transform.dense.",
        "text_head.layernorm.": "Qformer.cls.predictions.transform.LayerNorm.",
        "text_head.bias": "Qformer.cls.predictions.bias",
        "retrieval.vision_projection.": "vision_proj.",
        "retrieval.text_projection.": "text_proj.",
        "retrieval.vision_model.post_layernorm.": "ln_vision.",
        "retrieval.vision_model.embeddings.class_embedding": "visual_encoder.cls_token",
        "retrieval.vision_model.embeddings.position_embedding": "visual_encoder.pos_embed",
        "retrieval.vision_model.embeddings.patch_embedding.": "visual_encoder.patch_embed.proj.",
        "retrieval.vision_model.encoder.layers.": "visual_encoder.blocks.",
        ".self_attn.projection.": ".attn.proj.",
        ".self_attn.": ".attn.",
        ".layer_norm": ".norm",
        "retrieval.": "",
    }
    shapes = []
    for name, parameter in model.named_parameters():
        if name == "temperature":
            continue
        for ours, theirs in back.items():
            name = name.replace(ours, theirs)
        if name.endswith("qkv.bias"):
            width = (len(parameter) // 3,)
            shapes += [(name.replace("qkv.bias", "q_bias"), width), (name.replace("qkv.bias", "v_bias"), width)]
        else:
            shapes.append((name, tuple(parameter.shape)))
    return shapes


def make_batch(model, rank: int = 0):
    """Make encoded images, token ids and mask of a rank."""
    ids, mask = map(torch.tensor, made.make_texts(rank))
    return model.retrieval.vision_model.post_layernorm(torch.tensor(made.make_images(rank))), ids, mask


def measure_difference(ours, theirs) -> float:
    """Measure the largest difference between a tensor and the numbers of LAVIS."""
    return float((ours - torch.tensor(theirs, dtype=torch.float64)).abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", ["vision_tower", "image", "text", "matching", "captions"])
def test_each_pass_equals_that_of_lavis(name):
    model = make_model().eval()
    with Float64():
        image, ids, mask = make_batch(model)
        outputs = {}
        hook = model.retrieval.qformer.register_forward_hook(
            lambda *call: outputs.update(hidden=call[2].last_hidden_state)
        )
        if name == "vision_tower":
            model.retrieval.vision_model.post_layernorm = torch.nn.Identity()
            ours = model.encode_images(torch.tensor(made.make_pixels()))
        elif name == "image":
            model.compute_image_features(image)
            ours = outputs["hidden"]
        elif name == "text":
            model.compute_text_features(ids, mask)  # its last layer computes the first token alone
            first, embeddings = outputs["hidden"], model.retrieval.embeddings(input_ids=ids)
            model.retrieval.qformer(query_embeds=embeddings, query_length=0, attention_mask=mask)
            ours = outputs["hidden"]
            torch.testing.assert_close(first, ours[:, :1], rtol=0, atol=TOLERANCE)
        elif name == "matching":
            model.match(image, ids, mask)
            ours = outputs["hidden"][:, : made.QUERIES]
        else:
            ours = model.caption_images(image, ids, mask)[1]
        hook.remove()
    theirs = LAVIS["vision_tower"] if name == "vision_tower" else LAVIS["blip2_passes"][name]
    rows = slice(None)
    if name in ("text", "captions"):  # padding is compared nowhere
        rows = mask.bool()
        theirs = torch.tensor(theirs, dtype=torch.float64)[rows].tolist()
    assert measure_difference(ours[rows], theirs) < TOLERANCE


@pytest.fixture
def opt(tmp_path) -> str:
    """Make the folder of a tiny OPT with the made weights, and a tokenizer with as many words."""
    config = OPTConfig(**made.make_opt_config())
    model = OPTForCausalLM(config).double()
    weights = {
        name: torch.tensor(made.make_weight(f"opt_model.{name}", tuple(parameter.shape)))
        for name, parameter in model.named_parameters()
    }
    model.load_state_dict(weights, strict=False)
    model.save_pretrained(tmp_path / "opt")
    words = WordLevel({"<unk>": 0, "<pad>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, 25)}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), unk_token="<unk>", pad_token="<pad>", eos_token="</s>", bos_token="</s>"
    )
    tokenizer.save_pretrained(tmp_path / "opt")
    return str(tmp_path / "opt")


def test_the_second_stages_loss_and_gradients_equal_those_of_lavis(opt):
    torch.set_default_dtype(torch.float64)  # else the copy of the first stage is rounded
    model, tokenizer = build_blip2_generator(make_model(), opt)
    assert model.config.image_token_index == len(tokenizer) - 1 == 25
    model.vision_model.post_layernorm.eps = 1e-5
    with Float64():
        model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("language_model."):
                lavis = name.replace("language_model.", "opt_model.")
                parameter.copy_(torch.tensor(made.make_weight(lavis, tuple(parameter.shape))))
        for name in ("weight", "bias"):
            value = getattr(model.language_projection, name)
            value.copy_(torch.tensor(made.make_weight(f"opt_proj.{name}", tuple(value.shape))))
        model.query_tokens.copy_(torch.tensor(made.make_weight("query_tokens", tuple(model.query_tokens.shape))))
    ids, mask = map(torch.tensor, made.make_opt_texts())
    ids = torch.cat([torch.full((len(ids), made.QUERIES), model.config.image_token_index), ids], dim=1)
    mask = torch.cat([mask.new_ones(len(mask), made.QUERIES), mask], dim=1)
    labels = make_caption_labels(ids, mask, model.config.image_token_index)
    with Float64():
        image = model.vision_model.post_layernorm(torch.tensor(made.make_images(0)))
        model.vision_model.forward = lambda **_: BaseModelOutputWithPooling(last_hidden_state=image)
        loss = model(pixel_values=image, input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
    theirs = LAVIS["blip2_opt"]
    assert float(loss.detach()) == pytest.approx(theirs["loss"], abs=TOLERANCE)
    parameters, gradients = dict(model.named_parameters()), {}
    for name in theirs["gradients"]:
        ours = rename_lavis_weight(name).removeprefix("retrieval.").replace("opt_proj.", "language_projection.")
        gradient = parameters[ours].grad
        probe = torch.tensor(made.make_array("probe " + name, tuple(gradient.shape)))
        gradients[name] = float((gradient * probe).sum())
    assert len(gradients) > 40 and gradients == pytest.approx(theirs["gradients"], abs=1e-9)
    assert not any(parameter.grad is not None for parameter in model.language_model.parameters())


def test_the_published_sizes_have_the_parameters_of_lavis():
    """LAVIS's classes have as many: `BertLMHeadModel`, queries, projections, heads, temperature and ln_vision."""
    with torch.device("meta"):
        config = make_blip2_config(Blip2VisionConfig(), BertConfig(vocab_size=30523))
        model = Blip2ForPretraining(Blip2ForImageTextRetrieval(config), bos_token_id=30522)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == 186_705_470  # 188M in the paper (arXiv 2301.12597, section 3.1)
    tower = model.retrieval.vision_model.parameters()
    assert sum(parameter.numel() for parameter in tower) == 985_952_256  # ViT-g/14 without its last block


def compute_step(rank: int, world_size: int) -> dict:
    """Compute a rank's losses with the made negatives, and the mean over the ranks of the gradients times LAVIS's probes."""
    model = make_model()
    with Float64():
        negatives = tuple(torch.tensor(columns) for columns in made.make_negatives(rank, world_size))
        losses = model.compute_losses(*make_batch(model, rank), negatives=negatives)
        losses.total.backward()
    gradients = {}
    parameters = dict(model.named_parameters())
    for name in LAVIS[f"world_{world_size}"][rank]["blip2"]["gradients"]:
        gradient = parameters[rename_lavis_weight(name)].grad
        if world_size > 1:
            torch.distributed.all_reduce(gradient)
        probe = torch.tensor(made.make_array("probe " + name, tuple(gradient.shape)))
        gradients[name] = float((gradient / world_size * probe).sum())
    values = {"loss": losses.total, "loss_itc": losses.itc, "loss_itm": losses.itm, "loss_lm": losses.itg}
    return {"losses": {name: float(value.detach()) for name, value in values.items()}, "gradients": gradients}


def require_lavis(ours: dict, rank: int, world_size: int) -> None:
    theirs = LAVIS[f"world_{world_size}"][rank]["blip2"]
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=TOLERANCE)
    assert len(theirs["gradients"]) > 50
    assert ours["gradients"] == pytest.approx(theirs["gradients"], abs=1e-9)


def test_the_whole_loss_and_its_gradients_equal_those_of_lavis():
    require_lavis(compute_step(0, 1), 0, 1)


@torch.no_grad()
def compute_pairs(rows: slice) -> dict[str, float]:
    """Compute ITC and ITM of some pairs of rank 0; two pairs in all have only one choice of negatives."""
    model = make_model()
    with Float64():
        image, ids, mask = (value[rows] for value in make_batch(model))
        losses = model.compute_losses(image, ids, mask)
    return {"itc": float(losses.itc), "itm": float(losses.itm)}


def test_the_loss_on_two_ranks_equals_that_of_lavis_and_one_pair_on_each_rank_that_of_two_pairs(tmp_path):
    worker = Path(__file__).with_name("qformer_worker.py")
    results = run_ranks(worker, [str(tmp_path)], ["step", "pair"], tmp_path, 2, PATIENCE)
    for rank, result in enumerate(results):
        require_lavis(result["step"], rank, 2)
    means = {name: (results[0]["pair"][name] + results[1]["pair"][name]) / 2 for name in ("itc", "itm")}
    assert means == pytest.approx(compute_pairs(slice(0, 2)), abs=TOLERANCE)

"""Compute BLIP-2's and BLIP's losses with LAVIS 1.0.2 on made weights, and write the numbers to `lavis.json`.

Run in LAVIS's environment by `make oracle`. The classes of LAVIS compute everything; only the tokenizer and the vision
tower, which it would download, are replaced: the inputs are token ids and image features. The multinomial sampling of
negatives returns fixed columns.
"""

import json
import os
import socket
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
import torch.multiprocessing as mp
from lavis.models import eva_vit, med
from lavis.models.blip2_models.blip2_opt import Blip2OPT
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from lavis.models.blip2_models.modeling_opt import OPTConfig, OPTForCausalLM
from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
from lavis.models.blip_models import tie_encoder_decoder_weights
from lavis.models.blip_models.blip_caption import BlipCaption
from lavis.models.blip_models.blip_pretrain import BlipPretrain
from lavis.models.blip_models.blip_retrieval import BlipRetrieval
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import made_weights as made

FILE = Path(__file__).with_name("lavis.json")
ALPHA, EPOCH, ITERATION, ITERATIONS = 0.4, 1, 2, 10


class Texts(dict):
    """Output of a tokenizer."""

    def to(self, device):
        return self

    def __getattr__(self, name):
        return self[name]


class Tokenizer:
    """Tokenizer that returns the made token ids."""

    bos_token_id, enc_token_id, pad_token_id = made.BOS, made.ENC, made.PAD

    def __call__(self, texts, **_):
        ids, mask = made.make_texts(texts)
        return Texts(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))


class Features(nn.Identity):
    """Vision tower whose images are features already."""

    vision_width = made.VISION_WIDTH

    def forward_features(self, image):
        return image


def make_bert_config(**changes):
    return BertConfig(
        vocab_size=made.VOCAB,
        hidden_size=made.HIDDEN,
        num_hidden_layers=made.LAYERS,
        num_attention_heads=made.HEADS,
        intermediate_size=made.INTERMEDIATE,
        max_position_embeddings=made.POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=made.PAD,
        encoder_width=made.VISION_WIDTH,
        add_cross_attention=True,
        **changes,
    )


def set_weights(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temp" and not name.rpartition(".")[0].endswith("_m"):
                parameter.copy_(torch.tensor(made.make_weight(name, tuple(parameter.shape))))


def fix_negatives(rank, world_size, num_local=None):
    images, texts = made.make_negatives(rank, world_size)
    columns = [column % num_local if num_local else column for column in images + texts]
    iterator = iter(columns)
    torch.multinomial = lambda weights, number: torch.tensor([next(iterator)])
    return columns


def run_vision_tower():
    """Run LAVIS's EVA tower on made pixels."""
    tower = eva_vit.VisionTransformer(
        img_size=made.IMAGE_SIZE,
        patch_size=made.PATCH_SIZE,
        use_mean_pooling=False,
        embed_dim=made.VISION_WIDTH,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).double()
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            parameter.copy_(torch.tensor(made.make_weight(f"visual_encoder.{name}", tuple(parameter.shape))))
        return tower(torch.tensor(made.make_pixels())).tolist()


def make_blip2():
    model = Blip2Qformer.__new__(Blip2Qformer)
    nn.Module.__init__(model)
    config = make_bert_config(cross_attention_freq=2, query_length=made.QUERIES)
    model.tokenizer, model.max_txt_len = Tokenizer(), made.TOKENS
    model.visual_encoder, model.ln_vision = nn.Identity(), nn.LayerNorm(made.VISION_WIDTH)
    model.Qformer = BertLMHeadModel(config)
    model.query_tokens = nn.Parameter(torch.zeros(1, made.QUERIES, made.HIDDEN))
    model.vision_proj = nn.Linear(made.HIDDEN, made.FEATURES)
    model.text_proj = nn.Linear(made.HIDDEN, made.FEATURES)
    model.itm_head = nn.Linear(made.HIDDEN, 2)
    model.temp = nn.Parameter(0.07 * torch.ones([]))
    model.double()
    set_weights(model)
    return model


def sum_gradients(model):
    """Sum each gradient times made numbers: one number for each parameter, over all ranks."""
    sums = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is None:
            continue
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(gradient)
            gradient = gradient / torch.distributed.get_world_size()
        probe = torch.tensor(made.make_array("probe " + name, tuple(parameter.shape)))
        sums[name] = float((gradient * probe).sum())
    return sums


def run_blip2(rank, world_size):
    model = make_blip2()
    fix_negatives(rank, world_size)
    output = model({"image": torch.tensor(made.make_images(rank)), "text_input": rank})
    output.loss.backward()
    losses = {name: float(output[name]) for name in ("loss", "loss_itc", "loss_itm", "loss_lm")}
    return {"losses": losses, "gradients": sum_gradients(model)}


def run_blip2_passes():
    """Run each pass of the Q-Former for rank 0's pairs."""
    model = make_blip2().eval()
    image = model.ln_vision(torch.tensor(made.make_images(0)))
    tokens = Tokenizer()(0)
    queries = model.query_tokens.expand(len(image), -1, -1)
    atts = torch.ones(image.shape[:-1], dtype=torch.long)
    ones = torch.ones(queries.shape[:-1], dtype=torch.long)
    mask = torch.cat([ones, tokens.attention_mask], dim=1)
    with torch.no_grad():
        query = model.Qformer.bert(
            query_embeds=queries,
            encoder_hidden_states=image,
            encoder_attention_mask=atts,
            use_cache=True,
            return_dict=True,
        )
        text = model.Qformer.bert(tokens.input_ids, attention_mask=tokens.attention_mask, return_dict=True)
        both = model.Qformer.bert(
            tokens.input_ids,
            query_embeds=queries,
            attention_mask=mask,
            encoder_hidden_states=image,
            encoder_attention_mask=atts,
            return_dict=True,
        )
        decoder_ids = tokens.input_ids.clone()
        decoder_ids[:, 0] = made.BOS
        captions = model.Qformer(
            decoder_ids, attention_mask=mask, past_key_values=query.past_key_values, return_dict=True
        )
    outputs = {
        "image": query.last_hidden_state,
        "text": text.last_hidden_state,
        "matching": both.last_hidden_state[:, : made.QUERIES],
        "captions": captions.logits,
    }
    return {name: (value * 1.0).tolist() for name, value in outputs.items()}


class OptTokenizer:
    """Tokenizer of the language model that returns the made token ids; they end with a line break."""

    pad_token_id, padding_side = made.OPT_PAD, "right"

    def __call__(self, texts, **_):
        assert all(text.endswith("\n") for text in texts)
        ids, mask = made.make_opt_texts()
        return Texts(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))


def run_blip2_opt():
    """Run BLIP-2's second stage with a tiny OPT."""
    stage1, config = make_blip2(), made.make_opt_config()
    model = Blip2OPT.__new__(Blip2OPT)
    nn.Module.__init__(model)
    model.visual_encoder, model.ln_vision, model.query_tokens = nn.Identity(), stage1.ln_vision, stage1.query_tokens
    model.Qformer = stage1.Qformer
    model.Qformer.cls = None
    model.Qformer.bert.embeddings.word_embeddings = model.Qformer.bert.embeddings.position_embeddings = None
    for layer in model.Qformer.bert.encoder.layer:
        layer.output = layer.intermediate = None
    model.opt_tokenizer, model.prompt, model.max_txt_len = OptTokenizer(), "", made.TOKENS
    model.opt_model = OPTForCausalLM(OPTConfig(**config))
    model.opt_proj = nn.Linear(made.HIDDEN, config["hidden_size"])
    model.double()
    set_weights(model)
    for parameter in model.opt_model.parameters():
        parameter.requires_grad = False
    output = model({"image": torch.tensor(made.make_images(0)), "text_input": ["made"] * made.PAIRS})
    output["loss"].backward()
    return {"loss": float(output["loss"]), "gradients": sum_gradients(model)}


def make_text_models():
    """Make BLIP's text encoder and its decoder, which are tied as in the pretraining."""
    config = med.BertConfig(**{**make_bert_config().to_dict(), "add_type_embeddings": False, "model_type": "bert"})
    encoder, decoder = med.XBertEncoder(config, add_pooling_layer=False), med.XBertLMHeadDecoder(config)
    tie_encoder_decoder_weights(encoder, decoder.bert, "", "/attention")
    return encoder, decoder


def make_blip(kind, **parts):
    """Make a model of BLIP with momentum encoders and a queue."""
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    model.tokenizer, model.max_txt_len, model.visual_encoder = Tokenizer(), made.TOKENS, Features()
    for name, part in parts.items():
        setattr(model, name, part)
    model.vision_proj = nn.Linear(made.VISION_WIDTH, made.FEATURES)
    model.text_proj = nn.Linear(made.HIDDEN, made.FEATURES)
    model.itm_head = nn.Linear(made.HIDDEN, 2)
    model.temp = nn.Parameter(0.07 * torch.ones([]))
    model.double()
    set_weights(model)
    model.model_pairs = []
    for name in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
        copy = deepcopy(getattr(model, name))
        with torch.no_grad():
            for key, parameter in copy.named_parameters():
                parameter += torch.tensor(made.make_array(f"momentum {name}.{key}", tuple(parameter.shape), 0.05))
                parameter.requires_grad = False
        setattr(model, name + "_m", copy)
        model.model_pairs.append([getattr(model, name), copy])
    for name in ("image_queue", "text_queue"):
        queue = torch.tensor(made.make_array(name, (made.FEATURES, made.QUEUE_SIZE)))
        model.register_buffer(name, nn.functional.normalize(queue, dim=0))
    model.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
    model.queue_size, model.momentum, model.alpha = made.QUEUE_SIZE, 0.995, ALPHA
    return model


SCHEDULE = {"epoch": EPOCH, "iters": ITERATION, "num_iters_per_epoch": ITERATIONS}


def run_blip_retrieval(rank, world_size):
    """Run BLIP's fine-tuning for retrieval, with negatives of all ranks and images that some pairs share."""
    model = make_blip(BlipRetrieval, text_encoder=make_text_models()[0])
    model.register_buffer("idx_queue", torch.tensor([made.make_queue_ids()]))
    model.negative_all_rank = True
    fix_negatives(rank, world_size)
    fixed, weights = torch.multinomial, []
    torch.multinomial = lambda values, number: (weights.append(values.tolist()), fixed(values, number))[1]
    image_ids = torch.tensor(made.make_image_ids(rank))
    images = torch.tensor(made.make_images(rank))
    to_float, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double  # LAVIS makes the targets in float32
    output = model({"image": images, "text_input": rank, "image_id": image_ids, **SCHEDULE})
    torch.Tensor.float = to_float
    output.loss.backward()
    return {
        "losses": {name: float(output[name]) for name in ("loss", "loss_itc", "loss_itm")},
        "gradients": sum_gradients(model),
        "ids_after": model.idx_queue[0].tolist(),
        "image_weights": weights[: made.PAIRS],  # of the negative images, then of the negative texts
        "text_weights": weights[made.PAIRS :],
    }


def run_blip_caption():
    """Run BLIP's fine-tuning for captions, after a prompt of made tokens."""
    model = BlipCaption.__new__(BlipCaption)
    nn.Module.__init__(model)
    model.tokenizer, model.max_txt_len, model.visual_encoder = Tokenizer(), made.TOKENS, Features()
    model.text_decoder, model.prompt, model.prompt_length = make_text_models()[1], "made", made.PROMPT_TOKENS
    model.double()
    set_weights(model)
    output = model({"image": torch.tensor(made.make_images(0)), "text_input": 0})
    output.loss.backward()
    return {"loss": float(output.loss), "gradients": sum_gradients(model)}


def run_blip(rank, world_size):
    encoder, decoder = make_text_models()
    model = make_blip(BlipPretrain, text_encoder=encoder, text_decoder=decoder)
    before = {name: getattr(model, name).T.tolist() for name in ("image_queue", "text_queue")}
    fix_negatives(rank, world_size, num_local=made.PAIRS)
    features = {}
    for name in ("vision_proj", "text_proj", "vision_proj_m", "text_proj_m"):
        getattr(model, name).register_forward_hook(
            lambda module, inputs, value, name=name: features.__setitem__(
                name, nn.functional.normalize(value, dim=-1).tolist()
            )
        )
    output = model({"image": torch.tensor(made.make_images(rank)), "text_input": rank, **SCHEDULE})
    output.loss.backward()
    inner = output.intermediate_output
    return {
        "losses": {name: float(output[name]) for name in ("loss", "loss_itc", "loss_itm", "loss_lm")},
        "features": features,
        "queues": before,
        "queues_after": {name: getattr(model, name).T.tolist() for name in ("image_queue", "text_queue")},
        "position_after": int(model.queue_ptr),
        "image_logits": output.sims.sim_i2t.tolist(),
        "itm_logits": inner.itm_logits.tolist(),
        "lm_logits": inner.decoder_output.logits.tolist(),
        "lm_labels": inner.decoder_labels.tolist(),
        "momentum_text_proj": model.text_proj_m.weight.tolist(),
        "momentum_text_proj_before": (
            model.text_proj.weight.detach().numpy()
            + made.make_array("momentum text_proj.weight", (made.FEATURES, made.HIDDEN), 0.05)
        ).tolist(),
        "text_proj": model.text_proj.weight.tolist(),
        "gradients": sum_gradients(model),
        "step": EPOCH * ITERATIONS + ITERATION,
        "steps_per_epoch": ITERATIONS,
    }


def work(rank, world_size, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    torch.set_default_dtype(torch.float64)  # LAVIS makes targets in the default type
    results[rank] = {
        "blip2": run_blip2(rank, world_size),
        "blip": run_blip(rank, world_size),
        "blip_retrieval": run_blip_retrieval(rank, world_size),
    }
    torch.distributed.destroy_process_group()


def main():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    fixtures = {"vision_tower": run_vision_tower(), "blip2_passes": run_blip2_passes(), "blip2_opt": run_blip2_opt()}
    fixtures["blip_caption"] = run_blip_caption()
    for world_size in (1, 2):
        with mp.Manager() as manager, socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            port = place.getsockname()[1]
            place.close()
            results = manager.dict()
            mp.spawn(work, (world_size, port, results), nprocs=world_size)
            fixtures[f"world_{world_size}"] = [results[rank] for rank in range(world_size)]
    text = json.dumps(round_numbers(fixtures))
    FILE.write_text(text + "\n", encoding="utf-8")
    print(f"{FILE}: {len(text):,} characters")


def round_numbers(value):
    """Round to 13 digits, far below the tolerance of the tests."""
    if isinstance(value, dict):
        return {key: round_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [round_numbers(item) for item in value]
    return float(f"{value:.13g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()

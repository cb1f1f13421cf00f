"""Families of language models: each exact one against its own class, each refused one by name.

A row of `FAMILIES` stands for all released models of its class; `lit_vlm/model/families.py` lists them.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from float64 import Float64
from support import blueprint_of, sample
from test_build import make_language_folder
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from lit_vlm.config.schema import ModelConfig
from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.model import families, packed_attention
from lit_vlm.model.build import build_model
from lit_vlm.model.export import export_model
from lit_vlm.model.lora import find_lora_layers
from lit_vlm.model.parts import get_part
from lit_vlm.model.skeleton import defer_weights
from lit_vlm.model.spec import load_model_spec
from lit_vlm.stages import SFTStage
from lit_vlm.types import ModelPart, UserError

WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 6}
# Config class and settings of each exact family; all windows are shorter than the texts.
FAMILIES = {
    "qwen2 tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True}),
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "hyperclovax": (
        "HyperCLOVAXConfig",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 0.25,
            "tie_word_embeddings": True,
            "residual_multiplier": 0.7,
            "use_post_norm": True,
        },
    ),
    "granite": ("GraniteConfig", {"embedding_multiplier": 2.0, "logits_scaling": 4.0, "residual_multiplier": 0.5}),
}
PRUNED = dict(FAMILIES)  # the last layer of these is computed only where it is read
FAMILIES |= {
    "exaone4": ("Exaone4Config", {**WINDOWS, "tie_word_embeddings": True}),
    "exaone4 without windows": ("Exaone4Config", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "phi3": ("Phi3Config", {"sliding_window": 8}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {**WINDOWS, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": ("Cohere2Config", {**WINDOWS, "logit_scale": 0.25, "head_dim": 8}),
}
WITH_EXPERTS = {  # fused in memory, so their weights are loaded whole
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, "num_experts": 4}),
    "exaone_moe": ("ExaoneMoeConfig", {**WINDOWS, **EXPERTS, "num_experts": 4, "n_group": 1, "topk_group": 1}),
    "solar_open": ("SolarOpenConfig", ROUTED),
    "axk1": ("AXK1Config", {**ROUTED, **LATENT, "num_key_value_heads": 4}),
    "granitemoe": ("GraniteMoeConfig", {"logits_scaling": 4.0, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
ALL = FAMILIES | WITH_EXPERTS
RECORDS = [
    sample("안녕?", "네, 반갑습니다. 오늘은 무엇을 도와 드릴까요?"),
    sample("무엇이 보이나요?", "빨간 원", (60, 60)),
    sample("And?", "a long answer with many more words in it, so that windows end", seed=3),
]


def make_family_folder(folder: Path, family: str, **changes) -> str:
    """Save a random language model of a family; norms, biases and corrections of routers are random, too."""
    name, settings = (ALL | REFUSED)[family]
    path = make_language_folder(folder, getattr(transformers, name), **settings, **changes)
    model = AutoModelForCausalLM.from_pretrained(path)
    generator = torch.Generator().manual_seed(4)
    for key, value in model.state_dict().items():
        if value.ndim < 2 and "rotary" not in key:
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(path)
    return path


def compute_experts_in_float64(model):
    """Let experts run one by one: their grouped product has no float64."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
    return model.double().eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of each family, made when a test asks for it."""
    known: dict[str, str] = {}

    def get_folder(family: str) -> str:
        if family not in known:
            known[family] = make_family_folder(tmp_path_factory.mktemp("family"), family)
        return known[family]

    return get_folder


@pytest.mark.parametrize("family", ALL)
def test_text_logits_equal_the_language_models_own(family, folders, small_parts):
    folder = folders(family)
    blueprint = blueprint_of((small_parts[0], folder))
    model = compute_experts_in_float64(build_model(blueprint))
    theirs = compute_experts_in_float64(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"))
    batch = collate(Processor(blueprint.tokenizer, blueprint.images), [RECORDS[2]])
    assert int(batch.input_ids.max()) < theirs.config.vocab_size and batch.num_tokens > 20
    with torch.no_grad(), Float64():
        ours = model.lm_head(model.model(batch=batch))[:, : theirs.config.vocab_size]
        expected = theirs(input_ids=batch.input_ids[None]).logits[0]
    assert blueprint.remarks == []
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-9)


def compute_losses(model, processor, records):
    (log_probs,) = model(batch=collate(processor, records))
    return log_probs


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in ("gemma3", "axk1") else pytest.mark.slow) for name in ALL]
)
def test_a_packed_row_of_each_family_gives_the_loss_and_gradients_of_its_samples_one_by_one(
    family, folders, small_parts
):
    blueprint = blueprint_of((small_parts[0], folders(family)))
    model, processor = (
        compute_experts_in_float64(build_model(blueprint)),
        Processor(blueprint.tokenizer, blueprint.images),
    )
    with Float64():
        packed = compute_losses(model, processor, RECORDS)
        packed.sum().backward()
        together = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        alone = torch.cat([compute_losses(model, processor, [record]) for record in RECORDS])
        alone.sum().backward()
    torch.testing.assert_close(packed, alone, atol=1e-10, rtol=1e-9)
    assert {get_part(name) for name in together} == set(ModelPart)
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-9, rtol=1e-7, msg=name)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in ("gemma3", "solar_open") else pytest.mark.slow) for name in ALL]
)
def test_adapters_and_token_rows_of_each_family_are_exported_into_plain_transformers(
    family, folders, small_parts, tmp_path
):
    blueprint = blueprint_of((small_parts[0], folders(family)))
    stage = SFTStage(blueprint, parts={"language_model": {"lora": {"rank": 2}}})
    stage.configure_model()
    layers = [name for name in find_lora_layers(stage.model) if name.startswith("model.language_model.layers.")]
    assert {name.split(".")[3] for name in layers} == {"0", "1"}
    with torch.no_grad():
        for name, parameter in stage.model.named_parameters():
            if "lora_B" in name or name.startswith("new_tokens"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    export_model(stage.model.eval(), blueprint.tokenizer, blueprint.images, tmp_path / "hf")
    plain = compute_experts_in_float64(AutoModelForImageTextToText.from_pretrained(tmp_path / "hf"))
    assert type(plain).__module__.startswith("transformers.models.")
    model = compute_experts_in_float64(stage.model)
    batch = collate(Processor(blueprint.tokenizer, blueprint.images), [RECORDS[2]])
    batch.input_ids[5:7] = torch.tensor(blueprint.tokenizer.convert_tokens_to_ids(["<bbox>", "</bbox>"]))
    with Float64():
        (log_probs,) = model(batch=batch)
        log_probs.sum().backward()
        theirs, ours = plain(input_ids=batch.input_ids[None]).logits[0], model.lm_head(model.model(batch=batch))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)  # the merge is in float32
    assert all(float(p.grad.abs().sum()) > 0 for n, p in model.named_parameters() if "lora_A" in n and "layers" in n)
    again = build_model(load_model_spec(ModelConfig(), init_from=str(tmp_path / "hf")))
    for name, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name].double(), value), name


@pytest.mark.parametrize("family", PRUNED)
def test_the_pruned_last_layer_equals_the_whole_layer_of_each_family(family, folders, small_parts, monkeypatch):
    blueprint = blueprint_of((small_parts[0], folders(family)))
    model, processor = build_model(blueprint), Processor(blueprint.tokenizer, blueprint.images)
    assert model.model.prunes_last_layer
    found = []
    for pruned in (True, False):
        monkeypatch.setattr(type(model.model), "prunes_last_layer", pruned)
        model.zero_grad()
        log_probs = compute_losses(model, processor, RECORDS[:2])
        log_probs.sum().backward()
        found.append((log_probs.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (rows, gradients), (whole, others) = found
    torch.testing.assert_close(rows, whole, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# Refused

LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [4.0] * 48}
REFUSED = {
    "phi": ("PhiConfig", {}),
    "gemma2": ("Gemma2Config", {"final_logit_softcapping": 30.0, "head_dim": 8}),
    "axk2": ("AXK2Config", {**ROUTED, **LATENT}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "head_dim": 8}),
    "granite_swa": ("GraniteSWAConfig", {}),
    "llama4_text": ("Llama4TextConfig", {"head_dim": 8, "num_local_experts": 2}),
}
REFUSED_BY_CONFIG = {
    "longrope": ("Phi3Config", {"rope_parameters": LONG_ROPE}, "rope_type longrope.*longest sample of a row"),
    "linear": (
        "Qwen3NextConfig",
        {"layer_types": ["linear_attention", "full_attention"]},
        "layers of type linear_attention do not separate the samples",
    ),
    "bidirectional": ("Gemma3TextConfig", {"use_bidirectional_attention": True}, "not causal"),
    "logit scale": ("LlamaConfig", {"logits_scaling": 3.0}, "scales its logits by 3.0"),
}
REASONS = {
    "phi": "head has a bias",
    "gemma2": "final_logit_softcapping=30",
    "axk2": "an indexer selects keys",
    "gpt_oss": "attention sink",
    "granite_swa": "attention sink",
    "llama4_text": "chunked",
}


def write_config(folder: Path, config_class: str, settings: dict) -> str:
    getattr(transformers, config_class)(num_hidden_layers=2, **settings).save_pretrained(folder)
    if "logits_scaling" in settings:  # a field that the class does not know
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return str(folder)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_exact_is_refused_by_name_with_the_reason(family, small_parts, tmp_path):
    folder = write_config(tmp_path, *REFUSED[family])
    with pytest.raises(UserError, match=rf"model\.language_model=.* \({family}\).*{REASONS[family]}.*Choose Qwen2\.5"):
        blueprint_of((small_parts[0], folder))


@pytest.mark.parametrize("case", REFUSED_BY_CONFIG)
def test_a_config_whose_samples_would_not_stay_apart_in_a_row_is_refused_with_the_reason(case, small_parts, tmp_path):
    config_class, settings, reason = REFUSED_BY_CONFIG[case]
    with pytest.raises(UserError, match=reason):
        blueprint_of((small_parts[0], write_config(tmp_path, config_class, settings)))


def test_a_whole_model_whose_samples_would_not_stay_apart_in_a_row_is_refused_too(small_parts, tmp_path):
    spec = blueprint_of(small_parts)
    export_model(build_model(spec), spec.tokenizer, spec.images, tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    config = json.loads(path.read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"init_from=.*\(qwen2\) cannot be trained exactly.*rope_type dynamic"):
        load_model_spec(ModelConfig(), init_from=str(tmp_path / "hf"))


def remove_row(family: str, monkeypatch) -> None:
    rows = {name: row for name, row in families.FAMILIES.items() if name != family}
    monkeypatch.setattr(families, "FAMILIES", rows)


def test_a_head_with_a_bias_is_refused_whole_or_in_shards(small_parts, tmp_path, monkeypatch):
    remove_row("phi", monkeypatch)
    folder = make_family_folder(tmp_path, "phi")
    for context in (defer_weights, torch.no_grad):
        with context(), pytest.raises(UserError, match="head with a bias"):
            build_model(blueprint_of((small_parts[0], folder)))


def test_a_family_without_a_row_is_compared_with_its_own_class_before_it_trains(small_parts, tmp_path, monkeypatch):
    olmo = make_language_folder(tmp_path / "olmo", transformers.Olmo2Config)
    spec = blueprint_of((small_parts[0], olmo))
    build_model(spec)
    assert len(spec.remarks) == 1 and "type olmo2 are not among the tested ones" in spec.remarks[0]
    remove_row("granite_swa", monkeypatch)
    sinks = make_family_folder(tmp_path / "sinks", "granite_swa")
    with pytest.raises(UserError, match="attention sinks"):
        build_model(blueprint_of((small_parts[0], sinks)))


def test_a_difference_between_a_packed_row_and_the_familys_own_class_is_found(small_parts, tmp_path, monkeypatch):
    """As of a family that hides the samples of a row from each other in another way than by attention."""
    olmo = make_language_folder(tmp_path / "olmo", transformers.Olmo2Config)
    monkeypatch.setattr(packed_attention, "Segments", lambda lengths, device: families_segments([sum(lengths)], device))
    with pytest.raises(UserError, match=r"\(olmo2\) cannot be trained exactly: packed into one row, two texts have"):
        build_model(blueprint_of((small_parts[0], olmo)))


families_segments = packed_attention.Segments


# The table


def test_every_row_of_the_table_is_tested_and_every_tested_family_has_a_row():
    def get_type(entry) -> str:
        return getattr(transformers, entry[0]).model_type

    rows = {name: family.refusal is None for name, family in families.FAMILIES.items()}
    assert {name for name, is_exact in rows.items() if is_exact} == {get_type(entry) for entry in ALL.values()}
    assert {name for name, is_exact in rows.items() if not is_exact} == set(REFUSED) == set(REASONS)
    classes = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert {name: family.class_name for name, family in families.FAMILIES.items()} == {n: classes[n] for n in rows}


def test_the_table_in_the_document_is_the_one_of_the_families(repository, tmp_path):
    document = (repository / "docs/your-own-model.md").read_text(encoding="utf-8")
    assert families.format_table() in document
    copy = tmp_path / "page.md"
    copy.write_text(document.replace("SmolLM3ForCausalLM", "Old"), encoding="utf-8")
    families.write_table(copy)
    assert copy.read_text(encoding="utf-8") == document

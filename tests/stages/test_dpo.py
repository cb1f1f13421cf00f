"""DPO on real pairs against TRL's DPOTrainer, its collator, its forward pass and its reference model."""

import copy

import pytest
import torch
from datasets import Dataset
from float64 import restore_pixels
from support import picture
from test_forward import make_plain_processor
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from lit_vlm.data.collate import collate
from lit_vlm.data.processor import Processor
from lit_vlm.losses.loss_types import PREFERENCE_LOSSES
from lit_vlm.losses.preference import PreferenceLoss
from lit_vlm.stages import DPOStage
from lit_vlm.stages.preference_metrics import PreferenceMetrics
from lit_vlm.types import ImagePlaceholder, Language, Message, PreferencePair, Role, SampleKind, UserError


def make_pair(question: str, chosen: str, rejected: str, *sizes, seed: int = 0) -> PreferencePair:
    images = tuple(picture(*size, seed=seed + i) for i, size in enumerate(sizes))
    prompt = (Message(Role.user, (*(ImagePlaceholder(i) for i in range(len(images))), question)),)
    answers = Message(Role.assistant, (chosen,)), Message(Role.assistant, (rejected,))
    return PreferencePair(f"p{seed}", "test", f"test:{seed}", SampleKind.other, Language.ko, prompt, *answers, images)


BATCHES = {
    "text": [make_pair("안녕?", "네, 안녕하세요.", "아니요"), make_pair("Hi", "Hello there", "no")],
    "one tile": [
        make_pair("뭐?", "빨간 원입니다", "파란 별", (56, 56), seed=1),
        make_pair("What?", "a star", "a circle, maybe", (56, 56), seed=2),
    ],
    "anyres": [
        make_pair("뭐?", "빨간 원", "파란 별입니다", (150, 60), seed=3),
        make_pair("What?", "a star", "a circle", (120, 170), seed=4),
    ],
    "multi-image": [
        make_pair("어느?", "첫 번째", "두 번째", (60, 60), (30, 90), seed=5),
        make_pair("Same?", "yes they are", "no", (56, 56), (80, 40), seed=7),
    ],
}


def make_trl_row(record: PreferencePair) -> dict:
    content = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in record.prompt[0].content
    ]
    return {
        "images": [image.load() for image in record.images],
        "prompt": [{"role": "user", "content": content}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": record.chosen.text}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": record.rejected.text}]}],
    }


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    """Return a function that makes a DPOTrainer; each comparison sets its losses."""
    folder = tmp_path_factory.mktemp("trl")

    def make(policy, reference, processor, **options):
        arguments = DPOConfig(
            output_dir=str(folder),
            report_to="none",
            use_cpu=True,
            bf16=False,
            max_length=None,
            gradient_checkpointing=False,
            **options,
        )
        plain = make_plain_processor(processor)
        dataset = Dataset.from_list([make_trl_row(record) for record in BATCHES["one tile"]])
        return DPOTrainer(
            policy, reference, arguments, train_dataset=dataset, processing_class=plain
        ), DataCollatorForVisionPreference(plain)

    return make


@pytest.fixture
def policy_and_reference(in_float64):
    """In float64, because sppo_hard squares a difference of sums and amplifies their rounding errors twenty times."""
    return perturb(in_float64)


def perturb(model):
    """Return the model with a perturbed language model, and a copy of the original."""
    reference = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model, reference


def make_stage(policy, reference, **options) -> DPOStage:
    stage = DPOStage(policy, **options)
    stage.configure_model()
    stage.reference.load_state_dict(reference.state_dict(), strict=False)  # its vision tower is the policy's
    return stage


def make_batch(processor, records):
    chosen = sum(processor.encode_sequences(record)[0].num_supervised for record in records)
    return collate(processor, records, step_pairs=len(records), step_chosen_tokens=chosen)


def compute_preference(stage, batch, training=True):
    return stage._compute_preference(batch, PreferenceMetrics(), training)


def make_trl_inputs(shape, processor, collator):
    """Return the inputs of TRL's model for a batch. Its vision collator needs a picture, so text-only pairs are padded here."""
    records = BATCHES[shape]
    if shape == "text":
        sequences = [processor.encode_sequences(record)[answer] for answer in (0, 1) for record in records]
        longest = max(sequence.num_tokens for sequence in sequences)
        inputs = {
            name: torch.zeros(4, longest, dtype=torch.long)
            for name in ("input_ids", "attention_mask", "completion_mask")
        }
        for row, sequence in enumerate(sequences):
            inputs["input_ids"][row, : sequence.num_tokens] = torch.from_numpy(sequence.input_ids)
            inputs["attention_mask"][row, : sequence.num_tokens] = 1
            inputs["completion_mask"][row, : sequence.num_tokens] = torch.from_numpy(sequence.supervised)
        return inputs
    inputs = collator([make_trl_row(record) for record in records])
    inputs["pixel_values"] = restore_pixels(inputs["pixel_values"])
    # the template's newline after <|im_end|> is not part of the answer: the model stops before it
    inputs["completion_mask"][torch.arange(4), inputs["attention_mask"].sum(1) - 1] = 0
    return inputs


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("shape", list(BATCHES))
def test_dpo_loss_gradients_and_metrics_equal_those_of_trl(
    shape, share_prompts, policy_and_reference, processor, trl_trainer
):
    """The contract with the pinned TRL: a real DPOTrainer.compute_loss, for each of its losses."""
    policy, reference = policy_and_reference
    ours_policy = copy.deepcopy(policy)
    policy.requires_grad_(False)
    policy.model.language_model.requires_grad_(True)
    policy.lm_head.requires_grad_(True)
    trainer, collator = trl_trainer(policy, reference, processor)
    inputs = make_trl_inputs(shape, processor, collator)
    processor = Processor(processor.tokenizer, processor.images, share_prompts=share_prompts)
    batch = make_batch(processor, BATCHES[shape])
    assert (batch.prefix_segments[-1] >= 0) == share_prompts
    stage = make_stage(ours_policy, reference)
    for name in PREFERENCE_LOSSES if share_prompts else ["sigmoid", "ipo", "sft"]:
        smoothing = 0.1 if name in ("exo_pair", "robust", "aot") else 0.0
        trainer.loss_types, trainer.loss_weights, trainer.label_smoothing = [name], [1.0], smoothing
        trainer._metrics["train"].clear()
        policy.train()
        policy.zero_grad()
        theirs = trainer.compute_loss(policy, dict(inputs))
        theirs.backward()
        stage.loss = PreferenceLoss(loss_type=[name], label_smoothing=smoothing)
        stage.model.zero_grad()
        loss, found = compute_preference(stage, batch)
        loss.backward()
        size = max(1.0, float(theirs.detach()))  # sppo_hard's loss is 50 at beta 0.1
        assert float(loss.detach()) == pytest.approx(float(theirs.detach()), abs=1e-6, rel=1e-6), name
        for (key, a), (_, b) in zip(stage.model.named_parameters(), policy.named_parameters(), strict=True):
            if b.grad is not None:
                scale = max(size, float(b.grad.abs().max()))
                location = f"{name} {key}: "
                torch.testing.assert_close(a.grad, b.grad, atol=1e-5 * scale, rtol=1e-4, msg=location.__add__)
        recorded = trainer._metrics["train"]
        assert recorded.keys() - {"num_tokens"} == found.metrics.keys()
        for metric, value in found.metrics.items():
            assert value == pytest.approx(recorded[metric][0], rel=1e-4, abs=1e-5), (name, metric)
        chosen, rejected = found.rewards.chunk(2)
        assert float(chosen.mean()) == pytest.approx(found.metrics["rewards/chosen"], abs=1e-6)
        assert float(rejected.mean()) == pytest.approx(found.metrics["rewards/rejected"], abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},  # MPO
        {"loss_type": ["sigmoid"], "f_divergence_type": "forward_kl"},
        {"loss_type": ["hinge"], "f_divergence_type": "js_divergence"},
        {"loss_type": ["sigmoid"], "ld_alpha": 0.5},
        {"loss_type": ["sigmoid", "apo_zero"], "use_weighting": True},
        {"loss_type": ["discopop"], "discopop_tau": 0.1, "beta": 0.5},
    ],
)
def test_losses_with_mixtures_and_options_equal_those_of_trl(options, policy_and_reference, processor, trl_trainer):
    ours, theirs, _ = compute_both_losses(options, *policy_and_reference, processor, trl_trainer)
    assert ours == pytest.approx(theirs, abs=1e-6, rel=1e-6)


def test_a_loss_with_alpha_divergence_equals_that_of_trl(model, processor, trl_trainer):
    """In float32, because TRL's formula does not support float64. The square (margin - 1 / (2 beta))^2 has twice its root times
    the error of a margin, and a margin consists of four sums of log-probabilities."""
    options = {"loss_type": ["ipo"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.4}
    ours, theirs, likelihood = compute_both_losses(options, *perturb(model), processor, trl_trainer)
    error = 4 * torch.finfo(torch.float32).eps * likelihood
    assert ours == pytest.approx(theirs, abs=2 * theirs**0.5 * error, rel=0)


def compute_both_losses(options, policy, reference, processor, trl_trainer):
    """Return our loss, TRL's loss, and the largest absolute sum of an answer's log-probabilities."""
    stage = make_stage(copy.deepcopy(policy), reference, **options)  # TRL replaces a model's forward
    trainer, collator = trl_trainer(policy, reference, processor, **options)
    policy.train()
    theirs = trainer.compute_loss(policy, make_trl_inputs("anyres", processor, collator))
    batch = make_batch(processor, BATCHES["anyres"])
    loss, found = compute_preference(stage, batch)
    likelihood = max(-found.metrics["logps/chosen"], -found.metrics["logps/rejected"])
    return float(loss.detach()), float(theirs.detach()), likelihood


def test_a_changed_trl_is_reported(monkeypatch, policy_and_reference, processor):
    def use_new_attribute(self, model, inputs, return_outputs):
        return self.a_new_attribute

    monkeypatch.setattr(DPOTrainer, "_compute_loss", use_new_attribute)
    stage = make_stage(*policy_and_reference)
    with pytest.raises(UserError, match=r"trl \d+\.\d+\.\d+ computes .*a_new_attribute.*trl==1\.16"):
        compute_preference(stage, make_batch(processor, BATCHES["text"]))


def test_dpo_on_text_only_pairs_equals_the_formula(policy_and_reference, processor):
    policy, reference = policy_and_reference
    stage = make_stage(policy, reference, beta=0.3)
    metrics = PreferenceMetrics()
    ours, _ = stage._compute_preference(make_batch(processor, BATCHES["text"]), metrics, True)
    logps = []
    for model in (policy, reference):
        per_answer = []
        for answer in (0, 1):
            for record in BATCHES["text"]:
                ids = processor.encode_sequences(record)[answer]
                tokens = torch.from_numpy(ids.input_ids).long()
                log_probs = model(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1)
                chosen = torch.from_numpy(ids.supervised[1:]).nonzero().squeeze(1)
                per_answer.append(sum(log_probs[i, tokens[i + 1]] for i in chosen.tolist()))
        logps.append(per_answer)
    margins = [(logps[0][i] - logps[1][i]) - (logps[0][i + 2] - logps[1][i + 2]) for i in range(2)]
    expected = sum(-torch.nn.functional.logsigmoid(0.3 * margin) for margin in margins) / 2
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    means = metrics.compute(lambda numbers: numbers, torch.device("cpu"))
    for name, sums in zip(("ranking_accuracy", "reference_ranking_accuracy"), logps, strict=True):
        assert means[name] == sum(float(sums[i] > sums[i + 2]) for i in range(2)) / 2


@pytest.mark.parametrize("options", [{}, {"parts": {"language_model": {"lora": {"rank": 2}}}}])
def test_an_image_is_encoded_once_for_both_answers_and_the_reference(model, processor, options):
    stage = DPOStage(model, **options)
    stage.configure_model()
    assert stage.reference is None or stage.reference.model.vision_tower is None
    seen = []
    stage.model.model.vision_tower.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    batch = make_batch(processor, BATCHES["anyres"])
    compute_preference(stage, batch)
    assert seen == [batch.num_tiles]
    assert batch.image_index == [0, 1]  # each is once in the row: the prompt is shared


def test_a_trainable_tower_is_not_shared_with_the_reference(model, processor):
    stage = DPOStage(model, trainable=["vision_tower", "language_model"])
    stage.configure_model()
    seen = []
    for each in (stage.model, stage.reference):
        each.model.vision_tower.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    batch = make_batch(processor, BATCHES["one tile"])
    compute_preference(stage, batch)[0].backward()
    assert seen == [batch.num_tiles] * 2
    assert stage.reference.model.vision_tower is not stage.model.model.vision_tower

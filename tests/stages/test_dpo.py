"""DPO on real pairs against TRL's own DPOTrainer, its collator, its forward pass and its reference."""

import copy

import pytest
import torch
from datasets import Dataset
from support import picture
from test_forward import plain_processor
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from lit_vlm.data.collate import collate
from lit_vlm.losses.preference import LOSSES
from lit_vlm.stages import DPOStage
from lit_vlm.types import ImageSlot, Kind, Language, Message, PreferencePair, Role

METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
MORE = ("logits/chosen", "logits/rejected", "mean_token_accuracy", "entropy")


def pair(question: str, chosen: str, rejected: str, *sizes, seed: int = 0) -> PreferencePair:
    images = tuple(picture(*size, seed=seed + i) for i, size in enumerate(sizes))
    prompt = (Message(Role.user, (*(ImageSlot(i) for i in range(len(images))), question)),)
    answers = Message(Role.assistant, (chosen,)), Message(Role.assistant, (rejected,))
    return PreferencePair(f"p{seed}", "test", f"test:{seed}", Kind.other, Language.ko, prompt, *answers, images)


BATCHES = {
    "text": [pair("안녕?", "네, 안녕하세요.", "아니요"), pair("Hi", "Hello there", "no")],
    "one tile": [
        pair("뭐?", "빨간 원입니다", "파란 별", (56, 56), seed=1),
        pair("What?", "a star", "a circle, maybe", (56, 56), seed=2),
    ],
    "anyres": [
        pair("뭐?", "빨간 원", "파란 별입니다", (150, 60), seed=3),
        pair("What?", "a star", "a circle", (120, 170), seed=4),
    ],
    "multi-image": [
        pair("어느?", "첫 번째", "두 번째", (60, 60), (30, 90), seed=5),
        pair("Same?", "yes they are", "no", (56, 56), (80, 40), seed=7),
    ],
}


def row_of(record: PreferencePair) -> dict:
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
    """One DPOTrainer for all comparisons; its losses are set anew for each."""
    folder = tmp_path_factory.mktemp("trl")

    def make(policy, reference, processor):
        arguments = DPOConfig(
            output_dir=str(folder),
            report_to="none",
            use_cpu=True,
            bf16=False,
            max_length=None,
            gradient_checkpointing=False,
        )
        plain = plain_processor(processor)
        dataset = Dataset.from_list([row_of(record) for record in BATCHES["one tile"]])
        return DPOTrainer(
            policy, reference, arguments, train_dataset=dataset, processing_class=plain
        ), DataCollatorForVisionPreference(plain)

    return make


@pytest.fixture
def policy_and_reference(model):
    reference = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model, reference


def stage_of(policy, reference, **options) -> DPOStage:
    stage = DPOStage(policy, **options)
    stage.configure_model()
    stage.reference.load_state_dict(reference.state_dict())
    return stage


def test_dpo_loss_gradients_and_metrics_equal_trls(policy_and_reference, processor, trl_trainer):
    policy, reference = policy_and_reference
    ours_policy = copy.deepcopy(policy)
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
    policy.model.language_model.requires_grad_(True)
    policy.lm_head.requires_grad_(True)
    trainer, collator = trl_trainer(policy, reference, processor)
    compared = 0
    for shape, records in BATCHES.items():
        rows = [row_of(record) for record in records]
        if shape == "text":
            continue  # TRL's vision collator wants a picture; the next test covers text
        inputs = collator([dict(row) for row in rows])
        # the template's newline behind <|im_end|> is no word of the answer: the model stops before it
        inputs["completion_mask"][torch.arange(4), inputs["attention_mask"].sum(1) - 1] = 0
        batch = collate(processor, records, step_pairs=2, step_chosen_tokens=0)
        for name in LOSSES:
            smoothing = 0.1 if name in ("exo_pair", "robust") else 0.0
            trainer.loss_types, trainer.loss_weights, trainer.label_smoothing = [name], [1.0], smoothing
            trainer._metrics["train"].clear()
            policy.train()
            policy.zero_grad()
            theirs = trainer.compute_loss(policy, dict(inputs))
            theirs.backward()
            stage = stage_of(ours_policy, reference, loss_type=[name], label_smoothing=smoothing)
            stage.model.zero_grad()
            _, lengths = stage._scores(stage.model, batch)
            batch.step_chosen_tokens = sum(lengths[:2])
            ours, metrics = stage._preference(batch, training=True)
            ours.backward()
            assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=3e-6, abs=1e-6), (
                shape,
                name,
            )  # 1e-6, and float32 beyond 1
            for (key, a), (_, b) in zip(stage.model.named_parameters(), policy.named_parameters(), strict=True):
                if b.grad is not None:
                    scale = max(
                        1.0, float(b.grad.abs().max()), float(theirs.detach())
                    )  # sppo_hard's loss is 50 at beta 0.1
                    where = f"{shape} {name} {key}: "
                    torch.testing.assert_close(a.grad, b.grad, atol=1e-5 * scale, rtol=1e-4, msg=where.__add__)
            for metric in METRICS + MORE:
                assert metrics[metric] == pytest.approx(trainer._metrics["train"][metric][0], rel=1e-4, abs=1e-5), (
                    shape,
                    name,
                    metric,
                )
            compared += 1
    assert compared == 3 * len(LOSSES)


def test_dpo_on_text_only_pairs_equals_the_formula(policy_and_reference, processor):
    policy, reference = policy_and_reference
    stage = stage_of(policy, reference, beta=0.3)
    batch = collate(processor, BATCHES["text"], step_pairs=2)
    ours, _ = stage._preference(batch, training=True)
    logps = []
    for model in (stage.model, stage.reference):
        per_answer = []
        for answer in ("chosen", "rejected"):
            for record in BATCHES["text"]:
                ids = processor.sequences(record)[0 if answer == "chosen" else 1]
                tokens = torch.from_numpy(ids.input_ids).long()
                log_probs = model(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1)
                chosen = torch.from_numpy(ids.supervised[1:]).nonzero().squeeze(1)
                per_answer.append(sum(log_probs[i, tokens[i + 1]] for i in chosen.tolist()))
        logps.append(per_answer)
    margins = [(logps[0][i] - logps[1][i]) - (logps[0][i + 2] - logps[1][i + 2]) for i in range(2)]
    expected = sum(-torch.nn.functional.logsigmoid(0.3 * margin) for margin in margins) / 2
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)


def test_an_image_is_encoded_once_for_both_answers(policy_and_reference, processor):
    policy, reference = policy_and_reference
    stage = stage_of(policy, reference)
    seen = []
    hook = stage.model.model.vision_tower.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    batch = collate(processor, BATCHES["anyres"], step_pairs=2)
    stage._preference(batch, training=True)
    hook.remove()
    assert seen == [batch.num_tiles]
    assert batch.image_index == [0, 1, 0, 1]

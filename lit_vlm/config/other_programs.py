"""Names of LLaVA, LLaMA-Factory, ms-swift, TRL, axolotl, Lightning and transformers, and what to write here instead."""

from __future__ import annotations

import re

# Name in another program -> setting here with the same values.
KEY_ALIASES = {
    "lr": "stage.learning_rate",
    "batch_size": "data.global_batch_size",
    "bs": "data.global_batch_size",
    "train_batch_size": "data.global_batch_size",
    "micro_batch_size": "data.tokens_per_micro_batch",
    "epochs": "trainer.max_epochs",
    "num_train_epochs": "trainer.max_epochs",
    "num_epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "gpus": "trainer.devices",
    "num_gpus": "trainer.devices",
    "nnodes": "trainer.num_nodes",
    "wandb": "logger.wandb",
    "wandb_project": "logger.project",
    "wandb_entity": "logger.entity",
    "output_dir": "run_dir",
    "save_dir": "run_dir",
    "overwrite_output_dir": "overwrite",
    "name": "run_name",
    "exp_name": "run_name",
    "ckpt_path": "init_from",
    "checkpoint": "init_from",
    "cutoff_len": "data.max_length",
    "model_max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "seq_len": "data.max_length",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "eval_steps": "data.validation.every_steps",
    "logging_steps": "trainer.log_every_n_steps",
    "val_size": "data.validation.fraction",
    "val_split": "data.validation.fraction",
    "split_dataset_ratio": "data.validation.fraction",
    "warmup_ratio": "stage.warmup",
    "warmup_steps": "stage.warmup",
    "lr_scheduler_type": "stage.schedule",
    "lr_scheduler": "stage.schedule",
    "max_grad_norm": "trainer.gradient_clip_val",
    "dataloader_num_workers": "data.num_workers",
    "preprocessing_num_workers": "data.index_workers",
    "image_folder": "data.sources.mine.image_root",
    "image_dir": "data.sources.mine.image_root",
    "media_dir": "data.sources.mine.image_root",
    "max_samples": "data.sources.mine.num_samples",
    "mm_projector_type": "model.projector",
    "mm_projector_lr": "stage.parts.projector.learning_rate",
    "aligner_lr": "stage.parts.projector.learning_rate",
    "vision_tower_lr": "stage.parts.vision_tower.learning_rate",
    "mm_vision_tower_lr": "stage.parts.vision_tower.learning_rate",
    "vit_lr": "stage.parts.vision_tower.learning_rate",
    "mm_vision_select_layer": "model.vision_feature_layer",
    "pref_beta": "stage.beta",
    "image_aspect_ratio": "data.tiling",
    "lora_r": "stage.parts.language_model.lora.rank",
    "lora_rank": "stage.parts.language_model.lora.rank",
    "lora_alpha": "stage.parts.language_model.lora.alpha",
    "lora_dropout": "stage.parts.language_model.lora.dropout",
    "lora_target": "stage.parts.language_model.lora.targets",
    "lora_target_modules": "stage.parts.language_model.lora.targets",
    "target_modules": "stage.parts.language_model.lora.targets",
}

_ACCUMULATION = (
    "Write data.global_batch_size=<samples of one optimizer step, over all devices>; the micro-batches follow from it"
)
_DATA = "Write data=auto data.sources.mine.path={value}"
_LORA = "Write stage.parts.language_model.lora.rank=64 to train the language model with LoRA"
_MODEL = (
    "Write init_from={value} for a whole model of LLaVA's classes, or model.language_model={value} for a language model"
)
_PRECISION = "Write trainer.precision=bf16-mixed (or 16-mixed, bf16-true, 32-true)"
_RESUME = (
    "An unfinished run resumes by itself when its command is given again; resume_from=<checkpoint folder> names another"
)
_TRAINABLE = "Write the parts that train, e.g. stage.trainable=[projector,language_model]; all others are frozen"
_VISIBLE_DEVICES = "Write trainer.devices=<number>, and choose them with CUDA_VISIBLE_DEVICES=0,1 before the command"
_LAUNCH = "Start it with torchrun: torchrun --nproc-per-node={value} run.py ..."

# Name in another program -> sentence with what to write here; {value} is the value that was given.
KEY_REMEDIES = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_batch_size"), _ACCUMULATION),
    **dict.fromkeys(("gradient_accumulation_steps", "accumulate_grad_batches", "grad_accum_steps"), _ACCUMULATION),
    "per_device_eval_batch_size": "Validation uses the micro-batches of training: data.tokens_per_micro_batch",
    **dict.fromkeys(("dataset", "datasets", "data_path", "dataset_path", "train_file", "train_data", "json_file"), _DATA),
    **dict.fromkeys(("data_files", "train_dataset", "custom_train_dataset_path"), _DATA),
    "dataset_name": "Write data=auto data.sources.mine.hub={value}",
    **dict.fromkeys(("use_lora", "lora_enable", "use_peft", "finetuning_type", "train_type", "tuner_type", "peft"), _LORA),
    **dict.fromkeys(("model_name_or_path", "model_path", "model_id", "base_model", "model_name", "model_type"), _MODEL),
    "pretrained_model_name_or_path": _MODEL,
    **dict.fromkeys(("bf16", "fp16", "pure_bf16", "torch_dtype", "dtype", "mixed_precision", "tf32"), _PRECISION),
    **dict.fromkeys(("resume_from_checkpoint", "resume"), _RESUME),
    **dict.fromkeys(("freeze_vision_tower", "freeze_vit", "freeze_aligner", "freeze_llm", "freeze_backbone"), _TRAINABLE),
    **dict.fromkeys(("freeze_multi_modal_projector", "freeze_language_model", "tune_mm_mlp_adapter"), _TRAINABLE),
    **dict.fromkeys(("mm_tunable_parts", "unfreeze_mm_vision_tower", "freeze_mm_mlp_adapter"), _TRAINABLE),
    **dict.fromkeys(("device", "gpu_ids", "cuda"), _VISIBLE_DEVICES),
    **dict.fromkeys(("nproc_per_node", "num_processes"), _LAUNCH),
    "local_rank": "torchrun sets it: torchrun --nproc-per-node=8 run.py ...",
    **dict.fromkeys(("gradient_checkpointing", "use_gradient_checkpointing"), "Write stage.activation_checkpointing=full"),
    "deepspeed": "Write trainer=deepspeed_zero2 or trainer=deepspeed_zero3; there is no file of DeepSpeed's to give",
    "fsdp": "Write trainer=fsdp2",
    **dict.fromkeys(("report_to", "use_wandb"), "Write logger=wandb, logger=tensorboard or logger=csv"),
    **dict.fromkeys(("template", "conv_version", "prompt_template"), (
        "The chat template is the language model's own; model.chat_template=chatml or a Jinja file sets another"
    )),
    "max_pixels": "Write model.max_tiles=<tiles of an image>",
    **dict.fromkeys(("optim", "optimizer"), "The optimizer is AdamW: stage.learning_rate, stage.weight_decay, stage.adam_betas"),
    **dict.fromkeys(("attn_implementation", "attn_impl", "flash_attn", "use_flash_attn"), (
        "Attention has no setting: packed samples use the fastest kernel of the machine"
    )),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_bit", "bits"), (
        "Quantised weights are not trained here; LoRA with trainer.precision=bf16-true needs the least memory"
    )),
    **dict.fromkeys(("do_train", "do_eval", "predict_with_generate"), "Write task=train; it also scores the held-out samples"),
    **dict.fromkeys(("packing", "group_by_length", "group_by_modality_length", "neat_packing"), (
        "Samples are always packed without padding; data.tokens_per_micro_batch is the size of a pack"
    )),
    **dict.fromkeys(("config", "config_file", "config_name"), (
        "A file of settings is an experiment: save it as mine/experiment/<name>.yaml, its first line '# @package _global_',"
        " and write --config-dir mine experiment=<name> (docs/config.md)"
    )),
}  # fmt: skip

# Setting -> sentence with what to write instead of a value of another program.
VALUE_REMEDIES = {
    "trainer.devices": "Write the number of devices; CUDA_VISIBLE_DEVICES=0,1 before the command chooses which",
}

# Choice of another program -> choice here, by group.
CHOICE_ALIASES = {
    "stage": {
        **dict.fromkeys(("pretrain", "pt", "alignment", "stage1"), "align"),
        **dict.fromkeys(("finetune", "fine_tune", "instruct", "full", "lora", "stage2"), "sft"),
        **dict.fromkeys(("rlhf", "kto", "ppo", "orpo", "simpo", "preference"), "dpo"),
    },
    "task": {
        **dict.fromkeys(("finetune", "sft", "dpo", "align", "fit", "pretrain", "pt"), "train"),
        **dict.fromkeys(("check", "validate", "dry_run", "dryrun"), "preflight"),
        **dict.fromkeys(("infer", "inference", "predict", "generate", "webchat", "webui"), "chat"),
        **dict.fromkeys(("slurm", "sbatch"), "submit"),
        "merge": "export",
        "sweeps": "sweep",
    },
    "trainer": {
        **dict.fromkeys(("deepspeed", "zero2"), "deepspeed_zero2"),
        "zero3": "deepspeed_zero3",
        "fsdp": "fsdp2",
        **dict.fromkeys(("cuda", "single"), "gpu"),
    },
    "logger": {**dict.fromkeys(("none", "null", "off", "false"), "csv"), "tb": "tensorboard"},
    "data": {"llava": "llava_json", "json": "llava_json", "jsonl": "llava_json", "dpo": "preference"},
}

_OTHER_VLM_CLASS = re.compile(
    r"qwen.*vl|internvl|minicpm.?v|paligemma|idefics|smolvlm|phi.*vision|gemma.?3|molmo|pixtral|llama.*vision|mllama|glm.*v|blip"
    r"|(video|vip).?llava|llava.*video",
    re.IGNORECASE,
)
_NAMED_FILE = re.compile(r"/|\.(jsonl?|csv|tsv|parquet|arrow|tar|zip|txt)$", re.IGNORECASE)


def format_key_remedy(key: str, value: str) -> str:
    """Format what to write instead of a key of another program that has no setting of the same values; empty if unknown."""
    remedy = KEY_REMEDIES.get(key.rpartition(".")[2].lower().replace("-", "_"), "")
    return remedy.format(value=value or "...")


def explain_model_choice(name: str) -> str:
    """Explain a value of `model=` that names a model itself, or one of a class that cannot be trained here; else empty."""
    if _OTHER_VLM_CLASS.search(name):
        return (
            f"model={name}: only models of the LLaVA family are trained here, and this is another class. Write"
            " init_from=<a model's folder or hub id of type llava, llava_next or llava_onevision>, or build one of a language model:"
            " model=varco_vision_2_0_1_7b model.language_model=<folder or hub id>."
        )
    if "/" in name:
        return (
            f"model={name}: model= takes a name of conf/model/, not a folder or hub id. Write init_from={name} for a whole"
            f" model of LLaVA's classes, or model.language_model={name} for its language model."
        )
    return ""


def explain_data_choice(name: str) -> str:
    """Explain a value of `data=` that names a file, a folder or a dataset of the hub; else empty."""
    if not _NAMED_FILE.search(name):
        return ""
    return f"data={name}: data= takes a name of conf/data/, not a file. Write data=auto data.sources.mine.path={name}."

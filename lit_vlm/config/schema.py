"""Config schema: type, default, unit and source of every setting. YAML files in conf/ are named choices and repeat no default.

One dataclass per config group. `slots=True` and `kw_only=True` make an unknown key an error when the config becomes an
object, also if it was added with `+key=`. The trailing comment of a field is its help text, and each number has its range
beside it (`lit_vlm/config/ranges.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from omegaconf import MISSING

from lit_vlm.anyres import ModelClass, Tiling
from lit_vlm.config.callbacks import list_default_callbacks
from lit_vlm.config.choices import (
    ActivationCheckpointing,
    ContainerRuntime,
    DebugMode,
    LearningRateSchedule,
    MarkerMeaning,
    Markup,
    OnBadRecord,
    OnNonfinite,
    OnOverlong,
    ProjectorName,
    StageName,
    StrategyName,
    Task,
    WeightUnit,
)
from lit_vlm.config.curation import CurateConfig
from lit_vlm.config.mapping import MappingConfig
from lit_vlm.config.ranges import (
    ABOVE_0,
    AT_LEAST_0,
    COUNT,
    COUNT_OR_ZERO,
    GRID,
    HEARTBEAT_SECONDS,
    LAYER,
    LEARNING_RATE,
    MINUTES,
    NODES,
    PROCESSES,
    PROCESSES_OR_ZERO,
    SEED,
    SHARE,
    SHARE_ABOVE_0,
    SHARE_BELOW_1,
    SHARE_BELOW_HALF,
    SIGNAL_SECONDS,
    ranged,
)
from lit_vlm.config.task_settings import (
    DemoConfig,
    EvaluateConfig,
    GenerateConfig,
    JudgeConfig,
    PreferConfig,
    PreflightConfig,
    RunsConfig,
    ServeConfig,
    TrialsConfig,
    ViewConfig,
)
from lit_vlm.types import Language, ModelPart


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Parts of the model: hub ids or local folders; `tiny` is generated on demand.

    If init_from names a whole model, the two parts, the class and the projector are not read.
    """

    vision_tower: str = MISSING  # SigLIP, SigLIP 2 or CLIP: hub id, local folder, or "tiny"
    language_model: str = MISSING  # Qwen2.5, Qwen3, Llama-like: hub id, local folder, or "tiny"
    model_class: ModelClass | None = None  # transformers' class that is trained and exported; null: llava_onevision
    projector: ProjectorName = ProjectorName["mlp2x_gelu"]
    projector_weights: str | None = None  # mm_projector.bin of LLaVA for a model of parts; null: random weights
    pad_to_square: bool | None = (
        None  # LLaVA 1.x: true pads a picture in the mean colour, false crops; null: as in init_from, else true
    )
    vision_feature_layer: int | None = ranged(
        None, LAYER
    )  # layer whose output goes to the projector; null: second to last; later layers are removed
    grid: int | None = ranged(
        None, GRID
    )  # maximum tiles per side; null: as in init_from, else 6 as in LLaVA-OneVision: (1x1),...,(6x6)
    max_tiles: int | None = ranged(
        None, COUNT
    )  # N of anyres_max_N; features of more tiles are downsampled; null: as in init_from, else 9
    special_tokens: list[str] = field(
        default_factory=lambda: "<gro> <ocr> <char> </char> <obj> </obj> <bbox> </bbox> <delim>".split()
    )  # tokens added to the vocabulary, one id each; default: the nine of VARCO-VISION
    new_tokens_from: str | None = None  # file with one text token per line to add; with num_new_tokens: to learn from
    num_new_tokens: int | None = ranged(
        None, COUNT
    )  # number of tokens to learn from the Korean words of that text, JSON or JSON lines file; null: it lists them
    chat_template: str | None = None  # path of a Jinja file, or "chatml"; null: of the language model
    template_date: str | None = None  # YYYY-MM-DD for templates that print today's date; null: when first prepared
    revision: str | None = None  # hub revision of the parts and of init_from
    adapter_base: str | None = None  # base model of a LoRA adapter at init_from: folder or hub id; null: as it says
    trust_remote_code: bool = False  # run code of a hub repository; the included recipes never need it


@dataclass(kw_only=True, slots=True)
class ColumnsConfig:
    """Names of a source's columns (keys of its records) whose names are not those of a known format."""

    id: str | None = None  # column of the record's own id
    image: str | None = None  # column of the image: a path, encoded bytes, {bytes, path}, or a list of these
    question: str | None = None  # column of the question
    answer: str | None = None  # column of the answer
    caption: str | None = None  # column of the caption, for images without a question
    system: str | None = None  # column of the system message
    chosen: str | None = None  # column of the chosen answer, for stage=dpo
    rejected: str | None = None  # column of the rejected answer, for stage=dpo
    rejected_image: str | None = None  # column of the image of the rejected answer, for stage=dpo
    messages: str | None = None  # column of a list of {role, content}
    conversations: str | None = None  # column of a list of {from, value}
    history: str | None = None  # column of earlier turns: a list of [question, answer]


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """A data set."""

    path: str | None = None  # file, folder or pattern ("{00000..00012}.tar"); for format=builtin the kind of sample
    image_root: Any = None  # folder, or list of folders, that must contain all images; null: the folder of `path`
    hub: str | None = None  # instead of path: id of a dataset on the Hugging Face hub, owner/name
    hub_config: str | None = None  # configuration of a hub dataset that has several
    split: str | None = None  # train, validation or test, from file names in a folder; null: train for a hub dataset
    revision: str | None = None  # commit, tag or branch of a hub dataset
    format: str = "auto"  # a format of docs/formats.md, or the import path of your own class: my_package.MySource
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    mapping: MappingConfig | None = None  # format=mapped: location of image, question and answer in a record
    prompts: list[str] = field(default_factory=list)  # questions for records without one; one is chosen by digest
    weight: float | None = ranged(
        None, AT_LEAST_0
    )  # sampling weight relative to the other sources, see data.weights_in; null for all: by size
    repeat: float | None = ranged(
        None, ABOVE_0
    )  # without weights: number of times that an epoch reads each record; null: once
    count: int | None = ranged(None, COUNT)  # without weights: number of records that an epoch reads, instead of repeat
    fraction: float | None = ranged(
        None, SHARE_ABOVE_0
    )  # use only this share of the records, chosen by digest; null: all
    selection: str | None = None  # use only the records of this file, which task=curate writes; null: all
    generated: str | None = (
        None  # read the turns of this file, which task=generate writes, with the pictures of the records; null: their own
    )
    max_tiles: int | None = ranged(
        None, COUNT_OR_ZERO
    )  # maximum tiles of an image besides its base view; 0: only the base view; null: the model's maximum
    enlarge_to_px: int | None = ranged(
        None, COUNT
    )  # enlarge images whose longer side is shorter, e.g. 2304 for OCR as VARCO-VISION-2.0's card; null: no
    language: Language = Language.auto  # auto: detected from the text, any Hangul makes it Korean
    kind: str | None = None  # kind of sample, a name of types.SampleKind; null: detected from the record
    markup: Markup = Markup.auto
    marks: MarkerMeaning = MarkerMeaning.place  # meaning of markers of other formats in its texts
    num_samples: int | None = ranged(None, COUNT)  # number of samples to use; for format=builtin, to generate
    hard: bool = False  # format=builtin: larger images and smaller text, for high resolution
    licence: str | None = None  # licence of a named set, shown by task=preflight
    homepage: str | None = None  # web page of a named set
    obtain: str | None = None  # download instructions of a named set, shown when its files are missing
    expected_records: int | None = ranged(
        None, COUNT
    )  # number of records in a named set; task=prepare and preflight report a difference


@dataclass(kw_only=True, slots=True)
class ValidationConfig:
    """Held-out data and the validation interval."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)  # held-out sources; empty: a fraction of each source
    fraction: float = ranged(0.01, SHARE_BELOW_1)  # held-out share of each source, by digest, at most 200 samples
    every_steps: int | None = ranged(None, COUNT)  # optimizer steps between validations; null: only at the end
    max_samples: int = ranged(
        200, COUNT_OR_ZERO
    )  # maximum samples whose generated answers are scored, per kind and language


@dataclass(kw_only=True, slots=True)
class ShareConfig:
    """Shares of all sampled samples, over all sources; null: the result of the sources' weights."""

    ko: float | None = ranged(None, SHARE)  # share of Korean samples; the rest is English
    text_only: float | None = ranged(None, SHARE)  # share of samples without an image
    kinds: dict[str, float] = ranged(dict, SHARE)  # share of each kind of sample (types.SampleKind), e.g. {ocr: 0.2}


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Data sources, mixture, and limits of a micro-batch."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    weights_in: WeightUnit = WeightUnit.samples
    temperature: float = ranged(
        1.0, ABOVE_0
    )  # without weights: sources are weighted by size^(1/temperature); 1: by size; large: equally
    share: ShareConfig = field(default_factory=ShareConfig)
    drop_contaminated: bool = False  # leave out the records that task=curate with curate.method=contamination found
    lock: str | None = None  # a mixture.lock; if the data differ from it, the run stops and reports the differences
    index_dir: str | None = None  # folder of indexes and plans; null: run_dir/index
    index_workers: int | None = ranged(None, PROCESSES)  # processes that build an index; null: one per CPU
    verify: bool = True  # task=prepare: decode every image once
    global_batch_size: int = ranged(128, COUNT)  # samples per optimizer step, over all devices
    global_batch_tokens: int | None = ranged(None, COUNT)  # instead: tokens per optimizer step, in whole samples
    max_length: int | None = ranged(
        None, COUNT
    )  # maximum tokens of a sample; null: the limit of the language model and of a micro-batch
    on_overlong: OnOverlong = OnOverlong.quarantine
    tokens_per_micro_batch: int = ranged(16384, COUNT)  # token limit of a micro-batch: memory of one forward pass
    tiles_per_micro_batch: int = ranged(64, COUNT)  # tile limit of a micro-batch: memory of one vision tower pass
    tiling: Tiling = Tiling.anyres  # base: the whole image once; anyres: the image and its tiles (not LLaVA 1.x)
    on_bad_record: OnBadRecord = OnBadRecord.stop
    max_quarantined: float = ranged(0.01, SHARE)  # maximum share of a source; above it the run stops
    max_image_pixels: int = ranged(64_000_000, COUNT)  # larger images are bad records (decompression bombs)
    scaled_decode: bool = False  # decode large JPEGs at 1/2, 1/4 or 1/8 if that is enough; pixels differ slightly
    num_workers: int = ranged(2, PROCESSES_OR_ZERO)  # loader processes per device
    prefetch_factor: int = ranged(4, PROCESSES)  # micro-batches that each loader process prefetches


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """LoRA adapter of a model part."""

    rank: int = ranged(0, COUNT_OR_ZERO)  # rank of the LoRA update; 0: no LoRA, the weights of the part train
    alpha: float = ranged(16.0, ABOVE_0)  # LoRA alpha: the update is scaled by alpha / rank
    dropout: float = ranged(0.0, SHARE_BELOW_1)  # dropout on the input of the LoRA update
    targets: list[str] = field(default_factory=list)  # LoRA targets: module names; empty: every linear layer


@dataclass(kw_only=True, slots=True)
class PartConfig:
    """Settings of one model part that differ from the stage; null: the stage's value."""

    learning_rate: float | None = ranged(None, LEARNING_RATE)  # peak learning rate of this part; null: the stage's
    weight_decay: float | None = ranged(None, AT_LEAST_0)  # weight decay of this part; null: the stage's
    warmup: float | None = ranged(None, AT_LEAST_0)  # warm-up of this part; null: the stage's
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(kw_only=True, slots=True)
class PartsConfig:
    """Settings of each model part."""

    vision_tower: PartConfig = field(default_factory=PartConfig)
    projector: PartConfig = field(default_factory=PartConfig)
    language_model: PartConfig = field(default_factory=PartConfig)


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """Settings of a training stage: trained parts, loss, optimizer and learning-rate schedule."""

    MODEL_FIELDS: ClassVar[tuple[str, ...]] = ()  # settings that name another model
    TRAINS_SPECIAL_TOKENS: ClassVar[bool] = True  # rows of the control tokens, under LoRA

    name: StageName = MISSING  # set by the group's files
    trainable: list[ModelPart] = MISSING  # parts that train; all other parts are frozen
    learning_rate: float = ranged(MISSING, LEARNING_RATE)  # peak learning rate of every part without its own
    weight_decay: float = ranged(0.0, AT_LEAST_0)  # weight decay of AdamW; LLaVA and LLaVA-OneVision use 0
    warmup: float = ranged(0.03, AT_LEAST_0)  # below 1 a share of the steps, else a number of steps; LLaVA uses 0.03
    schedule: LearningRateSchedule = LearningRateSchedule.cosine  # decay after the warm-up, down to min_learning_rate
    min_learning_rate: float = ranged(0.0, SHARE)  # minimum learning rate, as a share of the peak
    adam_betas: tuple[float, float] = ranged((0.9, 0.999), SHARE_BELOW_1)  # betas of AdamW; PyTorch's default
    adam_eps: float = ranged(1e-8, ABOVE_0)  # epsilon of AdamW; PyTorch's default
    activation_checkpointing: ActivationCheckpointing = (
        ActivationCheckpointing.auto
    )  # activations to recompute in the backward pass, to save memory
    cache_features: bool = False  # compute a frozen tower's features once before training, in data.index_dir; large
    parts: PartsConfig = field(default_factory=PartsConfig)

    @property
    def preference_losses(self) -> list[str]:
        """Names of the preference losses; empty for a stage with next-token loss."""
        return []

    @property
    def model_folders(self) -> list[str]:
        """Folders or hub ids of models that the stage reads besides the one that it trains."""
        return [folder for name in self.MODEL_FIELDS if (folder := getattr(self, name))]

    @property
    def has_reference_model(self) -> bool:
        """True if a reference model runs in each step."""
        return False

    @property
    def checkpointing_level(self) -> ActivationCheckpointing:
        """Level of activation checkpointing; `auto` is none until it is resolved."""
        level = self.activation_checkpointing
        return ActivationCheckpointing.none if level is ActivationCheckpointing.auto else level

    def get_part_setting(self, part: ModelPart, name: str) -> Any:
        """Get a setting of the optimizer for a part: the part's own value, or the stage's."""
        own = getattr(getattr(self.parts, part.value), name)
        return getattr(self, name) if own is None else own

    def get_lora(self, part: ModelPart) -> LoraConfig | None:
        """Get the LoRA settings of a part; None without LoRA."""
        lora: LoraConfig = getattr(self.parts, part.value).lora
        return lora if lora.rank > 0 else None

    def make_export_config(self) -> StageConfig:
        """Make the settings of a stage that only builds the trained model: without caches and other models."""
        return replace(self, cache_features=False)


@dataclass(kw_only=True, slots=True)
class DPOStageConfig(StageConfig):
    """Settings of preference optimisation; names and losses are those of TRL."""

    MODEL_FIELDS: ClassVar[tuple[str, ...]] = ("reference",)
    TRAINS_SPECIAL_TOKENS: ClassVar[bool] = False  # the reference is the model without adapters; rows are no adapters

    beta: float = ranged(0.1, ABOVE_0)  # beta of DPO; from LLaVA-NeXT's dpo_ov7b.sh, VARCO's is not published
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])  # losses; several are summed with loss_weights
    loss_weights: list[float] | None = ranged(None, AT_LEAST_0)  # weight of each loss type; null: 1 each
    label_smoothing: float = ranged(0.0, SHARE_BELOW_HALF)  # assumed share of pairs with swapped labels
    f_divergence_type: str = "reverse_kl"  # reverse_kl, forward_kl, js_divergence or alpha_divergence
    f_alpha_divergence_coef: float = ranged(0.5, ABOVE_0)  # coefficient of f_divergence_type=alpha_divergence
    discopop_tau: float = ranged(0.05, ABOVE_0)  # temperature of loss_type=discopop
    ld_alpha: float | None = ranged(
        None, SHARE
    )  # weight of tokens beyond the length of the shorter answer (LD-DPO); null: 1
    use_weighting: bool = False  # weight the pairs as in WPO
    reference: str | None = None  # folder of the reference model; null: init_from
    cache_reference: bool = (
        False  # compute the reference log-probabilities once before training, in data.index_dir for other runs
    )

    @property
    def preference_losses(self) -> list[str]:
        return self.loss_type

    @property
    def has_reference_model(self) -> bool:
        return not self.cache_reference

    def make_export_config(self) -> StageConfig:
        return replace(self, cache_features=False, reference=None, cache_reference=True)


# Config class of each stage; `config_class` of its class in `STAGES` is the same. A stage with a config class of its own
# names it in conf/stage/ as /schema/stage/<stage>, all others name /schema/stage/base.
STAGE_CONFIGS: dict[StageName, type[StageConfig]] = {
    StageName.align: StageConfig,
    StageName.sft: StageConfig,
    StageName.highres: StageConfig,
    StageName.dpo: DPOStageConfig,
}


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """Settings of Lightning's Trainer under its own names; arguments that are not listed go through `extra`."""

    max_steps: int | None = ranged(None, COUNT)  # optimizer steps; null: from max_epochs
    max_epochs: float = ranged(1.0, ABOVE_0)  # passes over the mixture; the plan converts them to steps
    accelerator: str = "auto"  # cpu, gpu, or auto: whichever is available
    devices: int = ranged(1, PROCESSES)  # processes per machine, one device each
    num_nodes: int = ranged(1, NODES)  # number of machines
    strategy: StrategyName = StrategyName.auto  # distributed training strategy
    shard_size: int | None = ranged(
        None, COUNT
    )  # strategy=hsdp: devices over which one copy of the model is sharded; null: those of a machine
    timeout_minutes: float = ranged(
        30.0, MINUTES
    )  # maximum time that ranks wait for each other; then all exit and write their stacks to the run folder
    precision: str = "bf16-mixed"  # 32-true, bf16-mixed, bf16-true, 16-mixed, ...
    gradient_clip_val: float | None = ranged(1.0, AT_LEAST_0)  # maximum gradient norm; null: no clipping
    log_every_n_steps: int = ranged(10, COUNT)  # optimizer steps between two rows of metrics
    limit_val_batches: float | None = ranged(None, AT_LEAST_0)  # validation batches; a fraction is a share; null: all
    deterministic: bool = False  # raise an error for operations whose result differs between runs
    enable_progress_bar: bool = True  # show a progress bar on the terminal
    profile: bool = (
        False  # run some steps under PyTorch's profiler and write profile.html with the times to the run folder
    )
    num_threads: int | None = ranged(None, PROCESSES)  # CPU threads per process; null: torch's choice
    extra: dict[str, Any] = field(default_factory=dict)  # other arguments of lightning.Trainer, checked by name


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints, the state of an unfinished run: trained weights, optimizer and step. All strategies use the same layout."""

    every_steps: int | None = ranged(None, COUNT)  # optimizer steps between checkpoints; null: only by every_minutes
    every_minutes: float | None = ranged(15.0, MINUTES)  # minutes between checkpoints; null: only by every_steps
    keep_last: int = ranged(2, COUNT)  # checkpoints to keep; 2, so that one may be corrupt
    keep_best: bool = False  # also keep the checkpoint with the best best_metric
    best_metric: str = (
        "val/loss"  # val/loss (lowest is best), or a recall or a score while training, e.g. exam/mean (highest is best)
    )
    asynchronous: bool = True  # write during training; the copy in host memory is as large as the state


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    """Handling of faults during training."""

    on_nonfinite: OnNonfinite = OnNonfinite.stop  # action when the loss or a gradient is not finite on any rank
    max_skipped: int = ranged(10, COUNT_OR_ZERO)  # maximum consecutive skipped steps; above it the run stops
    heartbeat_seconds: float = ranged(10.0, HEARTBEAT_SECONDS)  # interval of each rank's heartbeat in the run folder
    max_oom_retries: int = ranged(
        3, COUNT_OR_ZERO
    )  # maximum times that the micro-batch limits are halved after a device ran out of memory


@dataclass(kw_only=True, slots=True)
class SubmitConfig:
    """Slurm job of task=submit, in Slurm's terms; null: the cluster's default."""

    dry_run: bool = False  # write and print the script, submit nothing
    exam: bool = False  # also submit task=exam of each stage: a job on one device, after that of the stage
    partition: str | None = None  # partition (queue)
    account: str | None = None  # account that is charged
    qos: str | None = None  # quality of service
    time: str | None = None  # time limit of a job, days-hours:minutes:seconds; a requeued job gets it again
    constraint: str | None = None  # required node features, e.g. h100
    gpus_per_node: int | None = ranged(
        None, COUNT_OR_ZERO
    )  # GPUs per node; null: trainer.devices if these are GPUs; 0: submit.extra requests them
    cpus_per_task: int | None = ranged(None, COUNT)  # CPU cores per process; null: 1 + data.num_workers
    memory: str | None = None  # memory per node, e.g. 0 for all
    container: str | None = None  # container image: for pyxis a .sqsh file or registry name, for Apptainer a .sif file
    container_runtime: ContainerRuntime = ContainerRuntime.pyxis
    container_mounts: list[str] = field(default_factory=list)  # mounts, host_path:container_path
    setup: list[str] = field(default_factory=list)  # shell lines to run before the start: modules, environment, staging
    env: dict[str, str] = field(default_factory=dict)  # environment variables of all ranks
    stage_to: str | None = None  # folder on each node's local disk to which data files are copied before the start
    signal_seconds: int = ranged(120, SIGNAL_SECONDS)  # seconds before the time limit, to save and requeue
    extra: list[str] = field(default_factory=list)  # further #SBATCH options, e.g. --exclusive


@dataclass(kw_only=True, slots=True)
class LoggerConfig:
    """Experiment trackers. The CSV file is always written."""

    wandb: bool = False  # log to Weights & Biases as well; the key stays in WANDB_API_KEY
    tensorboard: bool = False  # write TensorBoard files as well; needs pip install '.[tensorboard]'
    metric: str | None = None  # metric that a sweep optimises; a name that the run does not log ends the run
    project: str = "lit_vlm"  # project in Weights & Biases
    entity: str | None = None  # user or team in Weights & Biases; null: the default of the key
    group: str | None = None  # group of runs in Weights & Biases; null: the stages of a chain
    offline: bool = False  # write to the run folder and upload later with task=sync
    tags: list[str] = field(default_factory=list)  # tags of the run in Weights & Biases
    artifacts: list[str] = field(
        default_factory=list
    )  # artifacts to upload at the end: model, lock (mixture.lock), report


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """All settings of a run; the groups of the command line are its fields."""

    task: Task = Task.pipeline
    recipe: str = "tiny"  # task=pipeline: a folder of conf/experiment/
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    submit: SubmitConfig = field(default_factory=SubmitConfig)
    callbacks: list[Any] = field(
        default_factory=list_default_callbacks
    )  # names or {name: {argument: value}}: your own classes by import path, added to the default; or some of the default
    export: bool = (
        True  # export the model to hf/; false: keep only the last checkpoint, from which task=export makes hf/
    )
    special_boxes: bool = (
        True  # export box tokens as special tokens, as VARCO's release; false: every chat server keeps them
    )
    init_from: str | None = None  # weights: folder or hub id of a model, or "previous": the recipe's previous stage
    resume_from: str = (
        "auto"  # auto: resume an unfinished run; none: start from the beginning; or the folder of a checkpoint
    )
    run_dir: str = "runs"  # folder of all runs
    run_name: str | None = None  # folder below run_dir; null: the experiment and a hash of the changed settings
    overwrite: bool = False  # replace a finished run, or a different run, of the same name
    language: Language = (
        Language.auto
    )  # language of pages, preflight's findings and common errors: ko, en; auto: by LC_ALL, LC_MESSAGES or LANG
    seed: int = ranged(0, SEED)  # seed of randomly initialised weights, data order and dropout
    debug: DebugMode | None = None
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    prefer: PreferConfig = field(default_factory=PreferConfig)
    curate: CurateConfig = field(default_factory=CurateConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    demo: DemoConfig = field(default_factory=DemoConfig)
    view: ViewConfig = field(default_factory=ViewConfig)
    benchmarks: list[str] = field(
        default_factory=list
    )  # task=evaluate: benchmarks, or tasks of lmms-eval; training with evaluate.every_steps: benchmarks without a judge; task=curate, preflight
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    sweep: str | None = None  # task=sweep: a sweep file in W&B's format, e.g. sweeps/align.yaml
    trials: TrialsConfig = field(default_factory=TrialsConfig)
    sync: list[str] = field(default_factory=list)  # task=sync: run folders, which may be copies from other machines
    runs: RunsConfig = field(default_factory=RunsConfig)
    image: list[str] = field(default_factory=list)  # task=chat: images of the conversation
    prompt: str | None = None  # task=chat: answer this prompt and exit; null: a conversation
    max_new_tokens: int = ranged(256, COUNT)  # task=chat: maximum tokens of an answer

"""Every setting: its type, default, unit and source. YAML under conf/ holds named choices and restates none of these.

One dataclass per group of the command line. `slots=True` and `kw_only=True` make an unknown key an error when the
config becomes an object, also one that was smuggled in with `+key=`. The comment behind a field is its help text, and each
number has its range beside it (`lit_vlm/config/ranges.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from lit_vlm.anyres import Tiling
from lit_vlm.config.mapping import MappingConfig
from lit_vlm.config.ranges import (
    ABOVE_0,
    AT_LEAST_0,
    COUNT,
    COUNT_OR_NONE,
    GRID,
    HEARTBEAT_SECONDS,
    LAYER,
    LEARNING_RATE,
    MINUTES,
    NODES,
    PROCESSES,
    PROCESSES_OR_NONE,
    SEED,
    SHARE,
    SHARE_ABOVE_0,
    SHARE_BELOW_1,
    SHARE_BELOW_HALF,
    SIGNAL_SECONDS,
    ranged,
)
from lit_vlm.types import Language, Part

# OmegaConf writes an enum by its member's name, so names and values agree throughout.


class Task(Enum):
    pipeline = "pipeline"  # all stages of a recipe, in order
    train = "train"  # one stage
    prepare = "prepare"  # index and verify the data of a stage, build its plan; needs no GPU
    preflight = "preflight"  # what would be trained on, and whether it would run; seconds, no GPU, no weights
    sweep = "sweep"  # runs of one stage that a sweep file describes, and a page about them
    submit = "submit"  # train or the whole recipe, as Slurm jobs
    prefer = "prefer"  # make preference pairs from a finished model's own answers
    export = "export"  # make the model's folder from a run's checkpoint
    sync = "sync"  # send runs that were written offline to Weights & Biases, or what it lacks of them
    chat = "chat"  # talk to a finished model


class Projector(Enum):
    mlp2x_gelu = "mlp2x_gelu"  # LLaVA-1.5, LLaVA-OneVision, VARCO-VISION: Linear, GELU, Linear
    linear = "linear"  # LLaVA


class StageName(Enum):
    align = "align"
    sft = "sft"
    highres = "highres"
    dpo = "dpo"


class Schedule(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class ActivationCheckpointing(Enum):
    auto = "auto"  # the first of the others with which the stage fits on the device by its memory estimate
    none = "none"  # keep all that the backward pass needs
    selective = "selective"  # keep results of matrix products and attention, compute the rest of a layer again
    full = "full"  # keep each layer's input, compute the layer again: a third more time, least memory


class Format(Enum):
    auto = "auto"  # by file ending and the first record's keys
    llava = "llava"  # LLaVA JSON or JSONL: id, image, conversations
    sharegpt = "sharegpt"  # ShareGPT: conversations of human and gpt, images beside them, a system column
    messages = (
        "messages"  # Hugging Face messages or OpenAI content lists: JSONL, parquet, Arrow; images as paths or bytes
    )
    preference = "preference"  # prompt, chosen, rejected (TRL's columns or LLaVA-NeXT's keys)
    caption = "caption"  # a picture and its caption or text, in two columns; the question comes from prompts
    webdataset = "webdataset"  # tar files: pictures with a caption (.txt) or a record (.json) of the same key
    mapped = "mapped"  # labels of another structure, read by data.sources.<name>.mapping (AIHub)
    builtin = "builtin"  # made on the spot
    digits = "digits"  # scikit-learn's handwritten digits


class Markup(Enum):
    auto = "auto"  # on for sources of kind ocr, grounding and referring
    on = "on"  # well-formed <obj>, <char>, <bbox>, <gro>, <ocr> in the text become control tokens
    off = "off"  # they stay text


class Marks(Enum):
    """What `<image>`, `<video>`, `<bbox>` and their like mean in a text of a form whose own they are not."""

    place = "place"  # <image> is where a picture stands, if there are as many as pictures; all else is refused by name
    text = "text"  # text, as any other: for data that speak of HTML or of data formats


class OnBadRecord(Enum):
    quarantine = "quarantine"  # set aside in quarantine.jsonl, up to data.max_quarantined of them
    stop = "stop"  # end after the pass that finds them all; bad_records.jsonl in the run's folder lists them


class OnOverlong(Enum):
    quarantine = "quarantine"  # a bad record, handled by data.on_bad_record
    fewer_tiles = "fewer_tiles"  # its images are cut into fewer tiles until it fits; if that is not enough, quarantine
    cut_turn = "cut_turn"  # its last turns are left out until it fits, at least one answer stays; else quarantine


class WeightsIn(Enum):
    samples = "samples"  # a weight is a share of the samples drawn
    tokens = "tokens"  # a weight is a share of the tokens drawn


class DeviceName(Enum):
    h200 = "h200"
    h100 = "h100"
    a100_80gb = "a100_80gb"
    a100_40gb = "a100_40gb"
    l40s = "l40s"
    rtx4090 = "rtx4090"


class Strategy(Enum):
    """How the devices share the work."""

    auto = "auto"  # one device: single; several: what task=preflight would choose, and says why
    single = "single"
    ddp = "ddp"  # a whole copy on each, gradients are averaged
    deepspeed_zero2 = "deepspeed_zero2"  # optimizer and gradients are shared out
    deepspeed_zero3 = "deepspeed_zero3"  # weights as well
    deepspeed_zero3_offload = "deepspeed_zero3_offload"  # and what is not computed with lies in the host's memory
    fsdp2 = "fsdp2"  # weights, gradients and optimizer shared out by PyTorch's fully_shard
    hsdp = "hsdp"  # fsdp2 within a group of devices, copies between the groups


class OnNonfinite(Enum):
    stop = "stop"  # end before the step changes the weights
    skip = "skip"  # leave the step out, weights and optimizer stay as they were
    rollback = "rollback"  # go back to the last checkpoint, and leave the step out from there


class PairKind(Enum):
    """What a pair made by task=prefer teaches."""

    response = "response"  # the better of the model's answers before the worse one
    control = "control"  # an answer with boxes before one that ignores <gro> or <ocr>


class ScorerName(Enum):
    exact = "exact"  # against the known answer, by the measure of its kind: boxes, text lines, else the same text
    judge = "judge"  # by prefer.judge


class Debug(Enum):
    fast = "fast"  # a few steps of everything
    overfit = "overfit"  # one batch, again and again
    profile = "profile"  # trainer.profile=true, in a run of no more steps than that needs


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The parts: hub ids or local folders; `tiny` is made on the spot.

    The two parts and the projector are not read when init_from names a whole model.
    """

    vision_tower: str = MISSING  # SigLIP, SigLIP 2 or CLIP: hub id, local folder, or "tiny"
    language_model: str = MISSING  # Qwen2.5, Qwen3, Llama-like: hub id, local folder, or "tiny"
    projector: Projector = Projector.mlp2x_gelu
    vision_feature_layer: int | None = ranged(
        None, LAYER
    )  # feeds the projector; null: the last but one, later ones are removed
    grid: int | None = ranged(
        None, GRID
    )  # most tiles along a side; null: init_from's, or LLaVA-OneVision's 6: (1x1),...,(6x6)
    max_tiles: int | None = ranged(
        None, COUNT
    )  # N of anyres_max_N, above it features are pooled; null: init_from's, or 9
    special_tokens: list[str] = field(
        default_factory=lambda: "<gro> <ocr> <char> </char> <obj> </obj> <bbox> </bbox> <delim>".split()
    )  # one id each, added to the vocabulary; the default is VARCO-VISION's nine
    chat_template: str | None = None  # path of a Jinja file, or "chatml"; null: the language model's own
    template_date: str | None = None  # YYYY-MM-DD, for a template that writes today's date; null: when first prepared
    revision: str | None = None  # hub revision of parts and of init_from
    trust_remote_code: bool = False  # run code that comes with a hub repository; never needed by the shipped recipes


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One dataset."""

    path: str | None = None  # file or folder; for format=builtin the kind of picture, e.g. "caption"
    image_root: str | None = (
        None  # images are read inside this folder or zip files of it only; null: the folder of `path`
    )
    hub: str | None = None  # instead of path: a dataset's id on the Hugging Face hub, owner/name
    hub_config: str | None = None  # of a hub dataset that has several
    split: str | None = None  # train, validation, test, by the names of a folder's files; null: of a hub dataset train
    revision: str | None = None  # of a hub dataset: commit, tag or branch
    format: Format = Format.auto
    mapping: MappingConfig | None = None  # format=mapped: which fields are picture, question and answer
    prompts: list[str] = field(default_factory=list)  # questions for records without one; each takes one by its digest
    weight: float | None = ranged(
        None, AT_LEAST_0
    )  # share drawn, relative to the others, see data.weights_in; null for all: by their sizes
    repeat: float | None = ranged(
        None, ABOVE_0
    )  # without weights: how often an epoch reads each of its records; null: once
    count: int | None = ranged(
        None, COUNT
    )  # without weights: how many of its records an epoch reads, instead of repeat
    fraction: float | None = ranged(
        None, SHARE_ABOVE_0
    )  # use this share of its records only, chosen by digest; null: all
    max_tiles: int | None = ranged(
        None, COUNT_OR_NONE
    )  # most tiles of an image beside its base view; 0: base view alone; null: the model's
    language: Language = Language.auto  # auto: by the text, any Hangul makes it Korean
    kind: str | None = None  # a name of types.Kind; null: found from the record
    markup: Markup = Markup.auto
    marks: Marks = Marks.place  # other forms' marks in its texts
    num_samples: int | None = ranged(None, COUNT)  # use this many; for format=builtin, make this many
    hard: bool = False  # format=builtin: larger pictures and smaller text, for high resolution
    licence: str | None = None  # of a named set, shown by task=preflight
    homepage: str | None = None  # where a named set comes from
    obtain: str | None = None  # how to get a named set; shown when its files are missing
    expected_records: int | None = ranged(
        None, COUNT
    )  # of a named set; task=prepare and preflight say when the disk holds another number


@dataclass(kw_only=True, slots=True)
class ValidationConfig:
    sources: dict[str, SourceConfig] = field(default_factory=dict)  # held-out sources; empty: a fraction of each
    fraction: float = ranged(0.01, SHARE_BELOW_1)  # held out of each source by digest of the sample, at most 200 of it
    every_steps: int | None = ranged(None, COUNT)  # optimizer steps between validations; null: at the end only
    max_samples: int = ranged(
        200, COUNT_OR_NONE
    )  # most samples that the generated answers are scored on, per kind and language


@dataclass(kw_only=True, slots=True)
class ShareConfig:
    """Shares of all samples drawn, whatever source they come from; null: as the sources' weights bring it."""

    ko: float | None = ranged(None, SHARE)  # of Korean samples; the rest is English
    text_only: float | None = ranged(None, SHARE)  # of samples without an image
    kinds: dict[str, float] = ranged(dict, SHARE)  # name of types.Kind -> its share, e.g. {ocr: 0.2}


@dataclass(kw_only=True, slots=True)
class DataConfig:
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    weights_in: WeightsIn = WeightsIn.samples
    temperature: float = ranged(
        1.0, ABOVE_0
    )  # without weights: sources count by size^(1/temperature); 1: by size, large: all alike
    share: ShareConfig = field(default_factory=ShareConfig)
    lock: str | None = None  # a mixture.lock; the run stops and says what changed when the data are not those
    index_dir: str | None = None  # where indexes and plans are kept; null: run_dir/index
    index_workers: int | None = ranged(None, PROCESSES)  # processes that build an index; null: one per CPU
    verify: bool = True  # task=prepare: decode every image once
    global_batch_size: int = ranged(128, COUNT)  # samples per optimizer step, over all devices
    global_batch_tokens: int | None = ranged(None, COUNT)  # instead: tokens per optimizer step, to within a sample
    max_length: int | None = ranged(
        None, COUNT
    )  # most tokens of a sample; null: what the language model and a micro-batch hold
    on_overlong: OnOverlong = OnOverlong.quarantine
    tokens_per_micro_batch: int = ranged(16384, COUNT)  # memory cap of one forward pass
    tiles_per_micro_batch: int = ranged(64, COUNT)  # memory cap of one tower pass
    tiling: Tiling = Tiling.anyres  # base: the whole image once; anyres: the image and its tiles (LLaVA-OneVision)
    on_bad_record: OnBadRecord = OnBadRecord.stop
    max_quarantined: float = ranged(0.01, SHARE)  # share of a source; more than this stops the run
    max_image_pixels: int = ranged(64_000_000, COUNT)  # larger images are bad records (decompression bombs)
    scaled_decode: bool = False  # decode large JPEGs at 1/2, 1/4 or 1/8 where that is enough; pixels differ slightly
    num_workers: int = ranged(2, PROCESSES_OR_NONE)  # loader processes per device
    prefetch_factor: int = ranged(4, PROCESSES)  # micro-batches that each of them holds ready


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    rank: int = ranged(0, COUNT_OR_NONE)  # 0: no LoRA, the part's own weights train
    alpha: float = ranged(16.0, ABOVE_0)  # the update is scaled by alpha / rank
    dropout: float = ranged(0.0, SHARE_BELOW_1)  # on the input of the low-rank update
    targets: list[str] = field(default_factory=list)  # module names; empty: every linear layer of the part


@dataclass(kw_only=True, slots=True)
class PartConfig:
    """What differs for one part; null takes the stage's value."""

    learning_rate: float | None = ranged(None, LEARNING_RATE)  # peak of this part; null: the stage's
    weight_decay: float | None = ranged(None, AT_LEAST_0)  # null: the stage's
    warmup: float | None = ranged(None, AT_LEAST_0)  # null: the stage's
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(kw_only=True, slots=True)
class PartsConfig:
    vision_tower: PartConfig = field(default_factory=PartConfig)
    projector: PartConfig = field(default_factory=PartConfig)
    language_model: PartConfig = field(default_factory=PartConfig)


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """What trains, on which loss, how fast."""

    name: StageName = MISSING  # set by the group's files
    trainable: list[Part] = MISSING  # parts whose weights change; every other part is frozen
    learning_rate: float = ranged(MISSING, LEARNING_RATE)  # peak, of every part that names none of its own
    weight_decay: float = ranged(0.0, AT_LEAST_0)  # LLaVA and LLaVA-OneVision train without
    warmup: float = ranged(0.03, AT_LEAST_0)  # below 1 a share of the steps, else a number of steps; LLaVA's 0.03
    schedule: Schedule = Schedule.cosine  # of the learning rate after the warm-up, down to min_learning_rate
    min_learning_rate: float = ranged(0.0, SHARE)  # floor of the schedule, as a share of the peak
    adam_betas: tuple[float, float] = ranged((0.9, 0.999), SHARE_BELOW_1)  # AdamW's, PyTorch's default
    adam_eps: float = ranged(1e-8, ABOVE_0)  # AdamW's, PyTorch's default
    activation_checkpointing: ActivationCheckpointing = (
        ActivationCheckpointing.auto
    )  # what of the layers is computed again in the backward pass, for less memory
    cache_features: bool = False  # what a frozen tower sees, in one pass before training, kept in data.index_dir; large
    parts: PartsConfig = field(default_factory=PartsConfig)


@dataclass(kw_only=True, slots=True)
class DPOStageConfig(StageConfig):
    """Preference optimisation; names and losses are TRL's."""

    beta: float = ranged(0.1, ABOVE_0)  # VARCO's is not published; LLaVA-NeXT's dpo_ov7b.sh
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])  # several are summed by loss_weights
    loss_weights: list[float] | None = ranged(None, AT_LEAST_0)  # one per loss type; null: 1 each
    label_smoothing: float = ranged(0.0, SHARE_BELOW_HALF)  # share of pairs assumed to be labelled the wrong way round
    f_divergence_type: str = "reverse_kl"  # or forward_kl, js_divergence, alpha_divergence
    f_alpha_divergence_coef: float = ranged(0.5, ABOVE_0)  # for f_divergence_type=alpha_divergence
    discopop_tau: float = ranged(0.05, ABOVE_0)  # temperature of loss_type=discopop
    ld_alpha: float | None = ranged(
        None, SHARE
    )  # weight of tokens beyond the shorter answer's length (LD-DPO); null: 1
    use_weighting: bool = False  # WPO
    reference: str | None = None  # folder of the reference model; null: init_from
    cache_reference: bool = (
        False  # its log-probabilities in one pass before training, kept in data.index_dir for other runs
    )


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """Lightning's Trainer in its own words; what is not named here goes through `extra`."""

    max_steps: int | None = ranged(None, COUNT)  # optimizer steps; null: from max_epochs
    max_epochs: float = ranged(1.0, ABOVE_0)  # passes over the mixture; turned into steps by the plan
    accelerator: str = "auto"  # cpu, gpu, or auto: what is there
    devices: int = ranged(1, PROCESSES)  # processes on this machine, one device each
    num_nodes: int = ranged(1, NODES)  # machines
    strategy: Strategy = Strategy.auto  # how the devices share the work
    shard_size: int | None = ranged(
        None, COUNT
    )  # strategy=hsdp: devices that share one copy of the model; null: those of a machine
    timeout_minutes: float = ranged(
        30.0, MINUTES
    )  # ranks wait for each other no longer; then all leave, with their stacks in the run's folder
    precision: str = "bf16-mixed"  # 32-true, bf16-mixed, bf16-true, 16-mixed, ...
    gradient_clip_val: float | None = ranged(1.0, AT_LEAST_0)  # largest gradient norm; null: no clipping
    log_every_n_steps: int = ranged(10, COUNT)  # optimizer steps between two rows of the metrics
    limit_val_batches: float | None = ranged(None, AT_LEAST_0)  # validation batches; a share if not whole; null: all
    deterministic: bool = False  # refuse operations whose result differs from run to run
    enable_progress_bar: bool = True  # the bar on the terminal
    profile: bool = (
        False  # look at some steps under PyTorch's profiler; profile.html in the run's folder says what takes the time
    )
    num_threads: int | None = ranged(None, PROCESSES)  # CPU threads of one process; null: torch's choice
    extra: dict[str, Any] = field(default_factory=dict)  # lightning.Trainer's other arguments, checked by name


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """The state of an unfinished run: weights that train, optimizer, step. One layout for every strategy."""

    every_steps: int | None = ranged(None, COUNT)  # optimizer steps between two; null: by every_minutes alone
    every_minutes: float | None = ranged(15.0, MINUTES)  # and after so much time; null: by every_steps alone
    keep_last: int = ranged(2, COUNT)  # older ones are deleted; two, so that one may turn out damaged
    keep_best: bool = False  # keep the one of the lowest val/loss as well
    asynchronous: bool = True  # write while training goes on; the copy in memory takes as much room as the state


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    on_nonfinite: OnNonfinite = OnNonfinite.stop  # when the loss or a gradient is not a number, on any rank
    max_skipped: int = ranged(10, COUNT_OR_NONE)  # steps in a row; more stop the run
    heartbeat_seconds: float = ranged(10.0, HEARTBEAT_SECONDS)  # each rank says in the run's folder where it is
    max_oom_retries: int = ranged(
        3, COUNT_OR_NONE
    )  # times that the micro-batch budget is halved after a device ran out of memory


@dataclass(kw_only=True, slots=True)
class SubmitConfig:
    """task=submit: the job that Slurm gets, in Slurm's words. null leaves it to the cluster."""

    dry_run: bool = False  # write and print the script, submit nothing
    partition: str | None = None  # queue
    account: str | None = None  # whom the hours are charged to
    qos: str | None = None  # quality of service
    time: str | None = None  # limit of one job, days-hours:minutes:seconds; a requeued job gets it anew
    constraint: str | None = None  # features that nodes must have, e.g. h100
    gpus_per_node: int | None = ranged(
        None, COUNT_OR_NONE
    )  # null: trainer.devices where those are GPUs; 0: submit.extra asks for them
    cpus_per_task: int | None = ranged(None, COUNT)  # null: 1 + data.num_workers
    memory: str | None = None  # of a node, e.g. 0 for all of it
    container: str | None = None  # image for srun --container-image (pyxis and enroot)
    container_mounts: list[str] = field(default_factory=list)  # host:inside
    setup: list[str] = field(default_factory=list)  # shell lines before the start: modules, environment, staging
    env: dict[str, str] = field(default_factory=dict)  # exported to all ranks
    stage_to: str | None = None  # folder on each node's own disk that data files are copied to before the start
    signal_seconds: int = ranged(120, SIGNAL_SECONDS)  # before the time limit, to save and requeue
    extra: list[str] = field(default_factory=list)  # further lines for #SBATCH, e.g. --exclusive


@dataclass(kw_only=True, slots=True)
class LoggerConfig:
    """CSV is always written."""

    wandb: bool = False  # log to Weights & Biases as well; the key stays in WANDB_API_KEY
    tensorboard: bool = False  # write TensorBoard's files as well; needs pip install '.[tensorboard]'
    metric: str | None = None  # must be among what the run logs, as a sweep optimises it; a mistyped one ends the run
    project: str = "lit_vlm"  # of Weights & Biases, like what follows
    entity: str | None = None  # user or team; null: the key's own
    group: str | None = None  # runs that belong together; null: the stages of a chain
    offline: bool = False  # write to the run's folder, upload later with task=sync
    tags: list[str] = field(default_factory=list)  # words to find a run by
    artifacts: list[str] = field(
        default_factory=list
    )  # what is uploaded at the end: model, lock (mixture.lock), report


@dataclass(kw_only=True, slots=True)
class PreflightConfig:
    """task=preflight."""

    max_samples: int = ranged(2000, COUNT)  # records read of each source that has no index yet; the page says so
    num_shown: int = ranged(6, COUNT_OR_NONE)  # samples whose prompt, loss mask, tiles and boxes are shown
    world_size: int | None = ranged(None, COUNT)  # devices to plan for; null: trainer.devices * trainer.num_nodes
    device: DeviceName = DeviceName.h200  # whose memory and speed are assumed
    utilisation: float = ranged(0.4, SHARE_ABOVE_0)  # share of the device's peak that training is assumed to reach
    network: float = ranged(
        400.0, ABOVE_0
    )  # Gb/s into a node from the others, all its ports together; assumed where a strategy is chosen


@dataclass(kw_only=True, slots=True)
class PreferConfig:
    """task=prefer: pairs from the answers of the model at init_from to the prompts of data.sources."""

    output: str = "pairs.jsonl"  # the pairs; answers, pictures and state lie beside it in <name>_files/
    kinds: list[PairKind] = field(default_factory=lambda: [PairKind.response])  # response, control, or both
    num_samples: int = ranged(4, COUNT)  # answers drawn to each prompt
    temperature: float = ranged(1.0, ABOVE_0)  # of the draw; 1: as the model's probabilities say
    top_p: float = ranged(
        1.0, SHARE_ABOVE_0
    )  # draw among the likeliest tokens that have this probability together; 1: among all
    max_new_tokens: int = ranged(256, COUNT)  # of an answer; one that is cut by it is never used
    scorer: ScorerName = ScorerName.exact  # what tells the better answer
    judge: str | None = None  # scorer=judge: a finished model's folder or hub id, or the import path of your own class
    min_margin: float = ranged(
        0.0, SHARE
    )  # least difference of the two scores, which lie in 0 to 1; equal ones never make a pair
    reference_as_chosen: bool = False  # the known answer is chosen where no sample is as good


@dataclass(kw_only=True, slots=True)
class TrialsConfig:
    """task=sweep: how the runs of a sweep file are carried out."""

    count: int | None = ranged(None, COUNT)  # trials altogether; null: the file's run_cap, or 20; a grid ends by itself
    parallel: int | None = ranged(
        None, PROCESSES
    )  # trials at a time; null: as many as the local devices allow, on a CPU 1
    slurm: int | None = ranged(
        None, NODES
    )  # workers of a Slurm array, one trial at a time each, with submit.*; null: on this machine
    worker: int | None = ranged(None, COUNT_OR_NONE)  # which of them this process is; the array's script says it
    carry_to: str | None = None  # experiment that the best values are printed for, e.g. varco_vision_14b/1_align
    dry_run: bool = False  # show the parameters and the first commands, run nothing


@dataclass(kw_only=True, slots=True)
class RunConfig:
    task: Task = Task.pipeline
    recipe: str = "tiny"  # for the pipeline: a folder of conf/experiment/
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    submit: SubmitConfig = field(default_factory=SubmitConfig)
    callbacks: list[str] = field(
        default_factory=lambda: ["throughput", "language_loss", "guard", "samples", "report"]
    )  # import paths of your own classes, which come to these; or names of these, which leave the others out
    export: bool = (
        True  # leave the model in hf/; false: in the last checkpoint, from which task=export makes the folder
    )
    init_from: str | None = None  # weights: folder or hub id of a whole model, or "previous": the recipe's stage before
    resume_from: str = (
        "auto"  # auto: an unfinished run goes on where it was; none: from its start; or a checkpoint's folder
    )
    run_dir: str = "runs"  # where runs are kept
    run_name: str | None = None  # folder below run_dir; null: the experiment and a hash of what was changed
    overwrite: bool = False  # let a run replace a finished one, or another one, of the same name
    seed: int = ranged(0, SEED)  # of the weights that start at random, the order of the data, and dropout
    debug: Debug | None = None
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    prefer: PreferConfig = field(default_factory=PreferConfig)
    sweep: str | None = None  # task=sweep: a sweep file in W&B's format, e.g. sweeps/align.yaml
    trials: TrialsConfig = field(default_factory=TrialsConfig)
    sync: list[str] = field(default_factory=list)  # task=sync: run folders, also ones that were copied from elsewhere
    image: list[str] = field(default_factory=list)  # task=chat: pictures to talk about
    prompt: str | None = None  # task=chat: ask this once and leave; null: a conversation
    max_new_tokens: int = ranged(256, COUNT)  # task=chat: most tokens of an answer


@dataclass(kw_only=True, slots=True)
class RunIdentity:
    """Where a run lives; computed by parse, not a setting."""

    name: str  # e.g. tiny/2_sft or tiny/2_sft-3fa2b1c0
    experiment: str | None
    overrides: list[str] = field(default_factory=list)

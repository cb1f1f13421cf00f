"""Named choices of the settings: tasks, stages, formats, strategies and the like.

The trailing comment of a member is its help text.
"""

from __future__ import annotations

from enum import Enum, StrEnum

from lit_vlm.model.projectors import PROJECTORS

# OmegaConf writes an enum by the name of its member, so every name equals its value.


class Task(Enum):
    pipeline = "pipeline"  # all stages of a recipe, in order
    train = "train"  # one stage
    prepare = "prepare"  # index and verify the data of a stage and build its plan; needs no GPU
    preflight = "preflight"  # check the data, the memory and the settings of a stage; seconds, no GPU, no weights
    sweep = "sweep"  # run the trials of a sweep file and write a page with the results
    submit = "submit"  # submit one stage or the whole recipe as Slurm jobs
    prefer = "prefer"  # make preference pairs from the answers of a finished model
    export = "export"  # export the model folder from a run's checkpoint
    sync = "sync"  # upload offline runs, or the missing part of a run, to Weights & Biases
    runs = "runs"  # list the runs below run_dir, and the settings in which they differ
    chat = "chat"  # chat with a finished model
    exam = "exam"  # score a finished model on the fixed exam of synthetic questions
    serve = "serve"  # serve a finished model with an OpenAI-compatible interface
    demo = "demo"  # a page in the browser to ask a finished model, or two, about pictures
    view = "view"  # a page in the browser for the records of a stage, as the model will see them
    evaluate = "evaluate"  # score a finished model, or an endpoint, on benchmarks with lmms-eval
    judge = "judge"  # have a model at an OpenAI-compatible endpoint judge a file of answers
    generate = "generate"  # have a model write conversations, captions or translations for the records of data.sources
    curate = "curate"  # find duplicates, rows of benchmarks and more in the training data, and select the other records


# Projector between the vision tower and the language model, from the registry.
ProjectorName = StrEnum("ProjectorName", {name: name for name in PROJECTORS})  # type: ignore[misc]


class StageName(Enum):
    """Training stage."""

    align = "align"
    sft = "sft"
    highres = "highres"
    dpo = "dpo"
    represent = "represent"  # BLIP-2, first stage: the Q-Former learns from images and captions
    generate = "generate"  # BLIP-2, second stage: soft prompts of a frozen language model
    blip_pretrain = "blip_pretrain"  # BLIP: contrast with momentum encoders and a queue, matching, captions
    blip_caption = "blip_caption"  # BLIP, fine-tuning: captions after a prompt
    blip_retrieval = "blip_retrieval"  # BLIP, fine-tuning: contrast and matching for retrieval


class LearningRateSchedule(Enum):
    """Learning-rate schedule after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class ActivationCheckpointing(Enum):
    """Level of activation checkpointing."""

    auto = "auto"  # the first level below with which the estimated memory fits on the device
    none = "none"  # keep all activations for the backward pass
    selective = "selective"  # keep the results of matrix products and attention, recompute the rest of a layer
    full = "full"  # keep only the input of each layer and recompute the layer: a third more time, least memory


class Format(StrEnum):
    """Format of the records of a source."""

    auto = "auto"  # detected from the file extension and the keys of the first record
    llava = "llava"  # LLaVA JSON or JSONL: id, image, conversations (MiniCPM-V's role and content too)
    sharegpt = "sharegpt"  # ShareGPT: conversations of human and gpt, an images column, a system column
    messages = (
        "messages"  # Hugging Face messages or OpenAI content lists: JSONL, parquet, Arrow; images as paths or bytes
    )
    preference = "preference"  # prompt, chosen, rejected: of TRL, LLaVA-NeXT, LLaMA-Factory, ms-swift, RLAIF-V
    caption = "caption"  # an image and its caption or text, in two columns; the question comes from prompts
    question_answer = "question_answer"  # columns image, question, answer
    alpaca = "alpaca"  # instruction, input, output, history (LLaMA-Factory)
    query_response = "query_response"  # query, response, history (ms-swift)
    prompt_completion = "prompt_completion"  # prompt, completion, as text or messages (TRL)
    cauldron = "cauldron"  # texts of user and assistant (The Cauldron, FineVision), or conversation (ms-swift)
    coco = "coco"  # COCO's label files of captions and objects, and Flickr30k's captions
    webdataset = "webdataset"  # tar files: images with a caption (.txt) or a record (.json) of the same key
    mapped = "mapped"  # labels of another structure, converted by data.sources.<name>.mapping (AIHub)
    builtin = "builtin"  # synthetic samples, generated on demand
    digits = "digits"  # handwritten digits of scikit-learn


class Markup(Enum):
    """Conversion of markup in texts to control tokens."""

    auto = "auto"  # on for sources of kind ocr, grounding and referring
    on = "on"  # convert well-formed <obj>, <char>, <bbox>, <gro>, <ocr> in the text to control tokens
    off = "off"  # keep them as text


class MarkerMeaning(Enum):
    """Meaning of `<image>`, `<video>`, `<bbox>` and similar markers in a text whose format does not define them."""

    place = "place"  # <image> is an image placeholder if the counts match; a record with any other marker is an error
    text = "text"  # ordinary text, for data about HTML or data formats


class OnBadRecord(Enum):
    """Action for a bad record."""

    quarantine = "quarantine"  # exclude it and list it in quarantine.jsonl, up to data.max_quarantined
    stop = "stop"  # stop after all records were checked; bad_records.jsonl in the run folder lists them


class OnOverlong(Enum):
    """Action for a sample that is longer than the limits."""

    quarantine = "quarantine"  # treat it as a bad record, see data.on_bad_record
    fewer_tiles = "fewer_tiles"  # use fewer tiles for its images until it fits; else quarantine
    cut_turn = "cut_turn"  # remove its last turns until it fits, but keep at least one answer; else quarantine


class WeightUnit(Enum):
    """Unit of the mixture weights."""

    samples = "samples"  # a weight is a share of the sampled samples
    tokens = "tokens"  # a weight is a share of the sampled tokens


class DeviceName(Enum):
    """Accelerator whose memory and speed preflight assumes."""

    h200 = "h200"
    h100 = "h100"
    a100_80gb = "a100_80gb"
    a100_40gb = "a100_40gb"
    l40s = "l40s"
    rtx4090 = "rtx4090"


class StrategyName(Enum):
    """Distributed training strategy."""

    auto = "auto"  # one device: single; several: the choice of task=preflight, reported with its reason
    single = "single"
    ddp = "ddp"  # a full copy on each device, gradients are averaged
    deepspeed_zero2 = "deepspeed_zero2"  # optimizer states and gradients are sharded
    deepspeed_zero3 = "deepspeed_zero3"  # weights are sharded as well
    deepspeed_zero3_offload = "deepspeed_zero3_offload"  # ZeRO-3 with idle shards in host memory
    fsdp2 = "fsdp2"  # weights, gradients and optimizer states are sharded by PyTorch's fully_shard
    hsdp = "hsdp"  # fsdp2 inside a group of devices, replicas between the groups


class OnNonfinite(Enum):
    """Action for a loss or a gradient that is not finite."""

    stop = "stop"  # stop before the step changes the weights
    skip = "skip"  # skip the step; weights and optimizer stay unchanged
    rollback = "rollback"  # return to the last checkpoint and skip the step from there


class PairKind(Enum):
    """Kind of preference pair that task=prefer makes."""

    response = "response"  # the better answer of the model is chosen, the worse one rejected
    control = "control"  # an answer with boxes is chosen, one that ignores <gro> or <ocr> rejected


class ScorerName(Enum):
    """Scorer of the answers in task=prefer."""

    exact = "exact"  # compare with the reference answer by the metric of its kind: boxes, text lines, else exact match
    judge = "judge"  # score with prefer.judge


class CurationMethod(Enum):
    """Search of task=curate."""

    duplicates = "duplicates"  # records that are there already
    contamination = "contamination"  # records with the picture or the question of a benchmark
    balance = "balance"  # records of groups that are too large: kinds, languages, lengths, tiles or concepts
    prune = "prune"  # captions that do not fit their picture, by a model of curate.model, or of poor text
    capfilt = (
        "capfilt"  # BLIP's CapFilt: a captioner writes captions, and a filter keeps those that match (curate.model)
    )
    labels = "labels"  # answers that are classes and seem wrong, by cleanlab on the features of a tower (curate.model)
    personal = "personal"  # records whose text has a phone, resident registration or card number; pictures are not read


class DuplicateKind(Enum):
    """Records that are duplicates in task=curate."""

    rows = "rows"  # the same pictures and the same turns; the same picture with other turns is only listed
    pictures = "pictures"  # the same pictures, whatever the turns
    texts = "texts"  # nearly the same turns with the same numbers, whatever the pictures


class PictureMatch(Enum):
    """Difference up to which two pictures are the same."""

    bytes = "bytes"  # the same bytes
    pixels = "pixels"  # the same decoded pixels
    embedding = (
        "embedding"  # near in the features of a tower (curate.model, curate.min_cosine); a flip may change little there
    )
    perceptual = "perceptual"  # the same view after re-encoding, resizing or a crop of 5 %, in the same colours


class BalanceGroup(Enum):
    """Property of records by which curate.method=balance groups them."""

    kind = "kind"  # kind of sample, a name of types.SampleKind
    language = "language"
    length = "length"  # characters of all turns, in steps (curate.balance.lengths)
    tiles = "tiles"  # tiles of all pictures, as LLaVA-OneVision cuts them
    concept = "concept"  # concepts of a list that the turns name, by MetaCLIP's rule


class TextRule(Enum):
    """Rule of text quality that curate.method=prune applies to captions."""

    too_short = "too_short"  # fewer than 5 letters; a Hangul syllable counts as two
    repeated = "repeated"  # the same word four times in a row, or more than 15 % of the characters in repeated 5-grams
    symbols = "symbols"  # mostly other characters than letters and digits
    wrong_script = (
        "wrong_script"  # source in Korean: below 30 % Hangul; in English: below 70 % Latin; others: below 70 % of both
    )


class GenerationKind(Enum):
    """Text that task=generate asks for."""

    conversation = "conversation"  # several questions and answers about the picture
    description = "description"  # one detailed description
    reasoning = "reasoning"  # a question that needs reasoning, with its answer
    sentence = "sentence"  # the record's own turns, with short answers rewritten to sentences
    caption = "caption"  # a new caption, from the picture itself
    translation = "translation"  # the record's own turns in the other language, Korean or English


class Certainty(Enum):
    """Certainty that a record holds a row of a benchmark, from the surest on."""

    certain = "certain"  # a picture with the same bytes or pixels
    likely = "likely"  # a picture with the same view, or a long question
    possible = "possible"  # a short question


class JudgeKind(Enum):
    """Kind of judgement in task=judge."""

    rating = "rating"  # a score from 0 to 10, by the row's rubric or reference
    correctness = "correctness"  # correct or incorrect, by the row's reference
    pairwise = "pairwise"  # scores from 0 to 10 of two answers side by side


class ContainerRuntime(Enum):
    """Program that runs submit.container on the nodes."""

    pyxis = "pyxis"  # Slurm's plugin with enroot: srun --container-image
    apptainer = "apptainer"  # apptainer exec inside srun
    singularity = "singularity"  # singularity exec inside srun


class DebugMode(Enum):
    """Debug mode of a run."""

    fast = "fast"  # a few steps of every phase
    overfit = "overfit"  # train on the same batch in every step
    profile = "profile"  # trainer.profile=true in a run of only the steps that it needs


DEBUG_FAST_STEPS = 4  # debug=fast
DEBUG_PROFILE_STEPS = 6  # debug=profile: three warm-up steps and three profiled steps

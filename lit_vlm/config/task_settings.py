"""Settings of the tasks beside training, one group each; see the schema for how they are written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lit_vlm.config.choices import (
    DeviceName,
    GenerationKind,
    JudgeKind,
    PairKind,
    ScorerName,
)
from lit_vlm.config.ranges import (
    ABOVE_0,
    AT_LEAST_0,
    COUNT,
    COUNT_OR_ZERO,
    NODES,
    PORT,
    PROCESSES,
    SHARE,
    SHARE_ABOVE_0,
    TEMPERATURE,
    TIMEOUT_SECONDS,
    VOTES,
    ranged,
)
from lit_vlm.types import Language


@dataclass(kw_only=True, slots=True)
class PreflightConfig:
    """Settings of task=preflight."""

    max_samples: int = ranged(2000, COUNT)  # records to read of each source without an index; noted on the page
    num_shown: int = ranged(6, COUNT_OR_ZERO)  # samples whose prompt, loss mask, tiles and boxes are shown
    world_size: int | None = ranged(None, COUNT)  # devices to plan for; null: trainer.devices * trainer.num_nodes
    device: DeviceName = DeviceName.h200  # device whose memory and speed are assumed
    utilisation: float = ranged(0.4, SHARE_ABOVE_0)  # assumed share of the device's peak FLOP/s (MFU)
    network: float = ranged(
        400.0, ABOVE_0
    )  # network bandwidth into a node in Gb/s, all ports together; assumed for the choice of a strategy


@dataclass(kw_only=True, slots=True)
class PreferConfig:
    """Settings of task=prefer: preference pairs from the answers of the model at init_from to the prompts of data.sources."""

    output: str = "pairs.jsonl"  # file of the pairs; answers, images and state are in <name>_files/ next to it
    kinds: list[PairKind] = field(default_factory=lambda: [PairKind.response])  # response, control, or both
    num_samples: int = ranged(4, COUNT)  # answers to sample for each prompt
    temperature: float = ranged(1.0, ABOVE_0)  # sampling temperature; 1: the model's own probabilities
    top_p: float = ranged(
        1.0, SHARE_ABOVE_0
    )  # nucleus sampling: sample from the most likely tokens with this total probability; 1: from all
    max_new_tokens: int = ranged(256, COUNT)  # maximum tokens of an answer; a truncated answer is never used
    scorer: ScorerName = ScorerName.exact  # scorer that decides which answer is better
    judge: str | None = None  # scorer=judge: a finished model's folder or hub id, or the import path of your own class
    min_margin: float = ranged(
        0.0, SHARE
    )  # minimum difference of the two scores (0 to 1); equal scores never make a pair
    reference_as_chosen: bool = False  # use the reference answer as chosen if no sampled answer is as good


@dataclass(kw_only=True, slots=True)
class TrialsConfig:
    """Execution of the trials of task=sweep."""

    count: int | None = ranged(None, COUNT)  # total trials; null: run_cap of the file, or 20; a grid ends by itself
    parallel: int | None = ranged(
        None, PROCESSES
    )  # parallel trials; null: as many as the local devices allow, 1 on a CPU
    slurm: int | None = ranged(
        None, NODES
    )  # workers of a Slurm array, each runs one trial at a time, with submit.*; null: on this machine
    worker: int | None = ranged(None, COUNT_OR_ZERO)  # index of this worker, set by the script of the array
    carry_to: str | None = None  # experiment for which the best values are printed, e.g. varco_vision_14b/1_align
    dry_run: bool = False  # show the parameters and the first commands, run nothing


@dataclass(kw_only=True, slots=True)
class ServeConfig:
    """Settings of task=serve, the OpenAI-compatible server of the model at init_from."""

    host: str = "127.0.0.1"  # address to listen on; any but a loopback address needs a token in LIT_VLM_TOKEN
    port: int = ranged(8000, PORT)  # port to listen on
    model_name: str | None = None  # name of the model for clients; null: the run's or the folder's name
    image_root: str | None = None  # folder whose files a request may name as images; null: images only inside requests
    max_new_tokens: int = ranged(1024, COUNT)  # maximum tokens of an answer, for a request that sets none
    max_sequences: int = ranged(32, COUNT)  # answers that are generated at the same time
    max_cache_tokens: int = ranged(
        131_072, COUNT
    )  # size of the key cache in tokens: answers at the same time x longest of them
    max_waiting: int = ranged(256, COUNT)  # requests in the server; one more is refused with status 429
    max_request_mb: int = ranged(64, COUNT)  # maximum size of a request in MB, with its images


@dataclass(kw_only=True, slots=True)
class DemoConfig:
    """Settings of task=demo, the page in the browser; address and limits are those of serve.*."""

    compare_with: str | None = None  # second model: folder or hub id; it answers each question beside the first


@dataclass(kw_only=True, slots=True)
class ViewConfig:
    """Settings of task=view, the page in the browser; its address is that of serve.*."""

    curated: list[str] = field(
        default_factory=list
    )  # folders that task=curate wrote, whose lists are filters; []: those of run_dir/curate that fit the data


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Evaluation of a model: the fixed exam of synthetic questions, and benchmarks with task=evaluate."""

    exam_items: int | None = ranged(
        None, COUNT_OR_ZERO
    )  # questions for each kind, language and difficulty; null: all, 150; 0: a recipe is run without the exam
    every_steps: int | None = ranged(
        None, COUNT
    )  # optimizer steps between two exams while a stage trains, and one at its end; null: none while it trains
    training_items: int = ranged(5, COUNT_OR_ZERO)  # as exam_items, for the exam while a stage trains; 0: no exam
    training_rows: int = ranged(
        50, COUNT
    )  # the first questions of each of `benchmarks` that are asked while a stage trains
    files: str | None = None  # folder of local files, <files>/<benchmark>/*.parquet, .tsv or .jsonl; null: the hub
    limit: int | None = ranged(None, COUNT)  # only the first questions of each benchmark
    max_new_tokens: int | None = ranged(None, COUNT)  # maximum tokens of an answer; null: as each benchmark says
    num_concurrent: int = ranged(16, PROCESSES)  # requests to the model at the same time
    leave_out: bool = False  # score without rows that cannot be read and requests without an answer, and count them
    environment: str | None = None  # folder of lmms-eval's environment; null: .venv-outside/lmms_eval beside this one
    model_name: str | None = None  # model at an endpoint that has several
    key_variable: str | None = None  # environment variable with the endpoint's key; null: no key is sent
    timeout_seconds: float = ranged(600.0, ABOVE_0)  # maximum seconds until an endpoint answers a request


@dataclass(kw_only=True, slots=True)
class EndpointConfig:
    """A model at an OpenAI-compatible chat endpoint, with limits and prices."""

    endpoint: str | None = None  # base address, e.g. http://127.0.0.1:8000/v1
    model: str | None = None  # name of the model at the endpoint
    key_variable: str | None = None  # environment variable with the key, e.g. OPENAI_API_KEY; null: no key is sent
    temperature: float = ranged(0.0, TEMPERATURE)  # sampling temperature; 0: greedy
    max_new_tokens: int = ranged(1024, COUNT)  # maximum tokens of a reply
    extra: dict[str, Any] = field(
        default_factory=dict
    )  # further fields of each request, e.g. extra.top_p=0.9; null removes one: extra.max_tokens=null
    concurrency: int = ranged(8, PROCESSES)  # requests at the same time
    timeout_seconds: float = ranged(120.0, TIMEOUT_SECONDS)  # seconds without data after which a request is sent again
    max_retries: int = ranged(6, COUNT_OR_ZERO)  # maximum retries of a request; the waits double from 1 s to 60 s
    max_requests: int | None = ranged(None, COUNT)  # maximum requests, with retries and with those of earlier starts
    max_cost: float | None = ranged(None, ABOVE_0)  # maximum cost, earlier starts included; needs both prices
    price_input: float | None = ranged(None, AT_LEAST_0)  # price of a million input tokens, in any currency
    price_output: float | None = ranged(None, AT_LEAST_0)  # price of a million output tokens


@dataclass(kw_only=True, slots=True)
class JudgeConfig(EndpointConfig):
    """Settings of task=judge."""

    answers: str | None = None  # file of answers (.jsonl, .json), or a run folder for its samples.jsonl
    against: str | None = None  # kind=pairwise: file of the other answers, matched by id
    output: str | None = None  # folder of the results; null: <name of the answers>_judged/<kind> beside the answers
    kind: JudgeKind = JudgeKind.rating
    language: Language = Language.auto  # language of the prompt; auto: Korean for a question with Hangul
    prompt: str | None = None  # file with a prompt of your own, with {question}, {answer} and others
    votes: int = ranged(1, VOTES)  # replies to each prompt: their median, or the majority for correctness
    swap: bool = True  # kind=pairwise: ask in both orders of the two answers
    images: bool = False  # send the images too, to a judge that reads images
    image_root: str | None = None  # folder that contains the images; null: the folder of the answers
    limit: int | None = ranged(None, COUNT)  # judge only the first answers
    dry_run: bool = False  # print the number of requests, their tokens and cost, and send none


@dataclass(kw_only=True, slots=True)
class GenerateConfig(EndpointConfig):
    """Settings of task=generate: a model at a chat endpoint writes new turns for the records of data.sources."""

    kinds: list[GenerationKind] = field(
        default_factory=lambda: [GenerationKind.conversation, GenerationKind.description, GenerationKind.reasoning]
    )  # texts to ask for, for each record
    output: str | None = None  # folder of the generated files, lists and page; null: the run folder
    language: Language = (
        Language.auto
    )  # language of the new text; auto: that of the record, for translation the other one
    images: bool = False  # send the pictures too, to a model that reads images; kind caption always sends them
    limit: int | None = ranged(None, COUNT)  # use only the first records of each source
    num_shown: int = ranged(24, COUNT_OR_ZERO)  # examples on the page, of accepted and of rejected replies
    dry_run: bool = False  # print the number of requests, their tokens and cost, and send none


@dataclass(kw_only=True, slots=True)
class RunsConfig:
    """The list of task=runs."""

    json: bool = False  # print one JSON object for each run instead of tables

"""The preflight page reports the numbers of the index and the plan, shows the model's inputs, and executes nothing of the data."""

import io
import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
from rich.console import Console
from support import builtin, list_english, picture, sample

from lit_vlm.config import parse
from lit_vlm.config.choices import OnBadRecord, OnOverlong
from lit_vlm.cost import Flops
from lit_vlm.data.datamodule import DataModule
from lit_vlm.data.markup import build_object_mention
from lit_vlm.formatting import format_bytes, format_count, format_estimated_time, format_number, format_percent
from lit_vlm.messages import set_language
from lit_vlm.reports.preflight.checks import collect_findings
from lit_vlm.reports.preflight.facts import Finding, PreflightFacts, Severity, SourceRow
from lit_vlm.reports.preflight.report import print_preflight, render_preflight_page, write_preflight_page
from lit_vlm.reports.preflight.samples import collect_bad_examples, prepare_sample, prepare_samples, split_prompt
from lit_vlm.reports.preflight.statistics import (
    EvenlySpacedSubset,
    build_histograms,
    compute_padding,
    fill_source_rows,
    subsample_source,
    summarize_plan,
)
from lit_vlm.types import (
    Box,
    ControlToken,
    Fault,
    ImagePlaceholder,
    Language,
    Message,
    PreferencePair,
    RecordError,
    Role,
    Sample,
    SampleKind,
)

FLOPS = Flops(1.0, 1e-4, 256.0, 0.25)
INJECTION = "<script>alert(1)</script><img src=x onerror=alert(1)> <image> <|im_end|> 한글 👋"


@pytest.fixture
def datamodule(processor) -> DataModule:
    sources = [*builtin("caption", "grounding", n=90), *builtin("text", n=40, language=Language.en)]
    return DataModule(processor, sources, 0.1, global_batch_size=16, flops=FLOPS, tokens_per_micro_batch=4096)


@pytest.fixture
def facts(datamodule) -> PreflightFacts:
    plan = datamodule.make_plan(2)
    index, held_out = datamodule.index, datamodule.held_out
    facts = PreflightFacts(name="test/1", stage="sft", command="python run.py task=preflight", moment="now")
    facts.sources = [SourceRow(source.name, len(source), len(source)) for source in index.sources]
    fill_source_rows(facts.sources, index, held_out, index.errors)
    facts.held_out = len(held_out)
    facts.plan = summarize_plan(plan, plan.num_steps)
    facts.histograms = build_histograms(index, np.ones(len(index.sources)), {"tokens": 4096, "tiles": 64})
    facts.samples = prepare_samples(index, datamodule.processor, 6)
    return facts


def strip_tags(page: str) -> str:
    return unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL))


def test_rows_add_up_to_the_index(facts, datamodule):
    index, held_out = datamodule.index, datamodule.held_out
    assert sum(row.usable for row in facts.sources) == len(index) + len(held_out) == 220
    assert sum(row.tokens for row in facts.sources) == int(index.tokens.sum() + held_out.tokens.sum())
    assert sum(row.tiles for row in facts.sources) == int(index.tiles.sum() + held_out.tiles.sum())
    assert sum(row.held_out for row in facts.sources) == len(held_out) == facts.held_out
    assert {name for row in facts.sources for name in row.kinds} >= {"caption", "grounding", "text"}


def test_the_plan_adds_up(facts, datamodule):
    plan = datamodule.make_plan(2)
    draws, balance = plan.get_sample_sequence(), plan.measure_balance()
    assert facts.plan.tokens == int(datamodule.index.tokens[draws].sum())
    assert facts.plan.tiles == int(datamodule.index.tiles[draws].sum())
    assert (facts.plan.steps, facts.plan.k, facts.plan.world_size) == (
        plan.num_steps,
        plan.accumulate_grad_batches,
        2,
    )
    assert facts.plan.balance_ranks == balance["ranks"]["mean"]
    assert facts.plan.pack_tokens.most == balance["tokens"]["largest"] <= 4096


def test_histograms_hold_every_sample(facts, datamodule):
    index = datamodule.index
    for histogram in facts.histograms:
        expected = int((index.images > 0).sum()) if histogram.unit == "pixels" else len(index)
        assert sum(map(sum, histogram.series.values())) == expected, histogram.title
        assert all(len(counts) == len(histogram.edges) - 1 for counts in histogram.series.values())


def test_the_page_shows_the_numbers(facts):
    text = strip_tags(render_preflight_page(facts))
    for row in facts.sources:
        assert row.name in text and f"{row.tokens:,}" in text and f"{row.supervised:,} supervised" in text
    assert f"{facts.plan.steps:,}" in text and format_percent(facts.plan.balance_ranks) in text
    assert "would run" in text


def test_verdict_names_every_problem(facts):
    facts.findings = [
        Finding(Severity.failure, "The first problem.", "Do this."),
        Finding(Severity.warning, "A warning."),
        Finding(Severity.failure, "The second problem.", "Do that."),
    ]
    text = strip_tags(render_preflight_page(facts))
    assert "would fail: 2 problems" in text
    assert all(
        word in text for word in ("The first problem.", "Do this.", "A warning.", "The second problem.", "Do that.")
    )


def test_the_terminal_reports_how_many_faults_it_omits_and_where_they_are(facts, tmp_path):
    page = tmp_path / "preflight.html"

    def print_facts(quarantined):
        facts.sources[0].quarantined = quarantined
        console = Console(file=io.StringIO(), width=110)
        print_preflight(facts, page, console)
        return console.file.getvalue()

    two = {"broken": 3, "missing": 2}
    assert "and 1 more" not in print_facts(two) and "set aside: all faults" not in print_facts(two)
    many = print_facts({**two, "outside": 1})
    assert "and 1 more" in many and f"with examples: {page}" in many and "outside" not in many


def test_counts_of_one_are_singular():
    assert [format_count(number, "record") for number in (0, 1, 2000)] == ["0 records", "1 record", "2,000 records"]
    row = SourceRow("mine", 1, 1, quarantined={Fault.overlong: 1}, expected=2, unread={"model": 1, "turns[].x": 1})
    config = parse(["task=preflight", "experiment=tiny/2_sft"]).config
    facts = PreflightFacts("x", "sft", "", "", sources=[row])
    findings = collect_findings(facts, config.data, config.stage, config.trainer.precision)
    found = " ".join(each.what for each in findings)
    assert "mine: nothing is read from model (1), turns[].x (1)." in found
    assert "mine: 1 record is too long" in found and "mine: 1 record on disk where 2 are expected" in found


def test_an_empty_page_renders():
    facts = PreflightFacts(
        "x", "sft", "", "", findings=[Finding(Severity.failure, "data.sources.mine.path=/none: no such file.")]
    )
    assert "no such file" in render_preflight_page(facts)


def test_the_page_is_self_contained_and_escapes(facts, processor, tmp_path):
    facts.samples = [prepare_sample(sample(INJECTION, INJECTION, (60, 80)), processor)]
    facts.bad = collect_bad_examples([(INJECTION, RecordError(INJECTION, INJECTION, fault=Fault.url))])
    facts.sources[0].licence = INJECTION
    facts.findings = [Finding(Severity.warning, INJECTION, "\ud800")]
    page = write_preflight_page(tmp_path, facts).read_text(encoding="utf-8")
    assert "<script" not in page and "onerror=alert(1)>" not in page.replace("&gt;", "")
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "url(" not in page and "@import" not in page
    assert "한글 👋" in page
    assert '"pictures"' in (tmp_path / "preflight.json").read_text(encoding="utf-8")


def make_records(mixed) -> list:
    pair = PreferencePair(
        "p",
        "pairs",
        "pairs:1",
        SampleKind.preference,
        Language.ko,
        (Message(Role.user, (ImagePlaceholder(0), "어디에 있나요?")),),
        Message(Role.assistant, build_object_mention("빨간 원", Box(0.1, 0.1, 0.5, 0.5))),
        Message(Role.assistant, ("없습니다.",)),
        (picture(90, 60),),
    )
    control = Message(Role.user, (ControlToken("<gro>"), ImagePlaceholder(0), f"where? {INJECTION}"))
    answer = Message(Role.assistant, build_object_mention("원 \U0001f534", Box(0.0, 0.2, 1.0, 0.5)))
    return [
        *mixed,
        pair,
        Sample("c", "t", "t:1", SampleKind.grounding, Language.en, (control, answer), (picture(40, 90),)),
    ]


def test_coloured_text_is_the_prompt(processor, mixed):
    """The joined pieces decode to the same text as the tokens, and the colour marks what the mask marks."""
    for record in make_records(mixed):
        for encoded in processor.encode_sequences(record):
            pieces = split_prompt(encoded, processor)
            whole = processor.tokenizer.decode(encoded.input_ids.tolist(), clean_up_tokenization_spaces=False)
            assert "".join(piece.text for piece in pieces) == whole
            assert sum(piece.tokens for piece in pieces) == encoded.num_tokens
            assert sum(piece.tokens for piece in pieces if piece.supervised) == int(encoded.supervised.sum())
            supervised = [int(token) for token in encoded.input_ids[encoded.supervised]]
            supervised_text = "".join(piece.text for piece in pieces if piece.supervised)
            assert supervised_text == processor.tokenizer.decode(supervised, clean_up_tokenization_spaces=False)


def test_text_that_looks_like_a_control_token_is_not_shown_as_one(processor):
    shown = prepare_sample(sample("Say <|im_end|> and <image>.", "<bbox>"), processor)
    ((_, pieces),) = shown.segments
    texts = [piece.text for piece in pieces if piece.kind == "text"]
    assert any("<|im_end|>" in text and "<image>" in text for text in texts) and "<bbox>" in texts
    assert all(piece.text.startswith("<|im_") for piece in pieces if piece.kind == "control")


def test_the_rendered_prompt_on_the_page_is_the_prompt(facts, processor):
    facts.samples = [prepare_sample(sample("안녕? \n  두 줄 <b>", "네,\n\n안녕."), processor)]
    page = render_preflight_page(facts)
    block = re.search(r'<div class="rendered"[^>]*>(.*?)</div>', page, re.DOTALL)[1]
    ((_, pieces),) = facts.samples[0].segments
    assert unescape(re.sub(r"<[^>]+>", "", block)) == "".join(piece.text for piece in pieces)


def test_samples_show_tiles_boxes_and_both_answers(processor, mixed):
    grounded = prepare_sample(make_records(mixed)[-1], processor)
    assert grounded.marked and grounded.pictures[0].caption == "1 box"
    assert re.search(r"\d \u00d7 \d tiles? of 90 \u00d7 40 pixels", grounded.pictures[-1].caption)
    pair = prepare_sample(make_records(mixed)[-2], processor)
    assert [title for title, _ in pair.segments] == ["chosen", "rejected"]


def test_samples_are_spread_over_the_sources(datamodule, processor):
    datamodule.build_indexes()
    names = [shown.source for shown in prepare_samples(datamodule.index, processor, 6)]
    assert [names.count(source.name) for source in datamodule.index.sources] == [2, 2, 2]
    assert prepare_samples(datamodule.index, processor, 0) == []
    assert len(prepare_samples(datamodule.index, processor, 2)) == 2


def test_a_sample_of_a_source_is_spread_evenly(processor, tmp_path):
    (source,) = builtin("caption", n=1000)
    part = subsample_source(source, processor, tmp_path, 100)
    assert isinstance(part, EvenlySpacedSubset) and len(part) == 100
    assert part[0].id == source[0].id and part[99].id == source[999].id
    steps = np.diff([int(part[i].id.rsplit("-", 1)[-1].rsplit(":", 1)[-1]) for i in range(0, 100, 9)])
    assert steps.max() - steps.min() <= 2
    assert subsample_source(source, processor, tmp_path, 1000) is source


def test_rows_of_a_subset_are_scaled_to_the_source():
    row = SourceRow("a", records=1000, looked_at=100, usable=90)
    assert row.estimated and row.scale == 10
    assert not SourceRow("a", records=5, looked_at=5).estimated


def test_padding_equals_hand_computed_values():
    lengths = np.array([1, 3, 2, 2, 4, 4])
    assert compute_padding(lengths, 2) == pytest.approx(1 - 16 / 18)
    assert compute_padding(np.array([4, 1, 4, 1]), 2) == pytest.approx(1 - 10 / 16)
    assert compute_padding(np.array([4, 1, 4, 1]), 2, grouped=True) == 0.0
    assert compute_padding(np.array([5]), 2) == 0.0


def test_numbers_are_formatted_for_readers():
    assert [format_percent(share) for share in (0.0, 0.0001, 0.5, 0.9999, 1.0)] == [
        "0.0 %",
        "<0.1 %",
        "50.0 %",
        ">99.9 %",
        "100.0 %",
    ]
    assert format_number(1234567) == "1,234,567" and format_number(1234567, True) == "~1,230,000"
    assert format_bytes(141e9) == "141 GB" and format_bytes(2.5e6) == "2.5 MB" and format_bytes(0) == "0 B"
    assert (
        format_estimated_time(7200) == "2.0 hours"
        and format_estimated_time(86400 * 3) == "3.0 days"
        and format_estimated_time(120) == "2 minutes"
    )


def test_the_page_and_every_finding_are_korean(facts):
    set_language("ko")
    facts.samples, facts.findings = [], list(collect_all_findings(facts))
    page = render_preflight_page(facts)
    assert len(facts.findings) > 10 and '<html lang="ko">' in page and "데이터 혼합" in page
    assert list_english(page) == []


def collect_all_findings(facts):
    """Yield findings of most kinds, from sources and plans with every problem."""
    stop, set_aside = (
        parse(["experiment=tiny/2_sft", "init_from=null"]).config,
        parse(["experiment=tiny/2_sft", "init_from=null"]).config,
    )
    set_aside.data.on_bad_record, set_aside.data.on_overlong = OnBadRecord.quarantine, OnOverlong.quarantine
    row = SourceRow("mine", 100, 100, usable=90, expected=120, duplicates=3, passes=9.0, normalised=4, fewer_tiles=2)
    row.quarantined = {"missing": 2, "overlong": 1}
    other = replace(row, name="other", fewer_tiles=0, fewer_turns=1, looked_at=50)
    plan = replace(facts.plan, world_size=8, samples_per_step=300.0, blank=0.2, balance_ranks=0.8)
    bad = replace(facts, sources=[row, other], held_out=0, plan=plan)
    for config in (stop, set_aside):
        for limit in (0.001, 0.5):
            config.data.max_quarantined = limit
            yield from collect_findings(bad, config.data, config.stage, "bf16-mixed")

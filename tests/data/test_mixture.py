"""The mixture samples the requested shares in every prefix, and reports shares that it cannot meet."""

import json
from collections import Counter

import numpy as np
import pytest
from made_index import make_index

from lit_vlm.data.index.sample_index import KINDS, LANGUAGES, SampleIndex
from lit_vlm.data.packing.mixture import Mixture, MixtureSettings, SourceAmount
from lit_vlm.types import Language, SampleKind, UserError

KO, EN = LANGUAGES.index(Language.ko), LANGUAGES.index(Language.en)
CAPTION, OCR, TEXT = (KINDS.index(kind) for kind in (SampleKind.caption, SampleKind.ocr, SampleKind.text))


@pytest.fixture
def index() -> SampleIndex:
    """Five sources of one cell each."""
    return make_index({name: 40 for name in "abcde"})


@pytest.fixture
def varied() -> SampleIndex:
    """`ko` 300 and `en` 700 samples; of each a fifth is text without an image and three tenths are OCR."""
    sizes = {"ko": 300, "en": 700}
    place = np.concatenate([np.arange(size) / size for size in sizes.values()])
    kind = np.where(place < 0.2, TEXT, np.where(place < 0.5, OCR, CAPTION))
    language = np.repeat([KO, EN], list(sizes.values()))
    tokens = np.where(place < 0.2, 20, 100)
    return make_index(sizes, kind=kind, language=language, images=kind != TEXT, tokens=tokens)


def make_mixture(index: SampleIndex, sources: dict[str, SourceAmount] | None = None, **settings) -> Mixture:
    return Mixture(index, MixtureSettings(sources or {}, **settings))


def make_weights(**weights: float) -> dict[str, SourceAmount]:
    return {name: SourceAmount(weight=weight) for name, weight in weights.items()}


def compute_shares(index: SampleIndex, sampled: np.ndarray) -> np.ndarray:
    return np.bincount(index.source_ids[sampled], minlength=len(index.sources)) / len(sampled)


class TestSampling:
    def test_fewer_samples_are_a_prefix_of_more_samples(self, varied):
        mixture = make_mixture(varied, share_ko=0.41)
        many = mixture.sample(5000, seed=3)
        for count in (0, 1, 10, 1023, 1024, 1025, 4097):
            assert np.array_equal(mixture.sample(count, seed=3), many[:count])

    def test_weights_are_shares_of_the_samples_and_every_prefix_keeps_them(self, index):
        sampled = make_mixture(index, make_weights(a=5, b=3, c=1, d=1, e=0)).sample(640, seed=0)
        for upto in (64, 320, 640):
            assert np.abs(compute_shares(index, sampled[:upto]) - [0.5, 0.3, 0.1, 0.1, 0.0]).max() <= 1.5 / upto

    def test_every_prefix_keeps_each_cells_share_to_within_two_samples(self, varied):
        mixture = make_mixture(varied, share_ko=0.41, share_kinds={SampleKind.ocr: 0.27})
        sampled = mixture.sample(3000, seed=0)
        counts = np.arange(1, 3001)
        for cell, share in zip(mixture.cells, mixture.cell_shares, strict=True):
            assert np.abs(np.cumsum(np.isin(sampled, cell.members)) - counts * share).max() <= 2

    def test_every_sample_is_read_before_any_is_repeated_and_each_pass_has_its_own_order(self, index):
        sampled = make_mixture(index).sample(600, seed=0)
        passes = sampled.reshape(3, 200)
        assert all(sorted(one) == list(range(200)) for one in passes)
        assert not np.array_equal(passes[0], passes[1])

    def test_another_seed_gives_another_order(self, index):
        assert not np.array_equal(make_mixture(index).sample(200, 0), make_mixture(index).sample(200, 1))

    def test_sources_of_the_same_size_have_orders_of_their_own(self, index):
        sampled = make_mixture(index).sample(200, seed=0)
        orders = [tuple(index.position[sampled[index.source_ids[sampled] == source]]) for source in range(5)]
        assert len(set(orders)) == 5

    def test_passes_over_a_tiny_source_differ(self):
        index = make_index({"tiny": 3, "large": 300})
        sampled = make_mixture(index, make_weights(tiny=1, large=1)).sample(6000, seed=0)
        tiny = sampled[index.source_ids[sampled] == 0].reshape(-1, 3)
        assert all(sorted(one) == [0, 1, 2] for one in tiny)
        assert len({tuple(one) for one in tiny}) == 6

    def test_the_order_of_samples_does_not_change_between_versions(self):
        """Runs are resumed by step number: another order would read samples twice and others never."""
        assert make_mixture(make_index({"a": 6, "b": 3})).sample(12, seed=7).tolist() == [
            1,
            8,
            2,
            5,
            7,
            3,
            0,
            6,
            4,
            4,
            7,
            2,
        ]

    def test_a_thousand_sources_are_mixed(self):
        index = make_index({str(number): 2 for number in range(1000)})
        assert sorted(make_mixture(index).sample(2000, 0)) == list(range(2000))


class TestAmounts:
    def test_without_settings_shares_follow_the_sizes_of_the_sources(self, varied):
        mixture = make_mixture(varied)
        np.testing.assert_allclose(mixture.source_shares, [0.3, 0.7])
        assert mixture.epoch_length == 1000
        assert sorted(mixture.sample(1000, 0)) == list(range(1000))

    def test_repeat_and_count_set_the_length_of_an_epoch(self, varied):
        mixture = make_mixture(varied, {"ko": SourceAmount(repeat=2), "en": SourceAmount(count=350)})
        assert mixture.epoch_length == 950
        times = Counter(Counter(mixture.sample(950, 0).tolist()).values())
        assert times == {2: 300, 1: 350}

    def test_a_count_reads_another_part_in_each_epoch_until_all_is_read(self):
        index = make_index({"a": 100, "b": 50})
        mixture = make_mixture(index, {"a": SourceAmount(count=25)})
        epochs = mixture.sample(4 * 75, 0).reshape(4, 75)
        parts = [set(epoch[index.source_ids[epoch] == 0].tolist()) for epoch in epochs]
        assert set.union(*parts) == set(range(100))
        assert sum(map(len, parts)) == 100

    @pytest.mark.parametrize(("temperature", "expected"), ((1, [0.8, 0.2]), (2, [2 / 3, 1 / 3]), (1e6, [0.5, 0.5])))
    def test_temperature_flattens_the_shares_of_the_sizes(self, temperature, expected):
        mixture = make_mixture(make_index({"a": 80, "b": 20}), temperature=temperature)
        np.testing.assert_allclose(mixture.source_shares, expected, atol=1e-5)
        assert mixture.epoch_length == 100

    def test_weights_in_tokens_are_shares_of_the_tokens(self):
        index = make_index({"long": 200, "short": 200}, tokens=np.repeat([300, 30], 200))
        sampled = make_mixture(index, make_weights(long=3, short=1), weights_in="tokens").sample(2600, 0)
        tokens = np.bincount(index.source_ids[sampled], index.tokens[sampled])
        np.testing.assert_allclose(tokens / tokens.sum(), [0.75, 0.25], atol=0.002)

    def test_with_weights_an_epoch_is_as_long_as_the_sources_that_are_sampled(self, index):
        assert make_mixture(index, make_weights(a=1, b=1, c=1, d=5, e=0)).epoch_length == 160

    @pytest.mark.parametrize(
        ("sources", "settings", "message"),
        (
            ({"a": SourceAmount(weight=1)}, {}, r"data\.sources\.b\.weight is missing"),
            ({"x": SourceAmount(weight=1)}, {}, "names the source x, but there are only: a, b"),
            ({"a": SourceAmount(repeat=2, count=3)}, {}, r"data\.sources\.a has repeat and count"),
            (
                {"a": SourceAmount(weight=2, count=3), "b": SourceAmount(weight=1)},
                {},
                r"data\.sources\.a has weight and count",
            ),
            (make_weights(a=-1, b=1), {}, r"data\.sources\.a\.weight=-1 must be a number from 0"),
            (make_weights(a=float("nan"), b=1), {}, r"data\.sources\.a\.weight=nan"),
            (make_weights(a=0, b=0), {}, "Nothing is sampled"),
            (make_weights(a=1, b=1), {"temperature": 2.0}, r"data\.temperature=2 tempers"),
            ({}, {"temperature": 0.0}, r"data\.temperature=0 must be above 0"),
            ({}, {"weights_in": "tokens"}, r"data\.weights_in=tokens, but no source has a weight"),
        ),
    )
    def test_amounts_that_contradict_each_other_are_reported(self, sources, settings, message):
        with pytest.raises(UserError, match=message):
            make_mixture(make_index({"a": 5, "b": 5}), sources, **settings).sample(5, 0)

    @pytest.mark.parametrize("amount", (SourceAmount(weight=1), SourceAmount(count=3)))
    def test_an_empty_source_with_a_requested_amount_is_reported(self, amount):
        rest = SourceAmount(weight=1) if amount.weight else SourceAmount()
        with pytest.raises(UserError, match=r"data\.sources\.a is in the mixture, but has no usable sample"):
            make_mixture(make_index({"a": 0, "b": 5}), {"a": amount, "b": rest}).sample(5, 0)

    def test_an_empty_source_without_an_amount_is_ignored(self):
        assert sorted(make_mixture(make_index({"a": 0, "b": 5})).sample(5, 0)) == [0, 1, 2, 3, 4]


class TestShares:
    def sample(self, index: SampleIndex, count: int = 5000, **settings) -> np.ndarray:
        return make_mixture(index, **settings).sample(count, 0)

    def test_shares_of_language_text_and_kinds_are_met_exactly_and_together(self, varied):
        sampled = self.sample(varied, share_ko=0.45, share_text_only=0.1, share_kinds={SampleKind.ocr: 0.6})
        assert abs((varied.language[sampled] == KO).sum() - 0.45 * 5000) <= 3
        assert abs((varied.images[sampled] == 0).sum() - 0.1 * 5000) <= 3
        assert abs((varied.kind[sampled] == OCR).sum() - 0.6 * 5000) <= 3

    def test_a_share_keeps_the_proportions_within_its_parts(self, varied):
        sampled = self.sample(varied, share_ko=0.8)
        korean = varied.language[sampled] == KO
        for part in (korean, ~korean):
            kinds = np.bincount(varied.kind[sampled[part]], minlength=len(KINDS))[[TEXT, OCR, CAPTION]]
            np.testing.assert_allclose(kinds / kinds.sum(), [0.2, 0.3, 0.5], atol=0.005)

    def test_shares_take_precedence_over_the_weights_of_sources(self):
        """`both` is half Korean; `en` has none. Requested: equal weights, and three quarters Korean."""
        index = make_index({"both": 100, "en": 100}, language=[KO] * 50 + [EN] * 150)
        sampled = self.sample(index, sources=make_weights(both=1, en=1), share_ko=0.75)
        assert abs((index.language[sampled] == KO).sum() - 3750) <= 2
        english = index.source_ids[sampled[index.language[sampled] == EN]]
        assert np.bincount(english)[0] / len(english) == pytest.approx(1 / 3, abs=0.01)

    def test_a_share_of_zero_leaves_its_samples_out(self, varied):
        sampled = self.sample(varied, share_text_only=0.0)
        assert not (varied.images[sampled] == 0).any()

    def test_shares_that_need_an_empty_cell_are_met(self):
        """Half Korean and half text-only, which is possible only without the cell of English text."""
        index = make_index({"a": 300}, language=[KO] * 100 + [EN] * 200, images=[0] * 100 + [1] * 100 + [0] * 100)
        sampled = self.sample(index, share_ko=0.5, share_text_only=0.5)
        assert abs((index.language[sampled] == KO).sum() - 2500) <= 2
        assert abs((index.images[sampled] == 0).sum() - 2500) <= 2

    @pytest.mark.parametrize(
        ("settings", "message"),
        (
            ({"share_ko": 0.3}, r"data\.share\.ko=0\.3 cannot be met: no source has samples of that sort"),
            ({"share_text_only": 0.3}, r"data\.share\.text_only=0\.3 cannot be met"),
            ({"share_kinds": {SampleKind.ocr: 0.3}}, r"data\.share\.kinds\.ocr=0\.3 cannot be met"),
            (
                {"share_kinds": {SampleKind.caption: 0.3}},
                r"the rest beside data\.share\.kinds\.caption=0\.3, 0\.7, cannot be met",
            ),
            ({"share_ko": 1.2}, r"data\.share\.ko=1\.2: each must be a share from 0 to 1"),
            ({"share_kinds": {SampleKind.caption: 0.7, SampleKind.ocr: 0.6}}, r"together at most 1; they sum to 1\.3"),
        ),
    )
    def test_a_share_that_cannot_be_met_is_reported(self, settings, message):
        english = make_index({"a": 10}, language=EN)
        with pytest.raises(UserError, match=message):
            self.sample(english, **settings)

    def test_shares_that_contradict_each_other_are_reported(self):
        """All Korean samples are text-only."""
        index = make_index({"a": 200}, language=[KO] * 100 + [EN] * 100, images=[0] * 100 + [1] * 100)
        with pytest.raises(UserError, match=r"contradict each other .*data\.share\.ko=0\.9 \(reached .*text_only=0\.2"):
            self.sample(index, share_ko=0.9, share_text_only=0.2)

    def test_a_share_counts_only_sources_that_are_sampled(self):
        """The Korean samples are in a source that is left out."""
        index = make_index({"ko": 10, "en": 10}, language=[KO] * 10 + [EN] * 10)
        with pytest.raises(UserError, match=r"data\.share\.ko=0\.5 cannot be met: no source has samples of that sort"):
            self.sample(index, sources=make_weights(ko=0, en=1), share_ko=0.5)


class TestRows:
    def summarize(self, mixture: Mixture, count: int) -> dict[tuple[str, str], dict]:
        rows = mixture.summarize(mixture.sample(count, 0))
        json.dumps(rows)
        return {(row["group"], row["name"]): row for row in rows}

    def test_rows_show_the_requested_and_the_sampled_shares(self, varied):
        rows = self.summarize(make_mixture(varied, make_weights(ko=1, en=1), share_kinds={SampleKind.ocr: 0.5}), 2000)
        assert rows["source", "ko"]["asked"] == 0.5
        assert rows["source", "ko"]["samples"] == pytest.approx(0.5, abs=0.002)
        assert rows["source", "ko"]["size"] == 300
        assert rows["source", "ko"]["size_tokens"] == 60 * 20 + 240 * 100
        assert rows["source", "ko"]["repeats"] == pytest.approx(1000 / 300, abs=0.01)
        assert rows["kind", "ocr"]["asked"] == 0.5
        assert rows["kind", "ocr"]["samples"] == pytest.approx(0.5, abs=0.002)
        assert rows["kind", "ocr"]["tokens"] > 0.5
        assert rows["language", "ko"]["asked"] is None
        assert set(rows) == {
            *(("source", name) for name in ("ko", "en")),
            *(("language", name) for name in ("ko", "en")),
            *(("images", name) for name in ("text only", "with image")),
            *(("kind", name) for name in ("caption", "ocr", "text")),
        }

    def test_shares_of_each_group_sum_to_one(self, varied):
        rows = self.summarize(make_mixture(varied, share_ko=0.5), 1000)
        for group in ("source", "language", "images", "kind"):
            for column in ("samples", "tokens"):
                assert sum(row[column] for (name, _), row in rows.items() if name == group) == pytest.approx(1)
        assert (rows["language", "ko"]["asked"], rows["language", "en"]["asked"]) == (0.5, 0.5)

    def test_weights_in_tokens_are_reported_in_tokens(self, varied):
        rows = self.summarize(make_mixture(varied, make_weights(ko=3, en=1), weights_in="tokens"), 4000)
        row = rows["source", "ko"]
        assert (row["asked"], row["asked_in"]) == (0.75, "tokens")
        assert row["tokens"] == pytest.approx(0.75, abs=0.005)

    def test_a_source_that_is_left_out_has_a_row(self, varied):
        assert self.summarize(make_mixture(varied, make_weights(ko=1, en=0)), 100)["source", "en"]["samples"] == 0

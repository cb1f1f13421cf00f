"""Page of SmolLM2: its tables and its drawing are those of the committed run."""

import json

from benchmarks import smollm2


def test_the_page_shows_the_committed_run():
    result = json.loads(smollm2.RESULT.read_text(encoding="utf-8"))
    page = smollm2.PAGE.read_text(encoding="utf-8")
    assert f"<!-- smollm2 -->\n{smollm2.render_tables(result)}<!-- /smollm2 -->" in page
    assert smollm2.CHART.read_text(encoding="utf-8") == smollm2.draw_curves(result)

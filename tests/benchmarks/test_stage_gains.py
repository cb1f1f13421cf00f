"""The tables of what each stage gains are those of the committed result file."""

import json

from benchmarks import stage_gains

PAGE = stage_gains.ROOT / "docs/exam.md"


def test_the_tables_of_gains_are_those_of_their_result_file():
    result = json.loads(stage_gains.RESULT.read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    for name, render in (
        ("stage-gains", stage_gains.render_comparisons),
        ("stage-gains-cells", stage_gains.render_cells),
    ):
        assert f"<!-- {name} -->\n{render(result)}\n<!-- /{name} -->" in page

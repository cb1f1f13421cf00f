"""The learning curve of the documents is that of the measured run."""

import json

from benchmarks import learning_curve

PAGE = learning_curve.ROOT / "docs/exam.md"


def test_the_table_and_the_chart_of_the_learning_curve_are_those_of_its_result_file():
    result = json.loads(learning_curve.RESULT.read_text(encoding="utf-8"))
    assert (
        f"<!-- learning-curve -->\n{learning_curve.render_table(result)}\n<!-- /learning-curve -->"
        in PAGE.read_text(encoding="utf-8")
    )
    assert learning_curve.CHART.read_text(encoding="utf-8") == learning_curve.draw_curve(result)

"""Values of a sweep file reach the settings through the agent's command line without a change of type or character."""

import json

from lit_vlm.config.overrides import parse_arguments, parse_override
from lit_vlm.config.parse import parse

DUMP = "import os, sys; open(os.environ['DUMP'], 'a').write(sys.argv[1] + chr(10))"
VALUES = {
    "number": [3, 1e-05, -0.5, 10**12, 1e30],
    "flag": [True, False],
    "nothing": [None],
    "text": [
        "plain",
        "hello world",
        "한국어 지시문",
        "null",
        "3",
        "1e-5",
        "true",
        "a,b",
        "a=b",
        "it's",
        'say "hi"',
        "(x)",
        "[x]",
        "{x: 1}",
        "#c",
        "s3://b?x=1&y=2",
        "back\\slash",
        "ends\\",
        "${oc.env:HOME}",
        "$HOME `id`",
        "tab\there",
        "",
    ],
    "list": [[0.9, 0.99], [], ["a b", "x,y", None, "둘"], [[1, 2], [3]]],
}


def test_every_type_and_character_arrives_through_the_agents_command_line(client, tmp_path):
    given = {f"{kind}.{number}": value for kind, values in VALUES.items() for number, value in enumerate(values)}
    command = ["python", "-c", DUMP, "${args_json}"]
    parameters = {key: {"value": value} for key, value in given.items()}
    client.run_agent(
        client.create_sweep(method="grid", command=command, parameters=parameters), DUMP=str(tmp_path / "dump")
    )
    (arrived,) = map(json.loads, (tmp_path / "dump").read_text(encoding="utf-8").splitlines())
    assert sorted(map(repr, arrived.items())) == sorted(map(repr, given.items()))


def test_an_argument_of_the_agent_is_parsed_as_the_values_of_the_file():
    for kind, values in VALUES.items():
        for value in values:
            (override,) = parse_arguments([json.dumps({kind: value})])
            assert parse_override(override).value() == value and type(parse_override(override).value()) is type(
                value
            ), override


def test_a_complete_argument_of_an_agent_is_parsed_to_a_config():
    settings = {
        "experiment": "tiny/1_align",
        "stage.learning_rate": 2e-05,
        "stage.adam_betas": [0.9, 0.95],
        "trainer.gradient_clip_val": None,
        "trainer.deterministic": True,
        "trainer.max_steps": 7,
        "model.max_tiles": 4,
        "logger.tags": ["한국어, 둘", "it's"],
        "data": {"share": {"ko": 0.6}},
    }
    config = parse([json.dumps(settings, ensure_ascii=False)]).config
    assert (config.stage.learning_rate, config.stage.adam_betas) == (2e-5, (0.9, 0.95))
    assert config.trainer.gradient_clip_val is None and config.trainer.deterministic is True
    assert (config.trainer.max_steps, config.model.max_tiles) == (7, 4)
    assert config.logger.tags == ["한국어, 둘", "it's"] and config.data.share.ko == 0.6

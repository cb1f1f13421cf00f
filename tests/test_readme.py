"""The documents are true: tree, commands, errors, links, names and examples; both languages show the same blocks."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support import blueprint_of, picture
from waiting import PATIENCE

from benchmarks.quickstart import RESULT, render_tables
from benchmarks.quickstart import TABLE_PATTERN as BLOCK_OF_QUICKSTART
from lit_vlm.config.compose import compose_config
from lit_vlm.config.overrides import ConfigError, add_implied_overrides, parse_arguments, split_flags
from lit_vlm.config.parse import collect_override_errors, parse
from lit_vlm.config.schema import SourceConfig
from lit_vlm.config.sweep_overrides import validate_multirun
from lit_vlm.data.sources import open_source
from lit_vlm.model.build import build_model
from lit_vlm.model.export import export_model

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "README.ko.md"]
DOCUMENTS = [*READMES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TWINS = [
    tuple(READMES),
    (ROOT / "docs/your-own-data.md", ROOT / "docs/your-own-data.ko.md"),
    (ROOT / "docs/cluster.md", ROOT / "docs/cluster.ko.md"),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENTRY = re.compile(r"^(?:python|\.venv/bin/python|torchrun(?: --\S+)*) run\.py\b")


def blocks(path: Path, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(path.read_text(encoding="utf-8")) if found == language]


def commands(path: Path) -> list[str]:
    """The lines of bash blocks that start run.py."""
    return [line for block in blocks(path, "bash") for line in block.splitlines() if ENTRY.match(line)]


def words_of(command: str) -> list[str]:
    words = shlex.split(command)
    return words[words.index("run.py") + 1 :]


def all_commands() -> list:
    """Each command once: many stand in both languages."""
    first = {line: path for path in reversed(DOCUMENTS) for line in commands(path)}
    return [pytest.param(line, id=f"{path.name}: {line[:80]}") for line, path in first.items()]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder as a reader has it: with the YAML files that the documents write."""
    for path in DOCUMENTS:
        for block in blocks(path, "bash"):
            for name, body in re.findall(r"^cat > (\S+\.yaml) <<'END'\n(.*?)^END$", block, re.MULTILINE | re.DOTALL):
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_text(body, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_commands_to_test():
    assert len(all_commands()) > 30
    for path in DOCUMENTS:
        found = re.findall(r"run\.py(?![\w.])[^`\n]*", "\n".join(blocks(path, "bash")))
        inside = [line for line in found if not line.startswith("run.py -sc")]
        assert len(inside) == len([line for line in commands(path) if "-sc" not in line]), path.name


@pytest.mark.parametrize("command", all_commands())
def test_every_command_of_the_documents_is_accepted(command, place):
    flags, words = split_flags(words_of(command))
    assert "$" not in command
    if flags:
        words, sweep = add_implied_overrides(parse_arguments(words)), "-m" in flags
        assert set(flags) <= {"-m", "--cfg", "job"}
        assert collect_override_errors(words, is_multirun=sweep) == {}
        validate_multirun(words) if sweep else compose_config(words)
    else:
        parse(words)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_error_that_is_shown_is_the_real_one(path, place):
    for block in blocks(path, "text"):
        if block.startswith("$ python run.py"):
            command, said = block.split("\n", 1)
            with pytest.raises(ConfigError) as error:
                parse(words_of(command))
            assert str(error.value) == said.strip()


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_the_tree_of_the_readme_is_the_real_one(path):
    (tree,) = [block for block in blocks(path, "") if block.startswith("run.py ")]
    listed, folder = [], ""
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        listed.append(name if not line.startswith(" ") else folder + name)
    for name in listed:
        assert (ROOT / name).is_dir() if name.endswith("/") else (ROOT / name).is_file(), name
    for room, pattern in (("lit_vlm", "*"), ("conf", "*")):
        real = {
            f"{room}/{entry.name}{'/' if entry.is_dir() else ''}"
            for entry in (ROOT / room).glob(pattern)
            if not entry.name.startswith(("_", "."))
        }
        assert real == {name for name in listed if name.startswith(f"{room}/") and name != f"{room}/"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_that_are_named_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"`make ([a-z-]+)", text))
    named |= {word for block in blocks(path, "bash") for word in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE)}
    assert named <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        if heading:
            text = file.read_text(encoding="utf-8")
            found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in found}, target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tests_and_paths_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8"), (file, name)
    for name in re.findall(r"`((?:lit_vlm|conf|callbacks|benchmarks|tests|\.ci)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name


@pytest.mark.parametrize(("english", "korean"), TWINS, ids=lambda path: path.name)
def test_both_languages_show_the_same_blocks(english, korean):
    for language in ("bash", "python", "json", "text"):
        assert blocks(english, language) == blocks(korean, language)
    assert english.read_text(encoding="utf-8").count("\n## ") == korean.read_text(encoding="utf-8").count("\n## ")


def test_the_example_files_of_the_readme_are_read(tmp_path):
    (block,) = [block for block in blocks(READMES[0], "bash") if block.startswith("mkdir -p my")]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", block], cwd=tmp_path, env=environment, check=True, timeout=PATIENCE)
    for name, count in (("llava.json", 2), ("messages.jsonl", 1), ("preference.jsonl", 1)):
        source = open_source("mine", SourceConfig(path=str(tmp_path / "my" / name)), max_image_pixels=10_000)
        records = [source[number] for number in range(len(source))]
        assert len(records) == count
        assert all(image.load().size == (84, 56) for record in records for image in record.images)


def test_the_example_of_five_formats_is_made_and_read(tmp_path, monkeypatch):
    (block,) = [block for block in blocks(ROOT / "docs/mixtures.md", "bash") if block.startswith("mkdir -p five")]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", block], cwd=tmp_path, env=environment, check=True, timeout=PATIENCE)
    monkeypatch.chdir(tmp_path)
    sources = parse(["--config-dir", "mine", "experiment=tiny/1_align", "data=five"]).config.data.sources
    opened = {name: open_source(name, source, max_image_pixels=10**6) for name, source in sources.items()}
    sizes = {"llava_ko": 120, "chat_en": 100, "captions_en": 152, "shards_ko": 90, "boxes_ko": 60}
    assert {name: len(source) for name, source in opened.items()} == sizes
    assert opened["captions_en"][0].messages[0].text in ("Describe the picture.", "What is shown?")
    assert "<bbox>" in opened["boxes_ko"][0].messages[1].text


def test_the_named_sets_of_the_documents_are_those_of_conf():
    text = (ROOT / "docs/mixtures.md").read_text(encoding="utf-8").partition("## Named sets")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*) \|", text, re.MULTILINE))
    files = sorted((ROOT / "conf/data/source").glob("*.yaml"))
    assert sorted(rows) == [file.stem for file in files]
    for file in files:
        (expected,) = re.findall(r"^  expected_records: (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert "verified" in rows[file.stem] or "name" in rows[file.stem] or rows[file.stem] == f"{int(expected):,}"
        assert (expected == "null") == (not re.fullmatch(r"[\d,]+", rows[file.stem])), file.stem


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_example_record_is_read(path, tmp_path):
    from PIL import Image

    for number, block in enumerate(blocks(path, "json")):
        folder = tmp_path / str(number)
        (folder / "coco").mkdir(parents=True)
        for name in ("red.png", "coco/000001.jpg"):
            Image.new("RGB", (84, 56), "red").save(folder / name)
        (folder / "record.json").write_text(f"[{block}]", encoding="utf-8")
        source = open_source("mine", SourceConfig(path=str(folder / "record.json")), max_image_pixels=10_000)
        assert source[0].images[0].load().size == (84, 56)


LIBRARY_EXAMPLES = [block for page in ("library.md", "qformer.md") for block in blocks(ROOT / "docs" / page, "python")]
NUM_FAST_EXAMPLES = len(blocks(ROOT / "docs" / "library.md", "python"))


@pytest.mark.parametrize(
    "number",
    [
        number if number < NUM_FAST_EXAMPLES else pytest.param(number, marks=pytest.mark.slow)
        for number in range(len(LIBRARY_EXAMPLES))
    ],
)
def test_the_examples_of_the_library_pages_run(number, tmp_path):
    (tmp_path / "library.py").write_text(LIBRARY_EXAMPLES[number], encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "library.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout


TORCHVISION = Path(sys.prefix) / "torchvision"  # make test puts it there
WITHOUT_CUDA = ROOT / "tests/outside/without_cuda"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "beside",
    [
        "nothing",
        pytest.param(
            "torchvision",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not TORCHVISION.is_dir(), reason="no .venv/torchvision; make test puts it there"),
            ],
        ),
    ],
)
def test_the_code_that_uses_the_result_runs_as_it_stands_with_plain_transformers(small_parts, tmp_path, beside):
    """The block of both READMEs, in the environment that `make setup` makes, and beside torchvision."""
    programs = {block for path in READMES for block in blocks(path, "python") if "from_pretrained" in block}
    (program,) = programs
    blueprint = blueprint_of(small_parts)
    folder = tmp_path / "runs/tiny/4_dpo/hf"
    folder.parent.mkdir(parents=True)
    export_model(build_model(blueprint), blueprint.tokenizer, blueprint.images, folder)
    (tmp_path / "my").mkdir()
    picture(56, 84).load().save(tmp_path / "my/red.png")
    ours = 'import sys\nassert not {name.split(".")[0] for name in sys.modules} & {"lit_vlm", "callbacks"}\n'
    seen = 'print("torchvision" in sys.modules)\n'
    (tmp_path / "block.py").write_text(program + ours + seen, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "block.py"], cwd=tmp_path, env=environment_beside(beside), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer, _, loaded = done.stdout.rstrip().rpartition("\n")
    assert answer and loaded == str(beside == "torchvision")


def environment_beside(what: str) -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    if what == "nothing":
        return environment
    environment["PYTHONPATH"] = str(TORCHVISION)
    if subprocess.run([sys.executable, "-c", "import torchvision"], env=environment, capture_output=True).returncode:
        environment["PYTHONPATH"] += f"{os.pathsep}{WITHOUT_CUDA}"
    return environment


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_the_quickstarts_tables_are_those_of_the_measured_figures(path):
    (block,) = BLOCK_OF_QUICKSTART.findall(path.read_text(encoding="utf-8"))
    assert block == render_tables(json.loads(RESULT.read_text(encoding="utf-8")))


def test_the_readme_begins_with_what_decides():
    first = READMES[0].read_text(encoding="utf-8").splitlines()[:40]
    text = "\n".join(first)
    assert "make quickstart" in text and "`align`" in text and "`dpo`" in text


def test_the_makefile_takes_the_versions_of_python_that_the_package_takes(repository):
    package = (repository / "pyproject.toml").read_text(encoding="utf-8")
    least, most = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', package).groups()
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    assert f"(3, {least}) <= sys.version_info < (3, {most})" in makefile
    assert f"Python 3.{least} to 3.{int(most) - 1} is needed" in makefile

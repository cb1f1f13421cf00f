"""A source of a user's own class: read, indexed and locked as the others; each fault of the class is one message."""

import pickle
import sys

import pytest
from PIL import Image
from source_cases import get_contents

from lit_vlm.config import parse
from lit_vlm.config.schema import ColumnsConfig, SourceConfig
from lit_vlm.data.index.build import build_index
from lit_vlm.data.sources import open_source
from lit_vlm.types import ImagePlaceholder, RecordError, UserError

MODULE = '''
from lit_vlm.types import Language, Message, Role, Sample, SampleKind


class Rows:
    """Rows of a known form."""

    def __init__(self, name, config):
        self.name, self.path, self.digest = name, config.path, "v1"

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"image": "a.png", "question": f"q{index}", "answer": "a"}


class Samples(Rows):
    def __getitem__(self, index):
        messages = Message(Role.user, ("q",)), Message(Role.assistant, (f"a{index}",))
        return Sample(str(index), self.name, f"here {index}", SampleKind.text, Language.en, messages)

    def origin(self, index):
        return f"here {index}"

    def digest_of(self, start, stop):
        return f"{start} {stop}"


class Fails(Rows):
    def __init__(self, name, config):
        raise RuntimeError("no connection\\nto the server")


class FailsInRecord(Rows):
    def __getitem__(self, index):
        return super().__getitem__(index) if index != 1 else 1 / 0


class Empty(Rows):
    def __len__(self):
        return 0


class NoDigest(Rows):
    def __init__(self, name, config):
        self.name = name


class Wrong(Rows):
    def __getitem__(self, index):
        return "text"


class NoLength:
    pass


class Arguments(Rows):
    def __init__(self, folder):
        pass


function = len
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    Image.new("RGB", (8, 4)).save(tmp_path / "a.png")
    (tmp_path / "own_sources.py").write_text(MODULE)
    (tmp_path / "broken_sources.py").write_text("raise KeyError('setup')")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("own_sources", "broken_sources"):
        sys.modules.pop(name, None)


def open_own(folder, name="own_sources.Rows", **options):
    return open_source("mine", SourceConfig(format=name, path=str(folder), **options), max_image_pixels=10**6)


def test_an_own_class_gives_rows_or_samples_and_is_indexed_as_other_sources(package, processor):
    source = open_own(package)
    assert get_contents(source[2]) == [(ImagePlaceholder(0), "q2"), ("a",)] and source[2].images[0].size == (4, 8)
    assert len(open_own(package, num_samples=2)) == 2
    renamed = open_own(package, columns=ColumnsConfig(question="answer", answer="question"))
    assert [text for (*_, text) in get_contents(renamed[0])] == ["a", "q0"]
    samples = open_own(package, "own_sources.Samples")
    assert samples.origin(1) == "here 1" and samples.digest_of(0, 2) != samples.digest_of(0, 3)
    assert pickle.loads(pickle.dumps(samples))[1] == samples[1]
    store = package / "index"
    index = build_index([samples], processor, store=store)
    assert len(index) == 3 and index.compute_digest() == build_index([samples], processor, store=store).compute_digest()


FAULTS = {
    "own_sources.Row": "data.sources.mine.format: own_sources.Row cannot be imported (module 'own_sources' has no",
    "no_such_package.Source": "no_such_package.Source cannot be imported (No module named 'no_such_package')",
    "broken_sources.Source": "broken_sources.Source cannot be imported (KeyError: 'setup')",
    "own_sources.function": "own_sources.function is not a class of sources, which has __len__",
    "own_sources.NoLength": "own_sources.NoLength is not a class of sources, which has __len__, __getitem__ and digest",
    "own_sources.Fails": "own_sources.Fails(name, config) raised RuntimeError: no connection. Correct the class.",
    "own_sources.Arguments": "It is made with the source's name and its settings, and nothing else",
    "own_sources.Empty": "its __len__ says 0; at least 1 record is needed",
    "own_sources.NoDigest": "its digest is AttributeError: 'NoDigest' object has no attribute 'digest'; a text is needed",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_class_that_is_no_source_gives_one_message(package, name):
    with pytest.raises(UserError) as caught:
        open_own(package, name)
    assert FAULTS[name] in str(caught.value) and "\n" not in str(caught.value)


def test_an_exception_of_an_own_class_is_the_error_of_its_record(package):
    source = open_own(package, "own_sources.FailsInRecord")
    with pytest.raises(
        RecordError, match=r"mine\[1\]: own_sources.FailsInRecord raised ZeroDivisionError: division by"
    ):
        source[1]
    assert source[2]
    with pytest.raises(RecordError, match="returned what is text; a Sample, a PreferencePair or a row"):
        open_own(package, "own_sources.Wrong")[0]


def test_formats_and_folders_of_images_are_checked_before_anything_is_read():
    words = ["experiment=tiny/2_sft", "data=auto", "init_from=null"]
    config = parse([*words, "data.sources.mine.format=my_package.Source"]).config
    assert config.data.sources["mine"].format == "my_package.Source"
    roots = parse([*words, "data.sources.mine.path=a", "data.sources.mine.image_root=[b,/c]"]).config
    assert roots.data.sources["mine"].image_root[1] == "/c" and roots.data.sources["mine"].image_root[0].endswith("/b")
    for setting, message in (
        ("format=lava", "found 'lava'; a format is one of auto, llava,"),
        ("format=lava", "Did you mean llava?"),
        ("format=a..b", "found 'a..b'; a format is one of"),
        ("image_root=[]", "expected a folder or a list of folders, found []"),
        ("image_root=[[a]]", "expected a folder or a list of folders, found [['a']]"),
        ("columns.imge=x", "Did you mean data.sources.mine.columns.image?"),
    ):
        with pytest.raises(UserError) as caught:
            parse([*words, "data.sources.mine.path=a", f"data.sources.mine.{setting}"])
        assert message in str(caught.value), str(caught.value)


@pytest.mark.parametrize("path", ["/d/{00000..00012}.tar", "/d/{a,b}.jsonl", "/d/*.parquet"])
def test_a_pattern_of_files_needs_no_quotes_for_hydra(path):
    words = ["experiment=tiny/2_sft", "data=auto", "init_from=null", f"data.sources.mine.path={path}"]
    assert parse(words).config.data.sources["mine"].path == path

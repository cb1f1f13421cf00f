"""The 500 files of `bad_images.py`: each bad one is reported with its fault, each odd one is read exactly, and other
images are not affected."""

import json
import os
import subprocess
import sys
import warnings

import bad_images
import numpy as np
import pytest
from image_bytes import encode, make_photo
from test_images import MAX_PIXELS, audit  # noqa: F401 - a fixture
from waiting import PATIENCE

from lit_vlm.config.choices import OnBadRecord
from lit_vlm.data.collate import collate
from lit_vlm.data.lazy_images import BytesImage, FileImage
from lit_vlm.data.quarantine import Quarantine
from lit_vlm.data.tiling import load_tiles
from lit_vlm.types import Fault, ImagePlaceholder, Language, Message, RecordError, Role, Sample, SampleKind

ONE_BY_HEADER = ("pixel_bombs", "web_pages", "other_formats", "empty", "no_files", "outside", "nowhere")

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    return folder / "images", bad_images.make(folder)


@pytest.fixture
def cases(corpus):
    """(root, cases). For the user root, files without permissions are left out, because root can read them."""
    root, every = corpus
    return root, [case for case in every if not (case.unless_root and os.geteuid() == 0)]


def open_image(root, number, case):
    return FileImage(case.path, root, f"train.jsonl:{number}", MAX_PIXELS)


def return_record_error(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function()
        except RecordError as error:
            return error


def test_there_are_twenty_classes_of_twenty_five_files(corpus):
    _, every = corpus
    assert len(bad_images.CLASSES) == 20 and len(every) == 500
    assert {case.expected for case in every} == {
        *(None, Fault.broken, Fault.too_large, Fault.not_an_image, Fault.empty),
        *(Fault.unreadable, Fault.outside, Fault.missing, Fault.url),
    }


def test_each_bad_file_is_reported_with_its_fault_and_none_is_read(cases, audit):  # noqa: F811
    root, chosen = cases
    wrong = []
    audit.clear()
    for number, case in enumerate(chosen):
        image = open_image(root, number, case)
        header, pixels = return_record_error(lambda image=image: image.size), return_record_error(image.load)
        if case.expected is None:
            continue
        verified = return_record_error(image.verify)
        named = isinstance(verified, RecordError) and (verified.fault, verified.reason) == (pixels.fault, pixels.reason)
        named = named and isinstance(pixels, RecordError) and pixels.fault is case.expected
        named = named and pixels.origin == f"train.jsonl:{number}" and "image" in pixels.reason
        # The header is valid or gives the same fault; for most classes the header is enough.
        by_header = isinstance(header, RecordError) and header.fault is case.expected
        if not named or isinstance(header, RecordError) != by_header or (case.kind in ONE_BY_HEADER and not by_header):
            wrong.append((case.path, case.expected, header, pixels))
    assert not wrong
    assert not [args for event, args in audit if event != "open"]  # no connection
    assert all(str(args[0]).startswith(f"{root}{os.sep}") for event, args in audit if isinstance(args[0], str))


def test_each_odd_but_good_file_is_read_exactly(cases):
    root, chosen = cases
    wrong, count = [], 0
    for number, case in enumerate(chosen):
        if case.expected is not None:
            continue
        count += 1
        image = open_image(root, number, case)
        pixels = np.asarray(image.load())
        if not image.size == image.verify() == pixels.shape[:2] or pixels.shape != case.reference.shape:
            wrong.append((case.path, image.size, pixels.shape, case.reference.shape))
        elif np.abs(pixels - case.reference.astype(float)).mean() > case.tolerance:
            wrong.append((case.path, np.abs(pixels - case.reference.astype(float)).mean()))
    assert count == 201 and not wrong


def test_other_images_are_unchanged_and_the_quarantine_lists_exactly_the_bad_ones(cases, processor, tmp_path):
    root, chosen = cases
    good = [BytesImage(encode(make_photo(seed), "PNG"), "good", MAX_PIXELS) for seed in range(200, 203)]
    alone = [load_tiles(image, processor.images) for image in good]
    quarantine = Quarantine()
    for number, case in enumerate(chosen):
        result = return_record_error(
            lambda case=case, number=number: load_tiles(open_image(root, number, case), processor.images)
        )
        if isinstance(result, RecordError):
            quarantine.add("mine", result)
        assert np.array_equal(load_tiles(good[number % 3], processor.images), alone[number % 3]), case.path
    quarantine.apply_policy(OnBadRecord.quarantine, 1.0, {"mine": len(chosen)}, tmp_path / "quarantine.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text("utf-8").splitlines()]
    expected = [(f"train.jsonl:{number}", case.expected) for number, case in enumerate(chosen) if case.expected]
    assert [(row["origin"], row["fault"]) for row in rows] == expected
    assert quarantine.count_by_source() == {"mine": len(expected)}
    assert sum(quarantine.count_by_fault()["mine"].values()) == len(expected)


def test_a_micro_batch_with_a_bad_image_reports_it_and_the_others_are_collated_without_it(corpus, processor):
    root, every = corpus

    def make_record(number, image):
        messages = (Message(Role.user, (ImagePlaceholder(0), "무엇?")), Message(Role.assistant, ("사진",)))
        return Sample(str(number), "mine", f"train.jsonl:{number}", SampleKind.other, Language.ko, messages, (image,))

    data = encode(make_photo(200), "PNG")
    good = [make_record(number, BytesImage(data, f"train.jsonl:{number}", MAX_PIXELS)) for number in (1000, 1001)]
    alone = collate(processor, good)
    for number, case in list(enumerate(every))[::12]:
        if case.expected and not case.unless_root:
            bad = make_record(number, open_image(root, number, case))
            with pytest.raises(RecordError) as caught:
                collate(processor, [good[0], bad, good[1]])
            assert caught.value.origin == bad.origin and caught.value.fault is case.expected
    again = collate(processor, good)
    assert np.array_equal(again.tiles, alone.tiles) and again.layouts == alone.layouts


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission_are_reported(corpus):
    root, every = corpus
    forbidden = [case for case in every if case.unless_root]
    for number, case in enumerate(forbidden):
        error = return_record_error(open_image(root, number, case).load)
        assert error.fault is Fault.unreadable and "Permission denied" in error.reason
    assert len(forbidden) == 4


PROGRAM = """
import json, sys, time, warnings
from pathlib import Path
from lit_vlm.data.lazy_images import FileImage
warnings.simplefilter("ignore")

def peak():
    return next(int(line.split()[1]) / 1000 for line in open("/proc/self/status") if line.startswith("VmHWM"))

root, paths, results = Path(sys.argv[1]), json.loads(sys.argv[2]), []
before = peak()
for path in paths:
    for use in (lambda image: image.size, lambda image: image.load()):
        began, fault = time.process_time(), None
        try:
            use(FileImage(path, root, "x", 64_000_000))
        except Exception as error:
            fault = error.fault
        results.append((path, fault, time.process_time() - began))
print(json.dumps([peak() - before, results]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of a process's memory is read from /proc")
def test_fifty_bombs_cost_less_than_a_second_each_and_300_megabytes_together(corpus, repository):
    root, every = corpus
    bombs = {case.path: case for case in every if case.kind.endswith("_bombs")}
    command = [sys.executable, "-c", PROGRAM, str(root), json.dumps(list(bombs))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    megabytes, results = json.loads(done.stdout)
    assert len(bombs) == 50 and len(results) == 100
    assert megabytes < 300
    assert max(seconds for _, _, seconds in results) < 1.0
    assert all(fault in (None, bombs[path].expected) for path, fault, _ in results)
    assert all(fault is not None for _, fault, _ in results[1::2])  # at the latest when the pixels are read

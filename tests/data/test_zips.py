"""Hostile and damaged zip files: each bad member is refused by name, and its good neighbours stay usable."""

import io
import os
import random
import stat
import struct
import zipfile
import zlib

import pytest
from delivery import RawName, decompose, label, make_pair, make_zip, open_mapped, picture
from PIL import Image

from lit_vlm.data import decoding
from lit_vlm.data.readers import zip_members
from lit_vlm.data.readers.file_catalogue import IMAGE_PATTERNS, FileCatalogue
from lit_vlm.data.readers.zip_members import ZipMemberStream, iter_members
from lit_vlm.types import Fault, RecordError, UserError


def read_members(path):
    return {member.name: member for member in iter_members(path)}


def get_fault(path, name):
    with pytest.raises(RecordError) as caught:
        read_members(path)[name].read("here")
    assert str(caught.value).startswith("here: ") and path.name in str(caught.value)
    return caught.value.fault


def make_noise(size=100_000):
    return random.Random(0).randbytes(size)


@pytest.mark.parametrize("encoding", ["cp949", "utf-8", None])
@pytest.mark.parametrize("compress", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_of_all_name_encodings_are_read(tmp_path, encoding, compress):
    path = make_zip(
        tmp_path / "a.zip", [("라벨/사과 1.json", b"x" * 70_000), ("b", b""), ("c", make_noise())], encoding, compress
    )
    assert [member.name for member in iter_members(path)] == ["라벨/사과 1.json", "b", "c"]
    assert [member.read("") for member in iter_members(path)] == [b"x" * 70_000, b"", make_noise()]


def test_decomposed_and_backslash_names_are_normalised(tmp_path):
    path = make_zip(tmp_path / "a.zip", [(decompose("사과"), b"1"), ("나\\다", b"2")], "utf-8")
    assert list(read_members(path)) == ["사과", "나/다"]


def test_reading_a_header_reads_only_a_part_of_the_image(tmp_path):
    data = io.BytesIO()
    Image.frombytes("RGB", (1000, 1000), make_noise(3_000_000)).save(data, "PNG")
    path = make_zip(tmp_path / "a.zip", [("a.png", data.getvalue())])
    image = FileCatalogue(tmp_path, IMAGE_PATTERNS).make_image(0, "here", 10**7)
    with read_members(path)["a.png"].open("here") as stream, Image.open(stream) as opened:
        assert opened.size == image.size == (1000, 1000)
        assert len(stream._data) < 300_000 < len(data.getvalue())
    assert image.load().tobytes() == make_noise(3_000_000)


@pytest.mark.parametrize("name", ["../a.json", "/etc/a.json", "a/../../b.json", "C:\\a.json", "..\\a.json"])
def test_a_name_that_leads_out_of_the_archive_is_hostile(tmp_path, name):
    make_zip(tmp_path / "l.zip", [(name, label({"answer": "1"})), ("good.json", label({"answer": "2"}))])
    make_zip(tmp_path / "s.zip", [("good.jpg", picture())])
    source = open_mapped(tmp_path, image="good.jpg")
    assert [source[index].messages[1].text for index in range(2) if "good" in source.origin(index)] == ["2"]
    bad = next(index for index in range(2) if "good" not in source.origin(index))
    with pytest.raises(RecordError, match="leads out of the archive") as caught:
        source[bad]
    assert caught.value.fault is Fault.hostile


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_are_hostile(tmp_path, mode):
    entry = zipfile.ZipInfo("a.jpg")
    entry.create_system, entry.external_attr = 3, (mode | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    assert get_fault(tmp_path / "a.zip", "a.jpg") is Fault.hostile


def test_an_encrypted_member_is_reported(tmp_path):
    path = make_zip(tmp_path / "a.zip", [("a", b"secret"), ("b", b"open")])
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert get_fault(path, "a") is Fault.unreadable and read_members(path)["b"].read("") == b"open"


def test_an_unsupported_compression_method_is_reported(tmp_path):
    path = make_zip(tmp_path / "a.zip", [("a", b"x" * 100)], compress=zipfile.ZIP_LZMA)
    assert get_fault(path, "a") is Fault.unreadable


def test_members_that_claim_too_much_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "a.zip", [("a", bytes(3_000_000)), ("b", make_noise(3000))])
    monkeypatch.setattr(zip_members, "MAX_COMPRESSION_RATIO", 100)
    assert get_fault(path, "a") is Fault.hostile and len(read_members(path)["b"].read("")) == 3000
    monkeypatch.setattr(zip_members, "MAX_COMPRESSION_RATIO", 2000)
    monkeypatch.setattr(zip_members, "MAX_FILE_BYTES", 1_000_000)
    assert get_fault(path, "a") is Fault.too_large and decoding.MAX_FILE_BYTES == 200_000_000


@pytest.mark.parametrize(("claim", "fault"), [(1000, Fault.hostile), (20_000_001, Fault.broken)])
def test_a_wrong_size_is_detected(tmp_path, claim, fault):
    path = make_zip(tmp_path / "a.zip", [("a", bytes(20_000_000))])
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + 24
    data[at : at + 4] = struct.pack("<I", claim)
    path.write_bytes(data)
    assert get_fault(path, "a") is fault


def test_a_decompression_bomb_is_not_unpacked_beyond_its_claimed_size(tmp_path):
    path = make_zip(tmp_path / "a.zip", [("a.jpg", bytes(50_000_000))])
    member = read_members(path)["a.jpg"]
    stream = ZipMemberStream(
        zip_members.ZipMember(path, "a.jpg", member.offset, member.compressed_size, 100_000, member.crc), "here"
    )
    with pytest.raises(RecordError, match="more than the 100,000 bytes"):
        stream.read()
    assert len(stream._data) <= 100_001
    image = zip_members.ZipImage(
        zip_members.ZipMember(path, "a.jpg", member.offset, member.compressed_size, 10, member.crc), "here", 10**6
    )
    for look in (lambda: image.size, image.load):
        with pytest.raises(RecordError) as caught:
            look()
        assert caught.value.fault is Fault.hostile


def test_a_flipped_bit_is_detected_by_the_checksum(tmp_path):
    path = make_zip(tmp_path / "a.zip", [("a", make_noise())], compress=zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    assert get_fault(path, "a") is Fault.broken


def test_a_duplicate_member_of_an_archive_is_hostile(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = make_zip(tmp_path / "a.zip", [("a", b"1"), ("a", b"2"), ("b", b"3")])
    assert get_fault(path, "a") is Fault.hostile and read_members(path)["b"].read("") == b"3"


def test_a_header_with_another_name_is_hostile(tmp_path):
    path = make_zip(tmp_path / "a.zip", [("aaaa", b"1")])
    path.write_bytes(path.read_bytes().replace(b"aaaa", b"bbbb", 1))
    assert get_fault(path, "aaaa") is Fault.hostile


def test_nested_zips_are_refused_by_name(tmp_path):
    inner = make_zip(tmp_path / "inner" / "구이.zip", [("a.jpg", picture())])
    make_zip(tmp_path / "kfood.zip", [("구이.zip", inner.read_bytes())], "cp949")
    with pytest.raises(UserError, match=r"kfood\.zip: holds zip files itself \(구이\.zip\)\. Unpack it once"):
        open_mapped(tmp_path, labels=None)


@pytest.mark.parametrize("keep", [0, 10, 200, -10])
def test_a_truncated_archive_is_refused_by_name(tmp_path, keep):
    make_pair(tmp_path, {"answer": "1"})
    path = tmp_path / "TS_1.zip"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"TS_1\.zip: cannot be opened as a zip file.*download it again"):
        open_mapped(tmp_path)


def test_parts_of_zips_that_were_not_joined_are_reported(tmp_path):
    (tmp_path / "TL_1.zip.part0").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"parts of zip files \(TL_1\.zip\.part0, \.\.\.\)\. Put them together: cat"):
        open_mapped(tmp_path)


def test_an_image_in_a_zip_is_checked_like_a_file(tmp_path):
    bad = {
        "html.jpg": b"<html>",
        "empty.jpg": b"",
        "torn.jpg": picture(300, 300)[:700],
        "large.png": picture(3000, 3000, "PNG"),
    }
    make_zip(tmp_path / "s.zip", [("good.jpg", picture()), *bad.items()])
    catalogue = FileCatalogue(tmp_path, IMAGE_PATTERNS)
    found = {}
    for file in range(len(catalogue)):
        try:
            catalogue.make_image(file, "here", 1_000_000).load()
        except RecordError as error:
            assert f"s.zip/{catalogue.get_path(file)}" in str(error)
            found[catalogue.get_path(file)] = error.fault
    assert found == {
        "html.jpg": Fault.not_an_image,
        "empty.jpg": Fault.empty,
        "torn.jpg": Fault.broken,
        "large.png": Fault.too_large,
    }


def test_labels_that_are_links_are_not_followed(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_bytes(label({"answer": "secret"}))
    folder = tmp_path / "data"
    make_pair(folder, {"answer": "1"})
    os.symlink(secret, folder / "z.json")
    source = open_mapped(folder)
    with pytest.raises(RecordError, match=r"'z\.json' is a link") as caught:
        source[1]
    assert len(source) == 2 and caught.value.fault is Fault.hostile


def test_random_damage_raises_no_foreign_exception(tmp_path):
    """Changed bytes give a UserError, a RecordError or data with the right checksum, never another exception."""
    path = make_zip(tmp_path / "a.zip", [("가.json", b"{}" * 500), ("b.jpg", picture())], "cp949")
    whole, generator = path.read_bytes(), random.Random(1)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data)
        try:
            for member in iter_members(path):
                assert zlib.crc32(member.read("here")) == member.crc
        except (UserError, RecordError):
            continue


def test_raw_names_are_written_as_the_tests_expect(tmp_path):
    path = make_zip(tmp_path / "a.zip", [("가", b"")], "cp949")
    assert "가".encode("cp949") in path.read_bytes() and not zipfile.ZipFile(path).infolist()[0].flag_bits & 0x800
    assert issubclass(RawName, zipfile.ZipInfo)

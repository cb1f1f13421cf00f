"""Fifty hostile or broken tar files, each between two good samples, and the error expected for each."""

import io
import pickle
import tarfile
from dataclasses import dataclass, field

from lit_vlm.types import Fault

CANARY = "/tmp/lit-vlm-hostile-tar-canary"  # created only if a member was executed
NFD = "\u1112\u1161\u11ab"


class Payload:
    def __reduce__(self):
        return (open, (CANARY, "w"))


PICKLE = pickle.dumps(Payload())
SCRIPT = f"#!/bin/sh\ntouch {CANARY}\n".encode()


def make_member(name, data=b"", *, kind=tarfile.REGTYPE, link="", pax=None, form=tarfile.PAX_FORMAT, size=None):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, link, pax or {}
    info.size = len(data) if size is None else size
    return info.tobuf(form, "utf-8", "surrogateescape") + data + b"\0" * (-len(data) % 512)


def edit_header(block, at, data, checksum=True):
    """Replace bytes of a header and correct its checksum."""
    head = bytearray(block[:512])
    head[at : at + len(data)] = data
    if checksum:
        head[148:156] = b" " * 8
        head[148:156] = f"{sum(head):06o}\0 ".encode()
    return bytes(head) + block[512:]


def make_raw_name(name, data=b"x"):
    return edit_header(make_member("m.txt", data), 0, name.ljust(100, b"\0"))


def make_pax_block(records, kind=tarfile.XHDTYPE):
    return make_member("PaxHeader", records, kind=kind, form=tarfile.USTAR_FORMAT)


def make_pax_record(key, value):
    body = f" {key}={value}\n".encode()
    size = len(body)
    while len(str(size).encode() + body) != size:
        size = len(str(size).encode() + body)
    return str(size).encode() + body


def make_inner_tar():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../x.sh"))
    return stream.getvalue()


@dataclass
class HostileArchive:
    """Hostile archive: `body` comes between the good samples a and z; `lost`: whether z cannot be reached after it.

    `cut`: 0 omits the end mark, -1 replaces z by half a header, a lower number removes that many bytes.
    """

    body: bytes
    words: str
    fault: Fault = Fault.hostile
    lost: bool = False
    cut: int | None = None
    extra: bytes = field(default=b"")  # after the end of the archive


LINKS = [tarfile.SYMTYPE, tarfile.LNKTYPE]
CASES = {
    "pickle": HostileArchive(make_member("m.txt", b"t") + make_member("m.pyd", PICKLE), "ends in '.pyd'"),
    "symlink_out": HostileArchive(make_member("m.txt", kind=tarfile.SYMTYPE, link="/etc/hostname"), "is a symbolic link"),
    "parent": HostileArchive(make_member("../../etc/m.txt", b"t"), "leads out of the archive"),
    "absolute": HostileArchive(make_member("/etc/m.txt", b"t"), "leads out of the archive"),
    "pipe": HostileArchive(make_member("pipe:touch x.txt", b"t"), "a backslash, a drive or a scheme"),
    "pax_rename": HostileArchive(
        make_pax_block(make_pax_record("path", "../../etc/m.txt")) + make_member("m.txt", b"t"), "is renamed by an extended header"
    ),
    "duplicate": HostileArchive(make_member("m.txt", b"t") + make_member("m.txt", b"u"), "is in the archive twice"),
    "size_beyond_the_end": HostileArchive(
        edit_header(make_member("m.txt", b"t"), 124, b"77777777777\0"), "the archive ends before", Fault.broken, lost=True
    ),
    "checksum": HostileArchive(
        edit_header(make_member("m.txt", b"t"), 0, b"n", checksum=False), "no member's header is there", Fault.malformed, lost=True
    ),
    "cut_in_a_header": HostileArchive(make_member("m.txt", b"t"), "ends within a header", Fault.broken, lost=True, cut=-1),
    # The rest is marked slow.
    "pickle_alone": HostileArchive(make_member("m.pickle", PICKLE), "ends in '.pickle'"),
    "pth": HostileArchive(make_member("m.pth", PICKLE), "ends in '.pth'"),
    "npy": HostileArchive(make_member("m.npy", b"\x93NUMPY"), "ends in '.npy'"),
    "py": HostileArchive(make_member("m.py", b"open(1)"), "ends in '.py'"),
    "sh": HostileArchive(make_member("m.sh", SCRIPT), "ends in '.sh'"),
    "exe_behind_a_picture": HostileArchive(make_member("m.jpg.exe", b"MZ"), "ends in '.jpg.exe'"),
    "no_extension": HostileArchive(make_member("m", b"t"), "ends in '.'"),
    "dotfile": HostileArchive(make_member("folder/.txt", b"t"), "has no key", Fault.malformed),
    "nested_tar": HostileArchive(make_member("m.tar", make_inner_tar()), "ends in '.tar'"),
    "gzipped_json": HostileArchive(make_member("m.json.gz", b"\x1f\x8b"), "ends in '.json.gz'"),
    "hard_link": HostileArchive(make_member("m.txt", kind=tarfile.LNKTYPE, link="a.txt"), "is a hard link"),
    "hard_link_out": HostileArchive(make_member("m.txt", kind=tarfile.LNKTYPE, link="/etc/passwd"), "is a hard link"),
    "symlink_inside": HostileArchive(make_member("m.txt", kind=tarfile.SYMTYPE, link="a.txt"), "is a symbolic link"),
    "symlink_loop": HostileArchive(make_member("m.txt", kind=tarfile.SYMTYPE, link="m.txt"), "is a symbolic link"),
    "symlink_then_file_through_it": HostileArchive(
        make_member("m.d", kind=tarfile.SYMTYPE, link="/tmp") + make_member("m.d/../x.txt", b"t"), "is a symbolic link"
    ),
    "fifo": HostileArchive(make_member("m.txt", kind=tarfile.FIFOTYPE), "is a named pipe"),
    "character_device": HostileArchive(make_member("m.txt", kind=tarfile.CHRTYPE), "is a device"),
    "block_device": HostileArchive(make_member("m.txt", kind=tarfile.BLKTYPE), "is a device"),
    "sparse": HostileArchive(make_member("m.txt", b"t", kind=tarfile.GNUTYPE_SPARSE), "is a sparse file"),
    "pax_sparse": HostileArchive(make_member("m.txt", b"t", pax={"GNU.sparse.major": "1"}), "is a sparse file"),
    "unknown_type": HostileArchive(make_member("m.txt", b"t", kind=b"Q"), "is of the unknown type b'Q'"),
    "volume_label": HostileArchive(make_member("m.txt", kind=b"V"), "is of the unknown type b'V'"),
    "parent_inside": HostileArchive(make_member("x/../../m.txt", b"t"), "leads out of the archive"),
    "parent_folder": HostileArchive(make_member("../m", kind=tarfile.DIRTYPE), "leads out of the archive"),
    "backslashes": HostileArchive(make_member("..\\..\\m.txt", b"t"), "a backslash, a drive or a scheme"),
    "drive": HostileArchive(make_member("C:m.txt", b"t"), "a backslash, a drive or a scheme"),
    "url_name": HostileArchive(make_member("http://x/m.txt", b"t"), "a backslash, a drive or a scheme"),
    "nul": HostileArchive(make_raw_name(b"m.txt\0../../etc/x"), "has a NUL within its name"),
    "nul_by_pax": HostileArchive(make_member("m.txt", b"t", pax={"path": "m.txt\0x"}), "is renamed"),
    "line_break": HostileArchive(make_member("m\nx.txt", b"t"), "control characters"),
    "not_utf8": HostileArchive(make_raw_name("한.txt".encode("cp949")), "is no UTF-8"),
    "no_name": HostileArchive(make_raw_name(b""), "has no name"),
    "gnu_rename": HostileArchive(
        make_member("././@LongLink", b"../../etc/m.txt\0", kind=tarfile.GNUTYPE_LONGNAME, form=tarfile.GNU_FORMAT)
        + make_member("m.txt", b"t"),
        "is renamed by an extended header",
    ),
    "pax_resize": HostileArchive(make_member("m.txt", b"t" * 600, pax={"size": "3"}), "changes its size", lost=False),
    "pax_link": HostileArchive(make_member("m.txt", b"t", pax={"linkpath": "/etc/passwd"}), "changes its linkpath"),
    "pax_global_rename": HostileArchive(
        make_pax_block(make_pax_record("path", "../m.txt"), tarfile.XGLTYPE), "rename or resize all members after it"
    ),
    "pax_nonsense": HostileArchive(make_pax_block(b"99999 path=x\n"), "cannot be parsed", lost=True),
    "pax_huge": HostileArchive(
        edit_header(make_pax_block(b""), 124, b"00000777777\0"), "an extended header of 262,143 bytes", lost=True
    ),
    "pax_chain": HostileArchive(make_pax_block(make_pax_record("mtime", "1")) * 40, "more than 16 extended headers", lost=True),
    "negative_size": HostileArchive(
        edit_header(make_member("m.txt", b"t"), 124, b"\xff" * 12), "its size is below zero", lost=True
    ),
    "size_that_is_no_number": HostileArchive(
        edit_header(make_member("m.txt", b"t"), 124, b"zzzzzzzzzzz\0"), "no member's header is there", Fault.malformed, lost=True
    ),
    "size_too_small": HostileArchive(
        edit_header(make_member("m.txt", b"t" * 2000), 124, b"00000000001\0"),
        "no member's header is there",
        Fault.malformed,
        lost=True,
    ),
    "many_members": HostileArchive(b"".join(make_member(f"m.{i}.png", b"x") for i in range(300)), "more than 256 members"),
    "joined_archives": HostileArchive(b"", "bytes follow the archive's end", extra=make_member("m.txt", b"t")),
    "cut_in_a_member": HostileArchive(make_member("m.txt", b"t" * 5000), "ends before", Fault.broken, lost=True, cut=-3000),
    "no_end_mark": HostileArchive(b"", "without its end mark", Fault.broken, cut=0),
    "caption_alone": HostileArchive(make_member("m.txt", b"t"), "no image beside it", Fault.placeholders),
    "not_json": HostileArchive(make_member("m.json", b"{"), "not JSON", Fault.malformed),
    "two_captions": HostileArchive(make_member("m.txt", b"t") + make_member("m.en.txt", b"t"), "2 .txt members", Fault.malformed),
}  # fmt: skip


def build_archive(case: HostileArchive, picture: bytes) -> bytes:
    """Build an archive: sample a, the hostile members, sample z, and the end mark."""
    head = make_member("a.jpg", picture) + make_member("a.txt", "앞".encode())
    tail = make_member("z.jpg", picture) + make_member("z.txt", "뒤".encode())
    if case.cut is None:
        return head + case.body + tail + b"\0" * 1024 + case.extra
    if case.cut == 0:
        return head + case.body + tail
    whole = head + case.body
    return whole[: case.cut] if case.cut < -1 else whole + b"\0x" * 100

"""Fifty tar files that mean harm or are broken, each between two good samples; and what is said about them."""

import io
import pickle
import tarfile
from dataclasses import dataclass, field

from lit_vlm.types import Fault

CANARY = "/tmp/lit-vlm-hostile-tar-canary"  # made only by a member that was executed
NFD = "\u1112\u1161\u11ab"


class Payload:
    def __reduce__(self):
        return (open, (CANARY, "w"))


PICKLE = pickle.dumps(Payload())
SCRIPT = f"#!/bin/sh\ntouch {CANARY}\n".encode()


def member(name, data=b"", *, kind=tarfile.REGTYPE, link="", pax=None, form=tarfile.PAX_FORMAT, size=None):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, link, pax or {}
    info.size = len(data) if size is None else size
    return info.tobuf(form, "utf-8", "surrogateescape") + data + b"\0" * (-len(data) % 512)


def edited(block, at, data, checksum=True):
    """A header with other bytes, its checksum made right again."""
    head = bytearray(block[:512])
    head[at : at + len(data)] = data
    if checksum:
        head[148:156] = b" " * 8
        head[148:156] = f"{sum(head):06o}\0 ".encode()
    return bytes(head) + block[512:]


def raw_name(name, data=b"x"):
    return edited(member("m.txt", data), 0, name.ljust(100, b"\0"))


def pax_block(records, kind=tarfile.XHDTYPE):
    return member("PaxHeader", records, kind=kind, form=tarfile.USTAR_FORMAT)


def record(key, value):
    body = f" {key}={value}\n".encode()
    size = len(body)
    while len(str(size).encode() + body) != size:
        size = len(str(size).encode() + body)
    return str(size).encode() + body


def inner_tar():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../x.sh"))
    return stream.getvalue()


@dataclass
class Hostile:
    """`body` comes between the good samples a and z; `lost`: whether z cannot be reached behind it.

    `cut`: 0 leaves the end mark out, -1 puts half a header in the place of z, less takes so many bytes away.
    """

    body: bytes
    words: str
    fault: Fault = Fault.hostile
    lost: bool = False
    cut: int | None = None
    extra: bytes = field(default=b"")  # behind the archive's end


LINKS = [tarfile.SYMTYPE, tarfile.LNKTYPE]
CASES = {
    "pickle": Hostile(member("m.txt", b"t") + member("m.pyd", PICKLE), "ends in '.pyd'"),
    "symlink_out": Hostile(member("m.txt", kind=tarfile.SYMTYPE, link="/etc/hostname"), "is a symbolic link"),
    "parent": Hostile(member("../../etc/m.txt", b"t"), "leads out of the archive"),
    "absolute": Hostile(member("/etc/m.txt", b"t"), "leads out of the archive"),
    "pipe": Hostile(member("pipe:touch x.txt", b"t"), "a backslash, a drive or a scheme"),
    "pax_rename": Hostile(
        pax_block(record("path", "../../etc/m.txt")) + member("m.txt", b"t"), "is renamed by an extended header"
    ),
    "duplicate": Hostile(member("m.txt", b"t") + member("m.txt", b"u"), "is in the archive twice"),
    "size_beyond_the_end": Hostile(
        edited(member("m.txt", b"t"), 124, b"77777777777\0"), "the archive ends before", Fault.broken, lost=True
    ),
    "checksum": Hostile(
        edited(member("m.txt", b"t"), 0, b"n", checksum=False), "no member's header is there", Fault.malformed, lost=True
    ),
    "cut_in_a_header": Hostile(member("m.txt", b"t"), "ends within a header", Fault.broken, lost=True, cut=-1),
    # The rest runs in the long lane.
    "pickle_alone": Hostile(member("m.pickle", PICKLE), "ends in '.pickle'"),
    "pth": Hostile(member("m.pth", PICKLE), "ends in '.pth'"),
    "npy": Hostile(member("m.npy", b"\x93NUMPY"), "ends in '.npy'"),
    "py": Hostile(member("m.py", b"open(1)"), "ends in '.py'"),
    "sh": Hostile(member("m.sh", SCRIPT), "ends in '.sh'"),
    "exe_behind_a_picture": Hostile(member("m.jpg.exe", b"MZ"), "ends in '.jpg.exe'"),
    "no_extension": Hostile(member("m", b"t"), "ends in '.'"),
    "dotfile": Hostile(member("folder/.txt", b"t"), "has no key", Fault.malformed),
    "nested_tar": Hostile(member("m.tar", inner_tar()), "ends in '.tar'"),
    "gzipped_json": Hostile(member("m.json.gz", b"\x1f\x8b"), "ends in '.json.gz'"),
    "hard_link": Hostile(member("m.txt", kind=tarfile.LNKTYPE, link="a.txt"), "is a hard link"),
    "hard_link_out": Hostile(member("m.txt", kind=tarfile.LNKTYPE, link="/etc/passwd"), "is a hard link"),
    "symlink_inside": Hostile(member("m.txt", kind=tarfile.SYMTYPE, link="a.txt"), "is a symbolic link"),
    "symlink_loop": Hostile(member("m.txt", kind=tarfile.SYMTYPE, link="m.txt"), "is a symbolic link"),
    "symlink_then_file_through_it": Hostile(
        member("m.d", kind=tarfile.SYMTYPE, link="/tmp") + member("m.d/../x.txt", b"t"), "is a symbolic link"
    ),
    "fifo": Hostile(member("m.txt", kind=tarfile.FIFOTYPE), "is a named pipe"),
    "character_device": Hostile(member("m.txt", kind=tarfile.CHRTYPE), "is a device"),
    "block_device": Hostile(member("m.txt", kind=tarfile.BLKTYPE), "is a device"),
    "sparse": Hostile(member("m.txt", b"t", kind=tarfile.GNUTYPE_SPARSE), "is a sparse file"),
    "pax_sparse": Hostile(member("m.txt", b"t", pax={"GNU.sparse.major": "1"}), "is a sparse file"),
    "unknown_type": Hostile(member("m.txt", b"t", kind=b"Q"), "is of the unknown type b'Q'"),
    "volume_label": Hostile(member("m.txt", kind=b"V"), "is of the unknown type b'V'"),
    "parent_inside": Hostile(member("x/../../m.txt", b"t"), "leads out of the archive"),
    "parent_folder": Hostile(member("../m", kind=tarfile.DIRTYPE), "leads out of the archive"),
    "backslashes": Hostile(member("..\\..\\m.txt", b"t"), "a backslash, a drive or a scheme"),
    "drive": Hostile(member("C:m.txt", b"t"), "a backslash, a drive or a scheme"),
    "url_name": Hostile(member("http://x/m.txt", b"t"), "a backslash, a drive or a scheme"),
    "nul": Hostile(raw_name(b"m.txt\0../../etc/x"), "has a NUL within its name"),
    "nul_by_pax": Hostile(member("m.txt", b"t", pax={"path": "m.txt\0x"}), "is renamed"),
    "line_break": Hostile(member("m\nx.txt", b"t"), "control characters"),
    "not_utf8": Hostile(raw_name("한.txt".encode("cp949")), "is no UTF-8"),
    "no_name": Hostile(raw_name(b""), "has no name"),
    "gnu_rename": Hostile(
        member("././@LongLink", b"../../etc/m.txt\0", kind=tarfile.GNUTYPE_LONGNAME, form=tarfile.GNU_FORMAT)
        + member("m.txt", b"t"),
        "is renamed by an extended header",
    ),
    "pax_resize": Hostile(member("m.txt", b"t" * 600, pax={"size": "3"}), "changes its size", lost=False),
    "pax_link": Hostile(member("m.txt", b"t", pax={"linkpath": "/etc/passwd"}), "changes its linkpath"),
    "pax_global_rename": Hostile(
        pax_block(record("path", "../m.txt"), tarfile.XGLTYPE), "rename or resize all members after it"
    ),
    "pax_nonsense": Hostile(pax_block(b"99999 path=x\n"), "cannot be parsed", lost=True),
    "pax_huge": Hostile(
        edited(pax_block(b""), 124, b"00000777777\0"), "an extended header of 262,143 bytes", lost=True
    ),
    "pax_chain": Hostile(pax_block(record("mtime", "1")) * 40, "more than 16 extended headers", lost=True),
    "negative_size": Hostile(
        edited(member("m.txt", b"t"), 124, b"\xff" * 12), "its size is below zero", lost=True
    ),
    "size_that_is_no_number": Hostile(
        edited(member("m.txt", b"t"), 124, b"zzzzzzzzzzz\0"), "no member's header is there", Fault.malformed, lost=True
    ),
    "size_too_small": Hostile(
        edited(member("m.txt", b"t" * 2000), 124, b"00000000001\0"),
        "no member's header is there",
        Fault.malformed,
        lost=True,
    ),
    "many_members": Hostile(b"".join(member(f"m.{i}.png", b"x") for i in range(300)), "more than 256 members"),
    "joined_archives": Hostile(b"", "bytes follow the archive's end", extra=member("m.txt", b"t")),
    "cut_in_a_member": Hostile(member("m.txt", b"t" * 5000), "ends before", Fault.broken, lost=True, cut=-3000),
    "no_end_mark": Hostile(b"", "without its end mark", Fault.broken, cut=0),
    "caption_alone": Hostile(member("m.txt", b"t"), "no image beside it", Fault.placeholders),
    "not_json": Hostile(member("m.json", b"{"), "not JSON", Fault.malformed),
    "two_captions": Hostile(member("m.txt", b"t") + member("m.en.txt", b"t"), "2 .txt members", Fault.malformed),
}  # fmt: skip


def archive(case: Hostile, picture: bytes) -> bytes:
    """Sample a, the hostile members, sample z, and the end mark."""
    head = member("a.jpg", picture) + member("a.txt", "앞".encode())
    tail = member("z.jpg", picture) + member("z.txt", "뒤".encode())
    if case.cut is None:
        return head + case.body + tail + b"\0" * 1024 + case.extra
    if case.cut == 0:
        return head + case.body + tail
    whole = head + case.body
    return whole[: case.cut] if case.cut < -1 else whole + b"\0x" * 100

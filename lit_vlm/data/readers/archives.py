"""Directory of a zip file: its members, and the checks that refuse some of them.

The standard library reads the directory; its objects are released once their numbers are known. A name without the UTF-8
flag is CP949, as Korean Windows writes it, unless it is valid UTF-8, as macOS writes it.
"""

from __future__ import annotations

import stat
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lit_vlm.data.decoding import MAX_FILE_BYTES, describe_error
from lit_vlm.data.readers.zips import UTF8_FLAG, ZipMember, ZipMemberFlaw, decode_name
from lit_vlm.types import UserError

MAX_COMPRESSION_RATIO = 1100  # limit against zip bombs; deflate expands one byte to at most 1032
_ENCRYPTED_FLAG = 0x1


def iter_members(archive: Path) -> Iterator[ZipMember]:
    """Iterate over the files of a zip, in the order of its directory.

    Raises:
        UserError: it is no zip, or holds zips itself.
    """
    try:
        with zipfile.ZipFile(archive) as directory:
            entries = [entry for entry in directory.infolist() if not entry.is_dir()]
    except (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        reason = f"{archive}: cannot be opened as a zip file: {describe_error(error)}"
        raise UserError(f"{reason}. It may be cut off; download it again, or take it away.") from error
    names = [_decode_entry_name(entry) for entry in entries]
    counts = Counter(names)
    if nested_zips := sorted(name for name in counts if name.lower().endswith(".zip")):
        found = ", ".join(nested_zips[:3]) + (", ..." if len(nested_zips) > 3 else "")
        raise UserError(
            f"{archive}: holds zip files itself ({found}). Unpack it once; zips inside zips are not opened."
        )
    for entry, name in zip(entries, names, strict=True):
        flaw = ZipMemberFlaw.duplicate if counts[name] > 1 else _find_flaw(entry, name)
        yield ZipMember(archive, name, entry.header_offset, entry.compress_size, entry.file_size, entry.CRC, flaw)


def _decode_entry_name(entry: zipfile.ZipInfo) -> str:
    # The library reads a name without the UTF-8 flag as CP437, which keeps every byte. Its own `metadata_encoding`
    # applies to a whole archive, and fails at the first name of another encoding.
    raw = entry.orig_filename.encode("utf-8" if entry.flag_bits & UTF8_FLAG else "cp437")
    return decode_name(raw, entry.flag_bits)


def _find_flaw(entry: zipfile.ZipInfo, name: str) -> ZipMemberFlaw:
    mode = entry.external_attr >> 16
    if entry.flag_bits & _ENCRYPTED_FLAG:
        return ZipMemberFlaw.encrypted
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return ZipMemberFlaw.link
    if name.startswith("/") or ".." in PurePosixPath(name).parts or name[1:2] == ":" or "\0" in name:
        return ZipMemberFlaw.elsewhere
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return ZipMemberFlaw.method
    if entry.file_size > MAX_FILE_BYTES:
        return ZipMemberFlaw.too_large
    if entry.file_size > MAX_COMPRESSION_RATIO * max(1, entry.compress_size):
        return ZipMemberFlaw.ratio
    return ZipMemberFlaw.none

"""Checksums that checkpoint files carry, and the check of a file before anything in it is loaded.

A .pth is a zip archive, whose entries have checksums that torch doesn't check. What these don't
cover, such as padding and headers, is covered by one of the whole file, in the archive's comment. A
.safetensors has one in its metadata, if this project wrote it since there are checksums.
"""

import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

import torch

CHUNK = 1 << 22  # bytes read at a time
MAX_HEADER = 100_000_000  # bytes of a .safetensors file's header; the library's own limit
ABOUT = "mae"  # the entry of a .safetensors file's metadata that says what the weights are
CHECKSUM = "mae_checksum"  # the entry beside it
# Another, so that no flipped bit makes a file look like one without a checksum.
HAS_CHECKSUM = {"checksum": CHECKSUM}
NO_SUM = "0" * 8  # in the place of a checksum while it is computed

_COMMENT = b"mae crc32 "  # and 8 digits: the archive's comment, with which the file ends
_END = rb"PK\x05\x06.{16}"  # an archive's end record, up to the comment's length
_END_OF_OURS = re.compile(
    _END + re.escape(struct.pack("<H", len(_COMMENT) + 8) + _COMMENT) + rb"([0-9a-f]{8})\Z",
    re.DOTALL,
)
_END_OF_OTHERS = re.compile(_END + rb"\0\0\Z", re.DOTALL)
# A pickle's call of this takes as much memory as it asks for. torch allows it, and never writes it.
_BYTEARRAY = re.compile(rb"c(builtins|__builtin__)\nbytearray\n")
_VALUES = re.compile(r"[^/]*/data/\d+")  # the entries of an archive that are tensors' storages
_IN_HEADER = re.compile(rb'"%s":"([0-9a-f]{8})"' % CHECKSUM.encode())
_SAYS_SO = b'"%s"' % CHECKSUM.encode()


class Damaged(ValueError):
    """What is damaged in a file, in a few words."""


# ---- .pth


class SummedArchive:
    """A file for `torch.save` that gets its checksum as the archive's comment.

    Attributes:
        error: why a write failed; torch raises another error then.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.error: OSError | None = None
        self._file = file
        self._sum = 0
        self._held = b""  # the last two bytes, at the end the comment's length

    def write(self, data: memoryview) -> int:
        """Write all of `data` but its last two bytes, after those of the last call."""
        joined = self._held + bytes(data[:2])
        if len(data) < 2:
            self._put(joined[:-2])
            self._held = joined[-2:]
        else:
            self._put(self._held)
            self._put(data[:-2])
            self._held = bytes(data[-2:])
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> None:
        """Write the comment, after the archive's last byte."""
        assert self._held == b"\0\0", "torch writes archives without a comment"
        self._put(struct.pack("<H", len(_COMMENT) + 8) + _COMMENT)
        self._put(b"%08x" % self._sum)

    def _put(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._sum = zlib.crc32(data, self._sum)


def check_archive(file: IO[bytes], whole: bool = True) -> list[int] | None:
    """Check a .pth file without loading or inflating anything.

    All bytes are checked in files of this project. In others the entries are, but no padding and
    no headers.

    Args:
        file: open for reading.
        whole: False to leave out the tensors' values, which takes no time.

    Returns:
        the sizes of the archive's entries; None for a file that is no archive, as torch wrote them
        before version 1.6: it has no checksums.

    Raises:
        Damaged: an entry is compressed, as torch's never are, or a checksum is another.
        ValueError: the file's end is missing.
        OSError: the system can't read it.
    """
    start = file.read(4)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 200))
    end = file.read()
    ours = _END_OF_OURS.search(end)
    last = ours or _END_OF_OTHERS.search(end)
    if last is None:
        if start == b"PK\x03\x04":
            raise ValueError("its end is missing or damaged")
        _check_legacy(file)
        return None
    try:
        archive = zipfile.ZipFile(file)
        infos = archive.infolist()
        if _place_of_directory(end, last.start(), size) != archive.start_dir:
            raise Damaged("its directory is not where its end says")
        _check_directory(infos, size)
        if not whole or not ours:
            chosen = (i for i in infos if whole or not _VALUES.fullmatch(i.filename))
            _check_entries(archive, chosen)
        elif _crc32(file, 0, size - 8) != int(ours[1], 16):
            _check_entries(archive, infos)
            raise Damaged("bytes beside its entries don't match its checksum")
        for info in infos:
            if info.filename.endswith(".pkl"):
                _check_pickle(archive.read(info))
    except (Damaged, OSError, MemoryError):
        raise
    except Exception as error:  # zipfile raises anything on damaged bytes
        raise Damaged(f"its directory can't be read ({error!r:.80})") from error
    return [info.file_size for info in infos]


def _place_of_directory(end: bytes, last: int, size: int) -> int | None:
    """Where torch's reader finds the directory. zipfile's looks elsewhere in a hostile file.

    Args:
        end: the file's last bytes.
        last: the end record's place in them.
        size: the file's.

    Returns:
        the place in the file; None if it can't be torch's file.
    """
    (place,) = struct.unpack_from("<I", end, last + 16)
    if end[max(0, last - 20) :].startswith(b"PK\x06\x07"):  # there is a record of 64 bits
        (record,) = struct.unpack_from("<Q", end, last - 12)
        if record != size - len(end) + last - 76:
            return None
        (place,) = struct.unpack_from("<Q", end, last - 28)
    return place


def _check_directory(infos: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse, with `Damaged`, what torch never writes and what would take memory or time."""
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise Damaged(f"its entry {info.filename!r} is compressed, which torch never does")
    if sum(info.file_size for info in infos) > size:
        raise Damaged("its entries are said to be larger than the file")


def _check_legacy(file: IO[bytes]) -> None:
    file.seek(0)
    last = b""
    while chunk := file.read(CHUNK):
        _check_pickle(last + chunk)
        last = chunk[-40:]


def _check_pickle(content: bytes) -> None:
    if _BYTEARRAY.search(content):
        raise Damaged("it holds a bytearray, which can take any amount of memory")


def _check_entries(archive: zipfile.ZipFile, infos: Iterable[zipfile.ZipInfo]) -> None:
    for info in infos:
        try:
            with archive.open(info) as entry:
                while entry.read(CHUNK):
                    pass
        except (zipfile.BadZipFile, EOFError, RuntimeError) as error:
            raise Damaged(f"its entry {info.filename!r} doesn't match its checksum") from error


def _crc32(file: IO[bytes], start: int, stop: int, checksum: int = 0) -> int:
    """The checksum of a file's bytes from `start` to `stop`, which continues another."""
    file.seek(start)
    while start < stop and (chunk := file.read(min(CHUNK, stop - start))):
        checksum = zlib.crc32(chunk, checksum)
        start += len(chunk)
    return checksum


def check_tensors(contents: Any, sizes: list[int] | None, file_size: int) -> None:
    """Refuse, with `Damaged`, tensors that claim other values than their file holds.

    A view of one value can have any size, and takes memory when it is copied.

    Args:
        contents: of the file.
        sizes: of its entries, each of which is a tensor's storage; None if they are not known.
        file_size: in bytes.
    """
    for tensor in _tensors(contents):
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise Damaged("it holds a tensor without values, or a sparse one")
        if tensor.numel() * tensor.element_size() > file_size:
            raise Damaged(f"a tensor of shape {tuple(tensor.shape)} is larger than the file")
        # torch 2.6 reads the values beyond the entry from anywhere in memory, or crashes.
        if sizes is not None and tensor.untyped_storage().nbytes() not in sizes:
            raise Damaged("a tensor's size is not the one of its entry")


def _tensors(contents: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested dicts, lists and tuples, each container once, however deep."""
    waiting, seen = [contents], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            waiting += item.values() if isinstance(item, dict) else item


# ---- .safetensors


def with_checksum(content: bytes) -> list[bytes | memoryview]:
    """The pieces of a .safetensors file, whose `CHECKSUM` is `NO_SUM`, with its checksum."""
    found = _IN_HEADER.search(content)
    assert found is not None
    view, (start, stop) = memoryview(content), found.span(1)
    return [view[:start], b"%08x" % zlib.crc32(content), view[stop:]]


def check_safetensors(file: IO[bytes]) -> None:
    """Check a .safetensors file without loading it. Other projects' and old ones have no checksum.

    Raises:
        Damaged: its checksum is another, or missing where it says that it has one.
        ValueError: its header is larger than the file.
        OSError: the system can't read it.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, MAX_HEADER):
        raise ValueError(f"its header is said to have {length:,} bytes")
    header = file.read(length)
    found = _IN_HEADER.search(header)
    if found is None:
        if _SAYS_SO in header:
            raise Damaged("its metadata are incomplete")
        return
    start, stop = (8 + place for place in found.span(1))
    checksum = zlib.crc32(NO_SUM.encode(), _crc32(file, 0, start))
    if _crc32(file, stop, size, checksum) != int(found[1], 16):
        raise Damaged("its bytes don't match its checksum")

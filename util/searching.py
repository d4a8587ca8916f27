"""Searching folders, and lists of paths, for image files."""

import bisect
import codecs
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from util.decoding import image_suffixes
from util.errors import UserError

LOOKS_HELD_OUT = re.compile(
    rb"(val|valid|validation|tests?|testing|dev|eval|evaluation|hold-?_?out|held-?_?out)"
    rb"[-_ ]?(set|images|data|\d+)?",
    re.IGNORECASE,
)
SYSTEM_NAMES = frozenset(
    b"__macosx @eadir #recycle $recycle.bin lost+found thumbs.db ehthumbs.db desktop.ini".split()
) | {b"system volume information"}


@dataclass
class Found:
    """What a search for images met. Names are relative to the folder, or lines of the list.

    Attributes:
        images, others: how many images and other files there are, by suffix.
        hidden_files, hidden_folders: passed over by their names, also those of operating systems.
        held_out: folders, and links to files in them, left out of the training images.
        lookalikes: folders of training images that are named like held-out ones.
        again: folders reached a second time, over links.
        circles: links to a folder that they lie in.
        closed: folders that can't be read.
        missing: links and lines that lead to no file.
        duplicates: how many lines repeat another one.
        folders: those with images, by their upper two levels; not of a list.
    """

    images: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    hidden_files: int = 0
    hidden_folders: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    lookalikes: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    circles: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    duplicates: int = 0
    folders: set[str] = field(default_factory=set)


def search_folder(root: bytes, leave_out: Sequence[str] = ()) -> tuple[list[bytes], Found]:
    """Sorted paths of the image files below `root`, relative to it, and what else was met.

    Links are followed, except to a folder that they lie in.

    Args:
        root: a folder.
        leave_out: names of folders in it to pass over, also where a link leads to them.

    Raises:
        UserError: the folder can't be read, or its links multiply without reason.
    """
    names: list[bytes] = []
    found = Found()
    held_out = {os.path.realpath(os.path.join(root, os.fsencode(name))) for name in leave_out}
    suffixes = {suffix.encode() for suffix in image_suffixes()}
    lookalikes: list[bytes] = []
    reached: dict[bytes, bytes] = {}  # the first path of each real one
    # Each: its path; its real path and those of all folders above; whether it is a link; whether a
    # folder above was reached before.
    todo: list[tuple[bytes, tuple[bytes, ...], bool, bool]]
    todo = [(b"", (os.path.realpath(root),), False, False)]
    visits = 0
    while todo:
        folder, real_paths, is_link, again = todo.pop()
        visits += 1
        if visits > 20_000 and visits > 100 * len(reached):
            raise UserError(
                f"{os.fsdecode(root)}: links multiply {len(reached):,} folders, such as "
                f"{os.fsdecode(folder)}, more than a hundred times: remove some"
            )
        first = reached.setdefault(real_paths[-1], folder)
        if first != folder and not again:
            again = True
            found.again.append(os.fsdecode(folder if is_link else first))
        subfolders = []
        entries = _look_into(root, folder, suffixes, held_out, names, found)
        for name, is_link in sorted(entries):
            path = os.path.join(folder, name)
            real_path = os.path.join(real_paths[-1], name)
            if is_link:
                real_path = os.path.realpath(real_path)
            if real_path in real_paths:
                found.circles.append(os.fsdecode(path))
            elif _lies_in(real_path, held_out):
                found.held_out.append(os.fsdecode(path))
            else:
                subfolders.append((path, (*real_paths, real_path), is_link, again))
                if leave_out and LOOKS_HELD_OUT.fullmatch(name):
                    lookalikes.append(path + b"/")
        todo += reversed(subfolders)
    names.sort()
    for met in (found.hidden_folders, found.held_out, found.circles, found.closed):
        met.sort()
    found.again.sort()
    found.missing.sort()
    for folder in lookalikes:
        below = bisect.bisect(names, folder)
        if below < len(names) and names[below].startswith(folder):
            found.lookalikes.append(os.fsdecode(folder[:-1]))
    return names, found


def _lies_in(real_path: bytes, folders: set[bytes]) -> bool:
    """Whether a path is one of these real folders or lies below one."""
    return any(real_path == folder or real_path.startswith(folder + b"/") for folder in folders)


def _look_into(
    root: bytes,
    folder: bytes,
    suffixes: set[bytes],
    held_out: set[bytes],
    names: list[bytes],
    found: Found,
) -> list[tuple[bytes, bool]]:
    """The folders in a folder, and whether they are links; its images are added to `names`."""
    subfolders = []
    before = len(names)
    prefix = folder + b"/" if folder else b""  # here os.path's functions would double the time
    try:
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                name = entry.name
                lower = name.lower()
                _, dot, letters = lower.rpartition(b".")
                suffix = dot and dot + letters
                if name.startswith(b".") or lower in SYSTEM_NAMES:
                    if _is_folder(entry):
                        found.hidden_folders.append(os.fsdecode(prefix + name))
                    else:
                        found.hidden_files += 1
                elif _is_folder(entry):
                    subfolders.append((name, entry.is_symlink()))
                elif suffix and suffix not in suffixes:
                    found.others[os.fsdecode(suffix)] += 1
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    found.missing.append(os.fsdecode(prefix + name))
                elif (
                    suffix
                    and held_out
                    and entry.is_symlink()
                    and _lies_in(os.path.realpath(entry.path), held_out)
                ):
                    found.held_out.append(os.fsdecode(prefix + name))
                elif suffix:
                    found.images[suffix.decode()] += 1
                    names.append(prefix + name)
                else:
                    found.others[""] += 1
    except OSError as error:
        if not folder:
            raise UserError(f"{os.fsdecode(root)} can't be read: {error.strerror}") from error
        found.closed.append(os.fsdecode(folder))
    if len(names) > before:
        found.folders.add(os.fsdecode(b"/".join(folder.split(b"/")[:2])))
    return subfolders


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    """Whether it is a folder, or a link to one; not a link to itself or to where we can't go."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def read_list(file: Path) -> tuple[list[bytes], Found]:
    """The lines of a list that lead to files, in its order, and what else was met.

    Raises:
        UserError: it is no list, or no line leads to a file.
    """
    with open(file, "rb") as opened:
        content = opened.read(65536)
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        if file.suffix.lower() in image_suffixes() or (b"\0" in content and not is_utf16):
            raise UserError(f"{file} is a file, but no list of paths: give a folder of images")
        content += opened.read()
    if is_utf16:  # as PowerShell writes it
        content = content.decode("utf-16", "replace").encode()
    lines = [line.rstrip(b"\r") for line in content.removeprefix(codecs.BOM_UTF8).split(b"\n")]
    lines = [line for line in lines if line.strip()]
    folder = os.fsencode(file.parent)
    names = [line for line in lines if os.path.isfile(os.path.join(folder, line))]
    if not names:
        first = f" (its first line is {os.fsdecode(lines[0])[:200]})" if lines else ""
        raise UserError(
            f"{file} names no file that exists{first}: a line is a path, absolute or relative to "
            f"{file.parent}"
        )
    existing = set(names)
    found = Found(duplicates=len(names) - len(existing))
    found.missing = [os.fsdecode(line) for line in lines if line not in existing]
    found.images.update(os.path.splitext(os.fsdecode(name))[1].lower() for name in names)
    return names, found

"""Files of features, .npz, .npy or .csv: written as they come, and whole or not at all."""

import csv
import fcntl
import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from util.errors import UserError

Add = Callable[[np.ndarray, Sequence[str], np.ndarray], None]


@contextmanager
def writing(
    path: Path, shape: tuple[int, ...], most: int, classes: Sequence[str] | None
) -> Iterator[Add]:
    """A file of features that appears under its name if this context ends without an error.

    .npz holds `embeddings` float32 and `filenames`, with classes also `labels` int64 and `classes`;
    no pickled objects. .npy holds only the features, and `names_file` beside it what they are of.
    .csv has the columns filename, embedding_0, embedding_1, ..., in the fewest digits that give
    the same float32 when they are read.

    Memory does not grow with the features. On the disk .npz needs twice their size while it ends.

    Args:
        path: its suffix is one of `FORMATS`.
        shape: of one image's features; 1-D for .csv.
        most: how many images there can be.
        classes: names of the classes that labels are indices of; None without labels.

    Yields:
        a function that takes the next images' float32 features [N, *shape], names and int64
        labels [N].

    Raises:
        UserError: it can't be written, or another run is writing it.
    """
    with ExitStack() as stack:
        with _explained(path):
            add = stack.enter_context(FORMATS[path.suffix](path, shape, most, classes))

        def explained_add(features: np.ndarray, names: Sequence[str], labels: np.ndarray) -> None:
            with _explained(path):
                add(features, names, labels)

        yield explained_add
        with _explained(path):
            stack.close()


def names_file(path: Path) -> Path:
    """The table of names beside a .npy."""
    return path.with_suffix(".names.csv")


@contextmanager
def _npz(
    path: Path, shape: tuple[int, ...], most: int, classes: Sequence[str] | None
) -> Iterator[Add]:
    all_names: list[str] = []
    all_labels = [np.empty(0, np.int64)]
    with _replacing(path) as file, tempfile.TemporaryFile(dir=path.parent) as array:
        with _growing_array(array, shape, most) as append:

            def add(features: np.ndarray, names: Sequence[str], labels: np.ndarray) -> None:
                append(features)
                all_names.extend(names)
                all_labels.append(labels)

            yield add
        # zipfile's members have a fixed date, so that the same features give the same bytes.
        with zipfile.ZipFile(file, "w") as archive:
            array.seek(0)
            with archive.open("embeddings.npy", "w", force_zip64=True) as member:
                shutil.copyfileobj(array, member, 1 << 20)
            arrays = {"filenames": np.array(all_names, np.str_)}
            if classes is not None:
                arrays |= {"labels": np.concatenate(all_labels), "classes": np.array(classes)}
            for name, values in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, values, allow_pickle=False)


@contextmanager
def _npy(
    path: Path, shape: tuple[int, ...], most: int, classes: Sequence[str] | None
) -> Iterator[Add]:
    columns = ["filename"] if classes is None else ["filename", "label", "class"]
    with (
        _replacing(path) as file,
        _replacing(names_file(path)) as beside,
        _table(beside, columns) as table,
        _growing_array(file, shape, most) as append,
    ):

        def add(features: np.ndarray, names: Sequence[str], labels: np.ndarray) -> None:
            append(features)
            for name, label in zip(names, labels.tolist(), strict=True):
                table.writerow([name] if classes is None else [name, label, classes[label]])

        yield add


@contextmanager
def _csv(
    path: Path, shape: tuple[int, ...], most: int, classes: Sequence[str] | None
) -> Iterator[Add]:
    columns = ["filename", *(f"embedding_{number}" for number in range(shape[0]))]
    with _replacing(path) as file, _table(file, columns) as table:

        def add(features: np.ndarray, names: Sequence[str], labels: np.ndarray) -> None:
            for name, row in zip(names, features, strict=True):
                table.writerow([name, *map(str, row)])

        yield add


FORMATS = {".npz": _npz, ".npy": _npy, ".csv": _csv}


@contextmanager
def _growing_array(
    file: IO[bytes], shape: tuple[int, ...], most: int
) -> Iterator[Callable[[np.ndarray], None]]:
    """Writes a .npy; yields a function that appends float32 arrays [N, *shape] to it."""
    count = 0

    def write_header(count: int) -> None:
        about = {"descr": "<f4", "fortran_order": False, "shape": (count, *shape)}
        np.lib.format.write_array_header_1_0(file, about)

    def append(features: np.ndarray) -> None:
        nonlocal count
        count += len(features)
        file.write(features.astype("<f4").tobytes())

    write_header(most)
    start = file.tell()
    yield append
    file.seek(0)
    write_header(count)
    assert file.tell() == start  # numpy pads headers, so that the number of rows can change
    file.flush()


@contextmanager
def _table(file: IO[bytes], columns: list[str]) -> Iterator[Any]:
    """A csv writer into a file."""
    # A file's name can hold any bytes. Python's str has surrogates for them, this file has them.
    text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
    try:
        table = csv.writer(text, lineterminator="\n")
        table.writerow(columns)
        yield table
    finally:
        text.detach()  # writes what is left, and leaves the file open


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A hidden file beside `path` that gets its name at the end, or is removed on an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    # Not truncated before it is locked.
    with open(os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that has just ended may have given it its name: then that is the whole file.
            is_free = os.path.samestat(os.fstat(file.fileno()), os.stat(temporary))
        except (BlockingIOError, FileNotFoundError):
            is_free = False
        except OSError:  # some network file systems have no locks
            is_free = True
        if not is_free:
            raise UserError(
                f"another run is writing {path}: wait for it, or choose another --output"
            )
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {path} can't be written: {error.strerror or error}") from error

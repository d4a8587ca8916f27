"""Loads mutated or hostile checkpoints, with 1 GiB of memory and 60 seconds for each.

A line a file says what became of it. Whatever is no error of ours ends the process: a crash, an
alarm, a traceback, or status 77 for a file that ran code.
"""

import argparse
import os
import random
import resource
import signal
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import safetensors.torch
import torch

from util import checksums
from util.checkpoint import load_checkpoint, save_checkpoint, save_safetensors
from util.errors import UserError

CONTENTS = {
    "model": {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.float16)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
    "epoch": 3,
    "step": 2,
    "args": {"lr": 0.1, "names": ["x", "y"]},
}
CODE = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect")


# ---- mutations


def mutate(content, draw):
    """Bytes with one to four changes: bits, bytes, runs removed, repeated, or put elsewhere."""
    original, content = content, bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(content))
        length = draw.choice([1, 2, 4, 8, 40])
        match draw.randrange(6):
            case 0:
                content[place] ^= 1 << draw.randrange(8)
            case 1:
                content[place : place + length] = draw.randbytes(length)
            case 2:
                del content[place : place + length]
            case 3:
                content[place:place] = content[place : place + length]
            case 4:
                content[place : place + length] = draw.choice([b"\0", b"\xff", b"\x7f"]) * length
            case 5:
                other = draw.randrange(len(content))
                content[place : place + length] = content[other : other + length]
        content = content or bytearray(b"P")
    return bytes(content) if content != original else mutate(original, draw)


def repack(source, target, change):
    """Copy an archive with right checksums, its pickle changed by a function."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as changed:
        for name in archive.namelist():
            content = archive.read(name)
            changed.writestr(name, change(content) if name.endswith("data.pkl") else content)


def write_bytes(folder, draw):
    path = folder / "file.pth"
    save_checkpoint(path, CONTENTS)
    path.write_bytes(mutate(path.read_bytes(), draw))
    return path


def write_pickle(folder, draw):
    path = folder / "file.pth"
    save_checkpoint(folder / "whole.pth", CONTENTS)
    repack(folder / "whole.pth", path, lambda content: mutate(content, draw))
    return path


def write_legacy(folder, draw):
    """As torch wrote files before version 1.6, which are no archives."""
    path = folder / "file.pth"
    torch.save(CONTENTS, path, _use_new_zipfile_serialization=False)
    path.write_bytes(mutate(path.read_bytes(), draw))
    return path


def write_safetensors(folder, draw):
    path = folder / "file.safetensors"
    save_safetensors(path, CONTENTS["model"], {"args": CONTENTS["args"], "command": "x"})
    path.write_bytes(mutate(path.read_bytes(), draw))
    return path


def write_header(folder, draw):
    """The header mutated, under its right length and with a right checksum where it has one."""
    path = folder / "file.safetensors"
    about = {checksums.ABOUT: '{"args": {"lr": 0.1}}', checksums.CHECKSUM: checksums.NO_SUM}
    content = safetensors.torch.save(CONTENTS["model"], about | checksums.HAS_CHECKSUM)
    end = 8 + int.from_bytes(content[:8], "little")
    header = mutate(content[8:end], draw)
    content = struct.pack("<Q", len(header)) + header + content[end:]
    if f'"{checksums.CHECKSUM}":"{checksums.NO_SUM}"'.encode() in header:
        content = b"".join(checksums.with_checksum(content))
    path.write_bytes(content)
    return path


# ---- hostile files


class Call:
    """A pickle that calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def write_contents(path, contents):
    torch.save(contents, path)
    return path


def bomb(path):
    """A compressed entry, which becomes a thousand times larger."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(1 << 27))
    return path


def overlapping(path):
    """A thousand entries that are the same megabyte."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", bytes(1 << 20))
        archive.filelist *= 1000
    return path


def beyond(path):
    """A storage that says it is larger than its entry."""
    whole = write_contents(path.with_name("whole.pth"), {"model": {"w": torch.zeros(77)}})
    repack(whole, path, lambda content: content.replace(b"K\x4d", b"J" + struct.pack("<i", 10**8)))
    return path


def doubling(depth=100):
    """A few hundred bytes that are 2^100 leaves, if they are counted one by one."""
    value = [0]
    for _ in range(depth):
        value = [value, value]
    return value


def nested(path, depth=100_000):
    """Lists in lists, written by hand: pickle's own recursion is not deep enough."""
    lists = b"X\x01\0\0\0a" + b"]" * depth + b"a" * (depth - 1)
    whole = write_contents(path.with_name("whole.pth"), {"model": {}})
    repack(whole, path, lambda _: b"\x80\x02}(X\x05\0\0\0model}" + lists + b"su.")
    return path


def long_header(path):
    path = path.with_suffix(".safetensors")
    path.write_bytes(struct.pack("<Q", 10 * 2**30) + b'{"')
    return path


MODEL = {"w": torch.zeros(3)}
HOSTILE = {
    "bomb": bomb,
    "overlapping": overlapping,
    "beyond": beyond,
    "bytearray": lambda path: write_contents(path, {"model": MODEL, "x": Call(bytearray, 1 << 40)}),
    "code": lambda path: write_contents(path, {"model": MODEL, "x": Call(os.system, "true")}),
    "view": lambda path: write_contents(path, {"model": {"w": torch.zeros(1).expand(1 << 40)}}),
    "meta": lambda path: write_contents(path, {"model": {"w": torch.zeros(3, device="meta")}}),
    "nested": nested,
    "doubling": lambda path: write_contents(path, {"model": MODEL, "x": doubling()}),
    "long header": long_header,
}


# ---- loading


def refuse_code(event, _arguments):
    if event in CODE:
        os._exit(77)


def outcome(path, mmap):
    """What became of a file; a loaded one's values are read."""
    try:
        contents = load_checkpoint(path, mmap)
    except UserError as error:
        assert "\n" not in str(error), error
        return f"refused: {error}"
    for weight in contents["model"].values():
        weight.float().sum().item()
    return "loaded"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--kinds", nargs="+")
    parser.add_argument("--count", type=int)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    args.folder.mkdir()
    sys.addaudithook(refuse_code)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
    for kind in args.kinds:
        for number in range(args.count):
            signal.alarm(60)
            if kind == "hostile":
                name, write = list(HOSTILE.items())[number]
                path = write(args.folder / "file.pth")
            else:
                name, draw = f"{kind} {number}", random.Random(f"{kind} {number}")
                path = globals()[f"write_{kind}"](args.folder, draw)
            print(f"{name}: ", end="", flush=True)
            print(outcome(path, mmap=number % 2 == 1), flush=True)

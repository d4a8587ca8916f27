"""Statistics of image folders against numpy on the arrays that were written."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, command_line
from PIL import Image

import main_data
from util import data, statistics, tallies

RNG = np.random.default_rng


def write(folder, arrays):
    """Files of the arrays, [H, W] or [H, W, bands]: .npy, or .png where they are uint8."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, array in enumerate(arrays):
        if array.dtype == np.uint8:
            Image.fromarray(array).save(folder / f"{index:03d}.png")
        else:
            np.save(folder / f"{index:03d}.npy", array)
    return folder


def run(folder, **flags):
    """`main_data.py stats`, in this process."""
    words = ["stats", *command_line({"data_path": folder, "num_workers": 0} | flags)]
    args = main_data.get_args_parser().parse_args(words)
    main_data.main(args)


def measure(folder, **flags):
    """The JSON of `main_data.py stats`."""
    output = folder.parent / f"{folder.name}.json"
    run(folder, output=output, **flags)
    return json.loads(output.read_text())


def per_band(arrays, nodata=None):
    """The valid samples of each band, float64, in one array a band."""
    arrays = [array.reshape(*array.shape[:2], -1) for array in arrays]
    bands = [
        np.concatenate([a[:, :, band].ravel() for a in arrays])
        for band in range(arrays[0].shape[2])
    ]
    if nodata is not None:
        bands = [b[~np.isnan(b) if np.isnan(nodata) else b != b.dtype.type(nodata)] for b in bands]
    return [band.astype(np.float64) for band in bands]


def assert_equals_numpy(found, arrays, nodata=None):
    bands = per_band(arrays, nodata)
    expected = {
        "min": [b.min() for b in bands],
        "max": [b.max() for b in bands],
        "p01": [np.percentile(b, 1) for b in bands],
        "p99": [np.percentile(b, 99) for b in bands],
        "mean": [b.mean() for b in bands],
        "std": [b.std() for b in bands],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-9, atol=0, err_msg=name)
    assert found["pixels"] == sum(array.shape[0] * array.shape[1] for array in arrays)
    assert found["images"] == len(arrays)
    assert found["bands"] == len(bands)
    assert found["dtype"] == arrays[0].dtype.name


def smooth(dtype, low, high, bands, count=7, seed=0):
    """Arrays of different sizes whose bands differ."""
    random = RNG(seed)
    shapes = [(11 + index % 9, 23 - index % 7, bands) for index in range(count)]
    reach = np.linspace(0.3, 1, bands)
    return [(low + (high - low) * reach * random.beta(2, 5, s)).astype(dtype) for s in shapes]


CASES = {
    "uint8": smooth(np.uint8, 0, 256, 3),
    "grey uint8": [a[:, :, 0] for a in smooth(np.uint8, 0, 256, 1)],
    "uint16": smooth(np.uint16, 0, 65536, 13),
    "uint16 of the other byte order": [a.astype(">u2") for a in smooth(np.uint16, 0, 65536, 2)],
    "12 bits": smooth(np.uint16, 0, 4096, 13),
    "int8": smooth(np.int8, -128, 128, 2),
    "int16": smooth(np.int16, -1024, 3072, 1),
    "int32": smooth(np.int32, -(2**31), 2**31 - 1, 2),
    "uint32": smooth(np.uint32, 0, 2**32 - 1, 2),
    "float16": smooth(np.float16, -3, 5, 4),
    "float32": smooth(np.float32, -3, 5, 8),
    "float32 of the other byte order": [a.astype(">f4") for a in smooth(np.float32, 0, 1e-6, 2)],
    "float64 with a large offset": [a + 1e6 for a in smooth(np.float64, 0, 1e-2, 3)],
    "uint16 with a large offset": [a + np.uint16(65000) for a in smooth(np.uint16, 0, 5, 2)],
    "one image": smooth(np.float32, 0, 1, 5, count=1),
    "one pixel": [np.uint16([[[7, 4000]]])],
    "rare peaks": [
        np.repeat(np.uint16([0, 0, 7]), 100).reshape(20, 15),
        np.zeros((3, 9), np.uint16),
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_figures_are_numpys(case, tmp_path):
    arrays = list(CASES[case])
    assert_equals_numpy(measure(write(tmp_path / "images", arrays)), arrays)


def with_nodata(dtype, nodata, seed=0):
    """Arrays with nodata samples at different places in each band; one image has nothing else."""
    arrays = smooth(dtype, 100, 3000, 3, seed=seed)
    for array in arrays:
        array[RNG(seed).random(array.shape) < 0.3] = nodata
    arrays[2][:, :, 1] = nodata
    arrays[0][:] = nodata
    return arrays


@pytest.mark.parametrize(
    "dtype, nodata",
    [
        (np.uint16, 0),
        (np.int16, -9999),
        (np.int32, -9999),
        (np.float32, -9999),
        (np.float32, np.nan),
        (np.float16, np.nan),
        (np.float32, -3.4028235e38),
    ],
)
def test_nodata_is_left_out_of_its_band_alone(dtype, nodata, tmp_path, capsys):
    arrays = with_nodata(dtype, nodata)
    folder = write(tmp_path / "images", arrays)
    flag = {"nodata=" + np.format_float_positional(nodata): True}  # one word: it may be negative
    assert_equals_numpy(measure(folder, **flag), arrays, dtype(nodata))
    captured = capsys.readouterr()
    assert "--nodata" in captured.out
    assert captured.err == ""


def test_only_nodata(tmp_path, user_error):
    arrays = with_nodata(np.int16, -9999)
    for array in arrays:
        array[:, :, 1] = -9999
    folder = write(tmp_path / "images", arrays)
    message = user_error(lambda: run(folder, nodata=-9999))
    assert message == "band 1 holds nothing but nodata: leave it out with --bands"
    assert user_error(lambda: run(folder, nodata=-9999, bands=[2, 1])) == message
    run(folder, nodata=-9999, bands=[0, 2])


def test_forgotten_nodata_is_doubted(tmp_path, capsys):
    for index, (dtype, nodata) in enumerate([(np.int16, -9999), (np.float32, 3e38)]):
        run(write(tmp_path / f"many{index}", with_nodata(dtype, nodata)))
        assert "warning: bands 0, 1, 2: the m" in (err := capsys.readouterr().err)
        assert f"measure again with --nodata {'-9999' if index == 0 else '3000'}" in err
    few = smooth(np.uint16, 0, 900, 2)
    few[0][0, 0, 1] = 65535
    run(write(tmp_path / "few", few))
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: band 1: the maximum 65535 may stand for no data")
    assert "--value_range" not in captured.out


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_samples_that_are_not_finite(dtype, tmp_path, user_error, capsys):
    arrays = smooth(dtype, 0, 1, 2)
    arrays[3][4, 5, 1] = np.nan
    folder = write(tmp_path / "images", arrays)
    message = user_error(lambda: run(folder))
    assert message.startswith(f"{folder / '003.npy'} holds NaN: add --nodata nan")
    assert_equals_numpy(measure(folder, nodata="nan"), arrays, np.nan)
    arrays[3][4, 5, 1] = np.inf
    folder = write(tmp_path / "infinite", arrays)
    assert_equals_numpy(measure(folder, nodata="nan"), arrays[:3] + arrays[4:])
    assert f"left out as unreadable: {folder / '003.npy'}: holds infinite samples" in (
        capsys.readouterr().err
    )


def test_constant_bands(tmp_path, capsys):
    for dtype in (np.uint16, np.float32):
        arrays = smooth(dtype, 0, 60000, 4)
        for array in arrays:
            array[:, :, 1] = 17.3
            array[:, :, 3] = 0
        found = measure(write(tmp_path / np.dtype(dtype).name, arrays))
        assert found["std"][1] == found["std"][3] == 0
        assert found["mean"][1] == float(dtype(17.3))
        assert np.all(np.isfinite(found["mean"] + found["std"]))
        stds = found["flags"].partition("--std ")[2].split()
        assert (stds[1], stds[3]) == ("1", "1")
        assert "warning: bands 1, 3: constant" in capsys.readouterr().err


@pytest.mark.parametrize("value", [0, -5, 7, 60000])
def test_nothing_but_a_constant(value, tmp_path):
    found = measure(write(tmp_path / "images", [np.full((4, 5, 2), value, np.float16)]))
    assert (found["mean"], found["std"]) == ([value] * 2, [0, 0])
    words = found["flags"].split()
    low, high = map(float, words[3:5])
    assert low <= value <= high < np.inf
    assert low < high


def parse(flags):
    """Pasted flags as {name: numbers}, by a parser that knows neither their names nor counts."""
    parser = main_data.cli.ArgumentParser()
    for name in ("in_chans", "value_range", "mean", "std", "nodata", "bands"):
        parser.add_argument(f"--{name}", type=float, nargs="+", default=None)
    return vars(parser.parse_args(flags.split()))


# Constant, and so close that float32 on the scale from 0 to 1 can't tell their mean.
TOO_NARROW = ("one pixel", "uint16 with a large offset")


@pytest.mark.parametrize("case", [case for case in CASES if case not in TOO_NARROW])
def test_pasted_flags_normalise(case, tmp_path):
    """With the flags, every band has mean 0 and std 1, and no sample is outside of the range."""
    arrays = CASES[case]
    flags = parse(measure(write(tmp_path / "images", arrays))["flags"])
    bands = per_band(arrays)
    assert flags["in_chans"] == (None if len(bands) == 3 else [len(bands)])
    assert len(flags["mean"]) == len(flags["std"]) == len(bands)
    dtype = arrays[0].dtype
    if flags["value_range"] is None:
        assert dtype.kind == "u"
        flags["value_range"] = [0, np.iinfo(dtype).max]
    low, high = flags["value_range"]
    for band, mean, std in zip(bands, flags["mean"], flags["std"], strict=True):
        scaled = (band - low) / (high - low)
        assert scaled.min() >= -1e-3  # of a float16's shortest decimal
        assert scaled.max() <= 1 + 1e-3
        imgs = torch.from_numpy(scaled)[None, None, None]
        normalised = data.normalize(imgs, (mean,), (std,))
        assert abs(normalised.mean().item()) < 1e-3
        assert abs(normalised.std(correction=0).item() - 1) < 1e-3


@pytest.mark.parametrize(
    "dtype, low, high, expected",
    [
        (np.uint8, 0, 3, None),
        (np.uint16, 0, 65535, None),
        (np.uint16, 0, 32768, None),
        (np.uint16, 2, 32767, "0 32767"),
        (np.uint16, 0, 4095, "0 4095"),
        (np.uint16, 0, 4096, "0 8191"),
        (np.uint16, 0, 1, "0 1"),
        (np.uint32, 2, 9, "2 9"),
        (np.int16, 2, 9, "2 9"),
        (np.float32, 0, 0.1, "0 0.1"),
        (np.float32, -1e-7, 3e9, "-0.0000001 3000000000"),
    ],
)
def test_suggested_value_range(dtype, low, high, expected, tmp_path):
    arrays = [np.array([[low, high], [low, low]], dtype)]
    flags = measure(write(tmp_path / "images", arrays))["flags"]
    assert ("--value_range" in flags) == (expected is not None)
    if expected:
        assert f"--value_range {expected} --mean" in flags


def test_choices_are_repeated(tmp_path):
    arrays = [np.moveaxis(a, 2, 0) for a in smooth(np.uint16, 0, 65535, 13)]
    folder = write(tmp_path / "images", arrays)
    choices = {"bands": [12, 0, 7], "layout": "chw", "exif_orientation": True, "nodata": 0}
    found = measure(folder, **choices, max_pixels=10**6)
    chosen = [np.moveaxis(a, 0, 2)[:, :, [12, 0, 7]] for a in arrays]
    assert_equals_numpy(found, chosen, 0)
    flags = found["flags"]
    assert flags.startswith("--bands 12 0 7 --mean ")
    assert flags.endswith(" --nodata 0 --layout chw --exif_orientation --max_pixels 1000000")


def test_what_is_printed(tmp_path, capsys):
    folder = write(tmp_path / "images", smooth(np.uint16, 0, 4096, 2))
    flags = measure(folder)["flags"]
    lines = capsys.readouterr().out.splitlines()
    assert flags in lines
    assert lines[lines.index(flags) - 1].startswith("flags to paste")
    header = next(line for line in lines if line.split()[:2] == ["band", "min"])
    assert header.split() == "band min max p01 p99 mean std".split()
    assert [line.split()[0] for line in lines[lines.index(header) + 1 :][:2]] == ["0", "1"]
    run(write(tmp_path / "grey", smooth(np.uint8, 0, 256, 1, count=2)[0][:, :, 0][None]))
    out = capsys.readouterr().out
    assert "\n--in_chans 1 --mean " in out
    assert "three equal bands" in out


def test_max_images_are_spread_evenly(tmp_path, capsys):
    arrays = [np.full((2, 3), value, np.uint16) for value in range(100)]
    folder = write(tmp_path / "images", arrays)
    assert_equals_numpy(measure(folder, max_images=4), [arrays[i] for i in (0, 33, 66, 99)])
    assert "measuring 4 of 100 images" in capsys.readouterr().out
    assert_equals_numpy(measure(folder, max_images=1), arrays[:1])
    capsys.readouterr()
    for count in (100, 1000):
        assert_equals_numpy(measure(folder, max_images=count), arrays)
    assert "measuring" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_any_number_of_workers_and_any_slice_gives_the_same(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "MAX_KEPT", 500)
    folder = write(tmp_path / "images", smooth(dtype, -1000, 1000, 3, count=20))
    (folder / "007.npy").write_bytes(b"torn")
    found = measure(folder)
    assert found["unreadable"] == 1
    for workers in (1, 2):
        assert measure(folder, num_workers=workers) == found
    monkeypatch.setattr(statistics, "SLICE", 100)
    sliced = measure(folder)
    for name in ("min", "max", "p01", "p99"):
        assert sliced[name] == found[name]
    np.testing.assert_allclose(sliced["std"], found["std"], rtol=1e-12)


@pytest.mark.parametrize("shape", [(1000, 256), (10, 8)])
def test_subsample_of_a_wide_type_is_fair(shape, tmp_path, monkeypatch, capsys):
    """Neither columns nor the first pixels of images are preferred."""
    monkeypatch.setattr(statistics, "MAX_KEPT", 5000)
    height, width = shape
    ramp = np.broadcast_to(np.arange(width, dtype=np.float32), shape)
    ramps = [ramp + index for index in range(2 if height == 1000 else 400)]
    folder = write(tmp_path / "images", ramps)
    found = measure(folder)
    assert "percentiles are of" in capsys.readouterr().out
    (samples,) = per_band(ramps)
    spread = samples.max() - samples.min()
    for name, share in (("p01", 1), ("p99", 99)):
        assert abs(found[name][0] - np.percentile(samples, share)) < 0.01 * spread
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(found[name][0], getattr(samples, name)(), rtol=1e-9)


def test_all_values_are_kept_up_to_the_limit(monkeypatch):
    values = RNG(0).normal(size=5000)
    for size in (1, 7, 5000):
        tally = tallies.Moments(limit=5000)
        for index, piece in enumerate(np.split(values, range(size, 5000, size))):
            part = tallies.Moments(5000, origin=index)
            part.add(piece)
            tally.merge(part)
        assert (tally.kept, tally.thinned) == (5000, 0)
        assert tally.figures().p01 == np.percentile(values, 1)
    tally.add(values[:1])
    assert (tally.kept, tally.thinned) == (pytest.approx(2500, abs=5), 1)


@pytest.mark.parametrize(
    "other, holds",
    [
        (np.zeros((4, 4, 3), np.uint16), "3 bands of uint16"),
        (np.zeros((4, 4, 2), np.int16), "2 bands of int16"),
        (np.zeros((4, 4), np.uint16), "1 band of uint16"),
    ],
)
def test_images_of_different_kinds(other, holds, tmp_path, user_error):
    folder = write(tmp_path / "images", [*smooth(np.uint16, 0, 9, 2, count=3), other])
    message = user_error(lambda: run(folder))
    first, last = folder / "000.npy", folder / "003.npy"
    assert message.startswith(f"{first} holds 2 bands of uint16, but {last} holds {holds}: ")


def test_unreadable_images(tmp_path, user_error, capsys):
    arrays = smooth(np.uint8, 0, 256, 3, count=30)
    folder = write(tmp_path / "images", arrays)
    for index in range(9):
        (folder / f"{index:03d}.png").write_bytes(b"torn")
    found = measure(folder)
    assert_equals_numpy(found, arrays[9:])
    assert found["unreadable"] == 9
    warnings = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(warnings) == 9
    for index, line in enumerate(warnings):
        assert line.startswith(f"warning: left out as unreadable: {folder}/{index:03d}.png: ")
    (folder / "009.png").write_bytes(b"torn")
    message = user_error(lambda: run(folder))
    assert message.startswith("10 of 30 images are unreadable so far, more than 1%")


def test_values_beyond_arithmetic(tmp_path, user_error):
    arrays = smooth(np.float64, 0, 1, 1)
    arrays[0][0, 0] = -1.7976931348623157e308
    folder = write(tmp_path / "images", arrays)
    assert "has no finite std" in user_error(lambda: run(folder))


def test_output_that_can_not_be_written(tmp_path, user_error, monkeypatch, capsys):
    folder = write(tmp_path / "images", smooth(np.uint16, 0, 9, 2))
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "stats.json", tmp_path):
        assert "--output" in user_error(lambda output=output: run(folder, output=output))
    assert capsys.readouterr().out == ""
    output = tmp_path / "stats.json"
    run(folder, output=output)
    before = output.read_text()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    message = user_error(lambda: run(folder, output=output, bands=[0]))
    assert message == f"--output {output} could not be written: No space left on device"
    assert output.read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "images", "stats.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_ctrl_c_leaves_nothing_behind(tmp_path):
    folder = write(tmp_path / "images", [RNG(0).random((500, 500, 3))])
    for index in range(2000):  # a minute's work
        os.link(folder / "000.npy", folder / f"more{index}.npy")
    output = tmp_path / "stats.json"
    flags = {"data_path": folder, "num_workers": 2, "output": output}
    # A shell starts background jobs with SIGINT ignored, which children inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "main_data.py", "stats", *command_line(flags)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, before)
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    deadline = time.monotonic() + 60
    while len(workers := Path(children).read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)
    assert not output.exists()


def test_grey_and_rgb_photographs_count_as_rgb_and_a_declared_alpha_is_left_out(tmp_path):
    """As the default format reads them, in whatever order they come."""
    rgb, other = smooth(np.uint8, 0, 256, 3)[:2]
    grey = smooth(np.uint8, 0, 256, 1)[0].reshape(rgb.shape[:2])
    alpha = np.concatenate([other, other[:, :, :1] // 2], axis=2)
    for order in itertools.permutations([rgb, grey, alpha]):
        folder = write(tmp_path / str(len(list(tmp_path.iterdir()))), order)
        expected = [rgb, np.stack(3 * [grey], axis=2), other]
        found = measure(folder)
        assert_equals_numpy(found, expected)
        assert found["bands"] == 3


@pytest.mark.parametrize("kind", ["1 bit", "4 bits", "bool", "maxval 1000"])
def test_flags_are_on_the_scale_that_the_file_declares(tmp_path, kind):
    """As `read_image` has it: the mean of what it returns is --mean."""
    full = {"1 bit": 1, "4 bits": 15, "bool": 1, "maxval 1000": 1000}[kind]
    array = RNG(0).integers(0, full, (20, 30), endpoint=True).astype(np.uint16)
    tmp_path = tmp_path / "images"
    tmp_path.mkdir()
    if kind == "bool":
        np.save(tmp_path / "1.npy", array.astype(bool))
    elif kind == "maxval 1000":
        header = b"P5 30 20 1000\n"
        (tmp_path / "1.pgm").write_bytes(header + array.astype(">u2").tobytes())
    else:
        bits = {"bits": 4} if full == 15 else {}
        scaled = Image.fromarray((array * (255 // full)).astype(np.uint8))
        image = scaled.convert("1") if full == 1 else scaled.quantize(16)
        if full == 15:
            palette = [level * 17 for level in range(16) for _ in range(3)]
            image = Image.fromarray(array.astype(np.uint8), "P")
            image.putpalette(palette)
        image.save(tmp_path / "1.png", **bits)
    found = measure(tmp_path)
    words = found["flags"].split()
    means = np.array(words[words.index("--mean") + 1 : words.index("--std")], float)
    np.testing.assert_allclose(means, array.mean() / full, rtol=1e-4)

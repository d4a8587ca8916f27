"""Pixel formats: flags and checkpoints, any number of bands in models, transforms and pictures.

Against timm's rule for weights, numpy for pixels, and equalities that hold by construction.
"""

import math

import numpy as np
import pytest
import timm
import torch
from helpers import photograph, pixels
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import models_mae
import models_vit
from util import data, pretrained, visualize
from util.pixels import MAX_PIXELS, RGB, PixelFormat, resolve

# ---- flags and checkpoints


def given(**flags):
    """A command's flags, of which these are given."""
    names = "in_chans bands value_range mean std nodata layout exif_orientation".split()
    return dict.fromkeys(names) | {"max_pixels": MAX_PIXELS} | flags


def test_without_flags_images_are_8_bit_rgb_with_imagenets_statistics():
    assert resolve(given()) == RGB
    assert RGB.mean == IMAGENET_DEFAULT_MEAN
    assert RGB.std == IMAGENET_DEFAULT_STD
    assert RGB.is_8_bit_rgb


def test_flags_make_a_format(capsys):
    flags = given(bands=[4, 0], value_range=[0.0, 4095.0], mean=[0.1, 0.2], std=[0.3, 0.4])
    expected = PixelFormat(2, (4, 0), (0.0, 4095.0), (0.1, 0.2), (0.3, 0.4))
    assert resolve(flags) == expected
    assert resolve(flags | {"in_chans": 2}) == expected
    assert capsys.readouterr().err == ""


def test_bands_without_statistics_are_said_to_have_guessed_ones(capsys):
    assert resolve(given(in_chans=2)).mean == resolve(given(in_chans=2)).std == (0.5, 0.5)
    assert "no --mean and --std for 2 bands" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"in_chans": 2, "bands": [0, 1, 2]}, "--bands names 3 bands, not the 2 of --in_chans"),
        ({"in_chans": 2, "mean": [0.5, 0.5]}, "--mean and --std belong together"),
        ({"mean": [0.5], "std": [0.5]}, "takes a number for each of the 3 bands, not 1"),
        ({"value_range": [5.0, 5.0]}, "--value_range 5.0 5.0: LO must be below HI"),
    ],
    ids=str,
)
def test_flags_that_contradict_each_other_are_the_users_error(user_error, flags, message):
    assert message in user_error(lambda: resolve(given(**flags)))


SAVED = PixelFormat(2, (4, 0), (0.0, 4095.0), (0.1, 0.2), (0.3, 0.4), math.nan, "chw", True)


def test_a_checkpoints_format_is_read_from_it():
    stored = SAVED.stored()
    assert stored == SAVED.stored()  # though nan does not equal nan
    for flags in ({}, {"in_chans": 2}, {"bands": [4, 0]}, {"nodata": math.nan}, {"layout": "chw"}):
        kept = resolve(given(**flags), {"args": stored}, "c.pth")
        assert kept.stored() == stored
        assert kept.origin == "c.pth"
        assert math.isnan(kept.nodata)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("in_chans", 3, "in_chans 2, not 3"),
        ("bands", [0, 4], "bands 4 0, not 0 4"),
        ("value_range", [0.0, 1.0], "value_range 0.0 4095.0, not 0.0 1.0"),
        ("mean", [0.5, 0.5], "mean 0.1 0.2, not 0.5 0.5"),
        ("nodata", 0.0, "nodata nan, not 0.0"),
        ("layout", "hwc", "layout chw, not hwc"),
    ],
)
def test_other_flags_than_a_checkpoints_are_the_users_error(user_error, name, value, told):
    message = user_error(lambda: resolve(given(**{name: value}), {"args": SAVED.stored()}, "c.pth"))
    assert message.startswith(f"c.pth was trained with {told}: leave out --{name}")
    assert user_error(
        lambda: resolve(given(in_chans=3), {"args": SAVED.stored()}, "c.pth", may_adapt=True)
    ).startswith("c.pth was trained with in_chans 2")


def test_three_bands_may_start_another_number(user_error):
    flags = given(in_chans=5, mean=[0.1] * 5, std=[0.2] * 5)
    assert resolve(flags, {"args": RGB.stored()}, "c.pth", may_adapt=True) == PixelFormat(
        5, mean=(0.1,) * 5, std=(0.2,) * 5
    )
    assert "in_chans 3, not 5" in user_error(
        lambda: resolve(flags, {"args": RGB.stored()}, "c.pth")
    )


def test_another_number_of_bands_keeps_how_files_are_read():
    saved = {"args": PixelFormat(value_range=(0.0, 100.0), nodata=7.0, layout="chw").stored()}
    flags = given(in_chans=1, mean=[0.1], std=[0.2])
    adapted = resolve(flags, saved, "c.pth", may_adapt=True)
    assert adapted == PixelFormat(1, None, (0.0, 100.0), (0.1,), (0.2,), 7.0, "chw")
    adapted = resolve(flags | {"value_range": (0.0, 9.0)}, saved, "c.pth", may_adapt=True)
    assert adapted.value_range == (0.0, 9.0)


def test_a_checkpoint_that_does_not_say_leaves_it_to_the_flags():
    flags = given(mean=[0.5] * 3, std=[0.25] * 3)
    for saved in (None, {}, {"args": None}, {"args": {"model": "mae_vit_base_patch16"}}):
        assert resolve(flags, saved) == PixelFormat(mean=(0.5,) * 3, std=(0.25,) * 3)


def test_an_older_checkpoint_of_this_project_is_of_rgb_with_imagenets_statistics(user_error):
    contents = {"command": "main_pretrain.py", "args": {"model": "mae_vit_base_patch16"}}
    assert resolve(given(), contents, "c.pth").stored() == RGB.stored()
    flags = given(mean=[0.5] * 3, std=[0.25] * 3)
    assert "trained with mean 0.485" in user_error(lambda: resolve(flags, contents, "c.pth"))


# ---- weights of three channels in models of another number


@pytest.mark.parametrize("in_chans", [1, 2, 4, 13])
def test_encoders_of_three_channels_start_others_as_timms_do(tmp_path, in_chans, capsys):
    torch.manual_seed(0)
    source = timm.create_model("vit_tiny_patch16_224")
    torch.save(source.state_dict(), tmp_path / "rgb.pth")
    expected = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=True,
        in_chans=in_chans,
        pretrained_cfg_overlay={"file": str(tmp_path / "rgb.pth"), "custom_load": False},
    )
    model = models_vit.build_model("vit_tiny_patch16", in_chans=in_chans, global_pool=False)
    pretrained.load_encoder(model, source.state_dict(), "rgb.pth")
    assert torch.equal(model.patch_embed.proj.weight, expected.patch_embed.proj.weight)
    assert f"rgb.pth has 3 channels: its patch projection is adapted to {in_chans}" in (
        capsys.readouterr().err
    )


def test_a_classifier_is_not_adapted(user_error):
    weights = models_vit.build_model("vit_nano_patch4", img_size=8).state_dict()
    model = models_vit.build_model("vit_nano_patch4", img_size=8, in_chans=4)
    message = user_error(lambda: pretrained.load_classifier(model, weights, "rgb.pth"))
    assert message.startswith("rgb.pth has 3 channels, the model 4 channels")


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("in_chans", [1, 6])
def test_a_grey_image_in_one_three_or_six_equal_bands_has_the_same_loss(in_chans, norm_pix_loss):
    """Where the model of three bands predicts equal ones, as it learns to on grey images.

    timm's rule repeats whole triples without loss; other numbers cut the last one.
    """
    options = {"img_size": 16, "norm_pix_loss": norm_pix_loss}
    torch.manual_seed(0)
    rgb = models_mae.build_model("mae_vit_nano_patch4", **options)
    with torch.no_grad():
        for parameter in rgb.decoder_pred.parameters():
            channels = parameter.unflatten(0, (-1, 3))
            channels.copy_(channels[:, :1].expand_as(channels).clone())
    other = models_mae.build_model("mae_vit_nano_patch4", in_chans=in_chans, **options)
    other.load_state_dict(pretrained.adapt_channels(rgb.state_dict(), in_chans))
    grey, noise = torch.randn(4, 1, 16, 16), torch.rand(4, 16)
    losses = [
        model(grey.expand(-1, model.in_chans, -1, -1), 0.75, noise)[0] for model in (rgb, other)
    ]
    # norm_pix_loss divides by an unbiased variance, over P - 1 values.
    tolerance = 0.05 if norm_pix_loss else 1e-5
    torch.testing.assert_close(*losses, rtol=tolerance, atol=0)


# ---- images that are not 8-bit RGB


def test_normalisation_of_any_bands_is_numpys_and_makes_the_mean_exactly_0():
    random = np.random.default_rng(0)
    images = random.random((2, 13, 4, 5), dtype=np.float32)
    mean, std = random.random((2, 13)) + 0.1
    expected = (images - mean[:, None, None]) / std[:, None, None]
    normalized = data.normalize(torch.from_numpy(images), tuple(mean), tuple(std))
    np.testing.assert_allclose(normalized, expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(
        data.denormalize(normalized, tuple(mean), tuple(std)), images, rtol=0, atol=1e-6
    )
    filled = torch.tensor(mean, dtype=torch.float32)[None, :, None, None].expand(1, -1, 3, 3)
    assert data.normalize(filled, tuple(mean), tuple(std)).eq(0).all()


@pytest.mark.parametrize(
    "transform",
    [
        data.pretrain_transform((24, 32)),
        data.probe_transform((24, 32)),
        data.eval_transform((24, 32)),
        data.picture_transform((24, 32)),
    ],
    ids=lambda transform: str(transform)[:60],
)
def test_float_images_of_any_bands_are_cut_and_resized_like_8_bit_ones(transform):
    image = torch.cat([pixels(photograph(61, 47, seed=seed)) for seed in range(2)])[:5]
    for seed in range(5):
        results = []
        for version in (image, image / 255):
            torch.manual_seed(seed)
            results.append(transform(version))
        levels, floats = results
        assert levels.dtype == torch.uint8
        assert floats.dtype == torch.float32
        assert floats.shape == levels.shape == (5, 24, 32)
        # uint8 is rounded between rows and columns, too.
        assert (levels - 255 * floats).abs().max() <= 1.6
        assert floats.min() >= 0
        assert floats.max() <= 1


def test_bicubic_overshoots_stay_on_the_scale():
    edge = torch.zeros(2, 16, 16)
    edge[:, :, 8:] = 1
    for transform in (data.pretrain_transform(40), data.eval_transform(40)):
        torch.manual_seed(0)
        image = transform(edge)
        assert image.min() == 0
        assert image.max() == 1


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({}, "--aa rand-m9-mstd0.5-inc1"),
        ({"aa": "none", "color_jitter": 0.4}, "--color_jitter 0.4"),
    ],
    ids=str,
)
def test_policies_and_jitter_are_for_8_bit_rgb(user_error, options, flag):
    message = user_error(lambda: data.finetune_transform(16, is_8_bit_rgb=False, **options))
    assert message == f"{flag} is for 8-bit RGB images, which these are not: add --aa none"


def test_fine_tuning_cuts_other_images_as_pre_training_does():
    image = torch.rand(5, 40, 50)
    transforms = data.finetune_transform(16, aa="none"), data.pretrain_transform(16, (0.08, 1.0))
    cut = []
    for transform in transforms:
        torch.manual_seed(0)
        cut.append(transform(image))
    assert torch.equal(*cut)


@pytest.mark.parametrize(
    "make",
    [
        data.pretrain_transform,
        data.probe_transform,
        lambda size, scale, flip: data.finetune_transform(size, None, "none", scale, flip),
    ],
    ids=["pretrain", "probe", "finetune"],
)
def test_flips_and_crops_can_be_turned_off(make):
    """A whole square image under a crop of its own area stays as it is, or is flipped."""
    image = pixels(photograph(32, 32))
    seen = {True: set(), False: set()}
    for flip, seed in [(flip, seed) for flip in seen for seed in range(200)]:
        torch.manual_seed(seed)
        np.random.seed(seed)
        import random

        random.seed(seed)
        result = make(32, (1.0, 1.0), flip)(image)
        seen[flip] |= {torch.equal(result, image), 2 * torch.equal(result, image.flip(2))}
    assert 2 in seen[True]
    assert True in seen[True] & seen[False]
    assert 2 not in seen[False]


# ---- pictures


def test_pictures_of_imagenets_statistics_show_the_whole_scale():
    imgs = data.normalize(torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8))
    assert torch.equal(visualize._shown(imgs, RGB), data.denormalize(imgs))


def test_pictures_of_values_in_a_corner_of_the_scale_are_stretched():
    format = PixelFormat(1, mean=(0.05,), std=(0.01,))
    values = torch.tensor([0.0, 0.02, 0.05, 0.08, 0.5]).reshape(1, 1, 1, 5)
    shown = visualize._shown(data.normalize(values, format.mean, format.std), format)
    torch.testing.assert_close(shown.flatten(), torch.tensor([0, 0, 0.5, 1, 1]))


def test_statistics_outside_of_the_scale_show_all_of_it():
    pixels = PixelFormat(2, mean=(1.5, -0.5), std=(0.1, 0.1))
    assert visualize.shown_ranges(pixels) == [(0.0, 1.0)] * 2


@pytest.mark.parametrize(
    ("bands", "chosen", "expected"),
    [
        (1, None, [0, 0, 0]),
        (2, None, [0, 0, 0]),
        (5, None, [0, 1, 2]),
        (5, [3, 1, 0], [3, 1, 0]),
        (5, [4], [4, 4, 4]),
    ],
)
def test_a_grid_shows_three_bands_or_grey(bands, chosen, expected):
    levels = torch.arange(bands) * 10
    columns = [(levels / 255)[None, :, None, None].expand(1, -1, 4, 4)] * 4
    picture = np.asarray(visualize.draw_grid(columns, bands=chosen, min_side=4))
    assert picture[18, 4].tolist() == levels[expected].tolist()

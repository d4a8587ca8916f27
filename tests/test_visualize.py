"""The reconstruction grid, from a checkpoint and pixel by pixel."""

import argparse

import numpy as np
import pytest
import torch
from helpers import command_line
from PIL import Image

import main_visualize
from models_mae import build_model
from util import data, decoding, visualize


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """A smooth 40 x 32 picture in a file."""
    path = tmp_path_factory.mktemp("photograph") / "photograph.png"
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((40, 32), Image.BICUBIC).save(path)
    return path


def show(flags):
    main_visualize.main(main_visualize.get_args_parser().parse_args(command_line(flags)))


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_columns_show_what_they_say(photograph, norm_pix_loss):
    torch.manual_seed(0)
    model = build_model("tiny_test_model", img_size=(32, 40), norm_pix_loss=norm_pix_loss)
    pixels = decoding.read_image(photograph)[None]
    imgs = data.normalize(pixels)
    # A model that predicts its targets exactly reconstructs the original exactly.
    target = model.patchify(imgs)
    if norm_pix_loss:
        variance = target.var(-1, keepdim=True)
        target = (target - target.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()
    model.forward_decoder = lambda latent, ids_restore: target
    original, masked, reconstruction, pasted = visualize.reconstruct(model, imgs, 0.75, seed=0)
    torch.testing.assert_close(original, pixels / 255, rtol=0, atol=1e-6)
    torch.testing.assert_close(reconstruction, original, rtol=0, atol=1e-5)
    torch.testing.assert_close(pasted, original, rtol=0, atol=1e-5)
    removed = model.patchify(masked).eq(0.5).all(dim=-1)
    assert removed.sum() == 60
    assert torch.equal(model.patchify(masked)[~removed], model.patchify(original)[~removed])

    model.forward_decoder = lambda latent, ids_restore: torch.zeros_like(target)
    _, _, reconstruction, pasted = visualize.reconstruct(model, imgs, 0.75, seed=0)
    flat = model.patchify(imgs).mean(-1) if norm_pix_loss else torch.zeros(1, 80)
    expected = flat[:, :, None].expand_as(target)
    if not norm_pix_loss:  # zero is ImageNet's mean colour
        expected = data.denormalize(model.unpatchify(expected))
        torch.testing.assert_close(reconstruction, expected)
    assert torch.equal(model.patchify(pasted)[~removed], model.patchify(original)[~removed])
    assert not torch.equal(model.patchify(pasted)[removed], model.patchify(original)[removed])


def test_grid_places_every_image(photograph):
    columns = [torch.full((2, 3, 8, 12), value) for value in (0.0, 0.2, 0.4, 0.6)]
    columns[1][1] = 1.0
    grid = np.asarray(visualize.draw_grid(columns, min_side=16))
    height, width = 16, 24
    assert grid.shape[1] == 4 * width + 5 * 4
    row_tops = [grid.shape[0] - 2 * (height + 4), grid.shape[0] - (height + 4)]
    for row, top in enumerate(row_tops):
        for column in range(4):
            left = 4 + column * (width + 4)
            tile = grid[top : top + height, left : left + width]
            assert np.all(tile == round(columns[column][row, 0, 0, 0].item() * 255))


def test_a_pre_training_says_all_that_is_needed(
    pretrain_flags, pretrain, photograph, image_folder, tmp_path, capsys
):
    pretrain(pretrain_flags | {"norm_pix_loss": True, "input_size": [8, 16]})
    checkpoint = pretrain_flags["output_dir"] / "checkpoint-last.pth"
    output = tmp_path / "new" / "recon.png"
    capsys.readouterr()
    show({"checkpoint": checkpoint, "images": [photograph] * 3, "output": output})
    out = capsys.readouterr().out
    assert "3 images, 75% of their patches masked" in out
    assert "mean and variance are those of the original" in out
    three_rows = Image.open(output).size
    show({"checkpoint": checkpoint, "data_path": image_folder, "output": output, "num_images": 2})
    assert Image.open(output).size[1] < three_rows[1]
    first = output.read_bytes()
    show({"checkpoint": checkpoint, "data_path": image_folder, "output": output, "num_images": 2})
    assert output.read_bytes() == first
    flags = {"checkpoint": checkpoint, "data_path": image_folder, "output": output}
    show(flags | {"num_images": 2, "seed": 1})
    assert output.read_bytes() != first
    show(flags | {"mask_ratio": 0.5})
    assert "50% of their patches" in capsys.readouterr().out


def test_released_files_need_to_be_told_what_they_are(photograph, tmp_path, user_error, capsys):
    torch.manual_seed(0)
    weights = build_model("tiny_test_model", img_size=8).state_dict()
    bare, with_args = tmp_path / "bare.pth", tmp_path / "with_args.pth"
    torch.save({"model": weights}, bare)
    args = argparse.Namespace(model="tiny_test_model", input_size=8, norm_pix_loss=True)
    torch.save({"model": weights, "args": args}, with_args)
    flags = {"images": photograph, "output": tmp_path / "recon.png"}

    def refused(**given):
        return user_error(lambda: show(flags | given))

    assert "does not say its model: add --model" in refused(checkpoint=bare)
    given = {"checkpoint": bare, "model": "tiny_test_model", "input_size": 8}
    assert "does not say its norm_pix_loss" in refused(**given)
    show(flags | given | {"no_norm_pix_loss": True})
    assert "mean and variance" not in capsys.readouterr().out
    show(flags | {"checkpoint": with_args})
    assert "mean and variance" in capsys.readouterr().out
    assert "says norm_pix_loss True" in refused(checkpoint=with_args, no_norm_pix_loss=True)
    given |= {"input_size": 16, "norm_pix_loss": True}
    assert "is not a tiny_test_model: size mismatch for pos_embed" in refused(**given)


def test_wrong_input_is_refused(photograph, tmp_path, user_error):
    weights = build_model("tiny_test_model", img_size=8).state_dict()
    args = {"model": "tiny_test_model", "input_size": 8, "norm_pix_loss": False}
    whole, encoder = tmp_path / "whole.pth", tmp_path / "encoder.pth"
    torch.save({"model": weights, "args": args}, whole)
    kept = {k: v for k, v in weights.items() if "decoder" not in k and k != "mask_token"}
    torch.save({"model": kept, "args": args}, encoder)
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    flags = {"checkpoint": whole, "images": photograph, "output": tmp_path / "recon.png"}
    for wrong, message in (
        ({"checkpoint": encoder}, "has no decoder weights, which a reconstruction needs"),
        ({"checkpoint": tmp_path / "none.pth"}, "does not exist"),
        ({"images": text}, f"unreadable image {text}"),
        ({"images": tmp_path / "none.jpg"}, "none.jpg"),
        ({"output": tmp_path / "recon.xyz"}, "has no suffix of an image format"),
        ({"output": text / "recon.png"}, "can't be written"),
        ({"mask_ratio": 0}, "removes none of the 4 patches"),
    ):
        assert message in user_error(lambda wrong=wrong: show(flags | wrong))

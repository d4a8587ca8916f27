"""Pictures: reconstructions, attention and components, by hand and from checkpoints."""

import argparse

import numpy as np
import pytest
import tiny_finetune  # noqa: F401, for its model
import torch
from helpers import command_line
from PIL import Image

import main_visualize
import models_vit
from models_mae import build_model
from util import attention, data, decoding, visualize


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


# ---- attention


def by_hand(model, x, block):
    """Attention weights [heads, 1 + L, 1 + L] of a block for its input [1 + L, D], in float64."""
    state = {key: value.double().numpy() for key, value in model.blocks[block].state_dict().items()}
    x = x.double().numpy()
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * state["norm1.weight"] + state["norm1.bias"]
    q, k, _ = np.split(x @ state["attn.qkv.weight"].T + state["attn.qkv.bias"], 3, axis=-1)
    weights = []
    for head in range(4):
        width = slice(head * 8, head * 8 + 8)
        products = q[:, width] @ k[:, width].T / np.sqrt(8)
        exponentials = np.exp(products - products.max(-1, keepdims=True))
        weights.append(exponentials / exponentials.sum(-1, keepdims=True))
    return np.stack(weights)


@pytest.mark.parametrize("kind", ["autoencoder", "classifier"])
@torch.no_grad()
def test_attention_is_the_softmax_of_queries_and_keys(kind):
    torch.manual_seed(0)
    model = build_model("tiny_test_model", img_size=(8, 12))
    if kind == "classifier":
        model = models_vit.build_model("tiny_test_vit", img_size=(8, 12), num_classes=2).eval()
    for weight in model.parameters():
        weight += 0.2 * torch.randn_like(weight)
    imgs = torch.randn(3, 3, 8, 12)
    patches = model.patch_embed(imgs) + model.pos_embed[:, 1:]
    cls_token = (model.cls_token + model.pos_embed[:, :1]).expand(3, -1, -1)
    x = torch.cat([cls_token, patches], dim=1)
    for layer, inputs in ((0, x), (-1, model.blocks[0](x))):
        found = attention.attention(model, imgs, layer)
        assert found.shape == (3, 2, 4, 7)
        for image in range(3):
            expected = by_hand(model, inputs[image], layer)
            pair = np.stack([expected[:, 0], expected[:, 1:].mean(1)])
            np.testing.assert_allclose(found[image], pair, atol=1e-6)
    assert not model.blocks[1].attn._forward_pre_hooks


def test_maps_lie_over_their_patches():
    """Each head looks at one patch: there the map is brightest, in a grid of 2 x 3 patches."""
    imgs = torch.zeros(2, 3, 8, 12)
    looks_at = torch.tensor([[[0, 5], [2, 3]], [[1, 1], [4, 0]]])  # image, query, head
    weights = torch.nn.functional.one_hot(1 + looks_at, 7).float() * 0.3
    weights[..., 0] = 0.7
    picture = np.asarray(visualize.draw_attention(imgs, weights, (2, 3), side=80).convert("L"))
    assert picture.shape[1] == 4 + 18 + 4 * (120 + 4)
    tops = [18, 18 + 84, 18 + 2 * 84 + 8, 18 + 3 * 84 + 8]
    for row, top in enumerate(tops):
        for head in range(2):
            left = 22 + (2 + head) * 124
            tile = picture[top : top + 80, left : left + 120].astype(float)
            means = tile.reshape(2, 40, 3, 40).mean(axis=(1, 3))
            assert means.argmax() == looks_at[row // 2, row % 2, head]
            assert means.max() > 3 * np.sort(means.ravel())[-2]
    assert np.all(picture[tops[1] : tops[1] + 80, 22 : 22 + 120] == 255)  # no image there


# ---- components


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_components_are_numpy_s(shape):
    random = np.random.default_rng(0)
    x = random.normal(size=shape) * random.uniform(0.1, 3, shape[1]) + 5
    found, shares = attention.principal_components(torch.from_numpy(x).float())
    centred = x.astype(np.float32).astype(np.float64)
    centred -= centred.mean(0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign([row[np.abs(row).argmax()] for row in vt[:3]])
    np.testing.assert_allclose(found, (u * s)[:, :3] * signs, atol=1e-6)
    np.testing.assert_allclose(shares, (s**2 / (s**2).sum())[:3], atol=1e-9)


def test_few_patches_have_few_components():
    found, shares = attention.principal_components(torch.tensor([[1.0, 1.0], [3.0, 1.0]]))
    torch.testing.assert_close(found.float(), torch.tensor([[-1.0, 0, 0], [1.0, 0, 0]]))
    torch.testing.assert_close(shares.float(), torch.tensor([1.0, 0, 0]))
    found, shares = attention.principal_components(torch.ones(4, 5))
    assert not found.any()
    assert not shares.any()


def test_equal_patches_have_equal_colours_in_all_images():
    kinds = torch.tensor([[0, 1, 2, 0, 1, 2], [2, 2, 1, 1, 0, 0]])
    patches = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))[kinds]
    picture = visualize.draw_components(torch.zeros(2, 3, 8, 12), patches, (2, 3), side=80)
    picture = np.asarray(picture)
    colours = {}
    for image in range(2):
        top, left = 18 + image * 84, 4 + 124
        tile = picture[top : top + 80, left : left + 120].reshape(2, 40, 3, 40, 3)
        for kind, patch in zip(kinds[image].tolist(), np.ndindex(2, 3), strict=True):
            colour = tile[patch[0], :, patch[1]].reshape(-1, 3)
            assert np.all(colour == colours.setdefault(kind, colour[0]))
    assert len({tuple(colour) for colour in colours.values()}) == 3


# ---- the command


def test_attention_and_components_of_any_checkpoint(photograph, tmp_path, user_error, capsys):
    torch.manual_seed(0)
    weights = build_model("tiny_test_model", img_size=(8, 12)).state_dict()
    args = {"model": "tiny_test_model", "input_size": (8, 12), "norm_pix_loss": False}
    classifier = {"model": "tiny_test_vit", "input_size": (8, 12), "nb_classes": 2}
    classifier["global_pool"] = True
    encoder = {k: v for k, v in weights.items() if "decoder" not in k and k != "mask_token"}
    contents = {
        "whole": {"model": weights, "args": args},
        "encoder": {"model": encoder, "args": args},
        "classifier": {
            "model": models_vit.build_saved(classifier, 3).state_dict(),
            "args": classifier,
        },
    }
    written = {}
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pth")
        pictures = {kind: tmp_path / name / f"{kind}.png" for kind in ("attention", "pca")}
        flags = {"checkpoint": tmp_path / f"{name}.pth", "images": [photograph] * 2} | pictures
        if name == "whole":
            flags["output"] = tmp_path / name / "recon.png"
        capsys.readouterr()
        show(flags)
        out = capsys.readouterr().out
        assert "attention.png: 2 images, 4 heads of block 1; the class token gives" in out
        assert "pca.png: 2 images" in out
        assert ("which a reconstruction needs: it is left out" in out) == (name != "whole")
        assert ("recon.png: 2 images, 75% of their patches masked" in out) == (name == "whole")
        written[name] = [path.read_bytes() for path in pictures.values()]
        show(flags)
        assert [path.read_bytes() for path in pictures.values()] == written[name]
        show(flags | {"layer": 0})
        assert [path.read_bytes() for path in pictures.values()] != written[name]
    assert written["whole"] == written["encoder"]
    assert written["encoder"] != written["classifier"]
    whole, encoder = tmp_path / "whole.pth", tmp_path / "encoder.pth"
    picture, text = tmp_path / "x.png", tmp_path / "x.txt"
    for wrong, message in (
        ({"checkpoint": encoder, "attention": picture, "output": picture}, "has no decoder weight"),
        ({"checkpoint": whole, "output": picture, "layer": 0}, "add one of these"),
        ({"checkpoint": whole, "attention": picture, "layer": 2}, "layer 2 does not exist"),
        ({"checkpoint": whole, "attention": text}, "--attention"),
        ({"checkpoint": whole, "pca": text}, "--pca"),
        ({"attention": picture}, "give a model by --checkpoint"),
    ):
        flags = {"images": photograph} | wrong
        assert message in user_error(lambda flags=flags: show(flags))
    assert "give a model" in user_error(lambda: show({"checkpoint": whole}))

"""The model against the figures of the original, against transformers, and by hand."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from reference_figures import FIGURES, assert_statistics, reference_inputs, reference_mae
from torch import nn

import models_mae
from models_mae import MaskedAutoencoderViT
from util.errors import UserError
from util.optim import adamw, weight_decay_groups

CASES = FIGURES["mae"] + FIGURES["mae_base"]
IDS = [f"seed{case['seed']}" for case in CASES]
SMALL = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "norm_layer": partial(nn.LayerNorm, eps=1e-6),
}


@pytest.fixture(params=CASES, ids=IDS)
def case(request):
    return request.param


def test_forward_and_gradients_equal_the_reference(case):
    model = reference_mae(case)
    imgs, noise = reference_inputs(case, model)
    latent, mask, ids_restore = model.forward_encoder(imgs, case["mask_ratio"], noise)
    assert_statistics(latent, case["latent"])
    assert mask[0].tolist() == case["mask_row0"]
    assert ids_restore[0].tolist() == case["ids_restore_row0"]

    loss, pred, mask = model(imgs, case["mask_ratio"], noise)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    assert_statistics(pred, case["pred"])
    loss.backward()
    norms = {
        name: parameter.grad.double().norm().item()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if "grad_l2" in case:
        assert norms == pytest.approx(case["grad_l2"], rel=1e-4)


@pytest.mark.parametrize("case", [c for c in CASES if "adamw" in c], ids=lambda c: c["seed"])
def test_adamw_losses_equal_the_reference(case):
    model = reference_mae(case)
    recipe = case["adamw"]
    groups = weight_decay_groups(model, recipe["weight_decay"])
    optimizer = adamw(groups, betas=tuple(recipe["betas"]))
    for group in optimizer.param_groups:
        group["lr"] = recipe["lr"]
    losses = []
    for step in range(len(recipe["losses"])):
        imgs, noise = reference_inputs(
            case,
            model,
            image_seed=case["seed"] + 100 + step,
            noise_seed=case["seed"] + 200 + step,
        )
        loss, _, _ = model(imgs, case["mask_ratio"], noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(recipe["losses"], rel=1e-4)


@pytest.mark.parametrize("name", FIGURES["checkpoints"])
def test_state_dict_is_the_published_one(name):
    expected = FIGURES["checkpoints"][name]
    with torch.device("meta"):
        model = models_mae.build_model(name)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == expected["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == expected["total"]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == expected["trainable"]


@pytest.mark.parametrize("name", [n for n in models_mae.MODELS if n != "tiny_test_model"])
def test_named_models_have_the_documented_sizes(name):
    widths = {"nano": 128, "tiny": 192, "small": 384, "base": 768, "large": 1024, "huge": 1280}
    depths = {"nano": 6, "tiny": 12, "small": 12, "base": 12, "large": 24, "huge": 32}
    heads = {"nano": 4, "tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16}
    decoders = {"nano": (96, 2, 4), "tiny": (192, 4, 3), "small": (256, 4, 8)}
    size, patch = name.split("_")[2], int(name.split("_")[3].removeprefix("patch"))
    with torch.device("meta"):
        model = models_mae.build_model(name, img_size=2 * patch)
    assert model.cls_token.shape[-1] == widths[size]
    assert len(model.blocks) == depths[size]
    assert model.blocks[0].attn.num_heads == heads[size]
    assert model.patch_embed.patch_size == (patch, patch)
    decoder = (
        model.mask_token.shape[-1],
        len(model.decoder_blocks),
        model.decoder_blocks[0].attn.num_heads,
    )
    assert decoder == decoders.get(size, (512, 8, 16))
    assert model.norm.eps == model.decoder_norm.eps == model.blocks[0].norm1.eps == 1e-6


def transformers_twin(model):
    """transformers' ViTMAEForPreTraining with the weights of `model` (SMALL, 32 px, patch 8)."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    twin = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=64,
            image_size=32,
            patch_size=8,
            layer_norm_eps=1e-6,
            norm_pix_loss=model.norm_pix_loss,
        )
    )
    renamed = (
        (r"^decoder_blocks", "decoder.decoder_layers"),
        (r"^blocks", "vit.layers"),
        (r"norm1", "layernorm_before"),
        (r"norm2", "layernorm_after"),
        (r"attn\.proj", "attention.o_proj"),
        (r"^norm", "vit.layernorm"),
        (r"^(decoder_(embed|norm|pred|pos_embed)|mask_token)", r"decoder.\1"),
        (r"^patch_embed\.proj", "vit.embeddings.patch_embeddings.projection"),
        (r"^cls_token", "vit.embeddings.cls_token"),
        (r"^pos_embed", "vit.embeddings.position_embeddings"),
    )
    weights = {}
    for name, value in model.state_dict().items():
        for pattern, replacement in renamed:
            name = re.sub(pattern, replacement, name)
        if "attn.qkv" in name:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                weights[name.replace("attn.qkv", f"attention.{part}_proj")] = third
        else:
            weights[name] = value
    twin.load_state_dict(weights)
    return twin


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_equals_transformers_with_converted_weights(norm_pix_loss):
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(32, 8, norm_pix_loss=norm_pix_loss, **SMALL)
    twin = transformers_twin(model)
    imgs, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    loss, pred, mask = model(imgs, 0.75, noise)
    theirs = twin(pixel_values=imgs, noise=noise)
    torch.testing.assert_close(loss, theirs.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(pred, theirs.logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(mask, theirs.mask)
    loss.backward()
    theirs.loss.backward()
    gradient = twin.decoder.decoder_pred.weight.grad
    torch.testing.assert_close(model.decoder_pred.weight.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("img_size", "patch_size", "in_chans"),
    [(32, 8, 1), (32, 8, 4), ((16, 40), 8, 3), (32, (4, 16), 3), ((24, 32), (8, 4), 4)],
)
def test_shapes_that_are_not_square_and_other_channels(img_size, patch_size, in_chans):
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(img_size, patch_size, in_chans, norm_pix_loss=True, **SMALL)
    height, width = model.patch_embed.img_size
    patch_height, patch_width = model.patch_embed.patch_size
    imgs = torch.randn(2, in_chans, height, width)
    patches = model.patchify(imgs)
    assert torch.equal(model.unpatchify(patches), imgs)
    columns = width // patch_width
    patch = imgs[1, :, patch_height : 2 * patch_height, patch_width : 2 * patch_width]
    assert torch.equal(patches[1, columns + 1], patch.permute(1, 2, 0).flatten())

    loss, pred, mask = model(imgs, mask_ratio=0.5)
    loss.backward()
    assert pred.shape == patches.shape
    assert mask.sum(dim=1).tolist() == [patches.shape[1] / 2] * 2
    target = (patches - patches.mean(-1, keepdim=True)) / (
        patches.var(-1, keepdim=True) + 1e-6
    ).sqrt()
    removed = mask.bool()
    expected = (pred[removed] - target[removed]).square().mean()
    torch.testing.assert_close(loss, expected)


def test_removed_pixels_never_reach_the_encoder():
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(32, 8, **SMALL)
    imgs, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    latent, mask, _ = model.forward_encoder(imgs, 0.75, noise)
    removed_pixels = model.unpatchify(mask[:, :, None].expand(-1, -1, 192)).bool()
    changed = torch.where(removed_pixels, torch.randn_like(imgs), imgs)
    assert torch.equal(model.forward_encoder(changed, 0.75, noise)[0], latent)
    changed = torch.where(removed_pixels, imgs, imgs + 1)
    assert not torch.equal(model.forward_encoder(changed, 0.75, noise)[0], latent)


def test_masks_keep_the_patches_of_least_noise_and_differ_between_samples():
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(32, 8, **SMALL)
    noise = torch.rand(5, 16)
    x, mask, ids_restore = model.random_masking(torch.arange(80.0).view(5, 16, 1), 0.75, noise)
    for row in range(5):
        kept = np.argsort(noise[row].numpy())[:4]
        assert x[row, :, 0].tolist() == [16 * row + k for k in kept]
        assert sorted(np.flatnonzero(mask[row] == 0)) == sorted(kept)
        assert ids_restore[row].tolist() == noise[row].argsort().argsort().tolist()
    assert len({tuple(row.tolist()) for row in mask}) == 5


def test_loss_is_float32_under_autocast():
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(32, 8, norm_pix_loss=True, **SMALL)
    imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, pred, mask = model(imgs, 0.75, noise)
    assert pred.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    target = model.patchify(imgs)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = (pred.float() - target).square()[mask.bool()].mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_initial_weights():
    torch.manual_seed(0)
    model = models_mae.build_model("mae_vit_tiny_patch4", img_size=16)
    bound = math.sqrt(6 / (192 + 3 * 4 * 4))  # xavier-uniform over the pixels of a patch
    weight = model.patch_embed.proj.weight
    assert 0.98 * bound < weight.abs().max() <= bound
    qkv = model.blocks[0].attn.qkv
    bound = math.sqrt(6 / (192 + 3 * 192))
    assert 0.98 * bound < qkv.weight.abs().max() <= bound
    assert qkv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not any(p.any() for n, p in model.named_parameters() if "norm" in n and "bias" in n)
    assert not any(m.bias.any() for m in model.modules() if isinstance(m, nn.Linear))
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.2)


def test_wrong_models_are_refused():
    with pytest.raises(UserError, match=r"unknown model 'mae_vit_giant'.*mae_vit_base_patch16"):
        models_mae.build_model("mae_vit_giant")
    for img_size in (30, (32, 30), 4):
        with pytest.raises(UserError, match="not divisible by the patch of 8 x 8"):
            MaskedAutoencoderViT(img_size, 8, **SMALL)
    model = MaskedAutoencoderViT(32, 8, **SMALL)
    for ratio, outcome in ((0.0, "removes none"), (0.03, None), (0.95, "keeps none"), (1, "keeps")):
        if outcome is None:
            model.check_mask_ratio(ratio)
        else:
            with pytest.raises(UserError, match=outcome):
                model.check_mask_ratio(ratio)

"""Features without a mask: timm's own, and those of the pre-training's encoder."""

import pytest
import torch

import models_mae
import models_vit
from util import features


@pytest.mark.parametrize("layer", [-1, 0, 2, -6])
@pytest.mark.parametrize("global_pool", [True, False])
def test_tokens_are_timm_s(layer, global_pool):
    torch.manual_seed(0)
    model = models_vit.build_model("vit_nano_patch4", img_size=(12, 16), global_pool=global_pool)
    imgs = torch.randn(2, 3, 12, 16)
    index = layer % len(model.blocks)
    prefix, patches = model.forward_intermediates(
        imgs,
        [index],
        return_prefix_tokens=True,
        norm=True,
        output_fmt="NLC",
        intermediates_only=True,
    )[0][::-1]
    found = features.tokens(model.eval(), imgs, layer)
    torch.testing.assert_close(found, torch.cat([prefix, patches], dim=1), rtol=0, atol=1e-5)
    if layer == -1:
        torch.testing.assert_close(found, model.forward_features(imgs), rtol=0, atol=0)
        how = "mean" if global_pool else "cls"
        pooled = model.forward_head(model.forward_features(imgs), pre_logits=True)
        torch.testing.assert_close(features.pool(model, found, how), pooled, rtol=0, atol=1e-6)


def test_tokens_are_those_of_an_unmasked_encoder():
    torch.manual_seed(0)
    model = models_mae.build_model("mae_vit_nano_patch4", img_size=(8, 12))
    imgs = torch.randn(2, 3, 8, 12)
    in_order = torch.arange(6.0).expand(2, -1)
    expected, _, _ = model.forward_encoder(imgs, 0, in_order)
    found = features.tokens(model, imgs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(features.pool(model, found, "none"), expected[:, 1:])


@pytest.mark.parametrize("layer", [6, -7])
def test_a_layer_that_does_not_exist(layer, user_error):
    model = models_mae.build_model("mae_vit_nano_patch4", img_size=8)
    message = user_error(lambda: features.tokens(model, torch.zeros(1, 3, 8, 8), layer))
    assert message.startswith(f"layer {layer} does not exist: the model has the blocks 0 to 5")

"""The classifiers against the figures of the original, the masked autoencoder, and by hand."""

from functools import partial

import numpy as np
import pytest
import torch
from reference_figures import FIGURES, fill_weights
from torch import nn

import models_mae
import models_vit
from util.pretrained import load_encoder

CASES = FIGURES["vit"] + FIGURES["vit_base"]
NAMES = [name for name in models_mae.MODELS if not name.endswith("8b") and "test" not in name]
SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}


@pytest.fixture(params=CASES, ids=lambda case: f"seed{case['seed']}")
def case(request):
    return request.param


def small_model(global_pool, num_classes=1000, **config):
    """A classifier of images of 24 x 16 pixels with random weights everywhere, norms too."""
    torch.manual_seed(0)
    model = models_vit.vision_transformer(
        global_pool, img_size=(24, 16), num_classes=num_classes, **SMALL, **config
    )
    return fill_weights(model, seed=0)


def test_logits_and_state_dict_equal_the_reference(case):
    model = models_vit.vision_transformer(
        case["global_pool"], num_classes=case["num_classes"], **case["config"]
    )
    fill_weights(model, case["seed"]).eval()
    size = case["config"]["img_size"]
    images = np.random.RandomState(case["seed"] + 1).standard_normal((case["batch"], 3, size, size))
    with torch.no_grad():
        logits = model(torch.from_numpy(images.astype(np.float32)))
    torch.testing.assert_close(logits, torch.tensor(case["logits"]), rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())  # the positions too
    if "keys" in case:
        assert {k: list(v.shape) for k, v in model.state_dict().items()} == case["keys"]


def test_there_is_a_classifier_for_every_autoencoder():
    assert {f"mae_{name}" for name in models_vit.MODELS if "test" not in name} == set(NAMES)


@pytest.mark.parametrize("global_pool", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_sizes_equal_those_of_the_autoencoder_of_the_same_name(name, global_pool, monkeypatch):
    # timm 1.0.12 takes the rates of drop path from a tensor, which needs values.
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        mae = models_mae.build_model(name)
        classifier = models_vit.build_model(
            name.removeprefix("mae_"), num_classes=7, global_pool=global_pool
        )
    expected = {
        key.replace("norm.", "fc_norm.") if global_pool and key.startswith("norm.") else key: shape
        for key, shape in ((k, v.shape) for k, v in mae.state_dict().items())
        if not key.startswith(("decoder_", "mask_token"))
    }
    expected |= {"head.weight": (7, mae.norm.weight.numel()), "head.bias": (7,)}
    assert {key: value.shape for key, value in classifier.state_dict().items()} == expected
    assert classifier.patch_embed.img_size == mae.patch_embed.img_size == (224, 224)
    for block, expected_block in zip(classifier.blocks, mae.blocks, strict=True):
        assert block.attn.num_heads == expected_block.attn.num_heads
    epsilons = {m.eps for m in classifier.modules() if isinstance(m, nn.LayerNorm)}
    assert epsilons == {1e-6}


def test_features_equal_the_encoder_of_the_autoencoder_on_all_patches():
    torch.manual_seed(0)
    norm_layer = partial(nn.LayerNorm, eps=1e-6)
    mae = models_mae.MaskedAutoencoderViT((24, 16), **SMALL, norm_layer=norm_layer)
    fill_weights(mae, seed=1).eval()
    classifier = small_model(global_pool=False).eval()
    load_encoder(classifier, mae.state_dict())
    imgs = torch.randn(2, 3, 24, 16)
    patches = mae.patch_embed(imgs) + mae.pos_embed[:, 1:]
    token = (mae.cls_token + mae.pos_embed[:, :1]).expand(2, -1, -1)
    expected = mae.norm(nn.Sequential(*mae.blocks)(torch.cat([token, patches], dim=1)))
    features = classifier.forward_features(imgs)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
    logits = expected[:, 0] @ classifier.head.weight.T + classifier.head.bias
    torch.testing.assert_close(classifier(imgs), logits, rtol=1e-5, atol=1e-6)


def test_drop_path_grows_linearly_over_the_blocks():
    blocks = small_model(True, drop_path_rate=0.2).blocks
    for branch in ("drop_path1", "drop_path2"):
        rates = [getattr(getattr(block, branch), "drop_prob", 0.0) for block in blocks]
        assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_wrong_models_are_refused(user_error):
    message = user_error(lambda: models_vit.build_model("vit_giant"))
    assert "unknown model 'vit_giant'" in message
    assert all(name in message for name in models_vit.MODELS)
    for img_size in (30, (32, 30), 4):
        message = user_error(partial(models_vit.vision_transformer, img_size=img_size, **SMALL))
        assert "not divisible by the patch of 8 x 8" in message


@pytest.mark.parametrize("global_pool", [False, True])
def test_the_probe_head_is_a_linear_layer_on_standardised_features(global_pool):
    model = small_model(global_pool)
    models_vit.add_probe_head(model)
    norm, linear = model.head
    assert (norm.affine, norm.eps) == (False, 1e-6)
    assert not linear.bias.any()
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert linear.weight.shape == (1000, 32)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"head.1.weight", "head.1.bias"}

    nn.init.normal_(linear.bias)
    imgs = torch.randn(6, 3, 24, 16)
    tokens = model.forward_features(imgs)
    pooled = model.fc_norm(tokens[:, 1:].mean(dim=1)) if global_pool else tokens[:, 0]
    batch = pooled.mean(dim=0), pooled.var(dim=0, correction=0)
    running = 0.1 * batch[0], 0.9 + 0.1 * pooled.var(dim=0)  # after one step of momentum 0.1
    for training, (mean, variance) in ((True, batch), (False, running)):
        model.train(training)
        expected = (pooled - mean) / (variance + 1e-6).sqrt() @ linear.weight.T + linear.bias
        torch.testing.assert_close(model(imgs), expected, rtol=1e-4, atol=1e-5)

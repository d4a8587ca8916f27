"""Weights that transformers, timm and training frameworks save, as the starts of models here."""

import json
import shutil
from functools import partial
from urllib.parse import urlsplit

import pytest
import safetensors.torch
import timm
import torch

import models_vit
from models_mae import MaskedAutoencoderViT
from util import pixels
from util.checkpoint import load_checkpoint, save_safetensors
from util.conversion import from_transformers, is_transformers, to_transformers
from util.pretrained import check_heads, load_classifier, start_autoencoder_from, start_from

SIZE = {"image_size": 16, "patch_size": 4, "num_hidden_layers": 2}
SIZE |= {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 128}
SIZE |= {"layer_norm_eps": 1e-6}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}
DECODER |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 64}
OURS = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
PREFIXES = {
    "ViTMAEForPreTraining": "vit.",
    "ViTMAEModel": "",
    "ViTModel": "",
    "ViTForImageClassification": "vit.",
    "BeitForImageClassification": "beit.",
}


def of_transformers(kind, seed=1, **config):
    """A model of transformers, in evaluation mode, whose vectors are no new model's either."""
    transformers = pytest.importorskip("transformers")
    if kind.startswith("ViTMAE"):
        config = transformers.ViTMAEConfig(**(SIZE | DECODER | config))
    elif kind.startswith("ViT"):
        config = transformers.ViTConfig(**(SIZE | config))
    else:
        beit = {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0}
        config = transformers.BeitConfig(**(SIZE | beit | config))
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("position_embeddings"):
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


def autoencoder(img_size=16, seed=2, **config):
    torch.manual_seed(seed)
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    norm_layer = partial(torch.nn.LayerNorm, eps=1e-6)
    return MaskedAutoencoderViT(img_size, norm_layer=norm_layer, **{**OURS, **decoder, **config})


def classifier(global_pool, num_classes=2, **config):
    return models_vit.vision_transformer(
        global_pool, **{"img_size": 16, **OURS, **config}, num_classes=num_classes
    ).eval()


# ---- transformers


def saved_folder(model, folder):
    model.save_pretrained(folder)
    return folder


def saved_in_shards(model, folder):
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def with_published_names(model, folder):
    """As version 4 of transformers writes it."""
    weights = to_transformers(from_transformers(model.state_dict()))
    assert "decoder.decoder_layers.0.attention.attention.query.weight" in weights
    assert "vit.encoder.layer.1.attention.output.dense.bias" in weights
    folder.mkdir()
    model.config.save_pretrained(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def with_names_of_modules(model, folder):
    folder.mkdir()
    torch.save(model.state_dict(), folder / "state.pth")
    return folder / "state.pth"


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize(
    "save",
    [saved_folder, saved_in_shards, with_published_names, with_names_of_modules],
    ids=lambda save: save.__name__,
)
def test_the_loss_of_an_autoencoder_is_that_of_transformers(save, norm_pix_loss, tmp_path, capsys):
    theirs = of_transformers("ViTMAEForPreTraining", norm_pix_loss=norm_pix_loss)
    path = save(theirs, tmp_path / "model")
    capsys.readouterr()
    contents = load_checkpoint(path)
    ours = autoencoder(norm_pix_loss=norm_pix_loss)
    done = start_autoencoder_from(ours, path, contents)
    assert not done.warnings
    imgs, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    with torch.no_grad():
        expected = theirs(imgs, noise=noise).loss
        loss, _, _ = ours(imgs, 0.75, noise)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert not capsys.readouterr().err
    if save is not with_names_of_modules:
        assert contents["args"] == {
            "num_heads": 4,
            "input_size": 16,
            "norm_pix_loss": norm_pix_loss,
            "mask_ratio": 0.75,
            "decoder_embed_dim": 16,
            "decoder_depth": 1,
            "decoder_num_heads": 2,
        }


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_round_trip_keeps_every_bit_and_name(kind, tmp_path):
    """Also what transformers itself reads: no key is missing or unexpected there."""
    model = of_transformers(kind)
    model.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert is_transformers(weights)
    published = from_transformers(weights)
    assert not is_transformers(published)
    pooler = {key for key in published if key.startswith("pooler.dense.")}
    back = to_transformers(
        {key: weight for key, weight in published.items() if key not in pooler}, PREFIXES[kind]
    )
    if kind.startswith("Beit"):
        back = {key: weight for key, weight in back.items() if not key.endswith("key.bias")}
    for key, weight in back.items():
        written = key.replace("decoder_layers", "decoder_encoder.layer")
        assert torch.equal(weight, weights[key if key in weights else written]), key
    assert len(back) == len(weights) - len(pooler)
    again = from_transformers(back)
    assert all(torch.equal(again[key], published[key]) for key in again)

    safetensors.torch.save_file(back, tmp_path / "model.safetensors", {"format": "pt"})
    read, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert set(info["missing_keys"]) == pooler
    for key, weight in read.state_dict().items():
        assert key in pooler or torch.equal(weight, model.state_dict()[key]), key


def test_an_encoder_of_transformers_and_its_pooler(tmp_path, capsys):
    theirs = saved_folder(of_transformers("ViTModel"), tmp_path / "model")
    model = classifier(global_pool=False)
    capsys.readouterr()
    start_from(model, theirs)
    err = capsys.readouterr().err
    assert err == f"warning: the pooler of {theirs} is left out: no model here has one\n"
    imgs = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = of_transformers("ViTModel")(imgs).last_hidden_state
        features = model.forward_features(imgs)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "global_pool"),
    [("ViTForImageClassification", False), ("BeitForImageClassification", True)],
)
def test_logits_of_a_classifier_are_those_of_transformers(kind, global_pool, tmp_path):
    names = {0: "cat", 1: "dog"}
    theirs = of_transformers(kind, id2label=names, label2id={"cat": 0, "dog": 1})
    contents = load_checkpoint(saved_folder(theirs, tmp_path / "model"))
    assert contents["classes"] == ["cat", "dog"]
    assert contents["args"] == {
        "num_heads": 4,
        "input_size": 16,
        "global_pool": global_pool,
        "nb_classes": 2,
    }
    model = classifier(global_pool)
    load_classifier(model, contents["model"], input_size=16)
    imgs = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(imgs), theirs(imgs).logits, rtol=1e-5, atol=1e-5)


def test_a_transformer_without_biases_of_queries_has_zeros(tmp_path, capsys):
    theirs = of_transformers("ViTForImageClassification", qkv_bias=False)
    contents = load_checkpoint(saved_folder(theirs, tmp_path / "model"))
    assert "has no biases of queries, keys and values: they are 0" in capsys.readouterr().err
    model = classifier(global_pool=False)
    load_classifier(model, contents["model"], input_size=16)
    imgs = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(imgs), theirs(imgs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        ({}, 0.5, 0.5),
        ({"do_normalize": False}, 0.0, 1.0),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51] * 3}, 0.5, 0.2),
        ({"rescale_factor": 2 / 255}, 0.25, 0.25),
    ],
    ids=str,
)
def test_the_normalisation_of_a_folder_is_used_and_said(processor, mean, std, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    folder = saved_folder(of_transformers("ViTMAEModel"), tmp_path / "model")
    kept = transformers.ViTImageProcessor(**processor)
    kept.save_pretrained(folder)
    args = load_checkpoint(folder)["args"]
    assert args["in_chans"] == 3
    torch.testing.assert_close(args["mean"], (mean,) * 3)
    torch.testing.assert_close(args["std"], (std,) * 3)
    assert f"normalises by mean {mean:g} {mean:g} {mean:g} and std" in capsys.readouterr().err
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    if processor.get("do_normalize", True) and processor.get("do_rescale", True):
        theirs = kept(image, do_resize=False, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close((image / 255 - mean) / std, theirs, rtol=1e-5, atol=1e-5)
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    transformers.ViTImageProcessor(**imagenet).save_pretrained(folder)
    assert load_checkpoint(folder)["args"]["mean"] == (0.485, 0.456, 0.406)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "relu"}, "has the activation relu, which no model here has: only gelu"),
        ({"num_attention_heads": 8}, "has 8 attention heads, the model 4: choose another --model"),
        ({"model_type": "dinov2"}, "holds a dinov2 of transformers: only vit_mae, vit and beit"),
    ],
    ids=str,
)
def test_what_no_shape_shows_is_read_from_the_config(config, message, tmp_path, user_error):
    folder = saved_folder(of_transformers("ViTForImageClassification"), tmp_path / "model")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))

    def start():
        contents = load_checkpoint(folder)
        check_heads(classifier(global_pool=False), contents, folder)

    assert f"{folder} {message}" in user_error(start)


def test_another_epsilon_is_said(tmp_path, capsys):
    load_checkpoint(saved_folder(of_transformers("ViTMAEModel", layer_norm_eps=1e-12), tmp_path))
    assert "was trained with layer_norm_eps 1e-12, the models here have 1e-06" in (
        capsys.readouterr().err
    )


# ---- timm


def of_timm(folder, pool="avg", safe=True, **config):
    """A folder that timm writes, and its model."""
    pytest.importorskip("timm", minversion="1.0.16")  # older ones don't know today's hub library
    args = {"img_size": 16, **OURS, "num_classes": 2, "global_pool": pool, **config}
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", **args).eval()
    names = {"label_names": ["cat", "dog"]}
    timm.models.save_for_hf(
        model, folder, model_args=args, model_config=names, safe_serialization=safe
    )
    return model


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("img_size", [16, (8, 24)], ids=str)
@pytest.mark.parametrize("pool", ["avg", "token"])
def test_a_classifier_of_timm(pool, img_size, safe, tmp_path, capsys):
    theirs = of_timm(tmp_path, pool, safe, img_size=img_size, in_chans=3)
    contents = load_checkpoint(tmp_path)
    assert "by mean 0.5 0.5 0.5 and std 0.5 0.5 0.5, not by ImageNet's" in capsys.readouterr().err
    assert contents["classes"] == ["cat", "dog"]
    assert contents["args"] == {
        "num_heads": 4,
        "input_size": img_size,
        "in_chans": 3,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "global_pool": pool == "avg",
        "nb_classes": 2,
    }
    model = classifier(pool == "avg", img_size=img_size)
    load_classifier(model, contents["model"], input_size=img_size)
    imgs = torch.randn(2, 3, *(img_size if isinstance(img_size, tuple) else (16, 16)))
    assert torch.equal(model(imgs), theirs(imgs))
    done = start_autoencoder_from(autoencoder(img_size), tmp_path, contents)
    assert "encoder loaded; its head is left out" in done.summary


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"reg_tokens": 2}, "has register tokens, which no model here has"),
        ({"init_values": 0.1}, "has layer scale, which no model here has"),
        ({"pre_norm": True}, "has a norm before the blocks, which no model here has"),
        ({"qk_norm": True}, "has norms of queries and keys, which no model here has"),
        ({"act_layer": "relu"}, "has the activation relu, which no model here has: only gelu"),
        ({"mlp_ratio": 2}, "of another shape blocks.0.mlp.fc1.weight"),
        ({"qkv_bias": False}, "missing blocks.0.attn.qkv.bias, blocks.1.attn.qkv.bias"),
        ({"embed_dim": 64}, "has width 64, the model width 32: choose another --model"),
        ({"num_heads": 2}, "has 2 attention heads, the model 4: choose another --model"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_other_transformers_of_timm_are_refused_by_their_kind(
    config, message, tmp_path, user_error
):
    of_timm(tmp_path, "token", **config)

    def start():
        start_autoencoder_from(autoencoder(), tmp_path, load_checkpoint(tmp_path))

    assert f"{tmp_path} " in user_error(start)
    assert message in user_error(start)


def test_the_size_of_the_architecture_is_not_taken_for_the_models(tmp_path, capsys):
    """An older timm keeps it in a folder's config."""
    of_timm(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 224, 224]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_checkpoint(tmp_path)["args"]["input_size"] == 16
    del config["model_args"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "input_size" not in load_checkpoint(tmp_path)["args"]


def test_a_model_of_timm_that_transformers_saved(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    theirs = of_timm(tmp_path / "timm", "token")
    content = json.loads((tmp_path / "timm" / "config.json").read_text())
    del content["model_args"]["num_classes"]
    wrapper = transformers.TimmWrapperForImageClassification(
        transformers.TimmWrapperConfig.from_dict(
            {**content, "num_classes": 2, "label_names": ["cat", "dog"]}
        )
    )
    wrapper.timm_model.load_state_dict(theirs.state_dict())
    wrapper.save_pretrained(tmp_path / "wrapper")
    contents = load_checkpoint(tmp_path / "wrapper")
    assert 'begin with "timm_model."' in capsys.readouterr().err
    assert contents["args"]["global_pool"] is False
    model = classifier(global_pool=False)
    load_classifier(model, contents["model"], input_size=16)
    imgs = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(imgs), theirs(imgs))


# ---- wrappers, other kinds of models


@pytest.mark.parametrize(
    ("prefix", "is_said"),
    [
        ("module.", False),
        ("_orig_mod.", False),
        ("module._orig_mod.", False),
        ("model.", True),
        ("backbone.", True),
        ("model.module.encoder.", True),
    ],
)
@pytest.mark.parametrize("entry", ["model", "state_dict", "model_state_dict", None])
def test_names_of_wrappers_are_left_out(prefix, is_said, entry, tmp_path, capsys):
    weights = autoencoder().state_dict()
    wrapped = {f"{prefix}{key}": weight for key, weight in weights.items()}
    others = {"args": {"in_chans": None}, "epoch": 3} if entry == "state_dict" else {}
    torch.save({entry: wrapped, **others} if entry else wrapped, tmp_path / "file.pth")
    contents = load_checkpoint(tmp_path / "file.pth")
    assert contents["model"].keys() == weights.keys()
    assert all(torch.equal(contents["model"][key], weights[key]) for key in weights)
    assert "args" not in contents
    said = f'all keys of {tmp_path}/file.pth begin with "{prefix}", which is left out'
    assert (said in capsys.readouterr().err) == is_said


def test_flags_that_another_project_left_unset_say_nothing():
    flags = {"in_chans": 1, "mean": [0.2], "std": [0.3], "max_pixels": 100}
    foreign = {"args": {"in_chans": None, "mean": None, "std": None}}
    assert pixels.resolve(flags, foreign, "file.pth") == pixels.resolve(flags)


def test_blocks_that_were_compiled_one_by_one(tmp_path):
    weights = autoencoder().state_dict()
    compiled = {key.replace(".attn", "._orig_mod.attn"): weight for key, weight in weights.items()}
    torch.save(compiled, tmp_path / "file.pth")
    assert load_checkpoint(tmp_path / "file.pth")["model"].keys() == weights.keys()


def test_another_kind_of_model_is_refused_in_a_short_line(tmp_path, user_error):
    model = classifier(global_pool=True)
    others = {
        "resnet.pth": timm.create_model("test_resnet").state_dict(),
        "half.pth": {"model.cls_token": torch.zeros(1)}
        | timm.create_model("test_resnet").state_dict(),
        "wrapped.pth": {f"net.{key}": weight for key, weight in model.state_dict().items()},
        "deep.pth": classifier(global_pool=True, depth=2).state_dict()
        | {f"blocks.1.extra{n}": torch.zeros(1) for n in range(500)},
    }
    for name, weights in others.items():
        path = tmp_path / name
        torch.save(weights, path)
        message = user_error(lambda path=path: start_from(model, path))
        assert len(message) - len(str(path)) < 300, message
        if name == "deep.pth":
            assert message.endswith("blocks.1.extra6, blocks.1.extra7 and 492 more")
        else:
            assert f"its keys are {', '.join(list(weights)[:3])} and" in message


# ---- folders and addresses


def test_our_own_folder_says_more_than_a_config_does(tmp_path, capsys):
    of_timm(tmp_path)
    weights = load_checkpoint(tmp_path)["model"]
    capsys.readouterr()
    about = {"args": {"input_size": 16, "in_chans": 3}, "command": "main_finetune.py"}
    save_safetensors(tmp_path / "model.safetensors", weights, about)
    contents = load_checkpoint(tmp_path)
    assert contents["args"] == about["args"]
    assert contents["command"] == about["command"]
    assert not capsys.readouterr().err


def test_folders_that_hold_no_model(tmp_path, user_error):
    def refusal():
        return user_error(lambda: load_checkpoint(tmp_path))

    assert refusal() == (
        f"{tmp_path} is a folder without a model: it has no model.safetensors and no "
        "pytorch_model.bin"
    )
    torch.save({}, tmp_path / "checkpoint-last.pth")
    assert refusal().endswith(f"such as {tmp_path}/checkpoint-last.pth")
    safetensors.torch.save_file({}, tmp_path / "model.safetensors")
    assert "holds no model weights" in refusal()
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    for names in ({}, {"a": "../outside.safetensors"}):
        index.write_text(json.dumps({"weight_map": names}))
        assert refusal() == f"{index} names no files of weights in its folder"
    index.write_text(json.dumps({"weight_map": {"a": "missing.safetensors"}}))
    assert refusal() == f"checkpoint {tmp_path}/missing.safetensors does not exist"
    index.write_text("{")
    assert refusal().startswith(f"{index} can't be read: ")


def test_an_address_of_safetensors_is_downloaded_once(tmp_path, monkeypatch):
    """Two models' files have the same name there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    downloads = []
    for number in (1, 2):
        weights = {k: w + number for k, w in autoencoder().state_dict().items()}
        (tmp_path / f"{number}").mkdir()
        safetensors.torch.save_file(weights, tmp_path / f"{number}" / "model.safetensors")

    def download(address, file):
        downloads.append(address)
        number = urlsplit(address).path.split("/")[1]
        shutil.copy(tmp_path / number / "model.safetensors", file)

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    addresses = [f"https://example.invalid/{n}/model.safetensors?download=true" for n in (1, 2)]
    for address in addresses * 2:
        weights = load_checkpoint(address)["model"]
        expected = autoencoder().state_dict()["cls_token"] + (2 if "/2/" in address else 1)
        assert torch.equal(weights["cls_token"], expected)
    assert downloads == addresses

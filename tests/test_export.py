"""main_export: timm and transformers compute what the checkpoint's model does, from its folder."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import photograph, runner

import main_export
import main_visualize
import models_mae
import models_vit
from util import data, decoding, exporting, exporting_timm, features, model_card
from util.checkpoint import load_checkpoint, save_safetensors
from util.pixels import RGB, PixelFormat

export = runner(main_export)
visualize = runner(main_visualize)
CLASSES = ["a", "b", "c"]


def pixel_format(in_chans, **others):
    mean, std = (0.4, 0.5, 0.6, 0.5, 0.4)[:in_chans], (0.2, 0.3, 0.25, 0.3, 0.2)[:in_chans]
    return PixelFormat(in_chans=in_chans, mean=mean, std=std, **others)


def with_all_parameters_random(model):
    """A model none of whose parameters is 0 or 1, in evaluation mode.

    Its first norm sees variances of 1e-6, where a wrong eps shows.
    """
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    if hasattr(model, "head") and isinstance(model.head, torch.nn.Linear):
        torch.nn.init.normal_(model.head.weight)
    for small in (model.pos_embed, model.cls_token, *model.patch_embed.parameters()):
        small.data *= 1e-3
    return model.eval()


def save(path, model, args, pixels, **others):
    args = {**args, **pixels.stored()}
    torch.save({"model": model.state_dict(), "args": args, **others}, path)
    return path


def save_pretraining(folder, size=8, in_chans=3, pixels=None, **config):
    """A checkpoint of main_pretrain.py and its model."""
    torch.manual_seed(0)
    pixels = pixels or pixel_format(in_chans)
    args = {"model": "tiny_test_model", "input_size": size, "norm_pix_loss": True, "epochs": 3}
    args |= {"mask_ratio": 0.5, "data_path": "/home/me/photos", "blr": 0.1, **config}
    model = with_all_parameters_random(models_mae.build_saved(args, pixels.in_chans))
    path = folder / "pretrained.pth"
    return save(path, model, args, pixels, command="main_pretrain.py"), model


def save_classifier(folder, size=8, in_chans=3, global_pool=True, **others):
    """A checkpoint of main_finetune.py and its model."""
    torch.manual_seed(0)
    args = {"model": "tiny_test_vit", "input_size": size, "nb_classes": 3}
    args["global_pool"] = global_pool
    model = with_all_parameters_random(models_vit.build_saved(args, in_chans))
    others = {"command": "main_finetune.py", "classes": CLASSES} | others
    path = folder / "classifier.pth"
    return save(path, model, args, pixel_format(in_chans), **others), model


def images(model, in_chans=3):
    return torch.randn(2, in_chans, *model.patch_embed.img_size)


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# ---- timm


def load_timm(folder, **options):
    """As the README.md says; older versions of timm don't know local-dir."""
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()
    except AssertionError:
        if options:
            pytest.skip("this timm, before 1.0.16, loads no folder")
        config = json.loads((folder / "config.json").read_text())
        return timm.create_model(
            config["architecture"],
            checkpoint_path=folder / "model.safetensors",
            num_classes=config["num_classes"],
            pretrained_cfg=config["pretrained_cfg"],
            **config["model_args"],
        ).eval()


@pytest.mark.parametrize("size", [16, (8, 12)])
@pytest.mark.parametrize("in_chans", [1, 3, 5])
@pytest.mark.parametrize(("pool", "how"), [("avg", "mean"), ("token", "cls")])
@torch.no_grad()
def test_timm_gives_the_features_of_the_encoder(tmp_path, size, in_chans, pool, how):
    path, model = save_pretraining(tmp_path, size, in_chans)
    flags = {"checkpoint": path, "format": "timm", "output": tmp_path / "out"}
    export(flags if pool == "avg" else flags | {"global_pool": pool})
    loaded, imgs = load_timm(tmp_path / "out"), images(model, in_chans)
    tokens = features.tokens(model, imgs)
    assert_near(loaded.forward_features(imgs), tokens)
    assert_near(loaded(imgs), features.pool(model, tokens, how))


@pytest.mark.parametrize("global_pool", [True, False])
@torch.no_grad()
def test_timm_gives_the_logits_of_a_classifier(tmp_path, global_pool):
    path, model = save_classifier(tmp_path, (8, 12), 5, global_pool)
    export({"checkpoint": path, "format": "timm", "output": tmp_path / "out"})
    loaded, imgs = load_timm(tmp_path / "out"), images(model, 5)
    assert_near(loaded(imgs), model(imgs))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == CLASSES


def test_timm_gives_feature_maps_for_a_segmentation_library(tmp_path):
    path, model = save_pretraining(tmp_path, (8, 12))
    export({"checkpoint": path, "format": "timm", "output": tmp_path / "out"})
    encoder = load_timm(tmp_path / "out", features_only=True, out_indices=(0, 1))
    imgs = images(model)
    maps = encoder(imgs)
    assert [tuple(each.shape) for each in maps] == [(2, 32, 2, 3)] * 2
    tokens = features.tokens(model, imgs)[:, 1:].unflatten(1, (2, 3)).permute(0, 3, 1, 2)
    assert_near(model.norm(maps[1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2), tokens)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("mae_vit_nano_patch4", "vit_tiny_patch16_224"), ("mae_vit_base_patch16", "vit_base")],
)
def test_sizes_have_timm_s_name_where_there_is_one(name, architecture):
    with torch.device("meta"):
        model = models_mae.build_model(name)
    config = exporting_timm.timm_config(model, "avg", None, RGB)
    assert config["architecture"].startswith(architecture)


# ---- transformers


def load_transformers(name, folder, **options):
    """A model of transformers, and the keys that were missing or too many."""
    transformers = pytest.importorskip("transformers")
    loader = getattr(transformers, name)
    model, found = loader.from_pretrained(folder, output_loading_info=True, **options)
    return model.eval(), {name: keys for name, keys in found.items() if keys}


@torch.no_grad()
def test_transformers_gives_the_loss_under_the_same_noise(tmp_path):
    decoder = {"decoder_depth": 2, "decoder_embed_dim": 24, "decoder_num_heads": 3}
    path, model = save_pretraining(tmp_path, 16, 5, **decoder)
    export({"checkpoint": path, "format": "transformers", "output": tmp_path / "out"})
    imgs, noise = images(model, 5), torch.rand(2, 16)
    loss, pred, _ = model(imgs, 0.5, noise)
    loaded, wrong = load_transformers("ViTMAEForPreTraining", tmp_path / "out")
    found = loaded(imgs, noise=noise)
    assert not wrong
    assert_near(found.loss, loss)
    assert_near(found.logits, pred)

    tokens = features.tokens(model, imgs)
    loaded, wrong = load_transformers("ViTMAEModel", tmp_path / "out", mask_ratio=0.0)
    assert wrong.keys() <= {"unexpected_keys"}
    in_order = torch.arange(16.0).expand(2, -1)
    assert_near(loaded(imgs, noise=in_order).last_hidden_state, tokens)
    loaded, wrong = load_transformers("ViTModel", tmp_path / "out", add_pooling_layer=False)
    assert wrong.keys() <= {"unexpected_keys"}
    assert all(key.startswith("decoder.") for key in wrong["unexpected_keys"])
    assert_near(loaded(imgs).last_hidden_state, tokens)


@pytest.mark.parametrize(("size", "in_chans"), [(8, 3), ((8, 12), 1)])
@torch.no_grad()
def test_transformers_gives_the_tokens_of_the_encoder(tmp_path, size, in_chans):
    path, model = save_pretraining(tmp_path, size, in_chans)
    flags = {"checkpoint": path, "format": "transformers", "part": "encoder"}
    export(flags | {"output": tmp_path / "out"})
    loaded, wrong = load_transformers("ViTModel", tmp_path / "out", add_pooling_layer=False)
    imgs = images(model, in_chans)
    assert not wrong
    assert_near(loaded(imgs).last_hidden_state, features.tokens(model, imgs))


@pytest.mark.parametrize(
    ("global_pool", "size", "name"),
    [
        (True, 8, "BeitForImageClassification"),
        (False, 8, "ViTForImageClassification"),
        (False, (8, 12), "ViTForImageClassification"),
    ],
)
@torch.no_grad()
def test_transformers_gives_the_logits_of_a_classifier(tmp_path, global_pool, size, name):
    path, model = save_classifier(tmp_path, size, global_pool=global_pool)
    export({"checkpoint": path, "format": "transformers", "output": tmp_path / "out"})
    loaded, wrong = load_transformers("AutoModelForImageClassification", tmp_path / "out")
    imgs = images(model)
    assert not wrong
    assert type(loaded).__name__ == name
    assert_near(loaded(imgs).logits, model(imgs))
    assert loaded.config.id2label == dict(enumerate(CLASSES))
    assert loaded.config.label2id["c"] == 2


def test_outputs_without_a_class_are_named_by_their_numbers(tmp_path):
    path, _ = save_classifier(tmp_path, classes=["a", "b"])
    flags = {"checkpoint": path, "format": "timm"}
    export(flags | {"output": tmp_path / "timm"})
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert config["label_names"] == ["a", "b", "2"]
    export(flags | {"format": "transformers", "output": tmp_path / "out"})
    loaded, wrong = load_transformers("AutoModelForImageClassification", tmp_path / "out")
    assert not wrong
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "2"}


# ---- preprocessing


@pytest.mark.parametrize("size", [16, 232])
def test_preprocessing_is_the_evaluation_s(tmp_path, size):
    transformers = pytest.importorskip("transformers")
    pixels = pixel_format(3)
    path, _ = save_pretraining(tmp_path, size, model="mae_vit_nano_patch4")
    for library in ("timm", "transformers"):
        flags = {"format": library, "part": "encoder", "output": tmp_path / library}
        export({"checkpoint": path, **flags})
    photograph(301, 211).save(tmp_path / "image.png")
    image = decoding.read_image(tmp_path / "image.png", pixels)
    batch = data.stack([data.eval_transform(size)(image)])
    expected = data.normalize(batch, pixels.mean, pixels.std)

    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "transformers")
    found = processor(photograph(301, 211), return_tensors="pt").pixel_values
    assert_near(found, expected)

    config = timm.data.resolve_model_data_config(load_timm(tmp_path / "timm"))
    found = timm.data.create_transform(**config)(photograph(301, 211))[None]
    levels = (found - expected).abs() * torch.tensor(pixels.std)[:, None, None] * 255
    assert levels.max() < 2.5  # Pillow rounds between its two passes
    assert levels.mean() < 0.01


@pytest.mark.parametrize(
    ("others", "what"),
    [
        ({"in_chans": 5}, "5 bands"),
        ({"in_chans": 1, "value_range": (0.0, 4000.0)}, "the value range 0 to 4000"),
        ({"in_chans": 3, "nodata": float("nan")}, "the nodata value nan"),
        ({"in_chans": 3, "bands": (3, 2, 1)}, "the choice of bands 3 2 1"),
    ],
)
def test_what_preprocessing_can_t_do_is_said(tmp_path, capsys, others, what):
    path, _ = save_pretraining(tmp_path, pixels=pixel_format(**others))
    for library in ("timm", "transformers"):
        export({"checkpoint": path, "format": library, "output": tmp_path / library})
        assert f"The preprocessing in {library} does not know {what}" in capsys.readouterr().out
        assert what in (tmp_path / library / "README.md").read_text()
    assert not (tmp_path / "transformers" / "preprocessor_config.json").exists()


# ---- .safetensors


@pytest.mark.parametrize("part", ["autoencoder", "encoder"])
def test_safetensors_hold_the_same_bits(tmp_path, part):
    path, model = save_pretraining(tmp_path, (8, 12), decoder_depth=2)
    flags = {"checkpoint": path, "format": "safetensors", "part": part}
    export(flags | {"output": tmp_path / "out"})
    contents = load_checkpoint(tmp_path / "out" / "model.safetensors")
    expected = model.state_dict()
    if part == "encoder":
        expected = {k: v for k, v in expected.items() if not k.startswith(("decoder", "mask_"))}
    assert contents["model"].keys() == expected.keys()
    assert all(torch.equal(contents["model"][key], expected[key]) for key in expected)
    assert contents["command"] == "main_pretrain.py"
    assert contents["args"]["data_path"] == "photos"


@pytest.mark.parametrize("library", exporting.FORMATS)
def test_every_format_says_the_flags_to_this_project(tmp_path, library):
    path, _ = save_pretraining(tmp_path, in_chans=5)
    export({"checkpoint": path, "format": library, "output": tmp_path / "out"})
    said = load_checkpoint(tmp_path / "out" / "model.safetensors")["args"]
    expected = load_checkpoint(path)["args"] | {"data_path": "photos"}
    assert said == json.loads(json.dumps(expected))


def test_commands_take_the_safetensors_without_flags(tmp_path, image_folder, capsys):
    path, _ = save_pretraining(tmp_path, (8, 12), decoder_depth=2)
    export({"checkpoint": path, "format": "safetensors", "output": tmp_path / "out"})
    exported = tmp_path / "out" / "model.safetensors"
    pictures = [tmp_path / "recon.png", tmp_path / "expected.png"]
    for checkpoint, picture in zip([exported, path], pictures, strict=True):
        visualize({"checkpoint": checkpoint, "data_path": image_folder, "output": picture})
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    export({"checkpoint": exported, "format": "timm", "output": tmp_path / "again"})
    assert "tiny_test_model" in capsys.readouterr().out


def test_an_exported_classifier_is_evaluated_as_the_checkpoint(tmp_path, finetune, classify_flags):
    finetune(classify_flags)
    output = classify_flags["output_dir"]
    best = output / "checkpoint-best.pth"
    export({"checkpoint": best, "format": "safetensors", "output": tmp_path / "exported"})
    results = []
    del classify_flags["finetune"]
    for checkpoint in (best, tmp_path / "exported" / "model.safetensors"):
        finetune(classify_flags | {"eval": True, "resume": checkpoint})
        results.append(json.loads((output / "eval.json").read_text()))
    assert results[0]["test_loss"] == results[1]["test_loss"]


# ---- a linear probe


def test_a_probe_is_exported_with_its_encoder(
    tmp_path, linprobe, classify_flags, user_error, capsys
):
    linprobe(classify_flags | {"epochs": 1})
    probe = classify_flags["output_dir"] / "checkpoint-best.pth"
    export({"checkpoint": probe, "format": "timm", "output": tmp_path / "exported"})
    said = f"its encoder is read from {classify_flags['finetune']}\n"
    assert said in capsys.readouterr().out

    contents = load_checkpoint(probe)
    model = models_vit.build_saved(contents["args"], 3)
    encoder = load_checkpoint(classify_flags["finetune"])["model"]
    model.load_state_dict({k: v for k, v in encoder.items() if k in model.state_dict()}, False)
    models_vit.add_probe_head(model)
    model.load_state_dict(contents["model"], strict=False)
    imgs = images(model)
    assert_near(load_timm(tmp_path / "exported")(imgs), model.eval()(imgs))
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "`main_linprobe.py`" in card
    assert "test_acc1" in card

    flags = {"checkpoint": probe, "format": "timm", "output": tmp_path / "other"}
    message = user_error(lambda: export(flags | {"finetune": tmp_path / "gone.pth"}))
    assert message.endswith("does not exist; give its encoder by --finetune")
    other, _ = save_pretraining(tmp_path)
    message = user_error(lambda: export(flags | {"finetune": other}))
    assert "is a probe of a different encoder than" in message

    for name in RGB.stored():  # version 0.1 had no pixel formats
        del contents["args"][name]
    contents["args"]["finetune"] = "https://example.invalid/x.pth"
    old = tmp_path / "old.pth"
    torch.save(contents, old)
    flags["checkpoint"] = old
    message = user_error(lambda: export(flags))
    assert "the encoder at https://example.invalid/x.pth, which is not downloaded" in message
    assert "--finetune" in message
    export(flags | {"finetune": classify_flags["finetune"]})
    weights = [tmp_path / name / "model.safetensors" for name in ("exported", "other")]
    found, expected = (load_checkpoint(file)["model"] for file in weights)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_folding_a_batch_norm_by_hand():
    head = {
        "head.0.running_mean": torch.tensor([1.0, -2.0]),
        "head.0.running_var": torch.tensor([4.0, 0.25]),
        "head.1.weight": torch.tensor([[2.0, 3.0]]),
        "head.1.bias": torch.tensor([0.5]),
    }
    folded = exporting.fold_probe(head, eps=0.0)
    assert folded["head.weight"].tolist() == [[1.0, 6.0]]
    assert folded["head.bias"].tolist() == [0.5 - 1.0 + 12.0]


# ---- the end of a pre-training


def test_a_pretraining_leaves_its_encoder(pretrain, pretrain_flags, capsys, user_error):
    output = pretrain_flags["output_dir"]
    pretrain(pretrain_flags)
    encoder = output / "encoder.safetensors"
    assert f"done: 2 epochs, see {output}, encoder in {encoder}\n" in capsys.readouterr().out
    contents, trained = load_checkpoint(encoder), load_checkpoint(output / "checkpoint-last.pth")
    assert all(torch.equal(w, trained["model"][key]) for key, w in contents["model"].items())
    missing = trained["model"].keys() - contents["model"].keys()
    assert all(key.startswith(("decoder_", "mask_token")) for key in missing)
    assert contents["args"]["mean"] == list(RGB.mean)

    encoder.unlink()
    pretrain(pretrain_flags)  # a finished run
    assert encoder.exists()
    message = user_error(lambda: pretrain(pretrain_flags | {"resume": encoder}))
    assert "is not a training state of main_pretrain.py" in message


def test_an_encoder_that_can_t_be_written_is_an_error(pretrain, pretrain_flags, capsys, user_error):
    (pretrain_flags["output_dir"] / "encoder.safetensors").mkdir(parents=True)
    message = user_error(lambda: pretrain(pretrain_flags | {"epochs": 1, "warmup_epochs": 0}))
    assert message == "the training is done and saved, but no encoder, see the warning"
    err = capsys.readouterr().err
    assert "encoder.safetensors could not be written" in err
    assert "main_export.py makes such a file from a checkpoint" in err
    assert (pretrain_flags["output_dir"] / "checkpoint-last.pth").exists()


# ---- the model card


def test_the_card_says_what_the_checkpoint_says(tmp_path, pretrain, pretrain_flags):
    pretrain(pretrain_flags)
    output = pretrain_flags["output_dir"]
    flags = {"checkpoint": output / "checkpoint-last.pth", "format": "transformers"}
    export(flags | {"output": tmp_path / "exported"})
    card = (tmp_path / "exported" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert "library_name: transformers\n" in head
    assert "license:" not in head
    assert "pipeline_tag" not in head  # one for features would mask the images
    record = json.loads((output / "log.txt").read_text().splitlines()[-1])
    assert f"| train_loss | {record['train_loss']:.6g} |" in body
    assert f"| val_loss | {record['val_loss']:.6g} |" in body
    assert "images_per_s" not in body
    folder = pretrain_flags["data_path"].name
    assert f"a folder named `{folder}`, 18 images" in body
    assert "--lr 0.01" in body
    assert "mean 0.485, 0.456, 0.406" in body
    assert f"torch {torch.__version__}" in body
    assert str(tmp_path) not in card
    assert str(pretrain_flags["data_path"]) not in card

    pretrain(pretrain_flags | {"epochs": 3, "lr": 0.02, "accept_changes": True})
    export(flags | {"output": tmp_path / "later"})
    card = (tmp_path / "later" / "README.md").read_text()
    assert "The flags are the last ones. At epoch 2, step 0: lr 0.01 -> 0.02.\n" in card


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("https://me:pw@host.org/a/x.pth?X-Amz-Signature=SECRET/1#there", "x.pth"),
        ("https://host.org/a/x.pth;token=SECRET", "x.pth"),
        ("https://host.org/folder/?next=https://other.org/y", "folder"),
        ("https://me:pw@host.org", ""),
        ("https://me:p?w@host.org/x.pth", ""),
        ("s3://bucket/x.pth", "x.pth"),
        ("/home/me/photos/", "photos"),
        ("0.5", "0.5"),
    ],
)
def test_the_last_name_of_a_path_or_address(path, name):
    assert model_card.last_name(path) == name


def test_no_secret_of_an_address_is_exported(tmp_path):
    secrets = ["me", "pw", "host.org", "SECRET"]
    address = "https://{}:{}@{}/a/x.pth?X-Amz-Signature={}".format(*secrets)
    path, model = save_pretraining(tmp_path, init=address)
    export({"checkpoint": path, "format": "transformers", "output": tmp_path / "out"})
    args = {"model": "tiny_test_model", "init": address}
    encoder = exporting.save_encoder(tmp_path, model, {"args": args, "training": args})
    for file in (*(tmp_path / "out").iterdir(), encoder):
        content = file.read_bytes()
        assert not any(secret.encode() in content for secret in ("me:pw", *secrets[1:]))
    assert "--init x.pth" in (tmp_path / "out" / "README.md").read_text()
    assert load_checkpoint(encoder)["args"]["init"] == "x.pth"


# ---- files that hold only weights


def test_bare_weights_need_their_model_s_name(tmp_path, user_error):
    _, model = save_pretraining(tmp_path)
    torch.save({"model": model.state_dict()}, tmp_path / "bare.pth")
    flags = {"checkpoint": tmp_path / "bare.pth", "output": tmp_path / "out"}
    flags |= {"format": "safetensors"}
    message = user_error(lambda: export(flags))
    assert message.endswith("bare.pth does not say its model: add --model")
    flags |= {"model": "tiny_test_model"}
    message = user_error(lambda: export(flags | {"input_size": 16, "norm_pix_loss": True}))
    assert "is not what its flags describe: of another shape decoder_pos_embed" in message
    message = user_error(lambda: export(flags | {"input_size": 8}))
    assert message.endswith("does not say its norm_pix_loss: add --norm_pix_loss")
    export(flags | {"input_size": 8, "norm_pix_loss": True})
    contents = load_checkpoint(tmp_path / "out" / "model.safetensors")
    expected = RGB.stored() | {"model": "tiny_test_model", "input_size": 8, "norm_pix_loss": True}
    assert contents["args"] == json.loads(json.dumps(expected))
    assert "does not say how it was trained" in (tmp_path / "out" / "README.md").read_text()


@torch.no_grad()
def test_a_bare_classifier_says_its_pooling_and_classes(tmp_path):
    _, model = save_classifier(tmp_path)
    save_safetensors(tmp_path / "bare.safetensors", model.state_dict(), {})
    flags = {"checkpoint": tmp_path / "bare.safetensors", "output": tmp_path / "out"}
    export(flags | {"format": "timm", "model": "tiny_test_vit", "input_size": 8})
    imgs = images(model)
    assert_near(load_timm(tmp_path / "out")(imgs), model(imgs))


# ---- errors


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("classifier", {"part": "autoencoder"}, "is a classifier, which is exported whole"),
        ("classifier", {"global_pool": "avg"}, "--global_pool is for an encoder in timm's format"),
        ("classifier", {"norm_pix_loss": True}, "for an autoencoder, not for a classifier: leave"),
        ("pretraining", {"no_norm_pix_loss": True}, "--no_norm_pix_loss is for an autoencoder"),
        ("pretraining", {"part": "autoencoder"}, "timm has no masked autoencoder"),
        ("pretraining", {"finetune": "x"}, "--finetune is for a linear probe"),
        ("pretraining", {"model": "mae_vit_nano_patch4"}, "says model tiny_test_model: leave out"),
        ("pretraining", {"mean": [0, 0, 0], "std": [1, 1, 1]}, "leave out --mean"),
        (
            "pretraining",
            {"format": "transformers"},
            "transformers' ViTMAEForPreTraining takes only square images, not 8 x 12 "
            "(height x width): export the encoder by --part encoder",
        ),
        (
            "classifier",
            {"format": "transformers"},
            "BeitForImageClassification takes only square images, not 8 x 12 (height x width): "
            "--format timm holds it",
        ),
    ],
)
def test_what_can_t_be_exported(tmp_path, user_error, kind, flags, message):
    make = save_classifier if kind == "classifier" else save_pretraining
    path, _ = make(tmp_path, (8, 12))
    given = {"checkpoint": path, "format": "timm", "output": tmp_path / "out"} | flags
    assert message in user_error(lambda: export(given))
    assert not (tmp_path / "out").exists()


def test_an_encoder_has_no_autoencoder(tmp_path, user_error):
    path, _ = save_pretraining(tmp_path)
    flags = {"checkpoint": path, "format": "safetensors", "output": tmp_path / "encoder"}
    export(flags | {"part": "encoder"})
    flags["checkpoint"] = tmp_path / "encoder" / "model.safetensors"
    flags |= {"part": "autoencoder", "output": tmp_path / "out"}
    assert "has no decoder weights" in user_error(lambda: export(flags))


def test_the_output_must_be_new(tmp_path, user_error, monkeypatch):
    path, _ = save_pretraining(tmp_path)
    flags = {"checkpoint": path, "format": "timm"}
    assert "is not empty" in user_error(lambda: export(flags | {"output": tmp_path}))
    assert "is a file" in user_error(lambda: export(flags | {"output": path}))
    (tmp_path / "empty").mkdir()
    export(flags | {"output": tmp_path / "empty"})
    assert (tmp_path / "empty" / "README.md").exists()
    assert not (tmp_path / ".empty.tmp").exists()

    def full_disk(path, content):
        raise OSError("no space left")

    monkeypatch.setattr(exporting, "write_whole", full_disk)
    before = sorted(tmp_path.iterdir())
    message = user_error(lambda: export(flags | {"output": tmp_path / "out"}))
    assert message.endswith("out can't be written: no space left")
    assert sorted(tmp_path.iterdir()) == before

    def interrupt(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "write_whole", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(flags | {"output": tmp_path / "out"})
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
def test_a_mounted_volume_is_filled(tmp_path, user_error, monkeypatch, number):
    path, _ = save_pretraining(tmp_path)
    output = tmp_path / "out"
    output.mkdir()
    flags = {"checkpoint": path, "format": "transformers", "output": output}

    def refuse(self, target):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "rename", refuse)
    written, write_whole = [], exporting.write_whole

    def note(file, content):
        if file.parent == output:
            if file.name == full_at:
                raise OSError("no space left")
            written.append(file.name)
        write_whole(file, content)

    monkeypatch.setattr(exporting, "write_whole", note)
    before, full_at = sorted(tmp_path.iterdir()), "model.safetensors"
    message = user_error(lambda: export(flags))
    assert message.endswith("out can't be written: no space left")
    assert sorted(tmp_path.iterdir()) == before
    assert not list(output.iterdir())

    written, full_at = [], None
    export(flags)
    files = ["README.md", "preprocessor_config.json", "config.json", "model.safetensors"]
    assert written == files
    assert sorted(file.name for file in output.iterdir()) == sorted(files)
    assert sorted(tmp_path.iterdir()) == before
    assert load_checkpoint(output / "model.safetensors")["command"] == "main_pretrain.py"


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
def test_a_name_that_is_not_utf_8(tmp_path, capsys):
    path, _ = save_pretraining(tmp_path)
    output = tmp_path / os.fsdecode(b"out\xff")
    export({"checkpoint": path, "format": "timm", "output": output})
    assert "out\\udcff: encoder of" in capsys.readouterr().out
    assert "local-dir:out\\udcff" in (output / "README.md").read_text()
    assert sorted(tmp_path.iterdir()) == sorted([path, output])

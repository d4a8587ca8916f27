"""Pre-training from given weights: loaded to the bit, adapted or refused, and said."""

import json
import re

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import command_line
from reference_figures import FIGURES, reference_inputs, reference_mae
from test_load_encoder import copy_of, resampled_by_hand, with_random_vectors

import main_embed
import main_export
import main_pretrain
import main_visualize
import models_mae
import models_vit
from models_mae import MaskedAutoencoderViT
from util import cli
from util.checkpoint import load_checkpoint
from util.conversion import to_transformers
from util.pos_embed import sincos_pos_embed_2d
from util.pretrained import start_autoencoder_from

SMALL = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


def autoencoder(img_size=8, seed=1, **config):
    torch.manual_seed(seed)
    return MaskedAutoencoderViT(img_size, **{**SMALL, **DECODER, **config})


def saved(path, model, **args):
    """A file of a model whose norms, too, are not what a new model has."""
    torch.save({"model": with_random_vectors(model), **({"args": args} if args else {})}, path)
    return path


def start(model, path, **options):
    return start_autoencoder_from(model, path, load_checkpoint(path), **options)


def refused(monkeypatch, capsys, flags, command=main_pretrain):
    """The line on stderr with which a command refuses its flags."""
    monkeypatch.setattr("sys.argv", ["command", *command_line(flags)])
    with pytest.raises(SystemExit, match="2"):
        cli.run(command.main, command.get_args_parser())
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def of_transformers(folder, **config):
    """A folder as transformers writes it, of the model in tiny_pretrain.py."""
    folder.mkdir(exist_ok=True)
    weights = to_transformers(autoencoder().state_dict())
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "vit_mae", "image_size": 8, "num_attention_heads": 4, **config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ---- the command


@pytest.mark.parametrize("case", FIGURES["mae"][:2], ids=["raw", "normalised"])
def test_the_first_loss_is_the_figure_of_the_original(
    case, pretrain, pretrain_flags, tmp_path, monkeypatch
):
    """The command starts from the weights; what stands before its first step gets the inputs."""
    size = case["config"]
    assert (size["img_size"], size["patch_size"], size["mlp_ratio"]) == (32, 8, 4)
    reference = models_mae.factory(8, (32, 2, 4), (16, 1, 2))
    monkeypatch.setitem(models_mae.MODELS, "reference", reference)
    torch.save({"model": reference_mae(case).state_dict()}, tmp_path / "weights.pth")
    losses = []

    def first_step(model, loader, optimizer, *_, state, mask_ratio, **__):
        assert (state.epoch, state.step, optimizer.state) == (0, 0, {})
        images, noise = reference_inputs(case, model)
        losses.append(model(images, mask_ratio, noise)[0].item())
        raise SystemExit

    monkeypatch.setattr(main_pretrain, "train_one_epoch", first_step)
    flags = {"model": "reference", "input_size": 32, "mask_ratio": case["mask_ratio"]}
    flags |= {"norm_pix_loss": True} if case["norm_pix_loss"] else {}
    with pytest.raises(SystemExit):
        pretrain(pretrain_flags | flags | {"init": tmp_path / "weights.pth"})
    assert losses == [pytest.approx(case["loss"], rel=1e-5)]


def test_a_run_without_learning_keeps_every_bit_and_a_resume_needs_the_same_weights(
    pretrain, pretrain_flags, tmp_path, capsys, monkeypatch
):
    path = saved(tmp_path / "weights.pth", autoencoder(), norm_pix_loss=True)
    flags = pretrain_flags | {"lr": 0, "init": path}
    pretrain(flags)
    out, err = capsys.readouterr()
    assert (
        f"starting from {path}: encoder and decoder (width 16, depth 1, 2 heads) loaded; the file "
        "says that it was trained to predict normalised pixels\n"
    ) in out
    assert "add --norm_pix_loss to go on as it was trained" in err
    contents = load_checkpoint(pretrain_flags["output_dir"] / "checkpoint-last.pth")
    weights = load_checkpoint(path)["model"]
    assert contents["model"].keys() == weights.keys()
    assert all(torch.equal(contents["model"][key], weights[key]) for key in weights)
    assert contents["args"]["init"] == str(path)

    bare = tmp_path / "moved.pth"
    torch.save(weights, bare)
    pretrain(flags | {"init": bare})
    out, err = capsys.readouterr()
    assert "resuming" in out
    assert "starting from" not in out
    other = saved(tmp_path / "other.pth", autoencoder(seed=2))
    changed = r"different settings: init \(weights [0-9a-f]{8} -> %s\)"
    line = refused(monkeypatch, capsys, flags | {"init": other})
    assert re.search(changed % "weights [0-9a-f]{8}", line)
    del flags["init"]
    assert re.search(changed % "not given", refused(monkeypatch, capsys, flags))


def test_the_decoders_size_is_that_of_the_weights_if_no_flag_gives_one(
    pretrain, pretrain_flags, tmp_path, capsys, monkeypatch
):
    flags = pretrain_flags | {"epochs": 1}
    sizes = {"decoder_depth": 2, "decoder_embed_dim": 24, "decoder_num_heads": 3}
    pretrain(flags | sizes)
    first = flags["output_dir"] / "checkpoint-last.pth"
    contents = load_checkpoint(first)
    assert {name: contents["args"][name] for name in sizes} == sizes
    assert contents["model"]["decoder_blocks.1.norm1.weight"].shape == (24,)

    capsys.readouterr()
    pretrain(flags | {"init": first, "lr": 0, "output_dir": tmp_path / "further"})
    out, err = capsys.readouterr()
    assert "encoder and decoder (width 24, depth 2, 3 heads) loaded" in out
    assert "at random" not in out + err
    further = load_checkpoint(tmp_path / "further" / "checkpoint-last.pth")
    assert {name: further["args"][name] for name in sizes} == sizes
    assert all(torch.equal(further["model"][k], w) for k, w in contents["model"].items())

    picture = tmp_path / "recon.png"
    shown = {"checkpoint": first, "data_path": flags["data_path"], "output": picture}
    shown |= {"num_images": 1, "device": "cpu"}
    main_visualize.main(main_visualize.get_args_parser().parse_args(command_line(shown)))
    assert picture.exists()


@pytest.mark.parametrize("explicit", [0, 1])
def test_the_named_models_decoder_is_the_same_setting_with_and_without_flags(
    explicit, pretrain, pretrain_flags, capsys, monkeypatch
):
    sizes = {"decoder_depth": 1, "decoder_embed_dim": 16, "decoder_num_heads": 2}
    runs = [pretrain_flags, pretrain_flags | sizes]
    pretrain(runs[explicit])
    path = pretrain_flags["output_dir"] / "checkpoint-last.pth"
    assert {load_checkpoint(path)["args"][name] for name in sizes} == {None}
    pretrain(runs[1 - explicit])
    assert "resuming" in capsys.readouterr().out
    line = refused(monkeypatch, capsys, pretrain_flags | {"decoder_depth": 2})
    assert "different settings: decoder_depth (not given -> 2)" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"decoder_embed_dim": 18, "decoder_num_heads": 2}, "a decoder of width 18 with 2 heads"),
        ({"decoder_embed_dim": 16, "decoder_num_heads": 3}, "a decoder of width 16 with 3 heads"),
        ({"decoder_depth": 0}, "--decoder_depth: 0 is not an integer of at least 1"),
        ({"decoder_embed_dim": "wide"}, "--decoder_embed_dim: wide is not an integer"),
        ({"init": "missing.pth"}, "checkpoint missing.pth does not exist"),
        ({"init": ""}, "argument --init: is empty"),
        ({"init": "/dev/null"}, "checkpoint /dev/null is no file"),
        ({"init": "/proc"}, "/proc is a folder without a model"),
    ],
    ids=str,
)
def test_wrong_values_are_an_error_of_one_line(flags, message, pretrain_flags, monkeypatch, capsys):
    assert message in refused(monkeypatch, capsys, pretrain_flags | flags)


# ---- what can be a start


def test_an_encoder_alone_leaves_the_decoder_at_random_and_says_so(tmp_path):
    weights = with_random_vectors(autoencoder())
    encoder = {k: v for k, v in weights.items() if not k.startswith(("decoder_", "mask_token"))}
    torch.save(encoder, tmp_path / "encoder.pth")
    model = autoencoder(seed=2)
    before = copy_of(model.state_dict())
    done = start(model, tmp_path / "encoder.pth")
    for key, value in model.state_dict().items():
        assert torch.equal(value, encoder.get(key, before[key])), key
    assert "encoder loaded; the decoder starts at random" in done.summary
    (warning,) = done.warnings
    assert "pictures are noise for a while: give the full file" in warning


@pytest.mark.parametrize("global_pool", [False, True])
def test_of_a_classifier_the_encoder_is_loaded(global_pool, tmp_path):
    torch.manual_seed(3)
    theirs = models_vit.vision_transformer(global_pool, img_size=8, num_classes=5, **SMALL)
    path = saved(tmp_path / "classifier.pth", theirs)
    weights = load_checkpoint(path)["model"]
    model = autoencoder(seed=2)
    before = copy_of(model.state_dict())
    done = start(model, path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights.get(key, before[key])), key
    assert "its head is left out" in done.summary
    assert ("the encoder's norm starts anew" in done.summary) == global_pool


@pytest.mark.parametrize("old", [(4, 4), (2, 8)], ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_positions_of_both_tables_are_those_of_the_new_grid(old, trained, tmp_path):
    """A fixed table is computed for the new grid; one that was trained is resampled by axes."""
    theirs, new = autoencoder((4 * old[0], 4 * old[1])), (3, 5)
    if trained:
        for table in (theirs.pos_embed, theirs.decoder_pos_embed):
            table.data += torch.randn(table.shape)
    path = saved(tmp_path / "weights.pth", theirs, input_size=(4 * old[0], 4 * old[1]))
    model = autoencoder((4 * new[0], 4 * new[1]), seed=2)
    done = start(model, path)
    assert f"positions of {old[0]} x {old[1]} patches become those of 3 x 5" in done.summary
    for name in ("pos_embed", "decoder_pos_embed"):
        table, found = getattr(theirs, name).data, getattr(model, name).data
        expected = sincos_pos_embed_2d(table.shape[2], new, cls_token=True)[None]
        if trained:
            expected = resampled_by_hand(table, old, new)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_grey_images_cost_the_same_in_one_channel_as_in_three(tmp_path, capsys):
    theirs = autoencoder()
    path = saved(tmp_path / "weights.pth", theirs)
    theirs.load_state_dict(load_checkpoint(path)["model"])
    with torch.no_grad():  # equal predictions of the three channels
        layer = theirs.decoder_pred
        for parameter in (layer.weight, layer.bias):
            channels = parameter.unflatten(0, (-1, 3))
            channels.copy_(channels[:, :1].expand_as(channels))
    torch.save(theirs.state_dict(), path)
    model = autoencoder(in_chans=1, seed=2)
    start(model, path)
    assert "its patch projection and the decoder's last layer are adapted to 1" in (
        capsys.readouterr().err
    )
    grey, noise = torch.randn(3, 1, 8, 8), torch.rand(3, 4)
    losses = (m(x, 0.5, noise)[0] for m, x in ((theirs, grey.expand(-1, 3, -1, -1)), (model, grey)))
    assert torch.isclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "heads", "flags"),
    [
        ({"decoder_depth": 3}, None, "--decoder_depth 3"),
        ({"decoder_embed_dim": 24}, 2, "--decoder_embed_dim 24"),
        (
            {"decoder_embed_dim": 24, "decoder_depth": 2},
            4,
            "--decoder_embed_dim 24 --decoder_depth 2 --decoder_num_heads 4",
        ),
        ({}, 4, "--decoder_num_heads 4"),
    ],
    ids=str,
)
def test_a_decoder_of_another_size_starts_at_random_and_the_fitting_flags_are_named(
    config, heads, flags, tmp_path
):
    path = saved(tmp_path / "weights.pth", autoencoder(**config))
    weights = load_checkpoint(path)["model"]
    model = autoencoder(seed=2)
    before = copy_of(model.state_dict())
    done = start(model, path, decoder_heads=heads)
    (warning,) = done.warnings
    assert warning == (
        f"the decoder of {path} has another size, so this one starts at random: with {flags} it "
        "would be loaded"
    )
    for key, value in model.state_dict().items():
        is_new = key.startswith(("decoder_", "mask_token"))
        assert torch.equal(value, (before if is_new else weights)[key]), key


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("theirs", [False, True, None])
def test_the_target_is_said_and_another_one_warned_of(norm_pix_loss, theirs, tmp_path):
    args = {} if theirs is None else {"norm_pix_loss": theirs}
    path = saved(tmp_path / "weights.pth", autoencoder(), **args)
    done = start(autoencoder(norm_pix_loss=norm_pix_loss), path)
    said = {True: "to predict normalised pixels", False: "to predict raw pixels"}
    assert said.get(theirs, "doesn't say whether it was trained on raw or norm") in done.summary
    if theirs in (None, norm_pix_loss):
        assert not done.warnings
    else:
        (warning,) = done.warnings
        advice = "add" if theirs else "leave out"
        assert f"{advice} --norm_pix_loss to go on as it was trained" in warning


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"embed_dim": 64}, "has width 64, the model width 32: choose another --model"),
        ({"patch_size": 2}, "has patches of 2 x 2 pixels, the model patches of 4 x 4 pixels"),
        ({"depth": 3}, "has 3 blocks, the model 2 blocks"),
        ({"in_chans": 1}, "has 1 channels, the model 3 channels"),
    ],
    ids=str,
)
def test_an_encoder_of_another_size_is_refused(config, message, tmp_path, user_error):
    path = saved(tmp_path / "weights.pth", autoencoder(**config))
    model = autoencoder(seed=2)
    before = copy_of(model.state_dict())
    assert message in user_error(lambda: start(model, path))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (main_embed, {"data_path": "images", "output": "features.npz"}),
        (main_visualize, {"data_path": "images", "output": "recon.png", "norm_pix_loss": True}),
        (main_export, {"format": "timm", "output": "exported"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_no_command_takes_an_encoder_of_other_heads(
    command, flags, image_folder, tmp_path, monkeypatch, capsys
):
    """No shape shows them, and features would be wrong without a word."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").symlink_to(image_folder)
    folder = of_transformers(tmp_path / "folder", num_attention_heads=2)
    flags = {"checkpoint": folder, "model": "tiny_test_model", **flags}
    line = refused(monkeypatch, capsys, flags, command)
    assert f"{folder} has 2 attention heads, the model 4: choose another --model" in line


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize(
    ("name", "config_name", "size"),
    [
        ("decoder_depth", "decoder_num_hidden_layers", 1),
        ("decoder_embed_dim", "decoder_hidden_size", 16),
    ],
)
def test_no_decoder_is_built_that_its_weights_contradict(
    in_folder, name, config_name, size, tmp_path, pretrain_flags, monkeypatch, capsys
):
    """It would take minutes, or all memory."""
    monkeypatch.setattr(models_mae, "build_model", lambda *_, **__: pytest.fail("is built"))
    if in_folder:
        path = of_transformers(tmp_path / "folder", **{config_name: 300_000})
    else:
        path = saved(tmp_path / "file.pth", autoencoder(), **{name: 300_000})
    line = refused(monkeypatch, capsys, pretrain_flags | {"init": path})
    assert f"{path} says {name} 300000, but its weights have {size}: mend it" in line


TIMM = {"architecture": "vit_tiny_patch16_224"}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", ["vit_mae"], "it holds no object"),
        ("config.json", None, "it holds no object"),
        (
            "config.json",
            {"decoder_num_hidden_layers": "4"},
            'its "decoder_num_hidden_layers" is "4"',
        ),
        (
            "config.json",
            {"decoder_num_attention_heads": 0},
            'its "decoder_num_attention_heads" is 0',
        ),
        ("config.json", {"layer_norm_eps": None}, 'its "layer_norm_eps" is null'),
        ("config.json", {"layer_norm_eps": float("nan")}, 'its "layer_norm_eps" is NaN'),
        ("config.json", {"num_attention_heads": True}, 'its "num_attention_heads" is true'),
        ("config.json", {"image_size": [-8, -8]}, 'its "image_size" is [-8, -8]'),
        ("config.json", TIMM | {"input_size": 224}, 'its "input_size" is 224'),
        ("config.json", TIMM | {"model_args": []}, 'its "model_args" is []'),
        ("config.json", TIMM | {"pretrained_cfg": {"mean": "0.5"}}, 'its "mean" is "0.5"'),
        ("config.json", TIMM | {"mean": [0.5], "std": [0]}, 'its "std" is [0]'),
        ("config.json", TIMM | {"global_pool": ["avg"]}, 'its "global_pool" is ["avg"]'),
        ("config.json", TIMM | {"label_names": 2}, 'its "label_names" is 2'),
        ("preprocessor_config.json", {"image_mean": ["0.5"]}, 'its "image_mean" is ["0.5"]'),
        ("preprocessor_config.json", {"rescale_factor": 0}, 'its "rescale_factor" is 0'),
        ("model.safetensors.index.json", [], "it holds no object"),
        ("model.safetensors.index.json", {"weight_map": []}, 'its "weight_map" is []'),
        ("model.safetensors.index.json", {"weight_map": {"a": 1}}, 'its "weight_map" is {"a": 1}'),
    ],
    ids=str,
)
def test_malformed_files_of_a_folder_are_an_error_of_one_line(
    name, content, reason, tmp_path, user_error
):
    folder = of_transformers(tmp_path)
    if "index" in name:
        (folder / "model.safetensors").unlink()
    elif name == "config.json" and isinstance(content, dict) and "architecture" not in content:
        content = {"model_type": "vit_mae"} | content
    (folder / name).write_text(json.dumps(content))
    message = user_error(lambda: load_checkpoint(folder))
    assert message == f"{folder / name} is malformed: {reason}"


@pytest.mark.parametrize("outside", ["", ".", "..", "../a.bin", "/tmp/a.bin", "b/../../a.bin"])
def test_the_names_in_an_index_do_not_leave_its_folder(outside, tmp_path, user_error):
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.bin", "b": outside}}))
    assert user_error(lambda: load_checkpoint(tmp_path)) == (
        f"{index} names no files of weights in its folder"
    )


def test_half_a_decoder_and_malformed_weights_are_refused(tmp_path, user_error):
    path, weights = tmp_path / "weights.pth", autoencoder().state_dict()
    for key, value, message in (
        ("decoder_norm.bias", None, "missing decoder_norm.bias"),
        ("cls_token", None, "missing cls_token"),
        ("extra", torch.zeros(1), "unexpected extra"),
        ("patch_embed.proj.weight", torch.zeros(5), "has 1, not 4 axes"),
    ):
        changed = {k: v for k, v in (weights | {key: value}).items() if v is not None}
        torch.save(changed, path)
        assert message in user_error(lambda: start(autoencoder(), path))


def test_the_pixel_format_is_read_from_the_weights(
    pretrain, pretrain_flags, tmp_path, monkeypatch, capsys
):
    for split in ("train", "val"):
        (tmp_path / "bands" / split).mkdir(parents=True)
        for index in range(4):
            samples = np.random.default_rng(index).integers(0, 4000, (8, 8, 4), dtype=np.uint16)
            np.save(tmp_path / "bands" / split / f"{index}.npy", samples)
    bands = {"in_chans": 4, "value_range": (0, 4000)}
    bands |= {"mean": (0.4, 0.5, 0.6, 0.7), "std": (0.2, 0.2, 0.3, 0.3)}
    path = saved(tmp_path / "weights.pth", autoencoder(in_chans=4), **bands)
    flags = pretrain_flags | {"epochs": 1, "init": path, "data_path": tmp_path / "bands"}
    pretrain(flags)
    args = load_checkpoint(flags["output_dir"] / "checkpoint-last.pth")["args"]
    assert {name: args[name] for name in bands} == bands
    line = refused(monkeypatch, capsys, flags | {"mean": (0, 0, 0, 0), "std": (1, 1, 1, 1)})
    assert "was trained with mean 0.4 0.5 0.6 0.7, not 0.0 0.0 0.0 0.0" in line


def test_weights_that_are_not_finite_are_refused(pretrain_flags, tmp_path, monkeypatch, capsys):
    weights = autoencoder().state_dict()
    weights["norm.bias"][0] = float("nan")
    torch.save(weights, tmp_path / "nan.pth")
    line = refused(monkeypatch, capsys, pretrain_flags | {"init": tmp_path / "nan.pth"})
    assert "nan.pth holds values that are not finite in norm.bias" in line

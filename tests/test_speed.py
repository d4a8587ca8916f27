"""Fast paths compute what the plain ones do, and less of it."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
from timm.models.vision_transformer import Block
from torch.utils.flop_counter import FlopCounterMode

import models_mae
import models_vit
from benchmarks.sides import Setting, ours
from models_mae import DecoderBlock, MaskedAutoencoderViT
from util import speed

CPU = torch.device("cpu")


def loss_and_gradients(model, **options):
    imgs = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    loss, _, mask = model(imgs, 0.6, noise, **options)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), "mask": mask} | gradients


def nano(**config):
    torch.manual_seed(0)
    return models_mae.build_model("mae_vit_nano_patch4", img_size=16, **config)


def vit_nano():
    return models_vit.build_model("vit_nano_patch4", img_size=16, num_classes=3)


BUILDERS = [nano, vit_nano]


def assert_alike(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


# ---- what the loss doesn't look at is not computed


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_without_pred_equals_the_loss_with_it(norm_pix_loss):
    with_pred, without = (nano(norm_pix_loss=norm_pix_loss) for _ in range(2))
    assert_alike(loss_and_gradients(without, return_pred=False), loss_and_gradients(with_pred))


def test_pred_is_none_where_it_is_not_asked_for():
    _, pred, mask = nano()(torch.randn(2, 3, 16, 16), return_pred=False)
    assert pred is None
    assert mask.shape == (2, 16)


def test_decoder_block_is_a_block_whose_last_outputs_can_be_had_alone():
    torch.manual_seed(0)
    block, trimmed = Block(16, 2, qkv_bias=True), DecoderBlock(16, 2, qkv_bias=True)
    trimmed.load_state_dict(block.state_dict())
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(trimmed(x), block(x))
    torch.testing.assert_close(trimmed(x, outputs=3), block(x)[:, -3:])


def test_only_what_the_loss_needs_is_multiplied():
    """The forward pass's floating point operations, counted by hand."""
    model = MaskedAutoencoderViT(
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        decoder_embed_dim=16,
        decoder_depth=2,
        decoder_num_heads=2,
    )
    speed.prepare(model, CPU, torch.bfloat16)  # products that the counter knows
    patches, visible, removed, values = 16, 4, 12, 48
    tokens, width = 1 + visible, 32
    projection = 2 * visible * values * width
    encoder = 2 * (24 * tokens * width**2 + 4 * tokens**2 * width)
    embedding = 2 * tokens * width * 16
    tokens, width = 1 + patches, 16
    attention = 8 * tokens * width**2 + 4 * tokens**2 * width
    blocks = 2 * attention + 16 * (tokens + removed) * width**2
    prediction = 2 * removed * width * values
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.randn(1, 3, 16, 16), 0.75, return_pred=False)
    assert counter.get_total_flops() == projection + encoder + embedding + blocks + prediction


# ---- attention


def spy(monkeypatch, name):
    """The arguments of all calls of a function in torch.nn.functional from here on."""
    calls, function = [], getattr(torch.nn.functional, name)

    def noting(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, name, noting)
    return calls


@pytest.fixture
def fused_calls(monkeypatch):
    return spy(monkeypatch, "scaled_dot_product_attention")


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("dtype, fused", [(torch.bfloat16, False), (None, True)])
def test_only_bf16_on_a_cpu_avoids_the_fused_kernel(build, dtype, fused, fused_calls):
    model = build()
    speed.prepare(model, CPU, dtype)
    model(torch.randn(2, 3, 16, 16))
    assert bool(fused_calls) == fused


@pytest.mark.parametrize("amp, fused", [("bf16", False), ("off", True)])
@pytest.mark.parametrize("command", ["pretrain", "finetune", "linprobe"])
def test_commands_avoid_it_too(
    command, amp, fused, request, pretrain_flags, classify_flags, fused_calls
):
    main = request.getfixturevalue(command)
    flags = (pretrain_flags if command == "pretrain" else classify_flags) | {"amp": amp}
    main(flags | {"epochs": 1})
    assert bool(fused_calls) == fused
    if command != "pretrain":
        fused_calls.clear()
        checkpoint = flags["output_dir"] / "checkpoint-last.pth"
        if command == "finetune":
            del flags["finetune"]
        main(flags | {"eval": True, "resume": checkpoint})
        assert bool(fused_calls) == fused


def test_both_forms_of_attention_have_equal_loss_and_gradients():
    plain, fused = nano(), nano()
    speed.prepare(plain, CPU, torch.bfloat16)
    assert_alike(loss_and_gradients(plain), loss_and_gradients(fused))


# ---- linear layers


@pytest.fixture
def convolutions(monkeypatch):
    return spy(monkeypatch, "conv2d")


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 8), (2, 7, 8), (2, 3, 7, 8), (1, 1, 8)], ids=str)
def test_a_linear_layer_is_a_convolution_of_its_rows(shape, bias, dilation):
    torch.manual_seed(0)
    linear = speed.ConvolvedLinear(8, 12, bias)
    linear.dilation = dilation
    x = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2].requires_grad_()
    found = []
    for outputs in (torch.nn.Linear.forward(linear, x), linear(x)):
        outputs.square().sum().backward()
        gradients = [x.grad, *(p.grad for p in linear.parameters())]
        found.append([outputs.detach(), *gradients])
        x.grad = None
        linear.zero_grad()
    torch.testing.assert_close(found[1], found[0])
    assert found[1][0].is_contiguous()


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(
    "device, dtype, outruns, convolved",
    [
        ("cpu", None, True, True),
        ("cpu", None, False, False),
        ("cpu", torch.bfloat16, True, False),
        ("cuda", None, True, False),
    ],
)
def test_float32_on_a_cpu_is_convolved_where_that_is_faster(
    build, device, dtype, outruns, convolved, convolutions, monkeypatch
):
    monkeypatch.setattr(speed, "onednn_outruns_mkl", lambda: outruns)
    model = build()
    layers = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    speed.prepare(model, torch.device(device), dtype)
    model(torch.randn(2, 3, 16, 16))
    kernels = [weight.shape[2:] for _, weight, *_ in convolutions]
    assert kernels.count((1, 1)) == convolved * layers


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("threads", [1, 2])
def test_convolutions_are_onednn_s_with_any_number_of_threads(threads, monkeypatch):
    monkeypatch.setattr(speed, "onednn_outruns_mkl", lambda: True)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        layer = torch.nn.Linear(128, 256)
        speed.prepare(layer, CPU, None)
        with torch.profiler.profile() as profile:
            layer(torch.randn(4, 50, 128)).sum().backward()
    finally:
        torch.set_num_threads(threads_before)
    operations = {event.key for event in profile.key_averages()}
    assert "aten::mkldnn_convolution" in operations
    assert not operations & {"aten::mm", "aten::addmm", "aten::thnn_conv2d"}


def test_convolved_layers_have_equal_loss_and_gradients(monkeypatch):
    monkeypatch.setattr(speed, "onednn_outruns_mkl", lambda: True)
    convolved, plain = nano(), nano()
    speed.prepare(convolved, CPU, None)
    assert_alike(loss_and_gradients(convolved), loss_and_gradients(plain))
    assert convolved.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()),
    reason="torch without MKL or oneDNN",
)
@pytest.mark.parametrize(
    "vendor, family, flags, expected",
    [
        ("AuthenticAMD", 26, "avx2 avx512f avx512bw", True),
        ("AuthenticAMD", 27, "avx2 avx512f avx512bw", True),
        ("AuthenticAMD", 25, "avx2 avx512f avx512bw", False),
        ("AuthenticAMD", 26, "avx2", False),
        ("GenuineIntel", 6, "avx2 avx512f avx512bw", False),
    ],
)
def test_processors_on_which_onednn_is_faster(
    vendor, family, flags, expected, tmp_path, monkeypatch
):
    core = (
        f"processor\t: {{}}\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 2\n"
        f"flags\t\t: fpu {flags} sse\n\n"
    )
    file = tmp_path / "cpuinfo"
    file.write_text(core.format(0) + core.format(1))
    monkeypatch.setattr(speed, "Path", lambda name: file)
    assert speed.onednn_outruns_mkl() == expected
    file.unlink()  # as on other systems than Linux
    assert not speed.onednn_outruns_mkl()


# ---- memory


@contextlib.contextmanager
def kept_bytes(counted):
    """Adds up in `counted` the tensors that are kept for the backward pass."""

    def keep(tensor):
        counted.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


def test_grad_checkpointing_keeps_less_for_equal_gradients():
    plain, frugal = nano(), nano()
    speed.prepare(frugal, CPU, None, grad_checkpointing=True)
    found, kept = [], []
    for model in (plain, frugal):
        counted = []
        with kept_bytes(counted):
            found.append(loss_and_gradients(model))
        kept.append(sum(counted))
    assert_alike(found[1], found[0])
    assert kept[1] < 0.3 * kept[0]
    assert frugal.state_dict().keys() == plain.state_dict().keys()


FAULTS = """
import resource, torch
from util import speed
if {keep}:
    speed.keep_freed_memory()
for _ in range(8):
    torch.ones(2**24)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def test_only_on_a_cpu_is_freed_memory_kept(monkeypatch):
    calls = []
    monkeypatch.setattr(speed, "keep_freed_memory", lambda: calls.append(True))
    speed.prepare(nano(), torch.device("cuda"), None)
    assert not calls
    speed.prepare(nano(), CPU, None)
    assert calls


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_kept_memory_is_not_mapped_anew():
    faults = [
        int(subprocess.check_output([sys.executable, "-c", FAULTS.format(keep=keep)], text=True))
        for keep in (False, True)
    ]
    pages = 2**26 // 4096
    assert faults[0] - faults[1] > 5 * pages


# ---- compiled, recomputed


@pytest.mark.parametrize(
    "choice, convolves",
    [
        ({}, True),
        ({"compile": True}, False),
        ({"compile": True}, True),
        ({"grad_checkpointing": True}, True),
        ({"compile": True} | {"grad_checkpointing": True}, False),
    ],
)
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_commands_train_alike(
    command, choice, convolves, request, pretrain_flags, classify_flags, monkeypatch
):
    main = request.getfixturevalue(command)
    base = pretrain_flags if command == "pretrain" else classify_flags | {"drop_path": 0.5}
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    records = []
    for name, flags, outruns in (("plain", {}, False), ("chosen", choice, convolves)):
        monkeypatch.setattr(speed, "onednn_outruns_mkl", lambda outruns=outruns: outruns)
        out_dir = base["output_dir"] / name
        main(base | flags | {"output_dir": out_dir, "epochs": 1})
        records.append(json.loads((out_dir / "log.txt").read_text()))
    assert records[1]["train_loss"] == pytest.approx(records[0]["train_loss"], rel=1e-4)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert bool(graphs) == ("compile" in choice)
    assert graphs <= 2  # of encoder and decoder; evaluation and pictures compile nothing


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_steps_do_not_wait_for_the_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    train = ours(Setting("pretrain", "mae_vit_nano_patch4", 28, 8, device, "auto", False))
    train(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""Fast paths compute what the plain ones do, and less of it."""

import contextlib
import json
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import CPU, run
from timm.layers import DropPath

import models_mae
import models_vit
from util import distributed, speed


def loss_and_gradients(model):
    imgs = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    loss, _, mask = model(imgs, 0.6, noise)
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


# ---- attention


@pytest.fixture
def fused_calls(monkeypatch):
    """The arguments of all calls of torch's fused attention from here on."""
    calls, function = [], F.scaled_dot_product_attention

    def noting(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    return calls


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
from util.logs import Meter
if {keep}:
    speed.keep_freed_memory()
for _ in range(8):
    torch.ones(2**24)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.parametrize("command", ["pretrain", "finetune", "linprobe"])
def test_commands_keep_freed_memory_on_a_cpu(
    command, request, pretrain_flags, classify_flags, monkeypatch
):
    calls = []
    monkeypatch.setattr(speed, "keep_freed_memory", lambda: calls.append(True))
    flags = pretrain_flags if command == "pretrain" else classify_flags
    request.getfixturevalue(command)(flags | {"epochs": 1, "warmup_epochs": 0})
    assert calls == [True]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_kept_memory_is_not_mapped_anew(tmp_path):
    script, faults = tmp_path / "faults.py", []
    for keep in (False, True):
        script.write_text(FAULTS.format(keep=keep))
        code, out, err = run(script, {})
        assert code == 0, err
        faults.append(int(out))
    pages = 2**26 // 4096
    assert faults[0] - faults[1] > 5 * pages


# ---- compiled, recomputed


@pytest.mark.parametrize(
    "choice",
    [
        {"compile": True},
        {"grad_checkpointing": True},
        {"compile": True, "grad_checkpointing": True},
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_commands_train_alike(command, choice, request, pretrain_flags, classify_flags):
    """With drop path the draws of compiled blocks differ from eager ones."""
    main = request.getfixturevalue(command)
    base = pretrain_flags if command == "pretrain" else classify_flags
    if command == "finetune":
        base = base | {"drop_path": 0 if "compile" in choice else 0.5}
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    records = []
    for name, flags in (("plain", {}), ("chosen", choice)):
        out_dir = base["output_dir"] / name
        main(base | flags | {"output_dir": out_dir, "epochs": 1})
        records.append(json.loads((out_dir / "log.txt").read_text()))
    assert records[1]["train_loss"] == pytest.approx(records[0]["train_loss"], rel=1e-4)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert bool(graphs) == ("compile" in choice)
    assert graphs <= 2  # of encoder and decoder; evaluation and pictures compile nothing


@pytest.mark.parametrize("depth", [12, 32])
def test_blocks_of_all_drop_path_rates_share_one_compiled_graph(depth):
    """The first block, whose rate is 0, has the other; more than 8 would fall back to eager."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = models_vit.factory(4, 8, depth, 2)(img_size=8, num_classes=3, drop_path_rate=0.3)
    speed.prepare(model, CPU, None, compile=True)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "depth, grad_checkpointing", [(12, False), (12, True), (24, False), (32, False)]
)
def test_compiled_blocks_stay_whole_in_a_data_parallel_model(
    depth, grad_checkpointing, group, monkeypatch
):
    """Dynamo would cut them where DDP's buckets end: a block of ViT-L in two places."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    model = models_mae.factory(4, (256, depth, 2), (64, 2, 2))(img_size=8)
    speed.prepare(model, CPU, None, compile=True, grad_checkpointing=grad_checkpointing)
    parallel = distributed.data_parallel(model, distributed.Process(0, 2, CPU))
    parallel.bucket_bytes_cap = 2**20  # a block of the encoder has three times as much
    parallel(torch.randn(2, 3, 8, 8))[0].backward()
    assert len(graphs) == 2  # encoder, decoder


@pytest.mark.parametrize(
    ("device", "lacks", "message"),
    [
        ("cpu", "compiler", "--compile needs a compiler, and there is no g++: install one"),
        ("cuda", "compiler", "--compile needs a compiler, and there is no gcc or clang: install"),
        ("cuda", "triton", "--compile needs Triton on a GPU: pip install triton, or leave it out"),
    ],
)
def test_what_compiling_lacks_is_named_before_training(
    device, lacks, message, monkeypatch, user_error
):
    monkeypatch.setattr("shutil.which", lambda name: None if lacks == "compiler" else name)
    found = None if lacks == "triton" else object()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    prepare = partial(speed.prepare, nano(), torch.device(device), None, compile=True)
    assert user_error(prepare).startswith(message)


def test_a_block_that_cannot_be_compiled_as_a_whole_is_an_error():
    class Breaks(torch.nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x

    model = nano()
    model.blocks[0].mlp = Breaks()
    speed.prepare(model, CPU, None, compile=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(torch.randn(2, 3, 16, 16))


def test_float32_has_no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    speed.prepare(nano(), CPU, torch.bfloat16)
    assert torch.backends.cudnn.allow_tf32
    speed.prepare(nano(), CPU, None)
    assert not torch.backends.cudnn.allow_tf32


def test_tensor_drop_path_is_timms():
    """Each sample dropped as a whole, or divided by 1 - rate; nothing is done in evaluation."""
    x = torch.randn(4000, 3, 2)
    dropped = speed.TensorDropPath(0.3, CPU)
    torch.manual_seed(0)
    kept = (dropped(x) / x).flatten(1)
    torch.testing.assert_close(kept, kept[:, :1].expand_as(kept))
    expected = DropPath(0.3).train()(torch.ones(100, 1)).unique()
    for value in expected:  # 0 and 1 / 0.7
        kept[(kept - value).abs() < 1e-5] = value
    assert torch.equal(kept.unique(), expected)
    assert (kept[:, 0] > 0).float().mean().item() == pytest.approx(0.7, abs=0.03)
    assert dropped(x.bfloat16()).dtype is torch.bfloat16
    assert dropped.eval()(x) is x
    assert not dropped.state_dict()

"""The networks equal upstream's; checkpoints of several kinds give the same weights, and nothing in them runs."""

import io
import json
import os
import pickle
import subprocess
import sys
import types
from collections import defaultdict
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import net
from tests.files import Call
from tests.oracle import fill

ORACLE = Path(__file__).parent / "oracle"
KEYS = json.loads((ORACLE / "state_dict_keys.json").read_text())
REFERENCE = np.load(ORACLE / "reference.npz")


# ---- networks and their input ---------------------------------------------------------------------------------------


def blank(arch):
    """A network without numbers, which costs no time."""
    with torch.device("meta"):
        return net.build_model(arch).eval()


@pytest.mark.parametrize("arch", KEYS)
def test_state_dict_equals_upstreams_key_for_key(arch):
    model = blank(arch)
    assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == KEYS[arch]
    embedding, norm = model(torch.zeros(2, 3, 112, 112, device="meta"))
    assert (embedding.shape, norm.shape) == ((2, 512), (2, 1))


@pytest.mark.parametrize("arch", ["ir_18", "ir_34", "ir_50", "ir_101", "ir_se_50"])
def test_outputs_equal_upstreams_in_either_memory_format(arch):
    model = blank(arch)
    model.load_state_dict(fill.fill(model.state_dict()), assign=True)
    for memory_format in (torch.contiguous_format, torch.channels_last)[arch != "ir_18" :]:
        with torch.no_grad():
            x = fill.network_input().to(memory_format=memory_format)
            embedding, norm = model.to(memory_format=memory_format)(x)
        np.testing.assert_allclose(embedding, REFERENCE[f"{arch}_embedding"], atol=2e-6)
        np.testing.assert_allclose(norm, REFERENCE[f"{arch}_norm"], rtol=1e-5)


def test_conversion_equals_upstreams_and_its_formula():
    crops = fill.photo()
    x = net.to_input(crops)
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x[:, :, :4, :4], REFERENCE["photo_input_0_1"], atol=1e-6)
    np.testing.assert_allclose(x.double().sum((2, 3)), REFERENCE["photo_input_sum"], atol=1e-3)
    formula = (crops[..., ::-1].astype(np.float64) - 127.5) / 127.5  # BGR
    np.testing.assert_allclose(x, formula.transpose(0, 3, 1, 2), atol=1e-7)
    np.testing.assert_array_equal(net.to_input(torch.from_numpy(crops)), x)
    np.testing.assert_array_equal(crops, fill.photo())  # its argument is as it was


@pytest.mark.parametrize("shape", [(1, 3, 112, 112), (112, 112, 3), (1, 112, 112, 1)])
def test_conversion_refuses_what_is_not_a_batch_of_crops(shape):
    with pytest.raises(ValueError, match="crops must be"):
        net.to_input(np.zeros(shape, np.uint8))
    with pytest.raises(TypeError, match="crops must be uint8 RGB"):
        net.to_input(np.zeros((1, 112, 112, 3), np.float32))


def test_embedding_is_float32_of_unit_length_under_autocast_and_whole_or_in_halves(tiny_model):
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features, (embedding, norm) = tiny_model.features(x), tiny_model(x)
        assert all(map(torch.equal, tiny_model.head(features), (embedding, norm)))
    assert (features.dtype, embedding.dtype, norm.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))


# ---- checkpoints that are read --------------------------------------------------------------------------------------


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def load(folder, content, **options):
    torch.save(content, folder / "x.ckpt", **options)
    return net.load_checkpoint(folder / "x.ckpt")


def test_a_checkpoint_survives_saving_and_loading(tmp_path, tiny_model):
    facts = {"epoch": 3, "config": {"margin": 0.3, "ids": ["a", "b"]}, "metrics": {"val_eer": 0.25, "val_auc": None}}
    net.save_checkpoint(tmp_path / "x.pth", tiny_model, **facts, sha256=["00"])
    loaded = net.load_checkpoint(tmp_path / "x.pth")
    assert same_weights(loaded, tiny_model)
    assert (loaded.training, loaded.arch) == (False, "ir_tiny")
    assert loaded.facts == {"arch": "ir_tiny", **facts, "sha256": ["00"]}


def test_ours_is_read_by_upstreams_own_lines(tmp_path, tiny_model):
    net.save_checkpoint(tmp_path / "x.pth", tiny_model, epoch=1)
    model = net.build_model("ir_tiny")
    statedict = torch.load(tmp_path / "x.pth", weights_only=True)["state_dict"]
    model.load_state_dict({key[6:]: val for key, val in statedict.items() if key.startswith("model.")})
    assert same_weights(model, tiny_model)


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "backbone.", "", "module._orig_mod.model."])
@pytest.mark.parametrize("entries", [(), ("state_dict",), ("training", "networks", "student")])
def test_one_network_is_found_under_any_prefix_at_any_depth(tmp_path, tiny_model, prefix, entries):
    content = {prefix + key: value for key, value in tiny_model.state_dict().items()}
    content |= {"head.kernel": torch.zeros(512, 10), 5: torch.zeros(2)}
    for entry in reversed(entries):
        content = {entry: content, "epoch": 3, "optimizer": {"state": {0: {"step": torch.zeros(1)}}}}
    loaded = load(tmp_path, content)
    assert same_weights(loaded, tiny_model)
    assert loaded.facts == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("zipped", [True, False])
def test_other_floats_the_old_format_and_missing_batch_counters_are_fine(tmp_path, tiny_model, dtype, zipped):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny_model.state_dict().items()}
    state["output_layer.3.weight"] = torch.nn.Parameter(state["output_layer.3.weight"])
    state = {key: value for key, value in state.items() if "num_batches_tracked" not in key}  # as of old PyTorch
    model = load(tmp_path, {"state_dict": state}, _use_new_zipfile_serialization=zipped)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = tiny_model.output_layer[3].weight.to(dtype).float()
    torch.testing.assert_close(model.output_layer[3].weight, expected)


@pytest.mark.parametrize("kind", ["object", "dict", "numpy"])
def test_a_lightning_file_loads_without_the_packages_it_names(tmp_path, tiny_model, monkeypatch, kind):
    module = types.ModuleType("vanished_lightning")
    for name, base in (("ModelCheckpoint", types.SimpleNamespace), ("Settings", dict)):
        setattr(module, name, type(name, (base,), {"__module__": module.__name__}))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    content = {
        "epoch": 25,
        "state_dict": {f"model.{k}": v for k, v in tiny_model.state_dict().items()} | {"head.kernel": torch.zeros(3)},
        "callbacks": {module.ModelCheckpoint: {"best": "x", "object": module.ModelCheckpoint(path="x")}},
        "hyper_parameters": {
            "object": {"root": Path("/data")},
            "dict": module.Settings(margin=0.4, nested=defaultdict(list, a=[1])),
            "numpy": {"best": np.float64(0.5), "all": np.arange(3)},
        }[kind],
    }
    torch.save(content, tmp_path / "upstream.ckpt")
    monkeypatch.undo()
    with pytest.raises(ModuleNotFoundError):
        torch.load(tmp_path / "upstream.ckpt", weights_only=False)
    assert same_weights(net.load_checkpoint(tmp_path / "upstream.ckpt"), tiny_model)


# ---- checkpoints that are refused -----------------------------------------------------------------------------------


ATTACKS = {
    "os.system": lambda flag: Call(os.system, f"touch {flag}"),
    "eval": lambda flag: Call(eval, f"open({flag!r}, 'w')"),
    "subprocess": lambda flag: Call(subprocess.check_call, ["touch", flag]),
    "a pickle within": lambda flag: Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {flag}"), 2)),
    "torch.save": lambda flag: Call(torch.save, {}, flag),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_from_a_checkpoint_runs(tmp_path, tiny_model, attack, zipped):
    flag, path = tmp_path / "owned", tmp_path / "bad.ckpt"
    content = {"state_dict": tiny_model.state_dict(), "x": ATTACKS[attack](str(flag))}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    try:
        assert same_weights(net.load_checkpoint(path), tiny_model)
    except net.InputError as error:
        assert "bad.ckpt: " in str(error)  # noqa: PT017 (reading it past the inert call is as good)
    assert not flag.exists()
    torch.load(path, weights_only=False)
    assert flag.exists()  # so the attack was a real one


def refused(folder, content, match, **options):
    with pytest.raises(net.InputError, match=rf"x\.ckpt: .*{match}") as caught:
        load(folder, content, **options)
    assert str(caught.value).isprintable()  # one line, without codes that colour a terminal


def test_several_networks_are_refused_by_name(tmp_path, tiny_model):
    state = tiny_model.state_dict()
    both = {f"{prefix}.{key}": value for prefix in ("student", "teacher") for key, value in state.items()}
    refused(tmp_path, {"state_dict": both}, r"several networks.*state_dict/student\..*state_dict/teacher\.")
    refused(tmp_path, {"net": state, "ema": state}, r"several networks.*net/.*ema/")


@pytest.mark.parametrize("content", [{"a": 1}, {"state_dict": {"encoder.weight": torch.zeros(1)}}, {}])
def test_a_file_without_a_network_says_so(tmp_path, content):
    refused(tmp_path, content, "no AdaFace network in it")
    refused(tmp_path, [content], "holds list")


def test_a_wrong_architecture_names_the_one_that_fits(tmp_path, tiny_model):
    net.save_checkpoint(tmp_path / "x.pth", tiny_model)
    with pytest.raises(net.InputError, match=r"x\.pth: .*fit ir_tiny, not ir_50; say --arch ir_tiny"):
        net.load_checkpoint(tmp_path / "x.pth", "ir_50")
    with pytest.raises(net.InputError, match=r"'resnet50'.*ir_18, ir_34, ir_50"):
        net.build_model("resnet50")


def test_half_a_network_names_what_is_missing(tmp_path, tiny_model):
    state = tiny_model.state_dict()
    del state["body.3.res_layer.1.weight"]
    refused(tmp_path, state, r"not a whole ir_tiny network .*body\.3\.res_layer\.1\.weight")
    refused(tmp_path, {key: value for key, value in state.items() if "body.2." not in key}, "3 residual units")
    refused(tmp_path, state | {"body.3.res_layer.1.weight": torch.zeros(1)}, "not a whole ir_tiny")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_weights_that_no_training_leaves_are_refused(tmp_path, tiny_model, value):
    tiny_model.output_layer[4].running_var[0] = value
    refused(tmp_path, tiny_model.state_dict(), r"output_layer\.4\.running_var holds NaN, infinite or impossible")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 not a zip", b'{"a": 1}', "half", "half, old"])
def test_files_that_are_no_checkpoints_are_refused(tmp_path, tiny_model, content):
    if isinstance(content, str):
        file = io.BytesIO()
        torch.save(tiny_model.state_dict(), file, _use_new_zipfile_serialization=content == "half")
        content = file.getvalue()[: len(file.getvalue()) // 2]
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(net.InputError, match=r"x\.pth: not a readable checkpoint, download or copy it again"):
        net.load_checkpoint(tmp_path / "x.pth")


def test_a_pickle_protocol_that_pytorch_does_not_read_is_refused_with_its_reason(tmp_path, tiny_model):
    refused(tmp_path, tiny_model.state_dict(), "Unsupported operand", pickle_protocol=4)


def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(tmp_path, tiny_model):
    net.save_checkpoint(tmp_path / "x.pth", tiny_model)
    before = (tmp_path / "x.pth").read_bytes()
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        net.save_checkpoint(tmp_path / "x.pth", tiny_model, config={"a": lambda: None})
    with pytest.raises(KeyboardInterrupt), net.replacing(tmp_path / "x.pth") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]
    assert (tmp_path / "x.pth").read_bytes() == before


# ---- device and processes -------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    """gpus(2): this machine has two GPUs, for which this PyTorch has code, or else fails as it does."""

    def pretend(count, error=None):
        for name, value in (("is_available", count > 0), ("device_count", count), ("get_device_name", "NVIDIA Old")):
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        monkeypatch.setattr(torch, "ones", Mock(side_effect=error))

    return pretend


def test_a_device_that_is_not_there_is_refused(gpus):
    gpus(0)
    assert net.pick_device("auto") == net.pick_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1", "gpu"):
        with pytest.raises(net.InputError, match=f"--device {name}: must be auto, cpu.* 0 CUDA devices"):
            net.pick_device(name)


def test_a_cuda_device_is_named_with_its_number_and_without_tf32(gpus):
    gpus(2)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    assert net.pick_device("auto") == net.pick_device("cuda") == torch.device("cuda:0")
    assert net.pick_device("cuda:1") == torch.device("cuda:1")
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (False, False)


def test_a_gpu_for_which_pytorch_has_no_code_is_left_alone_with_a_word(gpus, capsys):
    gpus(1, RuntimeError("CUDA error: no kernel image is available\nCompile with"))
    assert net.pick_device("auto") == torch.device("cpu")
    said = "warning: not using NVIDIA Old (CUDA error: no kernel image is available), but the CPU\n"
    assert capsys.readouterr().out == said
    with pytest.raises(net.InputError, match=r"--device cuda: cannot be used .*no kernel image.*; take cpu"):
        net.pick_device("cuda")


def test_a_process_alone_has_everything_and_waits_for_nobody():
    alone, part, total = net.Processes("cpu"), torch.randn(5, 2), torch.ones(2)
    alone.sum_([total])
    assert (alone.rank, alone.world, alone.device) == (0, 1, torch.device("cpu"))
    assert (alone.share(5), total.tolist(), alone.collect("a")) == (slice(0, 5), [1, 1], ["a"])
    assert (alone.any(True), alone.any(0)) == (True, False)
    assert torch.equal(alone.gather(part, 5), part)


def test_progress_without_a_terminal_is_a_line_every_half_minute(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    for _ in net.progress(range(100), "reading crops", "crop"):
        clock[0] += 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert [line[:15] for line in lines] in [["reading crops: "] * n for n in (6, 7, 8)]


@pytest.mark.parametrize("code", [0, 2])
def test_leaving_ends_with_the_code(code):
    with pytest.raises(SystemExit, match=f"^{code}$"):
        net.run_main(lambda: code)

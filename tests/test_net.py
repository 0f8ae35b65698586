import json
import os
import sys
import types
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

import align
import net
from tests.oracle import fill

ORACLE = Path(__file__).parent / "oracle"
KEYS = json.loads((ORACLE / "state_dict_keys.json").read_text())
REFERENCE = np.load(ORACLE / "reference.npz")


@pytest.mark.parametrize("arch", KEYS)
def test_state_dict_equals_upstreams_key_for_key(arch):
    assert [[key, list(shape)] for key, shape in net._shapes(arch).items()] == KEYS[arch]


@pytest.mark.parametrize("arch", ["ir_18", "ir_34", "ir_50", "ir_101", "ir_se_50"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_outputs_equal_upstreams(arch, memory_format):
    model = net.build_model(arch).eval()
    model.load_state_dict(fill.fill(model.state_dict()))
    x = fill.network_input().to(memory_format=memory_format)
    with torch.no_grad():
        embedding, norm = model.to(memory_format=memory_format)(x)
    np.testing.assert_allclose(embedding, REFERENCE[f"{arch}_embedding"], atol=2e-6)
    np.testing.assert_allclose(norm, REFERENCE[f"{arch}_norm"], rtol=1e-5)


def test_wide_bottleneck_network_runs():
    model = net.build_model("ir_se_152").eval()
    with torch.no_grad():
        embedding, norm = model(torch.zeros(1, 3, 112, 112))
    assert embedding.shape == (1, 512)
    assert norm.shape == (1, 1)


def test_conversion_equals_upstreams():
    x = net.to_input(fill.photo())
    np.testing.assert_allclose(x[:, :, :4, :4], REFERENCE["photo_input_0_1"], atol=1e-6)
    np.testing.assert_allclose(x.double().sum((2, 3)), REFERENCE["photo_input_sum"], atol=1e-3)
    np.testing.assert_array_equal(net.to_input(torch.from_numpy(fill.photo())), x)


def test_conversion_swaps_red_and_blue():
    red = np.zeros((1, 112, 112, 3), np.uint8)
    red[..., 0] = 255
    assert net.to_input(red)[0, :, 0, 0].tolist() == [-1.0, -1.0, 1.0]


@pytest.mark.parametrize(
    ("crops", "error"),
    [
        (np.zeros((1, 112, 112, 3), np.float32), TypeError),
        (np.zeros((1, 3, 112, 112), np.uint8), ValueError),
        (np.zeros((112, 112, 3), np.uint8), ValueError),
    ],
)
def test_conversion_refuses_what_is_not_a_batch_of_crops(crops, error):
    with pytest.raises(error):
        net.to_input(crops)


def test_embedding_is_float32_of_unit_length_under_autocast(tiny_model):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert tiny_model.features(torch.randn(2, 3, 112, 112)).dtype == torch.bfloat16
        embedding, norm = tiny_model(torch.randn(2, 3, 112, 112))
    assert embedding.dtype == norm.dtype == torch.float32
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))


def test_halves_make_the_whole(tiny_model):
    x = torch.randn(2, 3, 112, 112)
    assert torch.equal(tiny_model.head(tiny_model.features(x))[0], tiny_model(x)[0])


def test_kaiming_normal_fan_out():
    conv = net.build_model("ir_18").body[7].res_layer[4]
    assert conv.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---- checkpoints


def test_checkpoint_survives_saving_and_loading(tmp_path, tiny_model):
    facts = {
        "epoch": 3,
        "config": {"margin": np.float64(0.3), "path": Path("a")},
        "metrics": {"val_eer": np.float32(0.5)},
    }
    net.save_checkpoint(tmp_path / "x.pth", tiny_model, **facts)
    loaded = net.load_checkpoint(tmp_path / "x.pth")
    assert same_weights(loaded, tiny_model)
    assert not loaded.training
    assert loaded.facts["config"] == {"margin": 0.3, "path": "a"}
    assert loaded.facts["metrics"] == {"val_eer": 0.5}
    assert loaded.arch == loaded.facts["arch"] == "ir_tiny"


def test_our_checkpoint_is_read_by_upstreams_own_loader(tmp_path, tiny_model):
    net.save_checkpoint(tmp_path / "x.pth", tiny_model, epoch=1)
    statedict = torch.load(tmp_path / "x.pth", weights_only=True)["state_dict"]
    model_statedict = {key[6:]: val for key, val in statedict.items() if key.startswith("model.")}
    fresh = net.build_model("ir_tiny")
    fresh.load_state_dict(model_statedict)
    assert same_weights(fresh, tiny_model)


@pytest.mark.parametrize("prefix", ["model.", "module.", "net.", "", "module.model."])
@pytest.mark.parametrize("nested", [True, False])
def test_prefixes_and_bare_state_dicts(tmp_path, tiny_model, prefix, nested):
    state = {prefix + key: value for key, value in tiny_model.state_dict().items()}
    state["head.kernel"] = torch.zeros(512, 10)
    torch.save({"state_dict": state} if nested else state, tmp_path / "x.ckpt")
    loaded = net.load_checkpoint(tmp_path / "x.ckpt")
    assert same_weights(loaded, tiny_model)
    assert loaded.facts == {}


def test_half_precision_weights_become_float32(tmp_path, tiny_model):
    torch.save(
        {k: v.half() if v.is_floating_point() else v for k, v in tiny_model.state_dict().items()}, tmp_path / "x"
    )
    assert {p.dtype for p in net.load_checkpoint(tmp_path / "x").parameters()} == {torch.float32}


def test_missing_batch_counters_are_accepted(tmp_path, tiny_model):
    torch.save({k: v for k, v in tiny_model.state_dict().items() if "num_batches" not in k}, tmp_path / "x")
    assert torch.equal(
        net.load_checkpoint(tmp_path / "x").body[0].res_layer[1].weight, tiny_model.body[0].res_layer[1].weight
    )


@pytest.mark.parametrize("kind", ["object", "dict", "numpy"])
def test_lightning_file_loads_without_the_packages_it_names(tmp_path, tiny_model, monkeypatch, kind):
    module = types.ModuleType("vanished_lightning.callbacks")

    class ModelCheckpoint:
        def __init__(self, path):
            self.path = path

    class Settings(dict):
        pass

    for cls in (ModelCheckpoint, Settings):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "vanished_lightning", types.ModuleType("vanished_lightning"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    content = {
        "epoch": 25,
        "state_dict": {f"model.{k}": v for k, v in tiny_model.state_dict().items()} | {"head.kernel": torch.zeros(3)},
        "callbacks": {ModelCheckpoint: {"best_model_path": "x", "object": ModelCheckpoint("y")}},
        "hyper_parameters": {"root": Path("/data")},
    }
    if kind == "dict":
        content["hyper_parameters"] = Settings(margin=0.4, nested=defaultdict(list, a=[1]))
    if kind == "numpy":
        content["best"] = np.float64(0.5)
    torch.save(content, tmp_path / "upstream.ckpt")
    monkeypatch.undo()
    with pytest.raises(ModuleNotFoundError):
        torch.load(tmp_path / "upstream.ckpt", weights_only=False)
    assert same_weights(net.load_checkpoint(tmp_path / "upstream.ckpt"), tiny_model)


class Attack:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec])
def test_code_in_a_checkpoint_is_not_run(tmp_path, tiny_model, function):
    flag = tmp_path / "owned"
    argument = f"touch {flag}" if function is os.system else f"open({str(flag)!r}, 'w')"
    torch.save({"state_dict": tiny_model.state_dict(), "x": Attack(function, argument)}, tmp_path / "bad.ckpt")
    try:
        net.load_checkpoint(tmp_path / "bad.ckpt")
    except net.InputError as error:
        assert "bad.ckpt: it asks to run" in str(error)  # noqa: PT017 (loading an inert eval is fine as well)
    assert not flag.exists()
    torch.load(tmp_path / "bad.ckpt", weights_only=False)
    assert flag.exists()  # so the attack was a real one


def test_wrong_architecture_names_keys_and_the_one_that_fits(tmp_path):
    net.save_checkpoint(tmp_path / "x.pth", net.build_model("ir_18"))
    with pytest.raises(net.InputError, match=r"not a whole ir_50 network \(missing body\.3.*its tensors fit ir_18"):
        net.load_checkpoint(tmp_path / "x.pth", "ir_50")


def test_missing_keys_are_named(tmp_path):
    state = net.build_model("ir_18").state_dict()
    del state["body.3.res_layer.1.weight"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(net.InputError, match=r"ir_18 network \(missing body\.3\.res_layer\.1\.weight\); the closest"):
        net.load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 not a zip", b"\x80\x02c__builtin__\neval\n."])
def test_files_that_are_no_checkpoints(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(net.InputError, match=r"x\.pth: (not a readable PyTorch checkpoint|it asks to run)"):
        net.load_checkpoint(tmp_path / "x.pth")


def test_truncated_checkpoint(tmp_path, tiny_model):
    net.save_checkpoint(tmp_path / "x.pth", tiny_model)
    data = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(net.InputError, match="not a readable"):
        net.load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("content", [{"a": 1}, [1], {"state_dict": {"encoder.weight": torch.zeros(1)}}])
def test_checkpoints_of_other_networks(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(net.InputError, match=r"x\.pth: (no AdaFace network|holds list)"):
        net.load_checkpoint(tmp_path / "x.pth")


def test_nan_weights_are_refused(tmp_path, tiny_model):
    tiny_model.body[0].res_layer[1].weight.data[0] = float("nan")
    net.save_checkpoint(tmp_path / "x.pth", tiny_model)
    with pytest.raises(net.InputError, match=r"body\.0\.res_layer\.1\.weight holds NaN"):
        net.load_checkpoint(tmp_path / "x.pth")


def test_failed_save_keeps_the_old_file_and_leaves_nothing(tmp_path, tiny_model):
    net.save_checkpoint(tmp_path / "x.pth", tiny_model)
    before = (tmp_path / "x.pth").read_bytes()
    with pytest.raises(TypeError, match="plain types only"):
        net.save_checkpoint(tmp_path / "x.pth", tiny_model, config={"a": object()})
    with pytest.raises(RuntimeError), net.replacing(tmp_path / "x.pth") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]
    assert (tmp_path / "x.pth").read_bytes() == before


def test_device_that_is_not_there():
    with pytest.raises(net.InputError, match="--device cuda:99"):
        align.pick_device("cuda:99")
    assert align.pick_device("cpu").type == "cpu"


def test_a_cuda_device_is_named_with_its_number_and_without_tf32(monkeypatch):
    """As tensors name theirs: torch.device("cuda") is not equal to the "cuda:0" of a tensor made there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    torch.backends.cudnn.allow_tf32 = True
    assert align.pick_device("auto") == align.pick_device("cuda") == torch.device("cuda:0")
    assert align.pick_device("cuda:1") == chosen[-1] == torch.device("cuda:1")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32

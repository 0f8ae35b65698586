"""The networks equal upstream's; checkpoints of all kinds give the same weights and run nothing.

The second half tests what all scripts share: files that are replaced as a whole, interrupts,
devices and processes.
"""

import functools
import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import types
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

import net
from tests.files import Call
from tests.oracle import fill

ORACLE = Path(__file__).parent / "oracle"
KEYS = json.loads((ORACLE / "state_dict_keys.json").read_text())
REFERENCE = np.load(ORACLE / "reference.npz")
CPU = torch.device("cpu")


# ---- networks ------------------------------------------------------------------------------------


def network_without_numbers(arch):
    """A network on the meta device, where it takes neither memory nor time."""
    with torch.device("meta"):
        return net.build_model(arch).eval()


@pytest.fixture(scope="module", params=KEYS)
def blank_model(request):
    return network_without_numbers(request.param)


def test_state_dict_equals_upstreams_key_for_key(blank_model):
    shapes = [[key, list(value.shape)] for key, value in blank_model.state_dict().items()]
    assert shapes == KEYS[blank_model.arch]


def test_every_network_gives_embeddings_of_512_numbers_and_norms(blank_model):
    embedding, norm = blank_model(torch.zeros(2, 3, 112, 112, device="meta"))
    assert embedding.shape == (2, 512)
    assert norm.shape == (2, 1)


def test_an_unknown_architecture_is_refused_with_those_there_are():
    with pytest.raises(net.InputError, match=r"'resnet50'.*ir_18, ir_34, ir_50"):
        net.build_model("resnet50")


@functools.lru_cache(maxsize=1)
def model_of_the_oracle(arch):
    """A network with the weights for which the oracle holds upstream's outputs."""
    model = network_without_numbers(arch)
    model.load_state_dict(fill.fill(model.state_dict()), assign=True)
    return model


@pytest.mark.parametrize(
    ("arch", "memory_format"),
    [
        ("ir_18", torch.contiguous_format),
        ("ir_18", torch.channels_last),
        ("ir_34", torch.channels_last),
        ("ir_50", torch.channels_last),
        ("ir_101", torch.channels_last),
        ("ir_se_50", torch.channels_last),
    ],
    ids=str,
)
def test_outputs_equal_upstreams(arch, memory_format):
    model = model_of_the_oracle(arch).to(memory_format=memory_format)
    x = fill.network_input().to(memory_format=memory_format)
    with torch.no_grad():
        embedding, norm = model(x)
    np.testing.assert_allclose(embedding, REFERENCE[f"{arch}_embedding"], atol=2e-6)
    np.testing.assert_allclose(norm, REFERENCE[f"{arch}_norm"], rtol=1e-5)


def test_embeddings_and_norms_are_float32_under_autocast(tiny_model):
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = tiny_model.features(x)
        embedding, norm = tiny_model(x)
    assert features.dtype == torch.bfloat16  # so autocast was at work
    assert embedding.dtype == torch.float32
    assert norm.dtype == torch.float32


def test_embeddings_have_unit_length_under_autocast(tiny_model):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        embedding, _ = tiny_model(torch.randn(2, 3, 112, 112))
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))


def test_the_two_halves_of_a_network_give_what_the_whole_gives(tiny_model):
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = tiny_model(x)
        halves = tiny_model.head(tiny_model.features(x))
    assert torch.equal(halves[0], whole[0])
    assert torch.equal(halves[1], whole[1])


# ---- the input -----------------------------------------------------------------------------------


def test_conversion_equals_upstreams():
    x = net.to_input(fill.photo())
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x[:, :, :4, :4], REFERENCE["photo_input_0_1"], atol=1e-6)
    np.testing.assert_allclose(x.double().sum((2, 3)), REFERENCE["photo_input_sum"], atol=1e-3)


def test_conversion_equals_its_formula():
    crops = fill.photo()
    bgr = crops[..., ::-1].astype(np.float64)
    expected = ((bgr - 127.5) / 127.5).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(net.to_input(crops), expected, atol=1e-7)


def test_conversion_takes_arrays_and_tensors_alike():
    crops = fill.photo()
    of_tensor = net.to_input(torch.from_numpy(crops))
    np.testing.assert_array_equal(of_tensor, net.to_input(crops))


def test_conversion_leaves_its_argument_as_it_was():
    crops = fill.photo()
    net.to_input(crops)
    np.testing.assert_array_equal(crops, fill.photo())


@pytest.mark.parametrize("shape", [(1, 3, 112, 112), (112, 112, 3), (1, 112, 112, 1)])
def test_conversion_refuses_what_is_not_a_batch_of_crops(shape):
    with pytest.raises(ValueError, match="crops must be"):
        net.to_input(np.zeros(shape, np.uint8))


def test_conversion_refuses_floats():
    with pytest.raises(TypeError, match="crops must be uint8 RGB"):
        net.to_input(np.zeros((1, 112, 112, 3), np.float32))


# ---- embeddings of crops -------------------------------------------------------------------------


@pytest.fixture
def crops():
    return torch.randint(0, 256, (5, 112, 112, 3), dtype=torch.uint8)


def with_another_head(model):
    """A copy of a network with random weights in its embedding layer."""
    other = net.build_model(model.arch)
    state = model.state_dict()
    state["output_layer.3.weight"] = other.state_dict()["output_layer.3.weight"]
    other.load_state_dict(state)
    return other.eval()


@pytest.fixture
def networks(tiny_model):
    """Three networks with one backbone."""
    return [tiny_model, with_another_head(tiny_model), with_another_head(tiny_model)]


def test_embeddings_of_crops_are_what_the_network_gives(tiny_model, crops):
    (embeddings,) = net.embed(tiny_model, crops, CPU)
    with torch.no_grad():
        expected, _ = tiny_model(net.to_input(crops))
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, expected, atol=1e-6, rtol=0)


def test_flipped_embeddings_are_upstreams_sum_over_both_mirror_images(tiny_model, crops):
    (embeddings,) = net.embed(tiny_model, crops, CPU, flip=True)
    x = net.to_input(crops)
    with torch.no_grad():
        embedding, norm = tiny_model(x)
        mirrored_embedding, mirrored_norm = tiny_model(x.flip(3))
    total = embedding * norm + mirrored_embedding * mirrored_norm
    expected = torch.nn.functional.normalize(total)
    torch.testing.assert_close(embeddings, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("flip", [False, True])
def test_embedding_with_several_heads_equals_embedding_with_each_whole_network(
    networks, crops, flip
):
    heads = [network.output_layer for network in networks]
    together = net.embed(networks[0], crops, CPU, heads, batch_size=2, flip=flip)
    assert len(together) == len(networks)
    for network, embeddings in zip(networks, together, strict=True):
        (alone,) = net.embed(network, crops, CPU, batch_size=2, flip=flip)
        assert torch.equal(embeddings, alone)


def test_the_heads_of_the_networks_do_differ(networks, crops):
    heads = [network.output_layer for network in networks]
    first, second, third = net.embed(networks[0], crops, CPU, heads)
    for a, b in ((first, second), (first, third), (second, third)):
        assert (a * b).sum(1).max() < 0.5


@pytest.mark.parametrize(("flip", "views"), [(False, 1), (True, 2)])
def test_a_common_backbone_runs_once_for_all_heads(networks, crops, flip, views):
    embedded = []
    for network in networks:
        network.body.register_forward_hook(lambda *args: embedded.append(len(args[2])))
    heads = [network.output_layer for network in networks]
    net.embed(networks[0], crops, CPU, heads, batch_size=2, flip=flip)
    assert sum(embedded) == views * len(crops)


def test_embedding_stops_between_two_batches_when_it_is_asked_to(tiny_model, crops, monkeypatch):
    embedded = []

    def ask(*args):
        embedded.append(args)
        monkeypatch.setattr(net.interrupt, "asked", True)

    tiny_model.body.register_forward_hook(ask)
    with pytest.raises(KeyboardInterrupt):
        net.embed(tiny_model, crops, CPU, batch_size=2)
    assert len(embedded) == 1


# ---- the hash of a network -----------------------------------------------------------------------


def test_a_network_is_known_by_its_weights_after_saving_and_loading(tmp_path, tiny_model):
    net.save_checkpoint(tmp_path / "x.pth", tiny_model)
    loaded = net.load_checkpoint(tmp_path / "x.pth")
    assert net.weights_sha256(loaded) == net.weights_sha256(tiny_model)


def test_networks_with_one_backbone_have_equal_hashes_of_the_backbone_alone(networks):
    backbones = {net.weights_sha256(network, backbone_only=True) for network in networks}
    assert len(backbones) == 1
    assert len({net.weights_sha256(network) for network in networks}) == 3


@pytest.mark.parametrize("backbone_only", [True, False])
@pytest.mark.parametrize("key", ["body.3.res_layer.1.weight", "input_layer.1.running_mean"])
def test_a_change_in_the_backbone_changes_both_hashes(tiny_model, key, backbone_only):
    before = net.weights_sha256(tiny_model, backbone_only)
    tiny_model.state_dict()[key].view(-1)[0] += 0.5
    assert net.weights_sha256(tiny_model, backbone_only) != before


# ---- checkpoints that are read -------------------------------------------------------------------


def same_weights(a, b):
    """Whether two networks have the same parameters and statistics, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def save_and_load(folder, content, **options):
    torch.save(content, folder / "x.ckpt", **options)
    return net.load_checkpoint(folder / "x.ckpt")


def test_a_network_survives_saving_and_loading(tmp_path, tiny_model):
    net.save_checkpoint(tmp_path / "x.pth", tiny_model)
    loaded = net.load_checkpoint(tmp_path / "x.pth")
    assert same_weights(loaded, tiny_model)
    assert loaded.arch == "ir_tiny"


def test_a_loaded_network_is_in_eval_mode(tmp_path, tiny_model):
    net.save_checkpoint(tmp_path / "x.pth", tiny_model.train())
    assert not net.load_checkpoint(tmp_path / "x.pth").training


def test_facts_survive_saving_and_loading(tmp_path, tiny_model):
    facts = {
        "epoch": 3,
        "config": {"margin": 0.3, "ids": ["a", "b"]},
        "metrics": {"val_eer": 0.25, "val_auc": None},
        "sha256": ["00"],
    }
    net.save_checkpoint(tmp_path / "x.pth", tiny_model, **facts)
    loaded = net.load_checkpoint(tmp_path / "x.pth")
    assert loaded.facts == {"arch": "ir_tiny", **facts}


def test_ours_is_read_by_upstreams_own_lines(tmp_path, tiny_model):
    net.save_checkpoint(tmp_path / "x.pth", tiny_model, epoch=1)
    model = net.build_model("ir_tiny")
    statedict = torch.load(tmp_path / "x.pth", weights_only=True)["state_dict"]
    model_statedict = {key[6:]: val for key, val in statedict.items() if key.startswith("model.")}
    model.load_state_dict(model_statedict)
    assert same_weights(model, tiny_model)


PREFIXES = ["model.", "module.", "_orig_mod.", "backbone.", "", "module._orig_mod.model."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("entries", [(), ("state_dict",), ("training", "networks", "student")])
def test_one_network_is_found_under_any_prefix_at_any_depth(tmp_path, tiny_model, prefix, entries):
    content = {prefix + key: value for key, value in tiny_model.state_dict().items()}
    content |= {"head.kernel": torch.zeros(512, 10), 5: torch.zeros(2)}
    for entry in reversed(entries):
        optimizer = {"state": {0: {"step": torch.zeros(1)}}}
        content = {entry: content, "epoch": 3, "optimizer": optimizer}
    loaded = save_and_load(tmp_path, content)
    assert same_weights(loaded, tiny_model)
    assert loaded.facts == {}


def as_an_old_pytorch_has_it(state, dtype):
    """A state dict of another float type, with a Parameter in it and without batch counters."""
    old = {}
    for key, value in state.items():
        if "num_batches_tracked" not in key:
            old[key] = value.to(dtype)
    old["output_layer.3.weight"] = torch.nn.Parameter(old["output_layer.3.weight"])
    return old


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("zipped", [True, False])
def test_other_floats_the_old_format_and_missing_batch_counters_are_fine(
    tmp_path, tiny_model, dtype, zipped
):
    content = {"state_dict": as_an_old_pytorch_has_it(tiny_model.state_dict(), dtype)}
    loaded = save_and_load(tmp_path, content, _use_new_zipfile_serialization=zipped)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    expected = tiny_model.output_layer[3].weight.to(dtype).float()
    torch.testing.assert_close(loaded.output_layer[3].weight, expected)


@pytest.fixture
def vanishing_package(monkeypatch):
    """A package that can be imported until `monkeypatch.undo()`, with two classes."""
    package = types.ModuleType("vanished_lightning")
    for name, base in (("ModelCheckpoint", types.SimpleNamespace), ("Settings", dict)):
        setattr(package, name, type(name, (base,), {"__module__": package.__name__}))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    return package


def hyper_parameters(kind, package):
    """What Lightning keeps of the settings of a run, of several kinds."""
    if kind == "object":
        return {"root": Path("/data")}
    if kind == "dict":
        return package.Settings(margin=0.4, nested=defaultdict(list, a=[1]))
    return {"best": np.float64(0.5), "all": np.arange(3)}


@pytest.mark.parametrize("kind", ["object", "dict", "numpy"])
def test_a_lightning_file_loads_without_the_packages_it_names(
    tmp_path, tiny_model, vanishing_package, monkeypatch, kind
):
    state = {f"model.{key}": value for key, value in tiny_model.state_dict().items()}
    callback = vanishing_package.ModelCheckpoint
    content = {
        "epoch": 25,
        "state_dict": state | {"head.kernel": torch.zeros(3)},
        "callbacks": {callback: {"best": "x", "object": callback(path="x")}},
        "hyper_parameters": hyper_parameters(kind, vanishing_package),
    }
    torch.save(content, tmp_path / "upstream.ckpt")
    monkeypatch.undo()
    with pytest.raises(ModuleNotFoundError):
        torch.load(tmp_path / "upstream.ckpt", weights_only=False)
    assert same_weights(net.load_checkpoint(tmp_path / "upstream.ckpt"), tiny_model)


# ---- checkpoints that are refused ----------------------------------------------------------------


ATTACKS = {
    "os.system": lambda flag: Call(os.system, f"touch {flag}"),
    "eval": lambda flag: Call(eval, f"open({flag!r}, 'w')"),
    "subprocess": lambda flag: Call(subprocess.check_call, ["touch", flag]),
    "a pickle within": lambda flag: Call(
        pickle.loads, pickle.dumps(Call(os.system, f"touch {flag}"), 2)
    ),
    "torch.save": lambda flag: Call(torch.save, {}, flag),
}


def load_or_refuse(path):
    """(network, None), or (None, message) of a checkpoint that is refused."""
    try:
        return net.load_checkpoint(path), None
    except net.InputError as error:
        return None, str(error)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_from_a_checkpoint_runs(tmp_path, tiny_model, attack, zipped):
    flag = tmp_path / "owned"
    path = tmp_path / "bad.ckpt"
    content = {"state_dict": tiny_model.state_dict(), "x": ATTACKS[attack](str(flag))}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    model, refusal = load_or_refuse(path)
    assert not flag.exists()
    # Reading the network past the call, which stays inert, is as good as refusing the file.
    if model is None:
        assert "bad.ckpt: " in refusal
    else:
        assert same_weights(model, tiny_model)
    torch.load(path, weights_only=False)
    assert flag.exists()  # so the attack was a real one


def assert_refused(folder, content, message, **options):
    """The checkpoint is refused in one line, which begins with its path and has the message."""
    with pytest.raises(net.InputError, match=rf"x\.ckpt: .*{message}") as caught:
        save_and_load(folder, content, **options)
    assert str(caught.value).isprintable()  # also without codes that colour a terminal


def test_two_networks_under_two_prefixes_are_refused_by_name(tmp_path, tiny_model):
    both = {}
    for key, value in tiny_model.state_dict().items():
        both[f"student.{key}"] = value
        both[f"teacher.{key}"] = value
    message = r"several networks.*state_dict/student\..*state_dict/teacher\."
    assert_refused(tmp_path, {"state_dict": both}, message)


def test_two_networks_in_two_entries_are_refused_by_name(tmp_path, tiny_model):
    state = tiny_model.state_dict()
    assert_refused(tmp_path, {"net": state, "ema": state}, r"several networks.*net/.*ema/")


FILES_WITHOUT_A_NETWORK = [{"a": 1}, {"state_dict": {"encoder.weight": torch.zeros(1)}}, {}]


@pytest.mark.parametrize("content", FILES_WITHOUT_A_NETWORK)
def test_a_file_without_a_network_says_so(tmp_path, content):
    assert_refused(tmp_path, content, "no AdaFace network in it")


@pytest.mark.parametrize("content", FILES_WITHOUT_A_NETWORK)
def test_a_file_without_a_dict_says_what_it_holds(tmp_path, content):
    assert_refused(tmp_path, [content], "holds list")


def test_a_wrong_architecture_names_the_one_that_fits(tmp_path, tiny_model):
    net.save_checkpoint(tmp_path / "x.pth", tiny_model)
    message = r"x\.pth: .*fit ir_tiny, not ir_50; say --arch ir_tiny"
    with pytest.raises(net.InputError, match=message):
        net.load_checkpoint(tmp_path / "x.pth", "ir_50")


def test_colours_that_are_not_rgb_or_bgr_are_refused(tmp_path, tiny_model):
    state = {f"net.{key}": value for key, value in tiny_model.state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(net.InputError, match=r"x\.pth: .*RGB or BGR, not 'rgb'"):
        net.load_checkpoint(tmp_path / "x.pth", channels="rgb")


def test_a_missing_tensor_is_named(tmp_path, tiny_model):
    state = tiny_model.state_dict()
    del state["body.3.res_layer.1.weight"]
    message = r"not a whole ir_tiny network .*body\.3\.res_layer\.1\.weight"
    assert_refused(tmp_path, state, message)


def test_a_missing_unit_is_counted(tmp_path, tiny_model):
    state = tiny_model.state_dict()
    without_a_unit = {key: value for key, value in state.items() if "body.2." not in key}
    assert_refused(tmp_path, without_a_unit, "3 residual units")


def test_a_tensor_of_another_shape_is_refused(tmp_path, tiny_model):
    state = tiny_model.state_dict()
    state["body.3.res_layer.1.weight"] = torch.zeros(1)
    assert_refused(tmp_path, state, "not a whole ir_tiny")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_weights_that_no_training_leaves_are_refused(tmp_path, tiny_model, value):
    tiny_model.output_layer[4].running_var[0] = value
    message = r"output_layer\.4\.running_var holds NaN, infinite or impossible"
    assert_refused(tmp_path, tiny_model.state_dict(), message)


def assert_unreadable(path, content):
    path.write_bytes(content)
    message = r"x\.pth: not a readable checkpoint, download or copy it again"
    with pytest.raises(net.InputError, match=message):
        net.load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 not a zip", b'{"a": 1}'])
def test_files_that_are_no_checkpoints_are_refused(tmp_path, content):
    assert_unreadable(tmp_path / "x.pth", content)


@pytest.mark.parametrize("zipped", [True, False])
def test_half_a_file_is_refused(tmp_path, tiny_model, zipped):
    file = io.BytesIO()
    torch.save(tiny_model.state_dict(), file, _use_new_zipfile_serialization=zipped)
    content = file.getvalue()
    assert_unreadable(tmp_path / "x.pth", content[: len(content) // 2])


def test_a_pickle_protocol_that_pytorch_does_not_read_is_refused_with_its_reason(
    tmp_path, tiny_model
):
    assert_refused(tmp_path, tiny_model.state_dict(), "Unsupported operand", pickle_protocol=4)


# ---- files that are replaced ---------------------------------------------------------------------


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(tmp_path, tiny_model):
    net.save_checkpoint(tmp_path / "x.pth", tiny_model)
    before = (tmp_path / "x.pth").read_bytes()
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        net.save_checkpoint(tmp_path / "x.pth", tiny_model, config={"a": lambda: None})
    assert names_in(tmp_path) == ["x.pth"]
    assert (tmp_path / "x.pth").read_bytes() == before


def test_an_interrupted_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    (tmp_path / "x.json").write_text("old")
    with pytest.raises(KeyboardInterrupt), net.replacing(tmp_path / "x.json") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert names_in(tmp_path) == ["x.json"]
    assert (tmp_path / "x.json").read_text() == "old"


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "x.json").write_text("old")
    with net.replacing(tmp_path / "x.json") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "x.json").read_text() == "old"
    assert (tmp_path / "x.json").read_text() == "new"
    assert names_in(tmp_path) == ["x.json"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "x.json"
    with net.replacing(path) as first:
        first.write_text("first, longer")
        with net.replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first, longer"
    assert names_in(tmp_path) == ["x.json"]


def write_as_process_7(path, temporary_names):
    with patch("os.getpid", return_value=7), net.replacing(path) as temporary:
        temporary_names.put(temporary)
        temporary.write_text("whole")


def test_writers_in_processes_with_equal_numbers_do_not_meet(tmp_path):
    """Processes in two containers often have the same number. Forks have the same state, too."""
    fork = multiprocessing.get_context("fork")
    temporary_names = fork.SimpleQueue()
    for _ in range(2):
        arguments = (tmp_path / "x.json", temporary_names)
        process = fork.Process(target=write_as_process_7, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == 0
    assert temporary_names.get() != temporary_names.get()
    assert names_in(tmp_path) == ["x.json"]


def test_a_half_written_checkpoint_is_not_listed(tmp_path, tiny_model):
    net.save_checkpoint(tmp_path / "whole.pth", tiny_model)
    with net.replacing(tmp_path / "x.pth") as temporary:
        temporary.write_bytes(b"half")
        assert net.list_checkpoints([str(tmp_path)]) == [str(tmp_path / "whole.pth")]


def test_a_full_disk_names_the_file_that_was_to_be_written(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(OSError, match="No space left") as caught, net.replacing(path):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(path)


def test_a_folder_without_permission_names_the_file_that_was_to_be_written(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(PermissionError) as caught, net.replacing(path) as temporary:
        raise PermissionError(13, "Permission denied", str(temporary))
    assert caught.value.filename == str(path)


def test_an_error_about_another_file_names_that(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, net.replacing(tmp_path / "x.json"):
        (tmp_path / "other.json").read_text()
    assert caught.value.filename == str(tmp_path / "other.json")


def test_json_is_written_whole_or_not_at_all(tmp_path):
    net.write_json(tmp_path / "x.json", {"a": [0.5, None]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        net.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert net.read_json(tmp_path / "x.json", "") == {"a": [0.5, None]}


# ---- names ---------------------------------------------------------------------------------------


NOT_UTF_8 = os.fsdecode(b"caf\xe9")  # the name of a file, as Python reads it


def test_a_table_takes_ids_and_paths_that_are_not_utf_8(tmp_path):
    net.write_csv(tmp_path / "x.csv", [{"ID": NOT_UTF_8, "name": "\u674e\u4f1f"}])
    text = (tmp_path / "x.csv").read_text(encoding="utf-8")
    assert text.splitlines() == ["ID,name", "caf\\udce9,\u674e\u4f1f"]


LONG_NAMES = {
    "letters of one byte": "a" * 250,
    "letters of three bytes": "\u674e" * 100,
    "letters that are encoded": "\U0001f600" * 60,
    "bytes that are not UTF-8": "\udce9" * 90,
    "letters of both kinds": "a" * 182 + "\u674e" * 9,
}


@pytest.mark.parametrize("text", LONG_NAMES.values(), ids=LONG_NAMES.keys())
def test_a_long_name_is_cut_to_what_file_systems_take(tmp_path, text):
    name = net.file_name(text)
    assert len(name.encode()) <= 200
    net.write_json(tmp_path / f"{name}+12345678.json", {"a": 1})
    assert names_in(tmp_path) == [f"{name}+12345678.json"]


@pytest.mark.parametrize("text", LONG_NAMES.values(), ids=LONG_NAMES.keys())
def test_long_names_that_differ_in_their_last_letter_stay_different(text):
    names = {net.file_name(text), net.file_name(f"{text}b"), net.file_name(f"{text[:-1]}b")}
    assert len(names) == 3


@pytest.mark.parametrize("n", range(180, 186))
def test_a_name_is_not_cut_inside_a_letter(n):
    text = "a" * n + "\u674e" * 20
    beginning, digest = net.file_name(text).split("+")
    assert text.startswith(beginning)
    assert len(digest) == 16


def test_a_name_of_two_hundred_bytes_is_not_cut():
    assert net.file_name("a" * 200) == "a" * 200
    assert net.file_name("a" * 201) != "a" * 201


@pytest.fixture
def two_drives(monkeypatch):
    """Nothing is relative to anything else, as on Windows from drive to drive."""

    def refuse(path, start=None):
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    monkeypatch.setattr(os.path, "relpath", refuse)


def test_a_path_on_another_drive_stays_as_it_is(two_drives):
    path = os.path.abspath("photos/1.jpg")
    assert net.relative_path(path, "/elsewhere") == path


def test_a_path_on_the_same_drive_is_relative(tmp_path):
    assert net.relative_path(tmp_path / "photos/1.jpg", tmp_path) == "photos/1.jpg"


def test_photographs_on_another_drive_have_names_of_their_own(two_drives):
    names = net.file_names(["/c/x/1.jpg", "/c/y/1.jpg", "/c/2.jpg"], home="/d")
    assert names["/c/2.jpg"] == "2"
    assert len(set(names.values())) == 3


# ---- what the terminal cannot show ---------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_script_says_names_that_the_output_cannot_encode(monkeypatch, encoding):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)

    def work():
        print(f"left out: \u674e\u4f1f/\u0142\u00f3d\u017a.jpg {NOT_UTF_8}")
        raise net.InputError("\u674e\u4f1f: no photograph")

    assert net.run_script("align.py", work, "interrupted") == 2
    said = {}
    for name, stream in streams.items():
        stream.flush()
        said[name] = stream.buffer.getvalue().decode(encoding)
    assert said["stdout"].startswith(r"left out: \u674e\u4f1f/\u0142")
    assert said["stdout"].endswith("caf\\udce9\n")
    assert said["stderr"] == "align.py: \\u674e\\u4f1f: no photograph\n"


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_a_script_runs_without_a_terminal(monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    assert net.run_script("align.py", lambda: None, "interrupted") == 0


# ---- interrupts ----------------------------------------------------------------------------------


SIGNALS = [signal.SIGINT, signal.SIGTERM]


def handler_of_the_caller(number, frame):
    raise AssertionError("the signal went to the handler that was there before")


@pytest.fixture
def interrupt():
    """An Interrupt of its own; handlers stand around it that a test can tell from others."""
    before = {number: signal.signal(number, handler_of_the_caller) for number in SIGNALS}
    yield net.Interrupt()
    for number, handler in before.items():
        signal.signal(number, handler)


def current_handlers():
    return [signal.getsignal(number) for number in SIGNALS]


def run_in_a_thread(function):
    """What a function returns or raises in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_nothing_is_raised_unless_it_was_asked_for(interrupt):
    with interrupt.listening():
        assert not interrupt.asked
        interrupt.raise_if_asked()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_raised_when_the_work_asks(interrupt, number):
    with interrupt.listening():
        signal.raise_signal(number)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            interrupt.raise_if_asked()


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_raises_at_once(interrupt, first, second):
    with interrupt.listening():
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)


def test_handlers_are_restored_at_the_end(interrupt):
    with interrupt.listening():
        assert handler_of_the_caller not in current_handlers()
    assert current_handlers() == [handler_of_the_caller] * 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, net.InputError, SystemExit])
def test_handlers_are_restored_after_an_error(interrupt, error):
    with pytest.raises(error), interrupt.listening():
        raise error
    assert current_handlers() == [handler_of_the_caller] * 2


def test_what_runs_after_an_interrupted_block_was_not_asked_to_stop(interrupt):
    with pytest.raises(KeyboardInterrupt), interrupt.listening():
        signal.raise_signal(signal.SIGINT)
        interrupt.raise_if_asked()
    assert not interrupt.asked
    with interrupt.listening():
        assert not interrupt.asked


def test_listening_in_a_worker_thread_runs_the_block_and_takes_no_signals(interrupt):
    def work():
        with interrupt.listening():
            return current_handlers()

    assert run_in_a_thread(work) == [handler_of_the_caller] * 2


def test_listening_in_a_worker_thread_forgets_no_signal(interrupt):
    def work():
        with interrupt.listening():
            interrupt.raise_if_asked()

    with interrupt.listening():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            run_in_a_thread(work)
        assert interrupt.asked


def test_a_script_may_run_in_a_worker_thread():
    worked = []
    code = run_in_a_thread(lambda: net.run_script("x.py", lambda: worked.append(1), "stopped"))
    assert code == 0
    assert worked == [1]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_script_that_a_signal_stops_ends_with_130(interrupt, capsys, number):
    def work():
        signal.raise_signal(number)
        net.interrupt.raise_if_asked()

    assert net.run_script("x.py", work, "stopped, go on") == 130
    assert capsys.readouterr().err == "x.py: stopped, go on\n"


# ---- devices -------------------------------------------------------------------------------------


@pytest.fixture
def pretend_gpus(monkeypatch):
    """pretend_gpus(2): this machine has two GPUs. `problem` is why PyTorch cannot use them."""

    def pretend(count, problem=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "NVIDIA Old")
        monkeypatch.setattr(net, "try_cuda", lambda name: problem)

    return pretend


def test_without_a_gpu_the_device_is_the_cpu(pretend_gpus):
    pretend_gpus(0)
    assert net.pick_device("auto") == CPU
    assert net.pick_device("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "gpu"])
def test_a_device_that_is_not_there_is_refused(pretend_gpus, name):
    pretend_gpus(0)
    with pytest.raises(net.InputError, match=f"--device {name}: must be auto, cpu.* 0 CUDA dev"):
        net.pick_device(name)


@pytest.mark.parametrize(
    ("name", "full_name"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")]
)
def test_a_cuda_device_is_named_with_its_number(pretend_gpus, name, full_name):
    pretend_gpus(2)
    assert net.pick_device(name) == torch.device(full_name)


def test_picking_a_device_turns_tf32_off(pretend_gpus):
    pretend_gpus(2)
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True
    net.pick_device("cuda")
    assert torch.backends.cudnn.allow_tf32 is False
    assert torch.backends.cuda.matmul.allow_tf32 is False


NO_KERNEL = "CUDA error: no kernel image is available"


def test_a_gpu_for_which_pytorch_has_no_code_is_left_alone_with_a_word(pretend_gpus, capsys):
    pretend_gpus(1, NO_KERNEL)
    assert net.pick_device("auto") == CPU
    expected = f"warning: not using NVIDIA Old ({NO_KERNEL}), but the CPU\n"
    assert capsys.readouterr().out == expected


def test_a_gpu_for_which_pytorch_has_no_code_is_refused_where_it_was_asked_for(pretend_gpus):
    pretend_gpus(1, NO_KERNEL)
    message = r"--device cuda: cannot be used .*no kernel image.*; take cpu"
    with pytest.raises(net.InputError, match=message):
        net.pick_device("cuda")


@pytest.fixture
def selected(monkeypatch):
    """The names of the devices that were selected, in place of selecting them."""
    names = []
    monkeypatch.setattr(torch.cuda, "set_device", names.append)
    return names


def test_trying_a_device_selects_it(selected):
    net.try_cuda("cpu")
    assert selected == ["cpu"]


def test_trying_a_device_computes_on_it(selected):
    assert net.try_cuda("cpu") is None
    assert "no_such_device" in net.try_cuda("no_such_device")


def test_trying_a_device_tells_the_first_line_of_what_is_wrong(monkeypatch):
    def fail(name):
        raise RuntimeError(f"{NO_KERNEL}\nCompile with")

    monkeypatch.setattr(torch.cuda, "set_device", fail)
    assert net.try_cuda("cuda:0") == NO_KERNEL


# ---- processes -----------------------------------------------------------------------------------


@pytest.fixture
def alone():
    """The one process without torchrun."""
    return net.Processes("cpu")


def test_a_process_alone_is_the_main_one(alone):
    assert alone.rank == 0
    assert alone.world == 1
    assert alone.is_main
    assert alone.device == CPU


def test_a_process_alone_has_everything(alone):
    part = torch.randn(5, 2)
    assert alone.share(5) == slice(0, 5)
    assert torch.equal(alone.gather(part, 5), part)
    assert alone.collect("a") == ["a"]
    assert alone.from_main("a") == "a"


def test_the_gradients_of_a_process_alone_are_the_sums(alone):
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    alone.sum_gradients([parameter])
    assert parameter.grad.tolist() == [1, 2]


def test_a_process_alone_waits_for_nobody(alone):
    alone.wait()


def test_a_process_alone_stops_when_it_is_asked_to_and_not_before(alone, monkeypatch):
    alone.raise_if_interrupted()
    monkeypatch.setattr(net.interrupt, "asked", True)
    with pytest.raises(KeyboardInterrupt):
        alone.raise_if_interrupted()


WHOLE_SET = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize("missing", WHOLE_SET)
@pytest.mark.parametrize("value", [None, ""])
def test_without_the_whole_set_of_torchruns_variables_there_is_one_process(
    monkeypatch, missing, value
):
    for name, there in WHOLE_SET.items():
        monkeypatch.setenv(name, there)
    monkeypatch.delenv(missing)
    if value is not None:
        monkeypatch.setenv(missing, value)
    processes = net.Processes("cpu")
    assert (processes.rank, processes.world, processes.is_main) == (0, 1, True)


@pytest.mark.parametrize("name", WHOLE_SET)
def test_one_of_torchruns_variables_alone_makes_no_group(monkeypatch, name):
    for other in WHOLE_SET:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, WHOLE_SET[name])
    processes = net.Processes("cpu")
    assert (processes.rank, processes.world, processes.is_main) == (0, 1, True)


def test_the_whole_set_of_torchruns_variables_makes_a_group(monkeypatch):
    for name, value in WHOLE_SET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(net.Processes, "wait", lambda self: None)
    processes = net.Processes("cpu")
    assert (processes.rank, processes.world, processes.is_main) == (1, 2, False)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_the_shares_of_all_processes_are_the_whole(alone, world):
    alone.world = world
    shared = []
    for rank in range(world):
        alone.rank = rank
        shared += range(5)[alone.share(5)]
    assert shared == [0, 1, 2, 3, 4]


# ---- progress and the end ------------------------------------------------------------------------


def test_progress_without_a_terminal_is_a_line_every_half_minute(monkeypatch, capsys):
    seconds = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: seconds[0])
    for _ in net.progress(range(100), "reading crops", "crop"):
        seconds[0] += 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert 6 <= len(lines) <= 8
    assert all(line.startswith("reading crops: ") for line in lines)
    assert re.search(r" 15/100 \[00:30<02:50, +2\.00s/crop\]", lines[0]), lines[0]


@pytest.mark.parametrize("code", [0, 2])
def test_leaving_ends_with_the_code(code):
    with pytest.raises(SystemExit, match=f"^{code}$"):
        net.run_main(lambda: code)

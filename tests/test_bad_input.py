"""What people really get wrong, through the three scripts: JSON files, crops, checkpoints, flags.

A wrong input ends in exit code 2 and one line on stderr that names the file or the flag, the entry
and the way out; nothing is written. What an ID or a file name says never leads outside the folders
that were asked for.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import align
import net
import triplet_dataset
from tests.files import Call, older_blocks, png, safetensors, saved, torchscript
from tests.synthetic import write_photos

# {script: {flag: values that are out of range}}
OUT_OF_RANGE = {
    "align.py": {"--max_workers": ["0", "-1", "nan", "x", "1.5", "1025"]},
    "evaluate_twins.py": {
        "--max_workers": ["0"],
        "--batch_size": ["0", "1e3"],
        "--seed": ["-1", "1.5", str(2**32)],
    },
    "train_twins.py": {
        "--epochs": ["0", "inf", "1e3"],
        "--train_percentage": ["0", "101", "1.5"],
        "--margin": ["0", "nan", "3", "x"],
        "--learning_rate": ["-1", "nan", "1e999"],
        "--validation_split": ["-0.1", "1", "nan"],
        "--freeze_backbone": ["maybe"],
    },
}


@pytest.mark.parametrize("script", OUT_OF_RANGE)
def test_the_flags_that_the_cases_spoil_do_work(run_script, script):
    assert run_script(script) == 0


# ---- JSON files ----------------------------------------------------------------------------------
class JsonFile(NamedTuple):
    """A JSON file that a script reads, a right and a wrong entry of it, and what is said then."""

    script: str
    flag: str
    brackets: str
    entry: str
    wrong_entry: str
    complaint: str

    def with_entries(self, *entries):
        """The text of such a file."""
        opening, closing = self.brackets
        return opening + ", ".join(entries) + closing


PERSON = '"p": ["x.png"]'
PAIR = '["p", "q"]'
FACE = '"p.jpg": [[1, 2]]'
FILES = {
    "photographs": JsonFile(
        "align.py",
        "--id_to_images",
        "{}",
        PERSON,
        '"p": [1]',
        "images of ID 'p' must be a list of paths",
    ),
    "alignment pairs": JsonFile(
        "align.py",
        "--pairs",
        "[]",
        PAIR,
        '["p", 1]',
        "pair 1 is ['p', 1]; expected two IDs, both strings",
    ),
    "landmarks": JsonFile(
        "align.py",
        "--landmarks",
        "{}",
        FACE,
        '"p.jpg": [["1", "2"]]',
        "landmarks of 'p.jpg'",
    ),
    "training pairs": JsonFile(
        "train_twins.py",
        "--train_pairs",
        "[]",
        PAIR,
        '["p"]',
        "pair 1 is ['p']; expected two IDs",
    ),
    "training crops": JsonFile(
        "train_twins.py",
        "--aligned_json",
        "{}",
        PERSON,
        '"p": "x.png"',
        "images of ID 'p' must be",
    ),
    "test pairs": JsonFile(
        "evaluate_twins.py",
        "--test_pairs",
        "[]",
        PAIR,
        "null",
        "pair 1 is None; expected two IDs",
    ),
    "test crops": JsonFile(
        "evaluate_twins.py",
        "--aligned_json",
        "{}",
        PERSON,
        '"p": {}',
        "images of ID 'p' must be a list",
    ),
}
OBJECTS = [kind for kind, file in FILES.items() if file.brackets == "{}"]
PAIR_LISTS = [kind for kind in FILES if "pairs" in kind]


def spoilt_contents(file):
    """Yield (bytes, words of the message) of such a file gone wrong; None in place of no file."""
    right = file.with_entries(file.entry)
    other_brackets = "[]" if file.brackets == "{}" else "{}"
    not_a_number = '"p": [NaN]' if file.brackets == "{}" else "[NaN, NaN]"
    yield None, ["No such file", "expected"]
    yield b"", ["not valid JSON"]
    yield right[:-1].encode(), ["not valid JSON", "expected"]
    yield right.encode("utf-16"), ["not valid JSON", "utf-8"]
    yield right.replace("p", "\xe9").encode("latin-1"), ["not valid JSON", "utf-8"]
    yield other_brackets.encode(), ["expected"]
    yield b"null", ["expected"]
    yield file.with_entries().encode(), ["expected"]
    yield file.with_entries(file.wrong_entry).encode(), [file.complaint]
    yield file.with_entries(not_a_number).encode(), ["bad.json: "]


@pytest.mark.parametrize("kind", FILES)
def test_a_spoilt_json_file_is_refused_with_file_entry_and_form(tmp_path, refuses, kind):
    file = FILES[kind]
    path = tmp_path / "bad.json"
    for content, words in spoilt_contents(file):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        refuses(file.script, {file.flag: path}, f"{path}: ", *words)


@pytest.mark.parametrize("kind", OBJECTS)
def test_a_key_that_is_there_twice_is_refused(tmp_path, refuses, kind):
    file = FILES[kind]
    path = tmp_path / "bad.json"
    path.write_text(file.with_entries(file.entry, file.entry))
    words = (f"{path}: ", "is there twice; merge the two entries")
    refuses(file.script, {file.flag: path}, *words)


def test_a_pair_with_a_person_who_has_no_photographs_is_refused(tmp_path, refuses):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([["no\nbody", "q"]]))
    words = (f"{path}: ", r"pair 1: ID 'no\nbody' has no images listed; add them")
    refuses("align.py", {"--pairs": path}, *words)


@pytest.mark.parametrize("kind", ["training pairs", "test pairs"])
def test_a_pair_of_people_without_crops_is_told_to_leave_out_skip_alignment(
    tmp_path, refuses, script_flags, kind
):
    file = FILES[kind]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([["no\nbody", "q"]]))
    crops = script_flags[file.script]["--aligned_json"]
    listed = rf"pair 1: ID 'no\nbody' is not listed in {crops}: "
    way_out = "if its photographs have not been aligned, leave out --skip_alignment"
    refuses(file.script, {file.flag: path}, f"{path}: ", listed, way_out)


@pytest.mark.parametrize("kind", PAIR_LISTS)
def test_a_pair_of_one_person_is_refused(tmp_path, refuses, kind):
    file = FILES[kind]
    path = tmp_path / "bad.json"
    known = "family00A" if file.script == "align.py" else "train0a"
    path.write_text(json.dumps([[known, known]]))
    words = (f"{path}: ", f"pair 1: ID {known!r} is paired with itself; correct")
    refuses(file.script, {file.flag: path}, *words)


def test_landmarks_of_other_photographs_are_refused(tmp_path, refuses):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"nothing.jpg": align.TEMPLATE.tolist()}))
    refuses("align.py", {"--landmarks": path}, "bad.json: ", "compare the paths")


# What may stand in a JSON file, tried at random.
TEXTS = st.text(max_size=3)
ANYTHING = (
    st.none() | st.booleans() | st.floats() | TEXTS | st.lists(st.text(max_size=2), max_size=3)
)
LISTED_IDS = ("a", "b", "c")
LISTED_ID = st.sampled_from(LISTED_IDS)
IMAGE_LISTS = st.dictionaries(TEXTS, st.lists(TEXTS) | ANYTHING, max_size=4) | ANYTHING
PAIR_OF_IDS = st.lists(LISTED_ID, min_size=2, max_size=2)
LISTS_OF_PAIRS = st.lists(PAIR_OF_IDS | st.lists(LISTED_ID | ANYTHING) | ANYTHING) | ANYTHING
many_cases = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def is_image_list(content):
    """Whether a JSON content is {"ID": ["path", ...], ...} with at least one ID."""
    if not isinstance(content, dict) or content == {}:
        return False
    for paths in content.values():
        if not isinstance(paths, list):
            return False
        if not all(isinstance(path, str) and path for path in paths):
            return False
    return True


def is_list_of_twins(content):
    """Whether a JSON content is [["ID", "twin's ID"], ...] of different people who are listed."""
    if not isinstance(content, list) or content == []:
        return False
    for pair in content:
        if not isinstance(pair, list) or len(pair) != 2:
            return False
        if not all(name in LISTED_IDS for name in pair):
            return False
        if pair[0] == pair[1]:
            return False
    return True


@many_cases
@given(content=IMAGE_LISTS)
def test_any_image_list_is_read_as_it_is_meant_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "images.json"
    path.write_text(json.dumps(content))
    if not is_image_list(content):
        with pytest.raises(net.InputError, match=r"images\.json: "):
            triplet_dataset.read_id_to_images(path)
        return
    images = triplet_dataset.read_id_to_images(path)
    counts = {name: len(paths) for name, paths in images.items()}
    assert counts == {name: len(paths) for name, paths in content.items()}
    assert all(os.path.isabs(image) for paths in images.values() for image in paths)


@many_cases
@given(content=LISTS_OF_PAIRS)
def test_any_pair_list_is_read_as_it_is_meant_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "pairs.json"
    path.write_text(json.dumps(content))
    id_to_images = {name: ["x"] for name in LISTED_IDS}
    if not is_list_of_twins(content):
        with pytest.raises(net.InputError, match=r"pairs\.json: "):
            triplet_dataset.read_pairs(path, id_to_images)
        return
    pairs, warnings = triplet_dataset.read_pairs(path, id_to_images)
    assert {frozenset(pair) for pair in pairs} == {frozenset(pair) for pair in content}
    assert bool(warnings) == (len(pairs) < len(content))


# ---- flags ---------------------------------------------------------------------------------------
FLAGS = [(script, flag) for script, flags in OUT_OF_RANGE.items() for flag in flags]


@pytest.mark.parametrize(("script", "flag"), FLAGS)
def test_a_value_out_of_range_names_its_flag(refuses, script, flag):
    for value in OUT_OF_RANGE[script][flag]:
        refuses(script, {flag: value}, flag, "--help lists all flags")


# ---- crops ---------------------------------------------------------------------------------------
# {kind: (the bytes of the file; what is said of it)}
CROPS = {
    "empty": (b"", "run the alignment stage again"),
    "truncated": (png()[:-40], "run the alignment stage again"),
    "wrong size": (png((112, 111)), "112x111 RGB, but a crop is 112x112 RGB"),
    "a scan": (png((10_000, 10_000), "1"), "10000x10000 1, but a crop is 112x112 RGB"),
    "16 bits": (png(mode="I;16"), "112x112 I;16, but a crop is"),
}


@pytest.mark.parametrize("kind", CROPS)
def test_a_wrong_crop_is_refused(tmp_path, refuses, kind):
    content, words = CROPS[kind]
    crop = next((tmp_path / "train_aligned").rglob("1.png"))
    crop.write_bytes(content)
    for script in ("train_twins.py", "evaluate_twins.py"):
        refuses(script, {}, f"{script}: {crop}: ", words)


@pytest.mark.parametrize("script", ["train_twins.py", "evaluate_twins.py"])
def test_listed_crops_that_are_gone_are_passed_over_with_their_count(
    tmp_path, run_script, capsys, script
):
    for name in ("train0a/1.png", "train1b/0.png"):
        (tmp_path / "train_aligned" / name).unlink()
    assert run_script(script) == 0
    assert "2 listed crops are gone and are passed over" in capsys.readouterr().out


def test_if_all_listed_crops_are_gone_the_first_is_named(tmp_path, refuses):
    first = tmp_path / "train_aligned" / "train0a" / "0.png"
    for crop in (tmp_path / "train_aligned").rglob("*.png"):
        crop.unlink()
    for script in ("train_twins.py", "evaluate_twins.py"):
        refuses(script, {}, f"{script}: {first}: ", "run the alignment stage again")


def test_one_crop_under_two_ids_names_both(tmp_path, refuses):
    first = next((tmp_path / "train_aligned" / "train0a").iterdir())
    second = next((tmp_path / "train_aligned" / "train0b").iterdir())
    second.write_bytes(first.read_bytes())
    words = ("ID 'train0b'", f"{first} of ID 'train0a'", "keep it under the one")
    for script in ("train_twins.py", "evaluate_twins.py"):
        refuses(script, {}, f"{script}: {second}: ", *words)


# ---- checkpoints ---------------------------------------------------------------------------------
# Each of these makes the bytes of a wrong checkpoint from the tiny network's state dict.
def truncated(state):
    return saved(state)[:-5000]


def another_network(state):
    return saved({"fc.weight": torch.zeros(2)})


def no_dict(state):
    return saved([state])


def half_of_the_keys(state):
    every_other = list(state)[::2]
    return saved({key: state[key] for key in every_other})


def with_nan(state):
    bias = torch.full((512,), torch.nan)
    return saved({**state, "output_layer.3.bias": bias})


# {kind: (what makes it, what is said of it)}
CHECKPOINTS = {
    "truncated": (truncated, "not a readable checkpoint, download or copy it again"),
    "another network": (another_network, "no AdaFace network in it"),
    "no dict": (no_dict, "holds list"),
    "half of the keys": (half_of_the_keys, "not a whole ir_tiny network"),
    "NaN": (with_nan, "bias holds NaN"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_wrong_checkpoint_is_refused(tmp_path, tiny_model, refuses, kind):
    make, words = CHECKPOINTS[kind]
    path = tmp_path / "bad.pth"
    path.write_bytes(make(tiny_model.state_dict()))
    refuses("evaluate_twins.py", {"--checkpoints": path}, f"{path}: ", words)
    refuses("train_twins.py", {"--pretrained": path}, f"{path}: ", words)


def test_a_missing_checkpoint_is_refused(tmp_path, refuses):
    path = tmp_path / "x.pth"
    refuses("evaluate_twins.py", {"--checkpoints": path}, "x.pth: no such")
    refuses("train_twins.py", {"--pretrained": path}, "x.pth: no such", "--pretrained")


def test_a_checkpoint_of_another_architecture_is_refused(refuses):
    refuses("train_twins.py", {"--arch": "ir_18"}, "start.pth: ", "say --arch ir_tiny")


def test_an_unknown_architecture_is_refused(refuses):
    changes = {"--arch": "resnet50", "--pretrained": "none"}
    refuses("train_twins.py", changes, "resnet50", "ir_50")


def test_no_code_of_a_checkpoint_runs(tmp_path, tiny_model, refuses):
    attack = Call(os.system, f"touch {tmp_path / 'owned'}")
    path = tmp_path / "bad.pth"
    path.write_bytes(saved({"state_dict": tiny_model.state_dict(), "x": attack}))
    words = "bad.pth: not a readable checkpoint"
    refuses("train_twins.py", {"--pretrained": path}, words)
    refuses("evaluate_twins.py", {"--checkpoints": path}, words)
    assert not (tmp_path / "owned").exists()


# ---- hostile names -------------------------------------------------------------------------------
HOSTILE_IDS = ["../../x", "/x", "..", "a/b", "a\\b", "x\ny", "~", "con\0"]


def list_files(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def test_no_id_leads_outside_the_folders(tmp_path, script_flags, run_script):
    inputs = tmp_path / "inputs"
    write_photos(inputs, 4, 2, seed=6)
    photos = json.loads((inputs / "id_to_images.json").read_text())
    renamed = dict(zip(HOSTILE_IDS, photos.values(), strict=True))
    (inputs / "id_to_images.json").write_text(json.dumps(renamed))
    pairs = inputs / "pairs.json"
    pairs.write_text(json.dumps([HOSTILE_IDS[i : i + 2] for i in (0, 2, 4, 6)]))
    before = list_files(tmp_path)

    photo_flags = {
        "--id_to_images": inputs / "id_to_images.json",
        "--landmarks": inputs / "landmarks.json",
        "--pairs": pairs,
    }
    aligned = script_flags["align.py"]["--aligned_json"]
    assert run_script("align.py", photo_flags) == 0
    assert run_script("evaluate_twins.py", {"--test_pairs": pairs, "--aligned_json": aligned}) == 0
    assert run_script("train_twins.py", {"--train_pairs": pairs, "--aligned_json": aligned}) == 0

    crops = triplet_dataset.read_id_to_images(aligned)
    assert {name: len(paths) for name, paths in crops.items()} == dict.fromkeys(HOSTILE_IDS, 2)
    new_files = list_files(tmp_path) - before
    assert len(new_files) > 16
    out = (tmp_path / "out").resolve()
    assert all(out in path.resolve().parents for path in new_files)
    assert not os.path.exists("/x")


# ---- what people bring ---------------------------------------------------------------------------
# Each of these makes the bytes of a file that people take for a checkpoint; `folder` is for
# whatever it writes on the way.
def git_lfs_pointer(folder, model):
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:0"


def web_page(folder, model):
    return b"\n<!DOCTYPE html><html><body>Google Drive"


def onnx_model(folder, model):
    return b"\x08\x07\x12\x07pytorch\x1a\x051.8.1:" + bytes(99)


def pickled_module(folder, model):
    return saved(model)


def network_of_older_blocks(folder, model):
    return saved(older_blocks(model.state_dict()))


def two_networks(folder, model):
    return saved({"model": model.state_dict(), "ema": model.state_dict()})


def cvlface_without_yaml(folder, model):
    return saved({f"net.{key}": value for key, value in model.state_dict().items()})


# {kind: (what makes it, what is said of it)}
OTHER_FILES = {
    "LFS pointer": (git_lfs_pointer, "git lfs pull"),
    "web page": (web_page, "a web page"),
    "ONNX": (onnx_model, "an ONNX model"),
    "TorchScript": (torchscript, "state_dict()"),
    "pickled module": (pickled_module, "save that module's state_dict()"),
    "older blocks": (network_of_older_blocks, "its residual units are not AdaFace's"),
    "two networks": (two_networks, "model/, ema/"),
    "CVLface without yaml": (cvlface_without_yaml, "model.yaml beside it, or say --channels"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_a_file_of_another_kind_is_named_with_the_way_out(tmp_path, tiny_model, refuses, kind):
    make, words = OTHER_FILES[kind]
    path = tmp_path / "other.pth"
    path.write_bytes(make(tmp_path, tiny_model))
    refuses("evaluate_twins.py", {"--checkpoints": path}, "other.pth: ", words)


# The ways out that these messages name.
def state_dict_of_torchscript(folder, model):
    torchscript(folder, model)
    path = folder / "new.pth"
    torch.save(torch.jit.load(folder / "script.pt").state_dict(), path)
    return path


def one_network_of_several(folder, model):
    several = {"model": model.state_dict()}
    path = folder / "one.pth"
    torch.save(several["model"], path)
    return path


def file_of_safetensors(folder, model):
    path = folder / "model.safetensors"
    path.write_bytes(safetensors(model.state_dict()))
    return path


WAYS_OUT = (state_dict_of_torchscript, one_network_of_several, file_of_safetensors)


@pytest.mark.parametrize("way_out", WAYS_OUT)
def test_the_ways_out_lead_out(tmp_path, tiny_model, way_out):
    path = way_out(tmp_path, tiny_model)
    weights = tiny_model.state_dict()
    for key, value in net.load_checkpoint(path).state_dict().items():
        assert torch.equal(value, weights[key])


@pytest.mark.parametrize("told", ["yaml", "flag"])
@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.parametrize("prefix", ["net.", "model.net."])
def test_networks_of_cvlface_see_the_colours_that_they_were_trained_on(
    tmp_path, tiny_model, prefix, order, told
):
    state = {prefix + key: value for key, value in tiny_model.state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    channels = order
    if told == "yaml":
        yaml = f"input_size: [3, 112, 112]\ncolor_space: '{order}'\nname: 'ir50'\n"
        (tmp_path / "model.yaml").write_text(yaml)
        channels = None
    model = net.load_checkpoint(tmp_path / "model.pt", channels=channels)
    bgr = net.to_input(torch.randint(256, (2, 112, 112, 3), dtype=torch.uint8))
    as_trained = bgr.flip(1) if order == "RGB" else bgr
    embedding, _ = model(bgr)
    expected, _ = tiny_model(as_trained)
    torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=0)


def test_paths_written_on_windows_are_found(tmp_path, write_crops):
    aligned, _ = write_crops([[2, 1]])
    images = json.loads(aligned.read_text())
    with_backslashes = {}
    expected = {}
    for name, paths in images.items():
        with_backslashes[name] = [path.replace("/", "\\") for path in paths]
        expected[name] = [str(tmp_path / path) for path in paths]
    aligned.write_text(json.dumps(with_backslashes))
    assert triplet_dataset.read_id_to_images(aligned) == expected


def test_a_missing_crop_with_a_path_of_windows_is_named_as_such():
    with pytest.raises(net.InputError, match="written on Windows"):
        triplet_dataset.load_crops([r"C:\data\a.png"])


@pytest.mark.parametrize("titles", ["", "id,twin\n"])
def test_the_pairs_to_align_may_be_a_csv_file(tmp_path, run_script, titles):
    path = tmp_path / "pairs.csv"
    path.write_text(f"{titles}family01B,family01A\n")
    assert run_script("align.py", {"--pairs": path}) == 0
    crops = json.loads((tmp_path / "out" / "aligned.json").read_text())
    assert list(crops) == ["family01B", "family01A"]


def test_pairs_as_csv_name_the_form_that_is_expected(tmp_path, refuses):
    path = tmp_path / "pairs.csv"
    path.write_text("id,twin\n")
    refuses("train_twins.py", {"--train_pairs": path}, "--train_pairs", "of two columns")


def test_checkpoints_by_wildcard_and_folder(tmp_path, tiny_model):
    for name in ("a.pth", "b.pt", "c.ckpt", "d.txt"):
        net.save_checkpoint(tmp_path / "models" / name, tiny_model)
    listed = net.list_checkpoints([f"{tmp_path}/models/*.p*", f"{tmp_path}/models"])
    assert [Path(path).name for path in listed] == ["a.pth", "b.pt", "c.ckpt"]


def test_a_wildcard_that_means_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(net.InputError, match="nothing"):
        net.list_checkpoints([f"{tmp_path}/nothing*.pth"])


def test_a_test_set_that_is_the_training_set_under_new_ids_is_refused(
    tmp_path, run_script, write_crops, capsys
):
    assert run_script("train_twins.py") == 0
    aligned, pairs = write_crops([[3, 2], [2, 2]])
    images = json.loads(aligned.read_text())
    twins = json.loads(pairs.read_text())
    aligned.write_text(json.dumps({f"new {name}": paths for name, paths in images.items()}))
    pairs.write_text(json.dumps([[f"new {name}" for name in pair] for pair in twins]))

    changes = {"--checkpoints": tmp_path / "out" / "models"}
    assert run_script("evaluate_twins.py", changes) == 2
    error = capsys.readouterr().err
    assert "was trained or validated on images of new train0a, new train0b" in error

    assert run_script("evaluate_twins.py", {**changes, "--allow_overlap": None}) == 0
    out = capsys.readouterr().out
    assert "was trained or validated on 4 of the test people" in out
    assert "so its figures look better than they are" in out

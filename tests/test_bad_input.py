"""What people really get wrong, through the three scripts: JSON files, crops, checkpoints, flags, IDs.

A wrong input ends in exit code 2 and one line on stderr that names the file or the flag, the entry and the way out;
nothing is written. What an ID or a file name says never leads outside the folders that were asked for.
"""

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import align
import net
import triplet_dataset
from tests.files import Call, older_blocks, png, safetensors, saved, torchscript
from tests.synthetic import write_photos

NUMBERS = {
    "align.py": {"--max_workers": ["0", "-1", "nan", "x", "1.5", "1025"]},
    "evaluate_twins.py": {"--max_workers": ["0"], "--batch_size": ["0", "1e3"], "--seed": ["-1", "1.5", str(2**32)]},
    "train_twins.py": {
        "--epochs": ["0", "inf", "1e3"],
        "--train_percentage": ["0", "101", "1.5"],
        "--margin": ["0", "nan", "3", "x"],
        "--learning_rate": ["-1", "nan", "1e999"],
        "--validation_split": ["-0.1", "1", "nan"],
        "--freeze_backbone": ["maybe"],
    },
}


@pytest.mark.parametrize("script", NUMBERS)
def test_the_flags_that_the_cases_spoil_do_work(run_script, script):
    assert run_script(script) == 0


# ---- JSON files -----------------------------------------------------------------------------------------------------

# script, flag, the whole file, a right entry; a wrong entry, and what is said of it
IMAGES, PAIRS, POINTS = ("{%s}", '"p": ["x.png"]'), ("[%s]", '["p", "q"]'), ("{%s}", '"p.jpg": [[1, 2]]')
FILES = {
    "photographs": ("align.py", "--id_to_images", *IMAGES, '"p": [1]', "images of ID 'p' must be a list of paths"),
    "alignment pairs": ("align.py", "--pairs", *PAIRS, '["p", 1]', "pair 1 is ['p', 1]; expected two IDs"),
    "landmarks": ("align.py", "--landmarks", *POINTS, '"p.jpg": [["1", "2"]]', "landmarks of 'p.jpg'"),
    "training pairs": ("train_twins.py", "--train_pairs", *PAIRS, '["p"]', "pair 1 is ['p']; expected two IDs"),
    "training crops": ("train_twins.py", "--aligned_json", *IMAGES, '"p": "x.png"', "images of ID 'p' must be"),
    "test pairs": ("evaluate_twins.py", "--test_pairs", *PAIRS, "null", "pair 1 is None; expected two IDs"),
    "test crops": ("evaluate_twins.py", "--aligned_json", *IMAGES, '"p": {}', "images of ID 'p' must be a list"),
}


@pytest.mark.parametrize("file", FILES)
def test_a_spoilt_json_file_is_refused_with_file_entry_and_form(tmp_path, refuses, file):
    script, flag, form, entry, wrong, complaint = FILES[file]
    good, other, path = form % entry, "[]" if form[0] == "{" else "{}", tmp_path / "bad.json"
    for content, *words in (
        (None, "No such file", "expected"),
        (b"", "not valid JSON"),
        (good[:-1].encode(), "not valid JSON", "expected"),
        (good.encode("utf-16"), "not valid JSON", "utf-8"),
        (good.replace("p", "\xe9").encode("latin-1"), "not valid JSON", "utf-8"),
        (other.encode(), "expected"),
        (b"null", "expected"),
        ((form % "").encode(), "expected"),
        ((form % wrong).encode(), complaint),
        ((form % ('"p": [NaN]' if form[0] == "{" else "[NaN, NaN]")).encode(), "bad.json: "),
    ):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        refuses(script, {flag: path}, f"{path}: ", *words)
    if form[0] == "{":
        path.write_text(form % f"{entry}, {entry}")
        refuses(script, {flag: path}, f"{path}: ", "stands there twice; merge the two entries")


@pytest.mark.parametrize("file", [file for file in FILES if "pairs" in file])
def test_pairs_of_nobody_and_of_one_person_are_refused(tmp_path, refuses, file):
    script, flag, *_ = FILES[file]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([["no\nbody", "q"]]))
    refuses(script, {flag: path}, f"{path}: ", r"pair 1: ID 'no\nbody' has no images listed; add them")
    known = "family00A" if script == "align.py" else "train0a"
    path.write_text(json.dumps([[known, known]]))
    refuses(script, {flag: path}, f"{path}: ", f"pair 1: ID {known!r} is paired with itself; correct")


def test_landmarks_of_other_photographs_are_refused(tmp_path, refuses):
    (tmp_path / "bad.json").write_text(json.dumps({"nothing.jpg": align.TEMPLATE.tolist()}))
    refuses("align.py", {"--landmarks": tmp_path / "bad.json"}, "bad.json: ", "compare the paths")


anything = st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.lists(st.text(max_size=2), max_size=3)
known = st.sampled_from("abc")
cases = settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


@cases
@given(content=st.dictionaries(st.text(max_size=3), st.lists(st.text(max_size=3)) | anything, max_size=4) | anything)
def test_any_image_list_is_read_as_it_is_meant_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "images.json"
    path.write_text(json.dumps(content))
    right = isinstance(content, dict) and content != {}
    right = right and all(isinstance(v, list) and all(isinstance(p, str) and p for p in v) for v in content.values())
    if right:
        read = triplet_dataset.read_id_to_images(path)
        assert {name: len(paths) for name, paths in read.items()} == {name: len(v) for name, v in content.items()}
        assert all(os.path.isabs(image) for paths in read.values() for image in paths)
    else:
        with pytest.raises(net.InputError, match=r"images\.json: "):
            triplet_dataset.read_id_to_images(path)


@cases
@given(content=st.lists(st.lists(known, min_size=2, max_size=2) | st.lists(known | anything) | anything) | anything)
def test_any_pair_list_is_read_as_it_is_meant_or_refused(tmp_path_factory, content):
    path, ids = tmp_path_factory.getbasetemp() / "pairs.json", {name: ["x"] for name in "abc"}
    path.write_text(json.dumps(content))
    right = isinstance(content, list) and len(content) > 0
    right = right and all(isinstance(p, list) and len(p) == 2 and all(x in [*"abc"] for x in p) for p in content)
    if right and all(a != b for a, b in content):
        pairs, warnings = triplet_dataset.read_pairs(path, ids)
        assert {frozenset(pair) for pair in pairs} == {frozenset(pair) for pair in content}
        assert bool(warnings) == (len(pairs) < len(content))
    else:
        with pytest.raises(net.InputError, match=r"pairs\.json: "):
            triplet_dataset.read_pairs(path, ids)


# ---- flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "flag"), [(script, flag) for script in NUMBERS for flag in NUMBERS[script]])
def test_a_value_out_of_range_names_its_flag(refuses, script, flag):
    for value in NUMBERS[script][flag]:
        refuses(script, {flag: value}, flag, "--help lists all flags")


# ---- crops ----------------------------------------------------------------------------------------------------------


CROPS = {
    "missing": (None, "run the alignment stage again"),
    "empty": (b"", "--realign"),
    "truncated": (png()[:-40], "--realign"),
    "wrong size": (png((112, 111)), "112x111 RGB, but a crop is 112x112 RGB"),
    "a scan": (png((10_000, 10_000), "1"), "10000x10000 1, but a crop is 112x112 RGB"),
    "16 bits": (png(mode="I;16"), "112x112 I;16, but a crop is"),
}


@pytest.mark.parametrize("kind", CROPS)
def test_a_wrong_crop_is_refused(tmp_path, refuses, kind):
    content, word = CROPS[kind]
    crop = next((tmp_path / "train_aligned").rglob("1.png"))
    crop.unlink()
    if content is not None:
        crop.write_bytes(content)
    for script in ("train_twins.py", "evaluate_twins.py"):
        refuses(script, {}, f"{script}: {crop}: ", word)


def test_one_crop_under_two_ids_names_both(tmp_path, refuses):
    one, other = (next((tmp_path / "train_aligned" / name).iterdir()) for name in ("train0a", "train0b"))
    other.write_bytes(one.read_bytes())
    for script in ("train_twins.py", "evaluate_twins.py"):
        refuses(script, {}, f"{script}: {other}: ", "ID 'train0b'", f"{one} of ID 'train0a'", "keep it under the one")


# ---- checkpoints ----------------------------------------------------------------------------------------------------


CHECKPOINTS = {  # from the tiny network's tensors to bytes, and what is said of them
    "truncated": (lambda state: saved(state)[:-5000], "not a readable checkpoint, download or copy it again"),
    "another network": (lambda state: saved({"fc.weight": torch.zeros(2)}), "no AdaFace network in it"),
    "no dict": (lambda state: saved([state]), "holds list"),
    "half of the keys": (lambda state: saved(dict([*state.items()][::2])), "not a whole ir_tiny network"),
    "NaN": (lambda state: saved(state | {"output_layer.3.bias": torch.full((512,), torch.nan)}), "bias holds NaN"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_wrong_checkpoint_is_refused(tmp_path, tiny_model, refuses, kind):
    make, word = CHECKPOINTS[kind]
    path = tmp_path / "bad.pth"
    path.write_bytes(make(tiny_model.state_dict()))
    refuses("evaluate_twins.py", {"--checkpoints": path}, f"{path}: ", word)
    refuses("train_twins.py", {"--pretrained": path}, f"{path}: ", word)


def test_a_missing_checkpoint_and_another_architecture_are_refused(tmp_path, refuses):
    refuses("evaluate_twins.py", {"--checkpoints": tmp_path / "x.pth"}, "x.pth: no such")
    refuses("train_twins.py", {"--pretrained": tmp_path / "x.pth"}, "x.pth: no such", "--pretrained")
    refuses("train_twins.py", {"--arch": "ir_18"}, "start.pth: ", "say --arch ir_tiny")
    refuses("train_twins.py", {"--arch": "resnet50", "--pretrained": "none"}, "resnet50", "ir_50")


def test_no_code_of_a_checkpoint_runs(tmp_path, tiny_model, refuses):
    attack = Call(os.system, f"touch {tmp_path / 'owned'}")
    (tmp_path / "bad.pth").write_bytes(saved({"state_dict": tiny_model.state_dict(), "x": attack}))
    refuses("train_twins.py", {"--pretrained": tmp_path / "bad.pth"}, "bad.pth: not a readable checkpoint")
    refuses("evaluate_twins.py", {"--checkpoints": tmp_path / "bad.pth"}, "bad.pth: not a readable checkpoint")
    assert not (tmp_path / "owned").exists()


# ---- hostile names --------------------------------------------------------------------------------------------------


def test_no_id_leads_outside_the_folders(tmp_path, script_flags, run_script):
    names = ["../../x", "/x", "..", "a/b", "a\\b", "x\ny", "~", "con\0"]
    inputs = tmp_path / "inputs"
    write_photos(inputs, 4, 2, seed=6)
    images = dict(zip(names, json.loads((inputs / "id_to_images.json").read_text()).values(), strict=True))
    (inputs / "id_to_images.json").write_text(json.dumps(images))
    (inputs / "pairs.json").write_text(json.dumps([names[i : i + 2] for i in (0, 2, 4, 6)]))

    def files():
        return {path for path in tmp_path.rglob("*") if path.is_file()}

    before, made, pairs = files(), script_flags["align.py"]["--aligned_json"], inputs / "pairs.json"
    changes = {"--id_to_images": inputs / "id_to_images.json", "--landmarks": inputs / "landmarks.json"}
    assert run_script("align.py", {**changes, "--pairs": pairs}) == 0
    assert run_script("evaluate_twins.py", {"--test_pairs": pairs, "--aligned_json": made}) == 0
    assert run_script("train_twins.py", {"--train_pairs": pairs, "--aligned_json": made}) == 0
    aligned, new = triplet_dataset.read_id_to_images(made), files() - before
    assert {name: len(crops) for name, crops in aligned.items()} == dict.fromkeys(names, 2)
    assert len(new) > 16
    assert all((tmp_path / "out").resolve() in path.resolve().parents for path in new)
    assert not os.path.exists("/x")


# ---- what people bring ----------------------------------------------------------------------------------------------
OTHERS = {
    "LFS pointer": (lambda *_: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "web page": (lambda *_: b"\n<!DOCTYPE html><html><body>Google Drive", "a web page"),
    "ONNX": (lambda *_: b"\x08\x07\x12\x07pytorch\x1a\x051.8.1:" + bytes(99), "an ONNX model"),
    "TorchScript": (torchscript, "state_dict()"),
    "pickled module": (lambda _, model: saved(model), "save its state_dict()"),
    "older blocks": (lambda _, model: saved(older_blocks(model.state_dict())), "blocks not of AdaFace's kind"),
    "two networks": (
        lambda _, model: saved({"model": model.state_dict(), "ema": model.state_dict()}),
        "model/, ema/",
    ),
    "CVLface without yaml": (
        lambda _, model: saved({f"net.{k}": v for k, v in model.state_dict().items()}),
        "model.yaml beside it, or say --channels",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_another_kind_is_named_with_the_way_out(tmp_path, tiny_model, refuses, kind):
    make, words = OTHERS[kind]
    (tmp_path / "other.pth").write_bytes(make(tmp_path, tiny_model))
    refuses("evaluate_twins.py", {"--checkpoints": tmp_path / "other.pth"}, "other.pth: ", words)


def test_the_ways_out_lead_out(tmp_path, tiny_model):
    torchscript(tmp_path, tiny_model)
    torch.save(torch.jit.load(tmp_path / "script.pt").state_dict(), tmp_path / "new.pth")
    torch.save({"model": tiny_model.state_dict()}["model"], tmp_path / "one.pth")
    (tmp_path / "model.safetensors").write_bytes(safetensors(tiny_model.state_dict()))
    for name in ("new.pth", "one.pth", "model.safetensors"):
        for key, value in net.load_checkpoint(tmp_path / name).state_dict().items():
            assert torch.equal(value, tiny_model.state_dict()[key])


@pytest.mark.parametrize("told", ["yaml", "flag"])
@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.parametrize("prefix", ["net.", "model.net."])
def test_networks_of_cvlface_see_the_colours_that_they_were_trained_on(tmp_path, tiny_model, prefix, order, told):
    state = {prefix + key: value for key, value in tiny_model.state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    if told == "yaml":
        (tmp_path / "model.yaml").write_text(f"input_size: [3, 112, 112]\ncolor_space: '{order}'\nname: 'ir50'\n")
    model = net.load_checkpoint(tmp_path / "model.pt", channels=order if told == "flag" else None)
    bgr = net.to_input(torch.randint(256, (2, 112, 112, 3), dtype=torch.uint8))
    as_trained = bgr.flip(1) if order == "RGB" else bgr
    torch.testing.assert_close(model(bgr)[0], tiny_model(as_trained)[0], atol=1e-5, rtol=0)


def test_paths_written_on_windows_are_found_or_named(tmp_path, write_crops):
    aligned, _ = write_crops([[2, 1]])
    images = json.loads(aligned.read_text())
    aligned.write_text(json.dumps({name: [p.replace("/", "\\") for p in paths] for name, paths in images.items()}))
    found = triplet_dataset.read_id_to_images(aligned)
    assert found == {name: [str(tmp_path / path) for path in paths] for name, paths in images.items()}
    with pytest.raises(net.InputError, match="written on Windows"):
        triplet_dataset.load_crops([r"C:\data\a.png"])


def test_pairs_as_csv_name_the_form_that_is_expected(tmp_path, refuses):
    (tmp_path / "pairs.csv").write_text("id,twin\na,b\n")
    refuses("train_twins.py", {"--train_pairs": tmp_path / "pairs.csv"}, '[["ID", "twin\'s ID"], ...]', "--train_pairs")


def test_checkpoints_by_wildcard_and_folder(tmp_path, tiny_model):
    for name in ("a.pth", "b.pt", "c.ckpt", "d.txt"):
        net.save_checkpoint(tmp_path / "models" / name, tiny_model)
    listed = net.list_checkpoints([f"{tmp_path}/models/*.p*", f"{tmp_path}/models"])
    assert [os.path.basename(path) for path in listed] == ["a.pth", "b.pt", "c.ckpt"]
    with pytest.raises(net.InputError, match="nothing"):
        net.list_checkpoints([f"{tmp_path}/nothing*.pth"])


def test_a_test_set_that_is_the_training_set_under_new_ids_is_refused(tmp_path, run_script, write_crops, capsys):
    assert run_script("train_twins.py") == 0
    aligned, pairs = write_crops([[3, 2], [2, 2]])
    renamed = {f"new {name}": paths for name, paths in json.loads(aligned.read_text()).items()}
    aligned.write_text(json.dumps(renamed))
    pairs.write_text(json.dumps([[f"new {name}" for name in pair] for pair in json.loads(pairs.read_text())]))
    changes = {"--checkpoints": tmp_path / "out" / "models"}
    assert run_script("evaluate_twins.py", changes) == 2
    assert "was trained on images of new train0a, new train0b" in capsys.readouterr().err
    assert run_script("evaluate_twins.py", {**changes, "--allow_overlap": None}) == 0
    assert "has seen 4 of the test people; it looks too good" in capsys.readouterr().out

"""Bad input as tables: JSON files, number flags, crops, checkpoints.

Each case runs a script's `main` and ends in one line on stderr that names the file or flag, the entry and the way
out, exit code 2 and nothing written. What stands well in other test files (most flags of train_twins, missing files,
crops at reader level) is not repeated here.
"""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import align
import evaluate_twins
import net
import train_twins
import triplet_dataset
from tests.synthetic import write_photos

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 1, 2, seed=5)
    return folder


@pytest.fixture
def scripts(tmp_path, write_crops, tiny_model, photos, monkeypatch):
    """{script: (main, {flag: value} that works, folder of its inputs)}; outputs go to tmp_path/out."""
    monkeypatch.setattr(net, "ARCHITECTURES", {name: net.ARCHITECTURES[name] for name in ("ir_18", "ir_tiny")})
    aligned, pairs = write_crops([[3, 2], [2, 2]])
    net.save_checkpoint(tmp_path / "start.pth", tiny_model)
    out, cpu = tmp_path / "out", {"--device": "cpu", "--max_workers": 2}
    landmarks = json.loads((photos / "landmarks.json").read_text())
    landmarks = {str(photos / path): points for path, points in landmarks.items()}
    images = json.loads((photos / "id_to_images.json").read_text())
    images = {name: [str(photos / path) for path in paths] for name, paths in images.items()}
    (tmp_path / "photos.json").write_text(json.dumps(images))
    (tmp_path / "landmarks.json").write_text(json.dumps(landmarks))
    (tmp_path / "photo_pairs.json").write_text(json.dumps([list(images)[:2]]))
    crops = {"--skip_alignment": None, "--aligned_json": aligned}
    return {
        "align.py": (
            align.main,
            {
                "--id_to_images": tmp_path / "photos.json",
                "--landmarks": tmp_path / "landmarks.json",
                "--pairs": tmp_path / "photo_pairs.json",
                "--aligned_folder": out / "crops",
                "--aligned_json": out / "aligned.json",
                **cpu,
            },
        ),
        "train_twins.py": (
            train_twins.main,
            {
                "--train_pairs": pairs,
                **crops,
                "--arch": "ir_tiny",
                "--pretrained": tmp_path / "start.pth",
                "--output_dir": out / "models",
                "--log_dir": out / "logs",
                "--epochs": 1,
                **cpu,
            },
        ),
        "evaluate_twins.py": (
            evaluate_twins.main,
            {"--test_pairs": pairs, **crops, "--output_dir": out, "--checkpoints": tmp_path / "start.pth", **cpu},
        ),
    }


@pytest.fixture
def refuses(tmp_path, scripts, capfd):
    """refuses("align.py", {"--pairs": path}, *words): the script refuses that in one line holding the words."""

    def check(script, changes, *words):
        main, flags = scripts[script]
        argv = [str(x) for flag, value in {**flags, **changes}.items() for x in (flag, value) if x is not None]
        assert main(argv) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == len(error.splitlines()) == 1, error
        assert error.startswith(f"{script}: ")
        for word in words:
            assert word in error
        written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        assert written == []
        return error

    return check


# ---- JSON files -------------------------------------------------------------------------------------

# (script, flag, what a right entry looks like, an entry of a wrong type and a word of what is said of it)
IMAGES, PAIRS, POINTS = '"p": ["x.png"]', '["p", "q"]', '"p.jpg": [[1, 2]]'
FILES = {
    "photographs": ("align.py", "--id_to_images", "{%s}", IMAGES, '"p": [1]', "images of ID 'p'"),
    "alignment pairs": ("align.py", "--pairs", "[%s]", PAIRS, '["p", 1]', "pair 1"),
    "landmarks": ("align.py", "--landmarks", "{%s}", POINTS, '"p.jpg": [["1", "2"]]', "landmarks of 'p.jpg'"),
    "training pairs": ("train_twins.py", "--train_pairs", "[%s]", PAIRS, '["p", 1]', "pair 1"),
    "training crops": ("train_twins.py", "--aligned_json", "{%s}", IMAGES, '"p": "x.png"', "images of ID 'p'"),
    "test pairs": ("evaluate_twins.py", "--test_pairs", "[%s]", PAIRS, '["p"]', "pair 1"),
    "test crops": ("evaluate_twins.py", "--aligned_json", "{%s}", IMAGES, '"p": {}', "images of ID 'p'"),
}


def spoilt(kind, form, entry, wrong):
    """(bytes of the file or None, words of the message) of one way to get a file wrong."""
    good, other = form % entry, "[]" if form[0] == "{" else "{}"
    deep = "[" * 100_000 + "]" * 100_000
    return {
        "missing": (None, "check the path"),
        "empty": (b"", "not valid JSON"),
        "not JSON": (b"p: x.png", "not valid JSON"),
        "cut off": (good[:-1].encode(), "not valid JSON"),
        "wrong top type": (other.encode(), "expected"),
        "null": (b"null", "expected"),
        "no entry": ((form % "").encode(), "at least one"),
        "wrong entry type": ((form % wrong).encode(), ""),
        "null entry": ((form % ('"p": null' if form[0] == "{" else "null")).encode(), ""),
        "NaN": ((form % ('"p": [NaN]' if form[0] == "{" else "[NaN, NaN]")).encode(), "NaN is not a number"),
        "10^5 digits": ((form % ('"p": [' + "9" * 10**5 + "]" if form[0] == "{" else "9" * 10**5)).encode(), "digits"),
        "nested deeply": ((form % (f'"p": {deep}' if form[0] == "{" else deep)).encode(), "nested too deeply"),
        "UTF-16": (good.encode("utf-16"), "save it as UTF-8"),
        "Latin-1": (good.replace("p", "\xe9").encode("latin-1"), "save it as UTF-8"),
        "binary": (bytes(range(256)), "not"),
        "half a character": (good.replace("p", "\\ud800").encode(), "half a character"),
    }[kind]


KINDS = ["missing", "empty", "not JSON", "cut off", "wrong top type", "null", "no entry", "wrong entry type"]
KINDS += ["null entry", "NaN", "10^5 digits", "nested deeply", "UTF-16", "Latin-1", "binary", "half a character"]


@pytest.mark.parametrize("file", FILES)
def test_a_spoilt_json_file_is_refused(tmp_path, refuses, file):
    script, flag, form, entry, wrong, name = FILES[file]
    for kind in KINDS:
        content, word = spoilt(kind, form, entry, wrong)
        (tmp_path / "bad.json").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "bad.json").write_bytes(content)
        refuses(script, {flag: tmp_path / "bad.json"}, "bad.json: ", word or (name if "wrong" in kind else "p"))


@pytest.mark.parametrize("file", [file for file, case in FILES.items() if case[2][0] == "{"])
def test_a_key_that_stands_twice_is_refused(tmp_path, refuses, file):
    script, flag, form, entry, *_ = FILES[file]
    (tmp_path / "bad.json").write_text(form % f"{entry}, {entry}")
    refuses(script, {flag: tmp_path / "bad.json"}, "bad.json: ", "stands there twice; merge the two entries")


@pytest.mark.parametrize("file", [file for file, case in FILES.items() if case[2][0] == "["])
@pytest.mark.parametrize("name", ["nobody", "", "line\nbreak\x1b[2J\u2028", "x" * 100_000])
def test_unknown_ids_are_named_in_one_line(tmp_path, refuses, file, name):
    script, flag, *_ = FILES[file]
    (tmp_path / "bad.json").write_text(json.dumps([[name, "q"]]))
    changes = {flag: tmp_path / "bad.json"}
    error = refuses(script, changes, ".json: ", repr(name)[:10], "add")
    assert error.strip().isprintable()
    assert len(error) < 1100


def test_unknown_images_and_landmarks_say_what_to_compare(tmp_path, refuses):
    (tmp_path / "bad.json").write_text(json.dumps({"nothing.jpg": align.TEMPLATE.tolist()}))
    refuses("align.py", {"--landmarks": tmp_path / "bad.json"}, "bad.json: ", "compare the paths")
    (tmp_path / "bad.json").write_text(json.dumps({"nobody": ["x.png"]}))
    for script in ("train_twins.py", "evaluate_twins.py"):
        refuses(script, {"--aligned_json": tmp_path / "bad.json"}, "pair 1", "not in the image list")


@pytest.mark.parametrize("number", ["1e999", "1e300", "9" * 400, "-1e7", '"1"', "true", "null", "[1]", "{}"])
def test_landmarks_that_are_no_places_in_a_photograph_are_refused(tmp_path, photos, refuses, number):
    path = photos / next(iter(json.loads((photos / "landmarks.json").read_text())))
    points = ", ".join([f"[{number}, 2]", "[3, 4]", "[5, 1]", "[7, 8]", "[2, 9]"])
    (tmp_path / "bad.json").write_text(f"{{{json.dumps(str(path))}: [{points}]}}")
    refuses("align.py", {"--landmarks": tmp_path / "bad.json"}, "bad.json: ")


def test_every_depth_of_nesting_is_refused_or_read(tmp_path):
    """Around the interpreter's limit, reading may succeed where quoting the entry does not."""
    for depth in range(850, 1010):
        (tmp_path / "x.json").write_text("[" * depth + "]" * depth)
        with pytest.raises(align.InputError):
            align.read_pairs(tmp_path / "x.json")


def test_byte_order_mark_is_fine(tmp_path, scripts):
    main, flags = scripts["evaluate_twins.py"]
    for flag in ("--test_pairs", "--aligned_json"):
        path = Path(flags[flag])
        path.write_text(path.read_text(), encoding="utf-8-sig")
    assert main([str(x) for item in flags.items() for x in item if x is not None]) == 0


def test_a_whole_character_outside_the_basic_plane_is_fine(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([["\U0001f46f", "b"]]))
    assert "\\ud83d" in (tmp_path / "x.json").read_text()
    assert align.read_pairs(tmp_path / "x.json") == [("\U0001f46f", "b")]


@pytest.mark.parametrize(
    ("read", "entry", "form"),
    [(align.read_pairs, '["%d", "%dt"]', "[%s]"), (align.read_id_to_images, '"%d": ["%d/0.png"]', "{%s}")],
)
def test_a_million_entries_are_read_within_bounds(tmp_path, read, entry, form):
    """Bounds: 60 s on a busy machine, and 25 times the file's size in memory (shown on fewer entries)."""
    (tmp_path / "x.json").write_text(form % ",".join(entry % (i, i) for i in range(1_000_000)))
    began = time.perf_counter()
    assert len(read(tmp_path / "x.json")) == 1_000_000
    assert time.perf_counter() - began < 60
    (tmp_path / "x.json").write_text(form % ",".join(entry % (i, i) for i in range(20_000)))
    tracemalloc.start()
    read(tmp_path / "x.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25 * (tmp_path / "x.json").stat().st_size


# ---- number flags -----------------------------------------------------------------------------------

COUNTS = ["0", "-1", "nan", "inf", "x", "", "1.5", "1e3", "0x10", "10" * 15, "9" * 5000, "1025 1", "\u00bd"]
NUMBERS = {
    "align.py": {"--max_workers": [*COUNTS, "1025"]},
    "evaluate_twins.py": {
        "--max_workers": [*COUNTS, "1025"],
        "--batch_size": COUNTS,
        "--seed": ["-1", "nan", "inf", "x", "", "1.5", str(2**32), "10" * 15],
    },
    "train_twins.py": {
        "--max_workers": ["", "inf", "1e3", "10" * 15, "1025"],
        "--batch_size": ["", "inf", "1e3", "10" * 15],
        "--epochs": ["", "inf", "1e3", "10" * 15],
        "--patience": ["", "inf", "1e3", "10" * 15],
        "--train_percentage": ["", "inf", "1e1", "10" * 15],
        "--margin": ["", "2", "1e30", "1e999", "1e-400"],
        "--learning_rate": ["", "1e6", "1e30", "1e-400"],
        "--weight_decay": ["", "1e6", "1e30"],
        "--validation_split": ["", "inf", "1e30", "1"],
        "--seed": ["-1", "nan", "inf", "", "1.5", str(2**32)],
    },
}


@pytest.mark.parametrize(("script", "flag"), [(script, flag) for script in NUMBERS for flag in NUMBERS[script]])
def test_a_number_out_of_range_or_no_number_names_its_flag(refuses, script, flag):
    for value in NUMBERS[script][flag]:
        refuses(script, {flag: value}, flag, "--help lists all flags")


@pytest.mark.parametrize("text", ["8", " 8 ", "+8", "0_8", "\u0668"])
def test_numbers_are_spelt_as_in_python(text):
    """Underscores, spaces and the digits of other scripts mean what they say, so they are taken."""
    flags = ["--id_to_images", "x", "--aligned_folder", "x", "--aligned_json", "x", "--max_workers", text]
    assert align.parse_args(flags).max_workers == 8


# ---- crops ------------------------------------------------------------------------------------------


def png(size=(112, 112), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


def huge_png():
    """A PNG whose header promises 100 million pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    return png()[:12] + header + struct.pack(">I", zlib.crc32(header)) + png()[33:]


CROPS = {
    "missing": (None, "run the alignment stage again"),
    "a folder": ("folder", "run the alignment stage again"),
    "empty": (b"", "--realign"),
    "text": (b"no picture", "--realign"),
    "truncated": (png()[:-40], "--realign"),
    "truncated in its header": (png()[:20], "--realign"),
    "wrong size": (png((112, 111)), "112x111 RGB, but a crop is 112x112 RGB"),
    "huge": (huge_png(), "10000x10000 RGB, but a crop is 112x112 RGB"),
    "grey": (png(mode="L"), "112x112 L, but a crop is"),
    "palette": (png(mode="P"), "112x112 P, but a crop is"),
    "with alpha": (png(mode="RGBA"), "112x112 RGBA, but a crop is"),
    "16 bits": (png(mode="I;16"), "112x112 I;16, but a crop is"),
}


@pytest.mark.parametrize("kind", CROPS)
def test_a_wrong_crop_is_refused(tmp_path, refuses, scripts, kind):
    content, word = CROPS[kind]
    crop = next((tmp_path / "train_aligned").rglob("1.png"))
    crop.unlink()
    if content == "folder":
        crop.mkdir()
    elif content is not None:
        crop.write_bytes(content)
    assert word in refuses("evaluate_twins.py", {}, f"{crop}: ")
    with pytest.raises(align.InputError, match=r"1\.png: "):
        triplet_dataset.load_crops([crop])


def test_a_picture_of_any_size_is_refused_in_one_line(tmp_path):
    (tmp_path / "x.png").write_bytes(huge_png())
    program = "import sys, align, triplet_dataset as t; "
    program += "sys.exit(align.run_script('train_twins.py', lambda: t.read_crop(sys.argv[1]), ''))"
    command = [sys.executable, "-c", program, str(tmp_path / "x.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr


def test_a_crop_changed_since_alignment_is_used_as_it_is(tmp_path):
    """The key that the alignment leaves in a crop tells when to make it anew; who brings crops needs none."""
    crop = np.random.default_rng(1).integers(0, 256, (112, 112, 3), np.uint8)
    note = PngImagePlugin.PngInfo()
    note.add_text("alignment", "of another photograph")
    for path, options in (("a.png", {}), ("b.png", {"pnginfo": note})):
        Image.fromarray(crop).save(tmp_path / path, **options)
        np.testing.assert_array_equal(triplet_dataset.read_crop(tmp_path / path), crop)


# ---- checkpoints ------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of a function, named so that it need not be one that exists."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickled(content, archive=True, compressed=False):
    """A pickle as a checkpoint file: bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as z:
        z.writestr("x/data.pkl", content)
        z.writestr("x/version", b"3\n")
        z.writestr("x/byteorder", b"little")
    return file.getvalue()


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def doubling_tuples(depth=80):
    """A dict whose key is a tuple of a tuple twice, and so on: 80 steps, 2^80 visits to hash it."""
    steps = b"".join(b"q%ch%c\x86" % (i, i) for i in range(depth))
    return b"\x80\x02}K\x01\x85" + steps + b"K\x01s."


def state(**changes):
    """The tiny network's tensors; `changes` by the key's dots as double underscores."""
    result = net.build_model("ir_tiny").state_dict()
    result.update({key.replace("__", "."): value for key, value in changes.items()})
    return result


LAST = "output_layer__3__weight"  # (512, 1568) in the tiny network
SHAPE = (512, 32 * 49)


def code(function, argument):
    return lambda flag: saved({"state_dict": state(), "x": Call(function, argument.replace("FLAG", str(flag)))})


ATTACKS = {
    "os.system": code(os.system, "touch FLAG"),
    "eval": code(eval, "open('FLAG', 'w')"),
    "exec": code(exec, "open('FLAG', 'w')"),
    "open": lambda flag: saved({"state_dict": state(), "x": Call(open, str(flag), "w")}),
    "subprocess": lambda flag: saved({"state_dict": state(), "x": Call(subprocess.check_call, ["touch", str(flag)])}),
    "a file within": lambda flag: saved(
        {"state_dict": state(), "x": Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {flag}"), 0).decode())}
    ),
    "getattr": lambda flag: saved(
        {"state_dict": state(), "x": Call(getattr, torch.nn.Linear, "forward"), "y": str(flag)}
    ),
    "torch.load": lambda flag: saved({"state_dict": state(), "x": Call(torch.load, str(flag))}),
    "old format": lambda flag: saved(
        {"state_dict": state(), "x": Call(eval, f"open({str(flag)!r}, 'w')")}, _use_new_zipfile_serialization=False
    ),
    "a bare pickle": lambda flag: pickle.dumps(Call(eval, f"open({str(flag)!r}, 'w')"), 2),
}


INERT = ("getattr", "torch.load", "a file within")  # names that a harmless file may hold: read, and never called


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_code_of_a_checkpoint_runs(tmp_path, refuses, attack):
    (tmp_path / "bad.pth").write_bytes(ATTACKS[attack](tmp_path / "owned"))
    if attack in INERT:
        assert net.load_checkpoint(tmp_path / "bad.pth").arch == "ir_tiny"
    else:
        refuses("train_twins.py", {"--pretrained": tmp_path / "bad.pth"}, "bad.pth: it asks to run", "do not trust it")
    assert not (tmp_path / "owned").exists()


REFUSED = {
    "empty": lambda: (b"", "download or copy it again"),
    "text": lambda: (b"no checkpoint", "download or copy it again"),
    "JSON": lambda: (b'{"state_dict": {}}', "download or copy it again"),
    "truncated": lambda: (saved(state())[:-5000], "download or copy it again"),
    "truncated, old format": lambda: (
        saved(state(), _use_new_zipfile_serialization=False)[:-5000],
        "download or copy it again",
    ),
    "another network": lambda: (saved({"state_dict": {"fc.weight": torch.zeros(2)}}), "no AdaFace network"),
    "another architecture": lambda: (saved(net.build_model("ir_18").state_dict()), "its tensors fit ir_18"),
    "half of the keys": lambda: (saved(dict(list(state().items())[::2])), "not a whole ir_tiny network (missing"),
    "no dict": lambda: (saved([state()]), "holds list"),
    "no state": lambda: (saved({"state_dict": None}), "no AdaFace network"),
    "a module": lambda: (saved(net.build_model("ir_tiny")), "x"),
    "NaN weights": lambda: (saved(state(**{LAST: torch.full(SHAPE, np.nan)})), "output_layer.3.weight holds NaN"),
    "infinite weights": lambda: (saved(state(**{LAST: torch.full(SHAPE, np.inf)})), "take an earlier checkpoint"),
    "beyond float32": lambda: (saved(state(**{LAST: torch.full(SHAPE, 1e300, dtype=torch.float64)})), "infinite"),
    "negative variance": lambda: (saved(state(output_layer__4__running_var=-torch.ones(512))), "negative variances"),
    "integers": lambda: (saved(state(**{LAST: torch.zeros(SHAPE, dtype=torch.int8)})), "is strided int8 on cpu"),
    "bool": lambda: (saved(state(**{LAST: torch.zeros(SHAPE, dtype=torch.bool)})), "save the network as float32"),
    "complex": lambda: (saved(state(**{LAST: torch.zeros(SHAPE, dtype=torch.complex64)})), "complex64"),
    "float8": lambda: (saved(state(**{LAST: torch.zeros(SHAPE).to(torch.float8_e4m3fn)})), "float8"),
    "quantised": lambda: (
        saved(state(**{LAST: torch.quantize_per_tensor(torch.zeros(SHAPE), 1, 0, torch.qint8)})),
        "qint8",
    ),
    "meta": lambda: (saved(state(**{LAST: torch.zeros(SHAPE, device="meta")})), "on meta"),
    "sparse": lambda: (saved(state(**{LAST: torch.zeros(SHAPE).to_sparse()})), "_rebuild_sparse_tensor"),
    "tuples that double": lambda: (pickled(doubling_tuples()), "a tuple of more than"),
    "a buffer of 100 GB": lambda: (
        pickled(b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\xe8\x76\x48\x17\x85R."),
        "asks to run __builtin__.bytearray",
    ),
    "a recursive list": lambda: (pickled(b"\x80\x02]q\x00h\x00a."), "holds list"),
    "nested deeply": lambda: (pickled(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."), "holds list"),
    "a config that doubles": lambda: (saved(ours(config={"a": doubling_lists()})), "config['a'] is damaged"),
    "val_ids of numbers": lambda: (saved(ours(config={"val_ids": [1, 2]})), "config['val_ids']"),
    "train_ids as text": lambda: (saved(ours(config={"train_ids": "abc"})), "take the checkpoint as it was saved"),
    "aligned_json a number": lambda: (saved(ours(config={"aligned_json": 5})), "config['aligned_json']"),
    "a percentage of text": lambda: (saved(ours(config={"train_percentage": "all"})), "config['train_percentage']"),
    "val_eer NaN": lambda: (saved(ours(metrics={"val_eer": float("nan")})), "metrics['val_eer']"),
    "val_eer text": lambda: (saved(ours(metrics={"val_eer": "low"})), "metrics['val_eer']"),
    "val_eer a tensor": lambda: (saved(ours(metrics={"val_eer": torch.zeros(1)})), "metrics['val_eer']"),
    "metrics of metrics": lambda: (saved(ours(metrics={"a": {"b": {}}})), "metrics['a']"),
    "a key of bytes": lambda: (saved(ours(config={b"a": 1})), "is damaged"),
}


def ours(**changes):
    tensors = {f"model.{key}": value for key, value in state().items()}
    return {"state_dict": tensors, "arch": "ir_tiny", "epoch": 1, "config": {}, "metrics": {}} | changes


def doubling_lists(depth=60):
    content = [1]
    for _ in range(depth):
        content = [content, content]
    return content


@pytest.mark.parametrize("kind", REFUSED)
def test_a_wrong_checkpoint_is_refused(tmp_path, refuses, kind):
    content, word = REFUSED[kind]()
    (tmp_path / "bad.pth").write_bytes(content)
    script = "train_twins.py" if kind == "another architecture" else "evaluate_twins.py"
    flag = "--pretrained" if kind == "another architecture" else "--checkpoints"
    if kind == "a module":  # a pickled module becomes an inert object: its class is not called
        word = "holds Backbone, not a checkpoint's dict"
    refuses(script, {flag: tmp_path / "bad.pth"}, "bad.pth: ", word)


class Copied:
    def __reduce__(self):
        expanded = torch.zeros(1).expand(10**5, 10**5)
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, (expanded, torch.float64, "cpu", False)


def deflated(name, content):
    file = io.BytesIO(pickled(b"\x80\x02}."))
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def overlapping():
    """A zip directory that lists one entry of 1 MB a thousand times."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data/0", bytes(10**6))
        archive.filelist *= 1000
        archive._didModify = True
    return file.getvalue()


def test_bombs_are_refused_within_little_memory(tmp_path):
    """Each file would take gigabytes or years when read; all together take less than 150 MB beside PyTorch."""
    bombs = {
        "tensors.pth": (deflated("x/data/0", bytes(200_000_000)), "compressed"),
        "pickle.pth": (deflated("x/data.pkl", b"}0" * 100_000_000), "compressed"),
        "overlap.pth": (overlapping(), "compressed"),
        "sets.pth": (pickled(b"\x80\x02" + b"\x8f" * 200_000), "more than 100000 entries"),
        "expanded.pth": (saved({"output_layer.3.weight": torch.zeros(1).expand(10**6, 10**6)}), "not a whole"),
        "copied.pth": (saved({"a": Copied()}), "_rebuild_device_tensor_from_cpu_tensor"),
    }
    for name, (content, _) in bombs.items():
        (tmp_path / name).write_bytes(content)
    program = """
import resource, sys, net
net.MAX_OPERATIONS = 100_000
net.ARCHITECTURES = {"ir_18": net.ARCHITECTURES["ir_18"]}
net.build_model("ir_18")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
for path in sys.argv[1:]:
    try:
        net.load_checkpoint(path)
    except net.InputError as error:
        print(peak() - before, error)
"""
    command = [sys.executable, "-c", program, *(str(tmp_path / name) for name in bombs)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.stderr == ""
    for (name, (_, word)), line in zip(bombs.items(), lines, strict=True):
        assert name in line
        assert word in line
        assert int(line.split()[0]) < 150, line


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("old", [False, True])
def test_other_floats_parameters_and_the_old_format_are_read_as_float32(tmp_path, monkeypatch, dtype, old):
    monkeypatch.setattr(net, "ARCHITECTURES", {"ir_tiny": net.ARCHITECTURES["ir_tiny"]})
    content = OrderedDict((k, v.to(dtype) if v.is_floating_point() else v) for k, v in state().items())
    content["output_layer.3.weight"] = torch.nn.Parameter(content["output_layer.3.weight"])
    torch.save({"state_dict": content, "arch": ["a", "lie"]}, tmp_path / "x", _use_new_zipfile_serialization=not old)
    model = net.load_checkpoint(tmp_path / "x")
    assert model.arch == "ir_tiny"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    weight = model.output_layer[3].weight
    torch.testing.assert_close(weight, content["output_layer.3.weight"].detach().float())

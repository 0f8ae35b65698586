import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage import data
from skimage.transform import SimilarityTransform

import align
from net import InputError
from tests.files import write_detector_weights
from tests.reference import crop_of_pattern, dlib_landmarks

ROOT = Path(align.__file__).parent


def arguments(photos, out, *more):
    return [
        *("--id_to_images", f"{photos}/id_to_images.json", "--landmarks", f"{photos}/landmarks.json"),
        *("--aligned_folder", f"{out}/crops", "--aligned_json", f"{out}/aligned.json", *map(str, more)),
    ]


def write_input(folder, images, landmarks):
    """images: {ID: [file name]}; landmarks: {file name: points}."""
    (folder / "id_to_images.json").write_text(json.dumps(images))
    (folder / "landmarks.json").write_text(json.dumps(landmarks))


def run(photos, out, *more):
    """Aligns with success; returns (totals, entries) of the report."""
    assert align.main(arguments(photos, out, *more)) == 0
    report = json.loads((out / "crops" / "alignment_report.json").read_text())
    return report["totals"], report["photographs"]


def one_photo(photos):
    """(content, landmarks) of one of the photographs."""
    points = json.loads((photos / "landmarks.json").read_text())["photos/family00A_0.jpg"]
    return (photos / "photos" / "family00A_0.jpg").read_bytes(), points


def error_of(capsys):
    """The one line that a script said on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ---- geometry


def test_five_points_of_68():
    points = np.arange(136, dtype=float).reshape(68, 2)
    five = [[77, 78], [89, 90], [60, 61], [96, 97], [108, 109]]
    assert align.five_points(points).tolist() == align.five_points(five).tolist() == five


@pytest.mark.parametrize("points", [[[1, 2]] * 4, [[1, 2, 3]] * 5, [[1, math.nan]] * 5, "abc", [["1", "2"]] * 5])
def test_wrong_landmarks_are_refused(points):
    with pytest.raises(ValueError, match=r"points|range"):
        align.five_points(points)


@pytest.mark.parametrize("seed", range(10))
def test_similarity_equals_scikit_images(seed):
    rng = np.random.default_rng(seed)
    source = rng.normal(0, 100, (5, 2))
    if seed % 2:  # a mirrored face: a reflection would fit, but must not be used
        source = align.TEMPLATE * [-3, 3] + rng.normal(0, 5, (5, 2))
    reference = SimilarityTransform.from_estimate(source, align.TEMPLATE).params[:2]
    matrix = align.similarity_transform(source, align.TEMPLATE)
    np.testing.assert_allclose(matrix, reference, atol=1e-6)
    assert np.linalg.det(matrix[:, :2]) > 0


def test_a_face_in_template_position_is_copied_exactly():
    image = np.random.default_rng(0).integers(0, 256, (150, 140, 3), np.uint8)
    np.testing.assert_array_equal(align.align_face(image, align.TEMPLATE), image[:112, :112])
    shifted = align.align_face(image, align.TEMPLATE + np.array([10, 20]))
    np.testing.assert_array_equal(shifted, image[20:132, 10:122])


@pytest.mark.parametrize("size", [3.3, 6.5, 10.7])
def test_error_against_a_supersampled_reference_falls_threefold(size):
    """Rings whose frequency rises to 0.9 of what the photograph can hold, far beyond the crop's resolution."""
    highest = 0.9 * np.pi * size / 160  # radians per crop pixel, per pixel of distance from the middle
    crop, naive, reference = crop_of_pattern(
        size, lambda x, y: 128 + 100 * np.cos(highest * ((x - 55.5) ** 2 + (y - 55.5) ** 2))
    )
    assert np.sqrt(((naive - reference) ** 2).mean()) > 3 * np.sqrt(((crop - reference) ** 2).mean())


@pytest.mark.parametrize("size", [0.4, 0.8, 1.0, 1.3])
def test_small_faces_are_sampled_once_and_not_blurred(size):
    crop, naive, _ = crop_of_pattern(size, lambda x, y: 128 + 100 * np.cos(x * size) * np.cos(y * size))
    np.testing.assert_array_equal(crop, naive)


# ---- photographs


KINDS = {  # how a grey photograph may be stored, from values 0..255
    "grey.png": lambda g: g,
    "cmyk.jpg": lambda g: g,
    "rgb.jpg": lambda g: np.stack([g] * 3, -1),
    "alpha.png": lambda g: np.stack([g] * 3 + [np.full_like(g, 255)], -1),
    "palette.gif": lambda g: g,
    "10 bits in 16.png": lambda g: (g * (1023 / 255)).astype(np.uint16),
    "14 bits in 16.tif": lambda g: (g * (16383 / 255)).astype(np.uint16),
    "16 bits.png": lambda g: g.astype(np.uint16) * 257,
    "16 bits in 32.tif": lambda g: g.astype(np.int32) * 257,
    "8 bits in 32.tif": lambda g: g.astype(np.int32),
    "Ü 0 to 1.tif": lambda g: (g / 255).astype(np.float32),
    "0 to 255.tif": lambda g: g.astype(np.float32),
}


@pytest.mark.parametrize("name", KINDS)
def test_all_kinds_of_images_become_8_bit_rgb(tmp_path, name):
    grey = np.linspace(0, 254, 64 * 48).reshape(64, 48).astype(np.uint8)
    mode = "CMYK" if "cmyk" in name else None
    picture = Image.fromarray(KINDS[name](grey)) if mode is None else Image.fromarray(grey).convert(mode)
    picture.save(tmp_path / name, **({"quality": 98} if "jpg" in name else {}))
    image = align.read_photo(tmp_path / name)
    assert (image.shape, image.dtype) == ((64, 48, 3), np.uint8)
    assert np.abs(image.astype(int) - grey[:, :, None]).max() <= (12 if "jpg" in name else 1)


@pytest.mark.parametrize("odd", [-1.0, 1e6, math.nan, math.inf])
def test_values_without_a_known_white_are_refused_by_name(tmp_path, odd):
    values = np.linspace(0, 1, 64 * 48, dtype=np.float32).reshape(64, 48)
    values[5, 5] = odd
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match="save it with 8 bits"):
        align.read_photo(tmp_path / "x.tif")


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"hevc"])
def test_heic_under_any_name_is_named_with_both_ways_out(tmp_path, photos, brand):
    for name in ("IMG_1.HEIC", "IMG_2.jpg"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(3000))
    content, points = one_photo(photos)
    (tmp_path / "good.jpg").write_bytes(content)
    names = ["IMG_1.HEIC", "IMG_2.jpg", "good.jpg"]
    write_input(tmp_path, {"a": names}, dict.fromkeys(names, points))
    _, entries = run(tmp_path, tmp_path)
    assert [entry["status"] for entry in entries] == ["unreadable", "unreadable", "aligned"]
    for entry in entries[:2]:
        assert all(word in entry["reason"] for word in ("HEIC", "pip install pillow-heif", "JPEG"))


@pytest.fixture(scope="module")
def eileen():
    """(image, 68 landmarks) of a real face."""
    return data.astronaut(), dlib_landmarks(data.astronaut())


def test_a_real_face_lands_on_the_template(tmp_path, eileen):
    image, landmarks = eileen
    Image.fromarray(image).save(tmp_path / "astronaut.png")
    write_input(tmp_path, {"eileen": ["astronaut.png"]}, {"astronaut.png": landmarks.tolist()})
    run(tmp_path, tmp_path)
    crop = np.array(Image.open(tmp_path / "crops" / "eileen" / "astronaut.png"))
    # Her eyes are found again in the crop, by dlib, where the template has them.
    again = align.five_points(dlib_landmarks(cv2.resize(crop, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)) / 4)
    assert np.linalg.norm(again - align.TEMPLATE, axis=1).mean() < 6


def test_one_face_gives_one_crop_in_every_orientation_size_and_format(tmp_path, eileen):
    image, points = eileen[0], align.five_points(eileen[1])
    reference = align.align_face(image, points).astype(int)
    photo, sources = Image.fromarray(image), {}

    def add(name, picture, factor=1, **options):
        picture.save(tmp_path / name, **options)
        sources[name] = ((points + 0.5) * factor - 0.5).tolist()

    for factor in (1, 2, 4):
        sized = photo.resize((512 * factor, 512 * factor), Image.Resampling.BICUBIC)
        add(f"{factor}.webp", sized, factor, quality=98)
        add(f"Ü{factor}.JPG", sized, factor, quality=98, subsampling=0)
    large = photo.resize((512 * 8, 512 * 8), Image.Resampling.BICUBIC)  # as JPEGs they are decoded at half their size
    for orientation, turn in enumerate((None, *(Image.Transpose(i) for i in (0, 3, 1, 5, 2, 6, 4))), 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        add(f"turned{orientation}.tif", photo if turn is None else photo.transpose(turn), exif=exif)
        add(f"large{orientation}.jpg", large if turn is None else large.transpose(turn), 8, quality=95, exif=exif)
    write_input(tmp_path, {"a": list(sources)}, sources)
    assert align.main(arguments(tmp_path, tmp_path)) == 0
    for name in sources:
        crop = np.array(Image.open(tmp_path / "crops" / "a" / f"{Path(name).stem}.png")).astype(int)
        assert np.abs(crop - reference).mean() < (0.01 if "turned" in name else 3), name


# ---- names


@given(st.lists(st.text(st.characters(exclude_categories=()), max_size=40), unique=True))
def test_any_ids_get_distinct_names_that_are_no_paths(names):
    found = [align.file_name(name) for name in [*names, "%", "%2F", "/", "\0", ".", "..", "", "\ud800", "C:\\x"]]
    assert [align.file_name(name) for name in ("A b-1", "Müller", "日本")] == ["A b-1", "Müller", "日本"]
    assert len(set(found[-9:])) == 9
    assert len(set(found[: len(names)])) == len(names)
    for name in found:
        assert name not in ("", ".", "..")
        assert not set(name) & set('/\\\0:*?"<>|+')
        name.encode()


def test_sources_with_one_stem_get_names_that_do_not_depend_on_order_or_place():
    paths = ["x/1.jpg", "y/1.png", "y/2.png", "y/IMG.jpg", "y/img.jpg"]
    names = align.file_names(paths)
    assert len({name.casefold() for name in names.values()}) == 5
    assert names["y/2.png"] == "2"
    assert align.file_names(paths[::-1]) == names
    moved = align.file_names([f"/other/place/{path}" for path in paths], home="/other/place")
    assert list(moved.values()) == list(names.values())


HOSTILE = ["../../x", "/etc/passwd", "..", ".", "", "a\0b", "-rf", "C:\\x", "\ud800", "日本", "alignment_report"]


def test_nothing_is_written_outside_the_folder(tmp_path, photos):
    out = tmp_path / "deep" / "er"
    out.mkdir(parents=True)
    content, points = one_photo(photos)
    (out / "...jpg").write_bytes(content)
    write_input(out, {name: ["...jpg"] for name in HOSTILE}, {"...jpg": points})
    run(out, out)
    assert [p.name for p in tmp_path.glob("*")] + [p.name for p in tmp_path.glob("*/*")] == ["deep", "er"]
    assert len(list((out / "crops").glob("*/*.png"))) == len(HOSTILE)
    assert len(list((out / "crops").iterdir())) == len(HOSTILE) + 2  # and the report with its sheet
    mapping = json.loads((out / "aligned.json").read_text())
    assert list(mapping) == HOSTILE
    assert all((out / crop).is_file() for (crop,) in mapping.values())


# ---- the stage


def test_the_stage_writes_crops_mapping_and_report(tmp_path, photos, capsys):
    totals, entries = run(photos, tmp_path, "--max_workers", 3)
    mapping = json.loads((tmp_path / "aligned.json").read_text())
    source = json.loads((photos / "id_to_images.json").read_text())
    for identity, crops in mapping.items():
        assert crops == [f"crops/{identity}/{Path(p).stem}.png" for p in source[identity]]
        for crop in crops:
            image = Image.open(tmp_path / crop)
            assert (image.mode, image.size) == ("RGB", (112, 112))
    assert list(mapping) == list(source)
    assert totals == {"aligned": 12}
    assert all(0 < entry["residual"] < 8 and entry["eyes"] > 35 for entry in entries)
    assert Image.open(tmp_path / "crops" / "alignment_sheet.png").size[0] == 10 * 114 + 2
    assert "12 photographs of 4 people: 12 aligned" in capsys.readouterr().out


def test_crops_that_show_nothing_are_flagged_and_counted(tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 16, (200, 200, 3), np.uint8)  # 12 bits in 16, as Pillow reads RGB
    pictures = {"black": noise, "white": 255 - noise, "constant": np.full_like(noise, 120), "good": noise * 10}
    for name, picture in pictures.items():
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    names = [f"{name}.png" for name in pictures]
    write_input(tmp_path, {"a": names}, dict.fromkeys(names, (align.TEMPLATE + 20).tolist()))
    for _ in range(2):
        totals, entries = run(tmp_path, tmp_path)
        flags = ["nearly black", "nearly white", "nearly constant", ""]
        assert [entry["flag"] for entry in entries] == flags
        assert [totals[flag] for flag in flags[:3]] == [1, 1, 1]
        assert "1 nearly white" in capsys.readouterr().out


def test_done_work_is_not_repeated_and_changes_are_noticed(tmp_path, photos):
    shutil.copytree(photos, tmp_path, dirs_exist_ok=True)

    def totals(*more):
        found, entries = run(tmp_path, tmp_path, *more)
        facts.append([[entry[k] for k in ("residual", "eyes", "flag")] for entry in entries])
        return found

    facts = []
    assert totals() == {"aligned": 12}
    crops = {p: p.stat().st_mtime_ns for p in (tmp_path / "crops").glob("*/*.png")}
    assert totals() == {"already done": 12}
    assert facts[0] == facts[1]
    assert crops == {p: p.stat().st_mtime_ns for p in crops}
    os.utime(tmp_path / "photos" / "family00A_0.jpg")  # as after an edit
    assert totals() == {"aligned": 1, "already done": 11}
    landmarks = json.loads((tmp_path / "landmarks.json").read_text())
    landmarks["photos/family01B_2.jpg"][0][0] += 3
    (tmp_path / "landmarks.json").write_text(json.dumps(landmarks))
    assert totals() == {"aligned": 1, "already done": 11}
    whole = (tmp_path / "crops" / "family00A" / "family00A_1.png").read_bytes()
    for damaged in (b"\x89PNG broken", b"", whole[:-1000]):
        (tmp_path / "crops" / "family00A" / "family00A_1.png").write_bytes(damaged)
        assert totals() == {"aligned": 1, "already done": 11}
    assert totals("--realign") == {"aligned": 12}
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert run(moved, moved)[0] == {"already done": 12}


def test_only_the_people_of_the_pairs(tmp_path, photos):
    (tmp_path / "pairs.json").write_text('[["family01B", "family01A"], ["family01A", "family01B"]]')
    run(photos, tmp_path, "--pairs", tmp_path / "pairs.json")
    assert list(json.loads((tmp_path / "aligned.json").read_text())) == ["family01B", "family01A"]


def test_the_plans_names_are_the_defaults(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert align.main([]) == 2
    line = error_of(capsys)
    assert line.startswith("align.py: --id_to_images id_to_images.json: ")
    assert '{"ID": ["path", ...], ...}' in line
    monkeypatch.chdir(photos)
    assert align.main(["--landmarks", "landmarks.json"]) == 0
    assert json.loads(Path("id_to_train_aligned_images.json").read_text())["family00A"][0].startswith("train_aligned")


def test_bad_photographs_are_reported_and_left_out(tmp_path, photos, capsys):
    content, points = one_photo(photos)
    damaged = {"empty.jpg": b"", "truncated.jpg": content[: len(content) // 2], "text.jpg": b"no image"}
    for name, what in damaged.items():
        (tmp_path / name).write_bytes(what)
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    unreadable = [*damaged, "folder.jpg", "fifo.jpg", "zero.jpg", "gone.jpg", "a\0b.jpg"]
    landmarks = {
        **dict.fromkeys(unreadable, points),
        "flat.jpg": [[150, 150]] * 5,
        "tiny.jpg": (align.TEMPLATE / 4 + 100).tolist(),
        "profile.jpg": (align.TEMPLATE * [0.4, 1] + 100).tolist(),
        "outside.jpg": (align.TEMPLATE * 10 + 400).tolist(),
        "huge.jpg": (align.TEMPLATE * 5000 - 330000).tolist(),
        "noface.jpg": None,
        "good.jpg": points,
    }
    names = [*landmarks, "unlisted.jpg"]
    for name in names[len(unreadable) :]:
        (tmp_path / name).write_bytes(content)
    write_input(tmp_path, {"a": names, "b": [unreadable[0]], "c": []}, landmarks)
    for _ in range(2):
        _, report = run(tmp_path, tmp_path)
        found = {Path(entry["source"]).name: entry["status"] for entry in report}
        assert found.pop("good.jpg") in ("aligned", "already done")
        assert found == {
            **dict.fromkeys(unreadable, "unreadable"),
            **{"flat.jpg": "too small", "tiny.jpg": "too small", "unlisted.jpg": "no landmarks"},
            **{"profile.jpg": "poor fit", "outside.jpg": "poor fit", "huge.jpg": "poor fit", "noface.jpg": "no face"},
        }
        assert json.loads((tmp_path / "aligned.json").read_text()) == {"a": ["crops/a/good.png"], "b": [], "c": []}
        assert all(entry["reason"] for entry in report if not entry["crop"])


def test_the_sheet_shows_the_worst_crops_first_as_the_report_lists_them(tmp_path):
    report = []
    for number, residual in enumerate((1.0, 7.0, 3.0)):
        Image.new("RGB", (112, 112), (0, 0, 10 * number + 50)).save(tmp_path / f"{number}.png")
        entry = {"crop": str(tmp_path / f"{number}.png"), "residual": residual, "status": "aligned", "flag": ""}
        report += [entry, {"crop": None, "status": "no face", "flag": "", "source": "x", "reason": "none"}]
    align.write_report({"a": []}, report, tmp_path)
    listed = json.loads((tmp_path / "alignment_report.json").read_text())["sheet"]
    assert [Path(crop).name for crop in listed] == ["1.png", "2.png", "0.png"]
    with Image.open(tmp_path / "alignment_sheet.png") as sheet:
        assert [sheet.getpixel((2 + 114 * i + 50, 50)) for i in range(3)] == [(0, 0, 60), (0, 0, 70), (0, 0, 50)]


@pytest.mark.parametrize("crops_before", [0, 1, 5, 11])
def test_killed_at_any_moment_the_next_run_completes(tmp_path, photos, crops_before):
    """SIGKILL in the middle of writing a crop; the first run's mapping stays whole, leftovers do no harm."""
    run(photos, tmp_path)
    whole = (tmp_path / "aligned.json").read_bytes()
    code = f"""if True:
        import itertools, os, signal, sys, align
        replace, calls = os.replace, itertools.count()
        os.replace = lambda *names: os.kill(os.getpid(), 9) if next(calls) == {crops_before} else replace(*names)
        align.main(sys.argv[1:])"""
    command = [sys.executable, "-c", code, *arguments(photos, tmp_path, "--realign", "--max_workers", 1)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "crops").glob("*/.*.png"))) == 1
    assert (tmp_path / "aligned.json").read_bytes() == whole
    run(photos, tmp_path)
    assert (tmp_path / "aligned.json").read_bytes() == whole
    assert all(Image.open(tmp_path / path).size == (112, 112) for ps in json.loads(whole).values() for path in ps)


# ---- landmark files


FACE = (align.TEMPLATE * 2 + [40, 60]).round(1)
ALTERED = {
    "left and right are exchanged": lambda p: p[[1, 0, 2, 4, 3]],
    "x and y are exchanged": lambda p: p[:, ::-1],
    "y counts from the bottom": lambda p: [0, 400] + p * [1, -1],
    "from 0 to 1": lambda p: p / [300, 400],
}


@pytest.mark.parametrize("slip", ALTERED)
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_a_slip_that_most_entries_share_is_named(tmp_path, slip, share):
    """Also in 68 points, and among correct ones; a few odd entries are not taken for a slip."""
    rng, entries = np.random.default_rng(0), {}
    for i in range(20):
        angle = rng.normal(0, 0.2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        points = (FACE - 100) @ turn.T + 110 + rng.normal(0, 2, (5, 2))
        points = ALTERED[slip](points) if i < share * 20 else points
        if i % 2:  # 68 points with these five in them
            points = points[[0] * 30 + [2] * 6 + [0] * 6 + [1] * 6 + [3] * 6 + [4] * 14]
        entries[f"{i}.jpg"] = points.tolist()
    (tmp_path / "landmarks.json").write_text(json.dumps(entries))
    if share < 0.5:
        assert len(align.read_landmarks(tmp_path / "landmarks.json", tmp_path)) == 20
    else:
        with pytest.raises(InputError, match=f"landmarks.json: .*{slip}"):
            align.read_landmarks(tmp_path / "landmarks.json", tmp_path)


def test_faces_on_their_side_and_profiles_are_no_slip(tmp_path):
    side = (FACE - 100) @ np.array([[0, 1], [-1, 0]]) + 150
    entries = {"side": side.tolist(), "other side": (300 - side).tolist(), "profile": (FACE * [0.3, 1]).tolist()}
    (tmp_path / "landmarks.json").write_text(json.dumps(entries))
    assert len(align.read_landmarks(tmp_path / "landmarks.json", "/elsewhere")) == 6  # seen from either folder


@pytest.mark.parametrize("content", [None, [], [FACE.tolist()], FACE.tolist(), [FACE.tolist()] * 2, [[]], "x", True])
def test_landmarks_as_detectors_write_them(tmp_path, content):
    file = tmp_path / "landmarks.json"
    file.write_text(json.dumps({"a.jpg": content}))
    if content in ([FACE.tolist()] * 2, [[]], "x", True):
        with pytest.raises(InputError, match=r"landmarks of 'a\.jpg': "):
            align.read_landmarks(file, tmp_path)
    else:
        assert align.read_landmarks(file, tmp_path) == {str(tmp_path / "a.jpg"): FACE.tolist() if content else []}


# ---- the command line; more in test_bad_input.py


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"a": ["nothing.jpg"]}, "not one photograph gave"),
        ({"Anna": [], "b": [], "anna": []}, "'Anna' and 'anna'"),
        ({"x" * 300: ["a.jpg"]}, "File name too long"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_the_mapping(tmp_path, photos, capsys, images, message):
    content, points = one_photo(photos)
    (tmp_path / "a.jpg").write_bytes(content)
    write_input(tmp_path, images, {"a.jpg": points, "nothing.jpg": points})
    (tmp_path / "aligned.json").write_text("as before")
    assert align.main(arguments(tmp_path, tmp_path)) == 2
    assert message in error_of(capsys)
    assert (tmp_path / "aligned.json").read_text() == "as before"


@pytest.mark.parametrize("flags", ["--device gpu", "--device mps", "--what"])
def test_wrong_flags_are_one_line_and_exit_code_2(capsys, flags):
    assert align.main(flags.split()) == 2
    assert flags.split()[0] in error_of(capsys)


def test_between_is_a_closed_interval():
    parse = align.between(float, 0, 1)
    assert [parse("0"), parse("1"), parse("5e-1"), align.between(int, 1, 3)("3")] == [0.0, 1.0, 0.5, 3]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a\n  b\tc"), 2, "x.py: a b c"),
        (OSError(28, "No space left on device", "f.png"), 2, "x.py: f.png: No space left on device"),
        (OSError(28, "No space left on device"), 2, "x.py: No space left on device"),
        (OSError(18, "Cross-device link", "a", None, "b"), 2, "x.py: b: Cross-device link"),
        (KeyboardInterrupt(), 130, "x.py: stopped, go on"),
        (RuntimeError("CUDNN_STATUS_ALLOC_FAILED"), 2, "x.py: out of memory: "),
        (torch.OutOfMemoryError("CUDA"), 2, "lower --batch_size (training: --images_per_batch), or take another"),
    ],
)
def test_what_a_user_can_mend_is_one_line(capsys, monkeypatch, error, code, line):
    assert align.run_script("x.py", Mock(side_effect=error), "stopped, go on") == code
    assert line in error_of(capsys)
    monkeypatch.setenv("RANK", "1")
    assert align.run_script("x.py", Mock(side_effect=error), "stopped, go on") == code
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert line in error_of(capsys)  # before the processes know of each other
    assert align.run_script("x.py", Mock(side_effect=error), "stopped, go on") == code
    met_by_all = isinstance(error, (InputError, KeyboardInterrupt))  # a full memory or disk is one process's own
    assert (capsys.readouterr().err == "") == met_by_all


@pytest.mark.parametrize("error", [OSError("no number"), RuntimeError("gloo, igloo"), ValueError("x"), MemoryError()])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        align.run_script("x.py", Mock(side_effect=error), "stopped")


# ---- the detector, with weights of the right shapes that find something


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    home = tmp_path_factory.mktemp("torch_home")
    write_detector_weights(home)
    return home


def test_the_detector_gives_face_alignments_own_landmarks_of_the_main_face(weights, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(weights))
    benchmark = torch.backends.cudnn.benchmark
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # PyTorch's threads wait busily, which is slow where others compute too
    detector, package = align.FaceDetector("cpu"), sys.modules["face_alignment"]
    other = package.FaceAlignment(package.LandmarksType.TWO_D, device="cpu", flip_input=False, compile=False)
    image = cv2.resize(data.astronaut(), (160, 128))
    points, several = detector(image)
    assert (points.shape, points.dtype, several) == ((68, 2), np.float64, True)
    every, _, boxes = other.get_landmarks_from_image(image, return_bboxes=True)  # which looks for the faces itself
    main, _ = align.main_face(np.array(boxes)[:, :4], image.shape)
    reference = every[[np.array_equal(box[:4], main) for box in boxes].index(True)]
    np.testing.assert_allclose(points, reference, atol=1e-3)
    large = cv2.resize(image, (2560, 2048), interpolation=cv2.INTER_NEAREST)
    monkeypatch.setattr(align, "DETECTION_SIZE", 160)  # as a photograph of 20,000 pixels at the usual size
    np.testing.assert_allclose((detector(large)[0] + 0.5) / 16 - 0.5, points, atol=1e-3)
    assert detector(image[:20]) == (None, False)
    assert torch.backends.cudnn.benchmark == benchmark
    torch.set_num_threads(threads)


def test_the_largest_most_central_face_is_taken_and_a_rival_noticed():
    shape = (1000, 1000, 3)
    central, larger_at_edge, small = [400, 400, 600, 600], [0, 0, 230, 230], [480, 480, 520, 520]
    boxes = np.array([small, larger_at_edge, central], float)
    box, several = align.main_face(boxes, shape)
    assert (box.tolist(), several) == (central, True)
    box, several = align.main_face(boxes[[0, 2]], shape)
    assert (box.tolist(), several) == (central, False)
    assert align.main_face(np.array([central, [0, 0, 900, 900]], float), shape)[0].tolist() == [0, 0, 900, 900]
    assert align.main_face(np.zeros((0, 4)), shape) == (None, False)


def test_detection_is_done_once(tmp_path, stand_in):
    rng = np.random.default_rng(0)
    for i in range(6):
        picture = rng.integers(0, 10 if i == 2 else 256, (201 if i == 1 else 200, 200, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    write_input(tmp_path, {"a": [f"{i}.png" for i in range(6)]}, {})
    flags = [flag for flag in arguments(tmp_path, tmp_path, "--device", "cpu") if "landmarks" not in flag]
    for calls, more in ((7, []), (2, []), (7, ["--realign"])):  # those without a face are tried again
        stand_in.clear()
        assert align.main([*flags, *more]) == 0
        assert len(stand_in) == calls
        entries = json.loads((tmp_path / "crops" / "alignment_report.json").read_text())["photographs"]
        assert entries[2]["status"] == "no face"
        assert [entry["flag"] for entry in entries] == ["", "several faces", "", "", "", ""]
        mapping = json.loads((tmp_path / "aligned.json").read_text())
        assert mapping == {"a": [f"crops/a/{i}.png" for i in (0, 1, 3, 4, 5)]}
        assert all(entry["eyes"] == 35.2 for entry in entries if entry["crop"])


def detection_error(tmp_path, photos, capsys):
    flags = [f for f in arguments(photos, tmp_path, "--device", "cpu") if "landmarks" not in f]
    assert align.main(flags) == 2
    assert not (tmp_path / "aligned.json").exists()
    return error_of(capsys)


def test_weights_that_cannot_be_had_are_explained_in_one_line(tmp_path, photos, monkeypatch, capsys, weights):
    def offline(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "hub" / "checkpoints"
    for content in (None, b"<html>Not found</html>", b""):
        if content is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "s3fd-619a316812.pth").write_bytes(content)
        error = detection_error(tmp_path, photos, capsys)
        for part in ("s3fd-619a316812.pth", "2DFAN4-11f355bf06.pth.tar", "https://", str(folder), "--landmarks"):
            assert part in error


OLD = """
from enum import Enum
class LandmarksType(Enum): {} = 1
class FaceAlignment:
    def __init__(self, kind, device): 0
"""


@pytest.mark.parametrize(
    "text", ["import not_there", "raise ImportError('libGL')", OLD.format("_2D"), OLD.format("TWO_D")]
)
def test_another_face_alignment_is_explained_in_one_line(tmp_path, photos, monkeypatch, capsys, text):
    (tmp_path / "face_alignment.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "face_alignment", raising=False)
    error = detection_error(tmp_path, photos, capsys)
    monkeypatch.delitem(sys.modules, "face_alignment", raising=False)
    installed = importlib.metadata.version("face-alignment")
    for part in ("face-alignment 1.5 or later", installed, 'pip install "face-alignment>=1.5"', "--landmarks"):
        assert part in error

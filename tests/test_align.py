import csv
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
import zlib
from pathlib import Path
from urllib.error import URLError

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from skimage.transform import SimilarityTransform

import align
from tests.synthetic import write_photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 2, 3, seed=5)
    return folder


def arguments(photos, out, *more):
    return [
        *("--id_to_images", f"{photos}/id_to_images.json", "--landmarks", f"{photos}/landmarks.json"),
        *("--aligned_folder", f"{out}/crops", "--aligned_json", f"{out}/aligned.json", *more),
    ]


# ---- geometry


def test_five_points_of_68():
    points = np.arange(136, dtype=float).reshape(68, 2)
    five = align.five_points(points)
    assert five.tolist() == [[77, 78], [89, 90], [60, 61], [96, 97], [108, 109]]
    assert align.five_points(five.tolist()).tolist() == five.tolist()


@pytest.mark.parametrize("points", [[[1, 2]] * 4, [[1, 2, 3]] * 5, [[1, float("inf")]] * 5, "abc", [[1, "x"]] * 5])
def test_wrong_landmarks_are_refused(points):
    with pytest.raises((ValueError, TypeError)):
        align.five_points(points)


@pytest.mark.parametrize("seed", range(20))
def test_similarity_equals_scikit_images(seed):
    rng = np.random.default_rng(seed)
    source = rng.normal(0, 100, (5, 2))
    if seed % 2:  # a mirrored face: a reflection would fit, but must not be used
        source = align.TEMPLATE * [-3, 3] + rng.normal(0, 5, (5, 2))
    reference = SimilarityTransform.from_estimate(source, align.TEMPLATE).params[:2]
    matrix = align.similarity_transform(source, align.TEMPLATE)
    np.testing.assert_allclose(matrix, reference, atol=1e-6)
    assert np.linalg.det(matrix[:, :2]) > 0


def test_coinciding_landmarks_are_refused():
    with pytest.raises(ValueError, match="coincide"):
        align.similarity_transform(np.ones((5, 2)), align.TEMPLATE)


def test_a_face_in_template_position_is_copied_exactly():
    image = np.random.default_rng(0).integers(0, 256, (150, 140, 3), np.uint8)
    np.testing.assert_array_equal(align.align_face(image, align.TEMPLATE), image[:112, :112])
    shifted = align.align_face(image, align.TEMPLATE + np.array([10, 20]))
    np.testing.assert_array_equal(shifted, image[20:132, 10:122])


def waves(x, y):
    """A smooth pattern in crop coordinates, (H, W, 3) in 0..255."""
    return np.stack([128 + 100 * np.sin(x / 9 + k) * np.cos(y / 11 - k) for k in range(3)], -1)


@pytest.mark.parametrize(("scale", "angle"), [(0.7, 0.3), (1.0, -0.5), (2.5, 1.0), (4.0, 0.1), (9.3, -2.0)])
def test_any_size_and_rotation_gives_the_same_crop(scale, angle):
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    half = int(scale * 90)
    move = np.array([half, half]) - turn @ [56, 56]
    yy, xx = np.mgrid[: 2 * half, : 2 * half]
    back = np.linalg.inv(turn)
    u, v = (back @ (np.stack([xx.ravel(), yy.ravel()]) - move[:, None])).reshape(2, *xx.shape)
    image = waves(u, v).round().astype(np.uint8)
    crop = align.align_face(image, align.TEMPLATE @ turn.T + move)
    y, x = np.mgrid[:112, :112]
    assert np.abs(crop - waves(x, y)).mean() < 1.2


def crop_of_pattern(size, pattern):
    """(align_face's crop, plain bilinear warp, supersampled reference) of pattern(x, y) at `size` times the crop."""
    side = int(112 * size)
    y, x = (np.mgrid[:side, :side] + 0.5) / size - 0.5
    image = np.repeat(pattern(x, y)[:, :, None], 3, 2).round().astype(np.uint8)
    points = (align.TEMPLATE + 0.5) * size - 0.5
    crop = align.align_face(image, points)
    naive = cv2.warpAffine(image, align.similarity_transform(points, align.TEMPLATE), (112, 112))
    grid = (np.arange(112 * 16) + 0.5) / 16 - 0.5
    reference = pattern(*np.meshgrid(grid, grid)).reshape(112, 16, 112, 16).mean((1, 3))
    return crop[:, :, 0].astype(float), naive[:, :, 0].astype(float), reference


@pytest.mark.parametrize("size", [3.3, 6.5, 10.7])
def test_error_against_a_supersampled_reference_falls_threefold(size):
    """Rings whose frequency rises to 0.9 of what the photograph can hold, far beyond the crop's resolution."""
    highest = 0.9 * np.pi * size  # radians per crop pixel

    def rings(x, y):
        return 128 + 100 * np.cos(highest / 2 / 80 * ((x - 55.5) ** 2 + (y - 55.5) ** 2))

    crop, naive, reference = crop_of_pattern(size, rings)
    assert np.sqrt(((naive - reference) ** 2).mean()) > 3 * np.sqrt(((crop - reference) ** 2).mean())


@pytest.mark.parametrize("size", [0.4, 0.8, 1.0, 1.3])
def test_small_faces_are_sampled_once_and_not_blurred(size):
    crop, naive, _ = crop_of_pattern(size, lambda x, y: 128 + 100 * np.cos(x * size) * np.cos(y * size))
    np.testing.assert_array_equal(crop, naive)


def test_large_faces_are_reduced_without_aliasing():
    """A pattern far above the crop's resolution must become grey; plain bilinear sampling keeps its contrast."""
    size = 12 * 112
    yy, xx = np.mgrid[:size, :size]
    image = np.repeat((128 + 100 * np.sin(2 * np.pi * (xx + yy) / 5.3))[:, :, None], 3, 2).astype(np.uint8)
    points = (align.TEMPLATE + 0.5) * 12 - 0.5
    crop = align.align_face(image, points).astype(float)
    naive = cv2.warpAffine(image, align.similarity_transform(points, align.TEMPLATE), (112, 112)).astype(float)
    assert crop.std() * 10 < naive.std()


# ---- photographs


def encode(image, kind):
    """(bytes, file name) of an RGB image in some format."""
    buffer, photo = io.BytesIO(), Image.fromarray(image)
    if kind == "16 bit":
        ok, png = cv2.imencode(".png", image[:, :, 0].astype(np.uint16) * 257)
        assert ok
        return png.tobytes(), "x.png"
    modes = {"grey": "L", "alpha": "RGBA", "cmyk": "CMYK", "rgb": "RGB"}
    form = "JPEG" if kind == "cmyk" else "PNG"
    photo = photo.quantize(256) if kind == "palette" else photo.convert(modes[kind])
    photo.save(buffer, form, **({"quality": 98} if form == "JPEG" else {}))
    return buffer.getvalue(), f"Ü {kind}.{form.upper()}"


@pytest.mark.parametrize("kind", ["rgb", "grey", "palette", "alpha", "cmyk", "16 bit"])
def test_all_kinds_of_images_become_rgb(tmp_path, kind):
    grey = np.repeat(np.linspace(0, 255, 64 * 48).reshape(64, 48, 1), 3, 2).astype(np.uint8)
    content, name = encode(grey, kind)
    (tmp_path / name).write_bytes(content)
    image = align.read_photo(tmp_path / name)
    assert image.shape == (64, 48, 3)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - grey).mean() < 3


def test_exif_orientation_is_honoured(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to stand upright
    image.save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(align.read_photo(tmp_path / "x.png"), np.array(image.rotate(270, expand=True)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_are_honoured_also_in_reduced_reads(tmp_path, orientation):
    turns = [None, *(Image.Transpose(i) for i in (0, 3, 1, 5, 4, 6, 2))]  # from stored to upright, by the EXIF standard
    ramp = np.add.outer(np.arange(480.0), 1.5 * np.arange(1600)) / 12
    upright = Image.fromarray(np.stack([ramp, ramp.max() - ramp, ramp / 2], -1).astype(np.uint8))
    back = {
        Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
        Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
    }
    turn = turns[orientation - 1]
    stored = upright if turn is None else upright.transpose(back.get(turn, turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.JPG", quality=95, exif=exif)
    for scale in (1, 2, 4, 8):
        photo = align.decode(tmp_path / "x.JPG", scale)
        assert photo.size == (1600, 480)
        assert photo.scale == scale
        assert photo.pixels.shape == (480 // scale, 1600 // scale, 3)
        reference = np.array(upright.resize((1600 // scale, 480 // scale), Image.Resampling.BOX))
        assert np.abs(photo.pixels.astype(int) - reference).mean() < 1.5


def test_the_detector_sees_about_1280_pixels(tmp_path):
    for size, scale in (((4288, 2848), 4), ((2848, 4288), 4), ((1919, 900), 1), ((1920, 900), 2), ((12000, 800), 8)):
        Image.new("RGB", size).save(tmp_path / "x.jpg")
        assert align.decode(tmp_path / "x.jpg").scale == scale
        Image.new("L", size).save(tmp_path / "x.png")
        assert align.decode(tmp_path / "x.png").scale == 1


def test_points_move_between_scales_by_pixel_centres():
    moved = align.move_points(np.array([[0.0, 0.0], [1071.0, 711.0]]), (1072, 712), (4287, 2847))
    np.testing.assert_allclose(
        moved, [[0.5 * 4287 / 1072 - 0.5, 0.5 * 2847 / 712 - 0.5], [4286 - 1.4995, 2846 - 1.4993]], atol=1e-3
    )


@pytest.mark.parametrize(("eyes", "scale"), [(600, 8), (300, 4), (279, 2), (139, 1), (40, 1)])
def test_a_photograph_is_decoded_as_finely_as_its_crop_needs(tmp_path, monkeypatch, eyes, scale):
    """Both with given landmarks, where it is decoded once, and with detected ones, again only where it must be."""
    decoded, decode = [], align.decode
    monkeypatch.setattr(align, "decode", lambda *args: decoded.append(decode(*args)) or decoded[-1])
    Image.new("RGB", (4288, 2848), "red").save(tmp_path / "x.jpg")
    points = (align.TEMPLATE - 56) * eyes / 35.2377 + [2000, 1400]
    job = align.Job(str(tmp_path / "x.jpg"), tmp_path / "x.png", "a", points)
    (result,) = align.align_jobs([job])
    assert (result.status, result.scale, [photo.scale for photo in decoded]) == ("aligned", scale, [scale])
    decoded.clear()
    (result,) = align.align_jobs([job._replace(landmarks=None)], lambda images: [((points + 0.5) / 4 - 0.5, False)])
    assert (result.status, result.scale) == ("aligned", min(scale, 4))
    assert [photo.scale for photo in decoded] == ([4] if scale >= 4 else [4, scale])
    assert result.eyes == pytest.approx(eyes, abs=0.1)


def test_the_largest_most_central_face_is_taken_and_a_rival_noticed():
    shape = (1000, 1000, 3)
    central, larger_at_edge, small = [400, 400, 600, 600], [0, 0, 230, 230], [480, 480, 520, 520]
    boxes = np.array([small, larger_at_edge, central], float)
    box, several = align.main_face(boxes, shape)
    assert (box.tolist(), several) == (central, True)
    box, several = align.main_face(boxes[[0, 2]], shape)
    assert (box.tolist(), several) == (central, False)
    huge = [0, 0, 900, 900]
    assert align.main_face(np.array([central, huge], float), shape)[0].tolist() == huge
    assert align.main_face(np.zeros((0, 4)), shape) == (None, False)


def dlib_landmarks(image):
    """68 landmarks of the uppermost face of an RGB image, by dlib's networks (a test-only oracle)."""
    import dlib

    # face_recognition_models cannot be imported without pkg_resources; only its data files are needed.
    folder = Path(importlib.util.find_spec("face_recognition_models").submodule_search_locations[0]) / "models"
    faces = dlib.get_frontal_face_detector()(image, 1)
    face = min(faces, key=lambda face: face.top())  # lower down, dlib takes a badge on her suit for a face
    shape = dlib.shape_predictor(str(folder / "shape_predictor_68_face_landmarks.dat"))(image, face)
    return np.array([[p.x, p.y] for p in shape.parts()], float)


def test_a_real_face_lands_on_the_template(tmp_path):
    image = data.astronaut()
    landmarks = dlib_landmarks(image)
    matrix = align.similarity_transform(align.five_points(landmarks), align.TEMPLATE)
    reference = SimilarityTransform.from_estimate(align.five_points(landmarks), align.TEMPLATE).params[:2]
    np.testing.assert_allclose(matrix, reference, atol=1e-6)

    Image.fromarray(image).save(tmp_path / "astronaut.png")
    (tmp_path / "ids.json").write_text(json.dumps({"eileen": ["astronaut.png"]}))
    (tmp_path / "landmarks.json").write_text(json.dumps({"astronaut.png": landmarks.tolist()}))
    flags = f"--id_to_images {tmp_path}/ids.json --landmarks {tmp_path}/landmarks.json"
    assert (
        align.main([*flags.split(), "--aligned_folder", f"{tmp_path}/c", "--aligned_json", f"{tmp_path}/a.json"]) == 0
    )
    crop = np.array(Image.open(tmp_path / "c" / "eileen" / "astronaut.png"))
    # Her eyes are found again in the crop, by dlib, where the template has them.
    again = align.five_points(dlib_landmarks(cv2.resize(crop, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)) / 4)
    assert np.linalg.norm(again - align.TEMPLATE, axis=1).mean() < 6
    mapped = align.five_points(landmarks) @ matrix[:, :2].T + matrix[:, 2]
    assert np.linalg.norm(mapped - align.TEMPLATE, axis=1).mean() < 6


def test_one_face_gives_one_crop_in_every_orientation_size_and_format(tmp_path):
    image = data.astronaut()
    points = align.five_points(dlib_landmarks(image))
    reference = align.align_face(image, points).astype(int)

    def crop_of(picture, landmarks, name, **options):
        picture.save(tmp_path / name, **options)
        (result,) = align.align_jobs([align.Job(str(tmp_path / name), tmp_path / "crop.png", "a", landmarks)])
        assert result.status == "aligned", result
        return np.array(Image.open(tmp_path / "crop.png")).astype(int)

    photo = Image.fromarray(image)
    for scale in (0.25, 0.5, 1, 2, 4, 8):
        size = round(512 * scale), round(512 * scale)
        sized = photo.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
        moved = align.move_points(points, (512, 512), size)
        if scale < 0.5:  # fewer pixels than the crop: only like itself
            assert np.abs(crop_of(sized, moved, "x.png") - reference).mean() < 12
            continue
        for name, options in (("x.png", {}), ("Ü.JPG", {"quality": 98, "subsampling": 0}), ("x.webp", {"quality": 98})):
            assert np.abs(crop_of(sized, moved, name, **options) - reference).mean() < 3, (scale, name)
    turns = [None, *(Image.Transpose(i) for i in (0, 3, 1, 5, 2, 6, 4))]  # from upright to stored
    for orientation, turn in enumerate(turns, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = photo if turn is None else photo.transpose(turn)
        assert np.abs(crop_of(stored, points, "x.tif", exif=exif) - reference).mean() < 0.01, orientation
    grey = np.array(photo.convert("L"))
    grey_reference = align.align_face(np.repeat(grey[:, :, None], 3, 2), points).astype(int)
    for kind in ("rgb", "grey", "palette", "alpha", "cmyk", "16 bit"):
        content, name = encode(np.repeat(grey[:, :, None], 3, 2), kind)
        assert np.abs(crop_of(Image.open(io.BytesIO(content)), points, name) - grey_reference).mean() < 3, kind


# ---- names


def test_hostile_ids_stay_inside_and_apart():
    names = [
        "../../x",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b",
        "a_b",
        "a\0b",
        "con",
        "NUL.txt",
        "x" * 300,
        "é" * 60,
        "C:\\x",
    ]
    names += ["Anna", "anna", "ANNA", " a", "a ", "a.", "-rf", "\ud800", "日本", "_~cdb4ee2aea69"]
    names += ["Ren\u00e9", "Rene\u0301", "alignment_report.json", "Alignment_sheet.png"]
    safe = align.safe_names(names)
    assert len({unicodedata.normalize("NFC", name.casefold()) for name in safe.values()}) == len(names)
    for name in safe.values():
        assert 0 < len(name.encode()) <= 255
        assert Path(name).name == name
        assert not set(name) & set('/\\\0:*?"<>|')
        assert name not in (".", "..")
        assert name.split(".")[0].lower() not in ("con", "nul", "alignment_report", "alignment_sheet")
    assert safe["日本"] == "日本"
    for name in ("90001", "A b-1", "550e8400-e29b-41d4-a716-446655440000", "x#1 [2] & co!"):
        assert align.safe_names([name]) == {name: name}
    assert align.safe_names(reversed(names)) == safe


def test_sources_with_one_stem_get_two_files():
    plan = align.plan_crops({"a": ["x/1.jpg", "y/1.png", "y/2.png", "x/1.jpg"]}, "out")
    paths = [target.as_posix() for _, target in plan["a"]]
    assert len(set(paths)) == len(paths) == 3
    assert paths[2] == "out/a/2.png"
    assert plan == {"a": align.plan_crops({"a": ["y/2.png", "y/1.png", "x/1.jpg"]}, "out")["a"][::-1]}


def test_crop_names_survive_a_move_of_the_data_set():
    plans = []
    for home in ("/a", "/other/place"):
        plan = align.plan_crops({"a": [f"{home}/x/1.jpg", f"{home}/y/1.jpg"]}, "out", home)
        plans.append([target for _, target in plan["a"]])
    assert plans[0] == plans[1]
    assert len(set(plans[0])) == 2


def test_nothing_is_written_outside_the_folder(tmp_path, photos):
    images = json.loads((photos / "id_to_images.json").read_text())
    hostile = {f"../../{name}": [str(photos / p) for p in paths] for name, paths in images.items()}
    out = tmp_path / "deep" / "er"
    out.mkdir(parents=True)
    (out / "ids.json").write_text(json.dumps(hostile))
    flags = arguments(photos, out)
    flags[1] = str(out / "ids.json")
    assert align.main(flags) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["er"]
    assert list(json.loads((out / "aligned.json").read_text())) == list(hostile)


# ---- the stage


def report_of(folder):
    return json.loads((folder / "crops" / "alignment_report.json").read_text())


def test_the_stage_writes_crops_mapping_and_report(tmp_path, photos, capsys):
    assert align.main(arguments(photos, tmp_path)) == 0
    mapping = json.loads((tmp_path / "aligned.json").read_text())
    source = json.loads((photos / "id_to_images.json").read_text())
    assert {k: len(v) for k, v in mapping.items()} == {k: len(v) for k, v in source.items()}
    for identity, crops in mapping.items():
        assert crops == [f"crops/{identity}/{Path(p).stem}.png" for p in source[identity]]
        for crop in crops:
            image = Image.open(tmp_path / crop)
            assert (image.mode, image.size) == ("RGB", (112, 112))
    report = report_of(tmp_path)
    assert {entry["status"] for entry in report["photographs"]} == {"aligned"}
    assert all(
        0 < entry["residual"] < 8 and entry["eyes"] > 35 and entry["scale"] == 1 for entry in report["photographs"]
    )
    assert report["totals"] == {"aligned": 12}
    assert report["crops_per_id"] == dict.fromkeys(source, 3)
    with open(tmp_path / "crops" / "alignment_report.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["crop"] for row in rows] == [entry["crop"] for entry in report["photographs"]]
    assert float(rows[0]["residual"]) == report["photographs"][0]["residual"]
    out = capsys.readouterr().out
    assert "12 photographs of 4 people: 12 aligned" in out
    assert "crops per person: 3 to 3" in out


def test_crops_are_rgb_not_bgr(tmp_path):
    Image.new("RGB", (200, 200), (250, 10, 10)).save(tmp_path / "red.png")
    (tmp_path / "id_to_images.json").write_text(json.dumps({"a": ["red.png"]}))
    (tmp_path / "landmarks.json").write_text(json.dumps({"red.png": (align.TEMPLATE + 20).tolist()}))
    assert align.main(arguments(tmp_path, tmp_path)) == 0
    assert Image.open(tmp_path / "crops" / "a" / "red.png").getpixel((50, 50)) == (250, 10, 10)


def test_done_work_is_not_repeated_and_changes_are_noticed(tmp_path, photos, capsys):
    for name in ("id_to_images.json", "landmarks.json"):
        (tmp_path / name).write_bytes((photos / name).read_bytes())
    (tmp_path / "photos").mkdir()
    for photo in (photos / "photos").iterdir():
        (tmp_path / "photos" / photo.name).write_bytes(photo.read_bytes())

    def totals(*more):
        assert align.main(arguments(tmp_path, tmp_path, *more)) == 0
        facts.append(
            [[e[k] for k in ("residual", "eyes", "scale", "flag")] for e in report_of(tmp_path)["photographs"]]
        )
        return capsys.readouterr().out.splitlines()[0].split(": ")[1]

    facts = []

    assert totals() == "12 aligned"
    crops = {p: p.stat().st_mtime_ns for p in (tmp_path / "crops").glob("*/*.png")}
    assert totals() == "12 already done"
    assert facts[0] == facts[1]
    assert crops == {p: p.stat().st_mtime_ns for p in crops}
    os.utime(tmp_path / "photos" / "family00A_0.jpg")  # as after an edit
    assert totals() == "1 aligned, 11 already done"
    landmarks = json.loads((tmp_path / "landmarks.json").read_text())
    landmarks["photos/family01B_2.jpg"][0][0] += 3
    (tmp_path / "landmarks.json").write_text(json.dumps(landmarks))
    assert totals() == "11 already done, 1 aligned"
    (tmp_path / "crops" / "family00A" / "family00A_1.png").write_bytes(b"\x89PNG broken")
    assert totals() == "11 already done, 1 aligned"
    assert totals("--realign") == "12 aligned"


def test_a_photograph_that_fails_in_an_odd_way_does_not_end_the_run(tmp_path, photos, monkeypatch):
    import struct

    decode = align.decode

    def damaged(path, scale=None):
        if path.endswith("family00A_0.jpg"):
            raise struct.error("unpack requires a buffer of 4 bytes")
        return decode(path, scale)

    monkeypatch.setattr(align, "decode", damaged)
    assert align.main(arguments(photos, tmp_path)) == 0
    assert [len(crops) for crops in json.loads((tmp_path / "aligned.json").read_text()).values()] == [2, 3, 3, 3]


def test_mapping_does_not_depend_on_workers(tmp_path, photos):
    for workers in ("1", "5"):
        (tmp_path / workers).mkdir()
        assert align.main(arguments(photos, tmp_path / workers, "--max_workers", workers)) == 0
    one, five = ((tmp_path / w / "aligned.json").read_bytes() for w in ("1", "5"))
    assert one == five


def test_only_the_people_of_the_pairs(tmp_path, photos):
    (tmp_path / "pairs.json").write_text('[["family01B", "family01A"]]')
    assert align.main(arguments(photos, tmp_path, "--pairs", f"{tmp_path}/pairs.json")) == 0
    assert list(json.loads((tmp_path / "aligned.json").read_text())) == ["family01B", "family01A"]


def png_of(width, height, *extra):
    """A PNG of that size in its header, with at most one more chunk (type, content) and no pixels."""
    chunks = [(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0")]
    chunks += [extra] if extra else []
    chunks.append((b"IEND", b""))
    body = b"".join(len(c).to_bytes(4, "big") + t + c + zlib.crc32(t + c).to_bytes(4, "big") for t, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def test_bad_photographs_are_reported_and_left_out(tmp_path, photos, capsys):
    good = str(photos / "photos" / "family00A_0.jpg")
    names = [
        "empty.jpg",
        "truncated.jpg",
        "folder.jpg",
        "missing.jpg",
        "text.jpg",
        "fifo.jpg",
        "unlisted.jpg",
        "flat.jpg",
        "zero.jpg",
        "bomb.png",
        "text bomb.png",
        "profile.jpg",
        "tiny.jpg",
        "outside.jpg",
    ]
    content = Path(good).read_bytes()
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "bomb.png").write_bytes(png_of(30000, 30000))
    (tmp_path / "text bomb.png").write_bytes(png_of(64, 64, b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000))))
    for name in ("unlisted", "flat", "profile", "tiny", "outside"):
        (tmp_path / f"{name}.jpg").write_bytes(content)
    points = json.loads((photos / "landmarks.json").read_text())["photos/family00A_0.jpg"]
    landmarks = {name: points for name in [*names, "gone.jpg", good] if name != "unlisted.jpg"}
    landmarks["flat.jpg"] = [[150, 150]] * 5
    landmarks["tiny.jpg"] = (align.TEMPLATE / 4 + 100).tolist()
    landmarks["profile.jpg"] = (align.TEMPLATE * [0.4, 1] + 100).tolist()
    landmarks["outside.jpg"] = (align.TEMPLATE * 10 + 400).tolist()
    (tmp_path / "id_to_images.json").write_text(json.dumps({"a": [*names, good], "b": ["gone.jpg"], "c": []}))
    (tmp_path / "landmarks.json").write_text(json.dumps(landmarks))
    assert align.main(arguments(tmp_path, tmp_path)) == 0
    mapping = json.loads((tmp_path / "aligned.json").read_text())
    assert mapping == {"a": ["crops/a/family00A_0.png"], "b": [], "c": []}
    report = report_of(tmp_path)["photographs"]
    unreadable = "empty.jpg truncated.jpg folder.jpg missing.jpg text.jpg fifo.jpg gone.jpg zero.jpg bomb.png"
    assert {Path(e["source"]).name: e["status"] for e in report} == {
        **dict.fromkeys([*unreadable.split(), "text bomb.png"], "unreadable"),
        "unlisted.jpg": "no landmarks",
        "flat.jpg": "too small",
        "tiny.jpg": "too small",
        "profile.jpg": "poor fit",
        "outside.jpg": "poor fit",
        "family00A_0.jpg": "aligned",
    }
    assert all("\n" not in entry["reason"] for entry in report)
    (bomb,) = (entry for entry in report if entry["source"].endswith("/bomb.png"))
    assert "decompression bomb" in bomb["reason"]
    out = capsys.readouterr().out
    assert "2 people have no crop" in out
    assert "and 10 more" in out
    with Image.open(tmp_path / "crops" / "alignment_sheet.png") as sheet:
        assert sheet.size == (10 * 120 + 8, 40 + 2 * 158 + 8)  # 16 photographs, ten in a row


def test_a_text_bomb_in_place_of_a_crop_is_replaced(tmp_path, photos):
    assert align.main(arguments(photos, tmp_path)) == 0
    crop = tmp_path / "crops" / "family00A" / "family00A_0.png"
    crop.write_bytes(png_of(112, 112, b"zTXt", b"alignment\0\0" + zlib.compress(bytes(50_000_000))))
    assert align.main(arguments(photos, tmp_path)) == 0
    assert report_of(tmp_path)["totals"] == {"aligned": 1, "already done": 11}


def test_the_sheet_begins_with_what_was_left_out_then_the_worst(tmp_path, monkeypatch):
    entries = []
    for number, residual in enumerate((1.0, 7.0, 3.0)):
        Image.new("RGB", (112, 112), (0, 0, 10 * number + 50)).save(tmp_path / f"{number}.png")
        entries.append(
            {"id": "é" * 30, "source": "x/\ud800\n.jpg", "crop": str(tmp_path / f"{number}.png"), "flag": ""}
        )
        entries[-1] |= {"status": "aligned", "residual": residual}
    Image.new("RGB", (50, 400), "red").save(tmp_path / "left.png")
    entries.append({"id": "a", "source": str(tmp_path / "left.png"), "crop": None, "flag": "", "status": "no face"})
    entries[-1]["residual"] = None
    sheet = align.contact_sheet(entries)
    colours = [sheet.getpixel((8 + 120 * i + 56, 40 + 56)) for i in range(4)]
    assert colours == [(255, 0, 0), (0, 0, 60), (0, 0, 70), (0, 0, 50)]
    monkeypatch.setattr(align, "SHEET_LIMIT", 2)
    assert align.contact_sheet(entries * 10).size[1] == 40 + 158 + 8


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.08, 0.2])
def test_killed_at_any_moment_the_next_run_completes(tmp_path, photos, delay):
    """SIGKILL some time after the first crop; the first run's mapping stays whole, leftovers do no harm."""
    assert align.main(arguments(photos, tmp_path)) == 0
    whole = (tmp_path / "aligned.json").read_bytes()
    command = [sys.executable, align.__file__, *arguments(photos, tmp_path, "--realign")]
    crops = tmp_path / "crops"
    before = {path: path.stat().st_mtime_ns for path in crops.rglob("*.png")}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None and before == {path: path.stat().st_mtime_ns for path in before if path.exists()}:
            time.sleep(0.001)
        time.sleep(delay)
        run.send_signal(signal.SIGKILL)
    assert (tmp_path / "aligned.json").read_bytes() == whole
    (crops / "family00A" / ".99999.family00A_0.png").write_bytes(b"half")
    assert align.main(arguments(photos, tmp_path)) == 0
    assert (tmp_path / "aligned.json").read_bytes() == whole
    assert all(Image.open(tmp_path / path).size == (112, 112) for ps in json.loads(whole).values() for path in ps)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"landmarks.json": "{}"}, "landmarks.json: expected"),
        ({"landmarks.json": '{"photos/family00A_0.jpg": [[1, 2]]}'}, "landmarks of 'photos/family00A_0.jpg'"),
        ({"landmarks.json": '{"other.jpg": [[1,1],[2,2],[3,3],[4,4],[5,5]]}'}, "no photograph of"),
        ({"id_to_images.json": "[]"}, "id_to_images.json: expected"),
        ({"id_to_images.json": '{"a": ["photos/nothing.jpg"]}', "landmarks.json": None}, "not one photograph gave"),
        ({"id_to_images.json": '{"a": ["x.jpg"], "b": ["./x.jpg"]}'}, "x.jpg is listed under 'a' and 'b'"),
        ({"pairs.json": '[["family00A", "nobody"]]'}, "1 IDs of the pairs are not in it, the first 'nobody'"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, photos, capsys, spoil, message):
    for name in ("id_to_images.json", "landmarks.json"):
        (tmp_path / name).write_bytes((photos / name).read_bytes())
    for name, text in spoil.items():
        points = json.dumps({"photos/nothing.jpg": align.TEMPLATE.tolist()})
        (tmp_path / name).write_text(points if text is None else text)
    more = ["--pairs", f"{tmp_path}/pairs.json"] if "pairs.json" in spoil else []
    assert align.main(arguments(tmp_path, tmp_path, *more)) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("align.py: ")
    assert message in error
    assert not (tmp_path / "aligned.json").exists()


@pytest.mark.parametrize("flags", [["--max_workers", "0"], ["--device", "gpu"], ["--max_workers", "x"], ["--what"]])
def test_wrong_flags_are_one_line_and_exit_code_2(tmp_path, photos, capsys, flags):
    assert align.main(arguments(photos, tmp_path, *flags)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        align.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flags = "id_to_images aligned_folder aligned_json pairs landmarks max_workers device realign"
    assert all(f"--{flag} " in text for flag in flags.split())


# ---- the detector, with weights of the right shapes that find one face in the middle


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    from face_alignment.detection.sfd.net_s3fd import s3fd
    from face_alignment.models import FAN

    home = tmp_path_factory.mktemp("torch_home")
    (home / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    detector = s3fd()
    for name, parameter in detector.named_parameters():
        if "_mbox_" in name:
            torch.nn.init.zeros_(parameter)
        if name.endswith("mbox_conf.bias"):  # background everywhere but at the coarsest scale
            parameter.data[-1] = 5.0 if name.startswith("conv7_2") else -5.0
    torch.save(detector.state_dict(), home / "hub" / "checkpoints" / "s3fd-619a316812.pth")
    torch.save(FAN(4).state_dict(), home / "hub" / "checkpoints" / "2DFAN4-11f355bf06.pth.tar")
    return home


@pytest.fixture
def with_weights(weights, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(weights))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # PyTorch's threads wait busily, which is slow where others compute too
    yield
    torch.set_num_threads(threads)


def test_detector_loads_weights_and_returns_points_of_the_given_image(with_weights, monkeypatch):
    detector = align.FaceAlignmentDetector("cpu")
    small = cv2.resize(data.astronaut(), (200, 200))
    ((points, _),) = detector([small])
    assert points.shape == (68, 2)
    seen = {}
    monkeypatch.setattr(detector, "boxes", lambda images: [np.array([[300.0, 100, 600, 500]]), np.zeros((0, 4))])

    def landmarks(images, boxes):
        seen["shapes"], seen["boxes"] = [image.shape for image in images], [box.tolist() for box in boxes]
        return np.tile([99.5, 199.5], (1, 68, 1))

    monkeypatch.setattr(detector, "landmarks", landmarks)
    (points, _), nobody = detector([np.zeros((1920, 2560, 3), np.uint8), small])
    assert seen == {"shapes": [(960, 1280, 3)], "boxes": [[300, 100, 600, 500]]}
    np.testing.assert_allclose(points, np.tile([199.5, 399.5], (68, 1)))
    assert nobody == (None, False)


def test_boxes_and_landmarks_equal_those_of_face_alignment(with_weights):
    """In batches of mixed sizes, on random weights that find something; in bfloat16 about the same boxes."""
    detector = align.FaceAlignmentDetector("cpu")
    sfd, generator = detector.network.face_detector, torch.Generator().manual_seed(3)
    for name, parameter in sfd.face_detector.named_parameters():
        if name.endswith("mbox_loc.weight"):
            parameter.data.normal_(0, 0.001, generator=generator)
        elif name.endswith("mbox_conf.bias"):
            parameter.data.zero_()
            parameter.data[-1] = 4.0 if name.startswith("fc7") else -4.0
    images = [cv2.resize(data.astronaut(), (160, 128)), cv2.resize(data.chelsea(), (100, 190))]
    images += [images[0][::-1].copy(), images[0][:20]]
    found = detector.boxes(images)
    assert len(found[3]) == 0  # too small for the network
    references = [np.array(sfd.detect_from_image(image))[:, :4] for image in images[:3]]
    for boxes, reference in zip(found, references, strict=False):
        assert len(reference) > 2
        np.testing.assert_allclose(boxes, reference, atol=1e-2)
    points = detector.landmarks(images[:2], [found[0][0], found[1][0]])
    for image, boxes, mine in zip(images, found, points, strict=False):
        (reference,) = detector.network.get_landmarks_from_image(image, detected_faces=[boxes[0]])
        np.testing.assert_allclose(mine, reference, atol=1e-4)
    detector.half = True
    for boxes, reference in zip(detector.boxes(images[1:2]), references[1:2], strict=True):  # in some other order
        assert np.abs(boxes[:, None] - reference[None]).max(-1).min(1).max() < 8


class StandIn:
    """A detector without a network: a face in the middle of every photograph; says who it runs with."""

    def __init__(self, device):
        if "STAND_IN" in os.environ:
            (Path(os.environ["STAND_IN"]) / f"{os.getpid()}").write_text(f"{torch.get_num_threads()}")

    def __call__(self, images):
        batches.append(len(images))
        return [(align.TEMPLATE + np.array(image.shape[1::-1]) / 2 - 56, image.shape[0] % 2 == 1) for image in images]


batches = []
start_worker = align._start_worker


def start_stand_in(threads):
    """The initializer of a worker process whose detector is the stand-in."""
    align.FaceAlignmentDetector = StandIn
    start_worker(threads)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(align, "FaceAlignmentDetector", StandIn)
    monkeypatch.setattr(align, "_start_worker", start_stand_in)
    batches.clear()


def many_photos(folder, n, height=200):
    for i in range(n):
        Image.new("RGB", (200, height), (i, 2 * i, 3 * i)).save(folder / f"{i}.png")
    return {"a": [str(folder / f"{i}.png") for i in range(n)]}


def test_detection_on_the_cpu_by_as_many_processes_as_max_workers_says(stand_in, tmp_path, monkeypatch):
    (tmp_path / "log").mkdir()
    monkeypatch.setenv("STAND_IN", str(tmp_path / "log"))
    _, report = align.align_images(many_photos(tmp_path, 5), tmp_path / "crops", max_workers=2)
    assert [entry["status"] for entry in report] == ["aligned"] * 5
    threads = {path.name: int(path.read_text()) for path in (tmp_path / "log").iterdir()}
    del threads[str(os.getpid())]
    assert set(threads.values()) == {max(1, os.cpu_count() // 2)}
    assert len(threads) == 2
    assert not batches  # nothing was detected in this process


def test_detection_on_cuda_takes_batches_and_flags_stay_on_record(stand_in, tmp_path):
    images = many_photos(tmp_path, 19, height=201)
    for status in ("aligned", "already done"):
        mapping, report = align.align_images(images, tmp_path / "crops", device="cuda:0", max_workers=3)
        assert {(e["status"], e["flag"], e["residual"], e["eyes"]) for e in report} == {
            (status, "several faces", 0, 35.2)
        }
        assert [Path(crop).stem for crop in mapping["a"]] == [str(i) for i in range(19)]
    assert sorted(batches) == [3, 8, 8]


def test_photographs_without_a_face_are_not_looked_at_again(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(StandIn, "__call__", lambda self, images: batches.append(1) or [(None, False)] * len(images))
    (tmp_path / "ids.json").write_text(json.dumps(many_photos(tmp_path, 2)))
    photos = align.read_id_to_images(tmp_path / "ids.json")
    for realign in (False, False, True):
        mapping, report = align.align_images(photos, tmp_path / "crops", None, "cuda", realign=realign)
        align.write_report(tmp_path / "crops", mapping, report)
        assert [entry["status"] for entry in report] == ["no face"] * 2
    assert len(batches) == 2


def test_workers_end_with_a_killed_parent(tmp_path):
    code = (
        "import align, os, time\nfrom concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\nfrom tests.test_align import start_stand_in\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, get_context('spawn'), start_stand_in, (1,))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n    time.sleep(100)\n"
    )
    (tmp_path / "run.py").write_text(code)
    root = str(Path(align.__file__).parent)
    command, env = [sys.executable, tmp_path / "run.py"], os.environ | {"PYTHONPATH": root}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as run:
        worker = int(run.stdout.readline())
        run.kill()
    for _ in range(100):
        state = Path(f"/proc/{worker}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the worker lives on")


def test_weights_that_cannot_be_had_are_explained_in_one_line(tmp_path, photos, monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    flags = [f for f in arguments(photos, tmp_path, "--device", "cpu") if "landmarks" not in f]
    assert align.main(flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    for part in ("s3fd-619a316812.pth", "2DFAN4-11f355bf06.pth.tar", "https://", str(tmp_path / "home"), "--landmarks"):
        assert part in error
    assert not (tmp_path / "aligned.json").exists()


def test_alone_from_the_command_line(tmp_path, photos):
    script = Path(align.__file__)
    done = subprocess.run([sys.executable, script, *arguments(photos, tmp_path)], capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "aligned.json").exists()

"""Stage 1: geometry, photographs, names, the whole stage, landmark files, messages, detection."""

import errno
import importlib.metadata
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
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
import net
from net import InputError
from tests.files import write_detector_weights
from tests.reference import crop_of_pattern, dlib_landmarks

ROOT = Path(align.__file__).parent
FACE = (align.TEMPLATE * 2 + [40, 60]).round(1)  # landmarks of a face in a photograph


def detection_flags(inputs, out, *more):
    """The flags that align the data set in the folder `inputs` and write everything to `out`."""
    return [
        f"--id_to_images={inputs}/id_to_images.json",
        f"--aligned_folder={out}/crops",
        f"--aligned_json={out}/aligned.json",
        *more,
    ]


def landmark_flags(inputs, out, *more):
    """The flags of `detection_flags`, and --landmarks, so that no detector is loaded."""
    return detection_flags(inputs, out, f"--landmarks={inputs}/landmarks.json", *more)


def write_data_set(folder, images, landmarks):
    """Write the two JSON files. images: {ID: [file name]}; landmarks: {file name: points}."""
    (folder / "id_to_images.json").write_text(json.dumps(images))
    (folder / "landmarks.json").write_text(json.dumps(landmarks))


def run_stage(inputs, out, *more):
    """Align with the landmarks in `inputs`; returns (totals, entries) of the report."""
    assert align.main(landmark_flags(inputs, out, *more)) == 0
    report = read_report(out)
    return report["totals"], report["photographs"]


def read_report(out):
    return json.loads((out / "crops" / "alignment_report.json").read_text())


def read_mapping(out):
    return json.loads((out / "aligned.json").read_text())


def one_photo(photos):
    """(content, landmarks) of one of the photographs."""
    landmarks = json.loads((photos / "landmarks.json").read_text())
    content = (photos / "photos" / "family00A_0.jpg").read_bytes()
    return content, landmarks["photos/family00A_0.jpg"]


def error_of(capsys):
    """The one line on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ---- geometry ------------------------------------------------------------------------------------
FIVE_OF_68 = [[77, 78], [89, 90], [60, 61], [96, 97], [108, 109]]  # if point i is [2 i, 2 i + 1]


def test_68_points_give_the_centres_of_the_eyes_the_nose_and_the_corners_of_the_mouth():
    points = np.arange(136, dtype=float).reshape(68, 2)
    assert align.five_points(points).tolist() == FIVE_OF_68


def test_five_points_stay_as_they_are():
    assert align.five_points(FIVE_OF_68).tolist() == FIVE_OF_68


@pytest.mark.parametrize(
    "points", [[[1, 2]] * 4, [[1, 2, 3]] * 5, [[1, math.nan]] * 5, "abc", [["1", "2"]] * 5]
)
def test_wrong_landmarks_are_refused(points):
    with pytest.raises(ValueError, match="not 5 or 68 points"):
        align.five_points(points)


def assert_similarity_equals_scikit_images(source):
    reference = SimilarityTransform.from_estimate(source, align.TEMPLATE).params[:2]
    matrix = align.similarity_transform(source, align.TEMPLATE)
    np.testing.assert_allclose(matrix, reference, atol=1e-6)
    assert np.linalg.det(matrix[:, :2]) > 0


@pytest.mark.parametrize("seed", range(5))
def test_similarity_of_any_points_equals_scikit_images(seed):
    source = np.random.default_rng(seed).normal(0, 100, (5, 2))
    assert_similarity_equals_scikit_images(source)


@pytest.mark.parametrize("seed", range(5))
def test_a_mirrored_face_is_not_reflected_though_that_would_fit(seed):
    noise = np.random.default_rng(seed).normal(0, 5, (5, 2))
    assert_similarity_equals_scikit_images(align.TEMPLATE * [-3, 3] + noise)


@pytest.mark.parametrize(("left", "top"), [(0, 0), (10, 20)])
def test_a_face_of_the_templates_size_is_copied_exactly(left, top):
    image = np.random.default_rng(0).integers(0, 256, (150, 140, 3), np.uint8)
    crop = align.align_face(image, align.TEMPLATE + np.array([left, top]))
    np.testing.assert_array_equal(crop, image[top : top + 112, left : left + 112])


@pytest.mark.parametrize("size", [3.3, 6.5, 10.7])
def test_error_against_a_supersampled_reference_falls_threefold(size):
    """On rings whose frequency rises far beyond the crop's resolution.

    It reaches 0.9 of what the photograph can hold.
    """
    # Radians per crop pixel, for each pixel of distance from the middle.
    highest = 0.9 * np.pi * size / 160

    def rings(x, y):
        squared_distance = (x - 55.5) ** 2 + (y - 55.5) ** 2
        return 128 + 100 * np.cos(highest * squared_distance)

    crop, naive, reference = crop_of_pattern(size, rings)
    error = np.sqrt(((crop - reference) ** 2).mean())
    naive_error = np.sqrt(((naive - reference) ** 2).mean())
    assert naive_error > 3 * error


@pytest.mark.parametrize("size", [0.4, 0.8, 1.0, 1.3])
def test_small_faces_are_sampled_once_and_not_blurred(size):
    def waves(x, y):
        return 128 + 100 * np.cos(x * size) * np.cos(y * size)

    crop, naive, _ = crop_of_pattern(size, waves)
    np.testing.assert_array_equal(crop, naive)


# ---- photographs ---------------------------------------------------------------------------------
def with_white(grey, white, dtype):
    """A grey image (H, W) uint8 in a file's wider range of values, where `white` stands for 255."""
    return Image.fromarray((grey * (white / 255)).astype(dtype))


def with_channels(grey, *more):
    """A grey image as an RGB one, with `more` channels behind."""
    return Image.fromarray(np.stack([grey, grey, grey, *more], axis=-1))


# How a grey photograph (H, W) uint8 may be stored.
KINDS = {
    "grey.png": lambda grey: Image.fromarray(grey),
    "cmyk.jpg": lambda grey: Image.fromarray(grey).convert("CMYK"),
    "rgb.jpg": lambda grey: with_channels(grey),
    "alpha.png": lambda grey: with_channels(grey, np.full_like(grey, 255)),
    "palette.gif": lambda grey: Image.fromarray(grey),
    "10 bits in 16.png": lambda grey: with_white(grey, 1023, np.uint16),
    "14 bits in 16.tif": lambda grey: with_white(grey, 16383, np.uint16),
    "16 bits.png": lambda grey: with_white(grey, 65535, np.uint16),
    "16 bits in 32.tif": lambda grey: with_white(grey, 65535, np.int32),
    "8 bits in 32.tif": lambda grey: with_white(grey, 255, np.int32),
    "Ü 0 to 1.tif": lambda grey: with_white(grey, 1, np.float32),
    "0 to 255.tif": lambda grey: with_white(grey, 255, np.float32),
}


@pytest.mark.parametrize("name", KINDS)
def test_all_kinds_of_images_become_8_bit_rgb(tmp_path, name):
    grey = np.linspace(0, 254, 64 * 48).reshape(64, 48).astype(np.uint8)
    picture = KINDS[name](grey)
    if name.endswith("jpg"):
        tolerance = 12
        picture.save(tmp_path / name, quality=98)
    else:
        tolerance = 1
        picture.save(tmp_path / name)
    image = align.read_photo(tmp_path / name)
    assert image.shape == (64, 48, 3)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - grey[:, :, None]).max() <= tolerance


@pytest.mark.parametrize("odd", [-1.0, 1e6, math.nan, math.inf])
def test_values_without_a_known_white_are_refused(tmp_path, odd):
    values = np.linspace(0, 1, 64 * 48, dtype=np.float32).reshape(64, 48)
    values[5, 5] = odd
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match="save it with 8 bits"):
        align.read_photo(tmp_path / "x.tif")


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"hevc"])
def test_heic_under_any_name_is_named_with_both_ways_out(tmp_path, photos, brand):
    names = ["IMG_1.HEIC", "IMG_2.jpg", "good.jpg"]
    for name in names[:2]:
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(3000))
    content, points = one_photo(photos)
    (tmp_path / "good.jpg").write_bytes(content)
    write_data_set(tmp_path, {"a": names}, dict.fromkeys(names, points))
    _, entries = run_stage(tmp_path, tmp_path)
    assert [entry["status"] for entry in entries] == ["unreadable", "unreadable", "aligned"]
    for entry in entries[:2]:
        for words in ("HEIC", "pip install pillow-heif", "JPEG"):
            assert words in entry["reason"]


def align_beside_a_good_one(folder, photos, *names):
    """The entries of the report on photographs in `folder`, when a good one is aligned with them.

    All have the good one's landmarks.
    """
    content, points = one_photo(photos)
    (folder / "good.jpg").write_bytes(content)
    names = [*names, "good.jpg"]
    write_data_set(folder, {"a": names}, dict.fromkeys(names, points))
    _, entries = run_stage(folder, folder)
    assert entries[-1]["status"] == "aligned"
    return entries[:-1]


def open_one_photo(photos):
    content, _ = one_photo(photos)
    return Image.open(BytesIO(content))


THUMBNAIL = {254: 1}  # the TIFF tag NewSubfileType, with which most RAW files begin


def test_camera_raw_is_left_out_by_its_name_and_by_its_first_image(tmp_path, photos):
    picture = open_one_photo(photos)
    picture.save(tmp_path / "DSC_1.NEF", "TIFF")
    picture.save(tmp_path / "renamed.tif", tiffinfo=THUMBNAIL)
    (tmp_path / "IMG_2.CR3").write_bytes(b"\0\0\0\x18ftypcrx " + bytes(3000))
    names = ("DSC_1.NEF", "renamed.tif", "IMG_2.CR3")
    for entry in align_beside_a_good_one(tmp_path, photos, *names):
        assert entry["status"] == "unreadable"
        assert entry["reason"] == "a camera RAW file: export it as JPEG or TIFF"


def test_a_tiff_that_begins_with_the_photograph_itself_is_read(tmp_path, photos):
    open_one_photo(photos).save(tmp_path / "scan.tif", tiffinfo={254: 0})
    (entry,) = align_beside_a_good_one(tmp_path, photos, "scan.tif")
    assert entry["status"] == "aligned"


def test_a_photograph_beyond_pillows_alarm_is_read_without_a_warning(tmp_path, capfd, recwarn):
    Image.new("L", (14000, 13000), 120).save(tmp_path / "large.jpg")
    points = (align.TEMPLATE * 20 + 5000).tolist()
    write_data_set(tmp_path, {"a": ["large.jpg"]}, {"large.jpg": points})
    totals, _ = run_stage(tmp_path, tmp_path)
    assert totals == {"aligned": 1, "nearly constant": 1}
    assert capfd.readouterr().err == ""
    assert list(recwarn) == []


def test_a_photograph_of_too_many_pixels_is_left_out_with_the_way_out(
    tmp_path, photos, monkeypatch
):
    monkeypatch.setattr(align, "MAX_MEGAPIXELS", 5)
    Image.new("L", (3000, 2000)).save(tmp_path / "large.png")
    (entry,) = align_beside_a_good_one(tmp_path, photos, "large.png")
    assert entry["status"] == "unreadable"
    assert entry["reason"] == "6 megapixels, more than 5: save it at half its size"


def test_a_png_with_damaged_exif_data_is_read(tmp_path, photos):
    picture = open_one_photo(photos)
    picture.save(tmp_path / "sound.png")
    without_byte_order = b"Exif\0\0" + b"\0\x08\0\x02\x01\x12\0\x03"
    picture.save(tmp_path / "damaged.png", exif=without_byte_order)
    entries = align_beside_a_good_one(tmp_path, photos, "sound.png", "damaged.png")
    sound, damaged = (np.array(Image.open(entry["crop"])) for entry in entries)
    np.testing.assert_array_equal(damaged, sound)


def test_a_photograph_is_turned_though_other_exif_data_are_damaged(tmp_path):
    orientation = b"\x12\x01\3\0\1\0\0\0\6\0\0\0"
    resolution_as_text = b"\x1a\x01\2\0\4\0\0\x0072\0\0"
    exif = b"Exif\0\0II*\0\x08\0\0\0\2\0" + orientation + resolution_as_text + bytes(4)
    Image.new("RGB", (80, 40)).save(tmp_path / "a.jpg", exif=exif)
    assert align.read_photo(tmp_path / "a.jpg").shape == (80, 40, 3)


@pytest.fixture(scope="module")
def astronaut():
    """(image, 68 landmarks) of a real face."""
    image = data.astronaut()
    return image, dlib_landmarks(image)


def test_a_real_face_lands_on_the_template(tmp_path, astronaut):
    image, landmarks = astronaut
    Image.fromarray(image).save(tmp_path / "astronaut.png")
    write_data_set(tmp_path, {"eileen": ["astronaut.png"]}, {"astronaut.png": landmarks.tolist()})
    run_stage(tmp_path, tmp_path)
    crop = np.array(Image.open(tmp_path / "crops" / "eileen" / "astronaut.png"))
    # dlib finds her landmarks again in the crop, where the template has them.
    enlarged = cv2.resize(crop, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    found = align.five_points(dlib_landmarks(enlarged) / 4)
    assert np.linalg.norm(found - align.TEMPLATE, axis=1).mean() < 6


# EXIF orientation: how the camera has turned the upright picture before storing it.
TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def save_turned(picture, orientation, path, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = TURNS[orientation]
    stored = picture.transpose(turn) if turn is not None else picture
    stored.save(path, exif=exif, **options)


def enlarge(picture, points, factor):
    """(picture, points) of the same photograph, `factor` times as large."""
    size = (picture.width * factor, picture.height * factor)
    larger = picture.resize(size, Image.Resampling.BICUBIC)
    return larger, (points + 0.5) * factor - 0.5


def assert_all_give_one_crop(folder, landmarks, reference, tolerance):
    """Align {file name: points}; each crop is `reference`, with a mean error below `tolerance`."""
    as_lists = {name: points.tolist() for name, points in landmarks.items()}
    write_data_set(folder, {"a": list(landmarks)}, as_lists)
    assert align.main(landmark_flags(folder, folder)) == 0
    for name in landmarks:
        crop = np.array(Image.open(folder / "crops" / "a" / f"{Path(name).stem}.png"))
        assert np.abs(crop.astype(int) - reference).mean() < tolerance, name


@pytest.fixture(scope="module")
def upright(astronaut):
    """(picture, five points, crop as int) of the real face."""
    image, landmarks = astronaut
    points = align.five_points(landmarks)
    crop = align.align_face(image, points).astype(int)
    return Image.fromarray(image), points, crop


def test_one_face_gives_one_crop_in_every_size_and_format(tmp_path, upright):
    picture, points, reference = upright
    landmarks = {}
    for factor in (1, 2, 4):
        larger, larger_points = enlarge(picture, points, factor)
        larger.save(tmp_path / f"{factor}.webp", quality=98)
        larger.save(tmp_path / f"Ü{factor}.JPG", quality=98, subsampling=0)
        landmarks[f"{factor}.webp"] = larger_points
        landmarks[f"Ü{factor}.JPG"] = larger_points
    assert_all_give_one_crop(tmp_path, landmarks, reference, tolerance=3)


def test_one_face_gives_one_crop_in_every_orientation(tmp_path, upright):
    picture, points, reference = upright
    landmarks = {}
    for orientation in TURNS:
        name = f"turned{orientation}.tif"
        save_turned(picture, orientation, tmp_path / name)
        landmarks[name] = points
    assert_all_give_one_crop(tmp_path, landmarks, reference, tolerance=0.01)


def test_large_jpegs_give_the_same_crop_though_decoded_at_half_their_size(tmp_path, upright):
    picture, points, reference = upright
    large, large_points = enlarge(picture, points, 8)
    landmarks = {}
    for orientation in TURNS:
        name = f"large{orientation}.jpg"
        save_turned(large, orientation, tmp_path / name, quality=95)
        landmarks[name] = large_points
    assert_all_give_one_crop(tmp_path, landmarks, reference, tolerance=3)


def test_the_report_has_the_distance_of_the_eyes_in_the_full_photograph(tmp_path, upright):
    picture, points, _ = upright
    large, large_points = enlarge(picture, points, 8)
    large.save(tmp_path / "large.jpg")
    write_data_set(tmp_path, {"a": ["large.jpg"]}, {"large.jpg": large_points.tolist()})
    _, (entry,) = run_stage(tmp_path, tmp_path)
    assert entry["eyes"] == pytest.approx(8 * math.dist(points[0], points[1]), abs=0.06)


@pytest.fixture
def small_face(tmp_path, upright):
    """(landmarks, right crop) of a small face in tmp_path/group.jpg, which is decoded at half size.

    The right crop is that of the photograph decoded at full size.
    """
    picture, points, _ = upright
    place = np.array([1501, 1203])
    group = Image.new("RGB", (4000, 3000), (90, 100, 110))
    group.paste(picture, tuple(place.tolist()))
    group.save(tmp_path / "group.jpg", quality=95)
    points = points + place
    assert math.dist(points[0], points[1]) < align.MIN_DECODED_EYES
    return points, align.align_face(align.read_photo(tmp_path / "group.jpg"), points).astype(int)


def test_a_photograph_that_fails_at_full_size_alone_is_left_out(
    tmp_path, photos, small_face, monkeypatch
):
    points, _ = small_face
    content, good_points = one_photo(photos)
    (tmp_path / "good.jpg").write_bytes(content)
    landmarks = {"group.jpg": points.tolist(), "good.jpg": good_points}
    write_data_set(tmp_path, {"a": list(landmarks)}, landmarks)
    read_photo = align.read_photo

    def read_if_reduced(path, long_side=None):
        if long_side is None:
            raise MemoryError("too little memory")
        return read_photo(path, long_side)

    monkeypatch.setattr(align, "read_photo", read_if_reduced)
    _, entries = run_stage(tmp_path, tmp_path)
    assert [entry["status"] for entry in entries] == ["unreadable", "aligned"]
    assert entries[0]["reason"] == "too little memory"


def test_a_small_face_in_a_large_jpeg_is_cropped_from_the_photograph_at_full_size(
    tmp_path, small_face
):
    points, right_crop = small_face
    reduced = align.read_photo(tmp_path / "group.jpg", align.DECODED_SIZE)
    assert reduced.shape == (1500, 2000, 3)
    blurred_crop = align.align_face(reduced, (points + 0.5) / 2 - 0.5)
    assert np.abs(blurred_crop - right_crop).mean() > 2
    assert_all_give_one_crop(tmp_path, {"group.jpg": points}, right_crop, tolerance=0.01)


def test_so_is_a_small_face_that_the_detector_finds(tmp_path, small_face, stand_in):
    write_data_set(tmp_path, {"a": ["group.jpg"]}, {})
    assert align.main(detection_flags(tmp_path, tmp_path, "--device=cpu")) == 0
    # The stand-in finds it in the middle of the reduced photograph, as large as in a crop.
    found = align.TEMPLATE - 56 + [1000, 750]
    full_size = align.read_photo(tmp_path / "group.jpg")
    right_crop = align.align_face(full_size, (found + 0.5) * 2 - 0.5)
    crop = np.array(Image.open(tmp_path / "crops" / "a" / "group.png"))
    np.testing.assert_array_equal(crop, right_crop)


# ---- names ---------------------------------------------------------------------------------------
TRICKY = ["%", "%2F", "/", "\0", ".", "..", "", "\ud800", "C:\\x"]


@given(st.lists(st.text(st.characters(exclude_categories=()), max_size=40)))
def test_any_ids_get_distinct_names_that_are_no_paths(ids):
    distinct_ids = {*ids, *TRICKY}
    names = {net.file_name(identity) for identity in distinct_ids}
    assert len(names) == len(distinct_ids)
    for name in names:
        assert name not in ("", ".", "..")
        assert not set(name) & set('/\\\0:*?"<>|+')
        name.encode()


@pytest.mark.parametrize("identity", ["A b-1", "Müller", "日本"])
def test_ordinary_ids_are_their_own_names(identity):
    assert net.file_name(identity) == identity


SAME_STEMS = ["x/1.jpg", "y/1.png", "y/2.png", "y/IMG.jpg", "y/img.jpg"]


def test_sources_with_one_stem_get_distinct_names():
    names = net.file_names(SAME_STEMS)
    assert len({name.casefold() for name in names.values()}) == 5


def test_a_stem_of_its_own_is_the_name():
    assert net.file_names(SAME_STEMS)["y/2.png"] == "2"


def test_names_do_not_depend_on_the_order():
    assert net.file_names(SAME_STEMS[::-1]) == net.file_names(SAME_STEMS)


def test_names_do_not_depend_on_where_the_data_set_lies():
    moved = [f"/other/place/{path}" for path in SAME_STEMS]
    names = net.file_names(moved, home="/other/place")
    assert list(names.values()) == list(net.file_names(SAME_STEMS).values())


LONG_STEMS = ["x" * 246, "照片" * 41, "&" * 200]  # "&" becomes three letters


@pytest.fixture
def long_names(tmp_path, photos):
    """A data set of photographs with long names, the last one's is good.jpg."""
    content, points = one_photo(photos)
    names = [f"{stem}.jpg" for stem in [*LONG_STEMS, "good"]]
    for name in names:
        (tmp_path / name).write_bytes(content)
    write_data_set(tmp_path, {"a": names}, dict.fromkeys(names, points))
    return tmp_path


def test_photographs_with_long_names_are_aligned(long_names):
    totals, entries = run_stage(long_names, long_names)
    assert totals == {"aligned": 4}
    assert len({entry["crop"] for entry in entries}) == 4


def test_a_name_that_the_file_system_does_not_take_leaves_out_one_photograph(
    long_names, monkeypatch
):
    monkeypatch.setattr(net, "LONGEST_NAME", 1000)
    _, entries = run_stage(long_names, long_names)
    statuses = [entry["status"] for entry in entries]
    assert statuses == ["aligned", "aligned", "no such name", "aligned"]
    assert "&" * 200 in entries[2]["source"]
    assert "File name too long; rename the photograph" in entries[2]["reason"]
    assert len(read_mapping(long_names)["a"]) == 3


def test_a_full_disk_ends_the_alignment(long_names, monkeypatch, capsys):
    full_disk = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(align, "save_crop", Mock(side_effect=full_disk))
    assert align.main(landmark_flags(long_names, long_names)) == 2
    assert error_of(capsys) == "align.py: No space left on device"


def test_the_photographs_of_a_long_id_are_aligned(tmp_path, photos):
    content, points = one_photo(photos)
    (tmp_path / "a.jpg").write_bytes(content)
    write_data_set(tmp_path, {"x" * 300: ["a.jpg"]}, {"a.jpg": points})
    run_stage(tmp_path, tmp_path)
    assert [len(crops) for crops in read_mapping(tmp_path).values()] == [1]


HOSTILE = [
    "../../x",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a\0b",
    "-rf",
    "C:\\x",
    "\ud800",
    "日本",
    "alignment_report",
]


def test_nothing_is_written_outside_the_folder(tmp_path, photos):
    out = tmp_path / "deep" / "er"
    out.mkdir(parents=True)
    content, points = one_photo(photos)
    (out / "...jpg").write_bytes(content)
    write_data_set(out, {identity: ["...jpg"] for identity in HOSTILE}, {"...jpg": points})
    run_stage(out, out)
    assert [path.name for path in tmp_path.glob("*")] == ["deep"]
    assert [path.name for path in tmp_path.glob("*/*")] == ["er"]
    assert len(list((out / "crops").glob("*/*.png"))) == len(HOSTILE)
    assert len(list((out / "crops").iterdir())) == len(HOSTILE) + 2  # the report and its sheet
    mapping = read_mapping(out)
    assert list(mapping) == HOSTILE
    for (crop,) in mapping.values():
        assert (out / crop).is_file()


# ---- the stage -----------------------------------------------------------------------------------
class FirstRun(NamedTuple):
    """A run of the stage on a copy of `photos`, which wrote its crops beside the photographs."""

    folder: Path
    totals: dict
    entries: list
    printed: str


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("aligned") / "data"
    shutil.copytree(photos, folder)
    with redirect_stdout(StringIO()) as printed:
        totals, entries = run_stage(folder, folder, "--max_workers=3")
    return FirstRun(folder, totals, entries, printed.getvalue())


@pytest.fixture
def aligned(tmp_path, first_run):
    """A copy of the folder that `first_run` left, with its 12 crops, for a test to change."""
    folder = tmp_path / "data"
    shutil.copytree(first_run.folder, folder)
    return folder


def test_every_photograph_gives_a_crop_under_its_person_and_stem(first_run):
    images = json.loads((first_run.folder / "id_to_images.json").read_text())
    mapping = read_mapping(first_run.folder)
    assert list(mapping) == list(images)
    for identity, crops in mapping.items():
        assert crops == [f"crops/{identity}/{Path(path).stem}.png" for path in images[identity]]


def test_crops_are_rgb_and_112_by_112(first_run):
    crops = [crop for crops in read_mapping(first_run.folder).values() for crop in crops]
    assert len(crops) == 12
    for crop in crops:
        image = Image.open(first_run.folder / crop)
        assert (image.mode, image.size) == ("RGB", (112, 112))


def test_the_report_has_totals_and_facts_of_each_photograph(first_run):
    assert first_run.totals == {"aligned": 12}
    assert len(first_run.entries) == 12
    for entry in first_run.entries:
        assert 0 < entry["residual"] < 8
        assert entry["eyes"] > 35


def test_the_sheet_has_ten_crops_in_a_row(first_run):
    with Image.open(first_run.folder / "crops" / "alignment_sheet.png") as sheet:
        assert sheet.width == 10 * 114 + 2


def test_the_totals_are_printed(first_run):
    assert "12 photographs of 4 people: 12 aligned" in first_run.printed


def test_crops_that_show_nothing_are_flagged_and_counted(tmp_path, capsys):
    # Black is that of a 12-bit picture stored in 16 bits, of which Pillow reads the upper 8.
    noise = np.random.default_rng(0).integers(0, 16, (200, 200, 3), np.uint8)
    pictures = {
        "black": noise,
        "white": 255 - noise,
        "constant": np.full_like(noise, 120),
        "good": noise * 10,
    }
    for name, picture in pictures.items():
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    names = [f"{name}.png" for name in pictures]
    landmarks = dict.fromkeys(names, (align.TEMPLATE + 20).tolist())
    write_data_set(tmp_path, {"a": names}, landmarks)
    for status in ("aligned", "already done"):
        totals, entries = run_stage(tmp_path, tmp_path)
        flags = ["nearly black", "nearly white", "nearly constant", ""]
        assert [entry["flag"] for entry in entries] == flags
        assert totals == {status: 4, "nearly black": 1, "nearly white": 1, "nearly constant": 1}
        assert "1 nearly white" in capsys.readouterr().out


def times_of_change(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "crops").glob("*/*.png")}


def test_done_work_is_not_repeated(aligned):
    before = times_of_change(aligned)
    totals, _ = run_stage(aligned, aligned)
    assert totals == {"already done": 12}
    assert times_of_change(aligned) == before


def test_a_repeated_run_reports_what_the_first_one_found(aligned, first_run):
    _, entries = run_stage(aligned, aligned)
    for fact in ("residual", "eyes", "flag"):
        assert [entry[fact] for entry in entries] == [entry[fact] for entry in first_run.entries]


def assert_one_crop_is_made_anew(folder):
    """The next run makes one crop, and the run after that none."""
    totals, _ = run_stage(folder, folder)
    assert totals == {"aligned": 1, "already done": 11}
    totals, _ = run_stage(folder, folder)
    assert totals == {"already done": 12}


def test_an_edited_photograph_is_aligned_again(aligned):
    os.utime(aligned / "photos" / "family00A_0.jpg")
    assert_one_crop_is_made_anew(aligned)


def test_a_photograph_with_corrected_landmarks_is_aligned_again(aligned):
    landmarks = json.loads((aligned / "landmarks.json").read_text())
    landmarks["photos/family01B_2.jpg"][0][0] += 3
    (aligned / "landmarks.json").write_text(json.dumps(landmarks))
    assert_one_crop_is_made_anew(aligned)


@pytest.mark.parametrize("damage", ["no PNG", "empty", "truncated"])
def test_a_damaged_crop_is_made_anew(aligned, damage):
    crop = aligned / "crops" / "family00A" / "family00A_1.png"
    damaged = {"no PNG": b"\x89PNG broken", "empty": b"", "truncated": crop.read_bytes()[:-1000]}
    crop.write_bytes(damaged[damage])
    assert_one_crop_is_made_anew(aligned)


def test_realign_makes_every_crop_anew(aligned):
    totals, _ = run_stage(aligned, aligned, "--realign")
    assert totals == {"aligned": 12}


def test_a_moved_data_set_is_not_aligned_again(aligned):
    moved = aligned.rename(aligned.with_name("moved"))
    totals, _ = run_stage(moved, moved)
    assert totals == {"already done": 12}


REJECTED = Path("crops", "family00A", "family00A_1.png")


@pytest.fixture
def with_a_deleted_crop(aligned):
    """The folder of `aligned`, in which a person has deleted a crop after a look at it."""
    (aligned / REJECTED).unlink()
    return aligned


def assert_one_is_rejected(folder):
    """The next run makes no crop, and leaves the deleted one out."""
    totals, entries = run_stage(folder, folder)
    assert totals == {"already done": 11, "rejected": 1}
    (rejected,) = (entry for entry in entries if entry["status"] == "rejected")
    assert Path(rejected["source"]).name == "family00A_1.jpg"
    assert rejected["reason"] == "its crop was deleted; --realign makes all crops again"
    assert str(REJECTED) not in read_mapping(folder)["family00A"]


def test_a_deleted_crop_is_rejected_and_counted(with_a_deleted_crop, capsys):
    assert_one_is_rejected(with_a_deleted_crop)
    printed = capsys.readouterr().out
    assert "11 already done, 1 rejected" in printed
    assert "--realign" in printed


def test_a_rejected_photograph_stays_out_on_the_next_runs(with_a_deleted_crop):
    for _ in range(3):
        assert_one_is_rejected(with_a_deleted_crop)


def test_a_rejected_photograph_stays_out_where_the_data_set_has_moved(with_a_deleted_crop):
    moved = with_a_deleted_crop.rename(with_a_deleted_crop.with_name("moved"))
    assert_one_is_rejected(moved)


def test_a_rejected_photograph_stays_out_of_a_copy_with_new_times(with_a_deleted_crop):
    copied = with_a_deleted_crop.with_name("copied")
    shutil.copytree(with_a_deleted_crop, copied, copy_function=shutil.copyfile)
    totals, _ = run_stage(copied, copied)
    assert totals == {"aligned": 11, "rejected": 1}


def test_a_rejected_photograph_comes_back_when_its_entry_in_the_report_is_deleted(
    with_a_deleted_crop,
):
    assert_one_is_rejected(with_a_deleted_crop)
    path = with_a_deleted_crop / "crops" / "alignment_report.json"
    report = json.loads(path.read_text())
    kept = [entry for entry in report["photographs"] if entry["status"] != "rejected"]
    path.write_text(json.dumps(report | {"photographs": kept}))
    totals, _ = run_stage(with_a_deleted_crop, with_a_deleted_crop)
    assert totals == {"already done": 11, "aligned": 1}


def test_a_photograph_that_replaces_a_rejected_one_is_aligned(with_a_deleted_crop):
    photograph = with_a_deleted_crop / "photos" / "family00A_1.jpg"
    with Image.open(photograph) as image:
        image.save(photograph, quality=50)
    totals, _ = run_stage(with_a_deleted_crop, with_a_deleted_crop)
    assert totals == {"already done": 11, "aligned": 1}


def test_a_rejected_photograph_stays_out_after_a_run_of_other_people(with_a_deleted_crop):
    pairs = with_a_deleted_crop / "others.json"
    pairs.write_text('[["family01A", "family01B"]]')
    run_stage(with_a_deleted_crop, with_a_deleted_crop, f"--pairs={pairs}")
    assert_one_is_rejected(with_a_deleted_crop)


def test_a_rejected_photograph_stays_out_after_a_run_of_a_shorter_list(with_a_deleted_crop):
    folder = with_a_deleted_crop
    assert_one_is_rejected(folder)
    path = folder / "id_to_images.json"
    whole = path.read_text()
    images = json.loads(whole)
    images["family00A"] = [name for name in images["family00A"] if "family00A_1" not in name]
    path.write_text(json.dumps(images))
    run_stage(folder, folder)
    path.write_text(whole)
    assert_one_is_rejected(folder)


@pytest.mark.parametrize("is_noticed", [True, False])
def test_a_rejected_photograph_stays_out_after_runs_without_the_photographs(
    with_a_deleted_crop, is_noticed
):
    folder = with_a_deleted_crop
    if is_noticed:
        assert_one_is_rejected(folder)
    (folder / "photos").rename(folder / "unplugged")
    for _ in range(2):
        assert align.main(landmark_flags(folder, folder)) == 2
    (folder / "unplugged").rename(folder / "photos")
    assert_one_is_rejected(folder)


def test_a_rejected_photograph_stays_out_when_the_list_alone_moves(with_a_deleted_crop):
    folder = with_a_deleted_crop
    assert_one_is_rejected(folder)
    lists = folder / "lists"
    lists.mkdir()
    for name in ("id_to_images.json", "landmarks.json"):
        text = (folder / name).read_text().replace('"photos/', f'"{folder}/photos/')
        (lists / name).write_text(text)
    totals, _ = run_stage(lists, folder)
    assert totals["rejected"] == 1


def test_an_image_that_is_no_crop_is_never_replaced(aligned):
    crop = aligned / "crops" / "family00A" / "family00A_1.png"
    Image.new("RGB", (320, 200)).save(crop)
    before = crop.read_bytes()
    for flags in ((), ("--realign",)):
        assert align.main([*landmark_flags(aligned, aligned), *flags]) == 2
    assert crop.read_bytes() == before


def test_crops_never_lie_among_the_photographs(aligned, capsys):
    folder = aligned / "people"
    images = json.loads((aligned / "id_to_images.json").read_text())
    landmarks = json.loads((aligned / "landmarks.json").read_text())
    moved = {}
    for identity, paths in images.items():
        (folder / identity).mkdir(parents=True)
        for path in paths:
            shutil.copy(aligned / path, folder / identity)
            moved[f"{identity}/{Path(path).name}"] = landmarks[path]
    (folder / "landmarks.json").write_text(json.dumps(moved))
    before = sorted(folder.rglob("*"))
    flags = landmark_flags(folder, aligned, f"--id_to_images={folder}")
    assert align.main([*flags, f"--aligned_folder={folder}"]) == 2
    assert "crops would lie among the photographs" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_a_list_of_crops_elsewhere_is_never_replaced(aligned, capsys):
    own = aligned / "mine.png"
    Image.new("RGB", (112, 112)).save(own)
    path = aligned / "own.json"
    path.write_text(json.dumps({"a": [str(own)]}))
    before = path.read_bytes()
    assert align.main(landmark_flags(aligned, aligned, f"--aligned_json={path}")) == 2
    assert "say --skip_alignment to use this list" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_the_list_of_crops_never_replaces_an_input_file(aligned, capsys):
    flags = landmark_flags(aligned, aligned)
    for flag, name in (("id_to_images", "id_to_images.json"), ("landmarks", "landmarks.json")):
        before = (aligned / name).read_text()
        assert align.main([*flags, f"--aligned_json={aligned / name}"]) == 2
        line = capsys.readouterr().err
        assert f"the list of crops would replace the file of --{flag}" in line
        assert (aligned / name).read_text() == before


def test_a_warning_says_that_crops_of_another_data_set_are_replaced(aligned, capsys):
    other = aligned.with_name("other")
    shutil.copytree(aligned, other)
    for path in (other / "photos").iterdir():
        with Image.open(path) as image:
            image.save(path, quality=40)
    run_stage(other, aligned)
    said = capsys.readouterr().out
    assert "warning: 12 crops of other photographs, such as " in said
    assert "give each data set an --aligned_folder of its own" in said


def test_photographs_that_the_landmark_file_leaves_out_have_no_crop_whatever_was_made_before(
    aligned, stand_in
):
    assert align.main(detection_flags(aligned, aligned, "--device=cpu", "--realign")) == 0
    landmarks = json.loads((aligned / "landmarks.json").read_text())
    few = dict(list(landmarks.items())[:2])
    (aligned / "landmarks.json").write_text(json.dumps(few))
    totals, _ = run_stage(aligned, aligned)
    assert totals == {"aligned": 2, "no landmarks": 10}


def test_the_report_keeps_every_photograph_of_others(aligned):
    for number in range(2):
        (aligned / "photos" / f"family00A_{number}.jpg").unlink()
    run_stage(aligned, aligned)
    pairs = aligned / "others.json"
    pairs.write_text('[["family01A", "family01B"]]')
    run_stage(aligned, aligned, f"--pairs={pairs}")
    others = read_report(aligned)["photographs_of_others"]
    missing = {Path(entry["source"]).name for entry in others if entry["status"] == "unreadable"}
    assert missing == {"family00A_0.jpg", "family00A_1.jpg"}


def test_realign_brings_a_rejected_photograph_back(with_a_deleted_crop):
    assert_one_is_rejected(with_a_deleted_crop)
    totals, _ = run_stage(with_a_deleted_crop, with_a_deleted_crop, "--realign")
    assert totals == {"aligned": 12}
    totals, _ = run_stage(with_a_deleted_crop, with_a_deleted_crop)
    assert totals == {"already done": 12}


def test_a_crop_that_a_new_photograph_of_the_same_name_renames_is_not_rejected(aligned):
    new = aligned / "more" / "family00A_1.jpg"
    new.parent.mkdir()
    shutil.copy(aligned / "photos" / "family00A_1.jpg", new)
    landmarks = json.loads((aligned / "landmarks.json").read_text())
    landmarks["more/family00A_1.jpg"] = landmarks["photos/family00A_1.jpg"]
    images = json.loads((aligned / "id_to_images.json").read_text())
    images["family00A"].append("more/family00A_1.jpg")
    write_data_set(aligned, images, landmarks)
    totals, _ = run_stage(aligned, aligned)
    assert totals == {"already done": 11, "aligned": 2}


@pytest.fixture
def people(tmp_path, photos):
    """A folder with a folder for each person, and other files; all landmarks are in it."""
    folder = tmp_path / "people"
    landmarks = json.loads((photos / "landmarks.json").read_text())
    moved = {}
    for path, points in landmarks.items():
        identity, _ = Path(path).stem.split("_")
        (folder / identity).mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / path, folder / identity)
        moved[f"{identity}/{Path(path).name}"] = points
    (folder / "landmarks.json").write_text(json.dumps(moved))
    in_folders = (
        "family00A/.DS_Store",
        "family00A/._1.jpg",
        "family01B/Thumbs.db",
        "family01B/a.pdf",
    )
    for name in ("notes.txt", *in_folders):
        (folder / name).write_bytes(b"x")
    return folder


def test_photographs_may_be_given_as_a_folder_of_people(people, tmp_path, photos, capsys):
    flags = landmark_flags(people, tmp_path, f"--id_to_images={people}")
    assert align.main(flags) == 0
    mapping = read_mapping(tmp_path)
    images = json.loads((photos / "id_to_images.json").read_text())
    assert list(mapping) == sorted(images)
    for identity, crops in mapping.items():
        assert crops == [f"crops/{identity}/{Path(path).stem}.png" for path in images[identity]]
    # One of them is the file of the landmarks.
    kinds = "1 .DS_Store, 1 .db, 1 .jpg, 1 .json, 1 .pdf, 1 .txt"
    line = f"other files in {people}, which are passed over: {kinds}"
    assert line in capsys.readouterr().out


def test_a_folder_of_people_is_not_aligned_again_where_it_has_moved(people, tmp_path):
    assert align.main(landmark_flags(people, tmp_path, f"--id_to_images={people}")) == 0
    moved = people.rename(tmp_path / "moved")
    assert align.main(landmark_flags(moved, tmp_path, f"--id_to_images={moved}")) == 0
    assert read_report(tmp_path)["totals"] == {"already done": 12}


def test_only_the_people_of_the_pairs_are_aligned(tmp_path, photos):
    pairs = tmp_path / "pairs.json"
    pairs.write_text('[["family01B", "family01A"], ["family01A", "family01B"]]')
    run_stage(photos, tmp_path, f"--pairs={pairs}")
    assert list(read_mapping(tmp_path)) == ["family01B", "family01A"]


def test_a_default_file_that_is_missing_is_named_with_its_flag_and_format(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert align.main([]) == 2
    line = error_of(capsys)
    assert line.startswith("align.py: --id_to_images id_to_images.json: ")
    assert '{"ID": ["path", ...], ...}' in line


def test_the_plans_names_are_the_defaults(tmp_path, photos, monkeypatch):
    shutil.copytree(photos, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert align.main(["--landmarks=landmarks.json"]) == 0
    mapping = json.loads(Path("id_to_train_aligned_images.json").read_text())
    assert mapping["family00A"][0].startswith("train_aligned_images/")


UNREADABLE = [
    "empty.jpg",
    "truncated.jpg",
    "text.jpg",
    "folder.jpg",
    "fifo.jpg",
    "zero.jpg",
    "gone.jpg",
    "a\0b.jpg",
]
# Landmarks with which a good photograph gives no crop, and what the report then says.
POOR_LANDMARKS = {
    "flat.jpg": ([[150, 150]] * 5, "too small"),
    "tiny.jpg": ((align.TEMPLATE / 4 + 100).tolist(), "too small"),
    "profile.jpg": ((align.TEMPLATE * [0.4, 1] + 100).tolist(), "poor fit"),
    "outside.jpg": ((align.TEMPLATE * 10 + 400).tolist(), "poor fit"),
    "huge.jpg": ((align.TEMPLATE * 5000 - 330000).tolist(), "poor fit"),
    "around.jpg": (((align.TEMPLATE - align.TEMPLATE.mean(0)) * 20 + 150).tolist(), "poor fit"),
    "noface.jpg": (None, "no face"),
}


@pytest.fixture
def bad_photographs(tmp_path, photos):
    """A data set of one good photograph and many bad ones."""
    content, points = one_photo(photos)
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.jpg").write_bytes(b"no image")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    landmarks = dict.fromkeys([*UNREADABLE, "good.jpg"], points)
    for name, (poor_points, _) in POOR_LANDMARKS.items():
        landmarks[name] = poor_points
    for name in (*POOR_LANDMARKS, "good.jpg", "unlisted.jpg"):
        (tmp_path / name).write_bytes(content)
    images = {"a": [*landmarks, "unlisted.jpg"], "b": ["empty.jpg"], "c": []}
    write_data_set(tmp_path, images, landmarks)
    return tmp_path


def assert_all_but_the_good_one_are_left_out(folder, good_status):
    _, entries = run_stage(folder, folder)
    statuses = {Path(entry["source"]).name: entry["status"] for entry in entries}
    expected = dict.fromkeys(UNREADABLE, "unreadable")
    for name, (_, status) in POOR_LANDMARKS.items():
        expected[name] = status
    assert statuses == expected | {"unlisted.jpg": "no landmarks", "good.jpg": good_status}
    assert read_mapping(folder) == {"a": ["crops/a/good.png"], "b": [], "c": []}
    for entry in entries:
        assert entry["crop"] or entry["reason"]


def test_bad_photographs_are_reported_and_left_out(bad_photographs):
    assert_all_but_the_good_one_are_left_out(bad_photographs, "aligned")


def test_a_repeated_run_reports_bad_photographs_again(bad_photographs):
    run_stage(bad_photographs, bad_photographs)
    assert_all_but_the_good_one_are_left_out(bad_photographs, "already done")


def test_a_folder_that_may_not_be_entered_is_named(tmp_path, photos, monkeypatch):
    closed = tmp_path / "closed"
    stat = os.stat

    def stat_outside(path, *arguments, **options):
        if str(path).startswith(str(closed)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    # The tests may run as root, who enters every folder.
    monkeypatch.setattr(os, "stat", stat_outside)
    (entry,) = align_beside_a_good_one(tmp_path, photos, "closed/1.jpg")
    assert entry["status"] == "unreadable"
    assert entry["reason"] == f"Permission denied: the folder {closed} may not be entered"


def test_a_name_that_the_output_cannot_encode_does_not_end_the_alignment(tmp_path, photos):
    content, points = one_photo(photos)
    (tmp_path / "good.jpg").write_bytes(content)
    (tmp_path / "照片.jpg").write_bytes(b"no photograph")
    names = ["good.jpg", "照片.jpg"]
    write_data_set(tmp_path, {"李伟": names}, dict.fromkeys(names, points))
    command = [sys.executable, "align.py", *landmark_flags(tmp_path, tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert rb"\u7167\u7247.jpg" in done.stdout
    assert read_mapping(tmp_path) == {"李伟": ["crops/李伟/good.png"]}


def test_the_sheet_shows_the_worst_crops_first_as_the_report_lists_them(tmp_path):
    blue = {"0.png": 50, "1.png": 60, "2.png": 70}
    residuals = {"0.png": 1.0, "1.png": 7.0, "2.png": 3.0}
    report = []
    for name, residual in residuals.items():
        crop = tmp_path / name
        Image.new("RGB", (112, 112), (0, 0, blue[name])).save(crop)
        facts = {"crop": str(crop), "residual": residual, "status": "aligned", "flag": ""}
        left_out = {"crop": None, "status": "no face", "flag": "", "source": "x", "reason": "none"}
        report += [
            facts | {"id": "a", "photograph": name},
            left_out | {"id": "a", "photograph": "x"},
        ]
    align.write_report(report, Counter(), tmp_path)
    listed = json.loads((tmp_path / "alignment_report.json").read_text())["sheet"]
    assert [Path(crop).name for crop in listed] == ["1.png", "2.png", "0.png"]
    with Image.open(tmp_path / "alignment_sheet.png") as sheet:
        colours = [sheet.getpixel((2 + 114 * column + 50, 50)) for column in range(3)]
    assert colours == [(0, 0, 60), (0, 0, 70), (0, 0, 50)]


# The stage, whose process ends without warning when it renames its finished file number argv[1].
KILLED_STAGE = """
import itertools
import os
import signal
import sys

import align

replace = os.replace
numbers = itertools.count()


def replace_or_die(*names):
    if next(numbers) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)


os.replace = replace_or_die
align.main(sys.argv[2:])
"""


@pytest.mark.parametrize("crops_before", [0, 1, 5, 11])
def test_killed_at_any_moment_the_next_run_completes(aligned, crops_before):
    """The first run's mapping stays whole, and the half-written crop does no harm."""
    mapping = (aligned / "aligned.json").read_bytes()
    files_before = set((aligned / "crops").rglob("*"))
    flags = landmark_flags(aligned, aligned, "--realign", "--max_workers=1")
    command = [sys.executable, "-c", KILLED_STAGE, str(crops_before), *flags]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(set((aligned / "crops").rglob("*")) - files_before) == 1
    assert (aligned / "aligned.json").read_bytes() == mapping
    run_stage(aligned, aligned)
    assert (aligned / "aligned.json").read_bytes() == mapping
    for crops in json.loads(mapping).values():
        for crop in crops:
            assert Image.open(aligned / crop).size == (112, 112)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_the_crops_made_so_far(tmp_path, photos, monkeypatch, capsys, number):
    align_photo = align.align_photo

    def align_until_interrupted(job, detector):
        if net.interrupt.asked:
            time.sleep(0.1)  # so the main thread has time to stop before all crops are made
        facts = align_photo(job, detector)
        if job.target.name == "family00A_2.png":
            os.kill(os.getpid(), number)
        return facts

    with monkeypatch.context() as patch:
        patch.setattr(align, "align_photo", align_until_interrupted)
        assert align.main(landmark_flags(photos, tmp_path, "--max_workers=1")) == 130
    assert "the crops so far are kept" in error_of(capsys)
    assert not (tmp_path / "aligned.json").exists()
    totals, _ = run_stage(photos, tmp_path)
    assert 3 <= totals["already done"] < 12
    assert totals["aligned"] == 12 - totals["already done"]


# ---- landmark files ------------------------------------------------------------------------------
def points_like_dlibs(points):
    """The eye on the right of the picture, outer and inner corner, the other eye, and the nose."""
    left_eye, right_eye, nose = points[:3]
    corner = (right_eye - left_eye) * 0.22
    corners = [right_eye + corner, right_eye - corner, left_eye - corner, left_eye + corner]
    return np.array([*corners, nose])


ALTERED = {
    "left and right are exchanged": lambda points: points[[1, 0, 2, 4, 3]],
    "x and y are exchanged": lambda points: points[:, ::-1],
    "y counts from the bottom": lambda points: [0, 400] + points * [1, -1],
    "dlib's five points": lambda points: points_like_dlibs(points),
    "from 0 to 1": lambda points: points / [300, 400],
}
POSITIONS_IN_68 = [0] * 30 + [2] * 6 + [0] * 6 + [1] * 6 + [3] * 6 + [4] * 14


def write_landmarks(path, slip, n_altered):
    """Write the landmarks of 20 faces, of which the first `n_altered` share a slip of ALTERED.

    Every other entry has 68 points, in which the five ones stand.
    """
    rng = np.random.default_rng(0)
    entries = {}
    for number in range(20):
        angle = rng.normal(0, 0.2)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        points = (FACE - 100) @ rotation.T + 110 + rng.normal(0, 2, (5, 2))
        if number < n_altered:
            points = ALTERED[slip](points)
        if number % 2 == 1:
            points = points[POSITIONS_IN_68]
        entries[f"{number}.jpg"] = points.tolist()
    path.write_text(json.dumps(entries))


@pytest.mark.parametrize("slip", ALTERED)
def test_a_slip_that_most_entries_share_is_named(tmp_path, slip):
    file = tmp_path / "landmarks.json"
    write_landmarks(file, slip, n_altered=14)
    with pytest.raises(InputError, match=f"landmarks.json: .*{slip}"):
        align.read_landmarks(file, tmp_path)


@pytest.mark.parametrize("slip", ALTERED)
def test_odd_entries_among_more_correct_ones_are_no_slip(tmp_path, slip):
    file = tmp_path / "landmarks.json"
    write_landmarks(file, slip, n_altered=8)
    assert len(align.read_landmarks(file, tmp_path)) == 20


def test_faces_on_their_side_and_profiles_are_no_slip(tmp_path):
    quarter_turn = np.array([[0, 1], [-1, 0]])
    side = (FACE - 100) @ quarter_turn + 150
    entries = {"side": side, "other side": 300 - side, "profile": FACE * [0.3, 1]}
    as_lists = {name: points.tolist() for name, points in entries.items()}
    file = tmp_path / "landmarks.json"
    file.write_text(json.dumps(as_lists))
    # Each path may start at either folder.
    assert len(align.read_landmarks(file, "/elsewhere")) == 6


def test_dlibs_own_five_points_are_refused_with_the_cause_and_the_way_out(
    tmp_path, upright, capsys
):
    picture, _, _ = upright
    picture.save(tmp_path / "a.png")
    points = dlib_landmarks(np.array(picture), "shape_predictor_5_face_landmarks.dat")
    write_data_set(tmp_path, {"a": ["a.png"]}, {"a.png": points.tolist()})
    assert align.main(landmark_flags(tmp_path, tmp_path)) == 2
    error = error_of(capsys)
    assert "landmarks.json: these are dlib's five points" in error
    assert "give its 68 points" in error


@pytest.mark.parametrize("width", [0.1, 0.3, 0.6, 1.0, 1.5])
def test_the_right_five_points_of_no_pose_are_taken_for_dlibs(width):
    for angle in np.radians(range(0, 360, 15)):
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        face = (align.TEMPLATE * [width, 1]) @ rotation.T
        assert not align.looks_like_dlibs(face)


# ---- landmarks of the stored pixels --------------------------------------------------------------
# EXIF orientation: where the pixel (x, y) of an upright picture of w x h is stored, if the face
# lies on its side or upside down there.
STORED = {
    3: lambda x, y, w, h: (w - 1 - x, h - 1 - y),
    4: lambda x, y, w, h: (x, h - 1 - y),
    5: lambda x, y, w, h: (y, x),
    6: lambda x, y, w, h: (y, w - 1 - x),
    7: lambda x, y, w, h: (h - 1 - y, w - 1 - x),
    8: lambda x, y, w, h: (h - 1 - y, x),
}


def stored_points(points, orientation, size):
    x, y = points.T
    return np.stack(STORED[orientation](x, y, *size), axis=1)


def align_turned(folder, upright, orientation, n_stored, n_right):
    """Align photographs with an EXIF tag; the first `n_stored` have landmarks of stored pixels."""
    picture, points, _ = upright
    picture = picture.crop((0, 0, 500, 400))
    landmarks = {}
    for number in range(n_stored + n_right):
        name = f"{number}.jpg"
        save_turned(picture, orientation, folder / name)
        face = stored_points(points, orientation, picture.size) if number < n_stored else points
        landmarks[name] = face.tolist()
    write_data_set(folder, {"a": list(landmarks)}, landmarks)
    return align.main(landmark_flags(folder, folder))


@pytest.mark.parametrize("orientation", STORED)
def test_landmarks_of_the_stored_pixels_are_refused_with_the_way_out(
    tmp_path, upright, capsys, orientation
):
    assert align_turned(tmp_path, upright, orientation, n_stored=3, n_right=1) == 2
    error = error_of(capsys)
    for words in (
        "--landmarks",
        "landmarks.json: the landmarks of 3 photographs",
        "0.jpg",
        "stored pixels, before the EXIF tag turns them",
        "give them in pixels of the upright photograph",
        "ImageOps.exif_transpose",
    ):
        assert words in error
    assert not (tmp_path / "aligned.json").exists()


@pytest.mark.parametrize("orientation", STORED)
def test_landmarks_of_the_upright_photograph_are_not_refused(tmp_path, upright, orientation):
    assert align_turned(tmp_path, upright, orientation, n_stored=0, n_right=1) == 0


def test_a_face_that_lies_among_more_upright_ones_is_not_refused(tmp_path, upright):
    assert align_turned(tmp_path, upright, 6, n_stored=1, n_right=2) == 0
    assert read_report(tmp_path)["totals"] == {"aligned": 3}


def test_a_face_that_lies_in_a_photograph_without_a_tag_is_not_refused(tmp_path, upright):
    picture, points, _ = upright
    picture.transpose(TURNS[6]).save(tmp_path / "a.jpg")
    face = stored_points(points, 6, picture.size)
    write_data_set(tmp_path, {"a": ["a.jpg"]}, {"a.jpg": face.tolist()})
    totals, _ = run_stage(tmp_path, tmp_path)
    assert totals == {"aligned": 1}


# ---- entries of landmark files -------------------------------------------------------------------
def write_entry(folder, content):
    """Write a landmark file with one entry, of a.jpg; returns its path."""
    file = folder / "landmarks.json"
    file.write_text(json.dumps({"a.jpg": content}))
    return file


@pytest.mark.parametrize("content", [FACE.tolist(), [FACE.tolist()]])
def test_points_may_stand_alone_or_in_a_list_of_one_face(tmp_path, content):
    file = write_entry(tmp_path, content)
    assert align.read_landmarks(file, tmp_path) == {str(tmp_path / "a.jpg"): FACE.tolist()}


@pytest.mark.parametrize("content", [None, []])
def test_null_and_an_empty_list_mean_no_face(tmp_path, content):
    file = write_entry(tmp_path, content)
    assert align.read_landmarks(file, tmp_path) == {str(tmp_path / "a.jpg"): []}


@pytest.mark.parametrize("content", [[FACE.tolist()] * 2, [[]], "x", True])
def test_other_landmarks_are_refused_by_name(tmp_path, content):
    file = write_entry(tmp_path, content)
    with pytest.raises(InputError, match=r"landmarks of 'a\.jpg': "):
        align.read_landmarks(file, tmp_path)


# ---- flags, messages and exit codes; more in test_bad_input.py -----------------------------------
@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"a": ["nothing.jpg"]}, "not one photograph gave"),
        ({"Anna": [], "b": [], "anna": []}, "'Anna' and 'anna'"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_the_mapping(tmp_path, photos, capsys, images, message):
    content, points = one_photo(photos)
    (tmp_path / "a.jpg").write_bytes(content)
    write_data_set(tmp_path, images, {"a.jpg": points, "nothing.jpg": points})
    before = '{"as": ["before"]}'
    (tmp_path / "aligned.json").write_text(before)
    assert align.main(landmark_flags(tmp_path, tmp_path)) == 2
    assert message in error_of(capsys)
    assert (tmp_path / "aligned.json").read_text() == before


@pytest.mark.parametrize("flags", [["--device", "gpu"], ["--device", "mps"], ["--what"]])
def test_wrong_flags_are_one_line_and_exit_code_2(capsys, flags):
    assert align.main(flags) == 2
    assert flags[0] in error_of(capsys)


@pytest.mark.parametrize(("text", "number"), [("0", 0.0), ("1", 1.0), ("5e-1", 0.5)])
def test_number_between_is_a_closed_interval(text, number):
    assert net.number_between(float, 0, 1)(text) == number


def test_number_between_of_whole_numbers_gives_an_int():
    number = net.number_between(int, 1, 3)("3")
    assert number == 3
    assert type(number) is int


def run_failing_script(error):
    """The exit code of a script whose work raises `error`."""
    advice = "lower --batch_size"
    return net.run_script("x.py", Mock(side_effect=error), "stopped, go on", advice)


# (error, exit code, line): what all processes of torchrun meet alike, and what may meet one alone.
MET_BY_ALL = [
    (InputError("a\n  b\tc"), 2, "x.py: a b c"),
    (KeyboardInterrupt(), 130, "x.py: stopped, go on"),
]
MET_BY_ONE = [
    (OSError(28, "No space left on device", "f.png"), 2, "x.py: f.png: No space left on device"),
    (OSError(28, "No space left on device"), 2, "x.py: No space left on device"),
    (OSError(18, "Cross-device link", "a", None, "b"), 2, "x.py: b: Cross-device link"),
    (RuntimeError("CUDNN_STATUS_ALLOC_FAILED"), 2, "x.py: out of memory: lower --batch_size"),
    (torch.OutOfMemoryError("CUDA"), 2, "x.py: out of memory: lower --batch_size"),
]


@pytest.mark.parametrize(("error", "code", "line"), [*MET_BY_ALL, *MET_BY_ONE])
def test_what_a_user_can_mend_is_one_line(capsys, error, code, line):
    assert run_failing_script(error) == code
    assert error_of(capsys) == line


@pytest.mark.parametrize(("error", "code", "line"), [*MET_BY_ALL, *MET_BY_ONE])
def test_each_process_speaks_before_it_knows_of_the_others(capsys, monkeypatch, error, code, line):
    monkeypatch.setenv("RANK", "1")
    assert run_failing_script(error) == code
    assert error_of(capsys) == line


@pytest.fixture
def second_process(monkeypatch):
    """This process is the second of several that torchrun started and that know of each other."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)


@pytest.mark.parametrize(("error", "code", "line"), MET_BY_ALL)
def test_the_second_process_is_silent_about_what_all_meet(
    capsys, second_process, error, code, line
):
    assert run_failing_script(error) == code
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("error", "code", "line"), MET_BY_ONE)
def test_the_second_process_says_what_it_may_have_met_alone(
    capsys, second_process, error, code, line
):
    assert run_failing_script(error) == code
    assert error_of(capsys) == line


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_the_advice_against_too_little_memory_is_another_device_unless_a_script_knows_more(
    capsys, error
):
    assert net.run_script("x.py", Mock(side_effect=error), "stopped") == 2
    assert error_of(capsys) == "x.py: out of memory: take another --device"


@pytest.mark.parametrize(
    "error", [OSError("no number"), RuntimeError("gloo, igloo"), ValueError("x")]
)
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_failing_script(error)


# ---- the detector, with random weights that find something ---------------------------------------
@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    home = tmp_path_factory.mktemp("torch_home")
    write_detector_weights(home)
    threads = torch.get_num_threads()
    # PyTorch's threads wait busily for each other, which is slow where others compute too.
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(home))
        # This is not the default, so that a detector that resets it would be noticed.
        patch.setattr(torch.backends.cudnn, "benchmark", True)
        yield align.FaceDetector("cpu")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small_photo():
    return cv2.resize(data.astronaut(), (160, 128))


@pytest.fixture(scope="module")
def detection(detector, small_photo):
    """(68 landmarks, whether there are several faces) of the small photograph.

    From a fine look, since random weights find other faces at every size.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "COARSE_LOOKS", ())
        return detector(small_photo)


def test_the_detector_gives_68_points_and_notices_several_faces(detection):
    points, several = detection
    assert points.shape == (68, 2)
    assert points.dtype == np.float64
    assert several is True


def test_the_landmarks_are_face_alignments_own_for_the_main_face(detection, small_photo):
    points, _ = detection
    package = sys.modules["face_alignment"]
    reference = package.FaceAlignment(
        package.LandmarksType.TWO_D, device="cpu", flip_input=False, compile=False
    )
    # The package looks for the faces itself, and gives the landmarks of all of them.
    faces, _, boxes = reference.get_landmarks_from_image(small_photo, return_bboxes=True)
    boxes = np.array(boxes)[:, :4]
    main_box, _ = align.main_face(boxes, small_photo.shape)
    (number,) = np.flatnonzero((boxes == main_box).all(1))
    np.testing.assert_allclose(points, faces[number], atol=1e-3)


def test_large_photographs_are_shrunk_for_the_detector(
    detector, detection, small_photo, monkeypatch
):
    points, _ = detection
    large = cv2.resize(small_photo, (2560, 2048), interpolation=cv2.INTER_NEAREST)
    monkeypatch.setattr(align, "DETECTION_SIZE", 160)
    monkeypatch.setattr(align, "COARSE_LOOKS", ())
    large_points, _ = detector(large)
    np.testing.assert_allclose((large_points + 0.5) / 16 - 0.5, points, atol=1e-3)


def test_in_a_photograph_too_small_for_the_detector_there_is_no_face(detector, small_photo):
    assert detector(small_photo[:20]) == (None, False)


@pytest.mark.usefixtures("detection")
def test_the_detector_leaves_the_settings_of_cudnn_as_they_were():
    assert torch.backends.cudnn.benchmark is True


SHAPE = (1000, 1000, 3)
CENTRAL = [400, 400, 600, 600]  # left, top, right, bottom
LARGER_AT_THE_EDGE = [0, 0, 230, 230]
SMALL = [480, 480, 520, 520]
LARGE = [0, 0, 900, 900]


def main_face(*boxes):
    box, several = align.main_face(np.array(boxes, float), SHAPE)
    return box.tolist(), several


def test_a_central_face_is_taken_before_a_larger_one_at_the_edge_which_is_noticed():
    assert main_face(SMALL, LARGER_AT_THE_EDGE, CENTRAL) == (CENTRAL, True)


def test_a_much_smaller_face_is_no_rival():
    assert main_face(SMALL, CENTRAL) == (CENTRAL, False)


@pytest.mark.parametrize(("height", "is_rival"), [(99, False), (100, True), (101, True)])
def test_a_face_of_at_least_half_the_area_is_a_rival(height, is_rival):
    other = [700, 0, 900, height]
    assert main_face(other, CENTRAL) == (CENTRAL, is_rival)


def test_a_much_larger_face_is_taken_though_it_is_not_central():
    box, _ = main_face(CENTRAL, LARGE)
    assert box == LARGE


def test_without_a_box_there_is_no_face():
    assert align.main_face(np.zeros((0, 4)), SHAPE) == (None, False)


# ---- coarse looks before fine ones ---------------------------------------------------------------
class Networks:
    """In place of face_alignment.FaceAlignment: it knows the faces, and finds what S3FD would.

    faces: (N, 4) boxes in a picture of the width `width`. A face is found where its side, the
    root of its area, is at least `smallest` (one number, or one for each face) in pixels of what
    is looked at. Each edge of its box is off by up to the share `error` of that side. `looks` is
    the widths of what was looked at; `asked` is the picture's shape and the box for which
    landmarks were wanted.
    """

    def __init__(self, faces, width, smallest=16, error=0.0, seed=0):
        self.faces = np.reshape(np.array(faces, float), (-1, 4))
        self.width = width
        self.smallest = smallest
        self.error = error
        self.seed = seed
        self.looks = []
        self.face_detector = self

    def __call__(self, *arguments, **options):  # the package's class is called to make networks
        return self

    def to(self, **options):
        pass

    def detect_from_image(self, image):
        self.looks.append(image.shape[1])
        boxes = self.faces * image.shape[1] / self.width
        side = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        rng = np.random.default_rng([self.seed, image.shape[1]])  # one answer for each size
        boxes += rng.uniform(-self.error, self.error, boxes.shape) * side[:, None]
        found = boxes[side >= self.smallest]
        return [np.append(box, 0.9) for box in found]

    def get_landmarks_from_image(self, image, detected_faces):
        (box,) = detected_faces
        self.asked = image.shape, box
        faces = self.faces * image.shape[1] / self.width
        nearest = np.argmin(abs(faces - box).sum(1))
        left, top, right, bottom = faces[nearest]
        corners = np.array([[left, top], [right, bottom]])
        return [np.repeat(corners, 34, axis=0)]


def detector_with(networks):
    package = ModuleType("face_alignment")
    package.LandmarksType = SimpleNamespace(TWO_D=1)
    package.FaceAlignment = networks
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "face_alignment", package)
        return align.FaceDetector("cpu")


PICTURE = np.zeros((860, 1280, 3), np.uint8)  # its middle is (640, 430)
LARGE_FACE = [500, 250, 780, 610]
# Faces; the widths of the looks that they need; the number of the main one; whether several.
SCENES = {
    "one large": ([LARGE_FACE], [320], 0, False),
    "a large one and a small one": ([[10, 10, 40, 40], LARGE_FACE], [320], 1, False),
    "a large one and a large one at the edge": ([LARGE_FACE, [0, 0, 300, 300]], [320], 0, True),
    "one of middle size": ([[580, 360, 700, 500]], [320, 640], 0, False),
    "a small one in the middle, a large one at the edge": (
        [[0, 0, 280, 360], [622, 412, 658, 448]],
        [320, 1280],
        1,
        True,
    ),
    "a face that is nearly half as large": ([LARGE_FACE, [0, 0, 222, 222]], [320, 1280], 0, False),
    "two that are nearly equals": (
        [[300, 300, 580, 560], [700, 300, 980, 560]],
        [320, 1280],
        0,
        True,
    ),
    "one small": ([[600, 400, 640, 440]], [320, 1280], 0, False),
    "none": ([], [320, 1280], None, False),
}


@pytest.mark.parametrize("name", SCENES)
def test_the_detector_looks_as_finely_as_the_faces_need(name):
    faces, looks, main, several = SCENES[name]
    networks = Networks(faces, 1280)
    detector = detector_with(networks)
    points, has_several = detector(PICTURE)
    assert networks.looks == looks
    assert has_several is several
    if main is None:
        assert points is None
    else:
        np.testing.assert_allclose(points[[0, -1]].ravel(), faces[main])
    kind = "fine" if 1280 in looks else "coarse"
    assert detector.looks == {kind: 1}


def test_landmarks_come_from_the_picture_of_full_size_wherever_the_face_was_found():
    networks = Networks(LARGE_FACE, 1280)
    detector_with(networks)(cv2.resize(PICTURE, (1920, 1290)))
    shape, box = networks.asked
    assert networks.looks == [320]
    assert shape == (860, 1280, 3)
    np.testing.assert_allclose(box, LARGE_FACE)


def test_a_picture_whose_copies_are_too_small_is_looked_at_itself():
    networks = Networks([40, 20, 80, 70], 120)
    points, _ = detector_with(networks)(np.zeros((90, 120, 3), np.uint8))
    assert networks.looks == [120]
    assert points is not None


def draw_scene(rng):
    """(shape, faces, the side from which on each is found): a picture with up to five faces."""
    width, height = rng.integers(300, 1281, 2)
    n = rng.integers(0, 6)
    long_side = max(width, height)
    sides = long_side * np.exp(rng.uniform(np.log(0.01), np.log(0.6), n))
    sizes = sides[:, None] * np.exp(rng.uniform(-0.15, 0.15, (n, 2)))
    spread = rng.choice([0.05, 0.2, 0.5])
    middles = np.array([width, height]) * (0.5 + rng.uniform(-spread, spread, (n, 2)))
    faces = np.hstack([middles - sizes / 2, middles + sizes / 2])
    return (height, width, 3), faces, rng.uniform(10, 30, n)


def answer_to_scene(scene, seed, shares):
    """((points, several), FaceDetector.looks) where coarse looks are at these shares of the size.

    The pixels of the picture do not matter, and to shrink them would take most of the time.
    """
    shape, faces, smallest = scene
    networks = Networks(faces, shape[1], smallest, error=0.01, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "COARSE_LOOKS", shares)
        patch.setattr(align.cv2, "resize", lambda image, size, **_: np.empty((*size[::-1], 3)))
        detector = detector_with(networks)
        return detector(np.empty(shape, np.uint8)), detector.looks


def test_coarse_looks_give_the_answers_of_fine_ones_in_any_scene():
    rng = np.random.default_rng(0)
    looks = Counter()
    for number in range(1000):
        scene = draw_scene(rng)
        answer, looks_at_scene = answer_to_scene(scene, number, align.COARSE_LOOKS)
        fine_answer, _ = answer_to_scene(scene, number, ())
        looks += looks_at_scene
        np.testing.assert_equal(answer, fine_answer, f"scene {number}")
    assert min(looks["coarse"], looks["fine"]) > 200  # both were tried


# A single face in the middle of a picture; faces of 100 pixels and more are seen. Its area must be
# 2.5 times the largest that may be unseen, so that it stays the largest of all by far.
@pytest.mark.parametrize(("side", "is_settled"), [(158, False), (159, True)])
def test_a_face_in_the_middle_settles_the_answer_from_a_known_size_on(side, is_settled):
    box = [500 - side / 2, 500 - side / 2, 500 + side / 2, 500 + side / 2]
    assert align.is_settled(np.array([box]), SHAPE, 100) is is_settled


# Its area is 40,000. Less a fifth, it is 22,000 more than that of an unseen face in the middle,
# which two squares of the distance may use up.
@pytest.mark.parametrize(("distance", "is_settled"), [(104, True), (105, False)])
def test_a_face_off_the_middle_settles_the_answer_up_to_a_known_distance(distance, is_settled):
    box = np.array([[400 + distance, 400, 600 + distance, 600]])
    assert align.is_settled(box, SHAPE, 100) is is_settled


@pytest.fixture
def align_noise(tmp_path, stand_in):
    """align_noise(*flags) -> how often the stage asked for a detector or asked one for a face.

    It aligns six pictures of noise with the detector `stand_in`, which finds several faces in
    picture 1, since its height is odd, and none in picture 2, since it is dark.
    """
    rng = np.random.default_rng(0)
    for number in range(6):
        height = 201 if number == 1 else 200
        brightest = 10 if number == 2 else 256
        picture = rng.integers(0, brightest, (height, 200, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    write_data_set(tmp_path, {"a": [f"{number}.png" for number in range(6)]}, {})

    def start(*more):
        stand_in.clear()
        assert align.main(detection_flags(tmp_path, tmp_path, "--device=cpu", *more)) == 0
        return len(stand_in)

    return start


def assert_five_crops_of_noise(out):
    entries = read_report(out)["photographs"]
    assert entries[2]["status"] == "no face"
    assert [entry["flag"] for entry in entries] == ["", "several faces", "", "", "", ""]
    assert {entry["eyes"] for entry in entries if entry["crop"]} == {35.2}
    crops = [f"crops/a/{number}.png" for number in (0, 1, 3, 4, 5)]
    assert read_mapping(out) == {"a": crops}


def test_without_landmarks_one_detector_sees_every_photograph(tmp_path, align_noise):
    assert align_noise() == 1 + 6
    assert_five_crops_of_noise(tmp_path)


def test_the_looks_of_a_run_are_reported_and_printed(tmp_path, align_noise, capsys):
    align_noise()
    assert read_report(tmp_path)["looks"] == {"coarse": 5, "fine": 1}
    assert "faces: 5 settled by a coarse look, 1 by a fine one\n" in capsys.readouterr().out


def test_without_detection_no_looks_are_printed(first_run):
    assert read_report(first_run.folder)["looks"] == {"coarse": 0, "fine": 0}
    assert "look" not in first_run.printed


def test_a_repeated_run_detects_only_where_no_face_was_found(tmp_path, align_noise):
    align_noise()
    assert align_noise() == 1 + 1
    assert_five_crops_of_noise(tmp_path)


def test_realign_detects_everywhere_again(tmp_path, align_noise):
    align_noise()
    assert align_noise("--realign") == 1 + 6
    assert_five_crops_of_noise(tmp_path)


def detection_error(tmp_path, photos, capsys):
    """The line with which the stage refuses to detect faces."""
    assert align.main(detection_flags(photos, tmp_path, "--device=cpu")) == 2
    assert not (tmp_path / "aligned.json").exists()
    return error_of(capsys)


@pytest.mark.parametrize("content", [None, b"<html>Not found</html>", b""])
def test_weights_that_cannot_be_had_are_explained_in_one_line(
    tmp_path, photos, monkeypatch, capsys, content
):
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", Mock(side_effect=URLError("no route to host"))
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "hub" / "checkpoints"
    if content is not None:
        folder.mkdir(parents=True)
        (folder / "s3fd-619a316812.pth").write_bytes(content)
    error = detection_error(tmp_path, photos, capsys)
    for words in (
        "s3fd-619a316812.pth",
        "2DFAN4-11f355bf06.pth.tar",
        "https://",
        str(folder),
        "--landmarks",
    ):
        assert words in error


@pytest.fixture
def replace_face_alignment(tmp_path, monkeypatch):
    """replace_face_alignment(text): a module with this text is imported in the package's place."""
    package = sys.modules.pop("face_alignment", None)
    monkeypatch.syspath_prepend(tmp_path)
    yield (tmp_path / "face_alignment.py").write_text
    sys.modules.pop("face_alignment", None)
    if package is not None:
        sys.modules["face_alignment"] = package


# The package before 1.5, and an older one, which has another name for the type of landmarks.
OLD = """
from enum import Enum

class LandmarksType(Enum):
    TWO_D = 1

class FaceAlignment:
    def __init__(self, kind, device):
        pass
"""
OLDEST = OLD.replace("TWO_D", "_2D")


@pytest.mark.parametrize("text", ["import not_there", "raise ImportError('libGL')", OLDEST, OLD])
def test_another_face_alignment_is_explained_in_one_line(
    tmp_path, photos, replace_face_alignment, capsys, text
):
    replace_face_alignment(text)
    error = detection_error(tmp_path, photos, capsys)
    for words in (
        "face-alignment 1.5 or later",
        importlib.metadata.version("face-alignment"),
        'pip install "face-alignment>=1.5"',
        "--landmarks",
    ):
        assert words in error


OUT_OF_MEMORY = """
import torch

class LandmarksType:
    TWO_D = 1

class FaceAlignment:
    def __init__(self, *args, **options):
        self.face_detector = self

    def to(self, **options):
        pass

    def detect_from_image(self, image):
        raise torch.OutOfMemoryError("CUDA out of memory")
"""


def test_too_little_memory_for_the_detector_is_explained_in_one_line(
    tmp_path, photos, replace_face_alignment, capsys
):
    replace_face_alignment(OUT_OF_MEMORY)
    error = detection_error(tmp_path, photos, capsys)
    for words in ("out of memory", "--device cpu", "--landmarks"):
        assert words in error

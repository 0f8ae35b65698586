import importlib.util
import io
import json
import os
import sys
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


def test_the_largest_most_central_face_is_taken():
    shape = (1000, 1000, 3)
    central, larger_at_edge, small = [400, 400, 600, 600], [0, 0, 230, 230], [480, 480, 520, 520]
    boxes = np.array([small, larger_at_edge, central], float)
    assert align.main_face(boxes, shape).tolist() == central
    huge = [0, 0, 900, 900]
    assert align.main_face(np.array([central, huge], float), shape).tolist() == huge


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
    safe = align.safe_names(names)
    assert len({name.casefold() for name in safe.values()}) == len(names)
    for name in safe.values():
        assert 0 < len(name.encode()) <= 255
        assert Path(name).name == name
        assert not set(name) & set('/\\\0:*?"<>|')
        assert name not in (".", "..")
        assert name.split(".")[0].lower() not in ("con", "nul")
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
    report = json.loads((tmp_path / "crops" / "alignment_report.json").read_text())
    assert {entry["status"] for entry in report} == {"aligned"}
    assert "12 photographs of 4 people: 12 aligned" in capsys.readouterr().out


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
        return capsys.readouterr().out.splitlines()[0].split(": ")[1]

    assert totals() == "12 aligned"
    crops = {p: p.stat().st_mtime_ns for p in (tmp_path / "crops").rglob("*.png")}
    assert totals() == "12 already done"
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

    read = align.read_photo

    def damaged(path):
        if path.endswith("family00A_0.jpg"):
            raise struct.error("unpack requires a buffer of 4 bytes")
        return read(path)

    monkeypatch.setattr(align, "read_photo", damaged)
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
    ]
    content = Path(good).read_bytes()
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "unlisted.jpg").write_bytes(content)
    (tmp_path / "flat.jpg").write_bytes(content)
    points = json.loads((photos / "landmarks.json").read_text())["photos/family00A_0.jpg"]
    landmarks = {name: points for name in [*names, "gone.jpg", good] if name != "unlisted.jpg"}
    landmarks["flat.jpg"] = [[5, 5]] * 5
    (tmp_path / "id_to_images.json").write_text(json.dumps({"a": [*names, good], "b": ["gone.jpg"], "c": []}))
    (tmp_path / "landmarks.json").write_text(json.dumps(landmarks))
    assert align.main(arguments(tmp_path, tmp_path)) == 0
    mapping = json.loads((tmp_path / "aligned.json").read_text())
    assert mapping == {"a": ["crops/a/family00A_0.png"], "b": [], "c": []}
    report = json.loads((tmp_path / "crops" / "alignment_report.json").read_text())
    assert {Path(e["source"]).name: e["status"] for e in report} == {
        **dict.fromkeys(
            ["empty.jpg", "truncated.jpg", "folder.jpg", "missing.jpg", "text.jpg", "fifo.jpg", "gone.jpg"],
            "unreadable",
        ),
        "unlisted.jpg": "no landmarks",
        "flat.jpg": "no face",
        "family00A_0.jpg": "aligned",
    }
    out = capsys.readouterr().out
    assert "2 people have no crop" in out
    assert "and 4 more" in out


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


def test_detector_loads_weights_and_returns_points_of_the_full_image(with_weights):
    detector = align.FaceAlignmentDetector("cpu")
    small = cv2.resize(data.astronaut(), (200, 200))
    points = detector(small)
    assert points.shape == (68, 2)
    seen = {}
    detector.network.face_detector.detect_from_image = lambda image: [np.array([300.0, 100, 600, 500, 0.9])]

    def landmarks(image, detected_faces):
        seen["shape"], seen["box"] = image.shape, detected_faces[0].tolist()
        return [np.tile([99.5, 199.5], (68, 1))]

    detector.network.get_landmarks_from_image = landmarks
    points = detector(np.zeros((1920, 2560, 3), np.uint8))
    assert seen == {"shape": (960, 1280, 3), "box": [300, 100, 600, 500]}
    np.testing.assert_allclose(points, np.tile([199.5, 399.5], (68, 1)))
    detector.network.face_detector.detect_from_image = lambda image: []
    assert detector(small) is None


def test_detection_on_the_cpu_by_worker_processes(with_weights, tmp_path, photos, capsys):
    flags = arguments(photos, tmp_path, "--device", "cpu", "--max_workers", "2")
    flags = [f for f in flags if "landmarks" not in f]
    (tmp_path / "ids.json").write_text(json.dumps({"a": [f"{photos}/photos/family00A_{i}.jpg" for i in range(3)]}))
    flags[1] = str(tmp_path / "ids.json")
    assert align.main(flags) == 0
    report = json.loads((tmp_path / "crops" / "alignment_report.json").read_text())
    assert [entry["status"] for entry in report] == ["aligned"] * 3
    with Image.open(tmp_path / "crops" / "a" / "family00A_0.png") as crop:
        got = np.array(crop)
    image = align.read_photo(photos / "photos" / "family00A_0.jpg")
    expected = align.align_face(image, align.FaceAlignmentDetector("cpu")(image))
    assert np.abs(got.astype(int) - expected).mean() < 2


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
    import subprocess

    script = Path(align.__file__)
    done = subprocess.run([sys.executable, script, *arguments(photos, tmp_path)], capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "aligned.json").exists()

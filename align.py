"""Stage 1: photographs to aligned 112x112 RGB face crops.

    python align.py                                       # all people of id_to_images.json
    python align.py --pairs train_twin_id_pairs.json      # only the people of these pairs
    python align.py --landmarks landmarks.json            # your own landmarks; no detector is loaded

Landmarks -> least-squares similarity to the ArcFace template -> crop, which carries a key of its source, so a repeated
run makes only the missing crops. alignment_report.json and alignment_sheet.png say what became of each photograph.
"""

import argparse
import hashlib
import json
import os
import re
import reprlib
import signal
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from configparser import RawConfigParser
from contextlib import contextmanager, suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torchvision.utils import save_image

from net import CROP_SIZE, InputError, Processes, progress, replacing, run_main
from triplet_dataset import load_crops, read_id_to_images, read_json, read_pairs, resolve, write_json

with suppress(ImportError):  # optional: photographs in Apple's HEIC format
    import pillow_heif

    pillow_heif.register_heif_opener()

# Left eye, right eye (as seen in the picture), nose, mouth corners, in pixels of the crop: the template of
# ArcFace (Deng et al., CVPR 2019; reference points of insightface), which AdaFace's crops follow.
TEMPLATE = [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
TEMPLATE = np.array(TEMPLATE)
DECODED_SIZE = 1920  # long side in pixels to which a JPEG is decoded, at least
WHITES = (1, 255, 1023, 4095, 16383, 65535)  # the largest value of 8 to 16 bits, and of floats
DETECTION_SIZE = 1280  # long side in pixels of what the face detector sees, at most
# Landmarks farther than this from the template (root mean square, crop pixels) are a profile or no face. 120 frontal
# photographs of 30 people reach 6.6 (median 3.1); a head turned by 60 degrees has 9.5, exchanged sides 23.
MAX_RESIDUAL = 8.0
MIN_EYES = 10  # pixels between the eyes in the photograph
WEIGHTS = "s3fd-619a316812.pth and 2DFAN4-11f355bf06.pth.tar from https://www.adrianbulat.com/downloads/python-fan/"


def five_points(landmarks):
    """5 or 68 landmarks (N, 2) -> (5, 2) float64: eye centres, nose tip, mouth corners, in the template's order.

    Of 68 (iBUG 300-W), eye centres are the means of points 36-41 and 42-47. Raises ValueError for anything else.
    """
    points = np.asarray(landmarks)
    if points.shape not in ((5, 2), (68, 2)) or points.dtype.kind not in "iuf" or not (np.abs(points) < 1e6).all():
        raise ValueError(f"not 5 or 68 points [x, y] in pixels: {reprlib.repr(landmarks)}")
    if len(points) == 68:
        points = np.stack([points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]])
    return points.astype(np.float64)


def similarity_transform(source, target):
    """(2, 3) matrix of the least-squares similarity from `source` to `target`, both (N, 2).

    As in Umeyama (IEEE TPAMI 13(4), 1991): for points as complex numbers, the regression target = a * source + b.
    """
    source, target = source @ [1, 1j], target @ [1, 1j]
    centred = source - source.mean()
    a = np.vdot(centred, target) / np.vdot(centred, centred)
    b = target.mean() - a * source.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def residual(points):
    """Root mean square distance in crop pixels of five points (5, 2) from the template, after the similarity."""
    matrix = similarity_transform(points, TEMPLATE)
    return float(np.sqrt(((points @ matrix[:, :2].T + matrix[:, 2] - TEMPLATE) ** 2).sum(1).mean()))


def align_face(image, landmarks):
    """The aligned crop of a face.

    image: (H, W, 3) uint8 RGB; landmarks: (5, 2) or (68, 2), (x, y) in pixels of `image`, the centre of the top left
    pixel being (0, 0). Returns (112, 112, 3) uint8 RGB; black where the photograph ends. Bilinear sampling of a large
    face would skip pixels and alias, so the crop is sampled about as finely as the picture is, then averaged.
    """
    matrix = similarity_transform(five_points(landmarks), TEMPLATE)
    samples = max(1, round(np.linalg.det(matrix[:, :2]) ** -0.5))  # per crop pixel and direction
    matrix *= samples
    matrix[:, 2] += (samples - 1) / 2  # pixel centres
    fine = cv2.warpAffine(image, matrix, (CROP_SIZE * samples,) * 2, flags=cv2.INTER_LINEAR)
    return cv2.resize(fine, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_AREA)


def read_photo(path, long_side=None):
    """(H, W, 3) uint8 RGB array of a photograph, upright by its EXIF orientation; raises OSError or ValueError.

    At full size, but with `long_side` a JPEG is decoded at 1/2, 1/4 or 1/8 if that many pixels are left. Where values
    have more than 8 bits, white is the smallest usual white that none exceeds: files do not say how many bits they use.
    """
    try:
        photo = Image.open(path)
    except UnidentifiedImageError:
        if re.match(rb"....ftyp(he|mif1|msf1)", Path(path).read_bytes()[:12], re.DOTALL):
            raise InputError("a HEIC photograph: pip install pillow-heif, or convert it to JPEG") from None
        raise
    with photo:
        share = min(1, (long_side or max(photo.size)) / max(photo.size))
        photo.draft(None, [max(1, int(side * share)) for side in photo.size])  # does nothing but for JPEGs
        upright = ImageOps.exif_transpose(photo)
        if upright.mode[0] in "IF":  # Pillow's own conversion clips at 255
            values = np.asarray(upright)
            low, high = values.min(), values.max()
            if not 0 <= low <= high <= WHITES[-1]:
                raise InputError(f"values from {low:g} to {high:g}, not within 0 to {WHITES[-1]}: save it with 8 bits")
            white = min(white for white in WHITES if high <= white)
            upright = Image.fromarray(np.uint8(np.round(values * (255.0 / white))))
        return np.array(upright.convert("RGB"))


class FaceDetector:
    """Landmarks of the main face of a photograph, by the networks of the face-alignment package.

    `detector(image)`: (H, W, 3) uint8 RGB -> ((68, 2) float64 in pixels, or None without a face; several as in
    `main_face`). Threads take turns. Raises InputError without package or weights.
    """

    def __init__(self, device="cpu"):
        self.lock = threading.Lock()
        try:  # here, because with landmarks given the alignment does without
            from face_alignment import FaceAlignment, LandmarksType

            # Off: compiling, which takes minutes and a C compiler, and a second pass over mirrored faces.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the package changes them for good
                self.network = FaceAlignment(LandmarksType.TWO_D, device=str(device), flip_input=False, compile=False)
        except (ImportError, AttributeError, TypeError) as error:
            found = ", ".join(package.version for package in distributions(name="face-alignment")) or "none"
            remedy = f'found: {found}; pip install "face-alignment>=1.5", or give --landmarks'
            raise InputError(f"face-alignment 1.5 or later is needed, {remedy} ({error})") from error
        except Exception as error:  # no connection, no space, a damaged file
            remedy = f"put {WEIGHTS} into {torch.hub.get_dir()}/checkpoints, or give --landmarks"
            raise InputError(f"face-alignment's weights cannot be loaded ({error}): {remedy}") from error

    def __call__(self, image):
        full = np.array(image.shape[1::-1])
        size = np.round(full * min(1, DETECTION_SIZE / full.max())).astype(int)
        if size.min() < 32:  # too small for the network
            return None, False
        small = cv2.resize(image, size.tolist(), interpolation=cv2.INTER_AREA)
        with self.lock, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            boxes = self.network.face_detector.detect_from_image(small)  # takes RGB
            box, several = main_face(np.reshape(boxes, (-1, 5))[:, :4], small.shape)
            if box is None:
                return None, False
            points = self.network.get_landmarks_from_image(small, detected_faces=[box])[0]
        return (points.astype(np.float64) + 0.5) * (full / size) - 0.5, several  # by pixel centres


def main_face(boxes, shape):
    """(box, several): the main face among `boxes` (N, 4: left, top, right, bottom) in an image of `shape`.

    The largest area - 2 * (distance of centres)^2, insightface's rule; several: another has at least half its area.
    """
    if len(boxes) == 0:
        return None, False
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    offset = (boxes[:, :2] + boxes[:, 2:]) / 2 - np.array(shape[1::-1]) / 2
    main = np.argmax(area - 2 * (offset**2).sum(1))
    return boxes[main], bool((area >= area[main] / 2).sum() > 1)


def read_landmarks(path, images_folder):
    """{"path": [[x, y], ...] or null} -> {path: five points [[x, y], ...], or [] for a photograph without a face}.

    5 or 68 points in pixels of the upright photograph, or a list with those of one face. Relative paths are taken from
    `images_folder`, that of id_to_images.json, and from the landmark file's own.
    """
    expected = '{"path": [[x, y], ...] or null, ...} with 5 or 68 points per photograph'
    landmarks = {}
    for image, points in read_json(path, expected).items():
        try:
            face = points[0] if np.ndim(points) == 3 and len(points) == 1 else points
            found = five_points(face).tolist() if face else []
        except ValueError as error:
            raise InputError(f"{path}: landmarks of {image!r}: {error}; expected {expected}") from error
        for folder in (images_folder, os.path.dirname(os.path.abspath(path))):
            landmarks[resolve(folder, image)] = found
    slip = find_slip([np.array(points) for points in landmarks.values() if points])
    if slip:
        raise InputError(f"{path}: {slip}; correct the file")
    return landmarks


SLIPS = {  # what most entries may have in common, and how it is put right
    "left and right are exchanged: the eye on the left of the picture comes first": lambda face: face[[1, 0, 2, 4, 3]],
    "x and y are exchanged: a point is [x, y], x from the left": lambda face: face[:, ::-1],
    "y counts from the bottom: it counts from the top": lambda face: face * [1, -1],
    "from 0 to 1: multiply by width and height": lambda face: TEMPLATE if 0 <= face.min() <= face.max() <= 1 else face,
}


def find_slip(faces):
    """What is wrong with most of `faces`, (5, 2) each, in words, or None."""

    def upright(face):  # for a face that lies on its side, each of the slips looks like another one
        x, y = face[1] - face[0]
        return x > max(abs(y), 1) and residual(face) <= MAX_RESIDUAL

    for slip, correct in SLIPS.items():
        if 2 * sum(not upright(face) and upright(correct(face)) for face in faces) > len(faces):
            return slip


class Job(NamedTuple):
    """One photograph of one person, and where its crop goes."""

    identity: str
    source: str
    target: Path
    landmarks: list | None  # five points; [] for no face; None if they must be detected
    key: str | None  # a hash of all that the crop depends on; None if there is no such file


def align_photo(job, detector=None):
    """Make the crop of a job's photograph, with its landmarks or else those that `detector` finds.

    Returns what became of it, which the crop, a PNG, also carries: "status"; "reason" for having no crop; "flag"
    (what to look at); "residual" (see there); "eyes" (pixels between them at full size); "key".
    """
    facts = {"status": "aligned", "reason": "", "flag": "", "residual": None, "eyes": None, "key": job.key}

    def left_out(status, reason):
        return facts | {"status": status, "reason": reason}

    if job.key is None:
        return left_out("unreadable", "no such file")
    if job.landmarks is None and detector is None:
        return left_out("no landmarks", "not in the landmark file")
    try:
        photo = read_photo(job.source, DECODED_SIZE)
        with Image.open(job.source) as full:
            scale = round(max(full.size) / max(photo.shape[:2]))
    except Exception as error:  # a damaged photograph can fail in any way; it must not end the run
        return left_out("unreadable", getattr(error, "strerror", None) or str(error) or repr(error))
    points, several = detector(photo) if job.landmarks is None else (job.landmarks, False)
    if points is None or len(points) == 0:
        return left_out("no face", "no face was found")
    points, size = five_points(points), np.array(photo.shape[1::-1])
    if job.landmarks:
        points = (points + 0.5) / scale - 0.5  # by pixel centres
    eyes, middle = float(np.hypot(*(points[1] - points[0]))), points.mean(0)
    facts["eyes"] = round(eyes * scale, 1)
    if (middle < 0).any() or (middle >= size).any() or eyes > size.max():
        return left_out("poor fit", "the landmarks are outside the photograph")
    if facts["eyes"] < MIN_EYES:
        return left_out("too small", f"{facts['eyes']} pixels between the eyes, under {MIN_EYES}")
    facts["residual"] = round(residual(points), 2)
    if facts["residual"] > MAX_RESIDUAL:
        return left_out("poor fit", f"{facts['residual']} crop pixels from the template: a profile, or no face")
    crop = align_face(photo, points)
    dark, light, flat = crop.mean() < 16, crop.mean() > 239, crop.std((0, 1)).max() < 4
    flags = {"several faces": several, "nearly black": dark, "nearly white": light, "nearly constant": flat}
    facts["flag"] = ", ".join(flag for flag, found in flags.items() if found)
    note = PngImagePlugin.PngInfo()
    note.add_text("alignment", json.dumps(facts))
    with replacing(job.target) as temporary:
        Image.fromarray(crop).save(temporary, "PNG", pnginfo=note)
    return facts


def previous(job):
    """What an earlier run made of a job with the same key, as its crop tells; None without such a crop."""
    with suppress(Exception), Image.open(job.target) as crop:  # whatever fails here is no crop of ours
        facts = json.loads(crop.info["alignment"])
        crop.load()  # a damaged one is made anew
        return facts | {"status": "already done"} if facts["key"] == job.key else None


def file_name(text):
    """A file name for any text, no two alike, never a path: all but letters, digits, "_", "-", "." and space as %XX."""
    if text in ("", ".", ".."):
        return text.replace(".", "%2E") or "%"
    return re.sub(r"[^\w .-]", lambda found: quote(found[0], safe="", errors="surrogatepass"), text)


def file_names(paths, home="."):
    """{path: its stem as a file name; if others share it, plus 8 digits of a hash of the path as seen from `home`}."""
    stems, names = Counter(Path(path).stem.casefold() for path in paths), {}
    for path in paths:
        names[path] = file_name(Path(path).stem)
        if stems[Path(path).stem.casefold()] > 1:
            seen = ascii(Path(os.path.relpath(path, home)).as_posix())  # wherever the data set lies, in any order
            names[path] += f"+{hashlib.sha256(seen.encode()).hexdigest()[:8]}"  # no other name has a plus sign
    return names


def plan(id_to_images, folder, landmarks, home):
    """The Jobs of all photographs of {ID: [path, ...]}; crops go to `folder`/<ID>/<stem>.png.

    landmarks: of read_landmarks, {} to detect them. Keys hold sources as seen from `home`: a data set can be moved.
    """
    jobs, alike = [], {}
    for identity, sources in id_to_images.items():
        if (other := alike.setdefault(identity.casefold(), identity)) != identity:  # one folder where case is ignored
            raise InputError(f"IDs {other!r} and {identity!r} differ in case alone; rename one")
        for source, name in file_names(dict.fromkeys(sources), home).items():
            points, key = landmarks.get(source), None
            if os.path.isfile(source):
                info, settings = os.stat(source), ["arcface-112", DECODED_SIZE, DETECTION_SIZE, MAX_RESIDUAL, MIN_EYES]
                facts = [*settings, os.path.relpath(source, home), info.st_size, info.st_mtime_ns, points]
                key = hashlib.sha256(repr(facts).encode()).hexdigest()
            jobs.append(Job(identity, source, Path(folder, file_name(identity), f"{name}.png"), points, key))
    return jobs


def write_report(mapping, report, folder):
    """Write alignment_report.json and a picture of the worst crops, and print what became of the photographs."""
    totals = Counter(word for entry in report for word in (entry["status"], *entry["flag"].split(", ")) if word)
    sheet = [crop for _, crop in sorted((-e["residual"], e["crop"]) for e in report if e["crop"])[:100]]  # row by row
    write_json(Path(folder, "alignment_report.json"), {"totals": totals, "sheet": sheet, "photographs": report})
    if sheet:
        with replacing(Path(folder, "alignment_sheet.png")) as temporary:
            save_image(load_crops(sheet).pixels.permute(0, 3, 1, 2) / 255, temporary, "png", nrow=10)
    counts = ", ".join(f"{n} {what}" for what, n in totals.items())
    print(f"{len(report)} photographs of {len(mapping)} people: {counts}; see {folder}/alignment_report.json")
    for entry in [entry for entry in report if not entry["crop"]][:5]:
        print(f"  left out, {entry['status']}: {entry['source']!r} ({entry['reason']})")


def align_files(args, pairs_flag="pairs", processes=None):
    """The whole stage, from files to files: align, write the mapping and the report, print the totals.

    args: the flags of `add_alignment_arguments`; `pairs_flag` names the one for the pairs, whose people alone are then
    aligned; the `processes` share the work, the first of them writes. Returns {ID: [crop path, ...]}, which
    --aligned_json now holds, relative to its folder. Raises InputError, also where no photograph gave a crop.
    """
    processes = processes or Processes(args.device)
    photos = read_flag(args, "id_to_images", read_id_to_images)
    if getattr(args, pairs_flag):
        photos = {name: photos[name] for pair in read_flag(args, pairs_flag, read_pairs, photos)[0] for name in pair}
    home, folder = os.path.dirname(os.path.abspath(args.id_to_images)), args.aligned_folder
    landmarks = read_flag(args, "landmarks", read_landmarks, home) if args.landmarks else {}
    jobs = plan(photos, folder, landmarks, home)
    if landmarks and all(job.landmarks is None for job in jobs):
        raise InputError(f"{args.landmarks}: no photograph of {args.id_to_images} is in it; compare the paths")
    mine, first = jobs[processes.rank :: processes.world], processes.rank == 0
    found = {job.target: None if args.realign else previous(job) for job in mine}
    todo, detector = [job for job in mine if not found[job.target]], None
    if todo and not landmarks:
        detector = FaceDetector(processes.device)
        if first:
            print(f"detecting faces on {processes.device}", flush=True)
    pool = ThreadPoolExecutor(args.max_workers)  # image libraries release Python's lock
    try:
        results = pool.map(lambda job: align_photo(job, detector), todo)
        results = progress(results, "aligning", "photo", total=len(todo), disable=not (first and todo))
        found |= {job.target: facts for job, facts in zip(todo, results, strict=True)}
    finally:
        pool.shutdown(cancel_futures=True)
    for part in processes.collect(found):
        found |= part
    mapping, report = {name: [] for name in photos}, []
    for job in jobs:
        crop = str(job.target) if found[job.target]["status"] in ("aligned", "already done") else None
        mapping[job.identity] += [crop] if crop else []
        report.append(found[job.target] | {"id": job.identity, "source": job.source, "crop": crop})
    if first:
        write_report(mapping, report, folder)
    if not any(mapping.values()):
        reason = f"{report[0]['source']}: {report[0]['reason']}" if report else "no photographs are listed"
        raise InputError(f"{args.id_to_images}: not one photograph gave a crop; {reason}")
    if first:
        json_home = os.path.dirname(os.path.abspath(args.aligned_json))
        relative = {n: [Path(os.path.relpath(crop, json_home)).as_posix() for crop in c] for n, c in mapping.items()}
        write_json(args.aligned_json, relative)
    processes.collect(None)  # now all may read it
    return mapping


# ---- command line, shared by the three scripts ----------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """An argument parser for `main(argv) -> exit code`: a wrong flag is an InputError of one line."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)

    def format_help(self):  # without the defaults that say nothing
        return re.sub(r"\s+\(default:\s+(None|False)\)", "", super().format_help())

    def error(self, message):
        raise InputError(f"{message}; --help lists all flags")


def between(kind, low, high):
    """An argparse type: a number of `kind`, int or float, from `low` to `high`, both included."""

    def parse(text):
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"must be {kind.__name__} from {low} to {high}, not {text!r}")

    return parse


def boolean(text):
    """An argparse type: True or False in any usual spelling."""
    words = {**RawConfigParser.BOOLEAN_STATES, "t": True, "y": True, "f": False, "n": False}
    if text.strip().lower() not in words:
        raise argparse.ArgumentTypeError(f"must be True or False, not {text!r}")
    return words[text.strip().lower()]


@contextmanager
def postponed_interrupt():
    """Yield a list that SIGINT and SIGTERM fill instead of stopping a step half-way; a second one stops at once."""
    asked = []

    def note(number, frame):
        asked.append(number)
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def add_alignment_arguments(parser, kind="train", skip=True):
    """The flags that scripts share; `kind`, train or test, is in the default names; `skip`: not align.py's alone."""
    add = parser.add_argument
    add("--id_to_images", default="id_to_images.json", metavar="FILE", help='JSON {"ID": ["photograph", ...], ...}')
    add("--aligned_folder", default=f"{kind}_aligned_images", metavar="DIR", help="gets <ID>/<photograph>.png")
    add("--aligned_json", default=f"id_to_{kind}_aligned_images.json", metavar="FILE", help="JSON, lists the crops")
    if skip:
        add("--skip_alignment", action="store_true", help="take the crops that --aligned_json lists")
        add("--channels", choices=("RGB", "BGR"), help="of CVLface's networks (keys net.*) without a yaml beside them")
    add("--landmarks", metavar="FILE", help='JSON {"path": [[x, y], ...], ...}, 5 or 68 points: no detector')
    add("--realign", action="store_true", help="make every crop anew, also those already done")
    add("--max_workers", type=between(int, 1, 1024), default=6, metavar="N", help="threads that align")
    add("--device", default="auto", help="auto (cuda if there is one that this PyTorch serves), cuda, cuda:N or cpu")


def read_flag(args, flag, read, *more):
    """`read` the file that a flag names; an InputError begins with the flag: `--pairs pairs.json: ...`."""
    try:
        return read(getattr(args, flag), *more)
    except InputError as error:
        raise InputError(f"--{flag} {error}") from error


def read_inputs(args, images_flag, pairs_flag):
    """({ID: [path, ...]}, [(ID, ID), ...], [warning, ...]) of the image list and the pairs that two flags name."""
    images = read_flag(args, images_flag, read_id_to_images)
    return images, *read_flag(args, pairs_flag, read_pairs, images)


def run_script(name, work, interrupted):
    """Run `work()` as a script's main: returns its exit code.

    0 done; 2 wrong input, told in one line on stderr; 130 interrupted, told in the line `interrupted`. The rest is a
    bug and passes. Of torchrun's processes the first speaks, and each of what it may meet alone: a full memory or disk.
    """
    alone = False
    try:
        work()
        return 0
    except KeyboardInterrupt:
        code, message = 130, interrupted
    except InputError as error:
        code, message = 2, str(error)
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)):  # cuDNN and cuBLAS say this
            raise
        code, alone = 2, True
        message = "out of memory: lower --batch_size (training: --images_per_batch), or take another --device"
    except OSError as error:
        if error.errno is None:
            raise
        code, message, alone = 2, ": ".join(filter(None, (error.filename2 or error.filename, error.strerror))), True
    if os.environ.get("RANK", "0") == "0" or alone or not torch.distributed.is_initialized():
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return code


def parse_args(argv=None):
    parser = Parser(prog="align.py", description="Cut aligned 112x112 face crops out of photographs.")
    add_alignment_arguments(parser, skip=False)
    parser.add_argument("--pairs", metavar="FILE", help='JSON [["ID", "twin\'s ID"], ...]: align only these people')
    return parser.parse_args(argv)


def main(argv=None):
    """Run the stage; returns the exit code (see run_script)."""
    interrupted = "interrupted; the crops made so far are kept, run it again to go on"
    return run_script("align.py", lambda: align_files(parse_args(argv), "pairs"), interrupted)


if __name__ == "__main__":
    run_main(main)

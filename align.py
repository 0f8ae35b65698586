"""Stage 1: photographs to aligned 112x112 RGB face crops.

    python align.py --id_to_images id_to_images.json --aligned_folder train_aligned_images \\
      --aligned_json id_to_train_aligned_images.json
    python align.py ... --pairs train_twin_id_pairs.json      # only the people of these pairs
    python align.py ... --landmarks landmarks.json            # your own landmarks; no detector is loaded

Landmarks -> least-squares similarity to the ArcFace template -> crop, as AdaFace was trained. The landmarks
come from face-alignment (SFD detector, 2D landmarks) or from a file. `train_twins.py` and `evaluate_twins.py`
run this stage themselves.

Every crop carries a key of its source file and settings, and the report the keys of what gave none, so a repeated
run only does what is new or changed. What became of each photograph stands in the folder of the crops, in
alignment_report.json and .csv; alignment_sheet.png shows the worst.
"""

import argparse
import csv
import errno
import hashlib
import json
import math
import os
import pickle
import re
import reprlib
import signal
import stat
import sys
import threading
import time
import unicodedata
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from tqdm import tqdm

# Left eye, right eye (as seen in the picture), nose, mouth corners, in pixels of the crop: the template of
# ArcFace (Deng et al., CVPR 2019; reference points of insightface), which AdaFace's crops follow.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
CROP_SIZE = 112  # pixels, width and height
DETECTION_SIZE = 1280  # long side in pixels of what the face detector sees, at most
CROP_EYES = 70  # pixels between the eyes that the crop needs in the decoded photograph: twice the template's 35
# Landmarks farther than this from the template (root mean square, crop pixels) are a profile or no face. The 120
# frontal photographs of 30 people that this was chosen on reach 6.6 (median 3.1); a head turned by 50 degrees has
# 7.5, by 60 degrees 9.5, left and right eye exchanged 23, 99 % of random points more than 11.
MAX_RESIDUAL = 8.0
MIN_EYES = 10  # pixels between the eyes in the photograph; fewer would be enlarged more than 3.5 times
SECOND_FACE = 0.5  # another face of this share of the main face's area could be the one that was meant
DETECTION_BATCH = 8  # photographs that CUDA works on at once
SETTINGS = (
    f"arcface-112 supersampled 2 {DETECTION_SIZE} {MAX_RESIDUAL} {MIN_EYES}"  # of each key: what makes crops differ
)
SHEET_LIMIT = 100  # pictures on the contact sheet


# ---- files ----


class InputError(ValueError):
    """A file, an entry or a setting that a user gave is wrong; the message is one line for that user."""


@contextmanager
def replacing(path):
    """Yield a temporary path in `path`'s folder that becomes `path` when the block ends without error.

    A reader sees the old file or the whole new one, never a part: the data is on the disk before the rename.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        raise InputError(f"{path}: cannot be written; {_explain(error)}; what was there before is unchanged") from error
    except BaseException:
        _remove(temporary)
        raise


def _remove(path):
    with suppress(OSError):  # a folder that vanished or cannot be written to
        path.unlink(missing_ok=True)


def _explain(error):
    """What an OSError says, and the way out, without the file's name."""
    remedy = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space", errno.EFBIG: "raise the limit"}
    remedy |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its rights or take another folder")
    return f"{error.strerror or error}: {remedy.get(error.errno, 'check the path and the disk')}"


def read_json(path):
    """The content of a JSON file: UTF-8 with or without a byte order mark, no key twice, no NaN.

    Half a surrogate pair (\\ud800), which JSON can escape, is refused: no UTF-8 file or terminal can take it later.
    """

    def unique(entries):
        result = {}
        for key, value in entries:
            if key in result:
                raise ValueError(f"key {key!r} stands there twice; merge the two entries")
            result[key] = value
        return result

    def constant(text):
        raise ValueError(f"{text} is not a number in JSON")

    def integer(text):
        if len(text) > 300:  # as a float it would overflow; and int() refuses 4301 digits with advice on Python
            raise ValueError(f"the number {text[:20]}... has {len(text)} digits")
        return int(text)

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_int=integer)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # rare, so the text is made again only then
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.start + 1]
        raise InputError(f"{path}: {half!r} is half a character; rename what is called so") from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply to be what is expected here") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}; correct the file there") from error


def read_id_to_images(path):
    """{"ID": ["path", ...]} -> {ID: [path, ...]}, relative paths taken from the file's own folder."""
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f'{path}: expected {{"ID": ["path", ...], ...}} with at least one ID')
    for name, images in content.items():
        if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
            raise InputError(f"{path}: the images of ID {name!r} must be a list of paths")
    folder = os.path.dirname(os.path.abspath(path))
    return {name: [resolve(folder, image) for image in images] for name, images in content.items()}


def read_pairs(path):
    """[["ID", "twin's ID"], ...] -> [(ID, ID), ...]."""
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise InputError(f'{path}: expected [["ID", "twin\'s ID"], ...] with at least one pair')
    for number, pair in enumerate(content, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise InputError(f"{path}: pair {number} is {reprlib.repr(pair)}; expected two IDs, both strings")
    return [(a, b) for a, b in content]


def resolve(folder, path):
    """`path` as it is meant in a file that lies in `folder`."""
    return os.path.normpath(os.path.join(folder, path))


def write_json(path, content):
    """Write `content` as JSON, atomically; NaN is refused (ValueError), since JSON has none."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.write("\n")


# ---- landmarks from a file ------------------------------------------------------------------------------------------


def read_landmarks(path, images_folder):
    """{"path": [[x, y], ...]} with 5 or 68 points -> {path: (5, 2) float64 array}.

    Relative paths are as in id_to_images.json, so taken from that file's folder (`images_folder`), and
    also from the landmark file's own. Points are pixels of the upright photograph at its full resolution.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f'{path}: expected {{"path": [[x, y], ...], ...}} with at least one entry')
    landmarks = {}
    for image, points in content.items():
        try:
            five = five_points(points)
            if not all(type(value) in (int, float) for point in points for value in point):  # nor "1" nor true
                raise ValueError("not all numbers")
            if np.abs(five).max() > 1e6:  # no photograph is so large, and squares of such may overflow
                raise ValueError("a coordinate is out of range")
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{path}: landmarks of {image!r}: expected 5 or 68 points [x, y] ({error})") from error
        for folder in (images_folder, os.path.dirname(os.path.abspath(path))):
            landmarks[resolve(folder, image)] = five
    return landmarks


# ---- geometry ---------------------------------------------------------------------------------------


def five_points(landmarks):
    """5 or 68 landmarks (N, 2) -> (5, 2) float64: eye centres, nose tip, mouth corners, template order.

    Of 68 (the iBUG 300-W numbering), the eye centres are the means of points 36-41 and 42-47, the nose is
    30, the mouth corners are 48 and 54. Raises ValueError for another shape or a value that is not finite.
    """
    points = np.asarray(landmarks, np.float64)
    if points.shape not in ((5, 2), (68, 2)):
        raise ValueError(f"shape {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("a coordinate is not finite")
    if len(points) == 68:
        points = np.stack([points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]])
    return points


def similarity_transform(source, target):
    """(2, 3) matrix of the least-squares similarity from `source` to `target`, both (N, 2).

    Rotation, uniform scale and translation without reflection, the closed form of Umeyama (IEEE TPAMI 13(4),
    1991). Raises ValueError when all source points coincide.
    """
    source_mean, target_mean = source.mean(0), target.mean(0)
    source, target = source - source_mean, target - target_mean
    variance = (source**2).sum()
    if variance < 1e-12:
        raise ValueError("all landmarks coincide")
    u, singular, vt = np.linalg.svd(target.T @ source)
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt)) or 1.0])
    linear = (singular * sign).sum() / variance * (u * sign) @ vt
    return np.column_stack([linear, target_mean - linear @ source_mean])


def residual(points):
    """Root mean square distance in crop pixels of five points (5, 2) from the template, after the similarity."""
    matrix = similarity_transform(points, TEMPLATE)
    return float(np.sqrt(((points @ matrix[:, :2].T + matrix[:, 2] - TEMPLATE) ** 2).sum(1).mean()))


def eye_distance(points):
    """Pixels between the eyes of five points (5, 2)."""
    return float(np.hypot(*(points[1] - points[0])))


def move_points(points, size, new_size):
    """Points (N, 2) of a picture of `size` (width, height) in the same picture at `new_size`, by pixel centres."""
    return (points + 0.5) * (np.array(new_size) / size) - 0.5


def align_face(image, landmarks):
    """The aligned crop of a face.

    image: (H, W, 3) uint8 RGB; landmarks: (5, 2) or (68, 2), (x, y) in pixels of `image`, the centre of the
    top left pixel being (0, 0). Returns (112, 112, 3) uint8 RGB; black where the photograph ends.

    Bilinear sampling of a large face would skip pixels and alias. So a face four or more times the crop is first
    reduced by area averaging, to no less than twice the crop, and the crop is sampled about as finely as the
    picture is, then averaged. Faces up to 1.5 times the crop are sampled once, as AdaFace's are: nothing is blurred.
    """
    points = five_points(landmarks)
    matrix = similarity_transform(points, TEMPLATE)
    size = 1 / math.sqrt(np.linalg.det(matrix[:, :2]))  # of the face, in crops
    if size >= 4:
        reduced = reduce_image(image, 1 / int(size / 2))
        points = move_points(points, image.shape[1::-1], reduced.shape[1::-1])
        image, matrix = reduced, similarity_transform(points, TEMPLATE)
        size = 1 / math.sqrt(np.linalg.det(matrix[:, :2]))
    samples = max(1, round(size))  # per crop pixel and direction
    matrix *= samples
    matrix[:, 2] += (samples - 1) / 2  # pixel centres
    fine = cv2.warpAffine(image, matrix, (CROP_SIZE * samples,) * 2, flags=cv2.INTER_LINEAR)
    return cv2.resize(fine, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_AREA)


def reduce_image(image, scale):
    """(H, W, 3) image reduced by area averaging."""
    height, width = image.shape[:2]
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


# ---- one photograph ---------------------------------------------------------------------------------


class Photo(NamedTuple):
    """A decoded photograph, upright according to its EXIF orientation."""

    pixels: np.ndarray  # (H, W, 3) uint8 RGB
    size: tuple  # (width, height) in the file, before any reduction
    scale: int  # decoded at 1 / scale


def reduction(ratio):
    """The strongest reduction of a JPEG while decoding (1, 2, 4 or 8) that is not above `ratio`."""
    return max(scale for scale in (1, 2, 4, 8) if scale <= max(ratio, 1))


def decode(path, scale=None):
    """The Photo in a file. A JPEG is decoded at 1 / scale, other files at full size.

    scale: 1, 2, 4 or 8; None for what the detector needs, 960 to 1920 pixels on the long side if there are as many.
    """
    with Image.open(path) as photo:
        size = photo.size
        scale = scale or reduction(max(size) / (0.75 * DETECTION_SIZE))
        if scale > 1:
            photo.draft(None, tuple(max(1, side // scale) for side in size))  # does nothing but for JPEGs
        scale = round(size[0] / photo.size[0])
        if photo.getexif().get(0x0112) in (5, 6, 7, 8):  # the camera was turned by 90 degrees
            size = size[::-1]
        upright = ImageOps.exif_transpose(photo)
        if upright.mode.startswith("I;16") or upright.mode == "I":  # convert() would clip 16 bits at 255
            pixels = np.repeat((np.asarray(upright) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
        else:
            pixels = np.array(upright.convert("RGB"))
        return Photo(pixels, size, scale)


def read_photo(path):
    """(H, W, 3) uint8 RGB array of a photograph at full size, upright according to its EXIF orientation."""
    return decode(path, 1).pixels


class FaceAlignmentDetector:
    """Landmarks of the main face of photographs, by the networks of the face-alignment package.

    `detector(images)`: [(H, W, 3) uint8 RGB, ...] -> [(landmarks, several), ...]; landmarks are (68, 2) float64
    (x, y) in pixels of the image, or None without a face; several says whether another face is almost as large.

    What the package does around its networks is done here: its own detection decodes boxes one by one in Python,
    runs in float32 always, and its landmarks come one image at a time. The boxes and points are the same. On CUDA
    the detector runs in bfloat16 (its activations need the range, its boxes not the precision), the landmark network
    in float16. torch.compile is off: it costs minutes and a C compiler. So is the second pass over mirrored faces
    (`flip_input`), which doubles the landmark network's work.
    """

    def __init__(self, device="cpu"):
        import face_alignment
        import torch

        self.device, self.half = str(device), torch.device(device).type == "cuda"
        self.lock = threading.Lock()  # one batch at a time; decoding and writing go on beside it
        benchmark = torch.backends.cudnn.benchmark  # the package switches it on for the whole process
        try:
            self.network = face_alignment.FaceAlignment(
                face_alignment.LandmarksType.TWO_D,
                device=self.device,
                dtype=torch.float16 if self.half else torch.float32,
                face_detector="sfd",
                flip_input=False,
                compile=False,
            )
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(
                f"face-alignment's weights cannot be loaded ({error}): put s3fd-619a316812.pth and "
                f"2DFAN4-11f355bf06.pth.tar from https://www.adrianbulat.com/downloads/python-fan/ into "
                f"{os.path.join(torch.hub.get_dir(), 'checkpoints')}, or give --landmarks"
            ) from error
        finally:
            torch.backends.cudnn.benchmark = benchmark

    def __call__(self, images):
        small = [reduce_image(image, min(1.0, DETECTION_SIZE / max(image.shape[:2]))) for image in images]
        with self.lock:
            boxes = self.boxes(small)
            faces = [main_face(found, image.shape) for found, image in zip(boxes, small, strict=True)]
            seen = [i for i, (box, _) in enumerate(faces) if box is not None]
            points = self.landmarks([small[i] for i in seen], [faces[i][0] for i in seen])
        result = [(None, False)] * len(images)
        for i, found in zip(seen, points, strict=True):
            result[i] = move_points(found, small[i].shape[1::-1], images[i].shape[1::-1]), faces[i][1]
        return result

    def boxes(self, images):
        """Faces in images (H, W, 3): a list of (N, 4) float64 arrays of left, top, right, bottom.

        Images of one size are one batch. Those under 32 pixels are too small for the network, hence without faces.
        """
        result = [np.zeros((0, 4))] * len(images)
        for shape in {image.shape for image in images if min(image.shape[:2]) >= 32}:
            same = [i for i, image in enumerate(images) if image.shape == shape]
            for i, found in zip(same, self._boxes(np.stack([images[i] for i in same])), strict=True):
                result[i] = found
        return result

    def _boxes(self, images):
        import torch
        from face_alignment.detection.sfd.bbox import nms

        mean = torch.tensor([104.0, 117.0, 123.0], device=self.device).view(1, 3, 1, 1)
        batch = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).flip(1) - mean  # BGR
        found = []  # (M, 6): number of the image, box, score
        with torch.inference_mode(), torch.autocast(batch.device.type, torch.bfloat16, enabled=self.half):
            outputs = self.network.face_detector.face_detector(batch)
        for level, (scores, offsets) in enumerate(zip(outputs[::2], outputs[1::2], strict=True)):
            stride = 2.0 ** (level + 2)  # anchors are four strides wide
            score = scores.float().softmax(1)[:, 1]
            image, y, x = torch.where(score > self.network.face_detector.filter_threshold)
            offset = offsets.float()[image, :, y, x]
            centre = (torch.stack([x, y], 1) + 0.5 + 0.4 * offset[:, :2]) * stride
            half = 2 * stride * (0.2 * offset[:, 2:]).exp()
            found.append(torch.cat([image[:, None], centre - half, centre + half, score[image, y, x, None]], 1))
        found = torch.cat(found).cpu().double().numpy()
        each = [found[found[:, 0] == i, 1:] for i in range(len(images))]
        return [boxes[nms(boxes, 0.3), :4] for boxes in each]

    def landmarks(self, images, boxes):
        """(N, 68, 2) float64 landmarks of one box (4,) per image, in pixels of the image."""
        import torch
        from face_alignment import utils

        result = np.zeros((len(images), 68, 2))
        if not images:
            return result
        boxes = np.array(boxes)
        sides = boxes[:, 2:] - boxes[:, :2]
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2 - sides * [0, utils.CENTER_Y_OFFSET]
        scales = sides.sum(1) / self.network.face_detector.reference_scale
        crops = np.stack([utils.crop(*face) for face in zip(images, centres, scales, strict=True)])
        batch = torch.from_numpy(crops).to(self.device).permute(0, 3, 1, 2).to(self.network.dtype) / 255
        with torch.inference_mode():
            heatmaps = self.network.face_alignment_net(batch)
        heatmaps = (heatmaps[-1] if isinstance(heatmaps, list) else heatmaps).float().cpu().numpy()
        for i, (centre, scale) in enumerate(zip(centres, scales, strict=True)):
            result[i] = utils.get_preds_fromhm(heatmaps[i : i + 1], centre, scale)[1][0]
        return result


def main_face(boxes, shape):
    """(box, several): the main face among `boxes` (N, 4: left, top, right, bottom) in an image of `shape`.

    The box with the largest area - 2 * (distance of its centre to the image's)^2, the rule of insightface's face
    analysis: the largest, unless it stands at the edge. several: another has at least half its area, so that it is
    not certain who was meant. (None, False) without boxes.
    """
    if len(boxes) == 0:
        return None, False
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    offset = (boxes[:, :2] + boxes[:, 2:]) / 2 - np.array([shape[1], shape[0]]) / 2
    main = np.argmax(width * height - 2 * (offset**2).sum(1))
    several = (width * height >= SECOND_FACE * width[main] * height[main]).sum() > 1
    return boxes[main], bool(several)


class Job(NamedTuple):
    """One photograph of one person, and where its crop goes."""

    source: str
    target: Path
    identity: str
    landmarks: np.ndarray | None  # (5, 2), or None to detect them
    key: str | None = None  # what the crop depends on, see job_key


class Result(NamedTuple):
    """What became of a photograph; the report has these fields for each.

    Statuses with a crop: "aligned", "already done"; without: "no face", "too small" (eyes under 10 pixels apart),
    "poor fit" (residual over 8, or landmarks outside the photograph), "no landmarks", "unreadable".
    """

    status: str
    reason: str = ""
    flag: str = ""  # "several faces": there is a crop, perhaps not of the one who was meant
    residual: float | None = None  # of the landmarks from the template, root mean square in crop pixels
    eyes: float | None = None  # pixels between the eyes in the photograph at full size
    scale: int | None = None  # the crop was made from the photograph decoded at 1 / scale


def job_key(job, home):
    """What a crop depends on, as a hash: source (as seen from `home`), its size and time of change, ID, landmarks,
    settings. Raises OSError or ValueError when the source is not a regular file.
    """
    info = os.stat(job.source)
    if not stat.S_ISREG(info.st_mode):
        raise OSError("not a regular file")
    points = "detected" if job.landmarks is None else job.landmarks.tolist()
    facts = [SETTINGS, job.identity, os.path.relpath(job.source, home), info.st_size, info.st_mtime_ns, points]
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogatepass")).hexdigest()


def align_jobs(jobs, detector=None):
    """Make the crops of jobs, detecting faces on all photographs without landmarks at once; [Result, ...]."""
    photos = [open_job(job) for job in jobs]
    unseen = [i for i, job in enumerate(jobs) if job.landmarks is None and isinstance(photos[i], Photo)]
    found = dict(zip(unseen, detector([photos[i].pixels for i in unseen]) if unseen else [], strict=True))
    results = []
    for i, (job, photo) in enumerate(zip(jobs, photos, strict=True)):
        if isinstance(photo, Photo):
            points, several = found.get(i, (job.landmarks, False))
            if i in found and points is not None:
                points = move_points(five_points(points), photo.pixels.shape[1::-1], photo.size)
            photo = cut_face(job, photo, points, several)
        results.append(photo)
    return results


def open_job(job):
    """The Photo of a job, as finely as the crop or the detector needs it, or the Result "unreadable"."""
    try:
        return decode(job.source, None if job.landmarks is None else reduction(eye_distance(job.landmarks) / CROP_EYES))
    except Exception as error:  # a damaged photograph can fail in any way; it must not end the run
        return Result("unreadable", str(error) or type(error).__name__)


def cut_face(job, photo, points, several=False):
    """Write the crop of a job from its Photo and five points in pixels of the full size; returns the Result."""
    if points is None:
        return Result("no face", "no face was detected")
    middle = points.mean(0)
    if not ((middle >= 0) & (middle < photo.size)).all():
        return Result("poor fit", f"the landmarks are outside the photograph of {photo.size[0]}x{photo.size[1]} pixels")
    flag, eyes = "several faces" if several else "", round(eye_distance(points), 1)
    if eyes < MIN_EYES:
        return Result("too small", f"the eyes are {eyes} pixels apart, under {MIN_EYES}", flag, None, eyes, photo.scale)
    error = round(residual(points), 2)
    if error > MAX_RESIDUAL:
        reason = f"landmarks {error} crop pixels from the template, over {MAX_RESIDUAL}: a profile, or no face"
        return Result("poor fit", reason, flag, error, eyes, photo.scale)
    try:
        if photo.scale > reduction(eyes / CROP_EYES):
            photo = decode(job.source, reduction(eyes / CROP_EYES))
        crop = align_face(photo.pixels, move_points(points, photo.size, photo.pixels.shape[1::-1]))
    except Exception as failure:  # as in open_job
        return Result("unreadable", str(failure) or type(failure).__name__)
    result = Result("aligned", "", flag, error, eyes, photo.scale)
    write_crop(job, crop, result)
    return result


def write_crop(job, crop, result):
    """Write a crop as PNG, atomically, with the job's key and the Result in a text chunk."""
    note = PngImagePlugin.PngInfo()
    note.add_text("alignment", json.dumps({"key": job.key, **result._asdict()}))
    with replacing(job.target) as temporary:
        Image.fromarray(crop).save(temporary, "PNG", pnginfo=note)


def earlier_result(job, report):
    """The Result of an earlier run for the same key, from the crop or, for one without a crop, from the old report."""
    try:
        with Image.open(job.target) as crop:
            note = json.loads(crop.info["alignment"])
        if note.pop("key") == job.key:
            return Result(**note)._replace(status="already done")
    except Exception:  # whatever lies there is no crop of ours, or a damaged one
        pass
    entry = report.get(job.key)
    return Result(**{field: entry[field] for field in Result._fields}) if entry else None


def earlier_failures(path):
    """{key: entry} of the photographs without a crop in an earlier run's report; {} without a readable one."""
    try:
        entries = read_json(path)["photographs"]
        remembered = ("no face", "too small", "poor fit")
        return {
            entry["key"]: entry
            for entry in entries
            if entry["status"] in remembered and set(Result._fields) <= set(entry)
        }
    except (InputError, KeyError, TypeError):
        return {}


# ---- many photographs -------------------------------------------------------------------------------


def folded(name):
    """What a file system may take for the same name: without letter case and Unicode's ways to write an accent."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def safe_names(names):
    """{name: file name} for any texts: no path, no two alike, also where case or normalisation do not count.

    Names that are file names on every system stay as they are; others keep their plain part and get, after a tilde
    that no unchanged name has, a part of their hash.
    """

    def unchanged(name):
        ours = r"alignment_(report|sheet)\..*"  # stand beside the people's folders
        bad = r"[\x00-\x1f\x7f\ud800-\udfff/\\:*?\"<>|~]|^[ .-]|[ .]$|^$"
        devices = r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?"  # on Windows
        if re.search(bad, name) or re.fullmatch(f"{devices}|{ours}", name, re.IGNORECASE):
            return False
        return len(name.encode()) <= 200 and alike[folded(name)] == 1

    def hashed(name):
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        return f"{re.sub(r'[^0-9A-Za-z_-]+', '_', name)[:60].lstrip('-')}~{digest}"

    names = list(names)
    alike = Counter(map(folded, names))
    return {name: name if unchanged(name) else hashed(name) for name in names}


def stem_names(paths):
    """{path: file name without ending}: the path's stem, or if others share it, a part of the path's hash too.

    So the names do not depend on the order of the paths.
    """
    stems = Counter(folded(Path(path).stem) for path in paths)
    unique = {p: Path(p).stem if stems[folded(Path(p).stem)] == 1 else f"{Path(p).stem}|{p}" for p in paths}
    names = safe_names(unique.values())
    return {path: names[name] for path, name in unique.items()}


def plan_crops(id_to_images, folder, home=""):
    """{ID: [(source, crop path), ...]}: `folder/<ID>/<source stem>.png`, each source once.

    Names tell sources with one stem apart by their path as seen from `home`, so they survive a move of the data.
    """
    folders = safe_names(id_to_images)
    plan = {}
    for identity, sources in id_to_images.items():
        seen = {source: os.path.relpath(source, home or os.curdir) for source in sources}
        names = stem_names(list(seen.values()))
        plan[identity] = [(s, Path(folder) / folders[identity] / f"{names[seen[s]]}.png") for s in seen]
    return plan


def align_images(id_to_images, folder, landmarks=None, device="cpu", max_workers=6, realign=False, home="", ranks=None):
    """Align every photograph of {ID: [path, ...]} into `folder`; returns ({ID: [crop path, ...]}, report).

    landmarks: {path: (5, 2)} or None to detect them on `device`. The mapping has every ID, in the given order,
    with the crops that there are, also those of earlier runs. The report is a list of dicts, one per photograph:
    "id", "source", "crop" (None without one), the fields of Result, and "key". `realign` makes every crop anew.
    `home` is the folder from which sources are named, so that a data set can be moved as a whole. The processes of
    `ranks` (net.Ranks) share the photographs out among them and all return the whole.

    With landmarks, or with a detector on CUDA, `max_workers` threads share the work (image libraries release
    the interpreter lock); with a detector on the CPU, as many processes, each with a network of its own and
    its share of the cores. Raises InputError when the detector cannot be had or its process dies.
    """
    plan = plan_crops(id_to_images, folder, home)
    failures = {} if realign else earlier_failures(Path(folder) / "alignment_report.json")
    jobs = [
        Job(source, target, identity, None if landmarks is None else landmarks.get(source))
        for identity, crops in plan.items()
        for source, target in crops
    ]
    todo, results, keys = [], {}, {}
    for job in jobs[ranks.rank :: ranks.world] if ranks else jobs:
        if landmarks is not None and job.landmarks is None:
            results[job.target] = Result("no landmarks", "not in the landmark file")
            continue
        try:
            job = job._replace(key=job_key(job, home or os.curdir))
        except (OSError, ValueError) as error:
            results[job.target] = Result("unreadable", getattr(error, "strerror", None) or str(error))
            continue
        keys[job.target] = job.key
        earlier = None if realign else earlier_result(job, failures)
        if earlier:
            results[job.target] = earlier
        else:
            todo.append(job)
    if todo:
        results |= _align_all(todo, landmarks is None, device, max_workers, ranks is None or ranks.rank == 0)
    for other_results, other_keys in ranks.collect((results, keys)) if ranks else ():
        results |= other_results
        keys |= other_keys

    mapping, report = {identity: [] for identity in plan}, []
    for job in jobs:
        job = job._replace(key=keys.get(job.target, job.key))
        result = results[job.target]
        crop = str(job.target) if result.status in ("aligned", "already done") else None
        if crop:
            mapping[job.identity].append(crop)
        report.append({"id": job.identity, "source": job.source, "crop": crop, **result._asdict(), "key": job.key})
    return mapping, report


def _align_all(jobs, detect, device, max_workers, talk=True):
    """{crop path: Result} of all jobs, by a pool of workers, with a progress bar if it may `talk`."""
    cv2.setNumThreads(1)  # the workers share the cores; OpenCV's own threads would fight them
    work, batch = align_jobs, 1
    if detect:
        if talk:
            print(f"detecting faces on {device}", flush=True)
        detector = FaceAlignmentDetector(device)  # on the CPU too: weights are fetched once, errors come at once
    if detect and str(device) == "cpu":
        max_workers = min(max_workers, len(jobs))
        threads = max(1, (os.cpu_count() or 1) // max_workers)
        pool = ProcessPoolExecutor(max_workers, get_context("spawn"), _start_worker, (threads,))
        work = _align_in_worker
        del detector  # the workers have their own
    else:
        pool = ThreadPoolExecutor(max_workers)
        if detect:
            work, batch = partial(align_jobs, detector=detector), DETECTION_BATCH
    batches = [jobs[i : i + batch] for i in range(0, len(jobs), batch)]
    results = {}
    with pool, tqdm(desc="aligning", total=len(jobs), unit="photo", disable=None if talk else True) as bar:
        try:
            for done, found in zip(batches, pool.map(work, batches), strict=True):
                results |= {job.target: result for job, result in zip(done, found, strict=True)}
                bar.update(len(done))
        except BrokenProcessPool as error:
            raise InputError("a detector process died, perhaps out of memory: lower --max_workers") from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


_detector = None  # one per worker process


def _start_worker(threads):
    global _detector
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    cv2.setNumThreads(1)
    _detector = FaceAlignmentDetector("cpu")


def _end_with_parent():
    parent_process().join()
    os._exit(1)  # a killed parent would leave the worker waiting for work for ever


def _align_in_worker(jobs):
    return align_jobs(jobs, _detector)


# ---- the stage ------------------------------------------------------------------------------------------------------


def write_report(folder, mapping, report):
    """Write alignment_report.json, alignment_report.csv and alignment_sheet.png into the folder of the crops."""
    folder = Path(folder)
    content = {
        "totals": Counter(entry["status"] for entry in report),
        "crops_per_id": {identity: len(crops) for identity, crops in mapping.items()},
        "photographs": report,
    }
    write_json(folder / "alignment_report.json", content)
    columns = ["id", "source", "crop", *Result._fields]
    with (
        replacing(folder / "alignment_report.csv") as temporary,
        open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(report)
    with replacing(folder / "alignment_sheet.png") as temporary:
        contact_sheet(report).save(temporary, "PNG")


def contact_sheet(report, columns=10):
    """A PIL picture of what to look at: photographs that were left out, then crops, the largest residual first."""
    worst = sorted(report, key=lambda entry: (entry["crop"] is not None, -(entry["residual"] or 0)))[:SHEET_LIMIT]
    tile, caption, margin, title = CROP_SIZE, 46, 8, 40
    width, height = tile + margin, tile + caption
    rows = -(-len(worst) // columns)
    sheet = Image.new("RGB", (columns * width + margin, title + rows * height + margin), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    text = (
        f"{len(worst)} of {len(report)} photographs: left out, then by residual, the worst first "
        "(px: root mean square distance of the landmarks from the template, in crop pixels)"
    )
    draw.text((margin, 12), text, "black", ImageFont.load_default(14))
    for i, entry in enumerate(worst):
        x, y = margin + i % columns * width, title + i // columns * height
        sheet.paste(tile_picture(entry), (x, y))
        distance = "" if entry["residual"] is None else f"{entry['residual']:.1f} px "
        note = entry["flag"] if entry["crop"] else entry["status"]
        lines = f"{entry['id']}/", Path(entry["source"]).name, distance + note
        for number, line in enumerate(lines):
            line = line.encode("utf-8", "replace").decode().replace("\n", " ")
            line = line if len(line) <= 20 else f"{line[:9]}…{line[-10:]}"
            draw.text((x, y + tile + 1 + 13 * number), line, "firebrick" if note and number == 2 else "black", font)
    return sheet


def tile_picture(entry):
    """The crop of a report entry, or its whole photograph small, or grey if that cannot be read."""
    tile = Image.new("RGB", (CROP_SIZE, CROP_SIZE), "lightgrey")
    try:
        if entry["status"] != "unreadable":
            whole = Image.fromarray(decode(entry["crop"] or entry["source"]).pixels)
            tile.paste(ImageOps.pad(whole, tile.size, color="lightgrey"))
    except Exception:  # the report says what is wrong with it
        pass
    return tile


def align_files(args, pairs, ranks=None):
    """The whole stage, from files to files: align, write the mapping and the reports, print the totals.

    args: the flags of `add_alignment_arguments` and --id_to_images, --aligned_folder, --aligned_json; pairs:
    [(ID, ID), ...] to align only those people, or None for all. Returns the mapping {ID: [crop path, ...]} that
    --aligned_json now holds (there relative to its folder). Raises InputError for wrong input and when not one
    photograph gave a crop; --aligned_json is left as it was then. The processes of `ranks` (net.Ranks) share the work;
    the first of them writes.
    """
    first = ranks is None or ranks.rank == 0
    images_file, folder = args.id_to_images, args.aligned_folder
    photos = read_id_to_images(images_file)
    if pairs is not None:
        names = list(dict.fromkeys(name for pair in pairs for name in pair))
        unknown = [name for name in names if name not in photos]
        if unknown:
            raise InputError(
                f"{images_file}: {len(unknown)} IDs of the pairs are not in it, the first {unknown[0]!r}; "
                "add their images or delete their pairs"
            )
        photos = {name: photos[name] for name in names}
    owner = {}
    for name, sources in photos.items():
        for source in sources:
            if owner.setdefault(source, name) != name:
                raise InputError(f"{images_file}: {source} is listed under {owner[source]!r} and {name!r}; keep one")
    repeated = sum(map(len, photos.values())) - len(owner)
    if repeated and first:
        print(f"warning: {repeated} photographs are listed twice under one ID; each is used once")
    landmarks = None
    if args.landmarks:
        landmarks = read_landmarks(args.landmarks, os.path.dirname(os.path.abspath(images_file)))
        if not any(source in landmarks for sources in photos.values() for source in sources):
            raise InputError(f"{args.landmarks}: no photograph of {images_file} has an entry; compare the paths")
    device = "cpu" if landmarks is not None else ranks.device if ranks else pick_device(args.device)
    home = os.path.dirname(os.path.abspath(images_file))
    mapping, report = align_images(photos, folder, landmarks, device, args.max_workers, args.realign, home, ranks)
    if first:
        write_report(folder, mapping, report)
        print_totals(mapping, report, Path(folder) / "alignment_report.json")
    failed = [entry for entry in report if entry["crop"] is None]
    if len(failed) == len(report):
        reason = f"{failed[0]['source']}: {failed[0]['reason']}" if failed else "no photographs are listed"
        raise InputError(f"{images_file}: not one photograph gave a crop; {reason}")
    home = os.path.dirname(os.path.abspath(args.aligned_json))
    relative = {
        identity: [Path(os.path.relpath(crop, home)).as_posix() for crop in crops]
        for identity, crops in mapping.items()
    }
    if first:
        write_json(args.aligned_json, relative)
    if ranks:
        ranks.collect(None)  # now all may read it
    return mapping


def print_totals(mapping, report, path):
    """Say what became of the photographs, and who has the fewest crops; everything is in the report at `path`."""
    totals = Counter(entry["status"] for entry in report)
    print(f"{len(report)} photographs of {len(mapping)} people: " + ", ".join(f"{n} {s}" for s, n in totals.items()))
    several = sum(entry["crop"] is not None and entry["flag"] != "" for entry in report)
    if several:
        print(f"  {several} crops are of photographs with several faces of like size: see {path.with_suffix('.csv')}")
    failed = [entry for entry in report if entry["crop"] is None]
    for entry in failed[:5]:
        print(f"  left out, {entry['status']}: {entry['source']!r} ({entry['reason']})")
    if len(failed) > 5:
        print(f"  and {len(failed) - 5} more; all are in {path}")
    empty = [identity for identity, crops in mapping.items() if not crops]
    if empty:
        print(f"  {len(empty)} people have no crop, so their pairs will be skipped: {', '.join(map(repr, empty[:5]))}")
    counts = sorted((len(crops), identity) for identity, crops in mapping.items() if crops)
    if counts:
        fewest = ", ".join(f"{identity!r} {n}" for n, identity in counts[:5])
        print(f"  crops per person: {counts[0][0]} to {counts[-1][0]}; fewest: {fewest}")


# ---- command line -----------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser for `main(argv) -> exit code`: a wrong flag is an InputError of one line."""

    def error(self, message):
        raise InputError(f"{message}; --help lists all flags")


def add_alignment_arguments(parser):
    """The flags that the three scripts share."""
    parser.add_argument("--landmarks", metavar="FILE", help=LANDMARKS_HELP)
    parser.add_argument("--realign", action="store_true", help="make every crop anew, also those already done")
    parser.add_argument(
        "--max_workers",
        type=worker_count,
        default=6,
        metavar="N",
        help="photographs aligned at once (default 6); each is a process with its own detector if that runs on the CPU",
    )
    parser.add_argument(
        "--device", type=device_name, default="auto", help="auto (default: cuda if there is one), cuda, cuda:N or cpu"
    )


LANDMARKS_HELP = (
    'JSON {"path": [[x, y], ...]} with 5 or 68 points per photograph, in pixels of the upright image at full '
    "resolution; paths as in --id_to_images; no detector is loaded then"
)


def pick_device(name="auto"):
    """torch.device for "auto" (cuda if there is one, else cpu), "cuda", "cuda:N" or "cpu".

    Also turns TF32 off for the process: reported figures are computed in full float32.
    Raises InputError for a device that this machine does not have.
    """
    import torch  # here, because with landmarks given the alignment does without

    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if available else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if (device.index or 0) >= available:
            raise InputError(f"--device {name}: PyTorch sees {available} CUDA devices here; use --device cpu or auto")
        device = torch.device("cuda", device.index or 0)  # with its number, as tensors say it
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return device


def integer(low, high):
    """An argparse type: an integer from low to high."""

    def parse(text):
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {value}")
        return value

    parse.__name__ = "integer"  # as argparse calls it: "invalid integer value: 'x'"
    return parse


positive_int = integer(1, 10**9)  # what array libraries count with; no use of a flag comes near it
worker_count = integer(1, 1024)  # a pool of processes starts them all
seed_number = integer(0, 2**32 - 1)  # what every random generator takes as a seed


def device_name(text):
    """An argparse type: auto, cpu, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9]\d?))?", text):
        raise argparse.ArgumentTypeError(f"must be auto, cuda, cuda:N or cpu, not {text!r}")
    return text


def parse_args(argv=None):
    parser = Parser(
        prog="align.py",
        description="Cut aligned 112x112 face crops out of photographs, as AdaFace expects them.",
    )
    parser.add_argument("--id_to_images", required=True, metavar="FILE", help='JSON {"ID": ["photograph", ...]}')
    parser.add_argument("--aligned_folder", required=True, metavar="DIR", help="where <ID>/<photograph>.png go")
    parser.add_argument(
        "--aligned_json", required=True, metavar="FILE", help='JSON to write, {"ID": ["crop", ...]}, for training'
    )
    parser.add_argument("--pairs", metavar="FILE", help='JSON [["ID", "twin\'s ID"], ...]: align only these people')
    add_alignment_arguments(parser)
    return parser.parse_args(argv)


def run_script(name, work, interrupted):
    """Run `work()` as a script's main: returns its exit code.

    0 done; 2 wrong input, told in one line on stderr; 130 interrupted, told in the line `interrupted`. Anything else
    that is raised is a bug and passes. Of the processes of torchrun, the others leave it to the first to tell what
    all of them meet.
    """
    first = os.environ.get("RANK", "0") == "0"

    def tell(text):
        with suppress(KeyboardInterrupt):
            if not first:
                time.sleep(5)  # if the first met the same, it ends now, and torchrun ends this one before it speaks
            print(f"{name}: {one_line(text)}", file=sys.stderr)

    try:
        work()
    except InputError as error:
        tell(error)
        return 2
    except OSError as error:
        tell(f"{error.filename or 'a file'}: {_explain(error)}")
        return 2
    except KeyboardInterrupt:
        if first:
            print(f"{name}: {interrupted}", file=sys.stderr)
        return 130
    except MemoryError:
        tell("out of memory: leave out --no_cache, if given, or lower --max_workers")
        return 2
    except RuntimeError as error:
        kind = type(error).__name__  # PyTorch's, which may not have been loaded
        if kind == "OutOfMemoryError":
            tell("out of GPU memory: lower --batch_size, or take another --device")
        elif re.search("DefaultCPUAllocator|could not (create|execute) a primitive", str(error)):  # oneDNN says that
            tell("out of memory: leave out --no_cache, if given, or lower --batch_size or --images_per_batch")
        elif kind in ("DistBackendError", "DistNetworkError", "DistStoreError") or "gloo" in str(error):
            tell(f"another process of this run has died, so it was {interrupted}")
        else:
            raise
        return 2
    return 0


def one_line(message, longest=1000):
    """The text of a message as one line of printable characters, whatever IDs and paths it quotes."""
    text = str(message)
    if len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-longest // 2 :]}"  # the file stands first, the remedy last
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def answer_flags(name, parse_args):
    """Answer --help and wrong flags at the top of a script, before PyTorch is loaded, which takes seconds."""
    code = run_script(name, parse_args, "interrupted")
    if code:
        sys.exit(code)


def main(argv=None):
    """Run the stage; returns the exit code (see run_script)."""

    def work():
        args = parse_args(argv)
        align_files(args, read_pairs(args.pairs) if args.pairs else None)

    return run_script("align.py", work, "interrupted; the crops made so far are kept, run it again to go on")


if __name__ == "__main__":
    sys.exit(main())

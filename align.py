"""Stage 1: photographs to aligned 112x112 RGB face crops.

    python align.py --id_to_images id_to_images.json --aligned_folder train_aligned_images \\
      --aligned_json id_to_train_aligned_images.json
    python align.py ... --pairs train_twin_id_pairs.json      # only the people of these pairs
    python align.py ... --landmarks landmarks.json            # your own landmarks; no detector is loaded

Landmarks -> least-squares similarity to the ArcFace template -> crop, as AdaFace was trained. The landmarks
come from face-alignment (SFD detector, 2D landmarks) or from a file. `train_twins.py` and `evaluate_twins.py`
run this stage themselves.

Every crop carries a key of its source file and settings, so a repeated run only does what is new or changed.
"""

import argparse
import hashlib
import json
import math
import os
import pickle
import re
import reprlib
import stat
import sys
import threading
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

# Left eye, right eye (as seen in the picture), nose, mouth corners, in pixels of the crop: the template of
# ArcFace (Deng et al., CVPR 2019; reference points of insightface), which AdaFace's crops follow.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
DETECTION_SIZE = 1280  # long side in pixels of what the face detector sees
CROP_SIZE = 112  # pixels, width and height
SETTINGS = "arcface-112 area bilinear 1"  # part of each crop's key: change it whenever crops would differ


# ---- files ----


class InputError(ValueError):
    """A file, an entry or a setting that a user gave is wrong; the message is one line for that user."""


@contextmanager
def replacing(path):
    """Yield a temporary path in `path`'s folder that becomes `path` when the block ends without error.

    A reader sees the old file or the whole new one, never a part: the data is on the disk before the rename.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
            if np.asarray(points).dtype.kind not in "if":  # "1" would pass for a number
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


def align_face(image, landmarks):
    """The aligned crop of a face.

    image: (H, W, 3) uint8 RGB; landmarks: (5, 2) or (68, 2), (x, y) in pixels of `image`, the centre of the
    top left pixel being (0, 0). Returns (112, 112, 3) uint8 RGB; black where the photograph ends.

    Faces more than twice as large as the crop are first reduced by area averaging, to no less than twice
    the crop's resolution: bilinear sampling alone would skip pixels and alias.
    """
    points = five_points(landmarks)
    matrix = similarity_transform(points, TEMPLATE)
    factor = int(0.5 / math.sqrt(abs(np.linalg.det(matrix[:, :2]))))
    if factor >= 2:
        image, points = resize(image, points, 1 / factor)
        matrix = similarity_transform(points, TEMPLATE)
    return cv2.warpAffine(image, matrix, (CROP_SIZE, CROP_SIZE), flags=cv2.INTER_LINEAR)


def resize(image, points, scale):
    """Reduce an image by area averaging and move points (N, 2) with it, by pixel centres and actual sizes."""
    height, width = image.shape[:2]
    size = max(1, round(width * scale)), max(1, round(height * scale))
    reduced = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return reduced, (points + 0.5) * (size[0] / width, size[1] / height) - 0.5


# ---- one photograph ---------------------------------------------------------------------------------


def read_photo(path):
    """(H, W, 3) uint8 RGB array of a photograph, upright according to its EXIF orientation."""
    with Image.open(path) as photo:
        upright = ImageOps.exif_transpose(photo)
        if upright.mode.startswith("I;16") or upright.mode == "I":  # convert() would clip 16 bits at 255
            return np.repeat((np.asarray(upright) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
        return np.array(upright.convert("RGB"))


class FaceAlignmentDetector:
    """Landmarks of the main face of a photograph, by the face-alignment package.

    `detector(image)`: (H, W, 3) uint8 RGB -> (68, 2) float64 (x, y) in pixels of `image`, or None without a
    face. Of several faces the one with the largest area - 2 * (distance to the image centre)^2 is taken, the
    rule of insightface's face analysis: the largest, unless it stands at the edge.

    The detector sees the photograph reduced to 1280 pixels on its long side. torch.compile is off: it costs
    minutes and a C compiler, the networks run for milliseconds. So is the second pass over mirrored faces
    (`flip_input`), which doubles the landmark network's work.
    """

    def __init__(self, device="cpu"):
        import face_alignment
        from torch import hub

        try:
            self.network = face_alignment.FaceAlignment(
                face_alignment.LandmarksType.TWO_D,
                device=str(device),
                face_detector="sfd",
                flip_input=False,
                compile=False,
            )
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise InputError(
                f"face-alignment's weights cannot be loaded ({error}): put s3fd-619a316812.pth and "
                f"2DFAN4-11f355bf06.pth.tar from https://www.adrianbulat.com/downloads/python-fan/ into "
                f"{os.path.join(hub.get_dir(), 'checkpoints')}, or give --landmarks"
            ) from error

    def __call__(self, image):
        corners = np.array([[0.0, 0.0], [image.shape[1] - 1, image.shape[0] - 1]])
        scale = min(1.0, DETECTION_SIZE / max(image.shape[:2]))
        small = image
        if scale < 1:
            small, corners = resize(image, corners, scale)
        boxes = self.network.face_detector.detect_from_image(small)
        if len(boxes) == 0:
            return None
        box = main_face(np.array([np.asarray(box, np.float64)[:4] for box in boxes]), small.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            points = self.network.get_landmarks_from_image(small, detected_faces=[box])[0]
        ratio = np.array(image.shape[1::-1]) / small.shape[1::-1]
        return (np.asarray(points, np.float64) + 0.5) * ratio - 0.5


def main_face(boxes, shape):
    """The box (4,) of the main face among `boxes` (N, 4: left, top, right, bottom) in an image of `shape`."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    offset = (boxes[:, :2] + boxes[:, 2:]) / 2 - np.array([shape[1], shape[0]]) / 2
    return boxes[np.argmax(width * height - 2 * (offset**2).sum(1))]


class Job(NamedTuple):
    """One photograph of one person, and where its crop goes."""

    source: str
    target: Path
    identity: str
    landmarks: np.ndarray | None  # (5, 2), or None to detect them


def job_key(job):
    """What a crop depends on, as a hash: source path, size and time of change, ID, landmarks, settings.

    Raises OSError or ValueError when the source is not a regular file.
    """
    info = os.stat(job.source)
    if not stat.S_ISREG(info.st_mode):
        raise OSError("not a regular file")
    points = "detected" if job.landmarks is None else job.landmarks.tolist()
    facts = [SETTINGS, job.identity, os.path.abspath(job.source), info.st_size, info.st_mtime_ns, points]
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogatepass")).hexdigest()


def crop_key(path):
    """The key that `align_one` left in a crop, or None for no crop of ours."""
    try:
        with Image.open(path) as crop:
            return crop.info.get("alignment")
    except (OSError, SyntaxError, ValueError):
        return None


def align_one(job, detector=None):
    """Make the crop of a job; returns (status, reason), the status "aligned", "no face" or "unreadable"."""
    try:
        key = job_key(job)
        image = read_photo(job.source)
    except Exception as error:  # a damaged photograph can fail in any way; it must not end the run
        return "unreadable", str(error) or type(error).__name__
    landmarks = detector(image) if job.landmarks is None else job.landmarks
    if landmarks is None:
        return "no face", "no face was detected"
    try:
        crop = align_face(image, landmarks)
    except (ValueError, ArithmeticError, cv2.error) as error:
        return "no face", str(error)
    note = PngImagePlugin.PngInfo()
    note.add_text("alignment", key)
    with replacing(job.target) as temporary:
        Image.fromarray(crop).save(temporary, "PNG", pnginfo=note)
    return "aligned", ""


# ---- many photographs -------------------------------------------------------------------------------


def safe_names(names):
    """{name: file name} for any texts: no path, no two alike, also where letter case does not count.

    Names that are file names on every system stay as they are; others keep their plain part and get, after a tilde
    that no unchanged name has, a part of their hash.
    """

    def unchanged(name):
        bad = r"[\x00-\x1f\x7f\ud800-\udfff/\\:*?\"<>|~]|^[ .-]|[ .]$|^$"
        devices = r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?"  # on Windows
        if re.search(bad, name) or re.fullmatch(devices, name, re.IGNORECASE):
            return False
        return len(name.encode()) <= 200 and alike[name.casefold()] == 1

    def hashed(name):
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        return f"{re.sub(r'[^0-9A-Za-z_-]+', '_', name)[:60].lstrip('-')}~{digest}"

    names = list(names)
    alike = Counter(name.casefold() for name in names)
    return {name: name if unchanged(name) else hashed(name) for name in names}


def stem_names(paths):
    """{path: file name without ending}: the path's stem, or if others share it, a part of the path's hash too.

    So the names do not depend on the order of the paths.
    """
    stems = Counter(Path(path).stem.casefold() for path in paths)
    unique = {p: Path(p).stem if stems[Path(p).stem.casefold()] == 1 else f"{Path(p).stem}|{p}" for p in paths}
    names = safe_names(unique.values())
    return {path: names[name] for path, name in unique.items()}


def plan_crops(id_to_images, folder):
    """{ID: [(source, crop path), ...]}: `folder/<ID>/<source stem>.png`, each source once."""
    folders = safe_names(id_to_images)
    plan = {}
    for identity, sources in id_to_images.items():
        names = stem_names(dict.fromkeys(sources))
        plan[identity] = [(source, Path(folder) / folders[identity] / f"{name}.png") for source, name in names.items()]
    return plan


def align_images(id_to_images, folder, landmarks=None, device="cpu", max_workers=6, realign=False):
    """Align every photograph of {ID: [path, ...]} into `folder`; returns ({ID: [crop path, ...]}, report).

    landmarks: {path: (5, 2)} or None to detect them on `device`. The mapping has every ID, in the given order,
    with the crops that there are, also those of earlier runs. The report is a list of dicts, one per
    photograph: "id", "source", "crop" (None without one), "status" ("aligned", "already done", "no face",
    "no landmarks", "unreadable") and "reason". `realign` makes every crop anew.

    With landmarks, or with a detector on CUDA, `max_workers` threads share the work (image libraries release
    the interpreter lock); with a detector on the CPU, as many processes, each with a network of its own and
    its share of the cores. Raises InputError when the detector cannot be had or its process dies.
    """
    plan = plan_crops(id_to_images, folder)
    given = landmarks is not None
    jobs, results = [], {}
    for identity, crops in plan.items():
        for source, target in crops:
            target.parent.mkdir(parents=True, exist_ok=True)
            jobs.append(Job(source, target, identity, landmarks.get(source) if given else None))
    todo = []
    for job in jobs:
        if given and job.landmarks is None:
            results[job.target] = "no landmarks", "not in the landmark file"
        elif not realign and _is_done(job):
            results[job.target] = "already done", ""
        else:
            todo.append(job)
    if todo:
        results |= _align_all(todo, not given, device, max_workers)

    mapping, report = {identity: [] for identity in plan}, []
    for job in jobs:
        status, reason = results[job.target]
        crop = str(job.target) if status in ("aligned", "already done") else None
        if crop:
            mapping[job.identity].append(crop)
        report.append({"id": job.identity, "source": job.source, "crop": crop, "status": status, "reason": reason})
    return mapping, report


def _is_done(job):
    try:
        return crop_key(job.target) == job_key(job)
    except (OSError, ValueError):
        return False


def _align_all(jobs, detect, device, max_workers):
    """{crop path: (status, reason)} of all jobs, by a pool of workers, with a progress bar."""
    cv2.setNumThreads(1)  # the workers share the cores; OpenCV's own threads would fight them
    work = align_one
    if detect:
        print(f"detecting faces on {device}", flush=True)
        detector = FaceAlignmentDetector(device)  # on the CPU too: weights are fetched once, errors come at once
    if detect and str(device) == "cpu":
        threads = max(1, (os.cpu_count() or 1) // max_workers)
        pool = ProcessPoolExecutor(max_workers, get_context("spawn"), _start_worker, (threads,))
        work = _align_in_worker
    else:
        pool = ThreadPoolExecutor(max_workers)
        if detect:
            lock = threading.Lock()  # one face at a time on the GPU; decoding and writing go on beside it

            def locked(image):
                with lock:
                    return detector(image)

            work = partial(align_one, detector=locked)
    with pool:
        try:
            outcomes = list(tqdm(pool.map(work, jobs), "aligning", len(jobs), unit="photo", disable=None))
        except BrokenProcessPool as error:
            raise InputError("a detector process died, perhaps out of memory: lower --max_workers") from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {job.target: outcome for job, outcome in zip(jobs, outcomes, strict=True)}


_detector = None  # one per worker process


def _start_worker(threads):
    global _detector
    import torch

    torch.set_num_threads(threads)
    cv2.setNumThreads(1)
    _detector = FaceAlignmentDetector("cpu")


def _align_in_worker(job):
    return align_one(job, _detector)


def align_files(args, pairs):
    """The whole stage, from files to files: align, write the mapping and the report, print the totals.

    args: the flags of `add_alignment_arguments` and --id_to_images, --aligned_folder, --aligned_json; pairs:
    [(ID, ID), ...] to align only those people, or None for all. Returns the mapping {ID: [crop path, ...]} that
    --aligned_json now holds (there relative to its folder). Raises InputError for wrong input and when not one
    photograph gave a crop; --aligned_json is left as it was then.
    """
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
    if repeated:
        print(f"warning: {repeated} photographs are listed twice under one ID; each is used once")
    landmarks = None
    if args.landmarks:
        landmarks = read_landmarks(args.landmarks, os.path.dirname(os.path.abspath(images_file)))
        if not any(source in landmarks for sources in photos.values() for source in sources):
            raise InputError(f"{args.landmarks}: no photograph of {images_file} has an entry; compare the paths")
    device = "cpu" if landmarks is not None else pick_device(args.device)
    mapping, report = align_images(photos, folder, landmarks, device, args.max_workers, args.realign)
    write_json(Path(folder) / "alignment_report.json", report)

    totals = Counter(entry["status"] for entry in report)
    print(f"{len(report)} photographs of {len(photos)} people: " + ", ".join(f"{n} {s}" for s, n in totals.items()))
    failed = [entry for entry in report if entry["crop"] is None]
    for entry in failed[:5]:
        print(f"  left out, {entry['status']}: {entry['source']} ({entry['reason']})")
    if len(failed) > 5:
        print(f"  and {len(failed) - 5} more; all are in {Path(folder) / 'alignment_report.json'}")
    empty = [identity for identity, crops in mapping.items() if not crops]
    if empty:
        print(f"  {len(empty)} people have no crop, so their pairs will be skipped: {', '.join(empty[:5])}")
    if len(failed) == len(report):
        reason = f"{failed[0]['source']}: {failed[0]['reason']}" if failed else "no photographs are listed"
        raise InputError(f"{images_file}: not one photograph gave a crop; {reason}")
    home = os.path.dirname(os.path.abspath(args.aligned_json))
    relative = {
        identity: [Path(os.path.relpath(crop, home)).as_posix() for crop in crops]
        for identity, crops in mapping.items()
    }
    write_json(args.aligned_json, relative)
    return mapping


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
    that is raised is a bug and passes.
    """
    try:
        work()
    except (InputError, OSError) as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch's, which may not have been loaded
            raise
        print(f"{name}: out of GPU memory: lower --batch_size, or take another --device", file=sys.stderr)
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

"""Stage 1: photographs to aligned 112x112 RGB face crops.

    python align.py                                     # all people of id_to_images.json
    python align.py --pairs train_twin_id_pairs.json    # only the people of these pairs
    python align.py --landmarks landmarks.json          # with your landmarks; no detector is loaded

Five landmarks of a face give the least-squares similarity to the ArcFace template, which cuts the
crop out of the photograph. Each crop stores a hash of everything it was made from, so a repeated
run makes only what is missing. alignment_report.json and alignment_sheet.png, beside the crops, say
what became of each photograph and show the worst crops. Whoever deletes a crop rejects it: it stays
out, until --realign.
"""

import errno
import hashlib
import json
import os
import re
import reprlib
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from net import (
    CROP_SIZE,
    InputError,
    OneProcessError,
    Parser,
    Processes,
    file_name,
    file_names,
    interrupt,
    is_out_of_memory,
    number_between,
    progress,
    read_csv,
    read_flag,
    read_json,
    relative_path,
    replacing,
    run_main,
    run_script,
    write_json,
)
from triplet_dataset import (
    count_other_files,
    load_crops,
    read_id_to_images,
    read_pairs,
    resolve,
)

with suppress(ImportError):  # optional: photographs in Apple's HEIC format
    import pillow_heif

    pillow_heif.register_heif_opener()

# Left eye, right eye (as seen in the picture), nose, mouth corners, in pixels of the crop. This
# is the template of ArcFace (Deng et al., CVPR 2019; reference points of insightface), which
# AdaFace follows.
TEMPLATE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)
DECODED_SIZE = 1920  # long side in pixels to which a JPEG is decoded, at least
# A JPEG that was decoded smaller is decoded again, at full size, if its eyes are then fewer pixels
# apart than this. In a crop they are 35 apart; it must not be sharper than what it is made from.
MIN_DECODED_EYES = 60
DETECTION_SIZE = 1280  # long side in pixels of what the face detector sees, at most
SMALLEST_DETECTION = 32  # short side in pixels below which the face detector fails
# The detector first looks at copies of a picture with these shares of its size, in this order.
COARSE_LOOKS = (1 / 4, 1 / 2)
# A face that is found in the picture is surely found in a copy too, if it has a side of at least
# this many pixels there. The detector is made for faces of 16 pixels and more (S3FD, ICCV 2017).
SURELY_SEEN = 32
BOX_TOLERANCE = 0.2  # by which share areas and ratings of one face may differ between two looks
MAX_MEGAPIXELS = 500  # of a photograph, which takes three bytes a pixel
Image.MAX_IMAGE_PIXELS = None  # no limit of Pillow's, which would print a warning
NO_VALUE = ("", "na", "n/a", "nan", "null")  # how tables write that a value is missing
RAW_SUFFIXES = (".nef", ".nrw", ".dng", ".cr2", ".cr3", ".arw", ".orf", ".rw2", ".raf", ".pef")
REDUCED_IMAGE = 1  # the bit for a thumbnail in the TIFF tag NewSubfileType
RAW_MESSAGE = "a camera RAW file: export it as JPEG or TIFF"
# Errors of writing a file whose name the file system does not take.
BAD_NAME = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)
# Values that may mean white: 1 for floats, else that of 8, 10, 12, 14 or 16 bits.
WHITES = (1, 255, 1023, 4095, 16383, 65535)
# Landmarks farther than this from the template (root mean square, crop pixels) are a profile or no
# face. 120 frontal photographs of 30 people reach 6.6, with a median of 3.1; a head turned by 60
# degrees has 9.5, and landmarks with left and right exchanged have 23.
MAX_RESIDUAL = 8.0
MIN_EYES = 10  # distance of the eyes in the photograph, in pixels
DETECTOR_WEIGHTS = (
    "s3fd-619a316812.pth and 2DFAN4-11f355bf06.pth.tar "
    "from https://www.adrianbulat.com/downloads/python-fan/"
)


# ---- geometry ------------------------------------------------------------------------------------
def five_points(landmarks):
    """5 or 68 landmarks (N, 2) -> (5, 2) float64: eyes, nose, mouth corners, as in TEMPLATE.

    Of 68 landmarks (iBUG 300-W), the eyes are the means of points 36-41 and 42-47. Raises
    ValueError for anything else.
    """
    points = np.asarray(landmarks)
    has_shape = points.shape in ((5, 2), (68, 2))
    is_numeric = points.dtype.kind in "iuf"
    if not (has_shape and is_numeric and (np.abs(points) < 1e6).all()):
        raise ValueError(f"not 5 or 68 points [x, y] in pixels: {reprlib.repr(landmarks)}")
    if len(points) == 68:
        left_eye = points[36:42].mean(0)
        right_eye = points[42:48].mean(0)
        points = np.stack([left_eye, right_eye, points[30], points[48], points[54]])
    return points.astype(np.float64)


def similarity_transform(source, target):
    """The (2, 3) matrix of the least-squares similarity from `source` to `target`, both (N, 2).

    As in Umeyama (IEEE TPAMI 13(4), 1991). With points as complex numbers a similarity is
    `a * source + b`, and this is the ordinary regression for a and b.
    """
    source = source[:, 0] + 1j * source[:, 1]
    target = target[:, 0] + 1j * target[:, 1]
    centred = source - source.mean()
    a = np.vdot(centred, target) / np.vdot(centred, centred)
    b = target.mean() - a * source.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def distance_from_template(points):
    """How far five points (5, 2) are from the template after alignment.

    The root mean square distance, in pixels of the crop.
    """
    matrix = similarity_transform(points, TEMPLATE)
    aligned = points @ matrix[:, :2].T + matrix[:, 2]
    squared_distances = ((aligned - TEMPLATE) ** 2).sum(1)
    return float(np.sqrt(squared_distances.mean()))


def align_face(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """The aligned crop of a face.

    image: (H, W, 3) uint8 RGB. landmarks: (5, 2) or (68, 2), (x, y) in pixels of `image`, where
    (0, 0) is the centre of the top left pixel. Returns (112, 112, 3) uint8 RGB, black where the
    photograph ends. Raises ValueError for other landmarks.

    Bilinear sampling of a large face would skip pixels and alias. So the crop is first sampled
    about as finely as the photograph is, and then averaged.
    """
    matrix = similarity_transform(five_points(landmarks), TEMPLATE)
    scale = np.sqrt(np.linalg.det(matrix[:, :2]))  # crop pixels per photograph pixel
    samples = max(1, round(1 / scale))  # per crop pixel, in each direction
    matrix *= samples
    matrix[:, 2] += (samples - 1) / 2  # pixel centres
    fine_size = (CROP_SIZE * samples, CROP_SIZE * samples)
    fine = cv2.warpAffine(image, matrix, fine_size, flags=cv2.INTER_LINEAR)
    return cv2.resize(fine, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_AREA)


def scale_pixels(points, factor):
    """Pixel positions (N, 2), as they are in the same image at `factor` times its size.

    (0, 0) is the centre of the top left pixel, so the image begins at (-0.5, -0.5).
    """
    return (points + 0.5) * factor - 0.5


# ---- photographs ---------------------------------------------------------------------------------
def read_photo(path: str | Path, long_side: int | None = None) -> np.ndarray:
    """The (H, W, 3) uint8 RGB array of a photograph, upright by its EXIF orientation.

    At full size; with `long_side`, a JPEG is decoded at the smallest of 1/1, 1/2, 1/4 and 1/8 of
    its size at which it is still at least `long_side` pixels long. Raises OSError or ValueError
    for a file that is not an image, and InputError, a ValueError, for a camera RAW file, for HEIC
    without pillow-heif, for too many pixels and for values that are not those of an image.
    """
    with open_photo(path) as photo:
        if is_raw_thumbnail(photo):
            raise InputError(RAW_MESSAGE)
        megapixels = photo.width * photo.height / 1e6
        if megapixels > MAX_MEGAPIXELS:
            message = f"{megapixels:.0f} megapixels, more than {MAX_MEGAPIXELS}"
            raise InputError(f"{message}: save it at half its size")
        if long_side:
            share = min(1, long_side / max(photo.size))
            size = [max(1, int(side * share)) for side in photo.size]
            photo.draft(None, size)  # only JPEGs can be decoded smaller
        photo.load()
        with suppress(Exception):  # damaged EXIF data can fail in any way; the pixels may be sound
            ImageOps.exif_transpose(photo, in_place=True)
        image = to_8_bits(photo) if photo.mode[0] in "IF" else photo
        if image.mode != "RGB":  # even without a change, converting copies every pixel
            image = image.convert("RGB")
        return np.array(image)


def open_photo(path):
    """The PIL image of a photograph, of which only the header has been read."""
    if Path(path).suffix.lower() in RAW_SUFFIXES:
        raise InputError(RAW_MESSAGE)
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        beginning = Path(path).read_bytes()[:12]
        if re.match(rb"....ftyp(he|mif1|msf1)", beginning, re.DOTALL):
            way_out = "pip install pillow-heif, or convert it to JPEG"
            raise InputError(f"a HEIC photograph: {way_out}") from None
        raise


def is_raw_thumbnail(photo):
    """Whether Pillow reads a thumbnail: most RAW files are TIFFs whose first image is one."""
    if photo.format != "TIFF":
        return False
    return bool(photo.tag_v2.get(ExifTags.Base.NewSubfileType, 0) & REDUCED_IMAGE)


def to_8_bits(image):
    """A PIL image with 16-bit or float values -> one with 8 bits; Pillow itself would clip at 255.

    Files do not say how many bits they use, so white is the smallest of WHITES that no value
    exceeds.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= WHITES[-1]:
        message = f"values from {low:g} to {high:g}, not within 0 to {WHITES[-1]}"
        raise InputError(f"{message}: save it with 8 bits")
    white = min(white for white in WHITES if high <= white)
    return Image.fromarray(np.uint8(np.round(values * (255.0 / white))))


# ---- landmarks -----------------------------------------------------------------------------------
class FaceDetector:
    """Finds the landmarks of the main face with the networks of the face-alignment package.

    `detector(image)`, image (H, W, 3) uint8 RGB, returns (landmarks, several): (68, 2) float64 in
    pixels, or None without a face, and whether there are several faces, as `main_face` says.
    Threads take turns. Raises InputError if the package or its weights are missing.

    Here "picture" is the image, shrunk to DETECTION_SIZE if it is larger. Small copies of the
    picture are searched for faces first (a coarse look), the picture itself (a fine look) only if
    they do not settle which face is the main one. The landmarks always come from the picture.
    `looks`, {"coarse": n, "fine": n}, counts the images by the look that settled them, except those
    that are too small for the detector.
    """

    def __init__(self, device="cpu"):
        self.lock = threading.Lock()
        self.looks = Counter()
        try:  # imported here, since it is not needed when landmarks are given
            from face_alignment import FaceAlignment, LandmarksType

            # Without compiling, which takes minutes and a C compiler, and without a second look
            # at the mirrored face. The package changes cuDNN's flags for good, unless they are
            # guarded.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                self.network = FaceAlignment(
                    LandmarksType.TWO_D, device=str(device), flip_input=False, compile=False
                )
        except (ImportError, AttributeError, TypeError) as error:
            versions = [package.version for package in distributions(name="face-alignment")]
            found = ", ".join(versions) or "none"
            raise InputError(
                f"face-alignment 1.5 or later is needed, found: {found} ({error}); "
                'pip install "face-alignment>=1.5", or give --landmarks'
            ) from error
        except Exception as error:  # no connection, no space, a damaged file
            if is_out_of_memory(error):
                raise
            folder = f"{torch.hub.get_dir()}/checkpoints"
            raise OneProcessError(
                f"face-alignment's weights cannot be loaded ({error}): "
                f"put {DETECTOR_WEIGHTS} into {folder}, or give --landmarks"
            ) from error
        if torch.device(device).type == "cpu":  # a fifth faster there; elsewhere not measured
            self.network.face_detector.face_detector.to(memory_format=torch.channels_last)

    def __call__(self, image):
        share = min(1, DETECTION_SIZE / max(image.shape[:2]))
        picture, factors = shrink(image, share)
        if picture is None:
            return None, False
        with self.lock:
            points, several = self._detect(picture)
        if points is not None:
            points = scale_pixels(points.astype(np.float64), factors)
        return points, several

    def _detect(self, picture):
        """(landmarks, several), the landmarks in pixels of the picture."""
        try:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                box, several = main_face(self._find_faces(picture), picture.shape)
                if box is None:
                    return None, False
                faces = self.network.get_landmarks_from_image(picture, detected_faces=[box])
                return faces[0], several
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            way_out = "take --device cpu, or give --landmarks"
            raise OneProcessError(f"out of memory while detecting faces: {way_out}") from error

    def _find_faces(self, picture):
        """The boxes (N, 4) of the first look that settles which face is the main one."""
        boxes = None
        for share in COARSE_LOOKS:
            unseen = SURELY_SEEN / share
            # This copy is larger than the last one, so fewer faces are unseen in it. If even that
            # would not settle the boxes of the last one, this look is not worth its time.
            if boxes is not None and not is_settled(boxes, picture.shape, unseen):
                continue
            boxes = self._look(picture, share)
            if is_settled(boxes, picture.shape, unseen):
                self.looks["coarse"] += 1
                return boxes
        self.looks["fine"] += 1
        return self._look(picture, 1)

    def _look(self, picture, share):
        """The boxes (N, 4), in pixels of the picture, of the faces that are found in a copy.

        share: the size of the copy, as a share of the picture's.
        """
        copy, factors = shrink(picture, share)
        if copy is None:
            return np.zeros((0, 4))
        found = self.network.face_detector.detect_from_image(copy)  # takes RGB
        boxes = np.reshape(found, (-1, 5))[:, :4]  # the fifth column is the confidence
        return boxes * np.tile(factors, 2)


def shrink(image, share):
    """(copy, factors): an image at a share of its size; (None, None) if the detector would fail.

    factors (2,): how many times as wide and as high as the copy the image is.
    """
    full_size = np.array([image.shape[1], image.shape[0]])
    size = np.round(full_size * share).astype(int)
    if size.min() < SMALLEST_DETECTION:
        return None, None
    copy = cv2.resize(image, size.tolist(), interpolation=cv2.INTER_AREA)
    return copy, full_size / size


def is_settled(boxes, shape, unseen):
    """Whether `main_face` would answer the same for the boxes of a look at the whole picture.

    boxes, shape: as for `main_face`; False without a box. unseen: every face with a side of at
    least this many pixels is among the boxes.

    A finer look may find more faces, and gives somewhat different boxes. An unseen face has an
    area, and so a rating, of less than unseen^2. So the main face stays the main one if it rates
    more than unseen^2. "several" stays as it is if the main face has more than twice the area
    unseen^2, or if there are several already. BOX_TOLERANCE makes up for the different boxes: all
    comparisons with the main face, of seen and unseen ones, must hold with that share to spare.

    For example, a single face in the middle is settled if its side is at least
    sqrt(2.5) * unseen: 203 pixels for the look at a quarter of the size, 102 for that at half. At
    a distance d from the middle, its area must also be at least 1.25 * (unseen^2 + 2 * d^2).
    """
    if len(boxes) == 0:
        return False
    area, rating = rate_faces(boxes, shape)
    main = np.argmax(rating)
    # The last of the others is the largest face that may be unseen, in the middle of the picture.
    other_areas = np.append(np.delete(area, main), unseen**2)
    other_ratings = np.append(np.delete(rating, main), unseen**2)
    margin = BOX_TOLERANCE * np.maximum(area[main], other_areas)
    if (rating[main] - other_ratings < margin).any():
        return False
    area_ratios = other_areas / area[main]
    surely_several = (area_ratios[:-1] >= (1 + BOX_TOLERANCE) / 2).any()
    surely_one = (area_ratios <= (1 - BOX_TOLERANCE) / 2).all()
    return bool(surely_several or surely_one)


def main_face(boxes, shape):
    """(box, several): the main face among `boxes` in an image of `shape`; (None, False) for none.

    boxes: (N, 4), left, top, right, bottom. The main face has the highest rating of `rate_faces`.
    There are several if another face has at least half its area.
    """
    if len(boxes) == 0:
        return None, False
    area, rating = rate_faces(boxes, shape)
    main = np.argmax(rating)
    n_large = (area >= area[main] / 2).sum()
    return boxes[main], bool(n_large > 1)


def rate_faces(boxes, shape):
    """(areas, ratings), both (N,), of boxes (N, 4) in an image of `shape`.

    The rating is `area - 2 * (distance from the image's centre)^2`, as in insightface.
    """
    top_left, bottom_right = boxes[:, :2], boxes[:, 2:]
    area = (bottom_right - top_left).prod(1)
    image_centre = np.array([shape[1], shape[0]]) / 2
    offset = (top_left + bottom_right) / 2 - image_centre
    return area, area - 2 * (offset**2).sum(1)


def read_landmarks(path, images_folder):
    """{"path": [[x, y], ...] or null} -> {path: five points [[x, y], ...], or [] for no face}.

    An entry has 5 or 68 points in pixels of the upright photograph, or a list with those of one
    face. Relative paths start at `images_folder`, that of id_to_images.json, or at the file's own
    folder.
    """
    expected = '{"path": [[x, y], ...] or null, ...} with 5 or 68 points per photograph'
    own_folder = os.path.dirname(os.path.abspath(path))
    landmarks = {}
    for image, entry in read_json(path, expected).items():
        try:
            points = points_of_entry(entry)
        except ValueError as error:
            message = f"{path}: landmarks of {image!r}: {error}; expected {expected}"
            raise InputError(message) from error
        for folder in (images_folder, own_folder):
            landmarks[resolve(folder, image)] = points
    refuse_landmarks_of_stored_pixels(path, landmarks)
    slip = find_slip([np.array(points) for points in landmarks.values() if points])
    if slip:
        raise InputError(f"{path}: {slip}; correct the file")
    return landmarks


def points_of_entry(entry):
    """The five points of an entry in a landmark file, as a list; [] without a face."""
    if not entry:
        return []
    if np.ndim(entry) == 3 and len(entry) == 1:  # a list of faces, of which there is one
        (entry,) = entry
    return five_points(entry).tolist()


def looks_like_dlibs(face):
    """Whether five points look like dlib's.

    Those are the two corners of the eye on the right of the picture, those of the other eye, and
    the nose.
    """
    right_eye = face[:2].mean(0)
    left_eye = face[2:4].mean(0)
    nose = face[4]
    eye_distance = np.hypot(*(right_eye - left_eye))
    eyes_are_level = np.ptp(face[:4, 1]) < 0.5 * eye_distance
    drop_to_nose = nose[1] - face[:4, 1].mean()
    nose_is_below = 0.2 * eye_distance < drop_to_nose < 1.5 * eye_distance
    nose_is_between = left_eye[0] < nose[0] < right_eye[0]
    return eyes_are_level and nose_is_below and nose_is_between


# Mistakes that run through a whole landmark file: the message about each, and a function that says
# whether five points that are not an upright face may have been written down with this mistake.
SLIPS = {
    "left and right are exchanged: the eye on the left of the picture comes first": (
        lambda face: is_upright(face[[1, 0, 2, 4, 3]])
    ),
    "x and y are exchanged: a point is [x, y], x from the left": (
        lambda face: is_upright(face[:, ::-1])
    ),
    "y counts from the bottom: it counts from the top": lambda face: is_upright(face * [1, -1]),
    "these are dlib's five points, eye corners and nose: give its 68 points, or eyes, nose and "
    "mouth corners": looks_like_dlibs,
    "the points are from 0 to 1: multiply them by width and height": (
        lambda face: face.min() >= 0 and face.max() <= 1
    ),
}


def find_slip(faces):
    """What is wrong with most of `faces`, (5, 2) each, in words; None if nothing is."""
    wrong = [face for face in faces if not is_upright(face)]
    for slip, may_have_slip in SLIPS.items():
        n_with_slip = sum(may_have_slip(face) for face in wrong)
        if n_with_slip > len(faces) / 2:
            return slip
    return None


def is_upright(face):
    """Whether five points look like an upright face.

    False for a face on its side, for which every slip looks like another one.
    """
    right, down = face[1] - face[0]  # the way from the left eye to the right one
    is_level = right > max(abs(down), 1)
    return is_level and distance_from_template(face) <= MAX_RESIDUAL


def refuse_landmarks_of_stored_pixels(path, landmarks):
    """Raise InputError if landmarks were found before the EXIF tag turned the photographs.

    Such a face lies on its side or upside down, and becomes upright when it is turned as the tag
    says. A person who lies down may look the same. So it is an error only if there are more such
    photographs than photographs with a tag that turns them and an upright face.
    """
    faces = {image: np.array(points) for image, points in landmarks.items() if points}
    upright = [image for image, face in faces.items() if is_upright(face)]
    lying = faces.keys() - upright
    mistaken = [image for image in lying if is_upright(turn_as_exif(faces[image], image))]
    if not mistaken:
        return
    turning_tags = range(3, 9)  # 1 leaves a face as it is, 2 mirrors it
    n_right = sum(stored_orientation(image)[0] in turning_tags for image in upright)
    if len(mistaken) > n_right:
        raise InputError(
            f"{path}: the landmarks of {len(mistaken)} photographs, such as {min(mistaken)}, are "
            "those of the stored pixels, before the EXIF tag turns them; give them in pixels of "
            "the upright photograph, which PIL.ImageOps.exif_transpose makes"
        )


def turn_as_exif(face, path):
    """Points (5, 2) in the stored pixels of a photograph, turned as its EXIF tag says."""
    orientation, (width, height) = stored_orientation(path)
    x, y = face.T
    from_right = width - 1 - x
    from_bottom = height - 1 - y
    turned = {
        2: (from_right, y),
        3: (from_right, from_bottom),
        4: (x, from_bottom),
        5: (y, x),
        6: (from_bottom, x),
        7: (from_bottom, from_right),
        8: (y, from_right),
    }
    return np.stack(turned.get(orientation, (x, y)), axis=1)


def stored_orientation(path):
    """(EXIF orientation, size) of a photograph's stored pixels; 1 is upright, 2 is mirrored."""
    try:
        with Image.open(path) as photo:
            return photo.getexif().get(ExifTags.Base.Orientation, 1), photo.size
    except Exception:  # align_photo will say why the photograph cannot be read
        return 1, (0, 0)


# ---- from a photograph to its crop ---------------------------------------------------------------
class Job(NamedTuple):
    """One photograph of one person, and where its crop goes."""

    identity: str
    source: str
    photograph: str  # `source` relative to the data set's folder, which may move
    n_bytes: int | None  # its size; None if there is no such file
    target: Path
    landmarks: list | None  # five points; [] for no face; None if no landmark file has them
    key: str | None  # a hash of all that the crop depends on; None if there is no such file


def plan_jobs(id_to_images, folder, landmarks, home):
    """The Jobs of all photographs of {ID: [path, ...]}; crops go to `folder`/<ID>/<stem>.png.

    landmarks: as `read_landmarks` returns them, {} to detect them. home: the data set's folder.
    """
    jobs = []
    first_spelling = {}
    for identity, sources in id_to_images.items():
        earlier = first_spelling.setdefault(identity.casefold(), identity)
        if earlier != identity:
            message = f"IDs {earlier!r} and {identity!r} differ in case alone"
            reason = "some file systems would put their crops into one folder"
            raise InputError(f"{message}, and {reason}; rename one")
        for source, name in file_names(sources, home).items():
            photograph = relative_path(source, home)
            target = Path(folder, file_name(identity), f"{name}.png")
            points = landmarks.get(source)
            n_bytes = None
            key = None
            if os.path.isfile(source):
                info = os.stat(source)
                n_bytes = info.st_size
                # None if the landmark file leaves this photograph out. That gives another key than
                # "detected", so a crop that the detector made does not count as already done.
                origin = points if landmarks else "detected"
                key = make_key(photograph, n_bytes, info.st_mtime_ns, origin)
            jobs.append(Job(identity, source, photograph, n_bytes, target, points, key))
    return jobs


def make_key(*photograph_and_landmarks):
    """A hash of all that a crop depends on."""
    sizes = [DECODED_SIZE, MIN_DECODED_EYES, DETECTION_SIZE]
    settings = ["arcface-112", *sizes, MAX_RESIDUAL, MIN_EYES]
    return hashlib.sha256(repr([*settings, *photograph_and_landmarks]).encode()).hexdigest()


def earlier_outcome(job):
    """The facts stored in a job's crop, if it was made from the same input; else None."""
    # Any failure means that the file is not there, is damaged, or is none of our crops.
    with suppress(Exception), Image.open(job.target) as crop:
        facts = json.loads(crop.info["alignment"])
        crop.load()  # fails for a damaged crop
        if facts["key"] == job.key:
            return facts | {"status": "already done"}
    return None


def read_report(folder):
    """The entries of the report that earlier runs have left in a folder; [] without one."""
    path = Path(folder, "alignment_report.json")
    if not path.is_file():
        return []
    report = read_json(path, "the report of an alignment; delete it to make a new one")
    entries = report.get("photographs", []) + report.get("photographs_of_others", [])
    if not all("n_bytes" in entry for entry in entries):
        way_out = "delete it (crops that you have deleted are then made again)"
        raise InputError(f"{path}: written by an earlier version of this program; {way_out}")
    return entries


def rejection(job, entry):
    """The facts of a photograph if a person has rejected its crop by deleting it; else None.

    entry: what the last report says of the photograph, or None. It was rejected if the report lists
    a crop that is gone, or says "rejected" already.
    """
    if entry is None or job.target.is_file():
        return None
    if entry["status"] != "rejected":
        if entry["crop"] is None:
            return None
        if job.target.with_name(Path(entry["crop"]).name).is_file():
            return None  # its name was that one, until another photograph got the same stem
    facts = {name: entry[name] for name in ("residual", "eyes")}
    reason = "its crop was deleted; --realign makes all crops again"
    return facts | {"status": "rejected", "reason": reason, "flag": "", "key": job.key}


def align_photo(job, detector=None):
    """Make the crop of a job's photograph; returns the facts about it, which the crop also holds.

    Without landmarks in the job, `detector` finds them. The facts are "status", what became of the
    photograph; "reason", why it has no crop; "flag", what a person should look at in the crop;
    "residual", see `distance_from_template`; "eyes", the distance of the eyes in pixels of the
    photograph; and "key", that of the job.
    """
    facts = {
        "status": "aligned",
        "reason": "",
        "flag": "",
        "residual": None,
        "eyes": None,
        "key": job.key,
    }

    def left_out(status, reason):
        return facts | {"status": status, "reason": reason}

    if job.key is None:
        return left_out("unreadable", reason_for_absence(job.source))
    if job.landmarks is None and detector is None:
        return left_out("no landmarks", "not in the landmark file")
    try:
        photo, reduction = read_reduced_photo(job.source)
    except Exception as error:  # a damaged photograph can fail in any way; the others go on
        return left_out("unreadable", reason_of(error))

    points, several = find_landmarks(job, photo, reduction, detector)
    if points is None:
        return left_out("no face", "no face was found")
    size = np.array([photo.shape[1], photo.shape[0]])
    middle = points.mean(0)
    eye_distance = float(np.hypot(*(points[1] - points[0])))
    facts["eyes"] = round(eye_distance * reduction, 1)
    if (middle < 0).any() or (middle >= size).any() or eye_distance > size.max():
        return left_out("poor fit", "the landmarks are outside the photograph")
    if facts["eyes"] < MIN_EYES:
        return left_out("too small", f"{facts['eyes']} pixels between the eyes, under {MIN_EYES}")
    facts["residual"] = round(distance_from_template(points), 2)
    if facts["residual"] > MAX_RESIDUAL:
        distance = f"{facts['residual']} crop pixels from the template, over {MAX_RESIDUAL}"
        return left_out("poor fit", f"the landmarks are {distance}: a profile, or no face")

    if reduction > 1 and eye_distance < MIN_DECODED_EYES:
        try:
            photo = read_photo(job.source)
        except Exception as error:  # perhaps there is too little memory for it
            return left_out("unreadable", reason_of(error))
        points = scale_pixels(points, reduction)
    crop = align_face(photo, points)
    facts["flag"] = ", ".join(find_oddities(crop, several))
    try:
        save_crop(job.target, crop, facts)
    except OSError as error:
        if error.errno not in BAD_NAME:  # a full disk, for instance, ends the alignment
            raise
        return left_out("no such name", f"{job.target}: {error.strerror}; rename the photograph")
    return facts


def reason_of(error):
    """What an exception says, in a few words."""
    return getattr(error, "strerror", None) or str(error) or repr(error)


def reason_for_absence(path):
    """Why there is no such file."""
    try:
        os.stat(path)
    except PermissionError as error:
        return f"{error.strerror}: the folder {os.path.dirname(path)} may not be entered"
    except (OSError, ValueError):  # ValueError for a path with a null character
        pass
    return "no such file"


def read_reduced_photo(path):
    """(photo, reduction): a photograph, decoded at a smaller size if it is a large JPEG.

    reduction: 1, 2, 4 or 8, the size of the full photograph in units of that of `photo`.
    """
    photo = read_photo(path, DECODED_SIZE)
    with Image.open(path) as full:
        reduction = round(max(full.size) / max(photo.shape[:2]))
    return photo, reduction


def find_landmarks(job, photo, reduction, detector):
    """(points, several): five points (5, 2) in pixels of `photo`, or None; several faces or not."""
    if job.landmarks is None:
        points, several = detector(photo)
        return None if points is None else five_points(points), several
    if not job.landmarks:
        return None, False
    return scale_pixels(five_points(job.landmarks), 1 / reduction), False


def find_oddities(crop, several):
    """Yield what a person should look at in a crop, in words."""
    if several:
        yield "several faces"
    if crop.mean() < 16:
        yield "nearly black"
    if crop.mean() > 239:
        yield "nearly white"
    if crop.std((0, 1)).max() < 4:
        yield "nearly constant"


def save_crop(path, crop, facts):
    """Write a crop as PNG, atomically, with the facts of `align_photo` inside."""
    note = PngImagePlugin.PngInfo()
    note.add_text("alignment", json.dumps(facts))
    with replacing(path) as temporary:
        Image.fromarray(crop).save(temporary, "PNG", pnginfo=note)


# ---- the stage -----------------------------------------------------------------------------------
def align_files(args, pairs_flag="pairs", processes=None):
    """The whole stage, from files to files; returns {ID: [crop path, ...]}.

    args: the flags of `add_alignment_arguments`. pairs_flag: the flag of the pairs whose people
    alone are aligned. processes: share the work; the first of them writes the report and
    --aligned_json, which holds the result with paths relative to its folder. Raises InputError,
    also if no photograph gave a crop.
    """
    processes = processes or Processes(args.device)
    ids, jobs = read_jobs(args, pairs_flag)
    refuse_to_replace_inputs(args, pairs_flag)
    refuse_to_replace_images(jobs)
    refuse_to_replace_list(args)
    if processes.is_main:
        warn_of_another_data_set(jobs, args.aligned_folder)
    outcomes = {}
    looks = Counter()
    for own_outcomes, own_looks in processes.collect(make_crops(args, jobs, processes)):
        outcomes |= own_outcomes
        looks += own_looks
    report = [describe_outcome(job, outcomes[job.target]) for job in jobs]
    mapping = {identity: [] for identity in ids}
    for entry in report:
        if entry["crop"]:
            mapping[entry["id"]].append(entry["crop"])
    if processes.is_main:
        if any(mapping.values()):
            write_mapping(args.aligned_json, mapping)
        write_report(report, looks, args.aligned_folder)
        print_report(mapping, report, looks, args.aligned_folder)
        if os.path.isdir(args.id_to_images):
            kinds = count_other_files(args.id_to_images)
            text = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) or "none"
            print(f"other files in {args.id_to_images}, which are passed over: {text}")
    if not any(mapping.values()):
        reason = "no photographs are listed"
        if report:
            reason = f"{report[0]['source']}: {report[0]['reason']}"
        raise InputError(f"{args.id_to_images}: not one photograph gave a crop; {reason}")
    processes.wait()  # from here on every process may read the files
    return mapping


def home_of_photographs(args):
    """The folder that the paths of --id_to_images are relative to."""
    home = os.path.abspath(args.id_to_images)
    return home if os.path.isdir(home) else os.path.dirname(home)


def read_jobs(args, pairs_flag):
    """([ID, ...], [Job, ...]): the people to align and their photographs."""
    photos = read_flag(args, "id_to_images", read_id_to_images)
    if getattr(args, pairs_flag):
        pairs, _ = read_flag(args, pairs_flag, read_pairs, photos)
        photos = {name: photos[name] for pair in pairs for name in pair}
    home = home_of_photographs(args)
    landmarks = {}
    if args.landmarks:
        landmarks = read_flag(args, "landmarks", read_landmarks, home)
    jobs = plan_jobs(photos, args.aligned_folder, landmarks, home)
    if landmarks and all(job.landmarks is None for job in jobs):
        message = f"no photograph of {args.id_to_images} is in it; compare the paths"
        raise InputError(f"--landmarks {args.landmarks}: {message}")
    return list(photos), jobs


def refuse_to_replace_inputs(args, pairs_flag):
    """Raise InputError if --aligned_json is one of the files that the stage reads."""
    for flag in ("id_to_images", pairs_flag, "landmarks"):
        path = getattr(args, flag)
        if path and os.path.realpath(path) == os.path.realpath(args.aligned_json):
            message = f"the list of crops would replace the file of --{flag}; name another file"
            raise InputError(f"--aligned_json {args.aligned_json}: {message}")


def refuse_to_replace_images(jobs):
    """Raise InputError if a crop would replace an image that is none of our crops."""
    for job in jobs:
        if job.key is None:  # no such photograph
            continue
        if os.path.realpath(job.target.parent) == os.path.dirname(os.path.realpath(job.source)):
            message = "crops would lie among the photographs; name another --aligned_folder"
            raise InputError(f"{job.target.parent}: {message}")
        is_crop = True  # also a file that is not there, or damaged
        with suppress(Exception), Image.open(job.target) as image:
            is_crop = "alignment" in image.info
        if not is_crop:
            message = f"the crop of {job.source} would replace it; name another --aligned_folder"
            raise InputError(f"{job.target}: {message}")


def refuse_to_replace_list(args):
    """Raise InputError if --aligned_json is there and lists images outside --aligned_folder.

    Such a list was made by someone else, of other crops. A file that holds no list of images is
    refused too.
    """
    if not os.path.exists(args.aligned_json):
        return
    folder = os.path.realpath(args.aligned_folder)
    for images in read_flag(args, "aligned_json", read_id_to_images).values():
        for image in images:
            is_own = Path(os.path.realpath(image)).is_relative_to(folder)
            if os.path.isfile(image) and not is_own:
                message = f"it lists {image}, which is not in --aligned_folder"
                way_out = (
                    "say --skip_alignment to use this list in training or evaluation, or name "
                    "another file"
                )
                raise InputError(f"--aligned_json {args.aligned_json}: {message}; {way_out}")


def warn_of_another_data_set(jobs, folder):
    """Warn if crops of other photographs, which are still there, are about to be replaced."""
    made_from = {}
    for entry in read_report(folder):
        if entry["crop"]:
            made_from[entry["id"], Path(entry["crop"]).name] = entry
    n_replaced = 0
    for job in jobs:
        entry = made_from.get((job.identity, job.target.name))
        if entry is None or job.key is None:
            continue
        # The same photograph has another path if it has moved, another size if it was edited. Only
        # if both differ is it taken for another photograph.
        is_another = entry["source"] != job.source and entry["n_bytes"] != job.n_bytes
        if is_another and os.path.isfile(entry["source"]):
            n_replaced += 1
            example = entry["source"]
    if n_replaced:
        way_out = "give each data set an --aligned_folder of its own"
        what = f"{n_replaced} crops of other photographs, such as {example}"
        print(f"warning: {what}, are replaced; {way_out}")


def find_earlier_outcomes(jobs, folder):
    """{target: facts} of the photographs that were aligned before, or whose crop was rejected."""
    earlier_entries = {}
    for entry in read_report(folder):
        # If the whole data set has moved, `photograph` is still the same; if only the list of the
        # photographs has moved, `source` is.
        for path in (entry["photograph"], entry["source"]):
            earlier_entries[entry["id"], path, entry["n_bytes"]] = entry
    outcomes = {}
    for job in jobs:
        interrupt.raise_if_asked()
        # The key is no help here: a copied photograph has another time, and so another key, but its
        # rejected crop has to stay out.
        entry = earlier_entries.get((job.identity, job.photograph, job.n_bytes))
        if entry is None:
            entry = earlier_entries.get((job.identity, job.source, job.n_bytes))
        facts = earlier_outcome(job) or rejection(job, entry)
        if facts:
            outcomes[job.target] = facts
    return outcomes


def make_crops(args, jobs, processes):
    """Make this process's share of the crops.

    Returns ({target: what `align_photo` returns}, FaceDetector.looks).
    """
    own_jobs = jobs[processes.rank :: processes.world]
    outcomes = {} if args.realign else find_earlier_outcomes(own_jobs, args.aligned_folder)
    waiting = [job for job in own_jobs if job.target not in outcomes]
    if not waiting:
        return outcomes, Counter()
    detector = None
    if not args.landmarks:
        detector = FaceDetector(processes.device)
        if processes.is_main:
            print(f"detecting faces on {processes.device}", flush=True)
    pool = ThreadPoolExecutor(args.max_workers)  # image libraries release Python's lock
    try:
        results = pool.map(lambda job: align_photo(job, detector), waiting)
        options = {"total": len(waiting), "disable": not processes.is_main}
        results = progress(results, "aligning", "photo", **options)
        for job, facts in zip(waiting, results, strict=True):
            outcomes[job.target] = facts
            interrupt.raise_if_asked()
    finally:
        pool.shutdown(cancel_futures=True)
    return outcomes, detector.looks if detector else Counter()


def describe_outcome(job, facts):
    """The entry of a photograph in alignment_report.json."""
    has_crop = facts["status"] in ("aligned", "already done")
    crop = str(job.target) if has_crop else None
    return facts | {
        "id": job.identity,
        "source": job.source,
        "photograph": job.photograph,
        "n_bytes": job.n_bytes,
        "crop": crop,
    }


def count_outcomes(report):
    """{status or flag: how many photographs have it}."""
    totals = Counter(entry["status"] for entry in report)
    for entry in report:
        if entry["flag"]:
            totals.update(entry["flag"].split(", "))
    return totals


def entries_to_keep(report, folder):
    """The entries of earlier reports that the next runs must know, beside those of `report`.

    They say which crops have been rejected. Some are about photographs that this run does not list:
    runs with other pairs or lists may use the same folder. The others are about photographs that
    could be read then, but not now, for instance because their drive is not connected.
    """

    def name_of(entry):
        return entry["id"], entry["photograph"]

    status_now = {name_of(entry): entry["status"] for entry in report}
    kept = []
    for entry in read_report(folder):
        status = status_now.get(name_of(entry))
        is_listed = status is not None
        has_become_unreadable = status == "unreadable" and entry["status"] != "unreadable"
        if not is_listed or has_become_unreadable:
            kept.append(entry)
    return kept


def write_report(report, looks, folder):
    """Write alignment_report.json and the picture of the worst crops, alignment_sheet.png."""
    with_crop = [entry for entry in report if entry["crop"]]
    with_crop.sort(key=lambda entry: (-entry["residual"], entry["crop"]))
    sheet = [entry["crop"] for entry in with_crop[:100]]
    content = {
        "totals": count_outcomes(report),
        "sheet": sheet,
        "photographs": report,
        "looks": {"coarse": looks["coarse"], "fine": looks["fine"]},
        "photographs_of_others": entries_to_keep(report, folder),
    }
    write_json(Path(folder, "alignment_report.json"), content)
    if sheet:
        # Imported here, since it takes longer than PyTorch, and only this picture needs it.
        from torchvision.utils import save_image

        crops = load_crops(sheet).pixels.permute(0, 3, 1, 2) / 255
        with replacing(Path(folder, "alignment_sheet.png")) as temporary:
            save_image(crops, temporary, "png", nrow=10)


def print_report(mapping, report, looks, folder):
    """Print the totals, and why the first five photographs without a crop have none."""
    counts = ", ".join(f"{n} {what}" for what, n in count_outcomes(report).items())
    print(f"{len(report)} photographs of {len(mapping)} people: {counts}")
    if looks:
        print(f"faces: {looks['coarse']} settled by a coarse look, {looks['fine']} by a fine one")
    print(f"details: {folder}/alignment_report.json")
    without_crop = [entry for entry in report if not entry["crop"]]
    for entry in without_crop[:5]:
        print(f"  left out, {entry['status']}: {entry['source']!r} ({entry['reason']})")


def write_mapping(path, mapping):
    """Write {ID: [crop path, ...]} with paths relative to the file's folder."""
    folder = os.path.dirname(os.path.abspath(path))
    relative = {}
    for identity, crops in mapping.items():
        relative[identity] = [relative_path(crop, folder) for crop in crops]
    write_json(path, relative)


# ---- lists that others have made of the images ---------------------------------------------------
class CropFinder:
    """Finds the crop that a path in a pair list or in metadata means.

    `finder(path, where)` returns (ID, crop). The path may be that of the crop, as in
    --aligned_json, or that of its photograph, as in --id_to_images. The crop is None if it is not
    in use: the photograph gave none, it is the copy of another, or its person is in no pair.
    aligned: {ID: [crop, ...]}, the crops in use. Raises InputError for a path that neither file
    lists; its message begins with `where`.
    """

    def __init__(self, args, aligned):
        self.known = {}  # {path of a photograph or a crop: (ID, crop in use or None)}
        self.files = args.aligned_json  # for messages
        self.folders = [os.path.dirname(os.path.abspath(args.aligned_json))]  # where paths start
        for identity, crops in aligned.items():
            self.known |= {os.path.abspath(crop): (identity, crop) for crop in crops}
        if os.path.exists(args.id_to_images):
            self.files = f"{args.id_to_images} or {args.aligned_json}"
            self.folders.insert(0, home_of_photographs(args))
            self._add_photographs(args, aligned)
        self._add_unused_crops(args)

    def _add_photographs(self, args, aligned):
        for identity, sources in read_flag(args, "id_to_images", read_id_to_images).items():
            crop_named = {Path(crop).stem: crop for crop in aligned.get(identity, [])}
            names = file_names(sources, home_of_photographs(args))
            for source, name in names.items():
                self.known.setdefault(source, (identity, crop_named.get(name)))

    def _add_unused_crops(self, args):
        for identity, crops in read_flag(args, "aligned_json", read_id_to_images).items():
            for crop in crops:
                self.known.setdefault(crop, (identity, None))

    def __call__(self, path, where):
        for folder in self.folders:
            full_path = resolve(folder, path)
            if full_path in self.known:
                return self.known[full_path]
        raise InputError(f"{where}: no image {path!r} in {self.files}; correct or delete the entry")


class ListedPair(NamedTuple):
    """Two images that a pair list names."""

    where: str  # the file and the number of the entry
    ids: tuple  # whom they show
    crops: tuple  # None for a photograph that gave no crop
    same: bool  # one person, by the list
    fold: str | None


def read_pair_list(path, finder):
    """The ListedPairs of a file.

    It is a CSV file with the columns path_1, path_2, same (1 for one person, else 0), and perhaps
    fold; or it has a line of two paths and 0 or 1 for each pair. Raises InputError for wrong
    entries.
    """
    pairs = []
    for number, row in enumerate(read_rows_of_pairs(path), 1):
        where = f"{path}: pair {number}"
        if row["same"].strip() not in ("0", "1"):
            raise InputError(f"{where}: same must be 1 or 0, not {row['same']!r}")
        same = row["same"].strip() == "1"
        found = [finder(row[column], where) for column in ("path_1", "path_2")]
        ids, crops = zip(*found, strict=True)
        if same != (ids[0] == ids[1]):
            names = " and ".join(repr(name) for name in ids)
            raise InputError(f"{where}: same is {row['same']}, but the images are of {names}")
        fold = row["fold"].strip() if "fold" in row else None
        if fold == "":
            raise InputError(f"{where}: fold is empty; fill it in, or leave the column out")
        pairs.append(ListedPair(where, ids, crops, same, fold))
    return pairs


def read_rows_of_pairs(path):
    """The rows of a pair list, as dicts, before its paths are looked up."""
    if str(path).lower().endswith(".csv"):
        return read_csv(path, ("path_1", "path_2", "same"), optional=["fold"])
    return read_lines_of_pairs(path)


def read_lines_of_pairs(path):
    """The rows of a file with two paths and 0 or 1 in each line."""
    expected = "expected two paths without spaces and 0 or 1 in each line, or a .csv file"
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; {expected}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if words and len(words) != 3:
            raise InputError(f"{path}: line {number} has {len(words)} words; {expected}")
        if words:
            rows.append(dict(zip(("path_1", "path_2", "same"), words, strict=True)))
    if not rows:
        raise InputError(f"{path}: no pair in it; {expected}")
    return rows


def read_metadata(path, columns, finder):
    """{column: {crop: value}} of a CSV file with the column `path` and these columns.

    NO_VALUE, and images whose crop is not in use, are left out. Raises InputError for an image with
    two values, and for a value in two spellings.
    """
    values = {column: {} for column in columns}
    for number, row in enumerate(read_csv(path, ("path", *columns)), 1):
        _, crop = finder(row["path"], f"{path}: row {number}")
        for column in columns:
            value = row[column].strip()
            if not crop or value.casefold() in NO_VALUE:
                continue
            if values[column].setdefault(crop, value) != value:
                message = f"another row says {values[column][crop]!r}, not {value!r}, of this image"
                raise InputError(f"{path}: row {number}: {message}; keep the right one")
    for column, value_of in values.items():
        refuse_two_spellings(path, column, value_of)
    return values


def refuse_two_spellings(path, column, value_of):
    """Raise InputError if two values differ in capitals or in ".0" alone: they would be two."""
    spelling = {}
    for value in value_of.values():
        plain = value.casefold().removesuffix(".0")
        first = spelling.setdefault(plain, value)
        if first != value:
            message = f"{column} has the values {first!r} and {value!r}; give them one spelling"
            raise InputError(f"{path}: {message}")


def refuse_missing_values(path, column, value_of, crops):
    """Raise InputError if the metadata has no value for one of the crops."""
    missing = [crop for crop in crops if crop not in value_of]
    if missing:
        message = f"{len(missing)} images have no {column}, such as {missing[0]}; add it"
        raise InputError(f"--metadata {path}: {message}")


# ---- command line --------------------------------------------------------------------------------
def add_alignment_arguments(parser, kind="train"):
    """Add this stage's flags to a script's parser; `kind`, train or test, names the defaults."""
    parser.add_argument(
        "--id_to_images",
        default="id_to_images.json",
        metavar="FILE",
        help='JSON file {"ID": ["photograph", ...], ...}, or a folder with a folder for each ID',
    )
    parser.add_argument(
        "--aligned_folder",
        default=f"{kind}_aligned_images",
        metavar="DIR",
        help="folder for the crops, <ID>/<photograph>.png",
    )
    parser.add_argument(
        "--aligned_json",
        default=f"id_to_{kind}_aligned_images.json",
        metavar="FILE",
        help="JSON file for the list of the crops",
    )
    parser.add_argument(
        "--landmarks",
        metavar="FILE",
        help='JSON file {"path": [[x, y], ...], ...} with 5 or 68 landmarks of each photograph; '
        "with this file, no face detector runs",
    )
    parser.add_argument(
        "--realign",
        action="store_true",
        help="make every crop anew, even if it is there or was deleted",
    )
    parser.add_argument(
        "--max_workers",
        type=number_between(int, 1, 1024),
        default=6,
        metavar="N",
        help="number of threads that align",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:N, or auto: cuda if there is a GPU that PyTorch can use, else cpu",
    )


def parse_args(argv=None):
    description = "Cut aligned 112x112 face crops out of photographs."
    parser = Parser(prog="align.py", description=description)
    add_alignment_arguments(parser)
    parser.add_argument(
        "--pairs",
        metavar="FILE",
        help='JSON file [["ID", "twin\'s ID"], ...], or a CSV file of two columns: '
        "align only these people",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the stage; returns the exit code (see net.run_script)."""
    return run_script(
        "align.py",
        lambda: align_files(parse_args(argv)),
        interrupted_message="interrupted; the crops so far are kept, and the same command goes on",
    )


if __name__ == "__main__":
    run_main(main)

"""References that tests compare with: brute force, supersampling, the landmarks of dlib."""

import importlib.util
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np

import align
import evaluate_twins
from triplet_dataset import TwinImages

# ---- metrics -------------------------------------------------------------------------------------


def share_accepted(scores, threshold):
    """The share of scores that a threshold accepts, as an exact fraction."""
    return Fraction(int((scores >= threshold).sum()), len(scores))


def brute_force(genuine, twin, general, scores=(), applied=None):
    """{name: float} of all metrics, by the words of the design.

    Every threshold is tried, also those at the further `scores`. Rates are fractions, so ties are
    exact. applied: {name: threshold that other people gave}.
    """
    genuine = np.asarray(genuine)
    twin = np.asarray(twin)
    general = np.asarray(general)
    figures = dict.fromkeys(evaluate_twins.METRICS, np.nan)
    if len(genuine) and len(twin):
        figures["auc"] = brute_force_auc(genuine, twin)
        figures |= brute_force_against_twins(genuine, twin, scores)
    if len(genuine) and len(general):
        figures["general_auc"] = brute_force_auc(genuine, general)
    if len(genuine) and len(twin) and len(general):
        figures |= brute_force_operating_points(genuine, twin, general, applied or {})
    return {name: float(value) for name, value in figures.items()}


def brute_force_auc(genuine, impostor):
    """The probability that a genuine score exceeds an impostor score; a tie counts one half."""
    above = (genuine[:, None] > impostor).mean()
    above_or_tied = (genuine[:, None] >= impostor).mean()
    return (above + above_or_tied) / 2


def brute_force_against_twins(genuine, twin, scores):
    """The figures of twin verification, from all thresholds one after another."""
    n = len(genuine) + len(twin)
    rows = []
    for threshold in [*sorted({*genuine, *twin, *scores}), np.inf]:
        fmr = share_accepted(twin, threshold)
        tar = share_accepted(genuine, threshold)
        accuracy = (tar * len(genuine) + (1 - fmr) * len(twin)) / n
        difference = abs(fmr - (1 - tar))
        rows.append((difference, threshold, fmr, tar, accuracy))

    _, threshold, fmr, tar, accuracy = min(rows)  # of equal differences, the lowest threshold
    figures = {
        "eer": (fmr + 1 - tar) / 2,
        "eer_threshold": threshold,
        "accuracy_at_eer": accuracy,
        "best_accuracy": max(accuracy for *_, accuracy in rows),
    }
    for far in ("0.01", "0.001", "0.0001"):
        allowed = [tar for _, _, fmr, tar, _ in rows if fmr <= Fraction(far)]
        figures[f"tar_at_far_{far}"] = max(allowed)
    return figures


def brute_force_operating_points(genuine, twin, general, applied):
    """The rates at thresholds from the general FMR, and at the applied ones."""
    figures = {}
    points = dict(applied)
    for far in ("0.001", "0.0001"):
        # The general FMR falls just above each general score and nowhere else.
        candidates = np.nextafter(np.unique(general), np.inf)
        allowed = [t for t in candidates if share_accepted(general, t) <= Fraction(far)]
        points[far] = allowed[0]
        figures[f"general_threshold_{far}"] = points[far]
    for name, threshold in points.items():
        figures[f"twin_fmr_{name}"] = share_accepted(twin, threshold)
        figures[f"general_fmr_{name}"] = share_accepted(general, threshold)
        figures[f"fnmr_{name}"] = 1 - share_accepted(genuine, threshold)
    return figures


# ---- image pairs ---------------------------------------------------------------------------------


def people(*families):
    """TwinImages of families given as images per person: people((3, 2), (2, 2, 2))."""
    images = {}
    pairs = []
    for number, sizes in enumerate(families):
        names = [f"{number}{letter}" for letter in "abc"[: len(sizes)]]
        for name, size in zip(names, sizes, strict=True):
            images[name] = [f"/{name}/{i}" for i in range(size)]
        pairs += combinations(names, 2)
    return TwinImages(images, pairs)


def kind_of(images, i, j):
    """What the pair of images i and j is, by the people's names; None for siblings in no pair."""
    first = images.ids[images.person[i]]
    second = images.ids[images.person[j]]
    twins = [{images.ids[a], images.ids[b]} for a, b in images.pairs]
    if first == second:
        return "genuine"
    if {first, second} in twins:
        return "twin"
    if images.family[i] != images.family[j]:
        return "general"
    return None


# ---- alignment -----------------------------------------------------------------------------------


def crop_of_pattern(size, pattern):
    """(crop of align_face, plain bilinear warp, supersampled reference) of a pattern, (112, 112).

    The photograph shows `pattern(x, y)`, a function of crop coordinates, at `size` times the crop.
    """
    side = int(112 * size)
    y, x = (np.mgrid[:side, :side] + 0.5) / size - 0.5
    grey = pattern(x, y).round().astype(np.uint8)
    photo = np.repeat(grey[:, :, None], 3, 2)
    points = (align.TEMPLATE + 0.5) * size - 0.5  # (0, 0) is the centre of a pixel
    crop = align.align_face(photo, points)

    matrix = align.similarity_transform(points, align.TEMPLATE)
    plain = cv2.warpAffine(photo, matrix, (112, 112))

    samples = 16  # per crop pixel, in each direction
    grid = (np.arange(112 * samples) + 0.5) / samples - 0.5
    fine = pattern(*np.meshgrid(grid, grid))
    reference = fine.reshape(112, samples, 112, samples).mean((1, 3))
    return crop[:, :, 0].astype(float), plain[:, :, 0].astype(float), reference


def dlib_landmarks(image, model="shape_predictor_68_face_landmarks.dat"):
    """Landmarks of the uppermost face of an RGB image, by one of dlib's models: 68 or 5."""
    import dlib

    # face_recognition_models cannot be imported without pkg_resources. Only its data are needed.
    package = importlib.util.find_spec("face_recognition_models")
    models = Path(package.submodule_search_locations[0]) / "models"
    predict_shape = dlib.shape_predictor(str(models / model))
    faces = dlib.get_frontal_face_detector()(image, 1)
    # Lower down, dlib takes a badge on her suit for a face.
    uppermost = min(faces, key=lambda face: face.top())
    shape = predict_shape(image, uppermost)
    return np.array([[point.x, point.y] for point in shape.parts()], float)

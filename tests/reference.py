"""References that tests compare with: brute force, supersampling, dlib."""

import importlib.util
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np

import align
import evaluate_twins
from triplet_dataset import TwinImages


def brute_force(genuine, twin, general, scores=(), applied=None):
    """The metrics by the words of DESIGN.md: every threshold tried (also at `scores`), rates as fractions."""
    genuine, twin, general = map(np.asarray, (genuine, twin, general))
    found = dict.fromkeys(evaluate_twins.METRICS, np.nan)

    def accepted(values, t):
        return Fraction(int((values >= t).sum()), len(values))

    for name, impostor in (("auc", twin), ("general_auc", general)):
        if len(genuine) and len(impostor):
            found[name] = ((genuine[:, None] > impostor).mean() + (genuine[:, None] >= impostor).mean()) / 2
    if len(genuine) and len(twin):
        rows = []
        for t in [*sorted({*genuine, *twin, *scores}), np.inf]:
            fmr, tar = accepted(twin, t), accepted(genuine, t)
            right = (tar * len(genuine) + (1 - fmr) * len(twin)) / (len(genuine) + len(twin))
            rows.append((abs(fmr - (1 - tar)), t, fmr, tar, right))
        _, t, fmr, tar, right = min(rows)
        found |= {"eer": (fmr + 1 - tar) / 2, "eer_threshold": t, "accuracy_at_eer": right}
        found["best_accuracy"] = max(right for *_, right in rows)
        for far in ("0.01", "0.001", "0.0001"):
            found[f"tar_at_far_{far}"] = max(tar for _, _, fmr, tar, _ in rows if fmr <= Fraction(far))
    if len(genuine) and len(twin) and len(general):
        points = dict(applied or {})
        for far in ("0.001", "0.0001"):
            above = np.nextafter(np.unique(general), np.inf)  # the general FMR falls there and nowhere else
            points[far] = next(t for t in above if accepted(general, t) <= Fraction(far))
            found[f"general_threshold_{far}"] = points[far]
        for name, t in points.items():
            found |= {f"twin_fmr_{name}": accepted(twin, t), f"general_fmr_{name}": accepted(general, t)}
            found[f"fnmr_{name}"] = 1 - accepted(genuine, t)
    return {name: float(value) for name, value in found.items()}


def people(*families):
    """TwinImages of families given as images per person: people((3, 2), (2, 2, 2))."""
    named = [{f"{f}{'abc'[i]}": n for i, n in enumerate(sizes)} for f, sizes in enumerate(families)]
    images = {name: [f"/{name}/{i}" for i in range(n)] for family in named for name, n in family.items()}
    return TwinImages(images, [pair for family in named for pair in combinations(family, 2)])


def kind_of(images, i, j):
    """What the pair of images i and j is, by the people's names; None for siblings that are no pair."""
    a, b = (images.ids[images.person[k]] for k in (i, j))
    twins = [{images.ids[x], images.ids[y]} for x, y in images.pairs]
    apart = images.family[i] != images.family[j]
    return "genuine" if a == b else "twin" if {a, b} in twins else "general" if apart else None


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


def dlib_landmarks(image):
    """68 landmarks of the uppermost face of an RGB image, by dlib's networks (a test-only oracle)."""
    import dlib

    # face_recognition_models cannot be imported without pkg_resources; only its data files are needed.
    folder = Path(importlib.util.find_spec("face_recognition_models").submodule_search_locations[0]) / "models"
    faces = dlib.get_frontal_face_detector()(image, 1)
    face = min(faces, key=lambda face: face.top())  # lower down, dlib takes a badge on her suit for a face
    shape = dlib.shape_predictor(str(folder / "shape_predictor_68_face_landmarks.dat"))(image, face)
    return np.array([[p.x, p.y] for p in shape.parts()], float)

"""Synthetic "photographs" of twin pairs: drawn faces whose landmarks are known.

Nothing here is a photograph and no figure measured on it says anything about people. It is for trying the
commands and for tests: pairs of twins that share their features and colouring, differ a little in shape and
in small marks on the skin, and are drawn again and again with other pose, light, hair, expression and background.
"""

import json
from pathlib import Path

import cv2
import numpy as np
import torch

from align import TEMPLATE
from net import to_input

SIZE = 3  # canonical face drawing: crop coordinates times this


def draw_person(rng):
    """The traits of a random person, as a dict of small arrays; twins get a copy through `draw_twin`."""
    return {
        "shape": rng.normal(0, 1, 10),
        "skin": np.clip(rng.normal((150, 175, 215), (28, 24, 18)), 60, 245),  # BGR for OpenCV
        "iris": rng.uniform(20, 190, 3),
        "lips": rng.uniform((60, 50, 130), (130, 110, 210)),
        "marks": rng.uniform((-24, -28, 2.0), (24, 42, 4.5), (4, 3)),  # x, y, radius about the nose
    }


def draw_twin(person, rng, difference=1.0):
    """A twin: the same colouring, a slightly other shape, marks elsewhere. difference 0 is the same person."""
    twin = {key: value.copy() for key, value in person.items()}
    twin["shape"] += difference * rng.normal(0, 0.9, 10)
    twin["iris"] = np.clip(twin["iris"] + difference * rng.normal(0, 55, 3), 5, 210)
    if difference:
        twin["marks"] = rng.uniform((-24, -28, 2.0), (24, 42, 4.5), (4, 3))
    return twin


def draw_photo(person, rng, width=320, height=360):
    """One shot: ((H, W, 3) uint8 RGB, (5, 2) landmarks in its pixels)."""
    s = person["shape"]
    expression = rng.normal(0, 1, 3)
    eyes = TEMPLATE[:2] + np.array([[-1.6 * s[0], s[1]], [1.6 * s[0], s[1]]])
    nose = TEMPLATE[2] + np.array([0.0, 1.8 * s[2]])
    mouth = TEMPLATE[3:] + np.array(
        [[-2.5 * s[3] - expression[0], 1.5 * s[4]], [2.5 * s[3] + expression[0], 1.5 * s[4]]]
    )
    points = np.concatenate([eyes, nose[None], mouth])
    canvas, mask = _draw_face(person, points, expression, rng)

    angle, scale = np.deg2rad(rng.normal(0, 9)), rng.uniform(1.1, 1.9) / SIZE
    linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = linear @ np.diag([rng.uniform(0.93, 1.07), 1.0])  # a little yaw
    middle = np.array([width, height]) / 2 + rng.normal(0, 12, 2)
    margin = 40  # the drawing reaches beyond the crop by this much on every side, in crop pixels
    centre = (np.array([56.0, 64.0]) + margin) * SIZE
    matrix = np.column_stack([linear, middle - linear @ centre])

    photo = _background(rng, width, height)
    face = cv2.warpAffine(canvas, matrix, (width, height), flags=cv2.INTER_AREA).astype(np.float32)
    alpha = cv2.warpAffine(mask, matrix, (width, height))[:, :, None].astype(np.float32) / 255
    photo = photo * (1 - alpha) + face * alpha
    light = rng.normal(1, 0.12) * (1 + rng.normal(0, 0.03, 3))
    slope = np.linspace(-1, 1, width)[None, :, None] * rng.normal(0, 0.12)
    photo = photo * light * (1 + slope) + rng.normal(0, 4, photo.shape)
    photo = cv2.GaussianBlur(photo, (0, 0), rng.uniform(0.4, 0.9))
    landmarks = ((points + margin) * SIZE + (SIZE - 1) / 2) @ linear.T + matrix[:, 2]
    return np.clip(photo, 0, 255).astype(np.uint8)[:, :, ::-1], landmarks


def _background(rng, width, height):
    coarse = rng.uniform(30, 225, 3) + rng.normal(0, 25, (5, 4, 3))
    return cv2.resize(np.clip(coarse, 0, 255), (width, height), interpolation=cv2.INTER_CUBIC)


def _draw_face(person, points, expression, rng):
    side = (112 + 80) * SIZE
    canvas, mask = np.zeros((side, side, 3), np.uint8), np.zeros((side, side), np.uint8)
    s, skin = person["shape"], person["skin"]
    hair = rng.uniform(15, 120) * np.array([0.7, 0.85, 1.0])  # dyed and cut as often as photographed

    def at(x, y):
        return round((x + 40) * SIZE), round((y + 40) * SIZE)

    def ellipse(centre, axes, colour, angle=0.0, start=0.0, end=360.0, thickness=-1, everywhere=True):
        axes = tuple(max(1, round(a * SIZE)) for a in axes)
        for target, value in (
            ((canvas, tuple(float(c) for c in colour)), (mask, 255)) if everywhere else ((canvas, colour),)
        ):
            cv2.ellipse(target, at(*centre), axes, angle, start, end, value, thickness, cv2.LINE_AA)

    def line(a, b, colour, thickness):
        cv2.line(canvas, at(*a), at(*b), tuple(float(c) for c in colour), max(1, int(thickness * SIZE)), cv2.LINE_AA)

    width, length = 42 + 2.6 * s[5], 58 + 2.6 * s[6]
    ellipse((56, 48), (width + 5, length - 4 + rng.uniform(-4, 6)), hair)
    ellipse((56, 66), (width, length), skin)
    ellipse((56, 18), (width * 0.85, 13 + rng.uniform(-4, 5)), hair)
    dark = skin * 0.62
    (left, right), nose, corners = points[:2], points[2], points[3:]
    for eye in (left, right):
        opening = 4.6 + 0.8 * s[7] + 0.5 * expression[1]
        ellipse(eye, (8.5, max(2.5, opening)), (240, 242, 245))
        ellipse(eye, (4.2, 4.2), person["iris"])
        ellipse(eye, (1.9, 1.9), (15, 15, 15))
        lift = 11 + 0.9 * s[8] + expression[2]
        line((eye[0] - 9, eye[1] - lift + 1), (eye[0] + 9, eye[1] - lift), hair * 0.6 + 10, 2.4 + 0.7 * s[9])
    line((56, left[1] + 4), (nose[0] - 4, nose[1]), dark, 1.2)
    ellipse((nose[0], nose[1] + 1), (6 + 0.8 * s[2], 3.2), dark)
    middle, half = corners.mean(0), (corners[1, 0] - corners[0, 0]) / 2
    ellipse(middle, (half, 3.4 + 0.6 * abs(expression[0])), person["lips"])
    line(corners[0], corners[1], np.array(person["lips"]) * 0.55, 0.9)
    for x, y, radius in person["marks"]:
        ellipse((nose[0] + x, nose[1] + y), (radius * 0.6, radius * 0.6), (40, 45, 70))
    return canvas, mask


def write_photos(folder, n_pairs, images_per_person, seed, prefix="family", triple=False):
    """Draw a data set into `folder`: photos/*.jpg, id_to_images.json, landmarks.json and pairs.json.

    `triple` adds one family of three siblings, hence three more pairs. Returns the list of pairs.
    """
    folder, rng = Path(folder), np.random.default_rng(seed)
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    images, landmarks, pairs = {}, {}, []
    for family in range(n_pairs + triple):
        first = draw_person(rng)
        siblings = [first] + [draw_twin(first, rng) for _ in range(2 if family == n_pairs else 1)]
        names = [f"{prefix}{family:02d}{letter}" for letter in "ABC"[: len(siblings)]]
        pairs += [[a, b] for i, a in enumerate(names) for b in names[i + 1 :]]
        for name, person in zip(names, siblings, strict=True):
            for shot in range(images_per_person):
                photo, points = draw_photo(person, rng)
                path = f"photos/{name}_{shot}.jpg"
                cv2.imwrite(str(folder / path), photo[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
                images.setdefault(name, []).append(path)
                landmarks[path] = points.round(2).tolist()
    for name, content in (("id_to_images", images), ("landmarks", landmarks), ("pairs", pairs)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return pairs


def set_batchnorm_statistics(model, crops, device, batch_size=32):
    """Give a network with random weights the BatchNorm statistics of crops, by one pass.

    Statistics are means over the pass's batches; dropout stays off. crops: (N, 112, 112, 3) uint8 RGB, N >= 2.
    """
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # a cumulative mean
        norm.train()
    with torch.no_grad():
        for part in crops.tensor_split(-(-len(crops) // batch_size)):
            model(to_input(part.to(device)))
    for norm in norms:
        norm.momentum = 0.1  # PyTorch's default again
        norm.eval()

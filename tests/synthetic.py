"""Synthetic "photographs" of twin pairs: drawn faces whose landmarks are known.

Nothing here is a photograph, and no figure that is measured on it says anything about people. It is
for trying the commands and for tests. Twins share their features and colouring. They differ a
little in shape and in small marks on the skin. Each is drawn again and again with another pose,
light, hair, expression and background.
"""

import json
import math
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import torch

from align import TEMPLATE
from net import to_input

SIZE = 3  # pixels of a drawing per pixel of a crop
MARGIN = 40  # crop pixels by which a drawing reaches beyond the crop on every side


# ---- people --------------------------------------------------------------------------------------
def draw_person(rng):
    """The traits of a random person, a dict of small arrays; colours are BGR, as in OpenCV."""
    return {
        "shape": rng.normal(0, 1, 10),
        "skin": np.clip(rng.normal((150, 175, 215), (28, 24, 18)), 60, 245),
        "iris": rng.uniform(20, 190, 3),
        "lips": rng.uniform((60, 50, 130), (130, 110, 210)),
        "marks": draw_marks(rng),
    }


def draw_marks(rng):
    """(4, 3): x, y and radius of marks on the skin, in crop pixels from the nose."""
    return rng.uniform((-24, -28, 2.0), (24, 42, 4.5), (4, 3))


def draw_twin(person, rng, difference=1.0):
    """A twin: the same colouring, a slightly other shape, marks elsewhere.

    With difference 0 it is the same person.
    """
    twin = {key: value.copy() for key, value in person.items()}
    twin["shape"] += difference * rng.normal(0, 0.9, 10)
    twin["iris"] = np.clip(twin["iris"] + difference * rng.normal(0, 55, 3), 5, 210)
    if difference:
        twin["marks"] = draw_marks(rng)
    return twin


# ---- a photograph --------------------------------------------------------------------------------
def draw_photo(person, rng, width=320, height=360):
    """One shot: ((H, W, 3) uint8 RGB, (5, 2) landmarks in its pixels)."""
    expression = rng.normal(0, 1, 3)
    points = place_features(person["shape"], expression)
    drawing, mask = draw_face(person, points, expression, rng)
    matrix = draw_pose(rng, width, height)

    photo = draw_background(rng, width, height)
    face = cv2.warpAffine(drawing, matrix, (width, height), flags=cv2.INTER_AREA)
    alpha = cv2.warpAffine(mask, matrix, (width, height))[:, :, None].astype(np.float32) / 255
    photo = photo * (1 - alpha) + face.astype(np.float32) * alpha
    light = rng.normal(1, 0.12) * (1 + rng.normal(0, 0.03, 3))
    slope = np.linspace(-1, 1, width)[None, :, None] * rng.normal(0, 0.12)
    noise = rng.normal(0, 4, photo.shape)
    photo = photo * light * (1 + slope) + noise
    photo = cv2.GaussianBlur(photo, (0, 0), rng.uniform(0.4, 0.9))

    in_drawing = (points + MARGIN) * SIZE + (SIZE - 1) / 2
    landmarks = in_drawing @ matrix[:, :2].T + matrix[:, 2]
    bgr = np.clip(photo, 0, 255).astype(np.uint8)
    return bgr[:, :, ::-1], landmarks


def place_features(shape, expression):
    """The five landmarks of a face, (5, 2) in crop coordinates, as in align.TEMPLATE."""
    eyes = TEMPLATE[:2] + np.array([[-1.6 * shape[0], shape[1]], [1.6 * shape[0], shape[1]]])
    nose = TEMPLATE[2] + np.array([0.0, 1.8 * shape[2]])
    widening = 2.5 * shape[3] + expression[0]
    lowering = 1.5 * shape[4]
    corners = TEMPLATE[3:] + np.array([[-widening, lowering], [widening, lowering]])
    return np.concatenate([eyes, nose[None], corners])


def draw_pose(rng, width, height):
    """The (2, 3) matrix that puts a drawing near the middle of a photograph, tilted and scaled."""
    angle = np.deg2rad(rng.normal(0, 9))
    scale = rng.uniform(1.1, 1.9) / SIZE
    yaw = rng.uniform(0.93, 1.07)  # a head that is turned a little looks narrower
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = scale * rotation @ np.diag([yaw, 1.0])
    middle = np.array([width, height]) / 2 + rng.normal(0, 12, 2)
    centre = (np.array([56.0, 64.0]) + MARGIN) * SIZE
    return np.column_stack([linear, middle - linear @ centre])


def draw_background(rng, width, height):
    """(H, W, 3): a few blurred patches of one colour."""
    patches = rng.uniform(30, 225, 3) + rng.normal(0, 25, (5, 4, 3))
    patches = np.clip(patches, 0, 255)
    return cv2.resize(patches, (width, height), interpolation=cv2.INTER_CUBIC)


class Drawing:
    """A picture in crop coordinates and its mask: `picture` (H, W, 3) BGR, `mask` (H, W), uint8.

    Ellipses are part of the mask, lines are not: they stay within ellipses.
    """

    def __init__(self):
        side = (112 + 2 * MARGIN) * SIZE
        self.picture = np.zeros((side, side, 3), np.uint8)
        self.mask = np.zeros((side, side), np.uint8)

    def ellipse(self, centre, axes, colour):
        """A filled ellipse with horizontal and vertical half-axes."""
        pixel_axes = tuple(max(1, round(axis * SIZE)) for axis in axes)
        place = (to_pixel(centre), pixel_axes, 0, 0, 360)
        cv2.ellipse(self.picture, *place, to_floats(colour), -1, cv2.LINE_AA)
        cv2.ellipse(self.mask, *place, 255, -1, cv2.LINE_AA)

    def line(self, start, end, colour, thickness):
        pixels = max(1, int(thickness * SIZE))
        place = (to_pixel(start), to_pixel(end))
        cv2.line(self.picture, *place, to_floats(colour), pixels, cv2.LINE_AA)


def to_pixel(point):
    """The pixel of a drawing that a point in crop coordinates falls on."""
    x, y = point
    return round((x + MARGIN) * SIZE), round((y + MARGIN) * SIZE)


def to_floats(colour):
    return tuple(float(channel) for channel in colour)


def draw_face(person, points, expression, rng):
    """(picture, mask) of a person's face with the five landmarks `points`, in crop coordinates."""
    drawing = Drawing()
    shape = person["shape"]
    skin = person["skin"]
    # Hair is dyed and cut as often as it is photographed.
    hair = rng.uniform(15, 120) * np.array([0.7, 0.85, 1.0])
    width = 42 + 2.6 * shape[5]
    length = 58 + 2.6 * shape[6]
    drawing.ellipse((56, 48), (width + 5, length - 4 + rng.uniform(-4, 6)), hair)
    drawing.ellipse((56, 66), (width, length), skin)
    drawing.ellipse((56, 18), (width * 0.85, 13 + rng.uniform(-4, 5)), hair)

    left_eye, right_eye, nose = points[:3]
    corners = points[3:]
    for eye in (left_eye, right_eye):
        draw_eye(drawing, person, eye, expression, hair)
    shadow = skin * 0.62
    drawing.line((56, left_eye[1] + 4), (nose[0] - 4, nose[1]), shadow, 1.2)
    drawing.ellipse((nose[0], nose[1] + 1), (6 + 0.8 * shape[2], 3.2), shadow)
    half_mouth = (corners[1, 0] - corners[0, 0]) / 2
    drawing.ellipse(corners.mean(0), (half_mouth, 3.4 + 0.6 * abs(expression[0])), person["lips"])
    drawing.line(corners[0], corners[1], person["lips"] * 0.55, 0.9)
    for x, y, radius in person["marks"]:
        drawing.ellipse((nose[0] + x, nose[1] + y), (radius * 0.6, radius * 0.6), (40, 45, 70))
    return drawing.picture, drawing.mask


def draw_eye(drawing, person, eye, expression, hair):
    """An eye and the brow above it."""
    shape = person["shape"]
    opening = 4.6 + 0.8 * shape[7] + 0.5 * expression[1]
    drawing.ellipse(eye, (8.5, max(2.5, opening)), (240, 242, 245))
    drawing.ellipse(eye, (4.2, 4.2), person["iris"])
    drawing.ellipse(eye, (1.9, 1.9), (15, 15, 15))
    lift = 11 + 0.9 * shape[8] + expression[2]
    left_end = (eye[0] - 9, eye[1] - lift + 1)
    right_end = (eye[0] + 9, eye[1] - lift)
    drawing.line(left_end, right_end, hair * 0.6 + 10, 2.4 + 0.7 * shape[9])


# ---- data sets and networks ----------------------------------------------------------------------
def write_photos(folder, n_pairs, images_per_person, seed, prefix="family", triple=False):
    """Draw a data set into `folder`: photos/*.jpg, id_to_images.json, landmarks.json, pairs.json.

    `triple` adds one family of three siblings, hence three more pairs. Returns the list of pairs.
    """
    folder = Path(folder)
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    images = {}
    landmarks = {}
    pairs = []
    for family in range(n_pairs + triple):
        n_siblings = 3 if family == n_pairs else 2
        names = [f"{prefix}{family:02d}{letter}" for letter in "ABC"[:n_siblings]]
        pairs += [list(pair) for pair in combinations(names, 2)]
        siblings = [draw_person(rng)]
        while len(siblings) < n_siblings:
            siblings.append(draw_twin(siblings[0], rng))
        for name, person in zip(names, siblings, strict=True):
            images[name] = []
            for shot in range(images_per_person):
                photo, points = draw_photo(person, rng)
                path = f"photos/{name}_{shot}.jpg"
                bgr = photo[:, :, ::-1]
                cv2.imwrite(str(folder / path), bgr, [cv2.IMWRITE_JPEG_QUALITY, 92])
                images[name].append(path)
                landmarks[path] = points.round(2).tolist()
    contents = {"id_to_images": images, "landmarks": landmarks, "pairs": pairs}
    for name, content in contents.items():
        text = json.dumps(content, indent=1)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return pairs


def set_batchnorm_statistics(model, crops, device, batch_size=32):
    """Give a network with random weights the BatchNorm statistics of crops, by one pass.

    Statistics are means over the batches of the pass; dropout stays off. crops: (N, 112, 112, 3)
    uint8 RGB, N >= 2.
    """
    model.eval()
    kinds = torch.nn.BatchNorm1d | torch.nn.BatchNorm2d
    norms = [module for module in model.modules() if isinstance(module, kinds)]
    for norm in norms:
        norm.momentum = None  # a cumulative mean
        norm.train()
    with torch.no_grad():
        for batch in crops.tensor_split(math.ceil(len(crops) / batch_size)):
            model(to_input(batch.to(device)))
    for norm in norms:
        norm.momentum = 0.1  # PyTorch's default again
        norm.eval()

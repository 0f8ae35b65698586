"""Photographs aligned per second, and where the time goes, on drawn 12-megapixel JPEGs. By hand, not in CI.

    python -m tests.bench_alignment [photographs [device]]

Both networks run, with random weights; their answers are replaced by the known face, since a random landmark network
points nowhere. The first table aligns all photographs anew with the weights loaded; the second is what each step takes
per photograph, one after the other.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

import align
from tests.synthetic import draw_person, draw_photo

SIZE, FACE = (4288, 2848), 8  # the drawn photograph is this many times enlarged, its eyes about 400 pixels apart


class KnownFace(align.FaceDetector):
    """The detector at work on one box, answering with the landmarks of the one face of every photograph."""

    def __init__(self, device, points):
        super().__init__(device)
        self.points, find = points, self.network.face_detector.detect_from_image

        def find_and_forget(image):
            find(image)
            return [np.array([0.3, 0.2, 0.7, 0.8, 1]) * [*np.tile(image.shape[1::-1], 2), 1]]

        self.network.face_detector.detect_from_image = find_and_forget

    def __call__(self, image):
        super().__call__(image)
        return (self.points + 0.5) * image.shape[1] / SIZE[0] - 0.5, False


def write_photographs(folder, n):
    """Draw n equal photographs; returns ([path, ...], (5, 2) landmarks)."""
    photo, points = draw_photo(draw_person(np.random.default_rng(0)), np.random.default_rng(1))
    large = cv2.resize(photo, (320 * FACE, 360 * FACE), interpolation=cv2.INTER_CUBIC)[: SIZE[1]]
    left = (SIZE[0] - large.shape[1]) // 2
    canvas = cv2.resize(photo, SIZE, interpolation=cv2.INTER_CUBIC)
    canvas[:, left : left + large.shape[1]] = large
    noise = np.random.default_rng(2).normal(0, 4, canvas.shape)
    paths = [folder / f"{i}.jpg" for i in range(n)]
    Image.fromarray((canvas + noise).clip(0, 255).astype(np.uint8)).save(paths[0], quality=92)
    for path in paths[1:]:
        path.write_bytes(paths[0].read_bytes())
    return [str(path) for path in paths], (points + 0.5) * FACE - 0.5 + [left, 0]


def write_weights(home):
    """Random weights under the names that face-alignment looks for; the detector finds next to nothing."""
    from face_alignment.detection.sfd.net_s3fd import s3fd
    from face_alignment.models import FAN

    (home / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    detector = s3fd()
    for name, parameter in detector.named_parameters():
        if "_mbox_" in name:
            torch.nn.init.zeros_(parameter)
        if name.endswith("mbox_conf.bias"):
            parameter.data[-1] = -5.0
    torch.save(detector.state_dict(), home / "hub" / "checkpoints" / "s3fd-619a316812.pth")
    torch.save(FAN(4).state_dict(), home / "hub" / "checkpoints" / "2DFAN4-11f355bf06.pth.tar")


def rate(photographs, folder, points, detector, workers):
    """Photographs per second, by the given landmarks or else the detector."""
    landmarks = {} if detector else dict.fromkeys(photographs, points.tolist())
    jobs = align.plan({"a": photographs}, folder, landmarks, folder)
    began = time.perf_counter()
    facts = align.align_images(jobs, detector, workers)
    assert {entry["status"] for entry in facts} == {"aligned"}, facts[0]
    return len(jobs) / (time.perf_counter() - began)


def time_split(photographs, folder, detector):
    """{step: milliseconds per photograph}, one photograph after the other."""
    spent = dict.fromkeys(("decode", "detect", "warp", "write"), 0.0)
    for path in photographs:
        times = [time.perf_counter()]
        image = align.read_photo(path, align.DECODED_SIZE)
        times.append(time.perf_counter())
        points, _ = detector(image)
        times.append(time.perf_counter())
        crop = align.align_face(image, points)
        times.append(time.perf_counter())
        Image.fromarray(crop).save(folder / "crop.png")
        times.append(time.perf_counter())
        for step, seconds in zip(spent, np.diff(times), strict=True):
            spent[step] += 1000 * seconds / len(photographs)
    return spent


def main(n=12, device="cpu"):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["TORCH_HOME"] = str(folder)
        write_weights(folder)
        photographs, points = write_photographs(folder, int(n))
        detector = KnownFace(device, points)
        detector(np.zeros((64, 64, 3), np.uint8))  # the package compiles at first use
        print(f"{n} JPEGs of {SIZE[0]}x{SIZE[1]}, {os.cpu_count()} cores, {device}", flush=True)
        for workers in (1, 2, 6):
            for used, how in ((None, "--landmarks"), (detector, "detection")):
                speed = rate(photographs, folder / "crops", points, used, workers)
                print(f"{workers} workers, {how}: {speed:.3f} photographs/s", flush=True)
        for step, milliseconds in time_split(photographs, folder, detector).items():
            print(f"{step:<10} {milliseconds:>8.1f} ms per photograph")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Photographs aligned per second, and where the time goes, on drawn 12-megapixel JPEGs. By hand, not in CI.

    python -m tests.bench_alignment --photographs 12 --device cpu

Both networks run, with random weights, and answer with the known face. Last: each step, one photograph at a time.
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

import align
from net import pick_device
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
    large = cv2.copyMakeBorder(large, 0, 0, left, left, cv2.BORDER_REFLECT)
    noisy = Image.fromarray((large + np.random.default_rng(2).normal(0, 4, large.shape)).clip(0, 255).astype(np.uint8))
    paths = [str(folder / f"{i}.jpg") for i in range(n)]
    for path in paths:
        noisy.save(path, quality=92)
    return paths, (points + 0.5) * FACE - 0.5 + [left, 0]


def write_weights(home):
    """Random weights under the names that face-alignment looks for; the detector finds next to nothing."""
    from face_alignment.detection.sfd.net_s3fd import s3fd
    from face_alignment.models import FAN

    torch.manual_seed(0)
    detector = s3fd()
    for name, parameter in detector.named_parameters():
        if "_mbox_" in name:
            parameter.data.zero_()
        if name.endswith("mbox_conf.bias"):
            parameter.data[-1] = -5.0
    (home / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(detector.state_dict(), home / "hub" / "checkpoints" / "s3fd-619a316812.pth")
    torch.save(FAN(4).state_dict(), home / "hub" / "checkpoints" / "2DFAN4-11f355bf06.pth.tar")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=int, default=12, help="how many (default 12)")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["TORCH_HOME"] = str(folder)
        write_weights(folder)
        photographs, points = write_photographs(folder, args.photographs)
        detector = KnownFace(pick_device(args.device), points)
        detector(align.read_photo(photographs[0], align.DECODED_SIZE))  # the first is the slowest
        print(f"{len(photographs)} JPEGs of {SIZE[0]}x{SIZE[1]}, {os.cpu_count()} cores, {args.device}\n", flush=True)
        for workers in (1, 2, 6):
            for used, known, how in ((None, points.tolist(), "landmarks given"), (detector, None, "detection")):
                jobs = align.plan({"a": photographs}, folder, dict.fromkeys(photographs, known), folder)
                began = time.perf_counter()
                with ThreadPoolExecutor(workers) as pool:
                    facts = list(pool.map(lambda job, used=used: align.align_photo(job, used), jobs))
                speed = len(jobs) / (time.perf_counter() - began)
                print(f"| {workers} workers, {how} | {speed:.3f} photographs/s, {facts[0]['status']} |", flush=True)
        times = []
        for path in photographs:
            times.append([time.perf_counter()])
            image = align.read_photo(path, align.DECODED_SIZE)
            times[-1].append(time.perf_counter())
            points, _ = detector(image)
            times[-1].append(time.perf_counter())
            Image.fromarray(align.align_face(image, points)).save(folder / "crop.png")
            times[-1].append(time.perf_counter())
        for step, seconds in zip(("decode", "detect", "warp and write"), np.diff(times).mean(0), strict=True):
            print(f"| {step} | {1000 * seconds:.1f} ms a photograph |")


if __name__ == "__main__":
    main()

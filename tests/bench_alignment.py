"""Photographs aligned per second, and where the time goes, on drawn 12-megapixel JPEGs.

    python -m tests.bench_alignment --photographs 12 --device cpu

Both networks of the detector run, with random weights, and then answer with the known face. The
last table has the time of each step, one photograph after another. This is run by hand, not in CI.
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

WIDTH, HEIGHT = 4288, 2848
ENLARGED = 8  # times that the drawn face is enlarged, which puts its eyes about 400 pixels apart
BOX = np.array([0.3, 0.2, 0.7, 0.8])  # left, top, right, bottom of its face, as shares of the image


class KnownFace(align.FaceDetector):
    """A detector that runs both its networks, and then answers with the landmarks it was given.

    points: (5, 2), in pixels of the full photograph, the same for every photograph.
    """

    def __init__(self, device, points):
        super().__init__(device)
        self.points = points
        self.find_faces = self.network.face_detector.detect_from_image
        self.network.face_detector.detect_from_image = self.find_one_face

    def find_one_face(self, image):
        """Run the detection network; returns one box, whatever it found."""
        self.find_faces(image)
        height, width = image.shape[:2]
        confidence = 1.0
        return [np.append(BOX * [width, height, width, height], confidence)]

    def __call__(self, image):
        super().__call__(image)
        reduction = image.shape[1] / WIDTH
        return align.scale_pixels(self.points, reduction), False


def write_photographs(folder, n):
    """Draw n equal photographs; returns ([path, ...], (5, 2) landmarks)."""
    person = draw_person(np.random.default_rng(0))
    photo, points = draw_photo(person, np.random.default_rng(1))
    enlarged_size = (photo.shape[1] * ENLARGED, photo.shape[0] * ENLARGED)
    large = cv2.resize(photo, enlarged_size, interpolation=cv2.INTER_CUBIC)[:HEIGHT]
    margin = (WIDTH - large.shape[1]) // 2
    large = cv2.copyMakeBorder(large, 0, 0, margin, margin, cv2.BORDER_REFLECT)
    noise = np.random.default_rng(2).normal(0, 4, large.shape)
    picture = Image.fromarray((large + noise).clip(0, 255).astype(np.uint8))
    paths = [str(folder / f"{number}.jpg") for number in range(n)]
    for path in paths:
        picture.save(path, quality=92)
    return paths, align.scale_pixels(points, ENLARGED) + np.array([margin, 0])


def write_weights(home):
    """Random weights under the names that face-alignment looks for; they find next to nothing."""
    from face_alignment.detection.sfd.net_s3fd import s3fd
    from face_alignment.models import FAN

    torch.manual_seed(0)
    detector = s3fd()
    for name, parameter in detector.named_parameters():
        if "_mbox_" in name:
            parameter.data.zero_()
        if name.endswith("mbox_conf.bias"):
            parameter.data[-1] = -5.0
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(detector.state_dict(), folder / "s3fd-619a316812.pth")
    torch.save(FAN(4).state_dict(), folder / "2DFAN4-11f355bf06.pth.tar")


def measure_speed(jobs, detector, workers):
    """(photographs aligned per second by so many threads, status of the first)."""
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        facts = list(pool.map(lambda job: align.align_photo(job, detector), jobs))
    seconds = time.perf_counter() - start
    return len(jobs) / seconds, facts[0]["status"]


def measure_steps(paths, detector, folder):
    """{step: its mean milliseconds a photograph}, one photograph after another."""
    times = []
    for path in paths:
        start = time.perf_counter()
        image = align.read_photo(path, align.DECODED_SIZE)
        decoded = time.perf_counter()
        points, _ = detector(image)
        detected = time.perf_counter()
        Image.fromarray(align.align_face(image, points)).save(folder / "crop.png")
        written = time.perf_counter()
        times.append([decoded - start, detected - decoded, written - detected])
    means = 1000 * np.mean(times, axis=0)
    return dict(zip(("decode", "detect", "warp and write"), means, strict=True))


def run_benchmark(folder, n, device):
    """Print both tables for n photographs; files go to `folder`."""
    os.environ["TORCH_HOME"] = str(folder)
    write_weights(folder)
    paths, points = write_photographs(folder, n)
    detector = KnownFace(device, points)
    detector(align.read_photo(paths[0], align.DECODED_SIZE))  # the first is the slowest
    print(f"{n} JPEGs of {WIDTH}x{HEIGHT}, {os.cpu_count()} cores, {device}\n", flush=True)

    known = dict.fromkeys(paths, points.tolist())
    variants = (("landmarks given", known, None), ("detection", {}, detector))
    for workers in (1, 2, 6):
        for variant, landmarks, variant_detector in variants:
            jobs = align.plan_jobs({"a": paths}, folder, landmarks, folder)
            speed, status = measure_speed(jobs, variant_detector, workers)
            row = f"| {workers} workers, {variant} | {speed:.3f} photographs/s, {status} |"
            print(row, flush=True)
    for step, milliseconds in measure_steps(paths, detector, folder).items():
        print(f"| {step} | {milliseconds:.1f} ms a photograph |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=int, default=12, help="how many (default 12)")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        run_benchmark(Path(folder), args.photographs, pick_device(args.device))


if __name__ == "__main__":
    main()

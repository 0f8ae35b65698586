"""Photographs aligned per second, and where the time goes, on drawn 12-megapixel JPEGs. By hand, not in CI.

    python -m tests.bench_alignment [photographs [part]]      # part: 1 or 2 (workers) or split; all without

Both networks run, with random weights; their answers are replaced by the known face, since a random detector finds
thousands of faces and a random landmark network points nowhere. Each row of the first table aligns all photographs anew
with the weights loaded; the second sums, in one process, what each step takes per photograph.
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
start_worker = align._start_worker


class KnownFace(align.FaceAlignmentDetector):
    """The detector at work, answering with the box and the landmarks of the one face of `photograph`."""

    def boxes(self, images):
        super().boxes(images)
        return [np.array([[0.3, 0.2, 0.7, 0.8]]) * np.tile(image.shape[1::-1], 2) for image in images]

    def landmarks(self, images, boxes):
        super().landmarks(images, boxes)
        five = [align.move_points(known_points(), SIZE, image.shape[1::-1]) for image in images]
        return np.array([points[[0] * 30 + [2] + [0] * 5 + [0] * 6 + [1] * 6 + [3] * 6 + [4] * 14] for points in five])


def known_points():
    """(5, 2) landmarks of the face in every photograph."""
    _, points = draw_photo(draw_person(np.random.default_rng(0)), np.random.default_rng(1))
    return (points + 0.5) * FACE - 0.5 + [(SIZE[0] - 320 * FACE) // 2, 0]


def write_photographs(folder, n):
    """Draw the photographs; returns their paths."""
    photo, _ = draw_photo(draw_person(np.random.default_rng(0)), np.random.default_rng(1))
    large = cv2.resize(photo, (320 * FACE, 360 * FACE), interpolation=cv2.INTER_CUBIC)[: SIZE[1]]
    left = (SIZE[0] - large.shape[1]) // 2
    canvas = cv2.resize(photo, SIZE, interpolation=cv2.INTER_CUBIC)
    canvas[:, left : left + large.shape[1]] = large
    noise = np.random.default_rng(2).normal(0, 4, canvas.shape)
    Image.fromarray((canvas + noise).clip(0, 255).astype(np.uint8)).save(folder / "0.jpg", quality=92)
    for i in range(1, n):
        (folder / f"{i}.jpg").write_bytes((folder / "0.jpg").read_bytes())
    return [str(folder / f"{i}.jpg") for i in range(n)]


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


def start_known_face(threads):
    """The initializer of a worker process with the stand-in; warmed up, since the package compiles at first use."""
    align.FaceAlignmentDetector = KnownFace
    start_worker(threads)
    align._detector([np.zeros((64, 64, 3), np.uint8)])


def rate(photographs, folder, workers, landmarks):
    """Photographs per second, from the difference of two runs, so that starting processes does not count."""
    seconds = []
    for sources in (photographs[:workers], photographs):
        began = time.perf_counter()
        given = dict.fromkeys(sources, known_points()) if landmarks else None
        _, report = align.align_images({"a": sources}, folder, given, "cpu", workers, realign=True)
        seconds.append(time.perf_counter() - began)
        assert {entry["status"] for entry in report} == {"aligned"}, report[0]
    return (len(photographs) - workers) / (seconds[1] - seconds[0])


def time_split(photographs, folder):
    """{step: milliseconds per photograph} in this process, on one thread."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    detector, spent = KnownFace("cpu"), {}
    detector([np.zeros((64, 64, 3), np.uint8)])

    def timed(step, call):
        def wrapped(*args):
            began = time.perf_counter()
            result = call(*args)
            spent[step] = spent.get(step, 0) + time.perf_counter() - began
            return result

        return wrapped

    kept = {name: getattr(align, name) for name in ("decode", "align_face", "write_crop")}
    for name, step in zip(kept, ("decode", "warp", "write"), strict=True):
        setattr(align, name, timed(step, kept[name]))
    detector.boxes, detector.landmarks = timed("detect", detector.boxes), timed("landmarks", detector.landmarks)
    for i, source in enumerate(photographs):
        timed("all", align.align_jobs)([align.Job(source, Path(folder) / f"{i}.png", "a", None, "")], detector)
    for name, function in kept.items():
        setattr(align, name, function)
    return {step: 1000 * seconds / len(photographs) for step, seconds in spent.items()}


def main(n, parts):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["TORCH_HOME"] = str(folder)
        write_weights(folder)
        photographs = write_photographs(folder, n)
        align.FaceAlignmentDetector, align._start_worker = KnownFace, start_known_face
        print(f"{n} JPEGs of {SIZE[0]}x{SIZE[1]}, {os.cpu_count()} cores", flush=True)
        for workers in (int(part) for part in parts if part != "split"):
            given, detected = (rate(photographs, folder / "crops", workers, given) for given in (True, False))
            print(
                f"{workers} workers: {given:.1f} photographs/s with --landmarks, {detected:.3f} with detection",
                flush=True,
            )
        if "split" in parts:
            split = time_split(photographs, folder)
            print("step        ms per photograph, one thread")
            for step in ("decode", "detect", "landmarks", "warp", "write", "all"):
                print(f"{step:<10} {split[step]:>8.1f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 12, sys.argv[2:] or ["1", "2", "split"])

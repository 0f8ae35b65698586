"""Photographs aligned per second, and where the time goes, on drawn 12-megapixel JPEGs.

    python -m tests.bench_alignment --photographs 12 --device cpu

Both networks of the detector run, with random weights; what they find is replaced with the known
face. The first table is for given landmarks, which need no detector. The second compares the
detector with one that looks once, at full size, in turns: with a large face, which a coarse look
settles, and with a small one, which needs a fine look. The last one has the share of each part of
the work, one photograph after another. This is run by hand, not in CI.
"""

import argparse
import os
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import torch
from PIL import Image

import align
from net import pick_device
from tests.synthetic import draw_person, draw_photo

WIDTH, HEIGHT = 4288, 2848
ENLARGED = 8  # times that the drawn face is enlarged, which puts its eyes about 400 pixels apart
# Left, top, right, bottom of the face that the detector finds, as shares of the image.
BOXES = {
    "large face": np.array([0.3, 0.2, 0.7, 0.8]),
    "small face": np.array([0.48, 0.46, 0.52, 0.54]),
}
SMALLEST_FACE = 16  # side in pixels, in the picture that is looked at; none smaller is found


class KnownFace(align.FaceDetector):
    """A detector that runs both its networks, and then answers with the landmarks it was given.

    points: (5, 2), in pixels of the full photograph, the same for every photograph. `box` is one of
    BOXES: where the network for detection says that there is a face.
    """

    def __init__(self, device, points):
        super().__init__(device)
        self.points = points
        self.box = None
        # One method under two names, so that `measure_parts` can time the two kinds of looks apart.
        self.look_coarsely = self.look_finely = self.network.face_detector.detect_from_image
        self.network.face_detector.detect_from_image = self.find_one_face

    def find_one_face(self, image):
        """Run the detection network; returns the box if it is not too small in this image."""
        height, width = image.shape[:2]
        if width == align.DETECTION_SIZE:
            self.look_finely(image)
        else:
            self.look_coarsely(image)
        left, top, right, bottom = self.box * [width, height, width, height]
        side = np.sqrt((right - left) * (bottom - top))
        confidence = 1.0
        return [[left, top, right, bottom, confidence]] if side >= SMALLEST_FACE else []

    def __call__(self, image):
        super().__call__(image)
        reduction = image.shape[1] / WIDTH
        return align.scale_pixels(self.points, reduction), False

    @contextmanager
    def one_look(self):
        """Within, it looks once, at full size, with its weights in PyTorch's usual layout."""
        network = self.network.face_detector.face_detector
        layout = torch.contiguous_format
        if network.conv1_2.weight.is_contiguous(memory_format=torch.channels_last):
            layout = torch.channels_last
        network.to(memory_format=torch.contiguous_format)
        with patch.object(align, "COARSE_LOOKS", ()):
            yield
        network.to(memory_format=layout)


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
    """(seconds, CPU seconds) a photograph, aligned by so many threads."""
    start = time.perf_counter()
    cpu_start = time.process_time()
    with ThreadPoolExecutor(workers) as pool:
        facts = list(pool.map(lambda job: align.align_photo(job, detector), jobs))
    seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() - cpu_start
    assert {entry["status"] for entry in facts} == {"aligned"}
    return np.array([seconds, cpu_seconds]) / len(jobs)


def measure_parts(jobs, detector):
    """{part: its seconds a photograph}, one photograph after another."""
    parts = [
        ("decode", align, "read_photo"),
        ("warp", align, "align_face"),
        ("write", align, "save_crop"),
    ]
    if detector:
        parts += [
            ("detector, coarse", detector, "look_coarsely"),
            ("detector, fine", detector, "look_finely"),
            ("landmarks", detector.network, "get_landmarks_from_image"),
        ]
    seconds = Counter()

    def timed(part, function):
        def timed_function(*arguments, **options):
            start = time.perf_counter()
            result = function(*arguments, **options)
            seconds[part] += time.perf_counter() - start
            return result

        return timed_function

    with ExitStack() as patches:
        for part, owner, name in parts:
            timed_function = timed(part, getattr(owner, name))
            patches.enter_context(patch.object(owner, name, timed_function))
        start = time.perf_counter()
        for job in jobs:
            align.align_photo(job, detector)
        total = time.perf_counter() - start
    seconds["rest"] = total - seconds.total()
    return {part: seconds[part] / len(jobs) for part in seconds}


def compare_looks(jobs, detector, workers, rounds=2):
    """Print the speeds of the detector and of one look at full size, measured in turns."""
    print("| face | one look: photographs/s | now: photographs/s | ratio | CPU seconds, ratio |")
    print("| --- | --- | --- | --- | --- |")
    for face, box in BOXES.items():
        detector.box = box
        before = np.zeros(2)
        now = np.zeros(2)
        for _ in range(rounds):
            with detector.one_look():
                before += measure_speed(jobs, detector, workers) / rounds
            now += measure_speed(jobs, detector, workers) / rounds
        ratio, cpu_ratio = before / now
        speeds = f"{1 / before[0]:.3f} | {1 / now[0]:.3f} | {ratio:.2f}"
        cpu_seconds = f"{before[1]:.2f} / {now[1]:.2f} = {cpu_ratio:.2f}"
        print(f"| {face} | {speeds} | {cpu_seconds} |", flush=True)


def print_parts(title, parts):
    total = sum(parts.values())
    shares = [f"{part} {1000 * t:.1f} ms ({t / total:.0%})" for part, t in parts.items()]
    print(f"| {title} | {', '.join(shares)} |", flush=True)


def run_benchmark(folder, n, device):
    """Print the tables for n photographs; files go to `folder`."""
    os.environ["TORCH_HOME"] = str(folder)
    write_weights(folder)
    paths, points = write_photographs(folder, n)
    threads = torch.get_num_threads()
    machine = f"{os.cpu_count()} cores, {threads} threads of PyTorch, {device}"
    print(f"{n} JPEGs of {WIDTH}x{HEIGHT}, {machine}\n", flush=True)

    known = dict.fromkeys(paths, points.tolist())
    known_jobs = align.plan_jobs({"a": paths}, folder, known, folder)
    align.align_photo(known_jobs[0])  # the first is the slowest
    for workers in (1, 2, 6):
        seconds, _ = measure_speed(known_jobs, None, workers)
        print(f"| {workers} workers, landmarks given | {1 / seconds:.3f} photographs/s |")

    jobs = align.plan_jobs({"a": paths}, folder, {}, folder)
    detector = KnownFace(device, points)
    for box in BOXES.values():
        detector.box = box
        align.align_photo(jobs[0], detector)  # here, too, the first of each size is the slowest
    print()
    compare_looks(jobs, detector, workers=2)

    print()
    print_parts("landmarks given", measure_parts(known_jobs, None))
    for face, box in BOXES.items():
        detector.box = box
        print_parts(face, measure_parts(jobs, detector))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=int, default=12, help="how many (default 12)")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        run_benchmark(Path(folder), args.photographs, pick_device(args.device))


if __name__ == "__main__":
    main()

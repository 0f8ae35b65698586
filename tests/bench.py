"""Speed of training steps beside the loop people write by hand, and what a run costs by size.

    python -m tests.bench --shape tiny --arch ir_18 --mode frozen --steps 1   # does it work?
    python -m tests.bench --shape small --arch ir_18                          # two CPU cores
    python -m tests.bench --shape nd --device cuda --peak 989                 # H100: dense bf16
    python -m tests.bench --part precision --shape small --arch ir_18         # bf16 beside fp32
    python -m tests.bench --part cost                                         # no crop is made

This is run by hand, not in CI. Ours are the trainer's own consecutive steps: "shuffled" of 16
triplets, "grouped" of 96 and 256 images. "naive" is a DataLoader with two workers that decode
three PNGs per triplet, three forward passes, float32, and AdamW as it comes; images pass the
backbone also where it is frozen. All start from the same random weights, on crops of noise.
Variants take turns of --steps steps after a warm-up, and the figures are medians of the turns.

images   counted each time they pass the network, or of a frozen backbone the embedding layer
host %   share of the time at which the last step was issued; near 100 % a GPU waits for the host
MFU %    3 times the FLOPs of a forward pass, against --peak
MiB      what a variant keeps, and its steps add
s/epoch  a step's time times its steps; an epoch of grouped steps embeds each image about once and
         holds the triplets within its blocks, not all
x        times the speed of the first row
loss     of the same 16 triplets at the start
"""

import argparse
import ctypes
import itertools
import math
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import net
import train_twins
from tests.synthetic import set_batchnorm_statistics
from triplet_dataset import Crops, ShuffledSteps

# {name: (pairs, three of which are one family; about how many images)}
SHAPES = {"nd": (160, 5953), "small": (24, 400), "tiny": (6, 40)}
COST_SIZES = (160, 1000, 10000)  # pairs, each with as many images as a pair of ND-TWINS
BATCH_SIZE = 16  # triplets
MARGIN = 0.3
TURNS = 3
OUR_FLAGS = {
    "shuffled": f"--batch_size {BATCH_SIZE}",
    "grouped 96": "",
    "grouped 256": "--images_per_batch 256",
}
MODES = ("full", "frozen")


# ---- data ----------------------------------------------------------------------------------------
def make_crops(n_pairs, n_images, folder, with_pixels=True):
    """Crops of coloured noise, in memory alone; the JSON files that list them go to `folder`.

    One family has three people and so three pairs, all others are two twins. with_pixels=False:
    for measurements that need no pixels, which then are None.
    """
    family_sizes = [3] + [2] * (n_pairs - 3)
    counts = images_per_person(family_sizes, n_images)
    generator = np.random.default_rng(0)
    id_to_images = {}
    pairs = []
    parts = []
    for family, (size, count) in enumerate(zip(family_sizes, counts, strict=True)):
        names = [f"{family:05d}{letter}" for letter in "abc"[:size]]
        pairs += itertools.combinations(names, 2)
        for name in names:
            id_to_images[name] = [f"{folder}/{name}-{i}.png" for i in range(count)]
        if with_pixels:
            parts += draw_family(generator, size, count)
    net.write_json(f"{folder}/crops.json", id_to_images)
    net.write_json(f"{folder}/pairs.json", pairs)
    paths = [path for images in id_to_images.values() for path in images]
    row = {path: i for i, path in enumerate(paths)}
    pixels = torch.from_numpy(np.concatenate(parts)) if with_pixels else None
    return Crops(pixels, row, sha256=paths)  # different paths will do as different hashes


def images_per_person(family_sizes, n_images):
    """(F,) how many images each person of each of F families has.

    The numbers are in proportion to ((i + 1/2) / F) ** 1.56, i = 0 ... F - 1. With 160 pairs and
    5,953 images that gives some 86,000 same-person pairs, as ND-TWINS has.
    """
    n_families = len(family_sizes)
    share = ((np.arange(n_families) + 0.5) / n_families) ** 1.56
    share = np.roll(share, n_families // 2)
    n_people_by_share = share @ family_sizes
    return np.maximum(2, np.round(share * n_images / n_people_by_share).astype(int))


def draw_family(generator, size, count):
    """The crops of each person of a family: a list of (count, 112, 112, 3) uint8."""
    look = generator.uniform(60, 190, 3) + generator.normal(0, 30, (7, 7, 3))
    people = []
    for _ in range(size):
        coarse = look + generator.normal(0, 2, (7, 7, 3))
        texture = np.kron(coarse, np.ones((16, 16, 1))).astype(np.float32)
        noise = 12 * generator.standard_normal((count, 112, 112, 3), np.float32)
        people.append(np.clip(texture + noise, 0, 255).astype(np.uint8))
    return people


def make_trainer(args, folder, crops, flags):
    """A TwinTrainer of these crops with its data loaded, which says nothing."""
    command = (
        f"--train_pairs {folder}/pairs.json --skip_alignment --aligned_json {folder}/crops.json "
        f"--arch {args.arch} --device {args.device} --train_percentage {args.percentage} "
        f"--output_dir {folder} --log_dir {folder} --overwrite {flags}"
    )
    (run,) = train_twins.parse_runs(command.split())
    trainer = train_twins.TwinTrainer(run)
    trainer.say = lambda text: None
    with mock.patch("triplet_dataset.load_crops", return_value=crops):
        trainer.load_network()
        trainer.load_data()
    return trainer


class Task(NamedTuple):
    """What all variants of a table train on."""

    args: argparse.Namespace
    folder: str
    crops: Crops
    paths: list  # of the training images
    triplets: (
        np.ndarray
    )  # (K, 3) rows of `paths`, for the naive loop; all take the first batch's loss
    n_triplets: int  # of an epoch


# ---- variants ------------------------------------------------------------------------------------
class NaiveLoop:
    """The loop people write by hand. `loss` is that of its first batch, before training."""

    precision = "fp32"

    def __init__(self, task, frozen):
        self.triplets = task.triplets
        self.n_done = 0
        self.steps_per_epoch = math.ceil(task.n_triplets / BATCH_SIZE)
        self.loss = None
        for row in np.unique(task.triplets):
            path = task.paths[row]
            pixels = task.crops.pixels[task.crops.row[path]]
            Image.fromarray(pixels.numpy()).save(path, compress_level=1)

        self.device = net.pick_device(task.args.device)
        self.model = net.load_checkpoint(f"{task.folder}/start.pth").to(self.device)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = not frozen or name.startswith("output_layer")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4)
        listed = [[task.paths[row] for row in triplet] for triplet in task.triplets]
        loader = DataLoader(listed, BATCH_SIZE, num_workers=2, collate_fn=decode_triplets)
        self.batches = iter(loader)

    def step(self):
        """Make the next step; returns its triplets, (T, 3)."""
        images = [part.to(self.device) for part in next(self.batches)]
        anchor, positive, negative = [self.model(part)[0] for part in images]
        to_positive = 1 - F.cosine_similarity(anchor, positive)
        to_negative = 1 - F.cosine_similarity(anchor, negative)
        loss = torch.clamp(to_positive - to_negative + MARGIN, min=0).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.loss is None:
            self.loss = loss.detach()
        start = self.n_done * BATCH_SIZE
        self.n_done += 1
        return self.triplets[start : start + BATCH_SIZE]

    def count_images(self, triplets):
        return triplets.size


def decode_triplets(triplets):
    """[(path, path, path), ...] -> three (N, 3, 112, 112) network inputs, the naive way."""
    parts = []
    for paths in zip(*triplets, strict=True):
        images = [np.array(Image.open(path).convert("RGB")) for path in paths]
        bgr = torch.from_numpy(np.stack(images)).flip(3).permute(0, 3, 1, 2)
        parts.append(bgr.float().div(255).sub(0.5).div(0.5))
    return parts


class OurTrainer:
    """The trainer's own steps, epoch after epoch.

    `loss` is that of the naive loop's first batch, before training.
    """

    def __init__(self, task, frozen, flags, precision):
        flags += f" --validation_split 0 --freeze_backbone {frozen} --precision {precision}"
        flags += f" --margin {MARGIN} --pretrained {task.folder}/start.pth"
        self.trainer = make_trainer(task.args, task.folder, task.crops, flags)
        self.precision = self.trainer.precision
        rows, index = np.unique(task.triplets[:BATCH_SIZE], return_inverse=True)
        crop_rows = self.trainer.train_rows[torch.from_numpy(rows)]
        self.trainer.prepare_training()
        features = partial(features_of_some, crop_rows)
        with mock.patch("train_twins.backbone_features", features):
            self.trainer.place_images()
        self.loss = self._first_loss(crop_rows, index.reshape(-1, 3))
        # What measure_start would find, but by a pass of all images.
        embeddings = torch.randn(len(self.trainer.train_rows), 512, device=self.trainer.device)
        self.trainer.start_embeddings = F.normalize(embeddings)
        self.steps_per_epoch = None
        self.planned_steps = self._plan_steps()

    def _first_loss(self, crop_rows, triplets):
        triplets = torch.from_numpy(triplets).to(self.trainer.device)
        with torch.no_grad():
            embeddings = self.trainer.embed(crop_rows)
            to_positive, to_negative = self.trainer.criterion.distances(embeddings, triplets)
            return self.trainer.criterion.loss(to_positive, to_negative)

    def _plan_steps(self):
        args = self.trainer.args
        for epoch in itertools.count(1):
            steps = self.trainer.train_set.steps(epoch, args.images_per_batch, args.batch_size)
            self.steps_per_epoch = len(steps)
            for number in range(len(steps)):
                yield steps[number]

    def step(self):
        """Make the next step; returns its triplets, (T, 3)."""
        triplets = next(self.planned_steps)
        self.trainer.step(triplets)
        return triplets

    def count_images(self, triplets):
        return len(np.unique(triplets))


def features_of_some(crop_rows, model, people, processes):
    """In place of train_twins.backbone_features, for speed: only some crops pass the network.

    The others get the features of these again.
    """
    crops = people.crops.pixels
    images = net.to_input(crops[crop_rows].to(processes.device))
    with torch.no_grad():
        features = model.features(images).cpu()
    position = torch.arange(len(crops)) % len(crop_rows)
    position[crop_rows] = torch.arange(len(crop_rows))
    return features[position]


# ---- measurements --------------------------------------------------------------------------------
def memory_in_use(device):
    """MiB that are in use, from where `peak_memory` counts: PyTorch's on CUDA, else all (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what has been freed does not count
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)


def peak_memory(device):
    """The most MiB that were in use since the last call of `memory_in_use`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    kib = status.split("VmHWM:")[1].split()[0]
    return int(kib) / 1024


def clock(device):
    """Seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Turn(NamedTuple):
    """The figures of some steps of a variant."""

    seconds_per_step: float
    triplets_per_step: float
    images_per_step: float
    seconds_per_image: float
    host_share: float  # of the time, when the last step was issued
    mib: float


def take_turns(variants, n_steps, device):
    """{name: (variant, Turn of medians)} of {name: what makes the variant}."""
    made = {}
    kept = {}
    for name, make in variants.items():
        before = memory_in_use(device)
        made[name] = make()
        for _ in range(n_steps):  # a warm-up
            made[name].step()
        clock(device)
        kept[name] = memory_in_use(device) - before
    turns = {name: [] for name in made}
    for _ in range(TURNS):
        for name, variant in made.items():
            turns[name].append(time_turn(variant, n_steps, device, kept[name]))
    medians = {}
    for name, variant in made.items():
        figures = [median(values) for values in zip(*turns[name], strict=True)]
        medians[name] = (variant, Turn(*figures))
    return medians


def time_turn(variant, n_steps, device, mib_kept):
    """The Turn of so many steps."""
    before = memory_in_use(device)
    began = clock(device)
    steps = [variant.step() for _ in range(n_steps)]
    issued = time.perf_counter() - began
    seconds = clock(device) - began
    mib_added = peak_memory(device) - before
    n_triplets = sum(len(triplets) for triplets in steps)
    n_images = sum(variant.count_images(triplets) for triplets in steps)
    return Turn(
        seconds / n_steps,
        n_triplets / n_steps,
        n_images / n_steps,
        seconds / n_images,
        issued / seconds,
        mib_kept + mib_added,
    )


class Cost(NamedTuple):
    """TFLOPs of one image."""

    forward: float  # of the whole network
    head: float  # of the embedding layer alone, forward

    def of_training(self, is_naive, frozen):
        """Of a training step; a backward pass costs twice as much as a forward pass."""
        if not frozen:
            return 3 * self.forward
        if is_naive:
            return self.forward + 2 * self.head
        return 3 * self.head


def measure_flops(model, crop):
    """The Cost of a network; crop: (1, 112, 112, 3) uint8."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(net.to_input(crop))
    head = 2 * model.output_layer[3].weight.numel()
    return Cost(counter.get_total_flops() / 1e12, head / 1e12)


# ---- tables --------------------------------------------------------------------------------------
def print_table(rows):
    """Print dicts with the same keys as Markdown."""
    print()
    print_row(rows[0])
    print_row(["---"] * len(rows[0]))
    for row in rows:
        print_row(format_cell(value) for value in row.values())


def print_row(cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def format_cell(value):
    if isinstance(value, str):
        return value
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def compare_steps(args, folder, modes, variants):
    """Print a table per mode of {name: function of a Task and `frozen` that makes the variant}."""
    device = net.pick_device(args.device)
    crops = make_crops(*SHAPES[args.shape], folder)
    torch.manual_seed(0)
    model = net.build_model(args.arch)
    # Random weights need statistics, or all images fall together.
    some_crops = crops.pixels[:: max(1, len(crops.row) // 32)]
    set_batchnorm_statistics(model, some_crops, torch.device("cpu"))
    net.save_checkpoint(f"{folder}/start.pth", model)
    cost = measure_flops(model, crops.pixels[:1])

    flags = "--pretrained none --validation_split 0"
    train_set = make_trainer(args, folder, crops, flags).train_set
    n_naive = BATCH_SIZE * (1 + TURNS) * args.steps
    numbers = np.random.default_rng(0).integers(len(train_set), size=n_naive)
    triplets = train_set.triplets(numbers)
    task = Task(args, folder, crops, train_set.images.paths, triplets, len(train_set))
    print(
        f"{args.arch} on {device}, {1e3 * cost.forward:.2f} GFLOP forward; "
        f"{len(task.paths):,} images, {task.n_triplets:,} triplets"
    )
    for mode in modes:
        frozen = mode == "frozen"
        makers = {name: partial(make, task, frozen) for name, make in variants.items()}
        medians = take_turns(makers, args.steps, device)
        first = next(iter(medians.values()))
        rows = []
        for name, measured in medians.items():
            tflops = cost.of_training(name == "naive", frozen)
            rows.append({mode: name, **describe_turn(measured, first, tflops, args.peak)})
        print_table(rows)


def describe_turn(measured, first, tflops_per_image, peak):
    """The rest of a row, of a variant and the first one, (variant, Turn) each."""
    variant, turn = measured
    rate = tflops_per_image / turn.seconds_per_image
    speed_ups = {}
    for what, seconds in durations(*measured).items():
        speed_ups[f"{what}, x"] = durations(*first)[what] / seconds
    return {
        "precision": variant.precision,
        "ms/step": 1e3 * turn.seconds_per_step,
        "triplets": turn.triplets_per_step,
        "images": turn.images_per_step,
        "images/s": 1 / turn.seconds_per_image,
        "host %": 100 * turn.host_share,
        "TFLOP/s": rate,
        "MFU %": 100 * rate / peak if peak else "-",
        "MiB": turn.mib,
        "s/epoch": durations(*measured)["epoch"],
        **speed_ups,
        "loss": f"{float(variant.loss):.6f}",
    }


def durations(variant, turn):
    """Seconds that a variant takes for an image, a triplet and an epoch."""
    return {
        "image": turn.seconds_per_image,
        "triplet": turn.seconds_per_step / turn.triplets_per_step,
        "epoch": turn.seconds_per_step * variant.steps_per_epoch,
    }


def measure_costs(args, folder, n_pairs):
    """The row of the table of costs for so many pairs."""
    n_images = n_pairs * 5953 // 160
    crops = make_crops(n_pairs, n_images, folder, with_pixels=False)
    row = {"pairs": n_pairs, "images": len(crops.row)}
    trainer = measure(
        row, "data set", lambda: make_trainer(args, folder, crops, "--pretrained none")
    )
    train_set, val_set = trainer.train_set, trainer.val_set
    row["triplets"] = len(train_set)
    row["validation images"] = len(val_set.images.paths)
    measure(row, "touched images", train_set.count_touched_images)
    n = trainer.args.images_per_batch
    measure(row, "first grouped step", lambda: train_set.steps(1, n)[0])
    measure(row, "first shuffled step", lambda: ShuffledSteps(train_set, 1, BATCH_SIZE)[0])
    embeddings = F.normalize(torch.randn(len(val_set.images.paths), 512))
    criterion, evaluator = trainer.criterion, trainer.evaluator
    measure(row, "loss", lambda: train_twins.mean_statistics(criterion, val_set, embeddings))
    measure(row, "figures", lambda: evaluator.figures(evaluator.score(embeddings)))
    return row


def measure(row, name, work):
    """Call `work()` and return its result; its seconds and MiB go into `row`."""
    device = torch.device("cpu")
    before = memory_in_use(device)
    began = time.perf_counter()
    result = work()
    row[f"{name}, s"] = time.perf_counter() - began
    row[f"{name}, MiB"] = peak_memory(device) - before
    return result


# ---- command line --------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--part", choices=("steps", "precision", "cost"), default="steps")
    add("--shape", choices=SHAPES, default="small")
    add("--arch", default="ir_50")
    add("--mode", choices=MODES, nargs="+", default=MODES)
    add("--device", default="auto", help="auto, cuda or cpu")
    add(
        "--precision",
        nargs="+",
        help="of our steps (default auto); for --part precision those to compare (fp32 bf16)",
    )
    add("--percentage", type=int, default=10, help="percentage of the triplets (default 10)")
    add("--steps", type=int, help="steps of a turn (default 30 on CUDA, 3 on a CPU)")
    add(
        "--peak",
        type=float,
        help="TFLOP/s of the device, for MFU; dense bf16: H100 SXM 989, A100 312, L4 121",
    )
    args = parser.parse_args(argv)
    if not args.steps:
        args.steps = 30 if net.pick_device(args.device).type == "cuda" else 3
    return args


def main(argv=None):
    args = parse_args(argv)
    variants = {}
    if args.part == "steps":
        precision = args.precision[0] if args.precision else "auto"
        variants["naive"] = NaiveLoop
        for name, flags in OUR_FLAGS.items():
            variants[name] = partial(OurTrainer, flags=flags, precision=precision)
    elif args.part == "precision":
        args.mode = ["full"]
        for precision in args.precision or ("fp32", "bf16"):
            variants[precision] = partial(OurTrainer, flags="", precision=precision)
    with tempfile.TemporaryDirectory() as folder:
        if args.part == "cost":
            print_table([measure_costs(args, folder, n_pairs) for n_pairs in COST_SIZES])
        else:
            compare_steps(args, folder, args.mode, variants)


if __name__ == "__main__":
    main()

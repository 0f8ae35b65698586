"""Speed of training, evaluation, data set and start-up beside a naive loop. Run by hand, not in CI.

    python -m tests.bench --shape small --arch ir_18 --device cpu     # a minute or two
    python -m tests.bench --shape nd --arch ir_18 --device cpu        # ND-TWINS' counts, extrapolated from single steps
    python -m tests.bench --part scale                                # or steps, startup: a part alone
    python -m tests.bench --clock cpu --threads 1                     # on a busy machine: CPU time of one thread

`naive` is the loop people write today: a DataLoader with two workers that decodes three crops per triplet with PIL,
three forward passes, fp32, the contiguous memory format, AdamW as it comes; with a frozen backbone every epoch still
goes through the whole network, and evaluation embeds both images of every pair. Ours is what train_twins.py does,
through the trainer itself. Both start from the same weights and see the same generated crops (coloured noise: only
counts matter for speed). Variants take turns within each repeat, so that what else the machine does hits all alike.

Figures are medians of the repeats after one warm-up. An epoch is the seconds per image times the images of its steps,
not a run of a whole epoch; what stands per triplet is derived from it. An image counts each time it passes the network,
or with a frozen backbone the embedding layer. The losses at the end are of one set of triplets, each variant's way.
"""

import argparse
import gc
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import train_twins
from evaluate_twins import image_pairs
from net import build_model, load_checkpoint, save_checkpoint
from train_twins import Images, TrainedPart, TwinTrainer, set_batchnorm_statistics
from triplet_dataset import TwinTripletDataset

# Pairs (three of them in one family of three), images, skew of the images per person.
SHAPES = {"nd": (160, 5953, 1.56), "small": (24, 400, 1.56), "tiny": (6, 40, 1.0)}
SCALES = ((160, 0, 10), (250, 40, 1), (500, 60, 1), (1000, 80, 1))  # pairs, images per person (0: nd), percentage
MARGIN, BATCH, GROUP = 0.3, 16, 96


# ---- data ---------------------------------------------------------------------------------------------


def family_sizes(n_pairs, n_images, skew):
    """Images per person of each family, [[n, n], ..., [n, n, n], ...].

    All families are of two but one of three, which makes three pairs. The i-th of F families has images in proportion
    to ((i + 1/2) / F) ** skew: with 160 pairs, 5,953 images and a skew of 1.56 some 86,000 same-person pairs, as
    ND-TWINS. Twins are photographed together, so they have equally many.
    """
    members = [3] + [2] * (n_pairs - 3)
    share = ((np.arange(len(members)) + 0.5) / len(members)) ** skew
    share = np.roll(share, len(members) // 2)  # the family of three is one of the middle
    counts = np.maximum(2, np.floor(share * n_images / (share @ members)).astype(int))
    sizes = [[int(count)] * n for count, n in zip(counts, members, strict=True)]
    for i in range(n_images - sum(map(sum, sizes))):
        sizes[i % len(sizes)][i // len(sizes) % 2] += 1
    return sizes


def listing(sizes, folder):
    """({ID: [paths]}, [[ID, twin's ID], ...]) of families of these sizes."""
    images, pairs = {}, []
    for f, family in enumerate(sizes):
        names = [f"{f:04d}{'abc'[i]}" for i in range(len(family))]
        pairs += [[a, b] for i, a in enumerate(names) for b in names[i + 1 :]]
        images |= {name: [f"{folder}/{name}/{i}.png" for i in range(n)] for name, n in zip(names, family, strict=True)}
    return images, pairs


def write_crops(images, seed=0):
    """Coloured noise: a texture per family, a fainter one per person, noise per image; twins are hard to tell apart."""
    rng, families = np.random.default_rng(seed), {}
    for name, paths in tqdm(images.items(), "writing crops", leave=False, disable=None):
        if name[:4] not in families:
            families[name[:4]] = rng.normal(0, 30, (7, 7, 3)) + rng.uniform(60, 190, 3)
        texture = np.kron(families[name[:4]] + rng.normal(0, 2, (7, 7, 3)), np.ones((16, 16, 1)))
        Path(paths[0]).parent.mkdir(parents=True)
        for path in paths:
            crop = np.clip(texture + rng.normal(0, 12, (112, 112, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(crop).save(path, compress_level=1)


# ---- naive --------------------------------------------------------------------------------------------


class NaiveItems(Dataset):
    """Tuples of decoded crops: of triplets, or of pairs of images."""

    def __init__(self, paths, rows):
        self.paths, self.rows = paths, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return tuple(self.decode(self.paths[row]) for row in self.rows[i])

    @staticmethod
    def decode(path):
        rgb = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
        return (rgb.flip(2).permute(2, 0, 1).float() / 255 - 0.5) / 0.5


def naive_loader(paths, rows, batch):
    return DataLoader(NaiveItems(paths, rows), batch, num_workers=2)


def naive_loss(anchor, positive, negative):
    """Of three (B, 512) tensors; written out, not triplet_loss.py."""
    to_positive = 1 - F.cosine_similarity(anchor, positive)
    to_negative = 1 - F.cosine_similarity(anchor, negative)
    return torch.clamp(to_positive - to_negative + MARGIN, min=0).mean()


class Naive:
    """The loop people write today; `step()` goes on to the next batch."""

    def __init__(self, checkpoint, paths, triplets, frozen, device):
        self.model = load_checkpoint(checkpoint).to(device).eval()
        if frozen:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad = name.startswith("output_layer")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4)
        self.batches, self.device = iter(naive_loader(paths, triplets, BATCH)), device

    def loss(self, batch):
        return naive_loss(*(self.model(part.to(self.device))[0] for part in batch))

    def step(self):
        batch = next(self.batches)
        self.optimizer.zero_grad()
        self.loss(batch).backward()
        self.optimizer.step()
        return 3 * len(batch[0]), len(batch[0])


# ---- ours ---------------------------------------------------------------------------------------------


class Ours:
    """The trainer's own steps, evenly chosen from its first epoch."""

    def __init__(self, arguments, folder, batching, repeats):
        command = f"--train_pairs {folder}/pairs.json --aligned_json {folder}/crops.json --skip_alignment --no_cache "
        command += f"--pretrained {folder}/start.pth --validation_split 0 --margin {MARGIN} --run_name {batching} "
        command += f"--output_dir {folder}/models --log_dir {folder}/logs --arch {arguments.arch} "
        command += f"--device {arguments.device} --precision {arguments.precision} --batching {batching} "
        command += f"--freeze_backbone {arguments.frozen} --train_percentage {arguments.percentage} "
        command += f"--images_per_batch {GROUP} " if batching == "grouped" else f"--batch_size {BATCH} "
        self.trainer = trainer = TwinTrainer(train_twins.parse_args(command.split()))
        trainer._say = lambda text: None
        trainer._prepare_data()
        trainer._prepare_model()
        trainer.rows = [np.arange(len(trainer.train_set.images.paths))]
        self.n_steps = trainer._steps(1, 0)[0]
        self.chosen = np.linspace(0, self.n_steps - 2, repeats + 1).round().astype(int)  # the last may be smaller
        self.given = 0

    def use(self, data):
        """Crops, or features of a frozen backbone, of all images."""
        trainer = self.trainer
        part = TrainedPart(trainer.model, trainer.args.freeze_backbone)
        trainer.images, trainer.trained = Images(data, part, trainer.device, trainer.ranks), part
        # What `--keep` compares with; its values do not matter for the speed.
        trainer.start_embeddings = F.normalize(torch.randn(len(trainer.rows[0]), 512, device=trainer.device))

    def step(self):
        number = self.chosen[min(self.given, len(self.chosen) - 1)]
        self.given += 1
        triplets, count = next(self.trainer._steps(1, int(number))[1])
        rows, _ = self.trainer._step(triplets, count, 1e-4)
        return len(rows), len(triplets)

    def loss(self, images, triplets):
        """Of triplets among these images, each image embedded once."""
        place = torch.from_numpy(np.searchsorted(images, triplets)).to(self.trainer.device)
        with torch.no_grad():
            embeddings = self.trainer.trained(self.trainer.images.take(images))
            return self.trainer.criterion.loss(*self.trainer.criterion.distances(embeddings, place)).item()


# ---- measuring ----------------------------------------------------------------------------------------


def reset_peak():
    """Let the peak of memory begin here (Linux); elsewhere it is that of the whole process."""
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak():
    """Peak resident memory in MiB since `reset_peak`, else of the process (getrusage); a child's own, not inherited."""
    try:
        text = Path("/proc/self/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def take_turns(variants, repeats, device, clock):
    """{name: (seconds, images, triplets, seconds per image, peak MiB)} of callables, medians after a warm-up."""
    measured = {name: [] for name in variants}
    for repeat in tqdm(range(repeats + 1), "repeats", leave=False, disable=None):
        for name, step in variants.items():
            reset_peak()
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = clock()
            counts = step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = clock() - began
            memory = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak()
            if repeat:
                measured[name].append((seconds, *counts, seconds / counts[0], memory))
    columns = {name: list(zip(*rows, strict=True)) for name, rows in measured.items()}
    return {name: (*map(statistics.median, four), max(memory)) for name, (*four, memory) in columns.items()}


def table(head, rows):
    cells = [head, *([cell if isinstance(cell, str) else f"{cell:,.4g}" for cell in row] for row in rows)]
    cells = [[cell.replace("e+0", "e") for cell in row] for row in cells]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))
    print(flush=True)


def compare_training(arguments, folder, frozen):
    """Ours and naive on one mode: the table, and the losses on the same triplets."""
    arguments.frozen, device = frozen, torch.device(arguments.device)
    grouped = Ours(arguments, folder, "grouped", arguments.repeats)
    shuffled = Ours(arguments, folder, "shuffled", arguments.repeats)
    data_set = grouped.trainer.train_set
    paths, crops = data_set.images.paths, data_set.load()
    together, _ = next(grouped.trainer._steps(1, 0)[1])  # a grouped step's triplets, hence its images
    images = np.unique(together)
    some = together[np.random.default_rng(0).choice(len(together), min(BATCH, len(together)), replace=False)]
    data, once = crops, None
    if frozen:
        # The features of the images whose losses are compared; the others' are repetitions of them.
        began = arguments.clock()
        known = train_twins.backbone_features(grouped.trainer.model, crops[images], device, grouped.trainer.ranks)
        once = (arguments.clock() - began) / len(images) * len(paths)
        data = known[torch.arange(len(paths)) % len(images)]
        data[images] = known
    for ours in (grouped, shuffled):
        ours.use(data)
    order = data_set.triplets(np.random.default_rng(0).choice(len(data_set), BATCH * (arguments.repeats + 1)))
    naive = Naive(f"{folder}/start.pth", paths, order, frozen, device)

    with torch.no_grad():
        batch = next(iter(naive_loader(paths, some, BATCH)))
        losses = naive.loss(batch).item(), shuffled.loss(np.unique(some), some), grouped.loss(images, some)

    fast = arguments.fast if frozen else 1  # steps without backbone are short: several make one measurement

    def several(step):
        return lambda: tuple(np.sum([step() for _ in range(fast)], 0))

    variants = {"naive": naive.step, "ours, shuffled": several(shuffled.step), "ours, grouped": several(grouped.step)}
    for ours in (grouped, shuffled):
        ours.chosen = np.linspace(0, ours.n_steps - 2, (arguments.repeats + 1) * fast).round().astype(int)
    measured = take_turns(variants, arguments.repeats, device, arguments.clock)
    n_steps = {"naive": math.ceil(len(data_set) / BATCH), "ours, shuffled": shuffled.n_steps}
    blocks = [block for step in data_set.grouped_epoch(1, GROUP) for block in step]
    n_visits = {"naive": 3 * len(data_set), "ours, grouped": sum(block.size for block in blocks)}
    rows, base = [], None
    for (name, (seconds, n_images, n_triplets, per_image, memory)), loss in zip(measured.items(), losses, strict=True):
        part = 1 if name == "naive" else fast
        steps = n_steps.get(name, grouped.n_steps)
        visits = n_visits.get(name, steps * n_images / part)
        epoch = per_image * visits
        figures = per_image, epoch / len(data_set), epoch
        base = base or figures
        ratios = [f"{b / f:,.1f}x" for b, f in zip(base, figures, strict=True)]
        row = [name, seconds / part * 1e3, n_images / part, f"{n_triplets / part:,.0f}", per_image * 1e3, f"{steps:,}"]
        rows.append([*row, visits, epoch, *ratios, memory, f"{loss:.6f}"])
    mode = "frozen backbone" if frozen else "full network"
    print(f"training, {mode}: {len(data_set):,} triplets, which is {arguments.percentage} % of {data_set.n_possible:,}")
    head = ["", "ms/step", "images", "triplets", "ms/image", "steps*", "images*", "s/epoch*"]
    table([*head, "per image", "per triplet", "per epoch", "peak MiB", "loss of the same 16"], rows)
    if once:
        print(f"the backbone once per image, before the first epoch: {once:,.1f} s for {len(paths):,} images*\n")


def compare_evaluation(arguments, folder):
    device, batch = torch.device(arguments.device), 32
    arguments.frozen = False
    ours = Ours(arguments, folder, "shuffled", 1)
    images = ours.trainer.train_set.images
    ours.use(ours.trainer.train_set.load())
    genuine, twin = image_pairs(images)
    pairs = np.concatenate([genuine, twin])
    model = load_checkpoint(f"{folder}/start.pth").to(device).eval()
    chosen = pairs[np.random.default_rng(0).choice(len(pairs), batch * (arguments.repeats + 1))]
    batches, given = iter(naive_loader(images.paths, chosen, batch)), iter(range(10**9))

    def naive():
        with torch.no_grad():
            one, other = (model(part.to(device))[0] for part in next(batches))
            F.cosine_similarity(one, other)
        return 2 * len(one), len(one)

    def embed():
        start = next(given) * 2 * batch % max(1, len(images.paths) - 2 * batch)
        rows = np.arange(start, min(start + 2 * batch, len(images.paths)))
        ours.trainer.images.embed(rows)
        return len(rows), 0

    measured = take_turns({"naive": naive, "ours": embed}, arguments.repeats, device, arguments.clock)
    per_image = {name: row[3] for name, row in measured.items()}
    whole = {"naive": 2 * len(pairs), "ours": len(images.paths)}
    rows = [
        (name, per_image[name] * 1e3, f"{n:,}", per_image[name] * n, f"{per_image['naive'] / per_image[name]:,.1f}x",
         f"{per_image['naive'] * whole['naive'] / (per_image[name] * n):,.1f}x", measured[name][4])
        for name, n in whole.items()
    ]  # fmt: skip
    print(f"evaluation: embeddings for {len(genuine):,} same-person and {len(twin):,} twin pairs of images")
    table(["", "ms/image", "images", "s in all*", "per image", "in all", "peak MiB"], rows)


def compare_steps(arguments):
    n_pairs, n_images, skew = SHAPES[arguments.shape]
    with tempfile.TemporaryDirectory() as folder:
        images, pairs = listing(family_sizes(n_pairs, n_images, skew), f"{folder}/crops")
        write_crops(images)
        Path(folder, "crops.json").write_text(json.dumps(images))
        Path(folder, "pairs.json").write_text(json.dumps(pairs))
        torch.manual_seed(0)
        model = build_model(arguments.arch)
        # Without its data's BatchNorm statistics an untrained network maps all images onto one.
        first = [person[0] for person in images.values()][:32]
        crops = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in first])
        set_batchnorm_statistics(model, crops, torch.device("cpu"))
        save_checkpoint(f"{folder}/start.pth", model)
        same = sum(len(person) * (len(person) - 1) // 2 for person in images.values())
        print(f"shape {arguments.shape}: {len(pairs)} pairs, {len(images)} IDs, {n_images:,} images, ", end="")
        print(
            f"{same:,} same-person pairs of images; {arguments.arch} on {arguments.device}, {arguments.precision}, ",
            end="",
        )
        print(f"{torch.get_num_threads()} threads, {arguments.clock_name} time, {arguments.repeats} repeats")
        print("* of a whole epoch, extrapolated from the seconds per image of the steps measured\n", flush=True)
        if "full" in arguments.mode:
            compare_training(arguments, folder, frozen=False)
        if "frozen" in arguments.mode:
            compare_training(arguments, folder, frozen=True)
        if "evaluation" in arguments.mode:
            compare_evaluation(arguments, folder)


# ---- scale and start-up -------------------------------------------------------------------------------


def measure_scale(n_pairs, per_person, percentage):
    """Print one size's figures as JSON; in a process of its own, so that the peak is its own."""
    sizes = [[per_person] * 2] * n_pairs if per_person else family_sizes(*SHAPES["nd"])
    images, pairs = listing(sizes, "/crops")
    reset_peak()
    before, began = peak(), time.process_time()
    data_set = TwinTripletDataset(images, pairs, percentage, seed=42)
    built = time.process_time()
    memory = peak() - before
    data_set.touched()
    touched = time.process_time()
    steps = data_set.grouped_epoch(1, GROUP)
    data_set.block_triplets(steps[0][0])
    grouped = time.process_time()
    next(data_set.epoch(1, BATCH))
    shuffled = time.process_time()
    row = [f"{len(pairs):,}", f"{len(data_set.images.paths):,}", data_set.n_possible, len(data_set), built - began]
    row += [memory, touched - built, grouped - touched, shuffled - grouped, peak() - before]
    print(json.dumps(row))


def compare_scale(repeats=3):
    print("data set: median seconds of one thread's CPU time, and MiB beyond the lists of paths; no crop is read")
    head = ["pairs", "images", "possible", "sampled", "build s", "build MiB", "touched s", "first grouped step s"]
    rows = []
    for size in SCALES:
        command = [sys.executable, "-m", "tests.bench", "--one", *map(str, size)]
        runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(repeats)]
        columns = list(zip(*runs, strict=True))
        rows.append([column[0] if isinstance(column[0], str) else statistics.median(column) for column in columns])
    table([*head, "first shuffled step s", "peak MiB"], rows)


def compare_startup(repeats=5):
    scripts = ("align", "train_twins", "evaluate_twins")
    commands = {"import torch": ["-c", "import torch"]}
    commands |= {f"import {name}": ["-c", f"import {name}"] for name in scripts}
    commands |= {f"{name}.py --help": [f"{name}.py", "--help"] for name in scripts}
    seconds = {name: [] for name in commands}
    for _ in range(repeats + 1):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    print("start-up, median of processes after the first", flush=True)
    rows = [
        (name, f"{value:.2f}", f"{value - medians['import torch']:+.2f}" if name.startswith("import") else "")
        for name, value in medians.items()
    ]
    table(["", "seconds", "beyond import torch"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts, modes = ("steps", "scale", "startup"), ("full", "frozen", "evaluation")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--arch", default="ir_18")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="auto", help="of ours; naive is always fp32 (default auto)")
    parser.add_argument("--percentage", type=int, default=10, help="of the triplets (default 10)")
    parser.add_argument("--repeats", type=int, default=5, help="median of so many (default 5)")
    parser.add_argument("--fast", type=int, default=8, help="frozen: steps of ours in each repeat (default 8)")
    parser.add_argument("--part", choices=parts, nargs="+", default=parts)
    parser.add_argument("--mode", choices=modes, nargs="+", default=modes, help="what of the steps (default all)")
    text = "wall, or cpu: this process alone, without the loader's workers (default wall)"
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help=text)
    parser.add_argument("--threads", type=int, help="of PyTorch (default its own choice)")
    arguments = parser.parse_args()
    arguments.clock_name, clocks = arguments.clock, {"wall": time.perf_counter, "cpu": time.process_time}
    arguments.clock = clocks[arguments.clock]
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if "steps" in arguments.part:
        compare_steps(arguments)
    if "scale" in arguments.part:
        compare_scale()
    if "startup" in arguments.part:
        compare_startup()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure_scale(*map(int, sys.argv[2:]))
    else:
        main()

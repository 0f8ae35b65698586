"""Speed of training steps beside the loop people write by hand, and what a run costs by size. By hand, not in CI.

    python -m tests.bench --shape small --arch ir_18                  # minutes on two CPU cores
    python -m tests.bench --shape nd --device cuda --peak 989         # ND-TWINS' counts; dense bf16 of an H100
    python -m tests.bench --part cost                                 # 160, 1,000 and 10,000 pairs; no crop is made

Ours are the trainer's own consecutive steps: `shuffled` of 16 triplets, `grouped` of 96 and 256 images. `naive`: a
DataLoader with two workers that decode three PNGs per triplet, three forward passes, float32, AdamW as it comes; the
backbone is passed also where it is frozen. All start from the same random weights, on crops of noise. Variants take
turns of --steps steps after a warm-up; figures are medians. An image counts each time it passes the network, or of a
frozen backbone the embedding layer. Host: the share of the time at which the last step was issued; near 100 % a card
waits for the host (a CPU is its own). MFU: 3 times the FLOPs of a forward pass, against --peak. MiB: what a variant
keeps and its steps add. An epoch is a step's time times its steps; of grouped steps it embeds each image about once and
holds the triplets within its blocks, not all. The loss is that of the same 16 triplets, each way.
"""

import argparse
import ctypes
import math
import tempfile
import time
from pathlib import Path
from statistics import median
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
from triplet_dataset import Crops, ShuffledSteps, write_json

SHAPES = {"nd": (160, 5953), "small": (24, 400), "tiny": (6, 40)}  # pairs, three of them one family; about the images
SIZES = (160, 1000, 10000)  # pairs of the costs, each with as many images as a pair of ND-TWINS
BATCH, MARGIN, TURNS = 16, 0.3, 3
OURS = {"shuffled": f"--batch_size {BATCH}", "grouped 96": "", "grouped 256": "--images_per_batch 256"}


def make_crops(n_pairs, n_images, folder, pixels=True):
    """Crops of coloured noise in memory alone, or with pixels=False not even there; their JSON files in `folder`.

    The i-th of F families, one of them of three people, has images in proportion to ((i + 1/2) / F) ** 1.56: some
    86,000 same-person pairs with 160 pairs and 5,953 images, as ND-TWINS.
    """
    members = [3] + [2] * (n_pairs - 3)
    share = np.roll(((np.arange(len(members)) + 0.5) / len(members)) ** 1.56, len(members) // 2)
    counts = np.maximum(2, np.round(share * n_images / (share @ members)).astype(int))
    rng, id_to_images, pairs, parts = np.random.default_rng(0), {}, [], []
    for family, (count, n) in enumerate(zip(counts, members, strict=True)):
        names = [f"{family:05d}{'abc'[i]}" for i in range(n)]
        pairs += [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        id_to_images |= {name: [f"{folder}/{name}-{i}.png" for i in range(count)] for name in names}
        look = rng.uniform(60, 190, 3) + rng.normal(0, 30, (7, 7, 3))
        for _ in names if pixels else ():
            texture = np.kron(look + rng.normal(0, 2, (7, 7, 3)), np.ones((16, 16, 1))).astype(np.float32)
            noisy = texture + 12 * rng.standard_normal((count, 112, 112, 3), np.float32)
            parts.append(np.clip(noisy, 0, 255).astype(np.uint8))
    write_json(f"{folder}/crops.json", id_to_images)
    write_json(f"{folder}/pairs.json", pairs)
    row = {path: i for i, path in enumerate(path for paths in id_to_images.values() for path in paths)}
    return Crops(torch.from_numpy(np.concatenate(parts)) if pixels else None, row, list(row))


def make_trainer(args, folder, crops, flags):
    """A TwinTrainer of these crops, its data loaded."""
    command = f"--skip_alignment --arch {args.arch} --device {args.device} --train_percentage {args.percentage} "
    command += f"--train_pairs {folder}/pairs.json --aligned_json {folder}/crops.json --overwrite {flags} "
    command += f"--output_dir {folder} --log_dir {folder}"
    trainer = train_twins.TwinTrainer(*train_twins.parse_runs(command.split()))
    trainer.say = lambda text: None
    with mock.patch("triplet_dataset.load_crops", return_value=crops):
        trainer.load_data()
    return trainer


def decode(triplets):
    """[(path, path, path), ...] -> three (N, 3, 112, 112) network inputs, the naive way."""
    pixels = np.stack([[np.array(Image.open(path).convert("RGB")) for path in triplet] for triplet in triplets])
    return torch.from_numpy(pixels).flip(4).permute(1, 0, 4, 2, 3).float().div(255).sub(0.5).div(0.5).unbind()


def naive(facts, args, folder, crops, frozen, triplets, paths):
    """The loop people write by hand, over `triplets` (K, 3); yields each step's numbers of triplets and images."""
    for row in np.unique(triplets):
        Image.fromarray(crops.pixels[crops.row[paths[row]]].numpy()).save(paths[row], compress_level=1)
    device, model = net.pick_device(args.device), net.load_checkpoint(f"{folder}/start.pth")
    for name, parameter in model.to(device).named_parameters():
        parameter.requires_grad = not frozen or name.startswith("output_layer")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=1e-4)
    triplets = [[paths[row] for row in triplet] for triplet in triplets]
    for batch in DataLoader(triplets, BATCH, num_workers=2, collate_fn=decode):
        anchor, positive, negative = (model(part.to(device))[0] for part in batch)
        to_positive, to_negative = 1 - F.cosine_similarity(anchor, positive), 1 - F.cosine_similarity(anchor, negative)
        loss = torch.clamp(to_positive - to_negative + MARGIN, min=0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        facts.setdefault("loss", loss.detach())
        yield BATCH, 3 * BATCH


def ours(facts, args, folder, crops, frozen, triplets, precision, flags):
    """The trainer's own steps, epoch after epoch; yields each step's triplets."""
    flags += f" --freeze_backbone {frozen} --precision {precision} --margin {MARGIN} --pretrained {folder}/start.pth"
    trainer = make_trainer(args, folder, crops, f"--validation_split 0 {flags}")
    images, place = np.unique(triplets[:BATCH], return_inverse=True)

    def features(model, *_):  # only `images` pass the network; the others get theirs again
        which = torch.arange(len(crops.pixels)) % len(images)
        which[images] = torch.arange(len(images))
        with torch.no_grad():
            return model.features(net.to_input(crops.pixels[images].to(trainer.device))).cpu()[which]

    with mock.patch("train_twins.backbone_features", features):
        trainer.build_model()
    trainer.embeddings["start"] = torch.randn(len(trainer.train_rows), 512, device=trainer.device) / 512**0.5
    with torch.no_grad():
        place = torch.from_numpy(place.reshape(-1, 3)).to(trainer.device)
        distances = trainer.criterion.distances(trainer.embed(trainer.train_rows[images]), place)
    facts |= {"precision": trainer.precision, "loss": trainer.criterion.loss(*distances)}
    for epoch in range(1, 10**9):
        steps = trainer.train_set.steps(epoch, trainer.args.images_per_batch, trainer.args.batch_size)
        facts["steps"] = len(steps)
        for chosen in (steps[i] for i in range(len(steps))):
            trainer.step(chosen)
            yield chosen


def memory(device, what="now"):
    """MiB in use "now", or the "peak" since then: PyTorch's on CUDA, else the process's own (Linux)."""
    if device.type == "cuda":
        if what == "now":
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if what == "now":
        ctypes.CDLL(None).malloc_trim(0)  # what has been freed does not count
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def clock(device):
    """Seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(variants, steps, device):
    """{name: (seconds a step, its triplets and images, seconds an image, host share, MiB)} of {name: generator}."""
    kept, turns = {}, {name: [] for name in variants}
    for name, variant in variants.items():
        before = memory(device)
        for _ in range(steps):  # a warm-up
            next(variant)
        clock(device)
        kept[name] = memory(device) - before
    for name in TURNS * list(variants):
        before, began = memory(device), clock(device)
        done = [next(variants[name]) for _ in range(steps)]
        issued = time.perf_counter() - began
        seconds, mib = clock(device) - began, kept[name] + memory(device, "peak") - before
        counts = [step if isinstance(step, tuple) else (len(step), len(np.unique(step))) for step in done]
        triplets, images = np.sum(counts, 0)
        turns[name].append((seconds / steps, triplets / steps, images / steps, seconds / images, issued / seconds, mib))
    return {name: [*map(median, zip(*figures, strict=True))] for name, figures in turns.items()}


def print_table(rows):
    """Dicts with the same keys, as Markdown."""
    shown = [[x if isinstance(x, str) else f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in r.values()] for r in rows]
    for cells in ([], list(rows[0]), ["---"] * len(rows[0]), *shown):
        print(f"| {' | '.join(cells)} |" if cells else "", flush=True)


def compare_steps(args, folder, modes, variants):
    """A table per mode of {name: (flags or None for naive, precision)}; the ratios are to the first."""
    device, crops = net.pick_device(args.device), make_crops(*SHAPES[args.shape], folder)
    torch.manual_seed(0)
    model = net.build_model(args.arch)  # random weights need statistics, or all images fall together
    set_batchnorm_statistics(model, crops.pixels[:: max(1, len(crops.row) // 32)], torch.device("cpu"))
    net.save_checkpoint(f"{folder}/start.pth", model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(net.to_input(crops.pixels[:1]))
    whole, head = counter.get_total_flops() / 1e12, 2 * model.output_layer[3].weight.numel() / 1e12
    data_set = make_trainer(args, folder, crops, "--pretrained none --validation_split 0").train_set
    count, paths = len(data_set), data_set.images.paths
    print(f"{args.arch} on {device}, {1e3 * whole:.2f} GFLOP forward; {len(paths):,} images, {count:,} triplets")
    order = data_set.triplets(np.random.default_rng(0).integers(count, size=BATCH * (1 + TURNS) * args.steps))
    for mode in modes:
        frozen, facts, made, rows, base = mode == "frozen", {}, {}, [], None
        for name, (flags, precision) in variants.items():
            facts[name] = {"precision": "fp32", "steps": math.ceil(count / BATCH)}
            shared = (facts[name], args, folder, crops, frozen, order)
            made[name] = naive(*shared, paths) if flags is None else ours(*shared, precision, flags)
        for name, (seconds, triplets, images, each, host, mib) in take_turns(made, args.steps, device).items():
            rate = (3 * whole if not frozen else whole + 2 * head if name == "naive" else 3 * head) / each
            row = {mode: name, "precision": facts[name]["precision"], "ms/step": 1e3 * seconds}
            row |= {"triplets": triplets, "images": images, "images/s": 1 / each, "host %": 100 * host, "TFLOP/s": rate}
            row |= {"MFU %": 100 * rate / args.peak if args.peak else "-", "MiB": mib}
            figures = {"image": each, "triplet": seconds / triplets, "epoch": seconds * facts[name]["steps"]}
            base = base or figures
            row |= {"s/epoch": figures["epoch"], **{f"{key}, x": base[key] / figures[key] for key in figures}}
            rows.append(row | {"loss": f"{float(facts[name]['loss']):.6f}"})
        print_table(rows)


def measure_cost(args, folder, n_pairs):
    """A row of the table of costs."""
    cpu, crops = torch.device("cpu"), make_crops(n_pairs, n_pairs * 5953 // 160, folder, pixels=False)
    row = {"pairs": n_pairs, "images": len(crops.row)}

    def measure(name, work):
        before, began = memory(cpu), time.perf_counter()
        result = work()
        row[f"{name}, s"] = time.perf_counter() - began
        row[f"{name}, MiB"] = memory(cpu, "peak") - before
        return result

    trainer = measure("data set", lambda: make_trainer(args, folder, crops, "--pretrained none"))
    row |= {"triplets": len(trainer.train_set), "validation images": len(trainer.val_set.images.paths)}
    measure("touched images", trainer.train_set.count_touched_images)
    measure(
        "first grouped step",
        lambda: trainer.train_set.steps(1, trainer.args.images_per_batch, trainer.args.batch_size)[0],
    )
    measure("first shuffled step", lambda: ShuffledSteps(trainer.train_set, 1, BATCH)[0])
    embeddings = F.normalize(torch.randn(row["validation images"], 512))
    measure("loss", lambda: train_twins.mean_statistics(trainer.criterion, trainer.val_set, embeddings))
    measure("figures", lambda: trainer.evaluator.figures(trainer.evaluator.score(embeddings)))
    return row


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, modes = parser.add_argument, ("full", "frozen")
    add("--part", choices=("steps", "precision", "cost"), default="steps")
    add("--shape", choices=SHAPES, default="small")
    add("--arch", default="ir_50")
    add("--mode", choices=modes, nargs="+", default=modes)
    add("--device", default="auto", help="auto, cuda or cpu")
    add("--precision", nargs="+", help="of ours (default auto); for --part precision those to compare (fp32 bf16)")
    add("--percentage", type=int, default=10, help="of the triplets (default 10)")
    add("--steps", type=int, help="of a turn (default 30 on CUDA, 3 on a CPU)")
    add("--peak", type=float, help="TFLOP/s of the device, for MFU; dense bf16: H100 SXM 989, A100 312, L4 121")
    args = parser.parse_args(argv)
    args.steps = args.steps or (30 if net.pick_device(args.device).type == "cuda" else 3)
    with tempfile.TemporaryDirectory() as folder:
        if args.part == "steps":
            variants = {name: (flags, (args.precision or ["auto"])[0]) for name, flags in OURS.items()}
            compare_steps(args, folder, args.mode, {"naive": (None, "fp32"), **variants})
        elif args.part == "precision":
            compare_steps(args, folder, ["full"], {name: ("", name) for name in args.precision or ("fp32", "bf16")})
        else:
            print_table([measure_cost(args, folder, n_pairs) for n_pairs in SIZES])


if __name__ == "__main__":
    main()

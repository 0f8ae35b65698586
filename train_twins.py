"""Fine-tune AdaFace on identical twins: align the photographs, then train with triplet loss.

    python train_twins.py                                     # the full network
    python train_twins.py --freeze_backbone                   # only the embedding layer
    python train_twins.py --skip_alignment --resume           # go on after an interruption
    python train_twins.py --freeze_backbone True False --train_percentage 10 50 100 --seed 1 2 3   # a run of each
    torchrun --standalone --nproc_per_node=8 train_twins.py   # on eight GPUs of one machine

The network stays in eval mode: BatchNorm keeps its pretrained statistics and dropout is off, so an embedding depends on
its image alone and is computed once per step, however many triplets use it; a frozen backbone runs once per image.
"""

import argparse
import hashlib
import itertools
import math
import shlex
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import align
import net
from align import between
from evaluate_twins import OPERATING_POINTS, SETTINGS, TwinEvaluator, compare, describe, plot_figure
from net import InputError, Processes, progress, to_input
from triplet_dataset import HAND_SIZE, People, TwinTripletDataset, read_json, split_pairs, write_json
from triplet_loss import DISTANCES, TripletLoss

CHECK_EVERY = 50  # steps between looks at the loss, for which a GPU has to be waited for
SAVE_MINUTES = 10  # between states to resume from
STEPS = {True: 400, False: 100}  # of a default run, frozen or not, in whole epochs: they decide, not the epochs


def parse_runs(argv=None):
    """The settings of each run that the command line asks for, the cheapest first."""
    text = "Fine-tune AdaFace on identical twins with triplet loss. --freeze_backbone, --train_percentage, --margin and"
    parser = align.Parser(prog="train_twins.py", description=f"{text} --seed take several values: a run of each.")
    count, seed, weight = between(int, 1, 10**9), between(int, 0, 2**32 - 1), between(float, 0, 1e6)
    group = parser.add_argument_group("data and stage 1, alignment")
    group.add_argument("--train_pairs", default="train_twin_id_pairs.json", help='JSON [["ID", "twin\'s ID"], ...]')
    align.add_alignment_arguments(group, "train")

    add = parser.add_argument_group("what is trained").add_argument
    add("--arch", choices=net.ARCHITECTURES, metavar="NAME", default="ir_50", help=", ".join(net.ARCHITECTURES))
    add("--pretrained", default="pretrained/adaface_ir50_ms1mv2.ckpt", help="weights to start from; none: random")
    bare, several = {"nargs": "*", "metavar": "BOOL"}, {"nargs": "+", "metavar": "N"}
    add("--freeze_backbone", type=align.boolean, **bare, default=False, help="only the embedding layer; bare: True")
    add("--train_percentage", type=between(int, 1, 100), **several, default=100, help="share of each pair's triplets")
    add("--validation_split", type=between(float, 0, 0.9), default=0.15, help="share of pairs, as whole families")

    add = parser.add_argument_group("how it is trained").add_argument
    add("--margin", type=between(float, 1e-6, 2), **several, default=0.3, help="of the triplet loss, a distance")
    add("--distance", choices=DISTANCES, default="cosine", help="1 - cos, or euclidean between unit vectors")
    add("--images_per_batch", type=between(int, 2 * HAND_SIZE, 10**9), default=96, help="images of a training step")
    add("--batch_size", type=count, help="instead, this many shuffled triplets a step, each once an epoch")
    add("--epochs", type=count, help=f"by default what makes {STEPS[False]} steps, frozen {STEPS[True]}; one at least")
    add("--quadruplet_weight", type=between(float, 0, 1), default=1.0, help="share of the loss on pairs of triplets")
    add("--drift_weight", type=weight, default=0.5, help="of the mean cosine distance to the embeddings at the start")
    add("--learning_rate", type=weight, default=1e-4, help="of AdamW, at its highest")
    add("--schedule", choices=("cosine", "constant"), default="cosine", help="the rate rises and falls, or stays")
    add("--weight_decay", type=weight, default=1e-4, help="decoupled; not on BatchNorm, PReLU and biases")
    add("--monitor", choices=("val_auc", "val_eer", "val_loss"), default="val_auc", help="what chooses the epoch")
    add("--patience", type=count, default=10, help="stop after so many epochs in a row without a new best")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of training steps alone")
    add("--seed", type=seed, **several, default=42, help="of the sampled triplets, their order and random weights")
    add("--split_seed", type=seed, default=42, help="of who is validated on")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="models", help="where the best epoch's checkpoint goes")
    add("--log_dir", default="training_logs", help="its folder <run name>/ gets logs, curves and last.pth")
    add("--run_name", type=align.file_name, help="name of the run, by default like full_100pct_margin0.3")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on with the run of this name; start it if there is none")
    add("--overwrite", action="store_true", help="replace the run of this name")
    args = parser.parse_args(argv)

    swept = ("freeze_backbone", "train_percentage", "margin", "seed")
    values = [sorted({*x}) or [True] if isinstance(x, list) else [x] for x in (getattr(args, key) for key in swept)]
    runs = [argparse.Namespace(**vars(args) | dict(zip(swept, x, strict=True))) for x in itertools.product(*values)]
    for run in runs:
        mode, seed = "frozen" if run.freeze_backbone else "full", f"_seed{run.seed}" if len(values[-1]) > 1 else ""
        run.run_name = run.run_name or f"{mode}_{run.train_percentage}pct_margin{run.margin:g}{seed}"
    if len({run.run_name for run in runs}) < len(runs):  # also margins that differ too little
        raise InputError(f"--run_name {runs[0].run_name}: {len(runs)} runs cannot share it; each gets one of its own")
    return sorted(runs, key=lambda run: (not run.freeze_backbone, run.train_percentage))


# What a resumed run must share with its beginning; the rest is how long, how fast, where, and the crops' origin.
RECIPE = ("seed", *(key for key in SETTINGS if key not in ("epochs", "patience", "precision", "used_precision")))


class Run:
    """One run: its folder, its log, its best epoch, and when it is over. Knows no network.

    `log`: the content of training_log.json; `state`: what last.pth holds for --resume, or None; `finished`: whether all
    is done. Raises InputError for what would spoil an earlier run, before anything of it is touched.
    """

    def __init__(self, args):
        self.args, self.name, self.epochs, self.state = args, args.run_name, args.epochs, None
        self.folder, arch = Path(args.log_dir) / self.name, args.arch.replace("_", "")
        self.prefix = f"twin_tuned_{arch}_{self.name}_epoch"
        self.last, log_file = self.folder / "last.pth", self.folder / "training_log.json"
        self.log = {"config": {}, "epochs": [], "best_epoch": None, "best_checkpoint": None, "stopped": None}
        if args.resume and self.last.is_file():
            self.state = net.read_checkpoint(self.last)
            self.log = self.state.pop("log")
        elif args.resume and log_file.is_file():
            log = read_json(log_file, "a training log")
            self.log = log if log["stopped"] else self.log  # else it was killed before its first state: begin again
        elif not args.overwrite and (log_file.is_file() or self.checkpoints()):
            ways = "--resume goes on, --overwrite replaces it, --run_name NAME starts another"
            raise InputError(f"{self.folder}: this run is there; {ways}")
        self.finished = self.log["stopped"] is not None and self.state is None
        self.check_same(vars(args))
        if args.pretrained != "none" and not Path(args.pretrained).is_file():
            raise InputError(f"--pretrained {args.pretrained}: no such file; see README, 'Weights'; none: random ones")

    def check_same(self, settings):
        """Refuse to go on with other settings or data than the run began with."""
        before = self.log["config"]
        keys = [key for key in RECIPE if key in before and before[key] != settings.get(key, before[key])]
        if keys:
            differing = "; ".join(f"{key} was {str(before[key])[:60]}, is {str(settings[key])[:60]}" for key in keys)
            raise InputError(f"{self.folder}: cannot resume: {differing}; use the first ones, or another --run_name")

    def start(self, config):
        """Take over the settings and write config.json."""
        self.check_same(config)
        self.log["config"] = config
        if self.state is None:  # what a replaced run left must not pass for this one's on --resume
            for path in (self.last, self.folder / "training_log.json", *self.checkpoints()):
                path.unlink(missing_ok=True)
        write_json(self.folder / "config.json", config)

    def append(self, entry):
        """Log an epoch; returns whether it is the best: the first with the best figure, the last without figures."""
        self.log["epochs"].append(entry)
        epoch, key = entry["epoch"], self.args.monitor
        if epoch == 0:
            return False
        values = [e[key] for e in self.log["epochs"][1:]]
        best = epoch if entry[key] is None else 1 + values.index((max if key == "val_auc" else min)(values))
        self.log["best_epoch"] = best
        if best == epoch:  # an earlier one lies where it was written, perhaps in another --output_dir
            self.log["best_checkpoint"] = str(Path(self.args.output_dir) / f"{self.prefix}{best}.pth")
        impatient = "patience" if epoch - best >= self.args.patience else None
        self.log["stopped"] = "epochs" if epoch >= self.epochs else impatient
        return best == epoch

    def checkpoints(self):
        """The checkpoints of best epochs that this run has written."""
        paths = Path(self.args.output_dir).glob(f"{self.prefix}*.pth")
        return [path for path in paths if path.stem.removeprefix(self.prefix).isdigit()]

    def delete_superseded(self):
        """Delete this run's checkpoints but the best; to be called when what replaces them is saved."""
        for path in self.checkpoints():
            if path.name != Path(self.log["best_checkpoint"] or "").name:
                path.unlink()


def backbone_features(model, people, processes):
    """Backbone.features (N, C, 7, 7) float32 of all crops of `people`, who keep them: each image passes once."""
    key = net.backbone_sha256(model)
    if key not in people.features:
        own = people.crops.pixels[processes.share(len(people.crops.pixels))].split(net.CHUNK[processes.device.type])
        with torch.no_grad():
            bar = progress(own, "backbone, once per image", "batch", disable=processes.rank > 0)
            parts = [model.features(to_input(few.to(processes.device))).contiguous().cpu() for few in bar]
        people.features = {key: processes.gather(torch.cat(parts), len(people.crops.pixels))}
    return people.features[key]


def make_optimizer(model, learning_rate, weight_decay):
    """AdamW over the parameters that require gradients; no decay on the one-dimensional: BatchNorm, PReLU, biases."""
    trained = [p for p in model.parameters() if p.requires_grad]
    flat, others = [p for p in trained if p.ndim <= 1], [p for p in trained if p.ndim > 1]
    groups = [{"params": others, "weight_decay": weight_decay}, {"params": flat, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def rate_factor(done, schedule):
    """What the learning rate is multiplied with when the share `done` (0 to 1) of all planned steps is made.

    "constant": 1. "cosine": a linear rise over the first tenth, then half a cosine down to zero.
    """
    if schedule == "constant":
        return 1.0
    return min(done / 0.1, (1 + math.cos(math.pi * max(0.0, (done - 0.1) / 0.9))) / 2)


def mean_statistics(criterion, dataset, embeddings):
    """{name: mean over all sampled triplets} of TripletLoss.STATISTICS; embeddings (N, 512) of the set's images."""
    total = 0
    for rows, triplets in dataset.by_pair():
        rows, triplets = (torch.from_numpy(x).to(embeddings.device) for x in (rows, triplets))
        values = criterion.statistics(*criterion.distances(embeddings[rows], triplets))
        total = total + values.double() * len(triplets)
    return dict(zip(criterion.STATISTICS, (total / len(dataset)).tolist(), strict=True))


class TwinTrainer:
    """Runs the two stages with the settings of one run.

        trainer = TwinTrainer(*parse_runs([...]))   # refuses what would spoil an earlier run
        trainer.align()       # photographs -> crops and --aligned_json; skipped by --skip_alignment
        trainer.train()       # crops -> checkpoint, logs, curves; returns the content of training_log.json

    `people`: of an earlier trainer with the same files. InputError is raised before an earlier run is touched.
    """

    def __init__(self, args, people=None):
        self.args, self.people, self.processes = args, people, Processes(args.device)
        self.device, self.first = self.processes.device, self.processes.rank == 0
        self.run = Run(args)
        self.precision = self.choose_precision()
        self.criterion = TripletLoss(args.margin, args.distance)
        self.way_out = f"start again with a --learning_rate below {args.learning_rate:g}"

    def choose_precision(self):
        """fp32, bf16 or fp16 of the training steps; a resumed run keeps the one that it began with where it can."""
        cuda, name = self.device.type == "cuda", self.args.precision
        found = getattr(torch.cpu, "get_capabilities", dict)()  # of PyTorch 2.10 and later
        bf16 = found.get("avx512_bf16") or found.get("amx_bf16")
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else bf16
        if name == "auto" and self.run.state:
            name = self.run.log["config"]["used_precision"]
        if name == "auto":  # on a CPU, steps without the backbone gain nothing
            worth = bf16 and (cuda or not self.args.freeze_backbone)
            return "bf16" if worth else "fp16" if cuda else "fp32"
        if (name == "fp16" and not cuda) or (name == "bf16" and cuda and not bf16):
            raise InputError(f"{self.device} has no {name}: --precision {'fp32 or fp16' if cuda else 'fp32 or bf16'}")
        return name

    def say(self, text):
        if self.first:
            (tqdm.write if sys.stderr.isatty() else print)(text)  # print alone would run into a progress bar
            sys.stdout.flush()

    def align(self):
        """Stage 1: align the photographs of all training pairs and write --aligned_json."""
        align.align_files(self.args, "train_pairs", self.processes)

    def train(self):
        """Stage 2: fine-tune and write everything; returns the content of training_log.json."""
        run = self.run
        if run.finished:
            self.say(f"{run.name} is finished, {len(run.log['epochs']) - 1} epochs; best: {run.log['best_checkpoint']}")
            return run.log
        self.load_data()
        self.build_model()
        if len(run.log["epochs"]) > run.epochs:  # resumed with fewer than are done
            run.log["stopped"] = "epochs"
        while not run.log["stopped"]:
            epoch = len(run.log["epochs"])
            with align.postponed_interrupt() as self.interrupts:
                self.finish_epoch(epoch, self.train_epoch(epoch) if epoch else self.measure_start())
                if not run.log["stopped"] and self.processes.any(self.interrupts or time.monotonic() > self.save_at):
                    self.save()
        if self.first:
            with align.postponed_interrupt():  # seconds from the end
                self.conclude()
        return run.log

    def load_data(self):
        """Crops (unless `people` were given, who have them), families, split and triplets."""
        args = self.args
        if not self.people:
            self.people = People(*align.read_inputs(args, "aligned_json", "train_pairs"))
            for warning in self.people.warnings:
                self.say(f"warning: {warning}")
        usable = TwinTripletDataset(self.people.id_to_images, self.people.pairs)  # of pairs that make a triplet
        train, val = split_pairs(usable.pairs, args.validation_split, args.split_seed, related=self.people.pairs)
        self.train_set = TwinTripletDataset(self.people.id_to_images, train, args.train_percentage, args.seed)
        self.val_set = TwinTripletDataset(self.people.id_to_images, val) if val else None
        self.evaluator = TwinEvaluator(self.val_set.images, args.seed) if val else None
        self.train_rows, self.n_skipped = self.people.rows(self.train_set.images.paths), usable.n_skipped
        steps = self.train_set.steps(1, args.images_per_batch, args.batch_size)
        self.run.epochs = args.epochs or math.ceil(STEPS[args.freeze_backbone] / max(1, len(steps)))
        # A network that has died must not be saved: without validation, a few training images are looked at.
        self.val_rows = self.people.rows(self.val_set.images.paths) if val else self.train_rows[:64]
        if self.n_skipped:
            self.say(f"warning: {self.n_skipped} of {len(self.people.pairs)} pairs have too few crops; skipped")
        if not val:
            self.say("warning: no validation: one family only, or --validation_split 0; the last epoch is kept")

    def build_model(self):
        """The network, its optimizer and its images, new or as the run to resume left them."""
        args, run, state = self.args, self.run, self.run.state
        torch.manual_seed(args.seed)
        start = run.last if state else args.pretrained
        model = net.build_model(args.arch) if start == "none" else net.load_checkpoint(start, args.arch, args.channels)
        self.model = model.to(self.device, memory_format=torch.channels_last).eval()
        self.model.requires_grad_(not args.freeze_backbone)
        self.model.output_layer.requires_grad_(True)
        self.optimizer = make_optimizer(self.model, args.learning_rate, args.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.embeddings, self.resume_at = {}, {}
        run.start(self.processes.collect(self.describe_run())[0])  # all have looked at what was there
        if state:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"] or self.scaler.state_dict())  # {} of steps not in fp16
            self.embeddings = {key: value.to(self.device) for key, value in state["embeddings"].items()}
            self.resume_at, run.state = state["progress"], None  # it holds weights and Adam's moments
        images = self.people.crops.pixels
        if args.freeze_backbone:
            images = backbone_features(self.model, self.people, self.processes)
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            images = images.to(self.device) if images.nbytes < free / 2 else images
        self.images, self.save_at = images, time.monotonic() + 60 * SAVE_MINUTES

    def describe_run(self):
        """The content of config.json; its first figures are also told."""
        train, val, device, cuda = self.train_set, self.val_set, self.device, self.device.type == "cuda"
        n_train, n_val, images = len(train.pairs), len(val.pairs) if val else 0, train.count_touched_images()
        text = f"{n_train} training and {n_val} validation pairs, {len(train)} of {train.n_possible} triplets"
        self.say(f"{self.run.name}: {text} with {images} images; {self.model.arch} on {device}, {self.precision}")
        config = {**vars(self.args), "planned_epochs": self.run.epochs, "used_precision": self.precision}
        config |= {"n_train_pairs": n_train, "n_val_pairs": n_val, "n_skipped_pairs": self.n_skipped}
        config |= {"n_train_triplets": len(train), "n_val_triplets": len(val) if val else 0}
        config |= {"n_train_images": len(train.images.paths), "n_touched_images": images}
        config |= {"train_ids": train.images.ids, "val_ids": val.images.ids if val else []}
        config["trainable_parameters"] = [name for name, p in self.model.named_parameters() if p.requires_grad]
        config["crops_sha256"] = hashlib.sha256(repr(self.people.crops.sha256).encode()).hexdigest()
        config |= {"used_device": str(device), "processes": self.processes.world}
        config["device_name"] = torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability()
        modules = ("torch", "torchvision", "numpy", "cv2", "PIL")
        config["versions"] = {name: str(sys.modules[name].__version__) for name in modules}
        return config

    def embed(self, rows):
        """Embeddings (K, 512) float32 of the images `rows` (K,) of the crops; the processes share the work."""
        frozen, parts = self.args.freeze_backbone, []
        size = 256 if frozen else net.CHUNK[self.device.type]
        for few in rows[self.processes.share(len(rows))].split(size):  # at least one, which may be empty
            images = self.images[few.to(self.images.device, non_blocking=True)].to(self.device, non_blocking=True)
            parts.append(self.model.head(images)[0] if frozen else self.model(to_input(images))[0])
        return self.processes.gather(torch.cat(parts), len(rows))

    def measure_start(self):
        """Epoch 0, the network before training: the mean statistics of the training triplets."""
        self.began = time.perf_counter()
        with torch.no_grad():
            self.embeddings["start"] = self.embed(self.train_rows)
        return mean_statistics(self.criterion, self.train_set, self.embeddings["start"])

    def train_epoch(self, epoch):
        """One pass over the epoch's steps, in which the state is saved when due; returns the steps' mean statistics."""
        args, self.began = self.args, time.perf_counter()
        steps = self.train_set.steps(epoch, args.images_per_batch, args.batch_size)
        start = self.resume_at.pop("step", 0)
        sums = torch.tensor(self.resume_at.pop("sums", [0.0] * 5), dtype=torch.float64, device=self.device)
        for i in progress(range(start, len(steps)), f"epoch {epoch}", "step", disable=not self.first):
            factor = rate_factor((epoch - 1 + (i + 0.5) / len(steps)) / self.run.epochs, args.schedule)
            for group in self.optimizer.param_groups:
                group["lr"] = args.learning_rate * factor
            sums += self.step(steps[i])  # no wait for the device here
            last = i + 1 == len(steps)
            if epoch == 1 and i + 1 == min(5, len(steps)):
                seconds, n = (time.perf_counter() - self.began) / (i + 1 - start), len(steps) * self.run.epochs
                hint = "; --freeze_backbone takes minutes" if seconds * n > 7200 and not args.freeze_backbone else ""
                text = f"{seconds:.2f} s a step, {n} steps in {self.run.epochs} epochs: {seconds * n / 60:.0f} min"
                self.say(f"{text}, and the validation{hint}")
            due = not last and self.processes.any(self.interrupts or time.monotonic() > self.save_at)
            if (i + 1) % CHECK_EVERY == 0 or last or due:
                self.check_finite(sums, f"epoch {epoch}, step {i + 1}")
            if due:
                self.save(i + 1, sums.tolist())
        means = zip(self.criterion.STATISTICS, (sums / max(1, len(steps))).tolist(), strict=True)
        return {**dict(means), "steps": len(steps)}

    def step(self, triplets):
        """One optimizer step on (T, 3) triplets, each distinct image embedded once; returns their statistics, (5,)."""
        args, criterion = self.args, self.criterion
        rows, index = np.unique(triplets, return_inverse=True)
        rows = torch.from_numpy(rows)
        index = torch.from_numpy(index.reshape(-1, 3)).to(self.device, non_blocking=True)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            embeddings = self.embed(self.train_rows[rows])
        before = self.embeddings["start"][rows.to(self.device, non_blocking=True)]
        positive, negative = criterion.distances(embeddings, index)
        loss = (1 - args.quadruplet_weight) * criterion.loss(positive, negative)
        loss = loss + args.quadruplet_weight * criterion.quadruplet_loss(positive, negative)
        loss = loss + args.drift_weight * (1 - (embeddings * before).sum(1)).mean()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.processes.sum_([p.grad for p in self.model.parameters() if p.requires_grad])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return criterion.statistics(positive, negative).double()

    def check_finite(self, sums, where):
        """Stop the run when the loss or a weight is not finite any more: one wait for the GPU."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        if not torch.stack([x.detach().isfinite().all() for x in (sums, *weights)]).all():
            raise InputError(f"{self.run.name}, {where}: the loss or the weights are not finite; {self.way_out}")

    def finish_epoch(self, epoch, statistics):
        """Validate, log, and write the checkpoint of the best."""
        run, trained = self.run, time.perf_counter()
        with torch.no_grad():
            embeddings = self.embed(self.val_rows)
        way_out = self.way_out if epoch else "take another checkpoint to start from"
        net.check_alive(embeddings, f"{self.run.name}, epoch {epoch}: the network", way_out)
        entry = {"epoch": epoch, "train_loss": statistics.pop("loss"), **statistics}
        validation = figures = {}
        if self.val_set:
            validation = mean_statistics(self.criterion, self.val_set, embeddings)
            figures = self.evaluator.figures(self.evaluator.score(embeddings))
        kept = ("eer", "auc", "general_auc", *(key for key, _ in OPERATING_POINTS.values()))
        entry |= {f"val_{key}": figures.get(key) for key in kept}
        entry |= {f"val_{key}": validation.get(key) for key in ("loss", "active_triplets", "violated_triplets")}
        now = time.perf_counter()
        entry["timing"] = {"seconds": now - self.began, "validation_seconds": now - trained}
        entry = self.processes.collect(entry)[0]  # all go on with the same figures, so that all stop at the same epoch
        best = run.append(entry)
        if epoch == 0 or best:
            self.embeddings["val_best" if best else "val_start"] = embeddings
        if best and self.first:
            facts = {"epoch": epoch, "config": run.log["config"]}
            for name, of in (("metrics", entry), ("start_metrics", run.log["epochs"][0])):
                facts[name] = {key: value for key, value in of.items() if key not in ("epoch", "timing")}
            facts["crop_sha256"] = self.people.crops.sha256  # to find a leak under other IDs
            net.save_checkpoint(run.log["best_checkpoint"], self.model, **facts)
        if self.first:
            write_json(run.folder / "training_log.json", {**run.log, "stopped": None})
        text = "epoch {epoch}: train loss {train_loss:.4f}, {active_triplets:.0%} active"
        if self.val_set:
            text += ", val loss {val_loss:.4f}, EER {val_eer:.2%}, AUC {val_auc:.4f}"
        self.say(f"{text.format(**entry)}, {entry['timing']['seconds']:.1f} s{'  best so far' if best else ''}")

    def save(self, step=0, sums=(0.0,) * 5):
        """Write last.pth, from which --resume goes on at a step of the epoch behind the logged ones; then interrupt."""
        if self.first:
            facts = {"config": self.run.log["config"], "log": self.run.log}
            facts |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            facts["progress"] = {"step": step, "sums": list(sums)}
            facts["embeddings"] = {key: value.cpu() for key, value in self.embeddings.items()}
            net.save_checkpoint(self.run.last, self.model, **facts)
            self.run.delete_superseded()
            plot_curves(self.run.folder, self.run.log)
        self.save_at = time.monotonic() + 60 * SAVE_MINUTES
        if self.processes.any(self.interrupts):
            raise KeyboardInterrupt

    def conclude(self):
        """Say how the best epoch compares with the start, write the last files, drop the state to resume from."""
        run, log, path = self.run, self.run.log, self.run.log["best_checkpoint"]
        self.say(f"stopped by {log['stopped']}; best epoch {log['best_epoch']}: {path}")
        if self.val_set:
            start, best = (self.evaluator.score(self.embeddings[f"val_{key}"]) for key in ("start", "best"))
            log["against_start"] = compare([self.evaluator.estimate(best)], self.evaluator.estimate(start))
            self.say(f"On the validation people, against the start: {describe(log['against_start'])}.")
            net.write_checkpoint(path, {**net.read_checkpoint(path), "against_start": log["against_start"]})
        plot_curves(run.folder, log)
        write_json(run.folder / "training_log.json", log)  # now that all is there, it says that the run is over
        run.delete_superseded()
        run.last.unlink(missing_ok=True)


def plot_curves(folder, log):
    """loss_curves.png and validation_curves.png of a run's log."""
    config, weight, loss = log["config"], log["config"]["quadruplet_weight"], f"loss ({log['config']['distance']})"
    minimised = f"minimised: {1 - weight:g} triplet + {weight:g} quadruplet loss + {config['drift_weight']:g} drift"
    verdict = describe(log["against_start"]).replace("), ", "),\n") if "against_start" in log else "not compared"
    figures = {"val_eer": "EER, twins", "val_auc": "AUC, twins", "val_general_auc": "AUC, everyone else"}
    losses = {"train_loss": f"triplet {loss},\ntraining", "val_loss": f"triplet {loss},\nvalidation"}
    panels = {"validation_curves.png": (f"{config['n_val_pairs']} validation pairs; best epoch: {verdict}", figures)}
    panels["loss_curves.png"] = (minimised, losses)
    legend = ("before training", f"best epoch, by {config['monitor']}")
    for file, (title, curves) in panels.items():
        with plot_figure(folder / file, 7.4, 1.2 + 1.8 * len(curves), len(curves)) as grid:
            for axes, (key, ylabel) in zip(grid, curves.items(), strict=True):
                values = np.array([entry[key] for entry in log["epochs"]], float)  # None becomes NaN
                before, best = legend if axes is grid[0] else (None, None)
                axes.plot(values, marker="o")
                axes.axhline(values[0], color="grey", linewidth=0.8, linestyle=":", label=before)
                axes.axvline(log["best_epoch"] or 0, color="grey", linewidth=0.8, linestyle="-.", label=best)
                axes.xaxis.get_major_locator().set_params(integer=True)
                axes.set_ylabel(ylabel)
            grid[0].set_title(f"{config['run_name']}\n{title}", fontsize=9)
            grid[-1].set_xlabel("epoch (0: before training)")


def train_runs(runs):
    """Train the runs of parse_runs on crops decoded once; returns the names of those of several that failed."""
    logs = {run.name: run.log for run in map(Run, runs if len(runs) > 1 else ()) if run.finished}
    left, failed = [args for args in runs if args.run_name not in logs], []
    leader = TwinTrainer((left or runs)[0])
    if not leader.run.finished and leader.args.pretrained != "none":  # before hours of alignment
        net.load_checkpoint(leader.args.pretrained, leader.args.arch, leader.args.channels)
    if not leader.run.finished and not leader.args.skip_alignment:
        leader.align()
    if len(runs) == 1:
        leader.train()
        return []
    if left:
        leader.load_data()
    leader.run = leader.train_set = leader.val_set = leader.evaluator = None  # each run has its own

    def train(args):
        logs[args.run_name] = TwinTrainer(args, leader.people).train()

    for args in progress(left, "all runs", "run", smoothing=1, disable=not leader.first):
        try:
            code = align.run_script(args.run_name, partial(train, args), "interrupted")
        except Exception:  # a bug keeps its traceback, and the other runs go on
            traceback.print_exc()
            code = 1
        if code == 130 or (code and leader.processes.world > 1):  # the other processes wait for this one
            raise KeyboardInterrupt if code == 130 else SystemExit(code)
        failed += [args.run_name] if code else []
    leader.say(summarize_runs([logs[args.run_name] for args in runs if args.run_name in logs], leader.args.pretrained))
    for name in failed:
        leader.say(f"FAILED: {name}, for the reason above; --resume tries it again")
    return failed


def summarize_runs(logs, pretrained):
    """Text: the best epochs of runs on their validation people, and the command that tests them on others."""
    width = max((len(log["config"]["run_name"]) for log in logs), default=0)
    lines = [f"{'run':{width}}  epoch     EER     AUC  general AUC"]
    for log in logs:
        lines.append(f"{log['config']['run_name']:{width}}  {log['best_epoch']:5}")
        for key, size in (("val_eer", 6), ("val_auc", 6), ("val_general_auc", 11)):
            value = log["epochs"][log["best_epoch"]][key]
            lines[-1] += f"  {'-' if value is None else f'{value:.4f}':>{size}}"
    checkpoints = [pretrained] * (pretrained != "none") + [log["best_checkpoint"] for log in logs]
    lines.append("These are the validation people, who chose the epochs and flatter them. The figures of other people:")
    return "\n".join([*lines, f"python evaluate_twins.py --checkpoints {shlex.join(checkpoints)}"])


def main(argv=None):
    """Run both stages; returns the exit code (see align.run_script), 1 if a run of several failed."""
    failed, interrupted = [], "interrupted; what was done is saved, --resume goes on"
    code = align.run_script("train_twins.py", lambda: failed.extend(train_runs(parse_runs(argv))), interrupted)
    return code or int(bool(failed))


if __name__ == "__main__":
    net.run_main(main)

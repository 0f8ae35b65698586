"""Fine-tune AdaFace on identical twins: align the photographs, then train with triplet loss.

    python train_twins.py --id_to_images id_to_images.json --train_pairs train_twin_id_pairs.json \\
      --pretrained pretrained/adaface_ir50_ms1mv2.ckpt                          # the full network
    python train_twins.py ... --freeze_backbone --batching grouped              # only the embedding layer
    python train_twins.py ... --skip_alignment --resume                         # go on after an interruption

Reads the photographs of twin pairs and a pretrained network; writes the best epoch to --output_dir, and logs and
curves to --log_dir. `evaluate_twins.py` then measures the checkpoints on other twins.

The network stays in eval mode: BatchNorm keeps its pretrained statistics and dropout is off. So an embedding
depends on its image alone, and an image is embedded once per step however many of its triplets use it. A frozen
backbone runs once per image for the whole run.
"""

import argparse
import hashlib
import math
import os
import platform
import re
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, nothing keeps two processes from one run
    fcntl = None

from align import (
    InputError,
    Parser,
    add_alignment_arguments,
    align_files,
    answer_flags,
    integer,
    positive_int,
    read_id_to_images,
    read_pairs,
    run_script,
    seed_number,
    write_json,
)


def boolean(text):
    """An argparse type: True or False in any usual spelling."""
    word = text.strip().lower()
    if word in ("true", "t", "yes", "y", "on", "1"):
        return True
    if word in ("false", "f", "no", "n", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"must be True or False, not {text!r}")


def number(low, high, low_included=False, high_included=False):
    """An argparse type: a finite float between low and high."""

    def parse(text):
        value = float(text)
        if not (low < value < high or (low_included and value == low) or (high_included and value == high)):
            least, most = "at least" if low_included else "above", "at most" if high_included else "below"
            raise argparse.ArgumentTypeError(f"must be {least} {low} and {most} {high}")
        return value

    parse.__name__ = "number"
    return parse


def file_name(text):
    """An argparse type: a plain name for files and folders."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        raise argparse.ArgumentTypeError(f"must be of letters, digits, '.', '_' and '-' alone, not {text!r}")
    return text


def parse_args(argv=None):
    parser = Parser(
        prog="train_twins.py", description="Fine-tune AdaFace to tell identical twins apart, with triplet loss."
    )
    group = parser.add_argument_group("data and stage 1, alignment")
    add = group.add_argument
    add("--id_to_images", metavar="FILE", help='JSON {"ID": ["photograph", ...]}; not read with --skip_alignment')
    add("--train_pairs", required=True, metavar="FILE", help='JSON [["ID", "twin\'s ID"], ...]')
    add("--aligned_folder", default="train_aligned_images", metavar="DIR", help="training crops (default %(default)s)")
    text = "list of the crops, which stage 1 writes and stage 2 reads (default %(default)s)"
    add("--aligned_json", default="id_to_train_aligned_images.json", metavar="FILE", help=text)
    add("--skip_alignment", action="store_true", help="stage 2 alone, on the crops of --aligned_json")
    add_alignment_arguments(group)

    add = parser.add_argument_group("what is trained").add_argument
    text = "network: ir_18, ir_34, ir_50 (default), ir_101, ir_152, ir_200, ir_se_50, ir_se_101, ir_se_152, ir_se_200"
    add("--arch", default="ir_50", metavar="NAME", help=text)
    text = "weights to start from (default %(default)s); none: random weights"
    add("--pretrained", default="pretrained/adaface_ir50_ms1mv2.ckpt", metavar="FILE", help=text)
    text = "train only the embedding layer (default False; bare means True)"
    add("--freeze_backbone", type=boolean, nargs="?", const=True, default=False, metavar="BOOL", help=text)
    text = "share of each training pair's triplets, 1..100 (default 100)"
    add("--train_percentage", type=integer(1, 100), default=100, metavar="P", help=text)
    text = "share of the pairs to validate on, as whole families (default 0.15; 0: none)"
    add("--validation_split", type=number(0, 1, True), default=0.15, metavar="SHARE", help=text)

    add = parser.add_argument_group("how it is trained").add_argument
    add("--margin", type=number(0, 2), default=0.3, metavar="D", help="triplet margin, a distance (default 0.3)")
    text = "1 - cos, or euclidean between unit vectors (default cosine)"
    add("--distance", choices=("cosine", "euclidean"), default="cosine", help=text)
    text = "shuffled (default): random triplets; grouped: all sampled triplets among the images of a step"
    add("--batching", choices=("shuffled", "grouped"), default="shuffled", help=text)
    add("--batch_size", type=positive_int, metavar="N", help="shuffled: triplets per step (default 16)")
    add("--images_per_batch", type=positive_int, metavar="N", help="grouped: images per step (default 96)")
    add("--epochs", type=positive_int, default=20, metavar="N", help="epochs at most (default 20)")
    text = "cosine: rises over the first tenth of --epochs, then falls to zero; constant (default cosine)"
    add("--schedule", choices=("cosine", "constant"), default="cosine", help=text)
    text = "weight of the mean cosine distance of each embedding to what it was before training (default 3; 0: off)"
    add("--keep", type=number(0, 1e6, True), default=3.0, metavar="WEIGHT", help=text)
    text = "share of the loss that compares each distance to a positive with those to all twins of the step, as one"
    text += " threshold does, the rest with its own triplet's alone (default 1; 0: the triplet loss)"
    add("--across", type=number(0, 1, True, True), default=1.0, metavar="SHARE", help=text)
    text = "of AdamW (default 1e-4; plain triplets at 1e-3, the frozen plan, told unseen people apart worse)"
    add("--learning_rate", type=number(0, 1e6), default=1e-4, metavar="RATE", help=text)
    text = "decoupled; not on BatchNorm, PReLU and biases (default 1e-4)"
    add("--weight_decay", type=number(0, 1e6, True), default=1e-4, metavar="DECAY", help=text)
    text = "the best epoch has the lowest loss or EER, or the highest AUC of twins (default val_loss)"
    add("--monitor", choices=("val_loss", "val_eer", "val_auc"), default="val_loss", help=text)
    text = "stop after N epochs in a row without a new best (default 5)"
    add("--patience", type=positive_int, default=5, metavar="N", help=text)
    text = (
        "of training steps (default auto: bf16 or fp16 on CUDA, fp32 on a CPU); epoch 0 and validation are always fp32"
    )
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=text)
    text = "torch.compile the training step: minutes at the start, for long runs (default off)"
    add("--compile", action="store_true", help=text)
    add("--seed", type=seed_number, default=42, help="of the split, the sampled triplets and their order (default 42)")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="models", metavar="DIR", help="best epoch's checkpoint (default %(default)s)")
    text = "its folder <run name>/ gets logs, curves and last.pth (default %(default)s)"
    add("--log_dir", default="training_logs", metavar="DIR", help=text)
    add("--run_name", type=file_name, metavar="NAME", help="name of the run (default like full_100pct_margin0.3)")
    text = "also save the state to resume from every so many minutes within an epoch (default 10)"
    add("--save_every", type=number(0, 1e6), default=10.0, metavar="MINUTES", help=text)
    text = "do not keep decoded crops and, with a frozen backbone, its features on the disk beside --aligned_json"
    add("--no_cache", action="store_true", help=text)
    add("--resume", action="store_true", help="go on with the run of this name; start it if there is none")
    add("--overwrite", action="store_true", help="replace the run of this name")
    args = parser.parse_args(argv)
    if not args.skip_alignment and not args.id_to_images:
        parser.error("--id_to_images is needed unless --skip_alignment is given")
    if args.batching == "grouped" and args.batch_size:
        parser.error("--batch_size is of shuffled batching; with --batching grouped give --images_per_batch")
    if args.batching == "shuffled" and args.images_per_batch:
        parser.error("--images_per_batch is of --batching grouped; shuffled batching has --batch_size")
    args.batch_size = args.batch_size or 16
    args.images_per_batch = args.images_per_batch or 96
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    return args


if __name__ == "__main__":
    answer_flags("train_twins.py", parse_args)

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from evaluate_twins import COLOURS, TwinEvaluator, differences, new_figure, save_figure, verdict
from net import Ranks, build_model, load_checkpoint, plain, read_checkpoint, save_checkpoint, to_input
from triplet_dataset import (
    TwinTripletDataset,
    load_crops,
    map_array,
    new_array,
    read_checked_pairs,
    split_pairs,
    usable_pairs,
)
from triplet_loss import TripletLoss

# Entries of config.json in which a resumed run may differ: how long, where, and how the crops came about.
CHANGEABLE = {"epochs", "patience", "device", "max_workers", "resume", "overwrite", "realign", "skip_alignment"}
CHANGEABLE |= {"id_to_images", "landmarks", "aligned_folder", "precision", "used_device", "device_name", "versions"}
CHANGEABLE |= {"save_every", "no_cache", "compile", "processes"}
CHECK_EVERY = 50  # steps between looks at the loss, for which a GPU has to be waited for


# ---- parts of training ------------------------------------------------------------------------------


def set_batchnorm_statistics(model, crops, device, batch_size=32, rows=None):
    """Give a network without pretrained weights the BatchNorm statistics of its training crops, by one pass.

    Statistics are means over the pass's batches; dropout stays off. crops: (N, 112, 112, 3) uint8 RGB, N >= 2; rows:
    (K,) int64, those to take, by default all.
    """
    rows = torch.arange(len(crops)) if rows is None else rows
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
        norm.train()
    with torch.no_grad():
        for part in rows.tensor_split(math.ceil(len(rows) / batch_size)):
            model(to_input(crops[part].to(device)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def make_optimizer(model, learning_rate, weight_decay):
    """AdamW over the parameters that require gradients; no decay on BatchNorm, PReLU and biases.

    Those are the one-dimensional parameters: pulling a scale or an offset toward zero is no regulariser.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def rate_factor(progress, schedule):
    """What the learning rate is multiplied with at `progress` (0 to 1) of all planned steps.

    "constant": 1. "cosine": a linear rise over the first tenth, then half a cosine down to zero.
    """
    if schedule == "constant":
        return 1.0
    return min(progress / 0.1, (1 + math.cos(math.pi * max(0.0, (progress - 0.1) / 0.9))) / 2)


def installed(package):
    """The version of an installed package, or None: OpenCV, for one, comes under several names."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def digest(tensors):
    """SHA-256 of tensors' bytes, in hexadecimal; a memory map is read piece by piece."""
    result = hashlib.sha256()
    for tensor in tensors:
        for piece in tensor.detach().reshape(len(tensor) if tensor.ndim else 1, -1).split(1024):
            result.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    return result.hexdigest()


def backbone_features(model, crops, device, ranks, path=None):
    """Backbone.features (N, C, 7, 7) float16 of all crops (N, 112, 112, 3); each crop passes once.

    path: a .npy file that is made if it is not there and then memory-mapped; None: in memory.
    Half precision halves the file, and moves a cosine of two embeddings by less than 1e-3.
    Raises InputError when a feature is beyond half precision (65504): no trained network comes near.
    """
    shape = (len(crops), model.output_layer[0].num_features, 7, 7)

    def parts():
        own = range(len(crops))[ranks.share(len(crops))]
        text = "backbone, once per image"
        for start in tqdm(own[::32], text, unit="batch", leave=False, disable=None if ranks.rank == 0 else True):
            few = slice(start, min(start + 32, own.stop))
            with torch.no_grad():
                features = _in_parts(lambda x: model.features(to_input(x)), crops[few].to(device)).half().cpu()
            if not torch.isfinite(features).all():
                raise InputError("the backbone's features are beyond half precision; is the checkpoint damaged?")
            yield few, features

    if path is None:
        own = [torch.empty(0, *shape[1:], dtype=torch.float16), *(features for _, features in parts())]
        return ranks.gather(torch.cat(own))
    if not any(ranks.collect(os.path.exists(path))):
        with new_array(path, np.float16, shape) if ranks.rank == 0 else nullcontext() as array:
            (name, *_) = ranks.collect(array.filename if ranks.rank == 0 else None)
            array = np.load(name, mmap_mode="r+") if array is None else array
            for rows, features in parts():
                array[rows] = features.numpy()
            array.flush()
            ranks.collect(None)
    ranks.collect(None)
    return map_array(path, np.float16, shape)


def _in_parts(function, images):
    """function(images); on a CPU a few at a time, whose activations stay in its cache and in memory it already has."""
    return torch.cat([function(few) for few in images.split(8)]) if images.device.type == "cpu" else function(images)


class TrainedPart(nn.Module):
    """What training runs and changes: the whole network or, if `frozen`, its embedding layer (`output_layer`) alone.

    The other parameters no longer require gradients. `forward`: uint8 crops (N, 112, 112, 3), or if `frozen` their
    backbone_features (N, C, 7, 7) -> embeddings (N, 512) float32.
    """

    def __init__(self, model, frozen):
        super().__init__()
        self.model, self.frozen = model, frozen
        model.requires_grad_(not frozen)
        model.output_layer.requires_grad_(True)

    def forward(self, data):
        if self.frozen:
            return self.model.head(data.float())[0]
        return _in_parts(lambda few: self.model(to_input(few))[0], data)


class Images:
    """Crops or features of all images (N, ...), where training can reach them fast, and their embeddings."""

    def __init__(self, data, part, device, ranks):
        self.part, self.device, self.ranks = part, device, ranks
        # What takes less than half of the GPU's free memory goes there; the rest stays where it is.
        fits = device.type == "cuda" and data.nbytes < torch.cuda.mem_get_info(device)[0] / 2
        self.data = data.to(device) if fits else data

    def take(self, rows):
        """The data of the images `rows` (K,) int64 on the device."""
        rows = torch.from_numpy(rows)
        if self.data.device.type == self.device.type:
            return self.data[rows.to(self.device, non_blocking=True)]
        return self.data[rows].pin_memory().to(self.device, non_blocking=True)

    def embed(self, rows):
        """Embeddings (K, 512) of the images `rows` (K,) in float32, without gradients; the processes share the work."""
        own = rows[self.ranks.share(len(rows))]
        with torch.no_grad():
            parts = [self.part(self.take(own[i : i + 256])) for i in range(0, len(own), 256)]
        return self.ranks.gather(torch.cat(parts or [torch.empty(0, 512, device=self.device)]))


@contextmanager
def postponed_interrupt():
    """Yield a list that SIGINT and SIGTERM fill instead of stopping a step half-way; a second one stops at once."""
    asked = []

    def note(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may ask for signals
        yield asked
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- the trainer ------------------------------------------------------------------------------------


class TwinTrainer:
    """Runs the two stages with the settings of `parse_args`; every flag is an attribute of `args`.

        trainer = TwinTrainer(parse_args([...]))   # refuses what would spoil an earlier run
        trainer.align()      # photographs -> crops and --aligned_json; skipped by --skip_alignment
        trainer.train()      # crops -> checkpoint, logs, curves; returns the content of training_log.json

    Raises InputError for wrong input, before anything of an earlier run is touched.
    """

    def __init__(self, args):
        self.args = args
        self.ranks = Ranks()
        self.first = self.ranks.rank == 0  # writes and prints
        mode = "frozen" if args.freeze_backbone else "full"
        self.run_name = args.run_name or f"{mode}_{args.train_percentage}pct_margin{args.margin:g}"
        self.log_dir = Path(args.log_dir) / self.run_name
        self.device = self.ranks.pick_device(args.device)
        self.saved = self._earlier_run()
        # A run goes on in the precision that it began with, wherever.
        go_on = self.saved and args.precision == "auto"
        self.precision = self._choose_precision(self.saved["config"]["used_precision"] if go_on else args.precision)
        self.criterion = TripletLoss(args.margin, args.distance)
        self.drawn = -math.inf  # when the curves were last drawn
        self.start_metrics = None  # of the validation people, with bootstrap samples

    def _choose_precision(self, name):
        cuda = self.device.type == "cuda"
        if name == "auto":
            if not cuda:
                return "fp32"
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        if name == "fp16" and not cuda:
            raise InputError("--precision fp16 needs CUDA; use bf16 or fp32 on a CPU")
        return name

    def _say(self, text):
        if self.first:
            print(text, flush=True)

    # ---- stage 1

    def align(self):
        """Align the photographs of all training pairs and write --aligned_json."""
        pairs = read_pairs(self.args.train_pairs)
        align_files(self.args, pairs, self.ranks)

    # ---- stage 2

    def train(self):
        """Fine-tune and write everything; returns the content of training_log.json."""
        self._prepare_data()
        self._prepare_model()
        crops = self._load_crops()
        # One process reads them all for it, and the disk serves one reader.
        self.config = self._describe(self.ranks.collect(digest([crops]) if self.first else None)[0])
        self.log = {"config": self.config, "epochs": [], "best_epoch": None, "best_checkpoint": None, "stopped": None}
        self.val_embeddings = {}  # at the start and in the best epoch
        self.progress = {"epoch": 0, "step": 0, "sums": [0.0] * 5}  # where an epoch that is not over yet stands
        with self._lock():
            self.ranks.collect(None)
            if self.saved:
                self._check_same_run()
                self._restore()
            if self._stop_reason():
                self._write_log()  # again: the run may have been interrupted between its last files
                self._say(f"{self.run_name} is finished ({self.log['stopped']}); best: {self.log['best_checkpoint']}")
                return self.log
            self._write_start()
            self._prepare_images(crops)
            start = len(self.log["epochs"])
            for epoch in range(start, self.args.epochs + 1):
                with postponed_interrupt() if epoch else nullcontext([]) as asked:
                    statistics, began = self._train_epoch(epoch, asked) if epoch else self._measure_start()
                    self._finish_epoch(self._entry(epoch, statistics, began))
                    self._save({"epoch": epoch + 1, "step": 0, "sums": [0.0] * 5})
                    self._write_log()
                if self._stop_reason():
                    break
                if any(self.ranks.collect(bool(asked))):  # after the last step that could be interrupted
                    raise KeyboardInterrupt
            if self.first:
                self._report()
        return self.log

    def _earlier_run(self):
        """last.pth of an earlier run of this name for --resume, else None; refuses what could not begin."""
        args, last = self.args, self.log_dir / "last.pth"
        if args.resume and last.is_file():
            saved = read_checkpoint(last)
            if not {"state_dict", "optimizer", "scaler", "log", "config", "progress"} <= saved.keys():
                raise InputError(f"{last}: not the state of a run; --overwrite starts anew")
            return saved
        if not args.overwrite:
            there = [path for path in (self.log_dir / "training_log.json", *self._checkpoints()) if path.exists()]
            if there:
                raise InputError(
                    f"{there[0]}: a run of this name is there; --resume goes on with it, --overwrite replaces it, "
                    f"--run_name NAME starts another{'; its last.pth is gone' if args.resume else ''}"
                )
        if args.pretrained != "none" and not Path(args.pretrained).is_file():
            raise InputError(
                f"{args.pretrained}: no such file; download AdaFace's weights (README, 'Weights') or give "
                "--pretrained FILE, or --pretrained none to start from random weights"
            )
        return None

    @contextmanager
    def _lock(self):
        """Refuse a second process on this run; the system lets go of the lock of a process that died."""
        if not self.first or fcntl is None:
            yield
            return
        self.log_dir.mkdir(parents=True, exist_ok=True)
        with open(self.log_dir / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                text = "another process works on this run; wait for it, or give this one a --run_name"
                raise InputError(f"{self.log_dir}: {text}") from error
            for folder in {self.log_dir, Path(self.args.output_dir)}:  # what a killed process left half written
                for path in folder.glob(".*.*") if folder.is_dir() else ():
                    ours = path.name.partition(".")[2].partition(".")
                    if ours[0].isdigit() and (folder == self.log_dir or f"_{self.run_name}_epoch" in ours[2]):
                        path.unlink(missing_ok=True)
            yield

    def _checkpoints(self):
        """The best-epoch checkpoints of this run's name."""
        folder = Path(self.args.output_dir)
        prefix = f"twin_tuned_{self.args.arch.replace('_', '')}_{self.run_name}_epoch"
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        return [folder / name for name in names if re.fullmatch(re.escape(prefix) + r"\d+\.pth", name)]

    def _prepare_data(self):
        args = self.args
        images = read_id_to_images(args.aligned_json)
        pairs, warnings = read_checked_pairs(args.train_pairs, images)
        usable = usable_pairs(pairs, images)
        if not usable:
            raise InputError(f"{args.aligned_json}: no pair makes a triplet (one twin needs two crops, the other one)")
        self.n_skipped = len(pairs) - len(usable)
        if self.n_skipped:
            warnings.append(f"{self.n_skipped} of {len(pairs)} pairs have too few crops for a triplet; skipped")
        train, val = split_pairs(usable, args.validation_split, args.seed, related=pairs)
        if not val:
            warnings.append(
                "no validation: all pairs are one family or --validation_split is 0; the last epoch is kept"
            )
        self.train_set = TwinTripletDataset(images, train, args.train_percentage, args.seed)
        self.val_set = TwinTripletDataset(images, val, 100, args.seed) if val else None
        if args.batching == "grouped":
            self.train_set.grouped_epoch(1, args.images_per_batch)  # refuses a budget that is too small
        for warning in dict.fromkeys(warnings + self.train_set.warnings):
            self._say(f"warning: {warning}")

    def _load_crops(self):
        """The crops of all training and validation images, by path, so that other splits find them on the disk too."""
        sets = [s for s in (self.train_set, self.val_set) if s]
        paths = sorted(path for s in sets for path in s.images.paths)
        row = {path: i for i, path in enumerate(paths)}
        self.rows = [np.array([row[path] for path in s.images.paths]) for s in sets]
        self.cache = None if self.args.no_cache else f"{self.args.aligned_json}."
        if self.first or not self.cache:  # the first process makes the file for all
            crops = load_crops(paths, self.cache)
        self.ranks.collect(None)
        return crops if self.first or not self.cache else load_crops(paths, self.cache)

    def _prepare_model(self):
        args = self.args
        torch.manual_seed(args.seed)
        if self.saved:
            self.model = load_checkpoint(self.log_dir / "last.pth", args.arch)
        elif args.pretrained == "none":
            self.model = build_model(args.arch)
        else:
            self.model = load_checkpoint(args.pretrained, args.arch)
        self.model.to(self.device, memory_format=torch.channels_last)
        self.part = TrainedPart(self.model.eval(), args.freeze_backbone)
        self.optimizer = make_optimizer(self.model, args.learning_rate, args.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def _restore(self):
        """Take over the saved run's state."""
        self.optimizer.load_state_dict(self.saved["optimizer"])
        self.scaler.load_state_dict(self.saved["scaler"])
        self.log.update(self.saved["log"])
        self.progress = self.saved["progress"]
        self.start_embeddings = self.saved["start_embeddings"].to(self.device)
        self.val_embeddings = {key: e.to(self.device) for key, e in self.saved["val_embeddings"].items()}

    def _prepare_images(self, crops):
        if self.args.pretrained == "none" and not self.log["epochs"]:
            rows = torch.from_numpy(np.sort(self.rows[0]))
            set_batchnorm_statistics(self.model, crops, self.device, rows=rows)
        if self.args.freeze_backbone:
            backbone = digest([t for k, t in self.model.state_dict().items() if not k.startswith("output_layer.")])
            key = hashlib.sha256(f"{self.config['crops_sha256']} {backbone}".encode()).hexdigest()[:16]
            path = f"{self.cache}features-{key}.npy" if self.cache else None
            crops = backbone_features(self.model, crops, self.device, self.ranks, path)
        self.images = Images(crops, self.part, self.device, self.ranks)
        self.trained = torch.compile(self.part) if self.args.compile else self.part
        if self.ranks.world > 1:  # no buffer changes, so none is broadcast
            ids = [self.device.index] if self.device.type == "cuda" else None
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of a name that older PyTorch lacks
                self.trained = DistributedDataParallel(self.trained, ids, broadcast_buffers=False)
        if self.val_set:
            images = {name: [] for name in self.val_set.images.ids}
            for path, person in zip(self.val_set.images.paths, self.val_set.images.person, strict=True):
                images[self.val_set.images.ids[person]].append(path)
            self.evaluator = TwinEvaluator(images, self.val_set.pairs, self.device, seed=self.args.seed)
        self.saved_at = time.monotonic()

    def _describe(self, crops_sha256):
        """The content of config.json."""
        images, ids = self.train_set.touched()
        packages = ("torch", "torchvision", "numpy", "opencv-python", "pillow", "face-alignment")
        cuda = self.device.type == "cuda"
        return {
            **vars(self.args),
            "run_name": self.run_name,
            "n_train_pairs": len(self.train_set.pairs),
            "n_val_pairs": len(self.val_set.pairs) if self.val_set else 0,
            "n_skipped_pairs": self.n_skipped,
            "n_train_triplets": len(self.train_set),
            "n_possible_train_triplets": self.train_set.n_possible,
            "n_val_triplets": len(self.val_set) if self.val_set else 0,
            "n_train_images": len(self.train_set.images.paths),
            "n_touched_images": images,
            "n_touched_ids": ids,
            "train_ids": self.train_set.images.ids,
            "val_ids": self.val_set.images.ids if self.val_set else [],
            "crops_sha256": crops_sha256,
            "trainable_parameters": [name for name, p in self.model.named_parameters() if p.requires_grad],
            "used_device": str(self.device),
            "device_name": torch.cuda.get_device_name(self.device) if cuda else platform.machine(),
            "used_precision": self.precision,
            "processes": self.ranks.world,
            "versions": {"python": platform.python_version(), **{name: installed(name) for name in packages}},
        }

    def _check_same_run(self):
        """Refuse to resume with other settings or data than the run began with."""
        config = plain(self.config)
        before = self.saved["config"]
        differing = [
            f"{key} was {str(before.get(key))[:60]}, is {str(config[key])[:60]}"
            for key in config
            if key not in CHANGEABLE and before.get(key) != config[key]
        ]
        if differing:
            raise InputError(
                f"{self.log_dir}: cannot resume with other settings or data: {'; '.join(differing)}; "
                "use the first ones, or --run_name for another run"
            )

    def _write_start(self):
        config = self.config
        if self.first:
            if self.args.overwrite:
                for name in ("last.pth", "training_log.json"):  # else --resume could go on with the replaced run
                    (self.log_dir / name).unlink(missing_ok=True)
            write_json(self.log_dir / "config.json", config)
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        n_val, n_train = config["n_val_pairs"], config["n_train_pairs"]
        self._say(
            f"{self.run_name}: {n_train} training and {n_val} validation pairs, {len(self.train_set)} of "
            f"{self.train_set.n_possible} triplets, which touch {config['n_touched_images']} images of "
            f"{config['n_touched_ids']} people; {self.args.arch} on {self.device}, {self.precision}"
        )

    def _measure_start(self):
        """(statistics, time of beginning) of epoch 0: the network before training, on the training triplets."""
        began = time.perf_counter()
        self.start_embeddings = self.images.embed(self.rows[0])
        return self.criterion.over(self.train_set, self.start_embeddings), began

    def _steps(self, epoch, start):
        """(number of steps of an epoch, iterator from step `start` on over (triplets (K, 3), count)).

        The triplets are this process's, and `count` is what all processes' losses of the step are divided by: its
        triplets, or in grouped batching the epoch's mean, so that a large family keeps its weight.
        """
        rank, world, size = self.ranks.rank, self.ranks.world, self.args.batch_size
        if self.args.batching == "shuffled":
            batches = self.train_set.epoch(epoch, size, start)
            return math.ceil(len(self.train_set) / size), ((batch[rank::world], len(batch)) for batch in batches)
        steps = self.train_set.grouped_epoch(epoch, self.args.images_per_batch)

        def groups():
            for blocks in steps[start:]:
                load, own = [0] * world, [np.empty((0, 3), np.int64)]
                for block in sorted(blocks, key=lambda block: -block.size):  # the largest first, to the least busy
                    least = load.index(min(load))
                    load[least] += block.size
                    if least == rank:
                        own.append(self.train_set.block_triplets(block))
                yield np.concatenate(own), len(self.train_set) / len(steps)

        return len(steps), groups()

    def _train_epoch(self, epoch, asked):
        """Visit every sampled triplet once; returns (statistics, time of beginning).

        When `asked` is no longer empty, or when it is time, the state is saved within the epoch.
        """
        began = time.perf_counter()
        start = self.progress["step"] if self.progress["epoch"] == epoch else 0
        sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        if start and self.first:
            sums += torch.tensor(self.progress["sums"], dtype=torch.float64, device=self.device)
        n_steps, steps = self._steps(epoch, start)
        watched = []  # the statistics and images of the last steps
        agree, before, asked_at = start, start, time.monotonic()  # several processes agree on a step to stop at
        silent = None if self.first else True
        bar = tqdm(steps, f"epoch {epoch}", n_steps, initial=start, unit="step", leave=False, disable=silent)
        for step, (triplets, count) in enumerate(bar, start):
            factor = rate_factor((epoch - 1 + (step + 0.5) / n_steps) / self.args.epochs, self.args.schedule)
            rows, statistics = self._step(triplets, count, self.args.learning_rate * factor)
            sums += statistics * len(triplets)  # no wait for the device here
            watched.append((step, rows, statistics))
            last = step + 1 == n_steps
            if len(watched) == CHECK_EVERY or last:
                self._watch(epoch, watched, bar)
                watched = []
            if last or (self.ranks.world > 1 and step < agree):
                continue
            due = time.monotonic() - self.saved_at > 60 * self.args.save_every
            if asked or due or self.ranks.world > 1:
                votes = self.ranks.collect((bool(asked), due, time.monotonic() - asked_at))
                stop, due, seconds = (max(values) for values in zip(*votes, strict=True))
                # Again in about two seconds: whoever asks to stop kills what has not stopped soon.
                agree = step + max(1, min(CHECK_EVERY, int(2 * (step + 1 - before) / max(seconds, 1e-9))))
                before, asked_at = step + 1, time.monotonic()
                if stop or due:
                    if watched:
                        self._watch(epoch, watched, bar)  # nothing broken is saved
                    totals = self.ranks.sum(sums).tolist()
                    self._save({"epoch": epoch, "step": step + 1, "sums": totals})
                if stop:
                    raise KeyboardInterrupt
        means = (self.ranks.sum(sums) / len(self.train_set)).tolist()
        return dict(zip(self.criterion.STATISTICS, means, strict=True)), began

    def _step(self, triplets, count, learning_rate):
        """One optimizer step on this process's (K, 3) triplets, each distinct image embedded once.

        Returns the images (rows of the training set) and the statistics of the triplets, (5,) float64 on the device.
        """
        rows, inverse = np.unique(triplets, return_inverse=True)
        if len(rows) == 0:
            rows = np.zeros(1, np.int64)  # a process without triplets takes part in the step too
        index = torch.from_numpy(inverse.reshape(-1, 3)).to(self.device, non_blocking=True)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            embeddings = self.trained(self.images.take(self.rows[0][rows]))
        distances = self.criterion.distances(embeddings, index)
        across = self.args.across
        loss = (1 - across) * self.criterion.loss(*distances, count)
        if across:
            everyone = self.ranks.gather(torch.stack(distances, 1).detach()).unbind(1)
            loss = loss + across * self.criterion.across(*distances, count, *everyone)
        if self.args.keep:
            # Per triplet, as the loss is, so that any number of processes computes the same.
            before = self.start_embeddings[torch.from_numpy(rows).to(self.device)]
            drift = (1 - (embeddings * before).sum(1))[index].mean(1).sum()
            loss = loss + self.args.keep / count * drift
        # DistributedDataParallel takes the mean of the processes' gradients; wanted is that of the sum of all losses.
        loss = loss * self.ranks.world
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if len(triplets) == 0:
            return rows, torch.zeros(5, dtype=torch.float64, device=self.device)
        return rows, torch.stack(list(self.criterion.statistics(*distances).values())).double()

    def _watch(self, epoch, watched, bar):
        """Stop the run when the last steps' loss was not finite, or when all embeddings have fallen together."""
        values = torch.stack([statistics for _, _, statistics in watched]).cpu()
        bar.set_postfix(loss=f"{float(values[-1, 0]):.4f}", refresh=False)
        where = f"{self.run_name}, epoch {epoch}"
        state = f"{self.log_dir / 'last.pth'} holds the last good state"
        broken = [
            (step, [self.train_set.images.paths[row] for row in rows])
            for (step, rows, _), finite in zip(watched, torch.isfinite(values).all(1).tolist(), strict=True)
            if not finite
        ]
        # One process meets it first; the next step has spread it to all.
        broken = [first for own in self.ranks.collect(broken[:1]) for first in own]
        if broken:
            step, paths = min(broken)
            raise InputError(
                f"{where}, step {step + 1}: the loss is not finite, on images {', '.join(paths[:5])} "
                f"{f'and {len(paths) - 5} more' if len(paths) > 5 else ''}; {state}; "
                "start again with a lower --learning_rate or --precision fp32"
            )
        if not all(torch.isfinite(p).all() for p in self.part.parameters() if p.requires_grad):
            raise InputError(  # the last step's loss was of the weights before it
                f"{where}, step {watched[-1][0] + 1}: the weights are not finite any more; {state}; "
                "start again with a lower --learning_rate or --precision fp32"
            )
        margin = self.criterion.margin
        loss, positive, negative = (self.ranks.sum(values[:, :3].mean(0)) / self.ranks.world).tolist()
        if max(positive, negative) < 0.01 * margin and abs(loss - margin) <= 0.01 * margin:
            raise InputError(
                f"{where}: the embeddings have collapsed: all distances are near zero and the loss sits at the margin "
                f"({loss:.4f}); {state}; start again with a lower --learning_rate"
            )

    def _entry(self, epoch, statistics, began):
        """Validate and make an epoch's log entry."""
        trained = time.perf_counter()
        entry = {"epoch": epoch, "train_loss": statistics["loss"]}
        entry |= {"val_loss": None, "val_eer": None, "val_auc": None, "val_general_auc": None}
        entry |= {name: value for name, value in statistics.items() if name != "loss"}
        self.embeddings = embeddings = self.images.embed(self.rows[1]) if self.val_set else None
        if self.val_set and self.first:
            validation = self.criterion.over(self.val_set, embeddings)
            figures = self.evaluator.figures(self.evaluator.compare(embeddings))
            entry |= {"val_loss": validation["loss"], "val_eer": figures["eer"], "val_auc": figures["auc"]}
            entry["val_general_auc"] = figures["general_auc"]
            entry["loss_gap"] = validation["loss"] - statistics["loss"]
            entry["val_active_triplets"] = validation["active_triplets"]
            entry["val_violated_triplets"] = validation["violated_triplets"]
            entry["val_spread"] = 1 - float(embeddings.mean(0).square().sum())  # mean cosine distance of all images
        if not all(math.isfinite(value) for value in entry.values() if value is not None):
            raise InputError(
                f"{self.run_name}: a figure of epoch {epoch} is not finite; last.pth holds the epoch before; "
                "start again with a lower --learning_rate or --precision fp32"
            )
        seconds = time.perf_counter() - began
        entry["timing"] = {"seconds": seconds, "validation_seconds": time.perf_counter() - trained}
        return self.ranks.collect(entry)[0]  # all go on with the same figures, so that all stop at the same epoch

    def _finish_epoch(self, entry):
        """Log an epoch and, if it is the best, save its checkpoint."""
        self.log["epochs"].append(entry)
        epoch = entry["epoch"]
        if self.val_set and epoch == 0:
            self.val_embeddings["start"] = self.embeddings
        if epoch > 0 and self._best_epoch() == epoch:
            metrics = {key: value for key, value in entry.items() if key not in ("epoch", "timing")}
            facts = {"epoch": epoch, "config": self.config, "metrics": metrics}
            if self.val_set and self.first:
                self.val_embeddings["best"] = self.embeddings
                self.log["improved"] = facts["improved"] = self._improved(entry)
            name = f"twin_tuned_{self.args.arch.replace('_', '')}_{self.run_name}_epoch{epoch}.pth"
            path = Path(self.args.output_dir) / name
            self._check_folders()
            if self.first:
                save_checkpoint(path, self.model, **facts)
            self.log |= {"best_epoch": epoch, "best_checkpoint": str(path)}
        self.log["stopped"] = self._stop_reason()
        if self.log["stopped"] and self.val_set and self.first:
            self.log["against_start"] = self._against_start()
        text = f"epoch {epoch}: train loss {entry['train_loss']:.4f}"
        if entry["val_loss"] is not None:
            text += (
                f", val loss {entry['val_loss']:.4f}, EER {100 * entry['val_eer']:.2f} %, AUC {entry['val_auc']:.4f}"
            )
            if entry["val_general_auc"] is not None:
                text += f", general AUC {entry['val_general_auc']:.4f}"
        best = "  best so far" if self.log["best_epoch"] == epoch else ""
        self._say(f"{text}, {100 * entry['active_triplets']:.0f} % active, {entry['timing']['seconds']:.1f} s{best}")

    def _save(self, progress):
        """Write last.pth, from which --resume goes on."""
        self._check_folders()
        if self.first:
            save_checkpoint(
                self.log_dir / "last.pth",
                self.model,
                epoch=progress["epoch"] - 1,
                config=self.config,
                metrics={},
                optimizer=self.optimizer.state_dict(),
                scaler=self.scaler.state_dict(),
                log={key: value for key, value in self.log.items() if key != "config"},
                progress=progress,
                start_embeddings=self.start_embeddings.cpu(),
                val_embeddings={key: e.cpu() for key, e in self.val_embeddings.items()},
            )
        self.saved_at = time.monotonic()

    def _check_folders(self):
        """A folder that vanished, as with its disk, is not made again: the rest of the run would lie elsewhere."""
        for folder in (self.log_dir, Path(self.args.output_dir)):
            if self.first and not folder.is_dir():
                raise InputError(f"{folder}: this folder has vanished; bring it back, with its disk, and --resume")

    def _write_log(self):
        """What follows from the log: its file, the curves, and that of this run's checkpoints only the best is kept."""
        self.log["stopped"] = self._stop_reason()
        if not self.first:
            return
        write_json(self.log_dir / "training_log.json", self.log)
        if self.log["best_epoch"]:
            for path in self._checkpoints():  # not before what replaces them is on the disk
                if path.name != Path(self.log["best_checkpoint"]).name:
                    path.unlink()
        if self.log["stopped"] or time.monotonic() - self.drawn > 20:  # a picture takes longer than a short epoch
            plot_curves(self.log_dir, self.log)
            self.drawn = time.monotonic()

    def _monitored(self, entry):
        """The figure of an epoch's log entry that --monitor names, such that lower is better."""
        return -entry["val_auc"] if self.args.monitor == "val_auc" else entry[self.args.monitor]

    def _best_epoch(self):
        """The epoch (>= 1) with the best monitored figure, the first on a tie; without validation the last."""
        entries = self.log["epochs"][1:]
        return (min(entries, key=self._monitored) if self.val_set else entries[-1])["epoch"]

    def _stop_reason(self):
        """Why training is over: "patience", "epochs", or None while it is not."""
        last = self.log["epochs"][-1]["epoch"] if self.log["epochs"] else 0
        if self.val_set and last > 0 and last - self._best_epoch() >= self.args.patience:
            return "patience"
        return "epochs" if last >= self.args.epochs else None

    def _report(self):
        epoch, key = self.log["best_epoch"], self.args.monitor
        self._say(f"stopped by {self.log['stopped']}; best epoch {epoch}: {self.log['best_checkpoint']}")
        if self.val_set:
            self._say(verdict(self.log["against_start"]))
            if not self.log["improved"]:
                start, best = (self.log["epochs"][number][key] for number in (0, epoch))
                self._say(
                    f"WARNING: no epoch is better than the network before training ({key} {start:.4f} at the "
                    f"start, {best:.4f} in epoch {epoch}): keep the start, or try other settings"
                )

    def _improved(self, entry):
        """Whether an epoch is better than the start: in what --monitor names or, by the bootstrap, on twins."""
        if self._monitored(entry) < self._monitored(self.log["epochs"][0]):
            return True  # without the bootstrap, which takes longer than a short epoch
        found = self._against_start()
        verdicts = [found[name]["verdict"] for name in ("auc", "eer")]
        return "better" in verdicts and "worse" not in verdicts

    def _against_start(self):
        """The best epoch's differences to the start on the validation people, of twins and of everyone else."""
        if self.start_metrics is None:
            self.start_metrics = self.evaluator.metrics(self.evaluator.compare(self.val_embeddings["start"]))
        best = self.evaluator.metrics(self.evaluator.compare(self.val_embeddings["best"]))
        found = differences(*best, *self.start_metrics)
        return {name: found[name] for name in ("auc", "eer", "general_auc", "fnmr_0.001") if name in found}


def plot_curves(folder, log):
    """loss_curves.png and validation_curves.png of a run's log."""
    epochs = [entry["epoch"] for entry in log["epochs"]]

    def draw(axes, ylabel, curves, scale=1):
        for (key, label), colour, style in zip(curves.items(), COLOURS, ("-", "--"), strict=False):
            values = [math.nan if entry.get(key) is None else scale * entry[key] for entry in log["epochs"]]
            axes.plot(epochs, values, color=colour, linestyle=style, marker="o", markersize=3, label=label)
            axes.axhline(values[0], color=colour, linewidth=0.8, linestyle=":")
        axes.plot([], [], color="grey", linewidth=0.8, linestyle=":", label="before training")
        if log["best_epoch"] is not None:
            axes.axvline(log["best_epoch"], color="black", linewidth=0.8, linestyle="-.", label="best epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="epoch (0: before training)", ylabel=ylabel)

    figure, axes = new_figure(7.4)
    losses = {"train_loss": "training", "val_loss": "validation"}
    draw(axes, f"triplet loss ({log['config']['distance']} distance)", losses)
    axes.set(title=log["config"]["run_name"], ylim=(0, 1.05 * axes.dataLim.ymax or None))
    save_figure(figure, folder / "loss_curves.png", axes)

    figure, panels = new_figure(7.4, 7.4, 3, 1)
    draw(panels[0], "EER (%)", {"val_eer": "twins"}, 100)
    draw(panels[1], "AUC", {"val_auc": "twins"})
    draw(panels[2], "AUC", {"val_general_auc": "everyone else"})
    panels[0].set_title(f"{log['config']['run_name']}: validation people")
    save_figure(figure, folder / "validation_curves.png", *panels)


# ---- command line -----------------------------------------------------------------------------------


def main(argv=None):
    """Run both stages; returns the exit code (see align.run_script)."""

    def work():
        trainer = TwinTrainer(parse_args(argv))
        if not trainer.args.skip_alignment:
            trainer.align()
        trainer.train()
        trainer.ranks.leave()

    return run_script("train_twins.py", work, "interrupted; what was done is saved, --resume goes on")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's SIGTERM is an interruption too
    sys.exit(main())

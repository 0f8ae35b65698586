"""Fine-tune AdaFace on identical twins: align the photographs, then train with triplet loss.

    python train_twins.py                                     # the full network
    python train_twins.py --freeze_backbone                   # only the embedding layer
    python train_twins.py --skip_alignment --resume           # go on after an interruption
    python train_twins.py --train_percentage 10 50 100 --seed 1 2 3   # a run of each combination
    torchrun --standalone --nproc_per_node=8 train_twins.py   # on eight GPUs of one machine

The network stays in eval mode: BatchNorm keeps its pretrained statistics and dropout is off, so
an embedding depends on its image alone. It is computed once per step, however many triplets use
it. The output of a frozen backbone is computed once per image and run.
"""

import argparse
import copy
import errno
import glob
import hashlib
import itertools
import math
import shlex
import sys
import textwrap
import time
import traceback
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from align import (
    CropFinder,
    add_alignment_arguments,
    align_files,
    read_metadata,
    refuse_missing_values,
)
from evaluate_twins import (
    METRICS,
    OPERATING_POINTS,
    TwinEvaluator,
    compare,
    describe,
    describe_flag,
    differing_flags,
    format_with_interval,
    group_by_recipe,
    interval,
    plot_figure,
)
from net import (
    ARCHITECTURES,
    IMAGES_AT_ONCE,
    LONGEST_NAME,
    InputError,
    Parser,
    Processes,
    boolean,
    build_model,
    check_alive,
    file_name,
    load_checkpoint,
    network_of,
    number_between,
    progress,
    read_checkpoint,
    read_csv,
    read_flag,
    read_json,
    report_errors,
    run_main,
    run_script,
    save_checkpoint,
    to_input,
    weights_sha256,
    write_checkpoint,
    write_json,
)
from triplet_dataset import (
    GROUP_SIZE,
    People,
    TwinTripletDataset,
    deal_people_into_folds,
    read_people,
    split_pairs,
)
from triplet_loss import DISTANCES, MarginSoftmax, TripletLoss

try:
    import fcntl
except ImportError:  # Windows has no such locks; runs are not locked there
    fcntl = None
# The errors of file systems without locks, as some clusters have; runs are not locked there.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)

CHECK_EVERY = 50  # steps between checks that the network is alive; each waits for the GPU
SAVE_SECONDS = 60  # at least this long between two writes of last.pth
WARM_UP_STEPS = 20  # over which the learning rate rises; afterwards it stays
# Differences of the monitored figure that do not count: 15 pairs cannot tell such epochs apart.
TOLERANCE = {"val_auc": 0.002, "val_eer": 0.002, "val_loss": 0.0}
AVERAGE_DECAY = 0.98  # of the running average of the weights, for each step
CENTRES_RATE = 10  # the centres of a MarginSoftmax learn at this many times --learning_rate
DEFAULT_EPOCHS = 40  # at most
FROZEN_BATCH = 256  # images whose features pass the embedding layer at once
OUT_OF_MEMORY = "lower --images_per_batch or --batch_size, or take another --device"


# ---- command line --------------------------------------------------------------------------------
class RecipeFlag(NamedTuple):
    """A training flag. Two runs in which all of them have equal values are the same setting."""

    default: object
    type: object
    help: str
    choices: tuple | None = None


seed_number = number_between(int, 0, 2**32 - 1)
positive_integer = number_between(int, 1, 10**9)
non_negative = number_between(float, 0, 1e6)

# Each flag here takes several values; every combination is a run. This table decides the names of
# runs and what --resume compares. The evaluation takes runs that differ only in the seed as one
# setting.
RECIPE = {
    "freeze_backbone": RecipeFlag(
        False, boolean, "train only the embedding layer; without a value it means True"
    ),
    "train_percentage": RecipeFlag(
        100, number_between(int, 1, 100), "percentage of each pair's triplets that is used"
    ),
    "margin": RecipeFlag(
        0.3, number_between(float, 1e-6, 2), "margin of the loss, in units of --distance"
    ),
    "distance": RecipeFlag(
        "cosine",
        str,
        "distance in the loss; cosine: 1 - cosine similarity; euclidean: that between embeddings "
        "of unit length",
        DISTANCES,
    ),
    "images_per_batch": RecipeFlag(
        96,
        number_between(int, 2 * GROUP_SIZE, 10**9),  # at least a group of each of two twins
        "largest number of images in a training step; a step takes images of several families",
    ),
    "batch_size": RecipeFlag(
        None,
        positive_integer,
        "number of triplets in a training step, which are drawn from all at random; without this "
        "flag, --images_per_batch decides",
    ),
    "quadruplet_weight": RecipeFlag(
        1.0,
        number_between(float, 0, 1),
        "w in the loss (1 - w) * triplet loss + w * quadruplet loss; the quadruplet loss compares "
        "every same-person distance in a step with every twin distance, across families",
    ),
    "drift_weight": RecipeFlag(
        0.3,
        non_negative,
        "weight of the drift in the loss: the mean cosine distance of the embeddings from those "
        "before training",
    ),
    "identity_weight": RecipeFlag(
        0.0,
        non_negative,
        "weight in the loss of a margin softmax (ArcFace, margin 0.3, scale 30), by which the "
        "network learns to recognise every training person",
    ),
    "learning_rate": RecipeFlag(
        1e-4,
        non_negative,
        f"learning rate of AdamW; it rises to this value over the first {WARM_UP_STEPS} steps",
    ),
    "weight_decay": RecipeFlag(
        1e-4, non_negative, "weight decay of AdamW; BatchNorm, PReLU and biases have none"
    ),
    "validation_split": RecipeFlag(
        0.15,
        number_between(float, 0, 0.9),
        "share of the training pairs that is kept for validation, in whole families",
    ),
    "split_seed": RecipeFlag(42, seed_number, "seed of the validation split and of --folds"),
    "cross": RecipeFlag(
        None,
        str,
        "column of --metadata, such as session: the two images of one person in a triplet must "
        "have different values there",
    ),
    "monitor": RecipeFlag(
        "val_auc",
        str,
        "figure of the validation pairs that decides when to stop and which epoch to keep; "
        "val_loss is the triplet loss",
        ("val_auc", "val_eer", "val_loss"),
    ),
    "precision": RecipeFlag(
        "auto",
        str,
        "precision of training steps; auto is bf16 where the hardware has it, else fp16 on CUDA "
        "and fp32 on a CPU",
        ("auto", "fp32", "bf16", "fp16"),
    ),
}
DEFAULT_SEED = 42


def build_parser():
    parser = Parser(
        prog="train_twins.py",
        description="Fine-tune AdaFace on identical twins with triplet loss.",
    )
    group = parser.add_argument_group("data, and stage 1: alignment")
    group.add_argument(
        "--train_pairs",
        default="train_twin_id_pairs.json",
        metavar="FILE",
        help='JSON file [["ID", "twin\'s ID"], ...], or a CSV file of two columns',
    )
    add_alignment_arguments(group, "train")
    group.add_argument(
        "--skip_alignment",
        action="store_true",
        help="use the crops that --aligned_json lists, instead of aligning photographs",
    )
    group.add_argument(
        "--metadata",
        metavar="FILE",
        help="CSV file with a column path, as in --id_to_images, and columns for --cross",
    )
    group.add_argument(
        "--folds",
        type=number_between(int, 2, 1000),
        metavar="K",
        help="cross-validation: deal the pairs into K folds of whole families and make K runs; "
        "each leaves out one fold, and evaluate_twins.py then tests it on this fold",
    )

    group = parser.add_argument_group("the network to start from")
    group.add_argument(
        "--arch",
        choices=ARCHITECTURES,
        metavar="NAME",
        default="ir_50",
        help=f"architecture of this network, one of {', '.join(ARCHITECTURES)}",
    )
    group.add_argument(
        "--pretrained",
        default="pretrained/adaface_ir50_ms1mv2.ckpt",
        metavar="FILE",
        help="file with its weights, or the word none for random weights",
    )
    group.add_argument(
        "--channels",
        choices=("RGB", "BGR"),
        help="colour order that a network of CVLface (keys net.*) takes, "
        "if no yaml beside its file says it",
    )

    group = parser.add_argument_group(
        "the recipe", "Each of these flags takes several values; every combination is a run."
    )
    for name, flag in RECIPE.items():
        text = flag.help
        if flag.default is not None:
            text += f" (default: {flag.default})"
        nargs = "+"
        metavar = None if flag.choices else "N"
        if name == "cross":
            metavar = "COLUMN"
        if flag.type is boolean:
            nargs = "*"
            metavar = "BOOL"
        group.add_argument(
            f"--{name}",
            type=flag.type,
            choices=flag.choices,
            nargs=nargs,
            metavar=metavar,
            help=text,
        )
    group.add_argument(
        "--seed",
        type=seed_number,
        nargs="+",
        metavar="N",
        help="seed of the sampled triplets, of their order and of random weights "
        f"(default: {DEFAULT_SEED})",
    )

    group = parser.add_argument_group("how long a run trains, and its files")
    group.add_argument(
        "--epochs",
        type=positive_integer,
        metavar="N",
        help=f"largest number of epochs (default: {DEFAULT_EPOCHS}; with --resume, the number that "
        "the run began with)",
    )
    group.add_argument(
        "--patience",
        type=positive_integer,
        default=10,
        metavar="N",
        help="stop when the figure of --monitor has not improved for so many epochs; improvements "
        "of val_auc and val_eer by 0.002 or less do not count",
    )
    group.add_argument(
        "--output_dir",
        default="models",
        metavar="DIR",
        help="folder for the checkpoint of the best epoch",
    )
    group.add_argument(
        "--log_dir",
        default="training_logs",
        metavar="DIR",
        help="folder for <run name>/ with logs, curves and last.pth, the state to resume from",
    )
    group.add_argument(
        "--run_name",
        type=file_name,
        metavar="NAME",
        help="name of the run, instead of one made of its recipe",
    )
    existing = group.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run of this name, or start it if there is none",
    )
    existing.add_argument(
        "--overwrite", action="store_true", help="start anew and replace the run of this name"
    )
    return parser


def parse_runs(argv: list[str] | None = None) -> list[argparse.Namespace]:
    """The settings of each run that a command line asks for.

    Each run has one value of every flag. Besides the flags it has `command`, the command line, and
    `fold`, the number of the fold that it leaves out, None without --folds. The quickest runs come
    first: frozen before full, and in each mode those with fewer triplets first. Raises InputError
    for wrong flags.
    """
    args = build_parser().parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    args.command = shlex.join(["python", "train_twins.py", *words])
    swept = {name: values_of(args, name, flag.default) for name, flag in RECIPE.items()}
    swept["seed"] = values_of(args, "seed", DEFAULT_SEED)
    if args.cross and not args.metadata:
        raise InputError("--cross needs --metadata, the file with that column")
    if args.metadata and not args.cross:
        raise InputError("--metadata is of no use without --cross, which names a column of it")
    folds = range(1, args.folds + 1) if args.folds else [None]
    settings = list(itertools.product(*swept.values()))
    if len(settings) > 1 and args.run_name:
        message = f"{len(settings)} runs need names of their own; leave the flag out"
        raise InputError(f"--run_name {args.run_name}: {message}")
    runs = []
    for values, fold in itertools.product(settings, folds):
        run = argparse.Namespace(**vars(args), fold=fold)
        for name, value in zip(swept, values, strict=True):
            setattr(run, name, value)
        run.run_name = args.run_name or default_name(run)
        if fold:
            run.run_name += f"_fold{fold}of{args.folds}"
        if len(run.run_name.encode()) > LONGEST_NAME:
            run.run_name = file_name(run.run_name)  # cuts it
        runs.append(run)
    refuse_equal_names(runs)
    return sorted(runs, key=lambda run: (not run.freeze_backbone, run.train_percentage))


def refuse_equal_names(runs):
    """Raise InputError if two runs have one name, since names round numbers to six digits."""
    names = set()
    for run in runs:
        if run.run_name in names:
            way_out = "give values that differ in their first six digits"
            raise InputError(f"{run.run_name}: two runs would have this name; {way_out}")
        names.add(run.run_name)


def values_of(args, name, default):
    """The distinct values that a flag was given, in ascending order, or its default."""
    values = getattr(args, name)
    if values is None:
        return [default]
    if values == []:  # --freeze_backbone without a value
        return [True]
    return sorted(set(values))


def default_name(args):
    """The name of a run: mode, percentage, margin, and whatever else is not the default."""
    mode = "frozen" if args.freeze_backbone else "full"
    run_name = f"{mode}_{args.train_percentage}pct_margin{args.margin:g}"
    for name, flag in RECIPE.items():
        value = getattr(args, name)
        is_named = name in ("freeze_backbone", "train_percentage", "margin")
        if not is_named and value != flag.default:
            # A column of --cross may hold a slash.
            text = f"{value:g}" if isinstance(value, float) else file_name(str(value))
            run_name += f"_{name}{text}"
    if args.seed != DEFAULT_SEED:
        run_name += f"_seed{args.seed}"
    return run_name  # not through file_name, which would also replace the plus sign of "1e+06"


# ---- the files of a run --------------------------------------------------------------------------
class RunFolder:
    """The files of one run: its settings, its log, the state to resume from, its best checkpoint.

    `log`: the content of training_log.json. `finished`: the run is complete. `can_continue`:
    there is a state to resume from. `first_config`: the config.json of a run that is finished or
    goes on, {} for a new run. Also sets `args.epochs` where the command line does not say it.
    Raises InputError for flags that would spoil an earlier run, before anything of it is touched.
    """

    def __init__(self, args):
        self.args = args
        self.name = args.run_name
        self.folder = Path(args.log_dir, self.name)
        self.state_file = self.folder / "last.pth"
        self.log_file = self.folder / "training_log.json"
        self.prefix = f"twin_tuned_{args.arch.replace('_', '')}_{self.name}_epoch"
        self.log = {
            "config": {},
            "epochs": [],
            "best_epoch": None,
            "best_checkpoint": None,
            "stopped": None,
        }
        self.first_config = {}
        self.finished = False
        self.can_continue = False
        self.locks = []
        self.refuse_if_locked()
        # `claim` compares: another process may train this run between here and there.
        self.times_at_first = self.times_of_change()
        if args.resume:
            self.look_at_earlier_run()
        if args.epochs is None:
            args.epochs = self.first_config.get("epochs", DEFAULT_EPOCHS)
        if not self.finished and not self.can_continue:
            self.refuse_to_replace()
        # What is known before alignment is compared here. TwinTrainer compares weights, crops,
        # pairs and what --precision auto means when it knows them.
        known = [name for name in RECIPE if name != "precision" or args.precision != "auto"]
        self.refuse_other_recipe({name: getattr(args, name) for name in known})

    def look_at_earlier_run(self):
        """Set `finished` or `can_continue`, and `first_config`, by the files of an earlier run.

        Neither is set if that run was killed before it first wrote last.pth: it begins again.
        """
        if self.log_file.is_file():
            log = read_json(self.log_file, "a training log")
            n_epochs = len(log["epochs"]) - 1  # without epoch 0
            wants_more = self.args.epochs is not None and self.args.epochs > n_epochs
            can_be_extended = log["stopped"] == "epochs" and self.state_file.is_file()
            if log["stopped"] and not (wants_more and can_be_extended):
                self.log = log
                self.first_config = log["config"]
                self.finished = True
                self.find_best_checkpoint()
                return
        if self.state_file.is_file():
            expected = "the settings of the run; without it, start again with --overwrite"
            self.first_config = read_json(self.folder / "config.json", expected)
            self.can_continue = True

    def refuse_to_replace(self):
        """Raise InputError if a new run would delete what no flag allows it to delete.

        That is an earlier run of this name or, whatever the flags, the network to start from.
        """
        checkpoints = self.checkpoints()
        start = Path(self.args.pretrained).resolve()
        if start in [path.resolve() for path in checkpoints]:
            message = "a new run of this name would delete the network that it starts from"
            raise InputError(f"--pretrained {start}: {message}; name the run with --run_name")
        if self.args.overwrite:
            return
        replace = "--overwrite replaces the run, --run_name NAME starts another"
        has_log = self.log_file.is_file()
        if has_log and not self.args.resume:
            raise InputError(f"{self.folder}: this run exists; --resume continues it, {replace}")
        if not checkpoints:
            return
        if not has_log:
            message = "a run of this name has written it, but its log is gone"
            raise InputError(f"{checkpoints[0]}: {message}; {replace}")
        # --resume, but last.pth is not there. A run that was killed before it first wrote it begins
        # again. If the epochs before the last one took longer than SAVE_SECONDS, it had written it.
        epochs = read_json(self.log_file, "a training log")["epochs"]
        seconds_before_last = sum(entry["timing"]["seconds"] for entry in epochs[:-1])
        if seconds_before_last > SAVE_SECONDS:
            message = f"it is gone, and with it {len(epochs) - 1} epochs; put it back"
            raise InputError(f"{self.state_file}: {message}; or {replace}")

    def refuse_other_recipe(self, recipe):
        """Raise InputError if an earlier run began with another recipe, network, data or seed.

        recipe: the part of it that is known already.
        """
        config = self.first_config
        if not config:
            return
        hashes = ("weights_sha256", "crops_sha256", "pairs_sha256")
        if config.get("recipe", {}).keys() != {*RECIPE, *hashes}:
            message = "begun by an earlier version of this program; --overwrite replaces it"
            raise InputError(f"{self.folder}: cannot resume: {message}")
        besides_recipe = ("seed", "arch", "folds", "fold")
        first = {name: config[name] for name in besides_recipe} | config["recipe"]
        now = {name: getattr(self.args, name) for name in besides_recipe} | recipe
        changes = []
        for name, value in now.items():
            if first.get(name) == value:
                continue
            if name.endswith("_sha256"):
                changes.append(f"the {name.removesuffix('_sha256')} are others than at its start")
            else:
                changes.append(f"{name} was {first.get(name)}, is {value}")
        if changes:
            message = f"cannot resume: {'; '.join(changes)}"
            way_out = (
                "go back to what the run began with; or --overwrite replaces it, --run_name NAME "
                "starts another"
            )
            raise InputError(f"{self.folder}: {message}; {way_out}")

    def lock_files(self):
        """The files to lock: one for the log folder, one for the names of the checkpoints."""
        return [self.folder / ".lock", Path(self.args.output_dir, f".{self.prefix}.lock")]

    def times_of_change(self):
        """When the log and the state were last written, None if they are not there."""
        times = []
        for path in (self.log_file, self.state_file):
            times.append(path.stat().st_mtime_ns if path.is_file() else None)
        return times

    def refuse_if_locked(self):
        """Raise InputError if another process is training this run."""
        for path in self.lock_files():
            if path.is_file():
                lock_file(path, shared=True).close()

    def claim(self, config):
        """Lock the run and write config.json; a new run also removes what an earlier one left.

        A run that goes on counts as unfinished from now on, also if it had ended before. Raises
        InputError if another process has trained the run since this one looked at it.
        """
        for path in self.lock_files():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.locks.append(lock_file(path))
        if self.times_of_change() != self.times_at_first:
            message = "another process has trained this run meanwhile; repeat the command"
            raise InputError(f"{self.folder}: {message}")
        if not self.can_continue:
            for path in (self.state_file, self.log_file, *self.checkpoints()):
                path.unlink(missing_ok=True)
        write_json(self.folder / "config.json", config)
        if self.can_continue:
            self.write_log()

    def release(self):
        """Let other processes train this run."""
        for lock in self.locks:
            lock.close()
        self.locks = []

    def record(self, entry):
        """Log an epoch; returns whether it is now the one to keep.

        Few validation pairs cannot tell epochs apart whose figures differ by no more than
        TOLERANCE. So the last epoch within TOLERANCE of the best is kept, and patience counts the
        epochs since a larger improvement; when it has run out, `log["stopped"]` says so. Without
        validation the last epoch is kept.
        """
        self.log["epochs"].append(entry)
        epoch = entry["epoch"]
        if epoch == 0:  # the network before training is measured, not saved
            return False
        figures = [logged[self.args.monitor] for logged in self.log["epochs"][1:]]
        improved_at, is_kept = judge_last_epoch(figures, self.args.monitor)
        if is_kept:
            self.log["best_epoch"] = epoch
            path = Path(self.args.output_dir, f"{self.prefix}{epoch}.pth")
            self.log["best_checkpoint"] = str(path)
        if epoch - improved_at >= self.args.patience:
            self.log["stopped"] = "patience"
        return is_kept

    def write_log(self):
        """Write training_log.json of a run that has not ended yet.

        --resume takes a run whose log says "stopped" as finished. So it stays null here, until
        TwinTrainer.conclude has written all other files.
        """
        write_json(self.log_file, {**self.log, "stopped": None})

    def find_best_checkpoint(self):
        """Correct the path of the best checkpoint in `log`, if it has moved to --output_dir.

        Raises InputError if the file is gone and the run is to go on.
        """
        path = self.log["best_checkpoint"]
        if path is None:
            return
        moved = Path(self.args.output_dir, Path(path).name)
        if moved.is_file():
            self.log["best_checkpoint"] = str(moved)
        elif not self.finished and not Path(path).is_file():
            way_out = "put it back, or start again with --overwrite"
            raise InputError(f"{path}: the checkpoint of the best epoch so far is gone; {way_out}")

    def describe_end(self):
        """Text: how a finished run ended, and whether it can go on or has lost its checkpoint."""
        n_epochs = len(self.log["epochs"]) - 1
        best = self.log["best_checkpoint"]
        lines = [f"{self.name} is finished after {n_epochs} epochs; best: {best}"]
        if self.log["stopped"] == "epochs" and self.args.epochs > n_epochs:
            lines.append(f"It cannot go on: {self.state_file} is gone. --overwrite starts it anew.")
        if not Path(best).is_file():
            way_out = f"to train it again, delete {self.folder} and repeat the command"
            lines.append(f"warning: {best} is gone; {way_out}")
        return "\n".join(lines)

    def checkpoints(self):
        """The checkpoints of best epochs that this run has written to --output_dir."""
        paths = Path(self.args.output_dir).glob(f"{glob.escape(self.prefix)}*.pth")
        return sorted(path for path in paths if path.stem.removeprefix(self.prefix).isdigit())

    def delete_superseded(self):
        """Delete the checkpoints that this run has written, but for the best one.

        Those that another run of this name has left stay. Call it only after the log or the state
        that names the best one is on disk.
        """
        best = Path(self.log["best_checkpoint"] or "").name
        for path in self.checkpoints():
            if path.name != best and self.has_written(path):
                path.unlink()

    def has_written(self, path):
        """Whether this run has written a checkpoint, and not another run of the same name."""
        try:
            config = read_checkpoint(path).get("config", {})
        except InputError:  # this program writes no damaged file
            return False
        own_config = self.log["config"]
        same = ("recipe", "seed", "folds", "fold")
        return all(config.get(name) == own_config.get(name) for name in same)


def judge_last_epoch(figures, monitor):
    """(the epoch of the last improvement, whether the last epoch is as good as the best one).

    figures: those of `monitor` in epochs 1, 2, ...; None without validation. Differences up to
    TOLERANCE do not count.
    """
    if figures[-1] is None:
        return len(figures), True
    tolerance = TOLERANCE[monitor]
    if monitor != "val_auc":  # lower is better
        figures = [-figure for figure in figures]
    improved_at = 1
    for epoch, figure in enumerate(figures, 1):
        if figure > figures[improved_at - 1] + tolerance:
            improved_at = epoch
    return improved_at, figures[-1] >= max(figures) - tolerance


def lock_file(path, shared=False):
    """Open and lock a file; the lock ends when the file is closed or the process ends.

    shared: only find out whether another process has locked it; any number of processes may do so
    at once. Raises InputError if another process has locked it.
    """
    # NFS grants a shared lock only on a file open for reading, an exclusive one only for writing.
    file = open(path, "a+b")  # noqa: SIM115 (it stays open as long as the lock is held)
    if fcntl:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            way_out = "wait for it, or start another with --run_name"
            raise InputError(f"{path}: another process is training this run; {way_out}") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
    return file


# ---- parts of training ---------------------------------------------------------------------------
def choose_precision(name, device, frozen, first_precision=None):
    """fp32, bf16 or fp16 for the training steps; InputError if the device does not have it.

    name: the value of --precision. first_precision: the one that a resumed run began with.
    """
    is_cuda = device.type == "cuda"
    if is_cuda:
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = cpu_has_bf16()
    if name != "auto":
        precision = name
    elif first_precision:
        precision = first_precision
    elif has_bf16 and (is_cuda or not frozen):
        precision = "bf16"  # on a CPU, frozen steps are too small to gain from it
    else:
        precision = "fp16" if is_cuda else "fp32"
    lacks_fp16 = precision == "fp16" and not is_cuda
    # Only a GPU can lack bf16: a CPU without it emulates it, slowly.
    lacks_bf16 = precision == "bf16" and is_cuda and not has_bf16
    if lacks_fp16 or lacks_bf16:
        way_out = "take --precision fp32 or fp16" if is_cuda else "take --precision fp32 or bf16"
        if precision == first_precision:
            way_out = "the run began with it: take the --device it ran on, or another --run_name"
        raise InputError(f"{device} has no {precision}; {way_out}")
    return precision


def cpu_has_bf16():
    """Whether this CPU computes in bf16; False where PyTorch is older than 2.10 and cannot say."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def make_optimizer(model, learning_rate, weight_decay):
    """AdamW over the parameters that require gradients.

    One-dimensional ones, which are those of BatchNorm, PReLU and biases, have no weight decay.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [  # rate_factor: see train_epoch
        {"params": matrices, "weight_decay": weight_decay, "rate_factor": 1},
        {"params": vectors, "weight_decay": 0.0, "rate_factor": 1},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def mean_statistics(criterion, dataset, embeddings):
    """{name in TripletLoss.STATISTICS: its mean over all possible triplets, sampled or not}.

    embeddings: (N, 512) of dataset.images.
    """
    device = embeddings.device
    images = dataset.images
    sums = torch.zeros(len(criterion.STATISTICS), device=device, dtype=torch.float64)
    for a, b in images.pairs:
        n, m = images.count[a], images.count[b]
        rows = np.concatenate([images.first[a] + np.arange(n), images.first[b] + np.arange(m)])
        value_number = torch.from_numpy(dataset.positives.value_number[rows]).to(device)
        matrix = criterion.matrix(embeddings[torch.from_numpy(rows).to(device)])
        sums += criterion.sums_over_all_triplets(matrix, n, value_number)
    means = (sums / dataset.n_possible).tolist()
    return dict(zip(criterion.STATISTICS, means, strict=True))


def backbone_features(model, people, processes):
    """Backbone.features (N, C, 7, 7) float32 of all crops of `people`; each image passes once.

    They are stored in `people`, so that all runs of a sweep with the same backbone share them. Only
    the latest backbone's are kept, since those of one are large.
    """
    key = weights_sha256(model, backbone_only=True)
    if key not in people.features:
        crops = people.crops.pixels
        own_crops = crops[processes.share(len(crops))]
        at_once = IMAGES_AT_ONCE[processes.device.type]
        # In each round all processes agree on whether to stop (raise_if_interrupted), so all make
        # equally many rounds. In the last one a process may have no images.
        largest_share = math.ceil(len(crops) / processes.world)
        n_rounds = math.ceil(largest_share / at_once)
        hidden = not processes.is_main
        parts = []
        with torch.no_grad():
            for i in progress(range(n_rounds), "backbone, once per image", "batch", disable=hidden):
                processes.raise_if_interrupted()
                batch = own_crops[i * at_once : (i + 1) * at_once]
                images = to_input(batch.to(processes.device))
                parts.append(model.features(images).contiguous().cpu())
        people.features = {key: processes.gather(torch.cat(parts), len(crops))}
    return people.features[key]


def lineage_of(facts):
    """Whom and what a checkpoint, and those it came from, were trained on and validated with.

    "trained_ids" and "trained_images" were trained on; "seen_ids" and "seen_images" were trained
    on or validated with. The images are (N, 36) perceptual hashes. "crop_sha256" is a list of the
    SHA-256 hashes of the seen images. All are empty for upstream's checkpoints.
    """
    config = facts.get("config", {})
    trained_ids = config.get("train_ids", [])
    no_images = torch.zeros((0, 36), dtype=torch.uint8)
    return {
        "trained_ids": facts.get("trained_ids", trained_ids),
        "seen_ids": facts.get("seen_ids", [*trained_ids, *config.get("val_ids", [])]),
        "trained_images": facts.get("trained_images", no_images),
        "seen_images": facts.get("seen_images", no_images),
        "crop_sha256": facts.get("crop_sha256", []),
    }


def read_values(args, people):
    """{crop: value} of the column that --cross names; None without it."""
    if not args.cross:
        return None
    finder = CropFinder(args, people.id_to_images)
    columns = read_flag(args, "metadata", read_metadata, [args.cross], finder)
    value_of = columns[args.cross]
    crops = itertools.chain(*people.id_to_images.values())
    refuse_missing_values(args.metadata, args.cross, value_of, crops)
    return value_of


def hashes_of_data(people, value_of):
    """The part of a recipe that says what the run is trained on, by content.

    value_of: what `read_values` returns.
    """
    pairs = repr(people.pairs)  # in their order, since the split depends on it
    return {
        "crops_sha256": hash_of_crops(people, value_of),
        "pairs_sha256": hashlib.sha256(pairs.encode()).hexdigest(),
    }


def hash_of_crops(people, value_of):
    """A hash of who has which images, by their pixels, and of the images' values for --cross."""
    content = {}
    for name, paths in people.id_to_images.items():
        content[name] = [people.crops.sha256[people.crops.row[path]] for path in paths]
        if value_of:
            content[name].append([value_of[path] for path in paths])
    return hashlib.sha256(repr(content).encode()).hexdigest()


class TwinTrainer:
    """Runs the two stages with the settings of one run.

        (args,) = parse_runs([...])
        trainer = TwinTrainer(args)   # refuses what would spoil an earlier run
        trainer.align()               # photographs -> crops and --aligned_json
        trainer.train()               # crops -> checkpoint, logs, curves

    people: what an earlier trainer has read from the same files, to save reading them again.
    """

    def __init__(self, args: argparse.Namespace, people: People | None = None):
        self.args = args
        self.people = people
        self.processes = Processes(args.device)
        self.device = self.processes.device
        self.run = RunFolder(args)
        self.criterion = TripletLoss(args.margin, args.distance)
        if self.run.finished:
            self.run.refuse_other_recipe({"weights_sha256": self.hash_of_start()})
            return
        if self.needs_start_file() and not Path(args.pretrained).is_file():
            way_out = "see 'Weights' in README, or take --pretrained none for random weights"
            raise InputError(f"--pretrained {args.pretrained}: no such file; {way_out}")
        first_precision = self.run.first_config.get("recipe", {}).get("precision")
        self.precision = choose_precision(
            args.precision, self.device, args.freeze_backbone, first_precision
        )

    def needs_start_file(self):
        """Whether the run begins with weights from a file."""
        return self.args.pretrained != "none" and not self.run.can_continue

    def say(self, text):
        """Print a line, once for all processes, without breaking the progress bar."""
        if self.processes.is_main:
            if sys.stderr.isatty():
                tqdm.write(text)
            else:
                print(text)
            sys.stdout.flush()

    def align(self) -> None:
        """Stage 1: align the photographs of all training pairs and write --aligned_json."""
        align_files(self.args, "train_pairs", self.processes)

    def train(self) -> dict:
        """Stage 2: fine-tune and write all files; returns the content of training_log.json."""
        if self.run.finished:
            if self.processes.is_main:
                self.run.delete_superseded()  # which a kill at the very end may have left
            self.say(self.run.describe_end())
            return self.run.log
        try:
            state = self.load_network()
            self.load_data()
            self.prepare_training()
            self.claim_folder()
            if state:
                self.restore(state)
            self.announce()
            self.place_images()
            next_epoch = len(self.run.log["epochs"])  # 0 in a new run: its log is empty
            for epoch in range(next_epoch, self.args.epochs + 1):
                self.processes.raise_if_interrupted()
                self.run_epoch(epoch)
                if self.run.log["stopped"]:
                    break
                self.save_if_due()
            return self.conclude()
        finally:
            self.run.release()

    # -- before the first epoch
    def load_people(self):
        """Read the pairs and the crops, unless `people` were given; returns the People."""
        if not self.people:
            self.people = People(*read_people(self.args, "aligned_json", "train_pairs"))
            for warning in self.people.warnings:
                self.say(f"warning: {warning}")
        return self.people

    def find_fold_ids(self):
        """The set of IDs of the fold that this run leaves out; empty without --folds.

        Raises InputError if there are fewer families than --folds.
        """
        args = self.args
        if not args.folds:
            return set()
        fold_of = deal_people_into_folds(self.people.pairs, args.folds, args.split_seed)
        return {name for name, fold in fold_of.items() if fold == args.fold}

    def refuse_folds_of_known_people(self):
        """Raise InputError if --folds would test the start on people whom it has seen."""
        args = self.args
        if not args.folds or not self.needs_start_file():
            return
        lineage = lineage_of(self.load_start().facts)
        known = {*lineage["seen_ids"]} & {*self.people.id_to_images}
        known |= self.people.people_on(lineage["seen_images"])
        if known:
            message = f"was trained or validated on {len(known)} of these people"
            way_out = "the folds would test on people whom it knows; start from another network"
            raise InputError(f"--folds: {args.pretrained} {message}; {way_out}")

    def load_data(self):
        """Read the crops, split the pairs and make the triplets."""
        args = self.args
        people = self.load_people()
        self.fold_ids = self.find_fold_ids()
        self.value_of = read_values(args, people)
        usable_pairs = self.find_usable_pairs()
        pairs_of_run = [pair for pair in usable_pairs if pair[0] not in self.fold_ids]
        if not pairs_of_run:
            raise InputError(f"{args.run_name}: the other folds have no pair that makes a triplet")
        # People that the start was trained on cannot validate it.
        never_validate = {*self.lineage["trained_ids"]}
        never_validate |= people.people_on(self.lineage["trained_images"])
        # Pairs that are skipped still join people to families.
        train_pairs, val_pairs = split_pairs(
            pairs_of_run, args.validation_split, args.split_seed, people.pairs, never_validate
        )
        self.train_set = TwinTripletDataset(
            people.id_to_images, train_pairs, args.train_percentage, args.seed, self.value_of
        )
        self.train_rows = people.rows(self.train_set.images.paths)
        # The triplets used so far, each once: their train_set.triplet_numbers, ascending.
        self.used_triplets = np.zeros(0, np.int64)
        self.prepare_validation(val_pairs)

    def find_usable_pairs(self):
        """The pairs that make a triplet. Says how many others are skipped, and sets `n_skipped`."""
        column = self.args.cross
        id_to_images, pairs = self.people.id_to_images, self.people.pairs
        try:
            usable = TwinTripletDataset(id_to_images, pairs, value_of=self.value_of)
        except InputError as error:
            if not column:
                raise
            raise InputError(f"--cross {column}: {error}") from error
        if column:
            self.say(describe_values(column, usable, TwinTripletDataset(id_to_images, pairs)))
        self.n_skipped = usable.n_skipped
        if self.n_skipped:
            reason = "no triplet can be made of their crops"
            self.say(f"warning: {self.n_skipped} of {len(pairs)} pairs are skipped: {reason}")
        return usable.pairs

    def prepare_validation(self, val_pairs):
        """Set what is measured after each epoch.

        `watched_rows`: the images that are embedded after each epoch, which are those of validation
        or, without validation, some of training. `val_set`: the triplets of the validation pairs.
        `evaluator`: measures these pairs. Both are None without validation. `seen_rows`: all images
        of training and validation.
        """
        self.val_set = None
        self.evaluator = None
        if not val_pairs:
            # A network that has died must not be saved, so some training images are watched.
            self.watched_rows = self.train_rows[:64]
            self.seen_rows = self.train_rows
            reason = "--validation_split 0, one family only, or all were trained on before"
            self.say(f"warning: no validation ({reason}); the last epoch is kept")
            return
        id_to_images = self.people.id_to_images
        self.val_set = TwinTripletDataset(id_to_images, val_pairs, value_of=self.value_of)
        # Seeded by the split, so that runs with other seeds can be compared on the same resamples.
        self.evaluator = TwinEvaluator(self.val_set.images, self.args.split_seed)
        if self.value_of:
            self.evaluator = self.evaluator.across(self.value_of)
        self.watched_rows = self.people.rows(self.val_set.images.paths)
        self.seen_rows = torch.cat([self.train_rows, self.watched_rows])

    def load_network(self):
        """Load the network to train; returns the state to resume from, None for a new run.

        Also sets `weights_hash` and `lineage` (see `lineage_of`) of the network that the run began
        with, and the log of a run that goes on.
        """
        args = self.args
        torch.manual_seed(args.seed)
        state = None
        if self.run.can_continue:
            state = read_checkpoint(self.run.state_file)
            # Only this entry: the averaged weights in the state would be a second network.
            model = network_of(self.run.state_file, {"state_dict": state["state_dict"]})
            self.run.log = state["log"]
            self.run.find_best_checkpoint()
            self.weights_hash = self.hash_of_start()
            self.lineage = state["lineage"]
        else:
            model = self.load_start()
            self.weights_hash = self.hash_of_start(model)
            self.lineage = lineage_of(model.facts)
        self.model = model.to(self.device, memory_format=torch.channels_last).eval()
        self.model.requires_grad_(not args.freeze_backbone)
        self.model.output_layer.requires_grad_(True)
        return state

    def prepare_training(self):
        """Make the optimizer, the average and the recipe.

        Raises InputError if this is not the recipe that the run began with.
        """
        args = self.args
        self.optimizer = make_optimizer(self.model, args.learning_rate, args.weight_decay)
        self.make_average()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.start_embeddings = None  # of the training images, before training
        self.identity_loss = None  # a MarginSoftmax, with --identity_weight
        self.watched_embeddings = {}  # {"start", "best"}: of the watched images
        self.saved_at = time.monotonic()  # SAVE_SECONDS count from here, then from each save
        self.recipe = self.make_recipe(self.weights_hash)
        self.run.refuse_other_recipe(self.recipe)

    def make_average(self):
        """Make the network whose weights are the running average of the trained ones.

        This `averaged_model` is what is validated and saved: averaged weights change less from
        epoch to epoch, and are better. `average`, a part of it, follows `trained`, the part of the
        model that is trained.
        """
        self.averaged_model = copy.deepcopy(self.model).requires_grad_(False)
        self.average = self.averaged_model
        self.trained = self.model
        if self.args.freeze_backbone:
            self.average = self.averaged_model.output_layer
            self.trained = self.model.output_layer

    def update_average(self):
        """Move the averaged weights towards the trained ones.

        PyTorch's AveragedModel does the same, but makes the host wait for a GPU in every step.
        """
        parameters = zip(self.average.parameters(), self.trained.parameters(), strict=True)
        with torch.no_grad():
            for average, trained in parameters:
                average.lerp_(trained, 1 - AVERAGE_DECAY)

    def claim_folder(self):
        """Take over the run's folder; if the main process may not, no process goes on."""
        # from_main waits for all processes, so all have looked at the folder before the main
        # process changes it.
        config = self.processes.from_main(self.make_config())
        self.run.log["config"] = config
        problem = None
        if self.processes.is_main:
            try:
                self.run.claim(config)
            except InputError as error:
                problem = error
        problem = self.processes.from_main(problem)
        if problem:
            raise problem

    def restore(self, state):
        """Take over what last.pth holds, besides what `load_network` has taken from it."""
        self.set_start_embeddings(state["start_embeddings"].to(self.device))
        if self.identity_loss:
            self.identity_loss.load_state_dict(state["identity_loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.used_triplets = state["used_triplets"].numpy()
        self.scaler.load_state_dict(state["scaler"])
        for name, embeddings in state["watched_embeddings"].items():
            self.watched_embeddings[name] = embeddings.to(self.device)

    def place_images(self):
        """Set `inputs`, what each training step takes rows of: all crops, or their features.

        They go to the GPU if they fit.
        """
        self.inputs = self.people.crops.pixels
        if self.args.freeze_backbone:
            self.inputs = backbone_features(self.model, self.people, self.processes)
        if self.device.type == "cuda" and fits_into_gpu(self.inputs, self.device):
            self.inputs = self.inputs.to(self.device)

    def load_start(self):
        """The network to start from."""
        args = self.args
        if args.pretrained == "none":
            return build_model(args.arch)
        return load_checkpoint(args.pretrained, args.arch, args.channels)

    def hash_of_start(self, model=None):
        """The hash of the weights that the run starts from, for the recipe.

        model: the network, if it is loaded already; else it is loaded here. For random weights,
        the architecture stands in place of a hash, since the seed decides the rest. If the file of
        a run that began earlier is gone, this is the hash that the run has stored.
        """
        args = self.args
        if args.pretrained == "none":
            return f"random {args.arch}"
        if model is None:
            if not Path(args.pretrained).is_file():
                return self.run.first_config["recipe"]["weights_sha256"]
            model = self.load_start()
        return weights_sha256(model)

    def make_recipe(self, weights_hash):
        """All that makes two runs the same setting: flags, weights, crops and pairs."""
        recipe = {flag: getattr(self.args, flag) for flag in RECIPE}
        recipe["precision"] = self.precision
        recipe["weights_sha256"] = weights_hash
        return recipe | hashes_of_data(self.people, self.value_of)

    def make_config(self):
        """The content of config.json."""
        train, val = self.train_set, self.val_set
        if self.device.type == "cuda":
            device_name = torch.cuda.get_device_name(self.device)
        else:
            device_name = torch.backends.cpu.get_cpu_capability()
        modules = ("torch", "numpy", "cv2", "PIL")  # align has imported them
        versions = {name: str(sys.modules[name].__version__) for name in modules}
        parameters = self.model.named_parameters()
        return {
            **vars(self.args),
            "recipe": self.recipe,
            "n_train_pairs": len(train.pairs),
            "n_val_pairs": len(val.pairs) if val is not None else 0,
            "n_skipped_pairs": self.n_skipped,
            "n_train_triplets": len(train),
            "n_val_triplets": len(val) if val is not None else 0,
            "n_train_images": len(train.images.paths),
            "n_touched_images": train.count_touched_images(),
            "train_ids": train.images.ids,
            "val_ids": val.images.ids if val is not None else [],
            "fold_ids": sorted(self.fold_ids),
            "trainable_parameters": [name for name, p in parameters if p.requires_grad],
            "used_device": str(self.device),
            "device_name": device_name,
            "processes": self.processes.world,
            "versions": versions,
        }

    def announce(self):
        """Say what is about to be trained on what."""
        config = self.run.log["config"]
        train = self.train_set
        n_images = config["n_touched_images"]
        self.say(
            f"{self.run.name}: {config['n_train_pairs']} training pairs and "
            f"{config['n_val_pairs']} validation pairs; "
            f"{len(train)} of {train.n_possible} triplets, with {n_images} images; "
            f"{self.model.arch} on {self.device}, {self.precision}"
        )

    # -- an epoch
    def run_epoch(self, epoch):
        """Train one epoch (epoch 0: only measure the start), validate, log, keep the best."""
        began = time.perf_counter()
        statistics = self.train_epoch(epoch) if epoch else self.measure_start()
        training_ended = time.perf_counter()
        embeddings, figures = self.validate(epoch)
        ended = time.perf_counter()
        entry = {
            "epoch": epoch,
            "train_loss": statistics.pop("loss"),
            **statistics,
            **figures,
            "timing": {"seconds": ended - began, "validation_seconds": ended - training_ended},
        }
        # All processes go on with the same figures, so that all stop at the same epoch.
        entry = self.processes.from_main(entry)
        is_kept = self.run.record(entry)
        if epoch == 0:
            self.watched_embeddings["start"] = embeddings
        if is_kept:
            self.watched_embeddings["best"] = embeddings
        if self.processes.is_main:
            if is_kept:
                self.save_best(entry)
            self.run.write_log()
        self.say(describe_epoch(entry, is_kept))

    def set_start_embeddings(self, embeddings):
        """Set `start_embeddings` and, with --identity_weight, `identity_loss`, which needs them.

        The optimizer then trains the centres of `identity_loss` too. So this comes before the
        state of a resumed run's optimizer is loaded.
        """
        self.start_embeddings = embeddings
        if not self.args.identity_weight:
            return
        images = self.train_set.images
        person = torch.from_numpy(images.person)
        # It is made on a CPU, where all processes get the same bits.
        identity_loss = MarginSoftmax(len(images.ids), embeddings.cpu(), person)
        self.identity_loss = identity_loss.to(self.device)
        self.person = person.to(self.device)
        centres = list(self.identity_loss.parameters())
        self.optimizer.add_param_group(
            {"params": centres, "weight_decay": 0.0, "rate_factor": CENTRES_RATE}
        )

    def measure_start(self):
        """Embed all training images; returns what epoch 0 logs in place of `train_epoch`'s part."""
        with torch.no_grad():
            self.set_start_embeddings(self.embed(self.model, self.train_rows))
        statistics = mean_statistics(self.criterion, self.train_set, self.start_embeddings)
        return {**statistics, "steps": 0, "distinct_triplets_used": 0}

    def train_epoch(self, epoch):
        """Make the steps of one epoch; returns its part of the log entry.

        The statistics in it are means over the steps. The weights change from step to step, and
        steps may be less precise than fp32.
        """
        args = self.args
        steps = self.train_set.steps(epoch, args.images_per_batch, args.batch_size)
        names = self.criterion.STATISTICS
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        used = [self.used_triplets]
        n_before = sum(entry["steps"] for entry in self.run.log["epochs"])
        began = time.perf_counter()
        hidden = not self.processes.is_main
        for i in progress(range(len(steps)), f"epoch {epoch}", "step", disable=hidden):
            self.processes.raise_if_interrupted()
            triplets = steps[i]
            n_done = i + 1
            warm_up = min(1, (n_before + n_done) / WARM_UP_STEPS)
            for group in self.optimizer.param_groups:
                group["lr"] = args.learning_rate * group["rate_factor"] * warm_up
            sums += self.step(triplets)  # stays on the GPU: reading it would make the CPU wait
            used.append(self.train_set.triplet_numbers(triplets))
            if epoch == 1 and n_done == min(5, len(steps)):
                self.announce_time(began, n_done, len(steps))
            if n_done % CHECK_EVERY == 0 or n_done == len(steps):
                self.refuse_if_diverged(sums, f"epoch {epoch}, step {n_done}")
        # A small sample may have no triplet inside the groups of an epoch, which then has no step.
        means = (sums / max(1, len(steps))).tolist()
        statistics = dict(zip(names, means, strict=True))
        self.used_triplets = np.unique(np.concatenate(used))
        n_used = len(self.used_triplets)
        return {**statistics, "steps": len(steps), "distinct_triplets_used": n_used}

    def step(self, triplets):
        """One optimizer step, which embeds each distinct image once.

        triplets: (T, 3) int64, positions in the list of training images. Returns a float64 tensor
        with a value for each name in TripletLoss.STATISTICS. Also sets `step_embeddings`.
        """
        args, criterion = self.args, self.criterion
        positions, inverse = np.unique(triplets, return_inverse=True)
        positions = torch.from_numpy(positions)  # of the distinct images
        embedding_rows = torch.from_numpy(inverse.reshape(-1, 3))  # of each triplet
        embedding_rows = embedding_rows.to(self.device, non_blocking=True)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            embeddings = self.embed(self.model, self.train_rows[positions])
        self.step_embeddings = embeddings.detach()
        positions_on_device = positions.to(self.device, non_blocking=True)
        at_start = self.start_embeddings[positions_on_device]

        to_positive, to_negative = criterion.distances(embeddings, embedding_rows)
        triplet_loss = criterion.loss(to_positive, to_negative)
        quadruplet_loss = criterion.quadruplet_loss(to_positive, to_negative)
        drift = (1 - (embeddings * at_start).sum(1)).mean()
        loss = (1 - args.quadruplet_weight) * triplet_loss
        loss = loss + args.quadruplet_weight * quadruplet_loss
        loss = loss + args.drift_weight * drift
        if self.identity_loss:
            identity_loss = self.identity_loss(embeddings, self.person[positions_on_device])
            loss = loss + args.identity_weight * identity_loss

        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        # Each process has the network's gradients of its own images only, so they are summed, not
        # averaged. The centres of identity_loss are left out: every process has all of theirs.
        self.processes.sum_gradients([p for p in self.model.parameters() if p.requires_grad])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.update_average()
        return criterion.statistics(to_positive, to_negative).double()

    def embed(self, model, rows):
        """Embeddings (K, 512) float32 of some crops; the processes share the work.

        rows: (K,) int64, which crops: row numbers in `inputs`. Gradients flow unless in no_grad.
        """
        frozen = self.args.freeze_backbone
        at_once = FROZEN_BATCH if frozen else IMAGES_AT_ONCE[self.device.type]
        own_rows = rows[self.processes.share(len(rows))]
        parts = []
        for some_rows in own_rows.split(at_once):  # one empty part if this process has no images
            inputs = self.inputs[some_rows.to(self.inputs.device, non_blocking=True)]
            inputs = inputs.to(self.device, non_blocking=True)
            if frozen:
                embeddings, _ = model.head(inputs)
            else:
                embeddings, _ = model(to_input(inputs))
            parts.append(embeddings)
        return self.processes.gather(torch.cat(parts), len(rows))

    def announce_time(self, began, n_done, n_steps):
        """Say, after the first steps, how long the run will take at most."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = (time.perf_counter() - began) / n_done
        validation = self.run.log["epochs"][0]["timing"]["validation_seconds"]
        minutes = self.args.epochs * (n_steps * seconds + validation) / 60
        steps = f"{n_steps} steps of {seconds:.2f} s"
        text = f"{self.args.epochs} epochs of {steps}, each with {validation:.1f} s of validation"
        self.say(f"at most about {minutes:.0f} min: {text}")

    def refuse_if_diverged(self, sums, where):
        """Raise InputError if the loss or a weight is not finite, or the network is dead.

        sums: those of the statistics so far. where: the epoch and the step, for the message. The
        CPU waits for the GPU here.
        """
        place = f"{self.run.name}, {where}"
        way_out = self.advice_on_divergence()
        weights = [p.detach() for p in self.model.parameters() if p.requires_grad]
        are_finite = [values.isfinite().all() for values in (sums, *weights)]
        if not torch.stack(are_finite).all():
            problem = "the loss or the weights are not finite"
            raise InputError(f"{place}: {problem}; {way_out}")
        check_alive(self.step_embeddings, f"{place}: the network", way_out)

    def advice_on_divergence(self):
        return f"start again with a --learning_rate below {self.args.learning_rate:g}"

    def validate(self, epoch):
        """Embed and measure the watched images; returns (embeddings, {figure: value or None}).

        All figures are None without validation. Raises InputError if the network is dead.
        """
        with torch.no_grad():
            embeddings = self.embed(self.averaged_model, self.watched_rows)
        way_out = self.advice_on_divergence()
        if epoch == 0:
            way_out = "take another checkpoint to start from"
        check_alive(embeddings, f"{self.run.name}, epoch {epoch}: the network", way_out)
        pair_figures = {}
        triplet_figures = {}
        if self.val_set is not None:
            pair_figures = self.evaluator.figures(self.evaluator.score(embeddings))
            triplet_figures = mean_statistics(self.criterion, self.val_set, embeddings)
        thresholds = [name for name, _ in OPERATING_POINTS.values()]  # evaluation applies them
        figures = {}
        for name in ("eer", "auc", "general_auc", *thresholds):
            figures[f"val_{name}"] = pair_figures.get(name)
        for name in ("loss", "active_triplets", "violated_triplets"):
            figures[f"val_{name}"] = triplet_figures.get(name)
        return embeddings, figures

    # -- files
    def save_best(self, entry):
        """Write the checkpoint of the best epoch so far."""
        log = self.run.log
        save_checkpoint(
            log["best_checkpoint"],
            self.averaged_model,
            epoch=entry["epoch"],
            config=log["config"],
            metrics=figures_of(entry),
            start_metrics=figures_of(log["epochs"][0]),
            **self.lineage_after_run(),
        )

    def lineage_after_run(self):
        """What the network has seen after this run, for its checkpoint."""
        hashes = self.people.hashes
        sha256 = self.people.crops.sha256
        trained_ids = {*self.lineage["trained_ids"], *self.train_set.images.ids}
        seen_ids = {*self.lineage["seen_ids"], *trained_ids}
        if self.val_set is not None:
            seen_ids |= {*self.val_set.images.ids}
        return {
            "trained_ids": sorted(trained_ids),
            "seen_ids": sorted(seen_ids),
            "trained_images": torch.cat([self.lineage["trained_images"], hashes[self.train_rows]]),
            "seen_images": torch.cat([self.lineage["seen_images"], hashes[self.seen_rows]]),
            "crop_sha256": [
                *self.lineage["crop_sha256"],
                *(sha256[row] for row in self.seen_rows.tolist()),
            ],
        }

    def save_if_due(self):
        """Write last.pth and the curves, and delete superseded checkpoints, every SAVE_SECONDS."""
        is_due = time.monotonic() - self.saved_at > SAVE_SECONDS
        if self.processes.is_main and is_due:
            self.save_state()
            self.run.delete_superseded()
            plot_curves(self.run.folder, self.run.log)
            self.saved_at = time.monotonic()

    def save_state(self):
        """Write last.pth, from which --resume goes on."""
        embeddings = {name: value.cpu() for name, value in self.watched_embeddings.items()}
        save_checkpoint(
            self.run.state_file,
            self.model,
            log=self.run.log,
            optimizer=self.optimizer.state_dict(),
            average=self.average.state_dict(),
            scaler=self.scaler.state_dict(),
            start_embeddings=self.start_embeddings.cpu(),
            watched_embeddings=embeddings,
            used_triplets=torch.from_numpy(self.used_triplets),
            lineage=self.lineage,
            identity_loss=self.identity_loss.state_dict() if self.identity_loss else {},
        )

    def conclude(self):
        """Compare the best epoch with the start and write the last files; returns the log."""
        run, log = self.run, self.run.log
        stopped = log["stopped"] or "epochs"
        if not self.processes.is_main:
            return {**log, "stopped": stopped}
        path = log["best_checkpoint"]
        self.say(f"stopped by --{stopped}; best epoch {log['best_epoch']}: {path}")
        self.say(f"The run has used {describe_used_triplets(log)}.")
        if stopped == "epochs":
            # Before log["stopped"] is set: --resume with more --epochs goes on from this state.
            self.save_state()
        log["stopped"] = stopped
        if self.val_set is not None:
            self.compare_with_start()
        plot_curves(run.folder, log)
        write_json(run.log_file, log)  # all files are there: now it says that the run has stopped
        if stopped != "epochs":
            run.state_file.unlink(missing_ok=True)
        run.delete_superseded()
        return log

    def compare_with_start(self):
        """Compare the best epoch with the start on the validation people; add that to the files."""
        log = self.run.log
        estimates = {}
        for name, embeddings in self.watched_embeddings.items():
            estimates[name] = self.evaluator.estimate(self.evaluator.score(embeddings))
        log["against_start"] = compare([estimates["best"]], estimates["start"])
        verdict = describe(log["against_start"])
        self.say(f"On the validation people, against the start: {verdict}.")
        content = read_checkpoint(log["best_checkpoint"])
        content["against_start"] = log["against_start"]
        samples = estimates["best"].samples
        if samples is not None:  # rank_settings compares the runs of a sweep by these
            content["val_auc_samples"] = torch.from_numpy(samples["auc"])
        write_checkpoint(log["best_checkpoint"], content)


def fits_into_gpu(images, device):
    """Whether images take less than half of a GPU's free memory."""
    free, _ = torch.cuda.mem_get_info(device)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return images.nbytes < (free + reusable) / 2


def figures_of(entry):
    """The figures of a log entry, without its epoch and time."""
    return {key: value for key, value in entry.items() if key not in ("epoch", "timing")}


def describe_values(column, dataset, whole):
    """The line that says how many triplets and positives the condition of --cross leaves.

    dataset: with the condition. whole: of the same pairs, without it.
    """
    n_negatives_only = (dataset.positives.count == 0).sum()
    return (
        f"--cross {column}: {dataset.n_possible} of {whole.n_possible} triplets have a positive "
        f"with another {column} than the anchor; {n_negatives_only} people with one {column} alone "
        "serve as negatives only"
    )


def describe_epoch(entry, is_kept):
    """The line that is printed after an epoch."""
    text = f"epoch {entry['epoch']}: train loss {entry['train_loss']:.4f}, "
    text += f"{entry['active_triplets']:.0%} active"
    if entry["val_loss"] is not None:
        text += f", val loss {entry['val_loss']:.4f}"
        text += f", EER {entry['val_eer']:.2%}, AUC {entry['val_auc']:.4f}"
    text += f", {entry['timing']['seconds']:.1f} s"
    return f"{text}  kept" if is_kept else text


def describe_used_triplets(log):
    """How many of the sampled triplets a run has used, in words."""
    n_used = log["epochs"][-1]["distinct_triplets_used"]
    n_sampled = log["config"]["n_train_triplets"]
    return f"{n_used} distinct triplets of {n_sampled} ({n_used / n_sampled:.0%})"


def plot_curves(folder, log):
    """Draw loss_curves.png and validation_curves.png of a run's log."""
    config = log["config"]
    w = config["quadruplet_weight"]
    drift = config["drift_weight"]
    minimised = f"minimised: {1 - w:g} triplet + {w:g} quadruplet loss + {drift:g} drift"
    if config["identity_weight"]:
        minimised += f" + {config['identity_weight']:g} margin softmax"
    loss = f"triplet loss ({config['distance']})"
    losses = {"train_loss": f"{loss},\ntraining", "val_loss": f"{loss},\nvalidation"}
    plot_panels(folder / "loss_curves.png", log, minimised, losses)

    title = f"{config['n_val_pairs']} validation pairs"
    if "against_start" in log:
        verdict = describe(log["against_start"])
        title += "\n" + textwrap.fill(f"kept epoch against the start: {verdict}", 80)
    figures = {
        "val_eer": "EER, twins",
        "val_auc": "AUC, twins",
        "val_general_auc": "AUC, everyone else",
    }
    plot_panels(folder / "validation_curves.png", log, title, figures)


def plot_panels(path, log, title, curves):
    """Draw a panel for each curve, against the epoch; curves: {key of a log entry: label}."""
    config = log["config"]
    with plot_figure(path, 7.4, 1.2 + 1.8 * len(curves), rows=len(curves)) as grid:
        for axes, (key, label) in zip(grid, curves.items(), strict=True):
            values = np.array([entry[key] for entry in log["epochs"]], float)  # None becomes NaN
            axes.plot(values, marker="o")
            start_label = "before training"
            kept_label = f"kept epoch, by {config['monitor']}"
            if axes is not grid[0]:  # plot_figure makes a legend of labels; one is enough
                start_label = None
                kept_label = None
            thin = {"color": "grey", "linewidth": 0.8}
            axes.axhline(values[0], linestyle=":", label=start_label, **thin)
            if log["best_epoch"]:
                axes.axvline(log["best_epoch"], linestyle="-.", label=kept_label, **thin)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_ylabel(label)
        grid[0].set_title(f"{config['run_name']}\n{title}", fontsize=9)
        grid[-1].set_xlabel("epoch (0: before training)")


# ---- one run, or a sweep -------------------------------------------------------------------------
def train_runs(runs):
    """Train the runs of `parse_runs`; returns the names of those that failed in a sweep.

    The InputError of a single run is raised.
    """
    if len(runs) > 1:
        return run_sweep(runs)
    (args,) = runs
    trainer = TwinTrainer(args)
    if trainer.run.finished:
        people = trainer.load_people()
        trainer.run.refuse_other_recipe(hashes_of_data(people, read_values(args, people)))
    else:
        align_if_asked(trainer, [args.cross])
    trainer.train()
    return []


def align_if_asked(trainer, columns):
    """Run stage 1, unless --skip_alignment is given; columns: the --cross of every run."""
    args = trainer.args
    if args.skip_alignment:
        return
    # Wrong files should fail now, not after an hour of alignment.
    if trainer.needs_start_file():
        trainer.load_start()
    if args.metadata:
        read_flag(args, "metadata", read_csv, ("path", *columns))
    trainer.align()


def run_sweep(runs):
    """Train several runs on crops that are decoded once; returns the names of those that failed.

    One trainer, the leader, aligns and reads the crops for all; each run then has its own trainer.
    """
    # All are made now: this refuses what would spoil an earlier run, before any run is trained.
    run_folders = [RunFolder(args) for args in runs]
    finished = [run_folder for run_folder in run_folders if run_folder.finished]
    waiting = [run_folder for run_folder in run_folders if not run_folder.finished]
    # A new run leads, if there is one: it needs the start's file, so a wrong one fails now.
    candidates = sorted(waiting, key=lambda run_folder: run_folder.can_continue) or finished
    leader = TwinTrainer(candidates[0].args)
    people = prepare_sweep(leader, finished, waiting)
    logs = {run_folder.name: run_folder.log for run_folder in finished}
    processes = leader.processes

    def train(args):
        logs[args.run_name] = TwinTrainer(args, people).train()

    failed = []
    # Runs differ much in length, so the bar's estimate is made of the last one alone.
    bar = {"smoothing": 1, "disable": not processes.is_main}
    args_of_waiting = [run_folder.args for run_folder in waiting]
    for args in progress(args_of_waiting, "all runs", "run", **bar):
        processes.raise_if_interrupted()
        code = train_one_of_several(args.run_name, partial(train, args))
        if code:
            failed.append(args.run_name)
            if processes.world > 1:  # the others may still wait inside the failed run
                break
    done = [logs[args.run_name] for args in runs if args.run_name in logs]
    if done:
        leader.say(summarize_runs(done, leader.args.pretrained))
    for name in failed:
        way_out = "when it is mended, repeat the command with --resume and without --overwrite"
        leader.say(f"FAILED: {name}, for the reason above; {way_out}")
    return failed


def prepare_sweep(leader, finished, waiting):
    """Align and read the crops of a sweep; returns the People that all its runs share.

    finished, waiting: the RunFolders of the sweep. What is wrong with any of them is refused here,
    before the first run is trained.
    """
    if finished:
        weights_hash = leader.hash_of_start()
        for run_folder in finished:
            run_folder.refuse_other_recipe({"weights_sha256": weights_hash})
    if waiting:
        align_if_asked(leader, {run_folder.args.cross for run_folder in waiting})
    people = leader.load_people()
    for run_folder in finished:
        value_of = read_values(run_folder.args, people)
        run_folder.refuse_other_recipe(hashes_of_data(people, value_of))
        if leader.processes.is_main:
            run_folder.delete_superseded()  # which a kill at the very end may have left
        leader.say(run_folder.describe_end())
    if waiting:
        leader.find_fold_ids()
        leader.refuse_folds_of_known_people()
    for run_folder in waiting:
        read_values(run_folder.args, people)
    return people


def train_one_of_several(name, train):
    """Call `train()` and return its exit code; a failure does not end the sweep."""
    try:
        code = report_errors(name, train, "interrupted", OUT_OF_MEMORY)
    except Exception:  # a bug keeps its traceback
        traceback.print_exc()
        return 1
    if code == 130:
        raise KeyboardInterrupt
    return code


class ValidatedRun(NamedTuple):
    """What the summary of a sweep needs of one run."""

    path: str  # its best checkpoint
    config: dict
    recipe: dict
    val_auc: float
    samples: np.ndarray  # (R,), of the validation AUC, on the same resamples for all runs


def summarize_runs(logs, pretrained):
    """Text: the best epochs on the validation people, the settings, and the next command."""
    width = max(len(log["config"]["run_name"]) for log in logs)
    lines = [f"{'run':{width}}  epoch   EER %     AUC  general AUC"]
    for log in logs:
        best = log["epochs"][log["best_epoch"]]
        cells = [
            f"{log['best_epoch']:5}",
            f"{METRICS['eer'].as_text(best['val_eer']):>6}",
            f"{METRICS['auc'].as_text(best['val_auc']):>6}",
            f"{METRICS['general_auc'].as_text(best['val_general_auc']):>11}",
        ]
        lines.append("  ".join([f"{log['config']['run_name']:{width}}", *cells]))
    lines += rank_settings(read_validated_runs(logs))
    if any(log["config"]["n_val_pairs"] for log in logs):
        lines.append("These figures chose the epochs, so they are better than those of new people.")
    lines += suggest_evaluation(logs, pretrained)
    return "\n".join(lines)


def suggest_evaluation(logs, pretrained):
    """Lines: the command that evaluates these runs and the start, and what it does."""
    paths = [log["best_checkpoint"] for log in logs]
    checkpoints = [path for path in paths if Path(path).is_file()]  # describe_end tells of others
    if not checkpoints:
        return []
    if pretrained != "none":
        checkpoints.insert(0, pretrained)
    config = logs[0]["config"]
    command = ["python", "evaluate_twins.py"]
    purpose = "This command tests the runs on the test people:"
    if config["folds"]:
        purpose = "This command tests each run on the fold that it has not seen:"
        command += ["--skip_alignment", "--aligned_json", config["aligned_json"]]
        command += ["--test_pairs", config["train_pairs"]]
    columns = {log["config"]["cross"] for log in logs}
    if config["cross"] and len(columns) == 1:
        command += ["--metadata", config["metadata"], "--cross", config["cross"]]
    parser = build_parser()
    for name in ("id_to_images", "landmarks", "channels"):  # evaluation has them too
        if config[name] != parser.get_default(name):
            command += [f"--{name}", config[name]]
    return [purpose, shlex.join([*command, "--checkpoints", *checkpoints])]


def read_validated_runs(logs):
    """The ValidatedRuns of training logs; [] unless all were validated on the same pairs."""
    runs = []
    validated_on = set()
    for log in logs:
        path = log["best_checkpoint"]
        content = read_checkpoint(path) if Path(path).is_file() else {}
        if "val_auc_samples" not in content:
            return []
        config = log["config"]
        pairs_of_run = (config["split_seed"], config["cross"], tuple(config["val_ids"]))
        validated_on.add(pairs_of_run)
        val_auc = log["epochs"][log["best_epoch"]]["val_auc"]
        samples = content["val_auc_samples"].numpy()
        runs.append(ValidatedRun(path, config, config["recipe"], val_auc, samples))
    return runs if len(validated_on) == 1 else []


def rank_settings(runs):
    """Lines: the settings by their mean validation AUC over seeds, compared with the first."""
    settings = []
    differing = differing_flags(runs)
    for group in group_by_recipe(runs):
        words = [describe_flag(flag, group[0].recipe[flag]) for flag in differing]
        mean = sum(run.val_auc for run in group) / len(group)
        samples = np.mean([run.samples for run in group], 0)
        name = ", ".join(words) or group[0].config["run_name"]
        settings.append((name, mean, samples))
    if len(settings) < 2:
        return []
    settings.sort(key=lambda setting: -setting[1])
    best_name, best_mean, best_samples = settings[0]
    lines = [f"Validation chooses: {best_name} (AUC {best_mean:.4f}). Differences to it:"]
    for name, mean, samples in settings[1:]:
        bounds = interval(samples - best_samples)
        text = format_with_interval(mean - best_mean, bounds, "+.4f")
        _, high = bounds
        verdict = "worse" if high < 0 else "cannot be told from it"
        lines.append(f"  {name}: AUC {text}, {verdict}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run both stages; returns the exit code (see net.run_script), 1 if a run of a sweep failed."""
    failed = []  # run_script returns an exit code alone

    def work():
        failed.extend(train_runs(parse_runs(argv)))

    interrupted = "interrupted; --resume goes on from the last saved epoch"
    code = run_script("train_twins.py", work, interrupted, OUT_OF_MEMORY)
    return code or int(bool(failed))


if __name__ == "__main__":
    run_main(main)

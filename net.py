"""The AdaFace IR and IR-SE face recognition networks: structure, input, checkpoints.

    from net import load_checkpoint, to_input
    model = load_checkpoint("pretrained/adaface_ir50_ms1mv2.ckpt")
    embedding, norm = model(to_input(crops))      # crops: (N, 112, 112, 3) uint8 RGB

On the way from photograph to metric this file stands in the middle: `align.py` makes the crops,
`net.py` turns a crop into an embedding, `triplet_loss.py` and `evaluate_twins.py` compare embeddings.

State-dict keys and shapes equal those of `net.py` in AdaFace (https://github.com/mk-minchul/AdaFace),
so weights go both ways unchanged.
"""

import math
import os
import pickle
import pickletools
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from contextlib import suppress
from datetime import timedelta
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from align import CROP_SIZE, InputError, pick_device, replacing

# name: (units per stage, channels per stage, bottleneck units, squeeze-and-excitation)
_BASIC, _WIDE = (64, 128, 256, 512), (256, 512, 1024, 2048)
ARCHITECTURES = {
    "ir_18": ((2, 2, 2, 2), _BASIC, False, False),
    "ir_34": ((3, 4, 6, 3), _BASIC, False, False),
    "ir_50": ((3, 4, 14, 3), _BASIC, False, False),
    "ir_101": ((3, 13, 30, 3), _BASIC, False, False),
    "ir_152": ((3, 8, 36, 3), _WIDE, True, False),
    "ir_200": ((3, 24, 36, 3), _WIDE, True, False),
    "ir_se_50": ((3, 4, 14, 3), _BASIC, False, True),
    "ir_se_101": ((3, 13, 30, 3), _BASIC, False, True),
    "ir_se_152": ((3, 8, 36, 3), _WIDE, True, True),
}
ARCHITECTURES["ir_se_200"] = (*ARCHITECTURES["ir_200"][:3], True)

EMBEDDING_SIZE = 512


class SEBlock(nn.Module):
    """Squeeze-and-excitation: every channel times a weight computed from all channels' means."""

    def __init__(self, channels, reduction=16):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.relu = nn.ReLU()
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return x * self.sigmoid(self.fc2(self.relu(self.fc1(self.avg_pool(x)))))


class ResidualUnit(nn.Module):
    """`res_layer(x) + shortcut_layer(x)`; the last convolution of `res_layer` carries the stride."""

    def __init__(self, in_channels, channels, stride, bottleneck, se):
        super().__init__()
        if in_channels == channels:
            self.shortcut_layer = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

        def conv(i, o, kernel, stride=1):
            return [nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(o)]

        if bottleneck:
            middle = channels // 4
            layers = [*conv(in_channels, middle, 1), nn.PReLU(middle), *conv(middle, middle, 3)]
            layers += [nn.PReLU(middle), *conv(middle, channels, 1, stride)]
        else:
            layers = [*conv(in_channels, channels, 3), nn.PReLU(channels), *conv(channels, channels, 3, stride)]
        self.res_layer = nn.Sequential(nn.BatchNorm2d(in_channels), *layers)
        if se:
            self.res_layer.add_module("se_block", SEBlock(channels))

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class Backbone(nn.Module):
    """AdaFace's network.

    `forward(x)`: x (N, 3, 112, 112) float, BGR in [-1, 1], any memory format ->
    (embedding (N, 512), norm (N, 1)), both float32 also under autocast; the embedding has unit length.

    `features` (all but `output_layer`) and `head` (`output_layer` and the normalisation) are its two
    halves, for those who keep the features of a frozen backbone: `head(features(x))` is `forward(x)`.

    Attributes: `arch`, its name; `facts`, what a checkpoint said beside the weights (see load_checkpoint).
    """

    def __init__(self, arch):
        super().__init__()
        units, channels, bottleneck, se = ARCHITECTURES[arch]
        self.arch, self.facts = arch, {}
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        last = channels[-1]
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(last),
            nn.Dropout(0.4),
            nn.Flatten(),
            nn.Linear(last * 7 * 7, EMBEDDING_SIZE),
            nn.BatchNorm1d(EMBEDDING_SIZE, affine=False),
        )
        body, before = [], 64
        for count, after in zip(units, channels, strict=True):
            for i in range(count):
                body.append(ResidualUnit(before, after, 2 if i == 0 else 1, bottleneck, se))
                before = after
        self.body = nn.Sequential(*body)
        for module in self.modules():
            # On the meta device only shapes matter, and normal_ there imports seconds of PyTorch.
            if isinstance(module, nn.Conv2d | nn.Linear) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, x):
        """(N, 3, 112, 112) -> (N, C, 7, 7), C being 512, or 2048 for 152 and 200 layers."""
        return self.body(self.input_layer(x))

    def head(self, features):
        """(N, C, 7, 7) -> (embedding (N, 512), norm (N, 1)), float32."""
        raw = self.output_layer(features).float()
        norm = torch.linalg.vector_norm(raw, dim=1, keepdim=True)
        # Upstream divides by the bare norm. A vector of exact zeros (a dead network) would give NaN.
        return raw / norm.clamp_min(torch.finfo(torch.float32).tiny), norm

    def forward(self, x):
        return self.head(self.features(x))


def build_model(name):
    """A network of the named architecture (`ARCHITECTURES` lists them) with random weights.

    Convolutions and the linear layer are Kaiming normal (fan out), as upstream. Raises InputError for
    an unknown name.
    """
    if name not in ARCHITECTURES:
        raise InputError(f"unknown architecture {name!r}: choose from {', '.join(ARCHITECTURES)}")
    return Backbone(name)


def to_input(crops):
    """The one conversion from aligned crops to what the network sees.

    crops: (N, 112, 112, 3) uint8 **RGB**, array or tensor on any device. Returns float32 **BGR**
    (N, 3, 112, 112) on the same device, `(x - 127.5) / 127.5`, so in [-1, 1]; its memory format is
    channels_last, which costs nothing here and is the faster one for convolutions.
    Raises TypeError or ValueError for another type or shape: a float or BGR image is a silent error later.
    """
    crops = torch.from_numpy(crops) if isinstance(crops, np.ndarray) else crops
    if crops.dtype != torch.uint8:
        raise TypeError(f"crops must be uint8 RGB, not {crops.dtype}")
    if crops.ndim != 4 or tuple(crops.shape[1:]) != (CROP_SIZE, CROP_SIZE, 3):
        raise ValueError(f"crops must be (N, 112, 112, 3), not {tuple(crops.shape)}")
    bgr = crops.permute(0, 3, 1, 2).flip(1)
    return bgr.to(torch.float32).sub_(127.5).div_(127.5)


# ---- processes --------------------------------------------------------------------------------------


class Ranks:
    """This process among those that torchrun started; alone without it.

    `rank` (0 writes the files), `world`, the number of processes, `local`, the number on this machine; `Ranks({})` is
    alone in any case. Every process must make the same calls in the same order. Tensors may be on the CPU, where gloo
    moves them, or on CUDA (NCCL).
    """

    def __init__(self, environment=os.environ):
        self.rank, self.world, self.local = (
            int(environment.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        self.device = None

    def pick_device(self, name="auto"):
        """align.pick_device, each process on a machine its own CUDA device; also joins the processes."""
        several = self.world > 1 and name in ("auto", "cuda") and torch.cuda.is_available()
        self.device = pick_device(f"cuda:{self.local}" if several else name)
        if self.world > 1 and not dist.is_initialized():
            # NCCL cannot serve two processes on one GPU, which is what a GPU's number in the flag makes.
            backend = "cpu:gloo,cuda:nccl" if several else "gloo"
            # One process may be hours behind another, for instance in alignment.
            dist.init_process_group(backend, timeout=timedelta(days=2))
        return self.device

    def share(self, n):
        """This process's part of range(n), as a slice."""
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def gather(self, part):
        """The processes' tensors (n, ...), n of any size each, one after the other, on every process."""
        if self.world == 1:
            return part
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([len(part)]))  # on the CPU: nothing waits for a GPU
        padded = part.new_zeros((int(max(lengths)), *part.shape[1:]))
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.cat([p[:n] for p, n in zip(parts, lengths, strict=True)])

    def sum(self, tensor):
        """The sum of the processes' tensors, on every process."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def collect(self, value):
        """The list of all processes' values (anything that pickles), on every process; also waits for all."""
        values = [value]
        if self.world > 1:
            values = [None] * self.world
            dist.all_gather_object(values, value)
        return values

    def leave(self):
        """End this process, all having done their work; alone, go on.

        Python's own end would not do: gloo's threads outlive the process group, and one that lets go of a tensor while
        Python shuts down aborts the process ("terminate called without an active exception").
        """
        if dist.is_initialized():
            self.collect(None)
            with suppress(RuntimeError):  # after it, all have heard of all; those who break it off have left
                self.collect(None)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


# ---- checkpoints ------------------------------------------------------------------------------------


def plain(value):
    """`value` made of dict, list, str, int, float, bool, None and tensors alone.

    Numpy scalars and paths would need their classes to be unpickled, and then a file would no longer
    load with `weights_only=True`. Raises TypeError for anything else.
    """
    if value is None or isinstance(value, torch.Tensor) or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a checkpoint holds plain types only, not {type(value).__name__}: {value!r}")


def save_checkpoint(path, model, **facts):
    """Write `model` to `path` in a form that this file and upstream's own inference read.

    The file is a dict with "state_dict" (keys `model.<key>`, tensors on the CPU), "arch", and "epoch",
    "config", "metrics" (None and empty unless given among `facts`) and whatever else `facts` holds, as
    plain types: it loads with `torch.load(path, weights_only=True)`. Written atomically.
    """
    state = {f"model.{key}": value.detach().cpu() for key, value in model.state_dict().items()}
    content = {"epoch": None, "config": {}, "metrics": {}, **plain(facts)}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save({"state_dict": state, "arch": model.arch, **content}, file)
        except RuntimeError as error:  # PyTorch's own, raised where it closes a file that the disk had no room for
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_checkpoint(path, arch=None):
    """Read a network from a checkpoint; returns it on the CPU, float32, in eval mode.

    Reads AdaFace's Lightning `.ckpt` (with `head.*` tensors and pickled objects beside the network), our
    `.pth`, and bare state dicts, their keys prefixed by `model.`, `module.`, `net.` or nothing. The
    architecture is `arch` if given, else inferred from the tensors. `facts` of the returned network holds
    "epoch", "config", "metrics" and the other entries that `save_checkpoint` wrote; {} for other files.

    Nothing from the file is run: see `read_checkpoint`. Raises InputError when the file is not a
    checkpoint, when no architecture fits (naming the first differing keys and the closest architecture),
    or when weights are not finite.
    """
    content = read_checkpoint(path)
    state = _network_state(content, path)
    found, differences = _closest_architecture(state, arch)
    if arch not in (None, found):
        fits = "the closest architecture is" if differences else "its tensors fit"
        differences = _differences(_shapes(arch), state)
    else:
        fits = "the closest architecture is"
    if differences:
        first = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
        raise InputError(f"{path}: not a whole {arch or found} network ({first}); {fits} {found}")
    for key, value in state.items():
        _check_weights(key, value, path)
    model = build_model(found)
    model.load_state_dict(state, strict=False)  # strictness was checked above; num_batches_tracked may miss
    model.facts = _facts(content, path)
    return model.eval()


def read_facts(path):
    """The `facts` of load_checkpoint alone, without making the network. Raises InputError as read_checkpoint."""
    return _facts(read_checkpoint(path), path)


def _check_weights(key, value, path):
    """Refuse a tensor of the network that cannot be its weights: of a dense, finite, floating-point kind."""
    real = value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    counter = key.endswith("num_batches_tracked") and value.dtype in (torch.int64, torch.int32)
    if value.layout != torch.strided or value.device.type != "cpu" or not (real or counter):
        kind = f"{value.layout} {value.dtype} on {value.device}".replace("torch.", "")
        raise InputError(f"{path}: {key} is {kind}, not plain weights; save the network as float32")
    if not torch.isfinite(value.float()).all():  # as float32, which float64 may exceed
        raise InputError(f"{path}: {key} holds NaN or infinite weights; take an earlier checkpoint")
    if key.endswith("running_var") and (value < 0).any():  # its root is NaN in every embedding
        raise InputError(f"{path}: {key} holds negative variances; take an earlier checkpoint")


def _facts(content, path):
    """What a checkpoint of ours says beside the weights; raises InputError when that is not what we write."""
    parts = "config", "metrics"
    if "arch" not in content or not all(isinstance(content.get(part), dict) for part in parts):
        return {}
    for part in parts:
        for key, value in content[part].items():
            if not isinstance(key, str) or not _is_fact(key, value, part):
                raise InputError(
                    f"{path}: the entry {part}[{key!r:.60}] is damaged; take the checkpoint as it was saved"
                )
    return {key: value for key, value in content.items() if key != "state_dict"}


def _is_fact(key, value, part):
    """Whether an entry of config or metrics is a plain value, or a list or dict of such, and of the right kind.

    Other entries would end an evaluation hours later, or, as `train_ids`, keep it from seeing a leak.
    """

    def plain_value(entry):
        return entry is None or type(entry) in (bool, int, str) or (type(entry) is float and math.isfinite(entry))

    if part == "metrics":
        return value is None or (type(value) in (int, float) and plain_value(value))
    if key in ("train_ids", "val_ids"):
        return type(value) is list and all(type(name) is str for name in value)
    if key in ("aligned_folder", "aligned_json"):
        return value is None or type(value) is str
    if key == "train_percentage":
        return type(value) is int and 1 <= value <= 100
    if type(value) in (list, tuple):
        return all(map(plain_value, value))
    if type(value) in (dict, OrderedDict):
        return all(type(name) is str and plain_value(entry) for name, entry in value.items())
    return plain_value(value)


def read_checkpoint(path):
    """The dict in a file that `torch.save` wrote, read without running anything from it.

    PyTorch's weights-only unpickler makes tensors and plain types. Every other class that the file
    names (Lightning callbacks, hyper-parameters) becomes an inert stand-in, so its package need not be
    installed and its code is not called. Files that name `os`, `sys` and the like are refused, and so are files
    that would grow far beyond their size (see _check_sizes).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    try:
        _check_sizes(path)
        try:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except ValueError:  # not a zip file: written by PyTorch before 1.6, or no checkpoint at all
            foreign = []
        try:
            content = _load_inert(path, foreign, _Inert)
        except pickle.UnpicklingError:  # perhaps a class of the file is a kind of dict, into which entries are put
            content = _load_inert(path, foreign, _InertDict)
    except InputError:
        raise
    except Exception as error:  # a hostile or damaged file can fail in any way
        reason = f"not a readable PyTorch checkpoint ({type(error).__name__}), download or copy it again"
        raise InputError(f"{path}: {reason}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {type(content).__name__}, not a checkpoint's dict")
    return content


class _Inert:
    """Takes the place of any class or function that a checkpoint names: does nothing, whatever it is given."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class _InertDict:
    """The same for kinds of dict: the unpickler puts entries into exact dicts only, so this makes such a one."""

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


# Names for which a checkpoint is refused. These are an attack in plain sight: they would be inert, but say more
# about the file than its weights do.
# (commands and __builtin__ are the names of subprocess and builtins in Python 2, which pickles keep.)
HOSTILE_MODULES = {"os", "posix", "nt", "sys", "io", "subprocess", "commands", "shutil", "importlib", "runpy", "pty"}
HOSTILE_MODULES |= {"socket", "ctypes"}
HOSTILE = {f"{module} {name}" for module in ("builtins", "__builtin__") for name in ("eval", "exec", "compile", "open")}
# And PyTorch calls these without question, where a few bytes can make them fill the memory or work for years: zeros
# of any size, copies of expanded tensors, the check of expanded sparse indices. No face network needs them.
HOSTILE |= {"builtins bytearray", "__builtin__ bytearray"}
HOSTILE |= {f"torch._utils _rebuild_{kind}" for kind in ("sparse_tensor", "device_tensor_from_cpu_tensor")}
MAX_OPERATIONS = 5_000_000  # of a pickle, each making one small object: a million IDs take 2 million
MAX_TUPLE = 1_000_000  # entries of a tuple with all that is in it


def _check_sizes(path):
    """Refuse a checkpoint whose content is far larger than the file: a zip bomb, or a pickle that is one.

    `torch.save` stores zip entries as they are; a network is most of its file, so nothing is lost by insisting.
    Raises InputError, or whatever a damaged file leads to.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # written by PyTorch before 1.6: five pickles, then the bare tensors
            file.seek(0)
            for _ in range(5):
                _check_pickle(file, path)
            return
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise InputError(f"{path}: its entries are compressed, which torch.save never does; save it again")
            for entry in entries:
                if entry.filename.endswith("/data.pkl"):
                    with archive.open(entry) as pickled:
                        _check_pickle(pickled, path)


def _check_pickle(file, path):
    """Go through a pickle without making anything: refuse HOSTILE names, endless pickles and endless tuples.

    Tuples that hold one tuple twice, and so on, double at every step, and hashing one as a key of a dict visits all.
    So the stack is followed with the size of each object in its place.
    """
    stack, memo = [], {}
    for number, (operation, argument, _) in enumerate(pickletools.genops(file)):
        name = operation.name
        if name == "GLOBAL" and (argument in HOSTILE or re.split("[. ]", argument)[0] in HOSTILE_MODULES):
            raise InputError(
                f"{path}: it asks to run {argument.replace(' ', '.')}, so it was not loaded; do not trust it"
            )
        if number > MAX_OPERATIONS:
            raise InputError(f"{path}: more than {MAX_OPERATIONS} entries beside the tensors; do not trust it")
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
            continue
        if name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
            continue
        taken = 0
        if pickletools.markobject in operation.stack_before:
            while (entry := stack.pop()) is not None:  # None: the mark
                taken += entry
            before = operation.stack_before.index(pickletools.markobject)
        else:
            before = len(operation.stack_before)
        for _ in range(before):
            taken += stack.pop()
        if name.startswith("TUPLE") and taken > MAX_TUPLE:
            raise InputError(f"{path}: holds a tuple of more than {MAX_TUPLE} entries; do not trust it")
        stack += [None if name == "MARK" else 1 + taken] * len(operation.stack_after)


def _load_inert(path, names, stand_in):
    # NumPy has no kind of dict, but states that none takes: numbers may stand beside a kind of dict.
    kinds = [(name, _Inert if name.startswith("numpy.") else stand_in) for name in names]
    stand_ins = [(type(name.rpartition(".")[2], (kind,), {}), name) for name, kind in kinds]
    with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's remarks on odd files; what is wrong with them is said in one line
        return torch.load(path, map_location="cpu", weights_only=True)


def _network_state(content, path):
    """The network's tensors out of a checkpoint's dict, without prefix; other tensors are left behind."""
    tensors = content.get("state_dict", content)
    tensors = tensors if isinstance(tensors, dict) else {}
    tensors = {k: v for k, v in tensors.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    parts = ("input_layer.", "body.", "output_layer.")

    def below(prefix):
        kept = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        return {k: v for k, v in kept.items() if k.startswith(parts)}

    prefixes = ("model.", "", "module.", "net.", "module.model.", "model.module.")
    state = max((below(prefix) for prefix in prefixes), key=len)
    if not state:
        keys = ", ".join(list(tensors)[:3]) or "no tensors"
        raise InputError(f"{path}: no AdaFace network in it (found {keys}); expected keys like input_layer.0.weight")
    return state


@cache  # building the deep networks takes a second even without weights
def _shapes(arch):
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in build_model(arch).state_dict().items()}


def _differences(expected, state):
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    surplus = [k for k in state if k not in expected]
    reshaped = [k for k in expected if k in state and tuple(state[k].shape) != expected[k]]
    return (
        [f"missing {k}" for k in missing]
        + [f"{k} is {tuple(state[k].shape)}, not {expected[k]}" for k in reshaped]
        + [f"unexpected {k}" for k in surplus]
    )


def _closest_architecture(state, likely=None):
    """(name, differences) of the architecture with the fewest differences to the tensors; `likely` is tried first."""
    best = None
    for arch in sorted(ARCHITECTURES, key=lambda name: name != likely):
        differences = _differences(_shapes(arch), state)
        if best is None or len(differences) < len(best[1]):
            best = arch, differences
        if not differences:
            break
    return best

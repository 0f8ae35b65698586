"""The AdaFace IR and IR-SE face recognition networks: structure, input, checkpoints.

    from net import load_checkpoint, to_input
    model = load_checkpoint("pretrained/adaface_ir50_ms1mv2.ckpt")
    embedding, norm = model(to_input(crops))      # crops: (N, 112, 112, 3) uint8 RGB

On the way from photograph to metric this file stands in the middle: `align.py` makes the crops,
`net.py` turns a crop into an embedding, `triplet_loss.py` and `evaluate_twins.py` compare embeddings.

State-dict keys and shapes equal those of `net.py` in AdaFace (https://github.com/mk-minchul/AdaFace),
so weights go both ways unchanged.
"""

import os
import pickle
from collections import OrderedDict
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

    `rank` (0 writes the files), `world`, the number of processes, `local`, the number on this machine. Every process
    must make the same calls in the same order. `name` of a device: gloo serves the CPU, NCCL CUDA.
    """

    def __init__(self):
        self.rank, self.world, self.local = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )

    def pick_device(self, name="auto"):
        """align.pick_device, each process on a machine its own CUDA device; also joins the processes."""
        several = self.world > 1 and name in ("auto", "cuda") and torch.cuda.is_available()
        self.device = pick_device(f"cuda:{self.local}" if several else name)
        if self.world > 1 and not dist.is_initialized():
            # Alignment is shared out beforehand, and one process may be hours behind another.
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(days=2))
        return self.device

    def share(self, n):
        """This process's part of range(n), as a slice."""
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def gather(self, part, n):
        """The whole (n, ...) tensor of which `part` is this process's `share`, on every process."""
        if self.world == 1:
            return part
        longest = -(-n // self.world)
        padded = part.new_zeros((longest, *part.shape[1:]))
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        counts = [n * (r + 1) // self.world - n * r // self.world for r in range(self.world)]
        return torch.cat([p[:count] for p, count in zip(parts, counts, strict=True)])

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
    with replacing(path) as temporary:
        torch.save({"state_dict": state, "arch": model.arch, **content}, temporary)


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
    found, differences = _closest_architecture(state)
    if arch not in (None, found):
        fits = "the closest architecture is" if differences else "its tensors fit"
        differences = _differences(_shapes(arch), state)
    else:
        fits = "the closest architecture is"
    if differences:
        first = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
        raise InputError(f"{path}: not a whole {arch or found} network ({first}); {fits} {found}")
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise InputError(f"{path}: {key} holds NaN or infinite weights; take an earlier checkpoint")
    model = build_model(found)
    model.load_state_dict(state, strict=False)  # strictness was checked above; num_batches_tracked may miss
    model.facts = _facts(content)
    return model.eval()


def read_facts(path):
    """The `facts` of load_checkpoint alone, without making the network. Raises InputError as read_checkpoint."""
    return _facts(read_checkpoint(path))


def _facts(content):
    ours = "arch" in content and isinstance(content.get("config"), dict) and isinstance(content.get("metrics"), dict)
    return {key: value for key, value in content.items() if key != "state_dict"} if ours else {}


def read_checkpoint(path):
    """The dict in a file that `torch.save` wrote, read without running anything from it.

    PyTorch's weights-only unpickler makes tensors and plain types. Every other class that the file
    names (Lightning callbacks, hyper-parameters) becomes an inert stand-in, so its package need not be
    installed and its code is not called. Files that name `os`, `sys` and the like are refused.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint file")
    try:
        try:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except ValueError:  # not a zip file: written by PyTorch before 1.6, or no checkpoint at all
            foreign = []
        try:
            content = _load_inert(path, foreign, _Inert)
        except pickle.UnpicklingError:  # perhaps a class of the file is a kind of dict, into which entries are put
            content = _load_inert(path, foreign, _InertDict)
    except Exception as error:  # a hostile or damaged file can fail in any way
        if isinstance(error, pickle.UnpicklingError) and "is blocked" in str(error):
            reason = f"it asks to run {str(error).split('GLOBAL ')[-1].split(' ')[0]}, so it was not loaded"
        else:
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


def _load_inert(path, names, stand_in):
    stand_ins = [(type(name.rpartition(".")[2], (stand_in,), {}), name) for name in names]
    with torch.serialization.safe_globals(stand_ins):
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


def _closest_architecture(state):
    """(name, differences) of the architecture with the fewest differences to the tensors."""
    best = None
    for arch in ARCHITECTURES:
        differences = _differences(_shapes(arch), state)
        if best is None or len(differences) < len(best[1]):
            best = arch, differences
        if not differences:
            break
    return best

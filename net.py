"""The AdaFace IR and IR-SE face recognition networks: structure, input, embeddings, checkpoints.

    model = load_checkpoint("pretrained/adaface_ir50_ms1mv2.ckpt")
    embedding, norm = model(to_input(crops))      # crops: (N, 112, 112, 3) uint8 RGB

State-dict keys and shapes equal those of `net.py` in AdaFace
(https://github.com/mk-minchul/AdaFace), so weights go both ways unchanged. The second half of
this file, under its own heading, holds what all scripts share: errors, JSON and CSV, the command
line, exit codes, interrupts, progress, the device.
"""

import argparse
import csv
import glob
import hashlib
import io
import json
import os
import re
import signal
import sys
import threading
import uuid
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterable
from configparser import RawConfigParser
from contextlib import contextmanager
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

LONGEST_NAME = 200  # bytes of a file name without its ending; file systems take 255 in all
CROP_SIZE = 112  # pixels, width and height of an aligned crop
# Images that pass the network at once. The activations of more would leave a CPU's caches.
IMAGES_AT_ONCE = {"cuda": 256, "cpu": 8}


class Architecture(NamedTuple):
    """The design of one of AdaFace's networks."""

    units: tuple  # residual units of each of the four stages
    channels: tuple  # channels of each stage
    bottleneck: bool  # whether a unit has three convolutions, as in networks of 152 layers and more
    squeeze_excitation: bool


BASIC = (64, 128, 256, 512)  # channels of the stages
WIDE = (256, 512, 1024, 2048)  # channels of the stages with bottleneck units
ARCHITECTURES = {
    "ir_18": Architecture((2, 2, 2, 2), BASIC, False, False),
    "ir_34": Architecture((3, 4, 6, 3), BASIC, False, False),
    "ir_50": Architecture((3, 4, 14, 3), BASIC, False, False),
    "ir_101": Architecture((3, 13, 30, 3), BASIC, False, False),
    "ir_152": Architecture((3, 8, 36, 3), WIDE, True, False),
    "ir_200": Architecture((3, 24, 36, 3), WIDE, True, False),
    "ir_se_50": Architecture((3, 4, 14, 3), BASIC, False, True),
    "ir_se_101": Architecture((3, 13, 30, 3), BASIC, False, True),
    "ir_se_152": Architecture((3, 8, 36, 3), WIDE, True, True),
    "ir_se_200": Architecture((3, 24, 36, 3), WIDE, True, True),
}


class SEBlock(nn.Module):
    """Squeeze-and-excitation: scales each channel by a weight made of the means of all channels."""

    def __init__(self, channels):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1, bias=False)

    def forward(self, x):
        means = x.mean((2, 3), keepdim=True)
        weights = self.fc2(self.fc1(means).relu()).sigmoid()
        return x * weights


def conv_bn(in_channels, out_channels, kernel, stride=1):
    """[convolution, BatchNorm]; with stride 1 the size stays the same."""
    padding = kernel // 2
    return [
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(out_channels),
    ]


class ResidualUnit(nn.Module):
    """`res_layer(x) + shortcut_layer(x)`; the last convolution of `res_layer` has the stride."""

    def __init__(self, in_channels, channels, stride, bottleneck, squeeze_excitation):
        super().__init__()
        if in_channels != channels:
            self.shortcut_layer = nn.Sequential(*conv_bn(in_channels, channels, 1, stride))
        elif stride > 1:
            self.shortcut_layer = nn.MaxPool2d(1, stride)
        else:
            # Upstream has MaxPool2d(1, 1), which gives the same bits but copies every element.
            self.shortcut_layer = nn.Identity()

        if bottleneck:
            middle = channels // 4
            layers = [
                nn.BatchNorm2d(in_channels),
                *conv_bn(in_channels, middle, 1),
                nn.PReLU(middle),
                *conv_bn(middle, middle, 3),
                nn.PReLU(middle),
                *conv_bn(middle, channels, 1, stride),
            ]
        else:
            layers = [
                nn.BatchNorm2d(in_channels),
                *conv_bn(in_channels, channels, 3),
                nn.PReLU(channels),
                *conv_bn(channels, channels, 3, stride),
            ]
        self.res_layer = nn.Sequential(*layers)
        if squeeze_excitation:
            self.res_layer.add_module("se_block", SEBlock(channels))

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class Backbone(nn.Module):
    """AdaFace's network, named as upstream names it: `input_layer`, `body` and `output_layer`.

    `forward(x)` is `head(features(x))`: x (N, 3, 112, 112) float, BGR in [-1, 1], gives the
    embedding (N, 512) of unit length and the norm (N, 1) that it had before, in float32 also under
    autocast. `arch` is the name of the architecture. `facts` holds what a checkpoint of ours said
    beside the weights (see `save_checkpoint`), and is empty for other networks.
    """

    def __init__(self, arch):
        super().__init__()
        design = ARCHITECTURES[arch]
        self.arch = arch
        self.facts = {}
        self.input_layer = nn.Sequential(*conv_bn(3, 64, 3), nn.PReLU(64))
        last_channels = design.channels[-1]
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(last_channels),
            nn.Dropout(0.4),
            nn.Flatten(),
            nn.Linear(last_channels * 7 * 7, 512),
            nn.BatchNorm1d(512, affine=False),
        )
        self.body = nn.Sequential(*residual_units(design))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.output_layer[3].bias)

    def features(self, x):
        """(N, 3, 112, 112) -> (N, C, 7, 7); C is 512, or 2048 for 152 and 200 layers."""
        return self.body(self.input_layer(x))

    def head(self, features):
        """(N, C, 7, 7) -> (embedding (N, 512), norm (N, 1)), float32."""
        return to_unit_length(self.output_layer(features))

    def forward(self, x):
        return self.head(self.features(x))


def residual_units(design):
    """The residual units of all stages; the first unit of a stage halves width and height."""
    units = []
    in_channels = 64
    for count, channels in zip(design.units, design.channels, strict=True):
        for position in range(count):
            stride = 2 if position == 0 else 1
            unit = ResidualUnit(
                in_channels, channels, stride, design.bottleneck, design.squeeze_excitation
            )
            units.append(unit)
            in_channels = channels
    return units


def to_unit_length(raw):
    """(N, 512) -> (embedding (N, 512) of unit length, norm (N, 1)), float32."""
    raw = raw.float()
    norm = torch.linalg.vector_norm(raw, dim=1, keepdim=True)
    # Upstream divides by the bare norm. A vector of exact zeros (a dead network) would give NaN.
    return raw / norm.clamp_min(torch.finfo(torch.float32).tiny), norm


def build_model(name: str) -> Backbone:
    """A network of ARCHITECTURES with random weights; raises InputError for an unknown name."""
    if name not in ARCHITECTURES:
        raise InputError(f"unknown architecture {name!r}: choose from {', '.join(ARCHITECTURES)}")
    return Backbone(name)


def to_input(crops: np.ndarray | torch.Tensor) -> torch.Tensor:
    """The one conversion from aligned crops to what the network sees.

    crops: (N, 112, 112, 3) uint8 **RGB**. Returns float32 **BGR** (N, 3, 112, 112), in [-1, 1] by
    `(x - 127.5) / 127.5`, on the same device and as channels_last. Raises TypeError for another
    dtype and ValueError for another shape.
    """
    crops = torch.as_tensor(crops)
    if crops.dtype != torch.uint8:
        raise TypeError(f"crops must be uint8 RGB, not {crops.dtype}")
    if crops.shape[1:] != (CROP_SIZE, CROP_SIZE, 3):
        raise ValueError(f"crops must be (N, 112, 112, 3), not {tuple(crops.shape)}")
    bgr = crops.permute(0, 3, 1, 2).flip(1)
    return bgr.float().sub_(127.5).div_(127.5)


def embed(model, crops, device, heads=None, batch_size=None, description=None, flip=False):
    """The embeddings of aligned crops, in float32: one (N, 512) tensor on `device` for each head.

    crops: (N, 112, 112, 3) uint8 RGB tensor. heads: embedding layers (`output_layer`) of networks
    that share the backbone of `model`, which then runs once for all; by default the model's own.
    batch_size: images at once. description: the label of a progress bar. flip: embed each image
    and its mirror image and take the direction of the sum of both vectors (as upstream fuses
    them: AdaFace, CVPR 2022). Embeddings of a dead network are returned as they are; see
    `check_alive`.
    """
    heads = heads or [model.output_layer]
    batch_size = batch_size or IMAGES_AT_ONCE[device.type]
    model.to(device, memory_format=torch.channels_last)
    for head in heads:
        head.to(device)
    results = [torch.empty((len(crops), 512), device=device) for _ in heads]
    starts = range(0, len(crops), batch_size)
    with torch.inference_mode():
        for start in progress(starts, description, "batch", disable=description is None):
            interrupt.raise_if_asked()
            batch = slice(start, start + batch_size)
            images = to_input(crops[batch].to(device, non_blocking=True))
            features = model.features(images)
            mirrored_features = model.features(images.flip(3)) if flip else None
            for head, result in zip(heads, results, strict=True):
                raw = head(features)
                if flip:
                    raw = raw + head(mirrored_features)
                result[batch], _ = to_unit_length(raw)
    return results


def check_alive(embeddings, network, way_out="take another checkpoint"):
    """Raise InputError if embeddings (N, 512) come from a dead network.

    That is: one of them is zero or not finite, or all of them are the same. `network` names it and
    `way_out` says what to do, for the message.
    """
    norms = torch.linalg.vector_norm(embeddings, dim=1)  # each is 1 if the network is alive
    if not ((norms - 1).abs() < 1e-3).all():  # written so that NaN is refused too
        reason = "the norm of an embedding is zero or not finite"
        raise InputError(f"{network} is dead: {reason}; {way_out}")
    # The mean of different unit vectors is shorter than 1; 5e-7 is float32's rounding.
    length_of_mean = torch.linalg.vector_norm(embeddings.mean(0))
    if len(embeddings) > 1 and length_of_mean > 1 - 5e-7:
        raise InputError(f"{network} is dead: all its embeddings are the same; {way_out}")


def weights_sha256(model, backbone_only=False):
    """A hash of a network's parameters and statistics; backbone_only: leave out `output_layer`."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        if backbone_only and key.startswith("output_layer."):
            continue
        if key.endswith("num_batches_tracked"):  # a counter, which old files do not have
            continue
        digest.update(value.cpu().contiguous().numpy())
    return digest.hexdigest()


# ---- checkpoints ---------------------------------------------------------------------------------
NETWORK_KEY = re.compile(r"(?:^|\.)((?:input_layer|body|output_layer)\..+)")
# Where a folder is named, its checkpoints are the files that end so.
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors")
OTHER_FILES = {  # how files that are no checkpoints begin, what they are, and the way out
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with `git lfs pull`",
    b"<": "a web page: download the file itself",
    b"\x08": "an ONNX model: take the PyTorch checkpoint that it was made from",
}
SAFETENSORS_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


def save_checkpoint(path: str | Path, model: Backbone, **facts) -> None:
    """Write `model` to `path`, atomically, as a dict that this file and upstream's inference read.

    The dict holds "state_dict" (keys `model.<key>`), "arch", "epoch", "config", "metrics" and the
    other `facts`, all of plain types and tensors, so that it loads with `weights_only=True`.
    """
    weights = {f"model.{key}": value.detach().cpu() for key, value in model.state_dict().items()}
    content = {
        "state_dict": weights,
        "arch": model.arch,
        "epoch": None,
        "config": {},
        "metrics": {},
    }
    write_checkpoint(path, content | facts)


def write_checkpoint(path, content):
    """Write the dict of a checkpoint, atomically; an OSError keeps the system's reason."""
    data = io.BytesIO()  # writing to a file, torch.save hides the reason of a failure
    torch.save(content, data)
    with replacing(path) as temporary:
        temporary.write_bytes(data.getbuffer())


def load_checkpoint(
    path: str | Path, arch: str | None = None, channels: str | None = None
) -> Backbone:
    """Read a network from a checkpoint: on the CPU, float32, in eval mode, for BGR input.

    Reads AdaFace's Lightning `.ckpt`, our `.pth`, safetensors, and any nested dict that holds
    exactly one network, under any prefix. The `facts` of the result are what `save_checkpoint`
    wrote. arch: the expected architecture, None for any. channels: "RGB" or "BGR", the input of a
    network of CVLface (keys `net.*`); by default what the yaml beside the file says. Raises
    InputError for all else.
    """
    return network_of(path, read_checkpoint(path), arch, channels)


def network_of(path, content, arch=None, channels=None):
    """The network in the content of a checkpoint file, as `load_checkpoint` returns it."""
    # last.pth has the lineage of the network that its run began with, without the people of the
    # run itself, so evaluation would not notice if some of them were test people.
    if "lineage" in content:
        message = "this is the state from which --resume goes on"
        raise InputError(f"{path}: {message}; take the checkpoint of that run, in --output_dir")
    prefix, weights = find_the_only_network(path, content)
    if re.search(r"(^|[./])net\.$", prefix):  # a network of CVLface
        turn_into_bgr(path, weights, channels)
    model = build_model(find_architecture(path, weights, arch))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        problem = f"not a whole {model.arch} network"
        # Units of another design, such as face.evoLVe's, have the same names but fewer layers.
        if "body.1.res_layer.5.weight" not in weights:
            problem = "its residual units are not AdaFace's"
        message = f"{path}: {problem} ({reason} ...); take a whole checkpoint of AdaFace"
        raise InputError(message) from None
    check_weights(path, model)
    if "arch" in content and isinstance(content.get("config"), dict):
        model.facts = {key: value for key, value in content.items() if key != "state_dict"}
    return model.eval()


def find_the_only_network(path, content):
    """(prefix, {key: tensor}) of the one network in a checkpoint's content."""
    networks = find_networks(content)
    if not networks:
        raise InputError(
            f"{path}: no AdaFace network in it (keys input_layer.*); "
            "if it holds a whole module, save that module's state_dict()"
        )
    if len(networks) > 1:
        names = ", ".join(networks)
        raise InputError(f"{path}: several networks in it ({names}); save one in a file of its own")
    ((prefix, weights),) = networks.items()
    return prefix, weights


def find_networks(content, entry=""):
    """{"entry/prefix": {key: tensor}} of all AdaFace networks in a checkpoint's nested dicts."""
    networks = {}
    for key, value in content.items():
        if isinstance(value, dict):
            networks |= find_networks(value, f"{entry}{key}/")
            continue
        match = NETWORK_KEY.search(str(key))
        if match and isinstance(value, torch.Tensor):
            prefix = entry + key[: match.start(1)]
            networks.setdefault(prefix, {})[match[1]] = value
    return networks


def turn_into_bgr(path, weights, channels):
    """Make the first layer of a network of CVLface take BGR, if it takes RGB."""
    if channels is None:
        yamls = Path(path).parent.glob("*.yaml")
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in yamls]
        found = set(re.findall(r"color_space:\W*(RGB|BGR)", " ".join(texts)))
        if len(found) != 1:
            raise InputError(
                f"{path}: a network of CVLface, which takes RGB or BGR; "
                "put its model.yaml beside it, or say --channels RGB or BGR"
            )
        (channels,) = found
    if channels not in ("RGB", "BGR"):
        raise InputError(f"{path}: channels must be RGB or BGR, not {channels!r}")
    if channels == "RGB" and "input_layer.0.weight" in weights:
        weights["input_layer.0.weight"] = weights["input_layer.0.weight"].flip(1)


def find_architecture(path, weights, expected):
    """The name of the architecture whose tensors these are; InputError if another is expected."""
    n_units = len({key.split(".")[1] for key in weights if key.startswith("body.")})
    has_se = any(".se_block." in key for key in weights)
    for name, design in ARCHITECTURES.items():
        if sum(design.units) == n_units and design.squeeze_excitation == has_se:
            if expected not in (None, name):
                raise InputError(
                    f"{path}: its tensors fit {name}, not {expected}; say --arch {name}"
                )
            return name
    units = f"{n_units} residual units {'with' if has_se else 'without'} squeeze-and-excitation"
    raise InputError(f"{path}: no network of AdaFace has {units}")


def check_weights(path, model):
    """Raise InputError for values that are NaN or infinite, and for negative variances."""
    for key, value in model.state_dict().items():
        impossible = key.endswith("running_var") and (value < 0).any()
        if impossible or not torch.isfinite(value).all():
            raise InputError(
                f"{path}: {key} holds NaN, infinite or impossible values; take another checkpoint"
            )


def read_checkpoint(path):
    """The dict in a file of `torch.save` or safetensors; nothing from the file is run.

    PyTorch's weights-only unpickler makes tensors and plain types, and refuses files that name
    `os`, `sys` and the like. Any other class becomes an inert stand-in: no package is needed, no
    code called. Raises InputError for a file that cannot be read.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint file")
    with open(path, "rb") as file:
        beginning = file.read(64)
    # A safetensors file begins with 8 bytes, the length of its header, and the header's "{". The
    # length may look like the beginning of one of OTHER_FILES.
    is_safetensors = beginning[8:9] == b"{"
    if not is_safetensors:
        for other, what in OTHER_FILES.items():
            if beginning.lstrip().startswith(other):
                raise InputError(f"{path}: {what}")
    try:
        if is_safetensors:
            content = read_safetensors(path)
        else:
            content = unpickle(path, is_zip=beginning.startswith(b"PK"))
    except Exception as error:  # a hostile or damaged file can fail in any way
        raise InputError(f"{path}: {explain_unreadable(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {type(content).__name__}, not a checkpoint's dict")
    return content


def explain_unreadable(error):
    """Why a checkpoint cannot be read, and what to do, in one line."""
    # PyTorch's reason stands behind its advice to load the file without weights_only.
    reason = str(error).rpartition("WeightsUnpickler error: ")[2]
    reason = " ".join(reason.split())[:200] or type(error).__name__
    way_out = "download or copy it again"
    if "torchscript" in reason.lower():
        way_out = "save torch.jit.load(FILE).state_dict() and take that"
    return f"not a readable checkpoint, {way_out} ({reason})"


def unpickle(path, is_zip):
    """The content of a file of `torch.save`, with stand-ins for classes that PyTorch refuses.

    is_zip: whether the file is a zip archive, as since PyTorch 1.6. An older file with such classes
    is refused.
    """
    stand_ins = []
    if is_zip:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins = [(make_stand_in(name), name) for name in foreign]
    with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True)


def make_stand_in(name):
    """An inert class in place of one that a checkpoint names."""
    if name.startswith("numpy."):  # PyTorch gives a numpy object its state, which is ignored
        methods = {
            "__init__": lambda self, *_, **__: None,
            "__setstate__": lambda self, _: None,
        }
    else:  # an OrderedDict takes the items and the attributes that the file gives an object
        methods = {"__new__": lambda cls, *_, **__: OrderedDict()}
    return type(name, (), methods)


def read_safetensors(path):
    """{key: tensor} of a safetensors file: the length of a JSON header, the header, the tensors."""
    data = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for key, entry in json.loads(data[8:start]).items():
        if key == "__metadata__":
            continue
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        begin, end = entry["data_offsets"]
        values = torch.frombuffer(data[start + begin : start + end], dtype=dtype)
        tensors[key] = values.reshape(entry["shape"])
    return tensors


def list_checkpoints(names):
    """The checkpoint files that `names` mean, each once, in their order.

    A name is a file, a folder, or a pattern with `*`, which some shells leave to the program.
    """
    files = {}
    for name in names:
        if Path(name).is_dir():
            inside = sorted(Path(name).iterdir())
            visible = [file for file in inside if not file.name.startswith(".")]
            found = [str(file) for file in visible if file.suffix in CHECKPOINT_SUFFIXES]
            problem = f"no file ending in {', '.join(CHECKPOINT_SUFFIXES)} there"
        elif "*" in name:
            found = sorted(glob.glob(name))
            problem = "no file has such a name"
        else:
            found = [name]
        if not found:
            raise InputError(f"{name}: {problem}")
        for file in found:
            files.setdefault(os.path.abspath(file), file)
    return list(files.values())


# ==== shared by all scripts =======================================================================
# ---- errors and files ----------------------------------------------------------------------------
class InputError(ValueError):
    """A file, an entry or a setting that a user gave is wrong; the message is one line for them."""


class OneProcessError(InputError):
    """An InputError that may come up in one of torchrun's processes alone; see `fail`."""


@contextmanager
def replacing(path):
    """Yield a temporary path; it becomes `path` when the block ends without an error.

    So no reader ever sees half a file, and a failure leaves the old file as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # the name that a user knows
        raise


def read_json(path, expected, kind=dict):
    """The object (or array, kind=list) in a JSON file, which is not empty and has no key twice.

    The file is UTF-8, with or without a byte order mark. `expected` describes the right content.
    Raises InputError for anything else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=dict_without_repeated_keys)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: {reason}; expected a JSON file, {expected}") from error
    except ValueError as error:  # also what is not UTF-8
        raise InputError(f"{path}: not valid JSON: {error}; expected {expected}") from error
    if not isinstance(content, kind) or not content:
        raise InputError(f"{path}: expected {expected}")
    return content


def read_csv_rows(path, expected):
    """The rows of a CSV file, each a list of strings, without those that hold no text.

    The file is UTF-8, with or without a byte order mark. `expected` describes the right content.
    Raises InputError for a file that cannot be read.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file, skipinitialspace=True))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; {expected}") from error
    except (ValueError, csv.Error) as error:  # ValueError: what is not UTF-8
        raise InputError(f"{path}: {error}; {expected}") from error
    # Spreadsheets leave rows of commas alone at the end.
    return [row for row in rows if any(cell.strip() for cell in row)]


def read_csv(path, columns, optional=()):
    """The rows of a CSV file as dicts, which have at least these columns; InputError otherwise.

    The file may write the titles of these and of the optional columns in capitals.
    """
    expected = f"expected a CSV file in UTF-8 with the columns {', '.join(columns)}"
    rows = read_csv_rows(path, expected)
    spelling = {column.casefold(): column for column in (*columns, *optional)}
    first_row = rows.pop(0) if rows else []
    titles = []
    for title in first_row:
        title = title.strip()
        titles.append(spelling.get(title.casefold(), title))
    missing = set(columns) - set(titles)
    if missing or not rows:
        found = ", ".join(titles) or "none"
        raise InputError(f"{path}: {expected} and at least one row; its columns are: {found}")
    for column in spelling.values():  # others may be empty columns, as spreadsheets write them
        if titles.count(column) > 1:
            raise InputError(f"{path}: two columns have one title, {column}; rename one")
    for number, row in enumerate(rows, 1):
        if len(row) > len(titles):
            way_out = "put values with a comma in quotation marks"
            raise InputError(f"{path}: row {number} has {len(row)} values; {way_out}")
    return [dict(zip_longest(titles, row, fillvalue="")) for row in rows]


def dict_without_repeated_keys(entries):
    """The dict of a JSON object's entries [(key, value), ...]; ValueError if a key comes twice."""
    for key, count in Counter(key for key, _ in entries).items():
        if count > 1:
            raise ValueError(f"the key {key!r} is there twice; merge the two entries")
    return dict(entries)


def write_json(path, content):
    """Write `content` as JSON, atomically; ValueError for NaN, which JSON does not have."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path, rows):
    """Write dicts that have the same keys as a table, atomically."""
    # IDs and paths may hold bytes that are not UTF-8, as Python's surrogates.
    form = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
    with replacing(path) as temporary, open(temporary, "w", **form) as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def file_name(text):
    """A file name for any text: never a path, and different for different texts.

    All but letters, digits, "_", "-", "." and space become %XX, and an empty text becomes "%". A
    name of more bytes than file systems take is cut, and gets "+" and a hash of the whole text.
    """
    if text == "":
        return "%"
    if text in (".", ".."):
        return text.replace(".", "%2E")
    name = re.sub(r"[^\w .-]", lambda found: quote(found[0], safe="", errors="surrogatepass"), text)
    encoded = name.encode()
    if len(encoded) > LONGEST_NAME:
        ending = f"+{hashlib.sha256(encoded).hexdigest()[:16]}"
        beginning = encoded[: LONGEST_NAME - len(ending)]
        name = beginning.decode(errors="ignore") + ending
    return name


def relative_path(path, folder):
    """`path` relative to `folder`, with slashes on every system.

    Where there is no such path, as between two drives of Windows, the full path.
    """
    try:
        relative = os.path.relpath(path, folder)
    except ValueError:
        relative = os.path.abspath(path)
    return Path(relative).as_posix()


def file_names(paths, home="."):
    """{path: file name}: the stem of each path as a file name, different for different paths.

    Paths that share a stem also get "+" and 8 digits of a hash of the path relative to `home`, so
    that names depend neither on where the data set lies nor on the order of its files.
    """
    stems = {path: Path(path).stem for path in paths}
    counts = Counter(stem.casefold() for stem in stems.values())
    names = {}
    for path, stem in stems.items():
        names[path] = file_name(stem)
        if counts[stem.casefold()] > 1:
            relative = relative_path(path, home)
            digest = hashlib.sha256(ascii(relative).encode()).hexdigest()
            names[path] += f"+{digest[:8]}"  # file_name leaves no "+" of the stem's own
    return names


# ---- command line --------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError, in one line, for a wrong flag."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)

    def format_help(self):
        """The help, without the defaults that say nothing."""
        return re.sub(r"\s+\(default:\s+(None|False|\[\])\)", "", super().format_help())

    def error(self, message):
        raise InputError(f"{message}; --help lists all flags")


def number_between(kind, low, high):
    """An argparse type: a number of `kind` (int or float) from `low` to `high`, both included."""
    noun = "a whole number" if kind is int else "a number"

    def parse(text):
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            message = f"must be {noun} from {low} to {high}, not {text!r}"
            raise argparse.ArgumentTypeError(message)
        return number

    return parse


def boolean(text):
    """An argparse type: True or False in any usual spelling."""
    words = {**RawConfigParser.BOOLEAN_STATES, "t": True, "y": True, "f": False, "n": False}
    word = text.strip().lower()
    if word not in words:
        raise argparse.ArgumentTypeError(f"must be True or False, not {text!r}")
    return words[word]


def read_flag(args, flag, read, *arguments):
    """Call `read` with the file that a flag names; an InputError then begins with the flag."""
    try:
        return read(getattr(args, flag), *arguments)
    except InputError as error:
        raise InputError(f"--{flag} {error}") from error


# ---- exit codes and interrupts -------------------------------------------------------------------
class Interrupt:
    """Whether SIGINT (Ctrl-C) or SIGTERM (a scheduler) has asked this process to stop.

    Long loops ask between two items, so nothing stops half-way through a file. A second signal
    stops the process wherever it is.
    """

    def __init__(self):
        self.asked = False

    def raise_if_asked(self):
        if self.asked:
            raise KeyboardInterrupt

    @contextmanager
    def listening(self):
        """Take the signals while the block runs; only Python's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.asked = False  # what runs next in this process was not asked to stop

    def _note(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


interrupt = Interrupt()


def run_script(name, work, interrupted_message, memory_advice="take another --device"):
    """Run `work()` as the main of the script `name`, with interrupts; returns the exit code.

    0: done. 2: wrong input, a full disk or too little memory, told in one line on stderr. 130:
    interrupted, told in the line `interrupted_message`. memory_advice: what to do if memory is
    short. Any other exception is a bug and is raised.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name may have letters that the output does not know
            stream.reconfigure(errors="backslashreplace")
    with interrupt.listening():
        return report_errors(name, work, interrupted_message, memory_advice)


def report_errors(name, work, interrupted_message, memory_advice):
    """Run `work()`; returns the exit code and says what went wrong, as `run_script` describes."""
    try:
        work()
    except KeyboardInterrupt:
        return fail(name, 130, interrupted_message)
    except InputError as error:
        return fail(name, 2, str(error), every_process=isinstance(error, OneProcessError))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return fail(name, 2, f"out of memory: {memory_advice}", every_process=True)
    except OSError as error:
        if error.errno is None:  # not from the system
            raise
        file = error.filename2 or error.filename  # of a renaming: the new name
        message = f"{file}: {error.strerror}" if file else str(error.strerror)
        return fail(name, 2, message, every_process=True)
    return 0


def is_out_of_memory(error):
    """Whether an error says that the memory of a GPU or the main memory is short."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The words of cuDNN and cuBLAS, and those of PyTorch on a CPU.
    return "ALLOC_FAILED" in str(error) or "DefaultCPUAllocator" in str(error)


def fail(name, code, message, every_process=False):
    """Print the one line of an error on stderr; returns the exit code.

    All processes of torchrun meet the same wrong input, so only the first one prints the line.
    every_process: print it in whichever process this is, since a full disk or too little memory may
    be met by one alone. A process that is not yet connected to the others prints every line.
    """
    is_first_or_alone = not dist.is_initialized() or os.environ.get("RANK", "0") == "0"
    if is_first_or_alone or every_process:
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return code


def run_main(main):
    """End the process with the exit code of a script's `main`."""
    code = main()
    if code == 0 and dist.is_initialized():
        # A thread of gloo that frees a tensor while Python shuts down would abort the process.
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)
    sys.exit(code)


# ---- progress, device, processes -----------------------------------------------------------------
def progress(items: Iterable, description: str | None, unit: str, **options) -> Iterable:
    """tqdm's bar over `items`; where there is no terminal, a line every 30 seconds."""
    is_terminal = sys.stderr.isatty()
    if not is_terminal:
        bar = "{l_bar}{bar:20}{r_bar}\n"
        options |= {"delay": 30, "mininterval": 30, "maxinterval": 30, "bar_format": bar}
    return tqdm(items, description, unit=unit, leave=not is_terminal, **options)


def pick_device(name="auto"):
    """The torch.device of "auto", "cpu", "cuda" or "cuda:N", made the process's current one.

    "auto" is cuda if there is a GPU that this PyTorch can use, else cpu. TF32 is turned off, since
    figures are computed in full float32. Raises InputError for a device that is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    full_name = name
    if name == "cuda":
        full_name = "cuda:0"
    elif name == "auto":
        full_name = "cuda:0" if count else "cpu"
    if full_name not in ("cpu", *(f"cuda:{i}" for i in range(count))):
        choices = "must be auto, cpu, cuda or cuda:N"
        raise InputError(f"--device {name}: {choices}; PyTorch sees {count} CUDA devices")
    if name == "auto" and full_name == "cpu" and torch.backends.mps.is_available():
        print("warning: not using an Apple GPU, but the CPU")
    if full_name != "cpu":
        reason = try_cuda(full_name)
        if reason and name != "auto":
            raise InputError(f"--device {name}: cannot be used ({reason}); take cpu")
        if reason:
            print(f"warning: not using {torch.cuda.get_device_name(0)} ({reason}), but the CPU")
            full_name = "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(full_name)


def try_cuda(name):
    """Compute something on a CUDA device and select it; returns why that fails, or None."""
    try:
        torch.cuda.set_device(name)
        torch.ones(1, device=name).add(1)
    except RuntimeError as error:
        # Such as "no kernel image is available for execution on the device".
        return str(error).splitlines()[0]
    return None


TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what it sets


class Processes:
    """The processes that torchrun started, of which this is one; alone without torchrun.

    `rank` is this one's number, `world` how many there are, `device` where this one computes, and
    `is_main` whether this is the first one, which prints and writes. All processes must call the
    methods in the same order, except `share`.
    """

    def __init__(self, device="auto"):
        self.rank = 0
        self.world = 1
        if all(os.environ.get(name) for name in TORCHRUN):  # a scheduler may set some of them
            self.rank = int(os.environ["RANK"])
            self.world = int(os.environ["WORLD_SIZE"])
        self.is_main = self.rank == 0
        if self.world == 1:
            self.device = pick_device(device)
            return
        has_gpus = device in ("auto", "cuda") and torch.cuda.is_available()
        self.device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if has_gpus else device)
        if not dist.is_initialized():
            # NCCL cannot serve two processes on one GPU. One process may align hours longer than
            # another, so none gives up early.
            backend = "cpu:gloo,cuda:nccl" if has_gpus else "gloo"
            dist.init_process_group(backend, timeout=timedelta(days=2))
            self.wait()

    def share(self, n: int) -> slice:
        """This process's part of range(n)."""
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def gather(self, part, n):
        """The whole (n, ...) tensor of which each process has its `share(n)`.

        Gradients flow back to this process's part only; see `sum_gradients`.
        """
        if self.world == 1:
            return part
        own = self.share(n)
        whole = part.new_zeros((n, *part.shape[1:]))
        whole[own] = part.detach()
        dist.all_reduce(whole)
        return torch.cat([whole[: own.start], part, whole[own.stop :]])

    def sum_gradients(self, parameters):
        """Replace the gradients of the parameters by their sums over the processes."""
        if self.world == 1:
            return
        gradients = [parameter.grad for parameter in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])  # one transfer for all
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, total in zip(gradients, parts, strict=True):
            gradient.copy_(total.view_as(gradient))

    def raise_if_interrupted(self):
        """Raise KeyboardInterrupt in all processes if one of them was asked to stop."""
        if self.world == 1:
            interrupt.raise_if_asked()
            return
        asked = torch.tensor([float(interrupt.asked)])  # on the CPU: nothing waits for a GPU
        dist.all_reduce(asked)
        if asked > 0:
            raise KeyboardInterrupt

    def collect(self, value):
        """The list of all processes' values, which may be anything that pickles."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value):
        """The main process's value, in every process."""
        return self.collect(value)[0]

    def wait(self):
        """Wait until all processes are here."""
        self.collect(None)

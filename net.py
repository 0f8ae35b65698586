"""The AdaFace IR and IR-SE face recognition networks: structure, input, embeddings, checkpoints.

    model = load_checkpoint("pretrained/adaface_ir50_ms1mv2.ckpt")
    embedding, norm = model(to_input(crops))      # crops: (N, 112, 112, 3) uint8 RGB

State-dict keys and shapes equal those of `net.py` in AdaFace (https://github.com/mk-minchul/AdaFace), so weights go
both ways unchanged. At the end stands what all files share: errors, atomic writing, the device, torchrun's processes.
"""

import glob
import hashlib
import io
import json
import os
import re
import signal
import sys
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

CROP_SIZE = 112  # pixels, width and height of an aligned crop
CHUNK = {"cuda": 256, "cpu": 8}  # images that pass the network at once: activations of more leave a CPU's caches

# name: (units per stage, channels per stage, bottleneck units, squeeze-and-excitation)
_UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 101: (3, 13, 30, 3), 152: (3, 8, 36, 3)}
_UNITS[200] = (3, 24, 36, 3)
_CHANNELS = {False: (64, 128, 256, 512), True: (256, 512, 1024, 2048)}  # of basic units, of bottlenecks
ARCHITECTURES = {f"ir_{n}": (units, _CHANNELS[n >= 152], n >= 152, False) for n, units in _UNITS.items()}
ARCHITECTURES |= {f"ir_se_{n}": (*ARCHITECTURES[f"ir_{n}"][:3], True) for n in (50, 101, 152, 200)}


class SEBlock(nn.Module):
    """Squeeze-and-excitation: every channel times a weight computed from all channels' means."""

    def __init__(self, channels):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1, bias=False)

    def forward(self, x):
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class ResidualUnit(nn.Module):
    """`res_layer(x) + shortcut_layer(x)`; the last convolution of `res_layer` carries the stride."""

    def __init__(self, in_channels, channels, stride, bottleneck, se):
        super().__init__()

        def conv(i, o, kernel, stride=1):
            return [nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(o)]

        if in_channels != channels:
            self.shortcut_layer = nn.Sequential(*conv(in_channels, channels, 1, stride))
        else:  # upstream's MaxPool2d(1, 1) gives the same bits, but copies and keeps an index of every element
            self.shortcut_layer = nn.MaxPool2d(1, stride) if stride > 1 else nn.Identity()
        if bottleneck:
            middle = channels // 4
            layers = [*conv(in_channels, middle, 1), nn.PReLU(middle), *conv(middle, middle, 3), nn.PReLU(middle)]
            layers += conv(middle, channels, 1, stride)
        else:
            layers = [*conv(in_channels, channels, 3), nn.PReLU(channels), *conv(channels, channels, 3, stride)]
        self.res_layer = nn.Sequential(nn.BatchNorm2d(in_channels), *layers)
        if se:
            self.res_layer.add_module("se_block", SEBlock(channels))

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


class Backbone(nn.Module):
    """AdaFace's network; `arch` is its name, `facts` what a checkpoint said beside the weights (see load_checkpoint).

    `forward(x)` = `head(features(x))`: x (N, 3, 112, 112) float, BGR in [-1, 1] -> (embedding (N, 512) of unit length,
    norm (N, 1)), float32 also under autocast.
    """

    def __init__(self, arch):
        super().__init__()
        units, channels, bottleneck, se = ARCHITECTURES[arch]
        self.arch, self.facts = arch, {}
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        layers = [nn.BatchNorm2d(channels[-1]), nn.Dropout(0.4), nn.Flatten(), nn.Linear(channels[-1] * 7 * 7, 512)]
        self.output_layer = nn.Sequential(*layers, nn.BatchNorm1d(512, affine=False))
        body = []
        for count, before, after in zip(units, (64, *channels[:-1]), channels, strict=True):
            body.append(ResidualUnit(before, after, 2, bottleneck, se))
            body += [ResidualUnit(after, after, 1, bottleneck, se) for _ in range(count - 1)]
        self.body = nn.Sequential(*body)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.output_layer[3].bias)

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
    """A network of ARCHITECTURES with random weights, Kaiming normal (fan out); raises InputError for other names."""
    if name not in ARCHITECTURES:
        raise InputError(f"unknown architecture {name!r}: choose from {', '.join(ARCHITECTURES)}")
    return Backbone(name)


def to_input(crops):
    """The one conversion from aligned crops to what the network sees.

    crops: (N, 112, 112, 3) uint8 **RGB**, array or tensor. Returns float32 **BGR** (N, 3, 112, 112) on the same device,
    `(x - 127.5) / 127.5`, so in [-1, 1], as channels_last. Raises TypeError or ValueError for another type or shape.
    """
    crops = torch.as_tensor(crops)
    if crops.dtype != torch.uint8:
        raise TypeError(f"crops must be uint8 RGB, not {crops.dtype}")
    if crops.shape[1:] != (CROP_SIZE, CROP_SIZE, 3):
        raise ValueError(f"crops must be (N, 112, 112, 3), not {tuple(crops.shape)}")
    return crops.permute(0, 3, 1, 2).flip(1).float().sub_(127.5).div_(127.5)


def embed(models, crops, device, batch_size=None, description=None, flip=False):
    """One (N, 512) float32 tensor on `device` for each of `models`, of uint8 RGB crops (N, 112, 112, 3).

    The models differ in `output_layer` alone: the backbone of the first runs once per image, in float32. batch_size:
    images at once; description: label of a progress bar; flip: upstream's fusion, the unit vector of the embeddings of
    image and mirror image, each times its norm (AdaFace, CVPR 2022). A dead network is found by check_alive.
    """
    batch_size = batch_size or CHUNK[device.type]
    models[0].to(device, memory_format=torch.channels_last)
    for model in models:
        model.output_layer.to(device)
    embeddings = torch.empty((len(models), len(crops), 512), device=device)
    with torch.inference_mode():
        for i in progress(range(0, len(crops), batch_size), description, "batch", disable=not description):
            x = to_input(crops[i : i + batch_size].to(device, non_blocking=True))
            views = [models[0].features(view) for view in ([x, x.flip(3)] if flip else [x])]
            for model, result in zip(models, embeddings, strict=True):
                found = [model.head(view) for view in views]
                result[i : i + batch_size] = F.normalize(sum(e * norm for e, norm in found)) if flip else found[0][0]
    return list(embeddings)


def backbone_sha256(model):
    """A hash of all parameters and statistics of a Backbone but those of `output_layer`."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        if not key.startswith("output_layer."):
            digest.update(value.cpu().contiguous().numpy())
    return digest.hexdigest()


def check_alive(embeddings, what, way_out="take another checkpoint"):
    """Raise InputError if embeddings (N, 512) are of a dead network: one is zero or NaN, or all are the same."""
    if not ((torch.linalg.vector_norm(embeddings, dim=1) - 1).abs() < 1e-3).all():
        raise InputError(f"{what} is dead: the norm of an embedding is zero or not finite; {way_out}")
    if len(embeddings) > 1 and embeddings.mean(0).square().sum() > 1 - 1e-6:
        raise InputError(f"{what} is dead: all embeddings have fallen together; {way_out}")


NETWORK_KEY = re.compile(r"(?:^|\.)((?:input_layer|body|output_layer)\..+)")
SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors")  # of the checkpoints in a folder
OTHER_FILES = {  # how files begin that are no checkpoints, what they are, and the way out
    b"version https://git-lfs": "a Git LFS pointer, not the file: fetch that with `git lfs pull`",
    b"<": "a web page, not the file: download the file itself",
    b"\x08": "an ONNX model: take the PyTorch checkpoint that it was made from",
}


def save_checkpoint(path, model, **facts):
    """Write `model` to `path`, atomically, as a dict that this file and upstream's own inference read.

    It holds "state_dict" (keys `model.<key>`), "arch", "epoch", "config", "metrics" and the other `facts`; of plain
    types and tensors, so that it loads with `weights_only=True`.
    """
    state = {f"model.{key}": value.detach().cpu() for key, value in model.state_dict().items()}
    content = {"state_dict": state, "arch": model.arch, "epoch": None, "config": {}, "metrics": {}, **facts}
    write_checkpoint(path, content)


def write_checkpoint(path, content):
    """Write the dict of a checkpoint, atomically; OSError says what the system says."""
    data = io.BytesIO()  # PyTorch's own writing hides the reason, such as a full disk
    torch.save(content, data)
    with replacing(path) as temporary:
        temporary.write_bytes(data.getbuffer())


def load_checkpoint(path, arch=None, channels=None):
    """Read a network from a checkpoint; returns it on the CPU, float32, in eval mode, for BGR.

    Reads AdaFace's Lightning `.ckpt`, our `.pth`, safetensors, and any nested dict with exactly one network, under any
    prefix. Its `facts` are what save_checkpoint wrote, or {}. Networks of CVLface (keys `net.*`) take RGB or BGR, as
    `channels` says or a yaml beside the file (`color_space: 'RGB'`). Raises InputError for anything else.
    """
    content = read_checkpoint(path)
    networks = find_networks(content)
    if not networks:
        raise InputError(f"{path}: no AdaFace network in it (keys input_layer.*); of a module save its state_dict()")
    if len(networks) > 1:
        raise InputError(f"{path}: several networks in it ({', '.join(networks)}); save one in a file of its own")
    ((name, state),) = networks.items()
    if re.search(r"(^|[./])net\.$", name):
        yamls = " ".join(p.read_text() for p in sorted(Path(path).parent.glob("*.yaml")))
        channels = channels or "/".join({*re.findall(r"color_space:\W*(RGB|BGR)", yamls)})
        if channels not in ("RGB", "BGR"):
            raise InputError(f"{path}: of CVLface; put its model.yaml beside it, or say --channels RGB or BGR")
        if channels == "RGB" and "input_layer.0.weight" in state:
            state["input_layer.0.weight"] = state["input_layer.0.weight"].flip(1)
    units = len({key.split(".")[1] for key in state if key.startswith("body.")})
    se = any(".se_block." in key for key in state)
    found = {(sum(counts), with_se): name for name, (counts, _, _, with_se) in ARCHITECTURES.items()}.get((units, se))
    if found is None or arch not in (None, found):
        fits = f"its tensors fit {found}, not {arch}; say --arch {found}"
        raise InputError(f"{path}: {fits if found else f'{units} residual units are no network of AdaFace'}")
    model = build_model(found)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        ours = "body.1.res_layer.5.weight" in state
        kind = f"not a whole {found} network" if ours else "blocks not of AdaFace's kind"
        raise InputError(f"{path}: {kind} ({reason} ...); take a whole checkpoint of AdaFace") from None
    for key, value in model.state_dict().items():
        if not torch.isfinite(value).all() or (key.endswith("running_var") and (value < 0).any()):
            raise InputError(f"{path}: {key} holds NaN, infinite or impossible weights; take an earlier checkpoint")
    if "arch" in content and isinstance(content.get("config"), dict):
        model.facts = {key: value for key, value in content.items() if key != "state_dict"}
    return model.eval()


def read_checkpoint(path):
    """The dict in a file that `torch.save` wrote, or in safetensors, read without running anything from it.

    PyTorch's weights-only unpickler makes tensors and plain types and refuses files that name `os`, `sys` and the like.
    Any other class becomes an inert stand-in: no package is needed, no code called. Raises InputError if unreadable.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint file")
    with open(path, "rb") as file:
        head = file.read(64)
    safe = head[8:9] == b"{"  # safetensors: a JSON header, after its length, which may begin as an ONNX model does
    for beginning, kind in OTHER_FILES.items():
        if not safe and head.lstrip().startswith(beginning):
            raise InputError(f"{path}: {kind}")
    try:
        zipped = head.startswith(b"PK")  # written by PyTorch 1.6 or later
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        stand_ins = [(_stand_in(name), name) for name in foreign]
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings(action="ignore"):
            content = read_safetensors(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile or damaged file can fail in any way
        reason = " ".join(str(error).rpartition("WeightsUnpickler error: ")[2].split())[:200] or type(error).__name__
        scripted = "torchscript" in reason.lower()
        way_out = "save torch.jit.load(FILE).state_dict() and take that" if scripted else "download or copy it again"
        raise InputError(f"{path}: not a readable checkpoint, {way_out} ({reason})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {type(content).__name__}, not a checkpoint's dict")
    return content


def list_checkpoints(names):
    """The checkpoints among `names`, each once: folders are opened, and wildcards, which some shells leave to us."""
    files = {}
    for name in names:
        found = sorted(glob.glob(name)) if "*" in name else [name]
        if Path(name).is_dir():
            found = sorted(str(p) for p in Path(name).iterdir() if p.suffix in SUFFIXES and p.name[0] != ".")
        if not found:
            raise InputError(f"{name}: no file ending in {', '.join(SUFFIXES)} there")
        files |= {os.path.abspath(file): file for file in found if os.path.abspath(file) not in files}
    return list(files.values())


def read_safetensors(path):
    """{key: tensor} of a safetensors file: 8 bytes with the length of a JSON header, the header, the tensors."""
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
    data, tensors = bytearray(Path(path).read_bytes()), {}
    start = 8 + int.from_bytes(data[:8], "little")
    for key, entry in json.loads(data[8:start]).items():
        if key != "__metadata__":
            kind, (begin, end) = kinds[entry["dtype"]], entry["data_offsets"]
            tensors[key] = torch.frombuffer(data[start + begin : start + end], dtype=kind).reshape(entry["shape"])
    return tensors


def _stand_in(name):
    """An inert class in place of one that a checkpoint names: an empty dict, since PyTorch fills no other kind."""
    if name.startswith("numpy."):  # whose objects take a state that no dict does
        return type(name, (), {"__init__": lambda self, *_, **__: None, "__setstate__": lambda self, _: None})
    return type(name, (), {"__new__": lambda cls, *_, **__: OrderedDict()})


def find_networks(content, entry=""):
    """{"entry/prefix": {key: tensor}} of all that looks like an AdaFace network in a checkpoint's nested dicts."""
    found = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= find_networks(value, f"{entry}{key}/")
        elif isinstance(value, torch.Tensor) and (match := NETWORK_KEY.search(str(key))):
            found.setdefault(entry + key[: match.start(1)], {})[match[1]] = value
    return found


# ---- shared by all files: errors, atomic writing, device, processes -------------------------------------------------
class InputError(ValueError):
    """A file, an entry or a setting that a user gave is wrong; the message is one line for that user."""


@contextmanager
def replacing(path):
    """Yield a temporary path that becomes `path` when the block ends without error: no reader ever sees a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def progress(items, description, unit, **options):
    """tqdm's bar over `items`; where there is no terminal, a line every 30 seconds."""
    if not sys.stderr.isatty():
        options |= {"delay": 30, "mininterval": 30, "maxinterval": 30, "bar_format": "{l_bar}{bar:20}{r_bar}\n"}
    return tqdm(items, description, unit=unit, leave=not sys.stderr.isatty(), **options)


def pick_device(name="auto"):
    """torch.device for "auto" (cuda if there is one that this PyTorch serves, else cpu), "cuda", "cuda:N" or "cpu".

    Selects it for the process and turns TF32 off: figures are computed in full float32. Raises InputError for others.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    full = {"auto": "cuda:0" if count else "cpu", "cuda": "cuda:0"}.get(name, name)  # as tensors say it
    if full not in ("cpu", *(f"cuda:{i}" for i in range(count))):
        raise InputError(f"--device {name}: must be auto, cpu, cuda or cuda:N; PyTorch sees {count} CUDA devices")
    unused = "an Apple GPU" if name == "auto" and torch.backends.mps.is_available() else None
    if full != "cpu":
        try:
            torch.cuda.set_device(full)
            torch.ones(1, device=full).add(1)
        except RuntimeError as error:  # such as "no kernel image is available for execution on the device"
            if name != "auto":
                raise InputError(f"--device {name}: cannot be used ({str(error).splitlines()[0]}); take cpu") from error
            full, unused = "cpu", f"{torch.cuda.get_device_name(0)} ({str(error).splitlines()[0]})"
    if unused:
        print(f"warning: not using {unused}, but the CPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device(full)


class Processes:
    """The processes that torchrun started, of which this is one; alone without torchrun.

    `rank` (0 prints and writes), `world`, their number, `device`. All must make the same calls in the same order.
    """

    def __init__(self, device="auto"):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        several = self.world > 1 and device in ("auto", "cuda") and torch.cuda.is_available()
        self.device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if several else device)
        if self.world > 1 and not dist.is_initialized():
            # Alignment may keep one process hours behind another. NCCL cannot serve two processes on one GPU.
            dist.init_process_group("cpu:gloo,cuda:nccl" if several else "gloo", timeout=timedelta(days=2))
            self.collect(None)  # all are there before one can fail

    def share(self, n):
        """The part of range(n) of this process, as a slice."""
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def gather(self, part, n):
        """The whole (n, ...) tensor, of which each process has its share(n); gradients reach this process's own."""
        if self.world == 1:
            return part
        whole, own = part.new_zeros((n, *part.shape[1:])), self.share(n)
        whole[own] = part.detach()
        dist.all_reduce(whole)
        return torch.cat([whole[: own.start], part, whole[own.stop :]])

    def sum_(self, tensors):
        """Replace each tensor by its sum over the processes."""
        for tensor in tensors if self.world > 1 else ():
            dist.all_reduce(tensor)

    def any(self, flag):
        """Whether `flag` is true in any process."""
        flags = torch.tensor([float(bool(flag))])  # on the CPU: nothing waits for a GPU
        self.sum_([flags])
        return bool(flags > 0)

    def collect(self, value):
        """The list of all processes' values (anything that pickles); also waits for all."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values


def run_main(main):
    """End the process with the exit code of a script's `main`; a scheduler's SIGTERM interrupts it as SIGINT does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = main()
    if code == 0 and dist.is_initialized():  # a thread of gloo that lets go of a tensor while Python ends aborts it
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)
    sys.exit(code)

"""Files that people bring and files that attack, as bytes; weights for the detector."""

import io
import json
import re
import warnings

import torch
from PIL import Image


def png(size=(112, 112), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


class Call:
    """Pickles as a call, which an unwary reader makes."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def safetensors(state):
    """The bytes of a safetensors file, by its format's description."""
    head, parts = {"__metadata__": {"format": "pt"}}, b""
    for key, value in state.items():
        data, kind = value.numpy().tobytes(), "F32" if value.is_floating_point() else "I64"
        head[key] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [len(parts), len(parts) + len(data)]}
        parts += data
    text = json.dumps(head).encode()
    text += b" " * ((8 - len(text)) % 256)  # so it begins as an ONNX model does
    return len(text).to_bytes(8, "little") + text + parts


def torchscript(folder, model):
    with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated; its files are not gone
        torch.jit.save(torch.jit.trace(model, torch.zeros(1, 3, 112, 112)), folder / "script.pt")
    return (folder / "script.pt").read_bytes()


def older_blocks(state):
    """The keys of older IR networks, which have no BatchNorm behind a unit's first convolution."""
    dropped = {key: value for key, value in state.items() if ".res_layer.2." not in key}
    return {re.sub(r"res_layer\.([3-5])", lambda m: f"res_layer.{int(m[1]) - 1}", k): v for k, v in dropped.items()}


def write_detector_weights(home):
    """Weights of the right shapes for face_alignment, which find something, where torch.hub keeps them."""
    from face_alignment.detection.sfd.net_s3fd import s3fd
    from face_alignment.models import FAN

    (home / "hub" / "checkpoints").mkdir(parents=True)
    generator, detector = torch.Generator().manual_seed(3), s3fd()
    torch.manual_seed(0)
    for name, parameter in detector.named_parameters():
        if name.endswith("mbox_loc.weight"):
            parameter.data.normal_(0, 0.001, generator=generator)
        elif "_mbox_" in name:
            torch.nn.init.zeros_(parameter)
        if name.endswith("mbox_conf.bias"):  # background everywhere but at one of the coarser scales
            parameter.data[-1] = 4.0 if name.startswith("conv6_2") else -4.0
    torch.save(detector.state_dict(), home / "hub" / "checkpoints" / "s3fd-619a316812.pth")
    torch.save(FAN(4).state_dict(), home / "hub" / "checkpoints" / "2DFAN4-11f355bf06.pth.tar")

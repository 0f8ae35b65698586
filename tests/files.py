"""Files that people bring and files that attack, as bytes; weights for the face detector."""

import io
import json
import re
import warnings

import torch
from PIL import Image


def png(size=(112, 112), mode="RGB"):
    """The bytes of a black PNG image."""
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


class Call:
    """Pickles as a call of `function`, which an unwary reader of the pickle makes."""

    def __init__(self, function, *arguments):
        self.function = function
        self.arguments = arguments

    def __reduce__(self):
        return self.function, self.arguments


def saved(content):
    """The bytes that torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def safetensors(state):
    """The bytes of a safetensors file, by the description of its format.

    The header is padded so that its length, and with it the file, begins as an ONNX model does.
    """
    header = {"__metadata__": {"format": "pt"}}
    tensors = b""
    for key, value in state.items():
        begin = len(tensors)
        tensors += value.numpy().tobytes()
        header[key] = {
            "dtype": "F32" if value.is_floating_point() else "I64",
            "shape": list(value.shape),
            "data_offsets": [begin, len(tensors)],
        }
    text = json.dumps(header).encode()
    first_byte_of_onnx = 8
    padding = (first_byte_of_onnx - len(text)) % 256
    text += b" " * padding
    return len(text).to_bytes(8, "little") + text + tensors


def torchscript(folder, model):
    """The bytes of a traced network, which are also written to folder/script.pt."""
    # TorchScript is deprecated, but its files are not gone.
    with warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(model, torch.zeros(1, 3, 112, 112))
        torch.jit.save(traced, folder / "script.pt")
    return (folder / "script.pt").read_bytes()


def older_blocks(state):
    """A state dict with the keys of older IR networks.

    Their units have no BatchNorm behind the first convolution, so later layers count one less.
    """
    older = {}
    for key, value in state.items():
        if ".res_layer.2." in key:
            continue
        layer = re.search(r"res_layer\.([3-5])", key)
        if layer:
            key = key.replace(layer[0], f"res_layer.{int(layer[1]) - 1}")
        older[key] = value
    return older


def write_detector_weights(home):
    """Weights of the right shapes for face_alignment, where torch.hub keeps them in `home`.

    They are random, but the detector finds something with them.
    """
    from face_alignment.detection.sfd.net_s3fd import s3fd
    from face_alignment.models import FAN

    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(3)
    detector = s3fd()
    torch.manual_seed(0)
    for name, parameter in detector.named_parameters():
        if name.endswith("mbox_loc.weight"):
            parameter.data.normal_(0, 0.001, generator=generator)
        elif "_mbox_" in name:
            torch.nn.init.zeros_(parameter)
        if name.endswith("mbox_conf.bias"):
            # There is a face at one of the coarser scales, and background at all others.
            is_face = name.startswith("conv6_2")
            parameter.data[-1] = 4.0 if is_face else -4.0
    torch.save(detector.state_dict(), folder / "s3fd-619a316812.pth")
    torch.save(FAN(4).state_dict(), folder / "2DFAN4-11f355bf06.pth.tar")

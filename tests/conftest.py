import json

import numpy as np
import pytest
import torch
from PIL import Image

import net

# A network of AdaFace's kind, small enough that a test trains it in a second. Not (8, 8, 16, 16): the backward pass of
# Conv2d(8, 16, 1, stride=2) on channels_last corrupts the heap in PyTorch 2.14 on CPUs with AVX-512.
net.ARCHITECTURES["ir_tiny"] = ((1, 1, 1, 1), (16, 16, 32, 32), False, False)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def write_crops(tmp_path):
    return crop_writer(tmp_path)


def crop_writer(folder):
    """write_crops([[3, 2], [2, 2, 2]]) -> (aligned JSON, pairs JSON): one family per list, images per person.

    Crops are coloured noise: a colour per family, a texture per person, noise per image.
    """

    def write(families, name="train", seed=0):
        rng = np.random.default_rng(seed)
        images, pairs = {}, []
        for f, sizes in enumerate(families):
            colour = rng.uniform(60, 190, 3)
            names = [f"{name}{f}{'abc'[i]}" for i in range(len(sizes))]
            pairs += [[a, b] for i, a in enumerate(names) for b in names[i + 1 :]]
            for person, size in zip(names, sizes, strict=True):
                texture = np.kron(rng.normal(0, 25, (7, 7, 3)), np.ones((16, 16, 1)))
                images[person] = []
                for i in range(size):
                    crop = np.clip(colour + texture + rng.normal(0, 15, (112, 112, 3)), 0, 255).astype(np.uint8)
                    path = folder / f"{name}_aligned" / person / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(crop).save(path)
                    images[person].append(path.relative_to(folder).as_posix())
        (folder / f"{name}.json").write_text(json.dumps(images))
        (folder / f"{name}_pairs.json").write_text(json.dumps(pairs))
        return folder / f"{name}.json", folder / f"{name}_pairs.json"

    return write


@pytest.fixture
def tiny_model():
    """A tiny network whose BatchNorm layers have statistics as after training, not 0 and 1."""
    model = net.build_model("ir_tiny")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()

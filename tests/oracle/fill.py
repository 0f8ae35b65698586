"""Deterministic weights and input, so that two implementations of one network can be compared.

Every tensor of a state dict is filled from its own key, so the order of keys and the framework's
random generator do not matter. `reference.npz` beside this file holds what AdaFace's own network
definition returned for these weights and this input, in float32 on a CPU (PyTorch 2.13), in eval
mode.
"""

import zlib

import numpy as np
import torch


def fill(state_dict):
    """Return a state dict of the same keys and shapes with deterministic values."""
    out = {}
    for key, tensor in state_dict.items():
        rng = np.random.RandomState(zlib.crc32(key.encode()))
        shape = tuple(tensor.shape)
        if key.endswith("num_batches_tracked"):
            value = np.zeros(shape, np.int64)
        elif key.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        elif key.endswith("running_mean"):
            value = (0.1 * rng.standard_normal(shape)).astype(np.float32)
        elif len(shape) >= 2:
            fan_in = int(np.prod(shape[1:]))
            value = (rng.standard_normal(shape) * np.sqrt(1.0 / fan_in)).astype(np.float32)
        else:
            value = rng.uniform(0.2, 0.9, shape).astype(np.float32)
        out[key] = torch.from_numpy(np.ascontiguousarray(value)).reshape(shape)
    return out


def network_input(n=2):
    """(n, 3, 112, 112) float32 in [-1, 1], the channel order the network expects."""
    images = np.random.RandomState(7).uniform(-1, 1, (n, 3, 112, 112))
    return torch.from_numpy(images.astype(np.float32))


def photo(n=2):
    """(n, 112, 112, 3) uint8 RGB crops, for the conversion to network input."""
    return np.random.RandomState(11).randint(0, 256, (n, 112, 112, 3)).astype(np.uint8)

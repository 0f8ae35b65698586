"""Training and evaluation on CUDA: what needs a GPU, and what can be seen of it without one.

A card that is not there is played by PyTorch's device "meta": `Fake` tensors say that they are there and keep their
numbers on the CPU. So the real TwinTrainer runs, with real numbers, and what CUDA would refuse (CPU and GPU tensors in
one operation) is refused, and what the host would wait for is noted. It cannot see kernels' own refusals and rounding,
autocast and GradScaler, cuDNN, NCCL, memory and speed. `python -m tests.test_cuda FOLDER FLAGS` runs it.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import net
import train_twins
from tests.conftest import GROUPED, SHUFFLED, Experiment, quick_features

ROOT = Path(__file__).parent.parent
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
RECIPE = "--quadruplet_weight 0.5 --drift_weight 0.5"  # every term of the loss
MODES = pytest.mark.parametrize("flags", [SHUFFLED, GROUPED, f"{SHUFFLED} --freeze_backbone", "--distance euclidean"])

# ---- a device that is not there --------------------------------------------------------------------------------------
META = torch.device("meta")
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
COPIES = {"aten::_to_copy", "aten::copy_"}
waits = []


class Fake(torch.Tensor):
    """A tensor that says it is on the device and keeps its numbers in `inner`, on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        facts = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return cls._make_wrapper_subclass(cls, inner.shape, device=META, **facts)

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})


class FakeDevice(TorchDispatchMode):
    """While it is on, torch.device("meta") is a card."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})


def execute(func, args, kwargs):
    """Do an operation on the CPU as strictly as CUDA would, and note what the host waits for."""
    name, tensors = func._schema.name, [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    fakes = [x for x in tensors if isinstance(x, Fake)]
    to_fake = torch.device(kwargs["device"]) == META if kwargs.get("device") else bool(fakes)
    if name == "aten::copy_":
        to_fake = isinstance(args[0], Fake)
    indices = [x for x in args[1] if x is not None] if name in INDEXING else []
    others = [x for x in tensors if x.dim() and not any(x is index for index in indices)]  # a CPU scalar may stand by
    if fakes and name not in COPIES and not all(isinstance(x, Fake) for x in others):
        raise RuntimeError(f"tensors on two devices in {name}")
    source = {"aten::_to_copy": 0, "aten::copy_": 1}.get(name)
    crosses = source is not None and isinstance(args[source], Fake) != to_fake
    later = kwargs.get("non_blocking") or (name == "aten::copy_" and any(args[2:]))
    looked_up = fakes and any(x.dtype == torch.bool or not isinstance(x, Fake) for x in indices)
    if (fakes and name in WAITS) or (crosses and not (later and to_fake)) or looked_up:
        waits.append(name)
    inner = {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") else kwargs
    args_inner, inner = tree_map(lambda x: x.inner if isinstance(x, Fake) else x, (args, inner))
    out = func(*args_inner, **inner)
    if not to_fake:
        return args[0] if name == "aten::copy_" else out
    out = tree_map(lambda x: Fake(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if fakes else out


def check_trainer(folder, flags):
    """Print as JSON what the host waits for in five steps on the fake device, after a proof that it would be seen."""
    net.Backbone.features = quick_features
    trainer = train_twins.TwinTrainer(train_twins.parse_args(Experiment(Path(folder)).flags(f"{RECIPE} {flags}")))
    trainer.device = trainer.processes.device = META
    trainer.say = lambda text: None
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with (
        mock.patch("torch.autocast", return_value=nullcontext()),
        mock.patch("torch.optim.adam._device_dtype_check_for_fused"),
        FakeDevice(),
    ):
        one = torch.ones(3).to("meta", non_blocking=True)
        assert not waits
        assert (one.sum().item(), len(one[one > 0]), one.cpu().tolist()) == (3, 3, [1, 1, 1])
        torch.ones(3).to("meta")
        assert len(waits) == 4, waits
        with pytest.raises(RuntimeError, match="two devices"):
            one + torch.ones(3)
        trainer.load_data()
        trainer.build_model()
        trainer.images = trainer.images.to(META)
        loss = trainer.measure_start()["loss"]
        waits.clear()
        for triplets in trainer.epoch_steps(1):
            trainer.step(triplets)
        print(json.dumps({"waits": waits, "start": loss}))


def test_a_device_that_is_not_there_gets_no_mixed_tensors_and_no_step_waits_for_it():
    pass


if __name__ == "__main__":
    check_trainer(*sys.argv[1:])

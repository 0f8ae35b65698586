"""Training and evaluation on CUDA: what needs a GPU, and what can be seen of it without one.

PyTorch's device "meta" plays a GPU that is not there: `Fake` tensors say that they are on it, and
keep their numbers on the CPU. The real trainer runs on it, in a process of its own. What mixes CPU
and GPU tensors is refused, and what the host would wait for is noted. It cannot see what kernels
refuse or round, autocast, GradScaler, NCCL, memory and speed.
"""

import json
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import evaluate_twins
import net
from tests.conftest import GROUPED, SHUFFLED, Experiment, quick_features, variant
from train_twins import TwinTrainer, parse_runs

ROOT = Path(__file__).parent.parent
META = torch.device("meta")
MODES = [SHUFFLED, GROUPED, f"{SHUFFLED} --freeze_backbone", "--distance euclidean"]
PRECISIONS = ["fp32", "bf16", "fp16"]

# ---- a device that is not there ------------------------------------------------------------------
# Operations whose result the host needs before it can go on.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2"}
# Operations that copy from one device to another, and which of their arguments is the source.
COPIES = {"aten::_to_copy": 0, "aten::copy_": 1}
waits = []  # descriptions of what the host has waited for


class Operation:
    """A call of an operation of PyTorch, as CUDA would see it."""

    def __init__(self, name, args, kwargs):
        self.name = name
        self.args = args
        self.kwargs = kwargs
        leaves = tree_leaves((args, kwargs))
        self.tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        self.is_on_device = any(isinstance(x, Fake) for x in self.tensors)
        self.source = COPIES.get(name)
        self.writes_into_first = self.source == 1
        self.goes_to_device = self._goes_to_device()
        self.index = []  # the tensors of an index: x[index]
        if "index" in name and isinstance(args[1], list):
            self.index = [x for x in args[1] if x is not None]

    def _goes_to_device(self):
        if self.kwargs.get("device"):
            return torch.device(self.kwargs["device"]) == META
        if self.writes_into_first:
            return isinstance(self.args[0], Fake)
        return self.is_on_device

    def mixes_devices(self):
        """Whether CUDA would refuse it; it takes numbers and indices from the CPU."""
        if self.source is not None or not self.is_on_device:
            return False
        operands = [x for x in self.tensors if x.dim() and not self._is_index(x)]
        return not all(isinstance(x, Fake) for x in operands)

    def _is_index(self, tensor):
        return any(tensor is x for x in self.index)

    def lets_host_wait(self):
        if (
            self.source is not None
            and self._copies_to_other_device()
            and not self._is_copied_later()
        ):
            return True
        if not self.is_on_device:
            return False
        # An index of bools has to be counted, and one from the CPU to be copied.
        needs_host = [x.dtype == torch.bool or not isinstance(x, Fake) for x in self.index]
        return self.name in WAITING or any(needs_host)

    def _copies_to_other_device(self):
        return isinstance(self.args[self.source], Fake) != self.goes_to_device

    def _is_copied_later(self):
        """Whether it is a copy to the device, with non_blocking=True."""
        if not self.goes_to_device:
            return False
        if self.writes_into_first and any(self.args[2:]):
            return True
        return bool(self.kwargs.get("non_blocking"))

    def where(self):
        """The name of the operation and the line of the product that calls it."""
        frames = [x for x in traceback.extract_stack() if Path(x.filename).parent == ROOT]
        if not frames:
            return self.name
        return f"{self.name} in {frames[-1].name}: {frames[-1].line}"

    def arguments_on_cpu(self):
        """(args, kwargs) with the CPU's tensors in place of the Fakes."""
        kwargs = dict(self.kwargs)
        if kwargs.get("device"):
            kwargs["device"] = "cpu"
        return tree_map(unwrap, (self.args, kwargs))


def unwrap(value):
    return value.inner if isinstance(value, Fake) else value


def wrap(value):
    return Fake(value) if isinstance(value, torch.Tensor) else value


def execute(_, func, types, args=(), kwargs=None):
    """Do an operation on the CPU as strictly as CUDA would, and note what the host waits for."""
    kwargs = kwargs or {}
    operation = Operation(func._schema.name, args, kwargs)
    if operation.mixes_devices():
        raise RuntimeError(f"tensors on two devices in {operation.name}")
    if operation.lets_host_wait():
        waits.append(operation.where())
    args_on_cpu, kwargs_on_cpu = operation.arguments_on_cpu()
    result = func(*args_on_cpu, **kwargs_on_cpu)
    if operation.goes_to_device:
        result = tree_map(wrap, result)
        if operation.is_on_device:
            return return_and_correct_aliasing(func, args, kwargs, result)
        return result
    if operation.writes_into_first:
        return args[0]
    return result


class Fake(torch.Tensor):
    """A tensor that says that it is on the device; its numbers are in `inner`, on the CPU."""

    __torch_dispatch__ = classmethod(execute)

    @staticmethod
    def __new__(cls, inner):
        fake = cls._make_wrapper_subclass(
            cls,
            inner.shape,
            device=META,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
        )
        fake.inner = inner
        return fake

    def tolist(self):
        return self.cpu().tolist()


class FakeDevice(TorchDispatchMode):
    """While it is entered, operations without a Fake argument are executed as strictly, too."""

    __torch_dispatch__ = execute


def refuse_a_blind_device():
    """Raise AssertionError unless waits and mixed devices are seen."""
    waits.clear()
    ones = torch.ones(3).to(META, non_blocking=True)
    assert waits == []
    assert ones.sum().item() == 3
    assert len(waits) == 1
    assert ones[ones > 0].tolist() == [1, 1, 1]
    assert len(waits) == 3  # for the index and for the list
    assert len(torch.ones(3).to(META)) == 3
    assert len(waits) == 4
    with pytest.raises(RuntimeError, match="two devices"):
        ones + torch.ones(3)


def prepare(flags):
    """(trainer before its first step, steps of an epoch, mean loss before them).

    A trainer for the CPU gets the fake device in its place.
    """
    terms = ("quadruplet_weight", "drift_weight", "identity_weight")
    (args,) = parse_runs([*flags, *(f"--{term}=0.5" for term in terms)])
    trainer = TwinTrainer(args)
    if trainer.device.type == "cpu":
        trainer.device = META
        trainer.processes.device = META
    trainer.load_network()
    trainer.load_data()
    trainer.prepare_training()
    trainer.claim_folder()
    trainer.place_images()
    trainer.inputs = trainer.inputs.to(trainer.device)
    loss = trainer.measure_start()["loss"]
    steps = trainer.train_set.steps(1, args.images_per_batch, args.batch_size)
    return trainer, steps, loss


def fake_run(folder, mode):
    """Print, as JSON, the waits of an epoch's steps and the loss before them."""
    net.Backbone.features = quick_features
    net.IMAGES_AT_ONCE["meta"] = 256
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter becomes a Fake
    no_autocast = mock.patch("torch.autocast")
    no_device_check = mock.patch("torch.optim.adam._device_dtype_check_for_fused")
    with no_autocast, no_device_check, FakeDevice():
        refuse_a_blind_device()
        trainer, steps, loss = prepare(Experiment(Path(folder)).flags(mode))
        waits.clear()
        for i in range(len(steps)):
            trainer.step(steps[i])
        print(json.dumps({"waits": sorted(set(waits)), "loss": loss}))


@pytest.fixture(scope="module", params=MODES)
def on_fake_device(request, tmp_path_factory):
    """{"mode", "waits", "loss"} of a run on the fake device."""
    mode = request.param
    folder = tmp_path_factory.mktemp("fake")
    command = [sys.executable, "-m", "tests.test_cuda", folder, f"{mode} --run_name fake"]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    return {"mode": mode, **json.loads(output.splitlines()[-1])}


def test_no_step_mixes_devices_or_waits_on_a_device_that_is_not_there(on_fake_device):
    assert on_fake_device["waits"] == []


def test_a_device_that_is_not_there_computes_the_cpus_loss(on_fake_device, run):
    _, log = run(f"{on_fake_device['mode']} --epochs 1")
    expected = log["epochs"][0]["train_loss"]
    assert on_fake_device["loss"] == pytest.approx(expected, abs=1e-5)


# ---- a GPU ---------------------------------------------------------------------------------------
@pytest.fixture
def sync_debug_mode():
    """Sets what PyTorch does when the host waits for the GPU, until the test is over."""
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def one_mebibyte():
    """Take all memory of the GPU from PyTorch, but what it has in use and one MiB."""
    held = torch.ones(1, device="cuda")  # its segment has room for the check of the device
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2**20 / total)
    yield held
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class TestOnAGpu:
    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("mode", MODES)
    def test_ten_steps_do_not_wait_for_the_gpu(self, experiment, sync_debug_mode, mode, precision):
        flags = experiment.flags(f"{mode} --device cuda --precision {precision}")
        trainer, steps, _ = prepare(flags)
        trainer.step(steps[0])
        sync_debug_mode("error")
        for i in range(10):
            trainer.step(steps[i % len(steps)])

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_epochs_give_the_losses_of_the_cpu(self, run, precision):
        _, on_cpu = run(SHUFFLED, "cpu")
        _, on_cuda = run(f"{SHUFFLED} --device cuda --precision {precision}", "cuda")
        tolerance = 1e-3 if precision == "fp32" else 0.02
        assert losses(on_cuda) == pytest.approx(losses(on_cpu), abs=tolerance)

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_a_run_goes_on_after_an_interruption(self, run, interrupt, precision):
        flags = f"{SHUFFLED} --device cuda --precision {precision}"
        _, whole = run(flags, "whole")
        # In the third step of the second epoch: Adam's state after the first one is restored.
        interrupt(flags, whole["epochs"][1]["steps"] + 3)
        _, resumed = run(f"{flags} --resume")
        assert losses(resumed) == pytest.approx(losses(whole), abs=1e-3)

    def test_evaluation_gives_the_cpus_figures(self, experiment):
        """Two checkpoints share a backbone, so that the second head is moved to the GPU alone."""
        other = experiment.folder / "other.pth"
        net.save_checkpoint(other, variant(net.load_checkpoint(experiment.start), 1))
        on_cpu = evaluated_figures(experiment, other, "cpu")
        on_cuda = evaluated_figures(experiment, other, "cuda")
        for figures_on_cuda, figures_on_cpu in zip(on_cuda, on_cpu, strict=True):
            assert figures_on_cuda == pytest.approx(figures_on_cpu, abs=1e-4)

    def test_too_little_memory_is_told_in_one_line(self, run, refusal, one_mebibyte):
        code, _ = run("--device cuda")
        assert code == 2
        assert refusal().startswith("out of memory")


def losses(log):
    """The losses of all epochs: those of the steps, and of the averaged weights in validation."""
    return [entry[name] for entry in log["epochs"] for name in ("train_loss", "val_loss")]


def evaluated_figures(experiment, other, device):
    """The figures of the start of an experiment, and of another network, on a device."""
    out = experiment.folder / device
    flags = (
        f"--test_pairs {experiment.pairs} --aligned_json {experiment.aligned} --skip_alignment "
        f"--flip --checkpoints {experiment.start} {other} --output_dir {out} --device {device}"
    )
    assert evaluate_twins.main(flags.split()) == 0
    comparison = json.loads((out / "comparison.json").read_text())
    figures = []
    for checkpoint in comparison["checkpoints"]:
        entries = checkpoint["figures"].items()
        figures.append({name: entry["value"] for name, entry in entries})
    return figures


if __name__ == "__main__":
    fake_run(*sys.argv[1:])

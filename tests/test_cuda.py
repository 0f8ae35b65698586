"""Training and evaluation on CUDA: what needs a GPU, and what can be seen of it without one.

PyTorch's device "meta" plays a card that is not there: `Fake` tensors say that they are there and keep their numbers on
the CPU. The real trainer runs on it, in a process of its own; what mixes CPU and GPU tensors is refused, and what the
host would wait for is noted. It cannot see what kernels refuse or round, autocast, GradScaler, NCCL, memory and speed.
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
from tests.conftest import GROUPED, SHUFFLED, Experiment, quick_features
from train_twins import TwinTrainer, parse_runs

ROOT, META = Path(__file__).parent.parent, torch.device("meta")
precisions = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
modes = pytest.mark.parametrize("mode", [SHUFFLED, GROUPED, f"{SHUFFLED} --freeze_backbone", "--distance euclidean"])
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2"}
SOURCE = {"aten::_to_copy": 0, "aten::copy_": 1}  # of a copy's arguments
waits = []


def execute(_, func, types, args=(), kwargs=None):
    """Do an operation on the CPU as strictly as CUDA would, and note what the host waits for."""
    name, kwargs = func._schema.name, kwargs or {}
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    fake, source = any(isinstance(x, Fake) for x in tensors), SOURCE.get(name)
    target = isinstance(args[0], Fake) if source == 1 else fake
    to_fake = torch.device(kwargs["device"]) == META if kwargs.get("device") else target
    places = [x for x in args[1] if x is not None] if "index" in name and isinstance(args[1], list) else []
    operands = [x for x in tensors if x.dim() and not any(x is place for place in places)]  # CPU scalars are taken
    if source is None and fake and not all(isinstance(x, Fake) for x in operands):
        raise RuntimeError(f"tensors on two devices in {name}")
    later = to_fake and (kwargs.get("non_blocking") or (source == 1 and any(args[2:])))
    waiting = name in WAITING or any(x.dtype == torch.bool or not isinstance(x, Fake) for x in places)
    if (fake and waiting) or (source is not None and isinstance(args[source], Fake) != to_fake and not later):
        frames = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT]
        waits.append(f"{name} in {frames[-1].name}: {frames[-1].line}" if frames else name)
    on_cpu = (args, kwargs | ({"device": "cpu"} if kwargs.get("device") else {}))
    on_cpu = tree_map(lambda x: x.inner if isinstance(x, Fake) else x, on_cpu)
    out = func(*on_cpu[0], **on_cpu[1])
    if not to_fake:
        return args[0] if source == 1 else out
    out = tree_map(lambda x: Fake(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if fake else out


class Fake(torch.Tensor):
    __torch_dispatch__ = classmethod(execute)

    @staticmethod
    def __new__(cls, inner):
        facts = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        fake = cls._make_wrapper_subclass(cls, inner.shape, device=META, **facts)
        fake.inner = inner
        return fake

    def tolist(self):
        return self.cpu().tolist()


FakeDevice = type("FakeDevice", (TorchDispatchMode,), {"__torch_dispatch__": execute})


def prepare(flags):
    trainer = TwinTrainer(*parse_runs([*flags, "--quadruplet_weight", "0.5", "--drift_weight", "0.5"]))
    if trainer.device.type == "cpu":  # its place is taken by the fake device
        trainer.device = trainer.processes.device = META
    trainer.load_data()
    trainer.build_model()
    trainer.images = trainer.images.to(trainer.device)
    return (
        trainer,
        trainer.train_set.steps(1, trainer.args.images_per_batch, trainer.args.batch_size),
        trainer.measure_start()["loss"],
    )


def fake_run(folder, mode):
    """Print the waits of an epoch's steps and the loss before it, after a proof that waits and mixing are seen."""
    net.Backbone.features = quick_features
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter becomes a Fake
    autocast, fused = mock.patch("torch.autocast"), mock.patch("torch.optim.adam._device_dtype_check_for_fused")
    with autocast, fused, mock.patch.dict(net.CHUNK, meta=256), FakeDevice():
        one = torch.ones(3).to(META, non_blocking=True)
        assert (one.sum().item(), one[one > 0].tolist(), len(torch.ones(3).to(META))) == (3, [1, 1, 1], 3)
        assert len(waits) == 4  # of the last line
        with pytest.raises(RuntimeError, match="two devices"):
            one + torch.ones(3)
        trainer, steps, loss = prepare(Experiment(Path(folder)).flags(mode))
        waits.clear()
        for i in range(len(steps)):
            trainer.step(steps[i])
        print(json.dumps([sorted(set(waits)), loss]))


@modes
def test_no_step_mixes_devices_or_waits_on_a_device_that_is_not_there(run, tmp_path, mode):
    command = [sys.executable, "-m", "tests.test_cuda", tmp_path, f"{mode} --run_name fake"]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    found, loss = json.loads(output.splitlines()[-1])
    assert (found, loss) == ([], pytest.approx(run(f"{mode} --epochs 1")[1]["epochs"][0]["train_loss"], abs=1e-5))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class TestOnAGpu:
    @precisions
    @modes
    def test_ten_steps_do_not_wait_for_the_gpu(self, experiment, request, mode, precision):
        trainer, steps, _ = prepare(experiment.flags(f"{mode} --device cuda --precision {precision}"))
        trainer.step(steps[0])
        request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
        torch.cuda.set_sync_debug_mode("error")
        for i in range(10):
            trainer.step(steps[i % len(steps)])

    @precisions
    def test_an_epoch_gives_the_cpus_losses_and_goes_on_after_an_interruption(self, run, interrupt, precision):
        flags = f"{SHUFFLED} --device cuda --precision {precision}"
        interrupt(flags, 3)
        logs = run(SHUFFLED, "cpu")[1], run(flags, "cuda")[1], run(f"{flags} --resume")[1]
        cpu, cuda, resumed = ([entry["train_loss"] for entry in log["epochs"]] for log in logs)
        assert cuda == pytest.approx(cpu, abs=1e-3 if precision == "fp32" else 0.02)
        assert resumed == pytest.approx(cuda, abs=1e-3)

    def test_evaluation_gives_the_cpus_figures(self, experiment):
        found = []
        for device in ("cpu", "cuda"):
            flags = f"--test_pairs {experiment.pairs} --aligned_json {experiment.aligned} --skip_alignment --flip "
            flags += f"--checkpoints {experiment.start} --output_dir {experiment.folder / device} --device {device}"
            assert evaluate_twins.main(flags.split()) == 0
            (row,) = json.loads((experiment.folder / device / "comparison.json").read_text())["checkpoints"]
            found.append({name: figure["value"] for name, figure in row["figures"].items()})
        assert found[1] == pytest.approx(found[0], abs=1e-4)

    def test_too_little_memory_is_told_in_one_line(self, run, refusal, request):
        request.addfinalizer(lambda: torch.cuda.set_per_process_memory_fraction(1.0))
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(2**20 / torch.cuda.get_device_properties(0).total_memory)
        assert run("--device cuda")[0] == 2
        assert refusal().startswith("out of memory")


if __name__ == "__main__":
    fake_run(*sys.argv[1:])

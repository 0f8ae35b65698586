"""Nothing is lost: interruptions, processes killed at random moments, full disks, folders that cannot be written to.

With KILLS in the environment, so many kills of each kind of run (3): `KILLS=20 python -m pytest tests/test_kills.py`.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import net
from tests.conftest import GROUPED, SHUFFLED, assert_equal_weights, without_timing
from tests.runner import finish, launch
from train_twins import TwinTrainer

KILLS = int(os.environ.get("KILLS", "3"))
KINDS = [f"{mode} {steps}" for mode in ("--freeze_backbone", "--drift_weight 1") for steps in (SHUFFLED, GROUPED)]


def assert_same_result(experiment, name, reference):
    """Two runs have left the same log, but for the clock, and bit for bit the same one checkpoint."""
    assert without_timing(experiment.log(name)) == without_timing(experiment.log(reference))
    assert_equal_weights(experiment.weights(name), experiment.weights(reference))
    assert not (experiment.folder / "logs" / name / "last.pth").exists()


def changed(path):
    """When a file was written, None if it is not there."""
    with suppress(FileNotFoundError):
        return path.stat().st_mtime_ns


def half_written(experiment):
    return [path for path in experiment.files() if path.name.startswith(".")]


# ---- interrupted ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [f"--freeze_backbone {SHUFFLED}", f"{GROUPED} --drift_weight 1"])
def test_an_interrupted_run_resumed_equals_an_uninterrupted_one(experiment, run, interrupt, flags):
    flags += " --epochs 3 --schedule cosine"
    _, whole = run(flags, "whole")
    steps = whole["epochs"][1]["steps"]
    assert steps > 1
    interrupt(flags, steps + 1, "parts")  # within the second epoch
    assert experiment.state("parts")["progress"]["step"] == 1
    interrupt(f"{flags} --resume", steps - 1, "parts")  # in the last step of it
    assert [entry["epoch"] for entry in experiment.state("parts")["log"]["epochs"]] == [0, 1, 2]
    assert run(f"{flags} --resume", "parts")[0] == 0
    assert_same_result(experiment, "parts", "whole")


def test_sigint_and_sigterm_within_an_epoch_save_and_end_with_130(experiment):
    flags = f"{SHUFFLED} --epochs 3"
    assert finish(launch(experiment.folder, [experiment.flags(flags, "whole")])) == [0]
    for number in (signal.SIGINT, signal.SIGTERM):
        processes = launch(experiment.folder, [experiment.flags(f"{flags} --resume", "parts")], PAUSE="0.2")
        while experiment.log("parts") is None and processes[0].is_alive():
            time.sleep(0.01)
        time.sleep(0.5)  # it has loaded the state by then, and an epoch takes over a second
        os.kill(processes[0].pid, number)
        assert finish(processes) == [130]
        (line,) = (experiment.folder / "0.err").read_text().splitlines()
        assert line == "train_twins.py: interrupted; what was done is saved, --resume goes on"
        assert experiment.state("parts")["progress"]["step"] > 0
    assert finish(launch(experiment.folder, [experiment.flags(f"{flags} --resume", "parts")])) == [0]
    assert_same_result(experiment, "parts", "whole")


def test_sigterm_ends_the_script_with_130_at_any_moment(experiment):
    os.mkfifo(experiment.folder / "fifo")  # a file that is never read to its end
    start = "import runpy, tests.conftest; runpy.run_path('train_twins.py', run_name='__main__')"
    flags = experiment.flags(f"--aligned_json {experiment.folder}/fifo")
    command = [sys.executable, "-c", start, *flags]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stderr=subprocess.PIPE, text=True)
    writing = os.open(experiment.folder / "fifo", os.O_WRONLY)  # waits until it is opened for reading
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    os.close(writing)
    assert process.returncode == 130
    assert err == "train_twins.py: interrupted; what was done is saved, --resume goes on\n"


def test_an_interruption_in_the_epoch_that_patience_ends_changes_nothing(experiment, run, interrupt):
    flags = "--learning_rate 0 --epochs 6 --patience 1"
    run(flags, "whole")
    interrupt(flags, 2, "parts", code=0)  # it is over: there is nothing to go on with
    assert_same_result(experiment, "parts", "whole")


def test_resuming_with_fewer_epochs_than_are_done_finishes_the_run(run, interrupt, capsys):
    interrupt("--epochs 6", 5)
    code, log = run("--epochs 2 --resume")
    assert (code, log["stopped"]) == (0, "epochs")
    capsys.readouterr()
    run("--epochs 2 --resume")
    assert "run is finished" in capsys.readouterr().out


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_that_ended_before_its_first_state_begins_again(experiment, run, interrupt, monkeypatch, replaced):
    if replaced:  # a run of other settings, whose state is not taken for this one's
        interrupt(f"{SHUFFLED} --seed 1", 2, "parts")
    step, seen = TwinTrainer.step, []

    def broken(self, triplets):
        seen.append(triplets)
        if len(seen) == 2:
            raise RuntimeError("a bug, which passes with its traceback")
        return step(self, triplets)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a bug"):
        patch.setattr(TwinTrainer, "step", broken)
        run("--overwrite", "parts")
    assert len(experiment.log("parts")["epochs"]) == 2
    assert run("--resume", "parts")[0] == run("", "whole")[0] == 0
    assert_same_result(experiment, "parts", "whole")


# ---- killed ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_random_moments_and_resumed_ends_the_same(experiment, kind):
    randomness, flags = random.Random(f"{kind} {KILLS}"), f"{kind} --epochs 8 --schedule cosine"
    assert finish(launch(experiment.folder, [experiment.flags(flags, "whole")])) == [0]
    last, kills, within = experiment.folder / "logs" / "killed" / "last.pth", 0, 0
    command = [experiment.flags(f"{flags} --resume", "killed")]
    for number in range(KILLS):
        processes = launch(experiment.folder, command, PAUSE="0.03", SAVE_MINUTES="0")  # a state after every step
        states = {changed(last)}
        wanted = randomness.randint(2, 4) if number else 1  # the first is killed soon, perhaps before any state
        while len(states) < wanted and processes[0].is_alive():
            states.add(changed(last))
        time.sleep(randomness.uniform(0, 0.05 if number else 0.3))
        processes[0].kill()
        (code,) = finish(processes)
        if code == 0:  # it came to its end before
            break
        assert code == -signal.SIGKILL
        kills += 1
        if last.exists():  # whole at every moment, as is the log
            within += experiment.state("killed")["progress"]["step"] > 0
        assert experiment.log("killed") is None or experiment.log("killed")["stopped"] in (None, "epochs")
    assert kills > 0
    assert finish(launch(experiment.folder, command)) == [0]
    assert_same_result(experiment, "killed", "whole")
    print(f"{kind}: {kills} kills, {within} with a state from within an epoch")


# ---- files ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("size", "file"), [(1 << 10, "config.json"), (1 << 16, "epoch1.pth")])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(experiment, run, refusal, size, file):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        code, _ = run("", "parts")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert code == 2
    line = refusal()
    assert file in line
    assert "File too large" in line
    assert not half_written(experiment)
    assert run("--resume", "parts")[0] == run("", "whole")[0] == 0
    assert_same_result(experiment, "parts", "whole")


def test_a_state_that_cannot_be_replaced_stays_as_it_was(experiment, run, interrupt, capsys, monkeypatch):
    run(SHUFFLED, "whole")
    interrupt(SHUFFLED, 3, "parts")
    before, replace = experiment.state("parts"), os.replace

    def refuse(source, target):
        if Path(target).suffix == ".pth":
            raise PermissionError(13, "Permission denied", str(source), None, str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        patch.setattr("train_twins.SAVE_MINUTES", 0)
        assert run(f"{SHUFFLED} --resume", "parts")[0] == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("last.pth: Permission denied")
    assert not half_written(experiment)
    assert experiment.state("parts")["progress"] == before["progress"]
    assert_equal_weights(experiment.state("parts")["state_dict"], before["state_dict"])
    assert run(f"{SHUFFLED} --resume", "parts")[0] == 0
    assert_same_result(experiment, "parts", "whole")


@pytest.mark.parametrize("flag", ["--log_dir", "--output_dir"])
def test_a_folder_that_cannot_be_written_to_is_one_line(experiment, run, refusal, flag):
    (experiment.folder / "file").write_text("")
    assert run(f"{flag} {experiment.folder}/file/x")[0] == 2
    assert f"{experiment.folder}/file/x" in refusal()


def test_a_run_that_goes_on_with_another_output_folder_keeps_its_best_checkpoint(experiment, run, interrupt, tmp_path):
    flags = "--learning_rate 0 --epochs 4 --patience 9"  # so the first epoch stays the best
    interrupt(flags, 3)
    code, log = run(f"{flags} --resume --output_dir {tmp_path}/elsewhere")
    assert (code, log["best_epoch"]) == (0, 1)
    assert "against_start" in net.read_checkpoint(log["best_checkpoint"])

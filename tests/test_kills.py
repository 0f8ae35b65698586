"""Nothing is lost that was saved: interrupts, kills, full disks, folders that cannot be written to.

Also two processes that would train one run. With KILLS in the environment, so many kills of each
kind of run (3): `KILLS=20 python -m pytest tests/test_kills.py`.
"""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten

import net
import train_twins
import triplet_dataset
from tests.conftest import GROUPED, SHUFFLED, assert_equal_weights, without_timing
from tests.runner import finish, launch
from train_twins import TwinTrainer, parse_runs

KILLS = int(os.environ.get("KILLS", "3"))
MODES = ("--freeze_backbone", "--drift_weight 1")
KINDS = [f"{mode} {steps}" for mode in MODES for steps in (SHUFFLED, GROUPED)]
INTERRUPTED = "train_twins.py: interrupted; --resume goes on from the last saved epoch"
SIGNALS = [signal.SIGINT, signal.SIGTERM]


def assert_same_result(experiment, name, reference):
    """Two runs have ended alike.

    They left the same log, but for the clock, and bit for bit the same weights in their one
    checkpoint. If --epochs ended them, they also left the same state to go on from, else none.
    """
    log = without_timing(experiment.log(name))
    assert log == without_timing(experiment.log(reference))
    assert_equal_weights(experiment.weights(name), experiment.weights(reference))
    checkpoint, expected = experiment.checkpoint(name), experiment.checkpoint(reference)
    for fact in ("epoch", "metrics", "start_metrics", "against_start"):
        assert checkpoint[fact] == expected[fact]
    may_go_on = log["stopped"] == "epochs"
    assert state_file(experiment, name).exists() == may_go_on
    if may_go_on:
        assert_same_state(experiment.state(name), experiment.state(reference))


def assert_same_state(state, reference):
    """Two states to go on from are equal, but for the clock, names and places in their logs."""
    logs = [without_timing(content.pop("log")) for content in (state, reference)]
    assert logs[0] == logs[1]
    leaves, structure = tree_flatten(state)
    expected_leaves, expected_structure = tree_flatten(reference)
    assert structure == expected_structure
    for leaf, expected in zip(leaves, expected_leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            assert torch.equal(leaf, expected)
        else:
            assert leaf == expected


def state_file(experiment, name):
    return experiment.folder / "logs" / name / "last.pth"


def saved_epochs(experiment, name):
    """The epochs that a run's state to resume from has; none without a state."""
    if not state_file(experiment, name).exists():
        return []
    return [entry["epoch"] for entry in experiment.state(name)["log"]["epochs"]]


def time_of_change(path):
    """When a file was written, None if it is not there."""
    with suppress(FileNotFoundError):
        return path.stat().st_mtime_ns


def wait_until(condition, process):
    """Wait until `condition()` is true, or the process has ended."""
    while not condition() and process.is_alive():
        time.sleep(0.01)


def half_written(experiment):
    return [path for path in experiment.files() if path.name.startswith(".")]


# ---- interrupted ---------------------------------------------------------------------------------
INTERRUPTED_RUNS = [
    f"--freeze_backbone {SHUFFLED}",
    f"{GROUPED} --drift_weight 1",
    f"{GROUPED} --identity_weight 1",
]


@pytest.mark.parametrize("flags", INTERRUPTED_RUNS)
def test_an_interrupted_run_resumed_equals_an_uninterrupted_one(experiment, run, interrupt, flags):
    flags += " --epochs 3"
    _, whole = run(flags, "whole")
    steps = whole["epochs"][1]["steps"]
    assert steps > 1
    interrupt(flags, steps + 1, "parts")  # inside the second epoch, which that costs
    assert saved_epochs(experiment, "parts") == [0, 1]
    interrupt(f"{flags} --resume", steps, "parts")  # in the last step of the second epoch
    assert saved_epochs(experiment, "parts") == [0, 1, 2]
    code, _ = run(f"{flags} --resume", "parts")
    assert code == 0
    assert_same_result(experiment, "parts", "whole")


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupt_inside_an_epoch_ends_it_after_the_step(experiment, run, interrupt, after):
    interrupt(SHUFFLED, after)  # which asserts that no further step was made
    assert saved_epochs(experiment, "run") == [0]
    assert [entry["epoch"] for entry in experiment.log()["epochs"]] == [0]


def test_sigint_and_sigterm_within_an_epoch_keep_what_is_saved_and_end_with_130(experiment):
    flags = f"{SHUFFLED} --epochs 3"
    assert finish(launch(experiment.folder, [experiment.flags(flags, "whole")])) == [0]
    command = [experiment.flags(f"{flags} --resume", "parts")]
    config = experiment.folder / "logs" / "parts" / "config.json"
    for number in SIGNALS:
        before = time_of_change(config)
        processes = launch(experiment.folder, command, PAUSE="0.2", SAVE_SECONDS="0")
        wait_until(lambda before=before: time_of_change(config) != before, processes[0])
        wait_until(lambda: saved_epochs(experiment, "parts") == [0], processes[0])
        time.sleep(0.5)  # it is in the first epoch by then, which takes over a second
        os.kill(processes[0].pid, number)
        assert finish(processes) == [130]
        assert (experiment.folder / "0.err").read_text().splitlines() == [INTERRUPTED]
        assert saved_epochs(experiment, "parts") == [0]
    assert finish(launch(experiment.folder, command)) == [0]
    assert_same_result(experiment, "parts", "whole")


def start_script(flags):
    """Start train_twins.py with the tests' tiny network as a script; returns the process."""
    start = "import runpy, tests.conftest; runpy.run_path('train_twins.py', run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-c", start, *flags],
        cwd=Path(__file__).parent.parent,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_second_signal_ends_the_script_with_130_at_any_moment(experiment):
    os.mkfifo(experiment.folder / "fifo")  # a file that is never read to its end
    process = start_script(experiment.flags(f"--aligned_json {experiment.folder}/fifo"))
    # This waits until the script opens the file for reading.
    writing = os.open(experiment.folder / "fifo", os.O_WRONLY)
    # It waits in read() by then, which never returns by itself. The second signal comes when the
    # first has been dealt with: while a signal is pending for the main thread, Linux may give
    # another one to another thread, and then read() goes on.
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    os.close(writing)
    assert process.returncode == 130
    assert error == f"{INTERRUPTED}\n"


def send_signal_at(monkeypatch, owner, name, number):
    """Make a function send this process a signal whenever it is called."""
    function = getattr(owner, name)

    def signalling(*arguments, **options):
        os.kill(os.getpid(), number)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, signalling)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (triplet_dataset, "read_id_to_images"),
        (train_twins, "load_checkpoint"),
        (TwinTrainer, "measure_start"),
    ],
)
def test_one_signal_before_the_first_epoch_ends_the_run_with_130_before_its_first_step(
    run, monkeypatch, refusal, owner, name, number
):
    steps = []
    monkeypatch.setattr(TwinTrainer, "step", lambda self, triplets: steps.append(triplets))
    send_signal_at(monkeypatch, owner, name, number)
    code, _ = run("--freeze_backbone")
    assert code == 130
    assert refusal() == INTERRUPTED.removeprefix("train_twins.py: ")
    assert steps == []


def test_an_interruption_in_the_epoch_that_patience_ends_changes_nothing(
    experiment, run, interrupt
):
    flags = "--learning_rate 0 --epochs 6 --patience 1"
    run(flags, "whole")
    interrupt(flags, 2, "parts", code=0)  # it is over: there is nothing to go on with
    assert_same_result(experiment, "parts", "whole")


def test_an_interruption_while_a_run_concludes_changes_nothing(experiment, run, monkeypatch):
    run("", "whole")
    send_signal_at(monkeypatch, TwinTrainer, "conclude", signal.SIGINT)
    code, _ = run("", "parts")
    assert code == 0
    assert_same_result(experiment, "parts", "whole")


def test_resuming_with_fewer_epochs_than_are_done_finishes_the_run(run, interrupt, capsys):
    interrupt("--epochs 6", 5)
    code, log = run("--epochs 2 --resume")
    assert (code, log["stopped"]) == (0, "epochs")
    capsys.readouterr()
    run("--epochs 2 --resume")
    assert "run is finished" in capsys.readouterr().out


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_that_ended_before_its_first_state_begins_again(
    experiment, run, interrupt, monkeypatch, replaced
):
    if replaced:  # a run of other settings, whose state is not taken for this one's
        interrupt(f"{SHUFFLED} --seed 1", 2, "parts")
    step = TwinTrainer.step
    steps = []

    def broken_step(self, triplets):
        steps.append(triplets)
        if len(steps) == 2:
            raise RuntimeError("a bug, which passes with its traceback")
        return step(self, triplets)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a bug"):
        patch.setattr(TwinTrainer, "step", broken_step)
        run("--overwrite", "parts")
    assert len(experiment.log("parts")["epochs"]) == 2
    assert saved_epochs(experiment, "parts") == []
    code, _ = run("--resume", "parts")
    assert code == 0
    run("", "whole")
    assert_same_result(experiment, "parts", "whole")


# ---- an interrupted sweep ------------------------------------------------------------------------
SWEEP = "--freeze_backbone --seed 1 2"  # in each of its two epochs, a run makes one step


def names_of(experiment, flags):
    """The names of the runs that a command makes, in their order."""
    return [args.run_name for args in parse_runs(experiment.flags(flags, ""))]


def assert_sweep_was_ended_before_its_second_run(experiment):
    """The first run of SWEEP is finished, the second was not begun, and --resume makes it."""
    first, second = names_of(experiment, SWEEP)
    assert experiment.log(first)["stopped"] == "epochs"
    assert saved_epochs(experiment, first) == [0, 1, 2]
    assert not (experiment.folder / "logs" / second).exists()
    before = experiment.files()
    assert train_twins.main(experiment.flags(f"{SWEEP} --resume", "")) == 0
    assert experiment.log(second)["stopped"] == "epochs"
    assert before.items() <= experiment.files().items()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_the_last_step_of_a_run_ends_the_sweep(experiment, monkeypatch, capsys, number):
    step = TwinTrainer.step
    steps = []

    def interrupted_step(self, triplets):
        steps.append(triplets)
        if len(steps) == 2:
            os.kill(os.getpid(), number)
        return step(self, triplets)

    with monkeypatch.context() as patch:
        patch.setattr(TwinTrainer, "step", interrupted_step)
        assert train_twins.main(experiment.flags(SWEEP, "")) == 130
    assert len(steps) == 2
    assert capsys.readouterr().err.splitlines()[-1] == INTERRUPTED
    assert_sweep_was_ended_before_its_second_run(experiment)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_a_run_concludes_ends_the_sweep(experiment, monkeypatch, capsys, number):
    with monkeypatch.context() as patch:
        send_signal_at(patch, TwinTrainer, "conclude", number)
        assert train_twins.main(experiment.flags(SWEEP, "")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == INTERRUPTED
    assert_sweep_was_ended_before_its_second_run(experiment)


@contextmanager
def counted_reads(monkeypatch, file_name):
    """The paths of checkpoints with this file name, as often as they are read."""
    load = torch.load
    reads = []

    def counted_load(path, *arguments, **options):
        if Path(path).name == file_name:
            reads.append(str(path))
        return load(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", counted_load)
        yield reads


def test_a_resumed_run_reads_its_state_once(experiment, run, interrupt, monkeypatch):
    interrupt(SHUFFLED, 2)
    with counted_reads(monkeypatch, "last.pth") as reads:
        code, _ = run(f"{SHUFFLED} --resume")
    assert code == 0
    assert reads == [str(state_file(experiment, "run"))]


def test_a_resumed_sweep_reads_the_state_of_a_run_once(experiment, interrupt, monkeypatch):
    flags = f"{SHUFFLED} {SWEEP}"
    first, _ = names_of(experiment, flags)
    interrupt(flags, 2, name="")
    with counted_reads(monkeypatch, "last.pth") as reads:
        assert train_twins.main(experiment.flags(f"{flags} --resume", "")) == 0
    assert reads == [str(state_file(experiment, first))]


# ---- more epochs for a run that has ended --------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_with_more_epochs_ends_as_if_asked_for_them_at_once(
    experiment, run, kind
):
    _, whole = run(f"{kind} --epochs 4", "whole")
    assert whole["epochs"][1]["steps"] > 1
    run(f"{kind} --epochs 2", "parts")
    assert saved_epochs(experiment, "parts") == [0, 1, 2]
    code, log = run(f"{kind} --resume --epochs 4", "parts")
    assert (code, log["stopped"]) == (0, "epochs")
    assert_same_result(experiment, "parts", "whole")


@pytest.mark.parametrize("after", [1, 3])  # in the first epoch that was added, and in the second
@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_goes_on_with_more_epochs_may_be_interrupted(
    experiment, run, interrupt, mode, after
):
    flags = f"{mode} --batch_size 24"  # two steps an epoch
    _, whole = run(f"{flags} --epochs 4", "whole")
    assert whole["epochs"][1]["steps"] == 2
    run(f"{flags} --epochs 2", "parts")
    interrupt(f"{flags} --resume --epochs 4", after, "parts")
    code, _ = run(f"{flags} --resume --epochs 4", "parts")
    assert code == 0
    assert_same_result(experiment, "parts", "whole")


def test_a_run_that_goes_on_with_more_epochs_counts_its_patience_from_the_best_of_all(
    experiment, run
):
    flags = "--learning_rate 0 --patience 3"  # the first epoch stays the best
    run(f"{flags} --epochs 9", "whole")
    run(f"{flags} --epochs 2", "parts")
    _, log = run(f"{flags} --resume --epochs 9", "parts")
    assert (log["stopped"], len(log["epochs"])) == ("patience", 5)
    assert_same_result(experiment, "parts", "whole")


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_that_is_asked_for_no_more_epochs_is_finished(experiment, run, capsys, epochs):
    run("--epochs 2")
    before = experiment.files()
    capsys.readouterr()
    code, _ = run(f"--resume --epochs {epochs}")
    assert code == 0
    assert "run is finished after 2 epochs" in capsys.readouterr().out
    assert experiment.files() == before


def test_a_run_that_patience_ended_is_finished_whatever_epochs_it_is_asked_for(
    experiment, run, capsys
):
    run("--learning_rate 0 --epochs 9 --patience 1")
    before = experiment.files()
    capsys.readouterr()
    code, _ = run("--learning_rate 0 --resume --epochs 20 --patience 1")
    assert code == 0
    assert "run is finished after 2 epochs" in capsys.readouterr().out
    assert experiment.files() == before


def test_all_runs_of_a_sweep_go_on_with_more_epochs(experiment):
    sweep = "--freeze_backbone True False"
    names = names_of(experiment, sweep)
    for flags in ("--epochs 1", "--epochs 3 --resume"):
        assert train_twins.main(experiment.flags(f"{sweep} {flags}", "")) == 0
    for name, mode in zip(names, ("True", "False"), strict=True):
        flags = f"--freeze_backbone {mode} --epochs 3"
        assert train_twins.main(experiment.flags(flags, f"alone_{mode}")) == 0
        assert_same_result(experiment, name, f"alone_{mode}")


def test_a_finished_run_that_is_interrupted_in_an_epoch_it_was_given_later_is_not_finished(
    experiment, run, interrupt
):
    flags = f"--freeze_backbone {SHUFFLED}"
    run(f"{flags} --epochs 3", "whole")
    run(f"{flags} --epochs 2", "parts")
    interrupt(f"{flags} --resume --epochs 3", 1, "parts")
    assert experiment.log("parts")["stopped"] is None
    command = experiment.flags(f"{flags} --resume", "parts")
    place = command.index("--epochs")
    del command[place : place + 2]  # so that it takes the number that it had last
    assert train_twins.main(command) == 0
    assert_same_result(experiment, "parts", "whole")


# ---- killed --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_random_moments_and_resumed_ends_the_same(experiment, kind):
    randomness = random.Random(f"{kind} {KILLS}")
    flags = f"{kind} --epochs {2 * KILLS + 2}"
    assert finish(launch(experiment.folder, [experiment.flags(flags, "whole")])) == [0]
    command = [experiment.flags(f"{flags} --resume", "killed")]
    state = state_file(experiment, "killed")
    kills = 0
    for number in range(KILLS):
        # There is a new state after every epoch.
        processes = launch(experiment.folder, command, PAUSE="0.02", SAVE_SECONDS="0")
        states = {time_of_change(state)}
        # The first one is killed soon, perhaps before any state.
        wanted = randomness.randint(1, 3) if number else 1
        while len(states) < wanted and processes[0].is_alive():
            states.add(time_of_change(state))
        time.sleep(randomness.uniform(0, 0.2))  # an epoch takes a few steps of 0.02 s and more
        processes[0].kill()
        (code,) = finish(processes)
        if code == 0:  # it came to its end before
            break
        assert code == -signal.SIGKILL
        kills += 1
        # The state and the log are whole at every moment.
        epochs = saved_epochs(experiment, "killed")
        assert epochs == list(range(len(epochs)))
        log = experiment.log("killed")
        assert log is None or log["stopped"] in (None, "epochs")
    assert kills > 0
    assert finish(launch(experiment.folder, command)) == [0]
    assert_same_result(experiment, "killed", "whole")
    print(f"{kind}: {kills} kills, {len(epochs)} epochs in the last state")


# ---- two processes -------------------------------------------------------------------------------
@contextmanager
def another_process(experiment, flags="", name="run", begun="logs/run/training_log.json"):
    """A process that is training a run; the block begins when the run has a file, `begun`."""
    processes = launch(
        experiment.folder, [experiment.flags(flags, name)], PAUSE="0.2", SAVE_SECONDS="0"
    )
    wait_until((experiment.folder / begun).exists, processes[0])
    yield processes
    finish(processes)


TOGETHER = "--freeze_backbone --batch_size 16"  # takes a few seconds with the pauses


def test_a_run_that_another_process_is_training_is_refused_and_that_one_keeps_everything(
    experiment, run, refusal
):
    run(TOGETHER, "whole")
    elsewhere = f"{experiment.folder}/elsewhere"
    with another_process(experiment, TOGETHER) as processes:
        for flags in (
            "",
            "--resume",
            "--overwrite",
            f"--overwrite --output_dir {elsewhere}",  # the folder of the log is the same
            f"--overwrite --log_dir {elsewhere}",  # the names of the checkpoints are the same
        ):
            code = train_twins.main(experiment.flags(f"{TOGETHER} {flags}"))
            assert code == 2
            line = refusal()
            assert "another process is training this run" in line
            assert "--run_name" in line
        assert processes[0].is_alive()
        assert finish(processes) == [0]
    assert_same_result(experiment, "run", "whole")
    assert not Path(elsewhere).exists()


def test_a_process_that_looked_before_another_began_the_run_is_refused_too(experiment, run):
    run(TOGETHER, "whole")
    (args,) = parse_runs(experiment.flags(TOGETHER))
    late = TwinTrainer(args)
    with another_process(experiment, TOGETHER) as processes:
        with pytest.raises(net.InputError, match="another process is training this run"):
            late.train()
        assert finish(processes) == [0]
    assert_same_result(experiment, "run", "whole")


@pytest.mark.parametrize("flags", ["", "--resume"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_process_that_looked_before_another_trained_the_run_does_not_replace_it(
    experiment, run, interrupt, flags, finished
):
    (args,) = parse_runs(experiment.flags(f"{TOGETHER} {flags}"))
    late = TwinTrainer(args)  # which may then align for hours
    if finished:
        run(TOGETHER)
    else:
        interrupt(TOGETHER, 2)
    before = experiment.files()
    with pytest.raises(net.InputError):
        late.train()
    assert experiment.files() == before


def test_runs_are_not_locked_on_a_file_system_without_locks(run, monkeypatch):
    def flock(file, kind):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    code, _ = run("--epochs 1")
    assert code == 0


def test_two_processes_train_two_runs_at_once(experiment, run):
    with another_process(experiment, TOGETHER) as processes:
        code, _ = run(TOGETHER, "other")
        assert code == 0
        assert finish(processes) == [0]
    assert_equal_weights(experiment.weights("other"), experiment.weights("run"))


def test_a_sweep_is_refused_before_its_first_run_if_another_process_is_training_its_last(
    experiment, refusal
):
    flags = f"{TOGETHER} --seed 1 2"
    first, second = names_of(experiment, flags)
    begun = f"logs/{second}/training_log.json"
    with another_process(experiment, f"{TOGETHER} --seed 2", "", begun) as processes:
        assert train_twins.main(experiment.flags(flags, "")) == 2
        assert "another process is training this run" in refusal()
        processes[0].kill()
    assert not (experiment.folder / "logs" / first).exists()


def test_a_killed_process_leaves_no_lock(experiment, run):
    run(TOGETHER, "whole")
    with another_process(experiment, TOGETHER) as processes:
        processes[0].kill()
        assert finish(processes) == [-signal.SIGKILL]
    code, _ = run(f"{TOGETHER} --resume")
    assert code == 0
    assert_same_result(experiment, "run", "whole")


@pytest.mark.parametrize("flags", ["--resume", "--overwrite"])
def test_another_process_may_go_on_with_a_finished_run(experiment, run, flags):
    run(TOGETHER)  # in this process, which goes on
    command = [experiment.flags(f"{TOGETHER} {flags}")]
    assert finish(launch(experiment.folder, command)) == [0]


def test_another_process_may_go_on_with_an_interrupted_run(experiment, run, interrupt):
    run(TOGETHER, "whole")
    interrupt(TOGETHER, 2)  # in this process, which goes on
    command = [experiment.flags(f"{TOGETHER} --resume")]
    assert finish(launch(experiment.folder, command)) == [0]
    assert_same_result(experiment, "run", "whole")


# ---- files ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("size", "file"), [(1 << 10, "config.json"), (1 << 16, "epoch1.pth")])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    experiment, run, refusal, size, file
):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        code, _ = run("", "parts")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    line = refusal()
    assert file in line
    assert "File too large" in line
    assert half_written(experiment) == []

    code, _ = run("--resume", "parts")
    assert code == 0
    run("", "whole")
    assert_same_result(experiment, "parts", "whole")


def test_a_state_that_cannot_be_replaced_stays_as_it_was(
    experiment, run, interrupt, capsys, monkeypatch
):
    _, whole = run(SHUFFLED, "whole")
    steps = whole["epochs"][1]["steps"]
    interrupt(SHUFFLED, steps + 1, "parts")  # inside the second epoch
    before = experiment.state("parts")
    replace = os.replace

    def refuse(source, target):
        if Path(target).name == "last.pth":
            raise PermissionError(13, "Permission denied", str(source), None, str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        patch.setattr(train_twins, "SAVE_SECONDS", 0)
        code, _ = run(f"{SHUFFLED} --resume", "parts")
    assert code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("last.pth: Permission denied")
    assert half_written(experiment) == []
    after = experiment.state("parts")
    assert after["log"] == before["log"]
    assert_equal_weights(after["state_dict"], before["state_dict"])

    code, _ = run(f"{SHUFFLED} --resume", "parts")
    assert code == 0
    assert_same_result(experiment, "parts", "whole")


@pytest.fixture
def the_first_epoch_is_best(monkeypatch):
    validate = TwinTrainer.validate

    def falling_validate(self, epoch):
        embeddings, figures = validate(self, epoch)
        return embeddings, figures | {"val_auc": 0.9 - epoch / 10}

    monkeypatch.setattr(TwinTrainer, "validate", falling_validate)


@pytest.mark.parametrize("flag", ["--log_dir", "--output_dir"])
def test_a_folder_that_cannot_be_written_to_is_one_line(experiment, run, refusal, flag):
    (experiment.folder / "file").write_text("")
    code, _ = run(f"{flag} {experiment.folder}/file/x")
    assert code == 2
    assert f"{experiment.folder}/file/x" in refusal()


@pytest.mark.usefixtures("the_first_epoch_is_best")
def test_a_run_that_goes_on_with_another_output_folder_keeps_its_best_checkpoint(
    experiment, run, interrupt, tmp_path
):
    flags = "--epochs 4 --patience 9"
    interrupt(flags, 3)
    code, log = run(f"{flags} --resume --output_dir {tmp_path}/elsewhere")
    assert (code, log["best_epoch"]) == (0, 1)
    assert "against_start" in net.read_checkpoint(log["best_checkpoint"])


@pytest.mark.usefixtures("the_first_epoch_is_best")
def test_a_run_goes_on_with_the_best_checkpoint_that_moved_to_its_output_folder(
    experiment, run, interrupt
):
    flags = "--epochs 4 --patience 9"
    interrupt(flags, 3)
    models = experiment.folder / "models"
    moved = models.rename(experiment.folder / "moved")
    code, log = run(f"{flags} --resume --output_dir {moved}")
    assert (code, log["best_epoch"]) == (0, 1)
    assert Path(log["best_checkpoint"]).parent == moved
    assert "against_start" in net.read_checkpoint(log["best_checkpoint"])
    assert not models.exists()


@pytest.mark.usefixtures("the_first_epoch_is_best")
def test_a_run_whose_best_checkpoint_is_gone_does_not_go_on(experiment, run, interrupt, refusal):
    flags = "--epochs 4 --patience 9"
    interrupt(flags, 3)
    (checkpoint,) = (experiment.folder / "models").glob("*.pth")
    checkpoint.unlink()
    before = experiment.state()["log"]
    refusal()
    code, _ = run(f"{flags} --resume")
    assert code == 2
    line = refusal()
    assert f"{checkpoint}: " in line
    assert "--overwrite" in line
    assert experiment.state()["log"] == before

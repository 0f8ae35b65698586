"""Fuzzing of what reads other people's files: the JSON readers, crops, and checkpoints.

    FUZZ_CASES=5000 python -m pytest tests/test_fuzz.py -s        # all cases by hand; the default is a few hundred

Every case ends in a result or an InputError of one line, within five seconds; it opens no file to write, starts no
program and leaves the folder as it was. Cases are the same in every run: hypothesis is derandomised, mutations seeded.
"""

import io
import json
import os
import signal
import sys
import types
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import align
import net
import triplet_dataset

CASES = int(os.environ.get("FUZZ_CASES", "400"))  # in all; a part of them for each target
LIMIT = 5  # seconds per case

# ---- one case ---------------------------------------------------------------------------------------


@contextmanager
def time_limit():
    def stop(*_):
        raise AssertionError(f"a case took more than {LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
watched, forbidden = [False], []  # whether a case runs, and what it did that none may


def watch(event, arguments):
    """An audit hook (PEP 578): sees what Python code opens, starts and connects to, in any folder."""
    if watched[0] and (
        (event == "open" and arguments[2] & WRITING)
        or event in ("os.system", "os.exec", "os.remove", "os.rename", "os.mkdir", "subprocess.Popen", "socket.connect")
    ):
        forbidden.append((event, arguments))


sys.addaudithook(watch)


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def outcome(read, *arguments):
    """ "result" or "refused"; anything else that happens fails the test."""
    watched[0] = True
    try:
        with time_limit():
            read(*arguments)
        result = "result"
    except align.InputError as error:
        assert len(align.one_line(error).splitlines()) == 1  # noqa: PT017 (a result is fine as well)
        result = "refused"
    finally:
        watched[0] = False
    assert forbidden == []
    return result


def mutate(rng, content, others):
    """`content` with one to four changes: flips, insertions, deletions, repeats, cuts, parts of `others`."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        at, n = int(rng.integers(0, max(1, len(data)))), int(rng.integers(1, 16))
        match rng.integers(0, 7):
            case 0:
                data[at : at + 1] = bytes(b ^ (1 << int(rng.integers(0, 8))) for b in data[at : at + 1])
            case 1:
                data[at:at] = rng.bytes(n)
            case 2:
                del data[at : at + n]
            case 3:
                data[at:at] = data[at : at + n]
            case 4:
                data[at : at + n] = rng.choice([0, 255, 127, 128]).astype(np.uint8).tobytes() * n
            case 5:
                del data[max(at, len(data) // 2) :]
            case 6:
                other = others[int(rng.integers(0, len(others)))]
                start = int(rng.integers(0, len(other)))
                data[at : at + n] = other[start : start + n]
    return bytes(data)


# ---- JSON -------------------------------------------------------------------------------------------

READERS = {
    "pairs": align.read_pairs,
    "images": align.read_id_to_images,
    "landmarks": lambda path: align.read_landmarks(path, "/photos"),
}
numbers = st.integers() | st.floats() | st.integers(10**300, 10**320)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(), inner, max_size=6),
    max_leaves=20,
)
names = st.text(min_size=1) | st.text(st.characters(), min_size=1)  # the second with halves of characters
near = {  # right, or nearly, so that the cases get past the first check
    "pairs": st.lists(st.tuples(names, names), min_size=1, max_size=6) | st.lists(st.lists(names | values), min_size=1),
    "images": st.dictionaries(names, st.lists(names, max_size=4), min_size=1, max_size=6)
    | st.dictionaries(names, st.lists(names | values, max_size=4) | values, min_size=1, max_size=6),
    "landmarks": st.dictionaries(
        names,
        st.lists(st.tuples(st.floats(-1e4, 1e4), st.integers(-9999, 9999)), min_size=5, max_size=5)
        | st.lists(st.lists(numbers | st.booleans(), min_size=2, max_size=2), min_size=5, max_size=5),
        min_size=1,
    ),
}
VALID = {
    "pairs": [["a", "b"], ["\u00e9", "\ud83d\udc6f"]],
    "images": {"a": ["a/0.png"], "b": []},
    "landmarks": {"a/0.png": align.TEMPLATE.tolist()},
}


@pytest.mark.parametrize("kind", READERS)
def test_json_readers(tmp_path, kind):
    path = tmp_path / "x.json"
    seen = Counter()

    @settings(
        max_examples=-(-CASES // 12),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(near[kind] | values, st.binary(max_size=200), st.integers(0, 2**32 - 1), st.integers(0, 5))
    def check(value, noise, seed, form):
        valid = json.dumps(VALID[kind]).encode()
        if form < 3:
            path.write_bytes(json.dumps(value, ensure_ascii=form == 0).encode("utf-8", "surrogatepass"))
        elif form == 3:
            path.write_bytes(noise)
        else:
            path.write_bytes(mutate(np.random.default_rng(seed), valid, [noise or b"x", b'{"a": [[1e999]]}']))
        before = files_below(tmp_path)
        seen[outcome(READERS[kind], path)] += 1
        assert files_below(tmp_path) == before

    check()
    print(f"{kind}: {dict(seen)}")


# ---- crops ------------------------------------------------------------------------------------------


def test_crops(tmp_path):
    rng, seen = np.random.default_rng(1), Counter()
    seeds = []
    for options in ({"format": "PNG"}, {"format": "JPEG"}, {"format": "TIFF"}, {"format": "WEBP"}, {"format": "BMP"}):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (112, 112, 3), np.uint8)).save(file, **options)
        seeds.append(file.getvalue())
    for _ in range(CASES // 8):
        (tmp_path / "x.png").write_bytes(mutate(rng, seeds[rng.integers(0, len(seeds))], seeds))
        before = files_below(tmp_path)
        seen[outcome(triplet_dataset.read_crop, tmp_path / "x.png")] += 1
        assert files_below(tmp_path) == before
    print(f"crops: {dict(seen)}")


# ---- checkpoints ------------------------------------------------------------------------------------


def checkpoints(monkeypatch):
    """Small valid files: ours, Lightning's with objects of a package that is not there, the old format."""
    module = types.ModuleType("vanished_package")
    classes = {name: type(name, (base,), {"__module__": module.__name__}) for name, base in
               (("Callback", object), ("Settings", dict))}  # fmt: skip
    vars(module).update(classes)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    callback = classes["Callback"]()
    callback.path = "best.ckpt"
    tensors = {f"model.{key}": value for key, value in net.build_model("ir_fuzz").state_dict().items()}
    ours = {"state_dict": tensors, "arch": "ir_fuzz", "epoch": 1, "config": {"val_ids": ["a"]}, "metrics": {"e": 0.5}}
    lightning = {
        "state_dict": tensors | {"head.kernel": torch.zeros(4, 2)},
        "callbacks": {classes["Callback"]: callback},
        "hyper_parameters": classes["Settings"](margin=0.4, best=np.float64(0.5)),
    }
    for content, new in ((ours, True), (lightning, True), (ours, False)):
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=new)
        yield file.getvalue()


def interesting(data):
    """Offsets of what is not weights: the pickles, the zip's directory."""
    head = data.find(b"data.pkl")
    start = max(head, 0)
    end = data.find(b".PK", start) if head >= 0 else 12_000
    directory = data.find(b"PK\x01\x02")
    return [(start, end if end > start else start + 12_000)] + ([(directory, len(data))] if directory > 0 else [])


def test_checkpoints(tmp_path, monkeypatch):
    """Half of the mutations fall into the pickle or the zip's directory: tensors are most of the bytes."""
    monkeypatch.setattr(net, "ARCHITECTURES", {"ir_fuzz": ((1, 1, 1, 1), (4, 4, 4, 4), False, False)})
    monkeypatch.setattr(net, "EMBEDDING_SIZE", 8)
    monkeypatch.chdir(tmp_path)
    rng, seen, seeds = np.random.default_rng(2), Counter(), list(checkpoints(monkeypatch))
    monkeypatch.delitem(sys.modules, "vanished_package")
    path = tmp_path / "x.pth"
    for seed in seeds:
        path.write_bytes(seed)
        assert outcome(net.load_checkpoint, path) == "result"
    shapes = net._shapes("ir_fuzz")
    monkeypatch.setattr(net, "_shapes", lambda arch: shapes)
    for number in range(CASES * 5 // 8):
        seed = seeds[number % len(seeds)]
        if rng.integers(0, 2):
            parts = interesting(seed)
            start, end = parts[rng.integers(0, len(parts))]
            content = seed[:start] + mutate(rng, seed[start:end], seeds) + seed[end:]
        else:
            content = mutate(rng, seed, seeds)
        path.write_bytes(content)
        before = files_below(tmp_path)
        try:
            seen[outcome(net.load_checkpoint, path)] += 1
        except BaseException:
            print(f"case {number}")
            raise
        assert files_below(tmp_path) == before
    print(f"checkpoints: {dict(seen)}")

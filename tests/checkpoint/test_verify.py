"""Every damage to a checkpoint is refused, naming the file."""

from __future__ import annotations

import json
import os
import random
import shutil
from itertools import cycle

import pytest

from lss.checkpoint import open_checkpoint, verify
from lss.checkpoint.files import read_header
from lss.checkpoint.manifest import render
from lss.cli import main
from lss.config.errors import Refused
from tests.distributed.pool import pool
from tests.train.jobs import train_run

FILES = (
    "manifest.json", "optimizer-00000-of-00002.safetensors", "optimizer-00001-of-00002.safetensors", "state.json",
    "weights-00000-of-00002.safetensors", "weights-00001-of-00002.safetensors",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two ranks with two saves."""
    out = tmp_path_factory.mktemp("verify") / "run"
    pool(2).run(train_run, 2, str(out), ["train.steps=2", "checkpoint.every=1", "model.positions=learned"])
    return out


def test_a_good_checkpoint_is_good(run, capsys):
    folder = run / "checkpoints" / "step_2"
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    assert verify(folder).step == 2
    assert main(["verify", str(folder)]) == 0
    assert main(["verify", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(f"{folder}: good, step 2, 5 files" in line for line in lines)
    assert (run / "checkpoints" / "latest").read_text() == "step_2\n"


def test_the_manifest_tells_where_every_tensor_lies(run):
    """Each rank has written about half of the bytes, and every element of every tensor stands in one place."""
    manifest = json.loads((run / "checkpoints" / "step_2" / "manifest.json").read_bytes())
    sizes = [facts["bytes"] for name, facts in manifest["files"].items() if name.startswith("weights")]
    assert max(sizes) / min(sizes) < 1.1
    table = manifest["tensors"]["weights"]["position_table.weight"]
    assert table["shape"] == [48, 32]
    assert sorted((piece["at"][0], piece["size"][0]) for piece in table["pieces"]) == [(0, 12), (12, 24), (36, 12)]
    assert manifest["tensors"]["optimizer"].keys() >= {"embedding.weight/exp_avg", "embedding.weight/exp_avg_sq"}


def flip(draw, folder, name):
    path = folder / name
    raw = bytearray(path.read_bytes())
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)


def cut(draw, folder, name):
    path = folder / name
    os.truncate(path, draw.randrange(1, path.stat().st_size))


def empty(draw, folder, name):
    os.truncate(folder / name, 0)


def append(draw, folder, name):
    with (folder / name).open("ab") as file:
        file.write(draw.choice([b"\0", b" ", b"\n", b"more"]))


def missing(draw, folder, name):
    (folder / name).unlink()


def swapped(draw, folder, name):
    other = draw.choice([other for other in FILES if other != name])
    (folder / name).rename(folder / "aside")
    (folder / other).rename(folder / name)
    (folder / "aside").rename(folder / other)
    return name, other


def of_another_step(draw, folder, name):
    shutil.copy(folder.parent / "step_1" / name, folder / name)


def link(draw, folder, name):
    """To the very same bytes elsewhere."""
    (folder / name).rename(folder.parent / f"real-{name}")
    (folder / name).symlink_to(folder.parent / f"real-{name}")


def extra(draw, folder, name):
    added = draw.choice(["notes.txt", "weights-00002-of-00003.safetensors", ".hidden", "model.safetensors"])
    (folder / added).write_bytes(b"")
    return (added,)


def extra_folder(draw, folder, name):
    (folder / "more").mkdir()
    return ("more",)


def traversal(draw, folder, name):
    """A manifest with a right digest of its own that leads out of the folder, to the right bytes."""
    names = ["../outside.safetensors", "/tmp/outside", "a/../b", "..", "sub\\file", "weights-0-of-1.safetensors/.."]
    target = draw.choice(names)
    shutil.copy(folder / FILES[5], folder.parent / "outside.safetensors")
    rewrite(folder, lambda content: content["files"].update({target: content["files"][FILES[5]]}))
    return ("manifest.json",)


def redirected(draw, folder, name):
    """A tensor that a manifest with a right digest takes from elsewhere."""
    target = draw.choice(["../outside.safetensors", "state.json", FILES[1]])

    def change(content):
        next(iter(content["tensors"]["weights"].values()))["pieces"][0]["file"] = target

    rewrite(folder, change)
    return ("manifest.json",)


def other_shape(draw, folder, name):
    """A tensor that a manifest with a right digest makes another one."""

    def change(content):
        entry = content["tensors"]["weights"][draw.choice(sorted(content["tensors"]["weights"]))]
        key = draw.choice(["shape", "dtype", "at", "size"])
        if key == "shape":
            entry["shape"][0] += 1
        elif key == "dtype":
            entry["dtype"] = "F32"
        else:
            entry["pieces"][0][key][0] += 1

    rewrite(folder, change)
    return ("manifest.json", *(f for f in FILES if f.startswith("weights")))


def other_form(draw, folder, name):
    """The same content in other bytes, or a key twice."""
    path = folder / "manifest.json"
    raw = path.read_bytes()
    path.write_bytes(draw.choice([json.dumps(json.loads(raw), indent=1).encode(), raw.rstrip(), raw + b"\n",
                                  b'{"step":7,' + raw[1:]]))  # fmt: skip
    return ("manifest.json",)


def rewrite(folder, change):
    content = json.loads((folder / "manifest.json").read_bytes())
    change(content)
    (folder / "manifest.json").write_bytes(render(content))


DAMAGES = (flip, flip, flip, cut, append, empty, missing, swapped, of_another_step, link, extra, extra_folder, traversal,
           redirected, other_shape, other_form)  # fmt: skip


def test_200_damaged_checkpoints_are_refused_by_name(run, tmp_path):
    draw, kinds, names = random.Random(20), cycle(DAMAGES), cycle(FILES)
    whole = run / "checkpoints"
    for number in range(200):
        damage = next(kinds)
        # the files of each kind of damage in turn, whatever the lengths of the two lists
        name = next(names) if number % len(DAMAGES) else (next(names), next(names))[1]
        there = tmp_path / str(number)
        shutil.copytree(whole, there)
        folder = there / "step_2"
        named = damage(draw, folder, name) or (name,)
        with pytest.raises(Refused) as refusal:
            verify(folder)
        text = str(refusal.value)
        assert any(str(folder / one) in text for one in named), (damage.__name__, name, text)
        assert text.endswith(".")
        assert "\n" not in text
        shutil.rmtree(there)


@pytest.mark.parametrize(
    "length", [1 << 63, 100_000_001, 1 << 20, 1], ids=["huge", "over 100 MB", "beyond the file", "not JSON"]
)
def test_the_length_of_a_header_is_held_against_the_file(tmp_path, length):
    path = tmp_path / "weights-00000-of-00001.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + b"\0" * 100)
    with pytest.raises(Refused, match="damaged"):
        read_header(path)


def test_a_manifest_or_state_beyond_64_mib_is_not_read(run, tmp_path):
    for name in ("manifest.json", "state.json"):
        folder = tmp_path / name / "step_2"
        shutil.copytree(run / "checkpoints" / "step_2", folder)
        os.truncate(folder / name, (64 << 20) + 1)
        with pytest.raises(Refused, match=name):
            open_checkpoint(folder).read_state()


def test_refusals_of_the_command(run, tmp_path, capsys):
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    flip(random.Random(1), damaged / "checkpoints" / "step_2", FILES[4])
    assert main(["verify", str(damaged)]) == 2
    assert f"step_2/{FILES[4]}: damaged" in capsys.readouterr().err
    assert main(["export", str(damaged / "checkpoints" / "step_2"), "-o", str(tmp_path / "w")]) == 2
    assert f"step_2/{FILES[4]}: damaged" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
    assert main(["verify", str(tmp_path / "absent")]) == 2
    assert "not a checkpoint" in capsys.readouterr().err
    old = tmp_path / "step_3"
    old.mkdir()
    (old / "model.safetensors").write_bytes(b"")
    assert main(["verify", str(old)]) == 2
    assert "format 1" in capsys.readouterr().err
    (damaged / "checkpoints" / "step_2").rename(damaged / "checkpoints" / "step_9")
    assert main(["verify", str(damaged)]) == 2
    assert "another step" in capsys.readouterr().err

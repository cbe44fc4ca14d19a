"""A format is one module of its folder; the first that finds its files reads them."""

from __future__ import annotations

import pkgutil

import pytest

from entropy_probe.checkpoints import formats
from entropy_probe.checkpoints.formats import FORMATS, CheckpointFormat, folders, optimizer_of, weights_of


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def test_every_module_is_a_member():
    modules = {module.name for module in pkgutil.iter_modules(formats.__path__)} - {"base"}
    assert {type(member).__module__.rpartition(".")[2] for member in FORMATS} == modules
    assert all(isinstance(member, CheckpointFormat) for member in FORMATS)


@pytest.mark.parametrize("other", ["optimizer_0/.metadata", "optimizer/.metadata", ".metadata", "optimizer.bin"])
def test_the_trainers_own_state_comes_first(tmp_path, other):
    _, place = optimizer_of(touch(tmp_path, other, "optimizer.pt"))
    assert place == tmp_path / "optimizer.pt"


def test_model_and_optimizer_may_be_of_two_formats(tmp_path):
    touch(tmp_path, "optimizer.pt", "weights/.metadata")
    assert optimizer_of(tmp_path)[1] == tmp_path / "optimizer.pt"
    assert weights_of(tmp_path)[1] == tmp_path / "weights"
    assert folders(tmp_path) == {tmp_path / "weights"}


def test_a_directory_without_state_is_of_no_format(tmp_path):
    assert optimizer_of(tmp_path) is weights_of(tmp_path) is None
    assert folders(tmp_path) == set()


def codes(path):
    member, _ = optimizer_of(path)
    return [note.code for note in member.doubts(path)]


def test_only_what_the_trainer_saved_needs_its_other_files(tmp_path):
    other = touch(tmp_path / "other", "optimizer_0/.metadata")
    trainer = touch(tmp_path / "trainer", "optimizer.pt")
    assert codes(other) == []
    assert codes(trainer) == ["no_trainer_state", "no_scheduler"]
    for place in (other, trainer):
        assert codes(touch(place, "trainer_state.json")) == ["no_scheduler"]
        assert codes(touch(place, "scheduler.pt")) == []

from __future__ import annotations

import io
import pickle
import zipfile

import pytest
import torch

from entropy_probe.checkpoints import CheckpointError
from entropy_probe.checkpoints.errors import shown
from entropy_probe.checkpoints.pickles import MAX_VALUES, PLAIN, check_pickle
from entropy_probe.checkpoints.safe_read import read_archived


def doubled(times: int, empty: object = ()) -> object:
    """A container that unfolds to 2 to the power of ``times``."""
    value = empty
    for _ in range(times):
        value = type(empty)((value, value))  # type: ignore[call-arg]
    return value


@pytest.mark.parametrize("protocol", range(6))
def test_tuples_that_unfold_to_more_than_they_take_are_refused(protocol):
    for value in (doubled(60), [1, {"a": doubled(60)}]):
        with pytest.raises(pickle.UnpicklingError, match="a tuple of 1000 values"):
            check_pickle(pickle.dumps(value, protocol))
    check_pickle(pickle.dumps([doubled(8), tuple(range(MAX_VALUES - 1))], protocol))
    with pytest.raises(pickle.UnpicklingError, match="a tuple of 1000 values"):
        check_pickle(pickle.dumps(tuple(range(MAX_VALUES)), protocol))


@pytest.mark.parametrize("protocol", range(6))
def test_a_tuple_of_one_that_is_built_with_and_without_marks_is_the_same(protocol):
    """Values behind a mark count, and those before it stay."""
    inside = tuple(range(400))
    check_pickle(pickle.dumps([(inside, inside), inside, "x", (1, 2, 3, 4), {"a": [inside]}], protocol))
    with pytest.raises(pickle.UnpicklingError):
        check_pickle(pickle.dumps([1, (inside, inside, inside)], protocol))


def test_a_large_list_is_as_long_as_it_looks():
    check_pickle(pickle.dumps([list(range(10**5)), {i: i for i in range(10**4)}]))


@pytest.mark.parametrize("data", [b"", b"\x80\x02h\x05.", b"\x80\x02\x86.", b"\x80\x02t.", b"0.", b"2.", b"(", b"\xff"])
def test_what_is_no_pickle_is_an_error(data):
    with pytest.raises((ValueError, LookupError)):
        check_pickle(data)


def archive(pickled: bytes, name: str = "archive/data.pkl") -> bytes:
    """What ``torch.save`` would write for it."""
    stream = io.BytesIO()
    torch.save(0, stream)
    source = zipfile.ZipFile(stream)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as to:
        for entry in source.namelist():
            inside = entry.endswith("data.pkl")
            to.writestr(name if inside else entry, pickled if inside else source.read(entry))
    return made.getvalue()


def call(name: bytes, *arguments: object) -> bytes:
    """The pickle of a call."""
    inner = pickle.dumps(tuple(arguments), 2)[2:-1]
    return b"\x80\x02c" + name + b"\n" + inner + b"R."


UNFOLDING = b")" + 60 * b"q\x00h\x00\x86"
BOMBS = {
    "a key that unfolds": b"\x80\x02}" + UNFOLDING + b"K\x01s.",
    "a key within values": b"\x80\x02}K\x00}(" + UNFOLDING + b"K\x01us.",
    "a key of a key": b"\x80\x02}(K\x00" + UNFOLDING + b"tK\x01s.",
    "a huge bytearray": call(b"builtins\nbytearray", 10**15),
    "a huge tensor": call(b"torch\nFloatTensor", 10**13),
    "text that doubles": call(b"_codecs\nencode", b"x", "hex"),
    "a set": call(b"builtins\nset", [1]),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/DATA.pkl"])
def test_archives_are_gone_through_before_they_are_opened(bomb, name, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("it was opened"))
    with pytest.raises(CheckpointError, match=r"it names \w+|a tuple of 1000 values") as caught:
        read_archived(archive(BOMBS[bomb], name), "here")
    assert "\n" not in str(caught.value)


def test_what_torch_saves_of_plain_values_is_read():
    value = {
        "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3, 2, dtype=torch.bfloat16), "n": 3}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": list(range(5000)), "foreach": None}],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "others": [torch.float32, torch.Size([2, 3]), torch.device("cpu"), "x", torch.tensor(2), torch.tensor(True)],
    }
    stream = io.BytesIO()
    torch.save(value, stream)
    got = read_archived(stream.getvalue(), "here")
    assert got["param_groups"] == value["param_groups"]
    assert got["others"] == value["others"]
    assert torch.equal(got["state"][0]["exp_avg"], value["state"][0]["exp_avg"])
    assert torch.equal(got["parameter"], value["parameter"])
    assert all(" " in name for name in PLAIN)


def test_values_are_shown_in_one_short_line():
    for value in (
        doubled(10**4, []),
        doubled(99),
        {1: doubled(99, [])},
        [[[["x" * 10**6]]]],
        10**10000,
        "\n" * 99,
        object(),
    ):
        text = shown(value)
        assert len(text) <= 60
        assert text.isprintable()
    assert [shown(x) for x in (0.5, None, True, 3, "a", (1, 2.5), [None])] == [
        "0.5", "None", "True", "3", "'a'", "(1, 2.5)", "[None]",
    ]  # fmt: skip
    assert shown(torch.ones(3)) == "a value of Tensor"


def test_messages_are_one_line_whatever_they_quote():
    found = str(CheckpointError("a\nb\x1b[2J\ud800\u202e: " + "x" * 10**5 + "; do this"))
    assert found.startswith(r"a\nb\x1b[2J\ud800\u202e: xxx")
    assert found.endswith("xxx; do this")
    assert len(found) < 2000
    assert found.isprintable()
    assert found.encode()


@pytest.mark.parametrize(
    ("name", "maker"),
    [
        (b"ctorchao.optim.subclass_8bit\nOptimState8bit\n", r"torchao; in an environment with torchao: .*dequantize"),
        (b"ctorch._tensor\n_rebuild_from_type_v2\nctorchao.optim\nX\n", "torchao"),
        (b"cgalore_torch.galore_projector\nGaLoreProjector\n", "GaLore"),
    ],
)
def test_the_library_whose_objects_a_file_holds_is_named(name, maker):
    with pytest.raises(CheckpointError, match=f"nothing in it was run; this is state of .*{maker}"):
        read_archived(archive(b"\x80\x02" + name + b"."), "here")

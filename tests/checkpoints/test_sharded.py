"""Checkpoints that two ranks saved with ``torch.distributed.checkpoint``, loaded into plain models, and faults."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from entropy_probe.checkpoints import CheckpointError, UnsupportedError, errors, inspect_checkpoint, load_checkpoint
from entropy_probe.checkpoints import dcp as sharded_directory
from entropy_probe.checkpoints.dcp import METADATA, ShardedDirectory, make_up
from entropy_probe.checkpoints.record import record_checkpoint
from entropy_probe.cli.output.inputs import hash_directory
from entropy_probe.steps.adamw import optimizer_parameters, shadow_step
from tests.cli.conftest import invoke
from tests.faults.payloads import Payload, raw_pickle

ROOT = Path(__file__).parents[2]
LAYOUTS = ("hf", "plain", "nested")


@pytest.fixture
def copy_of(sharded, tmp_path) -> Callable[..., Path]:
    def copy(layout: str, name: str = "full") -> Path:
        return Path(shutil.copytree(sharded / name / layout / "checkpoint-2", tmp_path / "checkpoint-2"))

    return copy


@pytest.mark.parametrize(("name", "layout"), [("full", "hf"), ("tied", "plain")])
def test_the_next_step_is_the_next_checkpoint_bitwise(sharded, name, layout):
    run = sharded / name
    now, after = (load_checkpoint(run / layout / f"checkpoint-{k}", run / "base") for k in (2, 3))
    assert not torch.distributed.is_initialized()
    assert (now.report.verdict, now.report.reasons) == ("healthy", ())
    assert now.report.optimizer_state.mapping.startswith("names (")
    parameters = optimizer_parameters(now.model, now.optimizer)
    gradients = torch.load(run / "step-3.pt", weights_only=True)
    stepped = shadow_step(parameters, now.optimizer, gradients)
    expected = optimizer_parameters(after.model, after.optimizer)
    assert stepped.keys() == expected.keys() == gradients.keys()
    assert [n for n in stepped if not torch.equal(stepped[n], expected[n])] == []
    assert not any(torch.equal(parameters[n], expected[n]) for n in stepped)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["full", "tied"])
def test_weights_and_moments_are_those_of_the_ranks(sharded, name, layout):
    run = sharded / name
    state = load_checkpoint(run / layout / "checkpoint-2", run / "base")
    whole = torch.load(run / "whole-2.pt", weights_only=True)
    parameters = dict(state.model.named_parameters())
    assert parameters.keys() == whole["model"].keys()
    for key, parameter in parameters.items():
        assert parameter.requires_grad
        assert torch.equal(parameter, whole["model"][key])
        entry = state.optimizer.state[parameter]
        assert all(torch.equal(entry[moment], x) for moment, x in whole["moments"][key].items())
        assert entry["step"] == 2
    assert [g["lr"] for g in state.optimizer.param_groups] == [1e-3, 3e-4]
    assert [g["weight_decay"] for g in state.optimizer.param_groups] == [0.1, 0.0]
    rotary = state.model.model.rotary_emb.inv_freq
    assert rotary.isfinite().all()
    assert rotary[0] == 1.0


def test_the_commands_take_it(sharded, tmp_path):
    run = sharded / "full"
    inspected = invoke("inspect", run / "hf" / "checkpoint-2", "--base-model", run / "base", "--json")
    assert inspected.exit_code == 0, inspected.output
    assert json.loads(inspected.stdout)["movement"]["status"] == "consistent"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{a}+{a}=", "answer": str(2 * a)}) + "\n" for a in range(4)))
    settings = {
        "checkpoint": str(run / "plain" / "checkpoint-2"),
        "base_model": str(run / "base"),
        "output_dir": str(tmp_path / "out"),
        "prompts": {"jsonl": str(prompts)},
        "reward": "tests.cli.rewards:odd_characters",
        "update": {"num_prompts": 4, "group_size": 4},
        "evaluation": {"total_sequences": 16},
        "probe": {"max_completion_length": 6},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    done = invoke("run", tmp_path / "run.yaml")
    assert done.exit_code == 0, (done.output, done.exception)
    assert (
        json.loads((tmp_path / "out" / "results.json").read_text())["optimizer_state"]["mapping"]
        == "names (27 tensors)"
    )


def test_another_precision_and_what_is_not_for_it(sharded, tmp_path):
    run = sharded / "full"
    half = load_checkpoint(run / "hf" / "checkpoint-2", run / "base", dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert {x["exp_avg"].dtype for x in half.optimizer.state.values()} == {torch.float32}
    with pytest.raises(CheckpointError, match="not supported: a manifest of a sharded checkpoint"):
        record_checkpoint(run / "hf" / "checkpoint-2", run / "base", written_by="a test")
    with pytest.raises(CheckpointError, match=r"config\.json: expected the model's configuration.*pass base_model"):
        load_checkpoint(run / "hf" / "checkpoint-2")


@pytest.mark.parametrize("layout", ["hf", "plain"])
def test_a_sweep_is_computed_from_every_shard(copy_of, layout):
    checkpoint = copy_of(layout)
    before = hash_directory(checkpoint)
    for shard in checkpoint.rglob("*.distcp"):
        flip(shard)
        assert hash_directory(checkpoint) != before
        flip(shard)
    assert hash_directory(checkpoint) == before


@pytest.mark.parametrize("layout", ["hf", "plain"])
def test_an_adapter_on_a_sharded_base_model_is_refused(runs, sharded, tmp_path, layout):
    base = shutil.copytree(sharded / "full" / layout / "checkpoint-2", tmp_path / "base")
    shutil.copy(sharded / "full" / "base" / "config.json", base)
    checkpoint = runs("lora").checkpoint(2)
    with pytest.raises(UnsupportedError, match=r"a base model in shards of torch\.distributed\.checkpoint; save its"):
        load_checkpoint(checkpoint, base)
    assert inspect_checkpoint(checkpoint, base).verdict == "unusable"


# --- faults ---------------------------------------------------------------------------------------------------------


def index(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change the index with torch's own classes."""

    def make(checkpoint: Path) -> None:
        metadata = pickle.loads((checkpoint / METADATA).read_bytes())
        change(metadata)
        (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))

    return make


def again(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Save the same again, changed, from one process."""

    def make(checkpoint: Path) -> None:
        opened = ShardedDirectory.open(checkpoint)
        content: dict[str, Any] = {"model": {}, "optimizer": {"state": {}, "param_groups": [{}, {}]}}
        for place, entry in opened.entries.items():
            into: Any = content
            for key in place[:-1]:
                into = into[key] if isinstance(key, int) else into.setdefault(key, {})
            into[place[-1]] = opened.read(entry)
        change(content)
        shutil.rmtree(checkpoint)
        dcp.save(content, checkpoint_id=checkpoint, no_dist=True)

    return make


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 8
    file.write_bytes(data)


Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
MOMENT = f"optimizer.state.{Q}.exp_avg"


def hostile(checkpoint: Path) -> None:
    raw_pickle(checkpoint / METADATA, Payload(checkpoint.parent / "ran"))


def hostile_inside(checkpoint: Path) -> None:
    metadata = pickle.loads((checkpoint / METADATA).read_bytes())
    metadata.planner_data["evil"] = Payload(checkpoint.parent / "ran")
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))


def hostile_value(checkpoint: Path) -> None:
    """In the learning rate, which is a pickle of its own."""
    stream = io.BytesIO()
    torch.save(Payload(checkpoint.parent / "ran"), stream)
    (checkpoint / "evil.distcp").write_bytes(stream.getvalue())

    def change(metadata: Any) -> None:
        info = metadata.storage_data[MetadataIndex("optimizer.param_groups.0.lr")]
        info.relative_path, info.offset, info.length = "evil.distcp", 0, len(stream.getvalue())

    index(change)(checkpoint)


def stored(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change where one shard of a moment is said to be."""
    return index(lambda m: change(next(v for k, v in m.storage_data.items() if k.fqn == MOMENT)))


def huge(metadata: Any) -> None:
    meta = metadata.state_dict_metadata[MOMENT]
    meta.size = torch.Size([10**6, 10**6])
    meta.chunks[:] = [ChunkStorageMetadata(torch.Size([0, 0]), meta.size)]


def one_shard_for_all(metadata: Any) -> None:
    """Tensors of one shape share the data of one."""
    first: dict[Any, Any] = {}
    for key, info in metadata.storage_data.items():
        meta = metadata.state_dict_metadata[key.fqn]
        if getattr(meta, "size", None):
            same = first.setdefault((meta.size, key.offset), info)
            info.relative_path, info.offset, info.length = same.relative_path, same.offset, same.length


HELD = "held for what unfolds"


def unfolding(change: Callable[[Any], Any], empty: bytes = b")", close: bytes = b"t") -> Callable[[Path], None]:
    """Put a container that holds itself twice, 60 times over, in the place of ``HELD``; built by hand."""
    begin = b"" if close == b"t" else empty
    put, get = b"r" + (10**6).to_bytes(4, "little"), b"j" + (10**6).to_bytes(4, "little")
    unfolds = empty + put + 60 * (b"0" + begin + b"(" + 2 * get + close + put)

    def make(checkpoint: Path) -> None:
        index(change)(checkpoint)
        pickled = pickle.dumps(pickle.loads((checkpoint / METADATA).read_bytes()), 2)
        text = b"X" + len(HELD).to_bytes(4, "little") + HELD.encode()
        assert pickled.count(text) == 1
        (checkpoint / METADATA).write_bytes(pickled.replace(text, unfolds))

    return make


def empty_shard(*offsets: int) -> Callable[[Any], None]:
    """A shard of no elements, at a place where none can be or of too many dimensions."""

    def change(metadata: Any) -> None:
        at = torch.Size((*offsets, 0) if offsets[0] == 3 else offsets)
        metadata.state_dict_metadata[MOMENT].chunks.append(ChunkStorageMetadata(at, torch.Size([0] * len(at))))
        first = next(info for key, info in metadata.storage_data.items() if key.fqn == MOMENT)
        metadata.storage_data[MetadataIndex(MOMENT, at, 9)] = first

    return change


def empty_tensor(metadata: Any) -> None:
    meta = metadata.state_dict_metadata[MOMENT]
    meta.size, meta.chunks[:] = torch.Size([0, 2**40, 2**40]), []


def set_moment(value: Any, key: str = "exp_avg", name: str = Q) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        entry = content["optimizer"]["state"][name]
        if isinstance(value, float):
            entry[key].view(-1)[5] = value
        else:
            entry[key] = value(entry[key])

    return change


def transpose(content: dict[str, Any]) -> None:
    for key in ("exp_avg", "exp_avg_sq"):
        set_moment(lambda x: x.T.contiguous(), key, Q.replace("q_proj", "k_proj"))(content)


FAULTS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "hostile index": (hostile, "UnsafeFileError", "nothing in it was run"),
    "hostile entry of the index": (hostile_inside, "UnsafeFileError", "nothing in it was run"),
    "hostile value": (hostile_value, "UnsafeFileError", "nothing in it was run"),
    "index empty": (lambda c: (c / METADATA).write_bytes(b""), "DamagedFileError", "expected an intact index"),
    "index garbage": (lambda c: (c / METADATA).write_bytes(b"\x93" * 99), "UnsafeFileError|DamagedFileError", "index"),
    "index cut": (
        lambda c: (c / METADATA).write_bytes((c / METADATA).read_bytes()[:9000]),
        "UnsafeFileError|DamagedFileError",
        "index",
    ),
    "index nested deeply": (
        lambda c: (c / METADATA).write_bytes(b"\x80\x04" + b"]" * 10 + b"(" * 10**5 + b"."),
        "UnsafeFileError|DamagedFileError",
        "index",
    ),
    "index of something else": (lambda c: (c / METADATA).write_bytes(pickle.dumps([1])), "DamagedFileError", "intact"),
    "shard missing": (
        lambda c: (c / "__1_0.distcp").unlink(),
        "MissingFileError",
        r"__1_0\.distcp: expected the shard",
    ),
    "shard cut": (
        lambda c: (c / "__1_0.distcp").write_bytes((c / "__1_0.distcp").read_bytes()[:-5000]),
        "DamagedFileError",
        "bytes within",
    ),
    "shard flipped": (lambda c: flip(c / "__0_0.distcp"), "DamagedFileError|UnsafeFileError", "distcp: "),
    "shard outside": (stored(lambda i: setattr(i, "relative_path", "../evil")), "UnsafeFileError", "files beside it"),
    "shard absolute": (stored(lambda i: setattr(i, "relative_path", "/etc/passwd")), "UnsafeFileError", "files beside"),
    "shard before the file": (stored(lambda i: setattr(i, "offset", -1)), "DamagedFileError", "intact index"),
    "shard beyond the file": (stored(lambda i: setattr(i, "offset", 10**9)), "DamagedFileError", "bytes within"),
    "shard too short": (stored(lambda i: setattr(i, "length", 100)), "DamagedFileError", "bytes within"),
    "shard of another tensor": (
        index(
            lambda m: m.storage_data[MetadataIndex(MOMENT, torch.Size([0, 0]), 0)].__dict__.update(
                vars(m.storage_data[MetadataIndex("model.lm_head.weight", torch.Size([0, 0]), 0)])
            )
        ),
        "DamagedFileError",
        r"exp_avg: expected torch.float32 \[32, 64\], got torch.float32 \[49, 64\]",
    ),
    "shards leave a hole": (index(lambda m: m.state_dict_metadata[MOMENT].chunks.pop()), "DamagedFileError", "make up"),
    "shards overlap": (
        index(lambda m: m.state_dict_metadata[MOMENT].chunks.__setitem__(1, m.state_dict_metadata[MOMENT].chunks[0])),
        "DamagedFileError",
        "make up",
    ),
    "huge tensor": (index(huge), "DamagedFileError", "bytes within"),
    "no planner data": (index(lambda m: setattr(m, "planner_data", None)), "DamagedFileError", "intact index"),
    "transformed shards": (
        stored(lambda i: setattr(i, "transform_descriptors", ["zstd"])),
        "UnsupportedError",
        rf"\.metadata: {MOMENT}: not supported: transformed",
    ),
    "place that unfolds": (unfolding(lambda m: setattr(m, "planner_data", HELD)), "UnsafeFileError", "a tuple of 1000"),
    "place of lists that unfold": (
        unfolding(lambda m: m.planner_data.update({MOMENT: HELD}), b"]", b"e"),
        "DamagedFileError",
        rf"got: place \[\[.* of {MOMENT}",
    ),
    "sizes that unfold": (
        unfolding(lambda m: setattr(m.state_dict_metadata[MOMENT], "size", HELD), b"]", b"e"),
        "DamagedFileError",
        r"got: sizes \(\[\[",
    ),
    "offset that unfolds": (
        stored(lambda i: setattr(i, "offset", [[1]])),
        "DamagedFileError",
        r"got: sizes \(\[\[",
    ),
    "name of many lines": (
        index(lambda m: m.storage_data.update({MetadataIndex("a\n" * 99): None})),
        "DamagedFileError",
        "got: the name 'a.na",
    ),
    "place of nothing": (index(lambda m: m.planner_data.update({MOMENT: ()})), "DamagedFileError", r"place \(\) of"),
    "place of another": (index(lambda m: m.planner_data.update({MOMENT: ("a", 1)})), "DamagedFileError", "place "),
    "shard of a long name": (
        stored(lambda i: setattr(i, "relative_path", "x" * 5000)),
        "UnsafeFileError",
        "files beside",
    ),
    "shard of a name in other letters": (
        stored(lambda i: setattr(i, "relative_path", "\xe9" * 200)),
        "UnsafeFileError",
        "files beside",
    ),
    "shard of no name": (
        stored(lambda i: setattr(i, "relative_path", [["x"]])),
        "DamagedFileError",
        "got: the file ..",
    ),
    "empty shard of other dimensions": (index(empty_shard(3, 0)), "DamagedFileError", "make up"),
    "empty shard beyond the tensor": (index(empty_shard(10**6, 0)), "DamagedFileError", "make up"),
    "empty tensor of any size": (index(empty_tensor), "DamagedFileError", "dtype or size of"),
    "moment NaN": (again(set_moment(float("nan"))), "InvalidValueError", "q_proj.*exp_avg: expected finite"),
    "moment negative": (again(set_moment(-1.0, "exp_avg_sq")), "InvalidValueError", "at least 0"),
    "moments transposed": (
        again(transpose),
        "MappingError",
        r"names \(27 tensors\): expected every entry to have its parameter's shape",
    ),
    "moment missing": (
        again(lambda c: c["optimizer"]["state"][Q].pop("exp_avg")),
        "UnsupportedError",
        "expected AdamW's",
    ),
    "entry missing": (again(lambda c: c["optimizer"]["state"].pop(Q)), "MappingError", "none for 1"),
    "entry of no parameter": (
        again(lambda c: c["optimizer"]["state"].update(x=c["optimizer"]["state"].pop(Q))),
        "MappingError",
        "state for 1 in none",
    ),
    "parameter in two groups": (
        again(lambda c: c["optimizer"]["param_groups"][1]["params"].append(Q)),
        "MappingError",
        "got 1 in two",
    ),
    "names of another model": (
        again(lambda c: c["model"].update(x=c["model"].pop(Q))),
        "MismatchError",
        "1 missing .*1 unknown",
    ),
    "weights of another shape": (
        again(lambda c: c["model"].update({Q: c["model"][Q].T.contiguous()[:3]})),
        "MismatchError",
        "expected shape",
    ),
    "weights NaN": (
        again(lambda c: c["model"][NORM].fill_(float("nan"))),
        "InvalidValueError",
        "norm.weight: expected",
    ),
    "no optimizer": (again(lambda c: c.pop("optimizer")), "UnsupportedError", "expected one optimizer .*got 0"),
    "no model": (again(lambda c: c.pop("model")), "UnsupportedError", "expected one 'model' with tensors by name"),
    "beta of 1": (
        again(lambda c: c["optimizer"]["param_groups"][0].update(betas=(0.9, 1.0))),
        "InvalidValueError",
        "betas in",
    ),
    "bitsandbytes": (
        again(lambda c: c["optimizer"]["state"][Q].update(state1=torch.ones(2))),
        "UnsupportedError",
        "bitsandbytes",
    ),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_fault(copy_of, sharded, fault):
    make, kinds, message = FAULTS[fault]
    checkpoint = copy_of("plain")
    make(checkpoint)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(checkpoint, sharded / "full" / "base")
    assert type(caught.value) in [getattr(errors, kind) for kind in kinds.split("|")], str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (checkpoint.parent / "ran").exists()
    report = inspect_checkpoint(checkpoint, sharded / "full" / "base")
    assert (report.verdict, report.reasons) == ("unusable", (str(caught.value),))


def test_data_that_is_shared_is_refused(copy_of, sharded):
    checkpoint = copy_of("plain")
    index(one_shard_for_all)(checkpoint)
    index(lambda metadata: compact(checkpoint, metadata))(checkpoint)
    with pytest.raises(CheckpointError, match="declared by tensors that share their data"):
        load_checkpoint(checkpoint, sharded / "full" / "base")


def compact(checkpoint: Path, metadata: Any) -> None:
    """Leave only the parts of the files that are referred to."""
    data = {file.name: file.read_bytes() for file in checkpoint.glob("*.distcp")}
    kept: dict[tuple[str, int], int] = {}
    fresh = dict.fromkeys(data, b"")
    for info in metadata.storage_data.values():
        name, start = info.relative_path, info.offset
        if (name, start) not in kept:
            kept[name, start] = len(fresh[name])
            fresh[name] += data[name][start : start + info.length]
        info.offset = kept[name, start]
    for name, content in fresh.items():
        (checkpoint / name).write_bytes(content)


def test_the_payload_does_work_when_it_is_let(copy_of):
    checkpoint = copy_of("plain")
    hostile_inside(checkpoint)
    pickle.loads((checkpoint / METADATA).read_bytes())
    assert (checkpoint.parent / "ran").exists()


def test_a_tied_model_under_an_untied_configuration_is_refused(sharded, copy_of):
    """By its names alone the output layer would count as frozen."""
    checkpoint = copy_of("plain", "tied")
    with pytest.raises(CheckpointError, match=r"1 missing \['lm_head.weight'\]|of which only .* was trained"):
        load_checkpoint(checkpoint, sharded / "full" / "base")


def filled(shape, boxes) -> bool:
    """By brute force."""
    count = torch.zeros(tuple(2 * n + 8 for n in shape), dtype=torch.int)
    for offsets, sizes in boxes:
        count[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))] += 1
    count[tuple(slice(n) for n in shape)] -= 1
    return not count.any()


def cut(box, generator: torch.Generator, times: int) -> list[Any]:
    """A box in parts, some of them empty, that no planes need keep apart."""
    boxes = [box]
    for _ in range(times):
        at = int(torch.randint(len(boxes), (), generator=generator))
        offsets, sizes = boxes.pop(at)
        dim = int(torch.randint(len(sizes), (), generator=generator))
        first = int(torch.randint(sizes[dim] + 1, (), generator=generator))
        part = lambda x, value, dim=dim: (*x[:dim], value, *x[dim + 1 :])  # noqa: E731
        boxes += [(offsets, part(sizes, first))]
        boxes += [(part(offsets, offsets[dim] + first), part(sizes, sizes[dim] - first))]
    return boxes


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("shape", [(9,), (6, 7), (4, 3, 5), (0, 3)])
def test_what_makes_up_a_tensor_is_that_of_brute_force(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    boxes = cut(((0,) * len(shape), shape), generator, seed)
    assert filled(shape, boxes)
    assert make_up(shape, boxes)
    for at, (offsets, sizes) in enumerate(boxes):
        for change in ((0, 1), (1, 0), (1, 1)):  # larger, moved, both: none of them empty before
            move, grow = change
            box = (offsets[0] + move, *offsets[1:]), (sizes[0] + grow, *sizes[1:])
            others = [*boxes[:at], box, *boxes[at + 1 :]]
            assert make_up(shape, others) == filled(shape, others)
        others = [*boxes[:at], boxes[0], *boxes[at + 1 :]]  # one twice, as large in all where they are equal
        assert make_up(shape, others) == filled(shape, others)


@pytest.mark.parametrize("grid", [(1, 60_000), (60_000, 1), (30, 40, 50), (1, 245, 245), (60_000,)])
def test_a_grid_of_many_shards_takes_no_pairs(grid):
    shape = tuple(3 * n for n in grid)
    boxes = [(tuple(3 * at for at in place), (3,) * len(grid)) for place in itertools.product(*map(range, grid))]
    assert make_up(shape, boxes)
    # one reaches into its neighbour
    offsets, sizes = boxes[-1]
    boxes[-1] = tuple(max(0, at - 1) for at in offsets), sizes
    assert not make_up(shape, boxes)


def test_tilings_that_no_plane_cuts_and_scalars():
    pinwheel = [((0, 0), (2, 1)), ((0, 1), (1, 2)), ((1, 2), (2, 1)), ((2, 0), (1, 2)), ((1, 1), (1, 1))]
    assert make_up((3, 3), pinwheel)
    assert not make_up((3, 3), [*pinwheel[:-1], ((1, 1), (1, 2))])
    assert make_up((), [((), ())])
    assert not make_up((), [((), ())] * 2)
    assert not make_up((5, 5), [((0, 0), (5, 5))] * 60_000)


def test_more_dimensions_than_a_tensor_has_are_refused():
    shards = tuple(sharded_directory._Shard((0,) * 40, (1,) * 40, "f", 0, 4) for _ in range(2))
    entry = sharded_directory.Entry("x", ("x",), torch.float32, (1,) * 40, shards)
    with pytest.raises(UnsupportedError, match=r"here: not supported: 2 shards of 40 dimensions; save it from fewer"):
        sharded_directory._check_cover("here", entry)

"""Each fault raises its typed error or is harmless, without a crash, a prompt, a process, a connection or a write."""

from __future__ import annotations

import hashlib
import os
import re
import shutil

import pytest

from entropy_probe.checkpoints import errors
from entropy_probe.checkpoints.record import record_checkpoint
from tests.checkpoints.conftest import edit_json
from tests.faults.page import PAGE, page, rows
from tests.faults.payloads import legacy_pickle, raw_pickle, zip_pickle
from tests.faults.table import FAULTS, Case, Fault, optimizer_pickle

EXIT_CODES = {"healthy": 0, "suspicious": 1, "unusable": 2}


@pytest.fixture
def case(tmp_path, runs):
    """Make the parts of a case from a run; the adapter names its own copy of the base model."""

    def make(run: str) -> Case:
        made = Case(tmp_path / "case")
        shutil.copytree(runs(run).checkpoint(3), made.checkpoint)
        shutil.copytree(runs(run).directory / "base", made.base)
        made.outside.mkdir()
        (made.outside / "secret").write_text("secret")
        for file in made.checkpoint.rglob("adapter_config.json"):
            edit_json(file, base_model_name_or_path=str(made.base))
        return made

    return make


def snapshot(case: Case) -> dict[str, str]:
    found = {}
    for path in sorted(case.root.rglob("*")):
        regular = path.is_file() and not path.is_symlink()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if regular else str(os.lstat(path).st_mode)
        found[str(path.relative_to(case.root))] = content
    return found


def ask(examine, case: Case, fault: Fault, *also: str):
    base = None if fault.base is None else str(case.root / fault.base)
    request = {"checkpoint": str(case.checkpoint), "base": base, "cwd": str(case.root)}
    return examine(**request, environment=fault.environment, also=also)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(case, examine, fault):
    made = case(fault.run)
    if fault.manifest:
        record_checkpoint(made.checkpoint, written_by="a test")
    fault.make(made)
    before = snapshot(made)
    answers = ask(examine, made, fault, *["table"] * fault.table)
    assert snapshot(made) == before
    for what, answer in answers.items():
        assert answer["status"] == 0, f"{what}: {answer}"
        assert answer["acts"] == [], what
        assert "Traceback" not in answer["stderr"], what
        assert "\x1b" not in answer["stdout"] + answer["stderr"], what
    loaded, report = answers["load"]["output"], answers["json"]["stdout"]
    if fault.error is not None:
        assert loaded["error"] is not None, "expected an error, but it loaded"
        assert loaded["error"][0] == fault.error, loaded["message"]
        assert "CheckpointError" in loaded["error"]
        assert re.search(fault.message, loaded["message"]), loaded["message"]
        assert "\n" not in loaded["message"]
    else:
        assert loaded["error"] is None, loaded
        assert loaded["finite"]
        if fault.suspicious is not None:
            assert any(re.search(fault.suspicious, note["text"]) for note in loaded["report"]["notes"])
        else:
            assert fault.harmless
            assert (loaded["report"]["verdict"], loaded["report"]["notes"]) == ("healthy", [])
    verdict = fault.inspects or ("unusable" if fault.error else "suspicious" if fault.suspicious else "healthy")
    assert f'"verdict": "{verdict}"' in report
    assert report.isascii()
    for what in answers.keys() - {"load"}:
        assert answers[what]["output"] == {"exit": EXIT_CODES[verdict]}
    if fault.table:
        assert f"Verdict: {verdict}" in answers["table"]["stdout"]


@pytest.mark.parametrize("run", ["lora", "full", "tied"])
def test_no_fault(case, examine, run):
    """The examination itself: an intact checkpoint passes it, so that what the faults show is theirs."""
    made = case(run)
    answers = ask(examine, made, Fault("none", run, lambda _: None), "table")
    assert answers["load"]["output"]["error"] is None
    assert answers["load"]["output"]["report"]["verdict"] in ("healthy", "suspicious")
    assert all(answer["status"] == 0 and answer["acts"] == [] for answer in answers.values())


@pytest.mark.parametrize("write", [zip_pickle, legacy_pickle, raw_pickle])
def test_the_payloads_do_work_when_they_are_let(case, write):
    import pickle

    import torch

    made = case("lora")
    optimizer_pickle(write)(made)
    if write is raw_pickle:
        pickle.loads(made.optimizer.read_bytes())
    else:
        torch.load(made.optimizer, weights_only=False)
    assert (made.outside / "ran").is_dir()


def test_the_watch_sees_what_a_command_does(case, examine):
    """``manifest`` writes one file under a temporary name and renames it; nothing else."""
    made = case("lora")
    before = snapshot(made)
    answer = ask(examine, made, Fault("none", "lora", lambda _: None), "manifest")["manifest"]
    assert answer["output"] == {"exit": 0}
    assert [act.split()[0] for act in answer["acts"]] == ["open", "os.rename"]
    assert snapshot(made).keys() - before.keys() == {"run/checkpoint-3/entropy-probe-manifest.json"}


def test_every_kind_of_error_is_met():
    met = {fault.error for fault in FAULTS if fault.error}
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ValueError)}
    assert met == kinds
    assert all(issubclass(getattr(errors, name), errors.CheckpointError) for name in kinds)
    assert len(FAULTS) >= 35
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_the_page_has_the_table_as_it_is():
    assert PAGE.read_text() == page(), "make faults writes it anew"
    names = [(where, fault) for where, fault, *_ in rows()]
    assert len(set(names)) == len(names)

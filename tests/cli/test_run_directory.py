from __future__ import annotations

import os

import pytest

from entropy_probe.cli.run_directory import RUN_FILES, check_output_dir, stage
from tests.report.results import make_result


def write_run(directory, *names: str, text: str = "new") -> None:
    with stage(directory) as staging:
        for name in names:
            (staging / name).write_text(text)
        make_result().save(staging)


def contents(directory) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_files_appear_together_and_nothing_else_is_left(tmp_path):
    out = tmp_path / "a" / "b"
    with stage(out) as staging:
        (staging / "config.yaml").write_text("x")
        assert [path.name for path in out.iterdir()] == [staging.name]
    assert contents(out) == {"config.yaml": "x"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, RuntimeError])
def test_after_an_error_everything_is_as_it_was(tmp_path, error):
    def fail(directory):
        with stage(directory) as staging:
            (staging / "config.yaml").write_text("half")
            raise error

    with pytest.raises(error):
        fail(tmp_path / "new")
    assert not (tmp_path / "new").exists()

    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(error):
        fail(empty)
    assert list(empty.iterdir()) == []

    write_run(tmp_path / "run", "config.yaml", "update.parquet")
    before = contents(tmp_path / "run")
    with pytest.raises(error):
        fail(tmp_path / "run")
    assert contents(tmp_path / "run") == before


def test_overwriting_removes_what_the_new_run_has_not_and_nothing_of_others(tmp_path):
    write_run(tmp_path / "run", "config.yaml", "update.parquet", "evaluation.parquet")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    kept = frozenset({(tmp_path / "run" / "update.parquet").resolve()})
    with stage(tmp_path / "run", keep=kept) as staging:
        (staging / "config.yaml").write_text("second")
        make_result().save(staging)
    left = contents(tmp_path / "run")
    assert left.keys() == {"config.yaml", "results.json", "update.parquet", "notes.txt"}
    assert left["config.yaml"] == "second"
    assert left["notes.txt"] == "mine"


def test_directories_that_may_be_written(tmp_path):
    check_output_dir(tmp_path / "new", overwrite=False)
    check_output_dir(tmp_path, overwrite=False)
    write_run(tmp_path / "run", "config.yaml")
    check_output_dir(tmp_path / "run", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    check_output_dir(tmp_path / "other", overwrite=True)


def test_directories_that_may_not_be_written(tmp_path):
    write_run(tmp_path / "run", "config.yaml")
    with pytest.raises(ValueError, match=r"expected a new or empty directory, .* pass --overwrite"):
        check_output_dir(tmp_path / "run", overwrite=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        check_output_dir(tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("name", RUN_FILES)
def test_overwrite_never_replaces_files_that_no_run_wrote(tmp_path, name):
    (tmp_path / name).write_text("somebody's own")
    with pytest.raises(ValueError, match=f"holds {name} but no result of an earlier run"):
        check_output_dir(tmp_path, overwrite=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_refused_before_any_work(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="cannot write into"), stage(tmp_path / "locked" / "out"):
        pass


def test_a_path_through_a_file_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ValueError, match=r"cannot write into .*file/out: Not a directory"),
        stage(tmp_path / "file" / "out"),
    ):
        pass

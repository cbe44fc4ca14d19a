import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.redesign import compare
from tests.redesign.compare import differences

RESULT = {
    "predicted": {"value": -0.1, "standard_error": 0.0},
    "row_means": [1.5, 2.5],
    "diagnostics": {"messages": ["the step is small", "few prompts"]},
    "timing": {"sample": 1.0},
    "memory": {"host_peak": 10},
    "attribution": {"seconds": 2.0, "folds": 4},
    "schema_version": 2,
    "versions": {"torch": "2.6"},
}
TOKENS = {"position": [0, 1], "contribution": [0.1, -0.2], "text": ["a", "b"], "logprobs": [[0.5], [0.25, 0.125]]}


@pytest.fixture
def before(tmp_path) -> Path:
    return written(tmp_path / "before", RESULT, TOKENS)


@pytest.fixture
def after(before, tmp_path) -> Path:
    return Path(shutil.copytree(before, tmp_path / "after"))


def written(directory: Path, result: dict, tokens: dict) -> Path:
    (directory / "run").mkdir(parents=True, exist_ok=True)
    (directory / "run" / "results.json").write_text(json.dumps(result))
    pq.write_table(pa.table(tokens), directory / "run" / "tokens.parquet")
    return directory


def found(before: Path, after: Path, **renames: str) -> list[str]:
    return list(differences(before, after, renames))


def test_a_copy_has_the_same_numbers(before, after):
    assert found(before, after) == []


def test_a_last_digit_in_json_is_one_line(before, after):
    value = math.nextafter(-0.1, 0)
    written(after, RESULT | {"predicted": {"value": value, "standard_error": 0.0}}, TOKENS)
    assert found(before, after) == [f"run/results.json: predicted.value: -0.1 before, {value!r} after"]


@pytest.mark.parametrize("other", [-0.0, 0, None, "0.0"])
def test_a_zero_is_not_another_zero(before, after, other):
    written(after, RESULT | {"predicted": {"value": -0.1, "standard_error": other}}, TOKENS)
    assert len(found(before, after)) == 1


def test_a_last_digit_in_a_table_is_one_line(before, after):
    value = math.nextafter(-0.2, 0)
    written(after, RESULT, TOKENS | {"contribution": [0.1, value]})
    assert found(before, after) == [f"run/tokens.parquet: contribution.values[1]: -0.2 before, {value!r} after"]


def test_a_digit_inside_a_list_of_a_table(before, after):
    written(after, RESULT, TOKENS | {"logprobs": [[0.5], [0.25, math.nextafter(0.125, 1)]]})
    assert [line.partition(":")[2].partition(":")[0] for line in found(before, after)] == [" logprobs.values[1][1]"]


def test_a_column_type_and_a_lost_column(before, after):
    narrow = TOKENS | {"position": pa.array([0, 1], pa.int32())}
    written(after, RESULT, narrow)
    assert found(before, after) == ['run/tokens.parquet: position.type: "int64" before, "int32" after']
    written(after, RESULT, {name: column for name, column in TOKENS.items() if name != "text"})
    assert any(line.startswith("run/tokens.parquet: text: ") for line in found(before, after))


def test_not_a_number_equals_itself(before, after):
    for directory in (before, after):
        written(directory, RESULT | {"row_means": [math.nan, math.inf]}, TOKENS)
    assert found(before, after) == []
    written(after, RESULT | {"row_means": [0.0, math.inf]}, TOKENS)
    assert found(before, after) == ["run/results.json: row_means[0]: NaN before, 0.0 after"]


def test_what_the_machine_decides_is_left_out(before, after):
    other = {"timing": {}, "memory": {"host_peak": 11}, "schema_version": 3, "versions": {"torch": "2.7"}}
    written(after, RESULT | other | {"attribution": {"seconds": 3.0, "folds": 4}}, TOKENS)
    assert found(before, after) == []


def test_rows_and_files_of_one_side(before, after):
    written(after, RESULT | {"row_means": [1.5]}, TOKENS)
    (after / "run" / "tokens.parquet").unlink()
    (after / "run" / "validation.json").write_text("{}")
    assert found(before, after) == [
        "run/results.json: row_means: [1.5, 2.5] before, [1.5] after",
        "run/tokens.parquet: missing after",
        "run/validation.json: missing before",
    ]


def test_renames_reach_keys_columns_and_files(before, after):
    renamed = {("forecast" if key == "predicted" else key): value for key, value in RESULT.items()}
    tokens = {("share" if name == "contribution" else name): column for name, column in TOKENS.items()}
    written(after, renamed, tokens)
    (after / "run" / "tokens.parquet").rename(after / "run" / "each_token.parquet")
    renames = {"predicted": "forecast", "contribution": "share", "tokens.parquet": "each_token.parquet"}
    assert found(before, after, **renames) == []
    assert len(found(before, after)) > 0


def test_notes_are_their_texts(before, after):
    notes = [
        {"code": "small_step", "text": "the step is small", "remedy": "", "numbers": {}},
        {"code": "few_prompts", "text": "few prompts", "remedy": "", "numbers": {"prompts": 3}},
    ]
    written(after, RESULT | {"diagnostics": {"notes": notes}}, TOKENS)
    assert list(differences(before, after)) == []
    written(after, RESULT | {"diagnostics": {"notes": notes[:1]}}, TOKENS)
    assert len(list(differences(before, after))) == 1


def test_paths_of_the_two_directories_are_one(before, after):
    for directory in (before, after):
        written(directory, RESULT | {"config": {"output_dir": str(directory.resolve() / "run")}}, TOKENS)
    assert found(before, after) == []


def test_the_inputs_are_compared_by_their_hashes(before, after):
    for directory, said in ((before, "a"), (after, "b")):
        (directory / "inputs").mkdir()
        (directory / "inputs" / "hashes.json").write_text(json.dumps({"model": said}))
        (directory / "inputs" / "trainer_state.json").write_text(json.dumps(said))
    assert found(before, after) == ['inputs/hashes.json: model: "a" before, "b" after']


def test_the_command_ends_with_1_where_numbers_differ(before, after):
    command = [sys.executable, compare.__file__, before, after]
    same = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (same.returncode, same.stdout) == (0, "the same numbers\n")
    written(after, RESULT | {"row_means": [1.5, 2.0]}, TOKENS)
    differ = subprocess.run(command, capture_output=True, text=True, check=False)
    assert differ.returncode == 1
    assert differ.stdout == "run/results.json: row_means[1]: 2.5 before, 2.0 after\n1 differences\n"


def test_a_directory_without_runs_is_an_error(before, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a directory of runs, found none"):
        found(before, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected runs with results, found none"):
        found(before, tmp_path / "empty")

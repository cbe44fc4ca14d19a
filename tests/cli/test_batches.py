"""What is said of how batches were sampled."""

import pytest

from entropy_probe.cli.batches import _describe
from entropy_probe.cli.config import RunConfig
from entropy_probe.sampling import SamplingReport


@pytest.mark.parametrize(("share", "said"), [(0.0, []), (0.09, []), (0.25, ["25.0% of the responses hit"])])
def test_truncated_responses_are_worth_a_note_where_they_are_many(tmp_path, share, said):
    rollouts = {"update": tmp_path / "u.parquet", "evaluation": tmp_path / "e.parquet"}
    config = RunConfig(checkpoint=tmp_path, output_dir=tmp_path / "out", rollouts=rollouts)
    notes = _describe("update", SamplingReport(8, 2, 2, 0, 1, 0.5, share, 3.0), config)
    assert [text in note.text for note, text in zip(notes, said, strict=True)] == [True] * len(said)

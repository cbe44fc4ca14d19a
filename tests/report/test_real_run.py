"""The run of ``make demo-real`` on SmolLM2-135M-Instruct, as it was saved: read and shown without a model.

Its rollouts and pictures are left out.
"""

import shutil
from pathlib import Path

from typer.testing import CliRunner

from entropy_probe.cli import app
from entropy_probe.report.payload import turns
from entropy_probe.report.tables import read_tables

RUN = Path(__file__).with_name("smollm2")


def test_it_is_shown_without_a_model(tmp_path):
    shutil.copytree(RUN, tmp_path / "run")
    done = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "predicted δH₁   -0.067 ± 0.011    this step ± 0.010, batch ± 2.7e-3" in done.output
    assert "…2 * 4. …" in done.output
    assert "im_start" not in done.output
    assert (tmp_path / "run" / "report.html").stat().st_size < 3e6


def test_its_prompts_are_named_and_cut():
    tables = read_tables(RUN)
    assert tables is not None
    assert tables.markup == {"<|im_start|>", "<|im_end|>"}
    for name, text in zip(tables.prompts["name"], tables.prompts["prompt"], strict=True):
        assert name.startswith("Solve the following multiplication: ")
        pieces = turns(text, tables.markup)
        assert [piece for kind, piece in pieces if kind == "role"] == ["system", "user", "assistant"]
        assert "".join(piece for _, piece in pieces) == text
        assert ("text", f"\n{name}") in pieces

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from entropy_probe.estimators.importance import SequenceWeights
from entropy_probe.report import checkpoint_section, figure_files, page, print_files, run_sections
from entropy_probe.report.sections.base import Bar, Row, Rows, Section, Verdict, bar_charts
from entropy_probe.report.wording import HARMLESS_ESS
from entropy_probe.results.checkpoint import CheckpointReport, GroupReport, MovementReport
from entropy_probe.results.probe import ProbeResult, SamplerMismatch
from tests.notes import noted
from tests.report.results import make_cross_prompt, make_result, run_page, shown


def show(result: ProbeResult, **settings) -> str:
    return shown(run_sections(result), **settings)


def test_every_number_is_in_the_table_with_its_error():
    text = show(make_result())
    rows = {line[1:16].strip(): line[16:].strip() for line in text.splitlines() if len(line) > 16}
    assert "nats/token" in text
    assert "8e-07" in text
    assert rows["entropy H(θ)"].startswith("0.842 ± 0.012")
    assert rows["predicted δH₁"] == "-1.432e-3 ± 0.081e-3  this step ± 6.0e-5, batch ± 5.4e-5"
    assert rows["gradient"] == "-0.520e-3 ± 0.030e-3"
    assert rows["momentum"] == "-0.912e-3 ± 0.060e-3"
    assert rows["weight decay"] == "0 ± 0"
    assert rows["realized ΔH"].startswith("-1.380e-3 ± 0.080e-3")
    assert rows["ΔH / δH₁"].startswith("0.964")
    assert rows["ΔH − δH₁"].startswith("0.052e-3 ± 0.030e-3")
    assert rows["ESS"].startswith("98.3%")
    assert "Agrees within error." in text


@pytest.mark.parametrize("terminal", [True, False])
def test_no_row_is_broken_at_80_columns(terminal):
    text = show(make_result(predicted=(-1.234e-300, 1e-302)), terminal=terminal)
    assert text.count("predicted δH₁") == 1
    assert ("\x1b[" in text) == terminal
    assert all(len(line) <= 80 for line in show(make_result()).splitlines())


def test_a_heavy_tail_that_does_no_harm_is_not_shown_as_beyond_a_bound():
    result = make_result()
    assert result.realized is not None
    heavy = result.realized.model_copy(update={"pareto_k": 0.75, "ess_fraction": 0.995})
    text = show(result.model_copy(update={"realized": heavy}))
    assert "Pareto k 0.75 tail of the weights; judged below 99% ESS" in " ".join(text.split())
    rest = heavy.model_copy(update={"ess_fraction": 0.98})
    assert "tail of the weights; at most 0.58" in show(result.model_copy(update={"realized": rest}))
    for ess, judged in ((100 * HARMLESS_ESS, False), (100 * HARMLESS_ESS - 0.1, True)):
        assert SequenceWeights(torch.ones(100).double(), ess, 1.0, 2.0).heavy_tailed == judged


def test_what_was_not_computed_is_not_shown():
    predicted_only = show(make_result(realized=None))
    assert "δH₁" in predicted_only
    assert "ΔH" not in predicted_only
    assert "ESS" not in predicted_only
    realized_only = show(make_result(predicted=None))
    assert "δH₁" not in realized_only
    assert "momentum" not in realized_only
    assert "ESS" in realized_only


def test_one_batch_and_two_batch_predictions_stand_side_by_side():
    text = show(make_result(cross_prompt=make_cross_prompt()))
    lines = [line.strip() for line in text.splitlines()]
    assert "one batch δH₁   -1.90e-3 ± 0.45e-3    SE: jackknife 4.5e-4, plug-in 4.0e-4" in lines
    assert "clusters       48                   blocks of 2 prompts, frozen geometry" in lines
    assert "predicted δH₁" in text
    alone = show(make_result(None, None, cross_prompt=make_cross_prompt()))
    assert "one batch δH₁" in alone
    assert "predicted δH₁" not in alone
    assert "Distinguishable from 0. The predicted change is 4.2 standard errors" in " ".join(alone.split())
    assert all(len(line) <= 80 for line in text.splitlines())


def test_ratio_to_a_prediction_of_0_is_undefined():
    assert "undefined" in show(make_result(predicted=(0.0, 0.0)))


def test_notes_and_paths_are_printed_as_they_are(tmp_path):
    directory = tmp_path / "[red]a[/red]" / ("long" * 30)
    directory.mkdir(parents=True)
    (directory / "results.json").write_text("{}")
    (directory / ".hidden").write_text("")
    stream = io.StringIO()
    print_files(directory, Console(file=stream, width=80))
    text = show(make_result(notes=noted("layer [bold]0[/bold] :smile:", remedy="Look at [i]it[/i].")))
    assert "note: layer [bold]0[/bold] :smile:" in text
    assert "   Look at [i]it[/i]. " in text
    assert f"Saved in {directory}: results.json\n" in stream.getvalue()


def make_report(**changes) -> CheckpointReport:
    group = GroupReport(
        num_parameters=16, learning_rate=8e-7, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, flags={"amsgrad": False}
    )
    fields = {
        "path": "runs/[b]checkpoint-3",
        "kind": "full",
        "global_step": 3,
        "optimizer": "AdamW",
        "groups": (group,),
        "num_with_exp_avg_sq": 16,
        "num_with_step": 16,
        "num_zero_elements": 1200,
        "optimizer_state": make_result().optimizer_state,
        "verdict": "suspicious",
        "notes": noted("trainer_state.json is [missing]", remedy="Copy [b]it[/b]."),
    }
    return CheckpointReport(**(fields | changes))


def show_checkpoint(report: CheckpointReport, **settings) -> str:
    return shown([checkpoint_section(report)], **settings)


def test_checkpoint_table():
    text = show_checkpoint(make_report())
    for words in (
        "runs/[b]checkpoint-3",
        "full weights",
        "AdamW",
        "8e-07",
        "0.9, 0.95",
        "1e-08",
        "0.01",
        "1.00 to 10.0",
    ):
        assert words in text
    assert "16 of 16 tensors, 100% of elements" in text
    assert "1,200 elements" in text
    assert "all at 20" in text
    assert "Verdict: suspicious" in text
    assert "note: trainer_state.json is [missing]" in text
    assert "Copy [b]it[/b]." in text


def test_what_files_say_cannot_act_on_the_terminal():
    movement = MovementReport(
        reference="0, where lora_B starts",
        num_parameters=14,
        correlation=0.05,
        correlation_of_others=-0.01,
        status="exchanged",
        exchanged=(("a", "b"),),
    )
    hostile = "\x1b]0;owned\x07\u202e[red]x"
    report = make_report(
        base_model=hostile, notes=noted(hostile, remedy=hostile), movement=movement, manifest="training"
    )
    text = show_checkpoint(report, width=200)
    assert text.count(r"\x1b]0;owned\x07\u202e[red]x") == 3
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "from 0, where lora_B starts, 14 tensors: correlation 0.05" in text
    assert "entries exchanged" in text
    assert "recorded during training; hashes agree" in text


def test_long_facts_are_whole_at_80_columns():
    text = show_checkpoint(make_report(movement_not_checked="the base model " * 9 + "is not at hand"))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    assert "the base model is not at hand" in " ".join(text.split())


def test_checkpoint_that_could_not_be_read_shows_the_reason():
    report = CheckpointReport(path="x", kind="lora", verdict="unusable", notes=noted("optimizer.pt: truncated"))
    text = show_checkpoint(report)
    assert "LoRA adapter" in text
    assert "Verdict: unusable" in text
    assert "note: optimizer.pt: truncated" in text
    assert "Look again." not in text


def test_showing_a_result_imports_no_heavy_library():
    code = (
        "import sys, json\n"
        "from entropy_probe.report import console\n"
        "print(json.dumps([m for m in ('transformers', 'peft', 'pyarrow') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_what_is_not_modelled_stands_below_the_notes():
    result = make_result(notes=noted("a note"))
    assert "not modelled" not in show(result)
    diagnostics = result.diagnostics.model_copy(
        update={"not_modelled": ("dropout of up to 0.1", "momentum"), "evaluation_unit": "trajectory"}
    )
    text = " ".join(show(result.model_copy(update={"diagnostics": diagnostics})).split())
    assert "note: a note Look again. not modelled: dropout of up to 0.1 not modelled: momentum" in text
    assert "256 trajectories on the evaluation side" in text


def test_the_sampler_is_compared_with_the_policy():
    result = make_result()
    assert "sampler" not in show(result)
    mismatch = SamplerMismatch(mean=0.0021, max=0.13, ess_fraction=0.97)
    diagnostics = result.diagnostics.model_copy(update={"mismatch": mismatch})
    text = show(result.model_copy(update={"diagnostics": diagnostics}))
    assert "sampler, evaluation 2.1e-3 |Δ log π|, at most 0.13; ESS 97" in " ".join(text.split())
    assert all(len(line) <= 80 for line in text.splitlines())


def test_each_batch_says_how_it_fits_the_policy():
    text = show(make_result())
    assert "policy fit, evaluation z -0.4 surprisal − entropy -3.1e-3 nats/token" in " ".join(text.split())
    assert "policy fit, update z +5.3 surprisal − entropy 0.041 nats/token" in " ".join(text.split())
    result = make_result()
    fit = result.diagnostics.policy_fit
    same = result.diagnostics.model_copy(update={"policy_fit": fit.model_copy(update={"update": fit.evaluation})})
    assert show(result.model_copy(update={"diagnostics": same})).count("policy fit") == 1


def test_a_record_of_another_kind_shows_itself_by_one_section():
    total = Row("made up", "-1.0e-3 ± 0.2e-3", "by hand", headline=True)
    bars = [Bar(total, -1e-3, 4e-4), Bar(Row("part", "-0.5e-3"), -5e-4)]
    section = Section(
        title="A what-if",
        key="what-if",
        short="What-if",
        verdict=Verdict("found", "It falls by 1.0e-3.", "ok"),
        blocks=(*bar_charts("Drawn", bars, "nats/token", "", "what-if"), Rows((total, bars[1].row), "nats/token")),
    )
    console, html = shown([section]), page([section])
    assert "made up  -1.0e-3 ± 0.2e-3  by hand" in console
    assert "Found. It falls by 1.0e-3." in console
    assert "(−1.0 ± 0.2)×10⁻³" in html
    assert "It falls by 1.0×10⁻³." in html
    assert html.count('<li class="row bar">') == 2
    assert figure_files([section]).keys() == {"what-if.png", "what-if.svg"}


def test_one_batch_has_the_larger_of_its_two_errors_everywhere():
    for jackknife, plugin in ((0.3e-3, 0.5e-3), (0.5e-3, 0.3e-3)):
        result = make_result(None, None, cross_prompt=make_cross_prompt(se_jackknife=jackknife, se_plugin=plugin))
        assert "one batch δH₁  -1.90e-3 ± 0.50e-3" in show(result)
        assert "(−1.90 ± 0.50)×10⁻³" in run_page(result)

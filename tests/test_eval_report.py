"""The report of a tiny run: stable keys, figures that follow from the evidence, and what a reader sees."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, cast

import pytest

from eval import report
from eval.config import KNOWN, Evaluate, ReportJob
from eval.evidence import count_tokens, gather
from eval.markdown import markdown_table
from eval.matrix import as_text
from eval.page import html_page
from eval.plots import plot_accuracy, plot_kl, plot_recovery
from eval.table import terminal_table, verdict
from launch.recipe import Recipe
from recovery.artifacts import read_manifest
from recovery.config import Runtime
from recovery.corpus import read_split
from recovery.errors import UserError
from recovery.files import read_json, write_json
from recovery.stage import build
from tests.pipeline import make_benchmarks, run_in_process, stages_of, tiny_recipe

KEYS = {
    *("kl", "top1", "kl_contexts", "top1_contexts", "ar_percent", "ar_percent_measurable", "tasks", "tokens"),
    *("tokens_generated", "trainable_parameters", "model_parameters", "tokens_per_sample", "seconds"),
    "closed_form",
}
AR_KEYS = {"value", "low", "high", "gap", "gap_se", "measurable"}


@pytest.fixture(scope="module")
def recipe(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    data = make_benchmarks(tmp_path_factory.mktemp("data"))
    return tiny_recipe(models["llama"], data, train={"epochs": 1, "evaluate_every": 3})


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run_in_process(recipe, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def summary(run: dict[str, Path]) -> dict[str, Any]:
    return read_json(run["report"] / "summary.json")


def test_the_keys_stay(summary: dict[str, Any]):
    assert set(summary) == KEYS
    assert set(summary["ar_percent"]) == AR_KEYS
    assert set(summary["ar_percent_measurable"]) == {*AR_KEYS, "tasks"}
    assert set(summary["kl_contexts"]) == {"degraded", "recovered", "recovery", "low", "high"}
    assert set(summary["kl"]) == {*summary["kl_contexts"], "learned"}
    assert set(summary["top1"]) == set(summary["top1_contexts"]) == {"degraded", "recovered"}
    assert set(summary["tasks"]) == {"arc_easy", "piqa"}
    assert set(summary["tasks"]["piqa"]) == {"reference", "degraded", "recovered", "n", "ar_percent"}
    assert set(summary["seconds"]) == {"degrade", "generate", "contexts", "train", "evaluate"}
    assert isinstance(summary["tokens"], int)


def test_figures_follow_from_the_evidence(run: dict[str, Path], summary: dict[str, Any]):
    for model in ("degraded", "recovered"):
        found = read_json(run[f"evaluate-{model}"] / "divergence.json")
        assert summary["kl"][model] == found["held_out"]["kl"]
        assert summary["top1_contexts"][model] == found["contexts"]["top1"]
        assert (
            summary["tasks"]["piqa"][model]["acc"] == read_json(run[f"evaluate-{model}"] / "scores.json")["piqa"]["acc"]
        )
    assert summary["kl"]["low"] < summary["kl"]["recovery"] < summary["kl"]["high"]
    assert summary["kl"]["recovery"] == pytest.approx(1 - summary["kl"]["recovered"] / summary["kl"]["degraded"])
    details = read_manifest(run["train"])["details"]
    assert summary["tokens"] == details["loss_tokens"] + details["calibration_tokens"]
    assert summary["trainable_parameters"] == details["trainable_parameters"]
    generated = sum(len(read_split(run["generate"], split).ids) for split in ("train", "held_out"))
    assert summary["tokens_generated"] == generated == count_tokens(run["generate"])
    parts = [read_manifest(run[f"evaluate-{model}"])["seconds"] for model in ("reference", "degraded", "recovered")]
    assert summary["seconds"]["evaluate"] == pytest.approx(sum(parts), abs=0.01)


def test_the_report_opens_with_the_result_and_says_how_to_use_it(run: dict[str, Path], summary: dict[str, Any]):
    text = (run["report"] / "report.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "# tiny"
    assert lines[2] == verdict(summary)
    assert lines[4].startswith("|  | reference | degraded | recovered |")
    assert lines[6].startswith("| KL, held-out text")
    assert f"{summary['kl']['recovered']:.3f}" in lines[6]
    assert f"{summary['tokens']:,}" in text
    assert f'PeftModel.from_pretrained(degraded, "{run["train"]}")' in text
    assert f'from_pretrained("{run["degrade"]}")' in text
    assert re.search(r"4 tensors changed, by", text)
    for name in re.findall(r"\]\((\w+\.png)\)", text):
        assert (run["report"] / name).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in run["report"].glob("*.png")} == {
        "accuracy.png",
        "damage.png",
        "kl.png",
        "recovery.png",
    }


def test_the_page_holds_everything_and_loads_nothing(run: dict[str, Path]):
    page = (run["report"] / "report.html").read_text()
    assert "default-src 'none'" in page
    sources = re.findall(r'<img src="([^"]*)"', page)
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert page.count("<table>") == 3


def test_what_a_file_names_is_text_on_the_page(tmp_path: Path):
    (tmp_path / "within").mkdir()
    (tmp_path / "elsewhere.png").write_bytes(b"x")
    words = (
        "a <script>x()</script> [b](javascript:x()) | `<img src=x>` ![none](none.png) ![up](../elsewhere.png) ![](..)"
    )
    page = html_page("<b>", words, tmp_path / "within")
    assert "<title>&lt;b&gt;</title>" in page
    assert not re.search(r"<script|<img|href", page)
    assert "none" in page


def test_words_from_elsewhere_stay_one_cell():
    assert as_text("config: `x` ![a](b) | c\nd") == "`config: 'x' ![a](b) / c d`"
    assert as_text("") == ""


@pytest.mark.parametrize(
    ("share", "low", "accuracy", "beginning"),
    [
        (0.95, 0.94, 97.0, "**Recovered**"),
        (0.95, 0.94, None, "**Recovered**"),
        (0.95, 0.94, 60.0, "**Partly recovered**"),
        (0.60, 0.50, 95.0, "**Partly recovered**"),
        (0.60, 0.50, -5.0, "**Not recovered**"),
        (-0.1, -0.2, None, "**Not recovered**"),
        (None, None, None, "**Nothing to recover**"),
    ],
)
def test_the_verdict(share: float | None, low: float | None, accuracy: float | None, beginning: str):
    summary = a_summary(measurable=accuracy is not None)
    summary["kl"] |= {"recovery": share, "low": low, "high": share}
    summary["ar_percent_measurable"]["value"] = accuracy
    assert verdict(summary).startswith(beginning)


def test_the_metrics_are_kept_beside_it(run: dict[str, Path], summary: dict[str, Any]):
    (line,) = (run["report"] / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert metrics["eval/kl_recovered"] == summary["kl"]["recovered"]
    assert metrics["eval/degraded_piqa_acc"] == summary["tasks"]["piqa"]["degraded"]["acc"]
    assert metrics["data/tokens_used"] == summary["tokens"]


def test_other_items_than_the_reference_saw_are_refused(run: dict[str, Path], recipe: Recipe, tmp_path: Path):
    job = cast(ReportJob, stages_of(recipe, run["report"].parent.parent)["report"].job)
    other = tmp_path / "scores"
    shutil.copytree(run["evaluate-degraded"], other)
    items = read_json(other / "items" / "piqa.json")
    write_json(other / "items" / "piqa.json", items[1:])
    given = job.scores.degraded.model_copy(update={"path": other})
    changed = job.model_copy(
        update={
            "scores": job.scores.model_copy(update={"degraded": given}),
            "runtime": Runtime(output=tmp_path / "report"),
        }
    )
    with pytest.raises(UserError):  # its own manifest no longer matches
        build(changed, report.produce, resumable=False)
    with pytest.raises(UserError, match="piqa: the degraded model was scored on other items"):
        gather(changed)


def a_summary(*, measurable: bool) -> dict[str, Any]:
    """All known tasks, with every AR% measurable or none."""
    result = {"value": 61.5, "low": 40.2, "high": 83.0, "gap": 0.12, "gap_se": 0.02, "measurable": True}
    if not measurable:
        result |= {"value": None, "low": None, "high": None, "gap": -0.01, "measurable": False}
    score = {"acc": 0.5, "acc_stderr": 0.03, "acc_norm": None}
    entry = {"reference": score, "degraded": score, "recovered": score, "n": 200, "ar_percent": result}
    nothing = {**dict.fromkeys(AR_KEYS), "measurable": False, "tasks": []}
    return {
        "kl": {"degraded": 5.0, "recovered": 1.0, "recovery": 0.8, "low": 0.78, "high": 0.83},
        "top1": {"degraded": 0.1, "recovered": 0.6},
        "kl_contexts": None,
        "top1_contexts": None,
        "ar_percent": result,
        "ar_percent_measurable": {**result, "tasks": ["mmlu", "sciq"]} if measurable else nothing,
        "tasks": dict.fromkeys((*KNOWN, "mmlu"), entry),
        "tokens": 123456,
        "tokens_generated": 7,
        "trainable_parameters": 99,
        "seconds": {},
    }


def test_the_terminal_table_is_aligned_and_in_order():
    lines = terminal_table(a_summary(measurable=True)).splitlines()
    assert [line.split("  ")[0] for line in lines if not line.startswith("-")][1:] == [
        *("KL, held-out text", "top-1, held-out text", "HellaSwag", "MMLU (3 subsets)", "ARC-Challenge"),
        *("WinoGrande", "PIQA", "OpenBookQA", "BoolQ", "ARC-Easy", "SciQ", "paper's average (7)"),
        *("measurable average (2)", "tokens used", "trainable parameters"),
    ]
    rows = [line for line in lines if "%" in line and not line.startswith("KL")]
    assert len({line.index("50.0 %") for line in rows if "50.0 %" in line}) == 1
    assert lines[7].endswith("AR 62 % [40, 83]")
    assert "123,456" in lines[-2]


def test_what_is_not_measurable_shows_its_gap():
    text = terminal_table(a_summary(measurable=False))
    assert "not measurable (gap -1.0 ± 2.0 points)" in text
    assert "AR " not in text
    assert "measurable average" not in text


@pytest.mark.parametrize("measurable", [True, False])
def test_plots_are_drawn_for_any_result(tmp_path: Path, measurable: bool):
    from matplotlib.image import imread

    summary = a_summary(measurable=measurable)
    plot_accuracy(summary, tmp_path / "a.png")
    plot_kl([], [{"step": 0, "tokens": 0, "split": "held_out", "kl": 5.0}], summary, tmp_path / "b.png")
    plot_recovery(summary, tmp_path / "c.png")
    for name in "abc":
        image = imread(tmp_path / f"{name}.png")
        assert min(image.shape[:2]) > 300
        assert image.std() > 0.05  # something is drawn


def test_a_bar_in_a_cell_does_not_split_it():
    assert markdown_table(["a", "b"], [["x|y", "1"]]).splitlines()[-1] == r"| x\|y | 1 |"


def test_without_benchmarks_there_is_kl_alone(tiny: Path, tmp_path: Path):
    recipe = tiny_recipe(tiny, tmp_path, adapter={"init": "closed_form_sequential"}, train={"epochs": 0})
    recipe = recipe.model_copy(update={"evaluate": Evaluate(suite="none")})
    folders = run_in_process(recipe, tmp_path / "runs")
    assert "contexts" not in folders
    summary = json.loads((folders["report"] / "summary.json").read_text())
    assert summary["tasks"] == {}
    assert not summary["ar_percent"]["measurable"]
    assert summary["kl"]["recovered"] < summary["kl"]["degraded"]
    assert "KL, held-out text" in terminal_table(summary)
    assert "Accuracy" not in (folders["report"] / "report.md").read_text()
    assert {path.name for path in folders["report"].glob("*.png")} == {"damage.png", "kl.png"}

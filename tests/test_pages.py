"""Pages whose commands and figures are the program's own output."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from launch.cli import main
from recovery.artifacts import REPOSITORY

RECIPE = "launch/recipes/cluster/llama-3.1-8b.yaml"
CHECKOUT = "/shared/recover-lora"


def block(page: str, marker: str) -> list[str]:
    """The lines of the fenced block behind a marker."""
    text = (REPOSITORY / "docs" / page).read_text()
    found = re.search(rf"<!-- {re.escape(marker)} -->\n```\w*\n(.*?)```", text, re.DOTALL)
    assert found is not None, f"{page} has no block {marker}"
    return found.group(1).splitlines()


def dry_run(model: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a dry run prints, as a user of the page would see it: with the page's folders and model."""
    small = ["--runs-dir", str(runs), "--set", f"models.reference={model}", "--set", "adapter.rank=4"]
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("sys.argv", ["recover-lora", "run", RECIPE, "--cluster", "mi300x", *small, "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        main()
    printed, said = capsys.readouterr()
    assert not ended.value.code, said
    printed = printed.replace(f" {' '.join(small)}", "")
    for ours, theirs in ((str(runs), f"{CHECKOUT}/runs"), (sys.executable, f"{CHECKOUT}/.venv/bin/python")):
        printed = printed.replace(ours, theirs)
    return printed.replace(str(REPOSITORY), CHECKOUT)


def test_the_page_about_mi300x_shows_what_a_dry_run_prints(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "models").mkdir()
    model = tmp_path / "models" / "Llama-3.1-8B"
    model.symlink_to(tiny)
    lines = dry_run(model, tmp_path / "runs", monkeypatch, capsys).splitlines()
    begin = lines.index("#!/usr/bin/env bash")
    script = lines[begin : lines.index("", begin)]
    commands = [re.sub(r"^\$ (\S+=\S* )+", "$ [environment] ", line) for line in lines if line.startswith("$ ")]
    print("\n".join([*script, "", *commands]))  # where this fails: what belongs on the page
    assert block("mi300x.md", "dry run: script") == script
    assert block("mi300x.md", "dry run: commands") == commands

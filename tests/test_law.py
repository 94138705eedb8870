"""Scaling laws: what was put in comes out, intervals cover it, and nothing is said of what was not varied."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from eval.law import Law, fit, trend
from eval.scaling import laws_file, plot_plane, plot_scaling, scaling_text, series_of
from launch.law import read_law
from recovery.errors import UserError
from tests.pipeline import make_benchmarks, tiny_recipe
from tests.test_cli import invoke


def points(
    seed: int, noise: float = 0.05, sizes: tuple[float, ...] = (1e8,), repeats: int = 2
) -> list[dict[str, float]]:
    """left = 2 tokens^-0.4 size^0.1, with noise of its logarithm."""
    draw = np.random.default_rng(seed)
    return [
        {
            "tokens": tokens,
            "parameters": 1e6,
            "model_parameters": size,
            "left": 2 * tokens**-0.4 * size**0.1 * math.exp(noise * draw.normal()),
        }
        for tokens in (1e4, 2e4, 4e4, 8e4, 16e4)
        for size in sizes
        for _ in range(repeats)
    ]


def test_the_exponents_come_back_within_their_intervals():
    law = fit(points(0, noise=0.0, sizes=(1e8, 1e9, 7e9)))
    assert law is not None
    assert law.names == ("tokens", "model_parameters")
    assert law.coefficients == pytest.approx((math.log(2), -0.4, 0.1), abs=1e-6)
    inside = 0
    for seed in range(200):
        found = fit(points(seed))
        assert found is not None
        inside += found.low[1] <= -0.4 <= found.high[1]
    assert 180 <= inside <= 199  # of 200 intervals of 95 %


def test_a_budget_is_where_the_law_reaches_the_target():
    law = fit(points(1, sizes=(1e8, 1e9, 7e9)))
    assert law is not None
    at = {"parameters": 1e6, "model_parameters": 7e10}
    budget = law.tokens_for(0.9, at)
    assert budget is not None
    assert law.left({**at, "tokens": budget.tokens})[0] == pytest.approx(0.1, rel=1e-2)
    truth = (2 * 7e10**0.1 / 0.1) ** (1 / 0.4)
    assert budget.low is not None
    assert budget.high is not None
    assert budget.low < truth < budget.high
    assert budget.beyond == pytest.approx(budget.tokens / 16e4)
    again = Law.from_json(json.loads(json.dumps(law.to_json())))
    assert again == law


def test_nothing_is_said_of_what_was_not_varied():
    law = fit(points(2))
    assert law is not None
    assert law.names == ("tokens",)
    assert fit(points(2)[:4]) is None  # two values of tokens
    assert fit([{**point, "tokens": 1e4} for point in points(2)]) is None
    flat = fit([{**point, "left": 0.5 + 0.01 * (number % 3)} for number, point in enumerate(points(2))])
    assert flat is not None
    assert flat.tokens_for(0.9, {"parameters": 1e6, "model_parameters": 1e8}) is None
    # Seeds differ a little in their tokens; that is no variation.
    seeds = [{**point, "tokens": 1e4 * (1 + 0.01 * number)} for number, point in enumerate(points(2))]
    assert fit(seeds) is None
    # Both grow together: whose merit it is cannot be told.
    assert fit([{**point, "parameters": point["tokens"] * 10} for point in points(2)]) is None


def rows() -> list[dict[str, Any]]:
    """Of a study over samples and seeds, with one series that has two points only."""
    found = []
    for number, point in enumerate(points(3)):
        ar = {"value": 10.0 + 5 * number, "low": -2.0 + 5 * number, "high": 22.0 + 5 * number, "measurable": True}
        kl = {"degraded": 4.0, "recovered": 4 * min(point["left"], 0.9), "recovery": 1 - min(point["left"], 0.9)}
        kept = {name: point[name] for name in ("tokens", "parameters", "model_parameters")}
        kept["tokens"] *= 1 + 0.01 * (number % 2)  # each seed's corpus has its own length
        kept["tokens_per_sample"] = 30.0
        labels = {"damage": "noise", "samples": f"{number // 2}", "seed": f"{number % 2}"}
        found.append({"labels": labels, "result": {"kl": kl, "ar_percent": ar, **kept}, "note": ""})
    few = [{**row, "labels": {**row["labels"], "damage": "rounding"}} for row in found[:2]]
    return [*found, *few, {"labels": few[0]["labels"], "result": None, "note": "not run yet"}]


def test_the_page_of_a_scaling_study(tmp_path: Path):
    series = series_of(rows(), ["samples"])
    assert {one.name: (len(one.members), one.law is None) for one in series} == {
        "noise": (10, False),
        "rounding": (2, True),
    }
    text = scaling_text(series)
    assert "No law: 2 finished points" in text
    assert "Of other model sizes nothing can be said" in text
    assert "AR% grows by" in text
    assert "AR% interval above zero: 20,000 trained tokens" in text
    assert "| x " in text
    for draw in (lambda path: plot_scaling(series, path), lambda path: plot_plane(rows(), path)):
        draw(tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_ar_grows_with_the_logarithm_of_tokens():
    made = [{"tokens": t, "value": 5 + 30 * math.log10(t / 1e4), "low": 0.0, "high": 9.0} for t in (1e4, 1e5, 1e6, 1e7)]
    line = trend(made)
    assert line is not None
    assert line.gain == pytest.approx(30)
    assert trend(made[:2]) is None


def test_a_plan_takes_its_corpus_from_a_law(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    recipe = tiny_recipe(tiny, make_benchmarks(tmp_path / "data"), train={"epochs": 2})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    laws = laws_file(series_of(rows(), ["samples"]))
    (tmp_path / "laws.json").write_text(json.dumps({"study": "s", "series": laws}))
    command = ("plan", str(tmp_path / "recipe.yaml"), "--law", str(tmp_path / "laws.json"))
    assert invoke(monkeypatch, *command, "--target", "0.9") == 0
    printed = capfd.readouterr().out
    assert "90 % of the KL at" in printed
    assert "power law has no floor" in printed
    assert "without one: it was not varied" in printed
    samples = int(printed.partition("generate.samples=")[2].partition(" ")[0])
    tokens = float(printed.partition("of the KL at ")[2].partition(" trained")[0].replace(",", ""))
    assert samples == pytest.approx(tokens / 2 / 30, rel=0.01)
    assert recipe.generate.max_length > 30
    assert "all predicted" in printed
    assert invoke(monkeypatch, *command, "--series", "other") == 2
    assert "the study's series are noise" in capfd.readouterr().err
    (tmp_path / "laws.json").write_text("{}")
    assert invoke(monkeypatch, *command) == 2
    assert yaml.safe_load(recipe.to_yaml())["train"]["epochs"] == 2
    with pytest.raises(UserError, match="not the laws of a study"):
        read_law(tmp_path / "laws.json", None)

"""Scaling laws: what was put in comes out, intervals cover it, and nothing is said of what was not varied."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from eval.law import Law, NoLaw, fit, trend
from eval.scaling import laws_file, plot_plane, plot_scaling, scaling_text, series_of
from launch.law import corpus_tokens, read_law
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
    assert law.names == ("tokens", "model_parameters")
    assert law.coefficients == pytest.approx((math.log(2), -0.4, 0.1), abs=1e-6)
    inside = 0
    for seed in range(200):
        found = fit(points(seed))
        inside += found.low[1] <= -0.4 <= found.high[1]
    assert 180 <= inside <= 199  # of 200 intervals of 95 %


def test_a_budget_is_where_the_law_reaches_the_target():
    law = fit(points(1, sizes=(1e8, 1e9, 7e9)))
    at = {"parameters": 1e6, "model_parameters": 7e10}
    budget = law.tokens_for(0.9, at)
    assert budget is not None
    assert budget.tokens is not None
    assert law.left({**at, "tokens": budget.tokens})[0] == pytest.approx(0.1, rel=1e-2)
    truth = (2 * 7e10**0.1 / 0.1) ** (1 / 0.4)
    assert budget.low is not None
    assert budget.high is not None
    assert budget.low < truth < budget.high
    assert law.beyond({**at, "tokens": 32e4}) == pytest.approx({"model_parameters": 10, "tokens": 2})
    assert law.beyond({"tokens": 5e3, "parameters": 1e6}) == pytest.approx({"tokens": 0.5})
    again = Law.from_json(json.loads(json.dumps(law.to_json())))
    assert again == law
    far = law.tokens_for(1 - 1e-9, at)
    assert far is not None
    assert far.tokens is None  # they help, and it takes more than are named


def refusal(made: list[dict[str, float]]) -> str:
    with pytest.raises(NoLaw) as caught:
        fit(made)
    return str(caught.value)


def test_nothing_is_said_of_what_was_not_varied():
    assert fit(points(2)).names == ("tokens",)
    assert "has 3 values in 4 finished points" in refusal(points(2)[:4])
    assert "has 3 values" in refusal([{**point, "tokens": 1e4} for point in points(2)])
    assert "3 finished points, and tokens need 4" in refusal(points(2, repeats=1)[:3])
    flat = fit([{**point, "left": 0.5 + 0.01 * (number % 3)} for number, point in enumerate(points(2))])
    assert flat.tokens_for(0.9, {"parameters": 1e6, "model_parameters": 1e8}) is None
    # Seeds differ a little in their tokens; that is no variation.
    assert "has 3 values" in refusal([{**point, "tokens": 1e4 * (1 + 0.01 * n)} for n, point in enumerate(points(2))])
    # Both grow together: whose merit it is cannot be told.
    assert "vary together" in refusal([{**point, "parameters": point["tokens"] * 10} for point in points(2)])
    assert "vary together" in refusal([{**point, "parameters": 1e9 / point["tokens"]} for point in points(2)])


def test_adapters_that_grow_with_their_models_have_no_exponent_of_their_own():
    """As those of one rank do: parameters go with the square root of the model's size, nearly."""
    made = points(4, sizes=(1e8, 1e9, 7e9))
    law = fit([{**point, "parameters": 30 * point["model_parameters"] ** 0.52} for point in made])
    assert law.names == ("tokens", "model_parameters")
    assert law.adapter_grows
    assert not fit(made).adapter_grows
    alternating = [{**point, "parameters": 1e6 * (1 + number % 2)} for number, point in enumerate(made)]
    assert not fit(alternating).adapter_grows


def test_two_adapters_are_not_taken_for_one():
    """Two values are no law of rank, and still two series: tokens keep their exponent, whichever had more."""
    made = points(7, sizes=(1e8,), repeats=4)
    for number, point in enumerate(made):
        point["parameters"] = 1e6 * (4 if number % 5 > number // 7 else 1)  # the smaller ones have more tokens
        point["left"] *= (point["parameters"] / 1e6) ** -0.5
    law = fit(made)
    assert law.names == ("tokens", "parameters")
    assert law.low[1] < -0.4 < law.high[1]
    assert law.low[2] < -0.5 < law.high[2]
    assert not law.is_sure("parameters")


def rows() -> list[dict[str, Any]]:
    """Of a study over samples and seeds, with one series that has two points only."""
    found = []
    for number, point in enumerate(points(3)):
        ar = {"value": 10.0 + 5 * number, "low": -2.0 + 5 * number, "high": 22.0 + 5 * number}
        ar |= {"measurable": True, "gap": 0.1}
        kl = {"degraded": 4.0, "recovered": 4 * min(point["left"], 0.9), "recovery": 1 - min(point["left"], 0.9)}
        kept = {name: point[name] for name in ("tokens", "parameters", "model_parameters")}
        kept["tokens"] *= 1 + 0.01 * (number % 2)  # each seed's corpus has its own length
        kept |= {"tokens_per_sample": 30.0}
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
    assert "No law: none of tokens, adapter parameters, model size has 3 values in 2 finished points." in text
    assert "Of other model sizes nothing can be said" in text
    assert "AR% grows by" in text
    assert "AR% interval above zero: 20,000 trained tokens" in text
    assert "| x " in text
    for draw in (lambda path: plot_scaling(series, path), lambda path: plot_plane(rows(), path)):
        draw(tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 10_000


def sized_rows(sizes: tuple[float, ...], exponent: float) -> list[dict[str, Any]]:
    """Of a study over model sizes and samples, with adapters of two sizes for every model."""
    template, found = rows()[0], []
    for number, point in enumerate(points(5, sizes=sizes)):
        kl = {"degraded": 40.0, "recovered": point["left"] * point["model_parameters"] ** (exponent - 0.1)}
        kl["recovery"] = 0.5
        kept = {name: point[name] for name in ("tokens", "model_parameters")} | {"parameters": 1e6 * (1 + number % 2)}
        found.append({**template, "labels": {"x": str(number)}, "result": {**template["result"], "kl": kl, **kept}})
    return found


def test_larger_models_are_told_as_such():
    """Of sizes that were measured to 7e9: 13B and 70B are beyond, each by as much as it is; 7B is there."""
    text = scaling_text(series_of(sized_rows((1e8, 1e9, 7e9), 0.1), ["x"]))
    lines = [line for line in text.splitlines() if line.startswith("| 90 %")]
    assert [line.split(" | ")[1] for line in lines] == ["as measured", "as measured", "13B", "70B"]
    assert "model size" not in lines[1]
    assert "x 1.9 model size" in lines[2]
    assert "x 10.0 model size" in lines[3]
    assert [line.split(" | ")[2] for line in lines] == ["1,000,000", "2,000,000", "2,000,000", "2,000,000"]
    assert "Of larger models nothing can be said" in scaling_text(series_of(sized_rows((1e8, 1e9, 7e9), 0.0), ["x"]))


def test_a_budget_names_the_adapter_that_it_is_for():
    """Over tokens and rank: the smallest adapter needs more than the largest, and both are told."""
    template, found = rows()[0], []
    for point in points(6, repeats=1):
        for parameters in (1e6, 2e6, 4e6):
            kl = {"degraded": 1.0, "recovered": point["left"] * (parameters / 1e6) ** -0.3, "recovery": 0.5}
            kept = {"tokens": point["tokens"], "model_parameters": 1e8, "parameters": parameters}
            found.append({**template, "labels": {"x": "x"}, "result": {**template["result"], "kl": kl, **kept}})
    text = scaling_text(series_of(found, ["x"]))
    small, large = (line.split(" | ") for line in text.splitlines() if line.startswith("| 90 %"))
    assert [small[2], large[2]] == ["1,000,000", "4,000,000"]
    assert float(small[3].replace(",", "")) > 2 * float(large[3].replace(",", ""))


def test_points_without_a_share_are_left_out():
    """A recovery to nothing left, or of no damage, has no logarithm; the residuals stay with their points."""
    made = rows()
    for number, kl in ((0, {"degraded": 4.0, "recovered": -1e-9}), (1, {"degraded": 0.0, "recovered": 0.0})):
        made[number]["result"]["kl"] = {**kl, "recovery": None}
    (one, *_) = series_of(made, ["samples"])
    assert one.law is not None
    assert len(one.members) == len(one.law.residuals) == 8


def test_ar_grows_with_the_logarithm_of_tokens():
    made = [{"tokens": t, "value": 5 + 30 * math.log10(t / 1e4), "low": 0.0, "high": 9.0} for t in (1e4, 1e5, 1e6, 1e7)]
    line = trend(made)
    assert line is not None
    assert line.gain == pytest.approx(30)
    assert trend(made[:2]) is None


@pytest.mark.parametrize("corpus", [500.0, 20_000.0, 400_000.0])
def test_a_closed_form_looks_at_no_more_of_a_larger_corpus(tiny: Path, tmp_path: Path, corpus: float):
    adapter = {"init": "closed_form_sequential", "calibration_tokens": 16_384}
    recipe = tiny_recipe(tiny, make_benchmarks(tmp_path / "data"), adapter=adapter, train={"epochs": 3})
    counted = 3 * corpus + 2 * min(corpus, 16_384)
    assert corpus_tokens(recipe, counted) == pytest.approx(corpus)


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
    assert "NOTE  model size: " in printed
    assert "the law does not know it: it was not varied" in printed
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

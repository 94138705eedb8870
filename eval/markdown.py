"""The report as Markdown: the result first, then what it took, how to use the adapter, and where it came from."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.causes import causes, want_of_text
from eval.config import ReportJob
from eval.evidence import Evidence
from eval.table import HEADER, benchmark_rows, divergence_rows, percent, verdict
from recovery.artifacts import CLUSTER, RECIPE
from recovery.sources import is_gguf

SHOWN_VERSIONS = ("python", "torch", "transformers", "peft", "deepspeed", "datasets", "lm_eval")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose other columns are right-aligned but for the last."""
    rule = ["---", *["---:"] * (len(header) - 2), "---"]
    lines = [list(header), rule, *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def render(job: ReportJob, evidence: Evidence, summary: Mapping[str, Any]) -> str:
    sections = [
        f"# {job.name}",
        verdict(summary),
        _result(summary),
        _limits(job, evidence, summary),
        _effort(evidence, summary),
        _corpus(evidence),
        _damage(evidence),
        _use(job, evidence),
        _origin(job, evidence),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _result(summary: Mapping[str, Any]) -> str:
    rows = [*divergence_rows(summary), *benchmark_rows(summary)]
    parts = [
        markdown_table(HEADER, rows),
        """\
KL is KL(reference ‖ model) in nats per token, the share of it that came back with a 95% interval over samples drawn
anew; top-1 is how often model and reference prefer the same next token.""",
    ]
    if summary["tasks"]:
        parts.append(_accuracy_note(summary))
    parts += ["![KL over training](kl.png)"]
    if summary["tasks"]:
        parts += ["![Accuracy](accuracy.png)", "![Accuracy recovery](recovery.png)"]
    return "\n\n".join(parts)


def _accuracy_note(summary: Mapping[str, Any]) -> str:
    items = sorted({entry["n"] for name, entry in summary["tasks"].items() if name != "mmlu"})
    each = f"{items[0]}" if len(items) == 1 else f"{items[0]} to {items[-1]}"
    return f"""\
Accuracy is lm-eval's `acc`, zero-shot, on {each} items a task. AR% = (recovered - degraded) / |degraded - reference|
in per cent, with a 95% interval from a paired bootstrap over items. Where the reference is not at least three paired
standard errors above the degraded model, AR% would be noise divided by noise: it is not measurable, and the gap is
shown. Measurable: the average over the benchmarks that pass."""


def _limits(job: ReportJob, evidence: Evidence, summary: Mapping[str, Any]) -> str:
    """What keeps the recovery from being whole, as far as the run itself has measured it."""
    if summary["kl"] is None or not summary["kl"]["recovered"]:
        return ""
    found = "\n".join(f"- {one}." for one in (*want_of_text(summary), *causes(job, evidence, summary)))
    parts = "rank and training, text, placement, and what no adapter undoes"
    more = f"`recover-lora diagnose --run` splits what is left: {parts}."
    return "\n\n".join(part for part in ("## What limits it", found, more) if part)


def _effort(evidence: Evidence, summary: Mapping[str, Any]) -> str:
    details = evidence.adapter["details"]
    rows = [
        ["tokens that carried loss, all epochs, and calibration", f"{summary['tokens']:,}"],
        ["tokens generated", f"{summary['tokens_generated']:,}"],
        ["trainable parameters", f"{summary['trainable_parameters']:,}"],
        ["parameters by name" if _is_whole(evidence) else "adapted modules", f"{details['adapted_modules']:,}"],
        *([f"seconds, {stage}", f"{spent:,.1f}"] for stage, spent in summary["seconds"].items()),
    ]
    return "## What it took\n\n" + "\n".join(["| | |", "|---|---:|", *(f"| {a} | {b} |" for a, b in rows)])


def _corpus(evidence: Evidence) -> str:
    rows = []
    for split in ("train", "held_out"):
        part = evidence.corpus[split]
        length = part["length"]
        rows.append(
            [
                split.replace("_", "-"),
                f"{part['samples']:,}",
                f"{part['tokens']:,}",
                f"{length['mean']:g} ({length['min']} to {length['max']})",
                percent(part["end_of_text_rate"]),
                percent(part["distinct_2"]),
                percent(part["repeats_4"]),
            ]
        )
    header = ("split", "samples", "tokens", "length", "ended", "distinct 2-grams", "repeated 4-grams")
    labelled = evidence.adapter["inputs"].get("labelled")
    note = (
        "" if labelled is None else f"\n\nLearned from was labelled text, `{labelled['path']}`, not its training split."
    )
    return "## Synthetic corpus\n\n" + markdown_table(header, rows) + note


def _is_whole(evidence: Evidence) -> bool:
    """Whether all parameters learned."""
    return evidence.adapter["job"].get("train", {}).get("parameters") == "all"


def _damage(evidence: Evidence) -> str:
    """How strong the damage was, where this run made it."""
    if "degrade" not in evidence.manifests:
        return ""
    manifest = evidence.manifests["degrade"]
    tensors: dict[str, dict[str, float]] = manifest["details"]["tensors"]
    settings = ", ".join(
        f"{key}: {_value(value)}" for key, value in manifest["job"]["damage"].items() if value is not None
    )
    first = next((name for name in tensors if "k_proj" in name), next(iter(tensors)))
    relative = [change["relative_l2"] for change in tensors.values()]
    return f"""\
## Damage

{settings}.

{len(tensors)} tensors changed, by {min(relative):.3g} to {max(relative):.3g} times their own L2 norm
({sum(relative) / len(relative):.3g} on average). The first, `{first}`, changed by an L2 norm of
{tensors[first]["l2"]:.2f} (compare Table 1 of the paper).

![Change of every tensor by layer](damage.png)"""


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _use(job: ReportJob, evidence: Evidence) -> str:
    if _is_whole(evidence):
        return f"""\
## Use the model

```python
from transformers import AutoModelForCausalLM

recovered = AutoModelForCausalLM.from_pretrained("{job.adapter.path}")
```"""
    base, more = evidence.adapter["inputs"]["degraded"]["path"], ""
    if is_gguf(base):
        folder, file = base.rpartition("/")[::2]
        base, more = folder, f', gguf_file="{file}", quantization_config=GgufConfig(dequantize=True)'
    needed = "AutoModelForCausalLM, GgufConfig" if more else "AutoModelForCausalLM"
    return f"""\
## Use the adapter

```python
from peft import PeftModel
from transformers import {needed}

degraded = AutoModelForCausalLM.from_pretrained("{base}"{more})
recovered = PeftModel.from_pretrained(degraded, "{job.adapter.path}")
```"""


def _origin(job: ReportJob, evidence: Evidence) -> str:
    """Artifacts, and code and package versions of what made the adapter."""
    manifest = evidence.adapter
    git = manifest["git"]
    revision = git["revision"] or "unknown"
    state = {True: ", with local changes", False: "", None: ""}[git["dirty"]]
    versions = ", ".join(
        f"{name} {manifest['versions'][name]}" for name in SHOWN_VERSIONS if name in manifest["versions"]
    )
    named = {
        "corpus": job.corpus,
        "closed form": job.repair,
        "adapter": job.adapter,
        "contexts": job.contexts,
        "degraded": job.degrade,
    }
    named |= {f"scores of the {model}": given for model, given in job.scores}
    lines = [f"- {name}: `{given.path.name}`" for name, given in named.items() if given is not None]
    lines += [
        f"- reference: `{manifest['inputs']['reference']['path']}`",
        f"- code: git revision {revision}{state}",
        f"- versions: {versions}",
        f"- seed: {job.seed}",
    ]
    runs = job.runtime.output.parent.parent
    given = again(runs / job.name, runs)
    commands = f"""\
```
recover-lora run {given}
recover-lora diagnose --run {given}
recover-lora deliver {given}
```"""
    return (
        "## Where it came from\n\n" + "\n".join(lines) + f"\n\nAgain, what limits it, and to hand it on:\n\n{commands}"
    )


def again(run_folder: Path, runs_dir: Path) -> str:
    """The arguments with which a command takes a run as it was."""
    files = shlex.quote(str(run_folder / RECIPE)), shlex.quote(str(run_folder / CLUSTER))
    return f"{files[0]} --cluster {files[1]} --runs-dir {shlex.quote(str(runs_dir))}"

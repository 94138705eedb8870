"""The model card of a delivered adapter, as the hub reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from eval.config import DeliverJob
from eval.markdown import markdown_table
from eval.table import HEADER, benchmark_rows, divergence_rows
from recovery.adapters import CONFIG
from recovery.artifacts import MANIFEST, read_manifest
from recovery.config import ModelInput
from recovery.files import read_json
from recovery.sources import is_gguf

if TYPE_CHECKING:
    from eval.deliver import Check

UNKNOWN = "unknown"
DIVERGENCES = {
    "forward_kl": "KL(reference || degraded + adapter)",
    "reverse_kl": "KL(degraded + adapter || reference)",
    "jensen_shannon": "generalized Jensen-Shannon divergence of reference and degraded + adapter",
}


def license_of(model: str) -> str:
    """What a model's own card names, by the hub's identifier; `unknown` where it has none."""
    card = Path(model) / "README.md"
    head, rule, _ = card.read_text(errors="replace").partition("\n---") if card.is_file() else ("", "", "")
    if not (rule and head.startswith("---")):
        return UNKNOWN
    try:
        about = yaml.safe_load(head)
    except yaml.YAMLError:
        return UNKNOWN
    return str(about.get("license", UNKNOWN)) if isinstance(about, Mapping) else UNKNOWN


def base_name(model: ModelInput) -> str:
    """A hub id, or the name of a local folder or file."""
    return model.path if model.revision is not None else Path(model.path).name


def model_card(
    job: DeliverJob,
    summary: Mapping[str, Any],
    manifest: Mapping[str, Any],
    generator: ModelInput,
    checks: Sequence[Check],
) -> str:
    """summary: the report's. manifest: the adapter's. generator: what the corpus was sampled from. checks: of the forms
    that are delivered."""
    made, base, licence = manifest["job"], base_name(job.degraded), license_of(job.reference.path)
    source = "the reference" if generator.digest == job.reference.digest else base_name(generator)
    experts = bool(read_json(job.adapter.path / CONFIG).get("target_parameters"))
    shown = markdown_table(HEADER, [*divergence_rows(summary), *benchmark_rows(summary)])
    return f"""\
---
{_front_matter(base, licence, made)}
---

# {job.name}

A LoRA adapter that gives a degraded model its accuracy back. It belongs to the very weights that it was made for,
`{base}` ({_named(job.degraded)}): on others, the undamaged reference included, it does harm.

## What comes back

{shown}

KL is KL(reference || model) in nats a token on text sampled from {source}; AR% is
(recovered - degraded) / |degraded - reference|. Intervals are 95 %, by bootstrap. "not measurable": the benchmark's gap
is within noise.

## How it was made

{_making(job, summary, made, source)}

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

degraded = AutoModelForCausalLM.from_pretrained({_place(job.degraded)})
recovered = PeftModel.from_pretrained(degraded, "path/to/this/folder")
```

{_vllm_use(base, made["adapter"], experts=experts)}{_gguf_use(job)}

## Checked

{_checked(checks)}

## Limits

Recovery was measured on synthetic text of {source} and on the benchmarks above, not on your task.
{_limit(made)}

Licence of the reference: {licence}; an adapter made from it is a derivative.
"""


def _named(model: ModelInput) -> str:
    """What tells these weights from others of the name."""
    if model.revision is not None:
        return f"commit {model.revision}"
    if is_gguf(model.path):
        return f"sha256 {model.digest.removeprefix('gguf:')}"
    if (Path(model.path) / MANIFEST).is_file():
        return f"`content` in its {MANIFEST}: {read_manifest(Path(model.path))['content']}"
    return f"sha256 of the JSON of its files' hashes: {model.digest}"


def _place(model: ModelInput) -> str:
    """The arguments of from_pretrained."""
    if is_gguf(model.path):
        return f'"path/to", gguf_file="{base_name(model)}"'
    if model.revision is not None:
        return f'"{model.path}", revision="{model.revision}"'
    return f'"path/to/{base_name(model)}"'


def _front_matter(base: str, licence: str, made: Mapping[str, Any]) -> str:
    """What the hub reads. made: the job of the adapter's manifest, here and below."""
    has_teacher = "train" in made and made["train"]["loss"]["cross_entropy"] < 1
    about = {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": licence if licence != UNKNOWN else "other",
        "tags": ["lora", "recover-lora", *(["distillation"] if has_teacher else [])],
    }
    return yaml.safe_dump(about, sort_keys=False).strip()


def _making(job: DeliverJob, summary: Mapping[str, Any], made: Mapping[str, Any], source: str) -> str:
    """source: what the corpus was sampled from."""
    settings = made["adapter"]
    rows = [
        ["method", method_of(made)],
        ["reference", base_name(job.reference)],
        ["degraded base", base_name(job.degraded)],
        ["where", _text(settings["placement"])],
        ["rank", _text(settings["rank"]) if settings["placement"] != "auto" else "by module (rank_pattern)"],
        ["trainable parameters", f"{summary['trainable_parameters']:,}"],
        ["tokens of loss and calibration", f"{summary['tokens']:,}"],
        ["text", f"{'labelled, written by people; held out: ' if _is_labelled(made) else ''}sampled from {source}"],
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _checked(checks: Sequence[Check]) -> str:
    forms = [
        [one.form, f"{one.kl:.4f}", f"{one.scored_kl:.4f}", f"{one.tokens_different} of {one.tokens_compared}"]
        for one in checks
    ]
    return markdown_table(("form", "KL, loaded again", "KL, scored", "greedy tokens that differ"), forms)


def method_of(made: Mapping[str, Any]) -> str:
    """In words, how an adapter was made. made: the job of its manifest."""
    if "train" not in made:
        return "closed form from the reference's activations, without training"
    loss = made["train"]["loss"]
    text, start = loss["cross_entropy"], "closed form, then " if made.get("start") else ""
    if text == 1:
        return f"{start}supervised fine-tuning: cross-entropy with the text's own tokens, without a teacher"
    divergence = DIVERGENCES[loss["kind"]]
    mixed = f"{1 - text:g} x {divergence} + {text:g} x cross-entropy with the text" if text else divergence
    return f"{start}logit distillation: {mixed}"


def _is_labelled(made: Mapping[str, Any]) -> bool:
    return made.get("labelled") is not None


def _limit(made: Mapping[str, Any]) -> str:
    if _is_labelled(made):
        return "The adapter learned from the labelled text too, and passes on its biases beside the reference's."
    return "The adapter can only bring back what the reference knows, and passes on its biases."


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else json.dumps(value).strip('"')


def _vllm_use(base: str, settings: Mapping[str, Any], *, experts: bool) -> str:
    if experts:
        return (
            "vLLM takes no adapters of experts, or of what PEFT takes for them: it serves the merged model"
            " (`recover-lora deliver RECIPE --merged`)."
        )
    several = settings["placement"] == "auto"
    folder = f"path/to/this/folder{'/uniform' if several else ''}"
    rank = "its `r`" if several else str(settings["rank"])
    note = (
        " `uniform/` is the same adapter with one rank everywhere: vLLM takes no rank of each module."
        if several
        else ""
    )
    return (
        f"`vllm serve path/to/{base} --enable-lora --lora-modules recovered={folder}` serves it "
        f"(`--max-lora-rank` {rank}, or the next that vLLM has).{note}"
    )


def _gguf_use(job: DeliverJob) -> str:
    return "\n\n`llama-cli -m path/to/this/folder/gguf/model.gguf` runs the whole recovered model." if job.gguf else ""

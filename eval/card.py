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
from recovery.config import ModelInput

if TYPE_CHECKING:
    from eval.deliver import Check

UNKNOWN = "unknown"


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
    job: DeliverJob, summary: Mapping[str, Any], manifest: Mapping[str, Any], checks: Sequence[Check]
) -> str:
    """summary: the report's. manifest: the adapter's. checks: of the forms that are delivered."""
    base, settings = base_name(job.degraded), manifest["job"]["adapter"]
    licence = license_of(job.reference.path)
    about = {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": licence if licence != UNKNOWN else "other",
        "tags": ["lora", "recover-lora", "distillation"],
    }
    trained = "closed form, then logit distillation" if manifest["job"].get("start") else "logit distillation"
    method = trained if "train" in manifest["job"] else "closed form, without training"
    rows = [
        ["method", f"{method}: KL(reference || degraded + adapter)"],
        ["reference", base_name(job.reference)],
        ["degraded base", base],
        ["where", _text(settings["placement"])],
        ["rank", _text(settings["rank"]) if settings["placement"] != "auto" else "by module (rank_pattern)"],
        ["trainable parameters", f"{summary['trainable_parameters']:,}"],
        ["tokens that carried loss", f"{summary['tokens']:,}, sampled from the reference; no labelled data"],
    ]
    forms = [
        [one.form, f"{one.kl:.4f}", f"{one.scored_kl:.4f}", f"{one.tokens_different} of {one.tokens_compared}"]
        for one in checks
    ]
    shown = markdown_table(HEADER, [*divergence_rows(summary), *benchmark_rows(summary)])
    form_table = markdown_table(("form", "KL, loaded again", "KL, scored", "greedy tokens that differ"), forms)
    return f"""\
---
{yaml.safe_dump(about, sort_keys=False).strip()}
---

# {job.name}

A LoRA adapter that gives a degraded model its accuracy back. It belongs to the very weights that it was made for,
`{base}` (sha256 of their listing {job.degraded.digest}): on others, the undamaged reference included, it does harm.

## What comes back

{shown}

KL is KL(reference || model) in nats a token on text sampled from the reference; AR% is
(recovered - degraded) / |degraded - reference|. Intervals are 95 %, by bootstrap. "not measurable": the benchmark's gap
is within noise.

## How it was made

| | |
|---|---|
{chr(10).join(f"| {name} | {value} |" for name, value in rows)}

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

degraded = AutoModelForCausalLM.from_pretrained("path/to/{base}")
recovered = PeftModel.from_pretrained(degraded, "path/to/this/folder")
```

{_vllm_use(base, settings)}{_gguf_use(job)}

## Checked

{form_table}

## Limits

Recovery was measured on synthetic English text of the reference and on the benchmarks above, not on your task. The
adapter can only bring back what the reference knows, and passes on its biases. Licence of the reference: {licence}; an
adapter made from it is a derivative.
"""


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else json.dumps(value).strip('"')


def _vllm_use(base: str, settings: Mapping[str, Any]) -> str:
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

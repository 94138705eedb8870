"""DeepSpeed JSON files: read, checked, and completed with what the recipe owns. Imports neither torch nor deepspeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recovery.config import Dtype
from recovery.errors import UserError

FOLDER = Path(__file__).resolve().parent.parent / "ds_configs"
OWNED_BY_RECIPE = {
    "train_batch_size": "train.batch_tokens",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.batch_tokens",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.learning_rate",
    "scheduler": "train.warmup_steps",
}


def read_deepspeed(name: str) -> dict[str, Any]:
    """The file `ds_configs/<name>.json`, or the JSON at the path `name`.

    Raises UserError for a missing or unreadable file and for a value that the recipe owns.
    """
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in FOLDER.glob("*.json")))
        raise UserError("train.deepspeed", f"no file {path}", f"give a path to a .json file or one of: {shipped}")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(str(path), f"not JSON ({error})", "mend the file") from error
    if not isinstance(content, dict):
        raise UserError(str(path), "not a JSON object", "mend the file")
    for key, owner in OWNED_BY_RECIPE.items():
        if key in content:
            raise UserError(str(path), f"it sets {key}", f"remove it there; {owner} of the recipe decides")
    if content.get("fp16", {}).get("enabled"):
        raise UserError(str(path), "it sets fp16", "remove it there; models.dtype of the recipe decides")
    if (stage := content.get("zero_optimization", {}).get("stage")) not in (1, 2, 3):
        raise UserError(str(path), f"zero_optimization.stage {stage}", "give 1, 2 or 3")
    return content


def complete(content: dict[str, Any], dtype: Dtype, max_grad_norm: float) -> dict[str, Any]:
    """What `deepspeed.initialize` gets: the file plus the recipe's precision and clipping.

    Micro-batches and their accumulation are counted by our own loop (they vary from step to step), so DeepSpeed is
    told one of each.
    """
    config = dict(content)
    if config.get("bf16", {}).get("enabled", "auto") == "auto":
        config["bf16"] = {**config.get("bf16", {}), "enabled": dtype == "bfloat16"}
    if config["bf16"]["enabled"]:
        # Hundreds of micro-batches, or of ranks, added up in bfloat16 would lose what each of the last ones brings.
        config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
        config.setdefault("communication_data_type", "fp32")
    config.update(
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=1,
        gradient_clipping=max_grad_norm,
        zero_allow_untested_optimizer=True,
    )
    return config

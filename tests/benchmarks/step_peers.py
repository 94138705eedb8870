"""One peer's LoRA distillation, an optimizer step for every line on standard input: see tests.benchmarks.step.

    python -m tests.benchmarks.step_peers {trl,plain} SETUP.json BATCH_SIZE

Runs in the peers' environment and imports nothing of ours but the measuring of memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

Step = Callable[[list[list[int]]], float]


def padded(samples: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, samples))
    ids = torch.tensor([sample + [0] * (width - len(sample)) for sample in samples])
    mask = torch.tensor([[1] * len(sample) + [0] * (width - len(sample)) for sample in samples])
    return ids, mask


def models(setup: dict[str, Any]) -> tuple[Any, Any]:
    reference, degraded = (
        AutoModelForCausalLM.from_pretrained(setup[name], dtype=torch.float32) for name in ("reference", "degraded")
    )
    return reference.eval().requires_grad_(False), degraded


def lora(setup: dict[str, Any]) -> LoraConfig:
    rank = setup["rank"]
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=["k_proj", "v_proj"], task_type="CAUSAL_LM")


def plain_loop(setup: dict[str, Any], batch_size: int) -> Step:
    """What a capable engineer writes in an afternoon: transformers, peft, log_softmax, kl_div, AdamW."""
    reference, degraded = models(setup)
    model: Any = get_peft_model(degraded, lora(setup))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=setup["learning_rate"])

    def step(samples: list[list[int]]) -> float:
        loss_tokens = sum(len(sample) - 1 for sample in samples)
        total = 0.0
        for first in range(0, len(samples), batch_size):
            ids, mask = padded(samples[first : first + batch_size])
            valid = mask[:, 1:].bool()
            with torch.no_grad():
                teacher = reference(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][valid]
            student = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][valid]
            q, p = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
            loss = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True) / loss_tokens
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def trl_trainer(setup: dict[str, Any], batch_size: int) -> Step:
    """TRL's GKDTrainer: its model wrapping, its loss and its training step."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer  # pyright: ignore[reportMissingImports]

    reference, degraded = models(setup)
    tokenizer = AutoTokenizer.from_pretrained(setup["reference"])
    arguments = GKDConfig(
        output_dir=setup["folder"],
        lmbda=0.0,
        beta=0.0,
        learning_rate=setup["learning_rate"],
        per_device_train_batch_size=batch_size,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
    dataset = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
    trainer: Any = GKDTrainer(
        model=degraded,
        teacher_model=reference,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora(setup),
        data_collator=lambda rows: rows,
    )
    model = trainer.model
    model.train()
    trainer.current_gradient_accumulation_steps = 1  # what trainer.train() would set
    optimizer = trainer.create_optimizer()
    trainable = [p for p in model.parameters() if p.requires_grad]

    def step(samples: list[list[int]]) -> float:
        loss_tokens = sum(len(sample) - 1 for sample in samples)
        total = 0.0
        for first in range(0, len(samples), batch_size):
            own = samples[first : first + batch_size]
            ids, mask = padded(own)
            inputs = {
                "input_ids": ids,
                "attention_mask": mask,
                "labels": torch.where(mask.bool(), ids, -100),
                "prompts": ids[:, :1],
                "prompt_attention_mask": mask[:, :1],
            }
            loss = trainer.training_step(model, inputs)
            total += float(loss) * sum(len(sample) - 1 for sample in own) / loss_tokens
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def serve(step: Step) -> None:
    """A line of samples in (JSON), a line of figures out, until the input ends."""
    print("ready", flush=True)
    for line in sys.stdin:
        begun = time.perf_counter()
        loss = step(json.loads(line))
        seconds = time.perf_counter() - begun
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_mb": peak_mb}), flush=True)


if __name__ == "__main__":
    kind, setup_file, size = sys.argv[1:]
    make = {"trl": trl_trainer, "plain": plain_loop}[kind]
    serve(make(json.loads(Path(setup_file).read_text()), int(size)))

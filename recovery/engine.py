"""The DeepSpeed engine around the student: ZeRO on any number of processes, one included.

What is kept of it between processes is free of any layout: whole float32 master weights and Adam moments by
parameter name, so that no pickle is read back and a run may go on under another ZeRO stage or world size.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage] - documented as public
from torch.profiler import record_function

from recovery import heartbeat
from recovery.adapters import adapter_parameters
from recovery.batches import Batch
from recovery.config import Loss, TrainJob
from recovery.deepspeed_config import complete
from recovery.head import Head
from recovery.loss import distill, distill_trainable
from recovery.models import causal_lm, final_hidden, head_of, logit_form
from recovery.partition import gathered
from recovery.targets import DenseTargets, NoTargets, Targets

MOMENTS = ("exp_avg", "exp_avg_sq")
START_WAIT = datetime.timedelta(hours=1)
"""The others wait while the first rank hashes the inputs, a cache of hundreds of GB among them. A rank that dies,
freezes or is cut off is noticed by its heartbeat, within half a minute."""


def start_distributed() -> tuple[int, int]:
    """Join the process group that the launcher described in the environment (or one of a single process).

    Returns (rank, world size).
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Its shared-memory op for CPU ranks costs a minute of g++ at first use and leaves buffers in /dev/shm after a
    # kill; adapters' gradients are small enough for gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized() and ranks == 1:
        # No launcher: a group of one needs no port.
        torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed(backend, timeout=START_WAIT, verbose=False)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    heartbeat.start(rank, ranks)
    return rank, ranks


class Student(nn.Module):
    """The adapted model as the engine runs it: a batch and its targets in, the sum of the loss out."""

    def __init__(self, adapted: Any, width: int) -> None:
        super().__init__()
        self.adapted = adapted
        self.width = width

    def forward(self, batch: Batch, targets: Targets, loss: Loss) -> Tensor:
        """Sum of the loss over the batch's loss positions, nats, float32 scalar."""
        with record_function("student"):
            hidden_NH = final_hidden(self.adapted, batch)[batch.loss_N]
        with record_function("loss"):
            if self.trainable_head:
                assert isinstance(targets, DenseTargets | NoTargets), "a trainable head has no sparse targets"
                return distill_trainable(hidden_NH, self._logits, targets, self.width, loss, batch.next_N)
            with self.whole_head() as head:
                return distill(hidden_NH, head, targets, loss, batch.next_N)

    def _logits(self, hidden_TH: Tensor) -> Tensor:
        """Through the head's own forward, so that autograd and ZeRO see it."""
        logits_TV = causal_lm(self.adapted).get_output_embeddings()(hidden_TH)
        scale, softcap = logit_form(self.adapted)
        logits_TV = logits_TV * scale
        return logits_TV if softcap is None else softcap * torch.tanh(logits_TV / softcap)

    @property
    def trainable_head(self) -> bool:
        head = causal_lm(self.adapted).get_output_embeddings()
        return any(parameter.requires_grad for parameter in head.parameters())

    @contextlib.contextmanager
    def whole_head(self) -> Iterator[Head]:
        """The head, gathered while in use: ZeRO-3 gathers only what a module's own forward touches.

        Enter it after the forward that makes the hidden states: a tied embedding is released by that forward.
        """
        with gathered(list(causal_lm(self.adapted).get_output_embeddings().parameters())):
            yield head_of(self.adapted, self.width)


class _Reader(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return final_hidden(self.model, batch)


def forward_only(model: Any, job: TrainJob) -> Callable[[Batch], Tensor]:
    """A frozen model under the job's ZeRO-3, without optimizer: batch to final hidden states (T, H). For all ranks."""
    engine = _initialize(model=_Reader(model), config=engine_config(job))
    engine.eval()  # which returns nothing, unlike a module's
    return engine


def _initialize(**given: Any) -> Any:
    """DeepSpeed's engine. What it prints, as it does of bfloat16, goes to the log: a command's output is its result."""
    import deepspeed

    with contextlib.redirect_stdout(sys.stderr):
        return deepspeed.initialize(**given)[0]


def engine_config(job: TrainJob) -> dict[str, Any]:
    return complete(job.deepspeed, job.dtype, job.train.max_grad_norm)


class Engine:
    """DeepSpeed's engine with the few verbs that the training loop needs."""

    def __init__(self, student: Student, job: TrainJob) -> None:
        parameters = list(adapter_parameters(student).values())
        optimizer = torch.optim.AdamW(
            parameters, lr=job.train.learning_rate, betas=(0.9, 0.999), weight_decay=job.train.weight_decay
        )
        config = engine_config(job)
        self._engine = _initialize(model=student, optimizer=optimizer, config=config)
        self._student = student
        self._ranks = torch.distributed.get_world_size()
        self._loss = job.train.loss

    def backward(self, batch: Batch, targets: Targets, step_tokens: int, *, last: bool) -> Tensor:
        """One micro-batch's gradient; last: the step's last one on this rank. Returns its detached sum of the loss."""
        self._engine.set_gradient_accumulation_boundary(last)
        total = self._engine(batch, targets, self._loss)
        # DeepSpeed averages over ranks; the loss is a sum over ranks divided by the global number of tokens.
        with record_function("backward"):
            self._engine.backward(total * (self._ranks / step_tokens))
        return total.detach()

    def step(self, learning_rate: float) -> Tensor | float:
        """Update the adapters; returns the gradient's norm before clipping, on the device where DeepSpeed left it."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return 0.0 if norm is None else norm  # `or` would wait for the device

    def hidden(self, batch: Batch) -> Tensor:
        return final_hidden(self._student.adapted, batch)

    def weights(self) -> dict[str, Tensor]:
        """Whole float32 master weights by parameter name, on the CPU of the first rank. Every rank must call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        return self._gathered(safe_get_full_fp32_param)

    def state(self) -> dict[str, Tensor]:
        """Whole master weights and Adam moments as `<kind>/<parameter>`, on the first rank. Every rank must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state = {f"weight/{name}": tensor for name, tensor in self.weights().items()}
        for kind in MOMENTS:
            found = self._gathered(lambda parameter, kind=kind: safe_get_full_optimizer_state(parameter, kind))
            state |= {f"{kind}/{name}": tensor for name, tensor in found.items()}
        return state

    def _gathered(self, whole: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
        """whole: gathers one parameter's tensor from all ranks; only the first keeps it."""
        kept = {}
        for name, parameter in adapter_parameters(self._student).items():
            tensor = _whole(whole(parameter), name)
            if torch.distributed.get_rank() == 0:
                kept[name] = tensor.detach().float().cpu().clone().contiguous()
        return kept

    def restore(self, state: dict[str, Tensor], step: int, batch: Batch, targets: Targets) -> None:
        """Continue from `state` after `step` steps.

        One step with zero gradient and zero learning rate, on any batch, copies the master weights into the model's
        own (each ZeRO stage keeps these elsewhere) and makes the moments, which are then overwritten.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameters = adapter_parameters(self._student)
        for name, parameter in parameters.items():
            safe_set_full_fp32_param(parameter, state[f"weight/{name}"].to(parameter.device))
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(self._engine(batch, targets, self._loss) * 0.0)
        self.step(0.0)
        for name, parameter in parameters.items():
            for kind in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[f"{kind}/{name}"].to(parameter.device), kind)
        inner = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        for moments in inner.state.values():
            if "step" in moments:
                moments["step"] = torch.full_like(torch.as_tensor(moments["step"]), float(step))


def _whole(tensor: Tensor | None, name: str) -> Tensor:
    assert tensor is not None, f"DeepSpeed holds no state for {name}"
    return tensor

"""Slurm: the batch script of a run, and its submission. Inside the allocation the same command runs the stages."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from launch.execution import Plan
from recovery.artifacts import REPOSITORY
from recovery.errors import EXIT_INTERRUPTED, Unavailable, UserError
from recovery.files import write_atomic


def script_file(plan: Plan) -> Path:
    return plan.run_folder / "jobs" / "slurm.sh"


def batch_script(plan: Plan) -> str:
    """The script that sbatch is given: this command, once more, on the allocation's first node.

    A signal comes `notice_s` before the time limit; training saves, the command ends with the code of an interrupt, and
    the job is queued again.
    """
    slurm = plan.cluster.slurm
    assert slurm is not None
    log = plan.run_folder.resolve() / "logs" / "slurm-%j.log"
    settings = [
        f"--job-name=recover-lora-{plan.recipe.name}",
        f"--nodes={slurm.nodes}",
        "--ntasks-per-node=1",
        f"--output={str(log.parent).replace('%', '%%')}/{log.name}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:TERM@{slurm.notice_s}",
        *slurm.arguments,
    ]
    typed = [argument for argument in sys.argv[1:] if argument != "--dry-run"]
    again = [sys.executable, "-m", "launch.cli", *typed]
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {_quoted(setting)}" for setting in settings),
        "set -u",
        f"cd {shlex.quote(str(Path.cwd()))}",
        f"export PYTHONPATH={shlex.quote(str(REPOSITORY))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"{shlex.join(again)} &",
        "child=$!",
        """trap 'kill -TERM "$child"' TERM""",
        "code=0",
        "# A signal ends the first wait, not the command.",
        """while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done""",
        f"""if [ "$code" -eq {EXIT_INTERRUPTED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi""",
        """exit "$code\"""",
    ]
    return "\n".join(lines) + "\n"


def _quoted(setting: str) -> str:
    """As sbatch reads its lines, which is not quite as a shell does."""
    if not re.search(r"[\s\"'\\\\#]", setting):
        return setting
    name, sign, value = setting.partition("=")
    escaped = re.sub(r'([\\\\"])', r"\\\1", value if sign else name)
    return f'{name}="{escaped}"' if sign else f'"{escaped}"'


def submit(plan: Plan) -> str:
    """Write the batch script and hand it to sbatch; what sbatch says. Raises UserError where there is none."""
    script = script_file(plan)
    for folder in (script.parent, plan.run_folder / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(script, batch_script(plan))
    try:
        done = subprocess.run(["sbatch", str(script)], check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("--cluster", "no sbatch here", f"submit {script} where Slurm is") from error
    if done.returncode:
        raise Unavailable(f"sbatch refused {script}: {done.stderr.strip()}")
    return f"{done.stdout.strip()}\n{script}"

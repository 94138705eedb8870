"""The front door.

recover-lora run launch/recipes/smollm2-135m/demo.yaml
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from launch.cluster import load_cluster
from launch.commands import execute, models_of, parse_partition, profile_training, serve_pool
from launch.corpus import corpus_app
from launch.recipe import load_recipe
from launch.track import track_app
from recovery.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Give a damaged language model its accuracy back: LoRA adapters, synthetic data, logit distillation.",
)

app.add_typer(corpus_app, name="corpus")
app.add_typer(track_app, name="track")

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="Recipe file, e.g. launch/recipes/smollm2-135m/demo.yaml")
]
ClusterName = Annotated[
    str, typer.Option("--cluster", metavar="FILE", help="Cluster file, or the name of a shipped one.")
]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override a field of the recipe; repeatable."),
]
RunsDir = Annotated[Path, typer.Option("--runs-dir", metavar="DIR", help="Where runs and artifacts lie.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print every command and job; start and write nothing.")]
MaxRestarts = Annotated[
    int,
    typer.Option(
        "--max-restarts",
        min=0,
        metavar="N",
        help="Start a failed stage of several processes again up to N times, on the hosts that still answer.",
    ),
]


Action = Callable[[Path, str, list[str], Path, bool], int]


def _command(name: str, help_text: str, action: Action, change: str = "seed=1") -> None:
    """A command of the common options. action: (recipe, cluster, overrides, runs_dir, dry_run) -> exit code. change:
    what its example sets."""

    def command(
        recipe: RecipeFile,
        cluster: ClusterName = "local",
        overrides: Overrides = [],  # noqa: B006 - typer reads the default, nothing changes it
        runs_dir: RunsDir = Path("runs"),
        dry_run: DryRun = False,
    ) -> None:
        raise typer.Exit(action(recipe, cluster, overrides, runs_dir, dry_run))

    example = f"\n\nExample: recover-lora {name} launch/recipes/smollm2-135m/demo.yaml --set {change}"
    app.command(name, help=help_text + example)(command)


@app.command(
    help="Sample the synthetic corpus from the reference.\n\n"
    "Example: recover-lora generate launch/recipes/smollm2-135m/demo.yaml --set generate.engine=vllm\n\n"
    "Several clients: add --partition 0/2 here, 1/2 there, then `recover-lora corpus merge` their corpora."
)
def generate(
    recipe: RecipeFile,
    cluster: ClusterName = "local",
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nothing changes it
    runs_dir: RunsDir = Path("runs"),
    dry_run: DryRun = False,
    partition: Annotated[
        str | None, typer.Option("--partition", metavar="I/N", help="Make the I-th of N parts only, from 0.")
    ] = None,
) -> None:
    part = parse_partition(partition)
    raise typer.Exit(execute(recipe, cluster, overrides, runs_dir, dry_run, "generate", part))


@app.command(
    help="All stages in order; finished ones are reused, an interrupted one goes on.\n\n"
    "Examples:\n\n"
    "recover-lora run launch/recipes/smollm2-135m/demo.yaml --set seed=1\n\n"
    "recover-lora run my-recipe.yaml --cluster my-cluster.yaml --max-restarts 3"
)
def run(
    recipe: RecipeFile,
    cluster: ClusterName = "local",
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nothing changes it
    runs_dir: RunsDir = Path("runs"),
    dry_run: DryRun = False,
    max_restarts: MaxRestarts = 0,
) -> None:
    raise typer.Exit(execute(recipe, cluster, overrides, runs_dir, dry_run, None, max_restarts=max_restarts))


@app.command(
    help="Train the adapters by logit distillation.\n\n"
    "Example: recover-lora train launch/recipes/smollm2-135m/demo.yaml --set train.loss.kind=reverse_kl"
)
def train(
    recipe: RecipeFile,
    cluster: ClusterName = "local",
    overrides: Overrides = [],  # noqa: B006 - typer reads the default, nothing changes it
    runs_dir: RunsDir = Path("runs"),
    dry_run: DryRun = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Only take a few steps, and say where their time goes.")
    ] = False,
    max_restarts: MaxRestarts = 0,
) -> None:
    if profile and not dry_run:
        raise typer.Exit(profile_training(recipe, cluster, overrides, runs_dir))
    raise typer.Exit(execute(recipe, cluster, overrides, runs_dir, dry_run, "train", max_restarts=max_restarts))


@app.command(
    help="Say what is damaged in a checkpoint, where and how badly, and what to do about it; or with --run, what "
    "limits a recovery, or what ended it.\n\n"
    "Examples:\n\n"
    "recover-lora diagnose assets/smollm2-135m-instruct runs/smollm2-135m-demo/degraded --output diagnosis\n\n"
    "recover-lora diagnose --run launch/recipes/smollm2-135m/demo.yaml"
)
def diagnose(
    reference: Annotated[Path | None, typer.Argument(metavar="REFERENCE", help="Folder of the full model.")] = None,
    degraded: Annotated[Path | None, typer.Argument(metavar="DEGRADED", help="Folder of the damaged one.")] = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="RECIPE", help="Explain what came of this recipe instead.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006 - typer reads it
    runs_dir: RunsDir = Path("runs"),
    cluster: ClusterName = "local",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="DIR", help="Write diagnosis.json and heat maps there; with --run limits.json."
        ),
    ] = None,
    text_tokens: Annotated[
        int,
        typer.Option(
            "--text-tokens",
            min=0,
            metavar="N",
            help="Tokens of the reference's own text on which the damage is weighed; 0 compares weights alone.",
        ),
    ] = 4096,
) -> None:
    if run is not None:
        given, on = load_recipe(run, overrides), load_cluster(cluster)
        from launch.limits import explain  # after a look at the files: it loads torch

        print(explain(given, on, runs_dir, output))
        return
    if reference is None or degraded is None:
        raise UserError("diagnose", "REFERENCE and DEGRADED are missing", "give two folders, or --run RECIPE")
    from launch.diagnose import diagnose as compare

    print(compare(reference, degraded, output, text_tokens))


@app.command(
    help="Look at every host of a cluster, in parallel: code, packages, devices, rates, network, disk, clock.\n\n"
    "The exit code is 1 where one is not fit.\n\n"
    "Examples:\n\n"
    "recover-lora preflight --cluster my-hosts.yaml\n\n"
    "recover-lora preflight my-recipe.yaml --cluster my-hosts.yaml"
)
def preflight(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="Also check that every host sees this recipe's models.")
    ] = None,
    cluster: ClusterName = "local",
    runs_dir: RunsDir = Path("runs"),
) -> None:
    from launch.preflight import run_preflight

    given = [] if recipe is None else models_of(load_recipe(recipe, []))
    raise typer.Exit(run_preflight(load_cluster(cluster), runs_dir, given))


@app.command(
    help="Memory of a device by part, time of a step, disk and device-hours of every layout, before anything starts; "
    "recommends the cheapest that fits and says why not the others. Reads the models' configs only.\n\n"
    "Examples:\n\n"
    "recover-lora plan launch/recipes/paper/llama-3.2-1b.yaml --cluster mi300x --nodes 4\n\n"
    "recover-lora plan launch/recipes/smollm2-135m/headline.yaml\n\n"
    "recover-lora plan my-recipe.yaml --law runs/smollm2-135m-data/laws.json --target 0.95"
)
def plan(
    recipe: RecipeFile,
    cluster: ClusterName = "local",
    overrides: Overrides = [],  # noqa: B006 - typer reads it
    runs_dir: RunsDir = Path("runs"),
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, metavar="N", help="Hosts, in place of the cluster file's.")
    ] = None,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Instead, simulate 8 to 1024 devices with as much work for each.")
    ] = False,
    law: Annotated[
        Path | None, typer.Option("--law", metavar="FILE", help="Take as many samples as a study's laws.json asks for.")
    ] = None,
    target: Annotated[
        float, typer.Option("--target", min=0, max=1, metavar="SHARE", help="Of --law: share of the KL to recover.")
    ] = 0.95,
    series: Annotated[
        str | None, typer.Option("--series", metavar="NAME", help="Of --law, where the study has several.")
    ] = None,
) -> None:
    from launch.plan_text import plan_text, scaling_text

    given, on = load_recipe(recipe, overrides), load_cluster(cluster)
    if law is not None:
        from launch.law import sized_by_law

        given, said = sized_by_law(given, law, series, target)
        print(f"{said}\n")
    if scaling:
        print(scaling_text(given, on))
    else:
        print(plan_text(given, on, nodes, runs_dir / given.name / "corpus"))


@app.command(
    help="A finished run's adapter with a model card, loaded again and compared with what was scored.\n\n"
    "Examples:\n\n"
    "recover-lora deliver launch/recipes/smollm2-135m/demo.yaml\n\n"
    "recover-lora deliver launch/recipes/smollm2-135m/demo.yaml --merged    # the whole recovered model too\n\n"
    "recover-lora deliver launch/recipes/smollm2-135m/demo.yaml --served --gguf    # asked of vLLM; for llama.cpp\n\n"
    "HF_TOKEN=... recover-lora deliver my-recipe.yaml --push me/my-model-recovered"
)
def deliver(
    recipe: RecipeFile,
    cluster: ClusterName = "local",
    overrides: Overrides = [],  # noqa: B006 - typer reads it
    runs_dir: RunsDir = Path("runs"),
    merged: Annotated[bool, typer.Option("--merged", help="Also write the recovered model as one checkpoint.")] = False,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Also write it as a GGUF file, by llama.cpp's converter.")
    ] = False,
    served: Annotated[
        bool, typer.Option("--served", help="Also ask a vLLM server of the adapter over the degraded model.")
    ] = False,
    llama_cpp: Annotated[
        Path, typer.Option("--llama-cpp", metavar="DIR", help="Folder with convert_hf_to_gguf.py (`make llama-cpp`).")
    ] = Path("assets/llama.cpp"),
    dense: Annotated[
        bool, typer.Option("--dense", help="Merge even into a packed or sparse model, which it is no longer then.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option("--push", metavar="OWNER/NAME", help="Upload it to this hub repository, with HF_TOKEN's rights."),
    ] = None,
) -> None:
    from launch.deliver import Forms
    from launch.deliver import deliver as make

    forms = Forms(merged, gguf, served, llama_cpp, dense)
    raise typer.Exit(make(load_recipe(recipe, overrides), load_cluster(cluster), runs_dir, forms, push))


@app.command(
    help="Run a grid of recipes; what points share is made once, and one that fails does not stop the others.\n\n"
    "Examples:\n\n"
    "recover-lora study launch/studies/smollm2-135m-matrix.yaml --only damage=kv-noise-0_5\n\n"
    "recover-lora study my-study.yaml --cluster my-hosts.yaml --parallel 4\n\n"
    "recover-lora study launch/studies/smollm2-135m-matrix.yaml --status --watch"
)
def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="Study file, e.g. one of launch/studies/.")],
    cluster: ClusterName = "local",
    runs_dir: RunsDir = Path("runs"),
    only: Annotated[
        list[str], typer.Option("--only", metavar="AXIS=LABEL,...", help="Leave out other labels; repeatable.")
    ] = [],  # noqa: B006 - typer reads it
    minutes: Annotated[
        float | None, typer.Option("--minutes", metavar="N", help="Begin no further point after N minutes.")
    ] = None,
    parallel: Annotated[
        int,
        typer.Option("--parallel", min=1, metavar="N", help="Points at a time, each on its share of hosts or devices."),
    ] = 1,
    status: Annotated[bool, typer.Option("--status", help="Say how far every point is; start nothing.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="With --status: again and again, until all are done.")] = False,
    forecast: Annotated[
        bool, typer.Option("--forecast", help="Also forecast, from the damage alone, what the closed forms recover.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    from launch.study import chosen, load_study, plans_of, point_commands, show_status
    from launch.study_run import run_study

    given, points = load_study(file)
    wanted, on = chosen(given, points, only), load_cluster(cluster)
    if status or watch:
        show_status(plans_of(wanted, on, runs_dir), runs_dir / given.name, watch=watch)
    elif dry_run:
        print(point_commands(plans_of(wanted, on, runs_dir)))
    else:
        raise typer.Exit(run_study(given, points, wanted, on, runs_dir, minutes, parallel=parallel, forecast=forecast))


for _name, _change, _help in (
    ("degrade", "seed=1", "Damage the reference as the recipe says (for studies)."),
    (
        "cache",
        "teacher.kind=hidden_states",  # the demo's own keeps no cache
        (
            "Store the reference's signal for a corpus (teacher.kind hidden_states or sparse_logits).\n\n"
            "With --dry-run: disk, memory and time of every kind for this recipe, predicted."
        ),
    ),
    ("evaluate", "evaluate.limit=10", "Score reference, degraded and recovered model."),
    ("report", "evaluate.bootstrap=20000", "Tables, plots and summary.json."),
):
    _command(_name, _help, partial(execute, only=_name), _change)
_command(
    "serve",
    "Start the cluster's vLLM servers for a recipe, print their addresses, and keep them until Ctrl-C.\n\n"
    "`run` and `generate` in another terminal use them as they are.",
    serve_pool,
)


def main() -> None:
    """Entry of the console script: the project's exit codes, one clear line for a user's mistake."""
    from recovery.stage import exit_code_of

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - every error gets its exit code here
        sys.exit(exit_code_of(error))


if __name__ == "__main__":
    main()

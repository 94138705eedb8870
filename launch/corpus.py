"""`recover-lora corpus`: look at a corpus, check it, unite its parts.

recover-lora corpus show runs/smollm2-135m-demo/corpus
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from recovery.artifacts import verify
from recovery.corpus import SUMMARY, TOKENIZER, Split, read_table, shards_of
from recovery.errors import UserError
from recovery.files import read_json

BAR_WIDTH = 40

corpus_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Look at a synthetic corpus, check it, unite its parts.",
)
CorpusFolder = Annotated[Path, typer.Argument(metavar="CORPUS", help="Folder, e.g. runs/smollm2-135m-demo/corpus")]


def _split(text: str) -> Split:
    for split in get_args(Split):
        if text == split:
            return split
    raise UserError(f"--split {text}", "no such split", f"choose from {', '.join(get_args(Split))}")


SplitName = Annotated[str, typer.Option("--split", metavar="NAME", help="train or held_out.")]


def _shards(corpus: Path, split: Split) -> list[Path]:
    shards = shards_of(corpus, split)
    if not shards:
        raise UserError(str(corpus), f"no shards of split {split} in it", "give the folder of a finished corpus")
    return shards


@corpus_app.command(
    help="Print samples, decoded.\n\nExample: recover-lora corpus show runs/my-run/corpus --first 100 -n 5"
)
def show(
    corpus: CorpusFolder,
    split: SplitName = "train",
    first: Annotated[int, typer.Option("--first", metavar="INDEX", help="Global index to begin with.")] = 0,
    count: Annotated[int, typer.Option("-n", "--count", metavar="N", help="Samples.")] = 3,
    ids: Annotated[bool, typer.Option("--ids", help="Token ids beside the text.")] = False,
) -> None:
    from transformers import AutoTokenizer

    shards = _shards(corpus, _split(split))
    tokenizer: Any = AutoTokenizer.from_pretrained(corpus / TOKENIZER)
    shown = 0
    for row in _rows(shards, first):
        if shown == count:
            break
        print(f"# {row['index']}: {row['length']} tokens, ended by {row['finish_reason']}, seed {row['seed']}")
        if ids:
            print(row["tokens"])
        print(tokenizer.decode(row["tokens"]), end="\n\n")
        shown += 1
    if not shown:
        raise UserError(f"--first {first}", "the corpus has no sample from there on", "give a smaller index")


def _rows(shards: list[Path], first: int) -> Iterator[dict[str, Any]]:
    for shard in shards:
        index = read_table(shard, ["index"])["index"].to_numpy()
        if len(index) and index[-1] >= first:
            yield from (row for row in read_table(shard).to_pylist() if row["index"] >= first)


@corpus_app.command(
    help="Lengths, end-of-text rate, start-token coverage, repetition, n-gram diversity.\n\n"
    "Example: recover-lora corpus stats runs/my-run/corpus --plot corpus.png"
)
def stats(
    corpus: CorpusFolder,
    split: SplitName = "train",
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw them into a PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    import numpy as np

    from recovery.corpus_statistics import describe_split

    name = _split(split)
    shards = _shards(corpus, name)
    summary = describe_split(corpus, name)
    summary["eligible_start_tokens"] = read_json(corpus / SUMMARY).get("eligible_start_tokens")
    if plot is not None:
        from datagen.plots import plot_corpus

        plot_corpus(corpus, plot)
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    length = summary["length"]
    print(f"samples             {summary['samples']}, {summary['tokens']} tokens")
    print(f"length              mean {length['mean']}, median {length['median']:.0f}, {length['min']}..{length['max']}")
    print(f"end of text         {100 * summary['end_of_text_rate']:.1f} % of the samples")
    if summary["eligible_start_tokens"]:
        share = 100 * summary["start_tokens"] / summary["eligible_start_tokens"]
        print(f"start tokens        {summary['start_tokens']} of {summary['eligible_start_tokens']} ({share:.1f} %)")
    for size in (1, 2, 3):
        print(f"distinct {size}-grams    {100 * (summary[f'distinct_{size}'] or 0):.1f} %")
    print(f"repeated 4-grams    {100 * (summary['repeats_4'] or 0):.1f} % within a sample, on average")
    print(f"(n-grams of the first {summary['rows_of_n_grams']} samples)\n\nsamples by length")
    lengths = np.concatenate([read_table(shard, ["length"])["length"].to_numpy() for shard in shards])
    counts, edges = np.histogram(lengths, bins=min(10, int(lengths.max() - lengths.min()) + 1))
    for number, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        print(f"{low:6.0f} - {high:<6.0f} {'#' * round(BAR_WIDTH * number / counts.max()):<{BAR_WIDTH}} {number}")
    if plot is not None:
        print(f"\nplot                {plot}")


@corpus_app.command("verify", help="Read every byte again: hashes, page checksums, indices, ids, teacher signal.")
def verify_corpus(corpus: CorpusFolder) -> None:
    from datagen.integrity import check_corpus

    verify(corpus)
    counts = check_corpus(corpus)
    print(", ".join(f"{split}: {samples} samples, {tokens} tokens" for split, (samples, tokens) in counts.items()))
    print("whole")


@corpus_app.command(
    help="Unite the parts that several clients made (generate --partition) into the corpus of the whole recipe, which "
    "`run` then reuses.\n\nExample: recover-lora corpus merge runs/my-run/corpus-0-of-2 runs/my-run/corpus-1-of-2"
)
def merge(
    parts: Annotated[list[Path], typer.Argument(metavar="PART...", help="Folders of all parts.")],
    runs_dir: Annotated[Path, typer.Option("--runs-dir", metavar="DIR", help="Where the whole corpus goes.")] = Path(
        "runs"
    ),
) -> None:
    from datagen.merge import merge_parts
    from recovery.stage import set_up_logging

    set_up_logging("merge")
    print(merge_parts(parts, runs_dir.resolve() / "artifacts"))

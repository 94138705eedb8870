"""A corpus in one picture: lengths, where texts end, repetition, how often each token starts a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from recovery.corpus import read_table, shards_of
from recovery.corpus_statistics import repeats

INK, BAR, GRID = "#1f2933", "#1f77b4", "#e4e7eb"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "text.color": INK,
    "figure.dpi": 150,
}
N_GRAM_ROWS = 2000


def plot_corpus(corpus: Path, path: Path) -> None:
    """Draw the training split of `corpus` as a PNG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shards = shards_of(corpus, "train")
    columns = [read_table(shard, ["length", "start_token", "finish_reason"]) for shard in shards]
    lengths = np.concatenate([table["length"].to_numpy() for table in columns])
    starts = np.concatenate([table["start_token"].to_numpy() for table in columns])
    stopped = np.concatenate([np.array(table["finish_reason"].to_pylist()) == "stop" for table in columns])
    rows = [np.asarray(row.values) for row in read_table(shards[0], ["tokens"])["tokens"]][:N_GRAM_ROWS]

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 6), layout="constrained")
        (length_axes, end_axes), (repeat_axes, start_axes) = figure.subplots(2, 2)
        longest = int(lengths.max())
        bins = np.linspace(0, longest + 1, min(longest + 1, 40) + 1)
        length_axes.hist(lengths, bins=bins, color=BAR)
        length_axes.set(title="Length of a sample", xlabel="tokens", ylabel="samples")

        order = np.sort(lengths[stopped])
        end_axes.plot(order, 100 * np.arange(1, len(order) + 1) / len(lengths), color=BAR)
        end_axes.set(title="Texts that have ended", xlabel="tokens", ylabel="% of samples", xlim=(0, longest + 1))
        end_axes.set_ylim(bottom=0)

        repeat_axes.hist(100 * repeats(rows), bins=np.linspace(0, 100, 41), color=BAR)
        repeat_axes.set(title="Repetition within a sample", xlabel="% of 4-grams seen before", ylabel="samples")

        _, times = np.unique(starts, return_counts=True)
        values, counts = np.unique(times, return_counts=True)
        start_axes.bar(values.astype(str), counts, color=BAR)
        start_axes.set(title="How often a token starts a text", xlabel="times", ylabel="tokens")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)

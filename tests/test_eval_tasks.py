"""Tasks offline, from tiny Arrow folders in the layout of the real ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from eval.config import KNOWN, PAPER, Evaluate
from eval.contexts import context_text, shares
from eval.tasks import TASKS, benchmark_data, load_items, sample_rows
from recovery.errors import UserError, UserErrors
from recovery.files import HashMemory
from tests.conftest import REPOSITORY

ITEMS = 10


def letters(number: int) -> dict[str, list[str]]:
    return {"text": [f"{name} {number}" for name in ("ant", "bee", "cow", "dog")], "label": list("ABCD")}


def rows_of(name: str) -> list[dict[str, Any]]:
    """Rows with the columns of the local data, which differ from the hub's in places."""
    numbers = range(ITEMS)
    if name == "hellaswag":
        return [
            {
                "activity_label": "Cooking",
                "ctx_a": f"A man stands at stove {n}.",
                "ctx_b": "he",
                "endings": [f"stirs {n}.", "sings [title] loud.", "eats.", "leaves."],
                "label": str(n % 4),
            }
            for n in numbers
        ]
    if name.startswith("mmlu"):
        return [{"question": f"Question {n}?", "choices": list("wxyz"), "answer": n % 4} for n in numbers]
    if name in ("arc_challenge", "arc_easy"):
        return [{"question": f"Which one is {n}?", "choices": letters(n), "answerKey": "ABCD"[n % 4]} for n in numbers]
    if name == "winogrande":
        sentence = "The cup did not fit the bag since _ was too big."
        return [
            {"sentence": f"{n} " + sentence, "option1": "bread", "option2": "butter", "answer": str(1 + n % 2)}
            for n in numbers
        ]
    if name == "piqa":
        return [{"goal": f"Goal {n}", "sol1": "run", "sol2": "walk on", "label": n % 2} for n in numbers]
    if name == "openbookqa":
        return [{"question_stem": f"Water {n} is", "choices": letters(n), "answerKey": "ABCD"[n % 4]} for n in numbers]
    if name == "boolq":
        return [{"question": f"is {n} even", "passage": f"About {n}.", "answer": n % 2 == 0} for n in numbers]
    return [
        {
            "question": f"What is {n}?",
            "support": "" if n % 2 else "It is known.",
            "correct_answer": "right",
            **{f"distractor{k}": f"wrong {k}" for k in (1, 2, 3)},
        }
        for n in numbers
    ]


def make_all(folder: Path) -> Path:
    from datasets import Dataset

    for name, benchmark in TASKS.items():
        split = "test" if name.startswith("mmlu") else "validation"
        Dataset.from_list(rows_of(name)).save_to_disk(folder / benchmark.folder / split)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_all(tmp_path_factory.mktemp("data"))


def requests_of(data: Path, name: str, position: int = 0) -> tuple[list[tuple[str, str]], Any]:
    items = load_items(name, 0, None, data)
    document = items.documents[position]
    made: Any = items.task.construct_requests(doc=document, ctx=items.prompt(position), metadata=(name, position, 1))
    return [request.args for request in made], items.task.doc_to_target(document)


@pytest.mark.parametrize("name", KNOWN)
def test_every_task_is_zero_shot_with_a_right_answer_for_every_item(data: Path, name: str):
    items = load_items(name, 0, None, data)
    assert items.doc_ids == list(range(ITEMS))
    for position, document in enumerate(items.documents):
        made: Any = items.task.construct_requests(doc=document, ctx=items.prompt(position), metadata=(name, 0, 1))
        answer = 3 if name == "sciq" else position % 2 if len(made) == 2 else position % 4
        if name == "boolq":
            answer = int(position % 2 == 0)
        likelihoods = [(0.0 if choice == answer else -1.0, False) for choice in range(len(made))]
        metrics = items.task.process_results(document, likelihoods)
        assert metrics["acc"] == 1.0
        assert ("acc_norm" in metrics) == (not name.startswith("mmlu") and name not in ("winogrande", "boolq"))


def test_prompts_are_those_of_lm_eval(data: Path):
    assert requests_of(data, "hellaswag")[0][:2] == [
        ("Cooking: A man stands at stove 0. He", " stirs 0."),
        ("Cooking: A man stands at stove 0. He", " sings. loud."),
    ]
    assert requests_of(data, "winogrande")[0] == [
        ("0 The cup did not fit the bag since bread", " was too big."),
        ("0 The cup did not fit the bag since butter", " was too big."),
    ]
    assert requests_of(data, "boolq") == (
        [("About 0.\nQuestion: is 0 even?\nAnswer:", " no"), ("About 0.\nQuestion: is 0 even?\nAnswer:", " yes")],
        1,
    )
    mmlu = requests_of(data, "mmlu_astronomy")[0]
    assert [choice for _, choice in mmlu] == [" A", " B", " C", " D"]
    assert mmlu[0][0] == (
        "The following are multiple choice questions (with answers) about astronomy.\n\n"
        "Question 0?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    )


def test_the_users_folder_and_the_cache_stay_as_they_are(data: Path, tmp_path: Path):
    before = sorted((path, path.stat().st_mtime_ns) for path in data.rglob("*"))
    script = (
        "from pathlib import Path; from eval.tasks import load_items\n"
        f"for name in ('hellaswag', 'piqa'): load_items(name, 0, 3, Path({str(data)!r}))\n"
    )
    environment = {"HF_HOME": str(tmp_path / "cache"), "PATH": "", "HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert sorted((path, path.stat().st_mtime_ns) for path in data.rglob("*")) == before
    assert not list(tmp_path.rglob("*.arrow"))
    assert result.stdout + result.stderr == ""


def test_the_sample_depends_on_seed_and_task_alone_and_is_not_the_head():
    assert sample_rows(1, "piqa", 1000, 50) == sample_rows(1, "piqa", 1000, 50)
    assert sample_rows(1, "piqa", 1000, 50) != sample_rows(2, "piqa", 1000, 50)
    assert sample_rows(1, "piqa", 1000, 50) != sample_rows(1, "boolq", 1000, 50)
    assert max(sample_rows(1, "piqa", 1000, 50)) > 500
    assert set(sample_rows(1, "piqa", 1000, 20)) < set(sample_rows(1, "piqa", 1000, 50))
    assert sample_rows(1, "piqa", 9, 50) == list(range(9)) == sample_rows(1, "piqa", 9, None)


def test_sampled_documents_are_the_rows_they_say(data: Path):
    items = load_items("piqa", 5, 4, data)
    assert [document["goal"] for document in items.documents] == [f"Goal {n}" for n in items.doc_ids]
    assert len(items.doc_ids) == 4


def test_the_digest_is_of_the_files_that_are_read(data: Path, tmp_path: Path):
    memory = HashMemory(None)
    whole = benchmark_data(data, PAPER, memory)
    assert whole.path == data
    assert benchmark_data(data, tuple(reversed(PAPER)), memory).digest == whole.digest
    assert benchmark_data(data, ["piqa"], memory).digest != whole.digest
    copy = make_all(tmp_path / "elsewhere")
    assert benchmark_data(copy, PAPER, HashMemory(None)).digest == whole.digest
    shard = next((copy / "piqa").rglob("*.arrow"))
    shard.write_bytes(shard.read_bytes() + b"\0")
    assert benchmark_data(copy, PAPER, HashMemory(None)).digest != whole.digest


def test_missing_data_are_told_task_by_task(tmp_path: Path):
    with pytest.raises(UserError, match=r"evaluate\.data_dir: no folder .*gone"):
        benchmark_data(tmp_path / "gone", ["piqa"], HashMemory(None))
    (tmp_path / "piqa").mkdir()
    with pytest.raises(UserErrors) as caught:
        benchmark_data(tmp_path, ["piqa", "mmlu_astronomy"], HashMemory(None))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert str(tmp_path / "piqa" / "plain_text" / "validation") in lines[0]
    assert "mmlu_no_train/astronomy/test" in lines[1]


def test_truncated_data_are_refused_by_name(tmp_path: Path):
    copy = make_all(tmp_path / "data")
    shard = next((copy / "piqa").rglob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(UserError, match=r"piqa.*not readable as Arrow"):
        load_items("piqa", 0, None, copy)


def test_unknown_and_repeated_tasks_are_refused_with_the_known_ones():
    with pytest.raises(ValidationError, match=r"unknown task helaswag; known: hellaswag, mmlu_philosophy"):
        Evaluate(tasks=("helaswag",))
    with pytest.raises(ValidationError, match="listed twice"):
        Evaluate(tasks=("piqa", "piqa"))
    with pytest.raises(ValidationError):
        Evaluate(tasks=())
    assert Evaluate().task_names == PAPER
    assert Evaluate(suite="extended").task_names == (*PAPER, "arc_easy", "sciq")
    assert Evaluate(suite="extended", tasks=("sciq",)).task_names == ("sciq",)


def test_the_config_and_the_data_check_import_neither_torch_nor_lm_eval():
    script = "import eval.config, eval.tasks, sys; print({'torch', 'lm_eval', 'datasets'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_contexts_are_prompts_without_answers_spread_over_tasks(data: Path):
    assert shares(7, ("a", "b", "c")) == {"a": 3, "b": 2, "c": 2}
    assert shares(1, ("a", "b")) == {"a": 1, "b": 0}
    assert context_text(load_items("piqa", 0, None, data), 2) == "Question: Goal 2\nAnswer:"
    # bread and butter share a letter, which is no word of the context
    assert context_text(load_items("winogrande", 0, None, data), 0) == "0 The cup did not fit the bag since"

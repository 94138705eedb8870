"""What a recipe's names turn out to be, with everything checked that can be checked before work starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from eval.config import BenchmarkData
from eval.tasks import benchmark_data
from launch.models import resolve_model
from launch.recipe import Recipe
from recovery.config import LooseInput, ModelInput
from recovery.damage_config import ConversionBug
from recovery.deepspeed_config import read_deepspeed
from recovery.errors import UserError, UserErrors
from recovery.files import HashMemory, arrow_files, digest_of
from recovery.placement import check_adapter, counterparts, select, skeleton
from recovery.vocabulary import Vocabulary, load_vocabulary, used_width

Result = TypeVar("Result")


class _Faults:
    """Collects the user's mistakes, so that one message tells them all."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []

    def attempt(self, action: Callable[[], Result]) -> Result | None:
        try:
            return action()
        except UserErrors as error:
            self.errors.extend(error.errors)
        except UserError as error:
            self.errors.append(error)
        return None

    def stop_if_any(self) -> None:
        if self.errors:
            raise UserErrors(self.errors)


@dataclass(frozen=True)
class Names:
    """What the recipe's names turned out to be."""

    reference: ModelInput
    generator: ModelInput
    degraded: ModelInput | None
    deepspeed: dict[str, Any]
    data: BenchmarkData | None
    labelled: dict[str, LooseInput]
    """Folders of labelled text, by the recipe's name."""


def resolve_names(recipe: Recipe, memory: HashMemory) -> Names:
    """Find every model, file and folder that the recipe names. Raises UserErrors with all that is wrong."""
    faults = _Faults()
    models = recipe.models
    reference = faults.attempt(lambda: resolve_model(models.reference, models.revision, "models.reference", memory))
    generator, degraded = reference, None
    if (own := recipe.generate.model) is not None:
        generator = faults.attempt(lambda: resolve_model(own, None, "generate.model", memory))
    if (given := models.degraded) is not None:
        degraded = faults.attempt(lambda: resolve_model(given, None, "models.degraded", memory))
    deepspeed = faults.attempt(lambda: read_deepspeed(recipe.train.deepspeed))
    data = None
    if (folder := recipe.evaluate.data_dir) is not None and recipe.evaluate.task_names:
        data = faults.attempt(lambda: benchmark_data(Path(folder), recipe.evaluate.task_names, memory))
    labelled: dict[str, LooseInput] = {}
    for name in recipe.labelled.sets if recipe.labelled is not None else ():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).is_dir():
            found = faults.attempt(partial(labelled_folder, name, memory))
            labelled |= {name: found} if found is not None else {}
    faults.stop_if_any()
    assert reference is not None
    assert generator is not None
    assert deepspeed is not None
    return Names(reference, generator, degraded, deepspeed, data, labelled)


def labelled_folder(name: str, memory: HashMemory) -> LooseInput:
    """A folder of labelled text and the hash of its Arrow files. Raises UserError when there are none."""
    folder = Path(name).expanduser().resolve()
    listing = {path.name: memory.sha256(path) for path in arrow_files(folder)}
    if not listing:
        raise UserError("labelled.sets", f"no data-*.arrow in {name}", "give a folder written by save_to_disk")
    return LooseInput(path=folder, digest=digest_of(listing))


def check_models(recipe: Recipe, names: Names) -> None:
    """Check vocabularies, and the modules that the recipe names, without reading any weights. Raises UserErrors.

    Apart from `build_stages`, since it imports transformers: where all is finished, nobody waits for that.
    """
    faults = _Faults()
    vocabularies: dict[str, Vocabulary] = {}

    def vocabulary(model: ModelInput) -> Vocabulary:
        if model.digest not in vocabularies:
            vocabularies[model.digest] = load_vocabulary(model.path, model.revision)
        return vocabularies[model.digest]

    if names.degraded is not None:
        degraded = names.degraded
        faults.attempt(lambda: used_width(vocabulary(names.reference), vocabulary(degraded)))
    if names.generator != names.reference:
        faults.attempt(lambda: used_width(vocabulary(names.reference), vocabulary(names.generator), "generate.model"))
    student = names.degraded or names.reference
    model = faults.attempt(lambda: skeleton(student.path, student.revision))
    if model is not None:
        if recipe.train.parameters == "adapters":
            faults.attempt(lambda: check_adapter(model, recipe.adapter))
        if recipe.adapter.init != "zero" and names.degraded is not None:
            reference = names.reference
            other = faults.attempt(lambda: skeleton(reference.path, reference.revision))
            if other is not None:
                faults.attempt(lambda: counterparts(model, other, "models.degraded"))
        if (damage := recipe.degrade) is not None and not isinstance(damage, ConversionBug):
            faults.attempt(lambda: select(model, damage.modules, "degrade.modules"))
    faults.stop_if_any()

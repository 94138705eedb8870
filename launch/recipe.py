"""Recipes: one YAML describes one experiment. Loaded, overridden with --set, and checked whole. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from datagen.config import Generate, Labelled
from eval.config import Evaluate
from recovery.config import Adapter, Models, OnlineTeacher, SparseLogitsTeacher, Teacher, Train
from recovery.damage_config import Damage
from recovery.errors import UserError, UserErrors, without_credentials
from recovery.settings import Config

MOST_VALUES = 100_000
"""Of a recipe: a few lines with anchors can stand for billions of values."""
MOST_SHOWN = 200
"""Characters of what was found, in an error."""
OF_YAML = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What PyYAML's own constructors raise (impossible dates, unknown truth values), beside YAMLError."""
ConfigType = TypeVar("ConfigType", bound=Config)


class TrackingSection(Config):
    experiment: str = "recover-lora"
    """MLflow experiment."""


class Recipe(Config):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run's folder."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    models: Models
    degrade: Damage | None = None
    """Damage made by this program, for studies; left out when models.degraded is given."""
    generate: Generate = Generate()
    labelled: Labelled | None = None
    """Text with answers to learn from in place of the synthetic corpus, for comparisons; with
    train.loss.cross_entropy 1 this is supervised fine-tuning."""
    adapter: Adapter = Adapter()
    teacher: Teacher = OnlineTeacher()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="before")
    @classmethod
    def _usual_damage(cls, content: Any) -> Any:
        """degrade without a kind is the paper's noise."""
        if isinstance(content, dict) and isinstance(content.get("degrade"), dict) and "kind" not in content["degrade"]:
            return {**content, "degrade": {"kind": "gaussian_noise", **content["degrade"]}}
        return content

    @model_validator(mode="after")
    def _one_damage(self) -> Recipe:
        if (self.degrade is None) == (self.models.degraded is None):
            raise ValueError("give exactly one of models.degraded (a model of yours) and degrade (damage made here)")
        return self

    @model_validator(mode="after")
    def _something_learns(self) -> Recipe:
        if self.train.epochs == 0 and self.adapter.init == "zero":
            raise ValueError("train.epochs 0 needs a closed form, or nothing would be recovered: set adapter.init")
        return self

    @model_validator(mode="after")
    def _adapters_or_all(self) -> Recipe:
        if self.train.parameters == "all" and (self.adapter.init != "zero" or not self.train.epochs):
            raise ValueError("train.parameters all has no adapters: leave out adapter.init, and give train.epochs")
        if self.train.parameters == "all" and self.teacher.kind == "sparse_logits":
            raise ValueError(
                "train.parameters all learns the head too, for which teacher.kind sparse_logits is not made"
            )
        return self

    @model_validator(mode="after")
    def _text_of_ones_own(self) -> Recipe:
        if self.labelled is not None and not isinstance(self.teacher, OnlineTeacher):
            raise ValueError("labelled text has no cached teacher: set teacher.kind online")
        if self.labelled is not None and not self.train.epochs:
            raise ValueError("labelled text is for training: give train.epochs, or leave it out")
        return self

    @model_validator(mode="after")
    def _one_teacher(self) -> Recipe:
        if not isinstance(self.teacher, SparseLogitsTeacher):
            return self
        if "lm_head" in self.adapter.placement:
            raise ValueError("adapter.placement lm_head learns the head, for which sparse_logits is not made")
        loss = self.train.loss
        if loss.kind != "forward_kl" or loss.temperature != 1:
            raise ValueError("teacher.kind sparse_logits has train.loss forward_kl at temperature 1 only")
        if self.teacher.captured and not self.generate.capture_logprobs:
            raise ValueError(
                "teacher.captured needs generate.capture_logprobs, the number of log-probabilities to store"
            )
        return self


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `path` with `section.field=value` overrides. Raises UserErrors with every fault, one line each."""
    return load_config(Recipe, path, overrides)


def load_config(kind: type[ConfigType], path: Path, overrides: Sequence[str] = ()) -> ConfigType:
    content = read_yaml(path)
    for override in overrides:
        apply_override(content, override)
    return check_config(kind, content, path)


def check_config(kind: type[ConfigType], content: dict[str, Any], path: Path) -> ConfigType:
    """The content of a file, as its class. Raises UserErrors with every fault, one line each."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UserErrors([_user_error(kind, path, fault) for fault in error.errors()]) from error


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(), Loader=_UniqueKeys)  # noqa: S506 - a subclass of the safe loader
    except OSError as error:
        raise UserError(str(path), error.strerror or "not readable", "give the path of a YAML file") from error
    except (yaml.YAMLError, *OF_YAML) as error:
        said = _short(without_credentials(" ".join(str(error).split())))
        raise UserError(str(path), f"not YAML ({said})", "mend the file") from error
    if _values(content, MOST_VALUES) > MOST_VALUES:
        raise UserError(str(path), f"more than {MOST_VALUES} values, its anchors followed", "write it shorter")
    if not isinstance(content, dict):
        raise UserError(str(path), f"a {type(content).__name__}, not a mapping of sections", "see launch/recipes/")
    return content


def _values(content: Any, most: int) -> int:
    """How many values there are with every anchor followed; counts no further than a few beyond `most`."""
    count, left = 0, [content]
    while left and count <= most:
        value = left.pop()
        count += 1
        if isinstance(value, dict | list):
            left.extend(value.values() if isinstance(value, dict) else value)
    return count


def _short(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


class _UniqueKeys(yaml.SafeLoader):
    """The safe loader, refusing a key given twice (YAML would silently take the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one field of the mapping: `train.epochs=2`; the value is read as YAML."""
    dotted, sign, text = override.partition("=")
    if not sign or not all(dotted.strip().split(".")):
        raise UserError(f"--set {override}", "not of the form section.field=value", "write e.g. --set train.epochs=2")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, *OF_YAML) as error:
        raise UserError(f"--set {override}", "its value is not YAML", "quote it") from error
    set_field(content, dotted.strip(), value, f"--set {override}")


def set_field(content: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    """Set one field, or a whole section, of the mapping. where: what to name in an error."""
    *sections, field = dotted.split(".")
    place: Any = content
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise UserError(where, f"{section} is not a section", "name a field of a section")
    place[field] = value


def _user_error(kind: type[BaseModel], path: Path, fault: Any) -> UserError:
    parts, models = _follow(kind, fault["loc"])
    where = ".".join(map(str, parts)) or str(path)
    found = fault["input"]
    shown = _short(without_credentials(repr(found))) if not isinstance(found, dict) else "a section"
    if fault["type"] == "extra_forbidden":
        _, models = _follow(kind, fault["loc"][:-1])
        known = sorted({name for model in models for name in model.model_fields})
        close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return UserError(where, "unknown field", f"{hint}known here: {', '.join(known)}")
    if fault["type"] == "missing":
        return UserError(where, "missing", "give it")
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        tag = fault["ctx"].get("tag")
        known = sorted(kind for model in models for kind in get_args(model.model_fields["kind"].annotation))
        return UserError(f"{where}.kind", "missing" if tag is None else f"found {tag!r}", f"one of: {', '.join(known)}")
    message = fault["msg"].removeprefix("Value error, ")
    return UserError(where, f"found {shown}", message[0].lower() + message[1:])


def _follow(kind: type[BaseModel], location: Sequence[Any]) -> tuple[list[Any], list[type[BaseModel]]]:
    """The location as the user wrote it, without the tags of unions, and the models that may stand at its end."""
    models, parts = [kind], []
    for part in location:
        tagged = [m for m in models if "kind" in m.model_fields and part in get_args(m.model_fields["kind"].annotation)]
        if tagged:
            models = tagged
            continue
        parts.append(part)
        models = [
            inner for m in models if part in m.model_fields for inner in _models_in(m.model_fields[part].annotation)
        ]
    return parts, models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The config classes in an annotation such as `Annotated[A | B, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]

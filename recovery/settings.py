"""The base class of everything that a recipe, a cluster file or a job holds."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Frozen, strict about its keys; fields are documented by the string beneath them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def to_yaml(self) -> str:
        """What was given and not what it defaults to, so that all that follows from it follows again."""
        import yaml

        return yaml.safe_dump(self.model_dump(mode="json", exclude_unset=True), sort_keys=False)

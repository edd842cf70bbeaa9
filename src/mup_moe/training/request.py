"""Everything that determines a cell's result except the tokens and `VERSION`, as a plain value that fits in JSON."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

from mup_moe.config.architecture import Architecture
from mup_moe.config.cell import Cell, GroupRate
from mup_moe.config.settings import ModelSettings, TrainingSettings, without_neutral
from mup_moe.files import UserError
from mup_moe.model.inventory import ModelShape
from mup_moe.parametrization import Parametrization
from mup_moe.training.version import VERSION


@dataclass(frozen=True)
class TrainingRequest:
    """A cell with its set-up's settings, its parametrization row and its architecture, if that is not one of ours."""

    cell: Cell
    model: ModelSettings
    training: TrainingSettings
    parametrization: Parametrization
    architecture: Architecture | None = None

    def to_json(self, cell: bool = True) -> str:
        """Returns one line of JSON for `from_json`, equal for equal requests. cell: whether to include the cell id."""
        parts = {"model": _plain(self.model), "training": _plain(self.training)}
        parts |= {"architecture": self.architecture.as_data()} if self.architecture else {}
        rules = self.parametrization.as_row()
        return json.dumps(parts | {"cell": self.cell.id if cell else None, "parametrization": rules}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads the output of `to_json`. Raises UserError for anything else."""
        try:
            fields: Mapping[str, Any] = json.loads(text)
            cell = Cell.parse(fields["cell"])
            model = ModelSettings(**fields["model"])
            named = fields.get("architecture")
            architecture = None if named is None else Architecture.parse(cell.architecture, named, {})
            model.check(cell, architecture)
            training: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in fields["training"].items()}
            rules = Parametrization.parse(cell.parametrization, fields["parametrization"])
            return cls(cell, model, TrainingSettings(**training), rules, architecture)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"the training request is not from this version ({error}): export it again with export-jobs"
            ) from None

    def shape(self, vocabulary: int) -> ModelShape:
        """Returns the shape of its model."""
        return ModelShape.of(self.cell, self.model, vocabulary, self.architecture)

    def base(self, vocabulary: int) -> ModelShape:
        """Returns the base shape, at which all factors are 1."""
        return ModelShape.base_of(self.cell, self.model, vocabulary, self.architecture)

    @property
    def rules(self) -> Parametrization:
        """The row, with the learning-rate factor for the group that the cell names."""
        of_group = self.cell.learning_rate_of
        return self.parametrization.scaled(*GroupRate.parse(of_group)) if of_group else self.parametrization

    @property
    def packages(self) -> tuple[str, ...]:
        """The packages other than torch whose code computes its model."""
        return ("transformers",) if self.architecture else ()

    @property
    def digest(self) -> str:
        """A digest that identifies the request, regardless of the tokens."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def fingerprint(self, tokens_digest: str) -> str:
        """Returns a digest of everything that the cell's result depends on except the machine."""
        return fingerprint_of(self.digest, tokens_digest)


def fingerprint_of(request: str, tokens_digest: str, version: int = VERSION) -> str:
    """Returns `TrainingRequest.fingerprint` for the request with this digest."""
    return hashlib.sha256(f"{request}\n{tokens_digest}\nversion {version}".encode()).hexdigest()[:16]


# Cached because a sweep has thousands of cells of a few set-ups.
_plain = cache(without_neutral)

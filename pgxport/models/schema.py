# SPDX-License-Identifier: Apache-2.0
"""The rule of every json file beside the weights: no key that transformers reads is ignored in silence.

A key is a field of the schema (honoured), or stands in one of the schema's tables: it has no effect on an answer, it is kept
for sampling, or only some of its values are computed and the others are refused. Keys that transformers does not know have
no effect there either.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pgxport.errors import CheckpointError
from pgxport.models.safetensors import shown

Size = Annotated[int, Field(ge=1, le=1 << 20)]
Count = Annotated[int, Field(ge=1, le=1024)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
Only = tuple[tuple[Any, ...], str]  # the values that are computed, and what another one would change


class FileSchema(BaseModel):
    """A json file of a checkpoint, or an object in one; its fields are the keys that are honoured."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    no_effect: ClassVar[Mapping[str, str]] = {}  # key -> why no answer depends on it
    kept: ClassVar[Mapping[str, Any]] = {}  # key -> the value that changes no greedy answer
    only: ClassVar[Mapping[str, Only]] = {}

    @classmethod
    def read(cls, values: object, where: str) -> Self:
        """The object as its schema; messages name it `where`.

        Raises:
            CheckpointError: a value is of another type, out of bounds, or of what pgx does not compute.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError(
                f"{where} is {shown(str(values))}, not an object; give the file that was saved with the weights"
            )
        for key, (allowed, why) in cls.only.items():
            if key in values and not any(type(values[key]) is type(a) and values[key] == a for a in allowed):
                can = " or ".join(map(repr, allowed))
                raise CheckpointError(f"{where}: {key} is {shown(str(values[key]))}, {why}; pgx computes {can}")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = str(first["loc"][0]) if first["loc"] else ""
            if first["type"] == "missing":
                raise CheckpointError(f"{where}: has no {key}; give the file that was saved with the weights") from error
            fault = (
                f"{key} is {shown(str(first['input']))}; {first['msg']}" if key else first["msg"].removeprefix("Value error, ")
            )
            raise CheckpointError(f"{where}: {fault}") from error

    @classmethod
    def keys(cls) -> set[str]:
        """Every key that the rule says something about."""
        return {*cls.model_fields, *cls.no_effect, *cls.kept, *cls.only}

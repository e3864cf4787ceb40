"""Values in what users write are taken as they are said: pydantic alone takes true for 1, and 1 or "yes" for true, and
looks into no value of a key that may hold any.
"""

from __future__ import annotations

import datetime
import math
from typing import Any

from pydantic import BaseModel, ModelWrapValidatorHandler, model_validator


class AsSaid(BaseModel):
    @model_validator(mode="wrap")
    @classmethod
    def _as_said(cls, raw: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        made = handler(raw)
        for name, field in cls.model_fields.items():
            key = field.alias or name
            if isinstance(raw, dict) and key in raw:
                _alike(raw[key], getattr(made, name), key)
        return made


def _alike(raw: Any, made: Any, key: str) -> None:
    """Raises ValueError where one of two is true or false and the other is not, and for what is no plain value."""
    if isinstance(raw, bool) != isinstance(made, bool):
        raise ValueError(f"{key} is {raw!r}, where {'true or false' if isinstance(made, bool) else 'a number'} belongs")
    if isinstance(raw, (datetime.date, bytes, set)) or (isinstance(made, float) and not math.isfinite(made)):
        raise ValueError(f"{key} is {str(raw)[:80]}: give a finite number or a text, in quotes")
    if isinstance(raw, list) and isinstance(made, (list, tuple)):
        for one, other in zip(raw, made):
            _alike(one, other, key)
    elif isinstance(raw, dict) and isinstance(made, dict):
        for (name, one), (other_name, other) in zip(raw.items(), made.items()):
            _alike(name, other_name, f"a name in {key}")
            _alike(one, other, f"{key}.{name}")

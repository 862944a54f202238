"""Which architecture is which class. A model file registers itself; adding one touches nothing else."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CheckpointError, UnsupportedModelError
from ..nn import CausalLM
from .config import ModelConfig

_MODELS: dict[str, Callable[[ModelConfig], CausalLM]] = {}


def register(*architectures: str) -> Callable[[type[CausalLM]], type[CausalLM]]:
    """Class decorator: the names in ``config["architectures"]`` that this model implements."""

    def decorate(cls: type[CausalLM]) -> type[CausalLM]:
        for name in architectures:
            _MODELS[name] = cls
        return cls

    return decorate


def architectures() -> tuple[str, ...]:
    """All names that can be loaded, sorted."""
    package = importlib.import_module(__package__ or "pelton.models")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return tuple(sorted(_MODELS))


def create(config: Mapping[str, Any]) -> CausalLM:
    """The model for a checkpoint's config.

    Raises:
        UnsupportedModelError: unknown architecture or option.
        CheckpointError: a config value has the wrong kind.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    known = architectures()
    if not isinstance(name, str):
        raise UnsupportedModelError("config field architectures names no model", f"known: {', '.join(known)}")
    if name not in known:
        raise UnsupportedModelError(f"architecture {name} is not implemented", f"known: {', '.join(known)}")
    try:
        return _MODELS[name](ModelConfig(config))
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        # Families read nested and optional fields as they come; whatever is wrong there is the config's fault.
        raise CheckpointError(f"the config of this {name} cannot be read ({error!r})", "check config.json") from error

"""Finding a function by what the user wrote: ``package.module:function`` or ``path/to/file.py:function``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from fedmerge.common.errors import ConfigError

FORMS = "'package.module:function' or 'path/to/file.py:function'"


def find_function(spec: str, *, where: str, forms: str = FORMS) -> Callable[..., Any]:
    """The function that ``spec`` names.

    A file is imported by its location, once, under a name of its own; its folder is not put on the
    import path.

    Raises:
        ConfigError: the spec has another form, or the file, module or function is not there. Errors
            inside the user's own code come through as they are.
    """
    source, colon, name = spec.rpartition(":")
    if not (colon and source and name.isidentifier()):
        raise ConfigError("not the name of a function", where=where, got=repr(spec), wanted=forms)
    module = _from_file(Path(source), where) if source.endswith(".py") else _from_module(source, where)
    function = getattr(module, name, None)
    if callable(function):
        return function  # type: ignore[no-any-return]
    public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    close = get_close_matches(name, public, n=1)
    raise ConfigError(
        "no such function", where=where, got=repr(name), do=f"Did you mean {close[0]!r}?" if close else None
    )


def _from_file(path: Path, where: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError("no such file", where=where, got=str(path), do=f"Relative to {Path.cwd()}.")
    path = path.resolve()
    unique = f"fedmerge_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if unique in sys.modules:
        return sys.modules[unique]
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None, "a path that ends in .py always has a loader"
    assert spec.loader is not None, "a path that ends in .py always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module  # dataclasses look their module up while it is executed
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[unique]
        raise
    return module


def _from_module(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there; something it imports is not
        raise ConfigError(
            "no such module",
            where=where,
            got=name,
            do="Install it, or name its file: path/to/file.py:function.",
        ) from error

"""Every error fedmerge raises for its callers.

    FedmergeError
    ├── FileError                 a file cannot be used at all
    │   ├── UnsafeFile            pickle, zip, or a header that lies about its bytes
    │   └── UnsupportedAdapter    an adapter whose weights are not a plain low-rank product
    ├── MismatchError             two things that must agree do not
    │   ├── MissingLayer          wanted by the base, absent here
    │   ├── UnknownLayer          present here, unknown to the base
    │   ├── ShapeMismatch
    │   ├── DtypeMismatch
    │   ├── BaseMismatch          made from another base
    │   └── VersionMismatch       origin version or software version
    ├── ValueRefused              the numbers themselves cannot be merged
    │   ├── NonFinite
    │   └── BadWeight             a self-reported example count outside its range
    ├── ConfigError               an unknown key, rule, or a value out of range
    └── EngineError               the engine could not finish; nothing was changed

A message says what, where, got, wanted, and what to do. It never contains tensor values.
"""

from __future__ import annotations


class FedmergeError(Exception):
    """Base of all errors meant for callers.

    ``where`` is a file, a site or an update; ``layer`` a parameter's name; ``got`` and ``wanted`` the
    two sides; ``do`` the way out. Each is optional and becomes part of the message.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        layer: str | None = None,
        got: object = None,
        wanted: object = None,
        do: str | None = None,
    ) -> None:
        self.what, self.where, self.layer = what, where, layer
        self.got, self.wanted, self.do = got, wanted, do
        super().__init__(self._message())

    def __reduce__(self) -> tuple[object, ...]:
        fields = {k: getattr(self, k) for k in ("where", "layer", "got", "wanted", "do")}
        fields["where"] = None if self.where is None else str(self.where)
        return _rebuild, (type(self), self.what, fields)

    def _message(self) -> str:
        place = [str(self.where)] if self.where is not None else []
        place += [f"layer {self.layer!r}"] if self.layer is not None else []
        head = f"{', '.join(place)}: {self.what}" if place else self.what
        sides = [f"got {self.got}"] if self.got is not None else []
        sides += [f"wanted {self.wanted}"] if self.wanted is not None else []
        text = f"{head}: {', '.join(sides)}" if sides else head
        return f"{text}. {self.do}" if self.do else text


def _rebuild(kind: type[FedmergeError], what: str, fields: dict[str, str | None]) -> FedmergeError:
    return kind(what, **fields)


class FileError(FedmergeError):
    """A file or a byte string cannot be used."""


class UnsafeFile(FileError):
    """Bytes that are not a well-formed safetensors file: pickle, zip, or a header that lies."""


class UnsupportedAdapter(FileError):
    """An adapter whose weights are not a plain low-rank product."""


class MismatchError(FedmergeError):
    """Two things that must agree do not."""


class MissingLayer(MismatchError):
    """The base has a layer that this does not bring."""


class UnknownLayer(MismatchError):
    """This brings a layer that the base does not have."""


class ShapeMismatch(MismatchError):
    """A layer's shape differs from the base's."""


class DtypeMismatch(MismatchError):
    """A layer's dtype is not one that can be merged."""


class BaseMismatch(MismatchError):
    """Made from a base with another fingerprint."""


class VersionMismatch(MismatchError):
    """An origin version or a software version that does not fit."""


class ValueRefused(FedmergeError):
    """The numbers themselves cannot be merged."""


class NonFinite(ValueRefused):
    """NaN, an infinity, or a finite value that overflows float32."""


class BadWeight(ValueRefused):
    """A self-reported example count outside its range."""


class ConfigError(FedmergeError):
    """An unknown key, an unknown name, or a value out of range."""


class EngineError(FedmergeError):
    """The engine could not finish; the model is as it was before."""

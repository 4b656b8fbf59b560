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
    │   ├── StatisticsMissing     the merge rule asks for what this does not bring
    │   └── VersionMismatch       origin version or software version
    ├── ValueRefused              the numbers themselves cannot be merged
    │   ├── NonFinite
    │   ├── NormExceeded          larger than the configured ratio of the base
    │   ├── BadWeight             a self-reported example count outside its range
    │   └── BadStatistic          negative where squares are meant, or too large
    ├── LimitError                a bound on bytes, requests or space is reached
    │   ├── TooLarge              never fits; sending it again does not help
    │   ├── QuotaExceeded         this site has used its share for now
    │   ├── TooSlow               the other side takes longer over its bytes than it may
    │   └── Busy                  the queue is full for now
    ├── StateError                not possible in the state the server is in
    │   ├── NotFound              no such version, update or task
    │   ├── NotKept               it was there, but retention has dropped it
    │   └── Duplicate             an exact copy of an update that is already there
    ├── StoreError                the state folder cannot be used
    │   ├── StoreLocked           another server uses it
    │   ├── StoreDamaged          bytes on disk are not what was written
    │   └── StoreFull             a write failed; nothing was acknowledged
    ├── AccessError               who asks may not do this
    │   ├── Unauthenticated       it is not known who asks
    │   └── Forbidden             it is known, and not allowed
    ├── Unreachable               the other side does not answer
    ├── ConfigError               an unknown key, rule, or a value out of range
    └── EngineError               the engine could not finish; nothing was changed
        └── FactorisationFailed   and never will, with these numbers

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


class StatisticsMissing(MismatchError):
    """The merge rule asks for a statistic that this does not bring."""


class VersionMismatch(MismatchError):
    """An origin version or a software version that does not fit."""


class ValueRefused(FedmergeError):
    """The numbers themselves cannot be merged."""


class NonFinite(ValueRefused):
    """NaN, an infinity, or a finite value that overflows float32."""


class NormExceeded(ValueRefused):
    """A layer, or the whole update, is larger than the configured ratio of the base."""


class BadWeight(ValueRefused):
    """A self-reported example count outside its range."""


class BadStatistic(ValueRefused):
    """A statistic that no data can give: negative where squares are meant, or too large to be summed."""


class LimitError(FedmergeError):
    """A bound on bytes, requests or space is reached.

    Attributes:
        retry_after: seconds after which trying again may succeed; None if it never will.
    """

    retry_after: float | None = None


class TooLarge(LimitError):
    """It never fits: sending the same again does not help."""


class QuotaExceeded(LimitError):
    """This site has used its share of updates or bytes for now."""

    retry_after = 3600.0


class TooSlow(LimitError):
    """The other side takes longer over its bytes than it may."""


class Busy(LimitError):
    """The queue is full for now."""

    retry_after = 2.0


class StateError(FedmergeError):
    """Not possible in the state the server is in."""


class NotFound(StateError):
    """No such version, update or task."""


class NotKept(StateError):
    """It was there once, but the retention settings have dropped it."""


class Duplicate(StateError):
    """An exact copy of an update that is already there."""


class StoreError(FedmergeError):
    """The state folder cannot be used."""


class StoreLocked(StoreError):
    """Another server uses the state folder."""


class StoreDamaged(StoreError):
    """Bytes on disk are not what was written."""


class StoreFull(StoreError):
    """A write failed, for lack of space or by the disk's fault; nothing was acknowledged."""


class AccessError(FedmergeError):
    """Who asks may not do this."""


class Unauthenticated(AccessError):
    """It is not known who asks."""


class Forbidden(AccessError):
    """It is known who asks, and that is not allowed."""


class Unreachable(FedmergeError):
    """The other side does not answer."""


class ConfigError(FedmergeError):
    """An unknown key, an unknown name, or a value out of range."""


class EngineError(FedmergeError):
    """The engine could not finish; the model is as it was before."""


class FactorisationFailed(EngineError):
    """Linear algebra gave up on these numbers; trying again does not help."""

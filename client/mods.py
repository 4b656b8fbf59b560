"""Flower mods for ClientApps that are not ours, and a guard against those that are wrong here.

Flower's mods for differential privacy take a reply for the whole model: they clip and blur ``reply - model``.
A reply that is a task vector is the difference already, so they would clip the model's own weights.
"""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Context, Message
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable, Mod

from fedmerge.client.privacy import privatise
from fedmerge.common import wire
from fedmerge.common.errors import ConfigError, MismatchError
from fedmerge.common.privacy import Privacy
from fedmerge.common.vectorfile import to_bytes


def private_updates(privacy: Privacy) -> Mod:
    """A mod that privatises the task vector of every reply, see :func:`fedmerge.client.privacy.privatise`.

    It sends the vector in float32. Every reply is a release of its own: a ClientApp that answers a request
    again should keep its first answer, as ours does. Our own ClientApp needs no mod.

    The mod raises MismatchError for a reply with arrays other than one task vector, which it cannot
    privatise, and what ``privatise`` raises; then nothing is sent.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        reply = call_next(message, context)
        if reply.has_content() and reply.content.array_records:
            _check(sorted(reply.content.array_records))
            vector = wire.unpack_vector(reply.content, wire.VECTOR, where="reply")
            reply.content[wire.VECTOR] = wire.pack_vector(to_bytes(privatise(vector, privacy)))
        return reply

    return mod


def refuse_flower_dp(mods: Iterable[Mod]) -> None:
    """Refuses Flower's mods for differential privacy.

    Raises:
        ConfigError: naming the mod.
    """
    for mod in mods:
        if isinstance(mod, LocalDpMod) or mod in (fixedclipping_mod, adaptiveclipping_mod):
            raise ConfigError(
                "Flower's mods for differential privacy clip the reply's difference to the model, "
                "which is wrong where the reply is a task vector",
                got=getattr(mod, "__name__", type(mod).__name__),
                wanted="fedmerge.client.mods.private_updates",
            )


def _check(names: list[str]) -> None:
    if names != [wire.VECTOR]:
        raise MismatchError(
            "a reply with arrays that cannot be privatised", got=", ".join(names), wanted=wire.VECTOR
        )

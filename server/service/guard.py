"""What every call passes: who calls, whether it is allowed, and what is said if it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from inspect import isasyncgenfunction
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from fedmerge.common.errors import ConfigError, FedmergeError, FileError
from fedmerge.common.frames import from_wire, to_wire
from fedmerge.protos.fedmerge.v1 import aggregator_pb2 as pb
from fedmerge.server.service.access import Access, Caller, Context, Role, require
from fedmerge.server.service.limits import Pace, Slots
from fedmerge.server.service.settings import ServiceSettings
from fedmerge.server.service.status import abort, abort_unexpected

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Behaviour = Callable[[Any, Context], Any]

READERS = {"Submit": from_wire(pb.SubmitRequest)}
WRITERS = {"Pull": to_wire}
"""Of the methods that carry chunks."""

CALLER: ContextVar[Caller] = ContextVar("caller")
"""Who made the call that is being answered."""


class Guard(grpc.aio.ServerInterceptor):
    """Lets a caller through to a service's method if one of its roles is in the method's row.

    A method without a row is refused. Other services of the same server, health and reflection, are for
    whoever has a role.

    All methods are served as streams both ways, which is the same on the wire: a caller is known, and has
    its place among the calls of its site, before it has sent anything.

    Args:
        access: the listener's policy. ``service``: full name of the guarded service.
        roles: who may call what, by the method's name.
    """

    def __init__(
        self, access: Access, service: str, roles: Mapping[str, Collection[Role]], settings: ServiceSettings
    ) -> None:
        self._access, self._service, self._roles, self._settings = access, service, roles, settings
        self._calls_of = Slots("calls of one site", settings.calls_per_site)
        self._answering: set[asyncio.Task[Any]] = set()

    async def ended(self) -> None:
        """Waits for answers under way, also for cancelled ones: they have things to put away."""
        if self._answering:
            await asyncio.wait(self._answering)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        service, _, method = handler_call_details.method.removeprefix("/").rpartition("/")
        if handler is None:
            return None
        roles = self._roles.get(method, ()) if service == self._service else tuple(Role)
        return grpc.stream_stream_rpc_method_handler(
            self._guarded(handler, method, roles),
            READERS.get(method, handler.request_deserializer),
            WRITERS.get(method, handler.response_serializer),
        )

    def _guarded(self, handler: Handler, method: str, roles: Collection[Role]) -> Behaviour:
        async def answer(requests: object, context: Context) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
            try:
                caller = self._access.caller(context)
                require(caller, *roles)
                CALLER.set(caller)
                with self._place(caller):
                    await self._answer(handler, requests, context)
            except grpc.aio.AbortError:
                raise
            except FedmergeError as error:
                await abort(context, error)
            except DecodeError:
                await abort(context, FileError("not a message of this call", where=method))
            except Exception:  # the rim: whatever it is, the client learns no details
                await abort_unexpected(context, method)

        return answer

    def _place(self, caller: Caller) -> AbstractContextManager[None]:
        """One of a site's calls at a time; admins and gateways are not counted. Raises Busy."""
        return self._calls_of.taken(caller.name) if caller.roles == {Role.SITE} else nullcontext()

    async def _answer(self, handler: Handler, requests: object, context: Context) -> None:
        behaviour, pace = _behaviour(handler), Pace(CALLER.get().name, self._settings)
        given = requests if handler.request_streaming else await _request(context, pace)
        if isasyncgenfunction(behaviour):
            async for reply in behaviour(given, context):
                await context.write(reply)
            return
        reply = await behaviour(given, context)
        if not handler.response_streaming:
            async with pace.waiting():
                await context.write(reply)


async def _request(context: Context, pace: Pace) -> object:
    async with pace.waiting():
        request: Any = await context.read()
    if request is grpc.aio.EOF:
        raise ConfigError("a call without a request")
    return request


def _behaviour(handler: Handler) -> Behaviour:
    kinds = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    found: Any = next(behaviour for behaviour in kinds if behaviour is not None)
    return found  # type: ignore[no-any-return]

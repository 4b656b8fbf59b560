"""What every call passes: who calls, whether it is allowed, and what is said if it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextvars import ContextVar
from typing import Any, TypeAlias

import grpc

from fedmerge.common.errors import FedmergeError
from fedmerge.common.frames import from_wire, to_wire
from fedmerge.protos.fedmerge.v1 import aggregator_pb2 as pb
from fedmerge.server.service.access import Access, Caller, Context, Role, require
from fedmerge.server.service.status import abort, abort_unexpected

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Behaviour = Callable[[Any, Context], Awaitable[Any]]

READERS = {"Submit": from_wire(pb.SubmitRequest)}
WRITERS = {"Pull": to_wire}
"""Of the methods that carry chunks."""

CALLER: ContextVar[Caller] = ContextVar("caller")
"""Who made the call that is being answered."""


class Guard(grpc.aio.ServerInterceptor):
    """Lets a caller through to a service's method if one of its roles is in the method's row.

    A method without a row is refused. Other services of the same server, health and reflection, tell
    nothing that needs guarding and pass.

    Args:
        access: the listener's policy. ``service``: full name of the guarded service.
        roles: who may call what, by the method's name.
    """

    def __init__(self, access: Access, service: str, roles: Mapping[str, Collection[Role]]) -> None:
        self._access, self._service, self._roles = access, service, roles
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
        if handler is None or service != self._service:
            return handler
        return _with_behaviour(handler, self._guarded(_behaviour(handler), method), method)

    def _guarded(self, behaviour: Behaviour, method: str) -> Behaviour:
        async def answer(request: Any, context: Context) -> Any:
            task = asyncio.current_task()
            assert task is not None
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
            try:
                caller = self._access.caller(context)
                require(caller, *self._roles.get(method, ()))
                CALLER.set(caller)
                return await behaviour(request, context)
            except FedmergeError as error:
                await abort(context, error)
            except Exception:  # the rim: whatever it is, the client learns no details
                await abort_unexpected(context, method)

        return answer


def _behaviour(handler: Handler) -> Behaviour:
    found: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary
    assert found is not None, "the service has no method with streams both ways"
    return found  # type: ignore[no-any-return]


def _with_behaviour(handler: Handler, behaviour: Behaviour, method: str) -> Handler:
    """The handler with another behaviour; chunks keep out of protobuf messages."""
    make: Callable[..., Handler] = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    reading = READERS.get(method, handler.request_deserializer)
    return make(behaviour, reading, WRITERS.get(method, handler.response_serializer))

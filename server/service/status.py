"""How errors leave the service: a gRPC status code for each class, the error itself in trailing metadata."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NoReturn
from uuid import uuid4

from grpc import StatusCode

from fedmerge.common import errors
from fedmerge.common.errors import FedmergeError
from fedmerge.common.messages import pack_error
from fedmerge.server.service.access import Context

logger = logging.getLogger(__name__)

STATUS: Mapping[type[FedmergeError], StatusCode] = {
    FedmergeError: StatusCode.INTERNAL,
    errors.FileError: StatusCode.INVALID_ARGUMENT,
    errors.UnsafeFile: StatusCode.INVALID_ARGUMENT,
    errors.UnsupportedAdapter: StatusCode.INVALID_ARGUMENT,
    errors.MismatchError: StatusCode.INVALID_ARGUMENT,
    errors.MissingLayer: StatusCode.INVALID_ARGUMENT,
    errors.UnknownLayer: StatusCode.INVALID_ARGUMENT,
    errors.ShapeMismatch: StatusCode.INVALID_ARGUMENT,
    errors.DtypeMismatch: StatusCode.INVALID_ARGUMENT,
    errors.BaseMismatch: StatusCode.INVALID_ARGUMENT,
    errors.StatisticsMissing: StatusCode.INVALID_ARGUMENT,
    errors.VersionMismatch: StatusCode.FAILED_PRECONDITION,
    errors.ValueRefused: StatusCode.INVALID_ARGUMENT,
    errors.NonFinite: StatusCode.INVALID_ARGUMENT,
    errors.NormExceeded: StatusCode.INVALID_ARGUMENT,
    errors.BadWeight: StatusCode.INVALID_ARGUMENT,
    errors.BadStatistic: StatusCode.INVALID_ARGUMENT,
    errors.LimitError: StatusCode.RESOURCE_EXHAUSTED,
    errors.TooLarge: StatusCode.OUT_OF_RANGE,
    errors.QuotaExceeded: StatusCode.RESOURCE_EXHAUSTED,
    errors.Busy: StatusCode.RESOURCE_EXHAUSTED,
    errors.TooSlow: StatusCode.DEADLINE_EXCEEDED,
    errors.StateError: StatusCode.FAILED_PRECONDITION,
    errors.NotFound: StatusCode.NOT_FOUND,
    errors.NotKept: StatusCode.FAILED_PRECONDITION,
    errors.Duplicate: StatusCode.ALREADY_EXISTS,
    errors.StoreError: StatusCode.UNAVAILABLE,
    errors.StoreLocked: StatusCode.UNAVAILABLE,
    errors.StoreDamaged: StatusCode.DATA_LOSS,
    errors.StoreFull: StatusCode.UNAVAILABLE,
    errors.AccessError: StatusCode.PERMISSION_DENIED,
    errors.Unauthenticated: StatusCode.UNAUTHENTICATED,
    errors.Forbidden: StatusCode.PERMISSION_DENIED,
    errors.Unreachable: StatusCode.UNAVAILABLE,
    errors.ConfigError: StatusCode.INVALID_ARGUMENT,
    errors.EngineError: StatusCode.INTERNAL,
    errors.FactorisationFailed: StatusCode.INTERNAL,
}

LONGEST_DETAIL = 200


async def abort(context: Context, error: FedmergeError) -> NoReturn:
    """Ends a call with an error's status; the client raises the same error again. Our own are logged."""
    if isinstance(error, errors.StoreError | errors.EngineError):
        logger.error("%s", error)
    details = f"{type(error).__name__}: {error.what}"[:LONGEST_DETAIL]
    await context.abort(STATUS[type(error)], details, tuple(pack_error(error)))


async def abort_unexpected(context: Context, method: str) -> NoReturn:
    """Ends a call that met an error of ours, which is logged under the reference that the client gets."""
    reference = uuid4().hex[:12]
    logger.exception("%s failed, reference %s", method, reference)
    await context.abort(StatusCode.INTERNAL, f"the server failed, reference {reference} in its log")

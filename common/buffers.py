"""Memory for bytes on their way."""

from __future__ import annotations

import ctypes
from functools import cache

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
TRIM_BYTES, PAD_BYTES, MMAP_BYTES = 32 << 20, 32 << 20, 2 << 20

GRPC_WINDOW = (
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 2 << 20),
)
"""What gRPC takes in of one stream before it is asked for. Left alone it grows to many megabytes while a disk
is slower than the network; 2 MiB still carry 20 MB/s over a round trip of 100 ms."""


@cache
def recycle_buffers() -> None:
    """Has glibc use freed chunks again instead of returning them; elsewhere nothing happens.

    Returned and taken anew, every chunk costs page faults: half of the system time of a transfer. Tensors
    of two mebibytes and more are still returned when they are freed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)
    mallopt(M_TOP_PAD, PAD_BYTES)
    mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)

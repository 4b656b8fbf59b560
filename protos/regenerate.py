"""Writes the Python modules of the contract anew: ``python -m fedmerge.protos.regenerate``.

Needs grpcio-tools, in the version that the extra ``dev`` names.
"""

from __future__ import annotations

from pathlib import Path

PROTOS = Path(__file__).parent
CONTRACT = "fedmerge/v1/aggregator.proto"
GENERATED = tuple(CONTRACT.replace(".proto", end) for end in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"))
IMPORTED_AS = "from fedmerge.v1 import"
"""What protoc writes: it knows the package of the contract, not that of the code around it."""


def regenerate(into: Path) -> None:
    """Writes the generated modules below ``into``, an existing folder.

    Raises:
        RuntimeError: the contract does not compile; the compiler has said why on standard error.
    """
    from grpc_tools import protoc

    outputs = [f"--{kind}_out={into}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{PROTOS}", *outputs, CONTRACT]):
        raise RuntimeError(f"{CONTRACT} does not compile")
    stubs = into / GENERATED[-1]
    stubs.write_text(stubs.read_text().replace(IMPORTED_AS, f"from {__package__}.fedmerge.v1 import"))


if __name__ == "__main__":
    regenerate(PROTOS)

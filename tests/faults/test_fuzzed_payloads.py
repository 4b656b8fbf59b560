"""Do 10,000 spoiled update files each end as a lawful update or as a typed error?

Valid files are spoiled by a seeded generator and put through the checks that a server runs. What is let in
is read again by other means and must be lawful. ``FEDMERGE_FUZZ_SEED`` sets another seed.
"""

import json
import os
import random
import re
import resource
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fedmerge.common import header, scan, sources, statisticparts, vectorfile
from fedmerge.common.base import Base
from fedmerge.common.errors import FedmergeError
from fedmerge.common.statistics import MOST, Statistics
from fedmerge.common.taskvector import LowRank, Manifest, TaskVector
from fedmerge.common.vectorfile import to_bytes
from fedmerge.server import admission
from fedmerge.server.admission import BaseNorms, Limits, admit_update

KNOWN_SEED = 20260123
SEED = int(os.environ.get("FEDMERGE_FUZZ_SEED", KNOWN_SEED))
PAYLOADS = 10_000
VERSION = 3


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


BASE = Base.from_checkpoint(
    {"w": drawn(5, 4), "conv": drawn(3, 2, 2, 2), "b": drawn(5), "e": drawn(6), "q": drawn(2, 4)}
)
NORMS = BaseNorms.of(BASE)
LIMITS = Limits(max_staleness=1)


def valid() -> list[bytes]:
    """One file of every kind: dense, low-rank, bfloat16, float64, with layers unchanged, with statistics."""
    says = Manifest(BASE.fingerprint, 2, "triage", "ward 7", 64, ("gram",))
    dense = {name: 0.5 * BASE.read(name) for name in BASE.merged_layers}
    factors = {
        "w": LowRank(0.5 * drawn(5, 2), 0.5 * drawn(2, 4), (5, 4)),
        "conv": LowRank(0.5 * drawn(3, 1), drawn(1, 8), (3, 2, 2, 2)),
        "b": dense["b"],
        "q": dense["q"],
    }
    measured = replace(says, statistics=("input_gram", "fisher", "second_moment"))
    told_more = [
        replace(TaskVector.of(dense, (), measured), statistics=statistics()),
        replace(TaskVector.of(factors, ["e"], measured), statistics=statistics()),
    ]
    written = to_bytes(TaskVector.of(dense, (), says))
    told = parsed(written)[0]["__metadata__"]
    return [
        written,
        to_bytes(TaskVector.of(dense, (), says), torch.bfloat16),
        to_bytes(TaskVector.of(factors, ["e"], says)),
        safetensors.torch.save({name: t.double() for name, t in dense.items()}, told),
        to_bytes(told_more[0]),
        to_bytes(told_more[1], torch.bfloat16),
    ]


def statistics() -> Statistics:
    """All there are; ``w`` and ``q`` share a Gram."""
    held = {
        name: {"fisher": BASE.read(name).square(), "second_moment": 1e-6 * BASE.read(name).square()}
        for name in ("w", "conv", "b", "q")
    }
    held["w"]["input_gram"] = held["q"]["input_gram"] = drawn(2, 4)
    held["conv"]["input_gram"] = drawn(3, 8)
    held["b"]["input_gram"] = drawn(5).square()
    return Statistics.of(held)


def parsed(data: bytes) -> tuple[dict, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def packed(text: bytes, payload: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + payload


# --- ways to spoil a file ---

JSON = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, float("nan"), "", "w", "w#left", "w#fisher", "../w",
    "\0", "x" * 999, "F32", "BF16", "I8", "F31", [], [0], [0, 8], [5, 4], [2**62, 2**62], [-1, 4], {},
    {"w": [5, 4]},
]  # fmt: skip
TEXTS = [
    "", "0", "-1", "1e18", "9" * 19, "9" * 20, "[]", '["e"]', '["w"]', '["e","e"]', "{}", '{"w":[5,4]}',
    '{"b":[5,1]}', '["fisher"]', '{"conv":"w"}', '{"e":"w"}', "[" * 2000,
    "nonsense", "\0", "\ud800", "0" * 64, "fedmerge.task_vector/2",
]  # fmt: skip
NAMES = ["w", "w#left", "w#fisher", "q#input_gram", "e#fisher", "extra", "../w"]
NUMBERS = [float("nan"), float("inf"), -float("inf"), 3e38, 1e30, -1e10, 100.0, 1e-45, -0.0]
DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.float8_e4m3fn]


def flip_bits(rng: random.Random, data: bytes, begin: int, end: int) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8, 64))):
        changed[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def in_header(rng: random.Random, data: bytes) -> bytes:
    return flip_bits(rng, data, 0, data.rindex(b"}", 0, data.index(b"}}") + 2))


def in_payload(rng: random.Random, data: bytes) -> bytes:
    return flip_bits(rng, data, len(data) - len(parsed(data)[1]), len(data))


def numbers(rng: random.Random, data: bytes) -> bytes:
    """Values that are large, or no numbers, on float32 boundaries of the payload."""
    found, payload = parsed(data)
    changed = bytearray(payload)
    for _ in range(rng.choice((1, 1, 4))):
        struct.pack_into("<f", changed, 4 * rng.randrange(len(changed) // 4), rng.choice(NUMBERS))
    return packed(json.dumps(found).encode(), bytes(changed))


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def splice(rng: random.Random, data: bytes) -> bytes:
    """The beginning of one file and the end of another, or of the same."""
    other = rng.choice(FILES)
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def other_payload(rng: random.Random, data: bytes) -> bytes:
    """One file's header over another's payload."""
    return packed(json.dumps(parsed(data)[0]).encode(), parsed(rng.choice(FILES))[1])


def length(rng: random.Random, data: bytes) -> bytes:
    told = int.from_bytes(data[:8], "little")
    wrong = rng.choice(
        (0, told - 1, told + 1, told + 8, len(data), 2**31, 2**63, 2**64 - 1, rng.getrandbits(64))
    )
    return wrong.to_bytes(8, "little") + data[8:]


def places(value: object) -> list[tuple[dict | list, str | int]]:
    """Every place in a JSON value where something stands."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = [(value, key) for key in keys]
    return found + [place for key in keys for place in places(value[key])]


def json_value(rng: random.Random, data: bytes) -> bytes:
    """Values of the header replaced, taken out, or put under another key."""
    found, payload = parsed(data)
    for _ in range(rng.choice((1, 1, 2))):
        holder, key = rng.choice(places(found))
        match rng.randrange(3):
            case 0:
                holder[key] = rng.choice(JSON)
            case 1:
                del holder[key]
            case 2 if isinstance(holder, dict):
                holder[rng.choice([*holder, *NAMES])] = holder.pop(key)
    return packed(json.dumps(found).encode(), payload)


def metadata(rng: random.Random, data: bytes) -> bytes:
    found, payload = parsed(data)
    told = found["__metadata__"]
    told[rng.choice(list(told))] = rng.choice([*TEXTS, *told.values()])
    return packed(json.dumps(found).encode(), payload)


def layers(rng: random.Random, data: bytes) -> bytes:
    """A well-formed file of a layer too few, too many, or another one than it should be."""
    tensors = safetensors.torch.load(data)
    name = rng.choice(list(tensors))
    tensor = tensors.pop(name)
    match rng.randrange(6):
        case 0:
            tensors["extra"] = tensor
        case 1:
            tensors[name] = tensor.to(rng.choice(DTYPES))
        case 2:
            tensors[name] = tensor.T.contiguous() if tensor.dim() == 2 else tensor[:1].clone()
        case 3:
            tensors[name] = tensor * rng.choice(NUMBERS)
        case 4:
            tensors[name] = tensor.flatten()
    return safetensors.torch.save(tensors, parsed(data)[0]["__metadata__"])


def doubled_key(rng: random.Random, data: bytes) -> bytes:
    found, payload = parsed(data)
    name = rng.choice(list(found))
    text = json.dumps(found)[:-1] + f", {json.dumps(name)}: {json.dumps(found[name])}}}"
    return packed(text.encode(), payload)


def noise(rng: random.Random, data: bytes) -> bytes:
    made = rng.randbytes(rng.randrange(200))
    return packed(made, b"") if rng.random() < 0.5 else made


SPOILERS = (
    in_header, in_payload, numbers, cut, splice, other_payload,
    length, json_value, metadata, layers, layers, doubled_key, noise,
)  # fmt: skip
FILES = valid()


def spoiled(seed: int, number: int) -> bytes:
    """The so-manieth payload of a seed; now and then spoiled twice."""
    rng = random.Random(f"{seed} {number}")
    data = rng.choice(SPOILERS)(rng, rng.choice(FILES))
    if rng.random() < 0.1:
        data = rng.choice((cut, splice, noise))(rng, data or b"\0")
    return data


# --- the claim ---


def fuzz(path: Path, payloads: int, seed: int) -> Counter[str]:
    """How often each outcome came; fails at the first payload that ends otherwise."""
    outcomes: Counter[str] = Counter()
    for number in range(payloads):
        data = spoiled(seed, number)
        path.write_bytes(data)
        try:
            admitted = admit_update(path, BASE, NORMS, LIMITS, current_version=VERSION, site="ward-7")
            assert is_lawful(data, admitted)
            outcomes["admitted"] += 1
        except FedmergeError as error:
            outcomes[type(error).__name__] += 1
        except Exception as error:
            raise AssertionError(f"FEDMERGE_FUZZ_SEED={seed}, payload {number}: {error!r}") from error
    return outcomes


def is_lawful(data: bytes, admitted: admission.Admitted) -> bool:
    """Whether the bytes, read by safetensors alone, are an update that may be merged."""
    told = parsed(data)[0].get("__metadata__", {})
    tensors = safetensors.torch.load(data)
    layers = {name: layer_in(tensors, name, json.loads(told["low_rank"])) for name in BASE.merged_layers}
    missing = {name for name, layer in layers.items() if layer is None}
    brought = {name: layer for name, layer in layers.items() if layer is not None}
    norms = {name: float(layer.norm()) for name, layer in brought.items()}
    norm = sum(n**2 for n in norms.values()) ** 0.5
    return (
        {part.partition("#")[0] for part in tensors} | missing == set(BASE.merged_layers)
        and missing == set(json.loads(told["unchanged"]))
        and all(layer.shape == BASE.layers[name].shape for name, layer in brought.items())
        and all(norms[name] <= LIMITS.layer_ratio * NORMS.layers[name] * (1 + 1e-6) for name in brought)
        and norm <= LIMITS.total_ratio * NORMS.total * (1 + 1e-6)
        and admitted.norm == pytest.approx(norm, rel=1e-5, abs=1e-12)
        and told["base"] == BASE.fingerprint
        and int(told["origin_version"]) in (0, 2, 3)
        and 1 <= admitted.examples <= LIMITS.max_examples
        and 1 <= len(told["task"]) <= 200
        and are_lawful_statistics(tensors, told)
    )


def are_lawful_statistics(tensors: dict[str, torch.Tensor], told: dict[str, str]) -> bool:
    """Whether every part that is no layer's is a statistic that is listed, fits its layer and can be."""
    shared = json.loads(told.get("shared_input", "{}"))
    parts = {part: tensor.float() for part, tensor in tensors.items() if part.partition("#")[2] in STATISTICS}
    parts |= {f"{name}#input_gram": parts[f"{holder}#input_gram"] for name, holder in shared.items()}
    return all(is_lawful_statistic(part, parts[part], told) for part in parts) and not any(
        f"{name}#input_gram" in tensors for name in shared
    )


STATISTICS = ("input_gram", "fisher", "second_moment")
COLUMNS = {"w": 4, "conv": 8, "q": 4}


def is_lawful_statistic(part: str, values: torch.Tensor, told: dict[str, str]) -> bool:
    name, _, statistic = part.partition("#")
    is_factor = statistic == "input_gram" and name in COLUMNS
    fits = (
        values.dim() == 2 and 1 <= len(values) <= values.shape[1] == COLUMNS[name]
        if is_factor
        else values.shape == BASE.layers[name].shape
    )
    total = values.double().square().sum() if is_factor else values.double().sum()
    return (
        fits
        and statistic in json.loads(told["statistics"])
        and name not in json.loads(told["unchanged"])
        and bool(torch.isfinite(values).all())
        and (is_factor or bool((values >= 0).all()))
        and float(total) <= MOST
    )


def layer_in(tensors: dict[str, torch.Tensor], name: str, low_rank: dict) -> torch.Tensor | None:
    if name in low_rank:
        product = tensors[f"{name}#left"].double() @ tensors[f"{name}#right"].double()
        return product.reshape(low_rank[name])
    return tensors[name].double() if name in tensors else None


def peak_kib() -> int:
    """The most memory this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_ten_thousand_spoiled_files_are_lawful_or_refused_with_a_typed_error(tmp_path):
    print(f"FEDMERGE_FUZZ_SEED={SEED}")
    peak = peak_kib()
    outcomes = fuzz(tmp_path / "incoming.part", PAYLOADS, SEED)
    print(dict(outcomes))
    assert peak_kib() - peak < 64 * 1024
    assert outcomes.total() == PAYLOADS
    assert PAYLOADS / 20 < outcomes["admitted"] < PAYLOADS / 2
    reached = {"UnsafeFile", "FileError", "MissingLayer", "UnknownLayer", "ShapeMismatch", "DtypeMismatch"}
    reached |= {"BaseMismatch", "VersionMismatch", "BadWeight", "NonFinite", "NormExceeded", "BadStatistic"}
    assert reached <= set(outcomes)


GATES = {
    "metadata are texts": ((header,), "_metadata", lambda found, _: found),
    "pairs of factors": ((vectorfile,), "_check_factors", lambda *_: None),
    "finite values": ((scan,), "isfinite", lambda _: True),
    "layers of the base": ((admission,), "check_vector", lambda *_: None),
    "base and task": ((admission,), "check_manifest", lambda *_: None),
    "origin": ((admission,), "check_origin", lambda *_: None),
    "norms": ((admission,), "_check_norm", lambda *_: None),
    "example count": ((vectorfile,), "WHOLE_NUMBER", re.compile(".*")),
    "statistics that can be": ((scan,), "check_values", lambda *_, **__: None),
    "statistics that fit": ((statisticparts, sources), "check_shape", lambda *_, **__: None),
    "statistics that are listed": ((vectorfile, sources), "check_listed", lambda *_: None),
}


@pytest.mark.parametrize("gate", GATES)
def test_the_same_files_find_out_that_a_gate_was_left_out(tmp_path, monkeypatch, gate):
    modules, name, left_out = GATES[gate]
    for module in modules:
        monkeypatch.setattr(module, name, left_out)
    with pytest.raises(AssertionError, match="FEDMERGE_FUZZ_SEED"):
        fuzz(tmp_path / "incoming.part", PAYLOADS, KNOWN_SEED)

"""Merge rules, by name."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from fedmerge.common.errors import ConfigError
from fedmerge.server.merge.ace import Ace
from fedmerge.server.merge.average import Average
from fedmerge.server.merge.dare import Dare
from fedmerge.server.merge.dop import Dop
from fedmerge.server.merge.fedavg import FedAvg
from fedmerge.server.merge.fisher import Fisher
from fedmerge.server.merge.fot import Fot, FotGram
from fedmerge.server.merge.holistic import Holistic
from fedmerge.server.merge.iso_c import IsoC
from fedmerge.server.merge.least_interference import LeastInterference
from fedmerge.server.merge.lore import Lore
from fedmerge.server.merge.lot import Lot
from fedmerge.server.merge.magmax import MagMax
from fedmerge.server.merge.nufilt import Nufilt
from fedmerge.server.merge.null_space import NullSpace
from fedmerge.server.merge.opcm import Opcm
from fedmerge.server.merge.perturb_and_merge import PerturbAndMerge
from fedmerge.server.merge.regmean import RegMean
from fedmerge.server.merge.rule import Rule
from fedmerge.server.merge.svc import Svc
from fedmerge.server.merge.task_arithmetic import TaskArithmetic
from fedmerge.server.merge.ties import Ties
from fedmerge.server.merge.tsv_m import TsvM
from fedmerge.server.merge.wudi import Wudi

ELEMENTWISE = (Average, TaskArithmetic, Ties, Dare, MagMax, Lore)
SPECTRAL = (LeastInterference, IsoC, TsvM, Svc, Wudi, Ace)
SEQUENTIAL = (Opcm, NullSpace, Nufilt, Dop)
WITH_STATISTICS = (Fisher, RegMean, Lot, PerturbAndMerge, Holistic)
IN_ROUNDS = (FedAvg, Fot, FotGram)

RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (*SEQUENTIAL, *SPECTRAL, *ELEMENTWISE, *WITH_STATISTICS, *IN_ROUNDS)
}

DEFAULT_RULE = LeastInterference.name
"""Best on average over the project's streams: ``docs/default-rule.md``."""


def make_rule(name: str, options: Mapping[str, object] | None = None) -> Rule:
    """A rule by name with validated options.

    Raises:
        ConfigError: an unknown rule or option, or a value out of range, with what would be right.
    """
    if name not in RULES:
        raise ConfigError("no such merge rule", got=repr(name), wanted=" or ".join(sorted(RULES)))
    kind = RULES[name]
    try:
        return kind.model_validate(dict(options or {}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = ".".join(map(str, first["loc"])) or "options"
        what = "no such option" if first["type"] == "extra_forbidden" else first["msg"]
        raise ConfigError(
            f"rule {name!r}, option {option!r}: {what}", got=repr(first.get("input")), do=_known(kind)
        ) from error


def _known(kind: type[Rule]) -> str:
    defaults = ", ".join(f"{name}={field.default!r}" for name, field in kind.model_fields.items())
    return f"Options and defaults: {defaults}." if defaults else "This rule has no options."

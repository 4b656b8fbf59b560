"""Why Flower's processes end: the cause behind an exit code, from the lines a process wrote last.

Flower's own codes are in its output alone (``Exit Code: 305``); to the system every failure is 1. One
code has many causes, and these rules tell them apart. They were written from Flower 1.41's real output.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

CODE = re.compile(r"Exit Code: (\d+)")


@dataclass(frozen=True)
class Cause:
    """One way to fail.

    Attributes:
        code: Flower's exit code; 0 where the process writes none.
        sign: what the output contains then. ``why``, ``do``: in plain words.
    """

    code: int
    sign: re.Pattern[str]
    why: str
    do: str


def _cause(code: int, sign: str, why: str, do: str) -> Cause:
    return Cause(code, re.compile(sign), why, do)


CAUSES = (
    _cause(
        305,
        r"CERTIFICATE_VERIFY_FAILED.*(local issuer|self.signed)",
        "the server's certificate is signed by another authority than [tls] ca",
        "Get the server's current ca.crt.",
    ),
    _cause(
        305,
        r"CERTIFICATE_VERIFY_FAILED.*(mismatch|not valid for)",
        "the server's certificate is for another host than [server] address",
        "Use a name the certificate holds, or make one with: fedmerge certs server --host NAME",
    ),
    _cause(
        305,
        r"CERTIFICATE_VERIFY_FAILED.*(expired|not yet valid)",
        "the server's certificate is outside its dates, or this machine's clock is wrong",
        "Compare the clocks; renew it with: fedmerge certs renew server",
    ),
    _cause(
        305,
        r"CERTIFICATE_VERIFY_FAILED",
        "the server's certificate is not trusted",
        "Run: fedmerge doctor client --config client.toml",
    ),
    _cause(
        305,
        r"\[code: 2004\]",
        "the key is not registered at the server, was taken out there, or another process uses it: after a"
        " crash, the server counts the old one as online for about a minute",
        "Give the site's supernode.pub to the server's [flower] sites folder; a key that was taken out"
        " needs a new pair. Stop other SuperNodes with this key.",
    ),
    _cause(
        305,
        r"\[code: 2001\]",
        "the server wants a registered key and this site shows none",
        "Name the site's supernode.key in [tls] key.",
    ),
    _cause(
        305,
        r"40[13] (Forbidden|Unauthorized)",
        "the server turned the request away: the clocks differ by more than minutes, or this is not its"
        " address for SuperNodes",
        "Compare the clocks, and [server] address with the server's [flower] listen.",
    ),
    _cause(
        302,
        r"Unable to parse the private key",
        "the key is not an ECDSA key in OpenSSH format; ed25519 and RSA are not accepted",
        "Make one with: fedmerge certs site NAME, or ssh-keygen -t ecdsa -b 384",
    ),
    _cause(
        303,
        r"Insecure connection is enabled",
        "a key without TLS",
        "Name [tls] ca too: SuperNode keys are only used over TLS.",
    ),
    _cause(
        104,
        r"enable-supernode-auth.*requires",
        "SuperNode authentication without TLS",
        "Give the server ca, cert and key in [tls].",
    ),
    _cause(
        105,
        r"schema",
        "the SuperLink's database is of another Flower version",
        "Move flower/superlink.db out of the state folder; versions and updates are not in it.",
    ),
    _cause(
        607,
        r"No module named",
        "the app cannot be imported here",
        "Install the same fedmerge, and what the site's tasks import, in this environment.",
    ),
    _cause(
        500,
        r"public key",
        "a registered key is not an ECDSA public key in OpenSSH format",
        "Use the supernode.pub that fedmerge certs site wrote.",
    ),
    _cause(
        0,
        r"address already in use",
        "the port is taken by another process",
        "Stop it, or choose another port.",
    ),
    _cause(
        0,
        r"\[code:? 23\]|Public key already in use",
        "the key was registered before, perhaps under another name",
        "Make a new pair for the site.",
    ),
    _cause(
        0,
        r"No space left on device|database or disk is full",
        "the disk is full",
        "Make room; what was acknowledged is safe.",
    ),
    _cause(
        0,
        r"Option `--insecure` was set.*(?s:.*)Connection attempt failed",
        "the server does not answer, or speaks TLS and this site does not",
        "Name ca and key in [tls], and check [server] address.",
    ),
    _cause(
        0,
        r"Connection attempt failed",
        "the server does not answer; the SuperNode keeps trying",
        "Check [server] address, the server, and what is between.",
    ),
)


def cause_of(lines: Iterable[str]) -> Cause | None:
    """The cause that a process's last lines show, or None."""
    text = "\n".join(lines)
    codes = [int(code) for code in CODE.findall(text)]
    wanted = codes[-1] if codes else 0
    return next((cause for cause in CAUSES if cause.code in (wanted, 0) and cause.sign.search(text)), None)


def explain(lines: Iterable[str]) -> str:
    """Cause and remedy in one sentence each; empty if the lines show none."""
    found = cause_of(lines)
    return f"Because {found.why}. {found.do}" if found else ""


def causes_of(code: int) -> list[Cause]:
    """All known causes behind one of Flower's exit codes."""
    return [cause for cause in CAUSES if cause.code == code]

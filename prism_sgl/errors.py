"""Errors that cross rooms. Shortage of memory is not among them: it is a value (``None``)."""

from __future__ import annotations

import signal

# sysexits.h: what a supervisor such as systemd reads (RestartPreventExitStatus=78).
EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 69
EXIT_TEMPFAIL = 75
EXIT_CONFIG = 78


def describe_exit(code: int) -> str:
    """An exit code in words; negative: killed by that signal."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


class PrismError(Exception):
    """Base of every error that prism_sgl raises on purpose."""

    exit_code = EXIT_FAILURE


class ConfigError(PrismError):
    """The user's configuration is wrong: one line with file, key, value and remedy."""

    exit_code = EXIT_CONFIG

    def __init__(self, key: str, problem: str, remedy: str, *, file: str = "models.toml") -> None:
        super().__init__(f"{file}: {key} {problem}; {remedy}")
        self.file = file
        self.key = key
        self.problem = problem
        self.remedy = remedy


class PortInUseError(PrismError):
    """The address that the server should listen on is taken."""

    exit_code = EXIT_UNAVAILABLE


class IllegalMoveError(PrismError):
    """A life cycle was asked to make a move that its table does not have."""


class LedgerError(PrismError):
    """The ledger file is missing, of another version, or full of owners."""


class VmmError(PrismError):
    """A call to the virtual memory backend failed; nothing of the batch stays mapped."""


class SeamError(PrismError):
    """A hook into SGLang did not attach, or SGLang is not the version whose seams we know."""


class UnsupportedModelError(PrismError):
    """This model, or an option of it, cannot run on elastic memory; it is refused by name at start."""

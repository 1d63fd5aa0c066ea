"""The errors a user can meet. Each message is one line: what is wrong, the value, what to do."""

from __future__ import annotations


class LlamaDistError(Exception):
    """Base of every error this package raises on purpose; `exit_code` is what the process leaves with."""

    exit_code = 1


class ConfigError(LlamaDistError, ValueError):
    """A flag, an environment variable or a combination of them that cannot work."""

    exit_code = 2


class CheckpointError(LlamaDistError, ValueError):
    """A checkpoint or tokenizer file that is missing, damaged, hostile or not supported."""

    exit_code = 2


class RequestError(LlamaDistError, ValueError):
    """A prompt or sampling parameter that cannot be served; `field` names it where there is one."""

    exit_code = 2

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class DesyncError(LlamaDistError, RuntimeError):
    """Ranks that must agree do not: differing flags, prompts or sampled tokens."""


class Halted(LlamaDistError):
    """Told to stop before the work began: nothing is lost, run it again."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class PeerLost(LlamaDistError, RuntimeError):
    """Another rank died, stopped answering or failed; the message names it."""

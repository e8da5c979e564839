"""Every exception this package raises on purpose.

A user error names the values, the rule they break and the remedy: :func:`explain` gives all
messages that one form, so that a message with a part missing cannot be written.
"""

from __future__ import annotations


class LightSeqError(Exception):
    """Base of all errors raised by megatron_lightseq."""


class ConfigError(LightSeqError, ValueError):
    """A configuration or an argument breaks a rule."""


class LayoutError(LightSeqError, ValueError):
    """Data and attention disagree on which rank holds which tokens."""


class ScheduleError(LightSeqError, ValueError):
    """A schedule would lose, repeat or misplace work; the message draws it."""


class UnsupportedError(LightSeqError, NotImplementedError):
    """A feature that was asked for does not exist here, and is refused rather than ignored."""


class TransportError(LightSeqError, RuntimeError):
    """A transfer between ranks failed, or the ranks disagree on what to transfer."""


class CheckpointError(LightSeqError, RuntimeError):
    """A checkpoint is missing, damaged, unsafe, or of another model."""


class SpoiledStateError(CheckpointError):
    """What would be saved holds NaN or infinity."""


class DataError(LightSeqError, ValueError):
    """A corpus or one of its indexes is missing, damaged, unsafe, or of another tokenizer."""


class PeerFailureError(LightSeqError, RuntimeError):
    """Another rank failed first; the message names it, its step and its error."""


def explain(*, got: str, rule: str, remedy: str) -> str:
    """One sentence each: the values at hand, the rule they break, and what to do about it."""
    return f"{got}: {rule}. {remedy}."

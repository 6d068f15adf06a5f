"""Faults that a user, a file or a device can cause, as seen by whoever runs Longspan.

Every message is one line: *what, value, limit, remedy*. The leaves keep small trees of their own
(`kv_store.errors`, `collectives.errors`, `sparse_attn.errors`); `cli.py` catches all of them.

    LongspanError                 exit code 1: the work failed
    |- UsageError                 exit code 2: wrong usage, nothing was started
    |- InputError                 the source text cannot be read or ingested
    |- ContextTooLong             more tokens than the model's context
    |- KvOutOfRange               keys that the number format of a document cannot hold
    |- ModelMismatch              a document that another model ingested
    |- NotAdmitted                a document or question that does not fit in memory
    |- TopologyInvalid            a description of a machine that says nothing usable
    |- CalibrationFailed          a machine too busy to be measured
    |- PlanRefused                no way of running it fits; the message says what would
    |- PlanInvalid                a step plan that this version did not write
    |- RankMismatch               ranks that were started differently
    |- RankFailed                 a rank failed while others waited for it
    |- ModelError
       |- ModelNotFound           no such model name or path
       |- ModelUnsupported        rope type, activation or architecture that is not implemented
       |- ModelDamaged            a weight file that is cut or inconsistent
       |- ModelFetchFailed        the download of a known model failed
       |- NotFinite               a forward gave what is no number
    |- ClusterError
       |- PortTaken               the port on which ranks would meet is in use
       |- RayUnavailable          Ray cannot be started or reached, or has no room for the ranks
"""

from __future__ import annotations


class LongspanError(Exception):
    """Base of every fault that is reported to the user as one line."""

    exit_code = 1


class UsageError(LongspanError):
    """The request itself is wrong; nothing was started."""

    exit_code = 2


class InputError(LongspanError):
    """The source text cannot be read or ingested."""


class ContextTooLong(LongspanError):
    """More tokens than the model's context holds."""


class ModelMismatch(LongspanError):
    """A document that another model ingested."""


class KvOutOfRange(LongspanError):
    """Keys or values that the number format of a document cannot hold."""


class ModelError(LongspanError):
    """Base of faults in finding or loading a model."""


class NotFinite(ModelError):
    """A forward gave NaN or infinity where the next token is chosen."""


class ModelNotFound(ModelError):
    """No model of that name or at that path."""


class ModelUnsupported(ModelError):
    """The model needs mathematics that is not implemented, so it is refused by name."""


class ModelDamaged(ModelError):
    """A weight file is cut, missing or inconsistent with its configuration."""


class ModelFetchFailed(ModelError):
    """A known model could not be downloaded or written."""


class ClusterError(LongspanError):
    """Base of faults in bringing ranks into being."""


class PortTaken(ClusterError):
    """The port on which ranks would meet cannot be had."""


class RayUnavailable(ClusterError):
    """Ray cannot be started or reached, or has no room for the ranks."""


class PlanInvalid(LongspanError):
    """A step plan that this version did not write."""


class RankMismatch(LongspanError):
    """Ranks that were started differently, or do not carry out the same steps."""


class RankFailed(LongspanError):
    """A rank failed; what it said is part of the message."""


class NotAdmitted(LongspanError):
    """A document or question that does not fit in memory; the message says what would."""


class TopologyInvalid(LongspanError):
    """A description of a machine that cannot be read, or that says nothing usable."""


class CalibrationFailed(LongspanError):
    """What was measured cannot be true; nothing was written."""


class PlanRefused(LongspanError):
    """No way of running the work on the machine fits; the message says what would."""

"""Faults of the service itself, beside those of the engine: owns their names and HTTP statuses.

Every message is one line: *what, value, limit, remedy*. The server raises them, `faults.py` puts
them on the wire by name, and the client raises the same class again; so this file imports no torch.

    UsageError
    |- KeyRequired             a server beyond loopback without a key; nothing was started
    |- KeyFileInvalid          a key file that cannot be read, is empty, or that everybody can read
    ServiceError
    |- AddressTaken            the address cannot be bound
    |- InvalidRequest          400  a field that is missing, unknown or out of range
    |- InvalidApiKey           401  a missing or wrong key
    |- HostRefused             403  a browser or a name that should not reach a server without a key
    |- RouteNotFound           404  no such path
    |- MethodNotAllowed        405  the path has other methods
    |- IngestBusy              409  the name is being ingested
    |- IngestCancelled         409  the ingest was ended by a DELETE or a shutdown
    |- BodyTooLarge            413  more bytes than the limit
    |- ContentTypeUnsupported  415  neither JSON, text nor a form
    |- TooBusy                 429  as many requests run as may
    |- ServerFault             500  the service failed; the server's log says how
    |- ShuttingDown            503  the server finishes what it has begun, and takes nothing new
    |- ServerUnreachable            client: nothing answers, or it stopped answering
    |- RemoteFault                  client: a fault of the server's store, named by its `code`
"""

from __future__ import annotations

import re

from orchestrator.errors import LongspanError, UsageError


class KeyRequired(UsageError):
    """A server that others can reach must have a key."""


class KeyFileInvalid(UsageError):
    """The key file cannot be read, is empty, or can be read by everybody."""


class ServiceError(LongspanError):
    """Base of the service's faults. status: of the HTTP response; param: the field at fault."""

    status = 500

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class AddressTaken(ServiceError):
    """The address cannot be bound."""


class InvalidRequest(ServiceError):
    """A field is missing, unknown or out of range."""

    status, exit_code = 400, 2


class InvalidApiKey(ServiceError):
    """The key is missing or wrong."""

    status = 401


class HostRefused(ServiceError):
    """A request for another host's name, or from another site's page, to a server without a key."""

    status = 403


class RouteNotFound(ServiceError):
    """No such path."""

    status = 404


class MethodNotAllowed(ServiceError):
    """The path exists, with other methods."""

    status = 405


class IngestBusy(ServiceError):
    """A document of this name is being ingested."""

    status = 409


class IngestCancelled(ServiceError):
    """The ingest was ended; what it has sealed is kept unless the document was deleted."""

    status = 409


class BodyTooLarge(ServiceError):
    """The body has more bytes than its route takes."""

    status = 413


class ContentTypeUnsupported(ServiceError):
    """The body is of a kind that its route does not read."""

    status = 415


class TooBusy(ServiceError):
    """As many requests are running as may run at once."""

    status = 429


class ServerFault(ServiceError):
    """The service failed; details stay in its log."""


class ShuttingDown(ServiceError):
    """The server takes no new work."""

    status = 503


class ServerUnreachable(ServiceError):
    """Nothing answers at the address, or it stopped answering."""


class RemoteFault(ServiceError):
    """A fault of the server's store, with its HTTP status and its name in snake case."""

    def __init__(
        self, message: str, *, status: int, code: str | None, param: str | None = None
    ) -> None:
        super().__init__(message, param=param)
        self.status, self.code = status, code


def error_code(kind: type[BaseException]) -> str:
    """A fault's name on the wire: `document_not_found` for DocumentNotFound."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()

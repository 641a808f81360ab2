"""Errors in the shape that OpenAI's clients read."""

from typing import Any

from quasar_core.errors import UsageError


class ApiError(Exception):
    """A request that is refused: the status, one sentence, and the field that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        field: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.code, self.retry_after = status, message, field, code, retry_after

    def body(self) -> dict[str, Any]:
        """`{"error": {…}}`."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "overloaded_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}


def refused(message: str, field: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be served as it is."""
    return ApiError(400, message, field, code)


def of_usage(error: UsageError) -> ApiError:
    """What the library refuses, without the dashes of the command line."""
    return refused(str(error).replace("--", ""))

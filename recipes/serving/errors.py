"""Errors over HTTP in OpenAI's form, and the door that every request passes: the key and the size of its body."""

import secrets

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = ("/", "/health")  # need no key: the page, which asks for the key itself, and whether the server lives


class APIError(HTTPException):
    """An error that a client is told of.

    Args:
        status: of HTTP.
        message: one sentence: what was found, what was expected.
        code: a word for programs, such as `context_length_exceeded`.
        param: the field at fault.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.code, self.param = code, param


def error_response(
    status: int, message: str, code: str | None = None, param: str | None = None, headers: dict | None = None
) -> JSONResponse:
    kind = "server_error" if status >= 500 else "authentication_error" if status == 401 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers)


def use_error_form(app: FastAPI) -> None:
    """Every error of the application, its own, the framework's and bugs, in OpenAI's form."""

    async def told(request: Request, error: StarletteHTTPException) -> JSONResponse:
        code, param = getattr(error, "code", None), getattr(error, "param", None)
        message = str(error.detail)
        if error.status_code == 404 and code is None:
            message = f"there is no {request.url.path}; see /openapi.json for what there is"
        if error.status_code == 405:
            message = f"{request.method} is not allowed for {request.url.path}"
        return error_response(error.status_code, message, code, param, dict(error.headers or {}))

    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return error_response(422, f"the body is not JSON: {first['ctx']['error']}", "invalid_json")
        place = [str(part) for part in first["loc"] if part != "body"]
        found = first["msg"].removeprefix("Value error, ")
        message = f"{'.'.join(place)}: {found}" if place else found
        return error_response(422, message, "invalid_value", place[0] if place else None)

    async def bug(request: Request, error: Exception) -> JSONResponse:
        return error_response(500, f"the server failed: {type(error).__name__}", "internal_error")

    app.add_exception_handler(StarletteHTTPException, told)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, bug)


class Door:
    """Before the application: refuses requests without the key, and bodies over `max_body_bytes`, unread.

    Args:
        api_key: without one nobody is asked.
        responses: where responses are counted by (path, status).
    """

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int, responses: dict[tuple[str, int], int]):
        self.app, self.api_key, self.max_body_bytes, self.responses = app, api_key, max_body_bytes, responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = self._counted(scope, send)
        headers = dict(scope["headers"])
        if self.api_key and scope["path"] not in OPEN_PATHS and not self._knows(headers.get(b"authorization", b"")):
            refusal = error_response(
                401, "the API key is missing or wrong", "invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )
            await refusal(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.max_body_bytes:
            too_large = self._too_large()
            await error_response(413, too_large.detail, too_large.code)(scope, receive, send)
            return
        await self.app(scope, self._bounded(receive), send)

    def _knows(self, authorization: bytes) -> bool:
        """Compared in a time that tells nothing of how much of a guess is right."""
        kind, _, key = authorization.partition(b" ")
        return secrets.compare_digest(key.strip(), self.api_key.encode()) and kind.lower() == b"bearer"

    def _counted(self, scope: Scope, send: Send) -> Send:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")  # a path that nobody serves is not told apart
                key = (path, message["status"])
                self.responses[key] = self.responses.get(key, 0) + 1
            await send(message)

        return counted

    def _bounded(self, receive: Receive) -> Receive:
        """A body without a declared length is counted as it comes."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> APIError:
        return APIError(413, f"the body is over {self.max_body_bytes} bytes", code="request_too_large")

"""An engine's own OpenAI-compatible application, listening beside the rollout that the engine works for.

Runs on the engine's thread and loop. Requests of people share the engine with the run's; each is given the weights'
epoch as its cache salt, so that no answer is made of keys and values of older weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from shared.engines.base import EngineError

HOST = "127.0.0.1"
SERVED_NAME = "policy"
"""What requests call the model in training."""
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


class Endpoint:
    """Takes a port of loopback at once (EngineError if somebody has it); listens there from `start` to `stop`.

    `epoch` tells the number of the weights.
    """

    def __init__(self, port: int, epoch: Callable[[], int]) -> None:
        self._epoch = epoch
        self._server: Any = None
        self._task: asyncio.Task[None] | None = None
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((HOST, port))
        except OSError as error:
            self._socket.close()
            raise EngineError(f"rollout.serve: cannot listen on {HOST}:{port}: {error}; choose another port") from error

    async def start(self, application: Application) -> None:
        """Serve the application."""
        import uvicorn

        salted = _salted(application, self._epoch)
        self._server = uvicorn.Server(uvicorn.Config(salted, log_level="warning", access_log=False))
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not self._task.done():  # noqa: ASYNC110 (it has a flag, and no event)
            await asyncio.sleep(0.01)
        if self._task.done():
            self._task.result()

    async def stop(self) -> None:
        """Close it; requests that are being answered are cut off."""
        if self._server is not None and self._task is not None:
            self._server.should_exit = self._server.force_exit = True
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await self._task
        self._socket.close()


def _salted(application: Application, epoch: Callable[[], int]) -> Application:
    """The application with a cache salt in the JSON of every request that has none."""

    async def served(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await application(scope, receive, send)
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        with contextlib.suppress(ValueError):
            asked = json.loads(body)
            if isinstance(asked, dict):
                body = json.dumps({"cache_salt": f"{epoch()}", **asked}).encode()
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        sent = False

        async def once() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await application({**scope, "headers": headers}, once, send)

    return served

"""The prefix that a proxy serves the service under. Some take it off a request's path and some leave it there."""

from starlette.types import ASGIApp, Receive, Scope, Send


class Prefix:
    """ASGI middleware, outside of all that looks at paths: behind it they are as if there were no prefix."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self.app = app
        self.prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or passes other scopes through."""
        if scope["type"] == "http" and scope["path"].startswith(f"{self.prefix}/"):
            scope = {**scope, "path": scope["path"].removeprefix(self.prefix)}
        await self.app(scope, receive, send)

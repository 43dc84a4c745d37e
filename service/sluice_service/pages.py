"""Serves the HTTP pages: /metrics for Prometheus, /healthz and /readyz for supervisors.

Importing aiohttp takes longer than loading a small model, so this module is imported
while models load.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import aiohttp
from aiohttp import web

_SCRAPE_SECONDS_MAX = 5.0


class Pages:
    """The pages on one port. Each request makes its page anew."""

    def __init__(
        self,
        expose: Callable[[str], Awaitable[tuple[bytes, str]]],
        is_ready: Callable[[], bool],
        trouble: Callable[[], str],
    ) -> None:
        """`expose` gives (body, content type) for what a scrape accepts.

        `trouble` is what an operator should know of a ready server, or an empty string.
        """
        self._expose = expose
        self._is_ready = is_ready
        self._trouble = trouble
        self.port = 0
        app = web.Application()
        app.router.add_get("/metrics", self._show_metrics)
        app.router.add_get("/healthz", self._show_health)
        app.router.add_get("/readyz", self._show_readiness)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)

    async def start(self, address: str) -> None:
        """Listen on HOST:PORT; `port` is the port then. Raises OSError when it is taken."""
        await self._runner.setup()
        host, _, port = address.rpartition(":")
        await web.TCPSite(self._runner, host.strip("[]"), int(port)).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Close the port."""
        await self._runner.cleanup()

    async def _show_metrics(self, request: web.Request) -> web.Response:
        body, content_type = await self._expose(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _show_health(self, _: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def _show_readiness(self, _: web.Request) -> web.Response:
        if self._is_ready():
            return web.Response(text=f"ready{self._trouble()}\n")
        return web.Response(text="not ready: loading or stopping\n", status=503)


async def scrape(addresses: Sequence[str]) -> list[str]:
    """The metrics page at each HOST:PORT; empty if none answers or the address is empty."""
    timeout = aiohttp.ClientTimeout(total=_SCRAPE_SECONDS_MAX)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def ask(address: str) -> str:
            if not address:
                return ""
            try:
                async with session.get(f"http://{address}/metrics") as response:
                    return await response.text()
            except (aiohttp.ClientError, TimeoutError):
                return ""

        return await asyncio.gather(*map(ask, addresses))

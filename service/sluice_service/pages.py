"""The HTTP side: /metrics for Prometheus, /healthz and /readyz for whoever keeps it running."""

from collections.abc import Awaitable, Callable

from aiohttp import web


def make_app(
    expose: Callable[[str], Awaitable[tuple[bytes, str]]],
    is_ready: Callable[[], bool],
    trouble: Callable[[], str],
) -> web.Application:
    """The pages, read live: `expose` gives (body, content type) for what a scrape accepts."""

    async def show_metrics(request: web.Request) -> web.Response:
        body, content_type = await expose(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def show_health(_: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def show_readiness(_: web.Request) -> web.Response:
        if is_ready():
            return web.Response(text=f"ready{trouble()}\n")
        return web.Response(text="not ready: loading or stopping\n", status=503)

    app = web.Application()
    app.router.add_get("/metrics", show_metrics)
    app.router.add_get("/healthz", show_health)
    app.router.add_get("/readyz", show_readiness)
    return app

"""How a client's messages travel: gRPC with threads or with asyncio, and retries."""

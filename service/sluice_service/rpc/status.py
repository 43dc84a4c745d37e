"""Turns errors into gRPC statuses: the one place where that happens."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from traceback import clear_frames
from typing import Any

import grpc
import structlog

from sluice_model import ModelError
from sluice_service.errors import ServiceError

log = structlog.get_logger()


@asynccontextmanager
async def as_status(context: "grpc.aio.ServicerContext[Any, Any]") -> AsyncIterator[None]:
    """End the call with the status of whatever the body raises.

    An error of ours is told as it is; anything else is INTERNAL with a fixed
    text, and its traceback goes to the log only.
    """
    try:
        yield
    except ServiceError as error:
        # A traceback keeps the messages that its frames were at, until the collector comes. And
        # one error may end many calls: it must not bring the frames of one to the others.
        clear_frames(error.__traceback__)
        error.__traceback__ = None
        await context.abort(error.status, str(error))
    except ModelError as error:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    except grpc.aio.AbortError:
        raise
    except grpc.aio.InternalError as error:
        # What gRPC could not send was for a client that is gone.
        log.info("client_gone", error=str(error))
    except Exception:
        log.exception("call_broke")
        await context.abort(
            grpc.StatusCode.INTERNAL, "an error inside the server; its log has the traceback"
        )

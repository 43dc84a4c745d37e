"""What tests look up inside the server: the parts that answer the Open Inference Protocol."""

from sluice_service.rpc.open_inference.dispatch import Dispatcher
from sluice_service.rpc.open_inference.inference import Inference
from tests.service.wire import Served


def inference(served: Served) -> Inference:
    return served.server._open_inference.inference


def dispatcher(served: Served, model: str = "accumulator") -> Dispatcher:
    return inference(served).find(model).dispatcher


def unanswered(served: Served) -> int:
    """How many requests of the one stream have been read and not answered."""
    (conversation,) = inference(served)._conversations
    return len(conversation._pending)


def is_flushed(served: Served) -> bool:
    """True when the host has been given everything that may be run."""
    return not dispatcher(served)._stream._is_flush_due


def has_opened_and_closed(served: Served) -> bool:
    """True when the host has opened and closed all lanes that it was asked to."""
    return not dispatcher(served)._stream._tasks

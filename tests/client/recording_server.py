"""The plain server of `model_server` on a real socket: it records, and can misbehave."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc

from sluice_protos.sequences_pb2 import (
    Limits,
    ListModelsResponse,
    ModelInfo,
    SequenceState,
)
from sluice_protos.sequences_pb2_grpc import (
    ModelsServicer,
    SequencesServicer,
    add_ModelsServicer_to_server,
    add_SequencesServicer_to_server,
)
from tests.client.durable_server import DurableServer, DurableStream, Store
from tests.client.model_server import ModelServer, Stream, make_contract

GENEROUS = Limits(
    request_bytes_max=2**22,
    chunk_steps_max=1000,
    credit_steps=100_000,
    unacknowledged_steps_max=1000,
)


class RecordingServer(SequencesServicer, ModelsServicer):
    """`requests` is what arrived, over all streams; `frames` those with chunks.

    With a store its sequences are durable, and its checkpoints are made by `checkpoint`.
    """

    def __init__(self, limits: Limits = GENEROUS, store: Store | None = None) -> None:
        self.model = ModelServer(limits) if store is None else DurableServer(limits, store)
        self.requests = []
        self._open_streams: list[tuple[Stream, queue.Queue]] = []
        self.streams = 0
        # Cleared: what arrives waits unanswered.
        self.is_answering = threading.Event()
        self.is_answering.set()
        # Break the stream when this many more requests have come; the last one is applied.
        self.requests_left: int | None = None
        self._lock = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(16))
        add_SequencesServicer_to_server(self, self._server)
        add_ModelsServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{self.port}"

    def __enter__(self) -> "RecordingServer":
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_answering.set()
        self._server.stop(0).wait()

    @property
    def frames(self) -> list:
        return [request for request in self.requests if request.lane]

    def ListModels(self, request, context):  # noqa: N802
        return ListModelsResponse(models=[ModelInfo(name="sum", is_ready=True)])

    def GetModel(self, request, context):  # noqa: N802
        if request.name != "sum":
            context.abort(grpc.StatusCode.NOT_FOUND, "serve it with --model NAME=PATH")
        return make_contract()

    def GetState(self, request, context):  # noqa: N802
        return SequenceState()

    def Infer(self, request_iterator, context):  # noqa: N802
        with self._lock:
            if isinstance(self.model, DurableServer):
                stream = DurableStream(self.model)
            else:
                stream = Stream(self.model, merges_notices=True)
            self.streams += 1
            answers: queue.Queue = queue.Queue()
            self._open_streams.append((stream, answers))
        threading.Thread(
            target=self._read, args=(stream, request_iterator, answers), daemon=True
        ).start()
        while (answer := answers.get()) is not None:
            if isinstance(answer, grpc.StatusCode):
                context.abort(answer, "broken on purpose")
            self.is_answering.wait()
            yield answer

    def wait_for(self, claim: Callable[[], bool]) -> None:
        """Until a claim about `requests` holds; only a hang ends it."""
        with self._lock:
            assert self._lock.wait_for(claim, timeout=60)

    def checkpoint(self) -> None:
        """Write all sequences to the store, and tell their clients."""
        with self._lock:
            for name in sorted(self.model.sequences):
                self.model.checkpoint(name)
            self._flush()

    def refuse(self) -> None:
        """The store has not answered for too long: let all lanes go."""
        with self._lock:
            for stream, _ in self._open_streams:
                for lane in list(stream.lanes.values()):
                    stream.refuse(lane)
            self._flush()

    def _flush(self) -> None:
        for stream, answers in self._open_streams:
            for response in stream.outbox:
                answers.put(response)
            stream.outbox.clear()

    def _read(self, stream: Stream, requests, answers: queue.Queue) -> None:
        try:
            for request in requests:
                with self._lock:
                    self.requests.append(request)
                    self._lock.notify_all()
                    stream.accept(request)
                    while lanes := stream.runnable():
                        stream.run([(lane, 1000) for lane in lanes])
                    if self.requests_left is not None:
                        self.requests_left -= 1
                        if self.requests_left <= 0:
                            self.requests_left = None
                            stream.end()
                            answers.put(grpc.StatusCode.UNAVAILABLE)
                            return
                    self._flush()
        except grpc.RpcError:
            pass
        except Exception as error:
            answers.put(grpc.StatusCode.INTERNAL)
            raise error
        finally:
            with self._lock:
                stream.end()
                self._open_streams.remove((stream, answers))
            answers.put(None)

# The server, without torch and without a compiler:
#
#   docker build --tag sluice .
#   docker run --rm -p 8001:8001 -p 8002:8002 -v "$PWD/demo-output:/models:ro" \
#     -e SLUICE_MODEL=lstm=/models/lstm.onnx sluice

FROM python:3.11-slim AS build
WORKDIR /source
COPY pyproject.toml constraints.txt README.md ./
COPY protos protos
COPY model model
COPY service service
COPY export export
COPY client client
COPY cli cli
RUN python -m pip install --constraint constraints.txt pip
RUN python -m pip wheel --no-deps --build-constraint constraints.txt --wheel-dir dist .
# The environment gets no pip of its own: nothing is installed into a running server.
RUN python -m venv --without-pip /opt/sluice
RUN python -m pip --python /opt/sluice/bin/python install --constraint constraints.txt \
    "$(echo dist/*.whl)[service,redis]"

FROM python:3.11-slim
COPY --from=build /opt/sluice /opt/sluice
# Inside a container every address is the container's own. Models are named by
# SLUICE_MODEL; every other setting has a SLUICE_… too: `sluice serve --help`.
ENV PATH=/opt/sluice/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    SLUICE_LISTEN=0.0.0.0:8001 \
    SLUICE_HTTP=0.0.0.0:8002
USER 65532:65532
EXPOSE 8001 8002
# SIGTERM is the graceful stop: clients are told, what is running finishes.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=2s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['SLUICE_HTTP'].rpartition(':')[2] + '/readyz')"]
ENTRYPOINT ["sluice"]
CMD ["serve"]

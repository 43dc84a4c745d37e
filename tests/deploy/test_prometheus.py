"""A real Prometheus takes deploy/'s configuration and reads a real server's metrics with it."""

import json
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tests.processes import free_port, running

FindProgram = Callable[[str, str], str]


def query(port: int, expression: str) -> list[dict[str, object]]:
    """What Prometheus answers to an instant query."""
    arguments = urllib.parse.urlencode({"query": expression})
    url = f"http://127.0.0.1:{port}/api/v1/query?{arguments}"
    with urllib.request.urlopen(url, timeout=5) as response:
        answer: list[dict[str, object]] = json.load(response)["data"]["result"]
    return answer


def test_promtool_accepts_the_configuration(root: Path, debian_program: FindProgram) -> None:
    promtool = debian_program("promtool", "prometheus")
    subprocess.run([promtool, "check", "config", root / "deploy/prometheus.yml"], check=True)


def test_prometheus_reads_the_metrics_of_a_running_server(
    root: Path,
    tmp_path: Path,
    model_file: Path,
    debian_program: FindProgram,
) -> None:
    program = debian_program("prometheus", "prometheus")
    http, web = free_port(), free_port()
    configuration = tmp_path / "prometheus.yml"
    text = (root / "deploy/prometheus.yml").read_text()
    assert "sluice:8002" in text
    # Only where the server is, and the pace, differ.
    text = text.replace("sluice:8002", f"127.0.0.1:{http}")
    configuration.write_text(text.replace("scrape_interval: 5s", "scrape_interval: 200ms"))
    serve = [sys.executable, "-m", "sluice_cli", "serve"]
    serve += ["--model", f"lstm={model_file}", "--listen", "127.0.0.1:0"]
    watch = [program, f"--config.file={configuration}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
    watch += [f"--web.listen-address=127.0.0.1:{web}"]
    serve += ["--http", f"127.0.0.1:{http}"]
    with (
        running(serve, ready=f"http://127.0.0.1:{http}/readyz"),
        running(watch, ready=f"http://127.0.0.1:{web}/-/ready"),
    ):
        deadline = time.monotonic() + 60
        while not query(web, 'up{job="sluice"} == 1'):
            assert time.monotonic() < deadline, "Prometheus never read the server's metrics"
            time.sleep(0.1)
        (built,) = query(web, "sluice_build_info")
        assert built["metric"]

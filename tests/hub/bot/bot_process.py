"""The bot as a process of its own, on a Hub of this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from die_with_parent import die_with_parent
from hub_server import TOKEN, HubServer
from safetensors.torch import save

SECRET = "correct horse battery staple"
PATIENCE = 120.0


class BotProcess:
    """``qguard serve`` from the moment it answers until `kill` or `end`."""

    def __init__(self, hub: HubServer, folder: Path, *options: str, token: str | None = TOKEN) -> None:
        self.folder = folder
        self._log = (folder / "log").open("ab")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        environment = hub.environment(folder / "home", token) | {"QGUARD_WEBHOOK_SECRET": SECRET}
        program = "import sys; from optimum_qguard.cli import main; sys.exit(main())"
        queue = ["--queue", str(folder / "queue.sqlite"), "--port", self.url.rpartition(":")[2]]
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, "serve", *queue, "--retry-delay", "0.2", *options],
            env=environment,
            preexec_fn=die_with_parent,
            stdout=self._log,
            stderr=self._log,
        )
        try:
            self.wait(lambda: self.answers)
        except BaseException:
            self.kill()
            raise

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def answers(self) -> bool:
        assert self.process.poll() is None, self.log
        try:
            return self.get("/health")[0] == 200
        except OSError:
            return False

    def wait(self, condition: Callable[[], object], patience: float = PATIENCE) -> None:
        end = time.monotonic() + patience
        while not condition():
            assert time.monotonic() < end, self.log
            time.sleep(0.1)

    def get(self, path: str) -> tuple[int, str]:
        return self.request(urllib.request.Request(self.url + path))

    def post(self, body: bytes, secret: str | None = SECRET) -> tuple[int, dict[str, str]]:
        headers = {"Content-Type": "application/json"} | ({} if secret is None else {"X-Webhook-Secret": secret})
        status, answer = self.request(urllib.request.Request(f"{self.url}/webhooks/scan", body, headers))
        return status, json.loads(answer)

    def request(self, request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    @property
    def health(self) -> dict[str, Any]:
        return json.loads(self.get("/health")[1])

    @property
    def idle(self) -> bool:
        found = self.health
        return not found["queued"] and not found["running"]

    def metric(self, line: str) -> float:
        """The value of a line in /metrics that begins so; 0 if there is none."""
        found = [text for text in self.get("/metrics")[1].splitlines() if text.startswith(f"{line} ")]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    def children(self) -> list[int]:
        """The processes that it has started."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        others = Path(f"/proc/{self.process.pid}/task").glob("*/children") if listed.exists() else []
        return [int(number) for file in others for number in file.read_text().split()]

    def kill(self) -> None:
        """As the kernel does where memory is short."""
        self.process.kill()
        self.process.wait()
        self._log.close()

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE)
        self._log.close()
        return code


def checkpoint(seed: int = 0, size: int = 64) -> dict[str, bytes]:
    """Files of a tiny one, by name."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        f"model.layers.{index}.mlp.up_proj.weight": torch.randn(size, size, generator=generator) for index in range(2)
    }
    return {"model.safetensors": save(weights), "config.json": b'{"model_type": "llama"}'}


def event(repository: str, commit: str) -> bytes:
    """A webhook request's body."""
    content = {
        "event": {"action": "update", "scope": "repo.content"},
        "repo": {"type": "model", "name": repository, "id": "x", "private": False, "headSha": commit},
        "webhook": {"id": "hook", "version": 3},
    }
    return json.dumps(content).encode()


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()

"""The demo needs no network: every connection to another machine is refused here."""

import subprocess
import sys

GUARDED = """
import socket
real = socket.socket.connect
def connect(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1"):
        raise AssertionError(f"connected to {address}")
    return real(self, address)
socket.socket.connect = connect
def resolve(*arguments, **_):
    raise AssertionError(f"looked up {arguments}")
socket.getaddrinfo = resolve
import adapmoe_lab as lab
silent = lambda _: None
model = lab.load("demo", link="none", device="cpu", dtype="float32", announce=silent)
print(model.generate("Once upon a time", max_new_tokens=4))
print(lab.evaluate(model, tasks=["minimal_pairs"], limit=8))
"""


def test_load_generate_and_evaluate_reach_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    command = [sys.executable, "-c", GUARDED]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("Once upon a time")
    assert "minimal_pairs" in done.stdout

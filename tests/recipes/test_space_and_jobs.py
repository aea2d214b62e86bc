"""The Space's folder and the script for a rented GPU, as far as they can be run without the service."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from huggingface_hub.cli._uv_script_header import parse_uv_script_header

from tests.hub_stand_in import hub_stand_in
from tests.toys import SUM, save_chat_model

ROOT = Path(__file__).parents[2]
SPACE, SCRIPT = ROOT / "recipes" / "space", ROOT / "recipes" / "jobs" / "train_and_push.py"


def test_the_space_says_what_the_hub_wants_to_know():
    head = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert head["sdk"] == "docker" and {"title", "emoji", "colorFrom", "colorTo"} <= head.keys()
    dockerfile = (SPACE / "Dockerfile").read_text()
    assert f"--port {head['app_port']} " in dockerfile and "USER user" in dockerfile and "--uid 1000" in dockerfile
    extras = re.search(r"\[([\w,]+)\]\"$", dockerfile, re.MULTILINE)[1].split(",")
    assert all(f'"{extra}":' in (ROOT / "setup.py").read_text() for extra in extras)


@pytest.mark.slow
def test_the_command_of_the_space_serves_a_model_from_the_hub(tmp_path):
    """The line of the Dockerfile, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (line,) = re.findall(r"^CMD (.*)$", (SPACE / "Dockerfile").read_text(), re.MULTILINE)
    command = shlex.split(line.replace("$MODEL", "tester/toy").replace("7860", port))
    command[0] = str(Path(sys.executable).with_name("nanochat"))
    toy = save_chat_model(tmp_path / "toy")
    with hub_stand_in() as hub:
        environment = os.environ | hub.environment(tmp_path / "home")
        put = f"from modeling_nanochat.training import hub; hub.upload({str(toy)!r}, hub.create_repository('toy'), 'x')"
        subprocess.run([sys.executable, "-c", put], env=environment, check=True, capture_output=True)
        server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            page = get(server, f"http://127.0.0.1:{port}/")
            assert "<html" in page
            asked = json.dumps({"messages": [{"role": "user", "content": SUM}], "temperature": 0}).encode()
            answer = json.loads(get(server, f"http://127.0.0.1:{port}/v1/chat/completions", asked))
            assert "42" in answer["choices"][0]["message"]["content"]
        finally:
            server.kill()
            server.wait()


def get(server: subprocess.Popen, address: str, body: bytes | None = None, seconds: float = 300) -> str:
    """The answer of a server that may still be starting."""
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    for _ in range(round(seconds / 0.2)):
        assert server.poll() is None, server.stderr.read().decode()
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read().decode()
        except ConnectionError:
            time.sleep(0.2)
        except urllib.error.URLError as error:
            assert isinstance(error.reason, ConnectionError), error
            time.sleep(0.2)
    raise AssertionError("the server did not start")


def test_the_job_carries_its_machine_and_pushes_every_model():
    header = parse_uv_script_header(SCRIPT.read_text())
    assert header.secrets == ["HF_TOKEN"] and header.flavor and header.timeout
    command = [sys.executable, str(SCRIPT), "--repo", "you/tiny", "--code", str(ROOT), "--show"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert shown[:2] == ["make install", "make demo"]
    assert shown[2:] == [
        f".venv/bin/nanochat push --model out/demo/{stage} --repo {name}"
        for stage, name in (("base", "you/tiny-base"), ("sft", "you/tiny-sft"), ("rl", "you/tiny"))
    ]
    shown = subprocess.run([*command, "--recipe", "speedrun"], capture_output=True, text=True, check=True).stdout
    assert "env DEPTH=12 bash recipes/speedrun.sh" in shown and "--model out/speedrun/rl" in shown


def test_a_job_that_fails_pushes_what_was_finished(tmp_path):
    """`make` and `nanochat` are stand-ins: training ends with the base model, and an error."""
    work, code = tmp_path / "work", tmp_path / "code"
    (code / "recipes").mkdir(parents=True)
    install = "install:\n\tmkdir -p .venv/bin && cp push .venv/bin/nanochat && chmod +x .venv/bin/nanochat\n"
    demo = "demo:\n\tmkdir -p out/demo/base && touch out/demo/base/stage.json && false\n"
    (code / "Makefile").write_text(install + demo)
    (code / "push").write_text('#!/bin/sh\necho "$@" >> pushed\n')
    command = [sys.executable, str(SCRIPT), "--repo", "you/tiny", "--code", str(code), "--work", str(work)]
    done = subprocess.run(command, env=os.environ | {"HF_TOKEN": "hf_x"}, capture_output=True, text=True)
    assert done.returncode == 1 and "1 of 3 models were trained, 1 pushed" in done.stderr
    assert (work / "pushed").read_text() == "push --model out/demo/base --repo you/tiny-base\n"
    without = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    done = subprocess.run(command, env=without, capture_output=True, text=True)
    assert done.returncode == 1 and "there is no HF_TOKEN" in done.stderr

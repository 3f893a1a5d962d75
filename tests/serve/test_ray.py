"""river-serve as a user starts it: two replicas on Ray Serve, read by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.fuzz import mutated
from tests.serve.served import CONTEXT, expected, words
from tests.words import save_word_tokenizer

openai = pytest.importorskip("openai")
psutil = pytest.importorskip("psutil")
pytest.importorskip("ray.serve")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
KEY, REPLICAS, SLOTS, QUEUE = "a key", 2, 8, 120
PROMPTS = [(5, 9, 17, 33), (7,), (3, 4, 5, 6, 7, 8, 9), (11, 12)]


@dataclass
class Server:
    """A server that runs, by its process."""

    process: subprocess.Popen[str]
    url: str

    def replicas(self) -> list[Any]:
        """Processes that have the model."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        # The title tells also what is running.
        return [one for one in found if _title(one).startswith("ray::ServeReplica:river:OpenAI")]


def _title(process: Any) -> str:
    try:
        return str(process.cmdline()[0]) if process.cmdline() else ""
    except psutil.Error:
        return ""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = save_word_tokenizer(tmp_path_factory.mktemp("server"), eos_token=None)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}w9 {{ m.content }} {% endfor %}w10")
    (folder / "keys.txt").write_text(f"{KEY}\n")
    port = free_port()
    command = [sys.executable, "-m", "river_compile", "serve", model, "--tokenizer", folder, "--context", CONTEXT]
    command += ["--port", port, "--replicas", REPLICAS, "--slots", SLOTS, "--queue", QUEUE, "--threads", 1]
    command += ["--api-key-file", folder / "keys.txt"]
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = process.stdout.readline()
    assert told.startswith("serving tiny on"), told
    started = psutil.Process(process.pid).children(recursive=True)
    yield Server(process, f"http://127.0.0.1:{port}")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    # Where nobody reaps processes, Ray's agents do not see that their parent is gone.
    for one in psutil.wait_procs(started, timeout=20)[1]:
        one.kill()


Call = Callable[[Any], Awaitable[Any]]


def ask(server: Server, *calls: Call, **settings: Any) -> list[Any]:
    """What each call of a client gives, or raises; none may take longer than some minutes."""

    async def together() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", timeout=120, **settings) as client:
            return list(
                await asyncio.wait_for(asyncio.gather(*(call(client) for call in calls), return_exceptions=True), 240)
            )

    settings.setdefault("api_key", KEY)
    return asyncio.run(together())


def whole(prompt: Sequence[int], new: int, **fields: Any) -> Call:
    async def call(client: Any) -> str:
        answer = await client.completions.create(
            model="tiny", prompt=words(prompt), max_tokens=new, temperature=0, extra_body=fields
        )
        return str(answer.choices[0].text)

    return call


def streamed(prompt: Sequence[int], new: int, **fields: Any) -> Call:
    async def call(client: Any) -> str:
        stream = await client.completions.create(
            model="tiny", prompt=words(prompt), max_tokens=new, stream=True, temperature=0, extra_body=fields
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    return call


async def chat(client: Any) -> Any:
    messages: Any = [{"role": "user", "content": "w5 w6"}]
    return await client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=9, temperature=0, logprobs=True, extra_body={"exact": True}
    )


def test_what_keeps_replicas_from_starting_is_told_in_our_own_line(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "river_compile", "serve", model, "--port", free_port(), "--tokenizer"]
    command.append(save_word_tokenizer(tmp_path, eos_token=None))
    ran = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and ran.stdout.count("serving") == 0
    line = f"error: the replicas do not start: {model}: nothing tells how many tokens it reads: give --context"
    assert ran.stderr.splitlines()[-1] == line


def test_openais_client_reads_what_the_decoder_says(server: Server, model: Path) -> None:
    for fields in ({"exact": True}, {"tau": 0.99}):
        text = " " + words(expected(model, PROMPTS[0], 20, tau=fields.get("tau", 2.0)))
        assert ask(server, whole(PROMPTS[0], 20, **fields), streamed(PROMPTS[0], 20, **fields)) == [text] * 2
    answer = ask(server, chat)[0]
    assert answer.choices[0].message.content == words(expected(model, [9, 5, 6, 10], 9, tau=2.0))
    assert len(answer.choices[0].logprobs.content) == 9 and answer.usage.completion_tokens == 9


def test_mistakes_are_the_errors_that_the_client_has_for_them(server: Server) -> None:
    found = ask(server, whole(PROMPTS[0], 3), api_key="another key")
    found += ask(server, whole(PROMPTS[0], 500), whole((), 5))
    assert [type(error).__name__ for error in found] == ["AuthenticationError", "BadRequestError", "BadRequestError"]
    assert "exceed the context of 200" in str(found[1])


def test_two_hundred_streams_at_once(server: Server, model: Path) -> None:
    calls = [streamed(PROMPTS[index % 4], 20, tau=2.0) for index in range(200)]
    alone = [" " + words(expected(model, prompt, 20, tau=2.0)) for prompt in PROMPTS]
    assert ask(server, *calls, max_retries=0) == [alone[index % 4] for index in range(200)]


def test_metrics_are_of_all_replicas(server: Server) -> None:
    ask(server, *(whole(PROMPTS[0], 5) for _ in range(30)))
    deadline, names = time.monotonic() + 20, set[str]()
    while len(names) < REPLICAS and time.monotonic() < deadline:
        text = httpx.get(f"{server.url}/metrics").text
        names = {line.split('"')[1] for line in text.splitlines() if line.startswith("river_slots{")}
    assert len(names) == REPLICAS
    assert text.count("# TYPE river_generated_tokens_total counter") == 1


def test_fuzzed_requests_never_fail_the_server_and_leave_no_memory_behind(server: Server) -> None:
    rng = random.Random(1)

    async def send(count: int) -> list[int]:
        headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
        found = []
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60) as client:
            for _ in range(count // 10):
                routes = rng.choices(("/v1/completions", "/v1/chat/completions"), (3, 1), k=10)
                answers = await asyncio.gather(*(client.post(route, content=mutated(rng)) for route in routes))
                found += [answer.status_code for answer in answers]
        return found

    statuses = asyncio.run(send(300))
    before = [one.memory_info().rss for one in server.replicas()]
    statuses += asyncio.run(send(1000))
    after = [one.memory_info().rss for one in server.replicas()]
    assert all(status < 500 for status in statuses), sorted(set(statuses))
    assert statuses.count(200) > 100 and statuses.count(400) > 100
    assert len(before) == len(after) == REPLICAS
    # A leak of one request's tokens and cache, 20 kB, would be 20 MB.
    assert sum(after) - sum(before) < 16 << 20


def test_a_load_of_a_minute_is_served_without_a_failure(server: Server) -> None:
    command = [sys.executable, ROOT / "samples" / "serve_load.py", server.url, "--users", 24, "--seconds", 60]
    command += ["--max-tokens", 16, "--api-key", KEY, "--words", "w5", "w6", "w7"]
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    told = json.loads(ran.stdout)
    assert told["errors"] == [] and told["stream"]["failures"] == 0
    assert told["stream"]["count"] > 100 and told["first token"]["count"] >= told["stream"]["count"]


def test_a_replica_that_dies_takes_no_request_with_it_in_silence(server: Server, model: Path) -> None:
    """The last test: what it kills is replaced, but its figures begin anew."""
    new = 150
    text = " " + words(expected(model, PROMPTS[0], new, tau=2.0))

    async def kill(client: Any) -> None:
        while httpx.get(f"{server.url}/health").json()["active"] < 3:
            await asyncio.sleep(0.01)
        server.replicas()[0].kill()

    asked = [kind(PROMPTS[0], new, tau=2.0) for kind in (whole, streamed) for _ in range(12)]
    *found, killed = ask(server, *asked, kill)
    assert killed is None
    # Whole answers are asked for again by the client; of a stream that breaks off it is told.
    assert found[:12] == [text] * 12
    broken = [one for one in found[12:] if one != text]
    assert all(isinstance(one, (openai.APIError, httpx.HTTPError)) for one in broken), broken
    deadline = time.monotonic() + 120
    while len(server.replicas()) < REPLICAS and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(server.replicas()) == REPLICAS
    assert ask(server, *(whole(PROMPTS[0], new, tau=2.0) for _ in range(12))) == [text] * 12

"""The routes, in this process: OpenAI's objects, whole and streamed; what is refused, and with which status."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from river_compile.serve.service import Service
from river_compile.serve.settings import digest
from tests.families import LAYERS
from tests.serve.fuzz import mutated
from tests.serve.served import (
    NAME,
    client_of,
    comes_to_rest,
    complete,
    events,
    expected,
    post,
    settings,
    together,
    words,
)
from tests.words import save_word_tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = (5, 9, 17, 33)


@pytest.fixture(scope="module")
def chatting(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose tokenizer has a chat template and an end."""
    folder = save_word_tokenizer(tmp_path_factory.mktemp("chat"), eos_token="w127")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}w9 {{ m.content }} {% endfor %}w10")
    made = Service(settings(model, folder))
    yield made
    made.close()


def test_a_completion_is_the_decoders_text(service: Service, model: Path) -> None:
    tokens = expected(model, PROMPT, 12, tau=2.0)
    for prompt in (words(PROMPT), list(PROMPT), [words(PROMPT)], [list(PROMPT)]):
        answer = complete(service, prompt, max_tokens=12, temperature=0, exact=True)
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (" " + words(tokens), "length")
        assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16}
        assert (answer["object"], answer["model"]) == ("text_completion", NAME)


def test_tau_and_seed_hold_for_one_request(service: Service, model: Path) -> None:
    for asked in ({"tau": 0.99}, {"tau": 2.0}, {"temperature": 0.8, "top_p": 0.9, "seed": 5, "tau": 0.99}):
        text = complete(service, words(PROMPT), max_tokens=16, **({"temperature": 0} | asked))["choices"][0]["text"]
        assert text == " " + words(expected(model, PROMPT, 16, **asked))


def test_a_stream_tells_the_same_in_pieces(service: Service) -> None:
    body = {"prompt": words(PROMPT), "max_tokens": 12, "temperature": 0}
    whole = complete(service, **body)
    answer = post(service, COMPLETIONS, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(answer.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "length"]
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert len({chunk["id"] for chunk in chunks}) == 1 and len(chunks) > 3


def test_a_chat_is_read_by_its_template_and_ends_where_the_model_ends(chatting: Service, model: Path) -> None:
    tokens = expected(model, [9, 5, 6, 10], 30, tau=2.0, stop_tokens=[127])
    messages = [{"role": "user", "content": [{"type": "text", "text": "w5 "}, {"type": "text", "text": "w6"}]}]
    body = {"model": NAME, "messages": messages, "temperature": 0, "exact": True, "max_completion_tokens": 30}
    choice = post(chatting, CHAT, body).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": words(tokens), "refusal": None}
    chunks = events(post(chatting, CHAT, {**body, "stream": True}).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas) == words(tokens)
    assert 0 < len(tokens) < 29 and chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"] == "stop"
    assert chunks[0]["object"] == "chat.completion.chunk"


def test_an_end_token_is_not_told(chatting: Service) -> None:
    answer = complete(chatting, words(PROMPT), max_tokens=190, temperature=1.5, seed=4)
    assert answer["choices"][0]["finish_reason"] == "stop" and "w127" not in answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] < 190


def test_a_stop_string_ends_an_answer_before_it(service: Service, model: Path) -> None:
    body = {"prompt": words(PROMPT), "max_tokens": 150, "temperature": 0, "exact": True}
    tokens = expected(model, PROMPT, 12, tau=2.0)
    stop = f"w{tokens[4]} w{tokens[5]}"
    text = " " + words(tokens)
    for given in (stop, ["nothing", stop]):
        choice = complete(service, **body, stop=given)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")
    chunks = events(post(service, COMPLETIONS, {**body, "stop": stop, "stream": True}).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text[: text.index(stop)]


def test_probabilities_are_told_as_each_route_has_them(service: Service, chatting: Service) -> None:
    body = {"prompt": words(PROMPT), "max_tokens": 3, "temperature": 0, "logprobs": 2}
    told = complete(service, **body)["choices"][0]["logprobs"]
    assert [len(told[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [3] * 4
    for token, logprob, likeliest in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert len(likeliest) == 2 and likeliest[token] == logprob == max(likeliest.values()) and logprob < 0
    assert complete(service, **(body | {"logprobs": 0}))["choices"][0]["logprobs"]["top_logprobs"] == [{}] * 3
    body = {"messages": [{"role": "user", "content": "w5"}], "logprobs": True, "max_tokens": 3, "temperature": 0}
    content = post(chatting, CHAT, {**body, "top_logprobs": 4}).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 3
    for entry in content:
        assert len(entry["top_logprobs"]) == 4 and entry["top_logprobs"][0]["token"] == entry["token"]
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert sum(math.exp(one["logprob"]) for one in entry["top_logprobs"]) < 1


def test_models_health_and_metrics(service: Service) -> None:
    async def run() -> None:
        async with client_of(service) as client:
            listed = (await client.get("/v1/models")).json()
            assert [entry["id"] for entry in listed["data"]] == [NAME]
            assert (await client.get(f"/v1/models/{NAME}")).json() == listed["data"][0]
            assert (await client.get("/v1/models/other")).status_code == 404
            assert (await client.get("/health")).json()["status"] == "ok"
            before = figures((await client.get("/metrics")).text)
            body = {"prompt": words(PROMPT), "max_tokens": 9, "temperature": 0, "tau": 0.99}
            await client.post(COMPLETIONS, json=body | {"exact": False})
            await client.post(COMPLETIONS, json=body | {"exact": True, "max_tokens": 40})
            # An answer may be read before its last pass is counted.
            while service.engine.load[0]:
                await asyncio.sleep(0.001)
            after = figures((await client.get("/metrics")).text)

            def grown(name: str) -> float:
                return after[name] - before.get(name, 0.0)

            assert grown("river_generated_tokens_total") == 49 and grown("river_prompt_tokens_total") == 8
            assert grown("river_time_to_first_token_seconds_count") == 2
            # Of each token after the first; exact mode's passes are all as deep as the model.
            assert grown("river_exit_depth_count") == 8 and 0 < grown("river_exit_depth_sum") <= 8 * LAYERS
            assert grown("river_drafted_tokens_total") >= grown("river_accepted_tokens_total")
            assert after["river_queue_length"] == after["river_active_streams"] == 0 and after["river_slots"] == 4

    asyncio.run(run())


def figures(text: str) -> dict[str, float]:
    """Figures without labels of their own, by name."""
    lines = [line.split() for line in text.splitlines() if line.count('="') == 1 and not line.startswith("#")]
    return {name.partition("{")[0]: float(value) for name, value in lines}


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"n": 2}, "n"),
    ({"echo": True}, "echo"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"wrong": 1}, "wrong"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 500}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"seed": -1}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"tau": "high"}, "tau"),
    ({"logprobs": 6}, "logprobs"),
    ({"prompt": ["w5", "w6"]}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [5, 1 << 40]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": None}, "prompt"),
)


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[json.dumps(fields)[:30] for fields, _ in REFUSED])
def test_what_is_not_served_is_refused_by_its_name(service: Service, fields: dict[str, Any], param: str) -> None:
    answer = post(service, COMPLETIONS, {"prompt": "w5", **fields})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"].split(".")[0] == param and param in error["message"], error


def test_bodies_that_are_no_request(service: Service) -> None:
    for body in (b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"prompt": NaN}'):
        answer = post(service, COMPLETIONS, body, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"], body[:20]
    assert post(service, COMPLETIONS, {"prompt": "w5 " * 500_000}).status_code == 413
    assert post(service, COMPLETIONS, {"model": "other", "prompt": "w5"}).status_code == 404
    assert post(service, CHAT, {"messages": [{"role": "user", "content": "w5"}]}).json()["error"]["param"] == "messages"
    assert post(service, "/v1/other", {}).status_code == 404


def test_a_body_that_does_not_tell_its_size_is_counted(service: Service) -> None:
    async def parts() -> Any:
        for _ in range(40):
            yield b" " * 50_000

    async def request(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(COMPLETIONS, content=parts(), headers={"content-type": "application/json"})

    assert together(service, request)[0].status_code == 413


def test_a_key_is_needed_where_there_are_keys(model: Path, tokenizer: Path) -> None:
    service = Service(replace(settings(model, tokenizer), keys=(digest("one"), digest("two"))))
    body = {"prompt": "w5", "max_tokens": 1}
    for given in (None, "Bearer three", "Bearer ", "one", "Basic one", "Bearer ö"):
        headers = {} if given is None else {"authorization": given.encode()}
        assert post(service, COMPLETIONS, body, headers=headers).status_code == 401
    for given in ("Bearer one", "bearer two"):
        assert post(service, COMPLETIONS, body, headers={"authorization": given}).status_code == 200

    async def open_to_all(client: httpx.AsyncClient) -> list[int]:
        return [(await client.get(path)).status_code for path in ("/health", "/metrics", "/v1/models")]

    assert together(service, open_to_all)[0] == [200, 200, 401]
    service.close()


def test_beyond_the_queue_it_is_503_with_a_time_to_wait(model: Path, tokenizer: Path) -> None:
    service = Service(settings(model, tokenizer, slots=1, queue=1))

    async def request(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(COMPLETIONS, json={"prompt": "w5", "max_tokens": 60})

    answers = together(service, *[request] * 6)
    assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503, 503, 503]
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 503)
    assert complete(service, "w5", max_tokens=2)
    service.close()


def test_a_client_that_leaves_frees_its_slot(service: Service) -> None:
    """Whether it read a stream or waited for the whole."""

    async def run() -> None:
        from river_compile.serve.app import make_app

        for stream in (True, False):
            body = json.dumps({"prompt": "w5", "max_tokens": 190, "stream": stream, "tau": 2.0}).encode()
            gone, told = asyncio.Event(), []
            messages = iter([{"type": "http.request", "body": body, "more_body": False}])

            async def receive(messages: Any = messages, gone: asyncio.Event = gone) -> Any:
                message = next(messages, None)
                if message is None:
                    await gone.wait()
                return message or {"type": "http.disconnect"}

            async def send(message: Any, told: list[Any] = told) -> None:
                told.append(message)

            scope = {
                "type": "http",
                "method": "POST",
                "path": COMPLETIONS,
                "query_string": b"",
                "headers": [(b"content-type", b"application/json")],
            }
            serving = asyncio.ensure_future(make_app(service)(scope, receive, send))
            while not service.engine.load[0]:
                await asyncio.sleep(0.001)
            gone.set()
            await asyncio.wait_for(serving, 30)
            made = service.metrics.registry.get_sample_value("river_generated_tokens_total", {"replica": "0"})
            while service.engine.load[0]:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.1)
            after = service.metrics.registry.get_sample_value("river_generated_tokens_total", {"replica": "0"})
            assert after is not None and made is not None and after - made < 20

    asyncio.run(run())


def test_no_request_makes_it_fail(service: Service) -> None:
    rng = random.Random(0)
    bodies = [mutated(rng) for _ in range(150)]

    async def run() -> list[int]:
        found = []
        async with client_of(service) as client:
            for body in bodies:
                route = rng.choice((COMPLETIONS, COMPLETIONS, CHAT))
                answer = await client.post(route, content=body, headers={"content-type": "application/json"})
                assert answer.status_code < 500, body
                found.append(answer.status_code)
        return found

    statuses = asyncio.run(run())
    assert statuses.count(200) > 10 and statuses.count(400) > 10
    assert comes_to_rest(service.engine) and service.engine.alive

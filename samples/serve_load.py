"""Load a server of river-serve with streams, and tell how it did.

    river serve out_dir --port 8000
    python samples/serve_load.py http://127.0.0.1:8000 --users 16 --seconds 60

Needs locust. Each user asks for one streamed completion after another; a 503 is a refusal, after which it waits as long
as it is told. Times are of this machine, client and server together.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import locust

WORDS = (
    "the",
    "a",
    "river",
    "boat",
    "house",
    "light",
    "of",
    "and",
    "to",
    "in",
    "runs",
    "stands",
    "over",
    "night",
    "day",
)
FIRST, REFUSED = "first token", "refused"


def user_class(options: argparse.Namespace) -> type[locust.HttpUser]:
    import gevent
    import locust

    headers = {} if options.api_key is None else {"authorization": f"Bearer {options.api_key}"}

    class Reader(locust.HttpUser):
        """Asks, reads to the end, asks again."""

        host = options.url
        wait_time = locust.constant(0)

        @locust.task
        def complete(self) -> None:
            words = [random.choice(options.words) for _ in range(random.randint(1, options.prompt_words))]
            body: dict[str, Any] = {"prompt": " ".join(words), "max_tokens": options.max_tokens, "stream": True}
            body |= {
                name: getattr(options, name) for name in ("tau", "temperature") if getattr(options, name) is not None
            }
            started = time.perf_counter()
            with self.client.post(
                "/v1/completions", json=body, headers=headers, stream=True, catch_response=True, name="stream"
            ) as answer:
                if answer.status_code == 503:
                    answer.success()
                    self._told(REFUSED, started)
                    gevent.sleep(float(answer.headers.get("retry-after", 1)))
                    return
                lines = self._read(answer, started)
                # Locust's own time ends where the answer begins.
                answer.request_meta["response_time"] = 1000 * (time.perf_counter() - started)
                if answer.status_code == 200 and lines and lines[-1] == b"data: [DONE]":
                    answer.success()
                else:
                    answer.failure(f"status {answer.status_code}, {len(lines)} events, not ended")

        def _read(self, answer: Any, started: float) -> list[bytes]:
            lines = []
            for line in answer.iter_lines():
                if line:
                    if not lines:
                        self._told(FIRST, started)
                    lines.append(line)
            return lines

        def _told(self, what: str, started: float) -> None:
            milliseconds = 1000 * (time.perf_counter() - started)
            self.environment.events.request.fire(
                request_type="", name=what, response_time=milliseconds, response_length=0, exception=None, context={}
            )

    return Reader


def load(options: argparse.Namespace) -> dict[str, Any]:
    """Run, and what was seen; times in milliseconds."""
    # Importing it changes sockets and threads of the whole process.
    import gevent
    from locust.env import Environment

    environment = Environment(user_classes=[user_class(options)])
    runner = environment.create_local_runner()
    runner.start(options.users, spawn_rate=options.users)
    gevent.sleep(options.seconds)
    runner.quit()
    found: dict[str, Any] = {"users": options.users, "seconds": options.seconds}
    for entry in environment.stats.entries.values():
        times = {f"p{int(100 * share)}": entry.get_response_time_percentile(share) for share in (0.5, 0.95, 0.99)}
        found[entry.name] = {"count": entry.num_requests, "failures": entry.num_failures, **times}
    found["errors"] = sorted({str(error.error) for error in environment.stats.errors.values()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--prompt-words", type=int, default=30, help="at most; their number is random")
    parser.add_argument("--words", nargs="+", default=WORDS, help="what prompts are made of")
    parser.add_argument("--tau", type=float)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--api-key")
    print(json.dumps(load(parser.parse_args()), indent=2))


if __name__ == "__main__":
    main()

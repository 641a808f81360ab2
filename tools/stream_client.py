"""A client in a process of its own, which costs little: it sends each body that it is given, and says what came.

    python -m tools.stream_client http://127.0.0.1:8000

Reads one JSON body a line from stdin, asks `/v1/chat/completions`, and writes a line of JSON for each: the text of the
answer, the seconds from sending to the last byte, the chunks that it came in, and the engine's own seconds (`timings`).
"""

import http.client
import json
import sys
import time
from typing import Any
from urllib.parse import urlsplit

PATH = "/v1/chat/completions"


def ask(connection: http.client.HTTPConnection, line: str) -> dict[str, Any]:
    """Send a body and read the whole reply; what it says is looked at only when the last byte has come."""
    start = time.perf_counter()
    connection.request("POST", PATH, line.encode("utf-8"), {"content-type": "application/json"})
    reply = connection.getresponse()
    raw = reply.read()
    seconds = time.perf_counter() - start
    if reply.status != 200:
        raise SystemExit(raw.decode("utf-8"))
    if not json.loads(line).get("stream"):
        document = json.loads(raw)
        return {
            "text": document["choices"][0]["message"]["content"],
            "seconds": seconds,
            "chunks": 1,
            **times(document),
        }
    events = raw.decode("utf-8").removesuffix("\n\n").split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    return {"text": text, "seconds": seconds, "chunks": len(chunks), **times(chunks[-1])}


def times(document: dict[str, Any]) -> dict[str, float]:
    """Seconds that the engine says its answer took."""
    timings = document["timings"]
    return {"engine_s": (timings["prompt_ms"] + timings["predicted_ms"]) / 1000}


def main() -> None:
    """Ask until stdin ends."""
    address = urlsplit(sys.argv[1])
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=600)
    for line in sys.stdin:
        print(json.dumps(ask(connection, line)), flush=True)


if __name__ == "__main__":
    main()

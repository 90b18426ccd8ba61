"""Metrics, health, models and the page."""

from __future__ import annotations

import html.parser
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aloud import Engine
from server.running import LONG, Running, asked, assert_problem, serving, wait_until


def values(server: Running) -> dict[str, float]:
    with server.client() as client:
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_counts_after_a_known_workload(engine: Engine) -> None:
    with serving(engine) as server:
        before = values(server)
        assert before["aloud_slots"] == 4
        for seed in range(3):
            assert server.speech(seed=seed, max_seconds=0.8).status_code == 200
        server.speech(voice="nobody")
        with server.client() as client:
            body = asked(input=LONG, max_seconds=20)
            with client.stream("POST", "/v1/audio/speech", json=body) as answer:
                parts = answer.iter_raw()
                next(parts)
                during = values(server)
            wait_until(lambda: values(server).get("aloud_requests_total{outcome=client_gone}") == 1)
        wait_until(lambda: values(server)["aloud_requests_speaking"] == 0)
        after = values(server)
    assert during["aloud_streams_running"] == during["aloud_requests_speaking"] == 1
    assert after["aloud_streams_running"] == after["aloud_streams_waiting"] == 0
    assert after["aloud_requests_total{outcome=finished}"] == 3
    assert after["aloud_time_to_first_audio_seconds_count"] == 4
    assert 0 < after["aloud_time_to_first_audio_seconds_sum"] < 60
    assert after["aloud_real_time_factor_count"] == 3
    assert 3 * 0.8 < after["aloud_audio_seconds_total"] < 3 * 0.8 + 20
    assert after["aloud_audio_underrun_seconds_total"] >= 0
    buckets = [value for name, value in after.items() if name.startswith("aloud_time_to_first_audio_seconds_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == 4


def test_no_label_is_a_clients(server: Running) -> None:
    with server.client() as client:
        for number in range(5):
            client.post("/v1/audio/speech", json=asked(voice=f"made-up-{number}", session_id=f"session-{number}"))
        text = client.get("/metrics").text
    assert "made-up" not in text
    assert "session-" not in text


def test_health(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with server.client() as client:
        assert client.get("/health/live").json() == {"status": "alive"}
        assert client.get("/health/ready").json() == {"status": "ready", "model": "small"}
        monkeypatch.setattr(server.engine, "_is_draining", True)
        assert_problem(client.get("/health/ready"), 503, "draining")
        refused = client.post("/v1/audio/speech", json=asked())
        assert_problem(refused, 503, "draining")
        assert refused.headers["retry-after"] == "5"
        assert client.get("/health/live").status_code == 200


def test_models(server: Running) -> None:
    with server.client() as client:
        (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "small"


def test_the_description_names_every_route(server: Running) -> None:
    with server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/audio/speech", "/v1/audio/voices", "/v1/sessions/{session_id}", "/health/ready"} <= set(paths)


def test_the_page_needs_nothing_from_elsewhere(server: Running) -> None:
    with server.client() as client:
        answer = client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"(?:src|href)\s*=|@import|https?://|url\(", answer.text)
    wanted = set(re.findall(r'\$\("([\w-]+)"\)', answer.text))
    there = set()

    class Ids(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            there.update(value for name, value in attributes if name == "id")

    Ids().feed(answer.text)
    assert wanted
    assert wanted <= there

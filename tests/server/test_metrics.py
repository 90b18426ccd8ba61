"""Metrics, health, models and the page."""

from __future__ import annotations

import html.parser
import json
import re
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aloud import Engine
from aloud.server.settings import Limits, Settings
from server.running import LONG, Running, asked, assert_problem, serving, wait_until

ROOT = Path(__file__).parents[2]


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


def test_the_real_time_factor_is_of_what_is_paced(engine: Engine) -> None:
    """And says so, wherever it is shown: an answer is held back, however fast it could be made."""
    with serving(engine, Settings(model="small", limits=Limits(lead_seconds=0.4))) as server:
        assert server.speech(input=LONG, max_seconds=2.4).status_code == 200
        wait_until(lambda: server.is_idle)
        assert values(server)["aloud_real_time_factor_sum"] > (2.4 - 0.4 - 0.2) / 2.4
        with server.client() as client:
            (described,) = re.findall("# HELP aloud_real_time_factor (.*)", client.get("/metrics").text)
        server.speech(input=LONG, max_seconds=2.4, pace="full")
        wait_until(lambda: server.is_idle)
        after = values(server)
        for name in ("real_time_factor", "time_to_first_audio_seconds"):
            assert after[f"aloud_{name}_count"] == 1, "nobody waits for the parts of a file"
        assert after["aloud_audio_seconds_total"] == pytest.approx(4.8)
    dashboard = json.loads((ROOT / "deploy" / "grafana.json").read_text(encoding="utf-8"))
    (panel,) = (panel for panel in dashboard["panels"] if "aloud_real_time_factor" in str(panel["targets"]))
    for said in (described, panel["description"]):
        assert "waiting included" in said
        assert "near 1" in said


def test_models(server: Running) -> None:
    with server.client() as client:
        (model,) = client.get("/v1/models").json()["data"]
        assert client.get("/v1/models/small").json() == model
        for other in ("large", "small/small", "../small", "%2fsmall", "Small"):
            assert_problem(client.get(f"/v1/models/{other}"), 404)
        assert_problem(client.get("/v1/models/sesame%2fcsm-1b"), 404, "model_not_found")
    assert model == {"id": "small", "object": "model", "created": model["created"], "owned_by": "aloud"}
    assert type(model["created"]) is int
    assert 0 <= time.time() - model["created"] < 3600


@pytest.mark.parametrize("path", ["owner/name", "owner%2Fname"])
def test_a_model_of_the_hub_has_a_slash(engine: Engine, path: str) -> None:
    with serving(engine, Settings(model="owner/name")) as server, server.client() as client:
        assert client.get(f"/v1/models/{path}").json()["id"] == "owner/name"


def test_a_model_is_named_by_its_folder(engine: Engine) -> None:
    """And not by where that is, which is nobody's business who asks for health without a key."""
    name = engine.runtime.name
    assert "/" not in name
    with serving(engine, Settings()) as server, server.client() as client:
        assert client.get("/health/ready").json() == {"status": "ready", "model": name}
        assert client.get("/v1/models").json()["data"][0]["id"] == name
        assert client.get(f"/v1/models/{name}").status_code == 200


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

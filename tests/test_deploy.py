"""What is deployed: every command, setting, path and metric in these files exists in the tree."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from aloud.cli import _parser
from aloud.engine_stats import EngineStats

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"


def instructions(text: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions, with lines that go on joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def images() -> dict[str, dict[str, str]]:
    """The last stage's ENTRYPOINT and CMD of each target."""
    found: dict[str, dict[str, str]] = {}
    for name, value in instructions((DEPLOY / "Dockerfile").read_text()):
        if name == "FROM":
            stage = found.setdefault(value.split(" AS ")[1], {})
        else:
            stage[name] = value
    return found


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_runs_a_command_that_there_is(target: str) -> None:
    image = images()[target]
    words = [*json.loads(image["ENTRYPOINT"]), *json.loads(image["CMD"])]
    assert words[0] == "aloud"
    parsed = _parser().parse_args(words[1:])
    assert (parsed.run.__name__, parsed.host, parsed.device) == (
        "_serve",
        "0.0.0.0",
        {"cpu": "cpu", "gpu": "cuda"}[target],
    )
    assert image["USER"] == "aloud"
    assert str(parsed.voices) in json.loads(image["VOLUME"])
    assert f":{image['EXPOSE']}/health/ready" in image["HEALTHCHECK"]


def test_an_image_copies_what_there_is_and_all_of_the_package() -> None:
    copied = set()
    for name, value in instructions((DEPLOY / "Dockerfile").read_text()):
        if name == "COPY" and not value.startswith("--from"):
            copied |= set(value.split()[:-1])
    assert [path for path in copied if not (ROOT / path).exists()] == []
    roots = re.search(r"ROOTS = (\{.*\})", (ROOT / "setup.py").read_text())
    assert roots is not None
    assert set(json.loads(roots[1]).values()) | {"csrc", "setup.py", "pyproject.toml"} <= copied


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_a_service_runs_an_image_with_settings_that_there_are(name: str) -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    service = compose["services"][name]
    assert service["build"]["target"] in images()
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    entry = json.loads(images()[service["build"]["target"]]["ENTRYPOINT"])
    parsed = _parser().parse_args([*entry[1:], *service["command"]])
    assert parsed.api_key_file == Path("/run/secrets") / service["secrets"][0]
    assert int(service["stop_grace_period"].removesuffix("s")) > parsed.drain_seconds
    assert service["ports"] == [f"127.0.0.1:8000:{parsed.port}"]
    assert service["read_only"]
    assert {volume.split(":")[0] for volume in service["volumes"]} == set(compose["volumes"])


def test_the_dashboard_shows_metrics_that_the_server_has() -> None:
    metrics = pytest.importorskip("aloud.server.metrics")
    from prometheus_client.parser import text_string_to_metric_families

    stats = {field.name: 0.0 for field in fields(EngineStats)}
    made = metrics.Metrics(SimpleNamespace(stats=lambda: SimpleNamespace(**stats)))
    made.requests.labels("finished").inc()
    exported = {
        sample.name for family in text_string_to_metric_families(made.text().decode()) for sample in family.samples
    }
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = {name for expression in asked for name in re.findall(r"aloud_\w+", expression)}
    assert shown <= exported
    # And the other way: what the server counts can be seen.
    ignored = {name for name in exported if name.endswith(("_created", "_sum", "_count"))}
    assert exported - ignored <= shown
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def ray_serve() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ray_serve", DEPLOY / "ray_serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ray_serve"] = module
    spec.loader.exec_module(module)
    return module


def test_ray_settings_are_read_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    serving = ray_serve().Serving.of({"max_streams": "8", "gpus": "0.5", "affinity": "false"})
    assert (serving.max_streams, serving.gpus, serving.affinity) == (8, 0.5, False)
    with pytest.raises(ValueError, match="There is no setting 'slots'"):
        ray_serve().Serving.of({"slots": "8"})

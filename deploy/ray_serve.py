"""The server as a Ray Serve application: the same routes, on as many replicas as there is speech to speak.

    pip install 'aloud[server]' 'ray[serve]>=2.54'
    serve run ray_serve:app model=sesame/csm-1b max_streams=64 max_replicas=4

- A replica takes as many requests as it has streams; a WebSocket is one for as long as it is open.
- Requests with the same `x-session-id` header go to the same replica: send the `session_id` there too. When that one
  is gone, another answers. With `sessions`, a folder that all machines share, it goes on from the last turn that was
  spoken or heard; without, rebuild the session with `PUT /v1/sessions/ID` from the last `GET /v1/sessions/ID`.
- A client that leaves cancels its speech; a replica that stops finishes what it speaks, for `drain_seconds`.

Whoever reaches Ray's own ports and dashboard can run anything there: let nobody else reach them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"


@dataclass(frozen=True)
class Serving:
    """What is served, and on how much."""

    model: str = "sesame/csm-1b"  # hub name or folder
    max_streams: int = 64  # of a replica
    min_replicas: int = 1
    max_replicas: int = 4
    gpus: float = 1.0  # of a replica
    cpus: float = 1.0
    device: str = "auto"
    api_key_file: str = ""  # a key a line; must be there on every machine
    voices: str = ""  # a folder that every machine shares
    sessions: str = ""  # likewise
    drain_seconds: float = 100.0
    affinity: bool = True  # sessions stay on their replica

    @classmethod
    def of(cls, arguments: dict[str, str]) -> Serving:
        """From a command line's `name=value`."""
        kinds = {field.name: type(field.default) for field in fields(cls)}
        unknown = sorted(set(arguments) - set(kinds))
        if unknown:
            raise ValueError(f"There is no setting {unknown[0]!r}. There are: {', '.join(kinds)}.")
        read: dict[type, Any] = {bool: _truth}
        return cls(**{name: read.get(kinds[name], kinds[name])(value) for name, value in arguments.items()})


def _truth(value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ValueError(f"A setting is true or false, got {value!r}.")
    return value.lower() == "true"


def app(arguments: dict[str, str]) -> Any:
    """What `serve run` asks for."""
    return application(Serving.of(arguments))


def application(serving: Serving) -> Any:
    """The Ray Serve application."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    def build() -> Any:
        """Make the engine and its routes, in the replica."""
        from aloud import Engine, Runtime
        from aloud.server.app import create_app
        from aloud.server.settings import Settings, read_keys

        keys = read_keys(Path(serving.api_key_file)) if serving.api_key_file else ()
        engine = Engine(Runtime.load(serving.model, device=serving.device, max_streams=serving.max_streams))
        voices, sessions = (Path(folder) if folder else None for folder in (serving.voices, serving.sessions))
        made = create_app(engine, Settings(keys=keys, voices=voices, sessions=sessions))
        made.state.engine = engine
        return made

    class Replica:
        """One engine."""

        def check_health(self) -> None:
            """Raise when the engine does not work any more; Ray then starts another replica."""
            self.app.state.engine.check_health()  # type: ignore[attr-defined]

        def __del__(self) -> None:
            self.app.state.engine.close()  # type: ignore[attr-defined]

    given: dict[str, Any] = {}
    if serving.affinity:
        given["request_router_config"] = RequestRouterConfig(request_router_class=ROUTER)
    deployment = serve.deployment(
        name="aloud",
        max_ongoing_requests=serving.max_streams,
        max_queued_requests=serving.max_streams,
        autoscaling_config=AutoscalingConfig(
            min_replicas=serving.min_replicas,
            max_replicas=serving.max_replicas,
            target_ongoing_requests=max(1.0, 0.7 * serving.max_streams),
        ),
        ray_actor_options={"num_gpus": serving.gpus, "num_cpus": serving.cpus},
        graceful_shutdown_timeout_s=serving.drain_seconds,
        health_check_period_s=10,
        **given,
    )
    return deployment(serve.ingress(build)(Replica)).bind()

"""vLLM's own OpenAI-compatible server as a Ray Serve application, one engine per replica.

A replica builds what ``vllm serve`` builds (engine client, FastAPI app, state) and Ray Serve calls
that app through ASGI. So routes, streams, errors, the API key and the plugin's fields are vLLM's.
Ray Serve gives one HTTP request to one replica: a request's branches never leave its engine.

``serve run deploy/ray/laptop.yaml`` starts it; the keys of ``args`` in that file are:

    vllm: options of ``vllm serve``, underscores or dashes, as in its own ``--config`` file
    metrics: ``port`` of each replica's ``/metrics`` (0: any free one; absent: none), and
        ``folder`` in which replicas list these ports for Prometheus' ``file_sd_configs``
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import serve

from deploy.ray.serve_options import cli_args

_KEYS = {"vllm", "metrics"}
_METRICS_KEYS = {"port", "folder"}

logger = logging.getLogger("ray.serve")


def to_flags(options: Mapping[str, Any]) -> list[str]:
    """Return options of ``vllm serve`` as its command line, dictionaries as JSON.

    Raises:
        ValueError: ``model`` is missing.

    """
    if "model" not in options:
        raise ValueError("`args.vllm` needs the key `model`: a folder or a name on the model hub")
    flags: list[str] = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, Mapping):
            flags += [f"--{name}", json.dumps(value)]
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags += [f"--{name}", str(value)]
    return flags


def parse(options: Mapping[str, Any]) -> Namespace:
    """Let vLLM parse and check options of ``vllm serve``.

    Raises:
        ValueError: vLLM knows no such option or refuses its value.

    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli = cli_args()
    try:
        args = cli.make_arg_parser(FlexibleArgumentParser()).parse_args(to_flags(options))
    except SystemExit as error:
        # argparse ends the process; a replica has to say why it cannot start.
        raise ValueError("vllm refuses an option of `args.vllm`; its log names it") from error
    cli.validate_parsed_serve_args(args)
    return args


@serve.deployment(name="engine")
@serve.ingress()
class Replica:
    """One engine and vLLM's app in front of it."""

    def __init__(self, options: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        self._options, self._metrics = options, metrics
        self._tasks: list[asyncio.Task[None]] = []

    async def __serve_build_asgi_app__(self) -> Any:
        """Start the engine; return vLLM's app (Ray Serve calls this once, after ``__init__``)."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.launcher import validate_api_server_args
        from vllm.plugins import load_general_plugins
        from vllm.reasoning import ReasoningParserManager
        from vllm.tool_parsers import ToolParserManager

        load_general_plugins()
        args = parse(self._options)
        if args.tool_parser_plugin:
            ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if args.reasoning_parser_plugin:
            ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        validate_api_server_args(args)
        # vLLM tells its engine process the cluster only where it chooses `spawn` by itself: where
        # somebody else did, the engine would start a Ray of its own, without the replica's GPUs.
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        self._client = build_async_engine_client(args)
        self._engine = await self._client.__aenter__()
        tasks = await self._engine.get_supported_tasks()
        app = build_app(args, tasks, self._engine.model_config)
        await init_app_state(self._engine, app.state, args, tasks)
        if "port" in self._metrics:
            self._serve_metrics(app)
        return named(app, serve.get_replica_context().replica_id.unique_id)

    async def check_health(self) -> None:
        """Raise when the engine is dead; Ray Serve then replaces this replica."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        """Stop the engine when Ray Serve takes the replica down."""
        for task in self._tasks:
            task.cancel()
        if hasattr(self, "_engine"):
            await self._client.__aexit__(None, None, None)

    def _serve_metrics(self, app: Callable[..., Awaitable[None]]) -> None:
        """Serve this replica's ``/metrics`` on a port of its own, and list it for Prometheus."""
        import uvicorn

        async def metrics_only(scope: Any, receive: Any, send: Any) -> None:
            known = scope["type"] == "http" and scope["path"].rstrip("/") == "/metrics"
            if known:
                await app(scope, receive, send)
            elif scope["type"] == "http":
                await send({"type": "http.response.start", "status": 404, "headers": []})
                await send({"type": "http.response.body", "body": b"only /metrics is here\n"})

        host = ray.util.get_node_ip_address()
        listener = socket.create_server((host, int(self._metrics["port"])))
        server = uvicorn.Server(uvicorn.Config(metrics_only, lifespan="off", log_config=None))
        server.capture_signals = suppress  # type: ignore[method-assign]  # not the main thread
        self._tasks.append(asyncio.create_task(server.serve(sockets=[listener])))
        if "folder" in self._metrics:
            target = f"{host}:{listener.getsockname()[1]}"
            replica = serve.get_replica_context().replica_tag
            list_target(Path(self._metrics["folder"]).expanduser(), target, replica)


def named(app: Callable[..., Awaitable[None]], name: str) -> Callable[..., Awaitable[None]]:
    """Return an app whose responses say, in the header ``x-replica``, who answered."""

    async def forward(scope: Any, receive: Any, send: Any) -> None:
        async def send_named(message: Any) -> None:
            if message["type"] == "http.response.start":
                header = (b"x-replica", name.encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        await app(scope, receive, send_named)

    return forward


def list_target(folder: Path, target: str, replica: str) -> None:
    """Write this process's target for ``file_sd_configs``; drop those of dead ones on this host."""
    folder.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    for old in folder.glob(f"{host}.*.json"):
        pid = int(old.name.split(".")[-2])
        if not Path(f"/proc/{pid}").exists():
            old.unlink(missing_ok=True)
    path = folder / f"{host}.{os.getpid()}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps([{"targets": [target], "labels": {"replica": replica}}]))
    part.replace(path)


def build(args: Mapping[str, Any]) -> serve.Application:
    """Return the application for the ``args`` of a Serve config file.

    Raises:
        ValueError: A key is unknown, or the model is missing.

    """
    metrics = args.get("metrics") or {}
    for name, given, known in (("args", args, _KEYS), ("args.metrics", metrics, _METRICS_KEYS)):
        if unknown := set(given) - known:
            raise ValueError(f"`{name}` has no key {sorted(unknown)}; it knows {sorted(known)}")
    options = {key.replace("-", "_"): value for key, value in (args.get("vllm") or {}).items()}
    to_flags(options)
    deployment = Replica
    if options.get("distributed_executor_backend") == "ray":
        # vLLM finds the placement group of the actor in which it starts, and puts a worker in each
        # bundle that has a GPU; the replica itself shares the first bundle and takes no GPU.
        size = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
        bundles = [{"CPU": 2, "GPU": 1}] + [{"CPU": 1, "GPU": 1}] * (size - 1)
        deployment = Replica.options(
            ray_actor_options={"num_cpus": 1, "num_gpus": 0},
            placement_group_bundles=bundles,
            placement_group_strategy="PACK",
        )
    return deployment.bind(options, dict(metrics))

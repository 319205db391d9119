"""vLLM with the plugin as a Ray Serve application: a replica is an OpenAI-compatible server.

A replica builds vLLM's own engine and vLLM's own HTTP application, so that streams, chat templates,
errors, `/metrics` and the plugin's fields are those of `vllm serve`. Ray picks a replica for each
HTTP request; all branches of a request live in that replica's engine and never leave it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ray import serve

REPLICA_HEADER = b"x-replica"
"""Response header that names the replica which answered."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def to_flags(options: dict[str, Any]) -> list[str]:
    """Return vLLM's command line for a mapping of its options.

    Args:
        options: Names as in `vllm serve`, with - or _; true and false stand for `--x` and `--no-x`,
            mappings and lists are sent as JSON.

    Raises:
        ValueError: An option has no value.

    """
    flags: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is None:
            raise ValueError(f"vllm.{name} has no value in the configuration: give one or drop it")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, (dict, list)):
            flags += [flag, json.dumps(value)]
        else:
            flags += [flag, str(value)]
    return flags


def parse(options: dict[str, Any]) -> Any:
    """Check vLLM's options as `vllm serve` does; return them parsed.

    Raises:
        ValueError: vLLM refuses them; its message is in the log above.

    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    try:
        args = parser.parse_args(to_flags(options))
    except SystemExit:  # argparse ends the process, which would end the replica without a word
        raise ValueError(f"vLLM refuses these options: {' '.join(to_flags(options))}") from None
    validate_parsed_serve_args(args)
    return args


async def forward(scope: Scope, receive: Receive, send: Send) -> None:
    """Hand a request to the server of the replica that runs this."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    context = serve.get_replica_context()
    name = context.replica_id.unique_id.encode()

    async def send_named(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (REPLICA_HEADER, name)]
        await send(message)

    await context.servable_object.server(scope, receive, send_named)


def make_forward() -> Any:
    """Return the application that Ray runs: Ray calls any function that it is given."""
    return forward


@serve.deployment
@serve.ingress(make_forward)
class Server:
    """One engine and its HTTP application."""

    async def __init__(self, options: dict[str, Any]) -> None:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
        from vllm.entrypoints.launchers.app import build_app
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        args = parse(options)
        self._client = build_async_engine_client(args)
        self.engine = await self._client.__aenter__()
        tasks = await self.engine.get_supported_tasks()
        self.server = build_app(args, tasks, self.engine.model_config)
        await init_app_state(self.engine, self.server.state, args, tasks)
        self._lifespan = self.server.router.lifespan_context(self.server)
        await self._lifespan.__aenter__()

    async def check_health(self) -> None:
        """Raise if the engine is dead: Ray then puts another replica in this one's place."""
        await self.engine.check_health()

    async def shutdown(self) -> None:
        """End the engine when Ray retires the replica; requests were drained before."""
        await self._lifespan.__aexit__(None, None, None)
        await asyncio.shield(self._client.__aexit__(None, None, None))

    async def __del__(self) -> None:
        await self.shutdown()


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application that `args` of a Serve configuration file describe.

    Args:
        args: `vllm`: options of `vllm serve`. `tensor_parallel_size` above 1 there gives each
            replica a placement group of as many GPUs, and vLLM's Ray executor. `env`: environment
            variables of the replicas.

    Raises:
        ValueError: The configuration lacks a model, or has a key that is not known.

    """
    if unknown := set(args) - {"vllm", "env", "num_cpus"}:
        raise ValueError(f"args: unknown key {min(unknown)!r}; allowed: env, num_cpus, vllm")
    options = dict(args.get("vllm") or {})
    if not options.get("model"):
        raise ValueError("args.vllm.model is missing: name a model, or its folder")
    env = {name: str(value) for name, value in (args.get("env") or {}).items()}
    actor: dict[str, Any] = {"runtime_env": {"env_vars": env}} if env else {}
    size = int(options.get("tensor_parallel_size", 1))
    cpus = args.get("num_cpus", 1)
    if size > 1:
        options.setdefault("distributed_executor_backend", "ray")
        # The replica itself needs no GPU: the engine's workers take one bundle each.
        bundles = [{"CPU": cpus}, *({"GPU": 1, "CPU": 1} for _ in range(size))]
        return Server.options(
            ray_actor_options={**actor, "num_cpus": cpus},
            placement_group_bundles=bundles,
            placement_group_strategy="PACK",
        ).bind(options)
    on_gpu = options.pop("on_gpu", True)
    gpus = {"num_gpus": 1} if on_gpu else {}
    return Server.options(ray_actor_options={**actor, "num_cpus": cpus, **gpus}).bind(options)

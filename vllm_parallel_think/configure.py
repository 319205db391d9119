"""Turning the plugin on inside vLLM's configuration, and refusing what it cannot serve."""

from __future__ import annotations

from dataclasses import replace

import vllm
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from .attention.thought_embeddings import check_file, shape_of
from .compat.logger import init_logger
from .compat.version import check_version
from .core.config.hogwild_profile import HogwildProfile
from .core.config.server_options import FLAG, ServerOptions
from .core.errors import OptionError
from .frontend import request_validation, response_summary, tokenwise
from .judge import settings as judge_settings
from .observability.metrics import export, refused_requests
from .settings import Settings, raw_options
from .validation import WAY_OUT, refuse_unsupported, workers_refusal

logger = init_logger(__name__)


DEFAULT_BLOCK_SIZES = {"cpu": 32, "cuda": 16}

_SCHEDULERS = {
    False: "vllm_parallel_think.scheduler.GroupScheduler",
    True: "vllm_parallel_think.scheduler.AsyncGroupScheduler",
}
_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_parallel_think.worker.cpu_worker.GroupCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_parallel_think.worker.gpu_worker.GroupCUDAWorker",
}


def configure(vllm_config: VllmConfig) -> None:
    """Set scheduler, worker and block size, if the operator turned the plugin on.

    vLLM runs this again in the engine process and after every copy of its configuration, so it
    accepts its own values.

    Raises:
        OptionError: The settings are wrong, or name something the plugin cannot serve.

    """
    raw = raw_options(vllm_config)
    if raw is None or vllm_config.model_config is None:
        return
    if vllm_config.model_config.runner_type == "draft":
        return  # a draft model's copy of a configuration that went through here already
    check_version(vllm.__version__)
    options = ServerOptions.parse(raw)
    settings = Settings.load(options)
    refuse_unsupported(vllm_config, options)
    if options.thought_embeddings is not None:
        check_file(options.thought_embeddings, shape_of(vllm_config))
    if options.judge is not None:
        judge = judge_settings.load(options.judge, vllm_config)
        judge_settings.refuse_other_vocabulary(vllm_config)
        settings = replace(settings, judge_threshold=judge.threshold)
    settings = replace(settings, no_workers=_prepare_workers(vllm_config, settings))
    _set_block_size(vllm_config, options)
    _set_classes(vllm_config)
    if current_platform.is_cuda():
        set_attention_backend(vllm_config)
    export.prepare()
    refused_requests.enable()
    request_validation.install(settings)
    response_summary.install()
    tokenwise.install()


def _prepare_workers(config: VllmConfig, settings: Settings) -> str | None:
    """Make a server whose default profile has workers fit for them; return what keeps others off.

    Raises:
        OptionError: The default profile has workers, and the server cannot run them.

    """
    default = settings.profiles.get(settings.default)
    if not isinstance(default, HogwildProfile):
        return workers_refusal(config)
    if config.scheduler_config.async_scheduling:
        logger.info("parallel_think: async scheduling is off, as %s has workers", default.name)
        config.scheduler_config.async_scheduling = False
    refusal = workers_refusal(config)
    if refusal is not None:
        raise OptionError(f"profile {default.name}: {refusal}, {WAY_OUT}")
    most = min(settings.options.max_paths, len(default.workers.names))
    if most < default.workers.num_workers:
        raise OptionError(
            f"profile {default.name} has {default.workers.num_workers} workers, {FLAG}: max_paths "
            f"allows {settings.options.max_paths}: raise it, {WAY_OUT}"
        )
    return None


def _set_block_size(config: VllmConfig, options: ServerOptions) -> None:
    cache = config.cache_config
    if cache.user_specified_block_size:
        if cache.block_size % 16:
            raise OptionError(
                f"--block-size {cache.block_size}: must be a multiple of 16, {WAY_OUT}"
            )
        return
    size = options.block_size or DEFAULT_BLOCK_SIZES[current_platform.device_type]
    if size % 16:
        raise OptionError(f"{FLAG}: block_size {size} must be a multiple of 16")
    cache.block_size = size
    # Without this vLLM puts its platform's own default back.
    cache.user_specified_block_size = True


def _set_classes(config: VllmConfig) -> None:
    scheduler, parallel = config.scheduler_config, config.parallel_config
    ours = _SCHEDULERS[bool(scheduler.async_scheduling)]
    if scheduler.scheduler_cls not in (None, *_SCHEDULERS.values()):
        raise OptionError(f"--scheduler-cls {scheduler.scheduler_cls}: drop it, {WAY_OUT}")
    scheduler.scheduler_cls = ours
    worker = parallel.worker_cls
    if worker not in (*_WORKERS, *_WORKERS.values()):
        raise OptionError(
            f"--worker-cls {worker}: parallel_think runs on the CPU and CUDA workers: "
            f"drop it, {WAY_OUT}"
        )
    parallel.worker_cls = _WORKERS.get(worker, worker)


def set_attention_backend(config: VllmConfig) -> None:
    """Choose FlashAttention, the CUDA backend that has our masks; vLLM prefers others on some GPUs.

    Raises:
        OptionError: The operator named another one.

    """
    attention = config.attention_config
    named = [attention.backend, *attention.backend_per_kind.values()]
    for backend in named:
        if backend not in (None, AttentionBackendEnum.FLASH_ATTN):
            raise OptionError(
                f"--attention-backend {backend.name}: parallel_think runs on FLASH_ATTN: drop it, "
                f"{WAY_OUT}"
            )
    attention.backend = AttentionBackendEnum.FLASH_ATTN

"""What each request says about the judge, and the same for the rows of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput

from .protected_tokens import StopStrings


@dataclass(frozen=True)
class JudgeRequest:
    """One request's part in lossy verification.

    Attributes:
        enabled: Whether anything may be accepted lossily.
        threshold: Least probability for the judge, 0 to leave that to the server.
        stop_ids: Tokens that end this request.
        grammar: Number of the profile whose tags it may write; 0 for none.
        stop_row: Row of its stop strings; 0 for none.

    """

    enabled: bool
    threshold: float
    stop_ids: tuple[int, ...]
    grammar: int
    stop_row: int = 0


@dataclass(frozen=True, eq=False)
class JudgeRequestBatch:
    """What a batch's requests say, in its order, on the device.

    Attributes:
        enabled: [B] bool.
        threshold: [B] float32.
        stop_ids: [B, S] int64, padded with -1.
        grammar: [B] int64.
        stop_row: [B] int64.

    """

    enabled: torch.Tensor
    threshold: torch.Tensor
    stop_ids: torch.Tensor
    grammar: torch.Tensor
    stop_row: torch.Tensor


class JudgeRequestTable:
    """What the requests in the worker say, by request id."""

    def __init__(self, grammars: Mapping[str, int], default: str, stops: StopStrings) -> None:
        """Start without requests.

        Args:
            grammars: Numbers of profiles.
            default: The profile of requests that name none, or ``off``.
            stops: Where stop strings have their rows.

        """
        self.stops = stops
        self._grammars = dict(grammars)
        self._default = default
        self._requests: dict[str, JudgeRequest] = {}

    def update(self, output: SchedulerOutput) -> None:
        """Add the requests that came and drop those that went."""
        for req_id in output.finished_req_ids:
            self._forget(req_id)
        for new in output.scheduled_new_reqs:
            if new.sampling_params is not None:
                self._forget(new.req_id)
                self._requests[new.req_id] = self._read(new.sampling_params)

    def _forget(self, req_id: str) -> None:
        request = self._requests.pop(req_id, None)
        if request is not None:
            self.stops.release(request.stop_row)

    def batch(self, req_ids: Sequence[str], device: torch.device) -> JudgeRequestBatch:
        """Return what a batch's requests say; two small copies, none of them waited for."""
        off = JudgeRequest(False, 0.0, (), 0)
        requests = [self._requests.get(req_id, off) for req_id in req_ids]
        width = max((len(request.stop_ids) for request in requests), default=0)
        numbers = torch.tensor(
            [
                [
                    *(request.enabled, request.grammar, request.stop_row),
                    *(*request.stop_ids, *[-1] * (width - len(request.stop_ids))),
                ]
                for request in requests
            ],
            dtype=torch.int64,
        ).reshape(len(requests), 3 + width)
        thresholds = torch.tensor([request.threshold for request in requests], dtype=torch.float32)
        if device.type == "cuda":
            numbers = numbers.pin_memory().to(device, non_blocking=True)
            thresholds = thresholds.pin_memory().to(device, non_blocking=True)
        return JudgeRequestBatch(
            enabled=numbers[:, 0] > 0,
            threshold=thresholds,
            stop_ids=numbers[:, 3:],
            grammar=numbers[:, 1],
            stop_row=numbers[:, 2],
        )

    def _read(self, params: SamplingParams) -> JudgeRequest:
        """Read a request's keys; the front end has checked them, other ways in are not trusted."""
        extra: Mapping[str, Any] = params.extra_args or {}
        threshold = extra.get("pt_judge_threshold", 0.0)
        if not isinstance(threshold, (int, float)):
            threshold = 1.0
        profile = extra.get("parallel_think", self._default)
        enabled = bool(extra.get("pt_judge", True)) and params.structured_outputs is None
        stops = [params.stop] if isinstance(params.stop, str) else params.stop or ()
        stop_row = self.stops.acquire(stops) if enabled else 0
        return JudgeRequest(
            # With more sets of stop strings in flight than rows, the last to come is not judged.
            enabled=enabled and stop_row is not None,
            threshold=float(threshold),
            stop_ids=tuple(sorted({*(params.stop_token_ids or ()), *params.all_stop_token_ids})),
            grammar=self._grammars.get(profile, 0) if isinstance(profile, str) else 0,
            stop_row=stop_row or 0,
        )

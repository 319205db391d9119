"""Sampled tokens on their way into groups, one at a time, so that a branch ends at its tag."""

from __future__ import annotations

from collections.abc import Callable

from vllm.v1.request import RequestStatus

from ..core.branch_graph import Kind, State
from ..core.interface import Cause, Verdict
from .fault_fence import fence
from .group_table import Branch

Update = Callable[[list[int]], tuple[list[int], bool]]
"""vLLM's own bookkeeping of sampled tokens: which ones count, and whether the request stopped."""


class TokenFeed:
    """Feeds what was sampled into groups, and ends requests where their branches end.

    Attributes:
        eos_tokens: End-of-sequence tokens of the model.

    """

    def __init__(self, eos_tokens: set[int]) -> None:
        self.eos_tokens = eos_tokens

    def take(
        self, branch: Branch, new_token_ids: list[int], is_stale: bool, update: Update
    ) -> tuple[list[int], bool]:
        """Take the tokens that a step sampled for a branch.

        Args:
            branch: Whose tokens they are.
            new_token_ids: The tokens.
            is_stale: Whether the request was preempted after the step was started.
            update: vLLM's own bookkeeping.

        Returns:
            The tokens that count, and whether the request ends.

        """
        status = branch.request.status
        with fence(branch.state):
            return self._feed(branch, new_token_ids, is_stale, update)
        # A request that counts as finished already would never be taken out of the queues.
        branch.request.status = status
        return [], False

    def _feed(
        self, branch: Branch, new_token_ids: list[int], is_stale: bool, update: Update
    ) -> tuple[list[int], bool]:
        request, node, group = branch.request, branch.node, branch.state.group
        kept: list[int] = []
        for token in new_token_ids:
            if node.state in (State.CLOSING, State.DONE) or node.kind is Kind.CLOSE:
                # The step was run for the K/V of its input; what it sampled is of no use.
                if is_stale:
                    return kept, False
                if node.state is not State.DONE:
                    group.end(node, Cause.CLOSED)
                request.status = RequestStatus.FINISHED_STOPPED
                return kept, True
            taken, stopped = update([token])
            if stopped and self._is_eos(branch, token):
                group.end(node, Cause.EOS)
                # Only the token that ends the whole answer belongs to it.
                return kept + (taken if group.finish is not None and not node.depth else []), True
            kept += taken
            verdict = group.feed(node, token)
            if verdict is Verdict.RETRACT:
                group.end(node, Cause.EOS)
                request.status = RequestStatus.FINISHED_STOPPED
                return kept[: len(kept) - len(taken)], True
            if stopped or verdict is Verdict.END:
                _end(branch, stopped)
                return kept, True
        return kept, False

    def _is_eos(self, branch: Branch, token: int) -> bool:
        """Whether a branch ended by an end-of-sequence token.

        vLLM keeps one such token apart and puts the others of the model's generation configuration
        among the client's stop tokens. In a path they all end the path, not the answer.
        """
        params = branch.request.sampling_params
        assert params is not None
        return branch.request.status == RequestStatus.FINISHED_STOPPED and (
            token == params.eos_token_id
            or (branch.node.depth > 0 and not params.ignore_eos and token in self.eos_tokens)
        )


def _end(branch: Branch, stopped: bool) -> None:
    """End a branch that vLLM stopped, or whose group asks for its end."""
    request, group = branch.request, branch.state.group
    if stopped:
        stop = request.stop_reason if isinstance(request.stop_reason, int) else None
        capped = request.status == RequestStatus.FINISHED_LENGTH_CAPPED
        group.end(branch.node, Cause.LENGTH if capped else Cause.STOP_TOKEN, stop)
        return
    group.end(branch.node, Cause.VERDICT)
    final = group.finish is not None and group.finish.reason == "length"
    request.status = (
        RequestStatus.FINISHED_LENGTH_CAPPED if final else RequestStatus.FINISHED_STOPPED
    )

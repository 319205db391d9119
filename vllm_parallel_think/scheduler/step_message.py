"""What the scheduler tells the worker process of groups whose workers see each other."""

from __future__ import annotations

from ..core.branch_graph import Node
from ..core.hogwild.cache_layout import ANSWER, Run
from ..core.hogwild.group import HogwildGroup
from ..scheduler_output import HogwildUpdate
from .group_table import GroupState
from .held_blocks import HeldBlocks


def update_of(family: GroupState, ledger: HeldBlocks) -> HogwildUpdate | None:
    """Return what moved in a group since it was last told, or ``None``."""
    group = family.group
    if not isinstance(group, HogwildGroup) or not group.branched or family.parked:
        return None
    if family.error is not None:  # fails at the end of this step; its K/V may be gone
        return None
    if family.moves_told == group.num_moves:
        return None

    def run(node: Node) -> Run:
        role = ANSWER if node is group.trunk else group.roles[node]
        ids = tuple(block.block_id for block in ledger.blocks(node))
        return Run(ids, len(node.tokens), role)

    first = min(family.history_told, group.num_unmoved)
    live = [
        (role, family.requests[node].request_id)
        for role, node in group.live.items()
        if node in family.requests
    ]
    update = HogwildUpdate(
        family.root.request_id,
        group.layout,
        run(group.trunk),
        first,
        tuple(run(node) for node in group.history[first:]),
        tuple((role, run(node)) for role, node in group.headers.items()),
        tuple(live),
    )
    family.moves_told = group.num_moves
    family.history_told = group.num_unmoved = len(group.history)
    return update


def end_of(family: GroupState) -> HogwildUpdate | None:
    """Return what tells that a group is over, or ``None`` if the worker process knows of none."""
    group = family.group
    if not isinstance(group, HogwildGroup) or not group.branched:
        return None
    return HogwildUpdate(family.root.request_id, group.layout, ended=True)

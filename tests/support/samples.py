"""Small answers in each grammar, as scripts for a player."""

from __future__ import annotations

from tests.support.repository import VISIBLE_OUTLINE as VISIBLE

MULTIVERSE = "<Parallel>\n<Goal>\n<Outline>\n1: p\n</Outline>\n<Outline>\n2: q\n</Outline>\n</Goal>"
NESTED = (
    " n\n<Parallel>\n<Goal>\n<Outline>\n1.1: a\n</Outline>\n<Outline>\n1.2: b\n</Outline>\n</Goal>"
)
NPR = "<guideline>\n<plan>1: p</plan>\n<plan>2: q</plan>\n</guideline>"
THREADS = "<Parallel>\n<Outlines>\n<Outline>1: p</Outline>\n<Outline>2: q</Outline>\n</Outlines>"

TOY = {
    "0.0": "a " + MULTIVERSE,
    "0.1/0.0": " p\n</Path>",
    "0.1/1.0": " q r s\n</Path>",
    "0.2": "c\n</Conclusion>\n</Parallel>\ntext",
}
"""Multiverse: two paths, the second one longer."""

DEEP = {
    "0.0": MULTIVERSE,
    "0.1/0.0": NESTED,
    "0.1/0.1/0.0": " x\n</Path>",
    "0.1/0.1/1.0": " y y y\n</Path>",
    "0.1/0.2": "i\n</Conclusion>\n</Parallel>\n</Path>",
    "0.1/1.0": " q\n</Path>",
    "0.2": "c\n</Conclusion>\n</Parallel>\n",
}
"""Multiverse: a block inside the first path."""

NPR_TOY = {
    "0.0": NPR,
    "0.1/0.0": " p p p\n</step>",
    "0.1/1.0": " q\n</step>",
    "0.2": "c\n</takeaway>\n\n4",
}

R1_TOY = {
    "0.0": "q a<Parallel>",
    "0.0/0.0": "\n p\n</Path>",
    "0.0/1.0": "\n r s t\n</Path>",
    "0.1": "c</Summary> end",
}

THREADS_TOY = {
    "0.0": "a" + THREADS,
    "0.0/0.0": " p</Thread>",
    "0.0/1.0": " q r</Thread>",
    "0.1": "</Parallel>\n e",
}

OUTLINE_TOY = {
    "0.0": " Apples\n2. Pears: sweet\n\n",
    "0.0/0.0": " one is red.\n",
    "0.0/1.0": " is green.\n",
    "0.1": " fruit.\n",
}

TOYS = {
    "multiverse": TOY,
    "npr": NPR_TOY,
    "parallel-r1": R1_TOY,
    "threadweaver": THREADS_TOY,
    VISIBLE: OUTLINE_TOY,
}

TEXTS = {
    "multiverse": TOY["0.0"] + "\n<Path>\n1: p\n</Path>\n<Path>\n2: q r s\n</Path>\n<Conclusion>\n"
    "c\n</Conclusion>\n</Parallel>\ntext",
    "npr": NPR_TOY["0.0"] + "\n<step>\n1: p p p\n</step>\n<step>\n2: q\n</step>\n<takeaway>\n"
    "c\n</takeaway>\n\n4",
    "parallel-r1": "q a<Parallel><Path>\n p\n</Path><Path>\n r s t\n</Path></Parallel>\n<Summary>"
    "c</Summary> end",
    "threadweaver": THREADS_TOY["0.0"] + "\n<Thread>\n1: p</Thread><Thread>\n2: q r</Thread>\n"
    "</Parallel>\n e",
    VISIBLE: "Short outline:\n1. Apples\n2. Pears: sweet\n\n\n"
    "**1. Apples**\n\nThis one is red.\n\n"
    "**2. Pears**\n\nThis is green.\n\nIn short, fruit.\n",
}
"""What the toys look like to a client."""

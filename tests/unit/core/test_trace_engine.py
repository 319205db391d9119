"""Whatever text came of a fork in the engine is read with the same forks and paths."""

from __future__ import annotations

import random

import pytest

from tests.support.player import Player
from tests.support.samples import MULTIVERSE, NESTED, NPR, THREADS, VISIBLE
from tests.support.vocabularies import ALL
from vllm_parallel_think.core.config.loading import builtin_profiles, load_profile
from vllm_parallel_think.core.config.profile import Profile
from vllm_parallel_think.core.trace import trace
from vllm_parallel_think.core.trace.heads import Tags

OUTLINES = {
    "multiverse": (MULTIVERSE, MULTIVERSE.replace("</Outline>\n", ""), NESTED),
    "npr": (NPR, NPR.replace("</plan>", "")),
    "parallel-r1": ("<Parallel>",),
    "threadweaver": (THREADS, THREADS.replace("</Outline>", "")),
    "skeleton": ("So:\n\n", "Well.\n\n"),
    "visible-outline": (" Apples\n2. Pears: sweet\n\n", " Apples\n2. Pears", " A\n2. B\n3. C\n"),
}
DRAFT = {"0.1": "1. Apples: x", "0.2": " Pears\n", "0.3": "no"}
PROFILES = [
    loaded
    for name in (*builtin_profiles(), VISIBLE)
    if isinstance(loaded := load_profile(name), Profile)
]


class Babble(dict[str, list[str]]):
    """Scripts of branches, made up when a branch starts: words, stray tags, whole outlines."""

    def __init__(self, profile: Profile, rng: random.Random) -> None:
        super().__init__()
        self._profile, self._rng = profile, rng
        self._outlines = OUTLINES.get(profile.name, ())
        self._tags = sorted(Tags(profile.fork, profile.path, profile.join).all) or ["**", "1. "]
        self._share = rng.choice([0, 0.1, 0.3])

    def get(self, address: str, default: object = "") -> list[str]:  # type: ignore[override]
        if address not in self:
            self[address] = self._made_up(address)
        return self[address]

    def _made_up(self, address: str) -> list[str]:
        rng, parts = self._rng, list[str]()
        if self._profile.outline is not None and address in DRAFT:
            return [DRAFT[address]]
        for _ in range(rng.randrange(8)):
            draw = rng.random()
            if draw < 0.5:
                parts.append(rng.choice([" w", " x", "\n", " 7"]))
            elif draw < 0.5 + self._share:
                parts.append(rng.choice(self._tags))
            elif draw < 0.6 + self._share and self._outlines:
                parts.append(rng.choice(self._outlines))
        if address == "0.0" and self._outlines:
            first = self._profile.opening or rng.random() < 0.5
            parts.insert(0 if first else len(parts), rng.choice(self._outlines))
        elif "/" in address and self._profile.path.end:
            parts.append(rng.choice([*map(str, self._profile.path.end), ""]))
        return parts


@pytest.mark.parametrize("vocabulary", ALL)
@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_texts_of_forks_are_read_with_the_same_forks_and_paths(profile, vocabulary):
    num_forked = 0
    for seed in range(40):
        rng = random.Random(f"{profile.name} {vocabulary.__name__} {seed}")
        player = Player(profile, Babble(profile, rng), vocabulary=vocabulary()).run()
        if not player.summary["forks"]:
            continue
        num_forked += 1
        found = trace(player.text, profile, player.vocabulary).summary
        for key in ("forks", "paths", "widest_fork", "depth"):
            assert found[key] == player.summary[key], (key, player.text)
    assert num_forked > 30

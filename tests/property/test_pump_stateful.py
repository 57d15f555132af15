# SPDX-License-Identifier: Apache-2.0
"""In any order of deeds of guest and back, the pump does as a model does.

Two rings share one small pool. Each guest offers random chains; each back takes them,
and completes them in any order; rings stop and start at any point. The model is in
tests/support/model.py. Of the invariants it shows, with every step that is made:

- I1: in isolated memory changes only what belongs to a chain that is offered: what the
  back may read is the guest's, what it may write is zero.
- I3: chains come out once, or are in flight, or are the guest's again after a stop.
- I4: bytes arrive, and chains keep their order.
- I5, I8: in guest memory changes only what a completed chain let the back write, and
  the used ring; after a stop, nothing.
- Each page that changed is marked at the VMM's next look at its dirty log, and no page
  is that the pump had no cause to write.
- I7: what a request leaves in isolated memory is never seen by another one.
"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.support.dirty import LogFile
from tests.support.model import ENTRIES, RINGS_AT, Model, Plane
from tests.support.plane import MIB, Lane
from tests.support.profiles import PROFILE

REGIONS = (37, 91, 128)
"""Pages of the guest's adjacent regions: many a buffer lies over two of them."""

LENGTHS = (0, 1, 7, 16, 63, 64, 65, 300, 511, 512, 513, 2000, 4095, 4096, 4097, 9000)
OFFSETS = (None, None, 0, 1, 511, 2048, 4090)
SIZES = (1, 2, 4, 16, 1024)
BASES = (0, 1, 0x7FFE, 0xFFF0, 0xFFFE, 0xFFFF)
POLICIES = ("full", "used", "used+tail")
WINDOWS = (0, 1, 3, 16, 1 << 30)
POOLS = ((4,), (7,), (8,), (16, 16), (64,))

LOGGED = RINGS_AT + (1 << 32) + MIB
"""Where the memory of the second ring, which is the last, has ended for sure."""

ring = st.integers(0, 1)
buffers = st.lists(
    st.tuples(st.sampled_from(LENGTHS), st.sampled_from(OFFSETS)),
    min_size=1,
    max_size=ENTRIES,
)


class PumpMachine(RuleBasedStateMachine):
    plane: Plane

    @property
    def models(self) -> list[Model]:
        return self.plane.models

    @initialize(
        seed=st.integers(0, 2**32),
        pool=st.sampled_from(POOLS),
        rings=st.lists(
            st.tuples(
                st.sampled_from(SIZES),
                st.sampled_from(BASES),
                st.sampled_from(POLICIES),
                st.lists(st.booleans(), min_size=5, max_size=5),
            ),
            min_size=2,
            max_size=2,
        ),
    )
    def begin(self, seed, pool, rings) -> None:
        self.plane = Plane(Random(seed), pool=pool, regions=REGIONS)
        for size, base, policy, flags in rings:
            lane = Lane(
                self.plane.world,
                size=size,
                base=base,
                policy=policy,
                guest_event_idx=flags[0],
                guest_indirect=flags[1],
                back_event_idx=flags[2],
                back_indirect=flags[3],
                whole_batches=flags[4],
                entries=ENTRIES,
                most=max(SIZES),
            )
            self.models.append(Model(self.plane, lane, policy))

    # Few rules, each with many ways, since a run leaves whole rules out at times.

    @rule(
        i=ring,
        lengths=buffers,
        readable=st.integers(0, ENTRIES),
        form=st.sampled_from(["direct", "indirect", "both"]),
        times=st.sampled_from([1, 2, 3, 5, 40]),
        then=st.sampled_from(["nothing", "step", "step", "rest"]),
    )
    def guest_offers(self, i, lengths, readable, form, times, then) -> None:
        model = self.models[i]
        for _ in range(times):
            model.offer(lengths, readable, form)
        if then == "step":
            model.step(256)
        elif then == "rest":
            model.rest()

    @rule(i=ring, way=st.sampled_from(["reaps", "waits", "looks"]))
    def guest(self, i, way) -> None:
        model = self.models[i]
        {
            "reaps": model.reap,
            "waits": model.guest_waits,
            "looks": model.guest_looks,
        }[way]()

    @rule(
        i=ring,
        budget=st.sampled_from([256, 256, 7, 2, 1]),
        then=st.sampled_from(["nothing", "rest", "till it rests"]),
        window=st.sampled_from([None, None, *WINDOWS]),
    )
    def pump(self, i, budget, then, window) -> None:
        """`window`: the pages that the ring may have in flight from now on."""
        model = self.models[i]
        if window is not None:
            model.set_window(window)
        while model.step(budget) and then == "till it rests":
            pass
        if then != "nothing":
            model.rest()

    @rule(
        i=ring,
        takes=st.sampled_from([0, 1, 2, 1000]),
        finishes=st.sampled_from([0, 1, 1, 3, 40]),
        which=st.integers(0, 1000),
        wrote=st.sampled_from([0, 1, 600, 5000, 1 << 20]),
        said=st.sampled_from([None, 0, 1, 513, 5000, 1 << 20, 0xFFFFFFFF]),
        then=st.sampled_from(["nothing", "step", "waits", "looks"]),
    )
    def back(self, i, takes, finishes, which, wrote, said, then) -> None:
        """Take chains; complete some in any order, and what a stop left behind too."""
        model = self.models[i]
        model.take(takes)
        for step in range(finishes):
            held = model.with_back()
            request = held[(which + 7 * step) % len(held)] if held else None
            if request is not None and model.can_finish(request):
                length = min(wrote, request.room) if said is None else said
                model.finish(request, wrote, length)
        if then == "step":
            model.step(256)
        elif then == "waits" and model.running:
            model.back_waits()
        elif then == "looks" and model.running:
            model.back_looks()

    @rule(i=ring, beyond=st.sampled_from([0, 1, 0x10000, 0x7FFFFFFF]))
    def back_lies(self, i, beyond) -> None:
        model = self.models[i]
        if model.running and model.bad < model.lane.size > len(model.finished):
            model.finish_bad(max(SIZES) + beyond)

    @rule(
        i=ring,
        says=st.sampled_from(["truth", "truth", "nothing", "all", "less", "rubbish"]),
        way=st.sampled_from(["stays", "on", "on", "skip", "reset", "reset"]),
        base=st.sampled_from((None, *BASES)),
        size=st.sampled_from((None, *SIZES)),
    )
    def stop(self, i, says, way, base, size) -> None:
        """Stop and start, or start what was left stopped; at the same base if None."""
        model = self.models[i]
        if model.running:
            fetched = model.offered - len(model.visible)
            model.stop(
                {
                    "truth": fetched & 0xFFFF,
                    "nothing": None,
                    "all": model.offered & 0xFFFF,
                    "less": (fetched - 1) & 0xFFFF,
                    "rubbish": (model.offered + 0x4000) & 0xFFFF,
                }[says]
            )
        if way == "stays":
            model.look_back()
        elif way == "reset":
            if base is None:
                base, _, _ = model.stopped_at
            model.start_anew(base, size or model.lane.size)
        else:
            model.start(skip=way == "skip")

    @rule(i=ring, which=st.integers(0, 1000))
    def guest_rewrites(self, i, which) -> None:
        """The guest changes what a chain has to say that it has offered already."""
        model = self.models[i]
        if model.pending:
            model.rewrite(model.pending[which % len(model.pending)])

    @rule(
        way=st.sampled_from(["looks", "looks", "looks", "has another", "has none"]),
        offset=st.sampled_from([0, 0, 8, 3]),
    )
    def vmm(self, way, offset) -> None:
        """The VMM looks at its dirty log, has another one, or wants none any more."""
        if way == "looks":
            self.plane.look_at_log()
        elif way == "has none":
            self.plane.log_into(None)
        else:
            self.plane.log_into(LogFile.up_to(LOGGED, offset))

    @rule()
    def settle(self) -> None:
        """If everybody does their part, all that was offered comes out."""
        for model in self.models:
            if not model.running:
                model.start()
        self.plane.settle()

    def teardown(self) -> None:
        if hasattr(self, "plane"):
            self.plane.log_into(None)


def stroll(seed: int, steps: int) -> None:
    """The same, by dice and with everything in it, where examples leave things out."""
    chance = Random(seed)
    some = chance.choice
    machine = PumpMachine()
    machine.begin(
        seed,
        some(POOLS),
        [
            (some(SIZES), some(BASES), some(POLICIES), [some([0, 1]) for _ in range(5)])
            for _ in range(2)
        ],
    )
    for _ in range(steps):
        i = chance.randrange(2)
        match some("oooppppbbbbggwlsvS"):
            case "o":
                count = chance.randint(1, ENTRIES)
                lengths = [(some(LENGTHS), some(OFFSETS)) for _ in range(count)]
                readable = chance.randint(0, ENTRIES)
                form = some(["direct", "indirect", "both"])
                times = some([1, 2, 3, 40])
                machine.guest_offers(i, lengths, readable, form, times, "nothing")
            case "p":
                then = some(["nothing", "rest", "till it rests"])
                window = some([*WINDOWS, *[None] * 5])
                machine.pump(i, some([256, 256, 7, 1]), then, window)
            case "b":
                wrote, said = some([0, 1, 600, 1 << 20]), some([None, 0, 600, 1 << 20])
                then = some(["nothing", "nothing", "waits", "looks"])
                which = chance.randrange(1000)
                takes, finishes = some([0, 1, 2, 1000]), some([0, 1, 3, 40])
                machine.back(i, takes, finishes, which, wrote, said, then)
            case "g":
                machine.guest(i, some(["reaps", "waits", "looks"]))
            case "w":
                machine.models[i].rest()
            case "l":
                if chance.random() < 0.2:
                    machine.back_lies(i, some([0, 0x10000]))
            case "s":
                says = some(["truth", "truth", "nothing", "all", "less", "rubbish"])
                way = some(["stays", "on", "on", "on", "skip", "reset"])
                base, size = some([*BASES, *[None] * 6]), some([*SIZES, *[None] * 5])
                machine.stop(i, says, way, base, size)
            case "r":
                if chance.random() < 0.2:
                    machine.guest_rewrites(i, chance.randrange(1000))
            case "v":
                way = some(["looks", "looks", "has another", "has none"])
                machine.vmm(way, some([0, 8, 3]))
            case "S":
                if chance.random() < 0.2:
                    machine.settle()
    machine.settle()
    machine.teardown()


@pytest.mark.timeout(0)
@settings(PROFILE, max_examples=PROFILE.max_examples // 10)
@given(seed=st.integers(0, 2**64 - 1))
def test_pump_in_any_traffic(seed):
    stroll(seed, 500)


TestPump = pytest.mark.timeout(0)(PumpMachine.TestCase)
TestPump.settings = PROFILE

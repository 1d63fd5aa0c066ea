"""What `doctor` makes of facts: each finding from facts that have it, none from facts that do not."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_dist.frontend.doctor import examination
from llama_dist.frontend.doctor.facts import Facts, Identity, Link, Look, Reading, Sight, Speed, name_ranks, spans
from llama_dist.frontend.doctor.findings import DOING
from llama_dist.frontend.doctor.links import MOST_LINES, blame
from llama_dist.frontend.doctor.report import find, report
from llama_dist.frontend.numbers import show_time
from llama_dist.frontend.options import DoctorOptions
from llama_dist.parallel.probe import SIZES, rounds

STAMPS = (("config.json", 10, 1, 5, 6), ("model.safetensors", 2000, 2, 5, 6))
LOOK = Look("safetensors", 2000, "nfs4 server:/x", STAMPS, {"config.json": "aa", "model.safetensors": "bb"})
VERSIONS = {"llama_dist": "0.1.0 (ab)", "torch": "2.13.0", "Python": "3.11.7", "CUDA": "none"}


def who(rank: int, host: str) -> Identity:
    return Identity(host, 100 + rank, f"boot-{host}/1", 6, f"10.0.0.{rank}", VERSIONS, "cpu", "a CPU", None, None, 8, 4)


def healthy(hosts: str = "aabbcc") -> Facts:
    """A rank for each letter, which is its host; two copies of the model."""
    facts, n = Facts(len(hosts), -(-len(hosts) // 2), "torchrun", 20.0), len(hosts)
    facts.who = {rank: dataclasses.replace(who(rank, host), size=n) for rank, host in enumerate(hosts)}
    facts.addresses = {rank: f"10.0.0.{rank}" for rank in range(n)}
    facts.clocks = {rank: (0.0003 * rank, 0.0001) for rank in range(n)}
    facts.kernels = dict.fromkeys(range(n), "C++ kernels 12 (avx512)")
    facts.speeds = {rank: Speed(0.01 + 0.001 * rank, 0.02) for rank in range(n)}
    facts.looks = dict.fromkeys(range(n), LOOK)
    facts.output = "/out/o.jsonl"
    facts.sights = {rank: Sight(True, True, True, "nfs4 server:/out") for rank in range(n)}
    facts.readings = {hosts.index(host): Reading(2**29, 0.5, 0.1) for host in sorted(set(hosts))}
    facts.backend = "gloo"
    facts.links = [
        Link(a, b, 2e-5, 3e9) if hosts[a] == hosts[b] else Link(a, b, 1e-4, 1.1e9) for a, b in combinations(range(n), 2)
    ]
    facts.reductions = {rank: [(size, 1e-4 + size / 1e9) for size in SIZES] for rank in range(n)}
    return facts


def wrong(facts: Facts) -> list[tuple[str, tuple[int, ...], str]]:
    return [(f.kind, f.ranks, f.text) for f in find(facts) if f.wrong]


def only(facts: Facts, kind: str, ranks: tuple[int, ...]) -> str:
    """The text of the one thing that is wrong."""
    found = wrong(facts)
    assert [(k, r) for k, r, _ in found] == [(kind, ranks)], found
    assert "\n" not in found[0][2]
    return found[0][2]


@pytest.mark.parametrize("hosts", ["a", "aa", "ab", "aabb", "aabbcc", "abc"])
def test_nothing_is_wrong_where_all_is_well(hosts: str) -> None:
    assert find(healthy(hosts)) == []


# ---- ranks


def test_every_step_has_its_words() -> None:
    source = Path(examination.__file__).read_text()
    steps = set(re.findall(r'self\.share\(\s*"(\w+)"', source))
    assert {"here", "listen", "mesh", "absent"} <= steps and steps - {"here"} <= DOING.keys()


def test_missing_ranks_are_named_with_those_that_came() -> None:
    facts = Facts(6, 3, "srun", 20.0, who={rank: who(rank, host) for rank, host in enumerate("aabbcc")})
    for rank in (2, 3):
        del facts.who[rank]
        facts.absent[rank] = "here"
    text = only(facts, "missing", (2, 3))
    assert text.startswith("ranks 2-3 of 6 never came in 20 s; heard of ranks 0-1 (host a), ranks 4-5 (host c).")


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("gone", "rank 2 (host b, pid 102) died while connecting to the others"),
        ("stopped", "is stopped, since it was connecting to the others; kill -CONT 102"),
        ("blocked", "hangs in the kernel while connecting"),
        ("running", "came, and does not answer since"),
        (None, "came, and does not answer since"),
    ],
)
def test_a_silent_rank_is_described_as_the_kernel_sees_it(state: str | None, says: str) -> None:
    facts = healthy()
    facts.absent[2] = "connect"
    facts.states = {} if state is None else {2: state}
    assert says in only(facts, "silent", (2,))
    facts.late = [2]
    assert "came late to the step of connecting" in only(facts, "silent", (2,))


def test_exchanges_that_broke_off_are_told_unless_a_silent_rank_explains_them() -> None:
    facts = healthy()
    facts.errors["mesh"] = {0: "the exchange of ranks 0 and 2 failed", 1: "comparing times failed"}
    assert [(kind, ranks) for kind, ranks, _ in wrong(facts)] == [("failed", (0,)), ("failed", (1,))]
    facts.absent[2] = "mesh"
    assert "exchanging messages" in only(facts, "silent", (2,))


def test_kernels_that_are_not_compiled_yet_are_no_fault() -> None:
    facts = healthy()
    facts.errors["kernels"] = {1: "no end of it in 12 s"}
    (note,) = find(facts)
    assert not note.wrong and note.text == "rank 1 (host a), compiling the C++ kernels: no end of it in 12 s"


def test_whoever_differs_from_most_is_named() -> None:
    facts = healthy()
    for rank in (4, 5):
        facts.who[rank] = dataclasses.replace(facts.who[rank], versions={**VERSIONS, "torch": "2.12.1"})
    assert "ranks 4-5 (host c) have torch 2.12.1, the others 2.13.0; install" in only(facts, "differs", (4, 5))

    facts = healthy("ab")
    facts.kernels[1] = "C++ kernels 12 (avx2)"
    assert "rank 1 (host b) has kernels C++ kernels 12 (avx2), the others C++" in only(facts, "differs", (1,))

    facts = healthy("ab")
    facts.who[1] = dataclasses.replace(facts.who[1], size=3)
    assert "rank 1 (host b) has world size 3, the others 2" in only(facts, "differs", (1,))

    facts = healthy("ab")
    facts.who[1] = dataclasses.replace(facts.who[1], device_name="another CPU")
    (note,) = find(facts)
    assert not note.wrong and "has processor or GPU another CPU, the others a CPU" in note.text


def test_gpus_that_are_shared_or_not_there() -> None:
    facts = healthy("aab")
    for rank, name in enumerate(("GPU-1", "GPU-1", "GPU-1")):  # of another host it is another one
        facts.who[rank] = dataclasses.replace(facts.who[rank], device="cuda", device_id=name)
    assert "ranks 0-1 (host a) share one GPU" in only(facts, "device", (0, 1))

    facts = healthy("ab")
    facts.who[1] = dataclasses.replace(facts.who[1], device_error="--device cuda, but torch finds no CUDA device here")
    assert only(facts, "device", (1,)).startswith("rank 1 (host b): --device cuda")


@pytest.mark.parametrize(("offset", "error", "named"), [(1.5, 0.1, True), (-1.5, 0.1, True), (0.9, 0.1, False)])
def test_a_clock_matters_beyond_a_second(offset: float, error: float, named: bool) -> None:
    facts = healthy()
    facts.clocks[2] = facts.clocks[3] = (offset, error)
    if named:
        assert f"host b is 1.50 s {'ahead of' if offset > 0 else 'behind'} that of host a (± 100 ms)" in only(
            facts, "clock", (2,)
        )
    else:
        assert wrong(facts) == []


def test_the_rank_that_was_asked_fastest_tells_its_host_s_time() -> None:
    """One that answered slowly knows less: its time may be off by as much."""
    facts = healthy()
    facts.clocks[2], facts.clocks[3] = (3.0, 4.0), (0.0, 0.0001)
    assert wrong(facts) == []
    facts.clocks[3] = (3.0, 2.5)  # 0.5 s or more
    assert wrong(facts) == []


def test_slow_ranks_are_those_slower_than_their_like() -> None:
    facts = healthy()
    facts.speeds[4], facts.speeds[5] = Speed(0.05, 0.02), Speed(0.04, 0.02)
    assert "ranks 4-5 (host c) are slow: a fixed product takes 50.0 ms, 4.2 times the median" in only(
        facts, "slow", (4, 5)
    )
    for rank in (4, 5):
        facts.who[rank] = dataclasses.replace(facts.who[rank], device_name="an old CPU")
    assert wrong(facts) == []
    facts.speeds[0] = Speed(0.01, 0.2)
    assert "rank 0 (host a) is slow: a fixed copy in memory" in only(facts, "slow", (0,))


# ---- links


@given(st.integers(0, 40))
def test_rounds_hold_every_pair_once(n: int) -> None:
    found = list(rounds(n))
    assert sorted(pair for pairs in found for pair in pairs) == list(combinations(range(n), 2))
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in found)
    assert len(found) <= n


@given(st.text("abc", min_size=2, max_size=9), st.data())
def test_every_bad_pair_is_blamed_on_something_that_has_it(letters: str, data: st.DataObject) -> None:
    hosts = dict(enumerate(letters))
    pairs = list(combinations(range(len(letters)), 2))
    bad = data.draw(st.sets(st.sampled_from(pairs)))
    found = blame(bad, pairs, hosts)
    assert sorted(pair for what in found for pair in what.pairs) == sorted(bad)
    for what in found:
        for a, b in what.pairs:
            names = {"rank": {str(a), str(b)}, "pair": {str(a), str(b)}}.get(what.kind, {hosts[a], hosts[b]})
            assert names.issuperset(what.who)


@pytest.mark.parametrize(
    ("letters", "bad", "kind", "guilty"),
    [
        ("aabbcc", lambda a, b: "c" in (a[0], b[0]) and a[0] != b[0], "host", "host c and every other host"),
        ("aabbcc", lambda a, b: {a[0], b[0]} == {"a", "c"}, "hosts", "hosts a and c"),
        ("abc", lambda a, b: "b" in (a[0], b[0]), "host", "host b and every other host"),
        ("ab", lambda a, b: True, "hosts", "hosts a and b"),
        ("aaaa", lambda a, b: 2 in (a[1], b[1]), "rank", "rank 2 (host a) and every other rank"),
        ("aaaa", lambda a, b: {a[1], b[1]} == {1, 3}, "pair", "rank 1 (host a) and rank 3 (host a)"),
    ],
)
def test_what_bad_pairs_have_in_common(letters: str, bad, kind: str, guilty: str) -> None:  # type: ignore[no-untyped-def]
    """Slow or without a connection, they are named alike. Good pairs are a third only where host c of three is bad."""
    facts, hosts = healthy(letters), dict(enumerate(letters))
    spoilt = {(a, b) for a, b in combinations(range(len(letters)), 2) if bad((hosts[a], a), (hosts[b], b))}
    assert [what.kind for what in blame(spoilt, [(x.a, x.b) for x in facts.links], hosts)] == [kind]
    facts.links = [
        dataclasses.replace(x, latency=0.05, bandwidth=1.1e8) if (x.a, x.b) in spoilt else x for x in facts.links
    ]
    (found,) = wrong(facts)
    assert found[0] == "slow link" and f"slow between {guilty}: 50.0 ms one way, 110 MB/s" in found[2]
    assert ("of good ones" in found[2]) == (letters != "ab")

    facts = healthy(letters)
    facts.unreached = {(b, a): "Connection refused" for a, b in spoilt}
    (found,) = wrong(facts)
    a, b = sorted(spoilt)[0]
    assert found[0] == "unconnected" and f"no connection between {guilty} (rank " in found[2]
    assert f"rank {b} cannot connect to rank {a} at 10.0.0.{a}: Connection refused" in found[2]


def test_a_slow_link_is_slow_among_its_like_or_for_any_run() -> None:
    """Pairs between hosts are slower than those within one, which is no finding. Gigabit Ethernet is one among 10."""
    facts = healthy("abc")
    facts.links = [dataclasses.replace(x, bandwidth=1.1e8) if x.b == 2 else x for x in facts.links]
    assert "host c and every other host" in wrong(facts)[0][2]
    facts.links = [dataclasses.replace(x, bandwidth=1.1e8) for x in facts.links]
    assert wrong(facts) == []
    facts.links = [dataclasses.replace(x, bandwidth=1.1e7) for x in facts.links]
    assert [kind for kind, _, _ in wrong(facts)] == ["slow link"] * 3


def test_many_bad_pairs_are_cut_short() -> None:
    facts = healthy("a" * 16)
    facts.links = [dataclasses.replace(x, latency=1.0) if x.a % 2 == 0 and x.b == x.a + 1 else x for x in facts.links]
    assert len(wrong(facts)) == 8 <= MOST_LINES
    facts.links = [dataclasses.replace(x, latency=1.0) if x.b == x.a + 1 else x for x in healthy("a" * 16).links]
    assert len(wrong(facts)) == MOST_LINES + 1 and wrong(facts)[-1][2].startswith("and 7 more slow pairs")


def test_pairs_without_a_time_are_counted() -> None:
    facts = healthy("abcd")
    facts.links = [x for x in facts.links if (x.a, x.b) != (1, 3)]
    (note,) = find(facts)
    assert not note.wrong and note.text.startswith("1 of 6 pairs were not timed")


# ---- files


def test_one_folder_copies_and_different_checkpoints() -> None:
    facts = healthy()
    options = DoctorOptions(ckpt_dir="/model", output_file="/out/o.jsonl")
    assert "checkpoint /model: safetensors, 2.00 KB, one folder that 3 hosts share (nfs4 server" in report(
        facts, options
    )

    copied = dataclasses.replace(LOOK, stamps=tuple((*s[:3], s[3], 99) for s in STAMPS), mount="ext4 /dev/sda")
    facts.looks[4] = facts.looks[5] = copied
    assert wrong(facts) == []
    assert "2 copies alike: ranks 0-1 (host a), ranks 2-3 (host b) (nfs4 server:/x); ranks 4-5" in report(
        facts, options
    )

    for stamps, digest, says in (
        (STAMPS, "cc", "model.safetensors has other content there"),
        ((STAMPS[0], ("model.safetensors", 7, 2, 5, 6)), "cc", "model.safetensors has 7 bytes there, not 2000"),
    ):
        digests = {**LOOK.digests, "model.safetensors": digest}
        facts.looks[4] = facts.looks[5] = dataclasses.replace(copied, stamps=stamps, digests=digests)
        assert f"ranks 4-5 (host c) see another checkpoint than the others: {says}" in only(facts, "checkpoint", (4, 5))
    facts.looks[4] = facts.looks[5] = dataclasses.replace(
        copied, stamps=STAMPS[:1], digests={"config.json": LOOK.digests["config.json"]}
    )
    assert "model.safetensors is not there" in only(facts, "checkpoint", (4, 5))
    assert "checkpoint /model" not in report(facts, options)


def test_the_output_s_folder() -> None:
    """Ranks 0 and 3 write: the first of each copy of the model."""
    facts = healthy()
    facts.sights[4] = Sight(True, False, True, "ext4")
    (note,) = find(facts)
    assert not note.wrong and "rank 4 (host c) has one of that name, not the same; rank 0 alone writes" in note.text
    facts.sights[3] = Sight(False, False, False, "ext4")
    assert "every replica writes there: put it on a shared disk" in only(facts, "output", (3, 4))
    facts = healthy()
    facts.sights[2] = facts.sights[3] = Sight(True, True, False, "nfs4")
    assert "rank 3 (host b) may not write into the folder of /out/o.jsonl" in only(facts, "output", (3,))


@pytest.mark.parametrize(
    ("reading", "named"),
    [
        (Reading(2**28, 2.0, 0.0), True),
        (Reading(2**28, 2.0, 0.9), False),  # what little was read from the disk tells nothing
        (Reading(2**28, 2.0, None), False),
        (Reading(2**20, 1.0, 0.0), False),
        (Reading(2**28, 0.3, 0.0), False),
    ],
)
def test_a_host_that_reads_slowly(reading: Reading, named: bool) -> None:
    facts = healthy()
    facts.readings[2] = reading
    if named:
        assert "host b reads the checkpoint at 134 MB/s, the others 1.07 GB/s" in only(facts, "slow reading", (2,))
    else:
        assert wrong(facts) == []


# ---- the report


def test_the_report_is_whole_whatever_is_missing() -> None:
    """Facts are filled step by step, and the report may come after any of them."""
    whole = healthy()
    options = DoctorOptions(ckpt_dir="/model", output_file="/out/o.jsonl")
    names = [field.name for field in dataclasses.fields(Facts)][4:]
    for n in range(len(names) + 1):
        facts = Facts(6, 3, "srun", 20.0)
        for name in names[:n]:
            setattr(facts, name, getattr(whole, name))
        assert report(facts, options).endswith("all is well\n")
        found = json.loads(report(facts, dataclasses.replace(options, json=True)))
        assert found["ok"] and found["findings"] == []
    text = report(whole, options)
    assert "\nall-reduce of 3 ranks over gloo  latency  bandwidth\n1 KB " in text and "\n64 MB " in text
    assert len({len(line) for line in text.splitlines() if line.startswith("rank ") and "(host" in line}) == 1


def test_large_worlds_show_the_slowest_pairs_and_sizes_that_were_left_out() -> None:
    facts = healthy("a" * 20)
    facts.links[77] = dataclasses.replace(facts.links[77], bandwidth=2e9)
    facts.reductions = {rank: rows[:4] for rank, rows in facts.reductions.items()}
    text = report(facts, DoctorOptions())
    slow = facts.links[77]
    table = text[text.index("pairs over gloo") :].splitlines()
    assert table[1].startswith(f"rank {slow.a} (host a) - rank {slow.b} (host a)")
    assert "and 162 faster ones" in table and "256 KB and more were left out: they take too long" in text


def test_hosts_of_one_name_are_told_apart() -> None:
    facts = healthy("ab")
    facts.who = {rank: dataclasses.replace(card, host="gpu") for rank, card in facts.who.items()}
    assert facts.hosts() == {0: "gpu 10.0.0.0", 1: "gpu 10.0.0.1"}


def test_ranks_are_named_briefly() -> None:
    assert spans([5, 0, 1, 2]) == "0-2, 5" and spans([]) == ""
    assert name_ranks([0, 1, 2, 7], {0: "a", 1: "a", 2: "b"}) == "ranks 0-1 (host a), rank 2 (host b), rank 7"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 µs"), (1.234e-5, "12.3 µs"), (0.00099999, "1.00 ms"), (0.05, "50.0 ms"), (61, "61.0 s")],
)
def test_short_times_are_readable(seconds: float, text: str) -> None:
    assert show_time(seconds) == text

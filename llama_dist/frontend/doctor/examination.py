"""One rank's part in the examination: steps that all ranks take together, each of them bounded.

Ranks meet in the store only (parallel/roll.py), so that one that is missing or stopped keeps nobody from going on, and
its name is known. Rank 0 gathers and writes. The ranks that are left exchange messages at the end, over the backends
of a run.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llama_dist.frontend.doctor import files, here
from llama_dist.frontend.doctor.facts import Facts, Identity, Link, Look, Reading, Sight, Speed
from llama_dist.frontend.doctor.here import Outcome, attempt
from llama_dist.frontend.doctor.report import report
from llama_dist.frontend.options import DoctorOptions
from llama_dist.frontend.output import Output
from llama_dist.parallel import probe, reach
from llama_dist.parallel.launch import Launch
from llama_dist.parallel.roll import SLACK, Roll, state_of
from llama_dist.parallel.watch import Card
from llama_dist.parallel.world import model_parallel_size, open_store, pick_device, set_threads

STEP = 10.0  # seconds that rank 0 waits for the others at a step
CONNECT, CLOCK = 4.0, 1.0  # seconds for connections to all ranks; for the time of one
HANG = 8.0  # seconds for what one rank does with files, or any rank may come to a step after another
STOPPED = "it takes connections, but is stopped or is another program"
COMPILE = 12.0  # seconds for the kernels, where they are new
MESSAGE = 6.0  # seconds one message may take
PAIRS, REDUCTIONS = 8.0, 8.0  # seconds to time them


class Examination:
    """One rank's part in it. `facts` are filled on rank 0; `sound`: no exchange has broken off."""

    def __init__(self, options: DoctorOptions, launch: Launch) -> None:
        self.options, self.launch = options, launch
        size = model_parallel_size(options.run, launch)
        self.facts = Facts(launch.size, size, launch.launcher, options.timeout)
        self.facts.output = options.output_file
        self.left_behind: Path | None = None  # the file in the output's folder
        self.sound = True
        set_threads(launch)
        self.mine, self.device = here.identify(launch, lambda: pick_device(options.run, launch))
        self.facts.who[launch.rank] = self.mine

    def reach_store(self) -> bool:
        """Meet where the ranks meet. False: nobody is there, which one rank of each host reports."""
        launch, seconds = self.launch, self.options.timeout

        def meet() -> Roll:
            if launch.rank or launch.agent_store:
                reach.await_port((launch.host, launch.port), seconds)
            store = open_store(launch, datetime.timedelta(seconds=seconds))
            return Roll(store, launch.rank, launch.size)

        found = attempt(meet, seconds + SLACK, STOPPED)
        if "value" in found:
            self.roll: Roll = found["value"]
            return True
        if self.speaks_for_host():
            self.report_no_way(found["error"])
        return False

    def speaks_for_host(self) -> bool:
        """True on one rank of each host, which is not rank 0, though they have not heard of each other."""
        return self.launch.local_rank == 0 or self.launch.rank == self.launch.local_rank == 1

    def report_no_way(self, why: str) -> None:
        launch, seconds = self.launch, self.options.timeout
        where = f"rank 0 at {launch.host}:{launch.port} (MASTER_ADDR and MASTER_PORT)"
        text = f"no way to {where} in {seconds:g} s: {why}; see whether it has started, and the firewalls"
        self.facts.errors["store"] = {launch.rank: text}
        Output().write(report(self.facts, self.options))

    def share(
        self,
        step: str,
        outcome: Outcome,
        seconds: float = STEP,
        lag: float = HANG,
        everywhere: bool = False,
    ) -> dict[int, Any]:
        """A step of the roll; the values of the ranks that came and had no error, which goes among the facts.

        Rank 0 has them, and the others where `everywhere`: thousands of values are not for all to read.
        """
        self.roll.step(step, outcome, seconds, lag)
        self.facts.absent = dict(self.roll.absent)
        came = self.roll.values(step) if self.launch.rank == 0 or everywhere else {}
        for rank, found in came.items():
            if "error" in found:
                self.facts.errors.setdefault(step, {})[rank] = found["error"]
        return {rank: found["value"] for rank, found in came.items() if "error" not in found}

    # ---- the steps, in their order

    def meet(self) -> None:
        self.roll.enter()
        came = self.share("here", {"value": asdict(self.mine)}, self.options.timeout, everywhere=True)
        self.facts.who = {rank: Identity(**value) for rank, value in came.items()}

    def connect(self) -> None:
        towards = [self.facts.who[r].towards if r in self.facts.who else None for r in range(self.launch.size)]

        def open_port() -> list[Any]:
            address = reach.own_address(self.launch, towards)
            return [address, reach.listen(address)]

        ports = self.share("listen", attempt(open_port), everywhere=True)
        self.facts.addresses = {rank: address for rank, (address, _) in ports.items()}
        targets = {rank: (address, port) for rank, (address, port) in ports.items() if rank != self.launch.rank}
        failed = self.share("connect", attempt(lambda: reach.connect_all(targets, CONNECT)))
        self.facts.unreached = {(a, int(b)): why for a, found in failed.items() for b, why in found.items()}
        if self.launch.rank == 0:
            self.facts.clocks[0] = 0.0, 0.0
            for rank in self.roll.ranks:
                if rank in targets and (0, rank) not in self.facts.unreached:
                    with contextlib.suppress(OSError):  # it may be stopped: the step will tell
                        self.facts.clocks[rank] = reach.clock_offset(targets[rank], CLOCK)
        self.share("clock", {"value": None})

    def compute(self) -> None:
        made = attempt(here.kernels, COMPILE, "the compiler is slow; they are ready when they are asked for again")
        self.facts.kernels = self.share("kernels", made, COMPILE, COMPILE)
        came = self.share("compute", attempt(lambda: asdict(here.time_device(self.device))))
        self.facts.speeds = {rank: Speed(**value) for rank, value in came.items()}

    def look(self) -> None:
        """The checkpoint on every rank; the output's folder; the speed of reading, on one rank of each host."""
        path, out = self.options.ckpt_dir, self.options.output_file
        found: Outcome = {}
        if path is not None:
            found = attempt(lambda: asdict(files.look(path)), HANG)
            came = self.share("look", found)
            for rank, value in came.items():
                stamps = tuple(tuple(stamp) for stamp in value["stamps"])
                self.facts.looks[rank] = Look(**{**value, "stamps": stamps})
        if out is not None:
            self._output(out)
        if path is not None:
            hosts, heads = self.facts.hosts(), dict[str, int]()
            for rank in self.roll.ranks:
                heads.setdefault(hosts[rank], rank)
            outcome: Outcome = {"value": None}
            if self.launch.rank in heads.values() and "value" in found:
                place = list(heads.values()).index(self.launch.rank), len(heads)
                outcome = attempt(lambda: asdict(files.read(path, place)), HANG)
            came = self.share("read", outcome)
            self.facts.readings = {rank: Reading(**value) for rank, value in came.items() if value is not None}

    def _output(self, out: str) -> None:
        outcome: Outcome = {"value": None}
        if self.launch.rank == 0:
            outcome = attempt(lambda: files.put(out), HANG)
        if outcome.get("value") is not None:
            self.left_behind = Path(outcome["value"][0])
        put = self.share("put", outcome, everywhere=True).get(0)
        if put is None:
            return
        name, text = Path(put[0]).name, str(put[1])
        came = self.share("output", attempt(lambda: asdict(files.see(out, text, name)), HANG))
        self.facts.sights = {rank: Sight(**value) for rank, value in came.items()}
        self.tidy()

    def tidy(self) -> None:
        """Take away the file in the output's folder."""
        path, self.left_behind = self.left_behind, None
        if path is not None:
            attempt(lambda: path.unlink(missing_ok=True), CLOCK)

    def exchange(self) -> None:
        """Time pairs and all-reduces among the ranks that are left, where each can connect to each."""
        there = [rank for rank in self.roll.ranks if rank in self.facts.addresses]
        cuda = all(self.facts.who[rank].device == "cuda" for rank in there)
        possible = len(there) == len(self.roll.ranks) > 1 and not self.facts.unreached
        # What rank 0 has seen decides, for all.
        plan = {"value": [there if possible else [], cuda]}
        ranks, on_gpus = self.share("plan", plan, everywhere=True).get(0, ([], False))
        if not ranks:
            return
        self.facts.backend = "nccl" if on_gpus else "gloo"
        device = self.device if on_gpus else torch.device("cpu")
        outcome = attempt(lambda: self._exchange(ranks, device))
        self.sound = "error" not in outcome
        came = self.share("mesh", outcome, STEP, 2 * MESSAGE)
        for rank, (links, reductions) in came.items():
            self.facts.links += [Link(*link) for link in links]
            self.facts.reductions[rank] = [(int(size), seconds) for size, seconds in reductions]

    def _exchange(self, ranks: list[int], device: torch.device) -> list[Any]:
        whole = [list(part) for part in self.facts.replicas() if len(part) > 1 and set(part).issubset(ranks)]
        address = self.facts.addresses[self.launch.rank]
        mesh = probe.build(self.roll.store, ranks, self.launch.rank, whole, device, address, MESSAGE)
        links = probe.time_pairs(mesh, PAIRS)
        reductions = probe.time_reductions(mesh, REDUCTIONS)
        probe.leave(mesh)
        return [[[x.a, x.b, x.latency, x.bandwidth] for x in links], reductions]

    # ---- what became of those who did not come

    def look_for_absent(self) -> None:
        """Ranks of the same host look what the kernel says of them; late ones are asked who they are."""
        if self.roll.absent:
            came = self.share("absent", {"value": self.states(set(self.roll.absent).intersection(self.facts.who))})
            for found in came.values():
                self.facts.states.update({int(rank): state for rank, state in found.items()})
        if self.launch.rank == 0 and self.roll.absent:
            self.facts.late = self.roll.came_late()
            self.facts.who.update((rank, Identity(**value["value"])) for rank, value in self.roll.heard_of("here"))

    def states(self, ranks: Iterable[int]) -> dict[int, str]:
        """What ranks of this host do."""
        mine = Card(self.launch.rank, self.mine.host, self.mine.pid, self.mine.space)
        found = {}
        for rank in ranks:
            card = self.facts.who[rank]
            state = state_of(Card(rank, card.host, card.pid, card.space), mine)
            if state is not None:
                found[rank] = state
        return found

    def speak_for_rank_0(self) -> None:
        """One of the others reports that rank 0 does not answer; one of each host, where the store is silent too."""
        who, speaks, met = self.facts.who, self.roll.speaks(), self.roll.at != "here"
        if speaks is None and not met:  # as where the store never let them in
            if self.speaks_for_host():
                again = attempt(lambda: reach.await_port((self.launch.host, self.launch.port), CLOCK))
                self.report_no_way(again.get("error", STOPPED))
            return
        if speaks is None:
            speaks = self.launch.rank == min(r for r in who if r and who[r].space == self.mine.space)
        if not speaks:
            return
        self.facts.states = self.states({0}.intersection(who))
        self.facts.absent[0] = self.roll.at
        if not met:
            self.facts.who.update((rank, Identity(**value["value"])) for rank, value in self.roll.heard_of("here"))
        Output().write(report(self.facts, self.options))

    def give_up(self, message: str) -> None:
        """Rank 0's last words: all that is known, and which ranks of this host are dead or stopped."""
        self.tidy()
        self.facts.interrupted = message
        odd = {rank: state for rank, state in self.states(self.facts.who).items() if state in ("gone", "stopped")}
        self.facts.states.update(odd)
        for rank in odd:
            self.facts.absent.setdefault(rank, self.roll.at)
        Output().write(report(self.facts, self.options))

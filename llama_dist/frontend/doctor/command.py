"""`doctor`, from its flags to its exit code."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable

from llama_dist.errors import PeerLost
from llama_dist.frontend.doctor.examination import Examination
from llama_dist.frontend.doctor.report import find, report
from llama_dist.frontend.options import DoctorOptions
from llama_dist.frontend.output import Output
from llama_dist.parallel.launch import read_launch
from llama_dist.parallel.roll import LeftOut
from llama_dist.parallel.watch import Watch
from llama_dist.parallel.world import model_parallel_size

log = logging.getLogger("llama_dist")

REST = 35.0  # seconds that all steps after the roll may take; then the report is written as far as it is known


def prepare(options: DoctorOptions) -> Callable[[], int]:
    """Check the flags against the ranks that were started; the examination comes back."""
    model_parallel_size(options.run, read_launch())
    return lambda: examine(options)


def examine(options: DoctorOptions) -> int:
    """Every rank calls it alike. The exit code: 0 where all is well, 1 where something is wrong."""
    launch, watch = read_launch(), Watch.current()
    assert watch is not None
    seconds = options.timeout + REST
    timer = threading.Timer(seconds, watch.finish, (f"no end after {seconds:g} s", 1))
    timer.daemon = True
    timer.start()
    exam = Examination(options, launch)
    if not exam.reach_store():
        return leave_now(1)
    if launch.rank == 0:
        watch.at_finish(lambda message, code: exam.give_up(message))
    try:
        exam.meet()
        exam.connect()
        exam.compute()
        exam.look()
        exam.exchange()
        exam.look_for_absent()
    except LeftOut as err:
        log.info("%s", err)
    except PeerLost as err:
        log.info("%s", err)
        exam.speak_for_rank_0()
        return leave_now(1)
    code = None
    if launch.rank == 0:
        output = Output()
        output.write(report(exam.facts, options))
        code = output.exit_code or int(any(finding.wrong for finding in find(exam.facts)))
    code = exam.roll.end(code, seconds)
    timer.cancel()
    return code if exam.sound else leave_now(code)


def leave_now(code: int) -> int:
    """End here: to take down groups whose exchange broke off can abort or hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

"""`python -m llama_dist COMMAND …`, also installed as `llama_dist`."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence

from llama_dist import cli
from llama_dist.errors import ConfigError, LlamaDistError
from llama_dist.frontend.weights_ahead import bytes_ahead
from llama_dist.model import ahead
from llama_dist.parallel.launch import Launch, check_launch, read_launch

MUTE_RANK_WAITS = 1.0  # seconds; a launcher stops the other ranks when one ends, and rank 0 is to have its say first


def set_up_logging(rank: int, verbose: bool) -> None:
    """Logs go to stderr: from rank 0, and from the others only warnings unless `verbose`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"[rank {rank}] %(message)s" if rank or verbose else "%(message)s"))
    logger = logging.getLogger("llama_dist")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO if rank == 0 else logging.WARNING)


def refuse(err: LlamaDistError, rank: int, speaks: bool) -> int:
    """Say what is wrong in one line, or leave that to the rank that does. The ranks have not met yet."""
    if speaks:
        where = f"[rank {rank}] " if rank else ""
        print(f"llama_dist: error: {where}{' '.join(str(err).split())}", file=sys.stderr, flush=True)
    else:
        time.sleep(MUTE_RANK_WAITS)
    return err.exit_code


def prepare(line: cli.Line, n_ranks: int) -> Callable[[], int]:
    """`cli.prepare`, with no search for garbage among what stays (torch, the tokenizer): 0.3 s of a start."""
    gc.disable()
    try:
        return cli.prepare(line, n_ranks)
    finally:
        gc.freeze()
        gc.enable()


def begin_room(line: cli.Line, launch: Launch) -> None:
    """Have memory for the weights made ready while torch is imported, where a command is to load some."""
    if line.command not in cli.LOADING or getattr(line.options, "against", False):  # children load the models of these
        return
    try:
        size = bytes_ahead(line.options.run, getattr(line.options, "shape", None), launch)
        if size:
            ahead.begin(size)
    except (OSError, RuntimeError) as err:  # no thread, no memory: then the model gets it when it is loaded
        logging.getLogger("llama_dist").debug("no room for the weights ahead: %s", err)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, run. Returns the exit code: 0, 2 for what the user can mend, 1 for the rest."""
    # torch's C++ warns at length of connections that a failed peer closed; who failed, the watch says in one line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    rank, local_rank, speaks = 0, 0, True
    try:
        launch = read_launch()
        rank, local_rank = launch.rank, launch.local_rank
        speaks = rank == 0 and launch.attempt == 0  # of what is the same in every attempt, the first has told
        check_launch(launch)
        line = cli.parse(sys.argv[1:] if argv is None else argv)
    except ConfigError as err:
        return refuse(err, rank, speaks)
    if line.help is not None:
        if rank == 0:
            print(line.help)
        return 0
    set_up_logging(rank, line.options.run.verbose)
    try:
        begin_room(line, launch)
        work = prepare(line, launch.size)
        if line.command not in cli.ON_RANKS:
            return work()
    except LlamaDistError as err:  # files may differ from host to host: one rank of each speaks
        ahead.take(0)
        return refuse(err, rank, speaks=local_rank == 0)
    except KeyboardInterrupt:
        return 130
    from llama_dist.parallel.watch import guard  # with torch, which a refusal should not wait for

    return guard(work)


if __name__ == "__main__":
    sys.exit(main())

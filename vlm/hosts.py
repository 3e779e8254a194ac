"""Several hosts: how the processes of one run find each other, and how one of them ends without the others."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Iterator

from vlm.errors import UserError

PATIENCE = 5.0  # seconds that a host which fails waits for the others to end too


def add_host_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `connect` reads."""
    parser.add_argument(
        "--distributed", action="store_true", help="several hosts, found from the cluster (TPU pod, SLURM, Open MPI)"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="several hosts: address of the first")
    parser.add_argument("--num_processes", type=int, help="several hosts: how many")
    parser.add_argument("--process_id", type=int, help="several hosts: which one this is, from 0")


def connect(options: argparse.Namespace) -> None:
    """Joins the other hosts: named by flags or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or
    found from the cluster with `--distributed`. Without any of these the process runs alone.

    Raises:
      UserError: incomplete flags, no cluster found, or hosts that do not answer.
    """
    coordinator = options.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = _number(options.num_processes, "--num_processes", "JAX_NUM_PROCESSES")
    index = _number(options.process_id, "--process_id", "JAX_PROCESS_ID")
    if coordinator is None and not options.distributed:
        if count is not None or index is not None:
            raise UserError("--num_processes and --process_id need --coordinator=HOST:PORT")
        return
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator: expected HOST:PORT, found {coordinator!r}")
    if not options.distributed and (count is None or index is None):
        raise UserError(f"--coordinator={coordinator} needs --num_processes and --process_id (or --distributed)")
    import jax

    try:
        jax.distributed.initialize(coordinator, count, index)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"joining the other hosts failed: {error}") from None


@contextlib.contextmanager
def may_end_alone() -> Iterator[None]:
    """Around a whole command: a host that fails ends, with its message and status, although the others go on.

    They would wait for it in their next collective, and it for them when the process exits. So it waits a few seconds,
    in which hosts that fail together leave together, and is gone; the others then fail in that collective, or are ended
    by the coordinator.
    """
    try:
        yield
    except BaseException as error:
        jax = sys.modules.get("jax")
        if jax is None or not jax.distributed.is_initialized():
            raise
        leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        leaving.start()
        leaving.join(PATIENCE)
        if not leaving.is_alive():
            raise
        status = 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        elif isinstance(error.code, int):
            status = error.code
        elif error.code is not None:
            print(error.code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _number(flag: int | None, name: str, variable: str) -> int | None:
    if flag is not None or variable not in os.environ:
        return flag
    try:
        return int(os.environ[variable])
    except ValueError:
        raise UserError(f"{variable}: expected a number as for {name}, found {os.environ[variable]!r}") from None

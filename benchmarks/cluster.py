"""A Dask cluster on this machine: prints its scheduler's address, lasts until its standard input is closed.

    python cluster.py WORKERS

Each worker is a process with one thread, that has the package's imports behind it.
"""

from __future__ import annotations

import sys


def main() -> None:
    from distributed import Client, LocalCluster

    workers = int(sys.argv[1])
    with LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster:
        with Client(cluster) as client:
            client.wait_for_workers(workers)
            client.run(_import)
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()


def _import() -> None:
    pass


if __name__ == "__main__":
    main()

"""Run a command; print what it took as one JSON line: wall and CPU seconds, peak memory.

    python -S launch.py [--sample] COMMAND ...

Started by the benchmarks as a small process of its own: on Linux a new process's ru_maxrss begins
at the peak of the process that started it, so a large one would hide a small command's memory.

wall: from the start of the command to its end. cpu: user and system time of it and all its
workers. maxrss: of the largest single process (bytes). With --sample also pss: the peak, over
samples taken while it runs, of the proportional set size summed over the whole process tree, and
anonymous: that of the part of it that is no file's. Sampling slows the command: take times without.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time


def tree(pid: int) -> list[int]:
    """``pid`` and all processes under it."""
    pids = [pid]
    for parent in pids:  # grows while it is walked
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{task}/children") as children:
                    pids += map(int, children.read().split())
        except OSError:  # it has ended
            continue
    return pids


def memory(pid: int) -> tuple[int, int]:
    """Proportional set size of ``pid`` and its anonymous part, in bytes."""
    values = {}
    try:
        with open(f"/proc/{pid}/smaps_rollup") as rollup:
            for line in rollup:
                name, _, rest = line.partition(":")
                if name in ("Pss", "Pss_File"):
                    values[name] = int(rest.split()[0]) * 1024
    except OSError:  # it has ended
        pass
    return values.get("Pss", 0), values.get("Pss", 0) - values.get("Pss_File", 0)


def main() -> None:
    sample = sys.argv[1] == "--sample"
    start = time.perf_counter()
    process = subprocess.Popen(sys.argv[2 if sample else 1 :], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = anonymous = 0
    if sample:
        assert process.stderr
        os.set_blocking(process.stderr.fileno(), False)
        errors = b""
        while not (done := os.wait4(process.pid, os.WNOHANG))[0]:
            begin = time.perf_counter()
            both = [memory(pid) for pid in tree(process.pid)]
            peak = max(peak, sum(pss for pss, _ in both))
            anonymous = max(anonymous, sum(part for _, part in both))
            errors += process.stderr.read() or b""  # a full pipe would stop the command
            # The kernel walks all pages for a sample, and holds up a large process meanwhile.
            time.sleep(max(0.01, 10 * (time.perf_counter() - begin)))
        errors += process.stderr.read() or b""
    else:
        assert process.stderr
        errors = process.stderr.read()
        done = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    _, status, usage = done
    result = {
        "status": os.waitstatus_to_exitcode(status),
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "maxrss": usage.ru_maxrss * 1024,
        "stderr": errors.decode(errors="replace")[-500:],
    }
    if sample:
        result |= {"pss": peak, "anonymous": anonymous}
    print(json.dumps(result))


main()

"""What is compared: each contender is a process of its own, told through a pipe to run once more.

    python contenders.py NAME '{"files": [...], ...}'

It gets ready (imports, buffers), answers with its versions, then answers each line on its standard
input: "run" with the seconds of one run from files to singular values, "sigma" with these values of
the last run. So contenders with libraries and thread counts of their own take turns in one round.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Singular values of the last file by module, without alpha / r, which is common to all of a file.
Spectra = dict[str, list[float]]
# One run, all that is timed. What it returns gives the spectra in this form, untimed.
Run = Callable[[], Callable[[], Spectra]]

PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
PACKAGES = (
    *("msplora", "numpy", "scipy", "pandas", "torch", "safetensors"),
    *("weightwatcher", "powerlaw", "scikit-learn", "gradience"),
)
DEFAULT_BLOCK = 8 * 2**20


def pread(files: list[str], block: int = 0) -> Run:
    """Each file in turn by preadv into one reused buffer: of the largest file's size, or of ``block`` bytes."""
    buffer = bytearray(block or max(map(os.path.getsize, files)))

    def run() -> Callable[[], Spectra]:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                offset = 0
                while count := os.preadv(descriptor, [buffer], offset):
                    offset += count
            finally:
                os.close(descriptor)
        return dict

    return run


def msplora(files: list[str], workers: int) -> Run:
    """msplora_analysis, from a folder to singular values in memory; the processes are started anew each time."""
    from msplora_analysis.adapters.discovery import discover
    from msplora_analysis.compute.results import Spectra as Found
    from msplora_analysis.compute.tasks import compute
    from msplora_analysis.options import Execution, Options

    folder = os.path.commonpath([os.path.dirname(file) for file in files])

    def run() -> Callable[[], Spectra]:
        results = list(compute(discover(folder), Options(), Execution(workers, cache=False)))

        def spectra() -> Spectra:
            last = results[-1]
            if not isinstance(last, Found):
                raise RuntimeError(last)
            # lora_alpha / r is 2 in every case.
            return {row.name: (values / 2).tolist() for row, values in zip(last.rows, last.sigma, strict=True)}

        return spectra

    return run


def _torch_spectra(files: list[str], threads: int, sigma: Callable[[Any, Any], Any]) -> Run:
    import torch
    from safetensors import safe_open

    torch.set_num_threads(threads)

    def run() -> Callable[[], Spectra]:
        for file in files:
            result = {}
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (it is no dict)
                    if key.endswith(A):
                        name = key.removesuffix(A)
                        a, b = (tensors.get_tensor(name + part).float() for part in (A, B))
                        result[name.removeprefix(PREFIX)] = sigma(a, b).tolist()
        return lambda: result

    return run


def torch_qr(files: list[str], threads: int) -> Run:
    """R of the QR of both factors, then the singular values of R_b R_aᵀ, float32."""
    import torch

    def sigma(a: Any, b: Any) -> Any:
        r_a, r_b = (torch.linalg.qr(factor, mode="r").R for factor in (a.T, b))
        return torch.linalg.svdvals(r_b @ r_a.T)

    return _torch_spectra(files, threads, sigma)


def torch_dense(files: list[str], threads: int) -> Run:
    """Singular values of the product B A itself, float32."""
    import torch

    return _torch_spectra(files, threads, lambda a, b: torch.linalg.svdvals(b @ a)[: len(a)])


def weightwatcher(files: list[str]) -> Run:
    """WeightWatcher's analysis of PEFT adapters: it forms B A and takes its r largest singular values (ARPACK)."""
    import logging

    import weightwatcher as ww

    logging.disable(logging.CRITICAL)

    def run() -> Callable[[], Spectra]:
        for file in files:
            result = {}
            details = ww.WeightWatcher(model=str(Path(file).parent)).analyze(peft=True)
            for row in details.to_dict("records"):  # it tells only the ends of each spectrum
                name = row["longname"].partition(".lora_")[0].removeprefix(PREFIX)
                result[name] = [row["sv_max"], row["sv_min"]]
        return lambda: result

    return run


def gradience(files: list[str], rank: int) -> Run:
    """gradience's audit, by its Python interface and without rank policies: the least that it can do."""
    from gradience.vnext.audit import audit_lora_peft_dir

    def run() -> Callable[[], Spectra]:
        for file in files:
            result = {}
            audit = audit_lora_peft_dir(Path(file).parent, compute_udr=False, include_top_singular_values=rank)
            for layer in audit.layers:
                result[layer.name.removeprefix(PREFIX)] = layer.top_singular_values
        return lambda: result

    return run


CONTENDERS: dict[str, Callable[..., Run]] = {
    "pread": pread,
    "msplora": msplora,
    "torch-qr": torch_qr,
    "torch-dense": torch_dense,
    "weightwatcher": weightwatcher,
    "gradience": gradience,
}


def versions() -> dict[str, str]:
    """Of what this process has imported."""
    result = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        module = {"scikit-learn": "sklearn", "msplora": "msplora_analysis"}.get(package, package)
        if module in sys.modules:
            try:
                result[package] = version(package)
            except PackageNotFoundError:
                result[package] = "not installed"
    return result


def main() -> None:
    # Answers have a channel of their own: some contenders print.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    run = CONTENDERS[sys.argv[1]](**json.loads(sys.argv[2]))
    answer(versions())
    spectra: Callable[[], Spectra] = dict
    for request in sys.stdin:
        if request.strip() == "sigma":
            answer(spectra())
            continue
        start = time.perf_counter()
        spectra = run()
        answer(time.perf_counter() - start)


if __name__ == "__main__":
    main()

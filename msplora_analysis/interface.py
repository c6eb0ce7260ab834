"""The verbs of ``import msplora_analysis as ma`` that take paths, or the tables that were loaded from them.

    ma.diagnose("runs/cola")
    ma.check("adapter", "vllm")
    ma.compare("runs/cola/msplora", "runs/cola/lora")
    ma.compare(spectra, spectra, method_a="MSPLoRA 8/8/8", method_b="LoRA r=8")

They give tables that show themselves in Jupyter in words (``display``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

from msplora_analysis.adapters.discovery import as_paths
from msplora_analysis.errors import AnalysisError
from msplora_analysis.files.addresses import StrPath
from msplora_analysis.options import NO_MOMENTS, Execution, Options, Progress, changed

if TYPE_CHECKING:
    import pandas as pd

    from msplora_analysis.show.notebook import Ablation, Advice, Checks, Comparison, Findings, Moments

    Source: TypeAlias = StrPath | Iterable[StrPath] | pd.DataFrame


def diagnose(
    source: Source,
    metrics: pd.DataFrame | None = None,
    pairs: pd.DataFrame | None = None,
    *,
    scales: pd.DataFrame | None = None,
    ignore_unknown: bool = False,
    semantics: str = "paper",
    base: StrPath | None = None,
    top_k: int | None = None,
    workers: int | None = 1,
    dask: str | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> Findings:
    """What deserves a look: faults, redundancy, unused rank; one row each, the most severe first.

    Keywords that are not listed are those of ``load_tables``, for paths alone.

    Args:
        source: A path or a list of paths, as for ``load_spectra``; or the spectra table.
        metrics: Beside a spectra table, that of ``load_metrics``. Findings that need it are left out without it; paths
            need none of the three.
        pairs: Likewise that of ``load_pairs(details=True)``.
        scales: Likewise that of ``load_scale_pairs(details=True)``.
        base: The model that was trained (a folder or file), to compare the updates with its weights. Only with paths.

    Returns:
        Columns id, severity (error, warning, info), the key columns of the spectra table (empty where they do not
        apply), value, threshold, evidence, source (of the threshold), advice, details (JSON, or empty). A finding is
        evidence, no verdict.

    Raises:
        AnalysisError: the input cannot be used. A file with NaN or Inf is a finding.

    Example:
        >>> ma.diagnose("runs/cola").query("severity == 'error'")
    """
    from msplora_analysis.ask import evidence, findings
    from msplora_analysis.show.notebook import Findings

    options = Options(ignore_unknown, semantics, top_k=top_k)  # base: no adapter is read as a difference to it
    execution = Execution(workers, dask, cache, progress)
    if not _is_table(source):
        if any(table is not None for table in (metrics, pairs, scales)):
            raise AnalysisError("metrics, pairs and scales belong to a spectra table: give that first, or paths alone")
        return Findings(findings.diagnose(evidence.gather(as_paths(source), options, execution, model=base)))
    _refuse(Options(base=base), options, execution)
    return Findings(findings.diagnose(evidence.of_tables(source, metrics, pairs, scales)))


def advise(
    paths: StrPath | Iterable[StrPath],
    *,
    moments: StrPath | None = None,
    ignore_unknown: bool = False,
    semantics: str = "paper",
    workers: int | None = 1,
    cache: bool = True,
    progress: Progress | None = None,
) -> Advice:
    """What to decide on the last checkpoint of each run: did it learn, what rank does it use, which scales to keep?

    Args:
        paths: Adapters, run folders or folders of such, as for ``load_spectra``.
        moments: See ``load_tables``, as for all keywords here. Without moments most stays open; the answers say so.

    Returns:
        A list, one for each run: ``answers`` (question, answer, evidence, sure, command, value), the table ``ranks``
        (rank, parameters, megabytes, energy, task_energy, predicted_kl, kl, metric, metric_change, low, high), a table
        ``scales``, and the ``rank`` that is enough (None: not known).

    Raises:
        AnalysisError: the input cannot be used.

    Example:
        >>> (advice,) = ma.advise("runs/cola")
        >>> advice.rank, advice.ranks[["rank", "predicted_kl"]]
    """
    from msplora_analysis.ask.advice.gather import advise_all
    from msplora_analysis.show.notebook import Advice

    options = Options(ignore_unknown, semantics, moments=moments)
    return Advice(advise_all(as_paths(paths), options, Execution(workers, None, cache, progress)))


def load_ablation(paths: StrPath | Iterable[StrPath]) -> Ablation:
    """The tables of ``msplora-measure ablate`` at and under ``paths``, one row for each cut.

    Args:
        paths: Files ``ablation.parquet`` or ``ablation.csv``, or folders that hold some at any depth, such as runs.

    Returns:
        Columns run, step, task, metric_name (of what: from ablation.json beside the table; step, task and metric_name
        are empty without it); cut, what, rank, parameters, metric, metric_change, low, high, kl, predicted_kl, loss.

    Raises:
        AnalysisError: there is none, or one is something else.

    Example:
        >>> ablation = ma.load_ablation("runs/cola")
        >>> ablation[ablation["cut"] == "layer"].nlargest(3, "kl")
    """
    from msplora_analysis.show.notebook import Ablation
    from msplora_analysis.tables.ablation import load_ablation

    return Ablation(load_ablation(paths))


def load_moments(
    paths: StrPath | Iterable[StrPath],
    *,
    moments: StrPath | None = None,
    ignore_unknown: bool = False,
    workers: int | None = 1,
    cache: bool = True,
    progress: Progress | None = None,
) -> Moments:
    """What the moments of adapters at and under ``paths`` say of each module, one row each.

    Args:
        paths: As for ``load_spectra``; adapters without moments are left out.
        moments: See ``load_tables``, as for all keywords here.

    Returns:
        Columns run, step, epoch, name, rank, task_norm and task_effective_rank of the whole update; predicted_kl, what
        leaving out the module costs, and whole_kl, what leaving out the adapter costs (nats an example; of a regression
        the mean squared difference); task, loss, labels, examples, tokens: what was measured. Jupyter shows the modules
        that carry most.

    Raises:
        AnalysisError: no adapter there has moments, or they are broken or of other weights.

    Example:
        >>> ma.load_moments("runs/cola").nlargest(3, "predicted_kl")
    """
    from msplora_analysis.ask.moments import load_moments
    from msplora_analysis.show.notebook import Moments

    options = Options(ignore_unknown, moments=moments)
    return Moments(load_moments(paths, options, Execution(workers, None, cache, progress)))


def check(adapter: StrPath, reader: str | None = None, *, ignore_unknown: bool = False) -> Checks:
    """What the programs that read adapters will do with one: the scale they apply, what they refuse or leave out.

    Args:
        adapter: An adapter's folder or file, or a folder with one adapter, as for ``load_spectra``.
        reader: One of them: "vllm", "sglang", "tgi", "llama.cpp", "mlx", "diffusers", "comfyui", "peft". None: all.
        ignore_unknown: Leave out tensors that fit no part of an adapter.

    Returns:
        One row for each thing to know, the worst first: columns reader (empty: it holds for all), id, severity (error,
        warning, info), effect ("after export", "refuses it", "wrong", "in part", or empty), title, evidence, source
        (where it was looked up), remedy. ``.outcomes`` says for each reader in a word what comes of it.

    Raises:
        AnalysisError: there is no such reader, or the adapter cannot be read.

    Example:
        >>> ma.check("adapter", "vllm").query("severity == 'error'")
        >>> ma.check("adapter").outcomes["mlx"]
        'after export'
    """
    from msplora_analysis.ask import readers
    from msplora_analysis.show.notebook import Checks
    from msplora_analysis.write.source import find_adapter

    found = readers.check(find_adapter(adapter), reader, Options(ignore_unknown), str(adapter))
    return Checks.of(found, {one.name: word for one, word in readers.verdicts(found) if reader in (None, one.name)})


def compare(
    a: Source,
    b: Source,
    *,
    method_a: str | None = None,
    method_b: str | None = None,
    pairs: pd.DataFrame | None = None,
    averaging: str = "spectra",
    claim: str = "runs",
    margin: float | Mapping[str, float] | None = None,
    epoch: float | None = None,
    stack: str | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    ignore_unknown: bool = False,
    semantics: str = "paper",
    base: StrPath | None = None,
    top_k: int | None = None,
    workers: int | None = 1,
    dask: str | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Two methods: do the layers of one differ more, by how much, and is it beyond chance?

    Keywords that are not listed are those of ``load_tables``, for paths alone.

    Args:
        a: The runs of one method: paths (of adapters, or of one table that ``msplora-analyze spectra`` wrote), or a
            spectra table. Runs are paired by task and seed, as run.json or, for tables, the names of runs say.
        b: Those of the other, as ``a`` is given: both as paths, or both as tables.
        method_a: Of ``a``, keep the runs of this method, as figures call it: "LoRA r=8", "MSPLoRA 8/4/2".
        method_b: Of ``b``, likewise.
        pairs: Beside spectra tables, that of ``load_pairs(details=True)`` for the runs of both, to compare the
            directions of layers too; with ``top_k`` the smaller rank where ranks differ. Paths need none.
        averaging: "spectra" (over runs and modules, then the divergence of layers, as in the paper) or "divergences".
        claim: "runs" (what is said holds of these tasks) or "tasks" (of tasks like them; from six tasks on).
        margin: Also test whether differences are below this: of every measure, or by its name ({"js": 0.01}).
        epoch: The epoch to compare at; None: the last that all runs share.
        stack: The stack of numbered layers to compare, if there are several.
        confidence: Of the intervals, between 0 and 1.
        seed: Of random relabelling, above 15 pairs of runs.

    Returns:
        One row per question (columns: see ``ask.comparison.compare``). ``.verdict`` says in words what is decided,
        ``.sentences`` what each row says.

    Raises:
        AnalysisError: the two cannot be compared.

    Example:
        >>> ma.compare("runs/msplora", "runs/lora").verdict
    """
    from msplora_analysis.ask.comparison import compare as comparison
    from msplora_analysis.ask.comparison.sides import load_sides, side_of, told_apart
    from msplora_analysis.show.notebook import Comparison

    options = Options(ignore_unknown, semantics, base, top_k)
    execution = Execution(workers, dask, cache, progress)
    if _is_table(a) != _is_table(b):
        raise AnalysisError("give both methods as paths, or both as spectra tables")
    if _is_table(a) and _is_table(b):
        _refuse(options, execution)
        ours, theirs = side_of(a, method_a, "a", pairs=pairs), side_of(b, method_b, "b", pairs=pairs)
        sides = told_apart(ours, theirs, "a", "b")
    else:
        if pairs is not None:
            raise AnalysisError("pairs belong to spectra tables: give these, or paths alone")
        options = replace(options, moments=NO_MOMENTS)
        sides = load_sides(as_paths(a), as_paths(b), method_a, method_b, options, execution, epoch=epoch)
    found = comparison.compare(
        *sides,
        averaging=averaging,
        claim=claim,
        margin=margin,
        epoch=epoch,
        stack=stack,
        confidence=confidence,
        seed=seed,
    )
    return Comparison(found)


def _refuse(*given: Options | Execution) -> None:
    """Raise AnalysisError for what is said of reading adapters where a table is given."""
    if names := changed(*given):
        raise AnalysisError(f"{names[0]} is for reading adapters: give their paths rather than a spectra table")


def _is_table(source: object) -> TypeGuard[pd.DataFrame]:
    import pandas as pd

    return isinstance(source, pd.DataFrame)

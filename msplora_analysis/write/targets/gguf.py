"""llama.cpp: adapter.gguf with ``blk.0.attn_q.weight.lora_a`` (r, in) and ``.lora_b`` (out, r).

So convert_lora_to_gguf.py makes it. llama.cpp takes the scale as alpha / r, and as 1 where alpha is 0 (``get_scale`` in
llama-adapter.h): alpha is r where all ranks are equal, else 0. A of the token embeddings is (vocabulary, r).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from msplora_analysis.errors import AnalysisError
from msplora_analysis.write.base_model import BaseModel
from msplora_analysis.write.llama_cpp import LlamaCpp
from msplora_analysis.write.source import Source
from msplora_analysis.write.targets.protocol import Target
from msplora_analysis.write.write import DTYPES, Pair

_FILE = "adapter.gguf"


def write(folder: Path, pairs: Sequence[Pair], dtype: str, source: Source, base: BaseModel | None) -> Iterator[str]:
    model = LlamaCpp(base)
    import gguf

    kind = gguf.GGMLQuantizationType[DTYPES[dtype]]
    ranks = {len(pair.a) for pair in pairs}
    writer = gguf.GGUFWriter(folder / _FILE, model.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ranks.pop()) if len(ranks) == 1 else 0.0)
    for pair in pairs:
        name = model.name(pair.module.name)
        if pair.a.ndim != 2:
            raise AnalysisError(f"{pair.module.name}: it is a convolution, of which llama.cpp has no LoRA")
        if pair.module.is_embedding != (name == "token_embd"):
            raise AnalysisError(f"{pair.module.name}: llama.cpp calls it {name}, which it adapts in another way")
        order = model.rows(name, len(pair.b))
        a, b = (pair.a.T if pair.module.is_embedding else pair.a), (pair.b if order is None else pair.b[order])
        for factor, values in (("a", a), ("b", b)):
            values = gguf.quants.quantize(np.ascontiguousarray(values), kind)
            writer.add_tensor(f"{name}.weight.lora_{factor}", values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    yield from ()


TARGET = Target(what="an adapter of llama.cpp", files=(_FILE,), write=write, dtypes=("bfloat16", "float16", "float32"))

"""What recording moments costs beside the forward and backward passes that it needs, at the size of LLaMA-2-7B.

    python benchmarks/moments.py [--examples 512] [--length 512] [--batch 4] [--no-autocast]
    python benchmarks/moments.py --tiny       (a model of a few thousand parameters: only to see that all of it runs)

A model of that size with random bfloat16 weights, made on the device; MSPLoRA 64/32/16 on all seven linear modules,
in float32 as PEFT keeps it; gradient checkpointing, not reentrant; bfloat16 autocast, as msplora-train --precision
bf16 has it. ``alone``: the loss of the same batches, forward and backward, into the gradients of the adapter, as a
step of training does; the median of ``--alone`` batches, times the number of batches. ``moments``: record_moments with
one draw of labels, from first to last, directions and scores of the gates included. Prints JSON; memory is that of the
GPU, above the model's.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from msplora_core import MSPLoraConfig, record_moments

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GB = 2**30


def make_model(tiny: bool, device: torch.device) -> Any:
    """LLaMA-2-7B without its weights, adapted."""
    hidden, intermediate, layers, heads, vocabulary = (64, 96, 4, 4, 320) if tiny else (4096, 11008, 32, 32, 32000)
    ranks = {"global": 16, "mid": 8, "layer": 4} if tiny else {"global": 64, "mid": 32, "layer": 16}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
            vocab_size=vocabulary,
        )  # fmt: skip
        base = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    base.config.use_cache = False
    model = peft.get_peft_model(base, MSPLoraConfig(ranks=ranks, target_modules=MODULES, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=1e-3)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device).train()


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, float | None]:
    """Seconds, and the most GB of the GPU that were taken above what was taken before."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started, None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started, (torch.cuda.max_memory_allocated() - before) / GB


def main() -> None:
    """Time both, and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--alone", type=int, default=16, help="batches that forward and backward alone are timed on")
    parser.add_argument("--no-autocast", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(options.tiny, device)
    vocabulary = model.get_base_model().config.vocab_size
    ids = torch.randint(vocabulary, (options.examples, options.length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : options.length // 4] = -100  # the prompts
    batches = [
        {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": targets}
        for rows, targets in zip(ids.split(options.batch), labels.split(options.batch), strict=True)
    ]

    def step(batch: dict[str, torch.Tensor]) -> None:
        model(**{name: values.to(device) for name, values in batch.items()}).loss.backward()

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=not options.no_autocast)
    with autocast:
        step(batches[0])  # to warm up; the gradients stay
        alone = [timed(lambda batch=batch: step(batch), device) for batch in batches[: options.alone]]
        model.zero_grad()
        record_moments(model, batches[:1], draws=1)
        found: list[Any] = []
        seconds, memory = timed(lambda: found.append(record_moments(model, batches, draws=1)), device)
        end, _ = timed(lambda: record_moments(model, batches[:1], draws=1), device)
    batch_alone = statistics.median(one for one, _ in alone)
    expected = batch_alone * len(batches)
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "model": "tiny" if options.tiny else "LLaMA-2-7B, random weights, bfloat16",
        "autocast": not options.no_autocast,
        "adapter": "MSPLoRA " + ("16/8/4" if options.tiny else "64/32/16") + " on seven modules a layer",
        "modules": len(found[0].modules),
        "examples": options.examples,
        "length": options.length,
        "batch": options.batch,
        "alone_seconds_a_batch": batch_alone,
        "alone_seconds": expected,
        "moments_seconds": seconds,
        "one_batch_of_moments_seconds": end,
        "ratio": seconds / expected,
        "alone_gb": max((gb for _, gb in alone if gb is not None), default=None),
        "moments_gb": memory,
        "more_gb": None if memory is None else memory - max(gb for _, gb in alone if gb is not None),
        "processor_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "target": {"ratio": 1.1, "more_gb": 1.0},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""What SpectraCallback costs: milliseconds a call, and its part of the training time at several logging intervals.

    python benchmarks/callback.py [--calls 5] [--steps 60] [--only small|large] [--step-ms 166]

small: all-MiniLM-L6-v2 with LoRA and MSPLoRA r = 8 on query and value, trained for some steps by Trainer on the CPU
(generated sentences, batches of 64 as for CoLA); the step time is measured beside the callback's. large: modules of
the size of LLaMA-2-7B's (32 layers, q_proj and v_proj, 4096 x 4096) with LoRA and MSPLoRA r = 64, on the GPU if there
is one; nothing is trained, and the step is taken to last --step-ms (166: LLaMA-2-7B on one H100).

The first call, which warms up, is not counted. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from msplora_analysis import SpectraCallback
from msplora_analysis.live.measures import adapter_values
from msplora_analysis.live.model import active_adapters
from msplora_core import MSPLoraConfig

INTERVALS = (1, 10, 50)  # steps


def seconds(model: Any, calls: int) -> float:
    """Median of what one log costs."""
    taken = []
    for _ in range(calls + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for adapter in active_adapters(model):
            adapter_values(adapter.tensors, adapter.config)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def fill(model: nn.Module) -> None:
    """Factors as after some training: none is zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.02)


def configs(rank: int, modules: list[str]) -> dict[str, Any]:
    common = {"r": rank, "target_modules": modules, "lora_alpha": 16}
    return {"LoRA": LoraConfig(**common), "MSPLoRA": MSPLoraConfig(**common)}


def large(calls: int, step: float) -> list[tuple[str, float, float]]:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.v_proj = (
                nn.utils.skip_init(nn.Linear, 4096, 4096, bias=False, dtype=torch.bfloat16, device=device)
                for _ in range(2)
            )

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = Attention()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(32))

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for method, config in configs(64, ["q_proj", "v_proj"]).items():
        model = get_peft_model(Model(), config)
        fill(model)
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        found.append((f"LLaMA-2-7B's q, v; {method} r=64; {name}", seconds(model, calls), step))
        del model
    return found


def small(calls: int, steps: int) -> list[tuple[str, float, float]]:
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from msplora_core.data.encoding import tokenize
    from msplora_core.data.loading import load_splits
    from msplora_core.data.tasks import get_task
    from msplora_core.models import find_model, load_model

    task = get_task("acceptability")
    found = []
    for method, config in configs(8, ["query", "value"]).items():
        base, tokenizer = load_model(find_model("minilm"), task)
        model = get_peft_model(base, config)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, max_steps=steps, per_device_train_batch_size=64, logging_steps=10, report_to="none",
                disable_tqdm=True, save_strategy="no", label_names=["labels"], use_cpu=True,
            )  # fmt: skip
            callback = SpectraCallback(budget=None)
            data = tokenize(load_splits(task, None)["train"], task, tokenizer, 64)
            collate = DataCollatorWithPadding(tokenizer)
            trainer = Trainer(
                model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[callback]
            )
            start = time.perf_counter()
            trainer.train()
            step = (time.perf_counter() - start - callback.seconds) / steps
        found.append((f"MiniLM; {method} r=8; CPU", seconds(model, calls), step))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", choices=("small", "large"))
    parser.add_argument("--step-ms", type=float, default=166)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    found = small(given.calls, given.steps) if given.only != "large" else []
    found += large(given.calls, given.step_ms / 1000) if given.only != "small" else []
    print("| adapter | ms a call | ms a step |", *(f" every {n} steps |" for n in INTERVALS), " below 2 % from |")
    print("|---|---|---|" + "---|" * (len(INTERVALS) + 1))
    for name, call, step in found:
        shares = (f" {call / (n * step):.1%} |" for n in INTERVALS)
        least = int(call / (0.02 * step)) + 1
        print(f"| {name} | {1000 * call:.1f} | {1000 * step:.0f} |", *shares, f" {least} steps |")


if __name__ == "__main__":
    main()

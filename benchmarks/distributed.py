"""Training on several GPUs: memory and time with the base model sharded, and agreement with one process.

    torchrun --nproc-per-node 2 benchmarks/distributed.py                # LLaMA-2-7B's shape, base sharded (FSDP2)
    torchrun --nproc-per-node 2 benchmarks/distributed.py --whole-base   # the same, whole in every process
    torchrun --nproc-per-node 2 benchmarks/distributed.py --compare      # a small model: N processes against one
    python benchmarks/distributed.py                                     # one process, whole base

The base has random weights (bfloat16) of the real shape, MSPLoRA its ranks 64/32/16 on q_proj and v_proj as
in the paper's instruction tuning; a step is the whole batch of 4 sequences of 512 tokens in every process. Times are
medians. Every process says what it holds and needs; the adapters of all are compared at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from msplora_core import MSPLoraConfig
from msplora_core.run import distributed

SIZES: dict[str, dict[str, int]] = {
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "small": {
        "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
        "vocab_size": 2000,
    },
}  # fmt: skip
RANKS = {"global": 64, "mid": 32, "layer": 16}


def make_model(size: str, dtype: torch.dtype, checkpointing: bool) -> Any:
    """A LLaMA of that size with random weights on the CPU, adapted; the same in every process."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            base = LlamaForCausalLM(LlamaConfig(**SIZES[size], use_cache=False))
        rotary = LlamaForCausalLM(
            LlamaConfig(**SIZES[size] | {"num_hidden_layers": 0, "vocab_size": 8})
        ).model.rotary_emb
        base.to_empty(device="cpu")
        base.model.rotary_emb = rotary  # its buffers are computed, not random
        for parameter in base.parameters():
            fill = torch.ones if parameter.dim() == 1 else small_random
            parameter.data = fill(parameter.shape, dtype=dtype)
    finally:
        torch.set_default_dtype(default)
    model: Any = peft.get_peft_model(base, MSPLoraConfig(ranks=RANKS, target_modules=["q_proj", "v_proj"]))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def small_random(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    # one block of random numbers, repeated: seven thousand million draws would take minutes
    block = torch.randn(2**20, dtype=dtype) * 0.02
    return block.repeat(-(-shape.numel() // block.numel()))[: shape.numel()].reshape(shape).clone()


def prepare(model: Any, shard: bool, device: torch.device) -> nn.Module:
    if distributed.process_count() == 1:
        return model.to(device)
    if shard:
        distributed.shard_frozen(model)
    else:
        model.to(device)
    return distributed.replicate_trained(model)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> float:
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.device.type == "cuda"):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    model = make_model(arguments.size, torch.bfloat16, arguments.gradient_checkpointing)
    whole = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    wrapped = prepare(model, not arguments.whole_base, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    generator = torch.Generator().manual_seed(distributed.process_index())
    vocabulary = SIZES[arguments.size]["vocab_size"]
    tokens = torch.randint(0, vocabulary, (arguments.batch, arguments.length), generator=generator).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for _ in range(arguments.warmup + arguments.steps):
        synchronize(device)
        started = time.perf_counter()
        losses.append(step(wrapped, optimizer, tokens))
        synchronize(device)
        times.append(time.perf_counter() - started)
    return {
        "process": distributed.process_index(),
        "frozen_parameters": whole,
        "frozen_parameters_here": sum(local(p).numel() for p in model.parameters() if not p.requires_grad),
        "trained_parameters": sum(p.numel() for p in trained),
        "step_seconds": round(statistics.median(times[arguments.warmup :]), 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device.type == "cuda" else None,
        "losses": [round(losses[0], 4), round(losses[-1], 4)],
        "adapters_identical": adapters_identical(trained),
    }


def adapters_identical(trained: list[nn.Parameter]) -> bool:
    """Whether every process has the first one's trained parameters, bit by bit."""
    same = torch.ones(1, device=trained[0].device)
    if distributed.process_count() > 1:
        for parameter in trained:
            first = parameter.detach().clone()
            dist.broadcast(first, src=0)
            same *= float(torch.equal(first, parameter))
        dist.all_reduce(same, op=dist.ReduceOp.MIN)
    return bool(same.item())


def compare(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Largest differences to one process after some steps on the same whole batches, float32."""
    outcome: dict[str, Any] = {"processes": distributed.process_count(), "device": str(device)}
    vocabulary = SIZES["small"]["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    rows = 4 * distributed.process_count()
    batches = [torch.randint(0, vocabulary, (rows, 64), generator=generator).to(device) for _ in range(arguments.steps)]
    mine = slice(4 * distributed.process_index(), 4 * distributed.process_index() + 4)
    runs: dict[str, tuple[torch.Tensor, list[torch.Tensor]]] = {}
    for name in ("one", "whole", "sharded"):
        model = make_model("small", torch.float32, arguments.gradient_checkpointing)
        wrapped = model.to(device) if name == "one" else prepare(model, name == "sharded", device)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        losses = []
        for batch in batches:
            tokens = batch if name == "one" else batch[mine]
            loss = wrapped(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        total = torch.stack(losses)
        if name != "one":
            dist.all_reduce(total, op=dist.ReduceOp.SUM)
            total /= distributed.process_count()
        runs[name] = total, [p.detach().clone() for p in trained]
    for name in ("whole", "sharded"):
        outcome[name] = {
            "loss_difference": (runs[name][0] - runs["one"][0]).abs().max().item(),
            "adapter_difference": max(
                (a - b).abs().max().item() for a, b in zip(runs[name][1], runs["one"][1], strict=True)
            ),
            "adapters_identical": adapters_identical([nn.Parameter(p) for p in runs[name][1]]),
        }
    outcome["largest_adapter_value"] = max(p.abs().max().item() for p in runs["one"][1])
    outcome["losses"] = [round(loss, 4) for loss in runs["one"][0].tolist()]
    return outcome


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    if distributed.process_count() > 1:
        dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--whole-base", action="store_true", help="do not shard the base model")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compare", action="store_true", help="a small model in N processes against one")
    parser.add_argument("--batch", type=int, default=4, help="sequences in every process")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    arguments = parser.parse_args()
    distributed.join()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if arguments.compare:
        torch.backends.cuda.matmul.allow_tf32 = False
        outcome = compare(arguments, device)
        outcomes = [outcome]
    else:
        outcomes = [measure(arguments, device)]
        if distributed.process_count() > 1:
            gathered: list[Any] = [None] * distributed.process_count()
            dist.all_gather_object(gathered, outcomes[0])
            outcomes = gathered
    if distributed.is_writer():
        for outcome in outcomes:
            print(json.dumps(outcome), flush=True)
    distributed.leave()


if __name__ == "__main__":
    main()

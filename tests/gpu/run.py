"""MSPLoRA on GPUs: sharded training against training on one, quantised bases, spectra while training.

    python tests/gpu/run.py [--parts fsdp zero quantised callback commands] [--out FILE]

Parts run at once, each in processes of its own. ``fsdp`` and ``zero`` take two GPUs (without any they run on CPUs with
gloo); ``zero`` needs deepspeed, ``quantised`` bitsandbytes. Every line is a check: what, whether it holds, numbers.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

CUDA = torch.cuda.is_available()
STEPS, RANKS = 4, 2


def device(rank: int = 0) -> torch.device:
    return torch.device("cuda", rank) if CUDA else torch.device("cpu")


def tell(what: str, holds: bool, **numbers: Any) -> None:
    print(json.dumps({"check": what, "holds": bool(holds), **numbers}), flush=True)


def make_model(rank: int = 0) -> Any:
    """A small LLaMA with an MSPLoRA adapter of random values, the same in every process."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    from msplora_core import MSPLoraConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "vocab_size": 100}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    targets = ["q_proj", "v_proj", "down_proj"]
    return peft.get_peft_model(base, MSPLoraConfig(target_modules=targets, init_weights=False)).to(device(rank))


def batches(rank: int, whole: bool = False) -> Iterator[torch.Tensor]:
    """The same batches of four in every process; of a rank its half, unless it is to train on all alone."""
    for step in range(STEPS):
        batch = torch.randint(0, 100, (4, 16), generator=torch.Generator().manual_seed(step))
        yield (batch if whole else batch[2 * rank : 2 * rank + 2]).to(device(rank))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)


def train(model: nn.Module, rank: int, whole: bool = False) -> None:
    steps = optimizer(model)
    for batch in batches(rank, whole):
        model(input_ids=batch, labels=batch).loss.backward()
        steps.step()
        steps.zero_grad()


def logits(model: nn.Module, rank: int = 0) -> torch.Tensor:
    batch = torch.randint(0, 100, (4, 16), generator=torch.Generator().manual_seed(99)).to(device(rank))
    with torch.no_grad():
        return model(input_ids=batch).logits


def difference(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    if tensors.keys() != expected.keys():
        return float("inf")
    return max((tensors[key].cpu().float() - value.cpu()).abs().max().item() for key, value in expected.items())


def trained_alone(rank: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, float]:
    """Tensors and outputs after training on one device, and how far training moved them."""
    from peft import get_peft_model_state_dict

    model = make_model(rank)
    before = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    train(model, rank, whole=True)
    after = get_peft_model_state_dict(model)
    return after, logits(model, rank), difference(after, before)


def check_saved(what: str, rank: int, tensors: dict[str, torch.Tensor], alone: Any) -> None:
    """What was gathered is what one device trains, and PEFT loads it into a fresh model."""
    from peft import set_peft_model_state_dict

    expected, outputs, moved = alone
    if rank == 0:
        apart = difference(tensors, expected)
        tell(f"{what}: trained as on one device", apart < 1e-4 * moved, apart=apart, moved=moved, tensors=len(tensors))
        fresh = make_model(rank)
        set_peft_model_state_dict(fresh, {key: value.to(device(rank)) for key, value in tensors.items()})
        apart = (logits(fresh, rank) - outputs).abs().max().item()
        tell(f"{what}: loaded into a fresh model", apart < 1e-3, apart=apart)


def fsdp(rank: int) -> None:
    import torch.distributed as dist
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    alone = trained_alone(rank)
    by_layer = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    wrap = functools.partial(FullyShardedDataParallel, use_orig_params=True, device_id=device(rank))
    for what, options in {
        "FSDP1, one unit": {},
        "FSDP1, layer by layer, shard_grad_op": {
            "auto_wrap_policy": by_layer,
            "sharding_strategy": ShardingStrategy.SHARD_GRAD_OP,
        },
    }.items():
        model = wrap(make_model(rank), **options)
        train(model, rank)
        state = model.state_dict()  # gathered: all processes take part
        check_saved(what, rank, get_peft_model_state_dict(model, state_dict=state), alone)

    gathered = StateDictOptions(full_state_dict=True)
    for what, by_layers in {"FSDP2, one unit": False, "FSDP2, layer by layer, kept until backward": True}.items():
        model = make_model(rank)
        for layer in model.base_model.model.model.layers if by_layers else ():
            fully_shard(layer, reshard_after_forward=False)
        fully_shard(model)
        train(model, rank)
        state = get_model_state_dict(model, options=gathered)
        check_saved(what, rank, get_peft_model_state_dict(model, state_dict=state), alone)
        fresh = fully_shard(make_model(rank))
        set_peft_model_state_dict(fresh, alone[0])
        apart = (logits(fresh, rank) - alone[1]).abs().max().item()
        if rank == 0:
            tell(f"{what}: a file loaded into a sharded model", apart < 1e-3, apart=apart)
    dist.barrier()

    for what, shard in {
        "FSDP1": lambda model: wrap(model, auto_wrap_policy=by_layer),
        "FSDP2": lambda model: [*map(fully_shard, model.base_model.model.model.layers)] and fully_shard(model),
    }.items():
        model = shard(make_model(rank))
        try:
            model(input_ids=next(batches(rank)))
            told = ""
        except RuntimeError as error:
            told = str(error)
        if rank == 0:
            tell(f"{what}, layer by layer, sharded at once again: refused", "shard_grad_op" in told, told=told[:80])


def zero(rank: int) -> None:
    import deepspeed
    from peft import get_peft_model_state_dict

    alone = trained_alone(rank)
    for stage in (2, 3):
        model = make_model(rank)
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model), config=config)
        for batch in batches(rank):
            engine.backward(engine(input_ids=batch, labels=batch).loss)
            engine.step()
        state = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else engine.module.state_dict()
        tensors = get_peft_model_state_dict(engine.module, state_dict=state) if rank == 0 else {}
        check_saved(f"DeepSpeed ZeRO-{stage}", rank, tensors, alone)


def quantised() -> None:
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    from msplora_core import MSPLoraConfig

    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 512}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)
    batch = torch.randint(0, 512, (4, 24), generator=torch.Generator().manual_seed(0)).to(device())
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    for bits, options in {8: {"load_in_8bit": True}, 4: four}.items():
        config = BitsAndBytesConfig(**options)
        lost: dict[str, float] = {}
        for name, method in {"LoRA": peft.LoraConfig(r=14), "MSPLoRA": MSPLoraConfig(r=8)}.items():
            method.target_modules = {"q_proj", "v_proj", "down_proj"}
            base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map=device())
            model = peft.get_peft_model(peft.prepare_model_for_kbit_training(base), method)
            steps = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
            losses = []
            for _ in range(20):
                loss = model(input_ids=batch, labels=batch).loss
                loss.backward()
                steps.step()
                steps.zero_grad()
                losses.append(loss.item())
            model.eval()
            with torch.no_grad():
                adapted = model(input_ids=batch).logits
                model.merge_adapter(safe_merge=True)
                merged = model(input_ids=batch).logits
                model.unmerge_adapter()
                unloaded = model.merge_and_unload()(input_ids=batch).logits
            lost[name] = ((merged - adapted).norm() / adapted.norm()).item()
            again = ((unloaded - adapted).norm() / adapted.norm()).item()
            tell(f"{bits} bits, {name}: trains", losses[-1] < 0.95 * losses[0], first=losses[0], last=losses[-1])
            tell(f"{bits} bits, {name}: merges", lost[name] < 0.25, lost=lost[name], lost_when_unloaded=again)
        tell(f"{bits} bits: merging loses no more than LoRA's", lost["MSPLoRA"] < 1.5 * lost["LoRA"] + 0.01)


def callback() -> None:
    """Spectra of a model on the GPU are those of its copy on the CPU."""
    import copy

    import msplora_analysis as ma

    model = make_model()
    here = ma.SpectraCallback(by_module=True)._values(model)
    there = ma.SpectraCallback(by_module=True)._values(copy.deepcopy(model).cpu())
    apart = max(abs(here[name] - value) / max(abs(value), 1e-3) for name, value in there.items())
    tell("SpectraCallback on the device", here.keys() == there.keys() and apart < 1e-5, apart=apart, values=len(there))


def commands() -> None:
    """``msplora-train`` on the device: QLoRA, and MSPLoRA with spectra in the log."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.core.toys import save_data, save_model

    folder = Path(tempfile.mkdtemp())
    save_model(folder / "model")
    save_data(folder / "data")
    shared = ["--model", folder / "model", "--data-dir", folder / "data", "--task", "cola", "--epochs", "2"]
    for method, options in {"qlora": ["--rank", "4"], "msplora": ["--ranks", "8,4,2", "--log-spectra"]}.items():
        command = ["-m", "msplora_core.cli", *shared, "--method", method, *options, "--output-dir", folder / method]
        done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
        states = sorted(folder.glob(f"{method}/checkpoint-*/trainer_state.json"))
        logged = "spectra/" in states[-1].read_text() if states else False
        fine = done.returncode == 0 and len(states) > 1 and logged == (method == "msplora")
        tell(f"msplora-train --method {method}", fine, end="" if fine else (done.stdout + done.stderr)[-800:])


PARTS: dict[str, Callable[..., None]] = {
    "fsdp": fsdp, "zero": zero, "quantised": quantised, "callback": callback, "commands": commands,
}  # fmt: skip
DISTRIBUTED = {"fsdp": 29611, "zero": 29612}


def run_part(name: str, rank: int | None) -> None:
    if rank is None:
        PARTS[name]()
        return
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(DISTRIBUTED[name]), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    if CUDA:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if CUDA else "gloo", rank=rank, world_size=RANKS)
    PARTS[name](rank)
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="file for the checks, one JSON object a line")
    parser.add_argument("--seconds", type=int, default=150, help="time limit of a part")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        run_part(options.part, options.rank)
        return 0

    began = time.monotonic()
    folder = Path(tempfile.mkdtemp())
    running = []
    for part in options.parts:
        for rank in range(RANKS) if part in DISTRIBUTED else (None,):
            command = [sys.executable, "-W", "ignore", __file__, "--part", part]
            command += [] if rank is None else ["--rank", str(rank)]
            name = f"{part}-{rank or 0}"
            with (folder / f"{name}.out").open("w") as out, (folder / f"{name}.err").open("w") as err:
                running.append((name, part, subprocess.Popen(command, stdout=out, stderr=err)))
    lines, failed = [], False
    while running:
        time.sleep(0.2)
        late = time.monotonic() - began > options.seconds
        for name, part, child in [one for one in running if late or one[2].poll() is not None]:
            running.remove((name, part, child))
            if child.poll() is None:
                child.kill()
            checks = [
                json.loads(line) for line in (folder / f"{name}.out").read_text().splitlines() if line[:2] == '{"'
            ]
            if child.wait():
                end = (folder / f"{name}.err").read_text()[-1500:]
                checks.append({"check": f"{name} ended", "holds": False, "status": child.returncode, "end": end})
                for _, same, other in running:
                    if same == part:  # the others of a group would wait for ever
                        other.kill()
            failed |= not all(check["holds"] for check in checks)
            lines += [json.dumps(check) for check in checks]
            print(*map(json.dumps, checks), sep="\n", flush=True)
    where = torch.cuda.get_device_name() if CUDA else "CPU"
    print(f"{time.monotonic() - began:.0f} s on {where}, torch {torch.__version__}")
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

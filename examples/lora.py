"""LoRA with PEFT on a frozen FP8 base: the usual script, and the lines marked COAT.

    python examples/lora.py --coat lean                                          # a real model, no download: minutes
    python examples/lora.py --coat lean --compare_bf16                           # and the same on the BF16 base first
    python examples/lora.py --coat lean --model_name_or_path MODEL --dataset_name DATASET ...                # yours

By default SmolLM2-135M learns from chapters of the Python reference; their last fifth is held out. Perplexities are
those of the model with its adapters, before and after, and of the merged model that is saved, which needs neither PEFT
nor hf_coat. Every option of ``transformers.TrainingArguments`` works; without ``--coat`` the base stays BF16. Started
by ``accelerate launch`` it trains in several processes; the adapter is saved, but not merged, and memory not measured.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import transformers
from data import SMOLLM2, topics
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from perplexity import METRIC
from sft import load_model, load_text, plain_perplexity, tokenize
from transformers import HfArgumentParser, Trainer

import hf_coat  # COAT
from hf_coat import memory, report  # COAT

DEFAULTS = {
    "output_dir": "runs/lora",
    "max_steps": 40,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 4,
    "logging_steps": 10,
    "save_strategy": "no",
    "eval_on_start": True,
    "dataloader_pin_memory": torch.cuda.is_available(),
    "report_to": "none",
}


@dataclass
class ScriptArguments:
    """What to train on what.

    Args:
        model_name_or_path: A model on the Hub or in a folder; by default smollm2-135m, from a package.
        dataset_name: As in sft.py; by default the chapters of the Python reference.
        dataset_config: The dataset's configuration, where it has several.
        block_size: Tokens in a sequence; examples are packed into sequences of this length.
        held_out: How many of the held-out sequences the perplexity is measured on.
        lora_r: Rank of the adapters.
        lora_alpha: Their scaling, times the rank.
        lora_dropout: Dropout of their input.
        lora_target_modules: Names of the linears that get one; by default all but the head.
        use_dora: Train DoRA instead.
        compare_bf16: Train on the BF16 base first, with the same seed and data, and show both.
    """

    model_name_or_path: str = SMOLLM2
    dataset_name: str | None = None
    dataset_config: str | None = None
    block_size: int = 64
    held_out: int = 64
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    use_dora: bool = False
    compare_bf16: bool = False


class Run(NamedTuple):
    perplexity: tuple[float, float]  # on held-out text, before and after
    merged: float | None  # of the merged model in BF16; of several processes none has the whole model
    log: list[dict]
    memory: memory.MemoryBreakdown | None


def chapters(script_args: ScriptArguments, seed: int) -> tuple[Dataset, Dataset]:
    if script_args.dataset_name is None:
        text = Dataset.from_dict({"text": list(topics.values())})
    else:
        text = load_text(script_args.dataset_name, script_args.dataset_config)
    parts = text.train_test_split(test_size=0.2, seed=seed)
    return parts["train"], parts["test"]


def train(script_args: ScriptArguments, args: transformers.TrainingArguments) -> Run:
    transformers.set_seed(args.seed)
    text, held_out = chapters(script_args, args.seed)
    model, tokenizer = load_model(script_args.model_name_or_path, text)
    targets = script_args.lora_target_modules
    config = LoraConfig(
        r=script_args.lora_r, lora_alpha=script_args.lora_alpha, lora_dropout=script_args.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets, use_dora=script_args.use_dora,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(model, config)
    held_out = tokenize(held_out, tokenizer, script_args.block_size).shuffle(args.seed)
    trainer = Trainer(  # COAT: converts the model here
        model=model,
        args=args,
        train_dataset=tokenize(text, tokenizer, script_args.block_size),
        eval_dataset=held_out.take(min(script_args.held_out, len(held_out))),
        processing_class=tokenizer,
        data_collator=transformers.default_data_collator,
        **METRIC,
    )
    trainer.train()
    before = trainer.state.log_history[0].get("eval_perplexity", float("nan"))  # of --eval_on_start false
    after = trainer.evaluate()["eval_perplexity"]
    if trainer.is_world_process_zero():
        print(f"perplexity on held-out text, before: {before:.2f}")
        print(f"perplexity on held-out text, after: {after:.2f}", end="\n\n", flush=True)
    trainer.save_model()  # the adapter: PEFT's own files
    merged = measured = None
    if args.world_size == 1:
        measured = memory.measure(model, next(iter(trainer.get_train_dataloader())), trainer.optimizer)
        plain = model.merge_and_unload()
        hf_coat.remove_coat(plain)  # COAT
        folder = f"{args.output_dir}/merged"  # not beside the adapter, which transformers would load on top of it
        plain.save_pretrained(folder)
        merged = plain_perplexity(trainer, folder)
    return Run((before, after), merged, trainer.state.log_history, measured)


def summarize(coat: Run, bf16: Run | None) -> None:
    """Losses side by side, perplexities, and the memory of a step with both bases."""  # COAT
    rows = {"before the training, FP8 base": coat.perplexity[0]}
    if bf16 is not None:
        print(report.loss_table({"BF16 base": bf16.log, "FP8 base": coat.log}), end="\n\n")
        rows["before the training, BF16 base"] = bf16.perplexity[0]
        rows["after it, BF16 base"] = bf16.perplexity[1]
        rows["after it, BF16 base, merged"] = bf16.merged
    rows["after it, FP8 base"] = coat.perplexity[1]
    rows["after it, FP8 base, merged: transformers alone, BF16"] = coat.merged
    print("Perplexity on held-out text")
    print("\n".join(f" {name:<56}{value:>8.2f}" for name, value in rows.items()), end="\n\n")
    if bf16 is not None:
        print(report.memory_table(None, None, coat.memory, bf16.memory, baseline="BF16 base"))


def main():
    parser = HfArgumentParser((ScriptArguments, hf_coat.TrainingArguments))  # COAT: not transformers.TrainingArguments
    parser.set_defaults(**DEFAULTS)
    script_args, args = parser.parse_args_into_dataclasses()
    disable_progress_bars()  # of the data; the training keeps its own
    if args.coat is None:
        train(script_args, args)
        return
    bf16 = None
    if script_args.compare_bf16:
        if args.process_index == 0:
            print("=== BF16 base", flush=True)
        plain = dataclasses.replace(args, coat=None, optim="adamw_torch", output_dir=f"{args.output_dir}/bf16")
        bf16 = train(script_args, plain)
        if args.process_index == 0:
            print("=== FP8 base: the same model, data and seed", flush=True)
    coat = train(script_args, args)
    if args.world_size == 1:
        summarize(coat, bf16)


if __name__ == "__main__":
    main()

"""Fine-tune a causal language model with COAT: the usual Hugging Face script, and the lines marked COAT.

    python examples/sft.py --coat lean                                    # a new small Llama, Python's documentation
    python examples/sft.py --coat lean --model_name_or_path smollm2-135m --learning_rate 1e-4         # a real model
    python examples/sft.py --coat lean --model_name_or_path MODEL --dataset_name DATASET ...                # yours

The first two need no download. A dataset has rows of ``messages``, of ``prompt`` and ``completion``, or of ``text``.
Every option of ``transformers.TrainingArguments`` works. Without ``--coat`` the training is the one you know.
Started by ``accelerate launch`` it trains in several processes; the summary at the end is then left out.
"""

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from data import SMOLLM2, python_documentation, small_llama, smollm2
from datasets import Dataset, disable_progress_bars, load_dataset
from perplexity import METRIC
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer

import hf_coat  # COAT
from hf_coat import memory, report  # COAT

DEFAULTS = {
    "output_dir": "runs/sft",
    "max_steps": 120,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "logging_steps": 10,
    "save_strategy": "no",
    "eval_on_start": True,
    "dataloader_pin_memory": torch.cuda.is_available(),
    "report_to": "none",
}
LOCAL_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass
class ScriptArguments:
    """What to train on what.

    Args:
        model_name_or_path: A model on the Hub or in a folder, or smollm2-135m; by default a small Llama from scratch.
        dataset_name: A dataset on the Hub, or a .json, .jsonl, .csv, .parquet or .txt file; by default Python's
            documentation.
        dataset_config: The dataset's configuration, where it has several.
        block_size: Tokens in a sequence; examples are packed into sequences of this length.
        held_out: How many sequences of the tenth that is kept out of the training the perplexity is measured on.
        compare_bf16: Train without COAT first, with the same seed and data, and show both.
    """

    model_name_or_path: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    block_size: int = 64
    held_out: int = 128
    compare_bf16: bool = False


def load_model(name: str | None, text: Dataset):
    if name is None:
        return small_llama(text)
    if name == SMOLLM2:
        return smollm2()
    return AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16"), AutoTokenizer.from_pretrained(name)


def load_text(name: str | None, config: str | None) -> Dataset:
    if name is None:
        return python_documentation()
    kind = LOCAL_FILES.get(Path(name).suffix)
    return load_dataset(kind, data_files=name, split="train") if kind else load_dataset(name, config, split="train")


def tokenize(text: Dataset, tokenizer, block_size: int) -> Dataset:
    """Rows of ``input_ids`` and ``labels``, each ``block_size`` long; what is not to be learned has no labels."""

    def encode(row):
        if "text" in row:
            prompt, completion = "", row["text"] + tokenizer.eos_token
        elif "prompt" in row and tokenizer.chat_template is None:
            prompt, completion = row["prompt"] + "\n", row["completion"] + tokenizer.eos_token
        else:
            roles = {"user": "prompt", "assistant": "completion"}
            messages = row.get("messages") or [{"role": role, "content": row[key]} for role, key in roles.items()]
            prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            completion = tokenizer.apply_chat_template(messages, tokenize=False).removeprefix(prompt)
        given, wanted = tokenizer([prompt, completion], add_special_tokens=False)["input_ids"]
        return {"input_ids": given + wanted, "labels": [-100] * len(given) + wanted}

    def pack(rows):
        joined = {key: sum(value, []) for key, value in rows.items()}
        starts = range(0, len(joined["labels"]) - block_size + 1, block_size)
        return {key: [value[i : i + block_size] for i in starts] for key, value in joined.items()}

    return text.map(encode, remove_columns=text.column_names).map(pack, batched=True)


class Run(NamedTuple):
    perplexity: tuple[float, float]  # on held-out text, before and after
    log: list[dict]
    memory: memory.MemoryBreakdown | None  # of several processes none has the whole model


def train(script_args: ScriptArguments, args: transformers.TrainingArguments) -> tuple[Trainer, Run]:
    transformers.set_seed(args.seed)
    text = load_text(script_args.dataset_name, script_args.dataset_config)
    model, tokenizer = load_model(script_args.model_name_or_path, text)
    text = text.train_test_split(test_size=0.1, seed=args.seed)
    held_out = tokenize(text["test"], tokenizer, script_args.block_size)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=tokenize(text["train"], tokenizer, script_args.block_size),
        eval_dataset=held_out.take(min(script_args.held_out, len(held_out))),
        processing_class=tokenizer,
        data_collator=transformers.default_data_collator,
        **METRIC,
    )
    tells = trainer.is_world_process_zero()
    if tells and args.coat is not None and args.coat.model is not None:  # COAT: applied; asking again tells how
        print(report.conversion_table(hf_coat.apply_coat(model, args.coat.model).to_dict()), end="\n\n", flush=True)
    trainer.train()
    before = trainer.state.log_history[0].get("eval_perplexity", float("nan"))  # of --eval_on_start false
    after = trainer.evaluate()["eval_perplexity"]
    if tells:
        print(f"perplexity on held-out text, before: {before:.1f}")
        print(f"perplexity on held-out text, after: {after:.2f}", end="\n\n", flush=True)
    trainer.save_model()
    measured = None
    if args.world_size == 1:
        measured = memory.measure(model, next(iter(trainer.get_train_dataloader())), trainer.optimizer)
    return trainer, Run((before, after), trainer.state.log_history, measured)


def plain_perplexity(trainer: Trainer, checkpoint: str | None = None) -> float:
    """Perplexity of a saved checkpoint, by default the run's, in a process where hf_coat cannot be imported."""
    folder = Path(trainer.args.output_dir)
    trainer.eval_dataset.save_to_disk(folder / "held_out")
    program = Path(__file__).with_name("perplexity.py")
    command = [sys.executable, program, checkpoint or folder, folder / "held_out"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["perplexity"]


def summarize(trainer: Trainer, coat: Run, bf16: Run | None) -> None:
    """Losses side by side, perplexities, and the memory of a step without and with COAT."""  # COAT
    model, batch, optimizer = trainer.model, next(iter(trainer.get_train_dataloader())), trainer.args.coat.optimizer
    rows = {"before the training": coat.perplexity[0]}
    if bf16 is not None:
        print(report.loss_table({"BF16 AdamW": bf16.log, "COAT": coat.log}), end="\n\n")
        rows["after it, BF16 AdamW"] = bf16.perplexity[1]
    rows["after it, COAT"] = coat.perplexity[1]
    rows["COAT's checkpoint in transformers alone"] = plain_perplexity(trainer)
    print("Perplexity on held-out text")
    print("\n".join(f" {name:<42}{value:>8.2f}" for name, value in rows.items()), end="\n\n")
    print(
        report.memory_table(
            memory.predict(model, batch, coat=False, optimizer=None),
            memory.predict(model, batch, optimizer=optimizer),
            coat.memory,
            bf16 and bf16.memory,
        )
    )


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
            print("=== BF16 AdamW", flush=True)
        plain = dataclasses.replace(args, coat=None, optim="adamw_torch", output_dir=f"{args.output_dir}/bf16")
        _, bf16 = train(script_args, plain)
        if args.process_index == 0:
            print("=== COAT: the same model, data and seed", flush=True)
    trainer, coat = train(script_args, args)
    if args.world_size == 1:
        summarize(trainer, coat, bf16)


if __name__ == "__main__":
    main()

"""Pretrain a causal language model from scratch with COAT: the usual Hugging Face script, and the lines marked COAT.

    python examples/pretrain.py --coat lean            # 107 M parameters, 105 M tokens: minutes on an H200
    python examples/pretrain.py --coat lean --tiny     # the whole path in half a minute on a CPU

Weights are FP32 and the model computes in BF16 (``--bf16``), as is usual from scratch: the update of a BF16 weight is
often smaller than half of the distance to the next BF16 number, and lost. ``--weights_dtype bfloat16`` keeps the
weights in BF16 all the same: COAT's optimizer rounds them by chance, or remembers 8 more bits of each
(``--coat '{"optimizer": {"weights": "master"}}'``). The text is what this machine has on its
disk; its order depends on ``--data_seed`` alone, or on ``--seed`` without it. Every option of
``transformers.TrainingArguments`` works. Without ``--coat`` the training is the one you know. Started by
``accelerate launch`` it trains in several processes, ``--per_device_train_batch_size`` rows in each; memory is then
neither predicted nor measured.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
from corpus import Blocks, load_corpus, passes
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser, Trainer, TrainerCallback

import hf_coat  # COAT
from hf_coat import memory, report  # COAT

STARTED = time.monotonic()
RECORD = "run.json"
DEFAULTS = {
    "output_dir": "runs/pretrain",
    "max_steps": 1600,
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 32,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "bf16": True,
    "use_cpu": not torch.cuda.is_available(),
    "train_sampling_strategy": "sequential",  # the rows are already in their random order
    "dataloader_pin_memory": torch.cuda.is_available(),
    "logging_steps": 20,
    "logging_nan_inf_filter": False,  # it would wait for the GPU in every step
    "save_strategy": "no",
    "prediction_loss_only": True,
    "report_to": "none",
}
TINY = {
    "sizes": '{"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}',
    "corpus": "runs/corpus-tiny",
    "vocab_size": 512,
    "block_size": 64,
    "held_out_tokens": 4096,
    "megabytes": 2,
    "max_steps": 30,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 5,
    "logging_steps": 5,
}


@dataclass
class ScriptArguments:
    """What to train on what.

    Args:
        model_type: The architecture, as transformers calls it.
        sizes: What its configuration takes, as JSON; by default those of a Llama of 107 M parameters.
        text: A folder of text files; by default the sources and documentation that are on this machine.
        corpus: The folder that keeps the text as tokens.
        weights_dtype: What the parameters are kept in, float32 or bfloat16; both begin with the same numbers.
        vocab_size: Entries of the tokenizer, which is trained on the text.
        block_size: Tokens in a sequence; documents are packed into sequences of this length.
        held_out_tokens: How much text is kept out of the training for the loss at the end.
        megabytes: At most as much text is read. If that is less than is trained on, it is repeated in another order.
        corpus_only: Only encode the text: before several runs at once that share it.
        max_seconds: Stop the training this long after the start of the program and evaluate what is there; of several
            processes each would stop at another step.
        tiny: Defaults that a CPU can do.
    """

    model_type: str = "llama"
    sizes: str = (
        '{"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16, '
        '"tie_word_embeddings": true}'
    )
    text: str | None = None
    corpus: str = "runs/corpus"
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    vocab_size: int = 4096
    block_size: int = 1024
    held_out_tokens: int = 2**21
    megabytes: int = 360
    corpus_only: bool = False
    max_seconds: float | None = None
    tiny: bool = False


class Clock(TrainerCallback):
    """Takes the time at each log, which waits for the GPU anyway, and stops a training that takes too long."""

    def __init__(self, max_seconds: float | None):
        self.max_seconds, self.times = max_seconds, []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.times.append((state.global_step, time.monotonic()))

    def on_step_end(self, args, state, control, **kwargs):
        if self.max_seconds is not None and time.monotonic() - STARTED > self.max_seconds:
            control.should_training_stop = control.should_log = True

    def steps_per_second(self) -> float | None:
        """Median over the intervals between logs; the first steps, which compile and tune, are before the first."""
        pairs = zip(self.times, self.times[1:], strict=False)
        rates = [(step - before) / (now - then) for (before, then), (step, now) in pairs if step > before]
        return statistics.median(rates) if rates else None


def plain_loss(checkpoint: str, script_args: ScriptArguments) -> float:
    """Held-out loss of the saved checkpoint in BF16, in another process where hf_coat cannot be imported."""
    program = Path(__file__).with_name("held_out_loss.py")
    command = [sys.executable, program, checkpoint, script_args.corpus, str(script_args.block_size)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["loss"]


def train(script_args: ScriptArguments, args: transformers.TrainingArguments) -> None:
    if script_args.max_seconds is not None and args.world_size > 1:
        raise ValueError("--max_seconds is for one process: several have a clock each. Use --max_steps")
    with args.main_process_first():  # of several processes the first makes it, if it is not there
        text = load_corpus(
            script_args.corpus,
            script_args.text and [script_args.text],
            vocab_size=script_args.vocab_size,
            held_out_tokens=script_args.held_out_tokens,
            megabytes=script_args.megabytes,
        )
    if script_args.corpus_only:
        return
    tokens = {"vocab_size": len(text.tokenizer), "bos_token_id": None, "eos_token_id": text.tokenizer.eos_token_id}
    sizes = {"max_position_embeddings": script_args.block_size, **json.loads(script_args.sizes)}
    config = AutoConfig.for_model(script_args.model_type, **tokens, **sizes)
    transformers.set_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for p in model.parameters():  # buffers stay: positions need the float32 of the rotary embedding's
        p.data = p.data.to(getattr(torch, script_args.weights_dtype))

    blocks = len(text.training) // script_args.block_size
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = args.max_steps * rows_per_step if args.max_steps > 0 else int(args.num_train_epochs * blocks)
    order = passes(blocks, rows, args.seed if args.data_seed is None else args.data_seed)
    clock = Clock(script_args.max_seconds)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Blocks(text.training, script_args.block_size, order),
        eval_dataset=Blocks(text.held_out, script_args.block_size),
        processing_class=text.tokenizer,
        data_collator=transformers.default_data_collator,
        callbacks=[clock],
    )
    tells, several = trainer.is_world_process_zero(), args.world_size > 1
    if tells:
        print(f"{model.num_parameters() / 1e6:.1f} M parameters, {len(text.training) / 1e6:.1f} M tokens to train on")
        if args.coat is not None and args.coat.model is not None:  # COAT: applied; asking again tells how
            print(report.conversion_table(hf_coat.apply_coat(model, args.coat.model).to_dict()), end="\n\n")

    predicted = measured = None  # of several processes none has the whole model
    if args.coat is not None and not several:  # COAT
        batch = args.train_batch_size, script_args.block_size
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            predicted = (
                memory.predict(model, batch, coat=False, optimizer=None),
                memory.predict(model, batch, optimizer=args.coat.optimizer),
            )

    begun = time.monotonic()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    seconds = time.monotonic() - begun
    steps, log = trainer.state.global_step, trainer.state.log_history
    rate = clock.steps_per_second()
    record = {
        "parameters": model.num_parameters(),
        "steps": steps,
        "planned_steps": trainer.state.max_steps,
        "tokens": steps * rows_per_step * script_args.block_size,
        "passes_over_the_text": steps * rows_per_step / blocks,
        "data_sha256": trainer.train_dataset.digest.hexdigest(),
        "train_seconds": seconds,
        "tokens_per_second": rate and rate * rows_per_step * script_args.block_size,
        "peak_bytes": torch.cuda.max_memory_allocated() if args.device.type == "cuda" else None,
        "train_loss": {entry["step"]: entry["loss"] for entry in log if "loss" in entry},
        "held_out_tokens": len(trainer.eval_dataset) * script_args.block_size,
        "held_out_loss": trainer.evaluate()["eval_loss"],
    }
    trainer.save_model()
    if not several:
        measured = memory.measure(model, next(iter(trainer.get_train_dataloader())), trainer.optimizer)
    if not tells:
        return
    record["memory"] = measured and measured.to_dict()
    record["held_out_loss_bf16"] = plain_loss(args.output_dir, script_args)
    record["script"] = {name: value for name, value in vars(script_args).items() if not name.startswith("max_")}
    record["arguments"] = {name: args.to_dict()[name] for name in ("coat", "seed", "data_seed", "optim", *DEFAULTS)}
    record["corpus"] = {name: value for name, value in text.about.items() if name != "settings"}
    Path(args.output_dir, RECORD).write_text(json.dumps(record, indent=1) + "\n")

    print(f"\nheld-out loss, as trained: {record['held_out_loss']:.4f}")
    print(f"held-out loss, the checkpoint in BF16 by transformers alone: {record['held_out_loss_bf16']:.4f}")
    print(f"{record['passes_over_the_text']:.2f} passes over the text; saved in {args.output_dir}\n")
    if predicted is not None:  # COAT
        print(report.memory_table(*predicted, measured))


def main():
    parser = HfArgumentParser((ScriptArguments, hf_coat.TrainingArguments))  # COAT: not transformers.TrainingArguments
    parser.set_defaults(**DEFAULTS)
    if "--tiny" in sys.argv:
        parser.set_defaults(**TINY)
    train(*parser.parse_args_into_dataclasses())


if __name__ == "__main__":
    main()

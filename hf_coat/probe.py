"""What rounding to FP8 does to the tokens that a model's linears read, measured in the model's own forward.

    error       relative root mean square of a token's rounding, ``|Q(x) - x| / |x|``; of the two scales that a linear
                uses the worse: that of the forward, and the one that all tokens share in the weight gradient
    kurtosis    ``mean(x^4) / mean(x^2)^2`` of a token: 3 for normal values, K where one of K values is all

Both are averaged over the tokens of a modality (image or text) that a linear reads. Rounding a token that lies within
the normal numbers of E4M3 costs it 0.026 whatever its size, and outliers inside it cost its other values nothing. The
error grows where a scale is set by other tokens that are more than :math:`2^{12}` times larger, of which neither the
kurtosis nor the largest value alone tells. What is above :data:`LIMIT` stands out.
"""

import functools
from collections.abc import Iterator

import torch
from coat_kernels import Granularity, quantize
from coat_kernels.formats import scale_from_amax
from torch import nn

from .config import CoatConfig, Region
from .functional import sampled
from .modules import CoatLinear
from .policy import Policy, is_model, text_config

LIMIT = 0.04  # one and a half times what rounding costs a token that its scale fits
MODALITIES = ("image", "text")
TOKEN_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


class Probe:
    """Watches the linears of a model's regions for as long as the context lasts, without changing what they compute.

    A linear is measured the first time that it is called in a step, converted or not: the figures of one in BF16 say
    what FP8 would do to it. Measuring takes MLPs and merged linears apart, so it costs time and some memory;
    afterwards nothing is left of it.

        with Probe(model) as probe:
            model(**batch)
        probe.figures()

    Args:
        model: A model of transformers, or something around one; nothing is measured in one without regions.
        config: Whose scales are used; by default those of the "lean" preset.
    """

    def __init__(self, model: nn.Module, config: CoatConfig | None = None):
        self.model, self.config = model, CoatConfig() if config is None else config
        self.measured: dict[tuple[str, str], torch.Tensor] = {}
        self.images: torch.Tensor | None = None  # which tokens of the batch stand for images, flat
        self.handles: list = []

    def __enter__(self) -> "Probe":
        policy = Policy(self.model, self.config)
        self.regions = {
            name: policy.region(name)
            for name, module in self.model.named_modules()
            if type(module) in (nn.Linear, CoatLinear) and policy.region(name) not in (None, Region.HEAD)
        }
        for name, region in self.regions.items():
            see = functools.partial(self._see, name, region)
            self.handles.append(self.model.get_submodule(name).register_forward_pre_hook(see))
        for module in self.model.modules():  # all of them: wrappers call some past their hooks
            if self.regions and is_model(module) and text_config(module) is not None:
                self.handles.append(module.register_forward_pre_hook(self._see_batch, with_kwargs=True))
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _see_batch(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if isinstance(ids, torch.Tensor) and not ids.is_floating_point():
            images = [token for token in (getattr(module.config, key, None) for key in TOKEN_IDS) if token is not None]
            self.images = torch.isin(ids, torch.tensor(images, device=ids.device)).flatten()

    @torch.no_grad()
    def _see(self, name: str, region: Region, module: nn.Module, args: tuple) -> None:
        x = args[0]
        if any((name, modality) in self.measured for modality in MODALITIES) or not x.numel():
            return
        rows = x.detach().flatten(0, -2)
        if region is Region.LANGUAGE:
            known = self.images is not None and len(self.images) == len(rows)
            image = self.images if known else torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        else:
            image = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        low, high = rows.aminmax()
        largest = torch.maximum(-low, high).float()
        for modality, chosen in (("image", image), ("text", ~image)):
            at = chosen.nonzero().flatten()
            if len(at):
                self.measured[name, modality] = self._figures(rows[sampled(at)].float(), largest)

    def _figures(self, x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        """Error and kurtosis of tokens [T, K], in a linear whose largest value is ``largest``."""
        format, size = torch.float8_e4m3fn, x.norm(dim=1)
        shared = scale_from_amax(largest.view(1, 1), format, self.config.power_of_two)
        own = None if self.config.granularity is Granularity.TOKEN else shared
        granularity = Granularity.TOKEN if own is None else Granularity.TENSOR

        def error(granularity: Granularity, scale: torch.Tensor | None) -> torch.Tensor:
            codes, _, scale = quantize(x, format, granularity, **({} if scale is None else {"scale": scale}))
            each = (codes.float() * scale - x).norm(dim=1) / size
            return each[size > 0].square().mean().sqrt()

        errors = error(granularity, own), error(Granularity.TENSOR, shared)
        square = x.square()
        kurtosis = square.square().mean(1) / square.mean(1).square()
        return torch.stack([torch.maximum(*errors), kurtosis[size > 0].mean()]).nan_to_num()

    def figures(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Name of a linear -> modality -> error and kurtosis; of several processes the largest."""
        table = torch.zeros(len(self.regions), len(MODALITIES), 2)
        places = {(n, m): (i, j) for i, n in enumerate(self.regions) for j, m in enumerate(MODALITIES)}
        for key, figures in self.measured.items():
            table[places[key]] = figures.cpu()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            table = table.to(next(self.model.parameters()).device)
            torch.distributed.all_reduce(table, torch.distributed.ReduceOp.MAX)
        found: dict[str, dict[str, tuple[float, float]]] = {}
        for (name, modality), place in places.items():
            error, kurtosis = table[place].tolist()
            if kurtosis:
                found.setdefault(name, {})[modality] = error, kurtosis
        return found

    def by_region(self) -> dict[str, dict[str, dict[str, float]]]:
        """Region -> modality -> the means of error and kurtosis over its linears, and the largest error."""
        gathered: dict[tuple[Region, str], list[tuple[float, float]]] = {}
        for name, figures in self.figures().items():
            for modality, pair in figures.items():
                gathered.setdefault((self.regions[name], modality), []).append(pair)
        table: dict[str, dict[str, dict[str, float]]] = {}
        for (region, modality), pairs in gathered.items():
            errors, kurtoses = zip(*pairs, strict=True)
            table.setdefault(region.value, {})[modality] = {
                "error": sum(errors) / len(pairs),
                "largest_error": max(errors),
                "kurtosis": sum(kurtoses) / len(pairs),
            }
        return table

    def outstanding(self) -> Iterator[tuple[str, str]]:
        """The converted linears whose error is above :data:`LIMIT`, and why they should be in BF16."""
        for name, figures in self.figures().items():
            modality = max(figures, key=lambda m: figures[m][0])
            error, kurtosis = figures[modality]
            if error > LIMIT and isinstance(self.model.get_submodule(name), CoatLinear):
                yield name, f"in BF16: FP8 costs its {modality} tokens {error:.3f}, kurtosis {kurtosis:.0f}"

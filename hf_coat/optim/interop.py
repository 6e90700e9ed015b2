"""States of ``torch.optim.AdamW`` to those of :class:`CoatAdamW` and back, as state dicts.

    optimizer = CoatAdamW(model.parameters())
    optimizer.load_state_dict(from_adamw_state_dict(torch.load("optimizer.pt")))

Both functions only read what they are given, and need neither optimizer nor model, so a Trainer's checkpoint becomes
one that ``coat=`` resumes from by rewriting its ``optimizer.pt``. It is a function to call, not something that loading
does by itself, because it rounds: the moments go from float32 (or BF16) to 8 bits as in any step of CoatAdamW. Going
back rounds no moment; the further bits of ``weights="master"`` are not AdamW's to have, and are left out.
"""

from typing import Any

import torch
from coat_kernels.states import StateFormat, Weights, decode_moments, encode_moments

from .adamw import RESIDUAL, CoatAdamW
from .sharding import is_sharded

# What torch.optim.AdamW keeps for a group beside the settings that both have.
ADAMW_SETTINGS = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
SHARED = ("lr", "betas", "eps", "weight_decay")
SETTINGS, MOMENTS = CoatAdamW.SETTINGS, CoatAdamW.MOMENTS
PARTS = ("_codes", "_scale", "_expansion")


def _encode(state: dict[str, torch.Tensor], group: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The entries of a parameter's state that hold the moments of AdamW's ``state``."""
    shape, dtype = state["exp_avg"].shape, state["exp_avg"].dtype  # AdamW's moments are as the parameter is
    moments = [_rows(state[moment].float()) for moment in MOMENTS]
    entries = {}
    for moment, encoded in zip(
        MOMENTS, encode_moments(moments, group["group_size"], StateFormat(group["format"])), strict=True
    ):
        codes, *side = encoded
        parts = zip(PARTS, (codes.view(shape), *side), strict=True)
        entries |= {moment + part: value for part, value in parts if value is not None}
    if group["weights"] == Weights.MASTER and dtype == torch.bfloat16:
        entries[RESIDUAL] = torch.zeros(shape, dtype=torch.uint8, device=state["exp_avg"].device)
    return entries


def _decode(state: dict[str, torch.Tensor], group: dict[str, Any]) -> dict[str, torch.Tensor]:
    """AdamW's moments, float32."""
    shape = state["exp_avg_codes"].shape
    encoded = [
        (_rows(state[f"{moment}_codes"]), state[f"{moment}_scale"], state.get(f"{moment}_expansion"))
        for moment in MOMENTS
    ]
    values = decode_moments(encoded, group["group_size"], StateFormat(group["format"]))
    return {moment: value.view(shape) for moment, value in zip(MOMENTS, values, strict=True)}


def _rows(x: torch.Tensor) -> torch.Tensor:
    """A vector as a column, as CoatAdamW sees it."""
    return x.unsqueeze(-1) if x.dim() == 1 else x


def from_adamw_state_dict(state_dict: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """What :meth:`CoatAdamW.load_state_dict` takes, from ``torch.optim.AdamW(...).state_dict()``.

    Learning rate, betas, eps and weight decay go over as they are, as does what schedulers have left in the groups.

    Args:
        state_dict: Of ``torch.optim.AdamW``, its moments float32 or BF16 tensors of the parameters' shapes. One of
            ``Adam`` with no weight decay does as well.
        **settings: Settings that only CoatAdamW has, such as ``group_size``, ``format`` and ``weights``. Its
            defaults, if left out.

    Raises:
        TypeError: For a setting that CoatAdamW does not have.
        ValueError: For what is no state dict of AdamW, ``amsgrad`` or ``maximize``, weight decay that is not
            decoupled, or DTensors; with the remedy.
    """
    own = [key for key in SETTINGS if key not in SHARED]
    unknown = [key for key in settings if key not in own]
    if unknown:
        raise TypeError(f"CoatAdamW has no setting {unknown[0]!r} that AdamW lacks; those are {', '.join(own)}")
    defaults = CoatAdamW([torch.nn.Parameter(torch.empty(0))], **settings).defaults
    groups, owners = [], {}
    for i, group in enumerate(_groups(state_dict)):
        _check_adamw_group(i, group)
        kept = {key: value for key, value in group.items() if key not in ADAMW_SETTINGS}
        groups.append({**kept, **{key: defaults[key] for key in own}})
        owners |= dict.fromkeys(group["params"], groups[-1])
    states = {}
    for key, state in state_dict["state"].items():
        _check_adamw_state(key, state)
        step = torch.as_tensor(state["step"], dtype=torch.float32, device="cpu").clone()
        states[key] = {"step": step, **_encode(state, owners[key])}
    return {"state": states, "param_groups": groups}


def to_adamw_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What ``torch.optim.AdamW.load_state_dict`` takes, from ``CoatAdamW(...).state_dict()``; moments in float32.

    (As ever, AdamW casts them to the dtype of its parameters when it loads them.)

    Raises:
        ValueError: For what is no state dict of CoatAdamW, or DTensors; with the remedy.
    """
    groups, owners = [], {}
    for i, group in enumerate(_groups(state_dict)):
        if any(key not in group for key in SETTINGS):
            raise ValueError(
                f"group {i} lacks settings of CoatAdamW ({', '.join(SETTINGS)}): it is of another optimizer"
            )
        shared = {key: value for key, value in group.items() if key in SHARED or key not in SETTINGS}
        groups.append({**shared, **ADAMW_SETTINGS})
        owners |= dict.fromkeys(group["params"], group)
    states = {}
    for key, state in state_dict["state"].items():
        _check_whole(key, state)
        states[key] = {"step": state["step"].clone(), **_decode(state, owners[key])}
    return {"state": states, "param_groups": groups}


def _groups(state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise ValueError(f"the state dict lacks {' and '.join(missing)}: it is no optimizer's, or it is damaged")
    return state_dict["param_groups"]


def _check_adamw_group(i: int, group: dict[str, Any]) -> None:
    missing = [key for key in SHARED if key not in group]
    if missing:
        raise ValueError(f"group {i} lacks {', '.join(missing)}: it is not of torch.optim.AdamW")
    for key in ("amsgrad", "maximize"):
        if group.get(key):
            raise ValueError(f"group {i} has {key}=True, which CoatAdamW does not do: go on with torch.optim.AdamW")
    if group["weight_decay"] and not group.get("decoupled_weight_decay", True):
        raise ValueError(
            f"group {i} has weight_decay={group['weight_decay']} that is not decoupled, as Adam's; CoatAdamW's is as "
            "AdamW's: set it to 0, or go on with torch.optim.Adam"
        )


def _check_adamw_state(key: Any, state: dict[str, Any]) -> None:
    if "exp_avg_codes" in state:
        raise ValueError(f"the state of parameter {key} has exp_avg_codes: it is CoatAdamW's already")
    wrong = [name for name in ("step", *MOMENTS) if name not in state]
    if wrong:
        raise ValueError(f"the state of parameter {key} lacks {', '.join(wrong)}: it is not of torch.optim.AdamW")
    for moment in MOMENTS:
        if not state[moment].is_floating_point():
            raise ValueError(
                f"the state of parameter {key}: {moment} is {state[moment].dtype}, expected floating-point values: it "
                "is of an optimizer with quantized states"
            )
    _check_whole(key, state)


def _check_whole(key: Any, state: dict[str, Any]) -> None:
    if any(isinstance(value, torch.Tensor) and is_sharded(value) for value in state.values()):
        raise ValueError(
            f"the state of parameter {key} is sharded: take the whole one first, with get_optimizer_state_dict of "
            "torch.distributed.checkpoint.state_dict and StateDictOptions(full_state_dict=True)"
        )

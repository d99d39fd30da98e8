"""Is dropout after every activation, and is nothing else changed? Over whole model zoos: `make dropout-coverage`.

Each network is run before and after `insert_dropout`. What is an activation is decided here by the names of functions
and classes, not by fasthaw's own tables.
"""

import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fasthaw.dropout import InsertedDropout, insert_dropout
from fasthaw.dropout.gates import in_gates
from fasthaw.groups import SplitError
from fasthaw.splitters import split_stages

P = 0.2
NAMES = {"relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "celu", "selu", "silu", "gelu", "hardswish", "mish"}
NAMES |= {"hardtanh"}  # as which nn.ReLU6 runs
COMPOSED = {"QuickGELU", "GELUTanh", "HardMish"}  # activation classes that call none of these functions
# Torchvision's networks at 64 pixels but for those that cannot: what `create` and the input need instead.
SIZES = {"inception_v3": 299, "maxvit_t": 224}
KEYWORDS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}


@dataclass(frozen=True)
class Coverage:
    """What came out for one network; `left_out` counts the calls without dropout by the reason."""

    arch: str
    calls: int
    dropped: int
    left_out: dict[str, int]
    eval_equal: bool
    keys_same: bool
    params_same: bool
    train_differs: bool
    mean_error: float  # the largest, in standard errors of the mean
    backward: bool
    groups_same: bool | None  # None where split_stages() does not divide the network at all

    @property
    def holds(self) -> bool:
        same = self.eval_equal and self.keys_same and self.params_same and self.groups_same is not False
        counted = self.dropped + sum(self.left_out.values()) == self.calls and "unknown" not in self.left_out
        return same and counted and self.dropped > 0 and self.train_differs and self.mean_error < 6 and self.backward


def coverage(arch: str, model: nn.Module, x: Tensor) -> Coverage:
    """Insert dropout into `model` and compare it, fed with `x`, with what it was."""
    model.eval()
    groups, keys, params = _groups(model), list(model.state_dict()), [id(p) for p in model.parameters()]
    expected = _eval(model, x)
    insert_dropout(model, P)
    eval_equal = all(map(torch.equal, expected, _eval(model, x)))
    inserted = [m for m in model.modules() if isinstance(m, InsertedDropout)]
    for child in inserted:  # only these: the network's own noise stays off
        child.train()
    differs = not all(map(torch.equal, expected, _eval(model, x)))
    with _Calls(model) as seen:
        outputs = tree_leaves(model.train()(x))
    sum(y.float().square().mean() for y in outputs).backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return Coverage(
        arch=arch,
        calls=seen.calls,
        dropped=seen.dropped,
        left_out=dict(seen.left_out),
        eval_equal=eval_equal,
        keys_same=list(model.state_dict()) == keys,
        params_same=[id(p) for p in model.parameters()] == params,
        train_differs=differs,
        mean_error=seen.mean_error,
        backward=all(bool(g.isfinite().all()) for g in grads if g is not None) and any(g is not None for g in grads),
        groups_same=None if groups is None else groups == _groups(model),
    )


class _Calls(TorchFunctionMode):
    """Counts the activation calls of a forward, and those whose output goes straight into inserted dropout."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.gates = model, in_gates(model)
        self.calls, self.dropped, self.left_out, self.mean_error = 0, 0, Counter(), 0.0
        self.stack: list[nn.Module] = []
        self.waiting: tuple[Tensor, nn.Module | None] | None = None

    def __enter__(self):
        hooks = nn.modules.module
        self.handles = [
            hooks.register_module_forward_pre_hook(self.enters),
            hooks.register_module_forward_hook(self.leaves),
        ]
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        self.next_call()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "").rstrip("_") in NAMES:
            self.activation(output)
        return output

    def activation(self, output: Tensor) -> None:
        self.next_call()
        self.calls += 1
        self.waiting = output, self.stack[-1] if self.stack else None

    def next_call(self) -> None:
        """What the activation before did not get by now, it will not get."""
        if self.waiting:
            module = self.waiting[1]
            self.left_out["in a gate" if id(module) in self.gates else "unknown"] += 1
        self.waiting = None

    def enters(self, module, args):
        self.stack.append(module)

    def leaves(self, module, args, output):
        self.stack.pop()
        if type(module).__name__ in COMPOSED:
            self.activation(output)
        if not isinstance(module, InsertedDropout):
            return
        assert self.waiting is not None and args[0] is self.waiting[0], "dropout after what is no activation"
        self.dropped, self.waiting = self.dropped + 1, None
        self.mean_error = max(self.mean_error, _mean_error(module, args[0].detach(), output.detach()))


def _mean_error(module: InsertedDropout, x: Tensor, y: Tensor) -> float:
    """How far the mean of `y` is from that of `x`, in standard errors: what is dropped together is one draw."""
    x, y = x.double(), y.double()
    by_channel = module.kind == "channel" or (module.kind == "auto" and x.dim() >= 4)
    draws = x.flatten(2).sum(2) if by_channel and x.dim() > 2 else x
    error = (module.p / (1 - module.p) * draws.square().sum()).sqrt() / x.numel()
    return ((y.mean() - x.mean()).abs() / error).item() if error > 0 else 0.0


def _eval(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return tree_leaves(model(x))


def _groups(model: nn.Module) -> list | None:
    try:
        return [(g.name, [id(p) for p in g.params()]) for g in split_stages().groups(model)]
    except SplitError:
        return None


def torchvision_case(arch: str) -> tuple[str, nn.Module, Tensor]:
    """A torchvision classifier with random weights, and a batch that is as small as it takes."""
    size, keywords = SIZES.get(arch, 64), dict(KEYWORDS.get(arch, {}))
    if arch.startswith("vit_"):
        size = 56 if arch == "vit_h_14" else 64
        keywords["image_size"] = size
    return _case(arch, lambda: torchvision.models.get_model(arch, weights=None, **keywords), size)


def timm_case(arch: str, size: int) -> tuple[str, nn.Module, Tensor]:
    """The same of timm."""
    import timm

    return _case(arch, lambda: timm.create_model(arch), size)


def _case(arch: str, make, size: int) -> tuple[str, nn.Module, Tensor]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make()
    for p in model.parameters():
        if not p.any():  # a head or a last norm that starts at 0 would hide all that comes before it
            nn.init.normal_(p, std=0.02)
    return arch, model, torch.randn(2, 3, size, size)


# The smallest quick model of each of timm's families (its modules), by the input size it takes.
TIMM_BY_SIZE = {
    56: ("deepseek_vit_412m "),
    64: (
        "convmixer_768_32 convnext_atto cpubone_nano cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny densenet121 "
        "dla46_c dpn48b edgenext_xx_small efficientvim_m1 efficientvit_b0 ese_vovnet19b_slim_dw fasternet_t0 "
        "fastvit_t8 focalnet_tiny_srf gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0 hrnet_w18_small "
        "iformer_t inception_next_atto lcnetv2_small legacy_seresnet18 legacy_xception lowformer_b0 mambaout_femto "
        "mobilenetv3_small_050 mobilenetv5_base mobileone_s1 mobilevit_xxs naflexvit_base_patch16_gap nasnetalarge "
        "nextvit_small nf_regnet_b0 pnasnet5large poolformer_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_004_tv "
        "repghostnet_050 repvit_m1 res2next50 resnest14d resnet18 resnetv2_18 rexnet_100 sam2_hiera_tiny "
        "selecsls42 shvit_s1 skresnet18 starnet_s050 tiny_vit_5m_224 tinynet_e tresnet_m vgg11 xception41p "
    ),
    128: ("inception_resnet_v2 inception_v3 inception_v4 "),
    224: (
        "beit_base_patch16_224 cait_xxs24_224 coat_tiny convit_tiny deit_tiny_patch16_224 efficientformer_l1 "
        "efficientformerv2_s0 efficientvit_m0 eva02_tiny_patch14_224 gcvit_xxtiny gmlp_ti16_224 hiera_tiny_224 "
        "levit_128 mvitv2_tiny nest_tiny pit_ti_224 samvit_base_patch16_224 sequencer2d_s swiftformer_xs "
        "swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 tnt_s_legacy_patch16_224 twins_svt_small visformer_tiny "
        "vit_small_r26_s32_224 vit_srelpos_small_patch16_224 vit_tiny_patch16_224 vitamin_small_224 volo_d1_224 "
        "xcit_nano_12_p8_224 "
    ),
    240: ("crossvit_tiny_240 "),
    256: ("eca_botnext26ts_256 maxvit_pico_rw_256 swinv2_tiny_window8_256 "),
}
TIMM = {arch: size for size, names in TIMM_BY_SIZE.items() for arch in names.split()}


def row(c: Coverage) -> str:
    """One line of the table."""
    marks = "".join("-".rjust(w) if ok is None else "yes".rjust(w) if ok else "NO".rjust(w) for ok, w in _marks(c))
    why = ", ".join(f"{n} {reason}" for reason, n in c.left_out.items())
    return f"{c.arch:28}{c.calls:6}{c.dropped:8}{marks}{c.mean_error:7.1f}  {why}"


HEAD = (
    f"{'network':28}{'calls':>6}{'dropped':>8}{'eval=':>7}{'keys=':>7}{'train!=':>8}{'backward':>10}{'groups=':>9}"
    f"{'mean':>7}  left out"
)


def _marks(c: Coverage) -> list[tuple[bool | None, int]]:
    return [
        (c.eval_equal, 7),
        (c.keys_same and c.params_same, 7),
        (c.train_differs, 8),
        (c.backward, 10),
        (c.groups_same, 9),
    ]


def main(wanted: list[str]) -> int:
    """Print the table; the exit code is 1 where something does not hold."""
    vision = torchvision.models.list_models(module=torchvision.models)
    cases = [(a, torchvision_case, ()) for a in vision] + [(a, timm_case, (size,)) for a, size in TIMM.items()]
    cases = [case for case in cases if not wanted or case[0] in wanted]
    began, results = time.perf_counter(), []
    print(HEAD)
    for arch, make, size in cases:
        results.append(coverage(*make(arch, *size)))
        print(row(results[-1]), flush=True)
    bad = [c.arch for c in results if not c.holds]
    calls, dropped = sum(c.calls for c in results), sum(c.dropped for c in results)
    print(f"{len(results)} networks, {calls} activation calls, {dropped} followed by dropout, the rest in gates;")
    print(f"what does not hold: {', '.join(bad) or 'nothing'} ({time.perf_counter() - began:.0f} s)")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

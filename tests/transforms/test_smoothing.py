"""The scales of SmoothQuant: the formula by a loop over channels, and what it promises."""

from pathlib import Path

import pytest
import torch
from basis_cases import in_basis, original, tiny_layout
from safetensors.torch import load_file
from torch import Tensor

from jointq_cli.models.checkpoint import SINGLE, Checkpoint
from jointq_cli.models.streamed import BlockwiseModel, StreamedModel
from jointq_cli.system.tensor_files import save_tensors
from jointq_cli.transforms.activation_samples import ActivationSamples, collect_samples
from jointq_cli.transforms.basis import Basis
from jointq_cli.transforms.merge_check import check_invariance, write_rotated
from jointq_cli.transforms.settings import SmoothQuant
from jointq_cli.transforms.smoothing import mlp_scales, value_scales

pytestmark = pytest.mark.usefixtures("no_gradients")

HEADS, KV_HEADS, HEAD_DIM, WIDTH, BLOCKS = 8, 2, 16, 128, 3  # groups of 4: not as many as there are KV heads
WINDOWS = torch.randint(3, 256, (3, 24), generator=torch.Generator().manual_seed(1))


def grouped(root: Path, family: str = "llama") -> StreamedModel:
    return original(root, family, num_attention_heads=HEADS, head_dim=HEAD_DIM)


def smoothing(alpha: float) -> SmoothQuant:
    return SmoothQuant(alpha=alpha, o_proj=True, down_proj=True)


def magnitudes(directory: Path) -> ActivationSamples:
    """Largest magnitudes over five decades."""
    generator = torch.Generator().manual_seed(0)
    samples = ActivationSamples(directory, BLOCKS)
    for block in range(BLOCKS):
        sizes = {"o_proj_max": HEADS * HEAD_DIM, "down_proj_max": WIDTH}
        samples.write(block, {name: 10 ** (5 * torch.rand(n, generator=generator) - 3) for name, n in sizes.items()})
    return samples


def weight_of(model: StreamedModel, block: int, layer: str) -> Tensor:
    name = f"{model.prefix(block)}{layer}.weight"
    return model.checkpoint.read([name])[name].double()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_scales_are_those_of_the_formula_channel_by_channel(
    family: str, alpha: float, root: Path, tmp_path: Path
) -> None:
    model = grouped(root, family)
    samples = magnitudes(tmp_path)
    values = value_scales(model, tiny_layout(model), samples, smoothing(alpha))
    inner = mlp_scales(model, tiny_layout(model), samples, smoothing(alpha))
    assert (values.shape, values.dtype) == ((BLOCKS, KV_HEADS, HEAD_DIM), torch.float64)
    assert (inner.shape, inner.dtype) == ((BLOCKS, WIDTH), torch.float64)
    for block in range(BLOCKS):
        given = {name: tensor.tolist() for name, tensor in samples.read(block).items()}
        o_proj, down_proj = (weight_of(model, block, name) for name in ("self_attn.o_proj", "mlp.down_proj"))
        for j in range(WIDTH):
            expected = given["down_proj_max"][j] ** alpha / float(down_proj[:, j].abs().max()) ** (1 - alpha)
            assert float(inner[block, j]) == pytest.approx(expected, rel=1e-6)
        for kv_head in range(KV_HEADS):
            for dim in range(HEAD_DIM):
                group = range(4 * kv_head, 4 * kv_head + 4)  # query heads that read these values
                channels = [head * HEAD_DIM + dim for head in group]
                x = max(given["o_proj_max"][channel] for channel in channels)
                w = max(float(o_proj[:, channel].abs().max()) for channel in channels)
                expected = x**alpha / w ** (1 - alpha)
                assert float(values[block, kv_head, dim]) == pytest.approx(expected, rel=1e-6)


def test_alpha_zero_looks_at_weights_alone_and_alpha_one_at_activations_alone(root: Path, tmp_path: Path) -> None:
    model = grouped(root)
    samples = magnitudes(tmp_path)
    largest = samples.read(1)["down_proj_max"].double()
    weight = weight_of(model, 1, "mlp.down_proj").abs().amax(dim=0)
    for alpha, expected in ((0.0, 1.0 / weight), (1.0, largest)):
        found = mlp_scales(model, tiny_layout(model), samples, smoothing(alpha))[1]
        torch.testing.assert_close(found, expected)


def test_half_way_activations_and_weights_are_equally_large(root: Path, tmp_path: Path) -> None:
    model = grouped(root)
    samples = magnitudes(tmp_path)
    s = value_scales(model, tiny_layout(model), samples, smoothing(0.5))
    t = mlp_scales(model, tiny_layout(model), samples, smoothing(0.5))
    for block in range(BLOCKS):
        given = samples.read(block)
        weight = weight_of(model, block, "mlp.down_proj").abs().amax(dim=0)
        torch.testing.assert_close(given["down_proj_max"].double() / t[block], weight * t[block])
        # Scales of values are one for a group, whose largest magnitudes then agree.
        shape = (KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
        x = given["o_proj_max"].double().reshape(shape).amax(dim=1)
        w = weight_of(model, block, "self_attn.o_proj").abs().amax(dim=0).reshape(shape).amax(dim=1)
        torch.testing.assert_close(x / s[block], w * s[block])


def with_dead_columns(model: StreamedModel, columns: list[int]) -> StreamedModel:
    path = model.checkpoint.directory / SINGLE
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[:, columns] = 0.0
    save_tensors(path, tensors)
    return StreamedModel(Checkpoint(path.parent), model.device, model.dtype)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_channels_keep_scales_that_can_be_divided_by(alpha: float, tmp_path: Path) -> None:
    """Dead in the activations (0, 1), in the weights (1, 2) of all heads of a group; the model stays the same."""
    model = with_dead_columns(grouped(tmp_path), [head * HEAD_DIM + dim for head in range(4) for dim in (1, 2)])
    samples = magnitudes(tmp_path)
    for block in range(BLOCKS):
        given = {name: tensor.clone() for name, tensor in samples.read(block).items()}
        for tensor in given.values():
            tensor[[head * HEAD_DIM + dim for head in range(4) for dim in (0, 1)]] = 0.0
        samples.write(block, given)
    s = value_scales(model, tiny_layout(model), samples, smoothing(alpha))
    t = mlp_scales(model, tiny_layout(model), samples, smoothing(alpha))
    for scales in (s, t):
        assert bool((scales.isfinite() & (scales >= 1e-5) & (scales <= 1e7)).all())
    rotated = in_basis(model, Basis(value_scales=s, mlp_scales=t), tmp_path / "smooth")
    merged = write_rotated(rotated, WINDOWS[:1], lambda: None)
    assert check_invariance(model, tmp_path / "smooth", merged, WINDOWS[:1]).merge <= 5e-6


@pytest.mark.parametrize("family", ["llama", "llama_bias", "phi3"])
def test_activations_of_the_smoothed_model_are_the_old_ones_over_the_scales(
    family: str, root: Path, tmp_path: Path
) -> None:
    model = grouped(root, family)
    layout = tiny_layout(model)

    def observed(seen: BlockwiseModel, directory: Path) -> ActivationSamples:
        directory.mkdir()
        samples = ActivationSamples(directory, BLOCKS)
        collect_samples(seen, layout, WINDOWS, 3, 16, samples, lambda: None, lambda: None)
        return samples

    before = observed(model, tmp_path / "before")
    s = value_scales(model, layout, before, smoothing(0.5))
    t = mlp_scales(model, layout, before, smoothing(0.5))
    smooth = in_basis(model, Basis(value_scales=s, mlp_scales=t), tmp_path / "smooth")
    after = observed(BlockwiseModel(smooth, model.device, torch.float32), tmp_path / "after")
    for block in range(BLOCKS):
        old, new = before.read(block), after.read(block)
        by_group = old["o_proj_max"].reshape(KV_HEADS, -1, HEAD_DIM) / s[block][:, None]
        torch.testing.assert_close(new["o_proj_max"], by_group.flatten().float(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            new["down_proj_max"], (old["down_proj_max"] / t[block]).float(), rtol=1e-4, atol=1e-6
        )
    again = mlp_scales(BlockwiseModel(smooth, model.device, torch.float32), layout, after, smoothing(0.5))
    torch.testing.assert_close(again, torch.ones_like(again), rtol=1e-4, atol=0)  # nothing is left to smooth

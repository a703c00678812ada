"""What the reservoir keeps is what modules were given in plain transformers, the same tokens however they come."""

from pathlib import Path

import pytest
import torch
from basis_cases import original, tiny_layout
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from jointq_cli.models.streamed import StreamedModel
from jointq_cli.transforms.activation_samples import ActivationSamples, collect_samples, rms_normalize

pytestmark = pytest.mark.usefixtures("no_gradients")

# No token twice: those of the first block are known by their rows.
WINDOWS = 3 + torch.randperm(253, generator=torch.Generator().manual_seed(1))[:120].reshape(5, 24)
ALL = WINDOWS.numel()
SITES = {
    "attention": "input_layernorm",
    "mlp": "post_attention_layernorm",
    "o_proj": "self_attn.o_proj",
    "down_proj": "mlp.down_proj",
}


def sampled(
    model: StreamedModel, directory: Path, tokens: int, batch: int = 5, windows: Tensor = WINDOWS
) -> list[dict[str, Tensor]]:
    directory.mkdir()
    samples = ActivationSamples(directory, len(model))
    collect_samples(model, tiny_layout(model), windows, batch, tokens, samples, lambda: None, lambda: None)
    return [samples.read(block) for block in range(len(model))]


def given(model: StreamedModel, names: dict[str, str]) -> list[dict[str, Tensor]]:
    """Per block, all that its modules are given by plain transformers: site -> (tokens, channels)."""
    module = AutoModelForCausalLM.from_pretrained(model.checkpoint.directory)
    found: list[dict[str, Tensor]] = [{} for _ in range(len(model))]
    for block, seen in enumerate(found):
        for site, name in names.items():
            module.get_submodule(f"{model.prefix(block)}{name}").register_forward_pre_hook(
                lambda _, args, seen=seen, site=site: seen.update({site: args[0].flatten(0, 1)})
            )
    module(WINDOWS)
    return found


def places(rows: Tensor, among: Tensor) -> list[int]:
    """Which of the rows `among` each row is. Fails where it is none of them."""
    distances, nearest = torch.cdist(rows.double(), among.double()).min(dim=1)
    assert bool((distances <= 1e-4 * among.double().norm(dim=1)[nearest]).all())
    return nearest.tolist()


def of_rms_one(rows: Tensor) -> Tensor:
    return rows / rows.square().mean(dim=-1, keepdim=True).sqrt()


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_kept_rows_are_what_the_modules_were_given_at_rms_one_where_a_norm_is(
    family: str, root: Path, tmp_path: Path
) -> None:
    model = original(root, family)
    for kept, truth in zip(sampled(model, tmp_path / "kept", 30), given(model, SITES), strict=True):
        for site in SITES:
            rows = kept[site]
            of_norm = site in ("attention", "mlp")
            found = places(rows, of_rms_one(truth[site]) if of_norm else truth[site])
            assert len(found) == 30
            assert found == sorted(set(found)), site  # no token twice, and in the order of the text
            if of_norm:
                torch.testing.assert_close(rows.square().mean(dim=1), torch.ones(30), rtol=1e-5, atol=0)


def test_rows_of_a_norm_times_its_gain_are_what_its_readers_are_given(root: Path, tmp_path: Path) -> None:
    model = original(root)
    readers = {"attention": "self_attn.q_proj", "mlp": "mlp.up_proj"}
    kept = sampled(model, tmp_path / "kept", ALL)
    for block, (rows, truth) in enumerate(zip(kept, given(model, readers), strict=True)):
        for site in readers:
            name = f"{model.prefix(block)}{SITES[site]}.weight"
            gain = model.checkpoint.read([name])[name]
            torch.testing.assert_close(rows[site] * gain, truth[site], rtol=1e-4, atol=1e-4)


def test_the_same_tokens_are_kept_whatever_the_batch_size(root: Path, tmp_path: Path) -> None:
    model = original(root)
    whole = sampled(model, tmp_path / "5", 30, batch=5)
    for batch in (1, 2, 3):  # 5 windows: the last batch is a smaller one
        for ours, theirs in zip(sampled(model, tmp_path / str(batch), 30, batch), whole, strict=True):
            assert ours.keys() == theirs.keys()
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_the_same_tokens_are_kept_each_time_and_others_at_every_site(root: Path, tmp_path: Path) -> None:
    model = original(root)
    once, again = (sampled(model, tmp_path / name, 30) for name in ("once", "again"))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(once, again, strict=True) for name in a)
    truth = given(model, SITES)
    chosen = {
        tuple(places(kept[site], of_rms_one(seen[site]) if site in ("attention", "mlp") else seen[site]))
        for kept, seen in zip(once, truth, strict=True)
        for site in SITES
    }
    assert len(chosen) == len(model) * len(SITES)


def test_tokens_come_from_the_whole_text_and_not_only_from_its_beginning(root: Path, tmp_path: Path) -> None:
    model = original(root)
    truth = given(model, {"o_proj": SITES["o_proj"]})
    counts = torch.zeros(5)
    for kept, seen in zip(sampled(model, tmp_path / "kept", 30), truth, strict=True):
        windows = torch.tensor(places(kept["o_proj"], seen["o_proj"])) // 24
        assert windows.max() == 4
        counts += windows.bincount(minlength=5)
    assert bool((counts >= 9).all())  # 18 on average


def test_where_there_are_fewer_tokens_all_are_kept_in_their_order(root: Path, tmp_path: Path) -> None:
    model = original(root)
    for kept, truth in zip(sampled(model, tmp_path / "kept", 10 * ALL, batch=2), given(model, SITES), strict=True):
        torch.testing.assert_close(kept["down_proj"], truth["down_proj"], rtol=1e-4, atol=1e-5)
        assert len(kept["attention"]) == ALL


@pytest.mark.parametrize("family", ["llama", "phi3", "olmo2"])
def test_the_largest_magnitude_is_that_of_all_tokens_and_not_of_those_kept(
    family: str, root: Path, tmp_path: Path
) -> None:
    model = original(root, family)
    layers = {site: SITES[site] for site in ("o_proj", "down_proj")}
    for kept, truth in zip(sampled(model, tmp_path / "kept", 4, batch=2), given(model, layers), strict=True):
        for site in layers:
            largest = kept[f"{site}_max"]
            torch.testing.assert_close(largest, truth[site].abs().amax(dim=0), rtol=1e-4, atol=1e-6)
            assert bool((kept[site].abs().amax(dim=0) < largest).any())


def test_norms_after_the_layers_are_no_sites(root: Path, tmp_path: Path) -> None:
    layers = {"o_proj", "o_proj_max", "down_proj", "down_proj_max"}
    for family, norms in (("llama", {"attention", "mlp"}), ("gemma2", {"attention", "mlp"}), ("olmo2", set[str]())):
        kept = sampled(original(root, family), tmp_path / family, 4)
        assert all(set(block) == layers | norms for block in kept), family


def test_what_r1_learns_from_are_both_norms_of_all_blocks(root: Path, tmp_path: Path) -> None:
    model = original(root)
    kept = sampled(model, tmp_path / "kept", 30)
    residual = ActivationSamples(tmp_path / "kept", len(model)).residual()
    assert residual.shape == (2 * len(model), 30, 64)
    for block, rows in enumerate(kept):
        assert torch.equal(residual[2 * block], rows["attention"])
        assert torch.equal(residual[2 * block + 1], rows["mlp"])


def test_rows_keep_the_dtype_of_the_forward_pass(root: Path, tmp_path: Path) -> None:
    (kept, *_) = sampled(original(root, dtype=torch.bfloat16), tmp_path / "kept", 4)
    assert {name: rows.dtype for name, rows in kept.items()} == {
        **dict.fromkeys(SITES, torch.bfloat16),
        "o_proj_max": torch.float32,
        "down_proj_max": torch.float32,
    }


def test_the_walk_tells_of_its_blocks_and_batches_and_leaves_no_hook_when_it_is_stopped(
    root: Path, tmp_path: Path
) -> None:
    model = original(root)
    reached: list[str] = []

    def walk(stop_after: int) -> None:
        def pause() -> None:
            reached.append("batch")
            if len(reached) == stop_after:
                raise KeyboardInterrupt

        collect_samples(
            model,
            tiny_layout(model),
            WINDOWS,
            2,
            4,
            ActivationSamples(tmp_path, 3),
            lambda: reached.append("block"),
            pause,
        )

    walk(stop_after=0)
    assert reached == 3 * ["batch", "batch", "batch", "block"]
    reached.clear()
    with pytest.raises(KeyboardInterrupt):
        walk(stop_after=6)
    assert not any(module._forward_pre_hooks for module in model.module.modules())
    assert all(parameter.is_meta for parameter in model.module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_of_any_size_has_rms_one_and_one_of_zeros_stays_so(dtype: torch.dtype) -> None:
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows *= torch.tensor([1e-2, 1.0, 1e4], dtype=dtype)[:, None]
    found = rms_normalize(torch.cat([rows, torch.zeros(1, 64, dtype=dtype)]))
    assert found.dtype == dtype
    torch.testing.assert_close(found[:3].float().square().mean(dim=1), torch.ones(3), rtol=1e-2, atol=0)
    assert bool((found[3] == 0).all())
    norm = nn.RMSNorm(64, eps=0.0, elementwise_affine=False)
    torch.testing.assert_close(found[:3].float(), norm(rows.float()), rtol=1e-2, atol=1e-5)

"""Names, groups and owners, by hand and by properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msplora_core.tuners.msplora.pyramid import ModuleAddress, assign_owners, contiguous_groups, parse_module_name


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("bert.encoder.layer.3.attention.self.query", ModuleAddress("bert.encoder.layer", 3, "query")),
        ("model.layers.31.self_attn.q_proj", ModuleAddress("model.layers", 31, "q_proj")),
        ("transformer.h.0.attn.c_attn", ModuleAddress("transformer.h", 0, "c_attn")),
        # digits inside a component are not a layer number
        ("wav2vec2.encoder.layers.11.attention.q_proj", ModuleAddress("wav2vec2.encoder.layers", 11, "q_proj")),
        ("bert4rec.block7.layers.5.fc1", ModuleAddress("bert4rec.block7.layers", 5, "fc1")),
        # T5 and mixtures of experts hold two numbers: the first is the layer's
        ("decoder.block.4.layer.1.EncDecAttention.q", ModuleAddress("decoder.block", 4, "q")),
        ("model.layers.2.mlp.experts.7.up_proj", ModuleAddress("model.layers", 2, "up_proj")),
        ("net.2", ModuleAddress("net", 2, "net")),
    ],
)
def test_module_names(name: str, address: ModuleAddress) -> None:
    assert parse_module_name(name) == address


@pytest.mark.parametrize("name", ["bert.pooler.dense", "wav2vec2.projection", "fc1"])
def test_unnumbered_module_is_an_error_that_says_what_to_do(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' has no layer number.*exclude_modules"):
        parse_module_name(name)


@pytest.mark.parametrize(
    ("layers", "sizes"),
    [(6, [2, 2, 2]), (7, [3, 2, 2]), (12, [4, 4, 4]), (30, [10, 10, 10]), (32, [11, 11, 10])],
)
def test_group_sizes(layers: int, sizes: list[int]) -> None:
    groups = contiguous_groups(range(layers), 3)
    assert [list(groups.values()).count(group) for group in range(3)] == sizes
    assert list(groups.values()) == sorted(groups.values())


@given(st.sets(st.integers(0, 200), min_size=1), st.integers(1, 9))
def test_groups_are_contiguous_and_even(layers: set[int], number: int) -> None:
    groups = contiguous_groups(list(layers), number)
    in_order = [groups[layer] for layer in sorted(layers)]
    assert in_order == sorted(in_order)
    sizes = [in_order.count(group) for group in range(min(number, len(layers)))]
    assert sum(sizes) == len(layers)
    assert max(sizes) - min(sizes) <= 1


def test_owner_is_the_first_module_that_uses_the_pair() -> None:
    shapes = {f"enc.layer.{i}.{m}": (8, 8) for i in range(7) for m in ("query", "value")}
    owners = assign_owners(shapes, mid_groups=3)
    assert owners["enc.layer.6.value"] == {
        "global": "enc.layer.0.value",
        "mid": "enc.layer.5.value",
        "layer": "enc.layer.6.value",
    }
    assert owners["enc.layer.2.query"]["mid"] == "enc.layer.0.query"
    assert owners["enc.layer.3.query"]["mid"] == "enc.layer.3.query"


def test_stacks_types_and_shapes_have_pyramids_of_their_own() -> None:
    shapes = {f"{stack}.{i}.{m}": (8, 8) for stack in ("encoder", "decoder") for i in range(3) for m in "qv"}
    shapes |= {f"encoder.{i}.out.q": (16, 8) for i in range(3)}  # same type, other shape
    owners = assign_owners(shapes, mid_groups=3)
    assert len({owner["global"] for owner in owners.values()}) == 5


def test_fewer_layers_than_groups_is_told() -> None:
    with pytest.warns(UserWarning, match="mid_groups=3, but only 2 layers of 'h'"):
        owners = assign_owners({"h.0.q": (4, 4), "h.1.q": (4, 4)}, mid_groups=3)
    assert owners["h.1.q"] == {"global": "h.0.q", "mid": "h.1.q", "layer": "h.1.q"}

"""Which layouts there are, and that the few chosen stand for all in the way promised."""

from itertools import combinations

import pytest

from models.moe_config import MoEConfig
from pretrain.config import PretrainConfig, TrainConfig
from pretrain.config_rules import validate
from pretrain.layouts import (
    Layout,
    each_value_once,
    legal_layouts,
    one_of_each_size,
    pairwise_cover,
)
from tests.parity import MODEL, variant

EXPERTS = variant(moe=MoEConfig(num_experts=4))


def config(model=MODEL, **train) -> PretrainConfig:
    return PretrainConfig(model=model, train=TrainConfig(global_batch_size=8, **train))


def names(layouts: list[Layout]) -> list[str]:
    return [layout.name for layout in layouts]


def test_all_layouts_of_two_ranks() -> None:
    found = names(list(legal_layouts(config(), max_ranks=2)))
    sizes = ["single", "dp2", "cp2 comm:all_gather", "cp2 comm:a2a", "pp2", "pp2 vpp2"]
    expected = [
        f"{size} zero:{zero}"
        for size in [*sizes, "tp2", "tp2 sp"]
        for zero in ("off", "on", "overlap")
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("model", [MODEL, EXPERTS])
def test_every_layout_is_what_its_values_say_and_accepted(model) -> None:
    for layout in legal_layouts(config(model), max_ranks=4):
        place = validate(
            PretrainConfig(
                model=model, parallel=layout.parallel, train=TrainConfig(global_batch_size=8)
            ),
            layout.world_size,
        )
        assert layout.values["dp"] == str(place.data_parallel_size)
        assert layout.values["tp"] == str(place.tensor_model_parallel_size)
        assert layout.values["ep"] == str(place.expert_model_parallel_size)


def test_what_validate_refuses_is_left_out() -> None:
    by_batch = {layout.values["dp"] for layout in legal_layouts(config(micro_batch_size=4))}
    assert by_batch == {"1", "2"}  # 8 sequences in micro-batches of 4
    by_heads = {layout.values["tp"] for layout in legal_layouts(config())}
    assert by_heads == {"1", "2", "4"}
    by_experts = {layout.values["ep"] for layout in legal_layouts(config(EXPERTS))}
    assert by_experts == {"1", "2", "4"}


@pytest.mark.parametrize("model", [MODEL, EXPERTS])
def test_every_pair_of_values_that_occurs_is_covered(model) -> None:
    layouts = list(legal_layouts(config(model), max_ranks=4))
    cover = pairwise_cover(layouts)

    def pairs(layouts: list[Layout]) -> set:
        return {
            pair for layout in layouts for pair in combinations(sorted(layout.values.items()), 2)
        }

    assert pairs(cover) == pairs(layouts)
    assert len(cover) < len(layouts) / 3
    assert names(pairwise_cover(layouts)) == names(cover)  # the same choice each time


def test_each_value_once() -> None:
    layouts = list(legal_layouts(config(), max_ranks=4))
    chosen = each_value_once(layouts)
    for axis in layouts[0].values:
        everywhere = {layout.values[axis] for layout in layouts}
        assert {layout.values[axis] for layout in chosen} == everywhere
    assert max(layout.world_size for layout in chosen if layout.values["tp"] == "2") == 2


def test_one_of_each_size_takes_the_kinds_in_turn() -> None:
    layouts = list(legal_layouts(config(), max_ranks=8))
    chosen = one_of_each_size(layouts)
    sizes = ("tp", "sp", "pp", "vpp", "cp", "dp")
    combined = [tuple(layout.values[axis] for axis in sizes) for layout in chosen]
    everywhere = {tuple(layout.values[axis] for axis in sizes) for layout in layouts}
    assert len(combined) == len(set(combined)) and set(combined) == everywhere
    assert {layout.values["zero"] for layout in chosen} == {"off", "on", "overlap"}
    assert {layout.values["comm"] for layout in chosen} == {"-", "all_gather", "a2a"}

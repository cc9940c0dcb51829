"""RankLayout against megatron-core's own generator of groups."""

import itertools

import pytest

from parallel.config import ConfigError, ParallelConfig
from parallel.rank_layout import Coordinates, RankLayout


def layout(tp: int, cp: int, dp: int, pp: int) -> RankLayout:
    return RankLayout(
        world_size=tp * cp * dp * pp,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        pipeline_model_parallel_size=pp,
    )


@pytest.mark.filterwarnings("ignore")  # megatron-core misses Transformer Engine, and says so
def test_groups_are_those_of_megatron_core() -> None:
    from megatron.core.parallel_state import RankGenerator

    for tp, cp, dp, pp in itertools.product((1, 2, 3, 8), (1, 2), (1, 2, 3), (1, 2, 4)):
        ours = layout(tp, cp, dp, pp)
        theirs = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
        for count in (1, 2, 3):
            for axes in itertools.combinations(("tp", "cp", "dp", "pp"), count):
                assert ours.groups(*axes) == theirs.get_ranks("-".join(axes)), (tp, cp, dp, pp)


@pytest.mark.filterwarnings("ignore")
def test_groups_of_experts_are_those_of_megatron_core() -> None:
    from megatron.core.parallel_state import RankGenerator

    names = {"etp": "tp", "ep": "ep", "edp": "dp", "pp": "pp"}
    for etp, ep, edp, pp in itertools.product((1, 2, 3), (1, 2, 4), (1, 2, 3), (1, 2, 4)):
        ours = RankLayout(
            world_size=etp * ep * edp * pp,
            pipeline_model_parallel_size=pp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
        )
        assert ours.expert_sizes == (etp, ep, edp, pp)
        theirs = RankGenerator(tp=etp, ep=ep, dp=edp, pp=pp, cp=1, order="tp-cp-ep-dp-pp")
        for count in (1, 2, 3):
            for axes in itertools.combinations(names, count):
                expected = theirs.get_ranks("-".join(names[axis] for axis in axes))
                assert ours.groups(*axes) == expected, (etp, ep, edp, pp)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"expert_model_parallel_size": 4}, "must divide the 2 ranks .* divisors are 1, 2"),
        (
            {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
            "expert_tensor_parallel_size=2 must divide the 2 ranks .* a multiple of 8 processes",
        ),
    ],
)
def test_experts_that_do_not_fit_a_stage(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RankLayout(world_size=4, pipeline_model_parallel_size=2, **sizes)


def test_coordinates_and_rank_are_inverse() -> None:
    places = layout(2, 2, 3, 4)
    assert places.coordinates(0) == Coordinates(tp=0, cp=0, dp=0, pp=0)
    assert places.coordinates(1) == Coordinates(tp=1, cp=0, dp=0, pp=0)  # tensor varies fastest
    assert places.coordinates(47) == Coordinates(tp=1, cp=1, dp=2, pp=3)
    for rank in range(places.world_size):
        assert places.rank(**places.coordinates(rank)._asdict()) == rank


def test_groups_in_numbers() -> None:
    places = layout(tp=2, cp=1, dp=2, pp=2)
    assert places.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert places.groups("dp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert places.groups("pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert places.groups("tp", "pp") == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert places.group_of(6, "dp") == [4, 6]


def test_data_parallel_size_is_what_is_left() -> None:
    config = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=4)
    assert RankLayout.of(config, world_size=32).data_parallel_size == 4
    assert RankLayout.of(config, world_size=32).sizes == Coordinates(tp=2, cp=1, dp=4, pp=4)


@pytest.mark.parametrize(
    ("world_size", "words"),
    [(6, "start 4 or 8 "), (3, "start 4 "), (1, "1 process was started; start 4 ")],
)
def test_a_world_that_does_not_divide(world_size: int, words: str) -> None:
    config = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    with pytest.raises(ConfigError, match=words) as caught:
        RankLayout.of(config, world_size)
    assert "parallel.tensor_model_parallel_size=2" in str(caught.value)
    assert "parallel.pipeline_model_parallel_size=2" in str(caught.value)


def test_context_parallel_size_is_named_where_it_counts() -> None:
    with pytest.raises(ConfigError, match="context_parallel_size=2"):
        RankLayout(world_size=3, context_parallel_size=2)


def test_sizes_below_one() -> None:
    with pytest.raises(ConfigError, match="world_size=0 must be 1 or more"):
        RankLayout(world_size=0)


def test_wrong_questions() -> None:
    places = layout(2, 1, 1, 1)
    with pytest.raises(ValueError, match="rank 2 is not among the 2 ranks"):
        places.coordinates(2)
    for axes in (("tensor",), ("tp", "ep")):
        with pytest.raises(ValueError, match=f"no group runs along {', '.join(axes)}"):
            places.groups(*axes)

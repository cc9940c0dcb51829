import torch

from models.xpos import rotary_table, rotate, xpos_decay, xpos_tables


def scores(query: torch.Tensor, key: torch.Tensor, tables, dtype=torch.complex128):
    """Score of one query/key pair placed at every pair of positions: [s, s]."""
    length = tables[0].shape[0]
    spread = [x.double().expand(length, 1, 1, -1) for x in (query, key)]
    pairs = [
        torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2))) * t.to(dtype)[:, None, None]
        for x, t in zip(spread, tables, strict=True)
    ]
    rotated = [torch.view_as_real(p).flatten(-2)[:, 0, 0] for p in pairs]
    return rotated[0] @ rotated[1].T


def test_decay_of_the_paper() -> None:
    expected = torch.tensor([0.285714, 0.308036, 0.330357, 0.352679], dtype=torch.float64)
    assert torch.allclose(xpos_decay(64)[:4], expected, atol=5e-7)
    assert abs(float(xpos_decay(64)[-1]) - 0.977679) < 5e-7
    assert abs(float(xpos_decay(128)[-1]) - 0.988839) < 5e-7
    # at distance 1024 the first pair has decayed to ζ_0² = 0.081633
    query, key = xpos_tables(torch.tensor([1024, 0]), 64)
    assert abs(float((query[0] * key[1].conj())[0].abs()) - 0.081633) < 5e-7


def test_scores_depend_on_the_distance_only_and_not_on_the_centre() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(16), torch.randn(16)
    positions = torch.arange(40)
    plain = scores(query, key, xpos_tables(positions, 16))
    for distance in range(-39, 40):
        diagonal = plain.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), rtol=1e-9)
    shifted = scores(query, key, xpos_tables(positions + 1000, 16))
    centred = scores(query, key, xpos_tables(positions, 16, centre=20))
    assert torch.allclose(plain, shifted, rtol=1e-9)
    assert torch.allclose(plain, centred, rtol=1e-9)


def test_xpos_without_its_scale_is_rope() -> None:
    positions = torch.arange(30)
    query, key = xpos_tables(positions, 16)
    rope = rotary_table(positions, 16)
    assert torch.allclose(query / query.abs(), rope)
    assert torch.allclose(key / key.abs(), rope)


def test_rotation_is_the_interleaved_one() -> None:
    """[x0, x1] at angle a becomes [x0 cos a - x1 sin a, x1 cos a + x0 sin a], pair by pair."""
    x = torch.randn(5, 2, 3, 8)
    table = rotary_table(torch.arange(5), 8).to(torch.complex64)
    angle = table.angle()[:, None, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    expected = torch.stack(
        [even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], -1
    )
    assert torch.allclose(rotate(x, table), expected.flatten(-2), atol=1e-6)


def test_rotation_keeps_the_type() -> None:
    table = rotary_table(torch.arange(4), 8).to(torch.complex64)
    assert rotate(torch.randn(4, 1, 2, 8, dtype=torch.bfloat16), table).dtype is torch.bfloat16

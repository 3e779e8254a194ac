"""The momentum teacher, the queue and the contrastive loss against their definitions written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm.errors import UserError
from vlm.models.blip import momentum
from vlm.models.blip.matching import hard_negatives, pick

RNG = np.random.default_rng(0)


def unit(*shape):
    x = RNG.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def by_hand(query, teacher, keys, queue, temperature, weight, group, ids=None, queue_ids=None):
    """One row, one candidate at a time, in float64."""
    total = 0.0
    for b in range(len(query)):
        first = b // group * group
        candidates = np.concatenate([keys[first : first + group], queue]).astype(np.float64)
        targets = np.zeros(len(candidates))
        if ids is None:
            targets[b - first] = 1
        else:
            equal = np.concatenate([ids[first : first + group], queue_ids]) == ids[b]
            targets = equal / equal.sum()
        targets = weight * softmax(candidates @ teacher[b] / temperature) + (1 - weight) * targets
        assert abs(targets.sum() - 1) < 1e-9
        total -= targets @ np.log(softmax(candidates @ query[b] / temperature))
    return total / len(query)


@pytest.mark.parametrize("group", [4, 2])
@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_contrastive_targets_of_four_rows_and_a_queue_of_eight(group, weight):
    query, teacher, keys, queue = unit(4, 6), unit(4, 6), unit(4, 6), unit(8, 6)
    arguments = query, teacher, keys, queue, 0.07, weight, group
    found = momentum.itc(*map(jnp.asarray, arguments[:6]), group)
    np.testing.assert_allclose(found, by_hand(*arguments), rtol=2e-6)


@pytest.mark.parametrize("group", [4, 2])
def test_equal_ids_share_the_target_evenly(group):
    query, teacher, keys, queue = unit(4, 6), unit(4, 6), unit(4, 6), unit(8, 6)
    ids, queue_ids = np.array([7, 3, 7, 5]), np.array([3, 3, -100, 7, -100, 1, 2, 3])
    grouped = ids.reshape(-1, group)
    here = (grouped[:, :, None] == grouped[:, None]).reshape(4, group)
    there = ids[:, None] == queue_ids[None]
    arguments = query, teacher, keys, queue, 0.1, 0.3, group
    found = momentum.itc(*map(jnp.asarray, arguments[:6]), group, (jnp.asarray(here), jnp.asarray(there)))
    np.testing.assert_allclose(found, by_hand(*arguments, ids, queue_ids), rtol=2e-6)


def test_gradients_flow_through_the_students_similarities_only():
    arrays = [jnp.asarray(unit(*shape)) for shape in ((4, 6), (4, 6), (4, 6), (8, 6))]

    def value(query, teacher, keys, queue, temperature):
        return momentum.itc(query, teacher, keys, queue, temperature, 0.4, 4)

    query, *constants, temperature = jax.grad(value, range(5))(*arrays, jnp.float32(0.1))
    assert all(float(jnp.abs(x).max()) == 0 for x in constants) and float(jnp.abs(query).max()) > 1e-3

    def student_only(t):  # the teacher's similarities stay at 0.1
        q, m, k, old = (np.asarray(x, np.float64) for x in arrays)
        candidates = np.concatenate([k, old])
        rows = []
        for b in range(4):
            targets = 0.4 * softmax(candidates @ m[b] / 0.1) + 0.6 * np.eye(12)[b]
            rows.append(-targets @ np.log(softmax(candidates @ q[b] / t)))
        return np.mean(rows)

    slope = (student_only(0.1 + 1e-5) - student_only(0.1 - 1e-5)) / 2e-5
    np.testing.assert_allclose(temperature, slope, rtol=1e-4)


def test_the_queue_wraps_around():
    queue, ids, index = jnp.zeros((8, 2)), jnp.full((8,), -100), jnp.int32(0)
    expected = np.full(8, -100)
    extra = {"queue": queue, "ids": ids, "queue_index": index, "step": jnp.int32(0)}
    for step in range(5):  # three at a time: the third and the sixth batch go around the end
        new = np.arange(3) + 10 * (step + 1)
        expected[(3 * step + np.arange(3)) % 8] = new
        rows = jnp.asarray(new, jnp.float32)[:, None] * jnp.ones((1, 2))
        extra = momentum.advance(extra, {"queue": rows, "ids": jnp.asarray(new)})
        np.testing.assert_array_equal(extra["ids"], expected)
    np.testing.assert_array_equal(extra["queue"][:, 1], expected)
    assert int(extra["queue_index"]) == 15 % 8 and int(extra["step"]) == 5
    with pytest.raises(UserError, match="expected at least the batch of 9, found 8"):
        momentum.advance(extra, {"queue": jnp.zeros((9, 2))})


def test_alpha_rises_linearly_and_stays():
    steps = jnp.array([0, 1, 5, 10, 11, 10_000])
    found = [float(momentum.alpha(step, 0.4, 10)) for step in steps]
    np.testing.assert_allclose(found, [0.0, 0.04, 0.2, 0.4, 0.4, 0.4], rtol=1e-6)
    assert float(momentum.alpha(jnp.int32(0), 0.4, 0)) == pytest.approx(0.4)


def test_the_teacher_is_a_moving_average():
    teacher, student = {"a": {"b": jnp.array([1.0, 2.0])}}, {"a": {"b": jnp.array([3.0, 2.0]), "c": jnp.ones(1)}}
    moved = momentum.update_teacher(teacher, student, 0.995)
    np.testing.assert_allclose(moved["a"]["b"], [1.01, 2.0], rtol=1e-6)
    whole = momentum.with_teacher(moved, student)
    assert whole["a"]["b"] is moved["a"]["b"] and float(whole["a"]["c"][0]) == 1


def test_negatives_follow_their_weights_and_are_never_the_own_pair():
    scores = jnp.array([[5.0, 0.0, 1.0], [0.0, 9.0, 0.0], [2.0, 0.0, 7.0]])
    draw = jax.jit(jax.vmap(lambda key: hard_negatives(key, scores, ~jnp.eye(3, dtype=bool))))
    drawn, valid = draw(jax.random.split(jax.random.key(0), 10_000))
    assert bool(valid.all()) and not bool((drawn == jnp.arange(3)[None]).any())
    share = np.mean(np.asarray(drawn) == 2, axis=0)
    expected = np.array([np.e / (1 + np.e), 0.5, 0.0])
    np.testing.assert_allclose(share, expected, atol=0.02)


def test_a_row_without_candidates_is_said_to_have_none():
    allowed = jnp.array([[False, False], [True, False]])
    drawn, valid = hard_negatives(jax.random.key(0), jnp.zeros((2, 2)), allowed)
    assert valid.tolist() == [False, True] and drawn.tolist() == [0, 0]


def test_negatives_come_from_the_rows_own_group():
    x = jnp.arange(12.0).reshape(6, 2)
    np.testing.assert_array_equal(pick(x, jnp.array([1, 0, 2, 0, 0, 1]), 3)[:, 0], [2, 0, 4, 6, 6, 8])
    for group in (4, 1):
        with pytest.raises(UserError, match=f"a divisor of the batch of 6 above 1, found {group}"):
            momentum.in_groups(x, group)
